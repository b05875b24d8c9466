"The search: valid alone judges, what was killed goes on as if nothing had happened, the best trial is a run like any other."
import sys
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from fastsmile.runs import tune as tuning
from fastsmile.core.errors import OptionError, SmileError, WriteError
from fastsmile.data.images import UnreadableImageError
from fastsmile.config.commands import TUNE_SPACE, TuneConfig
from fastsmile.config.fields import command_line
from fastsmile.config.fit import FitConfig
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.runs.tune import run_next_trial, search_folder, search_space, trial_config, tune

optuna = pytest.importorskip('optuna')


@pytest.fixture(scope='module')
def config(tiny):
    same = {f.name: getattr(tiny, f.name) for f in fields(FitConfig)}
    return TuneConfig(**same | dict(lr='auto', bs=64, epochs=2, tta='none'), trials=4, sampler='random', space='lr,bs,balance')


@pytest.fixture(scope='module')
def searched(config, faces, tmp_path_factory):
    "A search in which nothing was killed, and what its trials have decoded"
    seen = []
    def each(search):
        run_next_trial(search)
        test = set(search.data.rows.path[search.data.rows.split == 'test'])
        seen.append(test & {n for p in search.images_by_prep.values() for n in p.index} or list((search.path/'fits').rglob('predictions*')))
    run = tune(faces, replace(config, out=str(tmp_path_factory.mktemp('tune')/'search')), each)
    return run, seen


def table(run): return pd.read_csv(run.path/'candidates.csv').drop(columns='seconds')


def test_no_trial_touches_a_test_row_and_the_best_is_measured_once(searched):
    run, seen = searched
    assert seen == [[], [], [], []]  # nothing decoded, nothing predicted
    assert len(list((run.path/'fits').rglob('predictions_test.csv'))) == 1 and 'macro_f1' in run.metrics['test']
    best = table(run).iloc[0]
    assert best.valid_macro_f1 == table(run)[table(run).state == 'complete'].valid_macro_f1.max()
    assert run.options.lr == f'{best.lr:.4g}' and run.options.bs == best.bs and run.options.balance == best.balance
    assert run.history.valid_macro_f1[run.history.valid_loss.argmin()] == pytest.approx(best.valid_macro_f1)


def test_the_best_trial_is_a_run(searched, faces):
    run, _ = searched
    assert load_run(run.path).predict(faces).error.eq('').sum() > 100 and run.learner().dls.bs <= run.options.bs
    assert run.config['command'].startswith('fastsmile tune') and run.config['compared']['options']['trials'] == 4
    page = (run.path/'report.html').read_text()
    assert 'No trial has seen a test row' in page and 'best so far' in page and (run.path/'tune_history.png').stat().st_size > 1000
    kept = {p.parent.parent.name for p in (run.path/'fits').rglob('best.safetensors')}
    assert kept == {run.config['compared']['best']}  # the weights of the others are gone


def test_ties_are_named(searched):
    "Every complete trial is a tie, or further from the best one than its interval reaches"
    run, _ = searched
    said, rows = run.config['training']['table_caption'], table(run)
    score, complete = run.metrics['valid']['macro_f1'], rows[rows.state == 'complete']
    near = (complete.valid_macro_f1[1:] - complete.valid_macro_f1[0]).abs() <= score['value'] - score['low']
    assert f"on {run.metrics['valid']['rows']} valid rows" in said
    if near.any(): assert f"{near.sum()} of the {len(near)} other trials ({', '.join(map(str, complete.trial[1:][near]))}) are ties" in said
    else: assert 'No other trial is a tie' in said


def test_a_search_that_was_killed_ends_as_if_it_had_not_been(searched, config, faces, tmp_path, monkeypatch, no_charts):
    "In the middle of the second trial, after its first epoch"
    once = replace(config, out=str(tmp_path/'search'))
    from fastsmile.training.callbacks import TrialReporter
    real = TrialReporter.after_epoch
    def killed(self):
        real(self)
        if self.report_value.__self__.number == 1 and self.reported == 1: raise KeyboardInterrupt('now')
    monkeypatch.setattr(TrialReporter, 'after_epoch', killed)
    with pytest.raises(KeyboardInterrupt): tune(faces, once)
    monkeypatch.setattr(TrialReporter, 'after_epoch', real)
    with pytest.raises(SmileError, match='fastsmile tune'): fit('.', FitConfig(resume=once.out))
    epochs = []
    monkeypatch.setattr(TrialReporter, 'after_epoch', lambda self: (epochs.append(self.report_value.__self__.number), real(self))[1])
    again = tune(faces, once)
    pd.testing.assert_frame_equal(table(again), table(searched[0]))
    assert epochs and 0 not in epochs  # the first was not trained again
    pd.testing.assert_frame_equal(again.history[['epoch', 'train_loss', 'valid_loss']], searched[0].history[['epoch', 'train_loss', 'valid_loss']])
    assert tune(faces, once).config['finished'] == again.config['finished']  # nothing left to do


