"""How fast `fastsmile fit` trains, beside fastai by hand: same pictures, rows, architecture, epochs, batch, rate and machine.

    python benchmarks/train.py scratch --data DIR                    # resnet10t, 64 px, from random weights, 8 epochs, batches of 128
    python benchmarks/train.py finetune --data DIR --weights FILE    # mobilenetv2_100, 96 px, one epoch of the head and four of everything
    python benchmarks/train.py frozen --data DIR --rows 1000         # densenet161, 64 px, the network frozen, 15 epochs of the head
    python benchmarks/train.py ranks --data DIR --rows 3000 --epochs 3  # fit in one process, and under torchrun in one for each core
    python benchmarks/train.py neighbours                            # a step of resnet10t, 64 px: alone, beside busy loops, beside another training

DIR holds smiles.zip and smiles.csv. Rows are divided by person, once, for both. By hand means what somebody who knows fastai writes: DataLoaders from a
DataFrame with workers, `aug_transforms`, a timm architecture in `Learner` (scratch) or `vision_learner`, `fit_one_cycle` or `fine_tune`, the macro F1 as a
metric. Each contender runs in a process of its own; `--rounds` alternates between them and the quickest counts. `fit` is from the first picture decoded to
the last epoch; `whole` adds what is done before and afterwards (fastsmile audits, predicts, explains and writes a report, fastai predicts the test
rows). `same` is the time until the macro F1 on valid is as high as both reach, the lower of the two bests. Memory is the sum over a contender's processes.
`other` is the load of foreign processes during the run, as a share of all cores: a figure taken above 0.05 is not to be trusted.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

warnings.filterwarnings('ignore')


@dataclass(frozen=True)
class Case:
    "One training, for both contenders"
    arch: str
    size: int
    epochs: int             # of everything, or of the head where the network is frozen
    bs: int
    lr: float
    head_epochs: int = 0    # of the head alone, before
    frozen: bool = False
    weights: str = ''       # a file; random where empty
    workers: int = 2        # of fastai by hand
    weighted: bool = False
    still: bool = False     # fastai's frozen BatchNorm is not trained
    options: str = ''       # more of fastsmile's, as JSON
    folder: str = ''        # with rows.csv and the pictures


CASES = dict(scratch=Case('resnet10t', 64, 8, 128, 3e-3), finetune=Case('mobilenetv2_100', 96, 4, 64, 2e-3, head_epochs=1),
             frozen=Case('densenet161', 64, 15, 64, 3e-3, frozen=True))


def prepare(data: Path, rows: int | None, folder: Path):
    "The pictures as files, and rows.csv with path, label, person and split"
    from fastsmile.config.fields import SourceOptions
    from fastsmile.data.splits import stratified_group_split
    from fastsmile.data.source import read_source
    table = read_source(data/'smiles.zip', SourceOptions(label_col='label', group_col='person')).kept[['path', 'label', 'group']].drop_duplicates('path')
    if rows: table = table.sample(rows, random_state=0)
    table['split'] = stratified_group_split(table.label, table.group, dict(train=0.65, valid=0.15, test=0.2), seed=0)
    with zipfile.ZipFile(data/'smiles.zip') as z: z.extractall(folder, members=table.path)
    table.to_csv(folder/'rows.csv', index=False)


# The contenders: each trains and returns seconds of the fit, the macro F1 on valid and the seconds since the start after each epoch, and on test

def fastai_by_hand(case: Case) -> dict:
    import numpy as np
    import pandas as pd
    import timm
    from fastai.vision.all import (
        Callback,
        CategoryBlock,
        ColReader,
        ColSplitter,
        DataBlock,
        F1Score,
        ImageBlock,
        Learner,
        Normalize,
        Resize,
        ResizeMethod,
        aug_transforms,
        imagenet_stats,
        set_seed,
        vision_learner,
    )
    from sklearn.metrics import f1_score
    start, folder = time.perf_counter(), Path(case.folder)
    table = pd.read_csv(folder/'rows.csv')
    df = table[table.split != 'test'].assign(is_valid=lambda t: t.split == 'valid').reset_index(drop=True)
    set_seed(42)
    stats = [] if case.weights or case.frozen else [Normalize.from_stats(*imagenet_stats)]  # vision_learner adds its own
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path', pref=folder), get_y=ColReader('label'), splitter=ColSplitter(),
                      item_tfms=Resize(case.size, method=ResizeMethod.Squish), batch_tfms=[*aug_transforms(), *stats])
    kwargs = dict(bs=case.bs, num_workers=case.workers)
    if case.weighted:
        train_labels = df.label[~df.is_valid]
        dls = block.weighted_dataloaders(df, (1 / train_labels.map(train_labels.value_counts())).to_numpy(), **kwargs)
    else: dls = block.dataloaders(df, **kwargs)
    more = dict(pretrained_cfg_overlay=dict(file=case.weights)) if case.weights else {}
    metrics = F1Score(average='macro')
    if case.weights or case.frozen: learn = vision_learner(dls, case.arch, pretrained=bool(case.weights), metrics=metrics,
                                                            train_bn=not case.still, **more)
    else: learn = Learner(dls, timm.create_model(case.arch, num_classes=len(dls.vocab)), metrics=metrics)
    curve = []

    class Clock(Callback):
        order = 90
        def after_epoch(self): curve.append((time.perf_counter() - start, float(self.recorder.values[-1][-1])))

    with learn.no_bar():
        learn.add_cb(Clock())
        if case.head_epochs: learn.fine_tune(case.epochs, case.lr, freeze_epochs=case.head_epochs)
        else:
            if case.frozen: learn.freeze()
            learn.fit_one_cycle(case.epochs, case.lr)
        seconds = time.perf_counter() - start
        learn.remove_cb(Clock)
        test = table[table.split == 'test']
        p, _ = learn.get_preds(dl=learn.dls.test_dl(test))
    y = np.array([list(dls.vocab).index(v) for v in test.label])
    return dict(seconds=seconds, curve=curve, test=f1_score(y, p.argmax(1), average='macro'), train=len(dls.train) * dls.train.bs)


def fastsmile(case: Case) -> dict:
    os.environ['FASTSMILE_QUIET'] = '1'
    from fastsmile import FitConfig, fit
    from fastsmile.runs import fit as runs
    spent = {}
    def clocked(name, call):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try: return call(*args, **kwargs)
            finally: spent[name] = time.perf_counter() - start
        return timed
    for name in ('build_learner', 'train_learner'): setattr(runs, name, clocked(name, getattr(runs, name)))  # pictures are decoded in the first
    with tempfile.TemporaryDirectory() as tmp:
        os.environ['FASTSMILE_CACHE'] = f'{tmp}/cache'  # nothing is there already
        config = FitConfig(arch=case.arch, size=case.size, epochs=case.epochs, bs=case.bs, lr=str(case.lr), weights=case.weights or 'none',
                           freeze='head' if case.frozen else 'none', freeze_epochs=case.head_epochs or None, labels=f'{case.folder}/rows.csv',
                           label_col='label', split_col='split', group_col='group', calib=0.0, decide='argmax',
                           balance='weighted' if case.weighted else 'none', out=f'{tmp}/run')
        run = fit(case.folder, replace(config, **json.loads(case.options or '{}')))
        h, told = run.history, run.config['training']
        first = spent['build_learner'] + spent['train_learner'] - h.seconds.sum()
        return dict(seconds=spent['build_learner'] + spent['train_learner'], curve=list(zip((first + h.seconds.cumsum()).tolist(), h.valid_macro_f1)),
                    test=run.metrics['test']['macro_f1']['value'], train=int(h.filter(like='drawn_').iloc[0].sum()), precision=told['precision']['note'],
                    features=told['features'])


CONTENDERS = dict(fastai=fastai_by_hand, fastsmile=fastsmile)


def measure(name: str, case: Case) -> dict:
    "One contender in a process of its own"
    from audit import memory
    from predict import CORES, busy
    (all0, own0), start, peak = busy(), time.perf_counter(), 0
    with tempfile.TemporaryFile('w+') as out:
        cmd = [sys.executable, '-W', 'ignore', __file__, '--one', name, json.dumps(asdict(case))]
        p = subprocess.Popen(cmd, stdout=out)
        while p.poll() is None:
            with contextlib.suppress(OSError): peak = max(peak, memory(p.pid))
            time.sleep(0.2)
        whole, (all1, own1) = time.perf_counter() - start, busy()
        out.seek(0)
        if p.returncode: raise SystemExit(f'{name} failed')
        told = json.loads(out.read().splitlines()[-1])
    return told | dict(whole=whole, peak=peak / 2**20, other=max(0., (all1 - all0 - own1 + own0) / whole / CORES))


def reached(curve: list, f1: float) -> float: # seconds
    "When a curve of (seconds, macro F1) is first as high as that"
    return next(s for s, v in curve if v >= f1)


def compare(case: Case, args) -> dict:
    "Every contender in turn, `--rounds` times"
    best = {}
    for _ in range(args.rounds):
        for name in args.who.split(','):
            r = measure(name, case)
            print(json.dumps(dict(who=name, **{k: round(v, 3) if isinstance(v, float) else v for k, v in r.items()})), file=sys.stderr, flush=True)
            if name not in best or r['seconds'] < best[name]['seconds']: best[name] = r
    f1 = min(max(v for _, v in r['curve']) for r in best.values())
    def row(r):
        return dict(fit=round(r['seconds'], 1), same=round(reached(r['curve'], f1), 1), whole=round(r['whole'], 1),
                    rate=round(r['train'] * len(r['curve']) / r['seconds']), valid=round(max(v for _, v in r['curve']), 3), test=round(r['test'], 3),
                    peak=round(r['peak']), other=round(r['other'], 2))
    rows = {k: row(r) for k, r in best.items()}
    return dict(same_f1=round(f1, 3), rows=rows, times={k: round(rows['fastai'][k] / rows['fastsmile'][k], 2) for k in ('fit', 'same', 'whole')}
                if len(rows) == 2 else None)


def table(name: str, case: Case, told: dict) -> str:
    "The comparison as Markdown"
    epochs = case.head_epochs + case.epochs
    head = f"{name}: {case.arch}, {case.size} px, {epochs} epochs, batches of {case.bs}; the same macro F1 is {told['same_f1']}"
    lines = [f"| {k} | {r['fit']} | {r['same']} | {r['whole']} | {r['rate']} | {r['valid']} | {r['test']} | {r['peak']:,} | {r['other']} |"
             for k, r in told['rows'].items()]
    times = [f"| times as fast | **{told['times']['fit']}** | **{told['times']['same']}** | {told['times']['whole']} | | | | | |"] if told['times'] else []
    columns = '| | fit, s | to the same macro F1, s | whole, s | training pictures a second | macro F1 on valid (best) | on test | peak, MiB | other |'
    return '\n'.join([head, '', columns, '|---|---|---|---|---|---|---|---|---|', *lines, *times])


def in_processes(case: Case, n: int) -> dict:
    "`fit` in n processes with the cores divided among them; seconds of an epoch, its first one left out"
    import pandas as pd
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), '-m'] if n > 1 else ['-m']
    with tempfile.TemporaryDirectory() as tmp:
        options = f'--arch {case.arch} --size {case.size} --epochs {case.epochs} --bs {case.bs} --lr {case.lr}'
        cmd = [sys.executable, *launch, 'fastsmile', 'fit', case.folder, *options.split(),
               *'--weights none --label-col label --split-col split --group-col group --calib 0 --balance none --tta none'.split(),
               '--labels', f'{case.folder}/rows.csv', '--out', f'{tmp}/run', '--device', 'cpu']
        env = os.environ | dict(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // n)), FASTSMILE_QUIET='1', FASTSMILE_CACHE=f'{tmp}/cache')
        start = time.perf_counter()
        subprocess.run(cmd, env=env, check=True, capture_output=True)
        whole, h = time.perf_counter() - start, pd.read_csv(f'{tmp}/run/history.csv').iloc[1:]
        return dict(epoch=h.seconds.mean(), rate=h.images_per_second.mean(), loss=h.train_loss.iloc[-1], valid=h.valid_macro_f1.max(), whole=whole)


def ranks(case: Case) -> str:
    "One process with all cores beside one process for each core, as Markdown"
    told = {n: in_processes(case, n) for n in (1, os.cpu_count() or 1)}
    lines = [f"| {n} | {max(1, os.cpu_count() // n)} | {r['epoch']:.1f} | {r['rate']:.0f} | {r['loss']:.3f} | {r['valid']:.3f} | {r['whole']:.0f} |"
             for n, r in told.items()]
    head = '| processes | threads in each | an epoch, s | training pictures a second | training loss at the end | macro F1 on valid (best) | whole, s |'
    return '\n'.join([f'{case.arch}, {case.size} px, {case.epochs} epochs, batches of {case.bs}', '', head, '|---|---|---|---|---|---|---|', *lines])


STEP = """
import time, fastsmile, timm, torch
net, batch = timm.create_model('resnet10t', num_classes=3), torch.randn({bs}, 3, 64, 64)
opt, times, end = torch.optim.AdamW(net.parameters()), [], time.monotonic() + {seconds}
while len(times) < 5 or time.monotonic() < end:
    start = time.monotonic()
    net(batch).logsumexp(1).mean().backward()
    opt.step()
    opt.zero_grad()
    times.append(time.monotonic() - start)
