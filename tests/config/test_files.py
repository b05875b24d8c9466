"A file of options: what it may hold, what overrules what, and the one that fit writes"
import re
import tomllib
from importlib.resources import files

import pytest
from typer.testing import CliRunner

from fastsmile import FitConfig, TuneConfig, fit
from fastsmile.cli.commands import app
from fastsmile.config.fields import default_of
from fastsmile.config.recipes import RECIPES, options_toml, read_options, recipe_table, write_options
from fastsmile.core.errors import OptionError
from fastsmile.core.files import read_json

SMALL = dict(arch='resnet10t', weights='none', model_args='{"channels": [8, 8, 8, 8]}', size=32, bs=16, epochs=1, tta='none', device='cpu',
             workers=0, no_onnx=True)


def written(tmp_path, text):
    (tmp_path/'x.toml').write_text(text)
    return tmp_path/'x.toml'


def test_what_is_given_overrules_the_file_and_the_file_its_recipe(tmp_path):
    file = written(tmp_path, 'recipe = "cnn-b1"\nbs = 32\nepochs = 5\n')
    config = FitConfig.from_file(file, epochs=3)
    assert (config.epochs, config.bs, config.lr, config.size) == (3, 32, '1e-3', 56)
    assert FitConfig.from_file(file).epochs == 5  # given in the file, although it is the default
    assert FitConfig.from_file(file, recipe='resnet18').dropout == 0.2 and FitConfig.from_file(file, recipe='resnet18').bs == 32
    assert TuneConfig.from_file(written(tmp_path, 'trials = 3\nbs = 32')).given == ['bs']


@pytest.mark.parametrize('text,message', [
    ('epoch = 3', 'Did you mean epochs?'), ('learning-rate = 1e-3', 'Unknown option'), ('epochs = "3"', 'Accepted: an integer'),
    ('epochs = 3.5', 'Accepted: an integer'), ('compile = 1', 'Accepted: true or false'), ('epochs = true', 'Accepted: an integer'),
    ('drop_class = "a"', 'Accepted: e.g. drop_class = ["a", "b"]'), ('rename = [1]', 'is not a list of texts'),
    ('[network]\narch = "resnet18"', 'Unknown option'),
    ('epochs: 3', 'not a TOML file'), ('epochs = 3\nepochs = 4', 'not a TOML file'), ('source = "faces"', 'after the command'),
    ('resume = "runs/x"', 'fit --resume RUN'), ('epochs = -3', '--epochs -3 is out of range'), ('recipe = "vgg"', 'Accepted: densenet161-frozen'),
    ('lr = nan', 'not a learning rate'), ('valid = nan', '--valid nan is out of range'), ('json = true', 'Unknown option'),
    ('config = "y.toml"', 'Unknown option')])
def test_a_file_that_is_refused(tmp_path, text, message):
    with pytest.raises(OptionError) as e: FitConfig.from_file(written(tmp_path, text))
    assert message in str(e.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match='No such file'): FitConfig.from_file(tmp_path/'none.toml')
    with pytest.raises(OptionError, match='cannot be read'): FitConfig.from_file(tmp_path)
    (tmp_path/'x.toml').write_bytes('epochs = 3'.encode('utf-16'))
    with pytest.raises(OptionError, match='not a TOML file'): FitConfig.from_file(tmp_path/'x.toml')
    (tmp_path/'x.toml').write_bytes(b'\xef\xbb\xbfepochs = 3\r\n')  # as an editor of Windows saves it
    assert FitConfig.from_file(tmp_path/'x.toml').epochs == 3


@pytest.mark.parametrize('config', [
    FitConfig(), FitConfig(recipe='cnn-b1', bs=64), FitConfig(lr='1e-3', clip=0.5, ema=0.99, refit_all=True), FitConfig(min_confidence=1, valid=0.1),
    FitConfig(labels='a\udce4.csv', plan='plan.csv'),
    FitConfig(rename=('a=b', 'c "d"=e\\f'), labels="ö'\u2028\x7f\x01.csv", group_from=r'(.+)_\d+', model_args='{"channels": [8, 8]}')])
def test_what_is_written_is_read_again(tmp_path, config):
    write_options(config, tmp_path/'options.toml', 'fastsmile fit faces\nepochs = 9')
    assert FitConfig.from_file(tmp_path/'options.toml') == config
    assert set(tomllib.loads(options_toml(config))) == {k for k, v in config.as_dict().items() if v != config.defaults()[k]}


def test_every_recipe_is_a_file_for_config(tmp_path):
    for name, recipe in RECIPES.items():
        file = files('fastsmile')/'recipes'/f'{name}.toml'
        assert FitConfig.from_file(file) == FitConfig(**recipe.options)
        assert read_options(FitConfig, file) == recipe.options and recipe.assumed.keys() <= recipe.options.keys()
    assert sorted(RECIPES) == sorted(p.name.removesuffix('.toml') for p in (files('fastsmile')/'recipes').iterdir())


def test_the_table_of_recipes_marks_what_is_assumed():
    table = recipe_table()
    assert list(table.index) == list(RECIPES)
    for name, recipe in RECIPES.items():
        assert {k for k in table if table.loc[name, k].endswith('*')} == set(recipe.assumed)
        assert {k for k in table if table.loc[name, k]} == set(recipe.options)


def test_the_options_that_fit_writes_repeat_the_run(faces, tmp_path, no_charts):
    first = fit(faces, out=str(tmp_path/'first'), **SMALL)
    file = first.path/'options.toml'
    assert re.match(r'# fastsmile fit \S+ --config \S+options.toml\n', file.read_text())
    assert 'out' not in tomllib.loads(file.read_text())
    done = CliRunner().invoke(app, ['fit', str(faces), '--config', str(file), '--out', str(tmp_path/'second')])
    assert done.exit_code == 0, done.output
    a, b = (read_json(tmp_path/n/'config.json')['options'] | dict(out=None) for n in ('first', 'second'))
    assert a == b and read_json(tmp_path/'first'/'metrics.json')['test'] == read_json(tmp_path/'second'/'metrics.json')['test']


@pytest.mark.parametrize('options', [dict(seeds=2), dict(folds=2)])
def test_comparisons_and_cross_validations_write_what_repeats_all_of_it(faces, tmp_path, no_charts, options):
    options = dict(precision='fp32') | options
    fit(faces, out=str(tmp_path/'run'), **SMALL | options)
    assert FitConfig.from_file(tmp_path/'run'/'options.toml') == FitConfig(**SMALL | dict(augment='light') | options)  # planned


def test_the_shell_overrules_the_file(tmp_path, monkeypatch):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    file = written(tmp_path, 'epochs = 7\nlr_sweep = "1e-3,1e-2"\nlr = "1e-3"\n')
    run = CliRunner().invoke
    told = run(app, ['fit', '.', '--config', str(file)])
    assert told.exit_code == 2 and '--lr with --lr-sweep' in told.output
    told = run(app, ['fit', 'nowhere', '--config', str(file), '--lr', 'auto'])
    assert told.exit_code == 1 and 'nowhere' in told.output  # the options go together now
    assert run(app, ['fit', '.', '--config', str(tmp_path/'none.toml')]).exit_code == 2
    assert run(app, ['fit', '.', '--config', '']).exit_code == 2
    assert 'No such option' in run(app, ['predict', 'x', '--config', str(file)]).output


def test_defaults_are_what_help_shows():
    for name, f in FitConfig.__dataclass_fields__.items(): assert getattr(FitConfig(), name) == default_of(f)
