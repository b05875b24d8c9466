"""Report 5's size in its own layout: one raw array of 116,157 pictures of 56 x 56 with labels in a file.

    python benchmarks/arrays.py --out DIR                   draw it (1.1 GB on disk), audit it, train an epoch of B1
    python benchmarks/arrays.py --out DIR --rows 5000       smaller, to try the script

The array is drawn: faces in two kinds of smile, which stand for the hidden property. Planted are the report's flaws: 254 pictures twice,
9 of them with both labels. Each command is a process of its own; its wall time, its processor time (with that of the processes it starts) and its
peak memory are printed, and the duplicates that the audit names are compared with those that were planted.
"""
import argparse
import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from fastsmile.data.sample import draw_face, random_face_params

ROWS, TWICE, BOTH, SIDE = 116_157, 254, 9, 56
KINDS = ('negative smile', 'positive smile')


def drawn(part: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]: # (n, 56, 56, 3), (n,)
    "The pictures of a part, from its own generator"
    start, end, seed = part
    rng = np.random.default_rng((seed, start))
    labels = rng.integers(0, 2, end - start)
    return np.stack([np.asarray(draw_face(random_face_params(rng, KINDS[y]), SIDE, rng)) for y in labels]), labels


def draw(out: Path, rows: int, seed: int):
    "faces.npy and labels.npy, with pictures that stand twice"
    twice, both = (max(1, round(rows * n / ROWS)) for n in (TWICE, BOTH))
    single = rows - twice
    parts = [(i, min(i + 1000, single), seed) for i in range(0, single, 1000)]
    faces, labels = np.lib.format.open_memmap(out/'faces.npy', 'w+', np.uint8, (rows, SIDE, SIDE, 3)), np.empty(rows, int)
    with mp.get_context('spawn').Pool() as pool:
        for (a, b, _), (x, y) in zip(parts, pool.imap(drawn, parts)): faces[a:b], labels[a:b] = x, y
    of = np.random.default_rng(seed).choice(single, twice, replace=False)
    faces[single:], labels[single:] = faces[of], labels[of]
    labels[single:single + both] = 1 - labels[single:single + both]
    faces.flush()
    np.save(out/'labels.npy', labels)
    (out/'planted.json').write_text(json.dumps(dict(rows=rows, twice=twice, both=both)))


def measured(command: list[str], cwd: Path) -> tuple[float, float, float]: # seconds of the clock, of the processor, MiB
    "A command in a process of its own"
    start = time.perf_counter()
    p = subprocess.Popen([sys.executable, '-m', 'fastsmile', *command], cwd=cwd, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(p.pid, 0)
    if status: sys.exit(f'{command} ended with {status}')
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder of the array and of the runs')
    p.add_argument('--rows', type=int, default=ROWS)
    p.add_argument('--epochs', type=int, default=1)
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if not (a.out/'planted.json').exists(): draw(a.out, a.rows, a.seed)
    planted = json.loads((a.out/'planted.json').read_text())
    source = ['faces.npy', '--labels', 'labels.npy']
    for name, command in (('audit', ['audit', *source, '--out', 'audit']),
                          ('fit', ['fit', *source, '--recipe', 'cnn-b1', '--epochs', str(a.epochs), '--out', 'fit', '--tta', 'none'])):
        seconds, used, mib = measured(command, a.out)
        print(f'{name}: {planted["rows"]:,} rows, {seconds:.0f} s, {used:.0f} s of the processor, at most {mib:,.0f} MiB', flush=True)
    found = {f['kind']: f['count'] for f in json.loads((a.out/'audit'/'audit.json').read_text())['findings']}
    print(f'planted: {planted["twice"]} pictures twice, {planted["both"]} of them with both labels; found: {found}')
    metrics = json.loads((a.out/'fit'/'metrics.json').read_text())['test']
    m = metrics['balanced_accuracy']
    print(f'B1 after {a.epochs} epoch(s): balanced accuracy {m["value"]:.3f} ({m["low"]:.3f} to {m["high"]:.3f}) on {metrics["rows"]:,} test rows')


if __name__ == '__main__': main()
