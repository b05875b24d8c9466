"The traps of fastai and timm, each ruled out; options that would do nothing would fail here."
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, folder, learner, picture, trained
from typer.testing import CliRunner

from fastsmile.cli.commands import app
from fastsmile.metrics.calibration import class_prior
from fastsmile.training.balance import make_epoch_sampler
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_safe_csv
from fastsmile.models.factory import build_network, make_spec
from fastsmile.inference.load import load_model
from fastsmile.inference.rows import RowOptions
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.models.factory import param_groups
from fastsmile.training.learner import find_lr, run_phase, suggest_lr


def test_the_run_folder_is_whole(run):
    files = {p.relative_to(run.path).as_posix() for p in run.path.rglob('*') if p.is_file() and p.parent.name != 'explain'}
    assert files == {'config.json', 'options.toml', 'training_plan.json', 'table.csv',
                     'training_fingerprints.csv', 'audit.json', 'plan.csv', 'history.csv', 'curves.png',
                     'balance.json', 'augmented.jpg',
                     'checkpoints/best.safetensors', 'checkpoints/last.safetensors', 'model/model.safetensors', 'model/config.json', 'model/README.md',
                     'predictions_calib.csv', 'predictions_valid.csv', 'predictions_test.csv', 'predictions_calib_tta.csv', 'predictions_test_tta.csv',
                     'metrics.json', 'report.html'}
    assert run.config['status'] == 'finished' and load_run(run.path).metrics == run.metrics


def test_predict_gives_the_validation_rows_again(run, faces):
    valid = pd.read_csv(run.path/'predictions_valid.csv')
    again = run.predict(faces, bs=5, precision='fp32', request=RowOptions(uncalibrated=True)).set_index('path').loc[valid.path].reset_index()
    p = [c for c in valid if c.startswith('p_')]
    assert np.abs(again[p].astype(float).to_numpy() - valid[p].to_numpy()).max() < 1e-4
    assert again.label.tolist() == valid.label.tolist()


def test_the_same_seed_gives_the_same_run(run, no_charts, faces, tiny, tmp_path):
    again = fit(faces, replace(tiny, decide='balanced', out=str(tmp_path/'r')))
    same = ['epoch', 'train_loss', 'valid_loss', 'valid_macro_f1', 'lr']
    pd.testing.assert_frame_equal(again.history[same], run.history[same])
    other = fit(faces, replace(tiny, seed=2, out=str(tmp_path/'o')))
    assert other.history.train_loss.tolist() != run.history.train_loss.tolist()


def test_the_draw_survives_copies_and_workers(data, tiny, tmp_path):
    learn = learner(data, replace(tiny, workers=2), tmp_path)
    n = torch.bincount(torch.cat([y for _, y in learn.dls.train]))
    assert n.max() - n.min() <= tiny.bs
    copy = learn.dls.train.new()
    assert copy.draw is learn.dls.train.draw
    _, y = learn.get_preds(ds_idx=0)  # not drawn: targets in the order of the rows
    rows = data.rows[data.rows.split == 'train']
    assert [data.classes[i] for i in y] == rows.label.tolist()
    assert learn.dls.test_dl(rows[:3]).draw is None


def test_balance_none_draws_the_data_as_it_is(data, tiny, tmp_path):
    learn = learner(data, replace(tiny, balance='none'), tmp_path)
    y = data.rows[data.rows.split == 'train'].label.map(data.classes.index)
    assert (learn.dls.train.draw.rows_per_class == np.bincount(y)).all()


def test_a_class_that_training_lacks_is_not_drawn():
    draw = make_epoch_sampler([0, 0, 2], 3, 'weighted', 0)
    assert draw.rows_per_class.tolist() == [2, 0, 1] and np.isfinite(class_prior([0, 0, 2], 3)).all()


