"""How well scores tell images that are unlike a model's training images from others: AUC, and the share that is flagged.

    python benchmarks/unlike.py --out DIR            three small trainings, then the table; about six minutes on one core
    python benchmarks/unlike.py --out DIR --quick    two epochs of the smallest on fewer rows: about a minute

Models: `scratch` (resnet10t, narrow, from random weights) and `mobilenet` (mobilenetv2_100, fine-tuned) on crops of `smiles.zip`,
which are all grey, and `garments` (mobilenetv2_100 on `clothing.zip`, in colour). Held-out test rows of the same source are the
images that are alike; every other set is compared with them: the same rows blurred (a Gaussian of 3% and 6% of the longer side),
turned, with noise (standard deviation 40 of 255), tinted or turned grey, and images of other sources. A score flags what is above
95% of calib, so that 5% of the test rows are expected. Scores: `statistics`, what fastsmile uses (`data/unlike.py`: the network's
input alone); energy and the highest logit; of the features, the Mahalanobis distance to the nearest class mean (shared
covariance) and the cosine distance to the tenth-nearest training image.
`faces` and `smiles.zip` show many of the same photographs, in other crops.
"""
import argparse
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from domain import tinted
from PIL import Image, ImageFilter
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from fastsmile import FitConfig, fit
from fastsmile.data.images import resize_and_crop
from fastsmile.data.sample import SAMPLE_CLASSES, draw_face, random_face_params
from fastsmile.data.source import read_source
from fastsmile.config.fields import SourceOptions
from fastsmile.data.unlike import UNLIKE_SHARE
from fastsmile.inference.features import feature_model
from fastsmile.inference.load import load_model
from fastsmile.inference.torch_backend import TorchBackend

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'


def options(name: str, a: argparse.Namespace) -> dict: # of `fit`
    common = dict(size=a.size, tta='none', augment='light', balance='none', calib=a.calib, out=str(a.out/name))
    if name == 'scratch':
        net = dict(arch='resnet10t', model_args='{"channels": [32, 64, 128, 256]}', weights='none', lr='0.004', epochs=5)
    else: net = dict(arch='mobilenetv2_100', weights=str(a.weights/'mobilenetv2_100.safetensors'), lr='0.003', epochs=2)
    if name == 'garments': return common | net | dict(epochs=3)
    crops = read_source(a.data/'smiles.zip', SourceOptions(label_col='label', group_col='person')).kept
    crops.sample(min(a.rows, len(crops)), random_state=0)[['path', 'label', 'group']].to_csv(a.out/'crops.csv', index=False)
    table = dict(labels=str(a.out/'crops.csv'), label_col='label', group_col='group', test=0.2, valid=0.1)
    return common | net | table | (dict(epochs=2) if a.quick else {})


def read_images(file: Path, names: list[str]) -> list[Image.Image]: # RGB
    with zipfile.ZipFile(file) as z: return [Image.open(io.BytesIO(z.read(n))).convert('RGB') for n in names]


def some_of(file: Path, n: int) -> list[Image.Image]:
    with zipfile.ZipFile(file) as z: names = [x for x in sorted(z.namelist()) if x.lower().endswith(('.jpg', '.jpeg', '.png'))]
    return read_images(file, list(np.random.default_rng(1).choice(names, min(n, len(names)), replace=False)))


def noisy(img: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray((np.asarray(img, float) + rng.normal(0, 40, (*img.size[::-1], 3))).clip(0, 255).astype(np.uint8))


def other_images(test: list[Image.Image], name: str, a: argparse.Namespace) -> dict[str, list[Image.Image]]:
    "Images that the model was not trained for"
    rng, own = np.random.default_rng(0), 'clothing.zip' if name == 'garments' else 'smiles.zip'
    def blurred(share: float) -> list: return [i.filter(ImageFilter.GaussianBlur(share * max(i.size))) for i in test]
    sets = {'blurred 3%': blurred(.03), 'blurred 6%': blurred(.06), 'turned 90': [i.rotate(90, expand=True) for i in test],
            'turned 180': [i.rotate(180) for i in test], 'noise': [noisy(i, rng) for i in test]}
    if name == 'garments': sets |= {'grey': [i.convert('L').convert('RGB') for i in test]}
    else: sets |= {'tinted': [tinted(i, rng) for i in test]}
    for title, file in (('garments', 'clothing.zip'), ('crops', 'smiles.zip'), ('faces', 'facial_expressions.zip')):
        if file != own: sets[title] = some_of(a.data/file, a.images)
    labels = list(SAMPLE_CLASSES)
    drawn = [draw_face(random_face_params(rng, labels[i % len(labels)]), 128, rng) for i in range(a.images)]
    return sets | {'drawn faces': drawn}


def batched(backend: TorchBackend, pixels: np.ndarray) -> np.ndarray: # (n, ...)
    return np.concatenate([backend.logits(pixels[i:i + 64]) for i in range(0, len(pixels), 64)]).astype(np.float64)


def energy(z: np.ndarray) -> np.ndarray: return -np.logaddexp.reduce(z, axis=1)


def mahalanobis(train: np.ndarray, y: np.ndarray) -> Callable: # features (n, F) -> (n,)
    "Distance to the nearest class mean; the shared covariance is drawn to the identity by 5% of its mean variance"
    means = np.stack([train[y == c].mean(0) for c in np.unique(y)])
    rest = train - means[np.unique(y, return_inverse=True)[1]]
    cov = rest.T @ rest / len(rest)
    precision = np.linalg.inv(cov + 0.05 * np.trace(cov) / len(cov) * np.eye(len(cov)))
    return lambda f: np.min([((f - m) @ precision * (f - m)).sum(1) for m in means], 0)


def nearest(train: np.ndarray) -> Callable: # features (n, F) -> (n,)
    def unit(f: np.ndarray) -> np.ndarray: return f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-9)
    neighbours = NearestNeighbors(n_neighbors=min(10, len(train))).fit(unit(train))
    return lambda f: neighbours.kneighbors(unit(f))[0][:, -1]


