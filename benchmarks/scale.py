"""How cost grows from a thousand rows to a million: processor seconds and peak memory of each step, a process each.

    python benchmarks/scale.py steps                       # made rows, through the functions that real ones go through
    python benchmarks/scale.py decode --model runs/x       # real decoding: links to one set of drawn faces, in a folder and in a zip

Made rows are what a pass over the files leaves: facts, hashes and thumbnails, here at random, with one picture in a hundred a copy of
another (half of them with the same bytes), one in two hundred unreadable, three classes (70%, 20%, 10%) and people with ten pictures each.
`before` is the memory of the process with its made rows, `peak` the highest of the step, from the kernel (VmHWM, reset before the step).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

CLASSES = ('NOT smile', 'positive smile', 'negative smile')
SHARES = (.7, .2, .1)


def memory(which: str) -> float:
    "MiB of this process: VmRSS or VmHWM"
    return next(int(line.split()[1]) / 1024 for line in open('/proc/self/status') if line.startswith(which))


def measured(work) -> dict:
    "Seconds of the clock and of the processor, and memory, of a call"
    before = memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins here
    start, used = time.perf_counter(), time.process_time()
    said = work()
    return dict(seconds=time.perf_counter() - start, processor=time.process_time() - used, before=before, peak=memory('VmHWM'), said=said)


# made rows

def name_of(i: int) -> str: return f'faces/{i // 1000:04}/{i:07}.jpg'


def names_of(n: int) -> list[str]: return [name_of(i) for i in range(n)]


def made_source(n: int):
    "A labelled source of made rows"
    import pandas as pd
    from fastsmile.data.readers import FolderReader
    from fastsmile.data.source import Source
    rng = np.random.default_rng(0)
    people = [f'p{v}' for v in rng.integers(0, max(1, n // 10), n)]
    frame = pd.DataFrame(dict(path=names_of(n), label=np.array(CLASSES)[rng.choice(3, n, p=SHARES)], split='', group=people, reason=''), dtype=str)
    return Source('faces', 'csv', FolderReader('faces'), frame)


def made_scan(n: int):
    "What a pass over as many pictures would have left"
    import pandas as pd
    from fastsmile.data.scan import SCAN_COLUMNS, ScanResult
    rng = np.random.default_rng(1)
    copy = np.arange(n)
    twice = rng.choice(n, n // 100, replace=False)
    copy[twice] = rng.integers(0, n, len(twice))  # a copy of which
    hashes, thumbs = rng.integers(0, 2**64, (n, 1, 4), dtype=np.uint64)[copy], rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)[copy]
    hashes[twice[::2], 0, 0] ^= np.uint64(0b1011)  # half of them saved again
    own = copy.copy()
    own[twice[::2]] = twice[::2]
    error = np.where(rng.random(n) < 0.005, 'truncated', '')
    facts = pd.DataFrame(dict(error=error, digest=[f'{v:032x}' for v in own], bytes=20_000, width=64, height=64, mode='RGB', format='JPEG',
                              mean=rng.normal(120, 20, n), spread=rng.normal(50, 8, n).clip(10), low=20., high=220., sharpness=rng.normal(.5, .1, n).clip(.2),
                              cb=128., cr=130., chroma=2.), index=pd.Index(names_of(n), dtype=object))[SCAN_COLUMNS]
    return ScanResult(facts, hashes, thumbs)


def looked_at(n: int):
    "A made source after the audit"
    import fastsmile.data.audit
    from fastsmile.config.fit import FitConfig
    source, seen = made_source(n), made_scan(n)
    fastsmile.data.audit.scan_images = lambda *a, **k: seen  # everything but the decoding is real
    return lambda: fastsmile.data.audit.run_audit(source, FitConfig())


def made_rows(n: int):
    "Rows of predictions, one by one"
    rng = np.random.default_rng(2)
    for at in range(0, n, 10_000):
        for i, p in enumerate(rng.dirichlet((4, 2, 1), min(10_000, n - at)).tolist(), at):
            yield dict(path=name_of(i), label=CLASSES[p.index(max(p))], confidence=max(p), **{f'p_{c}': v for c, v in zip(CLASSES, p)}, error='')


def made_saved(n: int):
    "Predictions whose classes are known"
    from fastsmile.metrics.predictions import predictions_from_table
    rng, frame = np.random.default_rng(3), made_source(n).frame
    true = frame.label.map(CLASSES.index).to_numpy()
    p = rng.dirichlet((2, 1, 1), n)
    p[np.arange(n), true] += 1
    p /= p.sum(1, keepdims=True)
    cells = {f'p_{c}': p[:, i] for i, c in enumerate(CLASSES)}
    return predictions_from_table(frame.assign(target=frame.label, label=np.array(CLASSES)[p.argmax(1)], confidence=p.max(1), error='', **cells), CLASSES)


# the steps: each makes its rows, and returns what is measured

def listing(n: int):
    "the names of a folder, sorted on disk"
    from fastsmile.inference.inputs import external_sort
    return lambda: sum(1 for _ in external_sort(map(name_of, range(n - 1, -1, -1)))[1])


def duplicates(n: int):
    "groups of copies, by bytes and by look"
    from fastsmile.data.duplicates import find_look_alikes
    seen = made_scan(n)
    return lambda: len(np.unique(find_look_alikes(seen, 16)[1]))


def audit(n: int):
    "all of the audit but decoding: copies, findings, plan"
    work = looked_at(n)
    return lambda: int((work().table.reason == '').sum())


def audit_files(n: int):
    "audit.json, plan.csv and table.csv"
    from fastsmile.data.audit import write_audit
    looked = looked_at(n)()
    return lambda: write_audit(looked, Path('audit'))


def split(n: int):
    "train, calib, valid and test, stratified, people on one side"
    from fastsmile.data.audit import split_audited
    from fastsmile.config.fit import FitConfig
    looked = looked_at(n)()
    return lambda: split_audited(looked, FitConfig()).rows.split.value_counts().to_dict()


def sheet(n: int):
    "predictions.csv, row by row"
    return lambda: written(n)


def resumed(n: int):
    "the same, gone on with at half its rows"
    written(n, stop=n // 2)
    return lambda: written(n)


def written(n: int, stop: int | None = None) -> int:
    from fastsmile.inference.outputs import PredictionFile
    columns = ['path', 'label', 'confidence', *(f'p_{c}' for c in CLASSES), 'error']
    with PredictionFile('predictions.csv', columns, CLASSES, dict(made=n), 64, resume=True) as out:
        left = out.remaining(map(name_of, range(n)))
        for name, row in zip(left, islice(made_rows(n), out.rows_resumed, stop)): out.add(row | dict(path=name))
        return out.counts.rows if stop else out.finish().rows


def gallery(n: int):
    "which thumbnails the page shows"
    from fastsmile.reports.html import pick_gallery_rows
    return lambda: sum(map(len, pick_gallery_rows(made_rows(n), CLASSES, 600).values()))


def metrics(n: int):
    "all metrics with 1,000 draws of the bootstrap by person"
    from fastsmile.metrics.calibration import unfitted_calibration
    from fastsmile.metrics.predictions import measure_predictions
    saved = made_saved(n)
    return lambda: measure_predictions(saved, unfitted_calibration(SHARES, 'argmax'))['macro_f1']


STEPS = dict(listing=listing, duplicates=duplicates, audit=audit, audit_files=audit_files, split=split, sheet=sheet, resumed=resumed, gallery=gallery,
             metrics=metrics)


def alone(*args) -> dict:
    "A measurement in a process and a folder of its own"
    with tempfile.TemporaryDirectory() as tmp:
        env = os.environ | dict(FASTSMILE_QUIET='1', PYTHONPATH=os.pathsep.join(map(os.path.abspath, filter(None, sys.path))))
        cmd = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "one", *map(str, args)]
        r = subprocess.run(cmd, capture_output=True, text=True, cwd=tmp, env=env)
        if r.returncode: sys.exit(r.stderr)
        return json.loads(r.stdout.splitlines()[-1])


def table(sizes: list[int], steps: list[str]):
    "A row for each step: seconds of the processor, which other work on the machine does not change much, and peak memory, for each size"
    print('| step | ' + ' | '.join(f'{n:,}' for n in sizes) + ' |')
    print('|---' * (len(sizes) + 1) + '|')
    for step in steps:
        cells = []
        for n in sizes:
            m = alone(step, n)
            cells.append(f'{m["processor"]:.2f} s, {m["peak"]:,.0f} MiB (+{max(0, m["peak"] - m["before"]):,.0f})')
            print(f'{step} {n:,}: {cells[-1]}, {m["seconds"]:.1f} s of the clock', file=sys.stderr, flush=True)
        print(f'| {STEPS[step].__doc__} | ' + ' | '.join(cells) + ' |', flush=True)


# real decoding

KINDS = ['folder', 'zip', 'ray']


def decode(model: str, sizes: list[int], kinds: list[str]):
    "Predictions of a folder of links, of a zip, and on a local Ray"
    from fastsmile.config.commands import SampleConfig
    from fastsmile.data.sample import sample
    with tempfile.TemporaryDirectory() as tmp:
        faces = sorted(p for p in (sample(Path(tmp)/'faces', SampleConfig(n=min(1000, max([60, *sizes]))))/'happy_images').iterdir())
        print('| pictures | from | seconds | pictures a second | peak memory |\n|---|---|---|---|---|')
        for n in sizes:
            folder, packed = Path(tmp)/f'{n}', Path(tmp)/f'{n}.zip'
            folder.mkdir()
            for i in range(n): os.link(faces[i % len(faces)], folder/f'{i:06}{faces[i % len(faces)].suffix}')
            subprocess.run([sys.executable, '-m', 'zipfile', '-c', packed, folder], check=True)
            ways = dict(folder=('folder', folder, {}), zip=('zip', packed, {}), ray=('folder, --ray local', folder, dict(ray='local')))
            for what, where, kw in [ways[k] for k in kinds if k != 'ray' or find_spec('ray')]:
                m = alone('predict', where, os.path.abspath(model), json.dumps(kw))
                print(f'| {n:,} | {what} | {m["said"]:.1f} | {n / m["said"]:,.0f} | {m["peak"]:,.0f} MiB |', flush=True)


def one(what: str, *args):
    "In the process that is measured"
    if what == 'predict':
        from fastsmile.config.commands import PredictConfig
        from fastsmile.runs.predict import predict
        where, model, kw = args
        m = measured(lambda: predict(where, PredictConfig(model=model, out='p.csv', overwrite=True, device='cpu',
                                                          precision='fp32', bs=64, **json.loads(kw))).seconds)
    else: m = measured(STEPS[what](int(args[0])))
    print(json.dumps(m, default=str))


def main():
    if sys.argv[1:2] == ['one']: return one(*sys.argv[2:])
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', choices=('steps', 'decode'))
    ap.add_argument('--rows', type=int, nargs='+')
    ap.add_argument('--steps', nargs='+', choices=STEPS, default=list(STEPS))
    ap.add_argument('--model', help='for decode: a run or a bundle')
    ap.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS, help='for decode: where the pictures are')
    args = ap.parse_args()
    if args.what == 'steps': table(args.rows or [10**3, 10**4, 10**5, 10**6], args.steps)
    else: decode(args.model, args.rows or [10**3, 10**4], args.kinds)


if __name__ == '__main__': main()
