"evaluate, calibrate and compare on a run."
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import folder, picture

from fastsmile.metrics.calibration import apply_temperature, calibration_from_metadata
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.metrics.predictions import _quarters, read_model_metadata, read_saved_predictions
from fastsmile.config.commands import CalibrateConfig, EvaluateConfig


def test_evaluate_needs_no_model_and_no_torch(run, tmp_path):
    import shutil
    copy = shutil.copytree(run.path, tmp_path/'r', ignore=shutil.ignore_patterns('*.safetensors'))
    code = ("import sys; from fastsmile.runs.evaluate import evaluate; from fastsmile.config.commands import EvaluateConfig\n"
            f"m = evaluate({str(copy)!r}, config=EvaluateConfig(by=('group',)))\n"
            "import json; print(json.dumps([m['metrics']['macro_f1']['value'], sorted({'torch', 'timm', 'fastai'} & set(sys.modules))]))")
    value, loaded = json.loads(subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout)
    assert loaded == [] and value == run.metrics['test']['macro_f1']['value']


def test_evaluate_by_column_rule_and_coverage(run):
    from fastsmile.runs.evaluate import evaluate
    plain_, other = (evaluate(run.path, config=c) for c in (EvaluateConfig(), EvaluateConfig(by=('label', 'size', 'source'), threshold='argmax',
                                                                                            min_confidence=0.99, draws=200)))
    assert {s['slice']: s['rows'] for s in other['slices']['label']} == {c['label']: c['support'] for c in plain_['metrics']['per_class']}  # the true class
    assert set(other['slices']) == {'label', 'size', 'source'} and sum(s['rows'] for s in other['slices']['size']) == other['metrics']['rows']
    assert other['calibration']['rule'] == 'argmax' and other['metrics']['confusion'] != plain_['metrics']['confusion']
    assert other['calibration']['abstain']['confidence'] == 0.99 and plain_['calibration']['abstain']['confidence'] < 0.99
    low, high = (evaluate(run.path, config=EvaluateConfig(coverage=c, draws=100))['calibration']['abstain']['covered'] for c in (0.3, 0.9))
    assert low < high
    assert plain_['tta']['difference']['accuracy']['low'] <= plain_['tta']['difference']['accuracy']['high']
    with pytest.raises(OptionError, match='no such column'): evaluate(run.path, config=EvaluateConfig(by=('age',)))
    with pytest.raises(OptionError, match='Accepted: argmax'): evaluate(run.path, config=EvaluateConfig(threshold='cost'))
    for asked in (dict(tta='none'), dict(bs=8), dict(engine='torch'), dict(device='cpu'), dict(anyway=True), dict(label_col='x'), dict(faces='each')):
        with pytest.raises(OptionError, match='without a SOURCE: it has no effect'): evaluate(run.path, config=EvaluateConfig(**asked))
    with pytest.raises(OptionError, match='--part with a SOURCE'): evaluate(run.path, 'faces', EvaluateConfig(part='valid'))
    valid = evaluate(run.path, config=EvaluateConfig(part='valid'))
    assert valid['measured_on'] == 'valid' and valid['metrics']['accuracy'] == run.metrics['valid']['accuracy']


def test_evaluate_takes_the_engine_that_it_is_given(run, faces):
    from fastsmile.runs.evaluate import evaluate
    with pytest.raises(SmileError, match='holds no exported model'): evaluate(run.path, str(faces), EvaluateConfig(engine='onnx', anyway=True))


def test_evaluate_on_another_source(run, tmp_path):
    from fastsmile.runs.evaluate import evaluate
    classes = run.config['model']['classes']
    src = folder(tmp_path/'s', {f'{c}/{i}.png': picture(['red', 'blue', 'green'][k]) for k, c in enumerate(classes) for i in range(4)}
                 | {f'{classes[0]}/x.png': b'no'})
    r = evaluate(run.path, src, EvaluateConfig(out=str(tmp_path/'o'), tta='none', draws=100))
    rows = pd.read_csv(tmp_path/'o'/'predictions.csv')
    assert r['metrics']['rows'] == len(rows) == 12 and r['metrics']['failed'] == 1 and 'tta' not in r
    assert r['metrics']['accuracy']['value'] == (rows.label == rows.target).mean()
    (src/classes[0]).rename(src/'frown')
    with pytest.raises(SmileError, match='does not know frown'): evaluate(run.path, src, EvaluateConfig())
    renamed = evaluate(run.path, src, EvaluateConfig(rename=(f'frown={classes[0]}',), out=str(tmp_path/'p'), tta='none', draws=100))
    assert renamed['metrics']['accuracy'] == r['metrics']['accuracy']
    with pytest.raises(SmileError, match='was trained on'): evaluate(run.path, run.config['source'])


