"Ctrl-C once and twice, two at once, processes that die, shared memory that is full: in words, whole, and never for ever"
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from fastsmile.models.bundle import save_bundle
from fastsmile.training.callbacks import save_weights
from fastsmile.runs.compare import compare
from fastsmile.core.errors import SmileError
from fastsmile.core.files import (
    LOCK_FILE, TEMP_PREFIX, atomic_write, folder_lock, new_run_folder, open_exclusive, read_json, remove_stale_temps,
    write_text,
)
from fastsmile.core.system import Interrupted, graceful_interrupt
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.data.readers import FolderReader
from fastsmile.runs import predict as predict_room
from fastsmile.models.factory import build_network, make_spec
from fastsmile.config.commands import CalibrateConfig, PredictConfig
from fastsmile.config.fit import FitConfig
from fastsmile.inference.outputs import PredictionFile
from fastsmile.runs.predict import predict
from fastsmile.training.resume import write_state
from fastsmile.runs.calibrate import calibrate
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.explain import explain
from fastsmile.runs.report import report
from fastsmile.runs.fit import fit
from fastsmile.data.scan import scan_images
from fastsmile.runs.folder import recording_status

sys.path.insert(0, str(Path(__file__).parent))
from kills import LIMIT, TINY, broken, environment, start  # noqa: E402

posix = pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')


@pytest.fixture(autouse=True)
def heard():
    "Ctrl-C is heard, also where the tests themselves run in the background of a shell, which ignores it"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def wait_for(true, p: subprocess.Popen, seconds: float = 60):
    "Until something is true; an error where the process ends before, or nothing happens"
    end = time.time() + seconds
    while not true():
        assert p.poll() is None and time.time() < end, p.communicate()[1] if p.poll() is not None else 'nothing happened'
        time.sleep(0.005)


def ended(p: subprocess.Popen, seconds: float) -> tuple[int, str]: # exit code, what was said
    "How a process ends, which must not take longer"
    try: out, err = p.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        pytest.fail(f'still there after {seconds} s: {p.communicate()[1]}')
    assert 'Traceback' not in err and 'Exception ignored' not in err, err
    return p.returncode, out + err


def told(history) -> list: return history.drop(columns=['seconds', 'images_per_second', 'memory']).to_csv()


@posix
def test_ctrl_c_leaves_a_training_that_goes_on(faces, tmp_path):
    "With processes that load, which get the signal of a terminal as well"
    args = ['fit', faces, *TINY, '--epochs', 4, '--seed', 1, '--cache', 'none', '--workers', 2, '--no-onnx']
    p = start([*args, '--out', tmp_path/'cut'])
    wait_for((tmp_path/'cut'/'history.csv').exists, p)
    os.killpg(p.pid, signal.SIGINT)
    code, said = ended(p, 30)
    assert code == 130 and 'stopping after this batch' in said and f'fastsmile fit --resume {tmp_path/"cut"} resumes it' in said, said
    assert read_json(tmp_path/'cut'/'config.json')['status'] == 'stopped' and broken(tmp_path) == []
    again = fit('.', FitConfig(resume=str(tmp_path/'cut')))
    config = replace(again.options, out=str(tmp_path/'whole'))
    assert told(again.history) == told(fit(faces, config).history)


