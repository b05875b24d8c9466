"Pictures that were decoded once stay decoded."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import shell, trained

from fastsmile.data.cache import cache_dir, cached_pixels, clear_cache, list_cache
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import TEMP_PREFIX
from fastsmile.data.audit import audit_and_split
from fastsmile.data.images import Preprocessing
from fastsmile.data.readers import FolderReader
from fastsmile.training.loaders import PreparedImages
from fastsmile.models.factory import make_spec
from fastsmile.config.fit import FitConfig
from fastsmile.training.learner import prepare_images
from fastsmile.data.source import read_source


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTSMILE_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


class Counting(FolderReader):
    "A folder that counts what is read from it"
    reads = 0
    def read_bytes(self, name):
        type(self).reads += 1
        return super().read_bytes(name)


def counting(data, monkeypatch):
    monkeypatch.setattr(Counting, 'reads', 0)
    return replace(data, source=replace(data.source, reader=Counting(data.source.reader.root)))


@pytest.mark.parametrize('keep,first,second,files', [('memory', 1, 1, 0), ('disk', 1, 0, 1), ('none', 0, 0, 0), ('auto', 1, 1, 0)])
def test_where_pictures_are_kept(faces, tiny, monkeypatch, keep, first, second, files):
    data = counting(audit_and_split(read_source(faces), FitConfig()), monkeypatch)
    spec, config = make_spec('resnet10t', data.classes, size=32, model_args=tiny.model_args), replace(tiny, cache=keep)
    names = data.rows[data.rows.split.isin(['train', 'valid'])].path
    reads, got = [], []
    for _ in range(2):
        before = Counting.reads
        p = prepare_images(data, spec, config)
        reads.append((Counting.reads - before) / names.nunique())
        before = Counting.reads
        got.append([np.array(p(n)) for n in names])
        assert (Counting.reads - before > 0) == (keep == 'none')
    assert reads == [first, second] and len(list_cache()) == files and all(np.array_equal(a, b) for a, b in zip(*got))


def test_what_does_not_fit_in_memory_goes_to_disk(faces, monkeypatch):
    data = counting(audit_and_split(read_source(faces), FitConfig()), monkeypatch)
    digests = dict(zip(data.training_fingerprints.path, data.training_fingerprints.digest))
    p = PreparedImages(data.source.reader, Preprocessing(size=32), list(digests), digests=digests, max_bytes=1000)
    assert isinstance(p.pixels, np.memmap) and p.all_decoded and len(list_cache()) == 1
    assert not PreparedImages(data.source.reader, Preprocessing(size=32), list(digests), max_bytes=1000).all_decoded  # without knowing the content


def test_other_content_is_another_file(tmp_path):
    made = [cached_pixels(d, Preprocessing(size=16), lambda i: np.full((16, 16, 3), i, np.uint8)) for d in (['a', 'b'], ['a', 'c'], ['b', 'a'])]
    assert len(list_cache()) == 3 and made[0][1].max() == 1


def test_training_is_the_same_wherever_pictures_are(data, tiny, tmp_path):
    memory, *others = (trained(data, replace(tiny, epochs=1, cache=c, workers=w), tmp_path/c)[0] for c, w in (('memory', None), ('disk', 2), ('none', 0)))
    for history in others: pd.testing.assert_frame_equal(history, memory)


def test_no_room_and_no_permission(monkeypatch, tmp_path):
    import shutil
    make = lambda i: np.zeros((16, 16, 3), np.uint8)  # noqa: E731
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(10, 9, 1))
        assert cached_pixels(['a'], Preprocessing(size=16), make) is None
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FASTSMILE_CACHE', str(tmp_path/'file'))
    with pytest.raises(SmileError, match='cannot be made'): cached_pixels(['a'], Preprocessing(size=16), make)
    monkeypatch.delenv('FASTSMILE_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))  # the usual place, which nobody named
    assert cached_pixels(['a'], Preprocessing(size=16), make) is None
    with pytest.raises(OptionError, match='--cache'): FitConfig(cache='cloud')


def test_what_the_shell_says(home):
    cached_pixels(['a'], Preprocessing(size=16), lambda i: np.zeros((16, 16, 3), np.uint8))
    def ask(*args): return json.loads(shell('cache', '--json', *args).stdout)
    size = 16 * 16 * 3 + 128
    assert ask() == dict(path=str(cache_dir()), files=1, bytes=size) and ask('--clear') == dict(deleted=1, bytes=size)
    assert ask()['files'] == 0 and clear_cache() == (0, 0)


def test_clearing_leaves_what_is_being_written(home):
    def make(i):
        cleared.append(clear_cache())
        return np.zeros((16, 16, 3), np.uint8)
    cleared = []
    (home/'pixels').mkdir(parents=True)
    (home/'pixels'/f'{TEMP_PREFIX}x.npy.part').write_bytes(b'left by a process that was killed')
    assert cached_pixels(['a'], Preprocessing(size=16), make).shape == (1, 16, 16, 3) and cleared == [(0, 0)]
    assert [p.suffix for p in (home/'pixels').iterdir()] == ['.npy']
