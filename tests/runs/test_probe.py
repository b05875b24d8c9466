"Probes: heads equal to scikit-learn's, chosen on valid, a run folder like any other, no pickle and no leak."
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from fastsmile.core.files import file_sha256
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.runs.compare import compare
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.inference.rows import RowOptions
from fastsmile.inference.torch_backend import TorchBackend
from fastsmile.models.heads import classifier_head
from fastsmile.models.factory import build_network, make_spec
from fastsmile.config.commands import CalibrateConfig, CompareConfig, EvaluateConfig, ExplainConfig, ProbeConfig
from fastsmile.config.fit import FitConfig
from fastsmile.runs.probe import probe
from fastsmile.runs.calibrate import calibrate
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.explain import explain
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import Run, load_run
from fastsmile.models.heads import forest_from_sklearn, knn_from_rows
from fastsmile.data.splits import read_training_fingerprints

BARE = ProbeConfig(arch='resnet10t', weights='none', model_args=TINY, size=32, seed=1)
CONFIG = replace(BARE, trees=20, leaf='1,5', k='5,15', c='0.01,1')


@pytest.fixture(scope='module')
def probed(faces, tmp_path_factory):
    return probe(faces, replace(CONFIG, out=str(tmp_path_factory.mktemp('probe')/'all')))


def test_the_file_for_onnxruntime_is_written_unless_it_is_not_wanted(faces, tmp_path, no_charts):
    for no_onnx in (False, True):
        config = replace(BARE, probes='logistic', c='0.1', tta='none', no_onnx=no_onnx, out=str(tmp_path/str(no_onnx)))
        assert (probe(faces, config).path/'model'/'model.onnx').exists() is not no_onnx


def one(probed, kind): return Run(probed.path/'fits'/f'{kind}-seed1')


