"What a person sees in a shell: exit codes, one clear line, results on standard output."
import csv
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import folder, picture, shell

from fastsmile.core.errors import SmileError
from fastsmile.config.commands import (
    ArchsConfig, AuditConfig, CacheConfig, CalibrateConfig, CompareConfig, DemoConfig, EnsembleConfig, EvaluateConfig,
    ExplainConfig, ExportConfig, LRFindConfig, PredictConfig, ProbeConfig, PushConfig, ReportConfig, SampleConfig, ServeConfig,
    StudyConfig, TuneConfig,
)
from fastsmile.config.fields import flag
from fastsmile.config.fit import FitConfig


@pytest.mark.parametrize('name,config', [('fit', FitConfig), ('predict', PredictConfig), ('sample', SampleConfig), ('demo', DemoConfig),
                                         ('archs', ArchsConfig), ('audit', AuditConfig), ('evaluate', EvaluateConfig), ('calibrate', CalibrateConfig),
                                         ('explain', ExplainConfig), ('report', ReportConfig), ('compare', CompareConfig), ('cache', CacheConfig),
                                         ('probe', ProbeConfig), ('ensemble', EnsembleConfig), ('export', ExportConfig), ('serve', ServeConfig),
                                         ('study', StudyConfig), ('tune', TuneConfig), ('lr-find', LRFindConfig), ('push', PushConfig)])
def test_help_shows_every_option_and_an_example(name, config):
    from typer.testing import CliRunner

    from fastsmile.cli.commands import app
    r = CliRunner().invoke(app, [name, '--help'], env=dict(COLUMNS='120', TERM='dumb'))
    assert r.exit_code == 0 and f'fastsmile {name}' in r.stdout.split('Example')[1]
    assert {flag(f.name) for f in fields(config)} <= set(re.findall(r'--[a-z-]+', r.stdout))


def test_help_imports_nothing_heavy():
    code = "import sys; sys.argv = ['fastsmile', '--help']; from fastsmile.cli.commands import main\ntry: main()\nexcept SystemExit: print(sorted(sys.modules))"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0 and not {'torch', 'pandas', 'numpy', 'fastai', 'timm', 'PIL', 'matplotlib', 'scipy'} & set(eval(r.stdout.splitlines()[-1]))


@pytest.mark.parametrize('args,code,words', [(['fit', 'nowhere'], 1, 'does not exist'), (['fit', '--bs', 'many'], 2, "'--bs'"),
                                             (['fit', '--epochs', '-3'], 2, 'out of range'),
                                             (['predict', 'nowhere'], 1, 'does not exist'), (['predict'], 2, "'where'"), (['smile'], 2, 'smile'),
                                             (['sample', '/proc/x'], 1, 'cannot be made'), (['predict', '.', '--tta=upside-down'], 2, 'upside-down')])
def test_bad_input_is_one_line_and_a_code(args, code, words, tmp_path):
    r = shell(*args, cwd=tmp_path)
    assert r.returncode == code and words in r.stderr and 'Traceback' not in r.stderr and not r.stdout
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there(tmp_path):
    (tmp_path/'a.png').write_bytes(picture())
    r = shell('predict', 'a.png', '--model', 'x', cwd=tmp_path)
    assert r.returncode == 1 and 'no model' in r.stderr and 'Traceback' not in r.stderr


def test_debug_shows_the_traceback(tmp_path):
    assert 'Traceback' in shell('fit', 'nowhere', cwd=tmp_path, FASTSMILE_DEBUG='1').stderr


def test_an_option_of_one_value_is_given_once(tmp_path):
    "And those that may be given again, may"
    r = shell('predict', 'x', '--threshold', 'a=0.3', '--threshold=b=0.2', cwd=tmp_path)
    assert r.returncode == 2 and 'error: --threshold is given 2 times.' in r.stderr and 'once' in r.stderr
    r = shell('sample', 'faces', '-n', '5', '-n', '6', cwd=tmp_path)
    assert r.returncode == 2 and '-n is given 2 times' in r.stderr and not (tmp_path/'faces').exists()
    assert 'given' not in shell('audit', 'nowhere', '--drop-class', 'a', '--drop-class', 'b', cwd=tmp_path).stderr


