"A handful of what kills.py does in full"
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import CASES, Whole, attempt, broken, moment, unbroken  # noqa: E402


@pytest.fixture(scope='module')
def there(faces, run, tmp_path_factory):
    "What the commands read"
    where = tmp_path_factory.mktemp('kills')
    (where/'new').mkdir()
    pictures = sorted((faces/'happy_images').iterdir())
    for i in range(300): shutil.copy(pictures[i % len(pictures)], where/'new'/f'{i:04}.jpg')
    (where/'faces').symlink_to(faces)
    (where/'run').symlink_to(run.path)
    return where


def test_killed_predictions_and_audits_lose_nothing(there):
    for name, kills in (('predict', 1), ('audit', 1)):
        case, rng = CASES[name](there), random.Random(5)
        whole = unbroken(case, there/f'{name}-whole')
        for i in range(kills):
            how, at = ('change', whole.changes - 2) if name == 'predict' else moment(whole, rng)
            assert attempt(case, whole, there/f'{name}-{i}', how, at)[0] == []


def test_the_harness_sees_torn_files(tmp_path):
    files = {'a.json': '{"a": 1', 'b.csv': 'x,y\n1,2\n1', 'c.html': '<html><body>', 'd.safetensors': '\x08', 'e.png': '\x89PNG', 'f.md': '---\n', 'g.xyz': ''}
    for name, text in files.items(): (tmp_path/name).write_text(text, encoding='latin-1')
    assert sorted(b.partition(':')[0] for b in broken(tmp_path)) == sorted(files)
    (tmp_path/'.fastsmile-x.dir').mkdir()
    for name in ('.lock', '.fastsmile-x.a.json.part', '.fastsmile-x.dir/.tmpX', 'p.csv.part'): (tmp_path/name).write_text('half')
    assert len(broken(tmp_path)) == len(files)


def test_a_moment_follows_from_its_seed():
    whole = Whole(10.0, 30, {})
    drawn = [moment(whole, random.Random(i)) for i in range(60)]
    assert drawn == [moment(whole, random.Random(i)) for i in range(60)] and {how for how, _ in drawn} == {'any', 'end', 'change'}
    assert all(at <= (30 if how == 'change' else 10) for how, at in drawn)
