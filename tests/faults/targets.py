"""What reads files of strangers, as functions of bytes: each returns what was said of them (empty where they were taken), and raises nothing.

A target is made once in a folder of its own and is then given case after case; `seeds` are files that are right, to be spoilt.
"""
import asyncio
import hashlib
import io
import json
import re
import zipfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from fastsmile.core.errors import SmileError
from fastsmile.data.images import ImageError, decode_image
from fastsmile.config.fields import SourceOptions


def face(fmt: str, size=(24, 20), mode='RGB', seed=0, **how) -> bytes:
    "A small picture with structure"
    a = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buf = io.BytesIO()
    Image.fromarray(a).convert(mode).save(buf, fmt, **how)
    return buf.getvalue()


@dataclass
class Target:
    "Something that is fed"
    folder: Path
    seeds: list = field(default_factory=list)

    def __post_init__(self): raise NotImplementedError
    def __call__(self, data: bytes) -> str: raise NotImplementedError


def words(read, *args) -> str:
    "What a reader says of what it is given: the text of its `SmileError` or `ImageError`, or the text that it returns"
    try: said = read(*args)
    except (SmileError, ImageError) as e: return str(e)
    return said if isinstance(said, str) else ''


class Decoder(Target):
    "One picture"
    def __post_init__(self):
        kinds = dict(JPEG=('RGB', 'CMYK'), PNG=('RGBA', 'P'), GIF='P', WEBP=['RGB'], TIFF='L', BMP=['RGB'], PPM=['RGB'], JPEG2000=['RGB'], TGA=['RGB'],
                     ICO=['RGB'], AVIF=['RGB'])
        self.seeds = [face(f, mode=m) for f, modes in kinds.items() for m in modes]
        exif = Image.Exif()
        exif[0x0112] = 6
        self.seeds.append(face('JPEG', exif=exif))

    def __call__(self, data: bytes) -> str:
        def read():
            assert decode_image(data).mode == 'RGB'
        return words(read)


class Files(Target):
    "Bytes under a name in the folder, given to a reader"
    def feed(self, name: str, data: bytes, read) -> str:
        (self.folder/name).write_bytes(data)
        try: return words(read, self.folder/name)
        finally: (self.folder/name).unlink()


class Table(Files):
    "The CSV of a source, under three names"
    names = ('train.csv', 'train.tsv', 'metadata.csv')
    picture = face('JPEG')

    def __post_init__(self):
        for name in 'abc': (self.folder/f'{name}.jpg').write_bytes(face('JPEG'))
        self.seeds = [b'a,smile\nb,not smile\nc,smile\n', b'path,label,split,group\na.jpg,smile,train,p1\nb.jpg,no,test,p2\n',
                      b'file_name\tlabel\na.jpg\tx\nb.jpg\ty\n',
                      'path;label\na.jpg;lächelt\nb.jpg;ernst\n'.encode('latin-1'), b'\xef\xbb\xbfid,label\na,1\nb,0\n',
                      'path,label\na.jpg,x\n'.encode('utf-16')]

    def __call__(self, data: bytes) -> str:
        from fastsmile.data.source import read_source
        return self.feed(self.names[len(data) % 3], data, lambda path: read_source(self.folder, SourceOptions()))


class Parquet(Files):
    "The table of a source as Parquet: plain and packed, with pandas' notes and without"
    def __post_init__(self):
        import pyarrow as pa
        from pyarrow import parquet
        for name in 'abc': (self.folder/f'{name}.jpg').write_bytes(face('JPEG'))
        table = pa.table(dict(path=['a.jpg', 'b.jpg', 'c.jpg'], label=['smile', None, 'no'], age=[1, None, 3],
                              box=[[1., 2.], [], None], tags=[['x'], [], None]))
        for how in (dict(compression='zstd'), dict(compression='none', use_dictionary=False, store_schema=False), dict(compression='snappy', row_group_size=2)):
            buf = io.BytesIO()
            parquet.write_table(table.replace_schema_metadata({'pandas': '{"columns": []}'}), buf, **how)
            self.seeds.append(buf.getvalue())

    def __call__(self, data: bytes) -> str:
        from fastsmile.data.source import read_source
        return self.feed('table.parquet', data, lambda path: read_source(path, SourceOptions()))


