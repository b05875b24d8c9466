"What a program holds: Pillow images, arrays, bytes and open files become rows as files do."
import io

import numpy as np
import pytest
from conftest import TINY, folder, picture
from PIL import Image

from fastsmile.core.errors import SmileError
from fastsmile.inference.inputs import open_inputs
from fastsmile.inference.load import load_model
from fastsmile.inference.predict import predict_table  # noqa: F401  gives `Model` its predict
from fastsmile.models.bundle import save_bundle
from fastsmile.models.factory import build_network, make_spec
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.runs.predict import predict


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    spec, path = make_spec('resnet10t', ['neutral', 'smile'], 32, model_args=TINY), tmp_path_factory.mktemp('m')/'model'
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), build_network(spec).eval()), path)
    return load_model(path)


@pytest.fixture(scope='module')
def face(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp('f')/'face.png'
    Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(path)
    return path


def as_file(path):
    buf = io.BytesIO()
    Image.open(path).save(buf, 'PNG')  # the position is at the end now
    return buf


HELD = dict(pil=Image.open, array=lambda p: np.asarray(Image.open(p)), bytes=lambda p: p.read_bytes(), bytearray=lambda p: bytearray(p.read_bytes()),
            memory=lambda p: memoryview(p.read_bytes()), buffer=as_file, opened=lambda p: open(p, 'rb'), path=lambda p: p, text=str,
            rgba=lambda p: np.dstack([np.asarray(Image.open(p)), np.full((40, 30), 255, np.uint8)]), batch=lambda p: np.asarray(Image.open(p))[None])


@pytest.mark.parametrize('how', HELD)
def test_each_kind_alone_and_in_a_list_is_the_row_of_its_file(how, model, face):
    want = model.predict(face).drop(columns='path')
    alone, several = model.predict(HELD[how](face)), model.predict([HELD[how](face) if how != 'batch' else HELD[how](face)[0], face])
    assert len(alone) == 1 and len(several) == 2 and (several.error == '').all()
    for rows in (alone, several.iloc[:1], several.iloc[1:]):
        assert rows.label.tolist() == want.label.tolist() and np.allclose(rows.confidence.astype(float), want.confidence.astype(float), atol=1e-5)


def test_all_in_one_list_in_order_with_views_and_threads(model, face):
    items = [make(face) for name, make in HELD.items() if name != 'batch'] * 3
    rows = model.predict(items, tta=True, bs=4, threads=3)
    assert len(rows) == len(items) and rows.path[0] == 'image 0' and rows.path[7] == str(face) and rows.label.nunique() == 1
    assert model.predict(iter(items[:3])).path.tolist() == ['image 0', 'image 1', 'image 2']


def test_nothing_is_an_empty_table(model):
    columns = list(model.predict(np.zeros((9, 9), np.uint8)).columns)
    for nothing in ([], (), np.zeros((0, 9, 9, 3), np.uint8)):
        rows = model.predict(nothing)
        assert len(rows) == 0 and list(rows.columns) == columns
    with pytest.raises(SmileError, match='the list is empty'): open_inputs([])


def test_greys_palettes_and_turned_pictures(model, face):
    grey = Image.open(face).convert('L')
    rows = model.predict([np.asarray(grey), np.asarray(grey)[..., None], grey, np.dstack([np.asarray(grey)] * 3), grey.convert('P'), grey.convert('I;16')])
    assert (rows.error == '').all() and rows.label[:4].nunique() == 1
    turned = Image.open(face)
    turned.getexif()[0x112] = 6
    assert open_inputs([turned]).reader.read_image('image 0').size == (40, 30)


def test_what_cannot_be_decoded_is_a_row_with_its_reason(model, face, tmp_path):
    (tmp_path/'half.png').write_bytes(face.read_bytes()[:900])
    rows = model.predict([b'', b'no picture', face.read_bytes()[:900], Image.open(tmp_path/'half.png'), face, tmp_path/'half.png'])
    assert [bool(e) for e in rows.error] == [True, True, True, True, False, True] and rows.label[4]


@pytest.mark.parametrize('wrong,match', [
    (np.zeros((4, 4, 3)), r'array of float64, shape \(4, 4, 3\)'), (np.zeros((4, 4), bool), 'array of bool'),
    (np.zeros((3, 40, 30), np.uint8), r'shape \(3, 40, 30\)'),
    (np.zeros((0, 4, 3), np.uint8), r'shape \(0, 4, 3\)'), (np.zeros(9, np.uint8), r'shape \(9,\)'), (3, 'int is no picture'), (None, 'NoneType is no picture'),
    ([None], 'NoneType is no picture'), (io.StringIO('x'), 'open as text'), ([np.zeros((4, 4, 3), np.float32)], 'float32'), ([3.5], 'float is no picture'),
    ({'a.jpg': 1}, 'dict is no list of pictures')])
def test_what_is_no_picture_is_refused_in_a_line(wrong, match, model):
    with pytest.raises(SmileError, match=match) as e: model.predict(wrong)
    assert len(e.value.message) < 120 and 'ccepted' in e.value.hint or 'rb' in e.value.hint or 'values' in e.value.hint


def test_paths_in_arrays_and_closed_files(model, face):
    rows = model.predict(np.array([str(face)] * 2))
    assert rows.path.tolist() == [str(face)] * 2 and (rows.error == '').all()
    with open(face, 'rb') as f: pass
    with pytest.raises(SmileError, match='The file is closed'): model.predict(f)


def test_a_picture_does_not_change_and_folders_go_beside(model, face, tmp_path):
    held = Image.open(face)
    before = held.tobytes()
    root = folder(tmp_path/'f', {'a.png': picture(), 'b.png': picture()})
    rows = model.predict([held, root, np.asarray(held)])
    assert rows.path.tolist() == ['image 0', str(root/'a.png'), str(root/'b.png'), 'image 2'] and held.tobytes() == before


def test_the_file_of_predictions_takes_them_too(model, face, tmp_path):
    done = predict([Image.open(face), face], model=model.path, out=str(tmp_path/'p.csv'))
    assert done.rows == 2
