"Explanations: known answers for convolutional nets and transformers, corners, the album, explain and report on a run."
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import folder, picture
from torch import nn

from fastsmile.inference import explain as explain_room
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.inference.explain import attribution_maps, corner_share, find_feature_layer, randomisation_test
from fastsmile.inference.torch_backend import pixels_to_tensor
from fastsmile.models.factory import build_network, make_spec
from fastsmile.config.commands import CompareConfig, EXPLAIN_METHODS, ExplainConfig, ReportConfig, SERVED_EXPLANATIONS


class Window(nn.Module):
    "A network made by hand: the logit of class 1 is the red in one square, and nothing else"
    feature_info = [dict(module='conv')]

    def __init__(self, at=(8, 40), side=16):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1, bias=False)
        self.conv.weight.data = torch.tensor([1., 0, 0]).view(1, 3, 1, 1)
        mask = torch.zeros(1, 1, 64, 64)
        mask[..., at[0]:at[0] + side, at[1]:at[1] + side] = 1
        self.register_buffer('mask', mask)

    def forward(self, x):
        z = (self.conv(x) * self.mask).sum((1, 2, 3))
        return torch.stack([-z, z], 1)


def share(maps, at, side=16, around=0):
    "The share of the evidence in a square and around it"
    (r, c), box = at, np.zeros(maps.shape[1:], bool)
    box[max(0, r - around):r + side + around, max(0, c - around):c + side + around] = True
    return float((maps[:, box].sum(1) / np.maximum(maps.sum((1, 2)), 1e-12)).mean()), float(box.mean())


@pytest.mark.parametrize('method', EXPLAIN_METHODS)
def test_the_pixels_that_decide_light_up_and_no_others(method):
    x = np.full((2, 64, 64, 3), 60, np.uint8)
    x[:, 8:24, 40:56, 0] = 250
    spec = make_spec('resnet10t', ['no', 'yes'], size=64)
    maps = attribution_maps(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), Window().eval()), x, [1, 1], method)
    around = 10 if method == 'occlusion' else 1  # a window reaches over the edge
    if method == 'gradcam':  # the gradient's mean has no place: only the activation has, and it is highest in the square
        assert maps[:, 8:24, 40:56].min() == 1 and np.delete(maps[0], np.s_[40:56], axis=1).max() < 1
    else: assert share(maps, (8, 40), around=around)[0] > 0.99
    other = attribution_maps(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), Window(at=(40, 8)).eval()), x, [1, 1], method)
    if method != 'gradcam': assert share(other, (8, 40))[0] < 0.05


@pytest.mark.parametrize('arch,args,least', [('vit_tiny_patch16_224', '{"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}', 2),
                         ('swin_tiny_patch4_window7_224', '{"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}', 1.8)])
def test_a_transformer_that_learnt_a_patch_shows_it(arch, args, least):
    rng = np.random.default_rng(0)
    x = rng.integers(60, 140, (256, 64, 64, 3)).astype(np.uint8)
    y, at = rng.integers(0, 2, 256), rng.integers(0, 49, (256, 2))
    for i in np.flatnonzero(y): x[i, at[i, 0]:at[i, 0] + 16, at[i, 1]:at[i, 1] + 16, 0] = 250
    torch.manual_seed(0)
    spec = make_spec(arch, ['no', 'yes'], size=64, model_args=args)
    net = build_network(spec)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for s in range(80):
        i = np.arange(32 * s, 32 * s + 32) % 256
        loss = nn.functional.cross_entropy(net(pixels_to_tensor(x[i], spec.prep)), torch.from_numpy(y[i]))
        opt.zero_grad(); loss.backward(); opt.step()
    rows = np.flatnonzero(y)[:12]
    maps = attribution_maps(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), net.eval()), x[rows], [1] * 12, 'gradcam')
    got = [share(m[None], at[r], around=8) for m, r in zip(maps, rows)]
    assert np.mean([s / area for s, area in got]) > least


@pytest.mark.parametrize('arch', ['resnet10t', 'densenet121', 'mobilenetv2_100', 'vit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'convnext_atto'])
def test_every_family_has_features_for_grad_cam(arch):
    size = 224 if 'vit' in arch or 'swin' in arch else 64
    spec = make_spec(arch, ['a', 'b'], size=size)
    net = build_network(spec).eval()
    frozen = [p.requires_grad_(False) for p in net.parameters()]
    x = np.random.default_rng(0).integers(0, 255, (1, size, size, 3)).astype(np.uint8)
    a = attribution_maps(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), net), x, [1], 'gradcam')
    assert a.shape == (1, size, size) and np.isfinite(a).all() and a.min() >= 0
    assert not any(p.requires_grad for p in frozen)  # what was frozen is frozen again


