"What every registered layout promises: each row is used or has a reason, order changes nothing, and predict finds what audit found."
import json
import random
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import folder, picture

from fastsmile.config.fields import SourceOptions
from fastsmile.core.errors import SmileError
from fastsmile.data.layouts import SourcePlace
from fastsmile.data.source import LAYOUTS, detect_layout, read_source
from fastsmile.data.words import COLUMN_NAMES
from fastsmile.inference.inputs import open_inputs

FACES = {f'faces/{c}/{i}.png': picture(seed=10 * len(c) + i) for c in ('yes', 'no') for i in range(4)}
FLAT = {f'faces/{name.replace("/", "_")}': data for name, data in FACES.items()}  # in no class folders
ROWS = [(name, name.split('_')[1]) for name in FLAT] + [('faces/gone.png', 'no'), ('faces/faces_yes_0.png', ''), ('', 'yes')]


def shuffled(items, seed):
    items = list(items)
    if seed: random.Random(seed).shuffle(items)
    return items


def csv_of(rows, header='path,label'): return '\n'.join([header, *(','.join(row) for row in rows)]) + '\n'


def tables(where, seed):
    return folder(where, dict(shuffled(FLAT.items(), seed)) | {'train.csv': csv_of(shuffled(ROWS[:6], seed)), 'test.csv': csv_of(shuffled(ROWS[6:], seed))})


def table_file(where, seed): return folder(where, dict(shuffled(FLAT.items(), seed)) | {'labels.csv': csv_of(shuffled(ROWS, seed))})/'labels.csv'


def class_folders(where, seed):
    files = {f'{split}/{name.partition("/")[2]}': data for split in ('train', 'test') for name, data in FACES.items()}
    return folder(where, dict(shuffled(files.items(), seed)) | {'stray.png': picture(seed=99)})


def array(where, seed):
    x = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8)
    np.save(folder(where, {'labels.txt': 'label\na\nb\n\na\nb\na\n'})/'x.npy', x)
    return where/'x.npy'


def npz(where, seed):
    x = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8)
    named = dict(shuffled(dict(x_train=x[:4], y_train=np.arange(4) % 2, x_test=x[4:], y_test=np.arange(2)).items(), 0))
    np.savez(folder(where, {'x': ''})/'x.npz', **named)
    return where/'x.npz'


def names_with_labels(where, seed): return folder(where, dict(shuffled(((name.replace('faces/', '').replace('/', '_'), d) for name, d in FACES.items()), seed)))


def pixels(where, seed):
    rows = [f'{i % 2},{" ".join(str((i * 7 + k) % 256) for k in range(64))},{u}' for i, u in enumerate(['Training'] * 4 + ['PublicTest', 'PrivateTest'])]
    return folder(where, {'fer2013.csv': csv_of([[r] for r in rows], 'emotion,pixels,Usage')})/'fer2013.csv'


def parquet_images(where, seed):
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    (where/'data').mkdir(parents=True)
    for split, n in (('train', 4), ('test', 2)):
        cells = dict(image=[dict(bytes=picture(seed=i + n), path=f'{i}.png') for i in range(n)], label=[i % 2 for i in range(n)])
        parquet.write_table(pa.table(cells), where/f'data/{split}-00000-of-00001.parquet')
    return where


def label_lists(where, seed):
    lines = shuffled([*FLAT, 'faces/gone.png'], seed)
    lists = {c: [n for n in lines if ('yes' in n) == (c == 'yes')] for c in ('yes', 'no')}
    return folder(where, dict(shuffled(FLAT.items(), seed)) | {f'{c}_list.txt': '\n'.join(names) for c, names in lists.items()})


def sidecars(where, seed):
    texts = {name.replace('.png', '.json'): json.dumps(dict(flags={}, shapes=[dict(label=name.split('_')[1])], imagePath=name)) for name in FLAT}
    return folder(where, dict(shuffled([*FLAT.items(), *texts.items()], seed)) | {'faces/stray.png': picture(seed=99)})


MAKERS = {'tables': tables, 'table file': table_file, 'class folders': class_folders, 'array': array, 'npz': npz, 'labels in paths': names_with_labels,
          'pixels in a table': pixels, 'images in Parquet': parquet_images, 'label files': label_lists,
          'a file for each image': sidecars}
OWN_ROWS = {'tables': len(ROWS), 'table file': len(ROWS), 'class folders': 2 * len(FACES), 'array': 6, 'npz': 6, 'labels in paths': len(FACES),
            'pixels in a table': 6, 'images in Parquet': 6, 'label files': len(FACES) + 1,
            'a file for each image': len(FACES)}
ASIDE = {'tables': ['no file name', 'no such file', 'unlabelled'], 'table file': ['no file name', 'no such file', 'unlabelled'],
         'label files': ['no such file']}