def test_probabilities_speak_for_the_data_and_labels_for_the_rule(run, faces, tiny, tmp_path, no_charts):
    plain = fit(faces, replace(tiny, decide='argmax', monitor='loss', tta='none', out=str(tmp_path/'argmax')))
    a, b = (pd.read_csv(r.path/'predictions_test.csv') for r in (run, plain))
    p = [c for c in a if c.startswith('p_')]
    pd.testing.assert_frame_equal(a[p], b[p])
    assert [c[2:] for c in b[p].idxmax(axis=1)] == b.label.tolist()
    assert a.label.tolist() != b.label.tolist()
    assert a.confidence.tolist() == [row[f'p_{row.label}'] for _, row in a.iterrows()]
    shift = run.model.metadata.shift
    assert shift[0] > 0 > shift[1]  # NOT smile is commoner in the data than in what was drawn


def test_frozen_body_learns_nothing_not_even_statistics(data, tiny, tmp_path):
    learn = learner(data, tiny, tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.freeze()
    with learn.no_logging(): learn.fit(1, 1e-2)
    assert {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])} == {'fc.weight', 'fc.bias'}


def test_freeze_epochs_come_first(data, tiny, tmp_path):
    h = trained(data, replace(tiny, freeze_epochs=1, epochs=1), tmp_path)[0]
    assert h.phase.tolist() == ['head', 'all'] and h.epoch.tolist() == [1, 2]


@pytest.mark.parametrize('lr', ['auto', 'find', '0.005'])
def test_after_the_head_everything_is_trained_whoever_finds_the_rate(data, tiny, tmp_path, monkeypatch, lr):
    "A search makes a new optimizer while the body is frozen; the body must come back all the same, and the search's moments go"
    moved, moments = {}, {}
    def spy(learn, phase, *rest):
        moments[phase.name] = sum('step' in state for state in learn.opt.state.values())
        before = {k: v.clone() for k, v in learn.model.named_parameters()}
        run_phase(learn, phase, *rest)
        moved[phase.name] = {k for k, v in learn.model.named_parameters() if not v.equal(before[k])}
    monkeypatch.setattr('fastsmile.training.learner.run_phase', spy)
    _, _, learn = trained(data, replace(tiny, lr=lr, freeze_epochs=1, epochs=1, augment='none'), tmp_path)
    assert moments == {'head': 0, 'all': 0}
    assert moved['head'] == {'fc.weight', 'fc.bias'} and moved['all'] == {k for k, _ in learn.model.named_parameters()}


@pytest.mark.parametrize('arch', ['resnet10t', 'densenet121', 'mobilenetv2_100', 'vit_tiny_patch16_224', 'convnext_atto', 'efficientnet_b0'])
def test_three_groups_hold_every_parameter_once(arch):
    net = build_network(make_spec(arch, ['a', 'b']))
    groups = param_groups(net)
    ids = [id(p) for g in groups for p in g]
    assert len(groups) == 3 and all(groups) and sorted(ids) == sorted(id(p) for p in net.parameters())


def test_fewer_rows_than_a_batch_still_train(tmp_path, tiny, no_charts):
    files = {f'{c}/{i}.png': picture(c, seed=i) for c in ('red', 'blue') for i in range(12)}
    r = fit(folder(tmp_path/'s', files), replace(tiny, bs=512, out=str(tmp_path/'r')))
    assert np.isfinite(r.history.train_loss).all()


def test_the_rate_search_survives_few_batches_and_leaves_no_trace(data, tiny, tmp_path):
    learn = learner(data, replace(tiny, bs=64, size=16, augment='none'), tmp_path)
    assert len(learn.dls.train) == 1
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    rate = find_lr(learn, 50)
    assert 1e-5 <= rate.lr <= 1e-2 and len(rate.curve) >= 50
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items()) and learn.history.rows == []


def test_the_rate_search_says_when_it_falls_back():
    assert 'no fall' in suggest_lr(pd.DataFrame(dict(lr=np.geomspace(1e-5, 1, 60), loss=1., smooth=1.)))[1]
    assert 'only 0 usable' in suggest_lr(pd.DataFrame(dict(lr=[1e-5], loss=[np.nan], smooth=[np.nan])))[1]


