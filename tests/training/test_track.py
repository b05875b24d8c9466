"Tracking: what a dashboard gets is the history, and the history is that of a training which nobody watched."
import os
import sys
from dataclasses import replace

import pandas as pd
import pytest

from conftest import trained

from fastsmile.core.errors import OptionError, SmileError
from fastsmile.config.fit import FitConfig
from fastsmile.runs.fit import fit

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts

SAME = ['epoch', 'phase', 'train_loss', 'valid_loss', 'valid_macro_f1', 'lr']


def test_tensorboard_reads_the_history_back(faces, data, tiny, tmp_path):
    "Two phases and two learning-rate searches; the searches are not tracked"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = replace(tiny, lr='find', freeze_epochs=1, epochs=2, bs=32, tta='none')
    plain, told = trained(data, config, tmp_path/'none')[0], fit(faces, replace(config, track='tensorboard', out=str(tmp_path/'tensorboard')))
    pd.testing.assert_frame_equal(plain[SAME], told.history[SAME])
    assert not (tmp_path/'none'/'tensorboard').exists() and {p.name for p in (told.path/'tensorboard').iterdir()} == {'head', 'all'}
    for phase, rows in told.history.groupby('phase'):
        seen = EventAccumulator(str(told.path/'tensorboard'/phase)).Reload()
        f1 = seen.Scalars('epoch/valid_macro_f1')
        assert [e.step for e in f1] == rows.epoch.tolist() and [e.value for e in f1] == pytest.approx(rows.valid_macro_f1.tolist(), abs=1e-6)
        losses = seen.Scalars('train_loss')
        assert max(e.step for e in losses) == len(rows) * (max(e.step for e in losses) // len(rows)) > len(rows)  # every batch, no search
        assert 'lr_0' in seen.Tags()['scalars'] and 'valid_loss' in seen.Tags()['scalars']


def test_wandb_keeps_a_run_here(faces, data, tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    for k, v in dict(WANDB_MODE='offline', WANDB_CONSOLE='off', WANDB_DISABLE_GIT='true').items(): monkeypatch.setenv(k, v)
    seen = []
    real = wandb.Run.finish
    monkeypatch.setattr(wandb.Run, 'finish', lambda self, *a, **k: (seen.append((dict(self.summary), dict(self.config))), real(self, *a, **k))[1])
    plain, told = trained(data, tiny, tmp_path/'none')[0], fit(faces, replace(tiny, track='wandb', tta='none', out=str(tmp_path/'wandb')))
    pd.testing.assert_frame_equal(plain[SAME], told.history[SAME])
    (summary, config), = seen
    assert summary['epoch/valid_macro_f1'] == pytest.approx(told.history.valid_macro_f1.iloc[-1]) and summary['epoch/epoch'] == 2
    assert 'train_loss' in summary and config['arch'] == 'resnet10t' and list(told.path.rglob('*.wandb'))


@pytest.mark.parametrize('name,module', [('tensorboard', 'fastai.callback.tensorboard'), ('wandb', 'wandb')])
def test_without_the_package_the_extra_is_named(faces, tiny, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OptionError, match=rf'fastsmile\[{name}\]'): fit(faces, replace(tiny, track=name, out=str(tmp_path/'r')))


def test_wandb_without_an_account_is_one_clear_line(faces, tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setattr(wandb, 'init', lambda **k: (_ for _ in ()).throw(wandb.errors.UsageError('no API key')))
    with pytest.raises(SmileError, match='no API key') as e: fit(faces, replace(tiny, track='wandb', out=str(tmp_path/'r')))
    assert 'WANDB_MODE=offline' in e.value.hint and 'WANDB_API_KEY' not in os.environ


def test_another_dashboard_is_refused():
    with pytest.raises(OptionError, match='tensorboard'): FitConfig(track='mlflow')
