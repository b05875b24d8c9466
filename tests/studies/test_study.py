"A study trains its entries, goes on where it was stopped, and says what held from the figures alone"
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import without_charts

from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import folder_lock, read_json
from fastsmile.data.audit import audit_and_split
from fastsmile.studies.run import entry_metrics, entry_predictions, metric_differences
from fastsmile.config.commands import StudyConfig
from fastsmile.studies.experiments import STUDIES
from fastsmile.studies.experiments import source_options, with_weights
from fastsmile.studies.run import study, subsample_training_rows, write_study
from fastsmile.config.fit import FitConfig
from fastsmile.data.source import read_source

ASKED = ('B1', 'B2')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "The options of a study that takes seconds"
    out = tmp_path_factory.mktemp('studies')/'face'
    return StudyConfig(quick=True, seeds=2, weights='none', rows=110, only=ASKED, out=str(out), device='cpu', workers=0)


@pytest.fixture(scope='module')
def done(faces, small, monkeypatch_module):
    "That study, on the sample"
    with without_charts(): return study('face-property', faces, small)


@pytest.fixture(scope='module')
def monkeypatch_module():
    "The study's entries with an epoch"
    with pytest.MonkeyPatch.context() as m:
        s = STUDIES['face-property']
        m.setitem(STUDIES, 'face-property', replace(s, shared=s.shared | dict(bs=16), quick=dict(epochs=1, size=32)))
        yield m


def test_every_entry_has_a_run_for_each_seed_and_a_row(done, small):
    assert [r['name'] for r in done['entries']] == list(ASKED)
    assert len(list((small_path(small)/'runs').iterdir())) == 4
    table = pd.read_csv(small_path(small)/'study.csv')
    assert list(table.entry) == list(ASKED) and table.reported_balanced_accuracy.tolist() == [0.8233, 0.8412]
    for r in done['entries']:
        each = [read_json(p/'metrics.json')['test']['balanced_accuracy']['value'] for p in sorted((small_path(small)/'runs').glob(f'{r["name"].lower()}-*'))]
        assert r['measured']['balanced_accuracy']['seeds'] == pytest.approx(each)
        assert r['measured']['balanced_accuracy']['value'] == pytest.approx(sum(each) / 2)
    for p in (small_path(small)/'runs').iterdir(): assert re.match('fastsmile study face-property .*--rows 110', read_json(p/'config.json')['command'])


def small_path(config):
    return Path(config.out)


def test_claims_on_entries_that_were_not_trained_are_not_tested(done):
    said = {c['statement']: c['result'] for c in done['claims']}
    assert said['Dropout and one more layer help (B2 over B1).'] != 'not tested'
    assert said['Augmentation at a lower rate helps (B3 over B2).'] == 'not tested'


def test_pages_hold_their_figures_and_ours(done, small):
    for name in ('study.md', 'study.html'):
        text = (small_path(small)/name).read_text()
        assert '0.823' in text and f"{done['entries'][0]['measured']['balanced_accuracy']['value']:.3f}" in text
    assert (small_path(small)/'study.svg').read_text().startswith('<svg')


def test_seeds_and_entries_are_compared_on_the_rows_that_all_could_read(done, small, tmp_path):
    runs = [Path(shutil.copytree(small_path(small)/'runs'/name, tmp_path/name)) for name in ('b1-1', 'b1-2', 'b2-1')]
    for i, r in enumerate(runs):
        t = pd.read_csv(r/'predictions_test.csv', dtype=str, keep_default_na=False)
        t.loc[i, [c for c in t if c.startswith('p_')] + ['label', 'confidence']] = ''
        t.loc[i, 'error'] = 'no such file'
        t.loc[t.index != i, 'label'] = t.target  # all that could be read is right
        for c in t.filter(like='p_'): t.loc[t.index != i, c] = (t.target == c[2:]).astype(float).astype(str)
        t.to_csv(r/'predictions_test.csv', index=False)
    whole = pd.read_csv(small_path(small)/'runs'/'b1-1'/'predictions_test.csv')
    both, alone = entry_predictions(runs[:2]), entry_predictions(runs[2:])
    assert both.paths == tuple(whole.path[2:]) and alone.paths == (*whole.path[:2], *whole.path[3:])
    assert entry_metrics(both)['accuracy'] == dict(value=1, low=1, high=1, seeds=[1, 1]) and metric_differences(both, alone)['accuracy']['value'] == 0


def test_a_study_s_folder_is_one_s_alone(faces, small):
    with folder_lock(small.out), pytest.raises(SmileError, match='Another process is writing'): study('face-property', faces, small)


def test_pages_say_what_was_set_after_a_look_at_test(done, tmp_path):
    own_method = done['entries'][0] | dict(valid={'B1': 0.5})
    for caveat, there in (('Set after a look.', True), ('', False)):
        write_study(done | dict(own_method=own_method, caveat=caveat), tmp_path)
        for name in ('study.md', 'study.html'): assert ('Set after a look.' in (tmp_path/name).read_text()) == there


def test_what_is_finished_is_not_trained_again(done, faces, small):
    runs = sorted((small_path(small)/'runs').iterdir())
    before = [(p/'config.json').stat().st_mtime_ns for p in runs]
    again = study('face-property', faces, small)
    assert [(p/'config.json').stat().st_mtime_ns for p in runs] == before
    assert again['entries'][0]['measured'] == done['entries'][0]['measured']


