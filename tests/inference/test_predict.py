"Every input gets its row, whatever it is and whatever happens; a run that is killed goes on; what is quicker says the same."
import csv
import io
import json
import os
import shutil
import time
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import folder, picture
from forked import Program, run_python
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastsmile.inference.rows import RowOptions, make_row_format
from fastsmile.cli.tables import predict_output
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_json, write_json
from fastsmile.core.system import Interrupted
from fastsmile.data.images import Preprocessing, decode_image, resize_and_crop
from fastsmile.data.readers import FolderReader
from fastsmile.data.splits import read_training_fingerprints
from fastsmile.inference.inputs import external_sort, open_inputs
from fastsmile.config.commands import PredictConfig
from fastsmile.inference.load import load_model
from fastsmile.inference.predict import predict_rows
from fastsmile.inference.tta import TTA_VIEWS, predict_views
from fastsmile.runs.predict import predict
from fastsmile.core.files import write_safe_csv


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Forty pictures in two folders, and one that is broken"
    colours = ['navy', 'red', 'olive', 'white', 'teal', 'gray', 'pink', 'gold']
    files = {f'{"ab"[i % 2]}/{i:02}.{"jpg" if i % 3 else "png"}': picture(colours[i % 8], (30 + i, 40), 'JPEG' if i % 3 else 'PNG') for i in range(40)}
    return folder(tmp_path_factory.mktemp('album'), files | {'a/broken.jpg': b'no picture'})


@pytest.fixture
def ask(run, tmp_path):
    "Options of a prediction with the tiny run's model"
    return PredictConfig(model=str(run.path), out=str(tmp_path/'out'/'p.csv'), precision='fp32', device='cpu', bs=4, workers=2,
                         overwrite=True)


def rows_of(path): return list(csv.DictReader(open(path, newline='', encoding='utf-8', errors='surrogateescape')))


def shell(*args, cwd=None, stdin=None):
    return run_python(['-m', 'fastsmile', *args], cwd, os.environ | dict(COLUMNS='160', TERM='dumb'), stdin or '')


# what to predict on

def test_a_folder_is_walked_in_order_and_loops_end(album, ask, tmp_path):
    (album/'a'/'loop').symlink_to(album)
    (album/'a'/'self.jpg').symlink_to(album/'a'/'self.jpg')
    (album/'.hidden').mkdir()
    (album/'.hidden'/'x.png').write_bytes(picture())
    try: done = predict(album, ask)
    finally: (album/'a'/'loop').unlink(); (album/'a'/'self.jpg').unlink()
    rows = rows_of(ask.out)
    assert done.rows == len(rows) == 42 and done.failed == 2 and [r['path'] for r in rows] == sorted(r['path'] for r in rows)
    assert {r['path']: r['error'] for r in rows if r['error']}['a/broken.jpg'] == 'not an image that can be read'
    assert all(not r['label'] and not r['confidence'] for r in rows if r['error'])


def test_lists_give_a_row_for_each_line(album, ask, tmp_path):
    lines = ['b/01.jpg', 'a/00.png', 'b/01.jpg', 'gone.jpg', 'a/broken.jpg', str(album/'a'/'02.jpg'), '../../etc/passwd', 'ä\udcff.jpg']
    (album/'list.txt').write_bytes(b'\xef\xbb\xbf' + '\r\n'.join([*lines[:3], '', *lines[3:]]).encode('utf-8', 'surrogateescape'))
    predict(album/'list.txt', ask)
    rows = rows_of(ask.out)
    assert [r['path'] for r in rows] == lines
    assert [bool(r['error']) for r in rows] == [False, False, False, True, True, False, True, True]
    whole = {r['path']: r for r in predict_rows(load_model(ask.model), FolderReader(album), ['b/01.jpg'])}
    assert abs(float(rows[0]['confidence']) - whole['b/01.jpg']['confidence']) < 1e-5
    predict(album/'list.txt', replace(ask, root=str(tmp_path)))
    assert sum(not r['error'] for r in rows_of(ask.out)) == 1  # the absolute one


@pytest.mark.parametrize('text,column,names', [
    ('id,image\n1,a/00.png\n2,b/01.jpg\n', None, ['a/00.png', 'b/01.jpg']), ('id;Path\n1;a/00.png\n', None, ['a/00.png']),
    ('who,face\nAnn,a/00\n"Bob, Jr.",\nEve,b/01\n', 'face', ['a/00', '', 'b/01']), ('a/00,happy\nb/01,sad\n', '1', ['a/00', 'b/01']),
    ('face\nb/01.jpg\n', 'FACE', ['b/01.jpg'])])
def test_a_column_of_a_csv(album, ask, text, column, names):
    (album/'t.csv').write_text(text)
    predict(album/'t.csv', replace(ask, image_col=column))
    rows = rows_of(ask.out)
    assert [r['path'] for r in rows] == names and [bool(r['error']) for r in rows] == [not n for n in names]


def test_predictions_are_an_input_again(album, ask, tmp_path):
    predict(album, ask)
    first = rows_of(ask.out)
    predict(ask.out, replace(ask, root=str(album), out=str(tmp_path/'again.csv')))
    assert rows_of(tmp_path/'again.csv') == first


