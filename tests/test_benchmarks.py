"Every script of benchmarks/ runs with tiny arguments, so that none rots: its figures here mean nothing, its output is whole"
import io
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
from forked import run_python
from PIL import Image

from fastsmile.metrics.predictions import read_saved_predictions

BENCHMARKS = Path(__file__).resolve().parent.parent/'benchmarks'


@pytest.fixture(scope='module')
def photographs(faces, tmp_path_factory):
    "A zip of drawn faces in two class folders"
    path = tmp_path_factory.mktemp('photographs')/'faces.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for i, p in enumerate(sorted((faces/'happy_images').iterdir())[:24]): z.write(p, f'{"smile" if i % 2 else "not smile"}/{p.name}')
    return path


@pytest.fixture(scope='module')
def people(faces, tmp_path_factory):
    "smiles.zip and smiles.csv as benchmarks/train.py reads them, with drawn faces and made-up people"
    folder = tmp_path_factory.mktemp('people')
    names = [p for p in sorted((faces/'happy_images').glob('*.jpg')) if p.stat().st_size > 500][:80]
    with zipfile.ZipFile(folder/'smiles.zip', 'w') as z:
        for p in names: z.write(p, p.name)
    labels = ['smile' if i % 3 else 'not smile' for i in range(len(names))]
    rows = [f'{p.name},{label},{label},person {i // 2}' for i, (p, label) in enumerate(zip(names, labels))]
    (folder/'smiles.csv').write_text('\n'.join(['file,label,label3,person', *rows]))
    return folder


@pytest.fixture(scope='module')
def expressions(people, faces):
    "facial_expressions.zip, legend.csv and clothing.zip beside the people, as benchmarks/domain.py reads them"
    names = [p for p in sorted((faces/'happy_images').glob('*.jpg')) if p.stat().st_size > 500][:60]
    rows = []
    with zipfile.ZipFile(people/'facial_expressions.zip', 'w') as z, zipfile.ZipFile(people/'clothing.zip', 'w') as scenes:
        for i, p in enumerate(names):
            img, buf = Image.open(p).convert('L' if i % 2 else 'RGB'), io.BytesIO()
            img.save(buf, 'JPEG')
            z.writestr(f'images/Person{i}_{i}.jpg', buf.getvalue())
            rows.append(f'{i},Person{i}_{i}.jpg,{"happiness" if i % 3 else "Neutral"}')
            scenes.write(p, f'train/hat/{p.name}')
    (people/'legend.csv').write_text('\n'.join(['user.id,image,emotion', *rows]))
    return people


