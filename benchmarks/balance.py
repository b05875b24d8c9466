"""How good a training is on people it has not seen, and what every way against imbalance is worth.

    python benchmarks/balance.py --list                     the parts, done and to do
    python benchmarks/balance.py --only 'scratch/*'         five person-grouped folds of smiles, the small network from random weights
    python benchmarks/balance.py --only 'mobilenet/*'       the same with mobilenetv2_100 and ImageNet weights
    python benchmarks/balance.py --only 'label3/*'          --balance all on the three-way label of smiles, for three seeds
    python benchmarks/balance.py --only 'emotions/*'        --balance all on the eight emotions, for three seeds
    python benchmarks/balance.py --tables                   the figures so far, as Markdown

Each part is one `fit`; its rows are appended to --out when it is done, and a part that has rows is not run again, so the
script may be stopped at any time and started once more. --minutes ends it after the part that is running by then.
The folds are disjoint: every picture is tested once, by a network that has seen neither it nor, where the person is
known, that person; the interval of the five together comes from drawing persons. In label3 and emotions the split is the
same for all ways (seed 42), and so is the budget: 32 pixels, and as many pictures as 5 epochs of the data show.
"""
import argparse
import fnmatch
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from fastsmile import FitConfig, Run, fit, load_run, read_source
from fastsmile.metrics.calibration import apply_temperature
from fastsmile.core.files import write_text
from fastsmile.metrics.intervals import score_intervals
from fastsmile.metrics.scores import estimate_scores
from fastsmile.config.fields import SourceOptions
from fastsmile.data.splits import stratified_group_split
from fastsmile.metrics.scores import MAIN_SCORES

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
SMALL = dict(arch='resnet10t', model_args='{"channels": [32, 64, 128, 256]}', weights='none', size=64, augment='light')
FOLDS, SEEDS, ENDS = 5, (1, 2, 3), (('', 'value'), ('_low', 'low'), ('_high', 'high'))


@dataclass(frozen=True)
class Part:
    "One training"
    name: str
    source: Path
    config: FitConfig


def smiles(data: Path, column: str) -> pd.DataFrame:
    "Path, label and person of the smiles that have a label"
    return read_source(data/'smiles.zip', SourceOptions(label_col=column, group_col='person')).kept[['path', 'label', 'group']]


def fold_parts(kind: str, base: dict, data: Path, work: Path) -> list[Part]:
    "A part for each fold: its people are test rows, the others are divided by `fit`"
    rows = smiles(data, 'label')
    fold = stratified_group_split(rows.label, rows.group, {k: 1 / FOLDS for k in range(FOLDS)}, seed=0)
    parts = []
    for k in range(FOLDS):
        table = rows.assign(split=['test' if f == k else '' for f in fold])
        write_text(work/f'fold{k}.csv', table.to_csv(index=False))
        options = dict(labels=str(work/f'fold{k}.csv'), label_col='label', group_col='group', split_col='split', test=0.0, valid=0.1, calib=0.05)
        parts.append(Part(f'{kind}/{k}', data/'smiles.zip', FitConfig(**base, **options, monitor='balanced_accuracy', tta='flip')))
    return parts


def way_parts(kind: str, source: Path, options: dict) -> list[Part]:
    "`--balance all` for each seed: every way under one budget, on one split"
    base = FitConfig(**SMALL | dict(size=32), **options, epochs=5, lr='0.003', tta='none', balance='all')
    return [Part(f'{kind}/all/{seed}', source, replace(base, train_seed=seed)) for seed in SEEDS]


def all_parts(data: Path, weights: Path, work: Path) -> list[Part]:
    mobile = dict(arch='mobilenetv2_100', weights=str(weights/'mobilenetv2_100.safetensors'), size=96, epochs=4, augment='light')
    emotions = dict(labels=str(data/'legend.csv'), label_col='emotion', group_from=r'(.+)_\d+')
    return [*fold_parts('scratch', SMALL | dict(epochs=10), data, work), *fold_parts('mobilenet', mobile, data, work),
            *way_parts('label3', data/'smiles.zip', dict(label_col='label3', group_col='person')),
            *way_parts('emotions', data/'facial_expressions.zip', emotions)]


def runs_of(part: Part, run: Run) -> list[tuple[str, Run]]:
    "The run, or those that it compared, with the names of their rows"
    if run.comparison is None: return [(part.name, run)]
    return [(part.name.replace('/all/', f'/{r.variant}/'), load_run(run.path/'fits'/r.folder)) for r in run.comparison.itertuples()]


def row_of(name: str, run: Run, seconds: float) -> dict:
    "What is written down of a run"
    row, m = dict(part=name, epochs=run.options.epochs, seconds=round(seconds, 1)), run.metrics
    for s in ('valid', 'test'):
        row |= {f'{s}_rows': m[s]['rows'], f'{s}_collapsed': m[s]['collapsed']} | {f'{s}_{k}': m[s][k]['value'] for k in ('log_loss', 'auc')}
        row |= {f'{s}_{k}{e}': m[s][k][v] for k in MAIN_SCORES for e, v in ENDS}
    row |= {f'ece_{when}': m['calibration'][when]['ece']['value'] for when in ('before', 'after')} | dict(temperature=m['calibration']['temperature'])
    return row | dict(torch=version('torch'), fastai=version('fastai'), machine=platform.machine(), date=time.strftime('%Y-%m-%d'))