def test_zip_pattern_and_pictures(album, ask, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for p in sorted(album.rglob('*.*g')): z.write(p, p.relative_to(album).as_posix())
    predict(album, ask)
    want = {r['path']: r['confidence'] for r in rows_of(ask.out)}
    predict(tmp_path/'z.zip', ask)
    assert {r['path']: r['confidence'] for r in rows_of(ask.out)} == want
    monkeypatch.chdir(album)
    for where, n in (('**/*.png', 14), ('a/*', 21), (['b', 'a/00.png', 'a/00.png'], 22), ('a/02.jpg', 1), (['a/02.jpg', 'a/broken.jpg'], 2)):
        done = predict(where, ask)
        rows = rows_of(ask.out)
        assert done.rows == len(rows) == n and all((album/r['path']).exists() for r in rows)


def test_standard_input(album, run, tmp_path):
    r = shell('predict', '-', '--model', run.path, '--out', tmp_path/'p.csv', cwd=album, stdin='b/01.jpg\n\nno.jpg\na/00.png\n')
    assert r.returncode == 0, r.stderr
    assert [(x['path'], x['error']) for x in rows_of(tmp_path/'p.csv')] == [('b/01.jpg', ''), ('no.jpg', 'no such file'), ('a/00.png', '')]


@pytest.mark.parametrize('where,kw,words', [
    ('nowhere', {}, 'does not exist'), ('a' * 300 + '.png', {}, 'does not exist'), ('a/' * 3000, {}, 'does not exist'),
    ('*.nothing', {}, 'holds no images'), (['-', 'a'], {}, 'goes with nothing else'),
    ('.', dict(root='.'), 'does not go with'),
    ('.', dict(image_col='x'), 'does not go with'), ('t.csv', dict(image_col='7'), 'begins with who, face'), ('t.csv', {}, 'is needed'),
    ('empty.txt', {}, 'holds no images'), ('z/bad.zip', {}, 'cannot be read as a zip'), ('t.csv', dict(root='nowhere'), 'neither a folder nor a zip'),
    ('t.csv', dict(root='a' * 300, image_col='1'), 'neither a folder nor a zip')])
def test_inputs_that_cannot_be_used(tmp_path, monkeypatch, where, kw, words):
    folder(tmp_path, {'t.csv': 'who,face\nAnn,a\n', 'empty.txt': '\n', 'z/bad.zip': b'PK\x03\x04 no zip'})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SmileError, match=words): open_inputs(where, **kw)


def test_names_that_our_own_csv_made_harmless(tmp_path):
    "An apostrophe is taken away where the cell as it stands names nothing: in a folder and in a zip"
    files = {'=a.png': picture(), '-b.png': picture(), "'@": picture(), 'c.png': picture()}
    write_safe_csv(pd.DataFrame(dict(path=[*files, '=gone.png'])), folder(tmp_path, files)/'p.csv')
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for n, d in files.items(): z.writestr(n, d)
    for root in (None, str(tmp_path/'z.zip')):
        made = open_inputs(tmp_path/'p.csv', root=root)
        assert list(made.names) == [*files, '=gone.png'] and made.reader.read_image('=a.png').size == (24, 24)
    folder(tmp_path, {'q.csv': "path\n'-b.png\n", "'-b.png": picture()})
    assert list(open_inputs(tmp_path/'q.csv').names) == ["'-b.png"]  # somebody's own name stays


