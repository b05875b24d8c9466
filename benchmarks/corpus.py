"""Every file of a folder through the decoder: what becomes of it, how long it takes, how much memory it takes.

    pip download --no-binary :all: --no-deps pillow==9.5.0     # its tests hold over a thousand images, hundreds of them malformed on purpose
    tar xzf Pillow-9.5.0.tar.gz
    python benchmarks/corpus.py Pillow-9.5.0/Tests

Each file is read whatever it is called. It must end as an RGB picture or as a reason (`ImageError`): anything else, a file that
takes longer than --seconds, or one that takes more memory than --mib, is named, and the exit code is 1.
"""
import argparse
import collections
import multiprocessing as mp
import resource
import sys
import time
from pathlib import Path

from fastsmile.data.images import ImageError, decode_image


def outcome(path: Path) -> tuple[str, float, float]:
    "What becomes of a file, its seconds, and by how many MiB it raised the peak of this process"
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try: what = 'a picture' if decode_image(path.read_bytes()).mode == 'RGB' else 'NOT RGB'
    except ImageError as e: what = str(e).partition(':')[0]
    except Exception as e: what = f'ESCAPED {type(e).__name__}'
    return what, time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--seconds', type=float, default=5)
    p.add_argument('--mib', type=float, default=1024)
    a = p.parse_args()
    files, counts, bad = sorted(f for f in a.folder.rglob('*') if f.is_file()), collections.Counter(), []
    with mp.get_context('spawn').Pool(1) as pool:  # a crash of a library is seen as a result that never comes
        asked = [(f, pool.apply_async(outcome, (f,))) for f in files]
        for f, r in asked:
            try: what, seconds, mib = r.get(timeout=30)
            except mp.TimeoutError: what, seconds, mib = 'HANGS OR CRASHES', 30, 0
            counts[what] += 1
            if what.isupper() or what.startswith(('NOT', 'ESCAPED')) or seconds > a.seconds or mib > a.mib:
                bad.append(f'{f.relative_to(a.folder)}: {what}, {seconds:.1f} s, {mib:.0f} MiB')
    print(f'{len(files)} files: ' + ', '.join(f'{n} {what}' for what, n in counts.most_common()))
    print('\n'.join(bad) or f'none escapes, none takes {a.seconds:g} s or {a.mib:g} MiB')
    sys.exit(bool(bad))


if __name__ == '__main__': main()
