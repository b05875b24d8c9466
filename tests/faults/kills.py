"""Kill commands at moments drawn from a seed, look at what they left, go on, and compare with a command that nobody killed.

    python tests/faults/kills.py                              # 50 kills over audit, fit, predict and export
    python tests/faults/kills.py --command predict --kills 20 --seed 7
    python tests/faults/kills.py --keep /tmp/kills            # folders of failures stay there

The process group gets SIGKILL: at a moment anywhere in the time that the unbroken command took, or in the last part of it, or as soon as
the folder has changed a drawn number of times (files are written and renamed within milliseconds; this meets them). Afterwards every file
is whole or absent; what `atomic` and `predict` leave under temporary names is allowed. Then the command is given again (`fit` and `predict`
with --resume where there is something to go on with), has to end well, to clear what was temporary, and to give what the unbroken one gave.
"""
import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from forked import Program  # noqa: E402

TINY = '--arch resnet10t --weights none --size 32 --bs 16 --lr 0.005 --tta none'.split() + ['--model-args', '{"channels": [8, 16, 32, 64]}']
TIMES = ('seconds', 'images_per_second', 'memory')  # columns of history.csv that no two runs share
LIMIT = 180  # seconds that a command may take


def environment() -> dict:
    "One thread, no talk kept back"
    return {k: v for k, v in os.environ.items() if k != 'FASTSMILE_QUIET'} | dict(OMP_NUM_THREADS='1', COLUMNS='200')


def start(args) -> Program:
    "A command in a process group of its own, on which Ctrl-C works"
    return Program(['-m', 'fastsmile', *args], env=environment())


def shell(*args) -> tuple[int, str]: # exit code, what was said
    "A command to its end; one that does not end in time is an error"
    p = start(args)
    try: out, err = p.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        return -1, f'not at its end after {LIMIT} s: ' + p.communicate()[1]
    return p.returncode, out + err


# whole or absent

def read_csv(path: Path):
    rows = list(csv.reader(path.open(newline='', encoding='utf-8', errors='surrogateescape')))
    assert rows and len({len(r) for r in rows}) == 1, 'rows of different lengths'
    assert path.read_bytes().endswith(b'\n'), 'no newline at the end'


def read_safetensors(path: Path):
    from safetensors import safe_open
    with safe_open(path, 'np') as f:
        for k in f.keys(): f.get_tensor(k)  # noqa: SIM118


def read_picture(path: Path):
    from PIL import Image
    with Image.open(path) as img: img.load()


def read_page(path: Path): assert path.read_text(encoding='utf-8').rstrip().endswith('</html>'), 'the page does not end'


def read_onnx(path: Path):
    import onnx
    onnx.checker.check_model(onnx.load(path))


READERS = {'.json': lambda p: json.loads(p.read_text(encoding='utf-8')), '.toml': lambda p: tomllib.loads(p.read_text(encoding='utf-8')),
           '.csv': read_csv, '.safetensors': read_safetensors, '.png': read_picture,
           '.jpg': read_picture, '.html': read_page, '.onnx': read_onnx, '.npz': lambda p: dict(np.load(p)), '.npy': np.load,
           '.txt': lambda p: p.read_text(encoding='utf-8'), '.md': lambda p: p.read_text(encoding='utf-8').index('\n---\n', 4)}


def temporary(path: Path) -> bool:
    "What may be left by a process that was killed"
    return path.name == '.lock' or path.name.endswith('.part') or any(p.startswith('.fastsmile-') for p in path.parts)


def broken(folder: Path) -> list[str]:
    "Every file below that is neither whole nor temporary"
    out = []
    for path in sorted(p for p in folder.rglob('*') if p.is_file() and not temporary(p)):
        try: READERS[path.suffix](path)
        except Exception as e: out.append(f'{path.relative_to(folder)}: {type(e).__name__}: {e}')
    return out


# the commands

