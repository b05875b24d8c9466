"""How quickly `fastsmile serve` answers, beside its network alone, and whether its memory grows.

    python benchmarks/serve.py speed --arch resnet18 --size 224 --shape 400x533    # latency and throughput at 1, 8 and 64 clients
    python benchmarks/serve.py speed --arch resnet10t --size 64 --shape 64x64
    python benchmarks/serve.py memory                                              # 10,000 requests: resident memory as they go
    python benchmarks/serve.py load --minutes 3                                    # 64 clients: every request has its own answer, or it ends with 1
    python benchmarks/serve.py machine

The server is a process of its own, on 127.0.0.1; the clients are coroutines of this one, so both share the machine's cores. Each client keeps its connection
and sends a JPEG of its own again and again, as raw bytes; an answer that is not about that picture ends the benchmark. `network alone` is the same engine on
pictures that are decoded already, in batches of the size that this many clients can fill: no HTTP, no decoding. `decoding alone` uses all cores. `bound` is
1/(t_network + t_decoding). Pictures are drawn.
"""
import argparse
import asyncio
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

warnings.filterwarnings('ignore')
os.environ['FASTSMILE_QUIET'] = '1'
sys.path.insert(0, str(Path(__file__).parent))
from predict import bundle, machine  # noqa: E402 - its neighbour

CLIENTS = (1, 8, 64)


def pictures(n: int, shape: tuple[int, int]) -> list[bytes]:
    "n drawn faces as JPEGs of one shape"
    from fastsmile.data.sample import draw_face, random_face_params
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        buf = io.BytesIO()
        face = draw_face(random_face_params(rng, ('NOT smile', 'positive smile', 'negative smile')[i % 3]), 192, rng)
        face.resize(shape, Image.Resampling.BICUBIC).save(buf, 'JPEG', quality=90)
        out.append(buf.getvalue())
    return out


