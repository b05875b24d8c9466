"Pictures at a URL are read as pictures in a folder are, and what goes wrong on the way is said."
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from conftest import folder, picture

import fastsmile.data.readers
from fastsmile.reports.audit import audit
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import is_url
from fastsmile.data.images import ImageError
from fastsmile.data.readers import FolderReader
from fastsmile.inference.inputs import open_inputs
from fastsmile.config.commands import AuditConfig, PredictConfig
from fastsmile.config.fit import FitConfig
from fastsmile.runs.predict import predict
from fastsmile.data.readers import RemoteFolderReader, remote_reader
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.fit import fit, resume_arguments
from fastsmile.data.source import read_source

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts

ODD = ['a b.png', 'ä.png', 'a,"b".png', 'new/c.png', 'new/deep/d.JPG', 'plain', '100%.png', 'a#b.png', 'q?.png']


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "A folder of pictures with odd names, and what is no picture"
    return folder(tmp_path_factory.mktemp('here'), {n: picture(seed=i) for i, n in enumerate(ODD)} | {'broken.jpg': b'no picture', 'empty.png': b'',
                  '.hidden/x.png': picture(), '__MACOSX/._a.png': b'x', 'notes.md': 'hello'})


@pytest.fixture(scope='module')
def bucket(here):
    "The same in memory, and as a zip there"
    there = fsspec.filesystem('memory')
    for p in here.rglob('*'):
        if p.is_file(): there.pipe_file(f'/bucket/{p.relative_to(here).as_posix()}', p.read_bytes())
    with there.open('/bucket.zip', 'wb') as f, zipfile.ZipFile(f, 'w') as z:
        for p in sorted(here.rglob('*')):
            if p.is_file(): z.write(p, p.relative_to(here).as_posix())
    there.pipe_file('/bucket/fake.zip', b'PK\3\4 no zip')
    with there.open('/bomb.zip', 'wb') as f, zipfile.ZipFile(f, 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.bmp', bytes(2**25))
    yield 'memory://bucket'
    there.rm('/bucket', recursive=True)
    for p in ('/bucket.zip', '/bomb.zip'): there.rm(p)


@pytest.fixture
def ask(run, tmp_path):
    return PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), precision='fp32', device='cpu', bs=4, workers=2, known=str(run.path))


@pytest.mark.parametrize('made', ['{bucket}', '{bucket}/', '{bucket}.zip', 'file://{here}'])
def test_rows_are_those_of_the_folder(here, bucket, ask, made, tmp_path):
    predict(here, replace(ask, out=str(tmp_path/'local.csv')))
    done = predict(made.format(bucket=bucket, here=here), replace(ask, html=str(tmp_path/'g.html')))
    assert Path(ask.out).read_bytes() == (tmp_path/'local.csv').read_bytes() and (done.rows, done.failed) == (len(ODD) + 2, 2)


def test_a_pattern_a_picture_and_a_list(here, bucket, ask, tmp_path):
    def names(where, **kw): return list(open_inputs(where, **kw).names)
    assert names(f'{bucket}/*.png') == sorted(n for n in [*ODD, 'empty.png'] if n.endswith('.png') and '/' not in n)
    assert names(f'{bucket}/new/c.png') == ['c.png'] and names('memory://bucket/new') == ['c.png', 'deep/d.JPG']
    (tmp_path/'list.txt').write_text('new/c.png\ngone.png\na b.png\n')
    done = predict(tmp_path/'list.txt', replace(ask, root=bucket))
    assert (done.rows, done.errors) == (3, [('gone.png', 'no such file')])


def test_a_prediction_is_gone_on_with_where_it_is_of_the_same_url(bucket, ask):
    def stop(n):
        seen.append(n)
        if sum(seen) == 6: raise KeyboardInterrupt
    for where, words in ((bucket, None), (f'{bucket}.zip', 'root was')):
        seen = []
        with pytest.raises(KeyboardInterrupt): predict(bucket, ask, lambda total: stop)
        if words:
            with pytest.raises(SmileError, match=words): predict(where, replace(ask, resume=True))
        else: assert predict(where, replace(ask, resume=True)).resumed == 4


@pytest.mark.parametrize('where,words,hint', [
    ('memory://nowhere', 'does not exist', 'Name a folder'), ('memory://bucket/notes.md', 'holds no images', 'Pass'),
    ('memory://no.zip', 'does not exist', ''), ('memory://bucket/fake.zip', 'cannot be read as a zip', 'Unpack it'),
    ('nothing://x', 'cannot be opened', 'fsspec knows'), ('memory://bucket/*.webp', 'holds no images', 'Pass')])
def test_what_is_not_there_is_said(bucket, where, words, hint):
    with pytest.raises(SmileError, match=words) as e: open_inputs(where)
    assert hint in e.value.hint and not isinstance(e.value, OptionError)


def test_a_missing_package_is_named(monkeypatch):
    "A protocol whose package is not installed: one line, and what to install"
    from fsspec.registry import known_implementations
    monkeypatch.setitem(known_implementations, 'far', {'class': 'nopackage.Far', 'err': 'Install nopackage to access Far'})
    with pytest.raises(SmileError, match='far://x cannot be opened') as e: open_inputs('far://x')
    assert e.value.hint == 'Install nopackage to access Far'