@dataclass
class Case:
    "A command, how it goes on, and what it makes"
    there: Path  # faces, new, run

    def args(self, out: Path) -> list: raise NotImplementedError
    def again(self, out: Path) -> list: return self.args(out)
    def finished(self, out: Path) -> bool: return False  # does it refuse to be given again, because all is there?
    def made(self, out: Path) -> dict: raise NotImplementedError # name -> what must be the same


class Audit(Case):
    def args(self, out): return ['audit', self.there/'faces', '--out', out/'audit']
    def finished(self, out): return (out/'audit'/'audit.html').exists() and not (out/'audit'/'.lock').exists()

    def made(self, out):
        return {p.name: p.read_text().replace(str(out), 'OUT') for p in (out/'audit').iterdir()}


class Fit(Case):
    def args(self, out): return ['fit', self.there/'faces', *TINY, '--epochs', 5, '--seed', 1, '--out', out/'run']
    def again(self, out): return ['fit', '--resume', out/'run'] if (out/'run'/'config.json').exists() else self.args(out)
    def finished(self, out): return (out/'run'/'config.json').exists() and json.loads((out/'run'/'config.json').read_text())['status'] == 'finished'

    def made(self, out):
        import pandas as pd
        from safetensors.numpy import load_file
        run, history = out/'run', pd.read_csv(out/'run'/'history.csv')
        files = {p.name: p.read_text() for p in run.glob('*.csv') if p.name != 'history.csv'} | dict(metrics=(run/'metrics.json').read_text())
        return files | dict(history=history.drop(columns=[c for c in TIMES if c in history]).to_csv(),
                            status=json.loads((run/'config.json').read_text())['status'],
                            weights={k: v.tobytes() for k, v in load_file(run/'model'/'model.safetensors').items()},
                            names=sorted(str(p.relative_to(run)) for p in run.rglob('*') if not p.name.startswith('events')))


class Predict(Case):
    def args(self, out):
        return ['predict', self.there/'new', '--model', self.there/'run', '--bs', 8, '--workers', 2, '--out', out/'p.csv', '--html', out/'g.html']

    def again(self, out): return [*self.args(out), '--resume']
    def made(self, out): return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix != '.html'} | dict(page=(out/'g.html').exists())


class Export(Case):
    def args(self, out): return ['export', self.there/'run', '--out', out/'m.onnx']

    def made(self, out):
        import onnxruntime as ort
        session = ort.InferenceSession(out/'m.onnx', providers=['CPUExecutionProvider'])
        x = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
        return dict(said=session.run(None, {session.get_inputs()[0].name: x})[0].tobytes(), about=session.get_modelmeta().custom_metadata_map,
                    names=[p.name for p in out.iterdir()])


CASES = dict(audit=Audit, fit=Fit, predict=Predict, export=Export)
SHARES = dict(fit=0.24, predict=0.36, audit=0.24, export=0.16)


def prepare(there: Path, faces: int = 120, new: int = 400) -> Path:
    "Faces, pictures to predict, and a run"
    from fastsmile.config.commands import SampleConfig
    from fastsmile.data.sample import sample
    there.mkdir(parents=True, exist_ok=True)
    sample(there/'faces', SampleConfig(n=faces))
    pictures = sorted((there/'faces'/'happy_images').iterdir())
    (there/'new').mkdir()
    for i in range(new): shutil.copy(pictures[i % len(pictures)], there/'new'/f'{i:04}.jpg')
    code, said = shell('fit', there/'faces', *TINY, '--epochs', 1, '--out', there/'run')
    assert code == 0, said
    return there


# killing

def names(folder: Path) -> frozenset: return frozenset(os.path.join(d, f) for d, _, files in os.walk(folder) for f in files)


@dataclass
class Whole:
    "The unbroken command"
    seconds: float
    changes: int  # how often the names in its folder changed
    made: dict


