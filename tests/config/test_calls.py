"Every public function of a command takes a config, or the same options by name"
import inspect
from dataclasses import fields

import pytest

import fastsmile
from fastsmile.config.fields import Options
from fastsmile.core.errors import OptionError

COMMANDS = dict(
    audit='AuditConfig', fit='FitConfig', predict='PredictConfig', evaluate='EvaluateConfig', calibrate='CalibrateConfig', explain='ExplainConfig',
    report='ReportConfig', compare='CompareConfig', probe='ProbeConfig', ensemble='EnsembleConfig', tune='TuneConfig', export='ExportConfig',
    serve='ServeConfig', study='StudyConfig', sample='SampleConfig', lr_find='LRFindConfig', push='PushConfig')
FIRST = dict(study=('emotions', 'nowhere'), push=('nowhere', 'ada/smiles'))  # what precedes the options; one word for all others


def test_every_public_config_belongs_to_a_function_here():
    configs = {n for n in fastsmile.__all__ if n.endswith('Config')}
    assert configs - {'DemoConfig'} == set(COMMANDS.values())


@pytest.mark.parametrize('name', COMMANDS)
def test_options_are_given_as_a_config_or_by_name_never_both(name):
    function, config = getattr(fastsmile, name), getattr(fastsmile, COMMANDS[name])
    first = FIRST.get(name, ('nowhere',))
    option = fields(config)[0].name
    with pytest.raises(OptionError, match=f'{option} beside a {config.__name__}'): function(*first, config=config(), **{option: config().as_dict()[option]})
    with pytest.raises(OptionError, match=f"'{option}_' in {config.__name__}") as e: function(*first, **{f'{option}_': 1})
    assert e.value.hint == f'Did you mean {option}?'


@pytest.mark.parametrize('name', COMMANDS)
def test_no_parameter_hides_an_option(name):
    "A parameter of the name of an option would take its value"
    parameters = inspect.signature(getattr(fastsmile, name)).parameters
    config = getattr(fastsmile, COMMANDS[name])
    assert issubclass(config, Options) and not parameters.keys() & {f.name for f in fields(config)}
    assert parameters['config'].default is None and list(parameters.values())[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_options_by_name_are_checked_as_those_of_a_config(tmp_path):
    with pytest.raises(OptionError, match='--epochs -1 is out of range'): fastsmile.fit('nowhere', epochs=-1)
    faces = fastsmile.sample(tmp_path/'faces', n=60, seed=7)
    assert len(list((faces/'happy_images').iterdir())) > 55
    done = fastsmile.audit(faces, out=str(tmp_path/'audit'), hash='dhash')
    assert done.path == tmp_path/'audit' and (done.path/'plan.csv').exists()