def file_of(kept: Path, name: str) -> Path:
    "Where the test predictions of a part are kept"
    return kept/f"{name.replace('/', '-').replace(':', '-')}.csv"


def append(path: Path, row: dict):
    "One more row; the file is whole at any time"
    old = pd.read_csv(path) if path.exists() else pd.DataFrame()
    write_text(path, pd.concat([old, pd.DataFrame([row])]).to_csv(index=False))


def heading(*names) -> str:
    "The first two lines of a table"
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def fold_line(kind: str, rows: pd.DataFrame, kept: Path) -> str:
    "The folds of one network in one line: the mean, and all test rows together with persons drawn"
    b = rows.test_balanced_accuracy
    made = pd.concat([pd.read_csv(file_of(kept, r.part), keep_default_na=False).assign(temperature=r.temperature) for r in rows.itertuples()])
    columns = [c for c in made if c.startswith('p_')]
    y, pred = (made[c].map([c[2:] for c in columns].index).to_numpy() for c in ('target', 'label'))
    raw = made[columns].to_numpy(float)
    calibrated = np.concatenate([apply_temperature(raw[made.temperature == t], t) for t in made.temperature.unique()])
    cells, ones = [], np.ones((1, len(y)))
    for k, p in (('balanced_accuracy', raw), ('auc', raw), ('ece', raw), ('ece', calibrated)):
        low, high = score_intervals(y, pred, p, made.group).overall[k]
        cells.append(f'{estimate_scores(y, pred, p, ones)[0][k][0]:.4f} ({low:.4f} to {high:.4f})')
    return f'| {kind} | {len(rows)} | {b.mean():.4f} | {b.min():.4f} to {b.max():.4f} | {" | ".join(cells)} | {rows.ece_after.max():.4f} |'


def tables(out: Path, kept: Path):
    "Print what is there as Markdown"
    rows = pd.read_csv(out)
    kind = rows.part.str.split('/').str[0]
    print(heading('network', 'folds', 'mean balanced accuracy', 'over the folds', 'all rows together (95%)', 'AUC', 'calibration error', 'after temperature',
                  'in the worst fold'))
    for k in ('scratch', 'mobilenet'):
        if (kind == k).any(): print(fold_line(k, rows[kind == k], kept))
    for k in ('label3', 'emotions'):
        part = rows[kind == k].assign(way=lambda r: r.part.str.split('/').str[1])
        if part.empty: continue
        print(f'\n{k}: mean (lowest to highest) over the seeds, on test\n')
        print(heading('--balance', 'fits', 'epochs', 'balanced accuracy', 'macro F1', 'accuracy', 'log loss', 'calibration error, after temperature'))
        for way, g in part.groupby('way', sort=False):
            def cell(v): return f'{v.mean():.3f}' + (f' ({v.min():.3f} to {v.max():.3f})' if len(v) > 1 else '')
            cells = [cell(g[c]) for c in ('test_balanced_accuracy', 'test_macro_f1', 'test_accuracy')]
            errors = f'{g.ece_before.mean():.3f}, {g.ece_after.mean():.3f}'
            print(f"| `{way}` | {len(g)} | {g.epochs.iloc[0]} | {' | '.join(cells)} | {g.test_log_loss.mean():.3f} | {errors} |")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='*', help="parts to run, with wildcards: 'scratch/*', 'label3/weighted/1'")
    p.add_argument('--out', type=Path, default=Path(__file__).with_name('balance.csv'))
    p.add_argument('--data', type=Path, default=SHARED/'data')
    p.add_argument('--weights', type=Path, default=SHARED/'weights')
    p.add_argument('--minutes', type=float, default=1e9, help='begin no part after so many minutes')
    p.add_argument('--epochs', type=int, help='other epochs than planned, to try the script')
    p.add_argument('--list', action='store_true')
    p.add_argument('--tables', action='store_true')
    a = p.parse_args()
    kept, end = a.out.with_suffix(''), time.time() + 60 * a.minutes
    if a.tables: return tables(a.out, kept)
    done = set(pd.read_csv(a.out).part) if a.out.exists() else set()
    with tempfile.TemporaryDirectory() as work:
        for part in all_parts(a.data, a.weights, Path(work)):
            if not fnmatch.fnmatch(part.name, a.only): continue
            there = part.name.replace('/all/', '/none/') in done
            if a.list or there or time.time() > end:
                print(part.name, f'{part.config.epochs} epochs', 'done' if there else 'to do')
                continue
            config = replace(part.config, out=str(Path(work)/part.name.replace('/', '-')), **({'epochs': a.epochs} if a.epochs else {}))
            start = time.time()
            made = runs_of(part, fit(part.source, config))
            seconds = (time.time() - start) / len(made)
            for name, run in made:
                write_text(file_of(kept, name), pd.read_csv(run.path/'predictions_test.csv', keep_default_na=False).to_csv(index=False))
                append(a.out, row_of(name, run, seconds))
                print(name, f"balanced accuracy {run.metrics['test']['balanced_accuracy']['value']:.4f}", flush=True)


if __name__ == '__main__': main()
