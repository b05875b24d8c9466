"Every option of a training does what it says: drawn counts, losses, priors, frozen layers, groups, schedules, comparisons."
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import TINY
from fastai.callback.core import Callback
from safetensors.torch import load_file

from fastsmile.metrics.calibration import class_prior, loss_link, prior_shift, probabilities_from_logits
from fastsmile.training.balance import class_weights, plan_balance
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.config.fields import INCOMPATIBLE_OPTIONS
from fastsmile.metrics.calibration import CalibrationSettings, fit_calibration, fit_temperature
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.metrics.scores import confusion_matrix, label_scores
from fastsmile.models.heads import classifier_head
from fastsmile.training.loaders import augmentation_transforms
from fastsmile.training.losses import SoftF1, make_loss
from fastsmile.models.factory import build_network, make_spec
from fastsmile.metrics.predictions import read_saved_predictions
from fastsmile.runs.predict import predict
from fastsmile.runs.ensemble import ensemble
from fastsmile.config.commands import (
    CalibrateConfig, EnsembleConfig, EvaluateConfig, PredictConfig, ReportConfig, ServeConfig,
)
from fastsmile.config.fields import command_line
from fastsmile.config.fit import FitConfig
from fastsmile.runs.calibrate import calibrate
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.report import report
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.training.learner import build_learner, spec_from_config, train_learner
from fastsmile.metrics.comparison import write_comparison
from fastsmile.runs.variants import Variant, variant_row
from fastsmile.cli.tables import fit_output
from fastsmile.data.splits import read_training_fingerprints
from fastsmile.training.learner import find_lr


def learner(data, config, path):
    spec = spec_from_config(config, data.classes)
    torch.manual_seed(0)
    return build_learner(data, spec, build_network(spec, config.weights, config.init), config, path, 'cpu')


def trained(data, config, path):
    learn, facts = learner(data, config, path)
    train_learner(learn, config, path)
    return learn, pd.DataFrame(learn.history.rows), facts


def counts(data, split='train'):
    rows = data.rows[data.rows.split == split]
    return np.bincount(rows.label.map(data.classes.index), minlength=len(data.classes))


# Imbalance

