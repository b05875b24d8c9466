"The score of unlike images keeps what it promises, and takes no nonsense from a model file."
import json
from dataclasses import asdict

import numpy as np
import pytest

from fastsmile.data.unlike import UNLIKE_SHARE, Gaussian, UnlikeScale, fit_unlike_scale, input_statistics, parse_unlike_scale


def images(rng, n: int, size: int = 16) -> np.ndarray: # (n, size, size, 3), uint8
    "Smooth images that vary in brightness, contrast and slope"
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    a, b, level, gain = rng.normal(0.6, 0.2, n), rng.normal(0, 0.3, n), rng.normal(128, 15, n), rng.normal(40, 6, n)
    plane = level[:, None, None] + gain[:, None, None] * (a[:, None, None] * y + b[:, None, None] * x)
    return (plane[..., None] + rng.normal(0, 4, (n, size, size, 3))).clip(0, 255).astype(np.uint8)


def test_images_of_the_same_kind_are_flagged_in_at_most_a_twentieth_of_cases_on_average():
    rng, shares, apart = np.random.default_rng(0), [], []
    for n in (20, 59, 100, 700):
        for _ in range(12):
            scale = fit_unlike_scale(images(rng, 80), images(rng, n))
            shares.append((scale.unlike(images(rng, 200)) >= UNLIKE_SHARE).mean())
            apart.append((scale.unlike(images(rng, 50)[:, ::-1]) >= UNLIKE_SHARE).mean())
    assert 0.03 < np.mean(shares) < 0.06 and np.mean(apart) > 0.9


def test_a_score_of_many_held_out_images_is_thinned_evenly():
    rng = np.random.default_rng(1)
    train, held_out = images(rng, 60), images(rng, 1800)
    scale = fit_unlike_scale(train, held_out)
    assert len(scale.scores) == 500
    assert np.quantile(scale.scores, [.1, .5, .95]) == pytest.approx(np.quantile(scale.score(held_out), [.1, .5, .95]), rel=0.02)


@pytest.mark.parametrize('size', [8, 17, 224])
@pytest.mark.parametrize('value', [0, 255])
def test_flat_images_have_finite_scores(size, value):
    flat = np.full((30, size, size, 3), value, np.uint8)
    assert all(np.isfinite(values).all() for values in input_statistics(flat))
    scale = fit_unlike_scale(flat, flat)
    noise = np.random.default_rng(0).integers(0, 256, flat.shape, dtype=np.uint8)
    assert (scale.unlike(flat) < UNLIKE_SHARE).all() and (scale.unlike(noise) >= UNLIKE_SHARE).all()


@pytest.fixture(scope='module')
def stored() -> dict:
    rng = np.random.default_rng(2)
    return json.loads(json.dumps(asdict(fit_unlike_scale(images(rng, 60), images(rng, 40)))))


def test_it_comes_back_from_json_as_it_was(stored):
    read = parse_unlike_scale(stored)
    assert isinstance(read, UnlikeScale) and isinstance(read.layout, Gaussian) and json.loads(json.dumps(asdict(read))) == stored


@pytest.mark.parametrize('change', [
    dict(scores=[]), dict(scores=[2., 1.]), dict(scores=[float('nan')]), dict(scores=[1.] * 501), dict(more=1),
    dict(texture=dict(mean=[0.] * 7, whiten=[[0.] * 7] * 6, scale=1.)), dict(texture=dict(mean=[0.] * 7, whiten=[[0.] * 7] * 7, scale=-1.)),
    dict(layout=dict(mean=[0.] * 7, whiten=[[0.] * 7] * 7, scale=1.)), dict(layout=dict(mean=[1e300] * 36, whiten=[[0.] * 36] * 36, scale=1.))])
def test_a_spoilt_one_is_refused(stored, change):
    with pytest.raises(ValueError, match='scale of unlike images'): parse_unlike_scale(stored | change)
