"Trainings that test_ranks.py runs in one process, and under torchrun in two: python work_in_ranks.py FACES OUT"
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.callback.core import Callback
from safetensors.torch import load_file, save_file

from fastsmile.metrics.calibration import ValidationMetrics
from fastsmile.data.audit import audit_and_split
from fastsmile.training.loaders import BatchRows
from fastsmile.config.fit import FitConfig
from fastsmile.training.distributed import process_group, rank
from fastsmile.training.resume import StateSaver
from fastsmile.training.learner import build_learner, plan_training, spec_from_config, train_learner
from fastsmile.data.source import read_source

PLAIN = FitConfig(arch='smilecnn_1conv', weights='none', size=32, epochs=2, bs=16, lr='0.003', augment='none', seed=1, precision='fp32')  # no norms, no dropout
VARIED = replace(PLAIN, arch='resnet10t', model_args='{"channels": [8, 16, 32, 64]}', augment='medium')  # normalised, augmented
CASES = dict(weighted=replace(PLAIN, ema=0.9, clip=1.0), oversample=replace(PLAIN, balance='oversample', accumulate=2),
             both=replace(PLAIN, balance='both:17', loss='soft-f1'), weights=replace(PLAIN, balance='class-weight', loss='focal:1', lr='auto'),
             patience=replace(PLAIN, epochs=9, lr='1e-30', patience=2), varied=replace(VARIED, ema=0.9, epochs=3), cut=replace(VARIED, ema=0.9, epochs=3))


class Seen(Callback):
    "The rows that this process makes batches of, by epoch and loader"
    order = -10
    def before_fit(self): self.rows = []


class Cut(BaseException): pass


def odd(data):
    "The same data with a number of valid rows that two do not divide"
    valid = data.table.index[(data.table.reason == '') & (data.table.split == 'valid')]
    table = data.table.copy()
    if len(valid) % 2 == 0: table.loc[valid[0], 'reason'] = 'one too many'
    return replace(data, table=table)


def trained(data, config: FitConfig, folder: Path, cut: bool = False):
    "One training; leaves history.json, seen.json and the weights it ends with"
    from fastsmile.runs.fit import new_network
    spec = spec_from_config(config, data.classes)
    def learner():
        learn, _ = build_learner(data, spec, new_network(spec, config), config, folder, 'cpu')
        learn.add_cb(Seen())
        return learn
    learn = learner()
    history = learn.history  # a search takes it out
    split = {id(dl.rows): name for dl, name in zip(learn.dls, ('train', 'valid'))}
    made, written = BatchRows.batch, StateSaver.after_epoch
    def batch(self, at):
        if hasattr(learn.seen, 'rows'): learn.seen.rows += [(len(history.rows), split.get(id(self)), int(i)) for i in at]
        return made(self, at)
    def after_epoch(self):
        written(self)
        if len(self.learn.history.rows) == 1: raise Cut
    BatchRows.batch = batch
    try:
        if cut:
            StateSaver.after_epoch = after_epoch
            try: train_learner(learn, config, folder)
            except Cut: learn = learner()
            history = learn.history
            StateSaver.after_epoch = written
        told, _ = train_learner(learn, config, folder, resume=cut)
    finally: BatchRows.batch, StateSaver.after_epoch = made, written
    return history.rows, learn.seen.rows, told, learn.model.state_dict()


def measured(data, config: FitConfig, file: Path) -> dict:
    "Validation by one process over all rows, with the weights of a file"
    from fastsmile.runs.fit import new_network
    spec = spec_from_config(config, data.classes)
    balance, facts = plan_training(data.rows, spec.classes, config)
    learn, _ = build_learner(data, spec, new_network(spec, config), config, file.parent/'again', 'cpu')
    learn.model.load_state_dict(load_file(file))
    learn.model.eval()
    logits, y = (np.concatenate(v) for v in zip(*[(learn.model(x).detach().numpy(), y.numpy()) for x, y in learn.dls.valid]))
    metrics = learn.history.validation_metrics
    assert isinstance(metrics, ValidationMetrics) and len(y) == (data.rows.split == 'valid').sum()
    return metrics(logits, y)


def work(faces: str, out: Path, cases=tuple(CASES)):
    "Train every case; each process writes what it saw"
    data = odd(audit_and_split(read_source(faces), FitConfig(seed=1)))
    for name in cases:
        history, seen, told, weights = trained(data, CASES[name], out/name/f'rank{rank()}', cut=name == 'cut')
        (out/f'{name}-{rank()}.json').write_text(json.dumps(dict(history=history, seen=seen, best=told['best_epoch'], lr=[p['lr'] for p in told['phases']])))
        if not rank(): save_file({k: v.contiguous() for k, v in weights.items()}, out/f'{name}.safetensors')
    return data


def history_of(told: dict) -> pd.DataFrame: return pd.DataFrame(told['history'])


if __name__ == '__main__':
    with process_group(): work(sys.argv[1], Path(sys.argv[2]))
