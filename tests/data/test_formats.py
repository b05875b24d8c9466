"Archives and other containers: backslashes in a zip are folders; what is not read is named, with a line that converts it."
import gzip
import io
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import folder, picture

from fastsmile.config.fields import SourceOptions
from fastsmile.core.errors import SmileError
from fastsmile.data.archives import FOREIGN_FORMATS, foreign_format
from fastsmile.data.source import read_source
from fastsmile.inference.inputs import open_inputs

CLASSES = ('neutral', 'smile')
PICTURES = {f'faces/{CLASSES[i % 2]}/{i}.png': picture(seed=i) for i in range(6)}
LABELS = [CLASSES[i % 2] for i in range(6)]


def labels_of(source, **options) -> dict[str, str]:
    frame = read_source(source, SourceOptions(**options)).kept
    return dict(zip(frame.path, frame.label))


def test_backslashes_in_a_zip_are_folders(tmp_path):
    "PowerShell 5 and .NET write them; audit and predict find the same pictures under the same names"
    path = tmp_path/'windows.zip'
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('faces\\', b'')
        for name, data in PICTURES.items(): z.writestr(name.replace('/', '\\'), data)
    assert labels_of(path) == dict(zip(PICTURES, LABELS))
    inputs = open_inputs(path)
    assert list(inputs.names) == sorted(PICTURES)
    assert inputs.reader.read_image('faces/smile/1.png').size == (24, 24)


def test_a_table_in_a_zip_with_backslashes(tmp_path):
    "The table lies in a folder of the zip, beside the images"
    path = tmp_path/'windows.zip'
    rows = ''.join(f'{i}.png,{label}\n' for i, label in enumerate(LABELS))
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('set\\train.csv', 'file,label\n' + rows)
        for i in range(6): z.writestr(f'set\\images\\{i}.png', picture(seed=i))
    assert list(labels_of(path).values()) == LABELS


def test_a_name_that_exists_with_a_slash_keeps_its_backslash(tmp_path):
    path = tmp_path/'both.zip'
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('a/1.png', picture(seed=1))
        z.writestr('a\\1.png', picture(seed=2))
    reader = open_inputs(path).reader
    assert reader.names() == ['a/1.png', 'a\\1.png']
    assert reader.read_bytes('a/1.png') != reader.read_bytes('a\\1.png')


def packed_tar(path, root):
    with tarfile.open(path, f'w:{path.suffix[1:] if path.suffix != ".tgz" else "gz"}'.replace('w:tar', 'w')) as t:
        for name in PICTURES: t.add(root/name, name)
    return path


@pytest.mark.parametrize('ending', ['.tgz', '.tar', '.tar.gz', '.tar.bz2', '.tar.xz'])
def test_tars_are_named_and_the_line_unpacks_them(tmp_path, monkeypatch, ending):
    "fit, predict and --root refuse alike; after the line that is printed the folder is read"
    monkeypatch.chdir(tmp_path)
    path = packed_tar(folder(tmp_path/'in', PICTURES).parent/f'set{ending}', tmp_path/'in')
    with pytest.raises(SmileError, match='is a tar archive, which is not read') as e: read_source(path.name)
    for options in ({}, {'root': path.name}):
        (tmp_path/'list.txt').write_text('faces/smile/1.png\n')
        with pytest.raises(SmileError, match='tar archive'): open_inputs('list.txt' if options else path.name, **options)
    with pytest.raises(SmileError, match='tar archive'): read_source('https://example.org/set' + ending)
    command = e.value.hint.partition('python ')[2].replace("'", '').split()
    subprocess.run([sys.executable, '-W', 'ignore', *command], check=True)
    assert list(labels_of(tmp_path/'set').values()) == ['neutral'] * 3 + ['smile'] * 3


def test_a_folder_that_holds_only_an_archive_says_so(tmp_path):
    packed_tar(folder(tmp_path/'in', PICTURES).parent/'faces.tgz', tmp_path/'in')
    (tmp_path/'down').mkdir()
    (tmp_path/'faces.tgz').rename(tmp_path/'down/faces.tgz')
    with pytest.raises(SmileError, match=r'down/faces.tgz is a tar archive'): read_source(tmp_path/'down')