def bench(script: str, *args, fails: bool = False) -> str:
    "What a benchmark prints"
    env = os.environ | dict(FASTSMILE_QUIET='1', OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    done = run_python([BENCHMARKS/script, *args], env=env, timeout=300, forks=True)
    assert bool(done.returncode) == fails, done.stderr[-2000:]
    return done.stdout


def test_speed_prints_the_bound_and_leaves_out_what_is_not_installed(photographs):
    row = json.loads(bench('predict.py', 'speed', photographs, '--arch', 'resnet10t', '--shape', '32x32', '-n', 16, '--rounds', 1))
    rates = {name: rate['median'] for name, rate in row['rates'].items()}
    assert {'fastsmile', 'fp32', 'torch', 'fastai', 'timm', 'graph', 'decode'} <= set(rates) and min(rates.values()) > 0
    assert row['bound']['median'] == pytest.approx(1 / (1 / rates['graph'] + 1 / rates['decode']), rel=.02)
    assert row['times_fastai']['fastsmile']['median'] == pytest.approx(rates['fastsmile'] / rates['fastai'], rel=.02)
    assert row['same_labels'] == row['n'] == 16


def test_growth_and_machine(photographs):
    (line,) = bench('predict.py', 'growth', photographs, '--files', 40).splitlines()
    row = json.loads(line)
    assert (row['rows'], row['failed']) == (40, 0) and row['peak_mib'] > 50
    assert json.loads(bench('predict.py', 'machine'))['cores'] == os.cpu_count()


@pytest.mark.slow
def test_cold(photographs):
    seconds = json.loads(bench('predict.py', 'cold', photographs, '--arch', 'resnet10t', '--rounds', 1))['seconds']
    assert set(seconds) == {'fastsmile', 'torch', 'fastai'} and min(s['median'] for s in seconds.values()) > 0


def test_arrays(tmp_path):
    said = bench('arrays.py', '--out', tmp_path/'arrays', '--rows', 80)
    assert 'audit: 80 rows' in said and 'B1 after 1 epoch(s): balanced accuracy' in said


def test_audit(photographs):
    said = bench('audit.py', photographs, '--only', 'fastsmile audit,fastsmile hash')
    assert said.count('images a second') + said.count('pictures a second') == 2


def test_corpus(tmp_path):
    (tmp_path/'not an image.jpg').write_bytes(b'GIF89a')
    assert '1 files' in bench('corpus.py', tmp_path)


def test_search():
    assert '2,000 hashes, near 16' in bench('search.py', '--hashes', 2000)


STEPS = ['listing', 'duplicates', 'audit', 'audit_files', 'split', 'sheet', 'resumed', 'gallery', 'metrics']


@pytest.mark.parametrize('step', [s if s == 'audit' else pytest.param(s, marks=pytest.mark.slow) for s in STEPS])
def test_steps_of_scale(step):
    assert bench('scale.py', 'steps', '--rows', 200, '--steps', step).count('|') >= 6


def test_decode_of_scale(run):
    said = bench('scale.py', 'decode', '--rows', 20, '--model', run.path, '--kinds', 'zip')
    assert '| zip |' in said and '| folder |' not in said


def test_serve():
    pytest.importorskip('fasthtml')
    said = bench('serve.py', 'speed', '--arch', 'resnet10t', '--size', 32, '--shape', '32x32', '--clients', 2, '--seconds', 0.2)
    assert '| 2 |' in said


def test_train(people):
    quick = '{"tta": "none", "no_onnx": true}'
    said = bench('train.py', 'scratch', '--data', people, '--epochs', 1, '--bs', 8, '--size', 32, '--workers', 0, '--options', quick)
    assert 'fastai' in said and 'fastsmile' in said
    said = bench('train.py', 'neighbours', '--seconds', 0, '--bs', 2, '--beside', 0)
    assert len(re.findall(r'^\| .* \| \d+ \|$', said, re.M)) == 3


def test_plan():
    said = bench('plan.py', '--drawn', 60, '--only', 1)
    assert re.search(r'^ *[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ GB  \S*faces --weights none', said, re.M)


def test_domain(expressions, tmp_path):
    pytest.importorskip('cv2', reason='the extra faces is not installed')
    args = ['--data', expressions, '--out', tmp_path/'domain']
    assert 'photographs' in bench('domain.py', 'draw', '-n', 20, *args)
    bench('domain.py', 'fit', '--models', 'scratch', '--epochs', 1, *args)
    assert 'rows | accuracy | AUC |' in bench('domain.py', 'measure', *args)


def test_unlike(expressions, tmp_path):
    args = ['--data', expressions, '--out', tmp_path/'unlike', '--quick', '--images', 20]
    said = bench('unlike.py', *args, '--size', 32, '--calib', 0.45)
    assert len(re.findall(r'^\| (statistics|energy|highest logit|Mahalanobis|neighbours) \| .*%', said, re.M)) == 5


def test_shares(run):
    label = read_saved_predictions(run.path, 'test').classes[0]
    said = bench('shares.py', run.path, '--label', label, '--images', 4, '--draws', 2)
    assert len(re.findall(r'^\| 4 \| (10|30|50|90)% \| [\d.]+% \|', said, re.M)) == 4


def test_balance_runs_a_part_once_and_makes_its_tables(people, tmp_path):
    args = ['--data', people, '--out', tmp_path/'balance.csv']
    assert 'scratch/0' in bench('balance.py', '--list', *args)
    bench('balance.py', '--only', 'scratch/0', '--epochs', 1, *args)
    assert '| scratch | 1 |' in bench('balance.py', '--tables', *args)


def test_coverage_writes_a_row_for_each_score_and_makes_its_tables(tmp_path):
    args = ['--out', tmp_path/'coverage.csv', '--rows', 50, '--only', '50/50, weak']
    bench('coverage.py', *args, '--trials', 20, '--truth', 20000)
    bench('coverage.py', *args, '--trials', 2, '--truth', 2000, '--bootstrap')
    assert (tmp_path/'coverage.csv').read_text().count('50/50, weak') == 2 * 11
    assert bench('coverage.py', '--tables', '--out', tmp_path/'coverage.csv').count('| 50/50, weak | 50 |') == 2


def test_every_script_is_tested():
    text = Path(__file__).read_text()
    assert all(f"bench('{p.name}'" in text for p in BENCHMARKS.glob('*.py'))
