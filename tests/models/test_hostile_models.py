"Model files of strangers: no code is run, no size is believed, and what cannot be used is refused in words before memory is taken."
import copy
import hashlib
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, cheap
from safetensors.torch import save_file

from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.models.factory import build_network, make_spec
from fastsmile.training.resume import STATE_FORMAT, read_state, write_state
from fastsmile.models.weights import MAX_HEADER_BYTES, check_tensor_shapes, read_tensors, tensor_shapes


@pytest.fixture(scope='module')
def spec(): return make_spec('resnet10t', ('a', 'b'), 32, 'squash', TINY, 'mlp:8', 0.0, None)


@pytest.fixture
def bundle(spec, tmp_path):
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), build_network(spec, 'none').eval()), tmp_path/'model')
    return tmp_path/'model'


def change(folder: Path, *path, to):
    "Put something else into a bundle's config.json"
    cfg = json.loads((folder/'config.json').read_text())
    at = cfg
    for k in path[:-1]: at = at[k]
    at[path[-1]] = to
    (folder/'config.json').write_text(json.dumps(cfg))


class Evil:
    "A pickle that makes a file when it is opened"
    def __init__(self, mark): self.mark = str(mark)
    def __reduce__(self): return open, (self.mark, 'w')


@pytest.mark.parametrize('name', ['evil.pkl', 'evil.pth', 'evil.pt', 'evil.bin', 'evil.safetensors', 'archive.pth', 'state_dict.pth'])
def test_pickles_run_nowhere(name, bundle, spec, tmp_path):
    "As weights, as a model, as a bundle's weights, as the state of a training"
    mark, path = tmp_path/'owned', tmp_path/name
    if name == 'archive.pth': torch.save(Evil(mark), path)
    elif name == 'state_dict.pth': torch.save(dict(state_dict={'conv1.0.weight': torch.zeros(1), 'x': Evil(mark)}), path)
    else: path.write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(SmileError, match='do not fit|cannot be read safely'): build_network(spec, str(path))
    with pytest.raises(SmileError, match='is a file, not a model folder'): load_bundle(path)
    (bundle/'model.safetensors').write_bytes(path.read_bytes())
    with pytest.raises(SmileError, match='checksum'): load_bundle(bundle)
    change(bundle, 'fastsmile', 'sha256', to=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(SmileError, match='do not fit'): load_bundle(bundle)
    with pytest.raises(SmileError, match='cannot be read'): build_network(spec, str(bundle))
    with pytest.raises(SmileError, match='is not the state of a training'): read_state(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the trap works


def test_weights_without_code_are_taken(spec, tmp_path):
    net = build_network(make_spec('resnet10t', ('a', 'b'), 32, 'squash', TINY, 'linear', 0.0, None), 'none')
    torch.save(net.state_dict(), tmp_path/'w.pth')
    got = build_network(make_spec('resnet10t', ('a', 'b'), 32, 'squash', TINY, 'linear', 0.0, None), str(tmp_path/'w.pth'))
    assert torch.equal(got.state_dict()['conv1.0.weight'], net.state_dict()['conv1.0.weight'])


def header(what, data=b'', declared=None) -> bytes:
    text = what if isinstance(what, bytes) else json.dumps(what).encode()
    return struct.pack('<Q', len(text) if declared is None else declared) + text + data


def tensor(shape, start, end, dtype='F32'): return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


LIES = {
    'nothing': b'', 'half a length': b'\1\0', 'longer than the file': header({}, declared=10**6), 'the longest': header({}, declared=2**64 - 1),
    'no JSON': header(b'{' * 1000), 'a list': header([1, 2]), 'nested': header(b'[' * 200_000),
    'more than there is': header(dict(a=tensor([10**6], 0, 4 * 10**6)), bytes(16)),
    'a shape that overflows': header(dict(a=tensor([2**40, 2**40], 0, 16)), bytes(16)),
    'a shape of another size': header(dict(a=tensor([10**9], 0, 16)), bytes(16)), 'negative': header(dict(a=tensor([-4], 0, 16)), bytes(16)),
    'overlapping': header(dict(a=tensor([4], 0, 16), b=tensor([4], 8, 24)), bytes(24)),
    'the same twice': header(dict(a=tensor([4], 0, 16), b=tensor([4], 0, 16)), bytes(16)),
    'a hole': header(dict(a=tensor([4], 0, 16), b=tensor([4], 32, 48)), bytes(48)), 'backwards': header(dict(a=tensor([4], 16, 0)), bytes(16)),
    'more behind it': header(dict(a=tensor([4], 0, 16)), bytes(64)), 'another type': header(dict(a=tensor([4], 0, 16, 'OBJECT')), bytes(16)),
}


@pytest.mark.parametrize('name', LIES)
def test_headers_that_lie(name, bundle, spec, tmp_path):
    path = tmp_path/'w.safetensors'
    path.write_bytes(LIES[name])
    with cheap():
        with pytest.raises(ValueError): tensor_shapes(path)
        with pytest.raises(ValueError): read_tensors(path)
        with pytest.raises(SmileError, match='an empty file' if name == 'nothing' else 'do not fit|cannot be read safely'): build_network(spec, str(path))
        (bundle/'model.safetensors').write_bytes(LIES[name])
        change(bundle, 'fastsmile', 'sha256', to=hashlib.sha256(LIES[name]).hexdigest())
        with pytest.raises(SmileError, match='do not fit'): load_bundle(bundle)
        with pytest.raises(SmileError, match='is not the state'): read_state(path)


def test_a_header_of_gigabytes(tmp_path):
    "It is refused by its length alone"
    path = tmp_path/'w.safetensors'
    with open(path, 'wb') as f:
        f.write(struct.pack('<Q', MAX_HEADER_BYTES + 1))
        f.truncate(2**31)
    with cheap(mib=50), pytest.raises(ValueError, match='declares a header of 16,777,217 bytes'): read_tensors(path)


SIZES = [
    (('model_args', 'channels'), [10**9] * 4, r'channels is 1000000000'),
    (('model_args', 'channels'), [10**6, 8, 8, 8], 'tensors differ'),
    (('model_args', 'channels'), [-8, 16, 32, 64], 'do not fit'),
    (('model_args', 'channels'), ['8', 16, 32, 64], 'do not fit'),
    (('model_args', 'channels'), [8.5, 16, 32, 64], 'do not fit'),
    (('model_args', 'layers'), [10**6] * 4, 'asks for more than 2,000 tensors'),
    (('model_args', 'layers'), [0] * 20_000, 'has 20,000 entries'),
    (('model_args', 'stem_width'), 1e400, 'stem_width is inf'),
    (('model_args', 'stem_type'), 'd' * 10**6, 'text of 1,000,000 characters'),
    (('fastsmile', 'head', 'hidden'), [10**9], 'hidden is 1000000000'),
    (('fastsmile', 'head', 'hidden'), [10**6] * 50, 'tensors differ'),
    (('fastsmile', 'head', 'hidden'), [-1], 'do not fit'),
    (('fastsmile', 'head', 'hidden'), 7, 'do not fit'),
    (('fastsmile', 'head', 'dropout'), 'x', 'do not fit'),
    (('fastsmile', 'head', 'dropout'), 1e400, 'do not fit'),
    (('fastsmile', 'head'), dict(kind='knn', rows=10**12, k=5, distance='cosine'), 'do not fit'),
    (('fastsmile', 'head'), dict(kind='magic'), 'do not fit'),
    (('fastsmile', 'head'), dict(kind='forest', trees=10**9, nodes=10**11, depth=10**9), 'do not fit'),
    (('fastsmile', 'members'), [''] * 3, 'holds no model'),
    (('label_names',), [str(i) for i in range(10**6)], 'differ in length'),
    (('label_names',), 'ab', 'no labels'),
    (('label_names',), ['a', '\ud800'], 'not a fastsmile model'),
    (('pretrained_cfg', 'input_size'), [3, 10**6, 10**6], 'out of range'),
    (('pretrained_cfg', 'input_size'), [3, 32, -1], 'out of range'),
    (('pretrained_cfg', 'input_size'), [], 'not a fastsmile model'),
    (('pretrained_cfg', 'crop_pct'), 0, 'out of range'),
    (('pretrained_cfg', 'crop_pct'), float('nan'), 'out of range'),
    (('pretrained_cfg', 'mean'), ['x'] * 3, 'not a fastsmile model'),
    (('pretrained_cfg', 'std'), [0, 0, 0], 'preprocessing'),
    (('pretrained_cfg', 'mean'), [.5], 'preprocessing'),
    (('pretrained_cfg', 'interpolation'), '__class__', 'preprocessing'),
    (('pretrained_cfg', 'crop_mode'), 'eval', 'preprocessing'),
    (('fastsmile', 'prior'), [float('nan')] * 2, 'prior is nan'),
    (('fastsmile', 'shift'), [None] * 2, 'not a fastsmile model'),
    (('fastsmile', 'offset'), ['a', 'b'], 'not a fastsmile model'),
    (('fastsmile', 'format'), 'x', 'not a fastsmile model'),
    (('fastsmile', 'calibration', 'temperature'), -1, 'calibration'),
    (('fastsmile', 'calibration', 'rule'), '__import__', 'calibration'),
    (('fastsmile', 'calibration', 'set_thresholds'), ['x', 'y'], 'not a fastsmile model'),
    (('fastsmile', 'calibration', 'rows'), 3, 'not a fastsmile model'),
    (('fastsmile', 'calibration', 'rows'), ['a'], 'not a fastsmile model'),
    (('fastsmile', 'link'), 'focal:abc', 'not a fastsmile model'),
    (('fastsmile', 'link'), 'focal:nan', 'link'),
    (('fastsmile', 'origin'), None, 'origin'),
    (('fastsmile', 'origin'), [], 'origin'),
    (('fastsmile', 'metrics'), 'x', 'not a fastsmile model'),
    (('fastsmile', 'metrics'), dict(test=3), 'metrics'),
    (('fastsmile', 'decide'), ['a'], 'rule'),
    (('fastsmile', 'sha256'), None, 'checksum'),
    (('fastsmile',), [], 'not a fastsmile model'),
    (('model_args',), [1], 'not a fastsmile model'),
]


@pytest.mark.parametrize('path,to,match', SIZES, ids=[f'{".".join(map(str, p))}={str(t)[:20]}' for p, t, _ in SIZES])
def test_configs_that_ask_for_too_much_or_make_no_sense(path, to, match, bundle):
    change(bundle, *path, to=to)
    with cheap(), pytest.raises(SmileError, match=match): load_bundle(bundle)


NAMES = ('hf-hub:evil/model', 'local-dir:/tmp', 'os.system', '__import__("os").system("id")', '../../x', 7)
LOADS = dict(pretrained=True, pretrained_cfg=dict(file='/etc/passwd', custom_load=True), checkpoint_path='/tmp/evil.pth', cache_dir='/tmp', scriptable=True,
             pretrained_cfg_overlay=dict(url='http://evil.example/w.pth'), features_only=True, pretrained_filter_fn='os.system')
LAYERS = dict(act_layer='os.system', norm_layer='builtins.eval', aa_layer='__import__("os")', block='os.system', num_classes=5, nothing_such=1,
              stem_type='os.system')
CODE = [(('fastsmile', 'arch'), a, 'needs the architecture|not a fastsmile model') for a in NAMES] + [
    (('model_args', k), v, 'says where weights come from') for k, v in LOADS.items()] + [(('model_args', k), v, 'do not fit') for k, v in LAYERS.items()]


@pytest.mark.parametrize('path,to,match', CODE, ids=[f'{p[-1]}={str(t)[:20]}' for p, t, _ in CODE])
def test_code_in_strings(path, to, match, bundle, monkeypatch):
    "Names are looked up in timm's tables, never imported; nothing reaches for a network or another file"
    import os
    import socket
    import timm.models._builder as builder
    def never(*_, **__): raise AssertionError('this must not be called')
    monkeypatch.setattr(os, 'system', never)
    monkeypatch.setattr(socket, 'create_connection', never)
    monkeypatch.setattr(builder, 'load_pretrained', never)
    change(bundle, *path, to=to)
    with cheap(), pytest.raises(SmileError, match=match) as e: load_bundle(bundle)
    assert 'must not be called' not in str(e.value)


def test_json_that_is_too_deep_too_large_or_none(bundle):
    for data, match in [(b'[' * 200_000, 'too many lists within lists'), (b'{"a":' * 200_000, 'too many lists within lists'),
                        (b'\xff\xfe', 'cannot be read as JSON'), (b'9' * 10_000, 'cannot be read as JSON'), (b'null', 'not a fastsmile model'),
                        (b'[]', 'not a fastsmile model')]:
        (bundle/'config.json').write_bytes(data)
        with cheap(), pytest.raises(SmileError, match=match): load_bundle(bundle)
    with open(bundle/'config.json', 'wb') as f: f.truncate(2**32)
    with cheap(), pytest.raises(SmileError, match='more than 268,435,456 bytes'): load_bundle(bundle)


def test_a_network_is_measured_without_memory(spec):
    "The check takes none for weights, and stops early in a network of millions of layers"
    from fastsmile.models.factory import create_network
    big = make_spec('vit_huge_patch14_224', ('a', 'b'), None, 'squash', None, 'linear', 0.0, None)
    with cheap(seconds=20, mib=200), pytest.raises(ValueError, match='tensors differ'): check_tensor_shapes(lambda: create_network(big), {'a': (3,)})
    net = build_network(spec, 'none')
    check_tensor_shapes(lambda: create_network(spec), {k: tuple(v.shape) for k, v in net.state_dict().items()})
    from torch.nn.modules import module
    assert not module._global_parameter_registration_hooks


def test_states_of_training_that_are_none(tmp_path):
    path = tmp_path/'state.safetensors'
    for text in ('[]', '{}', '[' * 100_000, '{"format": "x"}', '3', 'null'):
        save_file(dict(a=torch.zeros(1)), path, metadata=dict(state=text))
        with pytest.raises(SmileError, match='is not the state of a training'): read_state(path)
    write_state(path, dict(a=torch.zeros(1)), dict(rows=[]))
    assert read_state(path)[1] == dict(rows=[], format=STATE_FORMAT)


# ONNX

@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    from fastsmile.inference.export import export
    import shutil
    where = tmp_path_factory.mktemp('onnx')/'model'
    shutil.copytree(run.path/'model', where)
    export(where)
    return next(where.rglob('*.onnx'))


def test_onnx_files_of_strangers(exported, tmp_path):
    "Weights in other files, tensors that lie, a config that is none, another network, nothing at all"
    import onnx
    from fastsmile.inference.onnx_backend import ONNX_CONFIG_KEY, load_onnx
    whole = onnx.load(exported)
    (tmp_path/'secret').write_bytes(bytes(10**6))
    def spoilt(how, name='m.onnx'):
        m = copy.deepcopy(whole)
        how(m)
        (tmp_path/name).write_bytes(m.SerializeToString())
        return tmp_path/name
    def elsewhere(location, varint=False):
        def how(m):
            t = m.graph.initializer[0]
            t.ClearField('raw_data')
            t.data_location = onnx.TensorProto.EXTERNAL
            t.external_data.add(key='location', value=location)
        path = spoilt(how)
        if varint: path.write_bytes(path.read_bytes().replace(b'\x0a\x08location', b'\x0a\x88\x00location'))
        return path
    for place in ('secret', '../secret', '/etc/passwd'):
        for v in (False, True):
            with cheap(), pytest.raises(SmileError, match='keeps weights in other files'): load_onnx(elsewhere(place, v))
    def huge(m): m.graph.initializer[0].dims[0] = 10**12
    def config(text):
        def how(m):
            for p in m.metadata_props:
                if p.key == ONNX_CONFIG_KEY: p.value = text
        return how
    def other(m): m.graph.output[0].name = 'other'
    for how, match in [(huge, 'cannot be read as ONNX'), (config('{'), 'classes are not known'), (config('[' * 100_000), 'classes are not known'),
                       (config('[1]'), 'not a fastsmile model'), (config('{"fastsmile": {}}'), 'not a fastsmile model'),
                       (other, 'cannot be read as ONNX|other inputs')]:
        with cheap(), pytest.raises(SmileError, match=match): load_onnx(spoilt(how))
    for data in (b'', b'\0' * 100, b'PK\x03\x04', exported.read_bytes()[:500], np.random.default_rng(0).bytes(5000)):
        (tmp_path/'n.onnx').write_bytes(data)
        with cheap(), pytest.raises(SmileError, match='cannot be read as ONNX|classes are not known'): load_onnx(tmp_path/'n.onnx')
    assert load_onnx(exported).spec.classes  # the file itself is fine


def test_a_zip_is_no_model(tmp_path, spec):
    with zipfile.ZipFile(tmp_path/'m.pth', 'w') as z: z.writestr('archive/data.pkl', pickle.dumps(Evil(tmp_path/'owned')))
    with pytest.raises((SmileError, OptionError)): build_network(spec, str(tmp_path/'m.pth'))
    assert not (tmp_path/'owned').exists()


@pytest.mark.parametrize('more', [dict(temperature=0.), dict(set_thresholds=[0.5]), dict(rule='magic'), dict(magic=1), 7, dict(with_views=dict(views='flip'))],
                         ids=str)
def test_an_impossible_calibration_of_views_is_refused(more, bundle):
    cfg = json.loads((bundle/'config.json').read_text())['fastsmile']['calibration']
    change(bundle, 'fastsmile', 'calibration', to=cfg | dict(with_views=cfg | dict(views='flip', temperature=2.)))
    assert load_bundle(bundle).metadata.calibration.for_views('flip').temperature == 2
    change(bundle, 'fastsmile', 'calibration', to=cfg | dict(with_views=cfg | dict(views='flip') | more if isinstance(more, dict) else more))
    with pytest.raises(SmileError): load_bundle(bundle)


@pytest.mark.parametrize('confusion', [[[1, 2]], [[1, 2], [3]], [[1, -2], [3, 4]], [[1, 2], [3, float('nan')]], [[1, 1e12], [3, 4]], 'ab', [['x', 1], [2, 3]]],
                         ids=str)
def test_an_impossible_confusion_matrix_of_calib_is_refused(confusion, bundle):
    cfg = json.loads((bundle/'config.json').read_text())['fastsmile']['calibration']
    change(bundle, 'fastsmile', 'calibration', to=cfg | dict(confusion=[[5, 1], [2, 7.5]]))
    assert load_bundle(bundle).metadata.calibration.confusion == [[5, 1], [2, 7.5]]
    change(bundle, 'fastsmile', 'calibration', to={k: v for k, v in cfg.items() if k != 'confusion'})
    assert load_bundle(bundle).metadata.calibration.confusion == []  # of before it was kept
    change(bundle, 'fastsmile', 'calibration', to=cfg | dict(confusion=confusion))
    with pytest.raises(SmileError, match='config.json is not a fastsmile model'): load_bundle(bundle)
