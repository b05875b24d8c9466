"The plan of a training: what is given stays, the rest fits the pictures, the time and the memory."
import json
import sys
from dataclasses import replace

import pandas as pd
import pytest
import timm
import torch
from conftest import folder, picture
from forked import run_python
from safetensors.torch import load_file

from fastsmile.config.fit import FitConfig
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_json
from fastsmile.inference.rows import RowOptions
from fastsmile.models.factory import early_layers_end
from fastsmile.runs.fit import fit
from fastsmile.training.plan import (PRETRAINED, RANDOM, NetworkChoice, PlanFacts, StepCost, _plan_size, _reasons, _time_steps, _with_schedule,
                                     activation_bytes, budget_seconds, choose_network, default_lr, images_that_fit, measure_step, plan_fit,
                                     plan_freeze, plan_lines, sizes_to_try, unchanged)
from fastsmile.training.learner import spec_from_config
from fastsmile.runs.fit import _say_if_late, new_network

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts

FACTS = PlanFacts(train=5000, valid=900, measured=3000, side=64, repeats=1, device='cpu', memory=16 * 10**9, used=6 * 10**8)
COST = StepCost(train=7e-3, forward=2e-3, activations=2.6e7, fixed=27_000_000, at_once=64)


def planned(config, facts=FACTS, cost=COST, regime=RANDOM): return _with_schedule(config, facts, cost, regime)


@pytest.mark.parametrize('given', [dict(epochs=5), dict(augment='medium'), dict(ema=0.0), dict(epochs=40, augment='none', ema=0.5)])
def test_what_is_given_stays_also_where_it_is_the_default(given):
    config = planned(FitConfig(arch='resnet10t', weights='none', size=64, bs=64, budget='2h', **given))
    assert {k: getattr(config, k) for k in given} == given


def test_epochs_fill_the_time_within_the_bounds_of_the_preset():
    epochs = [planned(FitConfig(arch='resnet10t', weights='none', size=64, bs=64, budget=b)).epochs for b in ('1s', '2m', '5m', '9h')]
    assert epochs == sorted(epochs) and epochs[0] == 1 and epochs[-1] == RANDOM.epochs['good'][1]


def test_long_trainings_from_random_weights_mix_and_average_short_ones_do_not():
    short, long = (planned(FitConfig(arch='resnet10t', weights='none', size=64, bs=64, epochs=n)) for n in (5, 24))
    assert (short.augment, short.ema) == ('light', 0.0)
    assert 'mixup' in long.augment and 0.9 <= long.ema < 1
    from_weights = [planned(FitConfig(size=96, bs=64, epochs=n, freeze=freeze), regime=PRETRAINED)
                    for freeze, epochs in (('none', (6, 7)), ('blocks.2', (3, 4))) for n in epochs]
    assert [c.augment for c in from_weights] == ['medium', 'medium+mixup:0.2'] * 2 and [c.ema > 0 for c in from_weights] == [False, True] * 2


@pytest.mark.parametrize('side,regime,largest', [(64, PRETRAINED, 128), (48, RANDOM, 64), (64, RANDOM, 64), (4000, PRETRAINED, 224), (10, PRETRAINED, 96)])
def test_small_pictures_are_never_blown_up_to_224(side, regime, largest):
    sizes = sizes_to_try(replace(FACTS, side=side), regime)
    assert sizes[0] == largest and sizes == sorted(sizes, reverse=True) and sizes[-1] == regime.sizes[0] and len(set(sizes)) == len(sizes)


def test_less_time_means_smaller_input():
    cost = lambda size: replace(COST, train=COST.train * (size / 96)**2, forward=COST.forward * (size / 96)**2)
    facts = replace(FACTS, side=400)
    sizes = [_plan_size(FitConfig(budget=b, bs=64), facts, sizes_to_try(facts, PRETRAINED), cost, PRETRAINED)[0] for b in ('30s', '3m', '6m', '1h')]
    assert sizes == sorted(sizes) and sizes[0] == 96 and sizes[-1] == 224


