"""What `predict --prior estimate` gives on a run's held-out test rows, resampled to other class shares.

    python benchmarks/shares.py RUN --label smile
"""
import argparse
from pathlib import Path

import numpy as np

from fastsmile.metrics.calibration import Calibration, calibration_from_metadata
from fastsmile.metrics.predictions import SavedPredictions, read_model_metadata, read_saved_predictions
from fastsmile.metrics.scores import confusion_matrix, label_scores
from fastsmile.metrics.shares import calibration_for_shares, estimate_shares, move_probabilities, shares_factor

SCORES = ('accuracy', 'balanced_accuracy', 'macro_f1')


def resample(y: np.ndarray, c: int, n: int, share: float, rng: np.random.Generator) -> np.ndarray: # (n,) rows
    "Rows of which `share` are of class `c`, each row once"
    own = round(n * share)
    parts = (np.flatnonzero(y == c), own), (np.flatnonzero(y != c), n - own)
    return np.concatenate([rng.choice(rows, k, replace=False) for rows, k in parts])


def measure(test: SavedPredictions, rows: np.ndarray, prior: np.ndarray, made: Calibration, c: int) -> list[float]:
    "Estimate, interval, method, then the scores before and after, with argmax and with the model's rule"
    y, p = test.y[rows], test.probs[rows]
    e = estimate_shares(p, prior, made)
    moved = move_probabilities(p, shares_factor(made, prior, e.shares))
    there, out = calibration_for_shares(made, e.shares, moved), [e.shares[c], e.low[c], e.high[c], e.method == 'em']
    for rule in ('argmax', made.rule):
        for calibration, probs in ((made, p), (there, moved)):
            cm = confusion_matrix(y, calibration.apply(probs, rule)[0], len(prior))
            out += [float(label_scores(cm, [s])[s]) for s in SCORES]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path)
    parser.add_argument('--label', required=True, help='the class whose share is varied')
    parser.add_argument('--images', type=int, nargs='+', default=[100, 400])
    parser.add_argument('--draws', type=int, default=100)
    o = parser.parse_args()
    own, test = read_model_metadata(o.run), read_saved_predictions(o.run, 'test')
    made, prior, c = calibration_from_metadata(own), np.array(own['prior']), list(test.classes).index(o.label)
    print(f'{o.run.name}: {prior[c]:.0%} {o.label} in training, temperature {made.temperature:.2f}, calib '
          f'{sum(made.calib_rows)} rows, test {len(test.y)} rows; scores before > after\n')
    names = [f'{rule}: {s}' for rule in ('argmax', made.rule) for s in SCORES]
    print(f'| images | {o.label} | estimate | mean interval | holds it | EM inside | {" | ".join(names)} |')
    print('|---' * (6 + len(names)) + '|')
    rng = np.random.default_rng(0)
    for n in o.images:
        for share in (.1, .3, .5, .9):
            draws = [measure(test, resample(test.y, c, n, share, rng), prior, made, c) for _ in range(o.draws)]
            found, m = np.array(draws), np.mean(draws, 0)
            holds, k = ((found[:, 1] <= share) & (share <= found[:, 2])).mean(), len(SCORES)
            before, after = [*m[4:4 + k], *m[4 + 2 * k:4 + 3 * k]], [*m[4 + k:4 + 2 * k], *m[4 + 3 * k:]]
            cells = ' | '.join(f'{a:.3f} > {b:.3f}' for a, b in zip(before, after))
            print(f'| {n} | {share:.0%} | {m[0]:.1%} | {m[1]:.0%} to {m[2]:.0%} | {holds:.0%} | {m[3]:.0%} | {cells} |')


if __name__ == '__main__': main()