class Archive(Files):
    "A zip of a source"
    def __post_init__(self):
        for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            buf = io.BytesIO()
            with zipfile.ZipFile(buf, 'w', how) as z:
                z.writestr('train.csv', 'a,smile\nb,no\n')
                for name in ('images/a.jpg', 'images/b.jpg', '../../up.jpg', '/abs.jpg'): z.writestr(name, face('JPEG'))
            self.seeds.append(buf.getvalue())

    def __call__(self, data: bytes) -> str:
        from fastsmile.data.source import read_source
        def read(path):
            source = read_source(path, SourceOptions())
            return '; '.join(filter(None, (words(source.reader.read_image, name) for name in source.frame.path[:4])))
        return self.feed('source.zip', data, read)


class Plan(Files):
    "An edited cleaning plan"
    def __post_init__(self):
        self.seeds = [b'path,action,reason,group,new_label\na.jpg,drop,why,same-1,\nb.jpg,keep,,,smile\n', b'action\tpath\nkeep\ta.jpg\n']

    def __call__(self, data: bytes) -> str:
        from fastsmile.data.plan import read_plan
        return self.feed('plan.csv', data, read_plan)


class Arrays(Files):
    "An array with labels"
    def __post_init__(self):
        for save, name in ((np.save, 'npy'), (np.savez, 'npz')):
            buf = io.BytesIO()
            if name == 'npy': save(buf, np.zeros((4, 6, 6, 3), np.uint8))
            else: save(buf, x_train=np.zeros((4, 6, 6, 3), np.uint8), y_train=np.array([0, 1, 0, 1]))
            self.seeds.append(buf.getvalue())
        (self.folder/'labels.txt').write_text('0\n1\n0\n1\n')

    def __call__(self, data: bytes) -> str:
        from fastsmile.data.source import read_source
        kind = 'npz' if data[:2] == b'PK' else 'npy'
        return self.feed(f'faces.{kind}', data, lambda path: read_source(path, SourceOptions(labels=str(self.folder/'labels.txt') if kind == 'npy' else None)))


class List(Files):
    "A list or a CSV of pictures to predict"
    def __post_init__(self):
        (self.folder/'a.jpg').write_bytes(face('JPEG'))
        self.seeds = [b'a.jpg\nmissing.jpg\n', b'path,x\na.jpg,1\n', b'path;x\n"a.jpg";1\n', b'a\n\n \n../a.jpg\n']

    def __call__(self, data: bytes) -> str:
        from fastsmile.inference.inputs import open_inputs
        def read(path):
            made = open_inputs(path)
            return '; '.join(filter(None, (words(made.reader.read_image, name) for name in list(made.names)[:20])))
        return self.feed(('list.txt', 'list.csv')[len(data) % 2], data, read)


class Bundle(Target):
    "A model's config.json, or its weights with a checksum that fits"
    def __post_init__(self):
        from fastsmile.models.bundle import save_bundle
        from fastsmile.models.spec import Model, ModelMetadata
        from fastsmile.models.factory import build_network, make_spec
        spec = make_spec('resnet10t', ('a', 'b'), 32, 'squash', '{"channels": [4, 4, 4, 4]}', 'linear', 0.0, None)
        save_bundle(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), build_network(spec, 'none').eval()), self.folder)
        self.config, self.weights = ((self.folder/n).read_bytes() for n in ('config.json', 'model.safetensors'))
        self.seeds = [self.config, self.weights]

    def __call__(self, data: bytes) -> str:
        from fastsmile.models.bundle import load_bundle
        is_config = data.lstrip()[:1] == b'{'
        config = data if is_config else json.dumps(self._signed(data)).encode()
        (self.folder/'config.json').write_bytes(config)
        (self.folder/'model.safetensors').write_bytes(self.weights if is_config else data)
        return words(load_bundle, self.folder)

    def _signed(self, weights: bytes) -> dict:
        "The config with the checksum of these weights"
        made = json.loads(self.config)
        made['fastsmile']['sha256'] = hashlib.sha256(weights).hexdigest()
        return made