def rows(n=300, f=12, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return (rng.normal(size=(n, f)) + 1.5 * np.eye(classes, f)[y]).astype(np.float32), y


@pytest.mark.parametrize('k', [1, 5, 101])
@pytest.mark.parametrize('distance', ['cosine', 'euclidean'])
def test_neighbours_are_those_of_scikit_learn(k, distance):
    (x, y), (new, _) = rows(), rows(seed=1)
    ours = knn_from_rows(x, y, 3, k, distance)
    theirs = KNeighborsClassifier(k, metric=distance, algorithm='brute').fit(x, y)
    assert np.abs(ours(torch.from_numpy(new)).exp().numpy() - theirs.predict_proba(new)).max() < 1e-6
    alone = torch.cat([ours.class_shares(torch.from_numpy(r[None])) for r in new])  # whatever the size of the batch
    assert alone.equal(ours.class_shares(torch.from_numpy(new)))


@pytest.mark.parametrize('leaf,weight', [(1, None), (5, 'balanced')])
def test_a_forest_is_that_of_scikit_learn(leaf, weight):
    "On the training rows too, which lie on the thresholds' sides by next to nothing"
    (x, y), (new, _) = rows(), rows(seed=1)
    x, new = (np.round(v, 1) for v in (x, new))  # many ties
    theirs = RandomForestClassifier(50, min_samples_leaf=leaf, class_weight=weight, random_state=0).fit(x, y)
    ours = forest_from_sklearn(theirs, 3)
    for rows_ in (x, new, theirs.estimators_[0].tree_.threshold[:12][None].astype(np.float32)):
        assert np.abs(ours(torch.from_numpy(rows_)).exp().numpy() - theirs.predict_proba(rows_)).max() < 1e-6


def test_a_class_that_the_forest_never_saw_has_no_share():
    x, y = rows()
    theirs = RandomForestClassifier(5, random_state=0).fit(x[y > 0], y[y > 0])
    assert forest_from_sklearn(theirs, 3).class_shares(torch.from_numpy(x))[:, 0].abs().max() == 0


def test_valid_chooses_and_test_is_measured_for_what_was_chosen(probed):
    tried = pd.read_csv(probed.path/'candidates.csv')
    assert len(tried) == 4 + 2 + 2 and tried.valid_macro_f1.is_monotonic_decreasing and not any(c.startswith('test') for c in tried)
    best = tried.groupby(tried.probe.str.split(',').str[0]).valid_macro_f1.max()
    for kind in ('knn', 'forest', 'logistic'):
        words = one(probed, kind).config['training']['summary']
        chosen = next(r for r in tried.itertuples() if r.probe in words)
        assert chosen.probe.startswith(kind) and chosen.valid_macro_f1 == best[kind]
    c = probed.comparison.set_index('folder')  # the best of each kind, calibrated
    assert probed.config['compared']['best'] == c.valid_macro_f1.idxmax() and c.test_macro_f1_low.notna().all()
    assert {'value', 'low', 'high'} <= set(probed.metrics['test']['macro_f1'])


def test_predict_says_what_was_measured(probed, faces):
    for kind in ('knn', 'forest', 'logistic'):
        run = one(probed, kind)
        test = pd.read_csv(run.path/'predictions_test.csv')
        again = run.predict(faces, precision='fp32', request=RowOptions(uncalibrated=True)).set_index('path').loc[test.path].reset_index()
        p = [c for c in test if c.startswith('p_')]
        assert np.abs(again[p].astype(float).to_numpy() - test[p].to_numpy()).max() < 1e-5 and again.label.tolist() == test.label.tolist()


def test_predict_imports_no_scikit_learn(probed, faces):
    code = f'''
import sys
from fastsmile.runs.predict import predict as predict_to_file
from fastsmile.config.commands import PredictConfig
predict_to_file({str(next(faces.glob("happy_images/*.jpg")))!r}, PredictConfig(model={str(one(probed, "forest").path)!r}, out={str(probed.path/"p.csv")!r}))
print({{'sklearn', 'fastai', 'pandas'}} & set(sys.modules))'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.stdout.strip() == 'set()', r.stderr


def test_no_pickle_and_logistic_is_plain_timm(probed):
    import timm
    assert not [p for p in probed.path.rglob('*') if p.suffix in ('.pkl', '.pth', '.joblib', '.pickle')]
    run = one(probed, 'logistic')
    assert run.config['model']['needs_fastsmile'] == '' and 'nearest' in one(probed, 'knn').config['model']['needs_fastsmile']
    net, x = timm.create_model(f'local-dir:{run.path/"model"}', pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert net(x).equal(run.model.net(x))


def test_every_command_takes_a_probe(probed, run, faces, tmp_path, no_charts):
    knn = one(probed, 'knn')
    assert evaluate(knn.path, config=EvaluateConfig(draws=100))['metrics']['rows'] == knn.metrics['test']['rows']
    assert calibrate(knn.path, CalibrateConfig(decide='argmax'))['calibration']['rule'] == 'argmax'
    album = explain(knn.path, config=ExplainConfig(methods=('gradcam',), n=2, neighbours=1, out=str(tmp_path/'e')))
    assert 'no gradient' in album['warnings'][0] and 'occlusion' in album['corner_share']
    assert 'gradcam' in explain(one(probed, 'logistic').path, config=ExplainConfig(methods=('gradcam',), n=2, out=str(tmp_path/'f')))['corner_share']
    r = compare([probed.path, run.path], CompareConfig(draws=100, out=str(tmp_path/'c.html')))
    assert r['rows'] == run.metrics['test']['rows'] and r['runs'][0]['images_per_second'] == ''
    with pytest.raises(SmileError, match='has no learner'): knn.learner()
    page = (probed.path/'report.html').read_text()
    assert 'Every probe and setting' in page and 'macro F1; the dot' not in page


def test_pixels(faces, tmp_path, no_charts):
    run = probe(faces, ProbeConfig(features='pixels', size=16, probes='knn', k='5,9', distance='euclidean', tta='none', no_onnx=True, seed=1,
                                   out=str(tmp_path/'p')))
    spec = run.model.spec
    assert (spec.arch, spec.prep.size, spec.head['distance']) == ('smilepixels', 16, 'euclidean')
    assert classifier_head(run.model.net).bank.shape[1] == 16 * 16 * 3
    assert run.comparison is None and run.predict(faces).error.eq('').sum() > 100
    train = pd.read_csv(run.path/'table.csv', keep_default_na=False).query("reason == '' and split == 'train'")
    said = run.predict(faces).set_index('path')
    assert (said.loc[train.path][f'p_{train.label.iloc[0]}'].iloc[0]) > 0


def test_balance_changes_what_is_fitted_and_is_taken_back(faces, tmp_path, no_charts):
    one_each = dict(knn=dict(k='5', distance='cosine'), logistic=dict(c='0.01'))
    def head(balance, kind, **kw):
        r = probe(faces, replace(BARE, probes=kind, **one_each[kind], balance=balance, tta='none', no_onnx=True,
                                out=str(tmp_path/f'{kind}-{balance}')))
        return r, load_bundle(r.path)
    none, weighted = (head(b, 'logistic')[1] for b in ('none', 'class-weight'))
    assert not classifier_head(none.net).weight.equal(classifier_head(weighted.net).weight)
    assert np.ptp(none.metadata.shift) < 1e-9 < np.ptp(weighted.metadata.shift)
    run, few = head('undersample', 'knn')
    assert few.spec.head['rows'] < 3 * min(pd.read_csv(run.path/'table.csv').query("split == 'train'").label.value_counts()) + 1


def test_the_rows_that_a_network_has_seen_do_not_measure_its_probe(run, faces, tmp_path, no_charts):
    "The same split: all rows stay. Another: rows in the training or validation data of --weights are set aside"
    same = probe(faces, ProbeConfig(weights=str(run.path), probes='logistic', c='0.1', seed=1, tta='none', no_onnx=True, out=str(tmp_path/'same')))
    assert same.metrics['test']['rows'] == run.metrics['test']['rows'] and same.model.spec.arch == 'resnet10t' and same.model.spec.prep.size == 32
    other = probe(faces, ProbeConfig(weights=str(run.path), probes='logistic', c='0.1', seed=5, tta='none', no_onnx=True, out=str(tmp_path/'other')))
    table, theirs = (pd.read_csv(r.path/'table.csv', keep_default_na=False).set_index('path') for r in (other, run))
    gone = table.index[table.reason.str.contains('training or validation data of --weights')]
    left = table.index[(table.reason == '') & (table.split == 'test')]
    assert len(gone) > 5 and len(left) and set(theirs.split[left]) == {'test'}


def test_nor_what_is_trained_from_it(run, faces, tiny, tmp_path, no_charts):
    "Another seed; what the first has seen, the second has seen, too"
    again = fit(faces, replace(tiny, weights=str(run.path), seed=5, epochs=1, lr='0.001', tta='none', out=str(tmp_path/'again')))
    table, theirs = (pd.read_csv(r.path/'table.csv', keep_default_na=False).set_index('path') for r in (again, run))
    gone, used = table.index[table.reason.str.contains('training or validation data of --weights')], table[table.reason == '']
    assert len(gone) > 5 and not (theirs.split[used.index[used.split.isin(['calib', 'valid'])]] == 'train').any()
    assert set(read_training_fingerprints(run.path).digest) <= set(read_training_fingerprints(again.path).digest)
    same = fit(faces, replace(tiny, weights=str(run.path), epochs=1, lr='0.001', tta='none', out=str(tmp_path/'same')))
    assert same.metrics['test']['rows'] == run.metrics['test']['rows'] and same.metrics['valid']['rows'] == run.metrics['valid']['rows']


@pytest.mark.parametrize('change,words', [(dict(k='0'), 'list of numbers'), (dict(probes='svm'), 'Accepted: knn'),
                                          (dict(balance='logit-adjust'), 'Accepted: none'), (dict(features='pixels', weights='none'), 'need no network'),
                                          (dict(distance='cosine,cosine'), 'twice'), (dict(c='x'), 'list of numbers'),
                                          (dict(probes='knn', trees=5), 'where forest is not'),
                                          (dict(probes='forest', k='7'), 'where knn is not'), (dict(valid=.6, test=.6), 'too little')])
def test_wrong_options_are_refused(change, words):
    with pytest.raises(OptionError, match=words): ProbeConfig(**change)


def test_too_many_neighbours_are_left_out_or_refused(faces, tmp_path, no_charts):
    made = probe(faces, replace(BARE, probes='knn', k='3,5000', distance='cosine', tta='none', no_onnx=True, out=str(tmp_path/'a')))
    assert pd.read_csv(made.path/'candidates.csv').probe.tolist() == ['knn, k 3, cosine']
    with pytest.raises(SmileError, match='more than the'): probe(faces, replace(BARE, probes='knn', k='5000', out=str(tmp_path/'b')))


def test_fit_does_not_go_on_with_a_probe(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(status='failed', kind='probe', source='x')))
    with pytest.raises(SmileError, match='fastsmile probe'): fit('.', FitConfig(resume=str(tmp_path)))


def saved_forest(folder):
    x, y = rows()
    spec = make_spec('smilepixels', ['a', 'b', 'c'], size=2)
    head = forest_from_sklearn(RandomForestClassifier(5, random_state=0).fit(x, y), 3)
    net = build_network(spec)
    net.fc = head
    save_bundle(Model(replace(spec, head=head.settings), ModelMetadata([.3, .3, .4], [0.] * 3, [0.] * 3, 'argmax'), net.eval()), folder)
    return head


def test_a_forest_that_leads_nowhere_is_refused(tmp_path):
    "Children that point back would never end, and features that are not there would crash"
    from safetensors.torch import load_file, save_file
    saved_forest(tmp_path/'m')
    assert load_bundle(tmp_path/'m').spec.head['trees'] == 5
    state, config = load_file(tmp_path/'m'/'model.safetensors'), json.loads((tmp_path/'m'/'config.json').read_text())
    for name, value, words in (('fc.left', 0, 'do not lead'), ('fc.right', 10**6, 'do not lead'), ('fc.feature', 99, 'features that are not there'),
                               ('fc.roots', -1, 'no nodes'), ('fc.values', float('nan'), 'no shares')):
        bad = {k: v.clone() for k, v in state.items()}
        bad[name].view(-1)[-1] = value
        save_file(bad, tmp_path/'m'/'model.safetensors', metadata=dict(format='pt'))
        config['fastsmile']['sha256'] = file_sha256(tmp_path/'m'/'model.safetensors')
        (tmp_path/'m'/'config.json').write_text(json.dumps(config))
        with pytest.raises(SmileError, match=words): load_bundle(tmp_path/'m')
    for head in (dict(kind='svm'), dict(kind='knn', rows=3), dict(kind='knn', rows=3, k=5, distance='cosine')):
        config['fastsmile']['head'] = head
        (tmp_path/'m'/'config.json').write_text(json.dumps(config))
        with pytest.raises(SmileError, match='do not fit'): load_bundle(tmp_path/'m')


def test_bf16_leaves_thresholds_and_banks_alone(probed):
    model = one(probed, 'knn').model
    assert TorchBackend(model, 'auto', 'cpu').precision == 'fp32'
    assert classifier_head(TorchBackend(model, 'bf16', 'cpu').net).bank.equal(classifier_head(model.net).bank)


def test_an_opened_probe_is_a_run(probed):
    assert load_run(probed.path).options.arch == 'resnet10t' and (probed.path/'model'/'README.md').exists()
