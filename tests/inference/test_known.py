"`predict --known`: what is known takes its label and is marked, what is contradictory does not, and nothing of it is measured."
import csv
import io
import json
import os
import zipfile
from dataclasses import fields, replace

import numpy as np
import pytest
from conftest import folder, honest_pairs, png, saved_again
from forked import run_python
from PIL import Image

from fastsmile.core.errors import OptionError, SmileError
from fastsmile.data.readers import FolderReader
from fastsmile.inference.rows import open_known_images
from fastsmile.config.commands import EvaluateConfig, PredictConfig
from fastsmile.inference.outputs import PredictionFile
from fastsmile.runs.predict import predict
from fastsmile.runs.evaluate import evaluate
from fastsmile.data.sample import SAMPLE_CLASSES, draw_face, random_face_params

NO, YES, OTHER = 'NOT smile', 'positive smile', 'negative smile'


def face(seed, fmt='PNG', size=None, quality=90) -> bytes:
    "The bytes of a drawn face"
    rng, buf = np.random.default_rng(seed), io.BytesIO()
    img = draw_face(random_face_params(rng, list(SAMPLE_CLASSES)[seed % 3]), 96, rng)
    (img.resize((size, size)) if size else img).save(buf, fmt, **(dict(quality=quality) if fmt == 'JPEG' else {}))
    return buf.getvalue()


@pytest.fixture(scope='module')
def there(tmp_path_factory):
    "Known pictures 0 to 5 (4 stands there twice, under two labels), and pictures to ask about"
    d = tmp_path_factory.mktemp('known')
    labels = {'0': NO, '1': 'Positive  SMILE', '2': OTHER, '3': NO, '4': NO, '4b': YES, '5': 'frown', '6': YES, '7': OTHER}
    folder(d/'old', {f'{n}.png': face(int(n[0])) for n in labels} | {'labels.csv': 'file_name,label\n' + ''.join(f'{n}.png,{v}\n' for n, v in labels.items())})
    folder(d/'new', {'a same.png': face(1), 'b saved again.jpg': face(2, 'JPEG', 72, 70), 'c torn.png': face(4), 'd frown.png': face(5),
                     'e new.png': face(20), 'f broken.jpg': b'no picture', 'g new.jpg': face(21, 'JPEG')})
    return d


@pytest.fixture
def ask(run, there, tmp_path):
    return PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), precision='fp32',
                         device='cpu', bs=2, workers=2, known=str(there/'old'))


def rows_of(path): return list(csv.DictReader(open(path, newline='', encoding='utf-8')))


def test_known_pictures_take_their_label_and_are_marked(there, ask):
    predict(there/'new', replace(ask, known=None))
    alone = rows_of(ask.out)
    done = predict(there/'new', ask)
    rows = rows_of(ask.out)
    assert [r['path'] for r in rows] == [r['path'] for r in alone] == sorted(os.listdir(there/'new'))
    assert [(r['known'], r['known_label']) for r in rows] == [
        ('1.png', YES), ('2.png', OTHER), ('4.png', f'{NO}|{YES}'), ('5.png', 'frown'), ('', ''), ('', ''), ('', '')]
    assert [r['label'] for r in rows] == [YES, OTHER, *(r['label'] for r in alone[2:])] and rows[5]['error'] and not rows[5]['label']
    for r, a in zip(rows, alone):  # the probabilities stay the model's, and confidence is that of the label that stands there
        assert {k: r[k] for k in r if k.startswith('p_')} == {k: a[k] for k in a if k.startswith('p_')}
        assert r['confidence'] == (r[f'p_{r["label"]}'] if r['label'] else '')
    assert 'known' not in alone[0] and (done.known, done.conflicting, done.failed) == (2, 2, 1)
    assert 'known images of' in done.run_info['probabilities'] and sum(done.labels.values()) == 6


@pytest.mark.parametrize('kw', [dict(abstain=True), dict(uncalibrated=True), dict(sets=True, raw=True), dict(tta='full'), dict(out='p.jsonl'),
                                dict(html='g.html')])
def test_known_beside_other_options(there, ask, tmp_path, kw):
    kw = {k: str(tmp_path/v) if k in ('out', 'html') else v for k, v in kw.items()}
    ask = replace(ask, **kw)
    predict(there/'new', ask)
    rows = [json.loads(line) for line in open(ask.out)] if ask.out.endswith('l') else rows_of(ask.out)
    assert [r['label'] for r in rows[:2]] == [YES, OTHER] and not rows[0].get('withheld')
    assert all(r['confidence'] == r['p_' + r['label']] for r in rows[:2])
    if ask.html: assert 'a copy of 1.png' in (tmp_path/'g.html').read_text() and 'known as NOT smile|positive smile' in (tmp_path/'g.html').read_text()


