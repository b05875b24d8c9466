"Every kind of finding is registered once, and what is made of the registry agrees with it."
import pandas as pd
import pytest

from fastsmile.config.commands import SampleConfig
from fastsmile.config.fields import DataOptions
from fastsmile.data.audit import run_audit
from fastsmile.data.findings import FINDING_KINDS, SEVERITIES, Finding, class_findings, make_finding
from fastsmile.data.plan import PLAN_COLUMNS, plan_single_images
from fastsmile.data.sample import sample
from fastsmile.data.source import read_source

DOCUMENTED = ['unreadable', 'missing-image', 'image-without-row', 'label-variant', 'unlabelled', 'tiny-class', 'imbalance', 'odd-image',
              'wrong-extension', 'exact-duplicate', 'near-duplicate', 'conflicting-label', 'split-leak', 'suspect-label', 'label-leak', 'grey-images',
              'no-face', 'several-faces', 'look-alike']  # of audit.json


def test_the_documented_kinds_are_registered():
    assert set(FINDING_KINDS) == set(DOCUMENTED)


@pytest.mark.parametrize('name', DOCUMENTED)
def test_a_kind_says_what_is_done(name):
    kind = FINDING_KINDS[name]
    assert kind.severity in SEVERITIES and kind.action and kind.plan_action in (None, 'keep', 'drop')
    found = make_finding(name, [dict(path='a.jpg', why='b')])
    assert found == Finding(name, kind.severity, kind.action, [dict(path='a.jpg', why='b')]) and found.count == 1
    assert set(found.as_dict()) == {'kind', 'severity', 'action', 'rows', 'groups', 'count'}


@pytest.mark.parametrize('name', DOCUMENTED)
def test_the_plan_has_a_row_for_images_of_kinds_with_an_action(name):
    plan = plan_single_images([make_finding(name, [dict(path='a.jpg', why='why'), dict(path='', why='about a class')])])
    action = FINDING_KINDS[name].plan_action
    assert list(plan.columns) == PLAN_COLUMNS and plan.action.tolist() == ([action] if action else [])
    if action: assert plan.reason.tolist() == [f'{name}: why']


def test_what_an_audit_finds_is_registered(tmp_path):
    audited = run_audit(read_source(sample(tmp_path/'s', SampleConfig(n=120))), DataOptions())
    assert len(audited.findings) > 5
    for f in audited.findings: assert f.kind in FINDING_KINDS and f.severity in SEVERITIES


@pytest.mark.parametrize('counts,why', [([50, 50], None), ([65, 35], 'a: 65 of 100 rows (65%)'), ([64, 36], None),
                                        ([500, 400, 50], 'a: 500 of 950 rows (53%); c: 50'), ([500, 400, 51], None)])
def test_imbalance_is_of_the_largest_class_or_of_the_smallest(counts, why):
    "Two large classes hide a small one from the share of the largest"
    found = class_findings(pd.Series([label for label, n in zip('abc', counts) for _ in range(n)]))[0]
    assert [row['why'] for row in found.rows] == [why] * bool(why)