@pytest.mark.parametrize('way,expected', [
    ('none', lambda n: n), ('weighted', lambda n: np.full(3, n.sum() // 3)), ('oversample', lambda n: np.full(3, n.max())),
    ('undersample', lambda n: np.full(3, n.min())), ('both:40', lambda n: np.full(3, 40)), ('augment:30', lambda n: np.maximum(n, 30)),
    ('class-weight', lambda n: n), ('logit-adjust', lambda n: n), ('oversample+class-weight', lambda n: np.full(3, n.max()))])
def test_what_is_asked_is_drawn(data, tiny, tmp_path, way, expected):
    dls = learner(data, replace(tiny, balance=way, bs=4), tmp_path)[0].dls
    for dl in (dls.train, dls.train.new()):  # a copy draws alike
        drawn = np.bincount(torch.cat([y for _, y in dl]), minlength=3)
        off = np.abs(drawn - expected(counts(data)))
        assert off.max() <= 4 and off.sum() <= 6  # at most a part of a batch and what rounding leaves
    assert dls.test_dl(data.rows[:5]).draw is None
    assert np.bincount(torch.cat([y for _, y in dls.valid]), minlength=3).tolist() == counts(data, 'valid').tolist()


def test_workers_draw_alike(data, tiny, tmp_path):
    none, two = (learner(data, replace(tiny, balance='undersample', bs=4, workers=w, augment='none'), tmp_path)[0].dls.train for w in (0, 2))
    assert torch.cat([y for _, y in none]).tolist() == torch.cat([y for _, y in two]).tolist()


def test_the_run_records_what_was_drawn(run, tiny):
    b = json.loads((run.path/'balance.json').read_text())
    assert len(b['drawn']) == len(run.history) and sum(b['planned'].values()) == sum(b['rows'].values())
    for d in b['drawn']:
        assert all(0 <= b['planned'][c] - d[c] < tiny.bs for c in b['planned'])
        assert d == dict(epoch=d['epoch'], **{c: int(run.history[f'drawn_{c}'][d['epoch'] - 1]) for c in b['planned']})
    page = run.report.read_text()
    assert 'planned per epoch' in page and 'Parameters by stage' in page and 'data:image/jpeg;base64' in page and len(page) < 400_000


@pytest.mark.parametrize('way', ['class-weight', 'class-weight:effective'])
def test_weights_are_those_of_training_rows_and_leave_validation_alone(data, tiny, tmp_path, way):
    learn, h, facts = trained(data, replace(tiny, balance=way, epochs=1), tmp_path)
    w = class_weights(counts(data), way.partition(':')[2] or 'inverse')
    assert np.allclose(learn.loss_func.weights, w) and w.max() > 1.5 * w.min()
    learn.remove_cbs([learn.history, learn.checkpoint_saver])
    z, y = (t.numpy() for t in learn.get_preds(ds_idx=1, act=lambda t: t))
    p = probabilities_from_logits(z, np.array(facts.shift))
    assert abs(-np.log(p[np.arange(len(y)), y]).mean() - h.valid_loss.iloc[-1]) < 1e-4


@pytest.mark.parametrize('change', [
    dict(loss='label-smoothing:0.3'), dict(loss='focal:2'), dict(loss='soft-f1'), dict(loss='bce'), dict(balance='none'), dict(balance='class-weight'),
    dict(balance='class-weight:effective'), dict(balance='logit-adjust'), dict(balance='weighted+class-weight'), dict(augment='medium+cutout:1'),
    dict(augment='medium+mixup'), dict(augment='medium+cutmix'), dict(head='mlp:16'), dict(dropout=0.5), dict(pool='catavgmax'), dict(init='kaiming'),
    dict(init='xavier'), dict(freeze='layer2'), dict(freeze='head'), dict(schedule='flat-cosine'), dict(schedule='plateau'), dict(accumulate=2),
    dict(clip=1e-3), dict(spread=100.), dict(train_seed=7)], ids=lambda c: '-'.join(f'{k}={v}' for k, v in c.items()))
def test_options_that_change_training(data, tiny, tmp_path, change, plain_losses):
    _, h, _ = trained(data, replace(tiny, epochs=1, **change), tmp_path)
    assert h.train_loss.tolist() != plain_losses and np.isfinite(h.train_loss).all()
    assert h.filter(like='train_').shape[1] == h.filter(like='valid_').shape[1] == 4


@pytest.fixture(scope='module')
def plain_losses(data, tiny, tmp_path_factory):
    return trained(data, replace(tiny, epochs=1), tmp_path_factory.mktemp('plain'))[1].train_loss.tolist()


@pytest.mark.parametrize('way,loss', [('weighted', 'ce'), ('class-weight', 'ce'), ('logit-adjust', 'ce'), ('oversample+class-weight', 'ce'),
                                      ('weighted', 'bce'), ('class-weight:effective', 'focal')])
def test_calibration_with_and_without_the_way_back(way, loss):
    def rows(n, seed):
        rng = np.random.default_rng(seed)
        y = (rng.random(n) < 0.15).astype(int)
        return torch.tensor(rng.normal(2. * y, 1), dtype=torch.float32)[:, None], y
    (x, y), (fresh, target) = rows(4000, 1), rows(20000, 2)
    plan, value = plan_balance(y, 2, way, 0), 2.0 if loss == 'focal' else None
    at = np.concatenate([plan.sampler.rows_of_epoch(e) for e in range(3)])
    net, crit = torch.nn.Linear(1, 2), make_loss(loss, value, plan)
    opt = torch.optim.LBFGS(net.parameters(), max_iter=50, line_search_fn='strong_wolfe')
    def step():
        opt.zero_grad()
        v = crit(net(x[at]), torch.from_numpy(y[at]))
        v.backward()
        return v
    opt.step(step)
    with torch.no_grad(): z = net(fresh).numpy()
    def error(p):
        cell = (p[:, 1] * 10).astype(int).clip(0, 9)
        return sum(abs((p[:, 1] - target)[cell == b].sum()) for b in range(10)) / len(p)
    shift = prior_shift(class_prior(y, 2), plan.implied_prior)
    raw = error(probabilities_from_logits(z, np.zeros(2)))
    honest = error(probabilities_from_logits(z, shift, loss_link(loss, value)))
    assert raw > 0.05 and honest < 0.02


def test_the_prior_that_is_asked_for(data, tiny, tmp_path):
    share = tmp_path/'prior.json'
    share.write_text(json.dumps(dict(zip(data.classes, (0.2, 0.2, 0.6)))))
    made = {p: learner(data, replace(tiny, prior=p, decide='balanced'), tmp_path) for p in ('data', 'uniform', str(share))}
    facts = {k: f for k, (_, f) in made.items()}
    z = np.random.default_rng(0).normal(size=(5, 3))
    p = {k: probabilities_from_logits(z, np.array(f.shift), f.link) for k, f in facts.items()}
    def moved(p, by): return p * by / (p * by).sum(1, keepdims=True)
    assert np.allclose(moved(p['uniform'], facts['data'].prior), p['data']) and np.allclose(moved(p['uniform'], [.2, .2, .6]), p[str(share)])
    labels = {tuple((np.log(p[k]) + facts[k].offset).argmax(1)) for k in p}
    assert len(labels) == 1  # the balanced decision is the same under each prior
    judged = [m.history.validation_metrics(z, np.arange(5) % 3) for m, _ in made.values()]
    assert all(np.isclose(j['loss'], judged[0]['loss']) and j['macro_f1'] == judged[0]['macro_f1'] for j in judged)  # validation rows have the data's shares
    with pytest.raises(OptionError, match='uniform'): learner(data, replace(tiny, prior='even'), tmp_path)


def test_each_refusal_is_reached():
    base = dict(augment='medium', balance='weighted', loss='ce')
    asked = [dict(balance='oversample+undersample'), dict(balance='class-weight+logit-adjust'), dict(balance='augment:9', augment='none'),
             dict(augment='light+strong'), dict(augment='mixup+cutmix'), dict(loss='soft-f1', augment='light+mixup'),
             dict(loss='soft-f1', balance='class-weight'),
             dict(loss='label-smoothing', balance='logit-adjust'), dict(loss='focal', balance='logit-adjust'), dict(loss='bce', balance='logit-adjust'),
             dict(freeze='head', freeze_epochs=2),
             dict(freeze='head', spread=5), dict(views='2'), dict(freeze='head', augment='light+mixup'), dict(freeze='head', balance='augment:9'),
             dict(freeze='head', augment='none', views='2'), dict(freeze='head', compile=True),
             dict(refit_all=True, schedule='plateau'), dict(balance='all', lr_sweep='1e-3,1e-2'),
             dict(lr='1e-3', lr_sweep='1e-3,1e-2'), dict(balance='all', patience=2), dict(folds=3, seeds=2), dict(folds=3, test=0.3)]
    assert len(asked) == len(INCOMPATIBLE_OPTIONS)
    for change, rule in zip(asked, INCOMPATIBLE_OPTIONS):
        with pytest.raises(OptionError) as e: FitConfig(**base | change)
        assert rule.options in e.value.message and e.value.hint == rule.reason


@pytest.mark.parametrize('change', [dict(balance='both'), dict(balance='both:0'), dict(balance='weighted:3'), dict(loss='focal:-1'), dict(loss='mse'),
                                    dict(augment='upside-down'), dict(augment='medium+medium'), dict(schedule='cosine'), dict(head='mlp:'), dict(head='mlp:0'),
                                    dict(pool='max'), dict(init='zeros'), dict(lr_sweep='1e-3'), dict(lr_sweep='a,b'), dict(ema=1.0), dict(accumulate=0)])
def test_values_that_are_not_accepted(change):
    with pytest.raises(OptionError, match='Accepted'): FitConfig(**change)


def test_soft_f1_remembers_a_class_that_the_batch_lacks():
    loss, z = SoftF1(3), torch.randn(8, 3, requires_grad=True)
    loss(z, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]))
    before = loss.sums[2, 2].item()
    loss(z, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert before == 2 and 0 < loss.sums[2, 2] < 2
    with torch.no_grad(): loss(z, torch.zeros(8, dtype=torch.long))
    assert loss.sums[2, 0] < 8  # validation counts nothing
    loss.reset()
    assert not loss.sums.any()


def test_no_augmentation_turns_a_face_upside_down():
    ramp = torch.linspace(0, 1, 32).view(1, 1, 32, 1).expand(64, 3, 32, 32).clone()
    from fastai.vision.core import TensorImage
    for strength in ('light', 'medium', 'strong'):
        x = TensorImage(ramp.clone())
        for t in augmentation_transforms(strength): x = t(x, split_idx=0)
        assert (x[:, 0, -8:].mean((1, 2)) > x[:, 0, :8].mean((1, 2))).all()


# Networks

@pytest.mark.parametrize('name,classes,size,n', [('smilecnn_b1', 1, 56, 1_723_009), ('smilecnn_b2', 1, 56, 1_985_665), ('smilecnn_1conv', 8, 48, 136_328),
                                                 ('smilecnn_3conv', 8, 48, 109_640)])
def test_the_reports_networks(name, classes, size, n):
    spec = make_spec(name, range(classes))
    net = build_network(spec).eval()
    assert spec.prep.size == size and sum(p.numel() for p in net.parameters()) == n
    other = build_network(make_spec(name, range(classes), size=64)).eval()
    assert other(torch.zeros(2, 3, 64, 64)).shape == (2, classes)


def test_the_face_property_reports_head():
    with torch.device('meta'): net = build_network(make_spec('resnet50', ['male'], head='mlp:512,512'))
    assert sum(p.numel() for p in classifier_head(net).parameters()) == 1_312_257


@pytest.mark.parametrize('arch', ['densenet121', 'mobilenetv3_small_050', 'convnext_atto', 'vit_tiny_patch16_224', 'smilecnn_b2'])
def test_a_head_of_hidden_layers_on_any_architecture(arch, tmp_path):
    spec = make_spec(arch, ['a', 'b'], size=64, head='mlp:8', dropout=0.5)
    net = build_network(spec).eval()
    assert [m.p for m in classifier_head(net) if isinstance(m, torch.nn.Dropout)] == [0.5, 0.5]
    model = Model(spec, ModelMetadata([.7, .3], [.1, -.1], [0., 0.], 'argmax', link='focal:2.0'), net)
    save_bundle(model, tmp_path/'m')
    again, x = load_bundle(tmp_path/'m'), torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert again.net(x).equal(net(x)) and again.spec == spec and again.metadata == model.metadata


def test_an_own_network_is_read_by_timm_once_fastsmile_is_imported(tmp_path):
    spec = make_spec('smilecnn_b1', ['a', 'b'], size=40)
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), build_network(spec).eval()), tmp_path/'m')
    net, x = timm.create_model(f'local-dir:{tmp_path}/m', pretrained=True).eval(), torch.randn(2, 3, 40, 40)
    with torch.no_grad(): assert net(x).equal(load_bundle(tmp_path/'m').net(x))


