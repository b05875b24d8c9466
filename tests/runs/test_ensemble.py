"Ensembles: measured on rows that no member has learnt from, each member with its own eyes, one model file that predicts."
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import without_charts
from torch import nn

from fastsmile.models.bundle import load_bundle
from fastsmile.runs.compare import compare
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.inference.rows import RowOptions
from fastsmile.inference.torch_backend import TorchBackend
from fastsmile.runs.ensemble import ensemble
from fastsmile.models.factory import build_network, make_spec
from fastsmile.config.commands import (
    CalibrateConfig, CompareConfig, EnsembleConfig, EvaluateConfig, ExplainConfig, PredictConfig, ProbeConfig,
)
from fastsmile.runs.predict import predict
from fastsmile.runs.probe import probe
from fastsmile.runs.calibrate import calibrate
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.explain import explain
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run


@pytest.fixture(scope='module')
def second(faces, tiny, tmp_path_factory):
    "Another size, loss, prior and balance than the session's run, on the same split"
    with without_charts():
        return fit(faces, replace(tiny, size=48, loss='label-smoothing', balance='none', prior='uniform', train_seed=9, freeze_epochs=0,
                                  out=str(tmp_path_factory.mktemp('runs')/'second')))


@pytest.fixture(scope='module')
def both(run, second, tmp_path_factory):
    return ensemble([run.path, second.path], EnsembleConfig(out=str(tmp_path_factory.mktemp('runs')/'both')))


def mean_by_hand(runs, rows, prior):
    total = 0
    for r in runs:
        saved = pd.read_csv(r.path/'predictions_test.csv').set_index('path').loc[rows]
        f = r.model.metadata
        p = f.calibration.apply(saved[[c for c in saved if c.startswith('p_')]].to_numpy())[1] * prior / np.array(f.prior)
        total = total + p / p.sum(1, keepdims=True) / len(runs)
    return total


def test_the_mean_of_calibrated_probabilities_under_the_prior_of_the_data(run, second, both):
    test = pd.read_csv(both.path/'predictions_test.csv')
    p = test[[c for c in test if c.startswith('p_')]].to_numpy()
    assert np.ptp(second.model.metadata.prior) < 1e-9 and np.ptp(both.model.metadata.prior) > 0.1  # --prior uniform in one of them
    assert np.abs(p - mean_by_hand([run, second], test.path, np.array(both.model.metadata.prior))).max() < 1e-5
    assert both.metrics['test']['rows'] == run.metrics['test']['rows'] and both.config['status'] == 'finished'


def test_each_member_sees_with_its_own_size(both, run, second, faces, tmp_path):
    model = both.model
    assert [q.size for q in model.preps] == [48, 32] and load_bundle(both.path).members[0].spec == run.model.spec
    test = pd.read_csv(both.path/'predictions_test.csv')
    for tta in ('none', 'flip'):
        saved = test if tta == 'none' else pd.read_csv(both.path/'predictions_test_tta.csv')
        again = both.predict(faces, tta=tta, bs=7, precision='fp32', request=RowOptions(uncalibrated=True)).set_index('path').loc[saved.path].reset_index()
        p = [c for c in saved if c.startswith('p_')]
        assert np.abs(again[p].astype(float).to_numpy() - saved[p].to_numpy()).max() < 1e-5
    done = predict(faces/'happy_images', PredictConfig(model=str(both.path), out=str(tmp_path/'p.csv'), tta='full'))
    assert done.rows > 100 and done.failed < 10
    assert TorchBackend(model, 'bf16', 'cpu').fp32_backend is not None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in TorchBackend(model, device='cpu').net.modules())


def test_the_members_stand_beside_the_ensemble(both, run):
    table = pd.read_csv(both.path/'candidates.csv')
    assert len(table) == 3 and set(table.rows) == {run.metrics['test']['rows']}
    assert table.macro_f1[0] == pytest.approx(run.metrics['test']['macro_f1']['value'])
    assert table.macro_f1[2] == pytest.approx(both.metrics['test']['macro_f1']['value'])
    assert 'The members and the ensemble' in (both.path/'report.html').read_text()