@posix
def test_ctrl_c_leaves_predictions_that_go_on(faces, run, tmp_path):
    (tmp_path/'new').mkdir()
    pictures = sorted((faces/'happy_images').iterdir())
    for i in range(3000): os.link(pictures[i % len(pictures)], tmp_path/'new'/f'{i:04}.jpg')
    args = ['predict', tmp_path/'new', '--model', run.path, '--bs', 8, '--tta', 'full', '--workers', 2, '--out', tmp_path/'p.csv']
    p, part = start(args), tmp_path/'p.csv.part'
    wait_for(lambda: part.exists() and part.stat().st_size > 5000, p)
    os.killpg(p.pid, signal.SIGINT)
    code, said = ended(p, 30)
    assert code == 130 and 'stopped.' in said and 'with --resume continues' in said and not (tmp_path/'p.csv').exists(), said
    kept = part.read_bytes()
    p = start([*args, '--resume'])
    wait_for(lambda: part.stat().st_size > len(kept) + 5000, p)
    for _ in range(2): os.killpg(p.pid, signal.SIGINT); time.sleep(0.01)
    assert ended(p, 30)[0] in (130, -signal.SIGINT) and part.read_bytes().startswith(kept[:kept.rindex(b'\n') // 2])


@posix
def test_ctrl_c_in_the_last_group(faces, run, tmp_path, monkeypatch):
    "Which is not full: the part is kept and goes on; where only the page is missing, that is said"
    names = [str(p) for p in sorted((faces/'happy_images').iterdir())[:5]]
    config = PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv'), bs=2, html=str(tmp_path/'p.html'))
    done = []
    def progress(total):
        def tick(n):
            done.append(n)
            if sum(done) == 5: signal.raise_signal(signal.SIGINT)
        return tick
    with pytest.raises(Interrupted, match=r'p.csv.part; the same command with --resume continues'): predict(names, config, progress)
    assert not (tmp_path/'p.csv').exists() and (tmp_path/'p.csv.part').exists()
    def stopped(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(predict_room, 'write_gallery', stopped)
        with pytest.raises(Interrupted, match=r'p.csv is whole; .*p.html is not written'): predict(names, replace(config, resume=True))
    assert len((tmp_path/'p.csv').read_text().splitlines()) == 6 and not (tmp_path/'p.html').exists()


@posix
def test_twice_is_at_once():
    "In the middle of what is finished first"
    with pytest.raises(KeyboardInterrupt), graceful_interrupt('this hour') as leave:
        threading.Timer(0.1, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2) if not time.sleep(0.1)]).start()
        begun = time.time()
        time.sleep(20)
        leave()
    assert time.time() - begun < 5


@posix
def test_once_is_not_forgotten_at_the_end():
    with pytest.raises(KeyboardInterrupt), graceful_interrupt('this step'): signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    with graceful_interrupt('nothing'): pass
    assert signal.getsignal(signal.SIGINT) is before


def test_gently_elsewhere_than_in_the_main_thread(): # where signals cannot be asked for
    seen = []
    def work():
        with graceful_interrupt('this') as leave: seen.append(leave())
    t = threading.Thread(target=work)
    t.start(); t.join()
    assert seen == [None]


@posix
def test_ctrl_c_in_an_audit(faces, tmp_path):
    "Of so many pictures that processes examine them"
    (tmp_path/'faces').mkdir()
    pictures = sorted((faces/'happy_images').iterdir())
    for i in range(2500):
        where = tmp_path/'faces'/'ab'[i % 2]
        where.mkdir(exist_ok=True)
        os.link(pictures[i % len(pictures)], where/f'{i:04}.jpg')
    p = start(['audit', tmp_path/'faces', '--out', tmp_path/'a', '--workers', 2])
    wait_for(lambda: len(children(p.pid)) >= 2, p)
    time.sleep(1)
    os.killpg(p.pid, signal.SIGINT)
    code, said = ended(p, 30)
    assert code == 130 and said.strip().splitlines()[-1].startswith('stopped.') and not (tmp_path/'a').exists(), said


def children(pid: int) -> list[int]:
    "The processes that a process has started"
    return [int(c) for t in Path(f'/proc/{pid}/task').glob('*/children') for c in t.read_text().split()]


def test_a_calibration_that_was_stopped_is_done_again(run, tmp_path, monkeypatch):
    "Nobody reads figures of one rule beside a model of another"
    copy = Path(shutil.copytree(run.path, tmp_path/'run'))
    def stopped(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr('fastsmile.runs.calibrate.write_metrics', stopped)
        calibrate(copy, CalibrateConfig(decide='balanced'))
    for use in (evaluate, report, lambda r: compare([r, run.path])):
        with pytest.raises(SmileError, match='is being calibrated, or was') as e: use(copy)
        assert f'fastsmile calibrate {copy} --decide balanced' in e.value.hint
    with pytest.raises(SmileError, match='is finished'): fit('.', FitConfig(resume=str(copy)))
    calibrate(copy, CalibrateConfig(decide='balanced'))
    assert read_json(copy/'config.json')['status'] == 'finished' and evaluate(copy)
    assert read_json(copy/'metrics.json')['calibration']['rule'] == read_json(copy/'model'/'config.json')['fastsmile']['decide'] == 'balanced'


def test_one_process_rewrites_a_run(run, tmp_path):
    copy = Path(shutil.copytree(run.path, tmp_path/'run'))
    for use in (calibrate, report, explain):
        with folder_lock(copy), pytest.raises(SmileError, match='Another process is writing'): use(copy)


def test_what_a_study_that_was_stopped_says(tmp_path):
    for command, how in (('fastsmile study emotions faces', 'Run the same command to resume.'), ('fastsmile fit faces', 'fastsmile fit --resume')):
        with pytest.raises(Interrupted) as e, recording_status(tmp_path/command[10:15], dict(kind='fit', command=command)): raise KeyboardInterrupt
        assert e.value.hint.startswith(how)


# locks

@posix
def test_a_forked_process_keeps_no_lock(tmp_path):
    "Of a process that was killed, whose children are still there"
    with open_exclusive(tmp_path/'a') as file:
        file.write('once\n')  # in the buffer, which a child must not write
        child = os.fork()
        if not child:
            time.sleep(20)
            os._exit(0)
    time.sleep(0.2)
    try:
        with open_exclusive(tmp_path/'a'): assert (tmp_path/'a').read_text() == 'once\n'
    finally: os.kill(child, signal.SIGKILL); os.waitpid(child, 0)


@posix
def test_without_locks_only_what_is_old_was_left(tmp_path, monkeypatch):
    monkeypatch.setattr('fastsmile.core.files.try_lock', lambda fd: None)
    old, young = tmp_path/f'{TEMP_PREFIX}old.a.part', tmp_path/f'{TEMP_PREFIX}young.a.part'
    for p in (old, young): p.touch()
    os.utime(old, (0, 0))
    write_text(tmp_path/'a', 'whole')
    assert sorted(p.name for p in tmp_path.iterdir()) == [young.name, 'a']


@posix
def test_a_long_write_is_nobody_s_leftover(tmp_path):
    with atomic_write(tmp_path/'a') as mine:
        mine.write_text('whole')
        os.utime(mine, (0, 0))
        remove_stale_temps(tmp_path)
    assert (tmp_path/'a').read_text() == 'whole'


# two at once

@posix
@pytest.mark.slow
def test_two_runs_with_one_name(faces, tmp_path):
    args = ['fit', faces, *TINY, '--epochs', 2, '--out', tmp_path/'run']
    both = [start(args) for _ in range(2)]
    ends = sorted(ended(p, LIMIT) for p in both)
    assert [c for c, _ in ends] == [0, 1] and re.search('is not empty|Another process is writing', ends[1][1]), ends
    assert broken(tmp_path) == [] and read_json(tmp_path/'run'/'config.json')['status'] == 'finished'


def test_a_run_that_is_being_written_is_not_gone_on_with(faces, tiny, tmp_path):
    write_text(tmp_path/'run'/'config.json', json.dumps(dict(status='running', kind='fit', source=str(faces), origin=dict(data='?'),
                                                             options=replace(tiny, out=str(tmp_path/'run')).as_dict())))
    with folder_lock(tmp_path/'run'):
        with pytest.raises(SmileError): fit('.', FitConfig(resume=str(tmp_path/'run')))
        with pytest.raises(SmileError, match='Another process is writing'), recording_status(tmp_path/'run', {}): pass
    assert not (tmp_path/'run'/LOCK_FILE).exists()


def test_a_folder_whose_owner_was_killed_is_taken_again(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/LOCK_FILE).touch()
    (tmp_path/'run'/f'{TEMP_PREFIX}x.config.json.part').touch()
    assert new_run_folder(tmp_path/'run', 'x') == tmp_path/'run'
    with folder_lock(tmp_path/'run'): assert [p.name for p in (tmp_path/'run').iterdir()] == [LOCK_FILE]
    (tmp_path/'run'/'letter.txt').touch()
    with pytest.raises(SmileError, match='is not empty'): new_run_folder(tmp_path/'run', 'x')


def as_bundle(net, spec, folder): save_bundle(Model(spec, ModelMetadata([0.5, 0.5], [0, 0], [0, 0], 'argmax'), net), folder)
def as_weights(net, spec, folder): save_weights(net, folder/'best.safetensors')
def as_state(net, spec, folder): write_state(folder/'state.safetensors', net.state_dict(), {})


def killed_by_size(work, limit=2**20) -> bool:
    "Whether a forked process is killed because it writes a larger file"
    import resource
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            work()
        finally: os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ


@posix
@pytest.mark.parametrize('write', [as_bundle, as_weights, as_state])
def test_half_written_tensors_are_cleared_by_the_next_writer(write, tmp_path):
    "Killed in the middle of the write, after the library has made a temporary file of its own"
    spec = make_spec('resnet10t', ['a', 'b'], size=32)
    net = build_network(spec, weights='none')
    assert killed_by_size(lambda: write(net, spec, tmp_path))
    left = list(tmp_path.rglob('*'))
    assert left and all(p.name.startswith(TEMP_PREFIX) or p.parent.name.startswith(TEMP_PREFIX) for p in left)
    write(net, spec, tmp_path)
    assert {p.name for p in tmp_path.rglob('*')} <= {'config.json', 'model.safetensors', 'best.safetensors', 'state.safetensors'}


def test_two_predictions_into_one_file(tmp_path):
    with PredictionFile(tmp_path/'p.csv', ['path', 'label', 'error'], [], {}) as first:
        with pytest.raises(SmileError, match='Another process is writing'): PredictionFile(tmp_path/'p.csv', ['path', 'label', 'error'], [], {})
        first.add(dict(path='a', label='x', error=''))
        first.finish()
    assert (tmp_path/'p.csv').read_text() == 'path,label,error\na,x,\n'


@posix
def test_writers_at_once_spoil_nothing(tmp_path):
    "Each clears what killed ones left, and none what another is writing"
    def work(i):
        for _ in range(60):
            with atomic_write(tmp_path/'a.txt', own_folder=i % 2 == 0) as tmp: tmp.write_text(str(i) * 5000)
    with ThreadPoolExecutor(4) as pool: list(pool.map(work, range(4)))
    assert len(set((tmp_path/'a.txt').read_text())) == 1 and [p.name for p in tmp_path.iterdir()] == ['a.txt']
    with pytest.raises(Interrupted), atomic_write(tmp_path/'b.txt'): raise Interrupted('a', 'b')
    assert not (tmp_path/'b.txt').exists()


# processes that load

@posix
@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
def test_a_loading_process_that_is_killed(faces, tmp_path):
    p = start(['fit', faces, *TINY, '--epochs', 30, '--cache', 'none', '--workers', 2, '--out', tmp_path/'run'])
    wait_for((tmp_path/'run'/'history.csv').exists, p)
    wait_for(lambda: len(children(p.pid)) >= 2, p)
    os.kill(children(p.pid)[-1], signal.SIGKILL)
    code, said = ended(p, 60)
    assert code == 1 and 'A data-loader worker has ended' in said and '--workers 0' in said, said
    assert read_json(tmp_path/'run'/'config.json')['status'] == 'failed' and (tmp_path/'run'/'checkpoints'/'state.safetensors').exists()


@posix
def test_an_examining_process_that_is_killed(faces, tmp_path):
    class Killing(FolderReader):
        def read_bytes(self, name):
            if name.startswith('7'): os.kill(os.getpid(), signal.SIGKILL)
            return super().read_bytes(name)
    pictures = sorted((faces/'happy_images').iterdir())
    for i in range(1200): os.link(pictures[i % len(pictures)], tmp_path/f'{i:04}.jpg')
    names = [f'{i:04}.jpg' for i in range(1200)] + ['7']
    with pytest.raises(SmileError, match='was killed'): scan_images(Killing(tmp_path), names, workers=2)


@posix
@pytest.mark.slow
def test_shared_memory_that_is_full(faces, tiny, tmp_path):
    if os.geteuid() or shutil.which('unshare') is None: pytest.skip('a small /dev/shm of its own needs root')
    for size, said_so in (('200k', 'come through a pipe'), ('4k', 'no workers are used')):
        inside = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
        cmd = ['unshare', '-m', 'sh', '-c', inside, 'sh', sys.executable, '-m', 'fastsmile', 'fit', faces, *TINY, '--epochs', 2, '--seed', 1, '--cache', 'none',
               '--workers', 2, '--out', tmp_path/size]
        p = subprocess.Popen([*map(str, cmd)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
        code, said = ended(p, LIMIT)
        assert code == 0 and said_so in said, said
    whole = fit(faces, replace(tiny, tta='none', out=str(tmp_path/'whole')))
    got = (tmp_path/'200k'/'history.csv').read_text()
    assert got.splitlines()[0] == ','.join(whole.history) and len(got.splitlines()) == 3
