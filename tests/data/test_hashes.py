"What every registered hash of images must do; a new one is an entry of `IMAGE_HASHES` and a name in the options."
import io
import multiprocessing
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastsmile.config.fields import HASH_NAMES, DataOptions
from fastsmile.data.readers import FolderReader
from fastsmile.data.sample import SAMPLE_CLASSES, draw_face, random_face_params
from fastsmile.data.scan import IMAGE_HASHES, ImageScanner, _grey_64x64, pack_bits, scan_images

HASHES = list(IMAGE_HASHES)


@pytest.fixture(scope='module')
def faces():
    rng = np.random.default_rng(7)
    return [draw_face(random_face_params(rng, c), 112, rng) for c in SAMPLE_CLASSES for _ in range(8)]


def distance(name, a, b): return int((IMAGE_HASHES[name].compute(a) != IMAGE_HASHES[name].compute(b)).sum())


def saved(img, fmt, **how):
    file = io.BytesIO()
    img.save(file, fmt, **how)
    return Image.open(file).convert('RGB')


def test_the_options_name_the_registry():
    assert tuple(HASHES) == HASH_NAMES and DataOptions().hash in HASHES


def test_the_help_names_the_distance_of_the_usual_hash():
    help_text = {f.name: f.metadata['help'] for f in fields(DataOptions)}['near']
    usual = DataOptions().hash
    assert f'{IMAGE_HASHES[usual].max_distance} for {usual}' in help_text


@pytest.mark.parametrize('name', HASHES)
def test_bits_of_one_length_whatever_the_image(name, faces):
    "Blank, tiny, wide and large images have a hash, too"
    odd = [Image.new('RGB', (64, 64), 'grey'), Image.new('RGB', (1, 1)), Image.new('RGB', (300, 20), 'red'), faces[0].resize((900, 700))]
    bits = [IMAGE_HASHES[name].compute(img) for img in [*faces, *odd]]
    assert {(b.dtype.kind, b.shape) for b in bits} == {('b', bits[0].shape)} and bits[0].ndim == 1
    assert 0 <= IMAGE_HASHES[name].max_distance < bits[0].size


@pytest.mark.parametrize('name', HASHES)
def test_a_copy_without_loss_is_the_same(name, faces):
    for img in faces[:6]: assert distance(name, img, saved(img, 'PNG')) == 0


@pytest.mark.parametrize('name', [n for n in HASHES if n != 'colorhash'])  # which only counts colours
def test_copies_are_nearer_than_other_faces(name, faces):
    for i, img in enumerate(faces):
        copies = [saved(img, 'JPEG', quality=85), img.resize((90, 90))]
        other = faces[(i + 8) % len(faces)]
        assert max(distance(name, img, c) for c in copies) < distance(name, img, other)


@pytest.mark.parametrize('name', [n for n in HASHES if IMAGE_HASHES[n].specific])
def test_a_specific_hash_takes_no_other_face_for_a_copy(name, faces):
    "Nor a mirror image: the search for training images in a test set has no thumbnails to compare"
    h = IMAGE_HASHES[name]
    for i, img in enumerate(faces):
        assert distance(name, img, ImageOps.mirror(img)) > h.max_distance
        assert all(distance(name, img, other) > h.max_distance for other in faces[:i])


@pytest.mark.parametrize('name', [n for n in HASHES if IMAGE_HASHES[n].from_grey])
def test_from_the_grey_image_it_is_the_same(name, faces):
    for img in faces: assert (IMAGE_HASHES[name].from_grey(_grey_64x64(img)) == IMAGE_HASHES[name].compute(img)).all()


@pytest.mark.parametrize('name', HASHES)
def test_the_scan_keeps_what_the_registry_computes(name, faces, tmp_path):
    for i, img in enumerate(faces[:4]): img.save(tmp_path/f'{i}.png')
    scan = scan_images(FolderReader(tmp_path), [f'{i}.png' for i in range(4)], ImageScanner(name, mirror=True))
    for i, img in enumerate(faces[:4]):
        assert (scan.hashes[i, 0] == pack_bits(IMAGE_HASHES[name].compute(img))).all()
        mirrored = pack_bits(IMAGE_HASHES[name].compute(ImageOps.mirror(img)))
        assert np.bitwise_count(scan.hashes[i, 1] ^ mirrored).sum() <= 2  # the small grey image is mirrored, not made anew


def hashes_of_a_gradient():
    img = Image.radial_gradient('L').convert('RGB')
    return {name: h.compute(img).tobytes() for name, h in IMAGE_HASHES.items()}


def test_another_process_computes_the_same():
    with multiprocessing.get_context('spawn').Pool(1) as pool: assert pool.apply(hashes_of_a_gradient) == hashes_of_a_gradient()