def measure(name: str, a: argparse.Namespace):
    "A row of the table for each score"
    model, table = load_model(a.out/name, 'torch'), pd.read_csv(a.out/name/'table.csv', keep_default_na=False)
    file, used = a.data/('clothing.zip' if name == 'garments' else 'smiles.zip'), table[table.reason == '']
    images, y = {}, None
    for split in ('train', 'calib', 'test'):
        rows = used[used.split == split]
        rows = rows.sample(min(len(rows), 2000), random_state=0)
        images[split] = read_images(file, rows.path.tolist())
        if split == 'train': y = rows.label.map(model.spec.classes.index).to_numpy()
    images |= other_images(images['test'][:a.images], name, a)
    pixels = {k: np.stack([resize_and_crop(i, model.spec.prep) for i in v]) for k, v in images.items()}
    del images
    backends = TorchBackend(model, device='cpu'), TorchBackend(feature_model(model.spec, model.net), device='cpu')
    logits, features = ({k: batched(b, p) for k, p in pixels.items()} for b in backends)
    distance, neighbours = mahalanobis(features['train'], y), nearest(features['train'])
    scores = {'statistics': {k: model.metadata.unlike.score(p) for k, p in pixels.items()},
              'energy': {k: energy(z) for k, z in logits.items()}, 'highest logit': {k: -z.max(1) for k, z in logits.items()},
              'Mahalanobis': {k: distance(f) for k, f in features.items()}, 'neighbours': {k: neighbours(f) for k, f in features.items()}}
    others = [k for k in pixels if k not in ('train', 'calib', 'test')]
    print(f'\n| {name} | test | {" | ".join(others)} |\n|---|---|{"---|" * len(others)}')
    for title, score in scores.items():
        bar, alike = np.quantile(score['calib'], UNLIKE_SHARE), score['test']
        cells = []
        for k in others:
            truth = np.arange(len(alike) + len(score[k])) >= len(alike)
            cells.append(f'{roc_auc_score(truth, np.concatenate([alike, score[k]])):.2f}, {(score[k] > bar).mean():.0%}')
        print(f'| {title} | {(alike > bar).mean():.1%} | {" | ".join(cells)} |', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder of the runs; those that are there are not trained again')
    p.add_argument('--data', type=Path, default=SHARED/'data')
    p.add_argument('--weights', type=Path, default=SHARED/'weights')
    p.add_argument('--models', default=None, help='scratch,mobilenet,garments; with --quick scratch alone')
    p.add_argument('--rows', type=int, default=6000, help='crops that are trained and measured on')
    p.add_argument('--images', type=int, default=600, help='images of each other set, at the most')
    p.add_argument('--size', type=int, default=64, help='pixels of the network input')
    p.add_argument('--calib', type=float, default=0.15, help='share of train that is set aside')
    p.add_argument('--quick', action='store_true')
    a = p.parse_args()
    if a.quick: a.rows, a.images = min(a.rows, 2000), min(a.images, 200)
    a.out.mkdir(parents=True, exist_ok=True)
    for name in (a.models or ('scratch' if a.quick else 'scratch,mobilenet,garments')).split(','):
        source = a.data/('clothing.zip' if name == 'garments' else 'smiles.zip')
        if not (a.out/name/'model'/'config.json').exists(): fit(source, FitConfig(**options(name, a)))
        measure(name, a)


if __name__ == '__main__': main()
