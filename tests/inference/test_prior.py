"predict --prior: rows under other class shares, a second pass that can be killed, and a summary that says what is estimated"
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import folder, picture

import fastsmile.runs.predict as runs_predict
from fastsmile.cli.tables import predict_output
from fastsmile.config.commands import PredictConfig
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_json, write_json
from fastsmile.core.system import Interrupted
from fastsmile.inference.load import load_model
from fastsmile.metrics.shares import ShareEstimate
from fastsmile.models.bundle import load_bundle
from fastsmile.runs.predict import predict


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Forty pictures, and one that is broken"
    files = {f'{i:02}.png': picture('navy red olive white'.split()[i % 4], (30 + i, 40), seed=i) for i in range(40)}
    return folder(tmp_path_factory.mktemp('album'), files | {'broken.jpg': b'no picture'})


@pytest.fixture
def ask(run, tmp_path):
    "Options of a prediction with the tiny run's model"
    return dict(model=str(run.path), out=str(tmp_path/'out'/'p.csv'), precision='fp32', device='cpu', bs=4, workers=2,
                engine='torch', overwrite=True)


@pytest.fixture
def shares(run, tmp_path):
    "A file of class shares"
    classes = load_bundle(run.path).spec.classes
    found = np.arange(len(classes)) + .5
    (tmp_path/'shares.json').write_text(json.dumps(dict(zip(classes, found / found.sum()))))
    return tmp_path/'shares.json', found / found.sum()


def table(done): return pd.read_csv(done.out, keep_default_na=False)


def test_the_bundle_of_a_run_keeps_the_confusion_of_calib(run):
    calibration = load_bundle(run.path).metadata.calibration
    counts = np.array(calibration.confusion)
    assert counts.shape == (len(calibration.calib_rows),) * 2 and 0 < counts.sum() <= sum(calibration.calib_rows) + 1e-3


def test_given_shares_move_probabilities_and_labels(run, album, ask, shares, tmp_path):
    model = load_bundle(run.path)
    prior, calibration = np.array(model.metadata.prior), model.metadata.calibration
    columns = [f'p_{c}' for c in model.spec.classes]
    options = ask | dict(sets=True, raw=True, threshold='argmax')
    before = table(predict(album, **options))
    done = predict(album, **options, prior=str(shares[0]))
    after = table(done)
    assert after.columns.tolist() == before.columns.tolist() and (after.error != '').sum() == 1
    good = before.error == ''
    old, new = (t.loc[good, columns].to_numpy(dtype=float) for t in (before, after))
    moved = old * shares[1] / prior
    assert np.allclose(new, moved / moved.sum(1, keepdims=True))
    plain = table(predict(album, **options, prior=str(shares[0]), uncalibrated=True)).loc[good, columns].to_numpy(dtype=float)
    tempered = plain**(1 / calibration.temperature)
    assert np.allclose(tempered / tempered.sum(1, keepdims=True), new)
    assert after.label[good].tolist() == [model.spec.classes[i] for i in moved.argmax(1)]
    assert done.changed == (before.label != after.label).sum() > 0
    unmoved = ['path', 'set', 'error', *(f'raw_{c}' for c in model.spec.classes)]
    pd.testing.assert_frame_equal(before[unmoved], after[unmoved])
    assert 'under the class shares' in done.run_info['probabilities']
    assert list((tmp_path/'out').iterdir()) == [tmp_path/'out'/'p.csv']