@pytest.mark.parametrize('freeze,first', [('layer3', 'layer3.0.conv1.weight'), ('layer4.0.conv2', 'layer4.0.conv2.weight'), ('head', 'fc.weight')])
def test_what_is_frozen_stays_in_every_phase(data, tiny, tmp_path, freeze, first):
    learn, _ = learner(data, replace(tiny, freeze=freeze), tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    train_learner(learn, replace(tiny, freeze=freeze, epochs=1, freeze_epochs=None if freeze == 'head' else 1), tmp_path)
    after, names = load_file(tmp_path/'checkpoints'/'last.safetensors'), [n for n, _ in learn.model.named_parameters()]
    frozen = names[:names.index(first)]
    modules = {n.rpartition('.')[0] for n in frozen}
    assert all(after[k].equal(v) for k, v in before.items() if k in frozen or k.rpartition('.')[0] in modules - {first.rpartition('.')[0]})
    assert any('running_mean' in k and k.rpartition('.')[0] in modules for k in before)  # statistics among them
    assert not after[first].equal(before[first]) and all(p.grad is None for n, p in learn.model.named_parameters() if n in frozen)


def test_an_unknown_module_is_refused_with_names_near_it(faces, tiny):
    with pytest.raises(OptionError, match='layer4'): fit(faces, replace(tiny, freeze='layer9'))


def test_groups_have_rates_of_their_own(data, tiny, tmp_path):
    learn, _, _ = trained(data, replace(tiny, groups=5, spread=16., epochs=1, schedule='flat-cosine'), tmp_path)
    learn.create_opt()
    learn.opt.set_hyper('lr', slice(1 / 16, 1.))
    assert len(learn.opt.param_lists) == 5 and np.allclose([h['lr'] for h in learn.opt.hypers], [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])


def test_weights_of_an_earlier_run(run, tiny, tmp_path):
    old = run.model.net.state_dict()
    args = dict(size=32, model_args=TINY)
    same, other, deep = (build_network(make_spec('resnet10t', c, head=h, **args), str(run.path)).state_dict()
                         for c, h in ((run.model.spec.classes, 'linear'), (('a', 'b'), 'linear'), (run.model.spec.classes, 'mlp:8')))
    assert all(v.equal(old[k]) for k, v in same.items())
    for new in (other, deep): assert all(v.equal(old[k]) for k, v in new.items() if not k.startswith('fc.'))
    assert other['fc.weight'].shape[0] == 2 and 'fc.1.weight' in deep
    with pytest.raises(SmileError, match='Add --arch resnet10t'): build_network(make_spec('resnet18', ['a', 'b']), str(run.path))
    with pytest.raises(SmileError, match='do not fit'): build_network(make_spec('resnet10t', ['a', 'b']), str(run.path))
    with pytest.raises(SmileError, match='holds no model'): build_network(make_spec('resnet18', ['a', 'b']), str(tmp_path))


def test_weights_of_a_vision_transformer_reach_another_size(tmp_path):
    spec = make_spec('vit_tiny_patch16_224', ['a', 'b'], size=64)
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), build_network(spec).eval()), tmp_path/'m')
    net = build_network(make_spec('vit_tiny_patch16_224', ['a', 'b', 'c'], size=96), str(tmp_path/'m')).eval()
    assert net.pos_embed.shape[1] == 37 and net(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    assert net.blocks[0].mlp.fc1.weight.equal(load_bundle(tmp_path/'m').net.blocks[0].mlp.fc1.weight)


# Schedules

def test_patience_ends_early_and_says_so(data, tiny, tmp_path):
    learn, _ = learner(data, replace(tiny, patience=2), tmp_path)
    said = []
    learn.history.print_line = said.append
    train_learner(learn, replace(tiny, lr='1e-9', patience=2, epochs=30, monitor='accuracy'), tmp_path)
    assert 3 <= len(learn.history.rows) < 20 and 'No improvement for 2 epochs' in said[-2] and said[-1].startswith('best: epoch')


def test_the_average_is_what_is_measured_and_kept(data, tiny, tmp_path):
    learn, h, _ = trained(data, replace(tiny, ema=0.9), tmp_path)
    plain = trained(data, tiny, tmp_path)[1]
    assert h.train_loss.tolist() == plain.train_loss.tolist() and h.valid_loss.tolist() != plain.valid_loss.tolist()
    kept = learn.model.state_dict()
    if learn.checkpoint_saver.best_epoch == len(h): assert kept['fc.weight'].allclose(learn.weight_ema.average['fc.weight'])


def test_more_accumulation_than_batches_is_refused(data, tiny, tmp_path):
    with pytest.raises(OptionError, match='batches of an epoch'): trained(data, replace(tiny, accumulate=100), tmp_path)


def test_refit_trains_on_train_and_valid(faces, tiny, tmp_path, run, no_charts):
    r = fit(faces, replace(tiny, refit_all=True, freeze_epochs=1, epochs=1, tta='none', out=str(tmp_path/'r')))
    table = pd.read_csv(r.path/'table.csv', dtype=str, keep_default_na=False)
    n = table[table.reason == ''].split.value_counts()
    assert r.config['training']['refit'] == dict(rows=n['train'] + n['valid'], epochs=2)
    assert r.history.phase.tolist() == ['head', 'all'] * 2 and r.history.valid_loss.isna().tolist() == [False] * 2 + [True] * 2
    drawn = r.history.filter(like='drawn_').sum(axis=1)
    assert drawn.iloc[-1] > drawn.iloc[0] and 'trained again' in r.report.read_text()
    assert not r.model.net.state_dict()['fc.weight'].equal(load_file(r.path/'checkpoints'/'best.safetensors')['fc.weight'])
    assert set(r.metrics) == {'monitor', 'valid', 'test', 'calibration'}
    assert set(read_training_fingerprints(r.path).split) == {'train', 'calib'}  # nothing that is made of it is chosen on what was valid
    both = ensemble([run.path, r.path], EnsembleConfig(tta='none', out=str(tmp_path/'both')))
    assert 'valid' not in both.metrics and 'test' in both.metrics
    with pytest.raises(SmileError, match='Take --how mean'): ensemble([run.path, r.path], EnsembleConfig(how='forest', out=str(tmp_path/'forest')))


def test_a_search_that_diverges_falls_back_and_leaves_no_trace(data, tiny, tmp_path):
    learn, _ = learner(data, replace(tiny, augment='none'), tmp_path)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}

    class Diverge(Callback):
        order = -20  # before anything looks at the loss
        def after_loss(self):
            if self.training and self.train_iter >= 3: self.learn.loss_grad = self.learn.loss = self.loss * float('nan')
    learn.add_cb(Diverge())
    rate = find_lr(learn, 50)
    assert rate.lr == 1e-3 and 'fell back' in rate.message and all(v.equal(before[k]) for k, v in learn.model.state_dict().items())
    learn.lr_find(num_it=20, show_plot=False, suggest_funcs=())  # fastai's own: no error either, and the weights are back
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())
    with pytest.raises(SmileError, match='lower --lr'): learn.fit(1, 1e-3)