def test_a_long_training_comes_before_a_larger_input():
    cost = lambda size: replace(COST, train=COST.train * (size / 96)**2, forward=COST.forward * (size / 96)**2)
    facts, config = replace(FACTS, side=160), FitConfig(budget='12m', bs=64, freeze='blocks.2')
    (long, step), (large, _) = (_plan_size(config, facts, sizes_to_try(facts, r), cost, r) for r in (PRETRAINED, replace(PRETRAINED, long=99, long_frozen=99)))
    assert long < large and _with_schedule(config.planned_as(size=long), facts, step, PRETRAINED).epochs >= PRETRAINED.long_frozen
    assert _plan_size(config, replace(facts, side=220), sizes_to_try(facts, PRETRAINED), cost, PRETRAINED)[0] >= 128
    faces = replace(facts, side=128)  # three quarters of the side are near enough
    assert _plan_size(FitConfig(budget='5m', bs=64, freeze='blocks.2'), faces, sizes_to_try(faces, PRETRAINED), cost, PRETRAINED)[0] == 96


def test_a_larger_input_waits_for_a_long_training_with_frozen_layers_too():
    cost = lambda size: replace(COST, train=COST.train * (size / 96)**2, forward=COST.forward * (size / 96)**2)
    def plan(minutes):
        config = FitConfig(budget=f'{minutes}m', bs=64, freeze='blocks.2')
        size, step = _plan_size(config, FACTS, sizes_to_try(FACTS, PRETRAINED), cost, PRETRAINED)
        return size, _with_schedule(config.planned_as(size=size), FACTS, step, PRETRAINED).epochs
    plans = [plan(minutes) for minutes in range(3, 16)]
    assert {size for size, _ in plans} == {96, 128} and min(epochs for size, epochs in plans if size == 128) >= PRETRAINED.long
    assert any(PRETRAINED.long_frozen <= epochs < PRETRAINED.long for _, epochs in plans)  # where no size has the time for it


def test_given_epochs_are_those_that_a_size_leaves_time_for():
    cost = lambda size: replace(COST, train=COST.train * (size / 96)**2, forward=COST.forward * (size / 96)**2)
    def size(epochs): return _plan_size(FitConfig(budget='5m', bs=64, epochs=epochs), FACTS, sizes_to_try(FACTS, PRETRAINED), cost, PRETRAINED)[0]
    assert [size(n) for n in (1, 3, 30)] == [128, 128, 96]


def test_a_size_has_to_fit_by_its_own_measurement():
    honest = lambda size: replace(COST, train=COST.train * (size / 96)**2, forward=COST.forward * (size / 96)**2)
    slower = lambda size: replace(honest(size), train=honest(size).train * (2 if size == 128 else 1))  # than its pixels say
    facts = replace(FACTS, side=128)
    config = next(c for c in (FitConfig(budget=f'{m}m', bs=64, freeze='blocks.2') for m in range(3, 15))
                  if _plan_size(c, facts, sizes_to_try(facts, PRETRAINED), honest, PRETRAINED)[0] == 128)
    size, cost = _plan_size(config, facts, sizes_to_try(facts, PRETRAINED), slower, PRETRAINED)
    assert (size, cost) == (96, honest(96)) and _with_schedule(config.planned_as(size=size), facts, cost, PRETRAINED).epochs >= PRETRAINED.long_frozen


