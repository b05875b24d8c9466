"""How often the 95% intervals of each score hold the truth, on drawn test sets.

    python benchmarks/coverage.py                        all populations and sizes; writes benchmarks/coverage.csv
    python benchmarks/coverage.py --bootstrap            the percentile bootstrap instead, which this replaced
    python benchmarks/coverage.py --only 'persons*'      some of the populations
    python benchmarks/coverage.py --tables               the figures so far, as Markdown
"""
import argparse
import fnmatch
from pathlib import Path

import pandas as pd

from fastsmile.core.files import write_text
from fastsmile.metrics.coverage import Population, bootstrap_spans, coverage, formula_spans, true_scores

POPULATIONS = {
    '70/20/10, very good': Population((.7, .2, .1), 2.5), '70/20/10, good': Population((.7, .2, .1), 2.0),
    '70/20/10, weak': Population((.7, .2, .1), 1.2), '50/50, very good': Population((.5, .5), 2.2),
    '50/50, weak': Population((.5, .5), 1.0), '70/30, good': Population((.7, .3), 1.6),
    '90/10, good': Population((.9, .1), 2.0), 'five classes': Population((.3, .25, .2, .15, .1), 2.0),
    'persons of 5, 70/30': Population((.7, .3), 1.6, 5, .5), 'persons of 10, 70/20/10': Population((.7, .2, .1), 2.0, 10, .5)}
SCORES = ['accuracy', 'balanced_accuracy', 'macro_f1', 'auc', 'log_loss', 'ece']


def tables(out: Path):
    "Coverage of the main scores as Markdown"
    for method, part in pd.read_csv(out).groupby('method', sort=False):
        wide = part[part.score.isin(SCORES)].pivot_table(index=['population', 'rows'], columns='score', values='covered', sort=False)
        print(f'\n{method}\n\n| population | rows | {" | ".join(SCORES)} |\n|{"---|" * (len(SCORES) + 2)}')
        for (name, rows), line in wide[SCORES].iterrows():
            print(f'| {name} | {rows:,} | {" | ".join(f"{v:.3f}" for v in line)} |')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='*', help='populations, with wildcards')
    p.add_argument('--rows', default='50,100,200,500,1000', help='sizes of the test sets')
    p.add_argument('--trials', type=int, default=1000)
    p.add_argument('--truth', type=int, default=1_000_000, help='rows from which the truth is measured')
    p.add_argument('--bootstrap', action='store_true')
    p.add_argument('--out', type=Path, default=Path(__file__).with_name('coverage.csv'))
    p.add_argument('--tables', action='store_true')
    a = p.parse_args()
    if a.tables: return tables(a.out)
    method, spans = ('bootstrap', bootstrap_spans) if a.bootstrap else ('formulas', formula_spans)
    for name, population in POPULATIONS.items():
        if not fnmatch.fnmatch(name, a.only): continue
        truth = true_scores(population, a.truth)
        for n in map(int, a.rows.split(',')):
            if n < 10 * population.rows_per_person: continue  # ten persons at least
            found = pd.DataFrame(coverage(population, n, a.trials, spans, truth)).round(4)
            found = found.assign(population=name, method=method, truth=[round(truth[0][s], 4) for s in found.score])
            old = pd.read_csv(a.out) if a.out.exists() else pd.DataFrame(columns=found.columns)
            same = (old.population == name) & (old.rows == n) & (old.method == method)
            write_text(a.out, pd.concat([old[~same], found]).to_csv(index=False))
            print(name, n, dict(zip(found.score, found.covered)), flush=True)


if __name__ == '__main__': main()