def test_what_fastai_offers_works_on_a_runs_learner(run):
    import matplotlib
    matplotlib.use('Agg')
    files = {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()}
    learn, kept = run.learner(), load_file(run.path/'checkpoints'/'best.safetensors')
    assert all(v.cpu().equal(kept[k]) for k, v in learn.model.state_dict().items())
    learn.show_results(max_n=4)
    with learn.no_logging():
        found = learn.lr_find(num_it=40, show_plot=False)
        learn.fine_tune(1, 1e-3)
    assert 1e-7 < found.valley < 10 and len(learn.recorder.values) == 1
    assert not all(v.cpu().equal(kept[k]) for k, v in learn.model.state_dict().items())
    assert {p: p.read_bytes() for p in run.path.rglob('*') if p.is_file()} == files  # the run stays as it was


@pytest.mark.parametrize('terminal,term', [('1', 'xterm'), ('0', 'xterm'), ('1', 'dumb')])
def test_a_display_on_a_terminal_that_moves_and_lines_elsewhere(data, tiny, tmp_path, monkeypatch, capsys, terminal, term):
    monkeypatch.delenv('FASTSMILE_QUIET')
    monkeypatch.setenv('TTY_COMPATIBLE', terminal)
    monkeypatch.setenv('TERM', term)
    trained(data, replace(tiny, epochs=1), tmp_path)
    said = capsys.readouterr().err
    assert said.count('epoch  phase  loss train/valid') == 1 and re.search(r' 1  all .* \*', said)
    assert 'best: epoch 1 (the last *)' in said and '    fc ' not in said
    assert ('images/s' in said) == ('\x1b[' in said) == ((terminal, term) == ('1', 'xterm'))


