"""How good a model of face crops is on photographs that are unlike them: in colour, the face small and somewhere.

    python benchmarks/domain.py draw --out DIR                   the stand-in photographs and the table of the crops
    python benchmarks/domain.py fit --out DIR --models scratch   train on grey 64-pixel crops: scratch, mobilenet
    python benchmarks/domain.py measure --out DIR                accuracy and AUC on the photographs, before and after

Training: the crops of `smiles.zip` whose person is known, without a fifth of the persons. Stand-in photographs show none of the
training's persons: grey faces of `facial_expressions.zip` (wider crops than those of `smiles.zip`) of that fifth, tinted in the colours of skin
and pasted with a soft edge, at several scales, into colour photographs (`clothing.zip`); and its few frames in colour, as they are.
happiness is smile, neutral is not smile. `before` reads photographs as a model without a domain does: in their colours,
cut at the box of the detector.
"""
import argparse
import io
import re
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn.metrics import roc_auc_score

from fastsmile import FitConfig, fit
from fastsmile.config.fields import SourceOptions
from fastsmile.data.faces import FaceDetector, make_face_detector
from fastsmile.data.readers import FolderReader
from fastsmile.data.source import read_source
from fastsmile.inference.load import load_model
from fastsmile.inference.predict import predict_frame

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
LABELS = dict(happiness='smile', neutral='not smile')
FACE_HEIGHTS, PHOTO_SIDES = (56, 80, 112, 160, 224), (320, 400, 512)  # pixels: of a pasted crop, of the shorter side


def held_out(person: str) -> bool: return zlib.crc32(person.encode()) % 5 == 0


def expressions(data: Path) -> pd.DataFrame: # name in the zip, label, person, colour
    "The happy and neutral faces: grey ones of the persons that are held out, and all frames in colour"
    legend = pd.read_csv(data/'legend.csv').drop_duplicates('image').set_index('image').emotion.str.lower()
    rows = []
    with zipfile.ZipFile(data/'facial_expressions.zip') as z:
        for name in sorted(n for n in z.namelist() if not n.endswith('/')):
            file = name.rpartition('/')[2]
            person = re.match(r'(.+)_\d+\.\w+$', file)
            label = LABELS.get(legend.get(file))
            if not label or not person: continue
            colour = Image.open(io.BytesIO(z.read(name))).mode != 'L'
            if colour or held_out(person[1]): rows.append((name, label, person[1], colour))
    return pd.DataFrame(rows, columns=['name', 'label', 'person', 'colour'])


def tinted(face: Image.Image, rng: np.random.Generator) -> Image.Image: # RGB
    "A grey face in the colours of skin under some light"
    light = rng.uniform([225, 175, 130], [255, 225, 205]).round().astype(int)
    dark = rng.uniform([5, 0, 0], [45, 25, 20]).round().astype(int)
    middle = (0.5 * light + 0.5 * dark + rng.uniform(-12, 12, 3)).clip(0, 255).astype(int)
    return ImageOps.colorize(face.convert('L'), *map(tuple, (dark, light)), mid=tuple(middle))


def pasted(face: Image.Image, background: Image.Image, height: int, side: int, rng: np.random.Generator) -> Image.Image:
    "A photograph with the face somewhere in it, with a soft edge"
    scale = side / min(background.size)
    photo = background.resize([round(v * scale) for v in background.size], Image.Resampling.BICUBIC)
    face = face.resize((max(1, round(face.width * height / face.height)), height), Image.Resampling.BICUBIC)
    mask = Image.new('L', face.size)
    edge = round(0.04 * height)
    ImageDraw.Draw(mask).rounded_rectangle([edge, edge, face.width - edge, face.height - edge], 0.3 * height, fill=255)
    at = tuple(int(rng.integers(0, max(1, p - f))) for p, f in zip(photo.size, face.size))
    photo.paste(face, at, mask.filter(ImageFilter.GaussianBlur(edge)))
    return photo


