"Real photographs, where they stand beside the project: sources are understood, counts are known."
import pytest

from fastsmile.config.fields import SourceOptions
from fastsmile.data.scan import scan_images
from fastsmile.data.source import read_source

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts


def test_smiles(shared):
    s = read_source(shared/'data'/'smiles.zip', SourceOptions(label_col='label', group_col='person'))
    assert s.kept.label.value_counts().to_dict() == {'not smile': 7833, 'smile': 3187}
    assert (scan_images(s.reader, s.kept.path[:300]).info.error == '').all()
    three = read_source(shared/'data'/'smiles.zip', SourceOptions(label_col='label3'))
    assert three.kept.label.nunique() == 3 and (three.frame.reason == 'unlabelled').sum() == 1918


def test_legend(shared):
    s = read_source(shared/'data'/'facial_expressions.zip', SourceOptions(labels=str(shared/'data'/'legend.csv')))
    assert s.kept.label.nunique() == 8 and len(s.label_spellings) == 7 and len(s.frame) == 11269 and len(s.images_without_row) == 29


def test_clothing(shared):
    s = read_source(shared/'data'/'clothing.zip')
    assert s.kept.label.nunique() == 10 and s.kept.split.value_counts().to_dict() == {'train': 3068, 'valid': 341}


@pytest.mark.parametrize('arch,mean', [('mobilenetv2_100', 0.485), ('tf_efficientnet_lite0', 0.5)])
def test_weights_at_hand(shared, arch, mean):
    from fastsmile.models.factory import build_network, make_spec
    spec = make_spec(arch, ['no', 'yes'], size=96)
    assert spec.prep.mean[0] == mean
    net = build_network(spec, str(shared/'weights'/f'{arch}.safetensors'))
    assert abs(float(net.get_classifier().weight.detach().std())) < 0.1


@pytest.mark.parametrize('kw', [dict(pool='catavgmax'), dict(head='mlp:32', dropout=0.2), dict(head='mlp:16', pool='catavgmax')])
def test_weights_at_hand_under_another_head(shared, kw):
    from safetensors.torch import load_file
    from fastsmile.models.factory import build_network, make_spec
    file = shared/'weights'/'mobilenetv2_100.safetensors'
    state, net = load_file(file), build_network(make_spec('mobilenetv2_100', ['no', 'yes'], size=96, **kw), str(file)).state_dict()
    assert all(net[k].equal(v) for k, v in state.items() if not k.startswith('classifier'))
