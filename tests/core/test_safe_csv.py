"CSVs that a spreadsheet program opens: nothing in them is computed, and everything is read back as it was."
import ast
import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, folder
from hypothesis import HealthCheck, given, settings, strategies as st

from fastsmile.metrics.predictions import read_saved_predictions, write_prediction_table
from fastsmile.inference.outputs import PredictionFile, read_prediction_rows
from fastsmile.data.plan import PLAN_COLUMNS, override_plan, read_plan
from fastsmile.runs.fit import fit
from fastsmile.core.files import CSV_OPEN_ARGS, escape_formula, import_pandas, read_safe_csv, unescape_formula, write_safe_csv
from fastsmile.data.splits import read_training_fingerprints, write_training_fingerprints
from fastsmile.core.errors import SmileError

pd = import_pandas()
SIGNS = st.sampled_from(['=', '+', '-', '@', '\t', '\r', '\n', "'", "''=", "'-1", '-1', '+1', '-0.5', '-1e-3', '-1-1', '=cmd|/C calc!A0', '"', ',', ';', 'a'])
CELLS = st.one_of(st.lists(SIGNS, max_size=3).map(''.join), st.text(max_size=8), st.binary(max_size=4).map(lambda b: b.decode('utf-8', 'surrogateescape')))
WRITTEN = CELLS.filter(lambda s: '\0' not in s and not re.search('[\ud800-\udc7f\udd00-\udfff]', s))  # what names and cells can hold
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]  # of a machine that others use, too
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=SLOW)