# Probabilities, decisions, words

def test_temperature_and_rules_are_fitted_for_the_prior_that_is_asked_for():
    def rows(n, share, seed):
        "Two classes, a network that is too sure and leans to one; its probabilities speak for equal shares"
        rng = np.random.default_rng(seed)
        y = (rng.random(n) < share).astype(int)
        z = 2.5 * 2 * rng.normal(1.4 * y - 0.7, 1) * 0.7 + 1.5
        return y, 1 / (1 + np.exp(np.stack([z, -z], 1)))
    (y, p), (fresh, q) = rows(4000, 0.1, 1), rows(20000, 0.5, 2)
    w = np.array([0.5 / 0.9, 0.5 / 0.1])[y]
    plain, fair = (fit_calibration(p, y, [.5, .5], CalibrationSettings('macro_f1'), weights=v) for v in (None, w / w.mean()))
    def loss(c): return -np.log(c.apply(q)[1][np.arange(len(fresh)), fresh]).mean()
    def f1(c): return label_scores(confusion_matrix(fresh, c.apply(q)[0], 2))['macro_f1']
    def covered(c):
        label, p = c.apply(q)
        return (p[np.arange(len(p)), label] >= c.min_confidence).mean()
    assert loss(fair) < loss(plain) - 0.005 and f1(fair) > f1(plain) + 0.02
    assert abs(covered(fair) - 0.9) < 0.02 < abs(covered(plain) - 0.9)