def test_the_first_bytes_count(tmp_path):
    "A tar that is called .zip; a gzip that is called .csv"
    packed_tar(folder(tmp_path/'in', PICTURES).parent/'x.tar', tmp_path/'in').rename(tmp_path/'x.zip')
    with pytest.raises(SmileError, match='x.zip is a tar archive'): read_source(tmp_path/'x.zip')
    (tmp_path/'labels.csv').write_bytes(gzip.compress(b'file,label\n1.png,smile\n'))
    folder(tmp_path/'images', {'1.png': picture()})
    with pytest.raises(SmileError, match='labels.csv is a gzip file'):
        read_source(tmp_path/'images', SourceOptions(labels=str(tmp_path/'labels.csv')))


def images_and_labels() -> dict:
    return dict(images=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), labels=np.arange(6) % 2)


def write_mat(path, held):
    from scipy.io import savemat
    savemat(path, held)


def write_pickle(path, held): pd.to_pickle(held, path)


def write_torch(path, held):
    import torch
    torch.save({k: torch.from_numpy(v) for k, v in held.items()}, path)


def run_line(hint: str):
    "The line of Python after the sentence that introduces it"
    exec(re.search(r'(?s)\bimport .*', hint)[0], {})


@pytest.mark.parametrize('name,write', [('x.mat', write_mat), ('x.pkl', write_pickle), ('x.pt', write_torch)])
def test_arrays_are_named_and_the_line_converts_them(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    held = images_and_labels()
    write(name, held)
    with pytest.raises(SmileError, match='which is not read') as e: read_source(name)
    with pytest.raises(SmileError, match='which is not read'): open_inputs(name)
    run_line(e.value.hint)
    assert list(labels_of('x.npz').values()) == ['0', '1'] * 3
    assert (np.asarray(read_source('x.npz').reader.read_image('2')) == held['images'][2]).all()


def rows() -> pd.DataFrame: return pd.DataFrame(dict(file=[f'{i}.png' for i in range(6)], label=LABELS))


def write_table_mat(path): write_mat(path, dict(file=np.array(rows().file, object), label=np.array(LABELS, object)))


@pytest.mark.parametrize('name,write', [('t.mat', write_table_mat), ('t.pkl', lambda p: rows().to_pickle(p)),
                                        ('t.feather', lambda p: rows().to_feather(p))])
def test_tables_are_named_and_the_line_converts_them(tmp_path, monkeypatch, name, write):
    "As --labels, and where they lie beside the images without a word"
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'set', {f'{i}.png': picture(seed=i) for i in range(6)})
    write(f'set/{name}')
    with pytest.raises(SmileError, match='which is not read'): read_source('set', SourceOptions(labels=f'set/{name}'))
    with pytest.raises(SmileError, match=f'set/{name} is a') as e: read_source('set')
    run_line(e.value.hint)
    if name == 't.feather': assert labels_of('set', labels='set/t.parquet') == dict(zip(rows().file, LABELS))
    else: assert labels_of('set') == dict(zip(rows().file, LABELS))


@pytest.mark.parametrize('f', [f for f in FOREIGN_FORMATS if f.marks], ids=lambda f: f.name)
def test_each_format_is_known_by_its_first_bytes(tmp_path, f):
    path = tmp_path/'nameless'
    path.write_bytes(b''.join([bytes(f.at), f.marks[0], bytes(600)]))
    with pytest.raises(SmileError, match=re.escape(f.name)): read_source(path)
    with pytest.raises(SmileError, match=re.escape(f.name)): open_inputs(path)


@pytest.mark.parametrize('name', ['a.tfrecord', 'a.tfrecords', 'train.tfrecord-00000-of-00010', 'a.tfrec'])
def test_tfrecords(name): assert foreign_format(name).name == 'a TFRecord file'