@pytest.mark.parametrize('arch', ['resnet10t', 'mobilenetv2_100', 'vit_tiny_patch16_224'])
def test_measuring_leaves_no_trace(arch):
    net = timm.create_model(arch, num_classes=3)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.random.get_rng_state()
    cost = measure_step(net, 224 if 'vit' in arch else 64, 8, 'cpu', 'light')
    assert cost.train > cost.forward > 0 and cost.activations > 0 and net.training
    assert all(v.equal(before[k]) for k, v in net.state_dict().items()) and state.equal(torch.random.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_activations_grow_with_the_pixels_and_not_with_the_batch():
    net = timm.create_model('resnet10t').train()
    with unchanged(net): small, large, more = (activation_bytes(net, torch.rand(n, 3, s, s)) for n, s in ((2, 64), (2, 128), (8, 64)))
    assert 3.5 < large / small < 4.5 and abs(more / small - 1) < 0.05


def test_parts_of_a_batch_halve_until_they_fit():
    net = timm.create_model('resnet10t')
    parts = [images_that_fit(1e8, 64, gigabytes * 10**9, net, 224) for gigabytes in (1, 2, 4, 8, 64)]
    assert parts == sorted(parts) and parts[-1] == 64 and parts[0] >= 2 and all(64 % p == 0 for p in parts)
    with pytest.raises(SmileError, match='A batch of 2 at 224 px needs about'): images_that_fit(1e8, 64, 2 * 10**8, net, 224)


def test_the_default_rate_is_that_of_the_network():
    assert default_lr(timm.create_model('densenet121'), True)[0] == default_lr(timm.create_model('resnet10t'), False)[0] == 4e-3
    assert default_lr(timm.create_model('convnext_atto'), True)[0] < default_lr(timm.create_model('convnext_atto'), False)[0] < 4e-3


def test_a_folder_of_weights_a_file_and_nothing(tmp_path, monkeypatch):
    for name in ('mobilenetv2_100.safetensors', 'resnet50.pth', 'mine.pth'): (tmp_path/name).write_bytes(b'1')
    assert choose_network(FitConfig(weights=str(tmp_path)), 'cpu').config.arch == 'mobilenetv2_100'
    assert choose_network(FitConfig(weights=str(tmp_path)), 'cuda').config.arch == 'resnet50'
    chosen = choose_network(FitConfig(weights=str(tmp_path), arch='resnet50'), 'cpu').config
    assert (chosen.arch, chosen.weights) == ('resnet50', str(tmp_path/'resnet50.pth'))
    with pytest.raises(OptionError, match='holds no file of densenet161'): choose_network(FitConfig(weights=str(tmp_path), arch='densenet161'), 'cpu')
    with pytest.raises(OptionError, match='of which architecture'): choose_network(FitConfig(weights=str(tmp_path/'mine.pth')), 'cpu')
    assert choose_network(FitConfig(weights=str(tmp_path/'resnet50.pth')), 'cpu').config.arch == 'resnet50'
    def unreachable(arch): raise SmileError('the hub cannot be reached')
    monkeypatch.setattr('fastsmile.training.plan.cached_weights', lambda arch: None)
    monkeypatch.setattr('fastsmile.training.plan.check_hub', unreachable)
    nothing = choose_network(FitConfig(), 'cpu')
    assert nothing.config.weights == 'none' and 'the hub cannot be reached' in nothing.rows[0].why
    monkeypatch.setattr('fastsmile.training.plan.cached_weights', lambda arch: 'x' if arch == 'resnet18' else None)
    assert (choose_network(FitConfig(), 'cpu').config.arch, choose_network(FitConfig(), 'cpu').config.weights) == ('resnet18', 'hub')


def test_steps_are_timed_in_the_precision_of_training():
    class Asked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.seen = torch.nn.Linear(3, 2), set()
        def forward(self, x):
            self.seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled('cpu')))
            return self.fc(x.mean((2, 3)))
    for precision, is_autocast in (('fp32', False), ('bf16', True)):
        net = Asked()
        _time_steps(net, 8, most=4, device='cpu', augment='light', precision=precision)
        assert net.seen == {(True, is_autocast), (False, False)}  # predictions are made in fp32