def test_a_run_under_another_prior_is_fitted_and_measured_under_it(faces, tiny, tmp_path, no_charts):
    r = fit(faces, replace(tiny, prior='uniform', decide='balanced', tta='none', calib=0.3, out=str(tmp_path/'r')))
    calib, test = (read_saved_predictions(r.path, k) for k in ('calib', 'test'))
    share = np.array(list(json.loads((r.path/'balance.json').read_text())['rows'].values()), dtype=float)
    assert np.allclose(calib.class_row_weights, share.sum() / share / 3) and np.isclose(calib.weights.mean(), 1)
    own = r.model.metadata.calibration
    assert np.isclose(own.temperature, fit_temperature(calib.probs, calib.y, calib.weights))
    assert not np.isclose(own.temperature, fit_temperature(calib.probs, calib.y))
    lost = -np.log(test.probs[np.arange(len(test.y)), test.y])
    assert np.isclose(r.metrics['test']['log_loss']['value'], np.average(lost, weights=test.weights))
    assert not np.isclose(r.metrics['test']['log_loss']['value'], lost.mean())
    again = calibrate(r.path, CalibrateConfig(decide='balanced'))
    assert again['calibration']['temperature'] == own.temperature and again['test']['log_loss'] == r.metrics['test']['log_loss']
    # one rule in fit, evaluate and predict, and by name in the report
    saved = pd.read_csv(r.path/'predictions_test.csv')
    assert r.predict(faces, precision='fp32').set_index('path').label[saved.path].tolist() == saved.label.tolist()
    assert evaluate(r.path)['metrics']['accuracy'] == r.metrics['test']['accuracy'] and own.rule == 'balanced'
    assert 'wins where all classes are equally common' in r.report.read_text() and 'equal shares of all classes' in r.report.read_text()


