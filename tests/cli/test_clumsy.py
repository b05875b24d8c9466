"What a clumsy or hostile user gives: records that are none, empty values, URLs to write to, names of boxes, columns that say what the model says."
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import folder, picture

from fastsmile.reports.audit import audit
from fastsmile.metrics.calibration import target_prior
from fastsmile.metrics.calibration import read_cost_matrix
from fastsmile.runs.compare import compare
from fastsmile.core.errors import OptionError, SmileError, shell_quote
from fastsmile.core.files import folder_lock, new_run_folder, read_run_config, write_text
from fastsmile.models.device import pick_device
from fastsmile.data.images import parse_region
from fastsmile.data.finder import ImageFinder
from fastsmile.data.tables import ColumnChoice, detect_columns
from fastsmile.data.readers import FolderReader
from fastsmile.inference.inputs import open_inputs
from fastsmile.serving.app import _listening_socket
from fastsmile.config.commands import AuditConfig, CompareConfig, EvaluateConfig, PredictConfig, SampleConfig
from fastsmile.config.fit import FitConfig
from fastsmile.inference.outputs import check_replaceable, read_prediction_rows
from fastsmile.inference.predict import predict_rows
from fastsmile.runs.predict import predict
from fastsmile.runs.calibrate import calibrate
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.explain import explain
from fastsmile.runs.report import report
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.data.sample import sample
from fastsmile.data.source import read_source

NONE = [[], 3, None, dict(status=['x']), dict(status='finished', options=[]), dict(status='finished', source=3)]


@pytest.mark.parametrize('record', NONE, ids=json.dumps)
def test_a_record_that_is_none(record, run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path/'run')
    (copy/'config.json').write_text(json.dumps(record))
    for use in (evaluate, calibrate, report, explain, load_run, read_run_config, lambda r: compare([r, run.path]),
                lambda r: fit('.', FitConfig(resume=str(r)))):
        with pytest.raises(SmileError, match='is not a fastsmile run'): use(copy)
    with pytest.raises(SmileError, match='is not empty'): new_run_folder(str(copy), 'x')


def test_a_record_without_a_training_is_no_finished_run(tmp_path):
    (tmp_path/'config.json').write_text('{"status": "finished"}')
    for use in (evaluate, report):
        with pytest.raises(SmileError, match='is not a finished run'): use(tmp_path)


@pytest.mark.parametrize('column', ['target', 'p_age', pytest.param('p_id', marks=pytest.mark.slow)])
def test_a_source_with_columns_that_predictions_have(column, run, faces, tmp_path):
    table = pd.read_csv(run.path/'table.csv', dtype=str, keep_default_na=False).query("split == 'test' and reason == ''")
    said = table[['path', 'label']].assign(**{column: range(len(table))})
    said.to_csv(tmp_path/'faces.csv', index=False)
    (tmp_path/'happy_images').symlink_to(faces/'happy_images')
    ask = EvaluateConfig(label_col='label', image_col='path', anyway=True, draws=100, out=str(tmp_path/'said'))
    plain, more = (evaluate(run.path, tmp_path/'faces.csv', replace(ask, by=by)) for by in ((), (f'given_{column}',)))
    assert plain['metrics']['accuracy'] == more['metrics']['accuracy'] and plain['metrics']['rows'] == len(table)


@pytest.mark.parametrize('where', ['s3://bucket/x', pytest.param('memory://x', marks=pytest.mark.slow)])
def test_nothing_is_written_to_a_url(where, faces, run, tmp_path, monkeypatch):
    other = shutil.copytree(run.path, tmp_path/'other')
    (tmp_path/'here').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    for write in (lambda: audit(faces, AuditConfig(out=where)), lambda: compare([run.path, other], CompareConfig(out=f'{where}.html')),
                  lambda: sample(where, SampleConfig(n=60)), lambda: write_text(where, 'x'), lambda: fit(faces, FitConfig(out=where)),
                  lambda: predict(faces/'happy_images', PredictConfig(model=str(run.path), out='p.csv', html=f'{where}.html')),
                  lambda: evaluate(run.path, config=EvaluateConfig(out=where))):
        with pytest.raises(SmileError, match='URL'): write()
    assert not list((tmp_path/'here').iterdir())


def test_a_box_with_a_number_that_no_picture_has(run, tmp_path):
    name = f'a.png#xywh={"9" * 5000},1,1,1'
    assert parse_region(name) == (name, None) and parse_region('a#xywh=1,2,3,4') == ('a', (1, 2, 3, 4))
    source = folder(tmp_path/'p', {'a.png': picture()})
    rows = list(predict_rows(load_run(run.path).model, open_inputs(source).reader, [name, 'a.png']))
    assert rows[0]['error'] and not rows[1]['error']


def test_numbers_in_other_scripts_are_none(tmp_path):
    with pytest.raises(OptionError, match='is no column'):
        detect_columns([["a", "b"]], ImageFinder(FolderReader(tmp_path)), ColumnChoice("²"), "x.csv", ("image",))
    with pytest.raises(OptionError, match='is not a shape'): read_source(folder(tmp_path, {'x.bin': b'1' * 168})/'x.bin', FitConfig(raw_shape='5 6,56,3'))