OPTIONS = {'labels in paths': SourceOptions(label_from='^([a-z]+)_')}


def read_as(layout, where, seed=0): return read_source(MAKERS[layout.name](where, seed), OPTIONS.get(layout.name, SourceOptions()))


def test_every_registered_layout_is_tried():
    assert [x.name for x in LAYOUTS] and {x.name for x in LAYOUTS} == set(MAKERS)
    assert {x.kind for x in LAYOUTS} == {'csv', 'folders', 'array'} and len({x.name for x in LAYOUTS}) == len(LAYOUTS)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.name)
def layout(request): return request.param


def test_it_is_detected_and_read_as_itself(layout, tmp_path):
    place, options = MAKERS[layout.name](tmp_path/'s', 0), OPTIONS.get(layout.name, SourceOptions())
    assert detect_layout(SourcePlace(place, options)) == layout
    source = read_source(place, options)
    assert source.kind == layout.kind and source.notes[0].startswith(f'Read as {layout.description}')
    other = 'csv' if layout.kind == 'folders' else 'folders'
    refusals = "is read as|has no CSV|no labelled images|needed: no column|JSON|is not a source"
    with pytest.raises(SmileError, match=refusals):
        read_source(place, replace(options, layout=other))


def test_rows_are_used_or_set_aside_with_a_reason(layout, tmp_path):
    source = read_as(layout, tmp_path/'s')
    aside = source.frame[source.frame.reason != '']
    assert len(source.frame) == OWN_ROWS[layout.name] == len(source.kept) + len(aside)
    assert (source.kept.label != '').all() and source.kept.path.map(source.reader.exists).all()
    assert sorted(aside.reason) == ASIDE.get(layout.name, ['unlabelled'] if layout.name == 'array' else [])
    if source.reader.stores_files:
        assert set(source.reader.names()) == set(source.images_without_row) | {p for p in source.frame.path if source.reader.exists(p)}


def test_order_changes_nothing(layout, tmp_path):
    def rows(seed):
        source = read_as(layout, tmp_path/str(seed), seed)
        return sorted(map(tuple, source.frame.values.tolist())), source.images_without_row, source.label_spellings
    assert rows(0) == rows(1) == rows(2)


def test_predict_finds_every_image_that_audit_found(layout, tmp_path):
    place = MAKERS[layout.name](tmp_path/'s', 0)
    source = read_source(place, OPTIONS.get(layout.name, SourceOptions()))
    found = [(p, r) for p, r in zip(source.frame.path, source.frame.reason) if r in ('', 'unlabelled')]
    if place.is_dir(): assert {p for p, _ in found} <= set(open_inputs(place).names)
    if not source.reader.stores_files or place.is_dir():
        inputs = open_inputs(place)
        assert all(np.array_equal(inputs.reader.read_image(p), source.reader.read_image(p)) for p, _ in found)
    tables = [place] if place.is_file() else sorted([*place.glob('*.csv'), *place.glob('*.txt')])
    if source.reader.stores_files and tables:
        assert sorted(d for t in tables for d in read_all(open_inputs(t))) == sorted(source.reader.read_bytes(p) for p, _ in found)


def read_all(inputs):
    "The bytes of the images that can be read"
    from fastsmile.data.images import ImageError
    for name in inputs.names:
        try: yield inputs.reader.read_bytes(name)
        except ImageError: pass


def test_the_same_in_a_zip_and_at_a_url(layout, tmp_path):
    place = MAKERS[layout.name](tmp_path/'s', 0)
    if not place.is_dir() or layout.name == 'images in Parquet': return
    options = OPTIONS.get(layout.name, SourceOptions())
    with zipfile.ZipFile(tmp_path/'s.zip', 'w') as z:
        for p in sorted(place.rglob('*.*')): z.write(p, p.relative_to(place).as_posix())
    here = read_source(place, options)
    for other in (tmp_path/'s.zip', f'file://{place}', f'file://{tmp_path}/s.zip'):
        there = read_source(other, options)
        assert there.frame.equals(here.frame) and there.images_without_row == here.images_without_row


# one reader of tables: what fit reads, predict reads

CELLS = {'Jürgen.png': picture(seed=1), 'below/x.PNG': picture(seed=2), 'plain.jpg': picture(seed=3, fmt='JPEG')}


@pytest.mark.parametrize('encode', [
    lambda t: t.encode(), lambda t: t.encode('utf-8-sig'), lambda t: t.encode('utf-16'), lambda t: t.encode('cp1252'), lambda t: t.replace(',', ';').encode(),
    lambda t: t.replace(',', '\t').encode(), lambda t: t.replace('\n', '\r\n').encode(), lambda t: t.replace('below/x.PNG', 'C:\\me\\below\\X.png').encode(),
    lambda t: t.replace('below/x.PNG', 'x').encode(), lambda t: t.partition('\n')[2].encode()],
    ids=['utf-8', 'bom', 'utf-16', 'cp1252', 'semicolons', 'tabs', 'crlf', 'backslashes', 'id', 'no header'])
