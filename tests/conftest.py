"Small things that several tests share: pictures, a sample, a trained run."
import functools
import io
import os
import shutil
import time
import warnings
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from forked import run_python
from PIL import Image

os.environ.setdefault('FASTSMILE_QUIET', '1')
warnings.filterwarnings('ignore', category=FutureWarning)

SHARED = Path(__file__).resolve().parent.parent.parent/'shared'
TIMES = ['seconds', 'images_per_second', 'memory']  # columns of history.csv that no two trainings share
TINY = '{"channels": [8, 16, 32, 64]}'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A worker takes a file, whose tests share its fixtures; benchmarks share none: one at a time, last"
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition('::')[0]
            return nodeid if file.endswith('test_benchmarks.py') else file
    return ByFile(config, log)


@pytest.fixture(scope='session')
def shared():
    "The folder of real data and weights that may stand beside the project"
    if not (SHARED/'data'/'smiles.zip').exists(): pytest.skip('no real data at ../shared/data')
    return SHARED


@pytest.fixture(scope='session', autouse=True)
def own_cache(tmp_path_factory):
    "No test reads or leaves anything in the user's cache"
    os.environ['FASTSMILE_CACHE'] = str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def faces(tmp_path_factory):
    "A small sample data set"
    from fastsmile.config.commands import SampleConfig
    from fastsmile.data.sample import sample
    return sample(tmp_path_factory.mktemp('sample')/'faces', SampleConfig(n=120))


@pytest.fixture(scope='session')
def tiny():
    "Options of a run that takes seconds"
    from fastsmile.config.fit import FitConfig
    return FitConfig(arch='resnet10t', weights='none', model_args=TINY, size=32, epochs=2, bs=16, lr='0.005', seed=1, precision='fp32', no_onnx=True)


@pytest.fixture(scope='session')
def data(faces, tiny):
    "The sample, audited and divided"
    from fastsmile.data.audit import audit_and_split
    from fastsmile.data.source import read_source
    return audit_and_split(read_source(faces, tiny), tiny)


def learner(data, config, path):
    "A Learner on the CPU that has not trained yet"
    from fastsmile.runs.fit import new_network
    from fastsmile.training.learner import build_learner
    from fastsmile.training.learner import spec_from_config
    spec = spec_from_config(config, data.classes)
    return build_learner(data, spec, new_network(spec, config), config, path, 'cpu')[0]


def trained(data, config, path, resume=False):
    "A training alone: its history without times, what it tells, its Learner"
    import pandas as pd
    from fastsmile.training.learner import train_learner
    learn = learner(data, config, path)
    told, _ = train_learner(learn, config, path, resume)
    return pd.DataFrame(learn.history.rows).drop(columns=TIMES), told, learn


@pytest.fixture(scope='session')
def run(faces, tiny, tmp_path_factory):
    "A finished run on the sample; its rule gives all classes, though the little network is sure of none"
    from dataclasses import replace
    from fastsmile.runs.fit import fit
    return fit(faces, replace(tiny, decide='balanced', out=str(tmp_path_factory.mktemp('runs')/'tiny')))


@contextmanager
def without_charts():
    "Reports of runs without charts and explained pictures, which take most of the time of a little training"
    with pytest.MonkeyPatch.context() as m:
        m.setattr('fastsmile.reports.run._report_charts', lambda *_: defaultdict(str))
        m.setattr('fastsmile.reports.run._threshold_charts', lambda *_: {})
        m.setattr('fastsmile.runs.fit.write_training_plots', lambda run: None)
        m.setattr('fastsmile.runs.results.explain_for_report', lambda *_: None)
        yield


@pytest.fixture
def no_charts():
    "For a test that trains several runs and looks at the charts and explained pictures of none"
    with without_charts(): yield


@pytest.fixture(scope='module')
def no_charts_in_module(run):
    "The same for all tests and fixtures of a file, by `pytestmark`; the run that all files share has its charts by then"
    with without_charts(): yield


@pytest.fixture(scope='module')
def browser():
    "Chromium for the tests of a file, each with a page of its own"
    sync_api = pytest.importorskip('playwright.sync_api')
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not found: pytest.skip('no Chromium on this machine')
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield browser
        browser.close()


def faults_of_file(browser, path, scheme, width) -> list[tuple]: # of `accessibility_faults`
    "What axe-core finds in a page of a run, in a colour scheme and at a width in pixels"
    page = browser.new_page(color_scheme=scheme, viewport=dict(width=width, height=900))
    page.goto(path.as_uri())
    try: return accessibility_faults(page)
    finally: page.close()


def accessibility_faults(page) -> list[tuple]: # rule and elements
    "What axe-core finds in a page of a browser"
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    return [(v['id'], [node['target'] for node in v['nodes']][:3]) for v in axe.run(page).response['violations']]


def picture(colour='navy', size=(24, 24), fmt='PNG', mode='RGB', seed=0, **kwargs) -> bytes:
    "The bytes of a picture with some structure; another seed is another picture"
    rng = np.random.default_rng(seed)
    img = Image.new('RGB', size, colour)
    img.paste(Image.fromarray(rng.integers(0, 255, (size[1] // 2, size[0] // 2, 3), dtype=np.uint8)))
    buf = io.BytesIO()
    img.convert(mode).save(buf, fmt, **kwargs)
    return buf.getvalue()


def folder(root: Path, files: dict) -> Path:
    "Write files, text or bytes, below `root`"
    for name, data in files.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        (root/name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def png(img: Image.Image) -> bytes:
    "The bytes of an image, without loss"
    buf = io.BytesIO()
    img.save(buf, 'PNG')
    return buf.getvalue()


def saved_again(img: Image.Image, quality: int, fmt: str = 'JPEG') -> bytes:
    "The bytes of an image, with loss"
    buf = io.BytesIO()
    img.save(buf, fmt, quality=quality)
    return buf.getvalue()


@functools.cache
def honest_pairs(side: int, n: int, only_alike: bool = False) -> list[tuple[Image.Image, Image.Image]]:
    "Drawn faces before a smile and during it: only the mouth changes; perhaps those alone that look alike to a hash"
    from dataclasses import replace
    from fastsmile.data.sample import draw_face, random_face_params
    from fastsmile.data.scan import phash
    pairs = []
    for seed in range(n):
        rng = np.random.default_rng(seed)
        one, other = random_face_params(rng, 'NOT smile'), random_face_params(rng, 'positive smile')
        other = replace(one, mouth_curve=other.mouth_curve, mouth_open=other.mouth_open)
        pair = tuple(draw_face(p, side, np.random.default_rng(100 * (seed % 2) + i)) for i, p in enumerate((one, other)))
        if not only_alike or (phash(pair[0]) != phash(pair[1])).sum() <= 16: pairs.append(pair)
    return pairs


@contextmanager
def cheap(seconds=5, mib=300):
    "What is done within takes few seconds of computing and little memory (the peak, where the system can forget the old one)"
    def peak() -> float: return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024
    reset = Path('/proc/self/clear_refs')
    can = os.access(reset, os.W_OK)
    if can: reset.write_text('5')
    before, start = peak() if can else 0, time.process_time()
    yield
    assert time.process_time() - start < seconds
    if can: assert peak() - before < mib


def shell(*args, cwd=None, **env):
    "The command as its own process"
    env = {k: v for k, v in os.environ.items() if k != 'FASTSMILE_QUIET'} | dict(COLUMNS='120', TERM='dumb') | env
    return run_python(['-m', 'fastsmile', *args], cwd, env)
