"An exported model says what its run says, from one file and without torch."
import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, folder, picture, shell

import fastsmile.inference.export as room
from fastsmile.inference.backend import normalize_pixels
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.system import may_have_gpu
from fastsmile.inference.torch_backend import TorchBackend
from fastsmile.inference.export import export
from fastsmile.data.images import Preprocessing
from fastsmile.data.readers import FolderReader
from fastsmile.models.factory import build_network, make_spec
from fastsmile.inference.onnx_backend import OnnxBackend, load_onnx
from fastsmile.config.commands import ExportConfig, PredictConfig
from fastsmile.inference.load import choose_backend, load_model
from fastsmile.inference.predict import predict_rows
from fastsmile.runs.predict import predict

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts

NEAR = 1e-5  # in probabilities, between the engines


@pytest.fixture(scope='module')
def made(run, tmp_path_factory):
    "A copy of the run, exported"
    path = shutil.copytree(run.path, tmp_path_factory.mktemp('onnx')/'run')
    return path, export(path)


@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Pictures of several shapes and modes, and one that is broken"
    files = {f'{i:02}.jpg': picture(fmt='JPEG', size=(40 + 7 * i, 60), seed=i) for i in range(12)}
    files |= {'grey.png': picture(mode='L', seed=50), 'x.png': picture(mode='RGBA', seed=51), 'broken.jpg': b'no'}
    return folder(tmp_path_factory.mktemp('album'), files)


def rows_of(path): return list(csv.DictReader(open(path, newline='', encoding='utf-8')))


def numbers(row): return {k: float(v) for k, v in row.items() if k.startswith(('confidence', 'p_', 'raw_', 'calibrated_')) and v != ''}


def bundle(where, arch, size, **kw):
    "A model whose norms have something to fold"
    torch.manual_seed(0)
    spec = make_spec(arch, ['NOT smile', 'positive smile', 'negative smile'], size=size, **kw)
    net = build_network(spec).eval()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.5, 2)
    save_bundle(Model(spec, ModelMetadata([.7, .2, .1], [.7, -.5, -1.2], [0.] * 3, 'argmax'), net), where)
    return where


def test_export_is_compared_on_the_run_s_pictures(made):
    path, done = made
    assert done['on'] == "of the run's source" and done['pictures'] == 64 and done['labels'] == 0 and done['opset'] == 20
    assert 0 < done['logits'] < 1e-4 and done['probs'] < NEAR and Path(done['out']) == path/'model'/'model.onnx'


def test_the_file_says_everything_the_bundle_says(made):
    import onnx
    path, done = made
    proto = onnx.load(done['out'])
    onnx.checker.check_model(proto)
    said = {p.key: json.loads(p.value) for p in proto.metadata_props}
    bundle = load_bundle(path)
    assert said['fastsmile.config'] == json.loads((path/'model'/'config.json').read_text())
    assert said['labels'] == list(bundle.spec.classes) and said['preprocessing'][0]['mean'] == list(bundle.spec.prep.mean)
    assert said['calibration']['temperature'] == bundle.metadata.calibration.temperature and said['decision']['offsets'] == bundle.metadata.calibration.offsets
    assert [o.version for o in proto.opset_import if o.domain == ''] == [20]
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and not shape[0].dim_value and [d.dim_value for d in shape[1:]] == [3, 32, 32]
    again = load_onnx(path)
    assert (again.spec, again.metadata) == (bundle.spec, bundle.metadata)


@pytest.mark.parametrize('ask', [{}, dict(tta='full', tta_mean='logits', raw=True), dict(threshold='balanced', uncalibrated=True, sets=True),
                                 dict(threshold='negative smile=0.05', abstain=True, tta='flip', bs=3, workers=3)])
def test_the_same_rows_as_torch(made, album, tmp_path, ask):
    path, _ = made
    both = []
    for engine in ('torch', 'onnx'):
        out = tmp_path/f'{engine}.csv'
        done = predict(album, PredictConfig(overwrite=True, model=str(path), engine=engine, out=str(out), precision='fp32', device='cpu', **ask))
        assert ('onnxruntime' in done.run_info['precision']) == (engine == 'onnx') and done.rows == 15 and done.failed == 1
        both.append(rows_of(out))
    assert list(both[0][0]) == list(both[1][0])
    for a, b in zip(*both):
        assert {k: v for k, v in a.items() if k not in numbers(a)} == {k: v for k, v in b.items() if k not in numbers(b)}
        assert numbers(a).keys() == numbers(b).keys() and all(abs(v - numbers(b)[k]) < NEAR for k, v in numbers(a).items())