class State(Files):
    "The state of a training that is gone on with"
    def __post_init__(self):
        import torch
        from fastsmile.training.resume import write_state
        write_state(self.folder/'state.safetensors', {'model.a': torch.zeros(3), 'rng.torch': torch.zeros(8, dtype=torch.uint8)}, dict(rows=[], phase=0))
        self.seeds = [(self.folder/'state.safetensors').read_bytes()]

    def __call__(self, data: bytes) -> str:
        from fastsmile.training.resume import read_state
        return self.feed('state.safetensors', data, read_state)


class Api(Target):
    "A whole HTTP request to the server's application: any status but 500, and JSON where JSON is said"
    config = dict(max_bytes=100_000, max_pixels=100_000, max_files=3, max_wait=0, device='cpu', precision='fp32', timeout=20.)

    def __post_init__(self):
        from fastsmile.models.spec import Model, ModelMetadata
        from fastsmile.models.factory import build_network, make_spec
        from fastsmile.config.commands import ServeConfig
        from fastsmile.serving.service import Service
        from fastsmile.serving.app import make_app
        spec = make_spec('resnet10t', ('a', 'b'), 32, 'squash', '{"channels": [4, 4, 4, 4]}', 'linear', 0.0, None)
        model = Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), build_network(spec, 'none').eval())
        self.app = make_app(Service(model, ServeConfig(**self.config)))
        self.loop = asyncio.new_event_loop()
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + face('PNG') + b'\r\n--x--\r\n'
        multi, raw = b'content-type: multipart/form-data; boundary=x', b'content-type: image/jpeg\r\norigin: http://localhost'
        self.seeds = [b'\r\n'.join([line, b'host: localhost', more, b'content-length: %d' % len(body), b'', body]) for line, more, body in (
            (b'POST /predict HTTP/1.1', multi, form), (b'POST / HTTP/1.1', multi, form), (b'POST /predict?name=a.jpg HTTP/1.1', raw, face('JPEG')),
            (b'POST /explain?method=sensitivity&label=a&face=1 HTTP/1.1', raw, face('JPEG')), (b'GET /model HTTP/1.1', b'x: y', b''),
            (b'GET /serve.js HTTP/1.1', b'sec-fetch-site: none', b''), (b'GET /healthz HTTP/1.1', b'x: y', b''))]

    def __call__(self, data: bytes) -> str:
        head, _, body = data.partition(b'\r\n\r\n')
        first, *lines = head.split(b'\r\n')
        method, target = (first.split(b' ') + [b'', b''])[:2]
        path, _, query = target.partition(b'?')
        split = [(k.strip().lower(), v.strip()) for k, _, v in (line.partition(b':') for line in lines)]
        headers = [(k, v) for k, v in split if re.fullmatch(rb"[\w!#$%&'*+.^`|~-]+", k)]
        verb, where = method.decode('latin-1').upper() or 'GET', unquote(path.decode('latin-1')) or '/'
        scope = dict(type='http', asgi=dict(version='3.0'), http_version='1.1', method=verb, scheme='http', server=('::1', 80), path=where, raw_path=path,
                     query_string=query, root_path='', client=('::1', 1), headers=headers, state={})
        half = len(body) // 2
        came = [dict(type='http.request', body=body[:half], more_body=True), dict(type='http.request', body=body[half:], more_body=False)]
        said = []
        async def receive(): return came.pop(0) if came else dict(type='http.disconnect')
        async def send(message): said.append(message)
        self.loop.run_until_complete(self.app(scope, receive, send))
        status, text = said[0]['status'], b''.join(m.get('body', b'') for m in said[1:])
        assert status in (200, 403, 404, 405, 413, 415, 421, 422, 431, 503), status
        if dict(said[0]['headers']).get(b'content-type') == b'application/json' and scope['method'] != 'HEAD': json.loads(text)
        assert self.app.state.service.limiter.active == self.app.state.service.limiter.bytes_held == 0
        return '' if status == 200 else f'{status} {text.decode()[:200]}'


TARGETS = dict(decoder=Decoder, table=Table, archive=Archive, plan=Plan, arrays=Arrays, list=List, bundle=Bundle, state=State, api=Api)
if find_spec('pyarrow'): TARGETS['parquet'] = Parquet
