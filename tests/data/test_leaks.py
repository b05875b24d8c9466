"Facts of the files that tell the class are a finding; facts that do not are none."
import io

import numpy as np
import pandas as pd
import pytest
from conftest import folder
from PIL import Image

from fastsmile.config.fields import DataOptions, SourceOptions
from fastsmile.data.audit import run_audit
from fastsmile.data.leaks import leak_finding, score_fact
from fastsmile.data.source import read_source


def image(rng, colour=True, side=24, fmt='PNG', light=0) -> bytes:
    pixels = (rng.integers(0, 160, (side, side, 3)) + light).astype(np.uint8)
    if not colour: pixels = np.repeat(pixels[..., :1], 3, -1)
    buf = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(buf, fmt)
    return buf.getvalue()


def leaks(tmp_path, smile: dict, other: dict, share=0.9, sub='', n=60):
    "The rows of the finding for class folders, where `share` of each class has its own kind of file"
    rng, files = np.random.default_rng(0), {}
    for label, own, others in (('smile', smile, other), ('no', other, smile)):
        for i in range(n):
            kind = own if rng.random() < share else others
            ext = 'jpg' if kind.get('fmt') == 'JPEG' else 'png'
            site = f'{"a" if kind is smile else "b"}/' if sub else ''
            files[f'{site}{label}/{label}{i}.{ext}'] = image(rng, **kind)
    audited = run_audit(read_source(folder(tmp_path/'s', files), SourceOptions(layout='folders')), DataOptions(), workers=1)
    return [r['why'] for f in audited.findings if f.kind == 'label-leak' for r in f.rows]


@pytest.mark.parametrize('smile, other, word', [
    (dict(colour=True), dict(colour=False), 'colour tells the class'),
    (dict(side=24), dict(side=40), 'the size in pixels tells the class'),
    (dict(fmt='PNG'), dict(fmt='JPEG'), 'the file format tells the class'),
    (dict(light=0), dict(light=80), 'brightness tells the class')])
def test_each_fact_is_found_and_only_where_it_tells(tmp_path, smile, other, word):
    found = leaks(tmp_path/'a', smile, other)
    assert any(word in why for why in found)
    assert not leaks(tmp_path/'b', smile, other, share=0.5)


def test_colour_is_said_with_its_shares(tmp_path):
    (why,) = (w for w in leaks(tmp_path, dict(colour=True), dict(colour=False)) if w.startswith('colour'))
    assert '% of ' in why and 'of the others' in why and 'guessing scores 0.50' in why


def test_folders_tell_only_beyond_the_class(tmp_path):
    rows = pd.DataFrame(dict(path=[f'{"a" if i % 2 else "b"}/x{i}.png' for i in range(80)], label=['smile' if i % 2 else 'no' for i in range(80)], group=''))
    info = pd.DataFrame(dict(chroma=0., format='PNG', mode='L', width=9, height=9, bytes=9, mean=9.), index=pd.Index(rows.path, dtype=object))
    assert [r['why'].split(' tells')[0] for r in leak_finding(rows, info, 'csv').rows] == ['the folder']
    assert not leak_finding(rows, info, 'folders').rows  # there the folder is the class


def test_rows_of_one_person_do_not_vouch_for_each_other():
    "Each person has a width of their own, which tells the class of rows of the same person alone"
    rng = np.random.default_rng(0)
    person = np.arange(60).repeat(20)
    labels, width = np.where(rng.random(60) < .5, 'smile', 'no')[person], rng.normal(size=60)[person]
    alone = score_fact(width[:, None], labels, np.full(1200, ''))
    grouped = score_fact(width[:, None], labels, person.astype(str))
    assert alone.tells and not grouped.tells


def test_few_rows_and_one_class_are_no_finding(tmp_path):
    assert not leaks(tmp_path, dict(colour=True), dict(colour=False), share=1, n=12)


def test_on_real_faces(shared):
    source = read_source(shared/'data'/'smiles.zip', SourceOptions(label_col='label', group_col='person'))
    few = source.kept.sample(800, random_state=0).reset_index(drop=True)
    from fastsmile.data.scan import scan_images
    info = scan_images(source.reader, few.path.tolist(), workers=1).info
    assert (info.chroma == 0).all() and not leak_finding(few, info, source.kind).rows