print(1000 * sorted(times[2:])[len(times[2:]) // 2])
"""
LOOP = 'while True: pass'
WAITING = {'spinning, OpenMP\'s default': dict(GOMP_SPINCOUNT='300000'), 'fastsmile\'s default': {}, 'sleeping at once': dict(OMP_WAIT_POLICY='PASSIVE')}


def step_time(env: dict, beside: list[str], seconds: float, bs: int) -> float:
    "Milliseconds of a training step (median) while the programs of `beside` run with the same settings"
    code, start = STEP.format(seconds=seconds, bs=bs), lambda c: subprocess.Popen([sys.executable, '-c', c], env=env, stdout=subprocess.DEVNULL)
    others = [start(c.format(seconds=3600, bs=bs)) for c in beside]
    try: return float(subprocess.run([sys.executable, '-c', code], env=env, check=True, capture_output=True, text=True).stdout)
    finally:
        for o in others: o.kill()


def neighbours(seconds: float, bs: int, most: int) -> str:
    "A step alone and beside others (at most `most` of them), by how OpenMP's threads wait, as Markdown"
    cases = {'alone': [], 'beside one busy loop': [LOOP], 'beside two': [LOOP, LOOP], 'beside another training': [STEP]}
    cases = {k: beside for k, beside in cases.items() if len(beside) <= most}
    clean = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_NUM_THREADS')}
    lines = [f'| {name} | ' + ' | '.join(f'{step_time(clean | waiting, beside, seconds, bs):.0f}' for beside in cases.values()) + ' |'
             for name, waiting in WAITING.items()]
    return '\n'.join([f'milliseconds of a step, batches of {bs}', '', f'| | {" | ".join(cases)} |', '|---' * (len(cases) + 1) + '|', *lines])


def main():
    if sys.argv[1:2] == ['--one']:
        print(json.dumps(CONTENDERS[sys.argv[2]](Case(**json.loads(sys.argv[3])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('case', choices=[*CASES, 'ranks', 'neighbours'])
    parser.add_argument('--data', type=Path, help='the folder of smiles.zip and smiles.csv')
    parser.add_argument('--weights', default='', help='a file of weights for the architecture')
    parser.add_argument('--rows', type=int, help='so many rows, drawn by chance')
    parser.add_argument('--rounds', type=int, default=1)
    parser.add_argument('--who', default=','.join(CONTENDERS))
    parser.add_argument('--options', default='', help='more options of fit, as JSON')
    parser.add_argument('--weighted', action='store_true', help='every class equally often, in both')
    parser.add_argument('--still', action='store_true',
                        help='by hand, the BatchNorm of a frozen network is not trained either: fastai does, unless it is told not to')
    for name in ('epochs', 'bs', 'size', 'workers'): parser.add_argument(f'--{name}', type=int)
    parser.add_argument('--beside', type=int, default=2, help='most programs beside the step of neighbours')
    parser.add_argument('--seconds', type=float, default=10, help='how long each figure of neighbours is measured')
    args = parser.parse_args()
    if args.case == 'neighbours': return print(neighbours(args.seconds, args.bs or 64, args.beside))
    if not args.data: parser.error(f'{args.case} needs --data DIR')
    case = replace(CASES.get(args.case, CASES['scratch']), weights=args.weights and str(Path(args.weights).absolute()), weighted=args.weighted,
                   still=args.still, options=args.options, **{k: getattr(args, k) for k in ('epochs', 'bs', 'size', 'workers') if getattr(args, k) is not None})
    if args.case == 'finetune' and not args.weights: parser.error('finetune needs --weights FILE')
    with tempfile.TemporaryDirectory() as tmp:
        prepare(args.data, args.rows, Path(tmp))
        case = replace(case, folder=tmp)
        if args.case == 'ranks': return print(ranks(case))
        told = compare(case, args)
    print(table(args.case, case, told))


if __name__ == '__main__': main()