def test_webdataset_unpacked(tmp_path):
    "A tar of WebDataset holds N.png and N.cls"
    files = {f'{i}.png': picture(seed=i) for i in range(6)} | {f'{i}.cls': label for i, label in enumerate(LABELS)}
    folder(tmp_path, files)
    assert labels_of(tmp_path) == {f'{i}.png': label for i, label in enumerate(LABELS)}


def test_a_list_names_images_in_folders_below(tmp_path):
    "predict reads SMILE_list.txt as fit does"
    folder(tmp_path, {f'files/{i}.png': picture(seed=i) for i in range(3)} | {'SMILE_list.txt': '0.png\n1.png\n'})
    inputs = open_inputs(tmp_path/'SMILE_list.txt')
    assert [inputs.reader.read_image(n).size for n in inputs.names] == [(24, 24)] * 2


FER = 'emotion,pixels,Usage\n' + ''.join(f'{i % 2},{" ".join(map(str, range(i, i + 16)))},Training\n' for i in range(6))


def parquet_bytes() -> bytes:
    pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    buf = io.BytesIO()
    held = [dict(bytes=data, path=name) for name, data in PICTURES.items()]
    pd.DataFrame(dict(image=held, label=LABELS)).to_parquet(buf)
    return buf.getvalue()


@pytest.mark.parametrize('name,make', [('fer2013.csv', lambda: FER.encode()), ('train.parquet', parquet_bytes),
                                       ('data/train-00000-of-00001.parquet', parquet_bytes)])
def test_tables_with_images_in_a_zip_or_at_a_url_are_named(tmp_path, monkeypatch, name, make):
    "audit and predict say the same; after the line that is printed both read them"
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'set', {name: make()})
    with zipfile.ZipFile('set.zip', 'w') as z: z.write(f'set/{name}', name)
    urls = [f'file://{tmp_path}/set', f'file://{tmp_path}/set/{name}', f'file://{tmp_path}/set.zip']
    for source in ('set.zip', *urls):
        for read in (read_source, open_inputs):
            with pytest.raises(SmileError, match='is (a table with pixels|Parquet with images), which is read from a file') as e:
                read(source)
            if source == 'set.zip':
                subprocess.run([sys.executable, *e.value.hint.partition('python ')[2].replace("'", '').split()], check=True)
                assert len(labels_of('set')) == 6
            elif source == urls[0]:
                (tmp_path/read.__name__).mkdir()
                monkeypatch.chdir(tmp_path/read.__name__)
                run_line(e.value.hint)
                assert len(labels_of('set')) == 6 and len(list(open_inputs('set').names)) == 6
                monkeypatch.chdir(tmp_path)


def test_predict_reads_a_table_at_a_url(tmp_path):
    "As fit does: relative names begin where the table is"
    rows = 'file,label\n' + ''.join(f'{i}.png,{label}\n' for i, label in enumerate(LABELS))
    folder(tmp_path, {f'images/{i}.png': picture(seed=i) for i in range(6)} | {'labels.csv': rows, 'list.txt': '1.png\n'})
    for name, n in (('labels.csv', 6), ('list.txt', 1)):
        inputs = open_inputs(f'file://{tmp_path}/{name}')
        assert [inputs.reader.read_image(name).size for name in inputs.names] == [(24, 24)] * n
    inputs = open_inputs(f'file://{tmp_path}/labels.csv', image_col='file', root=str(tmp_path/'images'))
    assert list(inputs.names) == [f'{i}.png' for i in range(6)]
    with pytest.raises(SmileError, match='no such file'): open_inputs(f'file://{tmp_path}/gone.csv')


def test_the_line_for_tfrecords(tmp_path, monkeypatch):
    "With a stand-in for TensorFlow: the line is Python, and makes class folders"
    from types import SimpleNamespace as Ns
    def example(data):
        i = int(data)
        feature = dict(label=Ns(int64_list=Ns(value=[i % 2])), image=Ns(bytes_list=Ns(value=[picture(seed=i)])))
        return Ns(features=Ns(feature=feature))
    records = lambda path: [Ns(numpy=lambda i=i: str(i)) for i in range(6)]
    monkeypatch.setitem(sys.modules, 'tensorflow', Ns(data=Ns(TFRecordDataset=records), train=Ns(Example=Ns(FromString=example))))
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'set/1.0.0', {'features.json': '{}', 'faces-train.tfrecord-00000-of-00001': b'1234'})
    with pytest.raises(SmileError, match='set/1.0.0/faces-train.tfrecord-00000-of-00001 is a TFRecord file') as e: read_source('set')
    assert '\n' not in e.value.hint
    run_line(e.value.hint)
    assert sorted(labels_of('set/1.0.0').values()) == ['0'] * 3 + ['1'] * 3


