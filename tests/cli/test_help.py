"What `--help` prints, and what is proposed where a word is mistyped."
import re
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fastsmile.cli.commands import app, expand_bare_flags
from fastsmile.cli.help import COMMAND_PANELS, COMMAND_SYNONYMS, OPTION_SYNONYMS
from fastsmile.config.fields import OPTION_PANELS

COMMANDS = get_command(app).commands


def printed(*args, columns=80):
    return CliRunner().invoke(app, list(args), env=dict(COLUMNS=str(columns), TERM='dumb')).output


def panels(text):
    return re.findall(r'╭─ (.*?) ─', text)


def test_the_summary_of_a_command_is_one_whole_line():
    text = printed('--help')
    assert panels(text) == ['Start here', 'Understand', 'More', 'Options']
    for name, command in COMMANDS.items():
        summary = command.help.split('\n')[0]
        assert '…' not in summary and len(re.findall(rf'^│ {name} +{re.escape(summary)} *│$', text, re.M)) == 1
    assert {n for names in COMMAND_PANELS.values() for n in names} <= set(COMMANDS)


@pytest.mark.parametrize('columns', (80, 120))
@pytest.mark.parametrize('name', sorted(COMMANDS))
def test_help_is_whole_and_fits_the_terminal(name, columns):
    frame, examples = printed(name, '--help', columns=columns).split('Examples:\n')
    assert '…' not in frame and max(map(len, frame.splitlines())) <= columns
    assert set(panels(frame)) <= {'Arguments', 'Options', *OPTION_PANELS}
    assert all(line.startswith('  ') for line in examples.rstrip().splitlines())


def test_the_options_of_fit_are_in_panels_with_the_common_ones_first():
    text = printed('fit', '--help')
    assert panels(text) == ['Arguments', *OPTION_PANELS]
    common = re.findall(r'^│ (--[a-z-]+)', text.split('─ Common')[1].split('╰')[0], re.M)
    assert {'--arch', '--epochs', '--out', '--preset'} <= set(common) and 8 <= len(common) <= 13
    assert panels(printed('calibrate', '--help')) == ['Arguments', 'Options']


@pytest.mark.parametrize('name', sorted(COMMANDS))
def test_examples_can_be_pasted(name):
    for line in COMMANDS[name].epilog.splitlines()[1:]:
        words = shlex.split(line.split('|')[-1] if line.startswith('find') else line)
        if words[0] == 'curl': continue
        typed = expand_bare_flags(words[words.index('fastsmile') + 1:])
        context = COMMANDS[typed[0]].make_context(typed[0], typed[1:])  # raises for what the parser does not accept
        assert context.command is COMMANDS[typed[0]] and not context.args


@pytest.mark.parametrize('typed,meant', [('train', 'fit'), ('trian', 'fit'), ('classify', 'predict'), ('infer', 'predict'), ('inference', 'predict'),
                                         ('test', 'evaluate'), ('eval', 'evaluate'), ('val', 'evaluate'), ('check', 'audit'), ('Fit', 'fit'),
                                         ('evalute', 'evaluate'), ('predcit', 'predict'), ('models', 'archs')])
def test_a_mistyped_command_is_answered_with_the_one_that_is_meant(typed, meant):
    r = CliRunner().invoke(app, [typed, 'faces'])
    assert r.exit_code == 2 and f'Did you mean {meant}?' in r.output


@pytest.mark.parametrize('line,meant', [('fit --epoch 3', '--epochs'), ('fit --batch-size 8', '--bs'), ('fit --model x', '--arch'), ('fit --gpu', '--device'),
                                        ('predict x --checkpoint y', '--model'), ('fit --label_col=x', '--label-col'), ('evaluate r --output x', '--out')])
def test_a_mistyped_option_is_answered_with_the_one_that_is_meant(line, meant):
    r = CliRunner().invoke(app, line.split())
    assert r.exit_code == 2 and f'Did you mean {meant}?' in r.output


def test_nothing_is_proposed_where_nothing_is_near():
    assert 'Did you mean' not in printed('zebra') and 'No such command: zebra.' in printed('zebra')
    assert 'Did you mean' not in printed('cache', '--zebra') and 'No such option: --zebra.' in printed('cache', '--zebra')


def test_synonyms_lead_to_what_exists_and_hide_nothing():
    flags = {f for c in COMMANDS.values() for p in c.params for f in p.opts}
    assert set(COMMAND_SYNONYMS) <= set(COMMANDS) and set(OPTION_SYNONYMS) <= flags
    assert not set(' '.join(COMMAND_SYNONYMS.values()).split()) & set(COMMANDS)
    words = ' '.join(COMMAND_SYNONYMS.values()).split()
    assert len(words) == len(set(words)), 'a word leads to two commands'
