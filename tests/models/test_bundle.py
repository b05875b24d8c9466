"The model file: the same logits in plain timm, and what does not fit refused in words."
import json

import numpy as np
import pytest
import torch
from forked import run_python

from fastsmile.core.files import file_sha256
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.core.errors import SmileError
from fastsmile.models.factory import build_network, make_spec


def bundle(path, arch='resnet10t', **kw):
    spec = make_spec(arch, ['a', 'b'], **kw)
    model = Model(spec, ModelMetadata([.7, .3], [.1, -.1], [0., 0.], 'argmax'), build_network(spec).eval())
    save_bundle(model, path)
    return model


@pytest.mark.parametrize('arch,kw', [
    ('resnet10t', dict(size=64, model_args='{"channels": [8, 16, 32, 64]}')), ('resnet10t', dict(pool='catavgmax')),
    ('resnet10t', dict(size=64, pool='avg', model_args='{"channels": [32, 64, 128, 256]}')), ('vit_tiny_patch16_224', dict(size=96)),
    ('swin_tiny_patch4_window7_224', dict(size=64)), ('mobilenetv2_100', dict(size=96))])
def test_plain_timm_gives_the_same_logits_without_fastsmile(tmp_path, arch, kw):
    model = bundle(tmp_path/'m', arch, **kw)
    x = torch.randn(2, 3, model.spec.prep.size, model.spec.prep.size, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path/'x.npy', x.numpy())
    code = f'''
import sys, timm, torch, numpy as np
m = timm.create_model('local-dir:{tmp_path}/m', pretrained=True).eval()
with torch.no_grad(): np.save('{tmp_path}/y.npy', m(torch.from_numpy(np.load('{tmp_path}/x.npy'))).numpy())
assert 'fastsmile' not in sys.modules
assert m.pretrained_cfg['input_size'][-1] == {model.spec.prep.size}
'''
    (tmp_path/'plain.py').write_text(code)
    done = run_python([tmp_path/'plain.py'])
    assert done.returncode == 0, done.stderr
    with torch.no_grad(): ours, again = model.net(x), load_bundle(tmp_path/'m').net(x)
    assert np.array_equal(np.load(tmp_path/'y.npy'), ours.numpy()) and ours.equal(again)


@pytest.mark.parametrize('change,words', [(dict(architecture=None), ''), (dict(num_classes=3, label_names=['a', 'b', 'c']), 'differ in length'),
                                          (dict(pretrained_cfg={}), 'not a fastsmile model'),
                                          (dict(fastsmile={'format': 99}), 'newer fastsmile'), (dict(model_args={'channels': [1, 2, 3, 4]}), 'do not fit')])
def test_a_json_that_does_not_fit_is_refused(tmp_path, change, words):
    bundle(tmp_path/'m')
    cfg = json.loads((tmp_path/'m'/'config.json').read_text())
    (tmp_path/'m'/'config.json').write_text(json.dumps(cfg | change))
    if change == dict(architecture=None): assert load_bundle(tmp_path/'m').spec.arch == 'resnet10t'  # our own key decides
    else:
        with pytest.raises(SmileError, match=words): load_bundle(tmp_path/'m')


def test_unknown_architecture_broken_json_missing_files(tmp_path):
    bundle(tmp_path/'m')
    cfg = json.loads((tmp_path/'m'/'config.json').read_text())
    cfg['fastsmile']['arch'] = 'resnet9000'
    (tmp_path/'m'/'config.json').write_text(json.dumps(cfg))
    with pytest.raises(SmileError, match='does not know'): load_bundle(tmp_path/'m')
    (tmp_path/'m'/'config.json').write_text('{')
    with pytest.raises(SmileError, match='cannot be read as JSON'): load_bundle(tmp_path/'m')
    with pytest.raises(SmileError, match='holds no model'): load_bundle(tmp_path)


def test_changed_and_cut_weights_are_refused(tmp_path):
    bundle(tmp_path/'m')
    weights = tmp_path/'m'/'model.safetensors'
    data = weights.read_bytes()
    for other in (data[:-1], data[:100], b'', data[:-1] + bytes([data[-1] ^ 1])):
        weights.write_bytes(other)
        with pytest.raises(SmileError, match='checksum'): load_bundle(tmp_path/'m')


def test_a_pickle_is_explained_and_not_executed(tmp_path):
    "As the model, as a run folder's content, and as weights whose checksum is right"
    import pickle

    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'pwned'), 'w'))
    evil = pickle.dumps(dict(weight=Evil()))
    for name in ('export.pkl', 'model.pth', 'model.pt', 'model.zip'):
        (tmp_path/name).write_bytes(evil)
        with pytest.raises(SmileError, match='can run code when they are opened'): load_bundle(tmp_path/name)
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'export.pkl').write_bytes(evil)
    with pytest.raises(SmileError, match='holds no model'): load_bundle(tmp_path/'run')
    bundle(tmp_path/'m')
    (tmp_path/'m'/'model.safetensors').write_bytes(evil)
    cfg = json.loads((tmp_path/'m'/'config.json').read_text())
    cfg['fastsmile']['sha256'] = file_sha256(tmp_path/'m'/'model.safetensors')
    (tmp_path/'m'/'config.json').write_text(json.dumps(cfg))
    with pytest.raises(SmileError, match='do not fit'): load_bundle(tmp_path/'m')
    assert not (tmp_path/'pwned').exists()


def test_a_bundle_that_is_cut_off_while_it_is_written_is_none(tmp_path, monkeypatch):
    bundle(tmp_path/'m')
    monkeypatch.setattr('fastsmile.models.bundle.write_json', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): bundle(tmp_path/'new')
    with pytest.raises(SmileError, match='holds no model'): load_bundle(tmp_path/'new')
    with pytest.raises(KeyboardInterrupt): bundle(tmp_path/'m', size=64, model_args='{"channels": [8, 16, 32, 64]}')
    with pytest.raises(SmileError, match='checksum'): load_bundle(tmp_path/'m')  # new weights, old JSON