def test_every_command_takes_an_ensemble(both, run, faces, tmp_path, no_charts):
    assert evaluate(both.path, config=EvaluateConfig(draws=100))['metrics']['rows'] == both.metrics['test']['rows']
    assert calibrate(both.path, CalibrateConfig(decide='argmax'))['calibration']['rule'] == 'argmax'
    assert load_bundle(both.path).metadata.decide == 'argmax'
    album = explain(both.path, config=ExplainConfig(methods=('gradcam',), n=2, neighbours=1, out=str(tmp_path/'e')))
    assert 'sensitivity' in album['corner_share'] and 'no single feature map' in album['warnings'][0]
    assert compare([run.path, both.path], CompareConfig(draws=100, out=str(tmp_path/'c.html')))['rows'] == run.metrics['test']['rows']
    with pytest.raises(SmileError, match='has no learner'): load_run(both.path).learner()
    with pytest.raises(SmileError, match='is an ensemble, which has no single network'): build_network(make_spec('resnet10t', ['a', 'b']), str(both.path))
    with pytest.raises(SmileError, match='is an ensemble itself'): ensemble([both.path, run.path])


@pytest.mark.parametrize('inputs', ['features', 'probs'])
def test_a_forest_over_what_they_say(run, second, faces, tmp_path, no_charts, inputs):
    made = ensemble([run.path, second.path], EnsembleConfig(how='forest', inputs=inputs, trees=20, leaf='1,5', tta='none', out=str(tmp_path/'f')))
    head, test = made.model.spec.head, pd.read_csv(made.path/'predictions_test.csv')
    assert head['trees'] == 20 and head['features'] == (128 if inputs == 'features' else 6)
    again = made.predict(faces, request=RowOptions(uncalibrated=True)).set_index('path').loc[test.path].reset_index()
    p = [c for c in test if c.startswith('p_')]
    assert np.abs(again[p].astype(float).to_numpy() - test[p].to_numpy()).max() < 1e-5
    calib, before = (pd.read_csv(q/'table.csv', keep_default_na=False).query("reason == '' and split == 'calib'") for q in (made.path, run.path))
    assert 0 < len(calib) < len(before)  # the rows that taught it do not calibrate it
    members = [pd.read_csv(q.path/'table.csv', keep_default_na=False).query("reason == '' and split == 'train'") for q in (run, second)]
    taught = set(before.path) - set(calib.path)
    assert f'on half of calib ({len(taught)} rows)' in made.config['training']['summary']
    assert not any(taught & set(m.path) for m in members)  # no member was trained on them: its features of them are those of new images
    assert set(pd.read_csv(made.path/'predictions_calib.csv').path) == set(calib.path)


def test_a_forest_needs_rows_that_no_member_was_trained_on(faces, tiny, tmp_path, no_charts):
    first = fit(faces, replace(tiny, epochs=1, calib=0.0, decide='argmax', tta='none', out=str(tmp_path/'first'))).path
    pair = [first, shutil.copytree(first, tmp_path/'second')]
    for inputs in ('features', 'probs'):
        with pytest.raises(SmileError, match='on which no member was trained') as e: ensemble(pair, EnsembleConfig(how='forest', inputs=inputs, trees=5))
        assert '--calib' in e.value.hint


def test_what_taught_one_measures_nothing(run, faces, tiny, tmp_path, no_charts):
    "Another split: only the rows that are test for both are left; the folds of a cross-validation share none"
    other = fit(faces, replace(tiny, seed=6, epochs=1, tta='none', out=str(tmp_path/'other')))
    made = ensemble([run.path, other.path], EnsembleConfig(tta='none', out=str(tmp_path/'both')))
    tables = [pd.read_csv(r.path/'table.csv', keep_default_na=False).query("reason == ''").set_index('path').split for r in (run, other)]
    saved = pd.read_csv(made.path/'predictions_test.csv').path
    assert len(saved) and all((t[saved] == 'test').all() for t in tables)  # the source names its test rows: they are those of both
    for part, weakest in (('valid', {'valid', 'test'}), ('calib', {'calib', 'valid', 'test'})):
        rows = pd.read_csv(made.path/'table.csv', keep_default_na=False).query(f"reason == '' and split == '{part}'").path
        assert len(rows) < len(pd.read_csv(run.path/f'predictions_{part}.csv')) and all(set(t[rows]) <= weakest for t in tables)
    taught = pd.read_csv(made.path/'training_fingerprints.csv', keep_default_na=False)
    assert not set(taught.path) & set(saved) and set(tables[1].index[tables[1] == 'train']) <= set(taught.path)
    folds = fit(faces, replace(tiny, epochs=1, folds=2, tta='none', out=str(tmp_path/'folds')))
    with pytest.raises(SmileError, match='are training rows of another'): ensemble([folds.path/'fold_0', folds.path/'fold_1'])
    with pytest.raises(SmileError, match='cross-validation'): ensemble([folds.path, run.path])


