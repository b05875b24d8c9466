"""The search for near-duplicates: time and memory as the set grows, on hashes as real faces have them.

    python benchmarks/search.py --hashes 1000000 [--source ../shared/data/smiles.zip]

Random hashes are the easy case: their bits are even. With --source the hashes are those of real pictures,
each in as many variants as are asked for, with 30 to 90 of its 256 bits changed: as uneven as the real ones.
One in a hundred gets a copy within 16 bits; there is one group of 5,000 equal hashes.
"""
import argparse
import resource
import time

import numpy as np

from fastsmile.data.duplicates import near_groups
from fastsmile.data.scan import pack_bits


def real_bits(source: str) -> np.ndarray:
    "(N, 256) bits of the hashes of a source's pictures"
    from fastsmile.data.readers import ZipReader
    from fastsmile.data.scan import scan_images
    reader = ZipReader(source)
    seen = scan_images(reader, reader.names())
    return np.unpackbits(seen.hashes[seen.readable, 0].view(np.uint8), axis=1).astype(bool)


def make(n: int, source: str | None, rng) -> np.ndarray:
    "(n, 4) packed hashes"
    out, base = [], real_bits(source) if source else None
    for i in range(0, n, 100_000):
        m = min(100_000, n - i)
        if base is None: bits = rng.random((m, 256)) < 0.5
        else: bits = base[rng.integers(0, len(base), m)] ^ (rng.random((m, 256), dtype=np.float32) < rng.uniform(30/256, 90/256, (m, 1)))
        out.append(pack_bits(bits))
    out = np.concatenate(out)
    k = n // 100
    flips = np.zeros((k, 256), bool)
    for row in flips: row[rng.choice(256, rng.integers(0, 17), replace=False)] = True
    out[-k:] = out[:k] ^ pack_bits(flips)
    out[n // 2:n // 2 + min(5000, n // 20)] = out[n // 2]
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--hashes', type=int, default=1_000_000)
    ap.add_argument('--near', type=int, default=16)
    ap.add_argument('--source')
    args = ap.parse_args()
    hashes = make(args.hashes, args.source, np.random.default_rng(0))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    groups = near_groups(hashes, args.near)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f'{args.hashes:,} hashes, near {args.near}, {"bits of " + args.source if args.source else "even bits"}: {seconds:.1f} s, '
          f'{len(hashes) - len(np.unique(groups)):,} rows join another; peak memory of the process {peak / 1e6:.2f} GB ({before / 1e6:.2f} before)')


if __name__ == '__main__': main()
