"The house: no import runs up the wings, rooms of a wing import only earlier ones, and heavy packages stay where they belong"
import ast
import functools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WINGS = ('core', 'config', 'data', 'metrics', 'models', 'training', 'inference', 'reports', 'serving', 'runs', 'studies', 'cli')
ROOMS = [p.relative_to(ROOT).with_suffix('') for p in sorted((ROOT/'fastsmile').glob('*/*.py')) if p.stem != '__init__']


def reading_order(wing: str) -> list[str]:
    "The rooms of a wing in the order of their notebooks' numbers"
    return [p.stem[3:] for p in sorted((ROOT/'nbs'/wing).glob('[0-9][0-9]_*.ipynb'))]


@functools.cache
def parsed(room: Path) -> ast.Module: return ast.parse((ROOT/room).with_suffix('.py').read_text(encoding='utf-8'))


@functools.cache
def imports_of(room: Path) -> list[tuple[int, str]]: # line, dotted name
    "Every import of a module, those inside functions too, with relative ones written out"
    tree, found = parsed(room), []
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == 'TYPE_CHECKING']
    for_types = {id(n) for block in blocks for n in ast.walk(block) if isinstance(n, ast.ImportFrom) and not n.level}
    for node in ast.walk(tree):
        if id(node) in for_types: continue  # other packages' types are never imported when the code runs
        if isinstance(node, ast.Import): found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(room.parts[:-node.level]) + '.' if node.level else ''
            found.append((node.lineno, (base + (node.module or '')).rstrip('.')))
    return found


def top_level_imports(room: Path) -> set[str]:
    "Packages that importing a module imports itself"
    tree = parsed(room)
    names = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level and n.module]
    return {n.split('.')[0] for n in names}


def test_every_module_is_a_room_of_a_wing_and_has_its_notebook():
    assert {p.stem for p in (ROOT/'fastsmile').glob('*.py')} == {'__init__', '__main__', '_modidx'}
    assert {r.parts[1] for r in ROOMS} == set(WINGS) == {p.parent.name for p in (ROOT/'nbs').glob('*/*.ipynb')}
    for wing in WINGS:
        rooms = reading_order(wing)
        assert sorted(rooms) == sorted(r.name for r in ROOMS if r.parts[1] == wing)
        numbers = [p.name[:2] for p in (ROOT/'nbs'/wing).glob('*.ipynb')]
        assert len(set(numbers)) == len(numbers), f'two notebooks of {wing} have one number'


@pytest.mark.parametrize('room', ROOMS, ids=str)
def test_no_import_runs_up(room):
    own, order = WINGS.index(room.parts[1]), reading_order(room.parts[1])
    for line, name in imports_of(room):
        package, *rest = name.split('.')
        if package != 'fastsmile' or not rest: continue
        assert len(rest) == 2 and rest[0] in WINGS, f'{room}:{line} imports {name}, which is no room'
        above = WINGS.index(rest[0]) > own
        later = rest[0] == room.parts[1] and order.index(rest[1]) >= order.index(room.name)
        assert not above and not later, f'{room}:{line} imports {name}, which comes later'


def test_the_order_is_the_one_that_contributing_shows():
    rows = re.findall(r'^\| `(\w+)` \|', (ROOT/'CONTRIBUTING.md').read_text(encoding='utf-8'), re.M)
    assert rows == list(WINGS)


def test_fastai_is_imported_in_training_alone():
    users = {str(r) for r in ROOMS for _, name in imports_of(r) if name.split('.')[0] == 'fastai'}
    assert users and {Path(u).parts[1] for u in users} == {'training'}


@pytest.mark.parametrize('room', [r for r in ROOMS if r.parts[1] in ('core', 'config', 'inference')], ids=str)
def test_light_rooms_import_nothing_heavy(room):
    heavy = {'pandas', 'fastai', 'matplotlib', 'sklearn', 'scipy'} | ({'torch', 'timm', 'numpy'} if room.parts[1] == 'config' else set())
    assert not top_level_imports(room) & heavy


def loaded_by(code: str) -> set[str]:
    "The packages that a fresh process has imported after `code`"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', f'{code}\nimport sys; print(*sys.modules)'], capture_output=True, text=True, check=True)
    return {name.split('.')[0] for name in done.stdout.split()}


@pytest.mark.parametrize('code, absent', [
    ('import fastsmile.inference.predict, fastsmile.runs.predict', {'fastai', 'pandas'}),
    ('import fastsmile.inference.onnx_backend, fastsmile.inference.inputs, fastsmile.inference.outputs', {'torch', 'fastai', 'pandas', 'timm'}),
    ('import fastsmile.runs.evaluate', {'torch', 'fastai', 'timm'}),
    ('import fastsmile.cli.commands', {'torch', 'fastai', 'pandas', 'timm', 'numpy'}),
])
def test_import_budgets(code, absent):
    assert not loaded_by(code) & absent


@pytest.mark.parametrize('given, spins', [({}, '2000'), (dict(GOMP_SPINCOUNT='77'), '77'), (dict(OMP_WAIT_POLICY='ACTIVE'), '30000000000')])
def test_threads_of_openmp_spin_shortly_unless_the_user_set_it(given, spins):
    waiting = ('GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'OMP_WAIT_POLICY')
    env = {k: v for k, v in os.environ.items() if k not in waiting} | given | dict(OMP_DISPLAY_ENV='verbose')
    library = next((Path(find_spec('torch').origin).parent/'lib').glob('libgomp*'), None)  # torch's own, which says what it was given when it is loaded
    if library is None: pytest.skip('this torch does not compute with the OpenMP of GNU')
    code = f'import ctypes, fastsmile; ctypes.CDLL({str(library)!r})'
    told = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, check=True).stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in told


def test_nbs_holds_notebooks_and_their_pictures():
    listed = subprocess.run(['git', 'ls-files', 'nbs'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a clone of the repository')
    assert not [f for f in listed.stdout.split() if not f.endswith('.ipynb') and not f.startswith('nbs/images/')]


PAGES = [ROOT/'README.md', *sorted((ROOT/'docs').glob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r'\]\((?!https?://)([^)\s]*)\)', page.read_text(encoding='utf-8'))
    assert links or page.name in ('data.md', 'training.md', 'python.md')
    for link in links:
        file, _, heading = link.partition('#')
        target = (page.parent/file).resolve() if file else page
        assert target.exists(), link
        if not heading: continue
        headings = re.findall('^#+ (.*)', target.read_text(encoding='utf-8'), re.M)
        assert heading in [re.sub('[^a-z0-9 -]', '', h.lower()).replace(' ', '-') for h in headings], link


def test_readme_is_short_and_begins_with_the_reader_s_own_commands():
    lines = (ROOT/'README.md').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 250
    commands = [line.split()[1] for line in lines if line.startswith('fastsmile ')]
    assert commands[:2] == ['fit', 'predict']
