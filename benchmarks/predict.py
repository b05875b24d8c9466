"""How fast `fastsmile predict` is, beside what people use today and beside what the machine allows.

    python benchmarks/predict.py speed PICTURES.zip --arch resnet18 --shape 400x533   # one row of the table, every contender in turn
    python benchmarks/predict.py cold PICTURES.zip                                    # a single picture, from nothing
    python benchmarks/predict.py growth PICTURES.zip                                  # 10^3, 10^4, 10^5 files: seconds and memory
    python benchmarks/predict.py machine

PICTURES.zip is any zip of photographs; the pictures of a shape are made from them, the same every time. Contenders whose package is not installed are left
out. Every contender has its model in memory and is warm; rounds alternate between them and the best counts. `other` is the load of foreign processes on
the machine during that round, as a share of all cores: a figure taken above 0.05 is not to be trusted.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from PIL import Image, ImageOps

warnings.filterwarnings('ignore')
os.environ['FASTSMILE_QUIET'] = '1'
CORES = os.cpu_count()


def pictures(source, where: Path, shape: tuple[int, int], n: int) -> list[str]:
    "n JPEGs of one shape: photographs from the zip, cut to the middle and resized"
    where.mkdir(parents=True)
    with zipfile.ZipFile(source) as z:
        names = sorted(m for m in z.namelist() if m.lower().endswith('.jpg'))
        for i in range(n):
            with z.open(names[i * 7919 % len(names)]) as f: img = Image.open(f).convert('RGB')
            ImageOps.fit(img, shape, Image.Resampling.BICUBIC).save(where/f'{i:06}.jpg', quality=90)
    return sorted(map(str, where.iterdir()))


def bundle(arch: str, size: int, where: Path, model_args=None) -> Path:
    "A model of three classes with random weights"
    import torch
    from fastsmile.models.bundle import save_bundle
    from fastsmile.models.spec import Model, ModelMetadata
    from fastsmile.models.factory import build_network, make_spec
    torch.manual_seed(0)
    spec = make_spec(arch, ['NOT smile', 'negative smile', 'positive smile'], size=size, model_args=model_args)
    save_bundle(Model(spec, ModelMetadata([.7, .1, .2], [.7, -1.2, -.5], [0.] * 3, 'argmax'), build_network(spec).eval()), where)
    return where


# The contenders: each takes the bundle and its size and returns a function from a list of files to the number of answers

def fastsmile(model: Path, size: int, precision: str = 'auto'):
    from fastsmile.inference.torch_backend import TorchBackend
    from fastsmile.data.readers import FolderReader
    from fastsmile.inference.load import load_model
    from fastsmile.inference.predict import predict_rows
    engine = TorchBackend(load_model(model, 'torch'), precision)
    return lambda files: sum(not r['error'] for r in predict_rows(engine, FolderReader('.'), files, total=len(files)))


def onnx(model: Path, size: int):
    from fastsmile.inference.export import export
    from fastsmile.data.readers import FolderReader
    from fastsmile.config.commands import ExportConfig
    from fastsmile.inference.load import load_model
    from fastsmile.inference.predict import predict_rows
    made = load_model(export(model, ExportConfig(out=str(model.parent/f'{model.name}.onnx')))['out'])
    return lambda files: sum(not r['error'] for r in predict_rows(made, FolderReader('.'), files, total=len(files)))


def int8(model: Path, size: int):
    "The quantized graph through `predict`, uncertain and unlike pictures recomputed; made at the first run, of the pictures themselves"
    from fastsmile import OptionError
    from fastsmile.core.system import has_fast_int8
    from fastsmile.data.readers import FolderReader
    from fastsmile.inference.predict import predict_rows
    if not has_fast_int8(): raise OptionError('int8 needs a processor with VNNI.')
    def run(files):
        if 'net' not in kept: kept['net'] = quantized(model, model.parent/f'{model.name}-int8', files)
        return sum(not r['error'] for r in predict_rows(kept['net'], FolderReader('.'), files, total=len(files)))
    kept = {}
    return run


def quantized(model: Path, where: Path, files: list[str]):
    "A copy of the bundle that knows what the pictures look like, exported, in int8"
    import numpy as np
    from dataclasses import replace
    from fastsmile.data.images import resize_and_crop
    from fastsmile.data.readers import FolderReader
    from fastsmile.data.unlike import fit_unlike_scale
    from fastsmile.inference.export import export
    from fastsmile.inference.load import load_model, make_backend
    from fastsmile.inference.quantize import add_int8
    from fastsmile.models.bundle import load_bundle, save_bundle
    loaded, reader = load_bundle(model), FolderReader('.')
    pixels = np.stack([resize_and_crop(reader.read_image(f, loaded.spec.prep), loaded.spec.prep) for f in 2 * files])
    save_bundle(replace(loaded, metadata=replace(loaded.metadata, unlike=fit_unlike_scale(pixels, pixels))), where)
    export(where)
    facts = add_int8(where, reader, 8 * files, 8 * files, least_speedup=0.)
    print(f'int8: {facts.recomputed:.1%} of the rows recomputed in fp32', file=sys.stderr)
    return make_backend(load_model(where, 'onnx'), 'int8')


def fastai(model: Path, size: int):
    import timm
    from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Normalize, Resize, ResizeMethod, imagenet_stats
    net = timm.create_model(f'local-dir:{model}', pretrained=True)
    block = DataBlock((ImageBlock, CategoryBlock(vocab=['a', 'b', 'c'])), get_y=lambda p: 'a', item_tfms=Resize(size, method=ResizeMethod.Squish),
                      batch_tfms=Normalize.from_stats(*imagenet_stats))
    def run(files):
        if 'learn' not in kept: kept['learn'] = Learner(block.dataloaders(files[:8], bs=64), net, loss_func=CrossEntropyLossFlat())
        with kept['learn'].no_bar(): return len(kept['learn'].get_preds(dl=kept['learn'].dls.test_dl(files))[0])
    kept = {}
    return run


def timm_loop(model: Path, size: int):
    import timm
    import torch
    net = timm.create_model(f'local-dir:{model}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))

    class Files(torch.utils.data.Dataset):
        def __init__(self, files): self.files = files
        def __len__(self): return len(self.files)
        def __getitem__(self, i): return transform(Image.open(self.files[i]).convert('RGB'))

    def run(files):
        with torch.inference_mode():
            return sum(len(net(x)) for x in torch.utils.data.DataLoader(Files(files), batch_size=64, num_workers=CORES))
    return run


def transformers(model: Path, size: int):
    from transformers import TimmWrapperForImageClassification, TimmWrapperImageProcessor, pipeline
    from transformers.utils import logging
    logging.set_verbosity_error()
    net = TimmWrapperForImageClassification.from_pretrained(model).eval()
    ask = pipeline('image-classification', model=net, image_processor=TimmWrapperImageProcessor.from_pretrained(model), device='cpu')
    return lambda files: sum(1 for _ in ask(files, batch_size=16))


def ultralytics(model: Path, size: int):
    from ultralytics import YOLO
    net = YOLO('yolo11n-cls.yaml', verbose=False)
    return lambda files: sum(1 for _ in net.predict(files, imgsz=size, batch=16, stream=True, verbose=False, device='cpu'))


def model_alone(model: Path, size: int):
    "The bound's first part: the folded network in fp32 on all cores, the better of one group on all cores and a group on each"
    import torch
    from fastsmile.core.system import default_batch_size
    from fastsmile.inference.torch_backend import TorchBackend
    from fastsmile.inference.load import load_model
    net, bs = TorchBackend(load_model(model, 'torch')).net, default_batch_size(size, 'cpu', CORES)
    x = torch.randn(bs, 3, size, size).to(memory_format=torch.channels_last)
    def once(_):
        with torch.inference_mode(): return len(net(x))
    def run(files):
        rounds, best = -(-len(files) // bs), 0
        start = time.perf_counter()
        done = sum(map(once, range(rounds)))
        best = done / (time.perf_counter() - start)
        with ThreadPoolExecutor(CORES, initializer=lambda: torch.set_num_threads(1)) as pool:
            start = time.perf_counter()
            done = sum(pool.map(once, range(rounds)))
            best = max(best, done / (time.perf_counter() - start))
        torch.set_num_threads(CORES)
        return best  # pictures per second
    return run


def decode_alone(model: Path, size: int):
    "The bound's second part: decoding and resizing on all cores"
    from fastsmile.data.images import resize_and_crop
    from fastsmile.data.readers import FolderReader
    from fastsmile.inference.load import load_model
    prep, reader = load_model(model).spec.prep, FolderReader('.')
    def run(files):
        with ThreadPoolExecutor(CORES) as pool: return sum(1 for _ in pool.map(lambda f: resize_and_crop(reader.read_image(f, prep), prep).shape, files))
    return run


CONTENDERS = dict(fastsmile=fastsmile, onnx=onnx, int8=int8, fastai=fastai, timm=timm_loop, transformers=transformers, ultralytics=ultralytics,
                  model=model_alone, decode=decode_alone)


def busy() -> tuple[float, float]:
    "Seconds of processor time that the machine and that this process with its children have used"
    v = [int(t) for t in Path('/proc/stat').read_text().split('\n')[0].split()[1:9]] if Path('/proc/stat').exists() else [0] * 8
    return (sum(v) - v[3] - v[4]) / os.sysconf('SC_CLK_TCK'), sum(os.times()[:4])


def measure(run, files) -> tuple[float, float]: # pictures per second, foreign load
    "One round"
    (all0, own0), start = busy(), time.perf_counter()
    done = run(files)
    seconds, (all1, own1) = time.perf_counter() - start, busy()
    return done if isinstance(done, float) else done / seconds, max(0., (all1 - all0 - own1 + own0) / seconds / CORES)


def speed(args):
    "Every contender in turn, `--rounds` times; a round that others disturbed is repeated, up to four times"
    from fastsmile import OptionError  # what a missing extra raises
    w, h = map(int, args.shape.split('x'))
    size = 224 if max(w, h) > 224 else max(w, h)
    with tempfile.TemporaryDirectory() as tmp:
        files, model = pictures(args.source, Path(tmp)/'pictures', (w, h), args.n), bundle(args.arch, size, Path(tmp)/'model')
        ready, best = {}, {}
        for name in args.who.split(','):
            try: ready[name] = CONTENDERS[name](model, size)
            except (ImportError, OptionError) as e: print(f'{name} is left out: {e}', file=sys.stderr)
        for run in ready.values(): run(files[:min(len(files), 32)])
        for _ in range(args.rounds):
            for name, run in ready.items():
                for _ in range(4):
                    rate, other = measure(run, files)
                    if other <= 0.05: break
                if name not in best or (other <= 0.05, rate) > (best[name][1] <= 0.05, best[name][0]): best[name] = rate, other
        bound = 1 / (1 / best['model'][0] + 1 / best['decode'][0]) if {'model', 'decode'} <= set(best) else None
        print(json.dumps(dict(arch=args.arch, shape=args.shape, size=size, n=args.n, rates={k: round(r, 1) for k, (r, _) in best.items()},
                              other={k: round(o, 2) for k, (_, o) in best.items()}, bound=bound and round(bound, 1),
                              of_bound=bound and 'fastsmile' in best and round(best['fastsmile'][0] / bound, 2),
                              times_fastai=round(best['fastsmile'][0] / best['fastai'][0], 2) if {'fastai', 'fastsmile'} <= set(best) else None)))


BY_HAND = '''
import sys
from fastai.vision.all import load_learner
label, i, p = load_learner(sys.argv[1]).predict(sys.argv[2])
print(label, p[i])
'''


def _first(_): return 'a'  # a label for fastai, which wants one; a name of a module, so that the learner can be exported


def cold(args):
    "One picture from a fresh process: `fastsmile predict` with torch and from an exported file, and fastai's load_learner and predict"
    from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Resize, ResizeMethod
    import timm
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        files, model = pictures(args.source, tmp/'pictures', (400, 533), 8), bundle(args.arch, 224, tmp/'model')
        block = DataBlock((ImageBlock, CategoryBlock(vocab=['a', 'b', 'c'])), get_y=_first, item_tfms=Resize(224, method=ResizeMethod.Squish))
        learn = Learner(block.dataloaders(files, num_workers=0), timm.create_model(f'local-dir:{model}', pretrained=True),
                        loss_func=CrossEntropyLossFlat())
        learn.export(tmp/'export.pkl')
        exported = ['export', model, '--check', tmp/'pictures', '--out', tmp/'model.onnx']
        python = [sys.executable, '-W', 'ignore']
        subprocess.run(list(map(str, [*python, '-m', 'fastsmile', *exported])), check=True, capture_output=True)
        ways = dict(fastsmile=[*python, '-m', 'fastsmile', 'predict', files[0], '--model', model, '--out', tmp/'p.csv', '--overwrite'],
                    onnx=[*python, '-m', 'fastsmile', 'predict', files[0], '--model', tmp/'model.onnx', '--out', tmp/'p.csv', '--overwrite'],
                    fastai=[*python, '-c', BY_HAND, tmp/'export.pkl', files[0]])
        best = {}
        for _ in range(args.rounds + 1):  # the first fills the disk's cache
            for name, cmd in ways.items():
                (all0, own0), start = busy(), time.perf_counter()
                subprocess.run(list(map(str, cmd)), check=True, capture_output=True)
                seconds, (all1, own1) = time.perf_counter() - start, busy()
                other = max(0., (all1 - all0 - own1 + own0) / seconds / CORES)
                if name not in best or seconds < best[name][0]: best[name] = seconds, other
        print(json.dumps(dict(arch=args.arch, seconds={k: round(s, 2) for k, (s, _) in best.items()}, other={k: round(o, 2) for k, (_, o) in best.items()},
                              ratio={k: round(best[k][0] / best['fastai'][0], 2) for k in ('fastsmile', 'onnx')})))


GROW = '''
import resource, sys, time
from fastsmile.config.commands import PredictConfig
from fastsmile.runs.predict import predict as predict_to_file
start = time.perf_counter()
done = predict_to_file(sys.argv[1], PredictConfig(model=sys.argv[2], out=sys.argv[3], device='cpu', overwrite=True))
print(done.rows, done.failed, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
'''


def growth(args):
    "Folders of 10^3, 10^4 and 10^5 files through a very small network: seconds and peak memory of the whole process"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        files = pictures(args.source, tmp/'pictures', (32, 32), min(500, max(args.files)))
        model = bundle('resnet10t', 32, tmp/'model', '{"channels": [8, 16, 32, 64]}')
        for n in args.files:
            (tmp/f'{n}').mkdir()
            for i in range(n): os.link(files[i % len(files)], tmp/f'{n}'/f'{i:06}.jpg')
            cmd = [sys.executable, '-W', 'ignore', '-c', GROW, tmp/f'{n}', model, tmp/f'{n}.csv']
            r = subprocess.run(list(map(str, cmd)), check=True, capture_output=True, text=True)
            rows, failed, seconds, mib = r.stdout.split()
            print(json.dumps(dict(rows=int(rows), failed=int(failed), seconds=round(float(seconds), 1), per_second=round(n / float(seconds)),
                                  peak_mib=round(float(mib)))), flush=True)


def machine(args):
    "What the figures were taken on"
    import torch
    have = torch.cpu.get_capabilities()
    packages = {}
    for p in ('fastsmile', 'torch', 'onnxruntime', 'timm', 'fastai', 'pillow', 'transformers', 'ultralytics'):
        try: packages[p] = version(p)
        except PackageNotFoundError: pass
    print(json.dumps(dict(cpu=have['cpu_name'], cores=CORES, **{k: have.get(k) for k in ('avx512_f', 'avx512_bf16', 'amx_bf16')}, system=platform.platform(),
                          python=platform.python_version(), **packages), indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['speed', 'cold', 'growth', 'machine'])
    parser.add_argument('source', nargs='?', help='a zip of photographs')
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--shape', default='400x533', help='width x height of the pictures; the network sees 224 px, or the side where that is smaller')
    parser.add_argument('-n', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--files', type=int, nargs='+', default=[1_000, 10_000, 100_000], help='for growth: sizes of the folders')
    parser.add_argument('--who', default=','.join(CONTENDERS))
    args = parser.parse_args()
    if args.what != 'machine' and not args.source: parser.error('a zip of photographs is needed')
    dict(speed=speed, cold=cold, growth=growth, machine=machine)[args.what](args)


if __name__ == '__main__': main()
