"Two processes train as one does, and end as one."
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('accelerate', reason='training in several processes needs the extra distributed (accelerate)')

from forked import run_python
from safetensors.torch import load_file
from work_in_ranks import CASES, history_of, measured, work

from fastsmile.training import ddp as shards
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_json
from fastsmile.config.fit import FitConfig
from fastsmile.training.distributed import process_group
from fastsmile.training.resume import STATE_FILE, read_state
from fastsmile.training.ddp import (
    check_distributed_options, has_unused_parameters, restore_batchnorms, rows_of_rank, sync_batchnorms,
)

TIMES = ('seconds', 'images_per_second', 'memory')
TINY = ['--arch', 'resnet10t', '--weights', 'none', '--size', '32', '--bs', '16', '--lr', '0.005', '--tta', 'none', '--model-args',
        '{"channels": [8, 16, 32, 64]}', '--device', 'cpu', '--precision', 'fp32']


def in_ranks(*program, **kwargs) -> list[subprocess.CompletedProcess]:
    "Two processes as torchrun starts them, without it: forks, which need not import torch each"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != 'FASTSMILE_QUIET'} | dict(OMP_NUM_THREADS='1', COLUMNS='200') | kwargs
    env |= dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    with ThreadPoolExecutor(2) as pool: return list(pool.map(lambda r: run_python(program, env=env | dict(RANK=r, LOCAL_RANK=r), timeout=240), '01'))


def torchrun(*args, **kwargs) -> subprocess.Popen:
    "Two processes; what a test leaves in their environment is not theirs"
    env = {k: v for k, v in os.environ.items() if k != 'FASTSMILE_QUIET'} | dict(OMP_NUM_THREADS='1', COLUMNS='200')
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *map(str, args)], env=env | kwargs,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(p: subprocess.Popen, limit: float = 90) -> tuple[int, str, str]:
    "How it ended, within the limit"
    try: out, err = p.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        p.terminate()  # torchrun ends its processes
        raise AssertionError(p.communicate(timeout=40)[1][-3000:]) from None
    finally:
        if p.poll() is None: p.kill()
    return p.returncode, out, err


@pytest.fixture(scope='module')
def both(faces, tmp_path_factory):
    "All cases, in one process and in two"
    one, two = tmp_path_factory.mktemp('one'), tmp_path_factory.mktemp('two')
    with ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(in_ranks, Path(__file__).with_name('work_in_ranks.py'), faces, two)
        data = work(faces, one, [c for c in CASES if c != 'cut'])
    assert [p.returncode for p in ranks.result()] == [0, 0], [p.stderr[-2000:] for p in ranks.result()]
    return data, one, two


def told(where: Path, case: str) -> list[dict]: return [json.loads(f.read_text()) for f in sorted(where.glob(f'{case}-*.json'))]


@pytest.mark.parametrize('case', [c for c in CASES if c not in ('varied', 'cut')])
def test_two_processes_train_as_one(both, case):
    _, one, two = both
    (alone,), (first, second) = told(one, case), told(two, case)
    for split in ('train', 'valid'):  # each epoch's rows are those of one process, as often, and both processes have some of them
        rows = [sorted((e, i) for e, s, i in t['seen'] if s == split) for t in (alone, first, second)]
        assert sorted(rows[1] + rows[2]) == rows[0] and len(rows[1]) - len(rows[2]) in (0, len(alone['history']) * (split == 'valid'))
    batches = [[i for e, s, i in t['seen'] if s == 'train' and e == 0] for t in (alone, first, second)]
    assert sorted(batches[0][:16]) == sorted(batches[1][:8] + batches[2][:8])
    assert first['history'] == second['history'] and first['best'] == second['best'] == alone['best']
    # The mean of two half batches' gradients is that of the batch but for the order of additions: float32 keeps 7 digits, Adam's steps some fewer.
    assert first['lr'] == pytest.approx(alone['lr'], rel=1e-3)
    a, b = history_of(alone).drop(columns=[*TIMES, 'phase']), history_of(first).drop(columns=[*TIMES, 'phase'])
    np.testing.assert_allclose(b.to_numpy(float), a.to_numpy(float), atol=1e-4)
    a, b = (load_file(where/f'{case}.safetensors') for where in (one, two))
    assert all((a[k] - b[k]).abs().max() < 1e-4 for k in a)


def test_patience_ends_both(both):
    assert len(told(both[2], 'patience')[0]['history']) == 3


@pytest.mark.parametrize('case', ['weighted', 'varied'])
def test_valid_is_measured_over_all_rows_once(both, case):
    "Also where statistics were each process's own (BatchNorm, averaged): what was measured is what the file holds"
    data, _, two = both
    seen = measured(data, CASES[case], two/case/'rank0'/'checkpoints'/'last.safetensors')
    last = told(two, case)[0]['history'][-1]
    assert (data.rows.split == 'valid').sum() % 2 == 1
    for k, v in seen.items(): assert last[f'valid_{k}'] == pytest.approx(v, abs=1e-5)


