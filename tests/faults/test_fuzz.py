"A handful of what fuzz.py does in full; every case that once escaped stays"
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fuzz import case, fuzz  # noqa: E402
from targets import TARGETS  # noqa: E402

ONCE = [('table', b";"), ('plan', b'path,action,path\na.jpg,keep,b\n'), ('list', b'A' * 300), ('arrays', b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', \n"),
        ('bundle', b'{"architecture": "resnet10t"}'), ('bundle', b'{}'), ('state', b'\xff' * 64)]


@pytest.mark.parametrize('name', TARGETS)
def test_spoilt_files_end_in_words(name):
    assert fuzz(name, cases=40, seed=1, mib=1024) == []


@pytest.mark.parametrize('name,data', ONCE)
def test_what_once_escaped(name, data, tmp_path): TARGETS[name](tmp_path)(data)


def test_a_seed_makes_its_case_again(tmp_path):
    target = TARGETS['plan'](tmp_path)
    assert case(target, 7) == case(target, 7) != case(target, 8)


def test_the_harness_sees_a_failure(monkeypatch):
    "A target that raises is reported with its seed"
    def failing(self, data):
        if data not in self.seeds: raise ZeroDivisionError('on purpose')
    monkeypatch.setattr(TARGETS['plan'], '__call__', failing)
    assert fuzz('plan', 3, 10, 1024)[0].startswith("plan, seed 10: ZeroDivisionError: 'on purpose'")
