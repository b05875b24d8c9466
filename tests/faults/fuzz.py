"""Spoil files that are right, and feed them to everything that reads files of strangers.

    python tests/faults/fuzz.py                           # every target, 200 cases each
    python tests/faults/fuzz.py --cases 15000             # the full count: over 100,000 in all
    python tests/faults/fuzz.py --target decoder --cases 5000 --seed 7
    python tests/faults/fuzz.py --target decoder --atheris --cases 100000     # guided by what it reaches; needs atheris

A case is a seed file with bytes changed, cut, doubled, or replaced by what often breaks readers. An exception that is no
`SmileError`, a case that takes over 5 s, or a process over --mib of memory is a failure; its case is written to --keep and named
with the seed that makes it again.
"""
import argparse
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS  # noqa: E402

TOKENS = (b'\0', b'\xff', b'\n', b'"', b"'", b',', b';', b'\t', b'../', b'/', b'NaN', b'Infinity', b'-1', b'0', b'1e999', b'99999999999999',
          b'{', b'}', b'[', b']', b'null', b'true', b'\xff\xff\xff\xff', b'\x7f\xff\xff\xff', b'\x80\0\0\0', b'\0' * 64, b'A' * 300,
          '\u202e'.encode(), b'\xed\xa0\x80', b'=cmd()', b'\x1b[2J')


def spoil(data: bytes, rng: random.Random) -> bytes:
    "One to eight things wrong"
    b = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at, n = rng.randrange(len(b) + 1), rng.choice((1, 2, 4, 16, 200))
        how = rng.randrange(7)
        if how == 0 and b: b[at % len(b)] = rng.randrange(256)
        elif how == 1 and b: b[at % len(b)] ^= 1 << rng.randrange(8)
        elif how == 2: del b[at:at + n]
        elif how == 3: b[at:at] = rng.choice(TOKENS)
        elif how == 4: b[at:at + n] = rng.choice(TOKENS)
        elif how == 5: b[at:at] = b[at:at + n]
        else: del b[at:]
    return bytes(b)


def case(target, seed: int) -> bytes:
    "The same seed is the same case"
    rng = random.Random(seed)
    return spoil(rng.choice(target.seeds), rng)


def memory() -> float:
    "The most memory so far, MiB"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(name: str, cases: int, seed: int, mib: float, keep: Path | None = None) -> list[str]: # failures
    "Feed a target"
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        target = TARGETS[name](Path(folder))
        for s in target.seeds: target(s)
        base = memory()
        for i in range(seed, seed + cases):
            data, start = case(target, i), time.perf_counter()
            try:
                target(data)
                why = ''
            except Exception as e: why = f'{type(e).__name__}: {str(e)[:150]!r}'
            if (took := time.perf_counter() - start) > 5: why = why or f'{took:.1f} s'
            if memory() - base > mib: why, base = why or f'{memory() - base:.0f} MiB', memory()
            if not why: continue
            bad.append(f'{name}, seed {i}: {why}')
            if keep: (keep/f'{name}-{i}').write_bytes(data)
    return bad


def guided(name: str, cases: int):
    "The same with atheris, which keeps what reaches new code"
    import atheris
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as corpus:
        with atheris.instrument_imports(include=['fastsmile', 'PIL', 'zipfile', 'csv']):
            target = TARGETS[name](Path(folder))
            for i, s in enumerate(target.seeds):
                target(s)  # imports what it needs, which would be too slow for a case
                (Path(corpus)/str(i)).write_bytes(s)
        atheris.Setup([sys.argv[0], corpus, f'-runs={cases}', '-timeout=5', '-rss_limit_mb=4096', '-max_len=20000'], target)
        atheris.Fuzz()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--target', choices=TARGETS)
    p.add_argument('--cases', type=int, default=200)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--mib', type=float, default=1024, help='memory that a case may add')
    p.add_argument('--keep', type=Path, help='folder for cases that fail')
    p.add_argument('--atheris', action='store_true')
    a = p.parse_args()
    warnings.simplefilter('ignore')
    if a.atheris: return guided(a.target or 'decoder', a.cases)
    if a.keep: a.keep.mkdir(exist_ok=True)
    bad = []
    for name in [a.target] if a.target else TARGETS:
        start = time.perf_counter()
        found = fuzz(name, a.cases, a.seed, a.mib, a.keep)
        bad += found
        print(f'{name}: {a.cases} cases from seed {a.seed}, {len(found)} failures, {time.perf_counter() - start:.0f} s, at most {memory():.0f} MiB', flush=True)
    print('\n'.join(bad))
    sys.exit(bool(bad))


if __name__ == '__main__': main()
