"What a person watches in a terminal of 80 columns: epochs, many classes, what comes next, what was changed."
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import shell
from rich.console import Console

from fastsmile.cli.tables import evaluation_tables, fit_output, metrics_tables, predict_output
from fastsmile.config.commands import EvaluateConfig
from fastsmile.core.errors import list_few
from fastsmile.inference.outputs import PredictionSummary
from fastsmile.metrics.predictions import _sets_note
from fastsmile.metrics.scores import unmeasured_classes_note
from fastsmile.runs.evaluate import evaluate


def text(shown, width=80):
    "What a terminal of that width shows"
    console = Console(width=width, file=open('/dev/null', 'w'), record=True, force_jupyter=False, highlight=False)
    for s in shown: console.print(s, markup=False)
    return console.export_text()


TINY = ('--arch resnet10t --weights none --size 32 --bs 16 --lr 0.005 --balance none --no-onnx').split()


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A folder with faces and a run of three epochs, and what `fit` said"
    place = tmp_path_factory.mktemp('terminal')
    assert shell('sample', 'faces', '-n', '60', cwd=place).returncode == 0
    r = shell('fit', 'faces', *TINY, '--epochs', '3', '--model-args', '{"channels": [8, 16, 32, 64]}', '--out', 'run', cwd=place, COLUMNS='80')
    assert r.returncode == 0, r.stderr
    return place, r


def test_epochs_are_aligned_below_one_header_and_the_best_is_named(trained):
    _, r = trained
    lines = r.stderr.splitlines()
    header, = (i for i, line in enumerate(lines) if line.startswith('epoch  phase'))
    epochs, best = lines[header + 1:header + 4], lines[header + 4]
    assert [line.split()[0] for line in epochs] == ['1', '2', '3'] and max(map(len, lines[header:header + 5])) <= 80
    assert len({line.rstrip(' *').rfind('s') for line in epochs}) == 1  # the times end in one column
    losses = [float(line.split()[4]) for line in epochs]
    stars = [line.endswith('*') for line in epochs]
    assert stars[0] and re.match(rf'best: epoch {max(i for i, s in enumerate(stars) if s) + 1} \(the last \*\)', best)
    assert min(losses) == losses[int(best.split()[2]) - 1] and f'{min(losses):.3f}' in best
    assert '\x1b' not in r.stderr and 'images/s' not in r.stderr  # no terminal, no display


def test_stages_of_the_network_are_for_verbose_alone(trained):
    place, r = trained
    line = 'parameters, all of them are trained'
    assert line in r.stderr and not re.search(r'^ +layer1 ', r.stderr, re.M)
    r = shell('fit', 'faces', *TINY, '--epochs', '1', '--model-args', '{"channels": [8, 16, 32, 64]}', '--tta', 'none', '-v', '--out', 'verbose', cwd=place)
    assert r.returncode == 0 and line in r.stderr and re.search(r'^ +layer1 +[\d,]+ of +[\d,]+$', r.stderr, re.M)


def test_the_next_commands_can_be_pasted(trained):
    place, r = trained
    steps = r.stdout.split('Next:\n')[1].splitlines()
    assert steps == ['  fastsmile evaluate run', '  fastsmile predict FOLDER --model run']
    for step in steps:
        done = shell(*shlex.split(step.replace('FOLDER', 'faces/happy_images'))[1:], cwd=place)
        assert done.returncode == 0, done.stderr


def test_calibrate_says_that_it_changed_the_model(trained, tmp_path):
    place, _ = trained
    shutil.copytree(place/'run', tmp_path/'run')
    before = (tmp_path/'run'/'model'/'config.json').read_bytes()
    r = shell('calibrate', 'run', '--decide', 'balanced', cwd=tmp_path)
    assert r.returncode == 0 and 'The model in run was changed' in r.stdout, r.stderr
    assert (tmp_path/'run'/'model'/'config.json').read_bytes() != before


def test_a_hundred_classes_are_not_a_hundred_rows(run):
    m = json.loads((run.path/'metrics.json').read_text())
    per_class = [c | dict(label=f'class {i}', f1=i / 100) for i, c in enumerate([m['test']['per_class'][0]] * 100)]
    test = m['test'] | dict(per_class=per_class)
    r = evaluate(run.path, config=EvaluateConfig(draws=100))
    shares = [dict(covered=.9)] * 100
    r |= dict(metrics=r['metrics'] | dict(per_class=per_class, classes=[c['label'] for c in per_class]),
              calibration=r['calibration'] | dict(sets=r['calibration']['sets'] | dict(by_class=shares)))
    for shown in (text(metrics_tables(m | dict(test=test))), text(evaluation_tables(r))):
        assert '... and 80 more' in shown and 'class 19 ' in shown and 'class 20 ' not in shown
        assert len(shown.splitlines()) < 70
    assert '... and 95 more' in shown  # of the classes that sets hold
    labels = {f'class {i}': i for i in range(100)}
    about = dict(probabilities='calibrated', precision='fp32')
    shown = text(predict_output(PredictionSummary(4950, labels, [], 'p.csv', seconds=1., run_info=about, images=4950))[0])
    assert '... and 80 more' in shown and 'class 99 ' in shown and 'class 79 ' not in shown


def test_few_classes_are_shown_whole(run):
    assert 'more, see --json' not in text(fit_output(run)[0])
    assert list_few(['a', 'b']) == 'a, b' and list_few(list('abcdefg')) == 'a, b, c, d, e ... and 2 more'


def test_a_note_on_a_hundred_classes_is_a_line():
    made = SimpleNamespace(always_in_sets=list(range(100)), calib_rows=[3] * 100, rows_for_sets=9)
    note, = _sets_note(made, tuple(f'class {i}' for i in range(100)))
    assert note.endswith("'class 4' (3 rows) ... and 95 more")


def test_a_note_on_classes_without_rows_is_a_line():
    cm = np.zeros((100, 100), int)
    cm[0, :8] = 1
    note = unmeasured_classes_note(cm, [f'class {i}' for i in range(100)])
    assert note.startswith("No row is 'class 1' or 'class 2' or 'class 3' or 'class 4' or 'class 5' ... and 94 more: not measured.")
    assert "counts 'class 1', 'class 2', 'class 3', 'class 4', 'class 5' ... and 2 more as 0" in note
