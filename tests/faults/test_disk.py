"No room, no right to write: one clear line, nothing lost, and the same command goes on when there is room"
import errno
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastsmile.core.system as memory
from fastsmile.data.cache import cached_pixels, list_cache
from fastsmile.cli.from_config import report_exception
from fastsmile.core.errors import SmileError, WriteError
from fastsmile.core.files import atomic_write, check_source_exists, read_json, write_text
from fastsmile.data.images import Preprocessing
from fastsmile.config.commands import AuditConfig, ExportConfig, PredictConfig
from fastsmile.config.fit import FitConfig
from fastsmile.inference.outputs import PredictionFile
from fastsmile.runs.predict import predict
from fastsmile.runs.fit import fit

sys.path.insert(0, str(Path(__file__).parent))
from forked import run_python  # noqa: E402
from kills import broken, environment, shell  # noqa: E402


SLOW = pytest.mark.slow


@contextmanager
def mounted(where: Path, options: str):
    "A file system in memory, of that size or read-only"
    where.mkdir(parents=True, exist_ok=True)
    if shutil.which('mount') is None or subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', where], capture_output=True).returncode:
        pytest.skip('mounting a small disk needs root')
    try: yield where
    finally: subprocess.run(['umount', '-l', where], check=True)


def make_room(where: Path): subprocess.run(['mount', '-o', 'remount,size=64m', where], check=True)


@pytest.mark.parametrize('kib', [*(pytest.param(k, marks=SLOW) for k in (8, 300, 700, 1100)), 1500])
def test_fit_goes_on_when_there_is_room(faces, tiny, run, tmp_path, kib):
    config = replace(tiny, tta='none', decide='balanced')
    with mounted(tmp_path/'disk', f'size={kib}k') as disk:
        with pytest.raises(WriteError, match=r'cannot be written: No space left on device') as e: fit(faces, replace(config, out=str(disk/'run')))
        assert str(disk) in e.value.message and broken(disk) == []
        make_room(disk)
        begun = (disk/'run'/'config.json').exists()
        again = fit('.', FitConfig(resume=str(disk/'run'))) if begun else fit(faces, replace(config, out=str(disk/'run')))
        drop = ['seconds', 'images_per_second', 'memory']
        assert again.history.drop(columns=drop).equals(run.history.drop(columns=drop)) and again.config['status'] == 'finished'
        assert broken(disk) == [] and not list(disk.rglob('.*'))


def test_predict_keeps_its_rows(faces, run, tmp_path):
    ask = PredictConfig(model=str(run.path), out=str(tmp_path/'whole.csv'), bs=8, precision='fp32', workers=2)
    predict(faces/'happy_images', ask)
    with mounted(tmp_path/'disk', 'size=8k') as disk:
        with pytest.raises(WriteError, match=r'p\.csv\.part cannot be written: No space left') as e:
            predict(faces/'happy_images', replace(ask, out=str(disk/'p.csv')))
        assert '--resume' in e.value.hint and (disk/'p.csv.part').stat().st_size > 2000
        make_room(disk)
        done = predict(faces/'happy_images', replace(ask, out=str(disk/'p.csv'), resume=True))
        assert done.resumed >= 16 and (disk/'p.csv').read_bytes() == (tmp_path/'whole.csv').read_bytes() and [p.name for p in disk.iterdir()] == ['p.csv']


def test_a_table_of_parquet_without_room_goes_on(faces, run, tmp_path, monkeypatch):
    "Its rows are there, and a plain repeat would throw them away"
    pytest.importorskip('pyarrow')
    ask = PredictConfig(model=str(run.path), out=str(tmp_path/'p.parquet'))
    def full(*_): raise WriteError('p.parquet cannot be written: No space left on device.', 'Make room.')
    with monkeypatch.context() as m, pytest.raises(WriteError, match='No space left') as e:
        m.setattr('fastsmile.inference.outputs.write_parquet', full)
        predict(faces/'happy_images', ask)
    assert 'kept in' in e.value.hint and '--resume' in e.value.hint
    assert predict(faces/'happy_images', replace(ask, resume=True)).resumed > 50


def audited(faces, run, disk):
    from fastsmile.reports.audit import audit
    audit(faces, AuditConfig(out=str(disk/'a')))


def exported(faces, run, disk):
    from fastsmile.inference.export import export
    export(run.path, ExportConfig(out=str(disk/'m.onnx')))


@pytest.mark.parametrize('work', [audited, pytest.param(exported, marks=SLOW)])
def test_what_makes_one_thing_leaves_nothing_half(faces, run, tmp_path, work):
    with mounted(tmp_path/'disk', 'size=24k') as disk:
        with pytest.raises(WriteError, match='No space left on device'): work(faces, run, disk)
        assert broken(disk) == [] and not (disk/'a'/'audit.html').exists() and not (disk/'m.onnx').exists()
        make_room(disk)
        work(faces, run, disk)
        assert broken(disk) == [] and not list(disk.rglob('.*')) and ((disk/'a'/'audit.html').exists() or (disk/'m.onnx').exists())