def test_predict_reads_the_tables_that_fit_reads(tmp_path, encode):
    table = folder(tmp_path, CELLS | {'t.csv': encode('image,label\nJürgen.png,yes\nbelow/x.PNG,no\nplain.jpg,yes\n')})/'t.csv'
    source, inputs = read_source(table), open_inputs(table)
    names = list(inputs.names)
    assert inputs.total == len(names) == 3 and names[0] == 'Jürgen.png'
    assert [inputs.reader.read_bytes(n) for n in names] == [source.reader.read_bytes(p) for p in source.kept.path] == list(CELLS.values())


@pytest.mark.parametrize('column', COLUMN_NAMES['image'])
def test_predict_knows_every_name_of_an_image_column(tmp_path, column):
    where = folder(tmp_path, CELLS | {'t.csv': f'what,{column.upper()}\n1,below/x\n2,plain\n'})
    assert list(open_inputs(where/'t.csv').names) == ['below/x', 'plain']


def test_predict_reads_parquet(tmp_path):
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    folder(tmp_path, CELLS)
    for names, seen in ((['Jürgen.png', None, 'x'], ['Jürgen.png', '', 'x']), (['plain'] * 5000, ['plain'] * 5000)):
        parquet.write_table(pa.table(dict(n=range(len(names)), file_name=names, box=[[1, 2]] * len(names))), tmp_path/'t.parquet')
        inputs = open_inputs(tmp_path/'t.parquet')
        assert inputs.total == len(names) and list(inputs.names) == seen and inputs.description.startswith('column file_name of')
    (tmp_path/'t.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(SmileError, match='cannot be read as Parquet'): open_inputs(tmp_path/'t.parquet')


@pytest.mark.parametrize('make', [lambda d: None, lambda d: str(d/'z.zip'), lambda d: f'file://{d}'], ids=['folder', 'zip', 'url'])
def test_a_table_leads_to_images_wherever_they_are(tmp_path, make):
    folder(tmp_path, CELLS | {'t.csv': 'file\nX\nC:\\a\\Jürgen.PNG\nplain\ngone.png\n'})
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for name, data in CELLS.items(): z.writestr(name, data)
    assert len(list(read_all(open_inputs(tmp_path/'t.csv', root=make(tmp_path))))) == 3


def test_bytes_that_are_no_text_are_file_names(tmp_path):
    "A table in UTF-8 with one name in another encoding: both files are found, and the row has the name that is there"
    odd = 'M\udcfcller.png'
    folder(tmp_path, {'ä.png': picture()} | {'t.csv': 'path\nä.png\n'.encode() + b'M\xfcller.png\n'})
    try: (tmp_path/odd).write_bytes(picture(seed=1))
    except OSError: pytest.skip('this file system takes no such name')
    inputs = open_inputs(tmp_path/'t.csv')
    names = list(inputs.names)
    assert names == ['ä.png', odd] and all(inputs.reader.read_image(n).size for n in names)
    (tmp_path/odd).rename(tmp_path/'Müller.png')
    assert list(open_inputs(tmp_path/'t.csv').names) == ['ä.png', 'Müller.png']


def test_a_folder_is_listed_only_where_a_name_is_missing(tmp_path, monkeypatch):
    from fastsmile.data.readers import FolderReader
    folder(tmp_path, CELLS | {'t.csv': 'path,label\nplain.jpg,x\nbelow/x.PNG,y\n', 'u.csv': 'path,label\nx,x\n', 'l.txt': 'plain\ngone\n'})
    walks, real = [], FolderReader.walk
    monkeypatch.setattr(FolderReader, 'walk', lambda self: walks.append(1) or real(self))
    for name, n, found in (('t.csv', 0, 2), ('l.txt', 0, 1), ('u.csv', 1, 1)):
        walks.clear()
        inputs = open_inputs(tmp_path/name)
        assert len(list(read_all(inputs))) == found and len(walks) == n, name


@pytest.mark.parametrize('packed', ['labels.zip', 'faces.zip'])
def test_a_zip_beside_a_table_is_found_by_both(tmp_path, packed):
    (folder(tmp_path, {'labels.csv': csv_of([(name, label) for name, label in ROWS[:4]])})/packed).write_bytes(b'')
    with zipfile.ZipFile(tmp_path/packed, 'w') as z:
        for name, data in FLAT.items(): z.writestr(name, data)
    for place in (tmp_path, tmp_path/'labels.csv'):
        source, inputs = read_source(place), open_inputs(place)
        assert len(source.kept) == 4 and set(source.kept.path) <= set(inputs.names)
        assert all(inputs.reader.read_bytes(p) == source.reader.read_bytes(p) for p in source.kept.path)