@given(st.lists(st.text(st.characters(codec='utf-8', exclude_characters='\0') | st.sampled_from('\udc80\udcff'), max_size=6), max_size=40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_sorting_on_disk_is_sorting(names, run):
    n, out = external_sort(names, run)
    assert n == len(names) and list(out) == sorted(names)


# what comes out

def test_the_three_formats_say_the_same(album, ask, tmp_path):
    pq = pytest.importorskip('pyarrow.parquet')
    for kind in ('csv', 'jsonl', 'parquet'): predict(album, replace(ask, out=str(tmp_path/f'p.{kind}')))
    rows = rows_of(tmp_path/'p.csv')
    lines = [json.loads(line) for line in open(tmp_path/'p.jsonl')]
    table = pq.read_table(tmp_path/'p.parquet')
    assert [r['path'] for r in rows] == [r['path'] for r in lines] == table['path'].to_pylist()
    assert [float(r['confidence']) if r['confidence'] else None for r in rows] == [r['confidence'] for r in lines] == table['confidence'].to_pylist()
    assert [r['error'] for r in rows] == table['error'].to_pylist() and not list(tmp_path.glob('*.part*'))


def test_raw_probabilities_have_columns_of_their_own(album, ask):
    done = predict(album, replace(ask, raw=True, uncalibrated=True))
    assert 'raw_ columns as the network gives them' in done.run_info['probabilities'] and 'corrected' in done.run_info['probabilities']
    row, model = rows_of(ask.out)[0], load_model(ask.model)
    raw, p = (np.array([float(row[f'{k}_{c}']) for c in model.spec.classes]) for k in ('raw', 'p'))
    shifted = raw * np.exp(model.metadata.shift)
    assert np.abs(shifted / shifted.sum() - p).max() < 1e-9 < np.abs(raw - p).max()
    assert 'as training saw them' in make_row_format(replace(model, metadata=replace(model.metadata, shift=[0.] * 3))).description


def killed(args, part, least, cwd=None):
    "Start a run, kill it when its part has so many rows, and return how many it had"
    p = Program(['-m', 'fastsmile', *args], cwd)
    end = time.time() + 60
    while time.time() < end and p.poll() is None and (not part.exists() or part.read_bytes().count(b'\n') <= least): time.sleep(0.005)
    assert p.poll() is None, 'the run ended before it was killed'
    p.kill()
    p.communicate()
    return part.read_bytes().count(b'\n')


def test_a_killed_run_goes_on(album, run, ask, tmp_path):
    names = sorted(n.relative_to(album).as_posix() for n in album.rglob('*.*g')) * 20
    (tmp_path/'l.txt').write_text('\n'.join(names))
    same = replace(ask, root=str(album), bs=8, tta='flip', out=str(tmp_path/'p.csv'))
    args = f'predict {tmp_path}/l.txt --root {album} --model {run.path} --bs 8 --tta flip --precision fp32 --device cpu --workers 2 --out {same.out}'.split()
    out, part = tmp_path/'p.csv', tmp_path/'p.csv.part'
    assert killed(args, part, 100) < len(names) and not out.exists()
    with open(part, 'a') as f: f.write('a/00.png,half a ro')  # a row that was cut off
    done = predict(tmp_path/'l.txt', replace(same, resume=True))
    assert done.resumed >= 96 and done.rows == len(names) == sum(done.labels.values()) + done.failed and not part.exists()
    predict(tmp_path/'l.txt', replace(same, out=str(tmp_path/'whole.csv')))
    assert (tmp_path/'whole.csv').read_bytes() == out.read_bytes() and [r['path'] for r in rows_of(out)] == names


def test_what_a_run_has_done_is_on_disk(album, ask):
    "At most the group that is being written is not there when the process dies"
    seen = []
    def progress(total):
        def tick(n):
            seen.append(n)
            if sum(seen) == 23: raise KeyboardInterrupt
        return tick
    with pytest.raises(KeyboardInterrupt): predict(album, ask, progress)
    part = ask.out + '.part'
    assert 23 - len(rows_of(part)) < 4 and not os.path.exists(ask.out)
    done = predict(album, replace(ask, resume=True))
    assert done.resumed == 20 and done.rows == 41


def test_resume_refuses_another_call(album, ask):
    def stop(total): raise KeyboardInterrupt
    def interrupted(n=9):
        seen = []
        with pytest.raises(KeyboardInterrupt): predict(album, ask, lambda total: lambda k: (seen.append(k), stop(0) if sum(seen) == n else None))
    interrupted()
    others = (dict(tta='flip'), 'tta was none'), (dict(raw=True), 'columns was'), (dict(precision='bf16'), 'precision was fp32'), (dict(bs=8), 'bs was 4')
    for change, words in others:
        with pytest.raises(SmileError, match=words): predict(album, replace(ask, resume=True, **change))
    with pytest.raises(SmileError, match='root was'): predict(album/'b', replace(ask, resume=True))
    (album/'other').mkdir()
    (album/'other'/'x.png').write_bytes(picture())
    try:
        with pytest.raises(SmileError, match='workers was 2'): predict(album, replace(ask, resume=True, workers=1))
        (album/'a'/'00.png').rename(album/'other'/'00.png')
        with pytest.raises(SmileError, match='The inputs have changed'): predict(album, replace(ask, resume=True))
    finally:
        (album/'other'/'00.png').rename(album/'a'/'00.png')
        (album/'other'/'x.png').unlink()
        (album/'other').rmdir()
    interrupted()
    with pytest.raises(SmileError, match='threshold was None'): predict(album, replace(ask, resume=True, threshold='balanced'))
    with pytest.raises(SmileError, match='columns was'): predict(album, replace(ask, resume=True, sets=True))
    assert predict(album, ask).resumed == 0  # without --resume from the start
    assert predict(album, replace(ask, resume=True)).resumed == 0  # nothing to go on with


def test_resume_refuses_a_model_that_reads_otherwise(album, ask, tmp_path):
    "The same weights under another rule are another model"
    import shutil
    model = tmp_path/'model'
    shutil.copytree(os.path.join(ask.model, 'model'), model)
    ask, seen = replace(ask, model=str(model)), []
    def tick(n):
        seen.append(n)
        if len(seen) == 9: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): predict(album, ask, lambda total: tick)
    config = read_json(model/'config.json')
    config['fastsmile']['calibration']['rule'] = 'argmax'
    write_json(model/'config.json', config)
    with pytest.raises(SmileError, match='model was'): predict(album, replace(ask, resume=True))


def test_resume_keeps_the_size_of_the_groups(album, ask, tmp_path, monkeypatch):
    "Where memory has become scarce since, groups of another size would be another call"
    ask, seen = replace(ask, bs=None), []
    monkeypatch.setattr('fastsmile.inference.predict.default_batch_size', lambda *a, **k: 4)
    def tick(n):
        seen.append(n)
        if len(seen) == 9: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): predict(album, ask, lambda total: tick)
    monkeypatch.setattr('fastsmile.inference.predict.default_batch_size', lambda *a, **k: 2)
    assert predict(album, replace(ask, resume=True)).resumed == 8


