"What training sees over epochs: every row in turn, the rarest not too often, the same after a resume."
import numpy as np
import pytest

from fastsmile.training.balance import make_epoch_sampler, permuted_rows, plan_balance

EMOTIONS = np.repeat(np.arange(8), [566, 463, 36, 26, 22, 10, 2, 1])


def counts(sampler, epochs, n): return sum(np.bincount(sampler.rows_of_epoch(e), minlength=n) for e in epochs)


@pytest.mark.parametrize('balance', ['none', 'weighted', 'oversample', 'undersample', 'both:30', 'augment:40'])
@pytest.mark.parametrize('labels', [EMOTIONS, np.repeat([0, 1, 2], [70, 20, 10]), np.array([0, 0, 2]), np.repeat([0, 3], [1, 50])])
def test_rows_of_a_class_take_turns(balance, labels):
    "After any epoch no row is more than one sample ahead of another of its class; two where one begins in the middle"
    sampler = make_epoch_sampler(labels, 8, balance, seed=3)
    for first in (0, 5):
        seen = np.zeros(len(labels), int)
        for epoch in range(first, first + 6):
            rows = sampler.rows_of_epoch(epoch)
            assert (np.bincount(labels[rows], minlength=8) == sampler.rows_per_class).all()
            seen += np.bincount(rows, minlength=len(labels))
            for c in np.unique(labels): assert np.ptp(seen[labels == c]) <= (1 if first == 0 else 2)


def test_five_epochs_of_weighted_leave_nothing_unseen():
    "The largest class, of which an epoch takes a quarter: sampled anew, 24% of it was never seen in five"
    labels = np.repeat(np.arange(4), [400, 30, 30, 30])
    sampler = make_epoch_sampler(labels, 4, 'both:100', seed=0)
    assert (counts(sampler, range(4), len(labels))[labels == 0] == 1).all() and counts(sampler, range(5), len(labels)).min() >= 1
    rng = np.random.default_rng(0)
    anew = {row for _ in range(5) for row in rng.permutation(400)[:100]}
    assert 0.18 < 1 - len(anew) / 400 < 0.30


def test_weighted_repeats_no_row_more_than_ten_times_and_keeps_the_size_of_an_epoch():
    sampler = make_epoch_sampler(EMOTIONS, 8, 'weighted', seed=0)
    assert len(sampler) == len(EMOTIONS) and counts(sampler, [0], len(EMOTIONS)).max() == 10
    rows = np.bincount(EMOTIONS)
    capped = sampler.rows_per_class == 10 * rows
    assert capped.tolist() == [False] * 5 + [True] * 3 and np.ptp(sampler.rows_per_class[~capped]) <= 1
    plan = plan_balance(EMOTIONS, 8, 'weighted', seed=0)
    assert np.allclose(plan.implied_prior, sampler.rows_per_class / len(EMOTIONS))  # the way back knows what was sampled
    assert counts(make_epoch_sampler(EMOTIONS, 8, 'oversample', seed=0), [0], len(EMOTIONS)).max() == 566  # asked for in words


@pytest.mark.parametrize('rows', [[3], [5, 5, 5], [90, 1], [0, 7, 0], [1] * 40, [200, 1, 1, 1, 1], [1, 1000, 3, 0, 90]])
def test_equal_shares_add_up(rows):
    rows = np.array(rows)
    sampler = make_epoch_sampler(np.repeat(np.arange(len(rows)), rows), len(rows), 'weighted', 0)
    assert sampler.rows_per_class.sum() == rows.sum() and (sampler.rows_per_class <= 10 * rows).all()
    assert (sampler.rows_per_class[rows > 0] > 0).all()


def test_the_sequence_has_no_seams():
    rows = np.arange(11)
    whole = permuted_rows(rows, 0, 55, seed=1)
    assert (np.sort(whole.reshape(5, 11), 1) == rows).all() and len({tuple(p) for p in whole.reshape(5, 11).tolist()}) == 5
    for start in (0, 1, 10, 11, 12, 40):
        for count in (1, 5, 11, 15): assert (permuted_rows(rows, start, count, seed=1) == whole[start:start + count]).all()


def test_classes_and_seeds_have_sequences_of_their_own():
    labels = np.repeat([0, 1], 50)
    one, other = (make_epoch_sampler(labels, 2, 'none', seed) for seed in (1, 2))
    assert (one.rows_of_epoch(4) == make_epoch_sampler(labels, 2, 'none', 1).rows_of_epoch(4)).all()
    assert (one.rows_of_epoch(0) != other.rows_of_epoch(0)).any()
    a, b = (permuted_rows(np.arange(50), 0, 50, seed) for seed in (1, 2))
    assert (a != b).any()


@pytest.mark.parametrize('workers', [0, 2])
def test_a_resumed_loader_draws_what_an_unbroken_one_draws(data, tiny, tmp_path, workers):
    from dataclasses import replace

    from conftest import learner
    config = replace(tiny, workers=workers, balance='weighted', augment='none', bs=4)
    whole, resumed = (learner(data, config, tmp_path/name) for name in 'ab')
    def draw(learn):
        for _ in learn.dls.train: pass
        return learn.dls.train.last.tolist()
    drawn = [draw(whole) for _ in range(4)]
    resumed.dls.train.epoch = 2  # as the checkpoint's history says
    assert [draw(resumed) for _ in range(2)] == drawn[2:]
    train = data.rows[data.rows.split == 'train']
    seen = np.bincount(np.concatenate(drawn), minlength=len(train))
    largest = (train.label == train.label.value_counts().index[0]).to_numpy()
    assert np.ptp(seen[largest]) <= 1 and seen[largest].min() >= 1
