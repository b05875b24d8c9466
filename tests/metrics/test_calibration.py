"What is fitted on calib holds on other rows: temperature, rules, sets; numbers of many values are cut into four slices."
import numpy as np
import pytest
import torch

from fastsmile.config.choices import LOSSES
from fastsmile.metrics.calibration import (
    INVERSE_LINKS, CalibrationSettings, apply_temperature, fit_calibration, fit_rule, fit_set_thresholds, fit_temperature,
    invert_link, loss_link, split_link,
)
from fastsmile.metrics.coverage import Population
from fastsmile.metrics.intervals import evaluate_predictions
from fastsmile.metrics.scores import confusion_matrix, label_scores


def sharp(n, seed, factor=2.5, prior=(.6, .25, .15)):
    rng = np.random.default_rng(seed)
    y = rng.choice(3, n, p=prior)
    z = 1.4 * (1.4 * np.eye(3)[y] + rng.normal(size=(n, 3))) + np.log(prior)
    e = np.exp(factor * (z - z.max(1, keepdims=True)))
    return y, e / e.sum(1, keepdims=True)


def test_temperature_mends_the_calibration_error():
    y, p = sharp(600, 1)
    ty, tp = sharp(4000, 2)
    t = fit_temperature(p, y)
    def ece(q): return evaluate_predictions(ty, q.argmax(1), q, 'abc')['ece']['value']
    assert 2 < t < 3 and ece(tp) > 0.08 and ece(apply_temperature(tp, t)) < 0.03
    assert fit_temperature(np.array([[1., 0., 0.]]), np.array([0])) > 0.3  # a single certain row moves little


@pytest.mark.parametrize('metric', ['macro_f1', 'balanced_accuracy', 'mcc'])
def test_a_fitted_rule_serves_its_metric_on_other_rows_and_hardly_ever_hurts(metric):
    gains = []
    ty, tp = sharp(6000, 99)
    for seed in range(8):
        y, p = sharp(300, seed)
        offset, _ = fit_rule(p, y, np.array([.6, .25, .15]), metric)
        ruled, plain = (label_scores(confusion_matrix(ty, pred, 3))[metric] for pred in ((np.log(tp) + offset).argmax(1), tp.argmax(1)))
        gains.append(float(ruled - plain))
    assert np.mean(gains) > -0.002 and min(gains) > -0.02
    if metric == 'balanced_accuracy': assert np.mean(gains) > 0.02 and min(gains) > 0


def test_on_few_rows_of_calib_nothing_is_fitted_and_it_says_so():
    y, p = sharp(10, 3)
    made = fit_calibration(p, y, [.6, .25, .15], CalibrationSettings('macro_f1'))
    assert np.allclose(made.offsets['macro_f1'], np.array(made.offsets['balanced']) / 2) and 'fewer than two classes' in made.notes[-1]
    assert '50% of the offset of balanced' in made.notes[-1] and made.always_in_sets == [c for c in range(3) if made.calib_rows[c] < 9]
    assert fit_calibration(p, y, [.6, .25, .15], CalibrationSettings('mcc')).offsets['mcc'] == [0, 0, 0]


def test_one_weight_is_fitted_on_forty_rows_where_the_likeliest_class_is_always_the_same():
    "A weak model under 70% of one class: its likeliest class is nearly always that one, though it knows something of the others"
    prior, gains = np.array([.72, .19, .09]), []
    def weak(n, seed):
        rng = np.random.default_rng(seed)
        y = rng.choice(3, n, p=prior)
        e = np.exp(0.5 * (rng.normal(size=(n, 3)) + 0.5 * np.eye(3)[y])) * prior
        return y, e / e.sum(1, keepdims=True)
    ty, tp = weak(6000, 99)
    for seed in range(12):
        y, p = weak(40, seed)
        offset, note = fit_rule(p, y, prior, 'macro_f1')
        ruled, plain = (label_scores(confusion_matrix(ty, pred, 3))['macro_f1'] for pred in ((np.log(tp) + offset).argmax(1), tp.argmax(1)))
        gains.append(float(ruled - plain))
    assert np.mean(gains) > 0.05 and min(gains) > 0.03 and 'from argmax to balanced' in note
    def reached(offset): return label_scores(confusion_matrix(ty, (np.log(tp) + offset).argmax(1), 3))['balanced_accuracy']
    fits = [reached(fit_rule(*weak(40, s)[::-1], prior, 'balanced_accuracy')[0]) for s in range(12)]  # theory knows the rule already
    assert np.min(fits) == reached(-np.log(prior))


