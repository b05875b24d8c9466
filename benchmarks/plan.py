"""How near the plan of `fastsmile fit` comes to the time and the memory that a training takes.

    python benchmarks/plan.py --data DIR --weights DIR   # twelve trainings, about 20 minutes on two cores
    python benchmarks/plan.py --drawn 60 --only 0        # one of them, on drawn faces

DIR of --data holds smiles.zip, smiles.csv and clothing.zip, that of --weights mobilenetv2_100.safetensors and tf_efficientnet_lite0.safetensors. Each
training runs in a process of its own. `time` is that of the whole run from the plan to the report, divided into the estimate; `memory` is the process's
peak, likewise. Above 1 the estimate is too high, below 1 too low. Measure on a machine that does nothing else.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMILES = ['smiles.zip', '--labels', 'smiles.csv', '--label-col', 'label', '--group-col', 'person']
CLOTHING = ['clothing.zip']
CASES = [(SMILES, '--weights none --preset quick --budget 1m'),
         (SMILES, '--weights none --arch resnet10t --size 32 --epochs 3'),
         (SMILES, '--weights none --arch resnet18 --size 64 --epochs 1'),
         (SMILES, '--weights WEIGHTS --preset quick --budget 2m'),
         (SMILES, '--weights WEIGHTS --arch tf_efficientnet_lite0 --size 64 --epochs 1'),
         (SMILES, '--weights none --arch densenet121 --size 64 --freeze head --epochs 4'),
         (CLOTHING, '--weights none --preset quick --budget 1m'),
         (CLOTHING, '--weights WEIGHTS --preset quick --budget 2m'),
         (CLOTHING, '--weights WEIGHTS --arch mobilenetv2_100 --size 160 --epochs 1'),
         (CLOTHING, '--weights none --arch densenet161 --size 64 --epochs 1 --bs 16'),
         (CLOTHING, '--weights none --arch resnet50 --size 96 --epochs 1 --bs 32'),
         (CLOTHING, '--weights none --arch vit_tiny_patch16_224 --epochs 1 --bs 32')]


def measure(source: list[str], options: str, out: Path) -> dict:
    "Train, and compare the plan with what was taken"
    cmd = [sys.executable, '-W', 'ignore', '-m', 'fastsmile', 'fit', *source, *options.split(), '--out', str(out)]
    process = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | dict(FASTSMILE_QUIET='1'))
    _, status, usage = os.wait4(process.pid, 0)
    if status: raise SystemExit(f'failed: {" ".join(cmd)}')
    written = out/'training_plan.json'
    plan, took = json.loads(written.read_text()), time.time() - written.stat().st_mtime
    peak = usage.ru_maxrss * 1024
    return dict(options=' '.join([source[0], options]), estimated=plan['seconds'], took=round(took, 1), time=round(plan['seconds'] / took, 2),
                memory=round(plan['memory'] / peak, 2), peak=f'{peak / 2**30:.2f} GB')


def located(words: list[str], folder: Path | None) -> list[str]:
    "The source with its files in a folder"
    return [str(folder/w) if folder and w.endswith(('.zip', '.csv')) else w for w in words]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help='folder of the pictures')
    parser.add_argument('--weights', default='none', help='folder of pretrained weights')
    parser.add_argument('--drawn', type=int, help='draw so many faces, instead of --data')
    parser.add_argument('--only', type=int, nargs='*', help='numbers of the trainings')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        if args.drawn:
            subprocess.run([sys.executable, '-m', 'fastsmile', 'sample', f'{tmp}/faces', '-n', str(args.drawn)], check=True, stdout=subprocess.DEVNULL)
        print(f'{"time":>5} {"memory":>7} {"estimated":>10} {"took":>8} {"peak":>9}  training')
        for i, (source, options) in enumerate(CASES):
            if args.only is not None and i not in args.only: continue
            words = [f'{tmp}/faces'] if args.drawn else located(source, args.data)
            row = measure(words, options.replace('WEIGHTS', args.weights), Path(tmp)/str(i))
            print(f'{row["time"]:>5} {row["memory"]:>7} {row["estimated"]:>10} {row["took"]:>8} {row["peak"]:>9}  {row["options"]}', flush=True)


if __name__ == '__main__': main()