@SLOW
def test_a_shell_gets_one_line(faces, run, tmp_path):
    with mounted(tmp_path/'disk', 'size=4k') as disk:
        code, said = shell('predict', faces/'happy_images', '--model', run.path, '--out', disk/'p.csv')
        lines = [line for line in said.splitlines() if line and not line.startswith('model:')]
        assert code == 1 and 'Traceback' not in said and len(lines) == 2 and 'No space left' in lines[0], said


def test_read_only(faces, tiny, run, tmp_path):
    from fastsmile.reports.audit import audit
    works = [lambda out: fit(faces, replace(tiny, out=str(out))), lambda out: audit(faces, AuditConfig(out=str(out))),
             lambda out: predict(faces/'happy_images', PredictConfig(model=str(run.path), out=str(out/'p.csv')))]
    with mounted(tmp_path/'disk', 'size=1m') as disk:
        (disk/'empty').mkdir()
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        for work in works:
            for out in (disk/'new', disk/'empty'):
                with pytest.raises(SmileError, match='Read-only file system'): work(out)


def test_a_cache_without_room_is_done_without(faces, tmp_path, monkeypatch):
    "Pages of a mapped file for which there is no room would end the process without a word"
    monkeypatch.setattr('shutil.disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 0, 10**9))  # it is taken by somebody else just then
    with mounted(tmp_path/'disk', 'size=32k') as disk:
        monkeypatch.setenv('FASTSMILE_CACHE', str(disk/'cache'))
        assert cached_pixels(['a', 'b'] * 20, Preprocessing(size=32), lambda i: np.zeros((32, 32, 3), np.uint8)) is None and list_cache() == []
        make_room(disk)
        assert cached_pixels(['a', 'b'] * 20, Preprocessing(size=32), lambda i: np.zeros((32, 32, 3), np.uint8)).shape == (40, 32, 32, 3)


# without a small disk

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='limits on the size of files are POSIX')
def test_a_limit_on_files_is_told(faces, run, tmp_path):
    "What a quota or a limit says, from a shell"
    code = ('import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); '
            'sys.argv = ["fastsmile", *sys.argv[1:]]; from fastsmile.cli.commands import main; main()')
    p = run_python(['-c', code, 'predict', faces/'happy_images', '--model', run.path, '--bs', '8', '--out', tmp_path/'p.csv'], env=environment())
    assert p.returncode == 1 and 'p.csv.part cannot be written: File too large' in p.stderr and 'Traceback' not in p.stderr, p.stderr
    code, said = shell('predict', faces/'happy_images', '--model', run.path, '--bs', 8, '--out', tmp_path/'p.csv', '--resume')
    assert code == 0 and 'rows are there, resuming' in said


@pytest.mark.parametrize('error,why', [(OSError(errno.ENOSPC, 'x'), 'No space left on device'), (OSError(errno.EROFS, 'x'), 'Read-only file system'),
                                       (RuntimeError('I/O error: No space left on device (os error 28)'), 'No space left on device')])
def test_errors_of_writing_name_the_file(tmp_path, error, why, monkeypatch, capsys):
    write_text(tmp_path/'a.txt', 'old')
    with pytest.raises(WriteError, match=rf'a\.txt cannot be written: {why}'), atomic_write(tmp_path/'a.txt'): raise error
    assert (tmp_path/'a.txt').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a.txt']
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    assert report_exception(error) == 1 and f'cannot be used: {why}' in capsys.readouterr().err


def test_what_is_synced_can_be_written(tmp_path, monkeypatch):
    "Windows syncs no file that is open for reading alone"
    fcntl = pytest.importorskip('fcntl', reason='asks POSIX how a file is open')
    how = []
    monkeypatch.setattr(os, 'fsync', lambda fd: how.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text(tmp_path/'a.txt', 'new')
    assert how == [os.O_RDWR] and (tmp_path/'a.txt').read_text() == 'new'


def test_files_that_were_read_are_no_memory_that_is_taken(tmp_path, monkeypatch):
    "In a container, whose system drops them where memory is asked for"
    for name, text in (('max', '1000000'), ('current', '900000'), ('stat', 'anon 100\nfile 700000\ninactive_anon 5\ninactive_file 600000\n')):
        (tmp_path/f'memory.{name}').write_text(text)
    monkeypatch.setattr(memory, 'CGROUP', tmp_path)
    assert memory.free_memory() == 700_000
    (tmp_path/'memory.stat').unlink()
    assert memory.free_memory() == 100_000
    (tmp_path/'memory.max').write_text('max')
    assert memory.free_memory() > 10**7


def test_a_source_with_a_name_that_no_system_takes():
    with pytest.raises(SmileError, match='does not exist'): check_source_exists('a' * 300)


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ConnectionError), atomic_write(tmp_path/'a.txt'): raise ConnectionError('elsewhere')
    with pytest.raises(ValueError), PredictionFile(tmp_path/'p.csv', ['path', 'error'], [], {}): raise ValueError('ours')
    assert read_json(tmp_path/'p.csv.part.json') == {}
