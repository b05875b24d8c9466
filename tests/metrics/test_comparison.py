"Equal runs seldom look different: persons are swapped together, and several runs are counted"
import numpy as np
import pytest
from scipy.stats import binomtest

from fastsmile.metrics.comparison import holm_adjust, paired_test, permutation_test


def equal_runs(rng, runs, persons=60, rows=10):
    "Runs of one skill; each is right or wrong on most rows of a person at once"
    person = np.repeat(np.arange(persons), rows)
    skill = rng.beta(0.8, 0.4, (runs, persons))[:, person]
    return rng.random(skill.shape) < skill, person.astype(str)


def test_equal_runs_on_rows_of_persons_differ_at_the_rate_of_the_test():
    "McNemar's test, which takes rows as independent, sees a difference in many of them"
    rng, found, by_row, trials = np.random.default_rng(0), 0, 0, 400
    for _ in range(trials):
        (one, two), person = equal_runs(rng, 2)
        gain = two.astype(float) - one
        found += permutation_test(gain, person, 200) < 0.05
        only_one, only_two = int((gain < 0).sum()), int((gain > 0).sum())
        by_row += binomtest(only_one, only_one + only_two).pvalue < 0.05
    assert found / trials < 0.085 and by_row / trials > 0.3


def test_of_eight_equal_runs_one_seldom_looks_different():
    rng, holm, each, trials = np.random.default_rng(1), 0, 0, 150
    for _ in range(trials):
        (first, *others), person = equal_runs(rng, 8, persons=40, rows=3)
        p = [permutation_test(other.astype(float) - first, person, 400) for other in others]
        holm, each = holm + (min(holm_adjust(p)) < 0.05), each + (min(p) < 0.05)
    assert holm / trials < 0.08 and each / trials > 0.1


def test_a_difference_is_found():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 2, 600)
    one = np.where(rng.random(600) < 0.7, y, 1 - y)
    two = np.where((one != y) & (rng.random(600) < 0.3), y, one)
    person = [str(i // 10) for i in range(600)]
    test = paired_test(y, one, two, person)
    assert test['accuracy'] < 0.01 and test['balanced_accuracy'] < 0.01
    assert paired_test(y, two, one, person)['accuracy'] == test['accuracy'] and test['only_one'] == 0


def test_without_persons_it_is_mcnemars_exact_test():
    gain = np.array([1.] * 7 + [-1.] * 2 + [0.] * 91)
    assert permutation_test(gain) == pytest.approx(binomtest(2, 9).pvalue)  # 2**9 signs, all of them
    assert permutation_test(np.zeros(5)) == 1
    assert permutation_test(np.ones(30), draws=1000) == 1 / 1001


def test_holm_is_in_the_order_given_and_never_above_one():
    assert holm_adjust([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm_adjust([0.9, 0.8]) == [1, 1] and holm_adjust([0.02]) == [0.02]