class Server:
    "The command in a process of its own"
    def __init__(self, model: Path, *options: str):
        command = [sys.executable, '-m', 'fastsmile', 'serve', str(model), '--port', '0', '--json', *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.host, self.port = self.process.stdout.readline().strip().removeprefix('http://').rsplit(':', 1)

    def __enter__(self): return self

    def __exit__(self, *_):
        self.process.terminate()
        self.done = json.loads(self.process.communicate(timeout=60)[0])

    def memory(self) -> float:
        "MiB that the process holds"
        return int(Path(f'/proc/{self.process.pid}/status').read_text().split('VmRSS:')[1].split()[0]) / 1024


async def client(server: Server, name: str, data: bytes, more, times: list):
    "Send one picture again and again, while `more()` says so"
    reader, writer = await asyncio.open_connection(server.host, int(server.port))
    head = f'POST /predict?name={name} HTTP/1.1\r\nhost: {server.host}\r\ncontent-type: image/jpeg\r\ncontent-length: {len(data)}\r\n\r\n'.encode()
    while more():
        start = time.perf_counter()
        writer.write(head + data)
        top = (await reader.readuntil(b'\r\n\r\n')).lower()
        body = await reader.readexactly(int(top.split(b'content-length: ')[1].split(b'\r\n')[0]))
        times.append(time.perf_counter() - start)
        if b' 200 ' not in top[:20] or json.loads(body)['predictions'][0]['path'] != name: sys.exit(f'{name} got {top[:40]} {body[:200]}')
    writer.close()


def load(server: Server, some: list[bytes], clients: int, seconds: float) -> tuple[list[float], float]: # seconds of each answer; answers a second
    "As many clients at once, for as long"
    async def all_of_them():
        times, end = [], time.perf_counter() + seconds
        await asyncio.gather(*(client(server, f'{i}.jpg', some[i % len(some)], lambda: time.perf_counter() < end, times) for i in range(clients)))
        return times
    start = time.perf_counter()
    times = asyncio.run(all_of_them())
    return times, len(times) / (time.perf_counter() - start)


def network_alone(model: Path, some: list[bytes], batch: int, seconds: float) -> float: # pictures a second
    "The engine of the server, on decoded pictures"
    from fastsmile.data.images import decode_image, resize_and_crop
    from fastsmile.inference.load import load_model, make_backend
    engine = make_backend(load_model(model), 'auto')
    prep = engine.model.spec.prep
    x = np.stack([resize_and_crop(decode_image(some[i % len(some)], prep=prep), prep) for i in range(batch)])
    engine.logits(x)
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        engine.logits(x)
        n += batch
    return n / (time.perf_counter() - start)


def decoding_alone(some: list[bytes], size: int, seconds: float) -> float: # pictures a second
    "Decoding and resizing on all cores"
    from fastsmile.data.images import Preprocessing, decode_image, resize_and_crop
    prep = Preprocessing(size=size)
    def one(data): return resize_and_crop(decode_image(data, prep=prep), prep)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        n, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds: n += len(list(pool.map(one, some)))
    return n / (time.perf_counter() - start)


def speed(args):
    from fastsmile.core.system import default_batch_size
    shape = tuple(map(int, args.shape.split('x')))
    with tempfile.TemporaryDirectory() as tmp:
        model, some, most = bundle(args.arch, args.size, Path(tmp)/'model'), pictures(64, shape), default_batch_size(args.size, 'cpu')
        alone = {c: network_alone(model, some, min(c, most), args.seconds / 2) for c in args.clients or CLIENTS}
        decoded = decoding_alone(some, args.size, args.seconds / 4)
        print('| architecture | pictures | clients | p50 ms | p95 ms | p99 ms | answers a second | network alone | of it | decoding alone | bound | of bound |')
        print('|---|---|---|---|---|---|---|---|---|---|---|---|')
        with Server(model) as server:
            load(server, some, 8, min(1, args.seconds))
            for c in args.clients or CLIENTS:
                times, rate = load(server, some, c, args.seconds)
                p, bound = np.percentile(times, (50, 95, 99)) * 1000, 1 / (1 / alone[c] + 1 / decoded)
                print(f'| {args.arch} {args.size} px | {args.shape} | {c} | {p[0]:.1f} | {p[1]:.1f} | {p[2]:.1f} | **{rate:.0f}** | {alone[c]:.0f} '
                      f'| {rate / alone[c]:.2f} | {decoded:.0f} | {bound:.0f} | {rate / bound:.2f} |')


def memory(args):
    with tempfile.TemporaryDirectory() as tmp:
        some = pictures(64, (128, 128))
        with Server(bundle('resnet10t', 64, Path(tmp)/'model', '{"channels": [8, 16, 32, 64]}')) as server:
            times, shown, print_at = [], [], [500, 1000, 2500, 5000, 7500, args.n]
            def more():
                if print_at and len(times) >= print_at[0]:
                    print_at.pop(0)
                    shown.append((len(times), server.memory()))
                return len(times) < args.n
            async def go(): await asyncio.gather(*(client(server, f'{i}.jpg', some[i], more, times) for i in range(8)))
            start = time.perf_counter()
            asyncio.run(go())
            seconds = time.perf_counter() - start
            shown.append((len(times), server.memory()))
        print('| requests | MiB |\n|---|---|')
        for n, m in shown: print(f'| {n:,} | {m:.0f} |')
        print(f"{len(times):,} requests in {seconds:.0f} s; the server says: {server.done['pictures']:,} pictures in {server.done['batches']:,} batches")


def lasting(args):
    "64 clients for minutes: requests sent and answered, latency, memory; each answer is about the picture that was sent, or `client` ends the program"
    some = pictures(64, (128, 128))
    with tempfile.TemporaryDirectory() as tmp:
        with Server(bundle('resnet10t', 64, Path(tmp)/'model', '{"channels": [8, 16, 32, 64]}'), '--max-waiting', str(2 * max(args.clients or [64]))) as server:
            total = len(load(server, some, 8, 1)[0])
            print('| clients | minute | answers | p50 ms | p99 ms | slowest ms | answers a second | MiB |\n|---|---|---|---|---|---|---|---|')
            for c in args.clients or [64]:
                for minute in range(1, max(1, round(args.minutes)) + 1):
                    times, rate = load(server, some, c, 60 * min(1, args.minutes))
                    p, total = np.percentile(times, (50, 99, 100)) * 1000, total + len(times)
                    print(f'| {c} | {minute} | {len(times):,} | {p[0]:.1f} | {p[1]:.1f} | {p[2]:.1f} | {rate:.0f} | {server.memory():.0f} |', flush=True)
        answered = server.done['pictures']
    print(f'{total:,} answers came, the first second included; the server predicted {answered:,} pictures: {answered - total} lost')
    sys.exit(answered != total)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('speed', 'memory', 'load', 'machine'))
    p.add_argument('--arch', default='resnet18')
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--shape', default='400x533')
    p.add_argument('--clients', type=int, nargs='+', help='speed: 1 8 64; load: 64')
    p.add_argument('--seconds', type=float, default=8.)
    p.add_argument('--minutes', type=float, default=3.)
    p.add_argument('-n', type=int, default=10_000)
    args = p.parse_args()
    dict(speed=speed, memory=memory, load=lasting, machine=machine)[args.what](args)


if __name__ == '__main__': main()