def test_sets_keep_their_promise_for_each_class():
    cover = []
    for seed in range(20):
        (y, p), (ty, tp) = sharp(400, seed), sharp(2000, 100 + seed)
        inside = tp >= fit_set_thresholds(p, y, 0.9)
        cover.append([(inside[ty == c, c]).mean() for c in range(3)])
    assert np.allclose(np.mean(cover, 0), 0.9, atol=0.025)


@pytest.mark.parametrize('link', ['softmax', 'sigmoid', 'focal:0.5', 'focal:2', 'label-smoothing:0.1'])
def test_arrays_and_tensors_have_one_inverse(link):
    z = np.random.default_rng(0).normal(size=(200, 4)) * 6
    one, other = invert_link(z, link), invert_link(torch.from_numpy(z), link, torch)
    assert np.allclose(one, other.numpy(), rtol=0, atol=1e-10) and np.isfinite(one).all()
    moderate = torch.from_numpy(z / 3)
    single, double = invert_link(moderate.float(), link, torch), invert_link(moderate, link, torch)
    assert single.dtype == torch.float32 and np.allclose(single.softmax(-1), double.softmax(-1), atol=1e-4)


def test_each_link_of_a_loss_has_an_inverse():
    links = {split_link(loss_link(word, loss.value and loss.value.default))[0] for word, loss in LOSSES.items()}
    assert links == set(INVERSE_LINKS)
    for bad in ('tanh', 'focal:x', 'focal:inf', ''):
        with pytest.raises(ValueError): split_link(bad)


def test_half_of_balanced_serves_macro_f1_where_nothing_is_fitted():
    "Three and eight classes, weak models: better than balanced and than argmax"
    from fastsmile.metrics.calibration import decision_offset
    for prior, strength in (((.72, .19, .09), 0.7), ((.3, .2, .15, .1, .1, .05, .05, .05), 1.2), ((.9, .1), 1.0)):
        y, _, p, _ = Population(prior, strength).draw(8000, np.random.default_rng(0))
        reached = {}
        for rule in ('macro_f1', 'argmax', 'balanced'):
            label = (np.log(p) + decision_offset(rule, np.array(prior))).argmax(1)
            reached[rule] = label_scores(confusion_matrix(y, label, len(prior)))['macro_f1']
        assert reached['macro_f1'] > max(reached['argmax'], reached['balanced']) + 0.01, prior


def test_the_fitted_rule_is_the_best_between_argmax_and_balanced():
    "On 40 rows it comes within a hundredth of the best that any weight reaches"
    prior = np.array([.7, .2, .1])
    ty, _, tp, _ = Population(tuple(prior), 1.0).draw(8000, np.random.default_rng(9))
    def reached(offset): return float(label_scores(confusion_matrix(ty, (np.log(tp) + offset).argmax(1), 3))['macro_f1'])
    best = max(reached(-w * np.log(prior)) for w in np.linspace(0, 1, 21))
    for seed in range(6):
        y, _, p, _ = Population(tuple(prior), 1.0).draw(40, np.random.default_rng(seed))
        assert reached(fit_rule(p, y, prior, 'macro_f1')[0]) > best - 0.015


def test_a_class_with_few_rows_is_in_every_set_and_that_is_known():
    y, p = sharp(200, 5)
    keep = np.concatenate([np.flatnonzero(y == 0), np.flatnonzero(y == 1), np.flatnonzero(y == 2)[:8]])
    made = fit_calibration(p[keep], y[keep], [.6, .25, .15])
    assert made.always_in_sets == [2] and made.rows_for_sets == 9 and made.prediction_sets(made.apply(p)[1])[:, 2].all()
    more = fit_calibration(np.concatenate([p[keep], p[y == 2][8:9]]), np.concatenate([y[keep], [2]]), [.6, .25, .15])
    assert more.always_in_sets == [] and not more.prediction_sets(more.apply(p)[1])[:, 2].all()