def test_sample_fit_predict_in_a_shell(tmp_path):
    assert shell('sample', 'faces', '-n', '60', cwd=tmp_path).returncode == 0
    options = '--arch resnet10t --weights none --size 32 --epochs 1 --bs 16 --lr 0.005'.split()
    r = shell('fit', 'faces', *options, '--model-args', '{"channels": [8, 16, 32, 64]}', cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert 'balanced accuracy' in r.stdout and 'majority' in r.stdout and 'unreadable' in r.stderr
    folder(tmp_path/'new', {'a.png': picture(), 'b/c.jpg': picture(fmt='JPEG'), 'broken.jpg': b'no picture', 'notes.txt': b'x'})
    r = shell('predict', 'new', '--tta', cwd=tmp_path)
    assert r.returncode == 0 and 'runs/resnet10t-' in r.stderr and 'not an image' in r.stdout
    rows = list(csv.DictReader((tmp_path/'predictions.csv').open()))
    assert [row['path'] for row in rows] == ['a.png', 'b/c.jpg', 'broken.jpg']
    assert [bool(row['error']) for row in rows] == [False, False, True] and list(rows[0])[:3] == ['path', 'label', 'confidence']
    assert abs(sum(float(v) for k, v in rows[0].items() if k.startswith('p_')) - 1) < 1e-6
    r = shell('predict', 'new', '--out', 'p.jsonl', '--json', cwd=tmp_path)
    assert json.loads(r.stdout)['rows'] == 3 and [json.loads(line)['path'] for line in (tmp_path/'p.jsonl').open()] == [row['path'] for row in rows]
    again = (tmp_path/'predictions.csv').read_bytes()
    r = shell('predict', 'new', '--tta', cwd=tmp_path)
    assert 'predictions.csv of an earlier run is kept' in r.stderr and 'predictions: predictions-2.csv' in r.stdout
    assert (tmp_path/'predictions.csv').read_bytes() == (tmp_path/'predictions-2.csv').read_bytes() == again


def test_names_that_attack_do_not_reach_the_terminal(tmp_path, run):
    folder(tmp_path/'new', {'\x1b[31mred\n.png': picture(), '<b>x</b>.png': b'no'})
    r = shell('predict', 'new', '--model', run.path, cwd=tmp_path)
    assert r.returncode == 0 and '\x1b[31m' not in r.stdout + r.stderr


def test_a_reader_that_leaves_is_no_failure(capsys, monkeypatch):
    from fastsmile.cli.from_config import report_exception
    monkeypatch.delenv('FASTSMILE_QUIET')
    for left in (BrokenPipeError(), SystemExit(1)): assert report_exception(left) == 1  # `fastsmile compare ... | head`: Rich leaves with SystemExit
    assert 'failed inside' not in capsys.readouterr().err
    assert report_exception(ValueError('x')) == 1 and 'failed inside' in capsys.readouterr().err


def test_names_of_the_package_are_functions_also_after_their_rooms_were_imported():
    "A room called like its function would stand in its place"
    import fastsmile
    from importlib import import_module
    for name, home in fastsmile._ROOM_OF.items():
        import_module(f'fastsmile.{home}')
        assert callable(getattr(fastsmile, name)), name


def test_predictions_that_all_failed_are_an_error(tmp_path, run, monkeypatch):
    from typer.testing import CliRunner
    from fastsmile.cli.commands import expand_bare_flags
    from fastsmile.cli.commands import app
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    monkeypatch.chdir(tmp_path)
    def ask(*args): return CliRunner().invoke(app, expand_bare_flags(['predict', *args, '--model', str(run.path)]))
    (tmp_path/'gone.txt').write_text('nowhere.png\nneither.png\n')
    r = ask('gone.txt')
    assert r.exit_code == 1 and 'not one image has a prediction' in r.stderr
    assert [bool(row['error']) for row in csv.DictReader((tmp_path/'predictions.csv').open())] == [True, True]
    folder(tmp_path/'one', {'a.png': picture()})
    r = ask('one')
    assert r.exit_code == 0 and re.search('1 image *\n', r.stdout) and '1 image in' in r.stdout
    r = ask('one', '--tta', 'foo')
    assert r.exit_code == 2 and "--tta 'foo'" in r.stderr and 'flip' in r.stderr


@pytest.mark.parametrize('status', ['finished', 'stopped'])
def test_an_occupied_folder_is_refused_before_any_work(tmp_path, status):
    "Nothing is read: the source that is named is not even there"
    from fastsmile.reports.audit import audit
    from fastsmile.runs.ensemble import ensemble
    from fastsmile.config.commands import AuditConfig, EnsembleConfig, ProbeConfig
    from fastsmile.config.fit import FitConfig
    from fastsmile.runs.probe import probe
    from fastsmile.runs.fit import fit
    where = folder(tmp_path/'taken', {'config.json': json.dumps(dict(status=status, kind='fit'))})
    for make, config in ((audit, AuditConfig), (fit, FitConfig), (probe, ProbeConfig), (ensemble, EnsembleConfig)):
        with pytest.raises(SmileError, match='taken is not empty') as e: make(str(tmp_path/'nowhere'), config(out=str(where)))
        assert (f'To resume the unfinished run in it: fastsmile fit --resume {where}' in e.value.hint) == (status == 'stopped')
