"A source that changes while it is read, and trainings that diverge: a row with an error or one clear line, never a silent gap"
import re
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fastsmile.reports.audit import audit
from fastsmile.training.callbacks import CheckpointSaver, StopOnDivergence
from fastsmile.core.errors import SmileError
from fastsmile.core.files import read_json, write_json
from fastsmile.runs.ensemble import ensemble
from fastsmile.data.images import ImageError
from fastsmile.data.images import UnreadableImageError
from fastsmile.config.commands import AuditConfig, EnsembleConfig, PredictConfig, ProbeConfig
from fastsmile.config.fit import FitConfig
from fastsmile.runs.predict import predict
from fastsmile.training.resume import StateSaver
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run
from fastsmile.data.scan import scan_images
from fastsmile.training.learner import train_learner

sys.path.insert(0, str(Path(__file__).parent))
from kills import shell  # noqa: E402

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts


def deleted(path): path.unlink()
def truncated(path): path.write_bytes(path.read_bytes()[:200])
def replaced(path): path.write_bytes(next(p for p in path.parent.iterdir() if p != path and p.stat().st_size != path.stat().st_size).read_bytes())


CHANGES = [deleted, truncated, replaced]


@pytest.fixture
def copy(faces, tmp_path): return shutil.copytree(faces, tmp_path/'faces')


def of_split(run_or_table, source, split, i=0):
    "A file of a split"
    table = pd.read_csv(run_or_table, dtype=str, keep_default_na=False)
    return source/table.path[(table.split == split) & (table.reason == '')].iloc[i]


@pytest.mark.parametrize('change', CHANGES)
def test_a_picture_of_a_probe_changes_after_the_audit(copy, tmp_path, monkeypatch, change):
    import fastsmile.runs.probe as probing
    set_up = probing.extract_probe_features
    def then(data, *a):
        change(copy/data.rows.path[data.rows.split == 'test'].iloc[0])
        return set_up(data, *a)
    monkeypatch.setattr(probing, 'extract_probe_features', then)
    config = ProbeConfig(features='pixels', size=16, probes='knn', k='5', out=str(tmp_path/'run'), tta='none')
    with pytest.raises(UnreadableImageError, match=r'\.jpg: (no such file|truncated|changed since)'): probing.probe(copy, config)


def test_pictures_that_taught_a_run_are_those_that_it_opens(copy, run, tmp_path):
    there = shutil.copytree(run.path, tmp_path/'run')
    write_json(there/'config.json', read_json(there/'config.json') | dict(source=str(copy)))
    run = load_run(there)
    path = of_split(run.path/'table.csv', copy, 'valid')
    replaced(path)
    with pytest.raises(ImageError, match='changed since'): run.data.reader.read_image(str(path.relative_to(copy)))
    both = ensemble([run.path, shutil.copytree(run.path, tmp_path/'again')], EnsembleConfig(tta='none', out=str(tmp_path/'both')))
    table = pd.read_csv(both.path/'predictions_valid.csv', dtype=str, keep_default_na=False)
    assert table.error[table.path == str(path.relative_to(copy))].tolist() == ['changed since it was audited']


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('keep', ['memory', 'none'])
def test_a_training_picture_changes_after_the_audit(copy, tiny, tmp_path, monkeypatch, change, keep):
    import fastsmile.runs.fit as runs
    looked = runs.split_audited
    def then(*a):
        data = looked(*a)
        change(copy/data.rows.path[data.rows.split == 'train'].iloc[3])
        return data
    monkeypatch.setattr(runs, 'split_audited', then)
    config = replace(tiny, cache=keep, workers=1 if keep == 'none' else 0, out=str(tmp_path/'run'))
    with pytest.raises(UnreadableImageError, match=r'\.jpg: (no such file|truncated|changed since)') as e: fit(copy, config)
    assert '\n' not in e.value.message and len(e.value.message) < 200
    assert read_json(tmp_path/'run'/'config.json')['status'] == 'failed'


