"What every backend and every export format must do: the same inputs, the same logits, and no torch where none is needed."
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, folder, picture

from fastsmile.config.commands import ENGINES, ExportConfig
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.data.images import Preprocessing, normalize
from fastsmile.data.readers import FolderReader
from fastsmile.inference.backend import normalize_pixels
from fastsmile.inference.load import BACKENDS, backend_of, choose_backend, load_model, make_backend
from fastsmile.models.bundle import save_bundle
from fastsmile.models.device import pixels_to_tensor
from fastsmile.models.factory import build_network, make_spec
from fastsmile.models.spec import Model, ModelMetadata

NEAR = 1e-4  # in logits, between backends


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A model whose norms have something to fold, in a folder"
    torch.manual_seed(0)
    spec = make_spec('resnet10t', ['a', 'b', 'c'], size=32, model_args=TINY)
    net = build_network(spec).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    where = tmp_path_factory.mktemp('backends')/'model'
    save_bundle(Model(spec, ModelMetadata([.7, .2, .1], [.7, -.5, -1.2], [0.] * 3, 'argmax'), net), where)
    return where


@pytest.fixture(scope='module', params=sorted(BACKENDS))
def model(request, bundle):
    "The same model, loaded for one backend"
    if request.param == 'torch': return load_model(bundle, 'torch')
    from fastsmile.inference.export import EXPORT_FORMATS, export
    file = EXPORT_FORMATS[request.param].default_path(bundle)
    if not file.exists(): export(bundle, ExportConfig(format=request.param))
    return load_model(file)


@pytest.fixture(scope='module')
def pixels(): return np.random.default_rng(0).integers(0, 256, (23, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope='module')
def expected(bundle, pixels):
    "Logits of the network as training left it"
    with torch.no_grad(): return load_model(bundle, 'torch').net(torch.from_numpy(normalize_pixels(pixels, Preprocessing(32)))).numpy()


def test_the_registries_and_the_options_have_the_same_names():
    from fastsmile.inference.export import EXPORT_FORMATS
    assert set(ENGINES) == {'auto', *BACKENDS} and EXPORT_FORMATS.keys() <= BACKENDS.keys()
    assert all(ExportConfig(format=name).format == name for name in EXPORT_FORMATS)
    assert all(f.suffix == BACKENDS[name].suffix for name, f in EXPORT_FORMATS.items())


def test_the_logits_are_those_of_the_network(model, pixels, expected):
    backend = make_backend(model, 'fp32', 'cpu')
    logits = backend.logits(pixels)
    assert logits.dtype == np.float32 and logits.shape == (23, 3) and np.abs(logits - expected).max() < NEAR
    assert (backend.precision, backend.device, backend.recomputed) == ('fp32', 'cpu', 0)


def test_batches_and_threads_change_only_the_last_digits(model, pixels, expected):
    backend = make_backend(model, 'fp32', 'cpu')
    backend.max_batch = 4
    with backend.single_core_threads(True) as initializer:
        initializer()
        assert np.abs(backend.logits(pixels) - expected).max() < NEAR


def test_flipped_images_are_mirrored(model, pixels):
    backend = make_backend(model, 'fp32', 'cpu')
    assert np.abs(backend.logits(pixels, flip=True) - backend.logits(np.ascontiguousarray(pixels[:, :, ::-1]))).max() < NEAR


def test_fp32_is_never_uncertain(model):
    p = np.array([[.5, .5, 0.], [.9, .1, 0.]])
    assert not make_backend(model, 'fp32', 'cpu').uncertain_rows(p, lambda p: p.argmax(1)[:, None]).any()


def test_memory_that_runs_out_halves_the_batches(model, pixels, expected, monkeypatch):
    backend = make_backend(model, 'fp32', 'cpu')
    forward = backend._forward
    def hungry(packed):
        if len(packed) > 6: raise MemoryError
        return forward(packed)
    monkeypatch.setattr(backend, '_forward', hungry)
    assert np.abs(backend.logits(pixels) - expected).max() < NEAR and backend.max_batch == 6


def test_a_device_that_is_not_there_is_refused(model):
    with pytest.raises(OptionError): make_backend(model, 'fp32', 'cuda:99')


def test_the_kind_follows_from_the_path(model):
    kind = backend_of(model)
    assert choose_backend(model.path, kind) == kind and (Path(model.path).suffix == BACKENDS[kind].suffix)


@pytest.mark.parametrize('kind', sorted(BACKENDS))
def test_a_file_of_a_stranger_is_refused(kind, tmp_path):
    path = tmp_path/f'm{BACKENDS[kind].suffix or ".pth"}'
    path.write_bytes(b'cos\nsystem\n')
    with pytest.raises(SmileError): load_model(path, kind)


@pytest.mark.parametrize('kind', sorted(set(BACKENDS) - {'torch'}))
def test_an_exported_model_is_loaded_and_run_without_torch(kind, bundle, tmp_path):
    from fastsmile.inference.export import EXPORT_FORMATS, export
    file = EXPORT_FORMATS[kind].default_path(bundle)
    if not file.exists(): export(bundle, ExportConfig(format=kind))
    code = f'''
import sys, numpy as np
from fastsmile.inference.load import load_model, make_backend
print(make_backend(load_model({str(file)!r})).logits(np.zeros((1, 32, 32, 3), np.uint8)).shape,
      {{'torch', 'timm', 'fastai', 'pandas'}} & set(sys.modules))
'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.stdout.strip() == '(1, 3) set()', r.stderr


@pytest.mark.parametrize('prep', [Preprocessing(32), Preprocessing(32, mean=(.5, .4, .3), std=(.5, .6, .7))])
def test_training_torch_and_onnx_see_the_same_bits(prep, tmp_path):
    "One normalisation: a valid batch of training, the input of torch, and the input of onnxruntime"
    import pandas as pd
    from fastsmile.training.balance import plan_balance
    from fastsmile.training.loaders import LoaderSpec, PreparedImages, make_loaders
    files = {f'{i}.png': picture(seed=i, size=(32, 32)) for i in range(8)}
    reader = FolderReader(folder(tmp_path, files))
    rows = pd.DataFrame(dict(path=list(files), label=['a', 'b'] * 4, split=['train'] * 4 + ['valid'] * 4))
    images = PreparedImages(reader, prep, rows.path)
    draw = plan_balance(np.array([0, 1, 0, 1]), 2, 'none', 0).sampler
    dls = make_loaders(rows, LoaderSpec(images, ('a', 'b'), draw, bs=4, device='cpu'))
    valid = rows.path[rows.split == 'valid']
    pixels = np.stack([np.asarray(reader.read_image(n)) for n in valid])
    batch = dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    onnx_input, torch_input = normalize_pixels(pixels, prep), pixels_to_tensor(pixels, prep)
    assert torch.equal(batch, torch_input) and np.array_equal(onnx_input, torch_input.numpy())
    formula = normalize(pixels.astype(np.float32), np.float32(prep.mean), np.float32(prep.std)).transpose(0, 3, 1, 2)
    assert np.array_equal(formula, onnx_input)
