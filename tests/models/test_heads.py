"What every kind of head must do: be built from its settings, be saved and loaded, and refuse settings that are impossible."
import json

import numpy as np
import pytest
import timm
import torch
from sklearn.ensemble import RandomForestClassifier

from fastsmile.config.fields import HEADS as HEAD_CHOICES, parse_head
from fastsmile.core.errors import SmileError
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.models.factory import create_network, make_spec, needs_fastsmile
from fastsmile.models.heads import HEADS, FittedHead, build_head, classifier_head, forest_from_sklearn, head_settings
from fastsmile.models.heads import head_summary, knn_from_rows, replace_head, without_head
from fastsmile.models.spec import FITTED_KINDS, Model, ModelMetadata, ModelSpec

FEATURES, CLASSES = 16, 3


def make_forest(x, y): return forest_from_sklearn(RandomForestClassifier(5, max_depth=4, random_state=0).fit(x, y), CLASSES)


# kind -> a head that has learnt something, from rows (N, F) and labels
FITTED = dict(mlp=lambda x, y: build_head(dict(kind='mlp', hidden=[8, 4], dropout=0.5), FEATURES, CLASSES),
              knn=lambda x, y: knn_from_rows(x, y, CLASSES, 5), forest=make_forest)


@pytest.fixture(scope='module')
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, FEATURES)).astype(np.float32), rng.integers(0, CLASSES, 60)


@pytest.fixture(params=sorted(HEADS))
def head(request, rows):
    torch.manual_seed(0)
    return FITTED[request.param](*rows).eval()


def test_every_kind_is_tested_and_every_choice_of_fit_is_a_kind():
    assert FITTED.keys() == HEADS.keys()
    assert {word for word, choice in HEAD_CHOICES.items() if choice.parse} <= HEADS.keys()
    assert parse_head('linear') == {} and parse_head('mlp:8,4')['kind'] in HEADS


def test_settings_build_the_same_head(head):
    settings = json.loads(json.dumps(head_settings(head)))
    again = build_head(settings, FEATURES, CLASSES)
    assert type(again) is type(head) and head_settings(again) == settings == head.settings
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in head.state_dict().items()}


def test_saved_and_loaded_it_gives_the_same_logits(head, rows):
    again = build_head(head.settings, FEATURES, CLASSES).eval()
    again.load_state_dict(head.state_dict())
    again.check()
    x = torch.from_numpy(rows[0][:7]) + 0.01
    with torch.no_grad(): assert again(x).equal(head(x)) and again(x).shape == (7, CLASSES)


def test_its_summary_is_words(head): assert len(head_summary(head.settings)) > 10 and '{' not in head_summary(head.settings)


def test_impossible_settings_are_refused(head):
    for key in head.settings.keys() - {'kind'}:
        for wrong in ('x', None, [], -1) if key != 'distance' else ('x',):
            if (key, wrong) in (('hidden', []), ('dropout', [])): continue  # no hidden layer is a linear one
            with pytest.raises((ValueError, TypeError, RuntimeError, SmileError)):
                made = build_head(head.settings | {key: wrong}, FEATURES, CLASSES)
                made.check()
    with pytest.raises(KeyError): build_head(dict(kind=head.kind), FEATURES, CLASSES)


def test_fitted_heads_keep_their_precision(head):
    assert isinstance(head, FittedHead) == (head.kind in FITTED_KINDS)
    if head.kind not in FITTED_KINDS: return
    before = {k: v.dtype for k, v in head.state_dict().items()}
    assert {k: v.dtype for k, v in torch.nn.Sequential(head).bfloat16()[0].state_dict().items()} == before


def test_it_stands_on_a_network_and_travels_in_a_bundle(head, tmp_path):
    spec = ModelSpec('resnet10t', ('a', 'b', 'c'), make_spec('resnet10t', 'abc', size=32).prep,
                     dict(channels=[4, 8, 16, FEATURES]), head.settings)
    net = create_network(spec).eval()
    classifier_head(net).load_state_dict(head.state_dict())
    save_bundle(Model(spec, ModelMetadata([.4, .3, .3], [0.] * 3, [0.] * 3, 'argmax'), net), tmp_path/'m')
    again, x = load_bundle(tmp_path/'m'), torch.randn(2, 3, 32, 32)
    assert again.spec == spec and needs_fastsmile(spec)
    with torch.no_grad(): assert again.net(x).equal(net(x)) and classifier_head(net)(without_head(net)(x)).equal(net(x))
    assert spec.head_is_fitted == (head.kind in FITTED_KINDS)


def test_a_network_of_two_heads_is_refused(head):
    with torch.device('meta'): net = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=3)
    with pytest.raises(SmileError, match='one linear layer'): replace_head(net, head.settings, 3)