def test_test_pictures_change_during_the_training(copy, tiny, tmp_path, monkeypatch, capsys):
    changed = []
    def after_epoch(self, written=StateSaver.after_epoch):
        written(self)
        if not changed:
            changed.extend(of_split(tmp_path/'run'/'table.csv', copy, 'test', i) for i in range(len(CHANGES)))
            for change, path in zip(CHANGES, changed): change(path)
    monkeypatch.setattr(StateSaver, 'after_epoch', after_epoch)
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    run = fit(copy, replace(tiny, tta='none', out=str(tmp_path/'run')))
    rows = pd.read_csv(run.path/'predictions_test.csv', keep_default_na=False).set_index('path')
    lost = rows.loc[[str(p.relative_to(copy)) for p in changed]]
    assert len(lost) == 3 and lost.error.ne('').all() and lost.label.eq('').all()
    assert run.metrics['test']['failed'] == 3 and run.metrics['test']['rows'] == len(rows) - 3
    assert 'could be read before and are not measured' in capsys.readouterr().err


def test_a_source_that_goes_away(copy, tiny, tmp_path, monkeypatch):
    "Back again, the run goes on; another in its place, it does not"
    def after_epoch(self, written=StateSaver.after_epoch):
        written(self)
        if copy.exists(): copy.rename(tmp_path/'elsewhere')
    config = replace(tiny, tta='none', out=str(tmp_path/'run'))
    with monkeypatch.context() as m:
        m.setattr(StateSaver, 'after_epoch', after_epoch)
        with pytest.raises(SmileError, match='can be predicted any more'): fit(copy, config)
    with pytest.raises(SmileError, match='does not exist'): fit('.', FitConfig(resume=str(tmp_path/'run')))
    (tmp_path/'elsewhere').rename(copy)
    assert fit('.', FitConfig(resume=str(tmp_path/'run'))).config['status'] == 'finished'


@pytest.mark.parametrize('change', CHANGES)
def test_a_picture_changes_during_predict(copy, run, tmp_path, change):
    names = sorted(p for p in (copy/'happy_images').iterdir())
    ask, late = PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv'), bs=4, workers=1), names[-3]
    def progress(total):
        seen = []
        def tick(n):
            if not seen: change(late)
            seen.append(n)
        return tick
    done = predict(copy/'happy_images', ask, progress)
    rows = pd.read_csv(ask.out, keep_default_na=False)
    assert rows.path.tolist() == [p.name for p in names] and done.rows == len(names)
    row = rows.set_index('path').loc[late.name]
    assert bool(row.error) == (change is not replaced) and (row.label == '') == bool(row.error)


def test_a_picture_goes_away_during_an_audit(copy, tmp_path, monkeypatch):
    "Between the table and the scan it is a finding; between the scan and the page it is not shown"
    import fastsmile.data.audit as data
    first, second = sorted((copy/'happy_images').iterdir())[4:6]
    def scanned(*a):
        first.unlink()
        seen = scan_images(*a)
        second.unlink()
        return seen
    monkeypatch.setattr(data, 'scan_images', scanned)
    done = audit(copy, AuditConfig(out=str(tmp_path/'a')))
    table = done.table.set_index('path')
    assert table.reason[f'happy_images/{first.name}'] == 'unreadable: no such file' and f'{first.name}' in str(done.record['findings'])
    assert done.record['rows_in'] == len(done.table) and (done.path/'audit.html').exists()