def test_pictures_beside_class_folders_are_accounted_for(tmp_path):
    files = {f'{split}{c}/{i}.png': picture(seed=i) for split in ('train/', 'test/') for c in 'ab' for i in range(2)} | {'train/x.png': picture(seed=9)}
    divided = read_source(folder(tmp_path/'divided', files))
    assert set(divided.frame.label) == {'a', 'b'} and divided.images_without_row == ['train/x.png']
    plain = read_source(folder(tmp_path/'plain', {n.removeprefix('train/'): v for n, v in files.items() if not n.startswith('test/')}))
    assert plain.images_without_row == ['x.png']
    found = {f.kind: f.count for f in audit(tmp_path/'divided', AuditConfig(out=str(tmp_path/'audit'))).findings}
    assert found['image-without-row'] == 1


@pytest.mark.parametrize('option', ['plan', 'labels', 'group_from', 'raw_shape', 'suspects'])
def test_an_empty_value_is_no_value(option):
    with pytest.raises(OptionError, match=f'--{option.replace("_", "-")} is empty'): AuditConfig(**{option: ''})


def test_an_empty_source_is_not_this_folder(run, monkeypatch, faces):
    monkeypatch.chdir(faces)
    with pytest.raises(SmileError, match='does not exist'): read_source('')
    with pytest.raises(SmileError, match='does not exist'): evaluate(run.path, '')


@pytest.mark.parametrize('stdin', ['', None])
def test_standard_input_without_a_path_replaces_nothing(stdin, run, tmp_path, monkeypatch):
    import io
    import sys
    monkeypatch.setattr(sys, 'stdin', stdin if stdin is None else io.StringIO(stdin))
    ask = PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv'))
    with pytest.raises(SmileError, match='Standard input'): predict('-', ask)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_part_that_is_spoilt_end_there(tmp_path):
    for spoilt in ('{"path": "b"', '3', '[' * 60000):
        (tmp_path/'p.jsonl.part').write_text('{"path": "a"}\n' + spoilt + '\n{"path": "c"}\n')
        assert [r['path'] for r, _ in read_prediction_rows(tmp_path/'p.jsonl.part', 'jsonl', ['path'])] == ['a']
    (tmp_path/'deep.jsonl').write_text('[' * 60000)
    with pytest.raises(OptionError, match='is not replaced'): check_replaceable(tmp_path/'deep.jsonl', 'jsonl')


@pytest.mark.parametrize('text', ['[' * 100000, '{"a": 1e999, "b": 1}', json.dumps(dict(a=10**400, b=1))])
def test_a_prior_that_is_none(text, tmp_path):
    (tmp_path/'p.json').write_text(text)
    with pytest.raises(SmileError, match='--prior'): target_prior(str(tmp_path/'p.json'), np.array([.5, .5]), ['a', 'b'])


def test_a_prior_that_is_none_leaves_no_run_folder(faces, tiny, tmp_path):
    (tmp_path/'p.json').write_text('{"smile": 1}')
    with pytest.raises(SmileError, match='must give each class'): fit(faces, replace(tiny, prior=str(tmp_path/'p.json'), out=str(tmp_path/'run')))
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('text,said', [('true,a,b\na,0,1\nb,1,0\na,5,0\n', 'each class once'), ('true,a,b\na,0,1,7\nb,1,0\n', 'cannot be read'),
                                       ('true,a,b\na,0,1\nb,1\n', 'cannot be read'),
                                       ('true,a,b\n' + 'x' * 200000 + ',0,1\n', 'cannot be read')])
def test_costs_that_are_none(text, said, tmp_path):
    (tmp_path/'c.csv').write_text(text)
    with pytest.raises(OptionError, match=said): read_cost_matrix(tmp_path/'c.csv', ['a', 'b'])


def test_other_values_that_are_none():
    with pytest.raises(OptionError, match='--seed'): FitConfig(seed=10**26)
    with pytest.raises(OptionError, match='--device'): pick_device('meta')
    with pytest.raises(SmileError, match='cannot listen on'): _listening_socket('nonsense..host', 0)


def test_a_server_answers_in_names_that_are_no_unicode():
    from fastsmile.inference.outputs import row_to_json
    serving = pytest.importorskip('fastsmile.serving.app')
    pytest.importorskip('starlette')
    said = json.loads(serving.json_response(row_to_json(dict(label='\udcff caf'))).body)
    assert said == dict(label='\udcff caf')


def test_commands_to_be_copied_are_quoted(tmp_path):
    assert shell_quote(tmp_path/'a b; touch x') == f"'{tmp_path}/a b; touch x'"
    with folder_lock(tmp_path): (tmp_path/'config.json').write_text(json.dumps(dict(status='stopped', options={}, source='x')))
    run = (tmp_path.parent/f'{tmp_path.name} b')
    shutil.copytree(tmp_path, run)
    with pytest.raises(SmileError) as e: new_run_folder(str(run), 'x')
    assert f"--resume '{run}'" in e.value.hint