def test_parts_are_varied_in_their_own_way_and_normalised(both):
    _, one, two = both
    assert history_of(told(two, 'varied')[0]).train_loss[0] == pytest.approx(history_of(told(one, 'varied')[0]).train_loss[0], abs=0.5)
    states = read_state(two/'varied'/'rank0'/'checkpoints'/STATE_FILE)
    assert not states[0]['rng.torch'].equal(states[0]['1.rng.torch'])


def test_going_on_ends_as_an_unbroken_training(both):
    _, _, two = both
    a, b = (history_of(told(two, c)[0]).drop(columns=[*TIMES]) for c in ('varied', 'cut'))
    assert a.equals(b)
    a, b = (load_file(two/f'{c}.safetensors') for c in ('varied', 'cut'))
    assert all(a[k].equal(b[k]) for k in a)


def test_the_first_alone_writes(both):
    _, _, two = both
    for case in CASES:
        assert {p.name for p in (two/case/'rank0').rglob('*') if p.is_file()} >= {'history.csv', 'last.safetensors', 'best.safetensors', STATE_FILE}
        assert not [p for p in (two/case/'rank1').rglob('*') if p.is_file()]


def test_a_killed_process_ends_all_and_the_run_goes_on(faces, tmp_path):
    import psutil
    run, tmp = tmp_path/'run', tmp_path/'tmp'
    tmp.mkdir()
    p = torchrun('-m', 'fastsmile', 'fit', faces, *TINY, '--epochs', '30', '--out', run)
    deadline = time.time() + 90
    while not (run/'checkpoints'/STATE_FILE).exists() and time.time() < deadline and p.poll() is None: time.sleep(0.02)
    workers = {c.environ()['RANK']: c for c in psutil.Process(p.pid).children() if 'RANK' in c.environ()}
    workers['1'].send_signal(signal.SIGKILL)
    start = time.time()
    code, out, err = said(p, 40)
    assert code and not out and time.time() - start < 35, err[-2000:]
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers.values())
    config = read_json(run/'config.json')
    assert config['status'] in ('running', 'failed') and (run/'checkpoints'/'best.safetensors').exists()
    (run/'config.json').write_text(json.dumps(config | dict(options=config['options'] | dict(epochs=4))))  # not all thirty
    first, second = in_ranks('-m', 'fastsmile', 'fit', '--resume', run, '--json', TMPDIR=str(tmp))
    assert first.returncode == second.returncode == 0 and 'resuming after epoch' in first.stderr, first.stderr[-2000:]
    assert (first.stderr + second.stderr).count('2 processes, 8 images') == 1
    assert json.loads(first.stdout + second.stdout)['path'] == str(run) and read_json(run/'config.json')['training']['processes'] == 2
    assert not [p for p in tmp.rglob('*') if p.is_file()]
    names = {k.removeprefix('module.') for k in load_file(run/'model'/'model.safetensors')}
    assert names == set(load_file(run/'model'/'model.safetensors')) == set(load_file(run/'checkpoints'/'last.safetensors'))


@pytest.mark.slow
def test_ctrl_c_ends_all(faces, tmp_path):
    run = tmp_path/'run'
    p = torchrun('-m', 'fastsmile', 'fit', faces, *TINY, '--epochs', '60', '--out', run)
    deadline = time.time() + 90
    while not (run/'checkpoints'/STATE_FILE).exists() and time.time() < deadline and p.poll() is None: time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    code, out, err = said(p, 35)
    assert code and not out and 'fastsmile fit --resume' in err and err.count('Ctrl-C: stopping') == 1, err[-2000:]
    assert read_json(run/'config.json')['status'] == 'stopped' and read_state(run/'checkpoints'/STATE_FILE)[1]['rows']


def test_what_the_first_finds_wrong_is_said_once(tmp_path):
    for c in 'ab':
        (tmp_path/'source'/c).mkdir(parents=True)
        for i in range(8): (tmp_path/'source'/c/f'{i}.png').write_bytes(b'no picture')
    both = in_ranks('-m', 'fastsmile', 'fit', tmp_path/'source', *TINY, '--out', tmp_path/'run')
    out, err = ''.join(p.stdout for p in both), ''.join(p.stderr for p in both)
    assert all(p.returncode for p in both) and not out, out
    assert err.count('can be used: unreadable') == 1 and 'Another process' not in err and 'rank1' not in err, err[-3000:]
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_an_occupied_folder_is_said_before_the_audit(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'letter.txt').touch()
    code, out, err = said(torchrun('-m', 'fastsmile', 'fit', tmp_path/'run', *TINY, '--out', tmp_path/'run'))
    assert code and err.count('is not empty') == 1 and 'no labelled images' not in err, err[-3000:]


