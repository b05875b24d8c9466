"Cross-validation: every row held out once, nobody on two sides, one summary."
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import faults_of_file, without_charts

from fastsmile.metrics.calibration import calibration_from_metadata
from fastsmile.runs.compare import compare
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import newest_run, read_json, write_json
from fastsmile.data.audit import run_audit
from fastsmile.metrics.predictions import read_model_metadata, read_saved_predictions
from fastsmile.config.commands import AuditConfig, CalibrateConfig, CompareConfig, EvaluateConfig, ReportConfig
from fastsmile.config.fields import DataOptions
from fastsmile.config.fit import FitConfig
from fastsmile.runs.calibrate import calibrate
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.explain import explain
from fastsmile.runs.report import report
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.data.source import read_source
from fastsmile.cli.tables import metrics_tables


@pytest.fixture(scope='module')
def folds(faces, tiny, tmp_path_factory):
    "A cross-validation of the sample without its given splits"
    root = tmp_path_factory.mktemp('cv')
    rows = pd.concat([pd.read_csv(faces/f'{s}.csv', header=None, dtype=str) for s in ('train', 'test')])
    rows.to_csv(root/'all.csv', header=['id', 'label'], index=False)
    config = replace(tiny, epochs=1, folds=3, labels=str(root/'all.csv'), out=str(root/'runs'/'cv'))
    with without_charts(): return fit(faces, config), run_audit(read_source(faces, config), config)


def test_every_row_is_held_out_once_by_a_model_that_never_saw_its_group(folds):
    run, looked = folds
    made = pd.read_csv(run.path/'predictions_oof.csv', keep_default_na=False)
    used = looked.table[looked.table.reason == '']
    assert sorted(made.path) == sorted(used.path) and made.path.is_unique
    for k in range(3):
        t = pd.read_csv(run.path/f'fold_{k}'/'table.csv', keep_default_na=False, dtype=str)
        t = t[t.reason == '']
        assert sorted(t[t.split == 'test'].path) == sorted(made.path[made.fold == k])
        assert {'train', 'valid', 'calib', 'test'} == set(t.split) and t[t.group != ''].groupby('group').split.nunique().max() == 1
        assert read_json(run.path/f'fold_{k}'/'config.json')['status'] == 'finished'


def test_the_summary_has_a_spread_and_is_no_model(folds):
    run = folds[0]
    m = run.metrics
    assert str(metrics_tables(m)[0].title) == f'out of fold, {m["test"]["rows"]} rows' and f'{m["test"]["rows"]} out-of-fold rows' in run.verdict
    assert len(m['folds']) == 3 and m['test']['rows'] == sum(f['rows'] for f in m['folds'])
    assert m['spread']['accuracy']['min'] == min(f['accuracy']['value'] for f in m['folds']) and 'fold_2/report.html' in run.report.read_text()
    assert run.config['status'] == 'cross-validated'
    with pytest.raises(SmileError, match='cross-validation'): load_run(run.path)
    with pytest.raises(SmileError, match='no finished run'): newest_run(run.path.parent)
    assert load_run(run.path/'fold_1').model.spec.classes == ('NOT smile', 'negative smile', 'positive smile')


@pytest.mark.browser
@pytest.mark.parametrize('scheme,width', [('light', 1280), ('dark', 390)])
def test_axe_finds_no_fault_in_the_page(folds, browser, scheme, width):
    assert not faults_of_file(browser, folds[0].report, scheme, width)


def test_the_page_shows_the_most_confident_mistakes_and_does_without_the_source(folds, tmp_path, monkeypatch):
    from fastsmile.runs.folds import rewrite_folds
    oof = pd.read_csv(folds[0].path/'predictions_oof.csv')
    wrong = oof[oof.label != oof.target].sort_values('confidence', ascending=False, kind='stable')
    html = (folds[0].path/'report.html').read_text()
    shown = re.findall(r'<figure class="wrong"[^>]*><button type="button" class="zoom"><img src="data:image[^"]+" alt="([^"]+)"', html)
    assert shown == wrong.path[:24].tolist() and 'id="mistakes"' in html
    copy = shutil.copytree(folds[0].path, tmp_path/'copy')
    monkeypatch.setattr('fastsmile.runs.folds.run_reader', lambda run: None)
    rewrite_folds(copy)
    assert 'id="mistakes"' not in (copy/'report.html').read_text() and 'Confusion matrix' in (copy/'report.html').read_text()


