"Class shares of new images: the estimate, how often its interval holds, and the bundle that carries what it needs"
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest

from fastsmile.metrics.calibration import Calibration, fit_temperature, unfitted_calibration
from fastsmile.metrics.coverage import Population
from fastsmile.metrics.predictions import SavedPredictions, calib_confusion
from fastsmile.metrics.scores import confusion_matrix
from fastsmile.metrics.shares import calibration_for_shares, confusion_shares, draw_shares, em_shares, estimate_shares
from fastsmile.metrics.shares import move_probabilities, shares_factor

TRUE = {2: np.array([[.93, .07], [.15, .85]]), 3: np.array([[.8, .1, .1], [.1, .8, .1], [.05, .25, .7]])}


def drawn_interval(rng: np.random.Generator, shares: np.ndarray, new: int, calib: int) -> np.ndarray: # (2, C)
    "The interval of one simulated calib and one set of new images, with labels from a known confusion"
    confusion = TRUE[len(shares)]
    counts = np.stack([rng.multinomial(calib // len(shares), row) for row in confusion])
    return np.quantile(draw_shares(counts, rng.multinomial(new, shares @ confusion)), [.025, .975], axis=0)


@pytest.mark.parametrize('shares', [(.9, .1), (.5, .5), (.02, .98), (.6, .3, .1)], ids=str)
@pytest.mark.parametrize('new, calib', [(50, 700), (300, 300), (1000, 100)])
def test_the_interval_holds_the_true_share_about_as_often_as_it_says(shares, new, calib):
    rng, shares = np.random.default_rng(new), np.array(shares)
    spans = np.stack([drawn_interval(rng, shares, new, calib) for _ in range(250 if len(shares) == 2 else 100)])
    held = ((spans[:, 0] <= shares) & (shares <= spans[:, 1])).mean(0)
    assert (held > .90).all() and held.mean() < .99, held


def test_an_interval_from_more_calib_rows_is_shorter_and_without_any_it_says_nothing():
    labels = np.array([400, 600])
    widths = [np.ptp(np.quantile(draw_shares(TRUE[2] * n, labels)[:, 1], [.025, .975])) for n in (0, 30, 300, 3000)]
    assert widths[0] > .95 and sorted(widths, reverse=True) == widths and widths[3] < .1


def test_the_most_likely_shares_are_shares_even_where_labels_are_impossible():
    found = confusion_shares(np.stack([TRUE[3]] * 3), np.array([[1, 0, 0], [0, 1, 0], [.3, .3, .4]]))
    assert np.allclose(found.sum(1), 1) and (found >= 0).all() and found[0, 0] > .99


def model_and_images(share: float, n: int = 600, lean: float = 0., calib: int = 400, seed: int = 0) -> tuple:
    "A model that counts on 30% of the second class, with its calib, and new images with another share of it"
    prior, rng = np.array([.7, .3]), np.random.default_rng(seed)
    def draw(shares, n):
        y, _, p, _ = Population(tuple(shares), 2.).draw(n, rng)
        p = p / shares * prior * np.exp([0, lean])
        return y, p / p.sum(1, keepdims=True)
    y, p = draw(prior, calib)
    made = replace(unfitted_calibration(prior, 'argmax'), temperature=fit_temperature(p, y))
    made = replace(made, confusion=confusion_matrix(y, made.apply(p, 'balanced')[0], 2).tolist())
    return prior, made, *draw(np.array([1 - share, share]), n)


@pytest.mark.parametrize('share', [.05, .5, .95])
def test_shares_are_found_and_labels_under_them_are_better(share):
    prior, made, y, p = model_and_images(share)
    e = estimate_shares(p, prior, made)
    assert e.method == 'em' and abs(e.shares[1] - share) < .05 and e.low[1] <= share <= e.high[1] and e.differs
    moved = move_probabilities(p, shares_factor(made, prior, e.shares))
    there = calibration_for_shares(made, e.shares, moved)
    before, after = made.apply(p)[1], there.apply(moved)[1]
    assert -np.log(after[np.arange(len(y)), y]).mean() < -np.log(before[np.arange(len(y)), y]).mean() - .01
    if share != .5: assert (there.apply(moved)[0] == y).mean() > (made.apply(p)[0] == y).mean()
    assert (there.apply(moved, 'balanced')[0] == made.apply(p, 'balanced')[0]).all()
    assert abs(there.apply(moved)[1].mean(0)[1] - e.shares[1]) < .01


def test_a_leaning_model_is_caught_by_the_confusion_matrix():
    prior, made, _, p = model_and_images(.3, n=2000, lean=1.2, calib=2000)
    e = estimate_shares(p, prior, made)
    assert em_shares(made.apply(p)[1], prior)[1] > .37 and e.method == 'confusion'
    assert abs(e.shares[1] - .3) < .06 and not e.differs


def test_images_with_the_shares_of_training_give_no_hint_and_few_images_none_at_all():
    hints = 0
    for seed in range(150):
        prior, made, _, p = model_and_images(.3, 120, calib=200, seed=seed)
        hints += bool(estimate_shares(p, prior, made).differs)
    assert hints <= 150 * .08
    prior, made, _, p = model_and_images(.95, 49)
    assert not estimate_shares(p, prior, made).differs


def test_without_a_confusion_matrix_or_without_images_there_is_an_estimate_and_no_interval():
    prior, made, _, p = model_and_images(.6)
    e = estimate_shares(p, prior, replace(made, confusion=[]))
    assert e.low is None and e.confusion is None and abs(e.shares[1] - .6) < .06 and not e.differs
    assert set(e.as_dict('ab')['a']) == {'value', 'prior', 'em'}
    none = estimate_shares(np.zeros((0, 2)), prior, made)
    assert none.low is None and none.rows == 0 and np.isfinite(none.shares).all()
    one = estimate_shares(p[:1], prior, made)
    assert (one.shares > .1).all() and (one.low <= one.shares).all() and (one.shares <= one.high).all()


def test_rows_of_one_person_count_for_fewer():
    y = np.repeat([0, 1] * 20, 5)
    p = np.where((np.arange(200) // 5 % 4 == 1)[:, None] ^ (y == 1)[:, None], [.2, .8], [.8, .2])
    table = pd.DataFrame(dict(target=np.array(['a', 'b'])[y], label='a', p_a=p[:, 0], p_b=p[:, 1], path='x', error=''))
    made = unfitted_calibration([.5, .5], 'argmax')
    alone = SavedPredictions(table.assign(group=[str(i) for i in range(200)]), ('a', 'b'))
    series = SavedPredictions(table.assign(group=[str(i // 5) for i in range(200)]), ('a', 'b'))
    rows, persons = np.array(calib_confusion(alone, made)), np.array(calib_confusion(series, made))
    assert rows.sum() == 200
    assert np.allclose(persons[1], rows[1] / 5, rtol=.15)  # all five rows of a person are right or wrong together


def test_a_calibration_of_before_has_no_confusion_and_a_new_one_keeps_it():
    old = {k: v for k, v in asdict(unfitted_calibration([.5, .5], 'argmax')).items() if k != 'confusion'}
    assert Calibration(**old).confusion == []
