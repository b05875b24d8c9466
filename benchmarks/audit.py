"""What looking at a folder costs: `fastsmile audit`, cleanvision and imagededup on the same files, one after the other.

    pip install cleanvision imagededup                # the peers; those that are missing are left out
    python benchmarks/audit.py ../shared/data/smiles.zip --options "--labels ../shared/data/smiles.csv --label-col label"
    python benchmarks/audit.py ../shared/data/clothing.zip --shape 400x533

Each contender has a process of its own, all cores, and a warm file cache (every file is read once before). Its seconds
include the start of Python and all imports; memory is the largest sum over its processes (PSS) in samples 0.2 s apart.
`audit` is the command: findings of all kinds, duplicates confirmed on pixels, class averages, the page. `hash` is what
imagededup's pHash does: hash every picture, find the pairs; fastsmile's hashes have 256 bits, imagededup's 64.
--shape makes a second folder in which every picture is cut and resized to it.
"""
import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HASH = '''
import numpy as np
from fastsmile.data.duplicates import find_look_alikes
from fastsmile.data.readers import FolderReader
from fastsmile.data.scan import scan_images
reader = FolderReader({folder!r})
exact, near = find_look_alikes(scan_images(reader, reader.names()), 16)
print(*((np.bincount(g)[np.bincount(g) > 1] - 1).sum() for g in (exact, near)), 'pictures that are another one again, exactly and nearly')
'''
CLEANVISION = '''
from cleanvision import Imagelab
lab = Imagelab(data_path={folder!r})
lab.find_issues(verbose=False)
print('; '.join(f'{{r.issue_type}} {{r.num_images}}' for r in lab.issue_summary.itertuples() if r.num_images))
'''
IMAGEDEDUP = '''
from imagededup.methods import PHash
hasher = PHash(verbose=False)
found = hasher.find_duplicates(encoding_map=hasher.encode_images(image_dir={folder!r}, recursive=True), max_distance_threshold=10)
print(sum(map(len, found.values())) // 2, 'pairs within 10 of 64 bits')
'''


def contenders(folder: Path, out: Path, options: str) -> dict: # name -> command
    "What is run, with those whose package is there"
    code = {'fastsmile hash': ('fastsmile', HASH), 'imagededup pHash': ('imagededup', IMAGEDEDUP), 'cleanvision': ('cleanvision', CLEANVISION)}
    made = {'fastsmile audit': [sys.executable, '-m', 'fastsmile', 'audit', folder, *shlex.split(options), '--out', out]}
    for name, (package, text) in code.items():
        try: version(package)
        except PackageNotFoundError: continue
        made[name] = [sys.executable, '-c', text.format(folder=str(folder))]
    return made


def memory(pid: int) -> int: # bytes
    "The memory of a process and all below it: its own, and its share of what is shared"
    total, todo = 0, [pid]
    while todo:
        p = todo.pop()
        try:
            total += next(int(line.split()[1]) for line in open(f'/proc/{p}/smaps_rollup') if line.startswith('Pss:')) * 1024
            for t in os.listdir(f'/proc/{p}/task'): todo += map(int, open(f'/proc/{p}/task/{t}/children').read().split())
        except (OSError, StopIteration): pass
    return total


def measure(cmd: list) -> tuple[float, int, str]: # seconds, bytes, the last line it printed
    "Run to the end"
    with tempfile.TemporaryFile('w+') as out:
        start, most = time.perf_counter(), 0
        p = subprocess.Popen([str(c) for c in cmd], stdout=out, stderr=subprocess.STDOUT, env=os.environ | dict(FASTSMILE_QUIET='1', COLUMNS='200'))
        while p.poll() is None:
            most = max(most, memory(p.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
        out.seek(0)
        lines = out.read().strip().splitlines() or ['']
    if p.returncode: sys.exit('\n'.join(lines[-15:]))
    return seconds, most, lines[-1]


def unpack(source: str, where: Path, shape: tuple[int, int] | None) -> Path:
    "A folder of the zip's pictures, in another shape where one is given"
    from PIL import Image, ImageOps
    with zipfile.ZipFile(source) as z: z.extractall(where)
    for f in where.rglob('*.jp*g') if shape else ():
        with Image.open(f) as img: ImageOps.fit(img.convert('RGB'), shape, Image.Resampling.BICUBIC).save(f, format='JPEG', quality=90)
    return where


def compare(source: str, shape: str | None, args):
    "A line for each contender"
    with tempfile.TemporaryDirectory() as tmp:
        folder = unpack(source, Path(tmp)/'pictures', tuple(map(int, shape.split('x'))) if shape else None)
        files = [f for f in folder.rglob('*') if f.suffix.lower() in ('.jpg', '.jpeg', '.png')]
        for f in files: f.read_bytes()
        print(f'\n{Path(source).name}, {len(files):,} pictures' + (f' as {shape}' if shape else ''), flush=True)
        for name, cmd in contenders(folder, Path(tmp)/'audit', args.options).items():
            if args.only and name not in args.only.split(','): continue
            seconds, most, said = min(measure([*cmd[:-1], f'{cmd[-1]}{i}'] if 'audit' in name else cmd) for i in range(args.rounds))
            print(f'{name:18} {seconds:7.1f} s {len(files) / seconds:8.0f} pictures a second {most / 2**20:7.0f} MiB   {said[:120]}', flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('source', help='a zip of pictures')
    ap.add_argument('--shape', help='WIDTHxHEIGHT of a second folder')
    ap.add_argument('--options', default='', help='for fastsmile audit')
    ap.add_argument('--rounds', type=int, default=1)
    ap.add_argument('--only', help='names of contenders, with commas')
    args = ap.parse_args()
    print(f'{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}')
    for shape in [None, args.shape] if args.shape else [None]: compare(args.source, shape, args)


if __name__ == '__main__': main()
