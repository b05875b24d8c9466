"A model knows what its training images looked like, and every way to ask it prepares images alike."
import asyncio
import csv
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import folder
from PIL import Image

from fastsmile.data.domain import parse_domain
from fastsmile.config.commands import EvaluateConfig, ExplainConfig, PredictConfig, ServeConfig
from fastsmile.core.files import read_json
from fastsmile.data.images import resize_and_crop
from fastsmile.data.sample import draw_face, random_face_params
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.explain import explain
from fastsmile.runs.predict import predict


def png(img) -> bytes:
    buf = io.BytesIO()
    img.save(buf, 'PNG')
    return buf.getvalue()


@pytest.fixture(scope='module')
def albums(tmp_path_factory):
    "Drawn faces under strong colour, in class folders; the same, turned grey"
    rng, colour, grey = np.random.default_rng(0), {}, {}
    for i, label in enumerate(['NOT smile', 'positive smile', 'negative smile'] * 4):
        face = np.asarray(draw_face(random_face_params(rng, label), 32, rng)) * rng.uniform(0.2, 1, 3)
        img = Image.fromarray(face.astype(np.uint8))
        colour[f'{label}/{i:02}.png'], grey[f'{label}/{i:02}.png'] = png(img), png(img.convert('L'))
    root = tmp_path_factory.mktemp('albums')
    return folder(root/'colour', colour), folder(root/'grey', grey)


@pytest.fixture(scope='module', params=[False, True], ids=['colour', 'grey'])
def both(run, request, tmp_path_factory):
    "Copies of the run: as it is, and as a model of grey images"
    path = shutil.copytree(run.path, tmp_path_factory.mktemp('runs')/'run')
    model = load_bundle(path)
    assert not model.spec.prep.grey
    save_bundle(replace(model, spec=replace(model.spec, prep=replace(model.spec.prep, grey=request.param))), path/'model')
    return path, request.param


def rows(path, album, out, **options):
    predict(album, PredictConfig(overwrite=True, model=str(path), out=str(out), device='cpu', precision='fp32', **options))
    return [{k: v for k, v in r.items() if k != 'path'} for r in csv.DictReader(open(out, newline='', encoding='utf-8'))]


def ways(path, album, out):
    "What each way to ask the model says of an album: predict by torch, evaluate, explain"
    out.mkdir()
    yield rows(path, album, out/'p.csv')
    yield rows(path, album, out/'tta.csv', tta='full')
    yield evaluate(path, album, EvaluateConfig(draws=100, device='cpu', out=str(out/'e')))['metrics']['log_loss']['value']
    told = explain(path, (str(album),), ExplainConfig(methods=('sensitivity',), n=2, neighbours=0, device='cpu', out=str(out/'x')))
    yield [[v for k, v in one.items() if k.startswith('p_') or k == 'confidence'] for one in told['images']['requested']]


def test_a_model_of_grey_images_sees_no_colour_whoever_asks(both, albums, tmp_path):
    path, grey = both
    for a, b in zip(ways(path, albums[0], tmp_path/'a'), ways(path, albums[1], tmp_path/'b'), strict=True):
        assert (a == b) == grey and a


def test_an_exported_model_agrees_and_says_how_images_are_prepared(both, albums, tmp_path):
    from fastsmile.inference.export import export
    from fastsmile.inference.onnx_backend import OnnxNet
    path, grey = both
    model = load_bundle(path)
    made = export(path)
    asked = [rows(where, albums[0], tmp_path/f'{i}.csv') for i, where in enumerate((path, made['out']))]
    for a, b in zip(*asked, strict=True): assert all(abs(float(a[k]) - float(b[k])) < 1e-4 for k in a if k.startswith('p_'))
    assert (rows(made['out'], albums[1], tmp_path/'g.csv') == asked[1]) == grey
    steps = json.loads(OnnxNet(made['out']).session().get_modelmeta().custom_metadata_map['preprocessing'])[0]
    assert steps['grey'] == grey == ('turned grey' in steps['steps']) == read_json(path/'model'/'config.json')['fastsmile']['grey_input']
    assert model.spec.prep == load_bundle(path).spec.prep


def test_the_server_agrees(both, albums):
    pytest.importorskip('fasthtml')
    from fastsmile.serving.service import Service
    from fastsmile.serving.uploads import Upload
    path, grey = both
    service = Service(load_bundle(path), ServeConfig(port=0, device='cpu', precision='fp32'))
    try: said = [asyncio.run(service.predict([Upload('a.png', next(a.rglob('00.png')).read_bytes())]))[0] for a in albums]
    finally: service.close()
    assert (said[0] == said[1]) == grey and not said[0][0]['error']


def test_training_and_prediction_see_the_same_grey(both, albums):
    "The one function that prepares images gives the network of a grey model three equal channels"
    path, grey = both
    pixels = resize_and_crop(Image.open(next(albums[0].rglob('00.png'))), load_bundle(path).spec.prep)
    assert (np.ptp(pixels, axis=-1).max() == 0) == grey


@pytest.mark.parametrize('face', [dict(width='a'), dict(q=1), [1], dict(x=2.), dict(width=float('nan')), dict(height=0)])
def test_an_impossible_frame_in_a_bundle_is_refused(face):
    with pytest.raises(ValueError, match='face|frame'): parse_domain(dict(face=face))