def test_names_that_are_hard_to_write(run, ask, tmp_path):
    "Line ends, quotes, commas and bytes that are no Unicode in a name: one row each, also where a part is read again"
    names = ['a\rb.png', 'a\nb.png', 'a\r\nb.png', 'a"b,c.png', "a'b;c.png", ' a.png', os.fsdecode(b'\xff.png'), 'a\\nb.png']
    folder(tmp_path/'odd', dict.fromkeys(names, picture()))
    seen = []
    def tick(n):
        seen.append(n)
        if len(seen) == 7: raise KeyboardInterrupt
    for kind in ('csv', 'jsonl', 'parquet'):
        seen.clear()
        one = replace(ask, out=str(tmp_path/f'p.{kind}'), bs=3)
        with pytest.raises(KeyboardInterrupt): predict(tmp_path/'odd', one, lambda total: tick)
        assert predict(tmp_path/'odd', replace(one, resume=True, html=str(tmp_path/'g.html'))).resumed == 6
    assert [r['path'] for r in rows_of(tmp_path/'p.csv')] == sorted(names)
    assert [json.loads(r)['path'] for r in open(tmp_path/'p.jsonl', errors='surrogateescape')] == sorted(names)


@pytest.mark.parametrize('asked', ['sets', 'abstain'])
def test_what_was_never_fitted_is_refused(album, ask, tmp_path, asked):
    "A model without rows in calib has no sets or threshold to give; its probabilities are said to be as they were"
    from fastsmile.models.bundle import save_bundle
    from fastsmile.metrics.calibration import unfitted_calibration
    model = load_model(ask.model)
    save_bundle(replace(model, metadata=model.metadata.calibrated(unfitted_calibration(model.metadata.prior, 'argmax'))), tmp_path/'plain')
    with pytest.raises(OptionError, match=f'--{asked}: this model was not calibrated'):
        predict(album, replace(ask, model=str(tmp_path/'plain'), **{asked: True}))
    assert 'not calibrated' in predict(album, replace(ask, model=str(tmp_path/'plain'))).run_info['probabilities']


def test_the_input_is_never_replaced(album, ask, tmp_path):
    (tmp_path/'t.csv').write_text(f'path\n{album}/a/00.png\n')
    for out in (tmp_path/'t.csv', tmp_path/'x'/'..'/'t.csv'):
        with pytest.raises(OptionError, match='is the input'): predict(tmp_path/'t.csv', replace(ask, out=str(out)))
    assert (tmp_path/'t.csv').read_text().startswith('path')


def test_every_column_has_its_type_in_parquet(album, ask, tmp_path):
    pq, pa = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    all_ = dict(raw=True, abstain=True, sets=True)
    for kind in ('csv', 'parquet'): predict(album, replace(ask, out=str(tmp_path/f'p.{kind}'), **all_))
    table, rows = pq.read_table(tmp_path/'p.parquet'), rows_of(tmp_path/'p.csv')
    text = {'path', 'label', 'most_probable', 'withheld', 'set', 'error'}
    assert table.column_names == list(rows[0]) and {c for c in table.column_names if table.schema.field(c).type == pa.string()} == text
    assert all(table.schema.field(c).type == pa.float64() for c in set(table.column_names) - text)
    for c in set(table.column_names) - text: assert [float(r[c]) if r[c] else None for r in rows] == table[c].to_pylist()


def test_two_writers_of_one_file(album, ask):
    pytest.importorskip('fcntl')
    from fastsmile.inference.outputs import PredictionFile
    with PredictionFile(ask.out, ['path', 'error'], [], {}):
        with pytest.raises(SmileError, match='Another process is writing'): predict(album, ask)


@pytest.mark.parametrize('out,words', [('p.xlsx', 'not known'), ('/proc/p.csv', 'cannot be written')])
def test_outputs_that_cannot_be_written(album, ask, out, words):
    with pytest.raises(SmileError, match=words): predict(album, replace(ask, out=out))


# what the numbers are

def test_tta_is_the_mean_over_its_views(album, run):
    model, reader = run.model, FolderReader(album)
    names = [n for n in reader.names() if 'broken' not in n]
    def probs(**kw): return np.array([[r[f'p_{c}'] for c in model.spec.classes] for r in predict_rows(model, reader, names, device='cpu', **kw)])
    plain = probs()
    for tta in ('flip', 'crops', 'full'):
        a, b = probs(tta=tta), probs(tta=tta, mean='logits')
        assert np.abs(a - plain).max() > 1e-6 and np.abs(a - b).max() > 1e-9 and np.abs(a.sum(1) - 1).max() < 1e-9 and np.abs(b.sum(1) - 1).max() < 1e-9
        assert np.array_equal(a, probs(tta=tta))
    assert not any(v.flip for v in TTA_VIEWS['crops']) and {v.zoom for v in TTA_VIEWS['full']} == {1.0, 0.9}
    mirrored = np.array([[r[f'p_{c}'] for c in model.spec.classes] for r in predict_rows(model, Mirrored(album), names, tta='flip', device='cpu')])
    assert np.abs(mirrored - probs(tta='flip')).max() < 1e-6  # flip does not tell a picture from its mirror image


class Mirrored(FolderReader):
    def read_image(self, name, prep=None): return super().read_image(name, prep).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_views_need_the_memory_of_one(album, run, monkeypatch):
    "The network never sees more pictures at once than a group has, however many views there are"
    from fastsmile.inference.torch_backend import TorchBackend
    most = []
    real = TorchBackend._forward
    monkeypatch.setattr(TorchBackend, '_forward', lambda self, x: (most.append(len(x)), real(self, x))[1])
    list(predict_rows(run.model, FolderReader(album), FolderReader(album).names(), tta='full', bs=8, device='cpu'))
    assert max(most) == 8