def test_a_run_without_prior_weighs_no_row(run): assert read_saved_predictions(run.path, 'calib').class_row_weights == ()


@pytest.mark.parametrize('collapsed', [True, False])
def test_a_collapse_is_said_loudly_by_fit_report_and_predict(run, faces, tmp_path, monkeypatch, capsys, collapsed):
    copy = shutil.copytree(run.path, tmp_path/'r')
    for part in ('valid', 'test', 'test_tta'):
        rows = pd.read_csv(copy/f'predictions_{part}.csv', keep_default_na=False)
        for c in run.model.spec.classes: rows[f'p_{c}'] = np.where((c == run.model.spec.classes[0]) if collapsed else (rows.target == c), 0.98, 0.01)
        rows.to_csv(copy/f'predictions_{part}.csv', index=False)
    report(copy, ReportConfig(keep_pictures=True))
    shown, result = fit_output(load_run(copy))
    said = next(s for s in shown if 'This model' in str(s))
    assert said.style == ('bold red' if collapsed else '') and result['verdict'] == str(said) and 'where answering' in result['verdict']
    assert ('has collapsed' in str(said)) == collapsed == ('class="verdict bad">This model has collapsed' in (copy/'report.html').read_text())
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    predict(faces/'happy_images', model=str(copy), out=str(tmp_path/'p.csv'), device='cpu')
    assert ('This model has collapsed' in capsys.readouterr().err) == collapsed


# Comparisons

def test_a_comparison_by_loss(run, tiny, tmp_path):
    row = variant_row(Variant('a', tiny), run.config, run.metrics)
    assert row['valid_loss'] == run.metrics['valid']['log_loss']['value']
    worse = row | dict(variant='b', folder='b', valid_loss=row['valid_loss'] + 1)
    assert write_comparison(tmp_path, [worse, row], 'loss') == row['folder']