@pytest.mark.parametrize('options,word', [(dict(folds=3), '--folds'), (dict(balance='all'), '--balance all'), (dict(lr_sweep='1e-3,1e-2'), '--lr-sweep'),
                                          (dict(seeds=2), '--seeds'), (dict(refit_all=True), '--refit-all'), (dict(compile=True), '--compile'),
                                          (dict(freeze='head'), '--views fresh'), (dict(bs=63), '--bs 63'), (dict(bs=2), '--bs 2')])
def test_what_is_done_by_one_process(monkeypatch, options, word):
    monkeypatch.setattr(shards, 'world_size', lambda: 2)
    with pytest.raises(OptionError, match=word): check_distributed_options(FitConfig(**options))
    check_distributed_options(FitConfig(freeze='head', views='fresh', bs=62))


def test_other_commands_are_not_for_several(tmp_path):
    env = os.environ | dict(WORLD_SIZE='2', RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1')
    r = [run_python(['-m', 'fastsmile', 'sample', tmp_path/'faces'], env=env | dict(RANK=k, FASTSMILE_QUIET='')) for k in '01']
    assert [p.returncode for p in r] == [2, 2] and 'fastsmile sample in several processes' in r[0].stderr and not r[1].stderr
    assert not (tmp_path/'faces').exists()


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, 'accelerate', None)
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(OptionError, match=r'fastsmile\[distributed\]'), process_group(): pass


def test_nobody_waits_forever(monkeypatch):
    "A process whose fellow never comes"
    for k, v in dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='localhost', MASTER_PORT='0').items(): monkeypatch.setenv(k, v)
    start = time.time()
    with pytest.raises(SmileError, match='Another process'), process_group(step_timeout=2): pass
    assert time.time() - start < 30
    with contextlib.suppress(ValueError, AssertionError): torch.distributed.destroy_process_group()


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 20))
def test_parts_are_the_whole(n, world, bs):
    whole = [rows_of_rank(range(n), r, world, bs) for r in range(world)]
    assert len({len(p) for p in whole}) == 1
    for i in range(len(whole[0]) // bs):  # step by step the batch of one process
        assert sorted(np.concatenate([p[i * bs:(i + 1) * bs] for p in whole])) == list(range(i * bs * world, (i + 1) * bs * world))
    assert len(whole[0]) == n // (bs * world) * bs
    assert sorted(np.concatenate([rows_of_rank(range(n), r, world) for r in range(world)])) == list(range(n))


@pytest.mark.parametrize('arch', ['resnet10t', 'densenet121'])
def test_norms_that_were_synchronised_are_put_back(arch):
    "timm's densenets have norms with an activation in them"
    import timm
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=2, **(dict(growth_rate=4, block_config=(1, 1), stem_type='') if arch == 'densenet121' else {})).train()
    net(torch.randn(4, 3, 32, 32))
    x, kinds = torch.randn(2, 3, 32, 32), [type(m) for m in net.modules()]
    before, state = net.eval()(x), {k: v.clone() for k, v in net.state_dict().items()}
    net, norms = sync_batchnorms(net)
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in net.modules()) and torch.allclose(net(x), before, atol=1e-6)
    with torch.no_grad(): next(m for m in net.modules() if isinstance(m, torch.nn.SyncBatchNorm)).running_mean += 1
    restore_batchnorms(net, norms)
    assert [type(m) for m in net.modules()] == kinds
    changed = [k for k, v in net.state_dict().items() if not v.equal(state[k])]
    assert len(changed) == 1 and changed[0].endswith('running_mean')


def test_parameters_that_do_nothing():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 8 * 8, 2))
    assert not has_unused_parameters(net, 8) and net.training
    net.more = torch.nn.Identity()
    net.more.weight = torch.nn.Parameter(torch.zeros(2))
    assert has_unused_parameters(net, 8)
    net.more.weight.requires_grad = False
    assert not has_unused_parameters(net, 8) and all(p.grad is None for p in net.parameters())


def test_a_wish_for_a_gpu_of_ones_own(monkeypatch):
    monkeypatch.setattr(shards, 'world_size', lambda: 2)
    monkeypatch.setattr(shards, 'pick_device', lambda asked: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(shards, 'local_rank', lambda: 1)
    with pytest.raises(SmileError, match='1 GPU'): shards.rank_device(None)
    with pytest.raises(OptionError, match='cuda:1'): shards.rank_device('cuda:1')
    assert replace(FitConfig(), device='cpu').device == 'cpu'