def test_its_predictions_say_which_labels_look_wrong(folds, faces, tmp_path):
    from fastsmile.reports.audit import audit
    where = shutil.copytree(folds[0].path, tmp_path/'cv', ignore=shutil.ignore_patterns('fold_*'))
    def known_as(low, collapsed):  # what its models are worth, from another training
        m = read_json(where/'metrics.json')
        write_json(where/'metrics.json', m | dict(test=m['test'] | dict(collapsed=collapsed, balanced_accuracy=dict(value=0.8, low=low, high=0.9))))
    for worth in ((0.3, False), (0.7, True)):
        known_as(*worth)
        with pytest.raises(SmileError, match='cannot find label errors'): audit(faces, AuditConfig(suspects=str(where), out=str(tmp_path/'b')))
        assert not (tmp_path/'b').exists()
    known_as(0.7, False)
    done = audit(faces, AuditConfig(suspects=str(where), out=str(tmp_path/'a')))
    assert {f.kind for f in done.findings} >= {'suspect-label', 'conflicting-label'}


def test_given_test_rows_stay_out(faces, tiny, tmp_path, no_charts):
    run = fit(faces, replace(tiny, epochs=1, folds=2, tta='none', out=str(tmp_path/'cv')))
    looked = run_audit(read_source(faces), DataOptions())
    used = looked.table[looked.table.reason == '']
    made = pd.read_csv(run.path/'predictions_oof.csv')
    assert sorted(made.path) == sorted(used.path[used.split != 'test'])


def test_what_does_not_go_with_folds():
    with pytest.raises(OptionError, match='--folds with .* cannot be combined'): FitConfig(folds=3, seeds=2)
    with pytest.raises(OptionError, match='from 2 to 50'): FitConfig(folds=1)
    with pytest.raises(OptionError, match='--test with --folds'): FitConfig(folds=3, test=0.3)


def test_a_cross_validation_is_measured_on_what_its_folds_held_out(folds, tmp_path):
    run = folds[0]
    r = evaluate(run.path, config=EvaluateConfig(by=('label', 'fold'), draws=200))
    assert r['metrics']['accuracy']['value'] == run.metrics['test']['accuracy']['value'] and r['metrics']['rows'] == run.metrics['test']['rows']
    assert [s['rows'] for s in sorted(r['slices']['fold'], key=lambda s: s['slice'])] == [f['rows'] for f in run.metrics['folds']]
    assert {'calibration', 'spread'} <= set(run.metrics) and r['tta']['difference']['accuracy']['low'] <= r['tta']['difference']['accuracy']['high']
    saved = read_saved_predictions(run.path, 'oof')
    own = [calibration_from_metadata(read_model_metadata(run.path/f'fold_{k}')) for k in range(3)]
    each = np.array([own[int(k)].apply(p[None], 'balanced')[0][0] for k, p in zip(saved.table.fold, saved.probs)])  # row by row
    other = evaluate(run.path, config=EvaluateConfig(threshold='balanced', draws=200))
    assert other['metrics']['accuracy']['value'] == (each == saved.y).mean() and other['calibration']['temperature'] == np.mean([c.temperature for c in own])
    with pytest.raises(SmileError, match='name a fold'): evaluate(run.path, config=EvaluateConfig(part='valid'))
    for ask in (lambda: evaluate(run.path, tmp_path), lambda: explain(run.path)):
        with pytest.raises(SmileError, match='no model of its own'): ask()


def test_a_cross_validation_is_compared_with_another_and_calibrated_again(folds, tmp_path, no_charts):
    import shutil
    run = folds[0]
    copy = shutil.copytree(run.path, tmp_path/'again')
    (copy/'fold_0 (copy)').mkdir()
    write_json(copy/'fold_1'/'config.json', read_json(copy/'fold_1'/'config.json') | dict(status='calibrating'))  # as a killed one leaves it
    with pytest.raises(SmileError, match='fold_1 is being calibrated, or was'): evaluate(copy)
    m = calibrate(copy, CalibrateConfig(decide='balanced'))
    assert evaluate(copy)
    assert {read_json(copy/f'fold_{k}'/'metrics.json')['calibration']['rule'] for k in range(3)} == {'balanced'} == {m['calibration']['rule']}
    made = pd.read_csv(copy/'predictions_oof.csv')
    assert m['test']['accuracy']['value'] == (made.label == made.target).mean() == read_json(copy/'metrics.json')['test']['accuracy']['value']
    both = compare([run.path, copy], CompareConfig(out=str(tmp_path/'c.html'), draws=200))
    first, second = both['runs']
    assert both['rows'] == run.metrics['test']['rows'] and second['metrics']['accuracy']['value'] == m['test']['accuracy']['value']
    before = pd.read_csv(run.path/'predictions_oof.csv')
    changed = ((before.label == before.target) != (made.label == made.target)).sum()
    assert second['paired_test']['only_one'] + second['paired_test']['only_two'] == changed and int(first['seconds']) >= 0
    with pytest.raises(SmileError, match='rows of these runs differ'): compare([run.path, run.path/'fold_0'], CompareConfig(out=str(tmp_path/'c.html')))
    (copy/'report.html').unlink()
    assert 'calibration' in report(copy, ReportConfig(keep_pictures=True)).read_text()
