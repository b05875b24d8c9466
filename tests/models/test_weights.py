"Files of weights as other programs write them: matched by name, counted, and refused with counts where they do not fit."
import argparse
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from conftest import TINY
from safetensors.torch import save_file
from torch import nn

from fastsmile.core.errors import SmileError
from fastsmile.models.factory import build_network, make_spec


def small(**kw): return make_spec('resnet10t', ['a', 'b'], 32, model_args=TINY, **kw)


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    made = build_network(small())
    for k, v in made.state_dict().items():
        if k.endswith(('running_mean', 'running_var', 'bn1.weight', 'bn1.bias')): v.uniform_(0.5, 1.5)  # unlike a new network's
    return made


def body(net: nn.Module) -> dict: return {k: v for k, v in net.state_dict().items() if not k.startswith('fc.')}
def under(prefix: str, state: dict) -> dict: return {prefix + k: v for k, v in state.items()}


def same_body(got: nn.Module, net: nn.Module) -> bool:
    state = got.state_dict()
    return all(torch.equal(state[k], v) for k, v in body(net).items())


def lightning(state): return dict(epoch=3, global_step=9, state_dict=under('model.', state), callbacks={}, optimizer_states=[],
                                  hyper_parameters=dict(folder=Path('faces'), args=argparse.Namespace(lr=1)))


def moco(state):
    q, k = under('module.encoder_q.', state), under('module.encoder_k.', {k: torch.zeros_like(v) for k, v in state.items()})
    return dict(arch='x', state_dict=q | k | {'module.queue': torch.zeros(8, 16), 'module.queue_ptr': torch.zeros(1)})


def numbered(net): return nn.Sequential(nn.Sequential(*list(net.children())[:-2]), nn.Linear(3, 2)).state_dict()


WRAPPED = dict(
    plain=lambda n: n.state_dict(), hub=lambda n: n.state_dict() | {'fc.weight': torch.zeros(1000, 512), 'fc.bias': torch.zeros(1000)},
    headless=body, parallel=lambda n: under('module.', n.state_dict()), compiled=lambda n: under('_orig_mod.module.', n.state_dict()),
    lightning=lambda n: lightning(n.state_dict()), lightning_net=lambda n: dict(state_dict=under('net.backbone.', body(n))),
    encoder=lambda n: under('encoder.', body(n)) | {'projector.0.weight': torch.zeros(4, 4)}, moco=lambda n: moco(body(n)),
    fastai_timm=lambda n: dict(model=under('0.model.', body(n)) | {'1.2.weight': torch.zeros(4)}, opt=dict(state=[])),
    fastai_body=lambda n: dict(model=numbered(n), opt=None), sequential=lambda n: under('encoder.', nn.Sequential(*n.children()).state_dict()),
    ema=lambda n: dict(state_dict={k: torch.zeros_like(v) for k, v in n.state_dict().items()}, state_dict_ema=OrderedDict(n.state_dict()),
                       args=argparse.Namespace(model='resnet10t')),
    dino=lambda n: dict(student=under('module.backbone.', {k: torch.zeros_like(v) for k, v in body(n).items()}),
                        teacher=under('backbone.', body(n)) | {'head.mlp.0.weight': torch.zeros(4, 4)}),
    half=lambda n: {k: v.half() if v.is_floating_point() else v for k, v in n.state_dict().items()},
    nested=lambda n: dict(weights=dict(network=dict(module=n.state_dict()))),
    no_counters=lambda n: {k: v for k, v in n.state_dict().items() if not k.endswith('num_batches_tracked')})


