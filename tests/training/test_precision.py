"Numbers of training: what is accepted, what auto chooses and writes down, and batches in parts where memory runs out."
import json
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from conftest import TIMES, TINY, learner, trained
from safetensors.torch import load_file

from fastsmile.training import precision as mixed
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.models.device import is_out_of_memory
from fastsmile.training.precision import AutocastPrecision, MemorySafeLearner, PrecisionChoice, check_precision
from fastsmile.training.resume import STATE_FILE, StateSaver, learner_state, read_state, restore_learner
from fastsmile.runs.fit import fit
from fastsmile.training.learner import train_learner


@pytest.fixture(scope='module')
def exact(data, tiny, tmp_path_factory): return trained(data, replace(tiny, precision='fp32'), tmp_path_factory.mktemp('exact'))


@pytest.mark.parametrize('asked,device', [('fp16', 'cpu'), ('bf16', 'mps'), ('fp16', 'mps')])
def test_what_a_device_cannot_is_refused(asked, device):
    with pytest.raises(OptionError, match=f'--precision {asked} is not offered for training on {device}') as e: check_precision(asked, device)
    assert 'auto' in e.value.hint


def test_refused_before_anything_is_read(tmp_path, tiny):
    with pytest.raises(OptionError, match='fp16'): fit(tmp_path/'nothing', replace(tiny, precision='fp16', device='cpu'))


def test_bf16_computes_otherwise_and_is_told(data, tiny, tmp_path, exact):
    h, told, learn = trained(data, replace(tiny, precision='bf16'), tmp_path)
    assert told['precision'] | dict(note='') == asdict(PrecisionChoice('bf16', 'bf16'))
    gap = (h.train_loss - exact[0].train_loss).abs()
    assert 0 < gap.iloc[0] < 0.05
    assert all(v.dtype == torch.float32 for k, v in load_file(tmp_path/'checkpoints'/'best.safetensors').items() if 'num_batches' not in k)
    assert not torch.is_autocast_enabled('cpu') and not learn.cbs.filter(lambda cb: isinstance(cb, AutocastPrecision))


def test_the_loss_is_outside_of_autocast(data, tiny, tmp_path):
    learn, seen = learner(data, tiny, tmp_path), []
    loss = learn.loss_func
    def spy(pred, y):
        seen.append((pred.dtype, torch.is_autocast_enabled('cpu')))
        return loss(pred, y)
    learn.loss_func = spy
    with learn.no_logging(), learn.no_bar(), learn.added_cbs(AutocastPrecision('bf16', 'cpu')): learn.fit(1, 1e-3)
    assert set(seen) == {(torch.float32, False)}


def test_auto_that_keeps_fp32_is_fp32_to_the_bit(data, tiny, tmp_path, exact, monkeypatch):
    monkeypatch.setattr(mixed, 'half_precision_to_time', lambda device: 'bf16')  # as if the machine had AMX
    monkeypatch.setattr(mixed, 'MIN_SPEEDUP', float('inf'))
    h, told, learn = trained(data, replace(tiny, precision='auto'), tmp_path)
    assert told['precision']['precision'] == 'fp32' and told['precision']['speedup'] > 0 and 'times as fast' in told['precision']['note']
    pd.testing.assert_frame_equal(h, exact[0], check_exact=True)
    assert all(v.equal(exact[2].model.state_dict()[k]) for k, v in learn.model.state_dict().items())


def test_auto_takes_what_pays_and_resume_takes_what_was_chosen(data, tiny, tmp_path, monkeypatch):
    class Stopped(BaseException): pass
    written = StateSaver.after_epoch
    def stop(self):
        written(self)
        if len(self.learn.history.rows) == 1: raise Stopped
    monkeypatch.setattr(mixed, 'half_precision_to_time', lambda device: 'bf16')
    monkeypatch.setattr(mixed, 'MIN_SPEEDUP', 0)
    with monkeypatch.context() as m:
        m.setattr(StateSaver, 'after_epoch', stop)
        with pytest.raises(Stopped): trained(data, replace(tiny, precision='auto'), tmp_path)
    noted = read_state(tmp_path/'checkpoints'/STATE_FILE)[1]['precision']
    assert noted['precision'] == 'bf16'
    monkeypatch.setattr(mixed, 'measure_speedup', lambda *_: pytest.fail('timed again'))
    assert trained(data, replace(tiny, precision='auto'), tmp_path, resume=True)[1]['precision'] == noted


def test_nothing_is_timed_where_it_is_plain(data, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed, 'half_precision_to_time', lambda device: None)
    monkeypatch.setattr(mixed, 'measure_speedup', lambda *_: pytest.fail('timed'))
    choice = mixed.choose_precision(learner(data, tiny, tmp_path), 'auto', 32)
    assert (choice.precision, choice.speedup) == ('fp32', None)