def draw(data: Path, out: Path, n: int, seed: int = 0):
    "photographs/ with labels.csv, and crops.csv: the training rows"
    rng, faces = np.random.default_rng(seed), expressions(data)
    (out/'photographs').mkdir(parents=True, exist_ok=True)
    grey, colour = faces[~faces.colour], faces[faces.colour]
    chosen = [g.sample(min(n // 2, len(g)), random_state=seed) for part in (grey, colour) for _, g in part.groupby('label')]
    rows = []
    with zipfile.ZipFile(data/'facial_expressions.zip') as z, zipfile.ZipFile(data/'clothing.zip') as scenes:
        backgrounds = [s for s in sorted(scenes.namelist()) if s.endswith('.jpg')]
        for i, row in enumerate(pd.concat(chosen).itertuples()):
            img = Image.open(io.BytesIO(z.read(row.name))).convert('RGB')
            height = int(rng.choice(FACE_HEIGHTS))
            if not row.colour:
                scene = Image.open(io.BytesIO(scenes.read(backgrounds[rng.integers(len(backgrounds))]))).convert('RGB')
                img = pasted(tinted(img, rng), scene, height, int(rng.choice(PHOTO_SIDES)), rng)
            img.save(out/'photographs'/f'{i:05}.jpg', quality=92)
            rows.append((f'{i:05}.jpg', row.label, row.person, 'frame' if row.colour else f'pasted {height}'))
    pd.DataFrame(rows, columns=['image', 'label', 'person', 'kind']).to_csv(out/'labels.csv', index=False)
    crops = read_source(data/'smiles.zip', SourceOptions(label_col='label', group_col='person')).kept
    crops = crops[(crops.group != '') & ~crops.group.map(held_out)]
    crops[['path', 'label', 'group']].to_csv(out/'crops.csv', index=False)
    print(f'{len(rows)} photographs, {len(crops)} crops to train on')


def models(weights: Path) -> dict: # name -> options of `fit`
    small = dict(arch='resnet10t', model_args='{"channels": [32, 64, 128, 256]}', weights='none', size=64, lr='0.004', epochs=8)
    mobile = dict(arch='mobilenetv2_100', weights=str(weights/'mobilenetv2_100.safetensors'), size=96, lr='0.003', epochs=3)
    return dict(scratch=small, mobilenet=mobile)


def train(data: Path, out: Path, name: str, options: dict):
    "A run folder of that name"
    config = FitConfig(labels=str(out/'crops.csv'), label_col='label', group_col='group', test=0.1, valid=0.1, tta='none',
                       augment='light', monitor='loss', balance='none', out=str(out/name), **options)
    fit(data/'smiles.zip', config)


def measured(model, out: Path, faces: FaceDetector) -> list[tuple]: # kind of photograph, rows, accuracy, AUC
    "Figures on the photographs in which a face is found"
    table = pd.read_csv(out/'labels.csv', dtype=str)
    rows = predict_frame(model, FolderReader(out/'photographs'), table.image, faces=faces)
    rows = rows.merge(table.rename(columns=dict(image='path', label='target')), on='path')
    rows, result = rows[rows.error == ''], []
    for kind, part in [('all', rows), *rows.groupby(rows.kind.str.split().str[0])]:
        if part.target.nunique() < 2: continue
        auc = roc_auc_score(part.target == 'smile', part['p_smile'].astype(float))
        result.append((kind, len(part), (part.label == part.target).mean(), auc))
    return result


def without_domain(model): return replace(model, spec=replace(model.spec, prep=replace(model.spec.prep, grey=False)))


class Wanted:
    "The options of `--faces largest`"
    faces, face_margin, face_score = 'largest', None, 0.7


def measure(out: Path, names: list[str]):
    "A row of a Markdown table for each model and each way to read photographs"
    print('| model | photographs are read | of | rows | accuracy | AUC |\n|---|---|---|---|---|---|')
    for name in names:
        if not (out/name/'model'/'config.json').exists(): continue
        model = load_model(out/name)
        ways = [('before', without_domain(model), FaceDetector('largest', 0., 0.7)),
                ('after', model, make_face_detector(Wanted, model.metadata.domain.face))]
        for way, read, faces in ways:
            for kind, n, accuracy, auc in measured(read, out, faces):
                print(f'| {name} | {way} | {kind} | {n} | {accuracy:.3f} | {auc:.3f} |', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('draw', 'fit', 'measure'))
    p.add_argument('--out', type=Path, required=True, help='folder of photographs and runs')
    p.add_argument('--data', type=Path, default=SHARED/'data')
    p.add_argument('--weights', type=Path, default=SHARED/'weights')
    p.add_argument('--models', default='scratch,mobilenet')
    p.add_argument('-n', type=int, default=1000, help='photographs of a kind, at the most')
    p.add_argument('--epochs', type=int)
    a = p.parse_args()
    if a.what == 'draw': draw(a.data, a.out, a.n)
    if a.what == 'fit':
        for name in a.models.split(','):
            train(a.data, a.out, name, models(a.weights)[name] | (dict(epochs=a.epochs) if a.epochs else {}))
    if a.what == 'measure': measure(a.out, a.models.split(','))


if __name__ == '__main__': main()