def test_other_options_and_other_rows_in_the_same_folder_are_refused(done, faces, small, tmp_path):
    with pytest.raises(SmileError, match='another --seed'): study('face-property', faces, replace(small, seed=7))
    less = shutil.copytree(faces, tmp_path/'less')
    for n in pd.read_csv(less/'train.csv', header=None)[0][:5]: next(less.rglob(f'{n}*')).unlink()
    with pytest.raises(SmileError, match='fingerprint'): study('face-property', less, small)


def test_where_it_runs_is_no_other_training(done, faces, small, tmp_path):
    "Nor how the folder of weights is spelled; and what is refused leaves the page as it was"
    before = (small_path(small)/'study.md').read_bytes()
    assert study('face-property', faces, replace(small, workers=1, device=None))['entries'][0]['measured'] == done['entries'][0]['measured']
    with pytest.raises(SmileError, match='another --seed'): study('face-property', faces, replace(small, seed=7))
    assert before.decode().split('\n')[6:] == (small_path(small)/'study.md').read_text().split('\n')[6:]
    assert "--only B1 --only B2" in before.decode() and '&#' not in before.decode()


def test_rows_that_were_left_out_taught_nothing(faces):
    config = FitConfig()
    data = audit_and_split(read_source(faces, config), config)
    some = subsample_training_rows(data, 40, 1)
    out = set(some.table.path[some.table.reason == 'left out by --rows'])
    assert out and out < set(data.training_fingerprints.path) and set(some.training_fingerprints.path) == set(data.training_fingerprints.path) - out


def test_an_option_about_the_source_stands_over_the_study_s_own(tmp_path):
    "What it says nothing of stays"
    s = STUDIES['smile-densenet161']
    assert source_options(s, tmp_path/'smiles.zip', StudyConfig(min_count=5)) == dict(label_col='label3', group_col='person', min_count=5)
    assert source_options(s, tmp_path/'smiles.zip', StudyConfig(label_col='label'))['label_col'] == 'label'
    assert source_options(s, tmp_path/'mine.zip', StudyConfig(min_count=5)) == dict(min_count=5)


def test_a_stand_in_takes_the_place_where_there_are_no_weights(tmp_path):
    entry, config = STUDIES['face-property'].entries[4], FitConfig(recipe='resnet50-partial')
    with pytest.raises(SmileError, match='no weights of resnet50 or mobilenetv2_100'): with_weights(entry, config, str(tmp_path))
    (tmp_path/'mobilenetv2_100.safetensors').touch()
    made, note = with_weights(entry, config, str(tmp_path))
    assert (made.arch, made.freeze, note) == ('mobilenetv2_100', 'blocks.6', 'mobilenetv2_100 for resnet50')
    (tmp_path/'resnet50.safetensors').touch()
    made, note = with_weights(entry, config, str(tmp_path))
    assert (made.arch, made.freeze, note) == ('resnet50', 'layer4.1.conv2', '')
    assert with_weights(STUDIES['face-property'].entries[0], FitConfig(recipe='cnn-b1'), str(tmp_path))[0].weights == 'none'


def test_wrong_names_are_answered_with_what_there_is(faces, tmp_path):
    with pytest.raises(OptionError, match='is not a folder'): study('clothing', faces, StudyConfig(weights=str(tmp_path/'weights')))
    with pytest.raises(OptionError, match='clothing'): study('shoes', faces)
    with pytest.raises(OptionError, match='B1; B2'): study('face-property', faces, StudyConfig(only=('B9',)))


def test_fewer_rows_keep_groups_whole_classes_in_proportion_and_every_test_row(run):
    data = run.data
    learnt = data.rows[data.rows.split != 'test']
    some = subsample_training_rows(data, len(learnt) // 2, 1)
    assert abs((some.rows.split != 'test').sum() - len(learnt) / 2) < 12
    assert set(some.rows.split) == set(data.rows.split) and set(some.rows.path) < set(data.rows.path)
    assert set(data.rows.path[data.rows.split == 'test']) < set(some.rows.path)
    lost = set(data.rows.group[~data.rows.path.isin(some.rows.path)]) - {''}
    assert not lost & set(some.rows.group)


def test_nearest_neighbours_are_an_entry_on_the_same_rows(faces, tmp_path, monkeypatch, no_charts):
    s = STUDIES['emotions']
    knn = next(e for e in s.entries if e.kind == 'probe')
    assert knn.options['k'] == '101'
    small = replace(knn, options=knn.options | dict(k='5', size=16))
    monkeypatch.setitem(STUDIES, 'emotions', replace(s, entries=tuple(small if e is knn else e for e in s.entries), quick=dict(epochs=1, size=32)))
    config = StudyConfig(quick=True, seeds=2, weights='none', only=('one convolution', knn.name), out=str(tmp_path/'s'), device='cpu', workers=0)
    made = study('emotions', faces, config)
    row = made['entries'][1]
    assert (row['network'], row['size'], row['epochs'], row['runs'], row['note']) == ('smilepixels', 16, None, 1, '')
    one, two = (pd.read_csv(tmp_path/'s'/'runs'/n/'predictions_test.csv') for n in ('one-convolution-1', 'nearest-neighbours-k-101'))
    assert one.path.tolist() == two.path.tolist()
    assert read_json(tmp_path/'s'/'runs'/'nearest-neighbours-k-101'/'config.json')['command'].startswith('fastsmile study emotions')
    assert 'smilepixels, 16 px |' in (tmp_path/'s'/'study.md').read_text()
    before = (tmp_path/'s'/'runs'/'nearest-neighbours-k-101'/'config.json').stat().st_mtime_ns
    assert study('emotions', faces, config)['entries'] == made['entries']
    assert (tmp_path/'s'/'runs'/'nearest-neighbours-k-101'/'config.json').stat().st_mtime_ns == before