def danger(path) -> list:
    "The cells of a file that a spreadsheet would compute: they begin with a sign, and are no number"
    with open(path, **CSV_OPEN_ARGS) as f:
        return [c for r in csv.reader(f) for c in r if c[:1] in set('=+-@\t\r\n') - {''} and c and not re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?', c, re.I)]


@given(CELLS)
@QUICK
def test_one_apostrophe_more_and_one_less(text):
    assert unescape_formula(escape_formula(text)) == text and escape_formula(text) in (text, f"'{text}")
    assert not re.match(r'[=+\-@\t\r\n]', escape_formula(text)) or re.fullmatch(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?', text, re.ASCII)


def test_numbers_are_no_formulas():
    assert [escape_formula(v) for v in ('-1', '+1', '-0.5', '-1e-05', -1, -0.5, None)] == ['-1', '+1', '-0.5', '-1e-05', -1, -0.5, None]
    assert [escape_formula(v) for v in ('=1', '-1+1', '- 1', '@a', '\tx', "'=1", '+a', '-1\n')] == [
        "'=1", "'-1+1", "'- 1", "'@a", "'\tx", "''=1", "'+a", "'-1\n"]


@given(st.lists(st.tuples(WRITTEN, WRITTEN, st.floats(-9, 9)), max_size=4), st.tuples(WRITTEN, WRITTEN).filter(lambda t: t[0] != t[1]))
@QUICK
def test_a_table_comes_back(tmp_path, rows, names):
    frame = pd.DataFrame(rows, columns=[*names, 'p_=x'])
    write_safe_csv(frame, tmp_path/'t.csv')
    back = read_safe_csv(tmp_path/'t.csv')
    assert list(back) == list(frame) and back.iloc[:, :2].values.tolist() == [list(r[:2]) for r in rows]
    assert [float(v) for v in back['p_=x']] == [r[2] for r in rows] and danger(tmp_path/'t.csv') == []


@given(st.lists(st.tuples(WRITTEN, WRITTEN, WRITTEN, st.floats(0, 1)), max_size=4), WRITTEN)
@QUICK
def test_predictions_come_back(tmp_path, rows, label):
    columns = ['path', 'label', 'confidence', f'p_{label}', f'{label}!', 'error']
    path = tmp_path/'p.csv'
    for old in tmp_path.iterdir(): old.unlink()
    with PredictionFile(path, columns, (label,), {}) as sheet:
        for p, c, e, v in rows: sheet.add({'path': p, 'label': c, 'confidence': v, f'p_{label}': v, f'{label}!': -v, 'error': e})
        inside = list(sheet.read())
        sheet.finish()
    done = [r for r, _ in read_prediction_rows(path, 'csv', columns)]
    assert done == inside and [(r['path'], r['label'], r['error'], float(r[f'{label}!'])) for r in done] == [(p, c, e, -v) for p, c, e, v in rows]
    assert read_safe_csv(path).values.tolist() == [list(r.values()) for r in done] and danger(path) == []


def edge(s: str) -> str: return ' '.join(s.split())


PATHS = WRITTEN.filter(lambda s: s.strip() and s.isprintable())


@given(st.dictionaries(PATHS, st.tuples(*[WRITTEN.filter(str.isprintable).map(edge)] * 3), min_size=1, max_size=4))
@QUICK
def test_a_plan_comes_back(tmp_path, rows):
    frame = pd.DataFrame([(p, 'keep', *r) for p, r in rows.items()], columns=PLAN_COLUMNS)
    write_safe_csv(frame, tmp_path/'plan.csv')
    assert read_plan(tmp_path/'plan.csv').values.tolist() == frame.values.tolist() and danger(tmp_path/'plan.csv') == []


def test_a_plan_with_names_that_are_no_unicode(tmp_path):
    "They make the file be read as another encoding, and every name is found all the same"
    names = ['\udcff.jpg', 'Zoë.jpg', '=a.jpg', 'plain.jpg']
    frame = pd.DataFrame([(n, 'drop', '', '', '') for n in names], columns=PLAN_COLUMNS, dtype=object)
    write_safe_csv(frame, tmp_path/'plan.csv')
    made = override_plan(frame[:0], read_plan(tmp_path/'plan.csv'), set(names))
    assert made.path.tolist() == names
    with pytest.raises(SmileError, match='1 images that are not in the source'): override_plan(frame[:0], read_plan(tmp_path/'plan.csv'), set(names[1:]))


@given(st.lists(st.tuples(WRITTEN, st.sampled_from(['train', 'valid'])), max_size=3))
@QUICK
def test_fingerprints_come_back(tmp_path, rows):
    frame = pd.DataFrame([(p, s, 'd' * 32, 'ff' * 8) for p, s in rows], columns=['path', 'split', 'digest', 'hash'])
    write_training_fingerprints(frame, tmp_path)
    assert read_training_fingerprints(tmp_path).values.tolist() == frame.values.tolist() and danger(tmp_path/'training_fingerprints.csv') == []


@given(st.lists(WRITTEN.filter(lambda s: s and s.isprintable()), min_size=2, max_size=3, unique=True), st.lists(WRITTEN, min_size=1, max_size=3, unique=True))
@QUICK
def test_saved_predictions_come_back(tmp_path, classes, paths):
    frame = pd.DataFrame({'path': paths, 'label': classes[0], 'confidence': .5, **{f'p_{c}': .5 for c in classes}, 'error': '', 'target': classes[1],
                          'group': '=g'})
    write_prediction_table(frame, tmp_path/'predictions_test.csv')
    write_safe_csv(pd.DataFrame(dict(path=paths, label=classes[1], reason='', note='@n')), tmp_path/'table.csv')
    saved = read_saved_predictions(tmp_path, 'test')
    assert saved.classes == tuple(classes) and saved.table.path.tolist() == paths and set(saved.table.target) == {classes[1]}
    assert set(saved.table.group) == {'=g'} and set(saved.table.note) == {'@n'} and (saved.y == 1).all()


def test_broken_tables_are_refused_in_words(tmp_path):
    for data, match in [(b'a,b\n1\n', 'row 2 has 1 cells'), (b'a\n' + b'x' * 200_000 + b'\n', 'cannot be read as a table')]:
        (tmp_path/'t.csv').write_bytes(data)
        with pytest.raises(SmileError, match=match): read_safe_csv(tmp_path/'t.csv')
    with pytest.raises(SmileError, match='cannot be read'): read_safe_csv(tmp_path/'none.csv')


def test_only_one_room_writes_tables():
    "Whoever writes a CSV writes it through `write_safe_csv` or a `PredictionFile`; the sample is somebody's table on purpose"
    def writes(tree) -> bool:
        calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        return any(re.search(r'\.to_csv$|csv\.(writer|DictWriter)$', call) for call in calls)
    rooms = Path(__file__).parents[2]/'fastsmile'
    found = {p.stem for p in rooms.glob('*/*.py') if writes(ast.parse(p.read_text(encoding='utf-8')))}
    assert found == {'files', 'outputs', 'sample'}


@pytest.fixture(scope='module')
def signs(tmp_path_factory, tiny):
    "A run on pictures whose names and labels begin with signs"
    root, rng = tmp_path_factory.mktemp('signs'), np.random.default_rng(0)
    names = [f'{s}{i}.png' for i, s in enumerate(["'=", '=', '@', '+', '-', 'a'] * 8)]
    folder(root, {n: picture(('red', 'navy')[i % 2], (36, 36), seed=i) for i, n in enumerate(names)})
    rows = [(n, ('-1', '+1')[i % 2], rng.choice(['=1+1', 'x'])) for i, n in enumerate(names)]
    with open(root/'labels.csv', 'w', newline='') as f: csv.writer(f).writerows([('path', 'label', '=note'), *rows])
    run = fit(root/'labels.csv', replace(tiny, epochs=1, out=str(tmp_path_factory.mktemp('signs-run')/'run'), near=0, tta='none'))
    return root, rows, run


def test_the_labels_plus_and_minus_one_survive_the_whole_walk(signs, tmp_path):
    root, rows, run = signs
    table = read_safe_csv(run.path/'table.csv')
    assert dict(zip(table.path, table.label)) == {n: c for n, c, _ in rows} and list(table['=note']) == [v for *_, v in rows]
    saved = read_saved_predictions(run.path, 'test')
    want = {n: c for n, c, _ in rows}
    assert set(saved.classes) == {'-1', '+1'} and [want[p] for p in saved.table.path] == saved.table.target.tolist() and len(saved.table) > 3
    raw = (run.path/'predictions_test.csv').read_text()
    assert re.search(r",[+-]1,0\.\d+,", raw) and "'-1" not in raw and "'+1" not in raw  # labels as they are
    for f in run.path.rglob('*.csv'): assert danger(f) == [], f.name
    assert "\n'=" in (run.path/'table.csv').read_text() and json.loads((run.path/'model'/'config.json').read_text())['label_names'] == ['+1', '-1']
    from fastsmile.config.commands import EvaluateConfig, PredictConfig
    from fastsmile.runs.predict import predict
    from fastsmile.runs.evaluate import evaluate
    done = predict(root, PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv')))
    back = read_safe_csv(tmp_path/'p.csv')
    assert set(back.path) == set(want) and set(back.label) <= {'-1', '+1'} and done.rows == len(rows) and danger(tmp_path/'p.csv') == []
    assert {s['slice'] for s in evaluate(run.path, None, EvaluateConfig(by=('=note',), draws=100))['slices']['=note']} == {'=1+1', 'x'}


def test_a_killed_prediction_goes_on_over_names_with_signs(signs, tmp_path):
    from fastsmile.config.commands import PredictConfig
    from fastsmile.runs.predict import predict
    root, rows, run = signs
    config = PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv'), bs=8)
    predict(root, config)
    left = iter([0] * 21)
    with pytest.raises(StopIteration): predict(root, replace(config, out=str(tmp_path/'q.csv')), lambda n: lambda k: next(left))
    predict(root, replace(config, out=str(tmp_path/'q.csv'), resume=True))
    assert (tmp_path/'q.csv').read_bytes() == (tmp_path/'p.csv').read_bytes()
