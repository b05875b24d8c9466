"""How fast `fastsmile predict` is, beside what people use today and beside what the machine allows.

    python benchmarks/predict.py speed PICTURES.zip --arch resnet18 --shape 400x533   # one row of the table, every contender in turn
    python benchmarks/predict.py cold PICTURES.zip                                    # a single picture, from nothing
    python benchmarks/predict.py growth PICTURES.zip                                  # 10^3, 10^4, 10^5 files: seconds and memory
    python benchmarks/predict.py machine

PICTURES.zip is any zip of photographs; the pictures of a shape are made from them, the same every time. Contenders whose package is not installed are left
out. Every contender has a process of its own, its model in memory, and is warm; rounds alternate between them, and the median counts, with the range over
the rounds. A round in which foreign processes took more than 5% of the machine is repeated.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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


# The contenders: each takes a model folder and its size, and returns a function from a list of files to the number of answers

def finished(model: Path, where: Path, files: list[str]) -> Path:
    "A copy of the bundle as `fit` leaves it: it knows what the pictures look like, and has the graphs of onnxruntime"
    from dataclasses import replace
    import numpy as np
    from fastsmile.core.system import LEAST_INT8_IMAGES
    from fastsmile.data.images import resize_and_crop
    from fastsmile.data.readers import FolderReader
    from fastsmile.data.unlike import fit_unlike_scale
    from fastsmile.inference.export import export
    from fastsmile.inference.quantize import add_int8
    from fastsmile.models.bundle import load_bundle, save_bundle
    files = files * -(-LEAST_INT8_IMAGES // len(files))
    loaded, reader = load_bundle(model), FolderReader('.')
    pixels = np.stack([resize_and_crop(reader.read_image(f, loaded.spec.prep), loaded.spec.prep) for f in files])
    save_bundle(replace(loaded, metadata=replace(loaded.metadata, unlike=fit_unlike_scale(pixels, pixels))), where)
    export(where)
    facts = add_int8(where, reader, files, files)
    if facts: print(f'int8: {facts.recomputed:.1%} of the rows recomputed in fp32', file=sys.stderr)
    return where


def labels(engine: str, precision: str, model: Path):
    "What `predict` runs: a function from files to their labels"
    from fastsmile.data.readers import FolderReader
    from fastsmile.inference.load import load_model, make_backend
    from fastsmile.inference.predict import predict_rows
    backend = make_backend(load_model(model, engine), precision)
    return lambda files: [row['label'] for row in predict_rows(backend, FolderReader('.'), files, total=len(files)) if not row['error']]


def fastsmile(model: Path, size: int, engine: str = 'onnx', precision: str = 'auto'):
    "`predict` as it comes: onnxruntime, in int8 where the processor has AVX2 or VNNI and it pays, close rows recomputed in fp32"
    run = labels(engine, precision, model)
    return lambda files: len(run(files))


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


def graph_alone(model: Path, size: int):
    "The bound's first part: the graph that `predict` runs, a group on each core, and nothing else"
    import numpy as np
    from fastsmile.core.system import default_batch_size
    from fastsmile.inference.load import load_model, make_backend
    from fastsmile.inference.quantize import network_inputs
    backend, bs = make_backend(load_model(model, 'onnx'), 'auto'), default_batch_size(size, 'cpu', CORES)
    x = network_inputs(np.random.default_rng(0).integers(0, 256, (bs, size, size, 3), dtype=np.uint8), backend.preps)
    def once(_): return len(backend.net.session(1).run(None, x)[0])
    def run(files):
        with ThreadPoolExecutor(CORES) as pool: return sum(pool.map(once, range(-(-len(files) // bs))))
    return run


def decode_alone(model: Path, size: int):
    "The bound's second part: decoding and resizing on all cores"
    from fastsmile.data.images import resize_and_crop
    from fastsmile.data.readers import FolderReader
    from fastsmile.models.spec import parse_config, read_bundle_config
    prep, reader = parse_config(read_bundle_config(model))[0].prep, FolderReader('.')
    def run(files):
        with ThreadPoolExecutor(CORES) as pool: return sum(1 for _ in pool.map(lambda f: resize_and_crop(reader.read_image(f, prep), prep).shape, files))
    return run


CONTENDERS = dict(fastsmile=fastsmile, fp32=partial(fastsmile, precision='fp32'), torch=partial(fastsmile, engine='torch', precision='fp32'),
                  fastai=fastai, timm=timm_loop, transformers=transformers, ultralytics=ultralytics, graph=graph_alone, decode=decode_alone)


def busy() -> tuple[float, float]:
    "Seconds of processor time that the machine and that this process with its children have used"
    v = [int(t) for t in Path('/proc/stat').read_text().split('\n')[0].split()[1:9]] if Path('/proc/stat').exists() else [0] * 8
    return (sum(v) - v[3] - v[4]) / os.sysconf('SC_CLK_TCK'), sum(os.times()[:4])


def contend(args):
    "In a process of its own: a contender, which answers each line of standard input with a round"
    folder = Path(args.source)
    files, asked = sorted(map(str, (folder/'pictures').iterdir())), sys.stdout
    sys.stdout = sys.stderr  # a line there is an answer
    try: run = CONTENDERS[args.who](folder/'model', args.size)
    except ImportError as e: sys.exit(f'{args.who} is left out: {e}')
    run(files)
    print('ready', file=asked, flush=True)
    for _ in sys.stdin:
        (all0, own0), start = busy(), time.perf_counter()
        done = run(files)
        seconds, (all1, own1) = time.perf_counter() - start, busy()
        other = max(0., (all1 - all0 - own1 + own0) / seconds / CORES)
        print(json.dumps(dict(rate=done / seconds, other=other)), file=asked, flush=True)


def start(name: str, folder: Path, size: int) -> subprocess.Popen | None:
    "The process of a contender, warm; None where its package is not installed"
    cmd = [sys.executable, '-W', 'ignore', __file__, 'contend', folder, '--who', name, '--size', size]
    process = subprocess.Popen(list(map(str, cmd)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process if process.stdout.readline() == 'ready\n' else None


def round_of(process: subprocess.Popen) -> float: # pictures per second
    "A round; one that others disturbed is repeated, up to four times"
    for _ in range(4):
        print('again', file=process.stdin, flush=True)
        row = json.loads(process.stdout.readline())
        if row['other'] <= 0.05: return row['rate']
    print(f'other processes took {row["other"]:.0%} of the machine', file=sys.stderr)
    return row['rate']


def spread(values) -> dict:
    "Median and range over the rounds"
    return dict(median=round(statistics.median(values), 2), least=round(min(values), 2), most=round(max(values), 2))


def speed(args):
    "Every contender in turn, `--rounds` times, each in a process of its own"
    w, h = map(int, args.shape.split('x'))
    size = 224 if max(w, h) > 224 else max(w, h)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        files = pictures(args.source, folder/'pictures', (w, h), args.n)
        finished(bundle(args.arch, size, folder/'plain'), folder/'model', files)
        quick, exact = labels('onnx', 'auto', folder/'model')(files), labels('onnx', 'fp32', folder/'model')(files)
        ready = {name: process for name in args.who.split(',') if (process := start(name, folder, size))}
        rounds = [{name: round_of(process) for name, process in ready.items()} for _ in range(args.rounds)]
        for process in ready.values():
            process.terminate()
            process.wait()
    row = dict(arch=args.arch, shape=args.shape, size=size, n=len(files), same_labels=sum(a == b for a, b in zip(quick, exact, strict=True)),
               rates={name: spread([r[name] for r in rounds]) for name in ready})
    if {'graph', 'decode'} <= set(ready):
        row['bound'] = spread([1 / (1 / r['graph'] + 1 / r['decode']) for r in rounds])
    if 'fastai' in ready:
        row['times_fastai'] = {name: spread([r[name] / r['fastai'] for r in rounds]) for name in ready if name not in ('fastai', 'graph', 'decode')}
    print(json.dumps(row))


BY_HAND = '''
import sys
from fastai.vision.all import load_learner
label, i, p = load_learner(sys.argv[1]).predict(sys.argv[2])
print(label, p[i])
'''


def _first(_): return 'a'  # a label for fastai, which wants one; a name of a module, so that the learner can be exported


def seconds(cmd: list) -> float:
    "How long a program takes"
    start = time.perf_counter()
    subprocess.run(list(map(str, cmd)), check=True, capture_output=True)
    return time.perf_counter() - start


def cold(args):
    "One picture from a fresh process: `fastsmile predict` as it comes and with torch, and fastai's load_learner and predict"
    from fastai.vision.all import CategoryBlock, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Resize, ResizeMethod
    import timm
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        files = pictures(args.source, tmp/'pictures', (400, 533), 8)
        model = finished(bundle(args.arch, 224, tmp/'plain'), tmp/'model', files)
        block = DataBlock((ImageBlock, CategoryBlock(vocab=['a', 'b', 'c'])), get_y=_first, item_tfms=Resize(224, method=ResizeMethod.Squish))
        learn = Learner(block.dataloaders(files, num_workers=0), timm.create_model(f'local-dir:{model}', pretrained=True),
                        loss_func=CrossEntropyLossFlat())
        learn.export(tmp/'export.pkl')
        python = [sys.executable, '-W', 'ignore']
        predict = [*python, '-m', 'fastsmile', 'predict', files[0], '--model', model, '--out', tmp/'p.csv', '--overwrite']
        ways = dict(fastsmile=predict, torch=[*predict, '--engine', 'torch'], fastai=[*python, '-c', BY_HAND, tmp/'export.pkl', files[0]])
        for cmd in ways.values(): subprocess.run(list(map(str, cmd)), check=True, capture_output=True)  # fills the disk's cache
        rounds = [{name: seconds(cmd) for name, cmd in ways.items()} for _ in range(args.rounds)]
        print(json.dumps(dict(arch=args.arch, seconds={name: spread([r[name] for r in rounds]) for name in ways},
                              of_fastai={name: spread([r[name] / r['fastai'] for r in rounds]) for name in ('fastsmile', 'torch')})))


GROW = '''
import sys, time
from pathlib import Path
from fastsmile.config.commands import PredictConfig
from fastsmile.runs.predict import predict as predict_to_file
start = time.perf_counter()
done = predict_to_file(sys.argv[1], PredictConfig(model=sys.argv[2], out=sys.argv[3], device='cpu', overwrite=True))
peak = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))  # ru_maxrss begins with the parent's
print(done.rows, done.failed, time.perf_counter() - start, int(peak.split()[1]) / 1024)
'''


def growth(args):
    "Folders of 10^3, 10^4 and 10^5 files through a very small network: seconds and peak memory of the whole process"
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        files = pictures(args.source, tmp/'pictures', (32, 32), min(500, max(args.files)))
        model = finished(bundle('resnet10t', 32, tmp/'plain', '{"channels": [8, 16, 32, 64]}'), tmp/'model', files)
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
    parser.add_argument('what', choices=['speed', 'cold', 'growth', 'machine', 'contend'], help='contend is what speed starts')
    parser.add_argument('source', nargs='?', help='a zip of photographs')
    parser.add_argument('--size', type=int, default=224, help='for contend: pixels on a side')
    parser.add_argument('--arch', default='resnet18')
    parser.add_argument('--shape', default='400x533', help='width x height of the pictures; the network sees 224 px, or the side where that is smaller')
    parser.add_argument('-n', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--files', type=int, nargs='+', default=[1_000, 10_000, 100_000], help='for growth: sizes of the folders')
    parser.add_argument('--who', default=','.join(CONTENDERS))
    args = parser.parse_args()
    if args.what != 'machine' and not args.source: parser.error('a zip of photographs is needed')
    dict(speed=speed, cold=cold, growth=growth, machine=machine, contend=contend)[args.what](args)


if __name__ == '__main__': main()
