"Training knows whether its images are in colour: all-grey data makes a grey model, mixed data draws grey versions."
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import folder, learner

from fastsmile.data.audit import audit_and_split
from fastsmile.data.sample import draw_face, random_face_params
from fastsmile.data.source import read_source
from fastsmile.models.bundle import load_bundle
from fastsmile.training.learner import spec_from_config
from fastsmile.training.loaders import RandomGrey

pytestmark = pytest.mark.usefixtures('no_charts')  # nothing here looks at a run's charts


def album(root, grey_share, n=60):
    "Drawn faces of two classes, some of them grey"
    rng, files = np.random.default_rng(0), {}
    for i in range(n):
        label = ('NOT smile', 'positive smile')[i % 2]
        img, buf = draw_face(random_face_params(rng, label), 32, rng), io.BytesIO()
        (img.convert('L') if rng.random() < grey_share else img).save(buf, 'PNG')
        files[f'{label}/{i:02}.png'] = buf.getvalue()
    return folder(root, files)


@pytest.fixture(scope='module')
def albums(tmp_path_factory):
    root = tmp_path_factory.mktemp('albums')
    return {share: album(root/str(share), share) for share in (0, .5, 1)}


@pytest.mark.parametrize('share, colour, turned, drawn', [
    (0, 'auto', False, []), (.5, 'auto', False, [.5]), (1, 'auto', True, []),
    (0, 'grey', True, []), (.5, 'grey', True, []), (.5, 'keep', False, []), (1, 'keep', False, [])])
def test_what_the_network_sees_in_training(albums, tiny, tmp_path, share, colour, turned, drawn):
    config = replace(tiny, colour=colour, augment='none', bs=8)
    data = audit_and_split(read_source(albums[share], config), config)
    spec = spec_from_config(config, data.classes, data.domain)
    assert spec.prep.grey == turned and data.domain.colour == {0: 'colour', .5: 'mixed', 1: 'grey'}[share]
    from fastsmile.runs.fit import new_network
    from fastsmile.training.learner import build_learner
    learn, _ = build_learner(data, spec, new_network(spec, config), config, tmp_path, 'cpu')
    assert [t.share for t in learn.dls.train.after_batch.fs if isinstance(t, RandomGrey)] == drawn
    torch.manual_seed(0)
    x = torch.cat([learn.dls.train.after_batch.fs[-1].decode(b[0]) for b in learn.dls.train])
    seen_grey = float(((x.amax(1) - x.amin(1)).amax((1, 2)) < 0.02).float().mean())
    expected = 1 if turned else share + (1 - share) * sum(drawn)
    assert abs(seen_grey - expected) < 0.21


def test_a_run_on_grey_images_says_so_everywhere(albums, tiny, tmp_path, capsys, monkeypatch):
    from fastsmile.runs.fit import fit
    from fastsmile.runs.folder import load_run
    monkeypatch.setenv('FASTSMILE_QUIET', '')
    run = fit(albums[1], replace(tiny, epochs=1, tta='none', out=str(tmp_path/'run')))
    assert 'All training images are grey' in capsys.readouterr().err
    model = load_bundle(run.path)
    assert model.spec.prep.grey and model.metadata.domain.colour == 'grey' and load_run(run.path).data.domain == model.metadata.domain
    assert 'turns its input grey' in (run.path/'model'/'README.md').read_text()
    assert 'grey-images' in (run.path/'audit.json').read_text() and run.config['model']['grey'] is True


def test_cached_features_of_grey_draws_are_not_those_without(albums, tiny, tmp_path):
    from fastsmile.training.features import feature_cache_file
    config = replace(tiny, freeze='head', views='2', cache='disk')
    data, files = audit_and_split(read_source(albums[.5], config), config), set()
    for colour in ('auto', 'keep'):
        learn = learner(data, replace(config, colour=colour), tmp_path)
        files.add(feature_cache_file(learn.model, learn.dls, 'fp32', (2, 'light', 1)))
    assert len(files) == 2 and None not in files