def test_a_network_without_numbers_gives_a_reason(album, run, tmp_path):
    model = load_model(run.path)
    with torch.no_grad(): model.net.get_classifier().bias[0] = float('nan')
    rows = list(predict_rows(model, FolderReader(album), FolderReader(album).names(), device='cpu'))
    assert len(rows) == 41 and all(r['error'] for r in rows) and not any(r['label'] for r in rows)


def test_fp16_that_overflows_is_made_again(album, run):
    model = load_model(run.path)
    with torch.no_grad(): model.net.get_classifier().weight.mul_(1e6)
    a, b = ([r['label'] for r in predict_rows(model, FolderReader(album), FolderReader(album).names(), device='cpu', precision=p)] for p in ('fp16', 'fp32'))
    assert a == b


@pytest.fixture(scope='module')
def smiles(shared):
    "A network with real weights, its head fitted to smiles; 200 other pictures as it sees them, and which smile"
    from sklearn.linear_model import LogisticRegression
    from fastsmile.models.spec import Model, ModelMetadata
    from fastsmile.inference.torch_backend import TorchBackend
    from fastsmile.data.readers import ZipReader
    from fastsmile.models.factory import build_network, make_spec
    reader, spec = ZipReader(shared/'data'/'smiles.zip'), make_spec('mobilenetv2_100', ['no', 'yes'], size=64)
    with open(shared/'data'/'smiles.csv', newline='') as f: label = {os.path.basename(next(iter(r.values()))): r['label'] for r in csv.DictReader(f)}
    names = np.random.default_rng(0).permutation([n for n in reader.names() if os.path.basename(n) in label])[:600].tolist()
    net, body = (build_network(spec, str(shared/'weights'/'mobilenetv2_100.safetensors')).eval() for _ in range(2))
    y = np.array([label[os.path.basename(n)] == 'smile' for n in names])
    x = np.stack([resize_and_crop(reader.read_image(n), spec.prep) for n in names])
    body.reset_classifier(0)
    metadata = ModelMetadata([.5, .5], [0, 0], [0, 0], 'argmax')
    features = TorchBackend(Model(spec, metadata, body), device='cpu').logits(x)
    fit = LogisticRegression(C=0.1, max_iter=300).fit(features[:400], y[:400])
    with torch.no_grad():
        net.get_classifier().weight.copy_(torch.from_numpy(np.concatenate([-fit.coef_, fit.coef_]) / 2))
        net.get_classifier().bias.copy_(torch.from_numpy(np.concatenate([-fit.intercept_, fit.intercept_]) / 2))
    return Model(spec, metadata, net), x[400:, None], y[400:]


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_narrow_precisions_agree_with_fp32_on_real_faces(smiles, precision):
    "The top class is the same on 99.5% of 200 pictures"
    from fastsmile.inference.torch_backend import TorchBackend
    model, x, y = smiles
    said = make_row_format(model).decisions
    exact, quick = (predict_views(TorchBackend(model, p, 'cpu'), x, TTA_VIEWS['none'], 'probs', said)[0].argmax(1) for p in ('fp32', precision))
    assert (exact == y).mean() > 0.8 and (exact == quick).mean() >= 0.995


def test_what_a_class_threshold_is_compared_with_is_said(run):
    from fastsmile.inference.rows import RowOptions, make_row_format
    name = run.model.spec.classes[0]
    words = make_row_format(run.model, request=RowOptions(threshold=f'{name}=0.8')).description
    assert f'{name}=0.8 is compared with the calibrated probability' in words
    assert 'compared' not in make_row_format(run.model, request=RowOptions(threshold='argmax')).description


def test_labels_that_differ_from_the_most_probable_class_name_it(album, run, ask, tmp_path):
    pq = pytest.importorskip('pyarrow.parquet')
    classes = run.model.spec.classes
    ask = replace(ask, threshold=f'{classes[2]}=0.0')  # every label is that class
    done = [predict(album, replace(ask, out=str(tmp_path/f'p.{kind}'))) for kind in ('csv', 'jsonl', 'parquet')]
    rows = [r for r in rows_of(tmp_path/'p.csv') if not r['error']]
    best = [max(classes, key=lambda c: float(r[f'p_{c}'])) for r in rows]
    differ = ['' if c == classes[2] else c for c in best]
    assert [r['most_probable'] for r in rows] == differ and any(differ) and {r['label'] for r in rows} == {classes[2]}
    lines = [json.loads(line) for line in open(tmp_path/'p.jsonl')]
    assert [r['most_probable'] for r in lines if not r['error']] == [c or None for c in differ]
    assert [c for c, e in zip(*(pq.read_table(tmp_path/'p.parquet')[k].to_pylist() for k in ('most_probable', 'error'))) if not e] == differ
    assert {d.overruled for d in done} == {len([c for c in differ if c])}
    shown, result = predict_output(done[0])
    assert any(f'labels ({done[0].overruled}) differ from the most probable class: the rule is --threshold {classes[2]}=0.0' in str(s) for s in shown)
    frame = run.model.predict(album, request=RowOptions(threshold=ask.threshold), precision='fp32')
    assert frame.most_probable[frame.error == ''].tolist() == differ
    argmax = predict(album, replace(ask, threshold='argmax', out=str(tmp_path/'a.csv')))
    assert argmax.overruled == 0 and {r['most_probable'] for r in rows_of(argmax.out)} == {''}
    (tmp_path/'s.json').write_text(json.dumps({c: 1. if c == classes[0] else 1e-6 for c in classes}))
    moved = predict(album, replace(ask, prior=str(tmp_path/'s.json'), out=str(tmp_path/'m.csv')))
    assert {r['most_probable'] for r in rows_of(moved.out) if not r['error']} == {classes[0]} and moved.overruled == len(rows)


