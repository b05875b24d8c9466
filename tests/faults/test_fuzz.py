"A handful of what fuzz.py does in full; every case that once escaped stays"
import csv
import io
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import case, fuzz  # noqa: E402
from targets import TARGETS  # noqa: E402

ONCE = [('table', b';', 'is empty'), ('table', b'a,' * 70_000, '70,001 columns'),
        ('plan', b'path,action,path\na.jpg,keep,b\n', 'its columns are path, action, path'),
        ('list', b'A' * 300, 'File name too long'), ('list', b'A' * 70_000, 'more than 65,536 characters'),
        ('arrays', b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', \n", 'cannot be read as an array'),
        ('bundle', b'{"architecture": "resnet10t"}', "KeyError: 'fastsmile'"),
        ('bundle', b'{}', "KeyError: 'fastsmile'"),
        ('bundle', b'{"a":' * 100_000, 'too many lists within lists'),
        ('state', b'\xff' * 64, 'header too large'),
        ('api', b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n\r\n{"a": [1]}', '422'),
        ('api', b'POST /predict?n\xe5me=a HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n\r\nx', '422'),
        ('api', b'GET /serve.js/ HTTP/1.1\r\nhost: localhost\r\n\r\n', '404'),
        ('api', b'POST / HTTP/1.1\r\nhost: localhost\r\norigin: http://a]b\r\n\r\n', '403'),
        ('api', b'POST / HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: 1\xb3\r\n\r\nx', '')]


@pytest.mark.parametrize('name', TARGETS)
def test_spoilt_files_end_in_words(name):
    assert fuzz(name, cases=40, seed=1, mib=1024) == []


@pytest.mark.parametrize('name,data,said', ONCE, ids=[f'{n}-{i}' for i, (n, *_) in enumerate(ONCE)])
def test_what_once_escaped_is_said_in_words(name, data, said, tmp_path): assert said in TARGETS[name](tmp_path)(data)


@pytest.mark.parametrize('name', TARGETS)
def test_seeds_are_taken(name, tmp_path):
    "What is spoilt is right before, and mostly wrong after: else a target tests nothing"
    target = TARGETS[name](tmp_path)
    seeds = [target(s) for s in target.seeds]
    assert all(s in ('', 'no such file; no such file', 'no such file; no such file; no such file') or name in ('archive', 'list') for s in seeds), seeds
    assert sum(bool(target(case(target, i))) for i in range(30)) > (0 if name == 'plan' else 3)


def test_a_seed_makes_its_case_again(tmp_path):
    target = TARGETS['plan'](tmp_path)
    assert case(target, 7) == case(target, 7) != case(target, 8)


def test_the_harness_sees_a_failure(monkeypatch):
    "A target that raises is reported with its seed"
    def failing(self, data):
        if data not in self.seeds: raise ZeroDivisionError('on purpose')
    monkeypatch.setattr(TARGETS['plan'], '__call__', failing)
    assert fuzz('plan', 3, 10, 1024)[0].startswith("plan, seed 10: ZeroDivisionError: 'on purpose'")


HEADS = st.sampled_from(['path', 'image', 'label', 'class', 'split', 'group', 'reason', 'path_given', 'Label', ' path', '', '=x', '1', 'a.jpg', 'nan'])
CELLS = st.sampled_from(['a.jpg', 'b', 'c.jpg', './a.jpg', 'x/../a.jpg', 'C:\\p\\b.jpg', '/tmp', '', ' ', 'smile', 'Smile ', 'nan', '-1', '=1', 'train', 'val',
                         'a,b', 'a;b', 'a\tb', 'a\nb', '"', "'", '\u202e', 'ﬁ', '0', '1e9', 'x' * 300]) | st.text(max_size=3)


@st.composite
def tables(draw):
    "A CSV in any dialect: with a header or without, with any columns in any order, its rows perhaps not of one length"
    width, buf = draw(st.integers(1, 5)), io.StringIO()
    rows = draw(st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=6))
    if draw(st.booleans()): rows.insert(0, draw(st.lists(HEADS, min_size=width, max_size=width)))
    if draw(st.integers(0, 9)) == 0: rows[-1] = rows[-1][:-1] + ['extra', 'extra']
    csv.writer(buf, delimiter=draw(st.sampled_from(',;\t|')), quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
               lineterminator=draw(st.sampled_from(['\n', '\r\n']))).writerows(rows)
    return buf.getvalue().encode(draw(st.sampled_from(['utf-8', 'utf-8-sig', 'utf-16'])), 'replace')


@given(tables(), st.sampled_from(['train.csv', 'labels.tsv']), st.sampled_from([{}, dict(label_col='label'), dict(image_col='1', label_col='2')]))
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_table_is_a_source_or_is_refused_in_words(tmp_path, data, name, options):
    "What is taken holds together: the columns that are promised, rows that are used name pictures that are there"
    from fastsmile.core.errors import SmileError
    from fastsmile.config.fields import SourceOptions
    from fastsmile.data.layouts import TABLE_COLUMNS
    from fastsmile.data.source import read_source
    for n in 'abc': (tmp_path/f'{n}.jpg').write_bytes(TARGETS['table'].picture)
    for old in tmp_path.glob('*.?sv'): old.unlink()
    (tmp_path/name).write_bytes(data)
    try: source = read_source(tmp_path, SourceOptions(**options))
    except SmileError as e: assert e.message and e.hint is not None; return
    assert list(source.frame)[:len(TABLE_COLUMNS)] == TABLE_COLUMNS and source.frame.columns.is_unique and len(source.kept) <= len(source.frame)
    assert set(source.kept.path) <= set(source.reader.names()) | {'/tmp'} and (source.kept.label != '').all()
    assert set(source.frame.path) | set(source.images_without_row) >= {'a.jpg', 'b.jpg', 'c.jpg'}
