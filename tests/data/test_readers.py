"What every registered reader promises: names that are there and sorted, bytes, images, regions, reasons; a copy in another process."
import pickle
import zipfile

import fsspec
import numpy as np
import pytest
from conftest import folder, picture

import fastsmile.data.archives
import fastsmile.data.readers
from fastsmile.core.errors import SmileError
from fastsmile.data.images import ImageError, ImageNotFoundError, Preprocessing, region_name, resize_and_crop
from fastsmile.data.readers import READERS, ArrayReader, FolderReader, RemoteFolderReader, RemoteZipReader, ZipReader
from fastsmile.data.finder import ListedReader

IMAGES = {'b.png': picture(seed=1), 'a/x.PNG': picture(seed=2, size=(20, 30)), 'a/deep/y.jpg': picture(seed=3, fmt='JPEG'), 'noext': picture(seed=4)}
OTHERS = {'train.csv': b'b,yes\n', 'a/notes.txt': b'x', '.hidden/z.png': picture(), '__MACOSX/._b.png': b'x'}


def zipped(path, files):
    with zipfile.ZipFile(path, 'w') as z:
        for name, data in files.items(): z.writestr(name, data)
    return path


def make_folder(where): return FolderReader(folder(where/'f', IMAGES | OTHERS))
def make_zip(where): return ZipReader(zipped(where/'f.zip', IMAGES | OTHERS))


def make_array(where):
    np.save(where/'a.npy', np.random.default_rng(0).integers(0, 255, (3, 30, 20, 3), dtype=np.uint8))
    return ArrayReader(where/'a.npy')


def make_remote(where):
    there = fsspec.filesystem('memory')
    for name, data in (IMAGES | OTHERS).items(): there.pipe_file(f'/contract/{name}', data)
    return RemoteFolderReader('memory://contract')


def make_remote_zip(where):
    fsspec.filesystem('memory').pipe_file('/contract.zip', zipped(where/'r.zip', IMAGES | OTHERS).read_bytes())
    return RemoteZipReader('memory://contract.zip')


MAKERS = {FolderReader: make_folder, ZipReader: make_zip, ArrayReader: make_array, RemoteFolderReader: make_remote, RemoteZipReader: make_remote_zip}
KINDS = [*READERS, ListedReader]  # the last is opened by lists and tables, around any other


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def reader(request, tmp_path):
    if request.param is ListedReader: yield ListedReader(make_folder(tmp_path), search_below=True)
    else: yield MAKERS[request.param](tmp_path)
    there = fsspec.filesystem('memory')
    for path in ('/contract', '/contract.zip'):
        if there.exists(path): there.rm(path, recursive=True)


def test_every_registered_reader_is_tried(): assert set(READERS) == set(MAKERS)


def test_names_are_sorted_and_there(reader):
    names = reader.names()
    assert names == sorted(reader.walk(), key=names.index) and len(set(names)) == len(names) > 2
    if reader.stores_files: assert names == sorted(IMAGES)
    for name in names:
        assert reader.exists(name) and reader.read_bytes(name) and reader.read_image(name).mode == 'RGB'
    assert 'train.csv' in reader.root_files() or not reader.stores_files
    assert reader.root_files() == sorted(reader.root_files())


def test_a_copy_in_another_process_is_at_the_same_location(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = reader.names()[0]
    before = reader.read_bytes(name)  # opened before it is sent
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.location == reader.location and type(copy) is type(reader)
    assert copy.names() == reader.names() and copy.read_bytes(name) == before
    assert copy.stores_files == reader.stores_files and copy.accepts_absolute == reader.accepts_absolute


@pytest.mark.parametrize('name', ['gone.png', 'a/gone', '999', 'b.png/gone', '', 'x' * 300, 'nul\0.png', 'ä\udcff.png'])
def test_a_missing_name_is_its_own_error(reader, name):
    assert not reader.exists(name)
    with pytest.raises(ImageError, match='no such|a folder, not a file|no file name|cannot be opened'): reader.read_bytes(name)
    with pytest.raises(ImageError): reader.read_image(name)
    with pytest.raises(ImageNotFoundError, match='no such (file|index)'): reader.read_bytes('gone.png')


def test_regions_and_preprocessing(reader):
    name = next(n for n in reader.names() if reader.read_image(n).size == (20, 30))
    whole, part = np.asarray(reader.read_image(name)), np.asarray(reader.read_image(region_name(name, (2, 3, 5, 7))))
    assert (part == whole[3:10, 2:7]).all()
    with pytest.raises(ImageError, match='not within'): reader.read_image(region_name(name, (18, 0, 5, 5)))
    prep = Preprocessing(size=16)
    assert (resize_and_crop(reader.read_image(name, prep), prep) == resize_and_crop(reader.read_image(name), prep)).all()


def test_what_is_too_large_is_refused(reader, monkeypatch):
    if not reader.stores_files: return  # an array is read where it is
    monkeypatch.setattr(fastsmile.data.readers, 'MAX_IMAGE_BYTES', 100)
    with pytest.raises(ImageError, match='more than 100 bytes'): reader.read_bytes('b.png')


def test_a_root_that_is_not_there_is_said(reader, tmp_path):
    if isinstance(reader, ListedReader): return  # it has the root of another reader
    with pytest.raises(SmileError): type(reader)('memory://nowhere/x.zip' if 'Remote' in type(reader).__name__ else tmp_path/'nowhere').names()


@pytest.mark.parametrize('make', [make_folder, make_zip, make_remote, make_remote_zip])
def test_a_list_names_images_wherever_they_are(make, tmp_path):
    "Missing extensions, backslashes, other cases and folders below: in a zip and at a URL as in a folder"
    below, beside = (ListedReader(make(tmp_path), search_below=s) for s in (True, False))
    for name in ('b', 'X', 'a\\x.PNG', 'C:\\me\\a\\deep\\Y.JPG', 'deep/y'):
        assert below.read_image(name).size and below.exists(name)
    assert beside.read_image('a/deep/y').size and beside.read_image('a\\x').size
    for name in ('y', 'X.png'):
        with pytest.raises(ImageNotFoundError, match='no such file'): beside.read_bytes(name)


def test_an_ambiguous_name_is_a_reason(tmp_path):
    reader = ListedReader(FolderReader(folder(tmp_path, {'a/x.png': picture(), 'b/x.png': picture(seed=1)})), search_below=True)
    with pytest.raises(ImageError, match='fits 2 files'): reader.read_image('x')
    assert reader.read_image('b/x').size == (24, 24)
