"A recipe stands below what is given, in Python and in the shell, and every one of them trains"
import json

import pytest
from typer.testing import CliRunner

from fastsmile import FitConfig, fit, load_run
from fastsmile.core.errors import OptionError
from fastsmile.core.files import read_json
from fastsmile.cli.commands import app
from fastsmile.config.fields import command_line
from fastsmile.config.recipes import RECIPES


@pytest.mark.parametrize('name', RECIPES)
def test_every_value_of_a_recipe_is_an_option_and_reaches_it(name):
    config = FitConfig(recipe=name)
    for k, v in RECIPES[name].options.items(): assert getattr(config, k) == v, k


def test_what_is_given_overrules_even_where_it_is_the_default():
    assert FitConfig(recipe='cnn-b1').bs == 124
    assert FitConfig(recipe='cnn-b1', bs=64).bs == 64
    with pytest.raises(OptionError, match='recipe'): FitConfig(recipe='vgg')


def test_the_command_line_of_a_recipe_says_what_overrules_it():
    assert command_line('fit', ['faces'], FitConfig(recipe='cnn-b1')) == 'fastsmile fit faces --recipe cnn-b1'
    assert command_line('fit', ['faces'], FitConfig(recipe='cnn-b1', bs=64)) == 'fastsmile fit faces --recipe cnn-b1 --bs 64'


def test_options_of_a_run_come_back_as_they_were():
    config = FitConfig(recipe='resnet18', bs=64, lr='auto')
    assert FitConfig(**config.as_dict()) == config


def test_cost_and_decide_do_not_go_together():
    with pytest.raises(OptionError, match='--cost with --decide'): FitConfig(cost='costs.csv', decide='argmax')


THIN = dict(resnet50=dict(channels=[8, 8, 8, 8]), resnet18=dict(channels=[8, 8, 8, 8]), densenet161=dict(growth_rate=4))


@pytest.mark.parametrize('name', RECIPES)
def test_each_recipe_trains_from_end_to_end(name, faces, tmp_path, no_charts):
    "The large networks with few channels: names of layers, heads and phases are those of the whole ones"
    small = dict(size=32, bs=16, epochs=1, freeze_epochs=0, weights='none', tta='none', precision='fp32', no_onnx=True, out=str(tmp_path/'run'))
    if thin := THIN.get(RECIPES[name].options['arch']): small |= dict(model_args=json.dumps(thin))
    run = fit(faces, FitConfig(recipe=name, **small))
    made = load_run(run.path)
    assert made.options.recipe == name and made.options.arch == RECIPES[name].options['arch']
    assert made.metrics['test']['rows'] > 0 and made.report.exists()
    assert read_json(run.path/'model'/'config.json')['architecture'] == made.options.arch


def test_the_shell_gives_what_is_typed_and_the_recipe_the_rest(faces, tmp_path, no_charts):
    out = tmp_path/'run'
    done = CliRunner().invoke(app, ['fit', str(faces), '--recipe', 'cnn-b1', '--epochs', '1', '--bs', '64', '--no-onnx', '--out', str(out)])
    assert done.exit_code == 0, done.output
    options = read_json(out/'config.json')['options']
    assert (options['epochs'], options['bs'], options['lr'], options['size']) == (1, 64, '1e-3', 56)
    assert '--bs 64' in read_json(out/'config.json')['command']