def test_the_scale_of_fp16_is_part_of_the_state(data, tiny, tmp_path):
    learn = learner(data, tiny, tmp_path)
    learn.create_opt()
    learn.scaler = torch.amp.GradScaler('cpu', init_scale=128.)
    tensors, rest = learner_state(learn)
    rest = json.loads(json.dumps(rest))
    learn.scaler = torch.amp.GradScaler('cpu')
    restore_learner(learn, tensors, rest)
    assert learn.scaler.get_scale() == 128.


# Memory

def hungry(learn, room, error):
    "The network has memory for `room` pictures"
    def check(_, args):
        if len(args[0]) > room: raise error
    learn.model.register_forward_pre_hook(check)


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory.'),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")])
def test_memory_that_runs_out_halves_the_batch_and_keeps_the_step(data, tiny, tmp_path, error, capsys, monkeypatch):
    monkeypatch.delenv('FASTSMILE_QUIET')
    config = replace(tiny, head='mlp:8', freeze='head', views='fresh', augment='none')  # frozen: BatchNorm sees no batch
    whole = trained(data, config, tmp_path/'whole')[0]
    learn = learner(data, config, tmp_path/'cut')
    hungry(learn, 6, error)
    assert is_out_of_memory(error)
    told, _ = train_learner(learn, config, tmp_path/'cut')
    h = pd.DataFrame(learn.history.rows).drop(columns=TIMES)
    assert told['micro_batches'] == 4 and capsys.readouterr().err.count('out of memory') == 2  # to 8, and to 4
    assert (h.filter(like='drawn_') == whole.filter(like='drawn_')).all(axis=None)
    assert (h.train_loss - whole.train_loss).abs().max() < 1e-4 and (h.valid_loss - whole.valid_loss).abs().max() < 1e-4
    assert h.lr.equals(whole.lr)


def test_a_backward_pass_that_fails_leaves_no_graph_behind(data, tiny, tmp_path):
    learn = learner(data, replace(tiny, epochs=1), tmp_path)
    left, failed = [], []
    def fail(_): # once, from within the backward pass
        failed.append(True)
        if len(failed) == 1: raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    def before_forward(_, args):
        if len(failed) == 1 and not left: left.append([k for k in ('pred', 'loss', 'loss_grad') if getattr(learn, k) is not None])
        if not failed and torch.is_grad_enabled(): args[0].requires_grad_().register_hook(fail)
    learn.model.register_forward_pre_hook(before_forward)
    told, _ = train_learner(learn, replace(tiny, epochs=1), tmp_path)
    assert told['micro_batches'] == 2 and left == [[]]


def test_with_accumulation_and_bf16_and_in_a_resumed_run(data, tiny, tmp_path):
    config = replace(tiny, accumulate=2, precision='bf16', epochs=1)
    learn = learner(data, config, tmp_path)
    hungry(learn, 8, torch.OutOfMemoryError('out of memory'))
    train_learner(learn, config, tmp_path)
    assert read_state(tmp_path/'checkpoints'/STATE_FILE)[1]['micro_batches'] == learn.micro_batches == 2 and not torch.is_autocast_enabled('cpu')
    again = learner(data, replace(config, epochs=1), tmp_path)
    train_learner(again, config, tmp_path, resume=True)
    assert again.micro_batches == 2


def test_other_errors_are_not_taken_for_it(data, tiny, tmp_path):
    learn = learner(data, tiny, tmp_path)
    hungry(learn, 3, RuntimeError('shapes differ'))
    with pytest.raises(RuntimeError, match='shapes differ'): train_learner(learn, tiny, tmp_path)
    learn = learner(data, tiny, tmp_path)
    hungry(learn, 1, torch.OutOfMemoryError('out of memory'))
    with pytest.raises(SmileError, match='a batch of 2'): train_learner(learn, tiny, tmp_path)


def test_the_report_says_it(faces, tiny, tmp_path):
    r = fit(faces, replace(tiny, precision='bf16', epochs=1, tta='none', out=str(tmp_path/'r'), model_args=TINY))
    assert r.config['training']['precision']['precision'] == 'bf16' and 'Computed in bf16. ' in r.report.read_text()
    assert isinstance(r.learner(), MemorySafeLearner)


# Compiled

def test_compiled_training_is_training_and_keeps_the_names(data, tiny, tmp_path, exact, monkeypatch):
    from torch._dynamo.utils import counters
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: plain(self, backend='eager'))  # no C++ compiler, no minute of waiting
    counters.clear()
    h, _, learn = trained(data, replace(tiny, precision='fp32', compile=True), tmp_path)
    assert counters['frames']['ok'] > 0
    assert (h.train_loss - exact[0].train_loss).abs().max() < 1e-3
    assert set(load_file(tmp_path/'checkpoints'/'best.safetensors')) == set(exact[2].model.state_dict()) and learn.model._compiled_call_impl is None


def test_where_nothing_can_be_compiled(faces, tiny, tmp_path, monkeypatch):
    def fail(*_, **__): raise RuntimeError('no C++ compiler was found')
    monkeypatch.setattr(torch, 'compile', fail)
    with pytest.raises(OptionError, match='no C.. compiler was found'): fit(faces, replace(tiny, compile=True, out=str(tmp_path/'r')))