def test_more_trials_are_new_ones(searched, config, faces, no_charts):
    run, _ = searched
    before = table(run)
    more = tune(faces, replace(config, trials=5, out=str(run.path)))
    after = table(more)
    assert len(after) == 5 and after.lr.nunique() == 5 and set(before.lr) < set(after.lr)
    with pytest.raises(SmileError, match='other options .epochs'): tune(faces, replace(config, epochs=3, out=str(run.path)))
    assert tune(faces, replace(config, trials=1, out=str(run.path))).config['finished'] == more.config['finished']


def test_a_trial_that_lags_is_stopped(config, faces, tmp_path):
    "At its first epoch, by a pruner that is never content; without one it is not"
    def each(search):
        if len(search.study.trials): search.study.pruner = optuna.pruners.ThresholdPruner(lower=2.)
        run_next_trial(search)
    run = tune(faces, replace(config, trials=2, out=str(tmp_path/'pruned')), each)
    t = table(run)
    assert t.state.tolist() == ['complete', 'pruned'] and t.epochs.tolist() == [2, 1] and 'stopped' in (run.path/'report.html').read_text()
    from fastsmile.runs.tune import pruner_for
    assert isinstance(pruner_for(replace(config, pruner='none')), optuna.pruners.NopPruner)
    assert isinstance(pruner_for(config), optuna.pruners.MedianPruner)


def test_a_trial_that_fails_is_a_row_and_minutes_end_the_search(config, faces, tmp_path, monkeypatch, no_charts):
    import fastsmile.runs.tune as module
    real = module.train_trial
    def fails(search, trial, told):
        if trial.number == 0: raise SmileError('The loss is not a number any more.')
        return real(search, trial, told)
    monkeypatch.setattr(module, 'train_trial', fails)
    run = tune(faces, replace(config, trials=2, monitor='loss', out=str(tmp_path/'fail')))
    assert table(run).state.tolist() == ['complete', 'fail'] and run.metrics['test']['rows'] and 'valid_loss' in table(run)
    monkeypatch.setattr(module, 'train_trial', lambda *a: (_ for _ in ()).throw(SmileError('no')))
    with pytest.raises(SmileError, match='No trial ended well'): tune(faces, replace(config, trials=9, minutes=0., out=str(tmp_path/'all')))
    assert len(pd.read_csv(tmp_path/'all'/'candidates.csv')) == 1  # no second one began


@pytest.mark.parametrize('error', [WriteError('The disk is full.'), pytest.param(UnreadableImageError('a.jpg: no such file'), marks=pytest.mark.slow)])
def test_what_is_no_fault_of_a_trial_ends_the_search_which_goes_on(config, faces, tmp_path, monkeypatch, no_charts, error):
    once = replace(config, trials=1, epochs=1, out=str(tmp_path/'search'))
    with monkeypatch.context() as m, pytest.raises(type(error), match=error.message):
        m.setattr(tuning, 'train_trial', lambda *_: (_ for _ in ()).throw(error))
        tune(faces, once)
    assert table(tune(faces, once)).state.tolist() == ['complete']


def test_the_epoch_that_ends_a_trial_early_is_told(config, faces, tmp_path, no_charts):
    run = tune(faces, replace(config, epochs=5, patience=1, lr='1e-9', space='bs', trials=1, out=str(tmp_path/'search')))
    assert 1 < len(run.history) < 5 and table(run).epochs.tolist() == [len(run.history)]


@pytest.mark.parametrize('name', TUNE_SPACE)
def test_each_word_of_the_space_varies_its_option(name):
    config = TuneConfig(space=name)
    (d,) = search_space(config, 64).values()
    values = d.choices if hasattr(d, 'choices') else (d.low, d.high)
    got = {getattr(trial_config(config, {name: v}), name) for v in values}
    assert len(got) == len(values) > 1 and trial_config(config, {}) == FitConfig()


