"What SECURITY.md says is so: the tests it names are there, its limits are the code's, every requirement has its licence."
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT/'SECURITY.md').read_text(encoding='utf-8')


def test_each_promise_names_tests_that_are_there():
    rows = re.findall(r'^\| [A-Z].*\|.*\| (`.*) \|$', TEXT, re.M)
    assert len(rows) >= 12
    for row in rows:
        for name in re.findall(r'`([\w/]+\.py)`', row):
            text = (ROOT/name).read_text(encoding='utf-8')
            assert 'def test_' in text or not name.startswith('tests/test_'), name
    assert 'security/advisories' in TEXT


def limits() -> dict:
    from fastsmile.data import archives
    from fastsmile.data import cells
    from fastsmile.core import files as core
    from fastsmile.data import images
    from fastsmile.serving import app as serving
    from fastsmile.models import weights as tensors
    mib = 2**20
    return {f'{images.MAX_IMAGE_PIXELS:,} pixels': 'a picture', f'{images.MAX_IMAGE_BYTES // mib} MiB, stored': 'a member',
            f'{archives.MAX_UNPACK_RATIO} times its packed size': 'a member', f'from {archives.MIN_BOMB_MEMBER_BYTES // mib} MiB on': 'a member',
            f'{archives.MAX_ZIP_MEMBERS:,} members': 'a zip',
            f'from {archives.MIN_BOMB_TOTAL_BYTES // 2**30} GiB on': 'a zip',
            f'{cells.MAX_TABLE_BYTES // mib} MiB, {cells.MAX_TABLE_COLUMNS:,} columns; {cells.MAX_TABLE_CELLS:,} cells': 'a table',
            f'{cells.MAX_LINE_CHARS:,} characters': 'a line',
            f'{core.MAX_JSON_BYTES // mib} MiB': 'a JSON', f'{tensors.MAX_HEADER_BYTES // mib} MiB': 'the header',
            f'a head of {serving._MAX_HEAD_BYTES // 1024} KiB': 'a request'}


def test_the_limits_are_those_of_the_code():
    pytest.importorskip('fasthtml', reason='the extra serve is not installed')
    rows = re.findall(r'^\| (.*?) \| (.*) \|$', TEXT.partition('## Limits')[2], re.M)
    for words, what in limits().items(): assert any(name.startswith(what) and words in said for name, said in rows), words


def test_every_requirement_has_its_licence(tmp_path):
    sys.path.insert(0, str(ROOT/'tools'))
    try: import licences
    finally: sys.path.pop(0)
    assert set(licences.named()) == set(licences.requirements()) and len(licences.named()) > 20
    assert subprocess.run([sys.executable, ROOT/'tools'/'licences.py', '--check']).returncode == 0
    lines = (ROOT/'LICENCES.md').read_text(encoding='utf-8').splitlines()
    assert all(len(line.split('|')[3].strip()) > 1 for line in lines if line.startswith('| '))
    for f in ('LICENCES.md', 'settings.ini'): (tmp_path/f).write_text((ROOT/f).read_text(encoding='utf-8').replace('\n    timm>=1.0.31', ''), encoding='utf-8')
    (tmp_path/'tools').mkdir()
    (tmp_path/'tools'/'licences.py').write_text((ROOT/'tools'/'licences.py').read_text(encoding='utf-8'), encoding='utf-8')
    done = subprocess.run([sys.executable, tmp_path/'tools'/'licences.py', '--check'], capture_output=True, text=True)
    assert done.returncode == 1 and 'disagree about timm' in done.stderr