@pytest.mark.parametrize('error', [torch.OutOfMemoryError, MemoryError])
def test_a_timed_step_that_memory_does_not_hold_is_a_smaller_one(error):
    class Large(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.seen = torch.nn.Linear(3, 2), []
        def forward(self, x):
            self.seen.append(len(x))
            if len(x) > 5: raise error('no memory for so many')
            return self.fc(x.mean((2, 3)))
    net = Large()
    train, forward, most = _time_steps(net, 8, most=64, device='cpu', augment='none')
    assert 2 <= most <= 5 and max(net.seen) > 5 and net.seen[-1] <= 5 and train > 0 and forward > 0


def test_an_estimate_over_the_time_names_the_ways_out(data):
    config = FitConfig(arch='resnet10t', weights='none', size=64, epochs=2000, bs=16, budget='1m')
    spec = spec_from_config(config, data.classes)
    text = '\n'.join(plan_lines(plan_fit(NetworkChoice(config), data, spec, new_network(spec, config), 'cpu'), 0))
    assert 'more than 60 s: try --freeze head (about' in text and '--budget' in text


def test_a_dry_run_leaves_nothing(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    monkeypatch.chdir(tmp_path)
    assert fit(faces, weights='none', dry_run=True) is None and not list(tmp_path.iterdir())
    told = capsys.readouterr().err
    assert 'resnet10t' in told and 'memory' in told and 'an epoch about' in told


@pytest.mark.parametrize('size,side,said', [(48, 64, True), (64, 64, False), (128, 300, False)])
def test_an_input_smaller_than_the_pictures_says_why(size, side, said):
    config = FitConfig().planned_as(size=size, bs=64, epochs=8)
    why = next(row.why for row in _reasons(config, replace(FACTS, side=side), 12, 1.) if row.option == 'size')
    assert (f'{side} px' in why, 'too few epochs' in why) == (True, said)


def test_weights_that_do_not_exist_are_said_to():
    with pytest.raises(OptionError, match='--weights nowhere/weights does not exist') as e: choose_network(FitConfig(weights='nowhere/weights'), 'cpu')
    assert '--weights FOLDER' in e.value.hint


@pytest.mark.parametrize('text,seconds', [('90s', 90), ('90 sec', 90), ('10m', 600), ('10min', 600), ('1.5 h', 5400)])
def test_durations_as_people_write_them(text, seconds): assert budget_seconds(FitConfig(budget=text)) == seconds


def test_a_run_that_took_much_longer_than_planned_says_so(run, capsys, monkeypatch):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    planned = read_json(run.path/'training_plan.json')['seconds']
    _say_if_late(run, planned + 10)
    assert not capsys.readouterr().err
    _say_if_late(run, 4 * planned + 400)
    assert 'planned were' in capsys.readouterr().err


def test_what_was_planned_repeats_the_run(faces, tmp_path):
    run = fit(faces, weights='none', preset='quick', budget='1s', tta='none', out=str(tmp_path/'run'))
    written = FitConfig.from_file(run.path/'options.toml')
    plan = read_json(run.path/'training_plan.json')
    assert {row['option'] for row in plan['rows']} <= written.given and plan['seconds'] > 0 and plan['memory'] > 2**20
    assert (written.arch, written.epochs, written.size, written.bs) == tuple(run.config['options'][k] for k in ('arch', 'epochs', 'size', 'bs'))
    assert run.options == replace(written, out=str(tmp_path/'run'))


def test_the_early_layers_of_pretrained_weights_stay_unless_that_or_the_epochs_are_given(faces, run, tmp_path):
    options = dict(weights=str(run.path), model_args=run.options.model_args, size=32, preset='quick', budget='1s', tta='none', no_onnx=True,
                   freeze_epochs=0, lr='0.005')
    found = fit(faces, out=str(tmp_path/'planned'), **options)
    before, after = (load_file(r.path/'model'/'model.safetensors') for r in (run, found))
    changed = {k.split('.')[0] for k in before if 'num_batches' not in k and not torch.equal(before[k], after[k])}
    assert found.config['options']['freeze'] == 'layer2' and changed == {'layer2', 'layer3', 'layer4', 'fc'}
    assert 'freeze' in [row['option'] for row in read_json(found.path/'training_plan.json')['rows']]
    for given in (dict(freeze='none'), dict(epochs=1), dict(recipe='resnet18')):
        config = FitConfig(**{k: v for k, v in options.items() if k != 'freeze_epochs'} | given)
        assert plan_freeze(config, run.model.net, PRETRAINED).freeze == 'none'


@pytest.mark.parametrize('arch', ['vit_small_patch8_224', 'twins_svt_small', 'mvitv2_tiny', 'coat_tiny', 'levit_128', 'vgg11_bn'])
def test_networks_that_are_not_divided_into_stages_have_no_early_layers(arch):
    with torch.device('meta'): assert early_layers_end(timm.create_model(arch)) is None


def test_what_was_given_is_written_also_where_it_is_the_default(faces, run, tmp_path):
    options = dict(weights=str(run.path), model_args=run.options.model_args, size=32, freeze='none', tta='none', no_onnx=True, freeze_epochs=0, lr='0.005')
    found = fit(faces, out=str(tmp_path/'run'), preset='quick', budget='1s', **options)
    assert '--freeze none' in found.config['command'] and FitConfig.from_file(found.path/'options.toml').given >= {'freeze', 'epochs', 'size'}


LIMITED = '''
import json, resource, sys
import torch, fastsmile.runs.fit
from fastsmile.core.system import _memory_pages
from fastsmile.runs.fit import fit
resource.setrlimit(resource.RLIMIT_AS, (_memory_pages(0) + int(sys.argv[3]) * 2**20,) * 2)
run = fit(sys.argv[1], arch='resnet10t', weights='none', model_args='{"channels": [8, 16, 32, 64]}', size=224, epochs=1, bs=64, tta='none',
          device='cpu', workers=0, cache='none', precision='fp32', no_onnx=True, out=sys.argv[2])
print(json.dumps(dict(parts=run.config['training']['micro_batches'], loss=float(run.history.train_loss.iloc[-1]))))
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='address space is limited and counted on Linux')
def test_training_stays_below_a_limit_on_memory(tmp_path):
    "64 pictures of 224 px keep 1 GB for the backward pass; with 1.9 GB of addresses beside the imported libraries, for threads and heaps too, they go in parts"
    source = folder(tmp_path/'s', {f'{c}/{i}.png': picture(c, seed=i) for c in ('red', 'blue') for i in range(50)})
    r = run_python(['-c', LIMITED, source, tmp_path/'run', '1900'], timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    result = json.loads(r.stdout.splitlines()[-1])
    assert result['parts'] > 1 and result['loss'] < 5


def test_the_best_preset_averages_three_trainings(faces, tiny, tmp_path):
    options = {k: v for k, v in tiny.as_dict().items() if k in ('arch', 'weights', 'model_args', 'size', 'bs', 'lr', 'precision')}
    run = fit(faces, preset='best', epochs=1, tta='none', no_onnx=True, out=str(tmp_path/'run'), **options)
    assert not list(run.path.rglob('model.onnx'))
    fits = sorted(p.name for p in (run.path/'fits').iterdir())
    assert fits == ['mean', 'weighted-seed42', 'weighted-seed43', 'weighted-seed44'] and len(run.comparison) == 3
    assert run.model.spec.arch == 'ensemble' and run.config['compared']['options']['seeds'] == 3
    test = pd.read_csv(run.path/'predictions_test.csv')
    again = run.predict(faces, precision='fp32', request=RowOptions(uncalibrated=True)).set_index('path').loc[test.path].reset_index()
    columns = [c for c in test if c.startswith('p_')]
    assert abs(again[columns].astype(float).to_numpy() - test[columns].to_numpy()).max() < 1e-4
    assert 'the mean of theirs' in run.report.read_text()
    assert fit(faces, replace(tiny, seeds=2, epochs=1, tta='none', out=str(tmp_path/'two'))).model.spec.arch == 'resnet10t'