def test_the_known_may_be_folders_a_zip_a_csv_elsewhere_or_a_run(there, run, faces, ask, tmp_path):
    made = {}
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for p in (there/'old').iterdir(): z.write(p, p.name)
    made['zip'] = replace(ask, known=str(tmp_path/'z.zip'))
    folder(tmp_path/'classes', {f'{c}/{n}.png': face(n) for n, c in {0: NO, 1: YES, 2: OTHER, 3: NO}.items()})
    made['folders'] = replace(ask, known=str(tmp_path/'classes'))
    (tmp_path/'x.csv').write_text('file,first,second\n' + ''.join(f'{n}.png,{a},{b}\n' for n, a, b in [(0, NO, OTHER), (1, OTHER, YES), (2, NO, OTHER)]))
    made['elsewhere'] = replace(ask, known=str(there/'old'), known_labels=str(tmp_path/'x.csv'), known_label_col='second')
    for kind, one in made.items():
        predict(there/'new', one)
        assert [r['label'] for r in rows_of(ask.out)[:2]] == [YES, OTHER], kind
    predict(there/'new', replace(made['elsewhere'], known_label_col='first'))
    assert [r['label'] for r in rows_of(ask.out)[:2]] == [OTHER, NO]
    done = predict(faces/'happy_images', replace(ask, known=str(run.path)))
    import pandas as pd
    table = pd.read_csv(run.path/'table.csv', dtype=str, keep_default_na=False)
    label = {os.path.basename(p): v for p, v, r in zip(table.path, table.label, table.reason) if not r}
    rows = rows_of(ask.out)
    assert done.known > 100 and done.known + done.conflicting == sum(bool(r['known']) for r in rows) and done.failed == 1
    for r in rows:
        if r['path'] in label and '|' not in r['known_label']: assert r['label'] == label[r['path']]
    with pytest.raises(OptionError, match='do not go with a run'): predict(there/'new', replace(ask, known=str(run.path), known_label_col='x'))


def test_what_cannot_be_known(there, ask, tmp_path):
    with pytest.raises(OptionError, match='without --known'): PredictConfig(known_label_col='x')
    with pytest.raises(SmileError, match='does not exist'): predict(there/'new', replace(ask, known='nowhere'))
    with pytest.raises(SmileError, match='is a class of the model'):
        folder(tmp_path/'cats', {'cat/a.png': face(1), 'dog/b.png': face(2)})
        predict(there/'new', replace(ask, known=str(tmp_path/'cats')))
    with pytest.raises(SmileError): predict(there/'new', replace(ask, known=str(there/'new')))  # nobody labelled them
    assert not os.path.exists(ask.out)


def test_known_is_the_same_picture(tmp_path):
    "A look-alike within 16 bits whose pixels or colours do not agree is not a copy; copies of copies bring their labels"
    red, blue = (Image.new('RGB', (64, 64), c) for c in ('#802020', '#202080'))
    folder(tmp_path/'k', {'a/x.png': b'', 'b/y.png': face(3)})
    red.save(tmp_path/'k'/'a'/'x.png')
    folder(tmp_path/'q', {'z.jpg': face(3, 'JPEG', 64, 60)})
    blue.save(tmp_path/'q'/'blue.png')
    known, asked = open_known_images(tmp_path/'k', ['a', 'b']), FolderReader(tmp_path/'q')
    assert known.find(asked, 'blue.png') is None and known.find(asked, 'z.jpg').labels == ('b',)
    assert known.find(FolderReader(tmp_path/'k'), 'a/x.png').labels == ('a',)
    folder(tmp_path/'k', {'a/again.jpg': face(3, 'JPEG', 64, 60)})
    torn = open_known_images(tmp_path/'k', ['a', 'b'])
    assert torn.find(FolderReader(tmp_path/'k'), 'b/y.png').labels == ('a', 'b') == torn.find(asked, 'z.jpg').labels and torn.fingerprint != known.fingerprint


def test_resume_with_known(there, ask, monkeypatch):
    real = PredictionFile.add
    def stopping(self, row):
        real(self, row)
        if self.counts.rows == 5: raise KeyboardInterrupt
    monkeypatch.setattr(PredictionFile, 'add', stopping)
    with pytest.raises(KeyboardInterrupt): predict(there/'new', ask)
    monkeypatch.setattr(PredictionFile, 'add', real)
    with pytest.raises(SmileError, match='columns was|known was'): predict(there/'new', replace(ask, resume=True, known=None))
    (there/'old'/'9.csv').write_text('file_name,label\n1.png,NOT smile\n2.png,negative smile\n')
    try:
        with pytest.raises(SmileError, match='known was'): predict(there/'new', replace(ask, resume=True, known_labels=str(there/'old'/'9.csv')))
    finally: (there/'old'/'9.csv').unlink()
    done = predict(there/'new', replace(ask, resume=True))
    assert (done.resumed, done.known, done.conflicting) == (4, 2, 2)
    whole = open(ask.out, 'rb').read()
    predict(there/'new', ask)
    assert open(ask.out, 'rb').read() == whole