def test_a_sweep_of_rates_with_seeds(faces, tiny, tmp_path, no_charts):
    r = fit(faces, replace(tiny, lr='auto', lr_sweep='1e-5,5e-3', seeds=2, decide='balanced', epochs=1, tta='none', out=str(tmp_path/'r')))
    c = r.comparison
    assert c.variant.tolist() == ['lr 1e-05'] * 2 + ['lr 0.005'] * 2 and c.seed.tolist() == [1, 2, 1, 2]
    assert c.valid_loss.nunique() == 4 and c.epochs.tolist() == [1] * 4
    best = c.groupby('variant').valid_macro_f1.mean().idxmax()
    assert r.options.lr == best.split()[1] and r.config['compared']['best'].startswith(best)
    splits = [pd.read_csv(p/'table.csv', dtype=str).split.tolist() for p in (r.path/'fits').iterdir()]
    assert all(s == splits[0] for s in splits)  # seeds change the training, not the split
    assert '--lr-sweep' in r.config['command'] and '--seeds 2' in r.config['command']
    assert 'All trainings' in r.report.read_text() and load_run(r.path).metrics == r.metrics
    shown, result = fit_output(r)
    assert [x['variant'] for x in result['comparison']][0] == best and 'half the range of 2' in str(shown[0].title)


def test_balance_all_compares_under_one_budget(faces, tiny, tmp_path, monkeypatch, no_charts):
    import fastsmile.runs.variants as sweep
    assert sweep.all_balance_options(np.array([700, 200, 100])) == ['none', 'weighted', 'oversample', 'undersample', 'both:265', 'augment:350', 'class-weight',
                                                         'class-weight:effective', 'logit-adjust']
    for kw, out in ((dict(loss='focal'), {'logit-adjust'}), (dict(loss='bce'), {'logit-adjust'}), (dict(augment='none'), {'augment:350'}),
                    (dict(loss='soft-f1'), {'class-weight', 'class-weight:effective', 'logit-adjust'}), ({}, set())):
        told = sweep.make_variants(replace(tiny, balance='all', **kw), np.repeat([0, 1, 2], [700, 200, 100]), 3)
        assert set(sweep.all_balance_options(np.array([700, 200, 100]))) - {v.name for v in told} == out
    monkeypatch.setattr(sweep, 'all_balance_options', lambda have: ['none', 'undersample'])
    r = fit(faces, replace(tiny, balance='all', tta='none', out=str(tmp_path/'r')))
    c, drawn = r.comparison, {}
    for folder in c.folder:
        h = pd.read_csv(r.path/'fits'/folder/'history.csv')
        drawn[folder] = int(h.filter(like='drawn_').sum().sum())
    assert c.variant.tolist() == ['none', 'undersample'] and c.epochs[1] > c.epochs[0] == tiny.epochs
    a, b = drawn.values()
    assert 0.6 < a / b < 1.6


def test_a_training_that_fails_is_a_row(faces, tiny, tmp_path, monkeypatch, no_charts):
    import fastsmile.runs.fit as runs
    real = runs.train_learner
    def train(learn, config, *args):
        if config.lr == '1': raise SmileError('The loss is not a number any more.')
        return real(learn, config, *args)
    monkeypatch.setattr(runs, 'train_learner', train)
    r = fit(faces, replace(tiny, lr='auto', lr_sweep='1,5e-3', epochs=1, tta='none', out=str(tmp_path/'r')))
    assert 'not a number' in r.comparison.error[0] and r.options.lr == '0.005' and ', 1 failed' in r.report.read_text()


def test_the_command_writes_a_flag_as_a_flag():
    assert command_line('fit', ['x'], FitConfig(refit_all=True, balance='both:30')) == 'fastsmile fit x --refit-all --balance both:30'


@pytest.mark.parametrize('kind,alone,leader', [(PredictConfig, dict(thumbs=5), dict(html='p.html')), (PredictConfig, dict(tta_mean='logits'), dict(tta='flip')),
                         (PredictConfig, dict(face_margin=0.), dict(faces='each')), (FitConfig, dict(face_margin=.2), dict(faces='largest')),
                         (EvaluateConfig, dict(face_score=.5), dict(faces='one')), (ServeConfig, dict(face_score=.5), dict(faces='one'))])
def test_what_would_do_nothing_alone_is_refused(kind, alone, leader):
    kind(**alone, **leader)
    with pytest.raises(OptionError, match=f'without --{next(iter(leader))}'): kind(**alone)


def test_two_ways_to_withhold_labels_are_refused():
    with pytest.raises(OptionError, match='--coverage with --min-confidence'): EvaluateConfig(coverage=0.5, min_confidence=0.9)
