"A training that was killed goes on, and ends as one that was not."
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TIMES, learner
from forked import run_python
from safetensors.torch import load_file, save_file

from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_json, write_json
from fastsmile.training.resume import STATE_FILE, StateSaver, read_state
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.training.learner import train_learner

pytestmark = pytest.mark.usefixtures('no_charts_in_module')  # nothing here looks at a run's charts


class Stopped(BaseException): pass


def same_history(a, b):
    drop = [c for c in a if c in TIMES]
    pd.testing.assert_frame_equal(a.drop(columns=drop), b.drop(columns=drop), check_exact=True)


def stop_after(epochs: int, monkeypatch):
    "The training ends as a kill would end it, right after the state of that epoch is written"
    written = StateSaver.after_epoch
    def after_epoch(self):
        written(self)
        if len(self.learn.history.rows) == epochs and self.learn.history.trained: raise Stopped
    monkeypatch.setattr(StateSaver, 'after_epoch', after_epoch)


def trained(data, config, path, resume=False):
    "History and weights of a training alone"
    learn = learner(data, config, path)
    told, _ = train_learner(learn, config, path, resume)
    return pd.DataFrame(learn.history.rows), learn.model.state_dict(), told['phases'], told['best_epoch']


@pytest.mark.parametrize('options,epochs', [
    (dict(epochs=3, freeze_epochs=2, lr='find', ema=0.9, clip=1.0, dropout=0.2), 1), (dict(epochs=2, freeze_epochs=2, lr='auto'), 2),
    (dict(epochs=3, accumulate=2, schedule='flat-cosine', augment='medium+cutmix'), 2),
    (dict(epochs=2, accumulate=3), 1), (dict(epochs=4, schedule='plateau:1', loss='soft-f1'), 3),
    (dict(epochs=6, patience=2, lr='1e-5'), 2), (dict(epochs=2), 2)])
def test_the_history_is_that_of_an_unbroken_training(data, tiny, tmp_path, monkeypatch, options, epochs):
    config = replace(tiny, **options)
    whole = trained(data, config, tmp_path/'whole')
    with monkeypatch.context() as m:
        stop_after(epochs, m)
        with pytest.raises(Stopped): trained(data, config, tmp_path/'cut')
    torch.rand(7), np.random.rand(3)  # another process has other generators
    cut = trained(data, config, tmp_path/'cut', resume=True)
    same_history(cut[0], whole[0])
    assert all(v.equal(cut[1][k]) for k, v in whole[1].items()) and cut[2:] == whole[2:]


@pytest.fixture(scope='module')
def refitted(faces, tiny, tmp_path_factory):
    "An unbroken run with a refit"
    return fit(faces, replace(tiny, tta='none', epochs=2, refit_all=True, out=str(tmp_path_factory.mktemp('refitted')/'whole')))


@pytest.mark.parametrize('epochs', [1, 3])
def test_a_run_with_a_refit_goes_on(faces, refitted, tmp_path, monkeypatch, epochs):
    whole, config = refitted, refitted.options
    with monkeypatch.context() as m:
        stop_after(epochs, m)
        with pytest.raises(Stopped): fit(faces, replace(config, out=str(tmp_path/'cut')))
    assert read_json(tmp_path/'cut'/'config.json')['status'] == 'failed' and not (tmp_path/'cut'/'metrics.json').exists()
    cut = fit('.', replace(type(config)(), resume=str(tmp_path/'cut')))
    same_history(cut.history, whole.history)
    a, b = (load_file(r.path/'model'/'model.safetensors') for r in (whole, cut))
    assert all(a[k].equal(b[k]) for k in a) and cut.metrics['test']['accuracy'] == whole.metrics['test']['accuracy']
    with pytest.raises(SmileError, match='is finished'): fit('.', replace(type(config)(), resume=str(cut.path)))


KILLED = '''
import os, signal, sys, threading, time
from pathlib import Path
state = Path(sys.argv[1])
def kill():
    while not state.exists(): time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
from fastsmile.cli.commands import main
sys.argv = ['fastsmile', *sys.argv[2:]]
main()
'''