def test_a_network_without_a_feature_map_says_so():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    with pytest.raises(SmileError, match='no feature map'): find_feature_layer(net, 32)


@pytest.fixture(scope='module')
def patched():
    "A small network that has learnt a red patch, and images that hold it"
    rng = np.random.default_rng(0)
    x = rng.integers(60, 140, (256, 8, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    y, at = rng.integers(0, 2, 256), rng.integers(0, 49, (256, 2))
    for i in np.flatnonzero(y): x[i, at[i, 0]:at[i, 0] + 16, at[i, 1]:at[i, 1] + 16, 0] = 250
    torch.manual_seed(0)
    spec = make_spec('resnet10t', ['no', 'yes'], size=64, model_args='{"channels": [8, 16, 32, 64]}')
    net = build_network(spec)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    for s in range(60):
        i = np.arange(16 * s, 16 * s + 16) % 256
        loss = nn.functional.cross_entropy(net(pixels_to_tensor(x[i], spec.prep)), torch.from_numpy(y[i]))
        opt.zero_grad(); loss.backward(); opt.step()
    return Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), net.eval()), x[y == 1][:8]


@pytest.mark.parametrize('method', EXPLAIN_METHODS)
def test_every_explanation_that_is_shown_depends_on_what_was_learnt(patched, method):
    model, x = patched
    assert set(SERVED_EXPLANATIONS) - {'none'} <= set(EXPLAIN_METHODS)
    state = {k: v.clone() for k, v in model.net.state_dict().items()}
    assert abs(randomisation_test(model, x, [1] * len(x), method)) < 0.5
    assert all(v.equal(state[k]) for k, v in model.net.state_dict().items())  # the model itself keeps its head


def test_the_size_of_the_gradient_depends_less_on_what_was_learnt(patched, monkeypatch):
    "What SmoothGrad shows: the mean size of gradients over noisy copies. Their signs, which sensitivity keeps, make the difference"
    from captum.attr import NoiseTunnel, Saliency
    def size(net, x, target, layer):
        torch.manual_seed(0)
        return NoiseTunnel(Saliency(net)).attribute(x, target=target, nt_type='smoothgrad', nt_samples=12, nt_samples_batch_size=4, stdevs=0.3).amax(1)
    model, x = patched
    monkeypatch.setitem(explain_room._ATTRIBUTIONS, 'size', size)
    size = randomisation_test(model, x, [1] * len(x), 'size')
    # with four heads each it lies between -0.2 and 0.3, by how near these are to the trained head; the mean over many is about 0
    sensitivity = np.mean([randomisation_test(model, x, [1] * len(x), 'sensitivity', seed=seed) for seed in range(42, 46)])
    assert size > 0.35 and abs(sensitivity) < 0.15
    assert 'hardly depend' in explain_room._randomisation_warning(0.81, 'size') and not explain_room._randomisation_warning(0.2, 'size')


def test_a_head_without_random_weights_is_not_tested(patched):
    model, x = patched
    assert randomisation_test(replace(model, net=Window()), x, [1] * len(x), 'sensitivity') is None
    assert randomisation_test(model, x[:0], [], 'gradcam') is None


def test_corners_are_a_quarter_of_the_picture():
    assert abs(corner_share(np.ones((1, 64, 64))) - 0.25) < 1e-9 and corner_share(np.zeros((1, 8, 8))) == 0


@pytest.mark.parametrize('at,warned', [((0, 0), True), ((24, 24), False)])
def test_evidence_in_the_corners_is_a_warning_on_the_page(tmp_path, at, warned):
    from fastsmile.inference.explain import TrainingImages, write_explanations
    from fastsmile.data.readers import FolderReader
    from fastsmile.reports.html import render_template
    from fastsmile.reports.run import inline_explanations
    spec = make_spec('resnet10t', ['no', 'yes'], size=64)
    model = Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), Window(at=at).eval())
    files = FolderReader(folder(tmp_path/'p', {f'{i}.png': picture(seed=i, size=(64, 64)) for i in range(4)}))
    album = write_explanations(model, TrainingImages(files, files.names(), ['no', 'yes'] * 2), None, tmp_path/'e',
                               ExplainConfig(methods=('sensitivity',), neighbours=0),
                       (files, files.names()))
    page = render_template('explain.html.j2', dict(run='r', album=inline_explanations(tmp_path/'e')))
    assert (album.corner_share['sensitivity'] > 0.9) == warned == bool(album.warnings) == ('class="warn"' in page)