def test_what_does_not_go_together_is_not_drawn(config, faces, tmp_path, monkeypatch):
    import fastsmile.runs.tune as module
    held = TuneConfig(freeze_epochs=2, loss='soft-f1')
    assert search_space(held, 64)['freeze'].choices == ('none',) and search_space(held, 64)['balance'].choices == ('none', 'weighted')
    drawn = []
    monkeypatch.setattr(module, 'train_trial', lambda search, trial, told: drawn.append(trial.params) or 0.5)
    monkeypatch.setattr(module, '_finish_best_trial', lambda search, command: None)
    run = tune(faces, replace(config, trials=20, space='balance,loss', out=str(tmp_path/'pairs')))
    study = optuna.load_study(study_name='fastsmile', storage=f'sqlite:///{run.path}/tune.db')
    assert len(drawn) == 20 < len(study.trials)  # the others were drawn and not begun
    assert not [p for p in drawn if p['balance'] == 'logit-adjust' and p['loss'] != 'ce'] and {p['loss'] for p in drawn} == set(module._LOSS_CHOICES)
    assert len(module.trial_table(study, 'macro_f1')) == 20


def test_a_recipe_stands_below_what_is_searched():
    made = TuneConfig(recipe='cnn-b3', trials=3)
    assert (made.arch, made.weights, made.bs, made.test) == ('smilecnn_b2', 'none', 124, 0.3) and 'lr' in made.search_space
    assert trial_config(made, dict(lr=0.01)) == FitConfig(recipe='cnn-b3', lr='0.01')
    assert command_line('tune', ['x'], made) == 'fastsmile tune x --recipe cnn-b3 --trials 3'
    with pytest.raises(OptionError, match='Accepted: densenet161-frozen'): TuneConfig(recipe='vgg')


def test_samplers(config, faces, tmp_path):
    from fastsmile.runs.tune import sampler_for
    d = search_space(config, 32)
    def draws(kind, numbers):
        out = []
        for n in numbers:
            study = optuna.create_study(sampler=sampler_for(replace(config, sampler=kind), n))
            out.append(study.ask(d).params['lr'])
        return out
    assert draws('random', [0, 1, 2]) == draws('random', [0, 1, 2]) and len(set(draws('random', [0, 1, 2]))) == 3
    assert isinstance(sampler_for(replace(config, sampler='tpe'), 0), optuna.samplers.TPESampler)


def test_importance_finds_the_option_that_matters():
    from fastsmile.runs.tune import option_importance, trial_table
    study = optuna.create_study(direction='maximize', sampler=optuna.samplers.RandomSampler(seed=0))
    d = dict(lr=optuna.distributions.FloatDistribution(0, 1), bs=optuna.distributions.FloatDistribution(0, 1))
    for i in range(30):
        t = study.ask(d)
        study.tell(t, t.params['lr'] + 0.01 * t.params['bs'])
        if i == 2: assert option_importance(study) == {}  # too few
    shares = option_importance(study)
    assert list(shares) == ['lr', 'bs'] and shares['lr'] > 0.9 and np.isclose(sum(shares.values()), 1)
    assert trial_table(study, 'macro_f1').valid_macro_f1.is_monotonic_decreasing


@pytest.mark.parametrize('change,words', [(dict(folds=3), 'folds'), (dict(seeds=2), 'seeds'), (dict(balance='all'), 'balance all'),
                                          (dict(resume='x'), 'resume'), (dict(space='lr,depth'), 'Accepted: lr'),
                                          (dict(space='lr', lr='1e-3'), 'Do one of both'), (dict(lr_sweep='1e-3,1e-2'), 'lr-sweep'),
                                          (dict(trials=0), 'out of range')])
def test_what_is_no_search_is_refused(change, words):
    with pytest.raises(OptionError, match=words): TuneConfig(**change)


def test_without_optuna_the_extra_is_named(monkeypatch, faces):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(OptionError, match=r'fastsmile\[tune\]'): tune(faces)


def test_the_same_command_finds_its_folder_again(config, faces):
    a = search_folder(faces, replace(config, out=None))
    assert a == search_folder(faces, replace(config, out=None, trials=99, minutes=3.)) != search_folder(faces, replace(config, out=None, epochs=7))
