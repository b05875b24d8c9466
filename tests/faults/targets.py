"""What reads files of strangers, as functions of bytes: each returns or raises `SmileError` (a picture: `ImageError`), and nothing else.

A target is made once in a folder of its own and is then given case after case; `seeds` are files that are right, to be spoilt.
"""
import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fastsmile.core import SmileError
from fastsmile.images import ImageError, decode
from fastsmile.options import SourceOptions


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
    def __call__(self, data: bytes): raise NotImplementedError


class Decoder(Target):
    "One picture"
    def __post_init__(self):
        kinds = dict(JPEG=('RGB', 'CMYK'), PNG=('RGBA', 'P'), GIF='P', WEBP=['RGB'], TIFF='L', BMP=['RGB'], PPM=['RGB'], JPEG2000=['RGB'], TGA=['RGB'],
                     ICO=['RGB'], AVIF=['RGB'])
        self.seeds = [face(f, mode=m) for f, modes in kinds.items() for m in modes]
        exif = Image.Exif()
        exif[0x0112] = 6
        self.seeds.append(face('JPEG', exif=exif))

    def __call__(self, data: bytes):
        try: assert decode(data).mode == 'RGB'
        except ImageError: pass


class Table(Target):
    "The CSV of a source, under three names"
    names = ('train.csv', 'train.tsv', 'metadata.csv')

    def __post_init__(self):
        for name in 'abc': (self.folder/f'{name}.jpg').write_bytes(face('JPEG'))
        self.seeds = [b'a,smile\nb,not smile\nc,smile\n', b'path,label,split,group\na.jpg,smile,train,p1\nb.jpg,no,test,p2\n',
                      b'file_name\tlabel\na.jpg\tx\nb.jpg\ty\n',
                      'path;label\na.jpg;lächelt\nb.jpg;ernst\n'.encode('latin-1'), b'\xef\xbb\xbfid,label\na,1\nb,0\n',
                      'path,label\na.jpg,x\n'.encode('utf-16')]

    def __call__(self, data: bytes):
        from fastsmile.table import read_source
        name = self.names[len(data) % 3]
        (self.folder/name).write_bytes(data)
        try: read_source(self.folder, SourceOptions())
        except SmileError: pass
        finally: (self.folder/name).unlink()


class Archive(Target):
    "A zip of a source"
    def __post_init__(self):
        for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            buf = io.BytesIO()
            with zipfile.ZipFile(buf, 'w', how) as z:
                z.writestr('train.csv', 'a,smile\nb,no\n')
                for name in ('images/a.jpg', 'images/b.jpg', '../../up.jpg', '/abs.jpg'): z.writestr(name, face('JPEG'))
            self.seeds.append(buf.getvalue())

    def __call__(self, data: bytes):
        from fastsmile.table import read_source
        path = self.folder/'source.zip'
        path.write_bytes(data)
        try:
            source = read_source(path, SourceOptions())
            for name in source.frame.path[:4]:
                try: source.reader.image(name)
                except ImageError: pass
        except SmileError: pass


class Plan(Target):
    "An edited cleaning plan"
    def __post_init__(self):
        self.seeds = [b'path,action,reason,group,new_label\na.jpg,drop,why,same-1,\nb.jpg,keep,,,smile\n', b'action\tpath\nkeep\ta.jpg\n']

    def __call__(self, data: bytes):
        from fastsmile.plan import read_plan
        path = self.folder/'plan.csv'
        path.write_bytes(data)
        try: read_plan(path)
        except SmileError: pass


class Arrays(Target):
    "An array with labels"
    def __post_init__(self):
        for save, name in ((np.save, 'npy'), (np.savez, 'npz')):
            buf = io.BytesIO()
            if name == 'npy': save(buf, np.zeros((4, 6, 6, 3), np.uint8))
            else: save(buf, x_train=np.zeros((4, 6, 6, 3), np.uint8), y_train=np.array([0, 1, 0, 1]))
            self.seeds.append(buf.getvalue())
        (self.folder/'labels.txt').write_text('0\n1\n0\n1\n')

    def __call__(self, data: bytes):
        from fastsmile.table import read_source
        kind = 'npz' if data[:2] == b'PK' else 'npy'
        path = self.folder/f'faces.{kind}'
        path.write_bytes(data)
        try: read_source(path, SourceOptions(labels=str(self.folder/'labels.txt') if kind == 'npy' else None))
        except SmileError: pass


class List(Target):
    "A list or a CSV of pictures to predict"
    def __post_init__(self):
        (self.folder/'a.jpg').write_bytes(face('JPEG'))
        self.seeds = [b'a.jpg\nmissing.jpg\n', b'path,x\na.jpg,1\n', b'path;x\n"a.jpg";1\n', b'a\n\n \n../a.jpg\n']

    def __call__(self, data: bytes):
        from fastsmile.inputs import open_inputs
        path = self.folder/('list.txt', 'list.csv')[len(data) % 2]
        path.write_bytes(data)
        try:
            made = open_inputs(path)
            for name in list(made.names)[:20]:
                try: made.reader.raw(name)
                except ImageError: pass
        except SmileError: pass


class Bundle(Target):
    "A model's config.json, or its weights with a checksum that fits"
    def __post_init__(self):
        from fastsmile.bundle import Facts, Model, save_bundle
        from fastsmile.models import build, make_spec
        spec = make_spec('resnet10t', ('a', 'b'), 32, 'squash', '{"channels": [4, 4, 4, 4]}', 'linear', 0.0, None)
        save_bundle(Model(spec, Facts([.5, .5], [0., 0.], [0., 0.], 'argmax'), build(spec, 'none').eval()), self.folder)
        self.config, self.weights = ((self.folder/n).read_bytes() for n in ('config.json', 'model.safetensors'))
        self.seeds = [self.config, self.weights]

    def __call__(self, data: bytes):
        from fastsmile.bundle import load_bundle
        is_config = data.lstrip()[:1] == b'{'
        config = data if is_config else json.dumps(self._signed(data)).encode()
        (self.folder/'config.json').write_bytes(config)
        (self.folder/'model.safetensors').write_bytes(self.weights if is_config else data)
        try: load_bundle(self.folder)
        except SmileError: pass

    def _signed(self, weights: bytes) -> dict:
        "The config with the checksum of these weights"
        made = json.loads(self.config)
        made['fastsmile']['sha256'] = hashlib.sha256(weights).hexdigest()
        return made


class State(Target):
    "The state of a training that is gone on with"
    def __post_init__(self):
        import torch
        from fastsmile.resume import write_state
        write_state(self.folder/'state.safetensors', {'model.a': torch.zeros(3), 'rng.torch': torch.zeros(8, dtype=torch.uint8)}, dict(rows=[], phase=0))
        self.seeds = [(self.folder/'state.safetensors').read_bytes()]

    def __call__(self, data: bytes):
        from fastsmile.resume import read_state
        path = self.folder/'state.safetensors'
        path.write_bytes(data)
        try: read_state(path)
        except SmileError: pass


TARGETS = dict(decoder=Decoder, table=Table, archive=Archive, plan=Plan, arrays=Arrays, list=List, bundle=Bundle, state=State)