def test_explain_a_run_its_mistakes_and_other_pictures(run, tmp_path):
    from fastsmile.runs.explain import explain
    config = ExplainConfig(methods=('sensitivity', 'gradcam'), n=3, neighbours=2, out=str(tmp_path/'e'))
    told = explain(run.path, (), config)
    album = json.loads((tmp_path/'e'/'explain.json').read_text())
    assert set(told['images']) == {'grid', 'losses', 'mistakes', 'uncertain'} and set(told['corner_share']) == {'sensitivity', 'gradcam'}
    assert set(told['randomisation']) == {'sensitivity', 'gradcam'} and told['randomisation'] == album['randomisation']
    assert all(len(v) <= 3 for v in told['images'].values()) and all(m['label'] != m['target'] for m in told['images']['mistakes'])
    assert all(len(r['nearest']) == 2 for r in album['groups']['mistakes']) and len(album['class_means']) == 3
    assert all((tmp_path/'e'/f).exists() for r in album['groups']['grid'] for f in (r['file'], *r['maps'].values()))
    html = (tmp_path/'e'/'explain.html').read_text()
    assert 'Randomisation test' in html and 'Average faces' in html and not re.findall(r'src="(?!data:image/jpeg)', html)
    files = folder(tmp_path/'p', {'a.png': picture('red'), 'b/c.png': picture('blue'), 'no.jpg': b'no'})
    asked = explain(run.path, (str(files/'a.png'), str(files/'b')), replace(config, neighbours=0, out=str(tmp_path/'f')))
    assert [p['path'] for p in asked['images']['requested']] == [str(files/'a.png'), str(files/'b'/'c.png')]
    with pytest.raises(SmileError, match='does not exist'): explain(run.path, (str(files/'x.png'),), config)
    with pytest.raises(SmileError, match='holds something else'): explain(run.path, (), replace(config, out=str(files)))
    with pytest.raises(OptionError, match='--methods'): ExplainConfig(methods=('magic',))


def test_report_again_needs_neither_model_nor_source_where_pictures_are_kept(run, tmp_path):
    import shutil
    from fastsmile.runs.report import report
    copy = shutil.copytree(run.path, tmp_path/'r', ignore=shutil.ignore_patterns('*.safetensors', 'report.html', 'README.md', 'metrics.json'))
    page = report(copy, ReportConfig(keep_pictures=True)).read_text()
    sections = ('metrics', 'next', 'mistakes', 'explain', 'thresholds', 'calibration', 'tta', 'data', 'training', 'reproduce')
    order = [page.index(f'<h2 id="{k}"') for k in sections]
    assert order == sorted(order) and page.index('class="verdict') < order[0] and 'data:image/jpeg' in page
    assert json.loads((copy/'metrics.json').read_text())['test'] == run.metrics['test']


def test_the_model_card_is_the_hubs(run):
    import yaml
    text = (run.path/'model'/'README.md').read_text()
    head = yaml.safe_load(text.split('---')[1])
    found = {m['type']: m['value'] for m in head['model-index'][0]['results'][0]['metrics']}
    assert head['pipeline_tag'] == 'image-classification' and abs(found['balanced_accuracy'] - run.metrics['test']['balanced_accuracy']['value']) < 1e-4
    assert 'still picture' in text and 'Intended use' in text and run.config['command'] in text
    from huggingface_hub import ModelCard
    assert ModelCard.load(run.path/'model'/'README.md').data.eval_results


def test_the_card_of_a_model_that_timm_alone_cannot_load_says_so(run, tmp_path):
    import shutil
    from fastsmile.reports.card import write_card
    from fastsmile.core.files import write_json
    copy = shutil.copytree(run.path, tmp_path/'r')
    write_json(copy/'config.json', run.config | dict(model=run.config['model'] | dict(needs_fastsmile='its head has hidden layers (8)')))
    before, after = ((p/'model'/'README.md').read_text() for p in (run.path, write_card(copy).parent.parent))
    assert "timm.create_model('local-dir:model'" in before and 'timm.create_model' not in after and 'load_model' in after and 'hidden layers' in after