def test_killed_in_a_shell(faces, tmp_path):
    "The signal comes at any moment once there is a state"
    options = '--arch resnet10t --weights none --size 32 --epochs 4 --bs 16 --lr 0.005 --tta none --precision fp32 --no-onnx'.split()
    env = {k: v for k, v in os.environ.items() if k != 'FASTSMILE_QUIET'} | dict(OMP_NUM_THREADS='1')
    state = tmp_path/'cut'/'checkpoints'/STATE_FILE
    r = run_python(['-c', KILLED, state, 'fit', faces, *options, '--model-args', '{"channels": [8, 16, 32, 64]}', '--out', tmp_path/'cut'], env=env)
    assert r.returncode == -signal.SIGKILL, r.stderr
    assert read_json(tmp_path/'cut'/'config.json')['status'] == 'running' and 1 <= len(read_state(state)[1]['rows']) < 4
    r = run_python(['-m', 'fastsmile', 'fit', '--resume', tmp_path/'cut', '--json'], env=env)
    assert r.returncode == 0 and 'resuming after epoch' in r.stderr and json.loads(r.stdout)['path'] == str(tmp_path/'cut')
    whole = fit(faces, replace(load_run(tmp_path/'cut').options, out=str(tmp_path/'whole')))
    same_history(load_run(tmp_path/'cut').history, whole.history)


@pytest.mark.parametrize('options', [dict(lr_sweep='1e-3,5e-3', lr='auto', epochs=1), dict(folds=2, epochs=1)])
def test_finished_trainings_of_several_stay(faces, tiny, tmp_path, monkeypatch, options):
    config = replace(tiny, tta='none', **options)
    with monkeypatch.context() as m:
        seen = []
        def after_epoch(self, written=StateSaver.after_epoch):
            written(self)
            seen.append(1)
            if len(seen) == 2: raise Stopped
        m.setattr(StateSaver, 'after_epoch', after_epoch)
        with pytest.raises(Stopped): fit(faces, replace(config, out=str(tmp_path/'r')))
    first = next(p for p in sorted(tmp_path.glob('r/*/*/config.json')) + sorted(tmp_path.glob('r/*/config.json')) if read_json(p).get('status') == 'finished')
    kept = read_json(first)
    write_json(first, kept | dict(origin=kept['origin'] | dict(data='0000')))
    with pytest.raises(SmileError, match='fingerprint'): fit('.', replace(type(config)(), resume=str(tmp_path/'r')))
    write_json(first, kept)
    stamp = first.stat().st_mtime_ns
    again = fit('.', replace(type(config)(), resume=str(tmp_path/'r')))
    assert first.stat().st_mtime_ns == stamp and read_json(again.path/'config.json')['status'] in ('finished', 'cross-validated')


def test_what_cannot_be_gone_on_with(faces, tiny, tmp_path, monkeypatch):
    def go(source='.', **kw): return fit(source, replace(type(tiny)(), resume=str(tmp_path/'r'), **kw))
    with pytest.raises(SmileError, match='not a run folder'): go()
    with monkeypatch.context() as m:
        stop_after(1, m)
        with pytest.raises(Stopped): fit(faces, replace(tiny, tta='none', out=str(tmp_path/'r')))
    with pytest.raises(OptionError, match='no other option'): go(epochs=7)
    with pytest.raises(SmileError, match='was trained on'): go(tmp_path)
    config = read_json(tmp_path/'r'/'config.json')
    write_json(tmp_path/'r'/'config.json', config | dict(origin=config['origin'] | dict(data='0000')))
    with pytest.raises(SmileError, match='fingerprint'): go()
    write_json(tmp_path/'r'/'config.json', config)
    state = tmp_path/'r'/'checkpoints'/STATE_FILE
    save_file(dict(x=torch.zeros(2)), state)
    with pytest.raises(SmileError, match='not the state'): go()
    state.write_bytes(b'no')
    with pytest.raises(SmileError, match='not the state'): go()
    state.unlink()
    assert go().config['status'] == 'finished'  # killed before the first epoch was done: from the beginning