def test_urls_and_options(bucket, ask):
    for kw, where, words in ((dict(), [bucket, 'a.png'], 'goes with nothing else'), (dict(root='.'), bucket, 'does not go with')):
        with pytest.raises(OptionError, match=words): predict(where, replace(ask, **kw))
    with pytest.raises(OptionError, match='is a URL'): predict(bucket, replace(ask, out='memory://p.csv'))
    assert [is_url(w) for w in ('s3://a', 'simplecache::s3://a', 'C:\\x', 'C:/x', 'a::b.png', 'x:y', '/a', 'gs://')] == [True, True] + [False] * 5 + [True]


def test_a_listing_that_fails_is_an_error_and_no_empty_folder(monkeypatch, bucket):
    from fsspec.implementations.memory import MemoryFileSystem
    real = MemoryFileSystem.ls
    def ls(self, path, *a, **k):
        if path.endswith('deep'): raise PermissionError('AccessDenied')
        return real(self, path, *a, **k)
    monkeypatch.setattr(MemoryFileSystem, 'ls', ls)
    with pytest.raises(SmileError, match='cannot be listed: PermissionError: AccessDenied'): open_inputs(bucket)


def test_a_bomb_at_a_url_is_not_unpacked(bucket):
    with pytest.raises(ImageError, match='bytes that unpack to'): remote_reader('memory://bomb.zip').read_bytes('a.bmp')


def test_a_picture_that_cannot_be_fetched_costs_its_own_row(monkeypatch, bucket):
    monkeypatch.setattr(fastsmile.data.readers, 'MAX_IMAGE_BYTES', 100)
    with pytest.raises(ImageError, match='more than 100 bytes'): remote_reader(bucket).read_bytes('a b.png')
    class Failing:
        def cat_file(self, *a, **k): raise RuntimeError('the line is\ncut')
    reader = remote_reader(bucket)
    monkeypatch.setattr(RemoteFolderReader, 'filesystem', property(lambda self: (Failing(), '')))
    with pytest.raises(ImageError, match=r'cannot be read: the line is\\x0acut'): reader.read_bytes('a b.png')


def test_links_that_lead_round_end(tmp_path):
    folder(tmp_path/'d', {'a/x.png': picture()})
    (tmp_path/'d'/'a'/'loop').symlink_to(tmp_path/'d')
    assert 'a/x.png' in remote_reader(f'file://{tmp_path}/d').names() and len(remote_reader(f'file://{tmp_path}/d').names()) < 5


def test_sources_are_read_and_audited(faces, tmp_path):
    "A table beside its pictures, the table itself, class folders"
    folder(tmp_path/'classes', {f'{c}/{i}.png': picture(seed=i + 9 * len(c)) for c in ('yes', 'no') for i in range(3)})
    for where in (faces, faces/'train.csv', tmp_path/'classes'):
        one, two = read_source(where), read_source(f'file://{where}')
        assert two.frame.equals(one.frame) and two.images_without_row == one.images_without_row
        assert type(one.reader) is FolderReader and type(two.reader) is RemoteFolderReader
    with zipfile.ZipFile(tmp_path/'faces.zip', 'w') as z:
        for p in faces.rglob('*.*'): z.write(p, p.relative_to(faces).as_posix())
    assert read_source(f'file://{tmp_path}/faces.zip').frame.equals(read_source(tmp_path/'faces.zip').frame)
    one, two = (audit(w, AuditConfig(out=str(tmp_path/out))) for w, out in ((faces, 'one'), (f'file://{faces}', 'two')))
    for name in ('audit.json', 'plan.csv', 'table.csv'): assert (one.path/name).read_bytes() == (two.path/name).read_bytes(), name
    with pytest.raises(SmileError, match='does not exist'): read_source('memory://nowhere')


def test_a_reader_is_the_same_in_another_folder(here, tmp_path, monkeypatch):
    "What is sent to another process finds its files there"
    import pickle
    monkeypatch.chdir(here)
    sent = pickle.dumps(FolderReader('.'))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(sent).read_image('new/c.png').size == (24, 24) and os.path.isabs(pickle.loads(sent).location)


def test_a_run_of_a_url_finds_its_source_again(faces, tiny, tmp_path, monkeypatch):
    made, url = fit(f'file://{faces}', replace(tiny, epochs=1, tta='none', out=str(tmp_path/'r'))), f'file://{faces}'
    monkeypatch.chdir(tmp_path)
    assert made.config['source'] == url and len(made.data.source.frame)
    with pytest.raises(SmileError, match='is what this run was trained on'): evaluate(made.path, url)
    def ask(known):
        predict(faces/'happy_images', PredictConfig(overwrite=True, model=str(made.path), out=str(tmp_path/'p.csv'), device='cpu', known=known))
        return (tmp_path/'p.csv').read_text()
    assert ask(str(made.path)).count('happy_images/') > 100 and ask(url) == ask(str(faces))
    (tmp_path/'r'/'config.json').write_text((tmp_path/'r'/'config.json').read_text().replace('"finished"', '"stopped"'))
    with pytest.raises(SmileError, match=f'was trained on {url}, not on'): resume_arguments('memory://bucket', FitConfig(resume=str(tmp_path/'r')))
    assert resume_arguments(url, FitConfig(resume=str(tmp_path/'r')))[0] == url