@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'parquet'])
def test_a_second_pass_that_is_stopped_is_resumed_with_the_same_bytes(kind, album, ask, shares, tmp_path, monkeypatch):
    if kind == 'parquet': pytest.importorskip('pyarrow')
    whole, out = tmp_path/f'whole.{kind}', tmp_path/f'p.{kind}'
    predict(album, **ask | dict(out=str(whole)), prior=str(shares[0]))
    def stopped(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(runs_predict, 'relabel_rows', stopped)
        with pytest.raises(Interrupted): predict(album, **ask | dict(out=str(out)), prior=str(shares[0]))
    assert not out.exists() and (tmp_path/f'p.{kind}.part').exists()
    assert predict(album, **ask | dict(out=str(out)), prior=str(shares[0]), resume=True).resumed >= 36
    assert out.read_bytes() == whole.read_bytes() and not [*tmp_path.glob('p.*.part*')]


def test_the_label_of_a_known_image_stays(faces, run, ask, tmp_path):
    classes = load_bundle(run.path).spec.classes
    (tmp_path/'s.json').write_text(json.dumps({c: 1. if c == classes[0] else 1e-6 for c in classes}))
    found = table(predict(faces, **ask, known=str(run.path), prior=str(tmp_path/'s.json')))
    known = found[(found.known != '') & (found.label == found.known_label)]
    assert len(known) and set(known.label) - {classes[0]}
    p = known[[f'p_{c}' for c in classes]].to_numpy(dtype=float)
    assert np.allclose(known.confidence.astype(float), p[np.arange(len(p)), known.label.map(list(classes).index)])


def test_estimated_shares_are_told_with_their_interval(album, ask):
    done = predict(album, **ask, prior='estimate')
    shown, result = predict_output(done)
    assert np.isclose(sum(s['value'] for s in done.shares.values()), 1)
    assert all(s['low'] <= s['value'] <= s['high'] for s in done.shares.values())
    assert any('class shares by estimate' in str(line) for line in shown)
    assert result['shares'] == done.shares and result['prior'] == 'estimate' and result['changed'] == done.changed
    json.dumps(result)


def test_a_model_without_a_confusion_matrix_estimates_by_em_and_says_so(run, album, ask, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    shutil.copytree(run.path/'model', tmp_path/'model')
    cfg = read_json(tmp_path/'model'/'config.json')
    del cfg['fastsmile']['calibration']['confusion']
    write_json(tmp_path/'model'/'config.json', cfg)
    options = ask | dict(model=str(tmp_path/'model'))
    done = predict(album, **options, prior='estimate')
    assert done.shares and all('low' not in s for s in done.shares.values())
    assert 'no confusion matrix' in ' '.join(''.join(capfd.readouterr()).split())
    assert not predict(album, **options).shares  # and no hint


def test_no_hint_is_given_where_many_images_are_unlike_or_where_there_are_few(run, album, ask, monkeypatch):
    prior = np.array(load_bundle(run.path).metadata.prior)
    found = ShareEstimate(prior[::-1], prior, 40, 'em', prior, prior, prior * 0, prior * 0 + 1, (0,))
    assert not predict(album, **ask).differs  # 40 images are too few
    monkeypatch.setattr(runs_predict, 'hint_possible', lambda rows, n_classes: True)
    monkeypatch.setattr(runs_predict, 'estimate_shares', lambda *_: found)
    monkeypatch.setattr(runs_predict, '_MANY_UNLIKE', 1.)
    done = predict(album, **ask)
    assert done.differs and any('--prior estimate' in str(line) for line in predict_output(done)[0])
    monkeypatch.setattr(runs_predict, '_MANY_UNLIKE', -1.)
    done = predict(album, **ask)
    assert not done.differs and not any('--prior estimate' in str(line) for line in predict_output(done)[0])


def test_no_image_at_all_and_only_broken_ones_are_no_reason_to_fail(ask, tmp_path):
    only_broken = folder(tmp_path/'broken', {'a.jpg': b'no picture'})
    done = predict(only_broken, **ask, prior='estimate')
    assert (done.rows, done.failed, done.shares) == (1, 1, {})


def test_other_words_and_files_of_other_classes_are_refused_before_anything_is_predicted(album, ask, tmp_path):
    with pytest.raises(OptionError, match='neither a word nor a file'): predict(album, **ask, prior='guess')
    (tmp_path/'other.json').write_text('{"cat": 0.5, "dog": 0.5}')
    with pytest.raises(SmileError, match='must give each class a share'): predict(album, **ask, prior=str(tmp_path/'other.json'))
    assert not (tmp_path/'out').exists()
    assert PredictConfig().prior == 'data'


@pytest.mark.parametrize('prior', ['estimate', 'uniform'])
def test_a_table_in_python_is_moved_like_a_file(prior, album, ask):
    written = table(predict(album, **ask, prior=prior))
    plain = load_model(ask['model'], engine='torch').predict(album, bs=4, threads=2, precision='fp32', device='cpu')
    moved = load_model(ask['model'], engine='torch').predict(album, bs=4, threads=2, precision='fp32', device='cpu', prior=prior)
    good = (written.error == '').to_numpy()
    assert moved.label.tolist() == written.label.tolist()
    p = [c for c in written if c.startswith('p_')]
    assert np.allclose(moved.loc[good, p].astype(float), written.loc[good, p].astype(float), atol=1e-6)
    assert not np.allclose(moved.loc[good, p].astype(float), plain.loc[good, p].astype(float), atol=1e-6)