def test_marked_rows_are_never_measured(there, run, ask, tmp_path):
    "`evaluate` does not offer it, refuses a table of predictions, and leaves marked rows out where true labels stand beside"
    assert not any('known' in f.name for f in fields(EvaluateConfig))
    out = there/'new'/'p.csv'
    try:
        predict(there/'new', replace(ask, out=str(out)))
        for config in (EvaluateConfig(), EvaluateConfig(label_col='label'), EvaluateConfig(label_col='known_label')):
            with pytest.raises(SmileError, match='is a table of predictions'): evaluate(run.path, out, config)
        rows = rows_of(out)
        with open(out, 'w', newline='') as f:
            table = csv.DictWriter(f, [*rows[0], 'truth'])
            table.writeheader()
            table.writerows(r | dict(truth=YES) for r in rows)
        r = evaluate(run.path, out, EvaluateConfig(label_col='truth', draws=100, tta='none', out=str(tmp_path/'e')))
        assert r['metrics']['rows'] == 2 and r['metrics']['failed'] == 1  # the two that are new, and the broken one
    finally: out.unlink()


def test_from_python(there, run):
    rows = run.predict(there/'new', known=there/'old')
    assert rows.label[:2].tolist() == [YES, OTHER] and rows.known.ne('').sum() == 4 and 'known' not in run.predict(there/'new')


def test_in_a_shell(there, run, tmp_path):
    "pandas comes with --known alone, fastai never; the summary says what was taken"
    code = '''
import sys
from fastsmile.cli.commands import main
try: main()
except SystemExit as e: print(e.code, sorted({'fastai', 'pandas'} & set(sys.modules)))
'''
    args = ['predict', there/'new', '--model', run.path, '--out', tmp_path/'p.csv', '--known', there/'old']
    text = run_python(['-c', code, *args], forget=('fastai', 'pandas')).stdout
    assert text.splitlines()[-1] == "0 ['pandas']" and '2 took the label of a known image' in text and '2 did not' in text


def test_the_summary_for_machines(there, ask):
    from fastsmile.cli.tables import predict_output
    said = predict_output(predict(there/'new', ask))[1]
    assert {k: said[k] for k in ('rows', 'known', 'conflicting', 'failed')} == dict(rows=7, known=2, conflicting=2, failed=1)


def test_the_same_bytes_come_first_and_copies_of_copies_count(tmp_path, monkeypatch):
    folder(tmp_path/'k', {'a/0.jpg': face(1, 'JPEG', 80), 'a/1.png': face(1), 'b/2.png': face(2)})
    asked = FolderReader(tmp_path/'k')
    known = open_known_images(tmp_path/'k', ['a', 'b'])
    assert known.find(asked, 'a/1.png').path == 'a/1.png' and known.find(asked, 'a/0.jpg').path == 'a/0.jpg'
    equal = replace(known, index=replace(known.index, hashes=np.repeat(known.index.hashes[:1], 3, 0)))
    assert [equal.find(asked, n).path for n in ('a/0.jpg', 'a/1.png')] == ['a/0.jpg', 'a/1.png']
    monkeypatch.setattr('fastsmile.data.duplicates.picture_groups', lambda scan, exact, near, reader: np.zeros(3, int))
    assert open_known_images(tmp_path/'k', ['a', 'b']).find(asked, 'b/2.png').labels == ('a', 'b')


def test_a_known_person_with_another_mouth_is_new(tmp_path):
    "Near hashes and thumbnails that agree name no copy, in neither direction, and give no label away"
    pairs = honest_pairs(160, 12, only_alike=True)
    assert len(pairs) > 3
    for i, (neutral, smiling) in enumerate(pairs):
        folder(tmp_path/'known'/f'{i}', {'no/a.png': png(neutral), 'yes/b.png': png(neutral.transpose(Image.Transpose.ROTATE_180))})
        folder(tmp_path/'asked'/f'{i}', {'smile.png': png(smiling), 'again.jpg': saved_again(neutral, 60)})
        known, asked = open_known_images(tmp_path/'known'/f'{i}', ['no', 'yes']), FolderReader(tmp_path/'asked'/f'{i}')
        assert known.index.near_rows(known.scanner(asked, 'smile.png')[1][0][0]).tolist() == [0]  # the hash takes it for a copy
        assert known.find(asked, 'smile.png') is None and known.find(asked, 'again.jpg').labels == ('no',)


def test_a_known_image_that_is_gone_gives_no_label(tmp_path):
    folder(tmp_path/'k', {'a/0.png': face(1), 'b/1.png': face(2)})
    folder(tmp_path/'q', {'x.jpg': face(1, 'JPEG', quality=80)})
    known, asked = open_known_images(tmp_path/'k', ['a', 'b']), FolderReader(tmp_path/'q')
    assert known.find(asked, 'x.jpg').labels == ('a',)
    (tmp_path/'k'/'a'/'0.png').unlink()
    assert known.find(asked, 'x.jpg') is None