def unbroken(case: Case, out: Path) -> Whole:
    "Run a command to its end, and watch its folder"
    out.mkdir(parents=True)
    begun, p, seen, changes = time.perf_counter(), start(case.args(out)), names(out), 0
    while p.poll() is None:
        if (now := names(out)) != seen: seen, changes = now, changes + 1
        time.sleep(0.0005)
    seconds, (_, err) = time.perf_counter() - begun, p.communicate()
    assert p.returncode == 0, err
    assert not broken(out), broken(out)
    return Whole(seconds, changes, case.made(out))


def moment(whole: Whole, rng: random.Random) -> tuple[str, float]:
    "When to kill: after seconds, or after changes of the folder"
    how = rng.choice(('any', 'end', 'change', 'change'))
    if how == 'change' and whole.changes: return how, rng.randint(1, whole.changes)
    return how, whole.seconds * (rng.uniform(0.7, 1) if how == 'end' else rng.uniform(0, 1))


def kill(case: Case, out: Path, how: str, at: float) -> bool: # was it still there?
    "Start a command and kill its process group"
    out.mkdir(parents=True)
    begun, p, seen, changes = time.perf_counter(), start(case.args(out)), names(out), 0
    while p.poll() is None:
        if how == 'change':
            if (now := names(out)) != seen: seen, changes = now, changes + 1
            if changes >= at: break
        elif time.perf_counter() - begun >= at: break
        time.sleep(0.0002)
    alive = p.poll() is None
    if alive: os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    return alive


def attempt(case: Case, whole: Whole, out: Path, how: str, at: float) -> tuple[list[str], Counter]: # what is wrong; what was seen
    "Kill, look, go on, compare"
    seen = Counter(killed=int(kill(case, out, how, at)))
    bad, left = broken(out), [p for p in out.rglob('*') if temporary(p)]
    seen['left something temporary'] += any(p.name.startswith('.fastsmile-') for p in left)
    args, there = case.again(out), case.finished(out)
    seen['had finished'] += there
    seen['went on'] += not there and '--resume' in args
    code, said = shell(*args)
    if there and (code != 1 or 'is finished' not in said and 'is not empty' not in said): bad.append(f'finished, but: {said[-600:]}')
    if not there and code: return [*bad, f'exit code {code} when it went on: {said[-600:]}'], seen
    bad += broken(out) + [f'{p.relative_to(out)} is left' for p in out.rglob('*') if temporary(p)]
    made = case.made(out)
    return bad + [f'{k} differs' for k in whole.made.keys() | made.keys() if whole.made.get(k) != made.get(k)], seen


def kills(name: str, n: int, seed: int, there: Path, keep: Path | None = None) -> list[str]: # failures
    "Kill one command so many times; says what was seen"
    case, rng, bad, total, begun = CASES[name](there), random.Random(f'{name} {seed}'), [], Counter(), time.perf_counter()
    whole = unbroken(case, there/f'{name}-whole')
    i = 0
    while total['killed'] < n and i < 4 * n:
        out, (how, at) = there/f'{name}-{i}', moment(whole, rng)
        found, seen = attempt(case, whole, out, how, at)
        total += seen
        bad += [f'{name}, kill {i} of seed {seed} ({how} {at:.3f}): {b}' for b in found]
        if found and keep: shutil.copytree(out, keep/out.name, dirs_exist_ok=True)
        shutil.rmtree(out)
        i += 1
    print(f'{name}: {i} attempts of seed {seed}, unbroken {whole.seconds:.1f} s and {whole.changes} changes; ' +
          ', '.join(f'{k} {v}' for k, v in total.items()) + f'; {len(bad)} failures, {time.perf_counter() - begun:.0f} s', flush=True)
    return bad


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--command', choices=CASES)
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--keep', type=Path, help='folder for what failures left')
    a = p.parse_args()
    each = {a.command: a.kills} if a.command else {k: round(a.kills * v) for k, v in SHARES.items()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ['FASTSMILE_CACHE'] = f'{folder}/cache'
        there = prepare(Path(folder)/'there')
        bad = [b for name, n in each.items() for b in kills(name, n, a.seed, there, a.keep)]
    print('\n'.join(bad))
    sys.exit(bool(bad))


if __name__ == '__main__': main()
