"From Python: callbacks of fastai in `fit`, a Learner that fastai's tools work with, and what a notebook sees of a training"
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import run_python
from fastai.callback.core import Callback
from PIL import Image

from fastsmile.core.errors import OptionError
from fastsmile.core.system import in_notebook
from fastsmile.runs.fit import fit
from fastsmile.runs.folder import load_run


class CountEpochs(Callback):
    "Which phases there were, and how many epochs were trained and validated"
    def __init__(self): self.fits = self.trained = self.validated = 0
    def before_fit(self): self.fits += 1
    def after_train(self): self.trained += 1
    def after_validate(self): self.validated += 1


def test_fit_takes_callbacks_and_trains_as_without(run, faces, tiny, tmp_path, no_charts):
    count = CountEpochs()
    again = fit(faces, replace(tiny, decide='balanced', out=str(tmp_path/'r')), cbs=[count])
    assert (count.fits, count.trained, count.validated) == (1, 2, 2)  # neither searches nor predictions
    assert again.history.train_loss.tolist() == run.history.train_loss.tolist()
    assert 'cbs' not in again.config['options'] and again.config['training']['callbacks'] == ['count_epochs']
    assert 'count_epochs' in again.report.read_text() and 'callbacks given in Python' not in run.report.read_text()


def test_one_callback_needs_no_list_and_a_class_is_made_an_object(faces, tiny, tmp_path, no_charts):
    made = fit(faces, replace(tiny, epochs=1, freeze_epochs=1, out=str(tmp_path/'r')), cbs=CountEpochs)
    assert made.config['training']['callbacks'] == ['count_epochs'] and len(made.history) == 2


@pytest.mark.parametrize('several', [dict(seeds=2), dict(folds=2), dict(refit_all=True), dict(balance='all'), dict(lr='auto', lr_sweep='1e-3,1e-2')])
def test_callbacks_are_refused_where_several_trainings_would_share_them(faces, tiny, tmp_path, several):
    with pytest.raises(OptionError, match='cbs with several trainings'): fit(faces, replace(tiny, out=str(tmp_path/'r'), **several), cbs=CountEpochs())
    assert not (tmp_path/'r').exists()


def test_callbacks_are_refused_where_seeds_are_planned(faces, tmp_path):
    with pytest.raises(OptionError, match='seeds=1'): fit(faces, preset='best', out=str(tmp_path/'r'), cbs=CountEpochs())


def test_what_is_no_callback_is_refused(faces):
    with pytest.raises(OptionError, match="'early stopping' in cbs is no callback"): fit(faces, cbs=['early stopping'])


@pytest.fixture(scope='module')
def learn(run): return run.learner()


def test_a_learner_has_metrics_progress_and_names_of_columns(learn, run):
    assert hasattr(learn, 'progress')
    with learn.no_bar(): loss, *scores = learn.validate()
    assert list(learn.recorder.metrics.attrgot('name')) == ['accuracy', 'balanced_accuracy', 'macro_f1']
    assert len(scores) == 3 and loss > 0 and all(0 <= s <= 1 for s in scores)
    assert 'run.predict' in run.learner.__doc__ and 'nor calibrated' in run.learner.__doc__


def test_a_learner_predicts_images_files_and_arrays_alike(learn, run, faces):
    files = sorted(Path(faces, 'happy_images').glob('*.jpg'))[:5]
    names = [f'happy_images/{f.name}' for f in files]
    with learn.no_bar():
        by_name, by_file, by_image, by_array = (learn.get_preds(dl=learn.dls.test_dl(items))[0].numpy() for items in (
            names, files, [Image.open(f) for f in files], [np.asarray(Image.open(f)) for f in files]))
        label, index, probabilities = learn.predict(Image.open(files[0]))
        assert learn.predict(str(files[0]))[0] == learn.predict(names[0])[0] == label
    assert by_name.shape == (5, len(run.model.classes))
    assert np.allclose(by_name, by_file, atol=1e-6)
    for other in (by_image, by_array): assert np.allclose(by_name, other, atol=1e-3)  # these come decoded, at their full size
    assert label == run.model.classes[int(index)] and np.allclose(probabilities.numpy(), by_name[0], atol=1e-3)


def test_a_learner_trains_on_without_changing_the_run(run):
    learn, before = run.learner(), {p: p.read_bytes() for p in run.path.rglob('*.safetensors')}
    with learn.no_bar(): learn.fit_one_cycle(1, 1e-3)
    assert len(learn.recorder.values[0]) == 5 and list(learn.recorder.metric_names)[-2:] == ['macro_f1', 'time']
    assert all(p.read_bytes() == data for p, data in before.items())


def test_fastai_shows_results_without_further_imports(run):
    done = run_python(['-c', f'''
from fastsmile import load_run
learn = load_run({str(run.path)!r}).learner()
learn.remove_cb(learn.progress)
learn.show_results(max_n=4)
from fastai.interpret import ClassificationInterpretation
interpretation = ClassificationInterpretation.from_learner(learn)
interpretation.plot_top_losses(4)
interpretation.plot_confusion_matrix()
print(interpretation.confusion_matrix().sum() == len(learn.dls.valid_ds), [str(c) for c in interpretation.vocab])
'''], env=os.environ | dict(MPLBACKEND='Agg', PYTHONWARNINGS='ignore'))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f'True {list(run.model.classes)}'


KERNEL = '''
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
shell = InteractiveShell.instance()
shell.kernel = object()
with capture_output(stderr=False) as shown: result = shell.run_cell({cell!r})
result.raise_error()
pages = [str(o.data.get('text/html', '')) for o in shown.outputs]
print([page for page in pages if 'valid loss' in page][-1])
'''

CELL = '''
from fastsmile import FitConfig, fit
run = fit({faces!r}, FitConfig(arch='resnet10t', weights='none', model_args={tiny!r}, size=32, epochs=2, bs=16, lr='0.005', no_onnx=True,
                               tta='none', precision='fp32', out={out!r}))
'''


def test_in_a_notebook_a_table_grows_and_the_verdict_ends_it(faces, tiny, tmp_path):
    env = dict(MPLBACKEND='Agg', FORCE_COLOR='1', CLICOLOR='1', TERM='xterm-color', FASTSMILE_QUIET='')  # as the kernels of Jupyter set them
    cell = CELL.format(faces=str(faces), tiny=tiny.model_args, out=str(tmp_path/'r'))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', KERNEL.format(cell=cell)], capture_output=True, text=True, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    page = done.stdout
    assert page.count('<tr>') == 3 and 'valid loss' in page and 'valid macro F1' in page and '<progress' not in page
    assert '\x1b[?25l' not in done.stderr and '\x1b[2K' not in done.stderr and '\r' not in done.stderr  # nothing moves a cursor
    assert 'macro F1 train/valid' not in done.stderr
    verdict = load_run(tmp_path/'r').verdict
    assert done.stderr.rstrip().endswith(verdict)


def test_without_a_kernel_there_is_no_notebook(): assert not in_notebook()
