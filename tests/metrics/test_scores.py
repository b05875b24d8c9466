"What every registered score must do; scikit-learn's values; intervals cover; a new score needs one entry and one formula."
import json

import numpy as np
import pytest
from forked import run_python
from sklearn import metrics as sk

from fastsmile.config.choices import MONITORED_METRICS, SCORES, lower_is_better, monitored_score
from fastsmile.config.fields import DECISION_RULES
from fastsmile.core.errors import OptionError
from fastsmile.metrics.calibration import Calibration, ValidationMetrics, fit_rule, resolve_decision_rule
from fastsmile.metrics.comparison import paired_test, spread_over_folds
from fastsmile.metrics.intervals import (
    bootstrap_weights, evaluate_predictions, paired_difference, percentile_intervals, score_intervals, with_intervals,
)
from fastsmile.metrics.scores import (
    ALL_SCORES, CALIBRATION_BINS, LABEL_FORMULAS, LABEL_SCORES, ROW_FORMULAS, SCORE_NAMES, confusion_matrix, estimate_scores,
    expected_calibration_error, label_scores,
)


def made(n=300, classes=4, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    probs = rng.dirichlet(np.ones(classes), n) * 0.6 + 0.4 * np.eye(classes)[np.where(rng.random(n) < 0.6, y, rng.integers(0, classes, n))]
    if ties: probs = np.round(probs, 1) + 0.02  # many equal scores
    return y, probs / probs.sum(1, keepdims=True)


@pytest.mark.parametrize('classes,ties', [(2, False), (2, True), (5, False), (5, True)])
@pytest.mark.parametrize('weighted', [False, True])
def test_metrics_agree_with_scikit_learn(classes, ties, weighted):
    y, p = made(classes=classes, ties=ties)
    w = np.random.default_rng(1).integers(0, 4, len(y)).astype(float) if weighted else np.ones(len(y))
    pred = p.argmax(1)
    got, each = estimate_scores(y, pred, p, w[None])
    kw = dict(sample_weight=w)
    want = dict(accuracy=sk.accuracy_score(y, pred, **kw), balanced_accuracy=sk.balanced_accuracy_score(y, pred, **kw),
                macro_f1=sk.f1_score(y, pred, average='macro', **kw), weighted_f1=sk.f1_score(y, pred, average='weighted', **kw),
                mcc=sk.matthews_corrcoef(y, pred, **kw), kappa=sk.cohen_kappa_score(y, pred, **kw), log_loss=sk.log_loss(y, p, labels=range(classes), **kw),
                auc=np.mean([sk.roc_auc_score(y == c, p[:, c], **kw) for c in range(classes)]),
                average_precision=np.mean([sk.average_precision_score(y == c, p[:, c], **kw) for c in range(classes)]),
                brier=sk.brier_score_loss(y, p, labels=range(classes), **kw) if classes > 2 else sk.brier_score_loss(y, p[:, 1], **kw))
    for k, v in want.items(): assert abs(float(got[k][0]) - v) < 1e-9, k
    prf = sk.precision_recall_fscore_support(y, pred, labels=range(classes), zero_division=0, **kw)
    for c in range(classes):
        one = (y == c).astype(int), (pred == c).astype(int)
        want = dict(precision=prf[0][c], recall=prf[1][c], f1=prf[2][c], auc=sk.roc_auc_score(one[0], p[:, c], **kw), mcc=sk.matthews_corrcoef(*one, **kw),
                    kappa=sk.cohen_kappa_score(*one, **kw), average_precision=sk.average_precision_score(one[0], p[:, c], **kw),
                    log_loss=sk.log_loss(one[0], p[:, c], **kw), brier=sk.brier_score_loss(one[0], p[:, c], **kw))
        for k, v in want.items(): assert abs(float(each[k][0, c]) - v) < 1e-9, (c, k)


def test_calibration_error_by_hand():
    y, p = made()
    sure, right = p.max(1), p.argmax(1) == y
    bins = np.minimum((np.ceil(sure * CALIBRATION_BINS) - 1).astype(int), CALIBRATION_BINS - 1)
    by_hand = sum(abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert abs(expected_calibration_error(sure, right, np.ones((1, len(y))))[0] - by_hand) < 1e-12


def test_intervals_cover_at_their_rate():
    "People with 1 to 5 pictures each, right together or wrong together: the bootstrap by person covers, the one by row does not"
    rng, truth, trials, people = np.random.default_rng(0), 0.8, 500, 120
    hit = dict(person=0, row=0)
    for i in range(trials):
        person = np.repeat(np.arange(people), rng.integers(1, 6, people))
        right = rng.random(len(person)) < rng.beta(truth * 2, (1 - truth) * 2, people)[person]  # skill of each person; its mean is the truth
        for k, ids in dict(person=person, row=np.arange(len(person))).items():
            if k == 'row' and i % 5: continue
            low, high = percentile_intervals([dict(a=(w * right).sum(1) / w.sum(1)) for w in bootstrap_weights(ids, 300, seed=i)], ids.max() + 1)['a']
            hit[k] += low <= truth <= high
    assert 0.93 <= hit['person'] / trials <= 0.97
    assert hit['row'] / (trials / 5) < 0.92


def test_a_paired_difference_is_narrower_than_two_intervals_apart():
    y, p = made(600, 3)
    pred = p.argmax(1)
    two = np.where((pred != y) & (np.arange(len(y)) % 10 == 0), y, pred)
    d = paired_difference(y, (pred, p), (two, p))['accuracy']
    alone = score_intervals(y, pred, p).overall['accuracy']
    assert d['low'] > 0 and d['high'] - d['low'] < (alone[1] - alone[0]) / 2
    m = paired_test(y, pred, two)
    assert m['only_one'] == 0 and m['only_two'] == int((two != pred).sum()) and m['accuracy'] == 1 / 1001
    assert paired_test(y, pred, pred)['accuracy'] == 1


def test_one_class_alone_and_rows_without_a_class_do_not_fail():
    p = np.array([[.9, .1], [.8, .2]])
    m = evaluate_predictions([0, 0], [0, 0], p, ['a', 'b'])
    assert np.isnan(m['auc']['value']) and m['accuracy']['value'] == 1 and m['collapsed'] is False


def test_macro_f1_says_where_it_counts_an_absent_class_that_is_answered():
    p = np.eye(3)[[0, 1, 2, 0]]
    made = evaluate_predictions([0, 1, 1, 0], [0, 1, 2, 0], p, 'abc')
    assert made['note'].endswith("(2 of 3), and macro F1 counts 'c' as 0, because the model predicts it.")
    assert abs(made['macro_f1']['value'] - (1 + 2 / 3 + 0) / 3) < 1e-9 and abs(made['balanced_accuracy']['value'] - 0.75) < 1e-9
    assert made['per_class'][1]['recall'] == 0.5 and evaluate_predictions([0, 1], [0, 1], p[:2], 'ab')['note'] == ''


# What every registered score must do

def test_each_score_has_one_entry_and_one_formula():
    assert set(LABEL_FORMULAS) == {k for k, s in SCORES.items() if s.kind == 'labels'} and not set(LABEL_FORMULAS) & set(ROW_FORMULAS)
    assert set(LABEL_FORMULAS) | set(ROW_FORMULAS) == set(SCORES) == set(ALL_SCORES) == set(SCORE_NAMES)
    assert {s.kind for s in SCORES.values()} <= {'labels', 'ranking', 'probabilities'}
    words = [s.monitor for s in SCORES.values() if s.monitor]
    assert len(set(words)) == len(words) and set(words) == set(MONITORED_METRICS)
    assert set(DECISION_RULES) == {'auto', 'argmax', 'balanced', *LABEL_SCORES}
    with pytest.raises(OptionError, match='Accepted: accuracy'): monitored_score('')


@pytest.mark.parametrize('name', ALL_SCORES)
@pytest.mark.parametrize('classes', [2, 4])
def test_perfect_predictions_have_the_best_value_and_others_have_not(name, classes):
    y, p = made(classes=classes, ties=False)
    def value(probs): return float(estimate_scores(y, probs.argmax(1), probs, np.ones((1, len(y))), [name])[0][name][0])
    best, found, worse = (value(probs) for probs in (np.eye(classes)[y], p, np.roll(p, 1, 1)))
    assert abs(best - (0 if SCORES[name].lower_is_better else 1)) < 1e-9
    sign = -1 if SCORES[name].lower_is_better else 1
    assert sign * best > sign * found > sign * worse


@pytest.mark.parametrize('name', ALL_SCORES)
def test_a_weight_is_a_row_that_often(name):
    y, p = made(n=120)
    often = np.random.default_rng(2).integers(0, 4, len(y))
    rows = np.repeat(np.arange(len(y)), often)
    weighted, weighted_each = estimate_scores(y, p.argmax(1), p, often[None].astype(float), [name])
    repeated, repeated_each = estimate_scores(y[rows], p[rows].argmax(1), p[rows], np.ones((1, len(rows))), [name])
    assert np.allclose(weighted[name], repeated[name])
    assert set(weighted_each) == set(repeated_each) and all(np.allclose(weighted_each[k], repeated_each[k]) for k in weighted_each)


@pytest.mark.parametrize('name', ALL_SCORES)
def test_a_score_alone_is_the_score_among_all(name):
    y, p = made(classes=3)
    w = np.random.default_rng(3).random((5, len(y)))
    whole, each = estimate_scores(y, p.argmax(1), p, w)
    alone, alone_each = estimate_scores(y, p.argmax(1), p, w, [name])
    assert list(alone) == [name] and (alone[name] == whole[name]).all() and alone[name].shape == (5,)
    assert all((alone_each[k] == each[k]).all() and each[k].shape == (5, 3) for k in alone_each)


@pytest.mark.parametrize('name', ALL_SCORES)
def test_a_score_is_reported_with_an_interval_and_compared(name):
    y, p = made(classes=3)
    m = evaluate_predictions(y, p.argmax(1), p, 'abc')
    assert m[name]['low'] <= m[name]['value'] <= m[name]['high'] and m[name]['low'] < m[name]['high']
    d = paired_difference(y, (p.argmax(1), p), (y, np.eye(3)[y]), draws=100)[name]
    assert (d['high'] < 0) if SCORES[name].lower_is_better else (d['low'] > 0)
    assert spread_over_folds([m, m])[name]['std'] == 0
    if SCORES[name].kind == 'labels': assert m['baseline'][name] < m[name]['value']


@pytest.mark.parametrize('monitor', MONITORED_METRICS)
def test_a_monitored_score_is_measured_while_training_and_decided_for(monitor):
    y, p = made(classes=3)
    none = np.zeros(3)
    found, name = ValidationMetrics(none, none)(np.log(p), y), monitored_score(monitor)
    whole = estimate_scores(y, p.argmax(1), p, np.ones((1, len(y))))[0]
    assert set(found) == set(MONITORED_METRICS) and np.isclose(found[monitor], whole[name][0])
    rule = resolve_decision_rule('auto', monitor)
    assert rule in DECISION_RULES and lower_is_better(monitor) == SCORES[name].lower_is_better
    if rule in LABEL_SCORES:
        offset, note = fit_rule(p, y, np.full(3, 1 / 3), rule)
        labels = Calibration(rule, offsets={rule: offset.tolist()}).apply(p)[0]
        assert note.startswith(rule) and label_scores(confusion_matrix(y, labels, 3))[rule] >= whole[rule][0] - 0.02


def test_intervals_are_of_what_is_measured():
    x, groups = np.random.default_rng(0).normal(5, 1, 400), [str(i // 4) for i in range(400)]
    found = with_intervals(lambda w: dict(mean=w @ x / w.sum(1), twice=2 * (w @ x) / w.sum(1)), groups, 400, draws=300)
    assert np.isclose(found['mean']['value'], x.mean(), rtol=1e-12) and found['mean']['low'] < 5 < found['mean']['high']
    assert np.isclose(found['twice']['high'], 2 * found['mean']['high'])  # the same draws


NEW_SCORE = '''
import importlib.util, json, sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
spec = importlib.util.find_spec('fastsmile.config.choices')
entry = "worst_recall=Score('lowest recall', 'labels', main=True, card=True, monitor='worst_recall', always_fitted=True),"
source = Path(spec.origin).read_text().replace('SCORES = dict(', f'SCORES = dict({entry}', 1)
sys.modules[spec.name] = choices = importlib.util.module_from_spec(spec)
exec(compile(source, spec.origin, 'exec'), vars(choices))
from fastsmile.metrics.scores import LABEL_FORMULAS
LABEL_FORMULAS['worst_recall'] = lambda c: c.recall().min(-1)

import pandas as pd
from conftest import TINY
from rich.console import Console
from fastsmile.config.commands import SampleConfig
from fastsmile.config.fit import FitConfig
from fastsmile.cli.tables import evaluation_tables
from fastsmile.data.sample import sample
from fastsmile.runs.evaluate import evaluate
from fastsmile.runs.fit import fit
where = sys.argv[1]
faces = sample(f'{where}/faces', SampleConfig(n=120))
run = fit(faces, FitConfig(arch='resnet10t', weights='none', model_args=TINY, size=32, epochs=1, bs=16, lr='0.005', seed=1, seeds=2,
                           calib=0.3, tta='none', no_onnx=True, monitor='worst_recall', out=f'{where}/run'))
metrics, history, comparison = run.metrics, pd.read_csv(run.path/'history.csv'), pd.read_csv(run.path/'comparison.csv')
console = Console(width=120)
with console.capture() as capture:
    for table in evaluation_tables(evaluate(run.path)): console.print(table)
print(json.dumps(dict(history='valid_worst_recall' in history, comparison=[c for c in comparison if 'worst_recall' in c],
    rule=metrics['calibration']['rule'], known=[r['worst_recall'] for r in metrics['calibration']['rules']], test=metrics['test']['worst_recall'],
    recall=min(c['recall'] for c in metrics['test']['per_class']), abstain='worst_recall' in metrics['calibration']['abstain'],
    bundle=json.loads((run.path/'model'/'config.json').read_text())['fastsmile']['metrics']['valid'],
    pages=[(run.path/f).read_text().count('lowest recall') for f in ('report.html', 'model/README.md')],
    table='lowest recall' in capture.get())))
'''


def test_a_new_score_is_one_entry_and_one_formula(tmp_path):
    "It is monitored, decided for, given an interval and shown everywhere, and nothing else names it"
    env = dict(PATH='/usr/bin:/bin', HOME=str(tmp_path), FASTSMILE_QUIET='1')
    made = run_python(['-c', NEW_SCORE, tmp_path], env=env)
    assert made.returncode == 0, made.stderr[-3000:]
    found = json.loads(made.stdout.splitlines()[-1])
    assert found['history'] and found['rule'] == 'worst_recall' and found['abstain'] and found['table'] and all(found['pages'])
    assert {'valid_worst_recall', 'test_worst_recall', 'test_worst_recall_low', 'test_worst_recall_high'} == set(found['comparison'])
    assert found['test']['value'] == found['recall'] and found['test']['low'] <= found['test']['value'] <= found['test']['high']
    assert len(found['known']) >= 5 and 'worst_recall' in found['bundle']