def test_a_probe_is_a_member_like_others(run, faces, tmp_path, no_charts):
    p = probe(faces, ProbeConfig(features='pixels', size=16, probes='knn', k='9', distance='cosine', tta='none', seed=1, out=str(tmp_path/'knn')))
    made = ensemble([run.path, p.path], EnsembleConfig(tta='none', out=str(tmp_path/'both')))
    assert TorchBackend(made.model, 'auto', 'cpu').precision == 'fp32' and made.predict(faces).error.eq('').sum() > 100


def test_runs_that_cannot_be_put_together(run, faces, tiny, tmp_path, no_charts):
    with pytest.raises(SmileError, match='two runs or more'): ensemble([run.path])
    with pytest.raises(SmileError, match='two runs or more'): ensemble([run.path, run.path])
    with pytest.raises(SmileError, match='not a run folder'): ensemble([run.path, tmp_path])
    with pytest.raises(OptionError, match='with --how mean'): EnsembleConfig(inputs='probs')
    with pytest.raises(OptionError, match='with --how mean'): EnsembleConfig(trees=5)
    copy = shutil.copytree(run.path, tmp_path/'copy')
    config = json.loads((copy/'config.json').read_text())
    (copy/'config.json').write_text(json.dumps(config | dict(source='/elsewhere')))
    with pytest.raises(SmileError, match='was trained on /elsewhere'): ensemble([run.path, copy])
    fewer = fit(faces, replace(tiny, epochs=1, tta='none', drop_class=('negative smile',), out=str(tmp_path/'fewer')))
    with pytest.raises(SmileError, match='has the classes'): ensemble([run.path, fewer.path])


def test_members_that_were_changed_are_refused(both, tmp_path):
    copy = shutil.copytree(both.path/'model', tmp_path/'m')
    path = copy/'members'/'1'/'config.json'
    path.write_text(path.read_text() + ' ')
    with pytest.raises(SmileError, match='not those that it was saved with'): load_bundle(copy)
    shutil.rmtree(copy/'members'/'1')
    with pytest.raises(SmileError, match='holds no model'): load_bundle(copy)


@pytest.mark.parametrize('width', [80, 110])
def test_no_number_of_the_members_is_broken_on_a_terminal(both, width):
    import io
    from rich.console import Console
    from fastsmile.cli.tables import candidates_output
    console = Console(file=io.StringIO(), width=width)
    console.print(candidates_output(both)[0][0])
    shown, rows = console.file.getvalue(), pd.read_csv(both.path/'candidates.csv').to_dict('records')
    assert len(rows) == 3 and 'balanced accuracy' in shown and max(map(len, shown.splitlines())) <= width
    for r in rows:
        for k in ('balanced_accuracy', 'macro_f1'): assert f'{r[k]:.3f} ({r[k + "_from"]:.2f} to {r[k + "_to"]:.2f})' in shown
        assert f'{r["log_loss"]:.3f}' in shown


def test_an_ensemble_is_one_onnx_file_and_its_rows_are_torch_s(both, faces, tmp_path):
    from fastsmile.inference.export import export
    from fastsmile.inference.load import load_model
    done = export(both.path)
    assert done['labels'] == 0 and done['logits'] < 1e-4 and Path(done['out']) == both.path/'model'/'model.onnx'
    models = load_model(both.path, 'torch'), load_model(both.path, 'onnx'), load_model(done['out'])
    want, *others = (m.predict(faces/'happy_images', device='cpu', precision='fp32') for m in models)
    for got in others:
        assert got.label.tolist() == want.label.tolist() and got.error.tolist() == want.error.tolist()
        good = want.error == ''
        for c in want.filter(like='p_'): assert np.abs(got[c][good].astype(float) - want[c][good].astype(float)).max() < 1e-5
    assert models[1].preps == models[0].preps and not models[1].members
    member = both.path/'model'/'members'/'1'/'config.json'
    before = member.read_text()
    member.write_text(before + ' ')
    try:
        with pytest.raises(SmileError, match='not those that it was saved with'): load_model(both.path, 'onnx')
    finally: member.write_text(before)