def test_pictures_that_taught_are_left_out_of_another_source(run, tmp_path, monkeypatch):
    import shutil
    from PIL import Image
    from fastsmile.runs.evaluate import evaluate
    source, classes = Path(run.config['source']), run.config['model']['classes']
    table = pd.read_csv(run.path/'table.csv', dtype=str, keep_default_na=False)
    rows = {s: table[(table.reason == '') & (table.split == s)].path.tolist() for s in ('train', 'valid', 'test')}
    for c in classes: (tmp_path/'s'/c).mkdir(parents=True)
    where = tmp_path/'s'/classes[0]
    shutil.copy(source/rows['train'][0], where/'same.jpg')
    with Image.open(source/rows['valid'][0]) as im:
        im.convert('RGB').resize((im.width * 2 // 3, im.height * 2 // 3)).save(where.parent/classes[1]/'smaller.png')
    for i, p in enumerate(rows['test'][:6]): shutil.copy(source/p, tmp_path/'s'/classes[i % 3]/f'{i}.jpg')
    ask = EvaluateConfig(out=str(tmp_path/'o'), tta='none', draws=100)
    r = evaluate(run.path, tmp_path/'s', ask)
    found = {Path(c['path']).name: (c['training_path'], c['split'], c['same']) for c in r['copies']}
    assert found == {'same.jpg': (rows['train'][0], 'train', 'bytes'), 'smaller.png': (rows['valid'][0], 'valid', 'pixels')}
    assert r['metrics']['rows'] == 6 and not pd.read_csv(tmp_path/'o'/'predictions.csv').path.str.contains('same|smaller').any()
    both = evaluate(run.path, tmp_path/'s', replace(ask, anyway=True))
    assert both['metrics']['rows'] == 8 and both['copies'] == r['copies']
    for p in (tmp_path/'s').rglob('[0-9].jpg'): p.unlink()
    with pytest.raises(SmileError, match='All images of the source are training images'): evaluate(run.path, tmp_path/'s', ask)
    old = shutil.copytree(run.path, tmp_path/'old', ignore=shutil.ignore_patterns('training_fingerprints.csv'))  # as an earlier version left it
    said = []
    monkeypatch.setattr('fastsmile.runs.evaluate.say', lambda text, **kw: said.append(text))
    assert evaluate(old, tmp_path/'s', ask)['metrics']['rows'] == 2 and any('no fingerprints of the training images' in s for s in said)


def test_calibrate_changes_the_model_file_the_labels_and_the_metrics(run, tmp_path):
    import shutil
    from fastsmile.runs.calibrate import calibrate
    copy = shutil.copytree(run.path, tmp_path/'r')
    classes = run.config['model']['classes']
    cost = tmp_path/'c.csv'
    cost.write_text('true,' + ','.join(classes) + '\n' + '\n'.join(f'{c},' + ','.join('0' if c == d else '50' if i == 2 else '1' for d in classes)
                                                                  for i, c in enumerate(classes)))
    before = read_saved_predictions(copy, 'test').table
    m = calibrate(copy, CalibrateConfig(cost=str(cost), min_confidence=0.77, set_level=0.8))
    after = read_saved_predictions(copy, 'test').table
    assert (after.label == classes[2]).sum() > (before.label == classes[2]).sum()
    p = [c for c in before if c.startswith('p_')]
    assert (after[p] == before[p]).all().all() and m['test']['macro_f1']['value'] != run.metrics['test']['macro_f1']['value']
    kept = calibration_from_metadata(read_model_metadata(copy))
    assert (kept.rule, kept.min_confidence, kept.coverage, kept.set_level) == ('cost', 0.77, None, 0.8)
    assert all('--min-confidence 0.77 --set-level 0.8' in (copy/f).read_text() for f in ('report.html', 'model/README.md'))  # how it can be made again
    from fastsmile.runs.folder import load_run
    again = load_run(copy).predict(run.config['source']).set_index('path').label  # the file is loaded, and says the same
    assert again.loc[after.path].tolist() == after.label.tolist()


def test_fit_decides_by_what_it_monitors(faces, tiny, tmp_path, no_charts):
    from fastsmile.runs.fit import fit
    def rule(**kw): return fit(faces, replace(tiny, epochs=1, tta='none', out=str(tmp_path/'-'.join(kw.values())), **kw))
    auto, plain_ = rule(monitor='balanced_accuracy'), rule(decide='argmax', monitor='macro_f1')
    assert auto.metrics['calibration']['rule'] == 'balanced' and auto.model.metadata.decide == 'balanced'
    assert plain_.metrics['calibration']['rule'] == 'argmax' and (plain_.path/'predictions_calib.csv').exists()
    assert auto.model.metadata.calibration.offsets == auto.model.metadata.calibration.offsets | {'argmax': [0, 0, 0]}


def test_no_rows_of_calib_is_said(faces, tiny, tmp_path, no_charts):
    from fastsmile.runs.fit import fit
    r = fit(faces, replace(tiny, epochs=1, calib=0.0, tta='none', out=str(tmp_path/'r')))
    assert 'no rows in calib' in r.metrics['calibration']['notes'][0] and r.model.metadata.calibration.temperature == 1


def test_predict_reads_probabilities_as_asked(run, tmp_path):
    from fastsmile.config.commands import PredictConfig
    from fastsmile.runs.predict import predict
    classes, faces = run.config['model']['classes'], run.config['source'] + '/happy_images'

    def ask(name, **kw):
        done = predict(faces, PredictConfig(model=str(run.path), out=str(tmp_path/f'{name}.csv'), **kw))
        return pd.read_csv(tmp_path/f'{name}.csv', dtype=str, keep_default_na=False), done
    plain_, _ = ask('plain')
    p = [f'p_{c}' for c in classes]
    good = plain_.error == ''
    cal, _ = ask('sets', sets=True)
    before, _ = ask('before', uncalibrated=True)
    assert (cal[p] == plain_[p]).all().all() and (cal.label == plain_.label).all() and (before.label == plain_.label).all()
    q = cal[good][p].astype(float).to_numpy()
    t = run.model.metadata.calibration.temperature
    assert np.allclose(q, apply_temperature(before[good][p].astype(float).to_numpy(), t)) and abs(t - 1) > 1e-3
    assert (cal[good].set != '').any() and set('|'.join(cal.set).split('|')) <= {*classes, ''}
    for t in (cal, before): assert [float(r.confidence) for r in t[good].itertuples()] == [float(r[f'p_{r.label}']) for _, r in t[good].iterrows()]
    likeliest, _ = ask('likeliest', threshold='argmax')
    assert (likeliest.label != plain_.label).any()
    every, _ = ask('every', threshold=f'{classes[2]}=0')
    none, _ = ask('none', threshold=f'{classes[0]}=1')
    assert set(every[good].label) == {classes[2]} and classes[0] not in set(none[good].label)
    with pytest.raises(OptionError, match='neither a rule'): ask('x', threshold='frown=2')
    held, done = ask('abstain', abstain=True)
    least = run.model.metadata.calibration.min_confidence
    sure = np.array([float(r[f'p_{r.label}']) >= least for _, r in cal[good].iterrows()])
    assert (held[good].label != '').tolist() == sure.tolist() and (held[good].withheld != '').sum() == (~sure).sum() == done.labels['withheld'] > 0


def told(shown) -> str:
    "What a terminal of 110 columns shows"
    import io
    from rich.console import Console
    console = Console(file=io.StringIO(), width=110)
    for s in shown: console.print(s)
    return console.file.getvalue()


def test_views_are_read_by_a_calibration_of_their_own(run, faces, tmp_path):
    "Temperature, rule and sets of means over views come from calib with these views, wherever such means are read"
    from fastsmile.metrics.calibration import CalibrationSettings, fit_calibration
    from fastsmile.runs.calibrate import calibrate
    from fastsmile.runs.evaluate import evaluate
    from fastsmile.runs.folder import load_run
    assert run.model.metadata.calibration.with_views.views == 'flip'
    copy, settings = shutil.copytree(run.path, tmp_path/'r'), dict(set_level=0.6, coverage=0.7)
    test = pd.read_csv(copy/'predictions_test_tta.csv', keep_default_na=False)
    columns = [c for c in test if c.startswith('p_')]
    extreme = test[columns] ** 4
    test.assign(**extreme.div(extreme.sum(axis=1), axis=0)).to_csv(copy/'predictions_calib_tta.csv', index=False)  # more rows, and others
    calibrate(copy, CalibrateConfig(decide='balanced', **settings))
    plain, calib = load_run(copy).model.metadata.calibration, read_saved_predictions(copy, 'calib_tta')
    own = fit_calibration(calib.probs, calib.y, run.model.metadata.prior, CalibrationSettings('balanced', **settings), groups=calib.groups)
    found = plain.for_views('flip')
    assert found.temperature == own.temperature > 2 * plain.temperature and found.set_thresholds == own.set_thresholds != plain.set_thresholds
    assert found.min_confidence == own.min_confidence != plain.min_confidence and found.confusion and plain.for_views('full') == plain
    shown = load_run(copy).predict(faces, tta='flip', precision='fp32').set_index('path').loc[test.path]
    label, p = own.apply(test[columns].to_numpy())
    assert np.abs(shown[columns].astype(float).to_numpy() - p).max() < 1e-4 and shown.label.tolist() == [columns[i][2:] for i in label]
    assert pd.read_csv(copy/'predictions_test_tta.csv').label.tolist() == shown.label.tolist()
    metrics, covering = load_run(copy).metrics, evaluate(copy, coverage=0.5, draws=100)
    assert evaluate(copy, draws=100)['tta']['temperature'] == metrics['test_tta']['temperature'] == covering['tta']['temperature'] == own.temperature


def test_predictions_of_calib_with_views_are_made_again_where_they_are_missing(run, tmp_path):
    from fastsmile.runs.calibrate import calibrate
    copy = shutil.copytree(run.path, tmp_path/'r')
    old = (copy/'predictions_calib_tta.csv').read_text()
    (copy/'predictions_calib_tta.csv').unlink()
    calibrate(copy, CalibrateConfig(decide='balanced'))
    new = pd.read_csv(copy/'predictions_calib_tta.csv')
    pd.testing.assert_frame_equal(new, pd.read_csv(io.StringIO(old)), atol=1e-5)


def test_a_class_without_rows_is_not_measured_rather_than_zero(run, tmp_path):
    from fastsmile.runs.compare import compare
    from fastsmile.config.commands import CompareConfig, ReportConfig
    from fastsmile.runs.evaluate import evaluate
    from fastsmile.runs.report import report
    from fastsmile.cli.tables import evaluation_tables, metrics_tables
    gone, copy = run.config['model']['classes'][2], shutil.copytree(run.path, tmp_path/'r')
    for part in ('test', 'test_tta'):
        p = copy/f'predictions_{part}.csv'
        frame = pd.read_csv(p, dtype=str, keep_default_na=False)
        frame[frame.target != gone].to_csv(p, index=False)
    report(copy, ReportConfig(keep_pictures=True))
    m = json.loads((copy/'metrics.json').read_text())
    assert m['test']['per_class'][2]['f1'] is None and m['test']['per_class'][2]['support'] == 0 and m['test']['per_class'][0]['f1'] > 0
    assert f'No row is {gone!r}: not measured.' in m['test']['note'] and '(2 of 3)' in m['test']['note'] and m['valid']['note'] == ''
    for page in ('report.html', 'model/README.md'):
        assert '>not measured<' in (text := (copy/page).read_text()) or '| not measured |' in text
        assert text.count('classes that have rows') >= 2  # in the verdict, and beside the means
    for shown in (metrics_tables(m), evaluation_tables(evaluate(copy, config=EvaluateConfig(min_confidence=1., draws=100)))):
        line, = (s for s in told(shown).splitlines() if s.strip().startswith(gone))
        assert '0.000' not in line and 'nan' not in line
    assert 'no row gets a label' in ' '.join(told(shown).split()) and m['calibration']['abstain']['rows'] > 0
    again = shutil.copytree(copy, tmp_path/'again')
    assert 'No row is' in compare([copy, again], CompareConfig(out=str(tmp_path/'c.html')))['note']


def test_evaluate_and_compare_replace_only_what_is_theirs(run, tmp_path):
    from fastsmile.runs.compare import compare
    from fastsmile.config.commands import CompareConfig
    from fastsmile.runs.evaluate import evaluate
    copy = shutil.copytree(run.path, tmp_path/'r', ignore=shutil.ignore_patterns('*.safetensors', 'explain'))
    before = (copy/'metrics.json').read_bytes()
    with pytest.raises(OptionError, match='is a run or a model folder'): evaluate(run.path, config=EvaluateConfig(out=str(copy), draws=100))
    assert (copy/'metrics.json').read_bytes() == before
    folder(tmp_path, {'mine/predictions.csv': 'image,label\na.png,smile\n', 'labels.csv': 'image,label\n'})
    with pytest.raises(OptionError, match='is not predictions'): evaluate(run.path, config=EvaluateConfig(out=str(tmp_path/'mine')))
    with pytest.raises(OptionError, match='is not a page'): compare([run.path, copy], CompareConfig(out=str(tmp_path/'labels.csv')))
    for _ in range(2):
        assert evaluate(run.path, config=EvaluateConfig(out=str(tmp_path/'e'), draws=100))['out'] == str(tmp_path/'e')
        compare([run.path, copy], CompareConfig(out=str(tmp_path/'c.html'), draws=100))


def test_the_source_of_a_run_is_measured_anyway_on_request(run, tmp_path):
    from fastsmile.runs.evaluate import evaluate
    with pytest.raises(SmileError, match='was trained on') as e: evaluate(run.path, run.config['source'])
    assert '--anyway' in e.value.hint
    r = evaluate(run.path, run.config['source'], EvaluateConfig(anyway=True, tta='none', draws=100, out=str(tmp_path/'o')))
    table = pd.read_csv(run.path/'table.csv', keep_default_na=False)
    used = table[table.reason == '']
    assert r['metrics']['rows'] >= len(used) and {c['path'] for c in r['copies']} >= set(used.path[used.split != 'test'])


def test_slices_of_numbers_stand_in_their_order_and_names_by_rows(run):
    from fastsmile.runs.evaluate import evaluate
    rows = evaluate(run.path, config=EvaluateConfig(by=('size', 'label'), draws=100))['slices']
    starts = [float(s['slice'].partition(' ')[0]) for s in rows['size']]
    by_rows = [r['slice'] for r in sorted(rows['size'], key=lambda r: (-r['rows'], r['slice']))]
    assert starts == sorted(starts) and by_rows != [s['slice'] for s in rows['size']]
    assert [s['rows'] for s in rows['label']] == sorted((s['rows'] for s in rows['label']), reverse=True)


@pytest.mark.parametrize('start,step', [(1_700_000_000, 60), (20230101, 1), (0.5, 1e-9), (-3, 1), (1e17, 1e5)])
def test_quarters_of_large_numbers_are_four(start, step):
    said = _quarters(pd.Series(start + step * np.arange(100)))
    assert said.nunique() == 4 and said.value_counts().between(24, 26).all()


def test_a_rule_that_nothing_was_fitted_for_is_named_by_what_it_does(run):
    from fastsmile.cli.tables import calibration_lines
    c, classes = run.metrics['calibration'], run.config['model']['classes']
    def rule(**weights):
        said = calibration_lines(c | dict(rule='macro_f1', rules=[dict(rule=k, weights=v) for k, v in weights.items()]), classes)
        return next(s for s in said if s.startswith('rule:')).partition(';')[0]
    assert rule(argmax=[1, 1, 1], balanced=[.5, 1, 2], macro_f1=[.5, 1, 2]) == 'rule: macro_f1, here the same as balanced'
    assert rule(argmax=[1, 1, 1], balanced=[.5, 1, 2], macro_f1=[.6, 1, 2]) == 'rule: macro_f1'