def test_lr_find_writes_its_search(faces, tiny, tmp_path):
    r = fit(faces, replace(tiny, lr='find', epochs=1, size=16, augment='none', tta='none', out=str(tmp_path/'r')))
    curve = pd.read_csv(r.path/'lr_find.csv')
    assert len(curve) >= 50 and (r.path/'lr_find.png').exists() and r.config['training']['phases'][0]['lr'] == curve.taken[0]


def test_options_that_change_training(data, tiny, tmp_path, run):
    loss = run.history.train_loss.tolist()
    assert trained(data, tiny, tmp_path/'same')[0].train_loss.tolist() == loss
    one = replace(tiny, epochs=1)
    loss = trained(data, one, tmp_path/'one')[0].train_loss.tolist()
    for i, change in enumerate([dict(augment='strong'), dict(augment='none'), dict(wd=0.5), dict(lr='0.001'), dict(bs=32), dict(resize='crop'), dict(size=48)]):
        assert trained(data, replace(one, **change), tmp_path/str(i))[0].train_loss.tolist() != loss, change


def test_the_epoch_is_chosen_by_log_loss_and_the_rule_by_monitor(faces, tiny, tmp_path, no_charts):
    rules = {}
    for monitor in ('loss', 'macro_f1', 'balanced_accuracy', 'accuracy'):
        r = fit(faces, replace(tiny, epochs=3, monitor=monitor, tta='none', out=str(tmp_path/monitor)))
        assert r.config['training']['best_epoch'] == 1 + int(r.history.valid_loss.argmin())
        assert r.metrics['monitor'] == monitor and 'the lowest log loss on valid' in r.report.read_text()
        rules[monitor] = r.metrics['calibration']['rule']
    assert rules == dict(loss='argmax', macro_f1='macro_f1', balanced_accuracy='balanced', accuracy='argmax')


def test_fractions_and_groups(tiny, tmp_path, no_charts):
    files = {f'{c}/p{i % 10}_{i}.png': picture(c, size=(20 + i, 20), seed=i) for c in ('red', 'blue') for i in range(40)}
    config = replace(tiny, valid=0.3, test=0.1, calib=0.0, group_from=r'(p\d+)_', epochs=1, tta='none', out=str(tmp_path/'r'))
    t = pd.read_csv(fit(folder(tmp_path/'s', files), config).path/'table.csv')
    assert t.groupby('group').split.nunique().max() == 1
    assert t.split.value_counts().to_dict() == {'train': 48, 'valid': 24, 'test': 8}


def test_unreadable_pictures_are_named_and_left_out(tmp_path, tiny, no_charts):
    files = {f'{c}/{i}.png': picture(c, seed=i) for c in ('red', 'blue') for i in range(15)} | {'red/broken.png': picture(seed=99)[:60], 'blue/empty.jpg': b''}
    r = fit(folder(tmp_path/'s', files), replace(tiny, epochs=1, out=str(tmp_path/'r')))
    t = pd.read_csv(r.path/'table.csv', keep_default_na=False).set_index('path')
    assert t.reason['blue/empty.jpg'] == 'unreadable: zero bytes' and t.reason['red/broken.png']
    assert (t.reason != '').sum() == 2


def test_a_failed_run_says_so(faces, tiny, tmp_path):
    with pytest.raises(SmileError, match='lower --lr'): fit(faces, replace(tiny, lr='10', augment='none', wd=1.0, epochs=30, out=str(tmp_path/'r')))
    with pytest.raises(SmileError, match='status is failed'): load_run(tmp_path/'r')