def test_a_zip_that_is_replaced(copy, run, tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        for p in sorted((copy/'happy_images').iterdir())[:30]: z.write(p, p.name)
    whole = predict(tmp_path/'a.zip', PredictConfig(model=str(run.path), out=str(tmp_path/'p.csv')))
    def progress(total):
        (tmp_path/'a.zip').write_bytes(b'PK' + bytes(1000))
        return lambda n: None
    done = predict(tmp_path/'a.zip', PredictConfig(model=str(run.path), out=str(tmp_path/'q.csv')), progress)
    assert done.rows == whole.rows == 30 and done.failed in (30, whole.failed) and all(e for _, e in done.errors)


# trainings that diverge

def learner(data, config, path):
    from fastsmile.runs.fit import new_network
    from fastsmile.training.learner import build_learner, spec_from_config
    spec = spec_from_config(config, data.classes)
    return build_learner(data, spec, new_network(spec, config), config, path, 'cpu')[0]


@pytest.fixture(scope='module')
def data(faces):
    from fastsmile.data.audit import audit_and_split
    from fastsmile.data.source import read_source
    return audit_and_split(read_source(faces), FitConfig(seed=1))


def finite(path):
    from safetensors.torch import load_file
    return all(torch.isfinite(v).all() for v in load_file(path).values())


@pytest.mark.parametrize('when', ['first', 'later', 'last batch'])
def test_weights_that_explode_are_not_kept(data, tiny, tmp_path, monkeypatch, when):
    "Also in the last batch of an epoch, whose loss is still a number"
    learn = learner(data, replace(tiny, epochs=4), tmp_path)
    def explode(self):
        last = self.iter == self.n_iter - 1
        if self.training and self.epoch == (0 if when == 'first' else 2) and (last or when == 'later'):
            with torch.no_grad(): next(self.model.parameters()).mul_(float('inf'))
    monkeypatch.setattr(CheckpointSaver, 'after_step', explode, raising=False)
    with pytest.raises(SmileError, match=r'diverged in epoch \d: .* (is|are) not finite') as e: train_learner(learn, replace(tiny, epochs=4), tmp_path)
    assert 'Try a lower --lr' in e.value.hint and '--clip' in e.value.hint
    if when == 'first': assert 'no epoch before it ended well' in e.value.message and not (tmp_path/'checkpoints'/'best.safetensors').exists()
    else:
        assert f'the best epoch, {learn.checkpoint_saver.best_epoch}, are kept in {tmp_path}/checkpoints/best.safetensors' in e.value.message
        assert all(finite(tmp_path/'checkpoints'/f'{n}.safetensors') for n in ('best', 'last', 'state')) and len(pd.read_csv(tmp_path/'history.csv')) == 2


def test_the_best_of_a_diverged_training_is_a_start(data, faces, tiny, tmp_path, monkeypatch):
    config = replace(tiny, epochs=3, tta='none', out=str(tmp_path/'a'))
    def explode(self):
        if self.epoch == 2: self.learn.loss_grad = self.learn.loss = self.learn.loss * float('nan')
    with monkeypatch.context() as m:
        m.setattr(CheckpointSaver, 'after_pred', explode, raising=False)
        m.setattr(StopOnDivergence, 'order', 70)
        m.setattr(CheckpointSaver, 'after_loss', explode, raising=False)
        with pytest.raises(SmileError, match='the loss is not finite'): fit(faces, config)
    assert read_json(tmp_path/'a'/'config.json')['status'] == 'failed' and (tmp_path/'a'/'config.json').read_text().count('diverged')
    again = fit(faces, replace(tiny, weights=str(tmp_path/'a'/'checkpoints'/'best.safetensors'), epochs=1, tta='none', out=str(tmp_path/'b')))
    assert again.config['status'] == 'finished'


def test_what_is_validated_by_hand_may_say_nan(run):
    "Outside of a training nothing is ended"
    learn = run.learner()
    with torch.no_grad(): learn.model.fc.bias.fill_(float('nan'))
    with learn.no_logging(): assert np.isnan(learn.validate()[0])
    assert issubclass(UnreadableImageError, SmileError) and not issubclass(ImageError, SmileError)


def test_a_loss_that_explodes_ends_the_epoch(faces, tmp_path):
    "From a shell, with the highest rate that is accepted; what is said, and what is kept"
    code, said = shell('fit', faces, *'--arch smilecnn_b1 --weights none --size 32 --bs 16 --lr 10 --epochs 9 --tta none --out'.split(), tmp_path/'run')
    assert code == 1 and re.search(r'error: The training diverged in epoch 1: the loss is .* on average; no epoch before it ended well\.', said), said
    assert re.search(r'Try a lower --lr than \d', said) and 'Traceback' not in said and 'macro F1 train/valid' not in said
    assert read_json(tmp_path/'run'/'config.json')['status'] == 'failed' and not list((tmp_path/'run').glob('checkpoints/*'))