def test_the_files_of_an_earlier_run_are_kept(album, ask, tmp_path):
    out, ask = tmp_path/'out', replace(ask, overwrite=False, html=str(tmp_path/'out'/'g.html'))
    names = [str(p) for p in sorted(album.rglob('*.png'))]
    first, before = predict(names[:3], ask), {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(before) == {'p.csv', 'g.html'} and first.page == ask.html
    for i in (2, 3):
        done = predict(names, ask)
        assert (done.out, done.page, len(rows_of(done.out))) == (str(out/f'p-{i}.csv'), str(out/f'g-{i}.html'), len(names))
    assert before == {name: (out/name).read_bytes() for name in before}
    with pytest.raises(OptionError): predict(names, replace(ask, threshold='frown'))
    assert len(list(out.iterdir())) == 6
    replaced = predict(names, replace(ask, overwrite=True))
    assert (replaced.out, replaced.page) == (ask.out, ask.html) and len(rows_of(ask.out)) == len(names) and len(list(out.iterdir())) == 6


@pytest.mark.parametrize('more', [dict(overwrite=True), dict(resume=True), dict(overwrite=False)])
def test_rows_without_a_prediction_replace_nothing(album, ask, tmp_path, more):
    out, ask = tmp_path/'out', replace(ask, html=str(tmp_path/'out'/'g.html'))
    predict(sorted(map(str, album.rglob('*.png'))), ask)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    failed = predict([str(album/'a'/'broken.jpg')], replace(ask, **dict(overwrite=False) | more))
    assert before == {name: (out/name).read_bytes() for name in before}
    assert (failed.out, failed.page) == (str(out/'p-2.csv'), str(out/'g-2.html')) and rows_of(failed.out)[0]['error']


def test_a_wrong_input_says_nothing_of_where_rows_would_have_gone(album, ask, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    ask = replace(ask, overwrite=False)
    predict(album/'a', ask)
    capsys.readouterr()
    with pytest.raises(SmileError): predict(tmp_path/'nwe', ask)
    assert 'is kept' not in capsys.readouterr().err
    predict(album/'a', ask)
    assert 'is kept: --out is' in ' '.join(capsys.readouterr().err.split())


def test_a_numbered_file_is_resumed(album, ask, tmp_path):
    names, ask = sorted(map(str, album.rglob('*.png'))), replace(ask, overwrite=False, html=str(tmp_path/'out'/'g.html'))
    predict(names[:2], ask)
    before = [Path(p).read_bytes() for p in (ask.out, ask.html)]
    ticks = []
    def progress(total):
        def tick(n):
            ticks.append(n)
            if sum(ticks) == 9: raise KeyboardInterrupt
        return tick
    with pytest.raises(Interrupted, match=r'p-2.csv.part; the same command with --resume continues'): predict(names, ask, progress)
    done = predict(names, replace(ask, resume=True))
    assert (done.out, done.resumed, done.rows) == (str(tmp_path/'out'/'p-2.csv'), 8, len(names)) and done.page.endswith('g-2.html')
    assert before == [Path(p).read_bytes() for p in (ask.out, ask.html)] and not list((tmp_path/'out').glob('*.part*'))


@pytest.mark.parametrize('zipped', [False, True])
def test_training_images_among_the_inputs_are_counted(faces, run, ask, tmp_path, zipped):
    fingerprints = read_training_fingerprints(run.path)
    trained, new = [faces/p for p in fingerprints.path[:3]], picture(seed=99)
    there = folder(tmp_path/'new', {f'other name {i}.jpg': p.read_bytes() for i, p in enumerate(trained)} | {'new.png': new})
    if zipped:
        with zipfile.ZipFile(tmp_path/'new.zip', 'w') as z:
            for p in there.iterdir(): z.write(p, p.name)
        there = tmp_path/'new.zip'
    done = predict(there, ask)
    assert (done.trained, predict_output(done)[1]['trained']) == (3, 3)
    assert any('3 of these images are in the training data of this model' in str(line) for line in predict_output(done)[0])
    alone = shutil.copytree(run.path/'model', tmp_path/'alone')
    again = predict(there, replace(ask, model=str(alone)))  # nothing says what it was trained on
    assert again.trained == 0 and not any('training data' in str(line) for line in predict_output(again)[0])


COST = [[0, 1, 1], [2, 0, 1], [3, 1, 0]]  # true classes down, labels across

@pytest.mark.parametrize('tta,mean', [('none', 'probs'), ('flip', 'probs'), ('flip', 'logits')])
@pytest.mark.parametrize('kw,key', [({}, 'label'), (dict(threshold='balanced'), 'label'), (dict(threshold='cost'), 'label'),
                                    (dict(threshold='negative smile=0.2'), 'label'), (dict(abstain=True), 'withheld'), (dict(sets=True), 'set')])
def test_what_is_asked_decides_which_calls_are_close(run, monkeypatch, kw, key, tta, mean):
    "A narrow precision that is off by up to 0.14 a logit says what fp32 says, whichever boundary is asked about"
    from fastsmile.inference import torch_backend as room
    facts, rng = run.model.metadata, np.random.default_rng(0)
    classes = run.model.spec.classes
    calibration = replace(facts.calibration, temperature=1.7, costs=COST, min_confidence=0.5, set_thresholds=[.3, .2, .1])
    model = replace(run.model, metadata=replace(facts, calibration=calibration, shift=[.5, -.2, -.3]))
    z = rng.normal(0, 1.5, (500, 3)).astype(np.float32)
    x = np.zeros((500, 1, 32, 32, 3), np.uint8)
    x[:, 0, :, :, 0], x[:, 0, :, :, 1] = np.arange(500)[:, None, None] // 256, np.arange(500)[:, None, None] % 256
    def truth(pictures): return z[pictures[:, 0, 0, 0].astype(int) * 256 + pictures[:, 0, 0, 1]]
    reading = make_row_format(model, request=RowOptions(**kw))
    def rows(precision):
        e = room.TorchBackend(model, precision, 'cpu')
        if e.fp32_backend: e.fp32_backend._forward, e._forward = truth, lambda v: truth(v) + rng.uniform(-.14, .14, (len(v), 3)).astype(np.float32)
        else: e._forward = truth
        return [r[key] for r in reading.format(*predict_views(e, x, TTA_VIEWS[tta], mean, reading.decisions))], e.recomputed
    (exact, none), (quick, again) = rows('fp32'), rows('bf16')
    assert quick == exact and none == 0 < again < 350
    monkeypatch.setitem(room.UNCERTAIN_LEAD, 'bf16', 0.)
    assert rows('bf16')[0] != exact  # so the second look was needed
    assert set(exact) - {''} <= {'|'.join(c for c, i in zip(classes, n) if i) for n in np.ndindex(2, 2, 2)}


def test_reduced_jpegs_agree(shared):
    "A JPEG that is decoded at a part of its size gives nearly the same input: 0.8 of 255 levels in the mean, 2 for 99 in 100"
    with zipfile.ZipFile(shared/'data'/'clothing.zip') as z:
        data = [z.read(n) for n in sorted(z.namelist()) if n.endswith('.jpg')][::30]
    off, reduced = [], 0
    for prep in (Preprocessing(size=36), Preprocessing(size=32, interpolation='bicubic', crop_mode='center', crop_pct=0.9)):
        for d in data:
            small = decode_image(d, prep=prep)
            reduced += small.size != decode_image(d).size
            off.append(np.abs(resize_and_crop(small, prep).astype(int) - resize_and_crop(decode_image(d), prep)).mean())
    assert reduced > len(off) / 2 and np.mean(off) < 0.8 and np.percentile(off, 99) < 2


def test_reduced_jpegs_keep_orientation_reasons_and_greys():
    img, exif = Image.new('L', (800, 400), 60), Image.Exif()
    img.paste(200, (0, 0, 400, 400))
    exif[0x0112] = 6
    buf = io.BytesIO()
    img.save(buf, 'JPEG', exif=exif)
    small = decode_image(buf.getvalue(), prep=Preprocessing(size=50))
    assert small.mode == 'RGB' and small.size == (100, 200) and small.getpixel((50, 10))[0] > 180
    from fastsmile.data.images import ImageError
    with pytest.raises(ImageError, match='truncated'): decode_image(buf.getvalue()[:-200], prep=Preprocessing(size=50))


def test_memory_that_runs_out_halves_the_groups(album, run, monkeypatch):
    from fastsmile.inference.torch_backend import TorchBackend
    real = TorchBackend._forward
    def forward(self, x):
        if len(x) > 3: raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 999 bytes")
        return real(self, x)
    names = FolderReader(album).names()
    want = [r['confidence'] for r in predict_rows(run.model, FolderReader(album), names, bs=16, device='cpu')]
    monkeypatch.setattr(TorchBackend, '_forward', forward)
    got = [r['confidence'] for r in predict_rows(run.model, FolderReader(album), names, bs=16, device='cpu')]
    assert all(abs(a - b) < 1e-6 if a != '' else b == '' for a, b in zip(want, got))
    monkeypatch.setattr(TorchBackend, '_forward', lambda self, x: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(SmileError, match='Not enough memory on cpu for one image'): list(predict_rows(run.model, FolderReader(album), names, device='cpu'))


def test_threads_are_given_back(album, run):
    before = torch.get_num_threads()
    list(predict_rows(run.model, FolderReader(album), FolderReader(album).names(), bs=2, threads=3, device='cpu'))
    next(predict_rows(run.model, FolderReader(album), FolderReader(album).names(), bs=2, threads=3, device='cpu'))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize('arch,kw', [('resnet18', {}), ('mobilenetv2_100', {}), ('densenet121', {}), ('tf_efficientnet_lite0', {}),
                                     ('vit_tiny_patch16_224', dict(size=96)), ('convnext_atto', {}), ('regnetx_002', {}), ('ghostnet_050', {})])
def test_folding_changes_only_the_last_digits(arch, kw):
    import copy
    from fastsmile.models.device import fold_batchnorms
    from fastsmile.models.factory import build_network, make_spec
    torch.manual_seed(0)
    net = build_network(make_spec(arch, ['a', 'b'], **kw)).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.5, 2); m.bias.data.normal_(0, 0.1)
    folded = copy.deepcopy(net)
    n, norms = fold_batchnorms(folded), sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert n > 0 if norms else n == 0
    x = torch.randn(2, 3, kw.get('size', 64), kw.get('size', 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a, b = net(x), folded(x)
    assert (a - b).abs().max() < 1e-4 * max(1, a.abs().max())


def test_predicting_in_a_shell_imports_neither_fastai_nor_pandas(album, run, tmp_path):
    code = f'''
import sys
sys.argv = ['fastsmile', 'predict', {str(album)!r}, '--tta', '--model', {str(run.path)!r},
            '--out', {str(tmp_path/"p.jsonl")!r}, '--html', {str(tmp_path/"g.html")!r}]
from fastsmile.cli.commands import main
try: main()
except SystemExit as e: print(e.code, {{'fastai', 'pandas', 'matplotlib', 'sklearn'}} & set(sys.modules))
'''
    r = run_python(['-c', code], forget=('fastai', 'pandas', 'matplotlib', 'sklearn'))
    assert r.stdout.splitlines()[-1] == '0 set()' and (tmp_path/'g.html').exists() and (tmp_path/'p.jsonl').exists()


def test_memory_does_not_grow_with_rows(run, tmp_path):
    "Ten times the rows, the same peak"
    (tmp_path/'one.png').write_bytes(picture())
    code = '''
import resource, sys
from fastsmile.config.commands import PredictConfig
from fastsmile.runs.predict import predict as predict_to_file
predict_to_file(sys.argv[1], PredictConfig(model=sys.argv[2], out=sys.argv[1] + '.csv', device='cpu'))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''
    peaks = []
    for n in (500, 5000):
        (tmp_path/f'{n}.txt').write_text('one.png\n' * n)
        r = run_python(['-c', code, tmp_path/f'{n}.txt', run.path])
        peaks.append(int(r.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 30, peaks  # MiB


def test_the_options_reach_the_command_line(album, run, tmp_path):
    args = ['predict', album, '--model', run.path, '--out', tmp_path/'p.csv', '--json']
    plain = json.loads(shell(*args).stdout)
    assert plain['rows'] == 41 and plain['failed'] == 1 and plain['errors'] == [dict(path='a/broken.jpg', error='not an image that can be read')]
    other = json.loads(shell(*args, '--precision', 'bf16', '--tta', '--tta-mean', 'logits').stdout)
    assert other['precision'].startswith('bf16 on cpu') and other['views'] == 'flip, mean of logits'
    r = shell('predict', album/'a'/'00.png', album/'b'/'01.jpg', '--model', run.path, '--out', tmp_path/'p.csv')
    assert r.returncode == 0 and '2 images' in r.stdout and 'probabilities: p_ columns corrected' in r.stdout and 'a second' in r.stdout
    with pytest.raises(OptionError): replace(PredictConfig(), precision='fp8')


def test_a_file_that_somebody_else_wrote_is_not_replaced(run, tmp_path):
    from fastsmile.inference.outputs import check_replaceable
    ask = PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv'), html=str(tmp_path/'g.html'))
    (tmp_path/'one').mkdir()
    (tmp_path/'one'/'a.png').write_bytes(picture())
    for _ in range(2): assert predict(tmp_path/'one', ask).rows == 1  # its own give way to the next
    theirs = {'labels.csv': 'path,label,confidence\na.png,smile,sure\n', 'l.jsonl': '{"path": "a.png", "label": "smile"}\n', 'm.jsonl': '["path"\n',
              'n.html': '<title>My labels</title>', 'o.parquet': 'PAR1'}
    folder(tmp_path, theirs)
    (tmp_path/'folder.csv').mkdir()
    with pytest.raises(OptionError, match=r'--out .*folder\.csv is a folder'): predict(tmp_path/'one', replace(ask, out=str(tmp_path/'folder.csv')))
    for name in theirs:
        given = replace(ask, html=str(tmp_path/name)) if name.endswith('html') else replace(ask, out=str(tmp_path/name))
        if name.endswith('parquet'): pytest.importorskip('pyarrow')
        with pytest.raises(OptionError, match=f'{name} exists and is not .*: it is not replaced'): predict(tmp_path/'one', given)
        assert (tmp_path/name).read_text() == theirs[name]
    with pytest.raises(OptionError, match='--html .*labels.csv exists'): predict(tmp_path/'one', replace(ask, html=str(tmp_path/'labels.csv')))
    with pytest.raises(OptionError, match='both name'): predict(tmp_path/'one', replace(ask, html=ask.out))
    for kind in ('jsonl', 'parquet') if find_spec('pyarrow') else ('jsonl',):
        check_replaceable(predict(tmp_path/'one', replace(ask, html=None, out=str(tmp_path/f'p.{kind}'))).out, kind)
    (tmp_path/'empty.csv').touch()  # as mktemp leaves it
    assert predict(tmp_path/'one', replace(ask, html=None, out=str(tmp_path/'empty.csv'))).rows == 1