def test_the_hub_out_of_reach_is_one_clear_error(faces, tiny, tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    for k in ('HTTPS_PROXY', 'https_proxy', 'ALL_PROXY', 'all_proxy'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr('fastsmile.models.factory.cached_weights', lambda arch: None)
    with pytest.raises(SmileError, match='--weights none'): fit(faces, replace(tiny, weights='hub', model_args=None, out=str(tmp_path/'r')))
    assert not (tmp_path/'r').exists()


def test_weights_from_a_file_are_loaded_and_start_frozen(faces, tiny, tmp_path, no_charts):
    from safetensors.torch import save_file
    net = build_network(make_spec('resnet10t', ['a', 'b', 'c', 'd'], model_args=TINY))
    save_file(net.state_dict(), tmp_path/'w.safetensors')
    torch.save(net.state_dict(), tmp_path/'w.pth')
    for f in ('w.safetensors', 'w.pth'):
        again = build_network(make_spec('resnet10t', ['a', 'b'], model_args=TINY), str(tmp_path/f))
        assert again.conv1[0].weight.equal(net.conv1[0].weight)
    h = fit(faces, replace(tiny, weights=str(tmp_path/'w.safetensors'), epochs=1, tta='none', out=str(tmp_path/'r'))).history
    assert h.phase.tolist() == ['head', 'all']


def test_a_pickle_with_code_is_not_executed(tiny, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'pwned'), 'w'))
    for name in ('w.pth', 'w.safetensors'):
        (tmp_path/name).write_bytes(pickle.dumps({'fc.weight': Evil()}))
        with pytest.raises(SmileError): build_network(make_spec('resnet10t', ['a', 'b']), str(tmp_path/name))
    with pytest.raises(SmileError, match='Pickles'): load_model(tmp_path/'w.pth')
    assert not (tmp_path/'pwned').exists()


def test_prediction_imports_neither_fastai_nor_pandas():
    import subprocess
    code = "import sys, fastsmile.inference.predict; print({'fastai', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'set()'


def test_wrong_options_are_refused_in_words(faces, tiny):
    for change, words in [(dict(arch='resnet19'), 'resnet18'), (dict(device='cuda:99'), 'cannot be used'),
                          (dict(model_args='{"chanels": [1]}'), 'does not take them'),
                          (dict(model_args='[1]'), 'not a JSON object')]:
        with pytest.raises(OptionError, match=words): fit(faces, replace(tiny, **change))


def test_lr_find_reads_its_rate_from_several_searches_and_trains_nothing(faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ['--arch', 'resnet10t', '--weights', 'none', '--model-args', TINY, '--size', '16', '--bs', '16', '--augment', 'none', '--steps', '50',
               '--searches', '2']
    ended = CliRunner().invoke(app, ['lr-find', str(faces), *options, '--json'])
    said = json.loads(ended.stdout.splitlines()[-1])
    assert ended.exit_code == 0 and [p['phase'] for p in said['phases']] == ['all']
    assert 1e-5 <= said['phases'][0]['lowest'] <= said['phases'][0]['highest'] <= 1e-2
    curve = read_safe_csv(tmp_path/'lr-find'/'lr_find.csv', numbers=True)
    assert len(curve) >= 20 and curve.lr.is_monotonic_increasing
    assert sorted(p.name for p in tmp_path.iterdir()) == ['lr-find']


def test_lr_find_makes_so_many_searches_of_so_many_steps_where_it_is_told_to(faces, tmp_path):
    from fastsmile.runs.lr_find import lr_find
    def found(**options):
        done = lr_find(faces, arch='resnet10t', weights='none', model_args=TINY, size=16, bs=16, augment='none', workers=0,
                       out=str(tmp_path/'out'), **options)
        assert done.plot == tmp_path/'out'/'lr_find.png' and done.plot.stat().st_size > 1000
        return done.phases[0]
    one, two, longer = found(searches=1, steps=50), found(searches=2, steps=50), found(searches=1, steps=70)
    assert one.lowest == one.highest and not one.curve.loss.head(20).equals(two.curve.loss.head(20))
    assert len(one.curve) <= 51 and (np.diff(np.log(longer.curve.lr)) < np.diff(np.log(one.curve.lr))[0]).all()
