"The features of a frozen network are computed once, and training on them is training."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import learner, trained
from safetensors.torch import load_file

from fastsmile.training import features
from fastsmile.data.cache import clear_cache, list_cache
from fastsmile.core.errors import OptionError
from fastsmile.models.heads import feature_shape
from fastsmile.training.features import training_on_features
from fastsmile.models.heads import classifier_head
from fastsmile.models.factory import build_network, make_spec
from fastsmile.config.fit import FitConfig
from fastsmile.training.resume import StateSaver
from fastsmile.runs.fit import fit

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch): monkeypatch.setenv('FASTSMILE_CACHE', str(tmp_path/'cache'))


@pytest.fixture(scope='module')
def frozen(tiny): return replace(tiny, freeze='head', epochs=3, tta='none')


@pytest.mark.parametrize('options', [dict(), dict(head='mlp:16', ema=0.9), dict(balance='class-weight', accumulate=2, loss='focal:1'),
                                     dict(arch='vit_tiny_patch16_224', model_args='{"depth": 2}')])
def test_for_identical_views_it_is_the_training_without_them(data, frozen, tmp_path, options):
    config = replace(frozen, augment='none', **options)
    (fresh, _, a), (kept, told, b) = (trained(data, replace(config, views=v), tmp_path/str(v)) for v in ('fresh', None))
    assert told['features']['views'] == 0 and told['features']['images'] == sum(len(d.rows.names) for d in b.dls)
    numbers = fresh.select_dtypes('number').columns
    assert np.abs(fresh[numbers] - kept[numbers]).max().max() < 1e-3, (fresh, kept)
    assert list(fresh) == list(kept)
    for k, v in a.model.state_dict().items(): assert torch.allclose(v, b.model.state_dict()[k], atol=1e-4), k


def test_the_network_works_once(data, frozen, tmp_path, monkeypatch):
    seen = []
    made = features._batch_features
    monkeypatch.setattr(features, '_batch_features', lambda net, transform, batch, dtype: (seen.append(len(batch[0])), made(net, transform, batch, dtype))[1])
    _, told, learn = trained(data, replace(frozen, views='2'), tmp_path)
    train_rows, valid_rows = (len(d.rows.names) for d in learn.dls)
    assert sum(seen) == 3 * train_rows + valid_rows == told['features']['images']
    seen.clear()
    again = trained(data, replace(frozen, views='2', lr='0.002', loss='focal:1', head='mlp:8'), tmp_path/'again')
    assert not seen and again[1]['features']['from_cache']


def test_what_is_kept_is_known_by_pictures_weights_views_and_precision(data, frozen, tmp_path):
    def files(**options):
        trained(data, replace(frozen, epochs=1, **options), tmp_path/'r')
        return len(list_cache())
    assert [files(), files(), files(views='1'), files(views='1', augment='light')] == [1, 1, 2, 3]
    assert [files(size=24), files(seed=2), files(precision='bf16')] == [4, 5, 6]
    assert files(cache='none') == files(cache='memory') == 6
    assert files(model_args=frozen.model_args[:-1] + ', "global_pool": "max"}') == 7  # no weight tells this from the first
    assert clear_cache()[0] == 7 and not list_cache()


def test_views_vary_and_count(data, frozen, tmp_path):
    plain, two, six = (trained(data, replace(frozen, views=v), tmp_path/f'{v}')[0].train_loss for v in (None, '2', '6'))
    assert len({plain.iloc[0], two.iloc[0], six.iloc[0]}) == 3
    learn = learner(data, replace(frozen, views='2'), tmp_path/'l')
    with training_on_features(learn, 2, 'medium', seed=1):
        learn.dls.train.epoch = 0
        first = learn.dls.train.get_idxs()
        learn.dls.train.epoch = 0
        assert first == learn.dls.train.get_idxs() != learn.dls.train.get_idxs()  # by the number of the epoch
        n = len(learn.dls.train.rows.targets)
        assert set(np.array(first) // n) == {0, 1, 2}
        x, y = learn.dls.train.rows.batch(first)
        assert torch.equal(y, learn.dls.train.rows.targets[np.array(first) % n]) and len(x) == len(first)


def test_a_run_is_whole_and_its_learner_sees_pictures(faces, frozen, tmp_path):
    r = fit(faces, replace(frozen, out=str(tmp_path/'r')))
    learn = r.learner()
    assert learn.dls.one_batch()[0].ndim == 4 and len(r.history) == 3
    state = load_file(r.path/'checkpoints'/'best.safetensors')
    assert set(state) == set(learn.model.state_dict()) and all(v.equal(state[k]) for k, v in learn.model.state_dict().items())
    valid = pd.read_csv(r.path/'predictions_valid.csv')
    p = valid[[f'p_{c}' for c in learn.dls.vocab]].to_numpy()
    target = valid.target.map(list(learn.dls.vocab).index).to_numpy()
    best = r.history.loc[r.history.epoch == r.config['training']['best_epoch']].iloc[0]
    assert abs(-np.log(p[np.arange(len(p)), target]).mean() - best.valid_loss) < 1e-3  # the model gives what training on features saw
    assert 'The features of the frozen network were computed once' in r.report.read_text() and 'augmentation: none' in r.report.read_text()


def test_it_is_resumed_as_any_training(data, frozen, tmp_path, monkeypatch):
    config = replace(frozen, views='1', lr='find', dropout=0.3, epochs=4)
    whole, _, a = trained(data, config, tmp_path/'whole')
    class Stopped(BaseException): pass
    written = StateSaver.after_epoch
    def stop(self):
        written(self)
        if len(self.learn.history.rows) == 2 and self.learn.history.trained: raise Stopped
    with monkeypatch.context() as m:
        m.setattr(StateSaver, 'after_epoch', stop)
        with pytest.raises(Stopped): trained(data, config, tmp_path/'cut')
    cut, _, b = trained(data, config, tmp_path/'cut', resume=True)
    pd.testing.assert_frame_equal(cut, whole, check_exact=True)
    assert all(v.equal(b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_with_a_refit(faces, frozen, tmp_path):
    r = fit(faces, replace(frozen, refit_all=True, epochs=2, out=str(tmp_path/'r')))
    assert len(r.history) == 4 and len(list_cache()) == 2  # other rows


@pytest.mark.parametrize('arch,size,shape', [('densenet121', 32, (1024,)), ('mobilenetv2_100', 32, (1280,)), ('convnext_atto', 32, (320,)),
                                             ('resnetv2_50', 32, (2048, 1, 1)), ('deit_tiny_distilled_patch16_224', 224, None)])
def test_architectures(arch, size, shape):
    with torch.random.fork_rng():
        net = build_network(make_spec(arch, ['a', 'b'], size=size))
    for p in classifier_head(net).parameters(): torch.nn.init.normal_(p)
    assert feature_shape(net, size) == shape and net.training


def test_where_the_head_is_not_all_the_network_works_in_every_batch(data, frozen, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, 'feature_shape', lambda net, size: None)
    monkeypatch.delenv('FASTSMILE_QUIET')
    _, told, _ = trained(data, replace(frozen, epochs=1), tmp_path)
    assert told['features'] is None and 'the whole network runs on every batch' in capsys.readouterr().err


@pytest.mark.parametrize('options', [dict(views='x'), dict(views='-1'), dict(views='4'), dict(freeze='layer4', views='fresh'),
                                     dict(freeze='head', augment='light+mixup'), dict(freeze='head', augment='none', views='3')])
def test_what_is_refused(options):
    with pytest.raises(OptionError): FitConfig(**options)
    FitConfig(freeze='head', augment='light+mixup', views='fresh')