def test_the_same_call_gives_the_same_bytes_and_goes_on_with_resume(made, album, tmp_path):
    path, _ = made
    def ask(out, **kw): return PredictConfig(overwrite=True, model=str(path), engine='onnx', out=str(out), bs=4, workers=2, **kw)
    predict(album, ask(tmp_path/'a.csv'))
    predict(album, ask(tmp_path/'b.csv'))
    want = (tmp_path/'a.csv').read_bytes()
    assert (tmp_path/'b.csv').read_bytes() == want
    from fastsmile.inference.outputs import PredictionFile
    from unittest.mock import patch
    with patch.object(PredictionFile, 'finish', side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt): predict(album, ask(tmp_path/'c.csv'))
    with open(tmp_path/'c.csv.part', 'r+b') as f: f.truncate(len(want) // 2)
    assert predict(album, ask(tmp_path/'c.csv', resume=True)).resumed > 0
    assert (tmp_path/'c.csv').read_bytes() == want


@pytest.mark.parametrize('alone', [True, False])
def test_one_picture_is_predicted_without_torch(made, album, tmp_path, alone):
    "From the file alone, and from the run, without being asked"
    path, done = made
    if not alone and may_have_gpu(): pytest.skip('torch predicts where there is a GPU')
    model = done['out'] if alone else str(path)
    out, heavy = tmp_path/'p.csv', {'torch', 'fastai', 'pandas', 'timm', 'onnx', 'safetensors', 'sklearn', 'scipy', 'matplotlib'}
    code = f'''
import sys
sys.argv = ['fastsmile', 'predict', {str(album/"03.jpg")!r}, '--tta', '--abstain', '--model', {model!r}, '--out', {str(out)!r},
            '--html', {str(tmp_path/"g.html")!r}]
from fastsmile.cli.commands import main
try: main()
except SystemExit as e: print(e.code, {heavy!r} & set(sys.modules), 'onnxruntime' in sys.modules)
'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.stdout.splitlines()[-1] == '0 set() True', r.stderr
    assert rows_of(out)[0]['error'] == '' and (tmp_path/'g.html').exists()


def test_onnxruntime_reports_nothing_and_keeps_no_identifier(made, album, tmp_path):
    "Its builds of 2026 would, from a file of sessions in the temporary folder on"
    home = tmp_path/'home'
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if k not in ('ORT_DISABLE_TELEMETRY', 'CI')} | dict(HOME=str(home), TMPDIR=str(home), XDG_CACHE_HOME=str(home))
    args = ['predict', album/'03.jpg', '--model', made[1]['out'], '--out', tmp_path/'p.csv']
    assert subprocess.run([sys.executable, '-m', 'fastsmile', *map(str, args)], env=env, capture_output=True).returncode == 0
    assert not [p for p in home.rglob('*') if p.is_file()]


@pytest.mark.parametrize('arch,size,kw', [('resnet10t', 32, dict(model_args=TINY, head='mlp:16,8', dropout=0.3)), ('smilecnn_b1', 56, {}),
                                          ('smilecnn_3conv', 40, dict(head='mlp:8')),
                                          ('vit_tiny_patch16_224', 32, dict(model_args='{"depth": 2}'))])
def test_other_networks_and_heads(tmp_path, arch, size, kw):
    where = bundle(tmp_path/'model', arch, size, **kw)
    done = export(where)
    assert done['on'] == 'of noise' and done['logits'] < 1e-3
    model, x = load_bundle(where), np.random.default_rng(1).integers(0, 256, (7, size, size, 3), dtype=np.uint8)
    assert np.abs(OnnxBackend(load_onnx(where)).logits(x) - TorchBackend(model, device='cpu').logits(x)).max() < 1e-3


def test_real_weights_on_real_faces(shared, tmp_path):
    "mobilenetv2 with ImageNet's weights: the exported file says what torch says on 60 faces"
    spec = make_spec('mobilenetv2_100', ['no', 'yes'], size=64)
    net = build_network(spec, str(shared/'weights'/'mobilenetv2_100.safetensors')).eval()
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0., 0.], [0., 0.], 'argmax'), net), tmp_path/'m')
    done = export(tmp_path/'m', ExportConfig(check=str(shared/'data'/'smiles.zip')))
    assert done['pictures'] == 64 and done['labels'] == 0 and done['logits'] < 1e-3


def test_the_input_is_torch_s_to_the_bit():
    prep, x = Preprocessing(size=16), np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    mean, std = (torch.tensor(v).repeat(16) for v in (prep.mean, prep.std))
    rows = torch.from_numpy(x).float().flatten(2).div_(255).sub_(mean).div_(std)
    assert (normalize_pixels(x, prep) == rows.view(x.shape).permute(0, 3, 1, 2).numpy()).all()


def test_a_file_that_is_not_the_same_is_not_kept(made, tmp_path, monkeypatch):
    path, _ = made
    real = room.write_onnx
    def wrong(model, cfg, where, opset):
        other = replace(model, net=build_network(model.spec).eval())
        real(other, cfg, where, opset)
    monkeypatch.setitem(room.EXPORT_FORMATS, 'onnx', replace(room.EXPORT_FORMATS['onnx'], write=wrong))
    with pytest.raises(SmileError, match='not the same'): export(path, ExportConfig(out=str(tmp_path/'x.onnx')))
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_is_found_out(made, tmp_path, monkeypatch):
    path, _ = made
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, 'export', lambda *a, **kw: real(*a, **{k: v for k, v in kw.items() if not k.startswith('dynamic_')}))
    with pytest.raises(Exception, match='(?i)dimension|shape'): export(path, ExportConfig(out=str(tmp_path/'x.onnx')))
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_given_and_a_source_that_is_gone(made, album, tmp_path, capsys, monkeypatch):
    path = shutil.copytree(made[0], tmp_path/'run')
    assert export(path, ExportConfig(check=str(album)))['pictures'] == 14
    config = json.loads((path/'config.json').read_text())
    (path/'config.json').write_text(json.dumps(config | dict(source=str(tmp_path/'gone'))))
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    assert export(path)['on'] == 'of noise' and 'noise alone' in capsys.readouterr().err
    (tmp_path/'broken').mkdir()
    (tmp_path/'broken'/'a.jpg').write_bytes(b'no')
    with pytest.raises(SmileError, match='none of its images'): export(path, ExportConfig(check=str(tmp_path/'broken')))


def test_opset_is_what_was_asked_for(made, tmp_path):
    import onnx
    export(made[0], ExportConfig(out=str(tmp_path/'x.onnx'), opset=18))
    assert [o.version for o in onnx.load(tmp_path/'x.onnx').opset_import if o.domain == ''] == [18]


def test_files_that_cannot_be_used(made, album, tmp_path):
    path = shutil.copytree(made[0], tmp_path/'run')
    def ask(**kw): return PredictConfig(out=str(tmp_path/'p.csv'), **kw)
    config = json.loads((path/'model'/'config.json').read_text())
    config['fastsmile']['calibration']['temperature'] = 2.5
    (path/'model'/'config.json').write_text(json.dumps(config))
    def probabilities(**kw):
        predict(album, ask(model=str(path), engine='onnx', overwrite=True, **kw))
        return np.array([[float(v) for k, v in r.items() if k.startswith('p_')] for r in rows_of(tmp_path/'p.csv') if not r['error']])
    want = load_bundle(path).metadata.calibration.apply(probabilities(uncalibrated=True))[1]
    assert np.allclose(probabilities(), want, atol=1e-6)  # config.json says how probabilities are read
    (tmp_path/'p.csv').unlink()
    (path/'model'/'model.onnx').unlink()
    with pytest.raises(SmileError, match='holds no exported model') as e: predict(album, ask(model=str(path), engine='onnx'))
    assert 'fastsmile export' in e.value.hint
    (tmp_path/'bad.onnx').write_bytes(b'no onnx')
    with pytest.raises(SmileError, match='cannot be read as ONNX'): predict(album, ask(model=str(tmp_path/'bad.onnx')))
    import onnx
    proto = onnx.load(made[1]['out'])
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path/'foreign.onnx')
    with pytest.raises(SmileError, match='not exported by fastsmile'): predict(album, ask(model=str(tmp_path/'foreign.onnx')))
    assert not (tmp_path/'p.csv').exists()


@pytest.mark.parametrize('kw,words', [(dict(engine='torch'), 'cannot run'), (dict(precision='bf16'), 'fp32'), (dict(device='cuda'), 'CPU')])
def test_options_that_do_not_go_together(made, album, tmp_path, kw, words):
    with pytest.raises(OptionError, match=words): predict(album, PredictConfig(overwrite=True, model=made[1]['out'], out=str(tmp_path/'p.csv'), **kw))
    with pytest.raises(OptionError, match='extension'): export(made[0], ExportConfig(out=str(tmp_path/'x.pb')))


def test_from_python_and_what_auto_takes(made, album, monkeypatch):
    path, done = made
    cases = ((path, 'auto', 'cpu', 'fp32'), (path, 'auto', 'cuda'), (path, 'auto', 'cpu', 'bf16'), (path, 'torch'), (done['out'],), (path, 'onnx'),
             (path, 'auto', 'cpu', 'auto', 1))
    assert [choose_backend(*a) for a in cases] == ['onnx', 'torch', 'torch', 'torch', 'onnx', 'onnx', 'onnx']
    for flags, images, kind in (({'amx_bf16'}, None, 'torch'), ({'amx_bf16'}, 257, 'torch'), ({'amx_bf16'}, 256, 'onnx'), ({'avx2'}, None, 'onnx')):
        monkeypatch.setattr('fastsmile.inference.load.cpu_flags', lambda flags=flags: flags)
        assert choose_backend(path, 'auto', 'cpu', 'auto', images) == kind
    monkeypatch.setattr('fastsmile.inference.load.may_have_gpu', lambda: True)
    assert choose_backend(path, precision='fp32') == 'torch' and choose_backend(path, device='cpu', precision='fp32') == 'onnx'
    table = load_model(done['out']).predict(album, tta=True)
    want = load_model(path, 'torch').predict(album, tta=True, precision='fp32', device='cpu')
    assert table.label.tolist() == want.label.tolist() and np.allclose(table.confidence[1:10].astype(float), want.confidence[1:10].astype(float), atol=NEAR)


def test_threads_and_groups_change_only_the_last_digits(made, album):
    model, reader = load_model(made[1]['out']), FolderReader(album)
    def probs(**kw): return [r['confidence'] or 0 for r in predict_rows(model, reader, reader.names(), **kw)]
    assert np.allclose(probs(bs=1, threads=1), probs(bs=5, threads=3), atol=NEAR)
    assert set(model.net.sessions) == {0, 1}  # all cores for one pass; one core each for several


def test_in_a_shell(made, album, tmp_path):
    path, _ = made
    r = shell('export', path, '--format', 'onnx', '--check', album, '--out', 'm.onnx', '--json', cwd=tmp_path)
    assert r.returncode == 0 and json.loads(r.stdout)['pictures'] == 14 and (tmp_path/'m.onnx').exists()
    r = shell('predict', album, '--model', 'm.onnx', '--json', cwd=tmp_path)
    assert r.returncode == 0 and json.loads(r.stdout)['precision'] == 'fp32 on cpu by onnxruntime' and json.loads(r.stdout)['failed'] == 1
    with pytest.raises(OptionError, match='Unknown') as e: ExportConfig(format='tflite')
    assert 'Accepted: onnx' in e.value.hint and not list(tmp_path.glob('.*part'))


def test_what_needs_torch_says_so(made):
    with pytest.raises(OptionError, match='the run that it comes from'): TorchBackend(load_onnx(made[1]['out']))


def test_what_the_exporter_says_comes_in_whole_words_without_colours(made, tmp_path, monkeypatch):
    def fails(*a, **kw): raise RuntimeError('\x1b[96mstep 1/3\x1b[0m\n' + 'of exporting ' * 40)
    monkeypatch.setattr(torch.onnx, 'export', fails)
    with pytest.raises(SmileError) as e: export(made[0], ExportConfig(out=str(tmp_path/'x.onnx')))
    said = e.value.message.partition('as ONNX: ')[2]
    assert said.startswith('step 1/3 of exporting') and said.endswith((' of ...', ' exporting ...')) and len(said) <= 300 and '[96m' not in said
    (tmp_path/'y.onnx').write_bytes(b'somebody else\'s')
    with pytest.raises(OptionError, match='is not a model that fastsmile exported'): export(made[0], ExportConfig(out=str(tmp_path/'y.onnx')))


def test_a_file_of_other_weights_is_not_used_and_auto_says_so(made, tmp_path, capsys, monkeypatch):
    "Weights that were trained again, a file that is broken: torch predicts under auto, and --engine onnx is refused"
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    monkeypatch.setattr('fastsmile.inference.load.may_have_gpu', lambda: False)
    path = shutil.copytree(made[0]/'model', tmp_path/'model')
    old = load_bundle(path)
    torch.manual_seed(7)
    save_bundle(replace(old, net=build_network(old.spec).eval()), path)
    with pytest.raises(SmileError, match='not made of the weights beside it') as e: load_model(path, 'onnx')
    assert f'fastsmile export {path}' in e.value.hint
    assert isinstance(load_model(path, precision='fp32').net, torch.nn.Module) and 'torch predicts instead' in capsys.readouterr().err
    export(path)
    assert load_model(path, precision='fp32').net.backend == 'onnx' and capsys.readouterr().err.count('torch') == 0
    (path/'model.onnx').write_bytes(b'cut off')
    assert isinstance(load_model(path, precision='fp32').net, torch.nn.Module) and 'cannot be read as ONNX' in capsys.readouterr().err
    (path/'model.safetensors').write_bytes(b'others')
    with pytest.raises(SmileError, match='checksum'): load_model(path, precision='fp32')


def test_fit_writes_the_file_and_calibrate_keeps_it_right(faces, tiny, run, tmp_path, album, monkeypatch):
    "No file with --no-onnx; else rows are torch's, from the folder and from the file alone, also after calibrate"
    from fastsmile.config.commands import CalibrateConfig
    from fastsmile.runs.calibrate import calibrate
    from fastsmile.runs.fit import fit
    assert run.config['options']['no_onnx'] and not list(run.path.rglob('*.onnx'))
    quantized = []
    monkeypatch.setattr('fastsmile.runs.results.add_int8', lambda *a: quantized.append(a))
    run = fit(faces, replace(tiny, epochs=1, tta='none', no_onnx=False, out=str(tmp_path/'run'))).path
    (_, _, calibration, held_out), = quantized  # pictures for int8: no row of test, and none twice
    split = {r['path']: r['split'] for r in rows_of(run/'table.csv')}
    assert {split[p] for p in calibration} == {'calib'} and {split[p] for p in held_out} == {'calib', 'valid'}
    assert not set(calibration) & set(held_out)
    for decide in (None, 'balanced'):
        if decide: calibrate(run, CalibrateConfig(decide=decide))
        tables = []
        for i, (model, engine) in enumerate(((run, 'torch'), (run, 'onnx'), (run/'model'/'model.onnx', 'auto'))):
            predict(album, PredictConfig(overwrite=True, model=str(model), engine=engine, precision='fp32',
                                         device='cpu', out=str(tmp_path/f'{i}.csv')))
            tables.append(rows_of(tmp_path/f'{i}.csv'))
        for other in tables[1:]:
            for a, b in zip(tables[0], other, strict=True):
                assert a['label'] == b['label'] and all(abs(v - numbers(b)[k]) < NEAR for k, v in numbers(a).items())
    assert load_onnx(run/'model'/'model.onnx').metadata.decide == 'balanced'


def test_what_cannot_be_exported_trains_all_the_same(faces, tiny, tmp_path, capsys, monkeypatch):
    from fastsmile.runs.fit import fit
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    def fails(*a, **kw): raise RuntimeError('no such operator')
    monkeypatch.setattr(torch.onnx, 'export', fails)
    run = fit(faces, replace(tiny, epochs=1, tta='none', no_onnx=False, out=str(tmp_path/'run')))
    assert run.config['status'] == 'finished' and not (run.path/'model'/'model.onnx').exists()
    assert 'torch predicts with it' in capsys.readouterr().err


# int8

def noise_png(rng):
    "A picture of a few random patches"
    import io
    from PIL import Image
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 7, 2), 3), dtype=np.uint8)).resize((40, 40)).save(out, 'PNG')
    return out.getvalue()


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    "A tiny network whose classes are close on noise, its int8 copy with weights of 7 bits, which all processors compute alike, and other noise"
    import fastsmile.inference.onnx_backend as backends
    import fastsmile.inference.quantize as quantize
    from fastsmile.inference.export import write_onnx
    rng, where = np.random.default_rng(3), tmp_path_factory.mktemp('int8')
    images, others = (folder(where/name, {f'{i:03}.png': noise_png(rng) for i in range(n)}) for name, n in (('measured', 180), ('others', 240)))
    from fastsmile.data.unlike import fit_unlike_scale
    model = load_bundle(bundle(where/'model', 'resnet10t', 32, model_args=TINY))
    reader = FolderReader(images)
    pixels = np.stack(room.read_some_images(reader, sorted(reader.names()), model.preps, 180))
    logits = TorchBackend(model, device='cpu').logits(pixels)
    with torch.no_grad():
        model.net.fc.weight.div_(torch.tensor(logits.std(0))[:, None])
        model.net.fc.bias.copy_((model.net.fc.bias - torch.tensor(logits.mean(0))) / torch.tensor(logits.std(0)))
    model = replace(model, metadata=replace(model.metadata, unlike=fit_unlike_scale(pixels[:90], pixels[90:])))
    save_bundle(model, where/'model')
    write_onnx(model, json.loads((where/'model'/'config.json').read_text()), where/'model'/'model.onnx')
    names = sorted(reader.names())
    with pytest.MonkeyPatch.context() as patch:
        for module in (backends, quantize): patch.setattr(module, 'int8_weight_bits', lambda: 7)
        patch.setattr(quantize._HeldOut, 'time_share', lambda self, net: 0.5)  # the clock chooses among candidates: another file on a busy machine
        facts = quantize.add_int8(where/'model', reader, names[:60], names[60:], least_speedup=0.)
        yield where/'model', others, facts


def ask_quick(quick, out, **options):
    return PredictConfig(overwrite=True, model=str(quick[0]), out=str(out), device='cpu', bs=16, workers=2, **options)


@pytest.mark.parametrize('options', [{}, dict(tta='flip', threshold='balanced'), dict(threshold='positive smile=0.4')])
def test_int8_labels_are_those_of_fp32(quick, tmp_path, options):
    "And probabilities are near; how many rows were recomputed is in the summary"
    done = {p: predict(quick[1], ask_quick(quick, tmp_path/f'{p}.csv', precision=p, **options)) for p in ('fp32', 'int8')}
    assert done['int8'].run_info['precision'].startswith('int8 on cpu by onnxruntime, ') and 'recomputed in fp32' in done['int8'].run_info['precision']
    assert 'recomputed' not in done['fp32'].run_info['precision']
    a, b = (rows_of(tmp_path/f'{p}.csv') for p in ('fp32', 'int8'))
    assert [r['label'] for r in a] == [r['label'] for r in b] and len({r['label'] for r in a}) == 3
    off = [abs(v - numbers(y)[k]) for x, y in zip(a, b) for k, v in numbers(x).items()]
    assert 0 < max(off) < 0.1


def test_int8_goes_on_to_the_same_bytes_in_int8_alone(quick, tmp_path):
    from unittest.mock import patch
    from fastsmile.inference.outputs import PredictionFile
    predict(quick[1], ask_quick(quick, tmp_path/'a.csv', precision='int8'))
    want = (tmp_path/'a.csv').read_bytes()
    with patch.object(PredictionFile, 'finish', side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        predict(quick[1], ask_quick(quick, tmp_path/'c.csv', precision='int8'))
    with open(tmp_path/'c.csv.part', 'r+b') as f: f.truncate(len(want) // 2)
    with pytest.raises(SmileError, match='precision was int8'): predict(quick[1], ask_quick(quick, tmp_path/'c.csv', precision='fp32', resume=True))
    assert predict(quick[1], ask_quick(quick, tmp_path/'c.csv', precision='int8', resume=True)).resumed > 0
    assert (tmp_path/'c.csv').read_bytes() == want


def test_pictures_unlike_the_training_images_are_recomputed(quick, tmp_path):
    "They may be far outside of what the int8 graph was made for: their rows are fp32's to the last digit"
    rng = np.random.default_rng(9)
    def png(i):
        import io
        from PIL import Image
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(out, 'PNG')
        return out.getvalue()
    odd = folder(tmp_path/'odd', {f'{i:02}.png': png(i) for i in range(40)})
    for p in ('fp32', 'int8'): done = predict(odd, ask_quick(quick, tmp_path/f'{p}.csv', precision=p))
    a, b = (rows_of(tmp_path/f'{p}.csv') for p in ('fp32', 'int8'))
    assert '40 uncertain rows recomputed' in done.run_info['precision'] and all(float(r['unlike']) >= 0.95 for r in a)
    assert all(abs(v - numbers(y)[k]) < NEAR for x, y in zip(a, b) for k, v in numbers(x).items())


def test_what_was_measured_is_in_the_int8_file(quick):
    from fastsmile.inference.onnx_backend import load_int8
    model = load_onnx(quick[0])
    net, facts = load_int8(model)
    assert facts == quick[2] and facts.weight_bits == 7 and facts.images == 120 and 0 < facts.recomputed < 0.5 and facts.margins == sorted(facts.margins)
    assert OnnxBackend(model, 'int8').precision == 'int8' and OnnxBackend(model, 'fp32').fp32_backend is None


def test_auto_takes_int8_where_it_pays(quick, tmp_path, monkeypatch, capsys):
    import fastsmile.inference.onnx_backend as backends
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    model, net = load_onnx(quick[0]), backends.load_int8(load_onnx(quick[0]))[0]
    for speedup, precision in ((1.05, 'fp32'), (1.5, 'int8')):
        monkeypatch.setattr(backends, 'load_int8', lambda m, s=speedup: (net, replace(quick[2], speedup=s)))
        assert OnnxBackend(model, 'auto').precision == precision
    done = predict(quick[1], ask_quick(quick, tmp_path/'p.csv'))
    assert done.run_info['precision'].startswith('int8')
    done = predict(str(quick[1]/'000.png'), ask_quick(quick, tmp_path/'p.csv'))  # a single picture: not worth reading another file
    assert done.run_info['precision'].startswith('fp32')
    done = predict(quick[1], ask_quick(quick, tmp_path/'p.csv', prior='uniform'))
    assert done.run_info['precision'].startswith('fp32')
    for bits, processor, precision in ((7, 8, 'int8'), (8, 8, 'int8'), (8, 7, 'fp32'), (7, 0, 'fp32')):
        monkeypatch.setattr(backends, 'load_int8', lambda m, b=bits: (net, replace(quick[2], speedup=1.5, weight_bits=b)))
        monkeypatch.setattr(backends, 'int8_weight_bits', lambda p=processor: p)
        assert OnnxBackend(model, 'auto').precision == precision, (bits, processor)


def test_int8_is_refused_where_it_cannot_be(quick, made, tmp_path, monkeypatch, capsys):
    import fastsmile.inference.onnx_backend as backends
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    def refused(match, **options):
        with pytest.raises(OptionError, match=match): predict(quick[1], replace(ask_quick(quick, tmp_path/'p.csv', precision='int8'), **options))
    refused('model.int8.onnx does not exist', model=str(made[0]))
    refused('needs a model.int8.onnx, and torch has none', engine='torch')
    refused('with --prior uniform', prior='uniform')
    refused('computes on the CPU', engine='onnx', device='cuda')
    copy = shutil.copytree(quick[0], tmp_path/'copy')
    monkeypatch.setattr(backends, 'int8_weight_bits', lambda: 8)
    for data, match in ((b'cut off', 'cannot be read as ONNX'), ((made[0]/'model'/'model.onnx').read_bytes(), 'is not an int8 file of fastsmile')):
        (copy/'model.int8.onnx').write_bytes(data)
        refused(match, model=str(copy))
        assert OnnxBackend(load_onnx(copy), 'auto').precision == 'fp32' and 'It is computed in fp32' in capsys.readouterr().err
    monkeypatch.setattr(backends, 'int8_weight_bits', lambda: 0)
    refused('needs a processor with AVX2 or VNNI')
    from fastsmile.config.fit import FitConfig
    with pytest.raises(OptionError, match='precision'): FitConfig(precision='int8')


def test_what_cannot_be_quantized_has_no_file_and_says_so(quick, tmp_path, monkeypatch, capsys):
    "A network without convolutions but the first; int8 that is not faster; too few pictures"
    import fastsmile.inference.quantize as quantize
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    copy = shutil.copytree(quick[0], tmp_path/'copy')
    reader = FolderReader(quick[1])
    names = sorted(reader.names())
    assert quantize.add_int8(copy, reader, names[:60], names[60:], least_speedup=1e9) is None and not (copy/'model.int8.onnx').exists()
    assert 'no int8 file' in capsys.readouterr().err
    assert quantize.add_int8(copy, reader, names[:60], names[60:100]) is None  # too few to measure on