def test_compare_runs_on_the_same_rows(run, faces, tiny, tmp_path):
    from fastsmile.runs.compare import compare
    from fastsmile.runs.fit import fit
    other = fit(faces, replace(tiny, decide='balanced', epochs=1, augment='none', out=str(tmp_path/'other')))
    r = compare([run.path, other.path], CompareConfig(out=str(tmp_path/'c.html'), draws=200))
    assert r['options'] == dict(epochs=[2, 1], augment=['medium', 'none']) and r['rows'] == run.metrics['test']['rows']
    assert r['runs'][0]['metrics']['accuracy']['value'] == run.metrics['test']['accuracy']['value']
    d = r['runs'][1]['difference']['accuracy']['value']
    assert abs(d - (other.metrics['test']['accuracy']['value'] - run.metrics['test']['accuracy']['value'])) < 1e-12
    assert 'permutation test' in (tmp_path/'c.html').read_text()
    with pytest.raises(SmileError, match='named twice'): compare([run.path, run.path/'..'/run.path.name], CompareConfig(out=str(tmp_path/'e.html')))
    seed = fit(faces, replace(tiny, epochs=1, seed=5, valid=0.5, tta='none', out=str(tmp_path/'seed')))
    with pytest.raises(SmileError, match='rows of these runs differ'):
        compare([run.path, seed.path], CompareConfig(part='valid', out=str(tmp_path/'d.html')))
    told = compare([run.path, seed.path], CompareConfig(part='valid', anyway=True, draws=100, out=str(tmp_path/'d.html')))
    assert 0 < told['rows'] < run.metrics['valid']['rows'] and 'Only these are compared' in (tmp_path/'d.html').read_text()


def test_a_collapsed_a_random_and_a_good_model_are_called_so(faces, tiny, tmp_path):
    from fastsmile.reports.card import verdict
    from fastsmile.runs.fit import fit
    collapsed = fit(faces, replace(tiny, balance='none', decide='argmax', lr='0.0001', epochs=1, tta='none', out=str(tmp_path/'collapsed')))
    assert collapsed.metrics['test']['collapsed'] and 'has collapsed' in collapsed.verdict and 'has collapsed' in collapsed.report.read_text()
    rng = np.random.default_rng(0)
    noise = folder(tmp_path/'noise', {f'{c}/{i}.png': picture(tuple(rng.integers(0, 255, 3)), seed=i + 60 * (c == 'b')) for c in 'ab' for i in range(60)})
    random = fit(noise, replace(tiny, epochs=2, tta='none', decide='balanced', out=str(tmp_path/'random')))
    assert 'not clearly better than guessing' in random.verdict or 'collapsed' in random.verdict
    assert verdict(random.metrics)['tone'] == 'bad'
    plain = folder(tmp_path/'plain', {f'{c}/{i}.png': picture(c, seed=i) for c in ('red', 'blue') for i in range(60)})
    good = fit(plain, replace(tiny, epochs=4, tta='none', out=str(tmp_path/'good')))
    assert 'is better than answering' in good.verdict and verdict(good.metrics)['tone'] == 'good'


def test_only_an_explanations_own_files_give_way_and_not_to_pictures_that_cannot_be_read(run, tmp_path):
    from fastsmile.runs.explain import explain
    out, pics = tmp_path/'e', folder(tmp_path/'pics', {'a.png': picture(), 'bad.jpg': b'no picture'})
    config = ExplainConfig(methods=('sensitivity',), n=1, neighbours=0, out=str(out))
    explain(run.path, (), config)
    folder(out, {'notes.txt': 'mine', 'sub/grid-0.jpg': 'mine', 'grid-0 (copy).jpg': 'mine'})
    before = sorted(p.name for p in out.rglob('*'))
    with pytest.raises(SmileError, match='None of these'): explain(run.path, (str(pics/'bad.jpg'),), config)
    assert sorted(p.name for p in out.rglob('*')) == before
    (out/'explain.json').unlink()  # as one that was killed leaves it: a stranger's file there still stops it
    with pytest.raises(SmileError, match='something else'): explain(run.path, (), config)
    for p in ('notes.txt', 'grid-0 (copy).jpg', 'sub/grid-0.jpg'): (out/p).unlink()
    (out/'sub').rmdir()
    explain(run.path, (), config)
    (out/'notes.txt').write_text('mine')
    explain(run.path, (str(pics/'a.png'),), config)
    left = {p.name for p in out.iterdir()}
    assert 'requested-0-sensitivity.jpg' in left and (out/'notes.txt').read_text() == 'mine' and not [n for n in left if n.startswith('grid')]