def test_a_folder_of_hugging_face_on_disk_is_an_arrow_stream(tmp_path):
    folder(tmp_path, {'dataset_dict.json': '{}', 'train/data-00000-of-00001.arrow': b'\xff\xff\xff\xff' + bytes(100)})
    with pytest.raises(SmileError, match='data-00000-of-00001.arrow is an Arrow stream'): read_source(tmp_path)


def test_zips_in_a_folder_are_named(tmp_path):
    "A zip for each class, as shared drives pack them"
    for label in CLASSES:
        with zipfile.ZipFile(tmp_path/f'{label}.zip', 'w') as z: z.writestr('1.png', picture())
    with pytest.raises(SmileError, match='holds no images, but zips: .*neutral.zip, .*smile.zip'): read_source(tmp_path)


@pytest.mark.parametrize('cell', ['?', '.', '/', './', '??d='])
def test_a_cell_of_which_no_name_is_left_names_no_image(tmp_path, cell):
    (tmp_path/'train.csv').write_text('\n'.join(['a.jpg,x', 'b.jpg,y', 'c.jpg,x', 'd.jpg,y', f'{cell},x']))
    for n in 'abcd': (tmp_path/f'{n}.jpg').write_bytes(picture(seed=ord(n)))
    source = read_source(tmp_path, SourceOptions(image_col='1', label_col='2'))
    assert sorted(source.kept.path) == ['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg'] and len(source.frame) == 5


def test_what_has_another_ending_is_named_with_the_line_that_mends_it(tmp_path, monkeypatch):
    "A zip called .tar, a zip without an ending, a gzipped table called .csv, a tgz called .zip: each line is run, and then the faces are read"
    monkeypatch.chdir(tmp_path)
    folder(tmp_path/'in', PICTURES)
    def zipped(path):
        with zipfile.ZipFile(path, 'w') as z:
            for name, data in PICTURES.items(): z.writestr(name, data)
    zipped('a.tar'), zipped('b')
    packed_tar(tmp_path/'c.tgz', tmp_path/'in').rename(tmp_path/'c.zip')
    for name, after in (('a.tar', 'a.zip'), ('b', 'b.zip'), ('c.zip', 'c')):
        for read in (read_source, open_inputs):
            with pytest.raises(SmileError, match='is a zip under another ending|is a tar archive') as e: read(name)
        line = e.value.hint.partition(': ')[2].replace('python ', f'{sys.executable} ')
        subprocess.run(line, shell=True, check=True)
        assert sorted(labels_of(after).values()) == sorted(LABELS)
    rows = 'file,label\n' + ''.join(f'{n},{n.split("/")[1]}\n' for n in PICTURES)
    (tmp_path/'in/l.csv').write_bytes(gzip.compress(rows.encode()))
    with pytest.raises(SmileError, match='l.csv is a gzip file') as e: labels_of('in', labels='in/l.csv')
    subprocess.run(e.value.hint.partition(': ')[2].replace('python ', f'{sys.executable} '), shell=True, check=True)
    assert list(labels_of('in', labels='in/l.csv').values()) == LABELS


def test_a_zip_in_a_zip_is_named_with_the_outer_one(tmp_path):
    with zipfile.ZipFile(tmp_path/'out.zip', 'w') as z: z.writestr('faces.zip', b'PK\3\4')
    with pytest.raises(SmileError, match='holds no images, but zips') as e: read_source(tmp_path/'out.zip')
    assert f"-e '{tmp_path}/out.zip' FOLDER), then those in it" in e.value.hint
