"Every way to predict says alike how unlike the training images an image is."
import asyncio
import csv
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from fastsmile import evaluate, load_model, predict
from fastsmile.cli.tables import predict_output
from fastsmile.config.commands import PredictConfig, ServeConfig
from fastsmile.core.errors import OptionError
from fastsmile.data.images import resize_and_crop
from fastsmile.data.sample import draw_face, random_face_params
from fastsmile.data.unlike import fit_unlike_scale
from fastsmile.inference.rows import RowOptions
from fastsmile.models.bundle import load_bundle, save_bundle

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts


def faces_of(n: int, seed: int) -> list:
    rng = np.random.default_rng(seed)
    return [draw_face(random_face_params(rng, 'positive smile' if i % 2 else 'NOT smile'), 64, rng) for i in range(n)]


@pytest.fixture(scope='module')
def known_faces(run, tmp_path_factory):
    "The run, whose model knows what 150 drawn faces look like"
    path = tmp_path_factory.mktemp('runs')/'scaled'
    shutil.copytree(run.path, path)
    model = load_bundle(path)
    pixels = np.stack([resize_and_crop(i, model.spec.prep) for i in faces_of(150, 0)])
    save_bundle(replace(model, metadata=replace(model.metadata, unlike=fit_unlike_scale(pixels[:100], pixels[100:]))), path/'model')
    return path


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Ten faces as they are, ten blurred, one broken file; in class folders"
    root = tmp_path_factory.mktemp('pictures')
    for i, face in enumerate(faces_of(20, 1)):
        where = root/('positive smile' if i % 2 else 'NOT smile')
        where.mkdir(exist_ok=True)
        (face if i < 10 else face.filter(ImageFilter.GaussianBlur(5))).save(where/f'{i:02}.png')
    (root/'NOT smile'/'99.png').write_bytes(b'')
    return root


def rows_of(path) -> pd.DataFrame: return pd.read_csv(path, keep_default_na=False, dtype={'unlike': str})


def test_predict_writes_the_column_and_says_how_many(known_faces, pictures, tmp_path):
    done = predict(pictures, PredictConfig(overwrite=True, model=str(known_faces), out=str(tmp_path/'p.csv')))
    rows = rows_of(done.out)
    good = rows[rows.error == ''].set_index('path')
    flagged = good.unlike.astype(float) >= 0.95
    blurred = good.index.str.contains('1[0-9].png')
    assert flagged[blurred].all() and flagged[~blurred].mean() <= 0.2 and (rows[rows.error != ''].unlike == '').all()
    assert done.unlike == flagged.sum() and done.failed == 1
    shown, result = predict_output(done)
    assert f'{flagged.mean():.0%} of images are unlike the training images (5% expected' in '\n'.join(map(str, shown))
    assert result['unlike'] == done.unlike


def test_the_api_python_and_views_say_the_same(known_faces, pictures, tmp_path):
    from fastsmile.serving.service import Service
    from fastsmile.serving.uploads import Upload
    model = load_model(known_faces)
    plain, views = model.predict(pictures).set_index('path').unlike, model.predict(pictures, tta=True).set_index('path').unlike
    assert plain.equals(views)
    one = sorted(pictures.rglob('1*.png'))[0]
    service = Service(model, ServeConfig())
    try: (row,), = asyncio.run(service.predict([Upload(one.name, one.read_bytes())]))
    finally: service.close()
    assert row['unlike'] == plain[str(one.relative_to(pictures))] and 'unlike' in service.columns


def test_labels_of_unlike_images_are_withheld_on_request(known_faces, pictures, tmp_path):
    config = PredictConfig(overwrite=True, model=str(known_faces), out=str(tmp_path/'p.csv'), abstain_unlike=True)
    rows = rows_of(predict(pictures, config).out)
    rows = rows[rows.error == '']
    flagged = rows.unlike.astype(float) >= 0.95
    assert (rows.label[flagged] == '').all() and (rows.withheld[flagged] != '').all() and (rows.label[~flagged] != '').all()
    sets = load_model(known_faces).predict(pictures, request=RowOptions(sets=True, abstain_unlike=True))
    sets = sets[(sets.error == '') & (pd.to_numeric(sets.unlike) >= 0.95)]
    assert (sets.set.str.count(r'\|') == 2).all()


def test_a_model_without_a_scale_has_no_column_and_refuses(run, pictures, tmp_path):
    model = load_model(run.path)
    bare = replace(model, metadata=replace(model.metadata, unlike=None))
    assert 'unlike' not in bare.predict(pictures)
    with pytest.raises(OptionError, match='--abstain-unlike'): bare.predict(pictures, request=RowOptions(abstain_unlike=True))


def test_evaluate_counts_them_and_fit_measures_a_scale(known_faces, pictures, tmp_path, faces, tiny):
    from fastsmile.runs.fit import fit
    result = evaluate(known_faces, pictures, out=str(tmp_path/'e'), tta='none')
    with open(tmp_path/'e'/'predictions.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
    assert result['unlike'] == sum(float(r['unlike']) >= 0.95 for r in rows) >= 8
    made = fit(faces, replace(tiny, epochs=1, calib=0.3, out=str(tmp_path/'calib'))).model
    assert made.metadata.unlike is not None and 'unlike' in made.predict([Image.new('RGB', (40, 40))])


def test_the_exported_model_says_the_same(known_faces, pictures, tmp_path):
    pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
    from fastsmile import export
    file = tmp_path/'model.onnx'
    export(known_faces, out=str(file), check=str(pictures))
    both = [load_model(p).predict(pictures).unlike.tolist() for p in (known_faces, file)]
    assert both[0] == both[1]