@pytest.mark.parametrize('name', WRAPPED)
def test_usual_files_fit_whole_and_say_so(name, net, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    torch.save(WRAPPED[name](net), tmp_path/'w.bin')
    got = build_network(small(), str(tmp_path/'w.bin'))
    if name == 'half': assert torch.allclose(got.conv1[0].weight, net.conv1[0].weight, atol=1e-3)
    else: assert same_body(got, net)
    assert not torch.equal(got.fc.weight, net.fc.weight)
    assert 'weights: 75 of 75 tensors of the body of resnet10t from' in capsys.readouterr().err


def test_every_reading_of_names_under_another_head(net, tmp_path):
    torch.save(WRAPPED['fastai_body'](net), tmp_path/'w.pth')
    for kw in (dict(head='mlp:8'), dict(pool='catavgmax'), dict(head='mlp:8', pool='catavgmax', dropout=0.1)):
        assert same_body(build_network(small(**kw), str(tmp_path/'w.pth')), net)


def test_fastai_saves_its_optimizer_beside_the_model(net, tmp_path):
    "Its state is in fastcore's L, which torch does not read"
    from fastai.learner import save_model
    from fastai.optimizer import Adam
    model = nn.Sequential(nn.Sequential(*list(net.children())[:-2]), nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    opt = Adam(list(model.parameters()), lr=0.1)
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    save_model(tmp_path/'learner.pth', model, opt)
    assert torch.equal(build_network(small(), str(tmp_path/'learner.pth')).conv1[0].weight, model[0][0][0].weight)


@pytest.mark.parametrize('arch', ['resnet18', 'densenet121'])
def test_names_of_torchvision(arch, tmp_path):
    import torchvision
    theirs = getattr(torchvision.models, arch)().state_dict()
    old = {}
    for k, v in theirs.items():  # as the files of 2017 have them
        for n in 'norm', 'relu', 'conv':
            for i in '12': k = k.replace(f'.{n}{i}.', f'.{n}.{i}.') if 'denselayer' in k else k
        old[k] = v
    for i, state in enumerate((theirs, under('module.', old))):
        torch.save(state, tmp_path/f'{i}.pth')
        got = build_network(make_spec(arch, ['a', 'b'], 64), str(tmp_path/f'{i}.pth')).state_dict()
        assert all(torch.equal(got[k], v) for k, v in theirs.items() if k in got and not k.startswith(('fc.', 'classifier.')))


def test_meta_spelling_of_a_convnext_under_a_prefix(tmp_path):
    ours, theirs = timm.create_model('convnext_atto', num_classes=0).state_dict(), {}
    for k, v in ours.items():
        words = k.replace('.blocks.', '.').replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv')
        if words.startswith('stem.'): words = words.replace('stem.', 'downsample_layers.0.')
        if '.downsample.' in words: words = 'downsample_layers.' + words.removeprefix('stages.').replace('.downsample', '')
        theirs[words.replace('head.norm', 'norm')] = v
    torch.save(dict(model=under('module.', theirs)), tmp_path/'w.pth')
    got = build_network(make_spec('convnext_atto', ['a', 'b'], 64), str(tmp_path/'w.pth')).state_dict()
    assert all(torch.equal(got[k].reshape(v.shape), v) for k, v in ours.items())


def test_a_transformer_reaches_another_size_and_pooling(tmp_path):
    net = timm.create_model('vit_tiny_patch16_224', num_classes=3)
    torch.save(under('encoder.', net.state_dict()), tmp_path/'w.pth')
    for pool in (None, 'avg'):
        got = build_network(make_spec('vit_tiny_patch16_224', ['a', 'b'], 96, pool=pool), str(tmp_path/'w.pth'))
        assert got.pos_embed.shape[1] == 37 and torch.equal(got.blocks[11].mlp.fc2.weight, net.blocks[11].mlp.fc2.weight)


REFUSED = dict(
    unrelated=(lambda n: dict(foo=torch.zeros(3)), r'0 of 75 tensors of the body; 75 missing: conv1.0.weight.*the file has foo\.'),
    one_missing=(lambda n: {k: v for k, v in n.state_dict().items() if k != 'layer4.0.bn2.running_var'},
                 r'74 of 75 tensors of the body; 1 missing: layer4.0.bn2.running_var\.'),
    half_there=(lambda n: under('model.', {k: v for k, v in n.state_dict().items() if 'layer4' not in k}), r'prefix model\..* missing: layer4.0'),
    head_alone=(lambda n: {k: v for k, v in n.state_dict().items() if k.startswith('fc.')}, '0 of 75'),
    wider=(lambda n: build_network(make_spec('resnet10t', 'ab')).state_dict(),
           r'55 of another shape: layer1.0.conv1.weight is 64 x 64 x 3 x 3 in the file, 8 x 64'),
    deeper=(lambda n: n.state_dict() | {'layer4.1.conv1.weight': torch.zeros(3)}, r'75 of 75 .* 1 that the network lacks: layer4.1.conv1.weight'),
    other_arch=(lambda n: timm.create_model('mobilenetv2_100', num_classes=2).state_dict(), '0 of 75'),
    numbers=(lambda n: dict(epoch=3, best=0.5), 'holds no tensors by name'), a_list=(lambda n: [torch.zeros(3)], 'holds no tensors by name'),
    whole_network=(lambda n: nn.Sequential(nn.Linear(3, 2)), 'holds no tensors by name, but a Sequential'),
    optimizer=(lambda n: torch.optim.SGD(n.parameters(), lr=1, momentum=.9).state_dict(), 'holds no tensors by name'))


@pytest.mark.parametrize('name', REFUSED)
@pytest.mark.parametrize('freeze', [False, True])
def test_less_than_the_whole_body_is_refused_with_counts(name, freeze, net, tmp_path):
    make, match = REFUSED[name]
    torch.save(make(net), tmp_path/'w.pth')
    with pytest.raises(SmileError, match=match) as e: build_network(small(head='mlp:8' if freeze else 'linear'), str(tmp_path/'w.pth'))
    assert 'do not fit resnet10t' in str(e.value) and '--arch' in e.value.hint and len(e.value.message) < 700


def test_files_of_relatives_are_no_half_loads(tmp_path):
    "A deeper network has all names of a shallower one, and the shallower one half of its"
    for file, arch in (('resnet18', 'resnet34'), ('resnet34', 'resnet18'), ('vit_tiny_patch16_224', 'vit_small_patch16_224')):
        torch.save(timm.create_model(file, num_classes=5).state_dict(), tmp_path/'w.pth')
        with pytest.raises(SmileError, match='do not fit'): build_network(make_spec(arch, ['a', 'b']), str(tmp_path/'w.pth'))


def test_broken_files_are_named(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'whole.pth')
    save_file(net.state_dict(), tmp_path/'whole.safetensors')
    whole, tensors = ((tmp_path/n).read_bytes() for n in ('whole.pth', 'whole.safetensors'))
    for name, data in {'a.pth': whole[:len(whole) // 2], 'b.safetensors': tensors[:-5], 'c.pth': b'', 'd.bin': tensors[:100], 'e.ckpt': b'\x89HDF\r\n' * 99,
                       'f.pt': b'PK\3\4' + bytes(99)}.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(SmileError, match=f'{name} (do not fit|cannot be read (safely|as weights))'): build_network(small(), str(tmp_path/name))


@pytest.mark.parametrize('name,data,what', [
    ('w.safetensors', b'version https://git-lfs.github.com/spec/v1\nsize 123\n', 'a pointer of Git LFS.*git lfs pull'), ('w.pth', b'', 'an empty file'),
    ('w.pth', b'<!DOCTYPE html><p>not found', 'a web page'), ('w.h5', b'\x89HDF\r\n' * 9, 'HDF5'), ('w.onnx', b'\x08\x07\x12\x07pytorch', 'an ONNX graph')])
def test_what_is_no_file_of_weights_is_named(tmp_path, name, data, what):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(SmileError, match=f'(?s){name} cannot be read as weights: it is .*{what}'): build_network(small(), str(tmp_path/name))


def test_torchscript_is_named_with_the_line_that_converts_it(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.trace(net.eval(), torch.zeros(1, 3, 32, 32)), 'w.pt')
    with pytest.raises(SmileError, match='it is a TorchScript archive') as e: build_network(small(), 'w.pt')
    exec(e.value.hint[e.value.hint.index('import torch'):], {})
    assert same_body(build_network(small(), 'weights.pth'), net)


def test_safetensors_and_the_old_format_under_any_ending(net, tmp_path):
    save_file(net.state_dict(), tmp_path/'pytorch_model.bin')
    torch.save(net.state_dict(), tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    for name in ('pytorch_model.bin', 'old.pth'): assert same_body(build_network(small(), str(tmp_path/name)), net)


def test_a_folder_of_the_hub(net, tmp_path):
    (tmp_path/'config.json').write_text('{"architecture": "resnet10t", "num_classes": 1000}')
    torch.save(net.state_dict(), tmp_path/'pytorch_model.bin')
    assert same_body(build_network(small(), str(tmp_path)), net)


class Trap:
    def __init__(self, folder): self.folder = str(folder)
    def __reduce__(self): return tempfile.mkdtemp, ('', 'trap-', self.folder)


def test_objects_beside_the_weights_run_nothing(net, tmp_path):
    torch.save(dict(state_dict=net.state_dict(), callback=Trap(tmp_path)), tmp_path/'w.pth')
    assert same_body(build_network(small(), str(tmp_path/'w.pth')), net)
    torch.save(net.state_dict() | {'conv1.0.weight': Trap(tmp_path)}, tmp_path/'w.pth')
    with pytest.raises(SmileError, match='74 of 75 .* missing: conv1.0.weight'): build_network(small(), str(tmp_path/'w.pth'))
    assert not list(tmp_path.glob('trap-*'))
    Trap(tmp_path).__reduce__()[0](*Trap(tmp_path).__reduce__()[1])
    assert list(tmp_path.glob('trap-*'))  # the trap works


def test_the_hubs_weights_of_a_body_that_was_changed(net, tmp_path, monkeypatch):
    monkeypatch.setattr('fastsmile.models.factory.cached_weights', lambda arch: tmp_path/'w.safetensors')
    save_file(timm.create_model('resnet10t').state_dict(), tmp_path/'w.safetensors')
    build_network(make_spec('resnet10t', ['a', 'b']), 'hub')
    for args in ('{"layers": [1, 1, 2, 1]}', TINY):
        with pytest.raises(SmileError, match='The pretrained weights of resnet10t do not fit: .* of the body'):
            build_network(make_spec('resnet10t', ['a', 'b'], model_args=args), 'hub')
