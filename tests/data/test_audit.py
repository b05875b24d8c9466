"Duplicates, the cleaning plan, the audit's page: what the notebooks do not show."
import csv
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import folder, picture
from forked import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastsmile.reports.audit import audit
from fastsmile.data.findings import odd_images
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.core.files import read_json
from fastsmile.data.audit import audit_and_split, remaining_classes, run_audit
from fastsmile.data.duplicates import find_look_alikes, near_groups
from fastsmile.data.scan import IMAGE_HASHES, pack_bits
from fastsmile.data.readers import FolderReader
from fastsmile.config.commands import AuditConfig, SampleConfig
from fastsmile.config.fields import DataOptions
from fastsmile.config.fit import FitConfig
from fastsmile.data.plan import PLAN_COLUMNS, read_plan
from fastsmile.data.sample import sample
from fastsmile.data.scan import ImageScanner, scan_images
from fastsmile.data.splits import assign_splits, stratified_group_split, weaker_split_rows
from fastsmile.data.source import COLUMN_OPTIONS, read_source

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


def canonical(groups) -> list:
    "Groups as sets of rows, whatever their numbers"
    return sorted(tuple(np.flatnonzero(groups == g)) for g in np.unique(groups))


@pytest.mark.parametrize('seed', [3, 4])
def test_the_audit_finds_what_was_planted_and_nothing_else(tmp_path, seed):
    where = sample(tmp_path/'s', SampleConfig(n=200, seed=seed))
    done, planted = audit(where, AuditConfig(out=str(tmp_path/'a'))), read_json(where/'flaws.json')
    stem = lambda paths: tuple(sorted(Path(p).stem for p in paths))  # noqa: E731
    kinds = ('exact-duplicate', 'near-duplicate', 'conflicting-label', 'split-leak')
    for kind in kinds:
        assert sorted(stem(g) for f in done.findings if f.kind == kind for g in f.groups) == sorted(stem(x['images']) for x in planted if x['kind'] == kind)
    for kind in ('unreadable', 'missing-image', 'image-without-row', 'wrong-extension'):
        assert [stem([r['path']]) for f in done.findings if f.kind == kind for r in f.rows] == [stem(x['images']) for x in planted if x['kind'] == kind]
    variants = next(f for f in done.findings if f.kind == 'label-variant')
    assert sum(len(r['why'].split(', ')) - 1 for r in variants.rows) >= 1
    assert {f.kind for f in done.findings} == {x['kind'] for x in planted} | {'imbalance'}
    assert {p.name for p in done.path.iterdir()} == {'audit.html', 'audit.json', 'plan.csv', 'table.csv'}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 120), st.integers(0, 24), st.sampled_from([64, 128, 256]))
def test_groups_are_those_of_brute_force(seed, n, near, bits):
    rng = np.random.default_rng(seed)
    h = rng.random((n, bits)) < rng.random(bits)  # some bits hardly vary, as in real hashes
    k = n // 2
    h[:k] = h[rng.integers(0, n, k)] ^ (rng.random((k, bits)) < near / bits / 1.5)
    words = pack_bits(h)
    links = np.bitwise_count(words[:, None] ^ words[None]).sum(-1) <= near
    from scipy.sparse.csgraph import connected_components
    assert canonical(near_groups(words, near)) == canonical(connected_components(links)[1])


def test_groups_among_six_thousand_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (6000, 4), dtype=np.uint64)
    flips = np.zeros((2000, 256), bool)
    for row in flips: row[rng.choice(256, rng.integers(0, 20), replace=False)] = True
    words[-2000:] = words[:2000] ^ pack_bits(flips)
    words[100:400] = words[100]
    def hits(i): return i + np.flatnonzero(np.bitwise_count(words[i:] ^ words[i]).sum(1) <= 16)
    pairs = [np.stack([np.full(len(j), i), j], 1) for i in range(len(words)) if len(j := hits(i))]
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    a, b = np.concatenate(pairs).T
    assert canonical(near_groups(words, 16)) == canonical(connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(6000, 6000)))[1])


def test_options_that_find_look_alikes(faces, tmp_path):
    from io import BytesIO

    from PIL import Image
    img = Image.open(min((faces/'happy_images').glob('*.jpg'))).convert('RGB')
    def png(i):
        buf = BytesIO()
        i.save(buf, 'PNG')
        return buf.getvalue()
    noisy = Image.fromarray((np.asarray(img) * 0.8 + np.random.default_rng(0).normal(0, 12, (*img.size[::-1], 3))).clip(0, 255).astype(np.uint8))
    root = folder(tmp_path/'f', {'a.png': png(img), 'm.png': png(img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), 'n.png': png(noisy), 'o.png': picture()})
    def linked(near=16, **ask):
        seen = scan_images(FolderReader(root), ['a.png', 'm.png', 'n.png', 'o.png'], ImageScanner(**ask))
        look = find_look_alikes(seen, near)[1]
        return ''.join(n[0] for n, g in zip(seen.info.index, look) if g == look[0])
    assert linked(near=0) == 'a' and linked(near=32) == 'an' and 'm' in linked(mirror=True)
    for kind, h in IMAGE_HASHES.items(): assert linked(h.max_distance, hash=kind)[0] == 'a'
    hashes = {kind: scan_images(FolderReader(root), ['a.png'], ImageScanner(kind)).hashes.tobytes() for kind in IMAGE_HASHES}
    assert len(set(hashes.values())) == len(IMAGE_HASHES)


def test_colour_tells_pictures_apart(tmp_path):
    root = folder(tmp_path/'f', {f'{c}/{i}.png': picture(c, seed=i) for c in ('red', 'blue') for i in range(2)})
    assert not any(f.groups for f in run_audit(read_source(root), DataOptions()).findings)


def test_the_same_file_again_and_a_file_with_two_labels(tmp_path):
    files = {f'{i}.png': picture(seed=i) for i in range(6)}
    root = folder(tmp_path/'f', files | {'l.csv': 'id,label\n0,a\n0,a\n1,a\n1,b\n2,b\n3,b\n4,a\n5,\n'})
    t = run_audit(read_source(root), DataOptions()).table
    assert t.reason.str.split(':').str[0].tolist() == ['', 'the same row again', 'conflicting-label', 'conflicting-label', '', '', '', 'unlabelled']
    text = 'path;action;reason;group;new_label\n1.png;keep;;;B \n5.png;keep;;;A\n2.png;drop;;;\n3.png;keep;;x;\n4.png;keep;;x;\n'
    plan = folder(root, {'plan.csv': text})/'plan.csv'
    t = run_audit(read_source(root, DataOptions(labels=str(root/'l.csv'))), DataOptions(plan=str(plan))).table
    assert t.label.tolist()[2:4] == ['b', 'b'] and t.reason.tolist()[2:4] == ['', 'the same row again']
    assert t.label.iloc[7] == 'a' and t.reason.iloc[7] == '' and t.reason.iloc[4] == 'dropped by the plan'
    assert t.group.iloc[5] == t.group.iloc[6] != ''


@pytest.mark.parametrize('text, why', [
    ('name,what\na,b\n', 'is not a cleaning plan'), ('path,action\n0.png,burn\n', "the action 'burn' of 0.png"), ('path,action\nx,keep\n', 'not in the source'),
    ('path,action\n0.png,keep\n0.png,drop\n', 'has two rows for'), ('path,action,new_label\n0.png,keep,grin\n', 'no row of the source has'),
    ('path,action\nbad.png,keep\n', 'cannot be read: zero bytes'), ('path,action\n1.png,keep\n', 'two labels'),
    ('path,action\n9.png,keep\n', '9.png, which has no label'), ('path,action,new_label\n1.png,drop,b\n', 'gives 1.png the label b, and drops it')])
def test_plans_that_cannot_be_obeyed(tmp_path, text, why):
    files = {f'{i}.png': picture(seed=i) for i in (0, 1, 2, 3, 9)} | {'bad.png': b''}
    root = folder(tmp_path/'f', files | {'l.csv': 'id,label\n0,a\n1,a\n1,b\n2,b\n3,b\nbad,a\n9,\n'})
    plan = folder(tmp_path, {'plan.csv': text})/'plan.csv'
    with pytest.raises(SmileError, match=why): run_audit(read_source(root), DataOptions(plan=str(plan)))


def test_a_plan_may_take_a_class_away_and_a_row_out_of_a_class_that_is_left_out(tmp_path):
    "A typing mistake is a class of one picture; its row gets the right label"
    files = {f'{i}.png': picture(seed=i) for i in range(9)}
    root = folder(tmp_path/'f', files | {'l.csv': 'id,label\n' + ''.join(f'{i},{"ab"[i % 2]}\n' for i in range(8)) + '8,aa\n'})
    plan = str(folder(tmp_path, {'plan.csv': 'path,action,new_label\n8.png,keep,a\n0.png,drop,\n'})/'plan.csv')
    made = run_audit(read_source(root), DataOptions(plan=plan))
    assert remaining_classes(made.table, ['a', 'aa', 'b'], plan) == ['a', 'b']
    opts = DataOptions(plan=plan, drop_class=('aa',))
    assert run_audit(read_source(root, opts), opts).table.set_index('path').loc['8.png', ['label', 'reason']].tolist() == ['a', '']
    gone = run_audit(read_source(root, replace(opts, plan=None)), replace(opts, plan=None)).table
    assert gone.reason.iloc[-1] == 'class left out'
    with pytest.raises(SmileError, match='No image of aa is left: class left out'): remaining_classes(gone, ['a', 'aa', 'b'], None)


def test_findings_say_what_a_plan_decided_otherwise(tmp_path):
    files = {f'{i}.png': picture(seed=i) for i in range(4)}
    root = folder(tmp_path/'f', files | {'l.csv': 'id,label\n0,a\n1,a\n1,b\n2,b\n3,\n'})
    plan = str(folder(tmp_path, {'plan.csv': 'path,action,new_label\n1.png,keep,b\n3.png,drop,\n'})/'plan.csv')
    said = [{f.kind: f.action for f in run_audit(read_source(root), DataOptions(plan=p)).findings} for p in (None, plan)]
    assert said[1]['conflicting-label'] == f"{said[0]['conflicting-label']}; 1 of its images as the plan says"
    assert said[1]['unlabelled'] == said[0]['unlabelled']


def test_options_that_say_nothing_about_the_source(tmp_path):
    root = folder(tmp_path/'f', {f'{c}/{i}.png': picture(seed=i) for c in 'ab' for i in range(2)})
    table = folder(tmp_path/'t', {f'{i}.png': picture(seed=i) for i in range(4)} | {'l.csv': 'id,label\n0,a\n1,b\n2,a\n3,b\n'})/'l.csv'
    pixels, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array(['a', 'b', 'a', 'b'])
    np.save(tmp_path/'x.npy', pixels)
    np.save(tmp_path/'x_labels.npy', labels)
    np.savez(tmp_path/'x.npz', images=pixels, labels=labels)
    for source, options, said in [*((root, {col: 'x'}, 'with class folders') for col in COLUMN_OPTIONS),
                                  *((tmp_path/name, {col: 'x'}, 'with an array') for col in COLUMN_OPTIONS for name in ('x.npy', 'x.npz')),
                                  (tmp_path/'x.npz', dict(labels=str(table)), 'holds its labels'),
                                  (tmp_path/'x.npz', dict(raw_shape='8,8,3'), 'holds its labels'),
                                  (table, dict(labels=str(table)), 'with a table as the source'),
                                  (root, dict(layout='folders', labels=str(table)), 'with --layout folders'),
                                  (table, dict(layout='folders'), 'is read as a table'), (tmp_path/'x.npy', dict(layout='csv'), 'is read as an array')]:
        with pytest.raises(OptionError, match=said): read_source(source, DataOptions(**options))
    for source in (root, table, tmp_path/'x.npy', tmp_path/'x.npz'): assert len(read_source(source).kept) == 4


def test_a_folder_alone(tmp_path):
    with pytest.raises(SmileError, match='are in only, one folder tells nothing apart, and no table is next to it'):
        read_source(folder(tmp_path/'g', {'only/a.png': picture()}))


def test_the_page_names_the_command_that_reads_the_source_as_it_did(tmp_path):
    root = folder(tmp_path/'f', {f'{i}.png': picture(seed=i) for i in range(4)} | {'l.csv': 'who,what,id\nx,a,0\ny,b,1\nx,a,2\ny,b,3\n'})
    made = audit(root, AuditConfig(label_col='what', image_col='id', near=9, out=str(tmp_path/'o')))
    assert f'fastsmile fit {root} --image-col id --label-col what --near 9 --plan plan.csv' in (made.path/'audit.html').read_text()


def test_a_plan_that_is_not_there():
    with pytest.raises(SmileError, match='does not exist'): read_plan('nowhere.csv')
    with pytest.raises(OptionError, match='from 0 to 32'): DataOptions(near=99)


def test_odd_pictures(tmp_path):
    from io import BytesIO

    from PIL import Image
    rng = np.random.default_rng(0)
    def save(img):
        buf = BytesIO()
        img.save(buf, 'PNG')
        return buf.getvalue()
    noise = [Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((90, 90)) for _ in range(120)]
    slope = Image.linear_gradient('L').convert('RGB').resize((90, 90)).rotate(30, Image.Resampling.BICUBIC)
    files = {f'{i}.png': save(n) for i, n in enumerate(noise)}
    files |= {'dark.png': save(noise[0].point(lambda v: v * 0.15)), 'bright.png': save(noise[0].point(lambda v: 215 + v * 0.15)),
              'flat.png': save(noise[0].point(lambda v: 110 + v * 0.14)), 'blank.png': save(Image.new('RGB', (90, 90), 'grey')),
              'blurred.png': save(slope.crop((20, 20, 70, 70))),
              'wide.png': save(noise[2].resize((400, 90))),
              'small.png': save(noise[3].resize((20, 20))), 'large.png': save(noise[4].resize((900, 900))), 'cmyk.tif': b''}
    buf = BytesIO()
    noise[5].convert('CMYK').save(buf, 'TIFF')
    root = folder(tmp_path/'f', files | {'cmyk.tif': buf.getvalue()})
    found = {r['path']: r['why'] for r in odd_images(scan_images(FolderReader(root), FolderReader(root).names()).info)}
    for name, why in {'dark.png': 'dark', 'bright.png': 'bright', 'flat.png': 'low contrast', 'blank.png': 'near-blank', 'blurred.png': 'blurred',
                      'wide.png': 'odd shape (400x90)', 'small.png': 'small (20x20)', 'large.png': 'large (900x900)', 'cmyk.tif': 'odd mode (CMYK)'}.items():
        assert why in found[name], (name, found.get(name))
    assert len(found) == 9


labels = st.lists(st.sampled_from(['smile', ' Smile', 'NOT smile', 'not  smile', '', 'nan', 'ﬁne', 'fine', 'ＳＭＩＬＥ', '0', '00']), min_size=2, max_size=30)


@settings(max_examples=25, deadline=None)
@given(labels, st.sampled_from([',', ';', '\t']), st.booleans())
def test_rows_reconcile_and_labels_are_one_class(tmp_path_factory, typed, sep, bom):
    root = tmp_path_factory.mktemp('r')
    rows = [f'{i % 20}{sep}{t}' for i, t in enumerate(typed)]
    folder(root, {f'{i}.png': picture(seed=i) for i in range(18)} | {'l.csv': ('\ufeff' if bom else '') + f'id{sep}label\n' + '\n'.join(rows) + '\n'})
    try: looked = run_audit(read_source(root, DataOptions(image_col='id', label_col='label')), DataOptions())
    except SmileError as e:
        assert 'no labelled' in e.message or 'two' in e.message or 'has a label' in e.message
        return
    t = looked.table
    assert len(t) == len(typed)
    used = t[t.reason == '']
    assert len(used) + t.reason.ne('').sum() == len(typed) and not used.duplicated('path').any()
    keys = {c: ' '.join(c.casefold().split()) for c in used.label}
    assert len(set(keys.values())) == len(set(keys)) and '' not in keys and 'nan' not in keys
    assert {'0', '00'} & set(used.label) <= set(typed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 25)), min_size=1, max_size=120), st.integers(0, 9))
def test_splits_are_disjoint_by_group(rows, seed):
    y, groups = [r[0] for r in rows], ['' if r[1] > 20 else str(r[1]) for r in rows]
    split = pd.Series(stratified_group_split(y, groups, dict(train=0.6, valid=0.2, test=0.2), seed))
    known = pd.Series(groups) != ''
    assert split.isin(['train', 'valid', 'test']).all()
    assert (split[known].groupby(pd.Series(groups)[known]).nunique() == 1).all()


def test_the_fractions_of_the_face_property_report():
    rng = np.random.default_rng(0)
    y, groups = rng.integers(0, 2, 10_000), [f'{g}' for g in rng.integers(0, 6000, 10_000)]
    share = Counter(stratified_group_split(y, groups, dict(train=0.595, valid=0.105, test=0.3), 0))
    assert all(abs(share[k] / 10_000 - v) < 0.002 for k, v in dict(train=0.595, valid=0.105, test=0.3).items())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['train', 'valid', 'test', '']), st.sampled_from(['', 'x', 'y', 'z'])), min_size=1, max_size=40))
def test_who_gave_way_leaves_no_straddling_group(rows):
    split, group = ([r[i] for r in rows] for i in (0, 1))
    gone = weaker_split_rows(split, group)
    left = pd.DataFrame(dict(s=split, g=group))[~gone]
    left = left[(left.g != '') & (left.s != '')]
    assert left.empty or left.groupby('g').s.nunique().max() == 1
    assert not any(g for g, s in zip(gone, split) if s == 'test')


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['train', 'valid', 'test', '']), st.sampled_from(['', 'x', 'y', 'z'])), max_size=20))
def test_a_row_without_a_side_follows_those_of_its_group_that_stay(rows):
    sure = [(s, '') for s in ('train', 'valid', 'test') for _ in range(4)]  # so that every side has both classes
    frame = pd.DataFrame([(s, g, 'ab'[i % 2]) for i, (s, g) in enumerate(sure + rows)], columns=['split', 'group', 'label'])
    split, gone, _ = assign_splits(frame, 0.1, 0.2, 0, 0)
    left = pd.DataFrame(dict(s=split, g=frame.group))[~gone]
    assert left[left.g != ''].groupby('g').s.nunique().le(1).all() and (left.s != '').all()


@pytest.fixture(scope='session')
def half_labelled(tmp_path_factory):
    "Class folders, a folder of near copies without a label, and two other images in it"
    rng = np.random.default_rng(0)
    def png(pixels): out = io.BytesIO(); Image.fromarray(pixels).save(out, 'PNG'); return out.getvalue()
    def shade(colour): return png(np.full((48, 48, 3), colour, np.uint8) + rng.integers(0, 20, (48, 48, 3), dtype=np.uint8))
    files = {f'{c}/{i}.png': shade(60 + 90 * (c == 'yes')) for c in ('no', 'yes') for i in range(10)}
    files |= {f'unlabelled/{i:02}.png': shade((60, 150)[i % 2]) for i in range(12)}
    stripes = np.where(np.indices((48, 48)).sum(0)[..., None] % 12 < 6, 250, 5).astype(np.uint8).repeat(3, 2)
    red = np.stack([np.full((48, 48), v, np.uint8) for v in (250, 0, 0)], 2)
    return folder(tmp_path_factory.mktemp('half')/'s', files | {'unlabelled/red.png': png(red), 'unlabelled/stripes.png': png(stripes)})


def test_next_is_what_is_unlike_the_labelled_or_what_a_model_is_least_sure_of(half_labelled, tmp_path):
    from fastsmile.inference.predict import load_model
    from fastsmile.models.bundle import save_bundle
    from fastsmile.models.factory import build_network, make_spec
    from fastsmile.models.spec import Model, ModelMetadata
    def chosen(**options):
        html = (audit(half_labelled, AuditConfig(out=str(tmp_path/str(len(options))), next=3, **options)).path/'audit.html').read_text()
        part = html[html.index('<h2 id="next">'):html.index('<h2 id="findings">')]
        return re.findall(r"class=\"card\" tabindex=\"-1\" data-path='\"([^\"]+)\"'", part)
    assert set(chosen()[:2]) == {'unlabelled/red.png', 'unlabelled/stripes.png'} and len(chosen(hash='dhash')) == 3
    spec = make_spec('smilepixels', ['no', 'yes'], size=16)
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0.] * 2, [0.] * 2, 'argmax'), build_network(spec)), tmp_path/'model')
    names = sorted(p.relative_to(half_labelled).as_posix() for p in (half_labelled/'unlabelled').iterdir())
    frame = load_model(tmp_path/'model').predict([str(half_labelled/n) for n in names])
    margin = dict(zip(names, (frame.p_no - frame.p_yes).abs()))
    got = chosen(model=str(tmp_path/'model'), near=0)
    assert got == sorted(names, key=margin.get)[:3]


def test_what_next_and_its_model_need(tmp_path):
    labelled = folder(tmp_path/'f', {f'{c}/{i}.png': picture(seed=i + 9 * (c == 'b')) for c in 'ab' for i in range(6)})
    with pytest.raises(SmileError, match='every image that can be read has a label'): audit(labelled, AuditConfig(out=str(tmp_path/'a'), next=5))
    with pytest.raises(SmileError, match='--model'): AuditConfig(model='runs/x')


def test_a_plan_labels_images_that_have_no_row(half_labelled, tmp_path):
    "In fit as in audit: only those that the plan names"
    plan = tmp_path/'plan.csv'
    plan.write_text('path,action,reason,group,new_label\nunlabelled/03.png,keep,,,yes\nunlabelled/red.png,keep,,,no\n')
    data = audit_and_split(read_source(half_labelled), FitConfig(plan=str(plan), valid=0.2, test=0.2))
    rows = data.rows.set_index('path')
    assert len(rows) == 22 and rows.label['unlabelled/03.png'] == 'yes' and rows.split['unlabelled/red.png']
    plan.write_text('path,action,reason,group,new_label\nunlabelled/99.png,keep,,,yes\n')
    with pytest.raises(SmileError, match='not in the source'): run_audit(read_source(half_labelled), DataOptions(plan=str(plan)))


def label_by_keys(page, tmp_path):
    "Keys on a page of `--next`: a label goes on to the next image, undo takes it back; gives what the download holds"
    files = {f'{c}/{i}.png': picture(seed=i + 20 * (c == 'yes')) for c in ('no', 'yes') for i in range(5)}
    where = folder(tmp_path/'next', files | {f'unlabelled/{i}.png': picture(seed=50 + i) for i in range(4)})
    done = audit(where, AuditConfig(out=str(tmp_path/'b'), next=4))
    page.goto((done.path/'audit.html').as_uri())
    names = [json.loads(n) for n in page.locator('#next + p + .many .card').evaluate_all('c => c.map(x => x.dataset.path)')]
    assert len(names) == 4 and '1 no' in page.locator('.keys').inner_text() and page.locator('#undo').is_disabled()
    def current(): return json.loads(page.locator('.card.current').get_attribute('data-path'))
    for key in '122': page.keyboard.press(key)
    assert current() == names[3] and '3 images changed' in page.locator('#changes').text_content()
    page.keyboard.press('u')
    assert current() == names[2] and '2 images changed' in page.locator('#changes').text_content()
    page.keyboard.press('1')
    page.keyboard.press('k')  # what has no label cannot be kept
    page.keyboard.press('Control+z')
    page.keyboard.press('ArrowLeft')
    assert current() == names[2] and page.locator('#next + p + .many .card.changed').count() == 3
    with page.expect_download() as got: page.click('#download')
    got.value.save_as(tmp_path/'labels.csv')
    table = run_audit(read_source(where), DataOptions(plan=str(tmp_path/'labels.csv'))).table.set_index('path')
    assert [table.label[n] for n in names[:3]] == ['no', 'yes', 'no'] and table.reason[names[3]] == 'unlabelled'


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine')
def test_a_conflict_settled_in_the_page_reaches_fit(faces, tmp_path):
    sync_api = pytest.importorskip('playwright.sync_api')
    done = audit(faces, AuditConfig(out=str(tmp_path/'a')))
    pair = next(f for f in done.findings if f.kind == 'conflicting-label').groups[0]
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        page, said, asked = browser.new_page(), [], []
        page.on('console', lambda m: said.append(m.text))
        page.on('pageerror', lambda e: said.append(str(e)))
        page.on('request', lambda r: asked.append(r.url))
        page.goto((done.path/'audit.html').as_uri())
        other = next(c for c in ('negative smile', 'NOT smile') if c != done.table.set_index('path').label[pair[0]])
        page.locator(f"select.label[data-path='{json.dumps(pair[0])}']").select_option(other)
        assert '1 image changed' in page.locator('#changes').text_content()
        with page.expect_download() as got: page.click('#download')
        got.value.save_as(tmp_path/'plan.csv')
        assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
        label_by_keys(page, tmp_path)
        browser.close()
    assert not said and all(u.startswith(('file:', 'data:', 'blob:')) for u in asked)
    rows = list(csv.DictReader((tmp_path/'plan.csv').open(newline='')))
    assert list(rows[0]) == PLAN_COLUMNS and len(rows) == len(done.plan)
    t = run_audit(read_source(faces), DataOptions(plan=str(tmp_path/'plan.csv'))).table.set_index('path')
    assert t.reason[pair[0]] == '' and t.reason[pair[1]].startswith('conflicting-label')
    assert t.label[pair[0]] == other
    assert (t.reason == '').sum() == (done.table.reason == '').sum() + 1


def test_labels_and_names_that_attack_the_page_are_text(tmp_path):
    evil = '<script>alert(1)</script>'
    files = {f'{i}.png': picture(seed=i) for i in range(8)} | {'<img src=x onerror=alert(2)>.png': picture(seed=3)}
    rows = ''.join(f'{i},{(evil, "</script>b")[i % 2]}\n' for i in range(8))
    root = folder(tmp_path/'f', files | {'l.csv': f'id,label\n{rows}<img src=x onerror=alert(2)>,a\n'})
    html = (audit(root, AuditConfig(out=str(tmp_path/'a'))).path/'audit.html').read_text()
    assert evil not in html and '<img src=x' not in html and html.count('</script>') == 3


def test_fail_on_and_json_from_the_shell(faces, tmp_path):
    def shell(*args): return run_python(['-m', 'fastsmile', 'audit', faces, *args], tmp_path)
    r = shell('--json', '--fail-on', 'error')
    assert r.returncode == 1 and json.loads(r.stdout)['rows_in'] == json.loads(r.stdout)['rows_kept'] + json.loads(r.stdout)['rows_set_aside']
    assert shell().returncode == 0 and len(list((tmp_path/'audits').iterdir())) == 2


def test_suspect_labels_come_from_out_of_fold_predictions(tmp_path):
    root = folder(tmp_path/'f', {f'{c}/{i}.png': picture(seed=i + 50 * (c == 'b')) for c in 'ab' for i in range(20)})
    made = pd.DataFrame([dict(path=f'{c}/{i}.png', label=c, p_a=0.9 if (c == 'a') != (i == 7) else 0.1) for c in 'ab' for i in range(20)])
    made.assign(p_b=1 - made.p_a).to_csv(folder(tmp_path, {'run/x': ''})/'run/predictions_oof.csv', index=False)
    done = audit(root, AuditConfig(out=str(tmp_path/'a'), suspects=str(tmp_path/'run')))
    found = next(f for f in done.findings if f.kind == 'suspect-label')
    assert sorted(r['path'] for r in found.rows) == ['a/7.png', 'b/7.png'] and (done.table.reason == '').all()
    assert not any(f.kind == 'suspect-label' for f in audit(root, AuditConfig(out=str(tmp_path/'b'))).findings)
    with pytest.raises(SmileError, match='predictions_oof'): audit(root, replace(AuditConfig(), suspects=str(root)))


@pytest.mark.parametrize('packed', [False, True])
def test_pictures_without_a_label_go_to_a_list_that_predict_reads(tmp_path, packed, monkeypatch, capsys):
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    from fastsmile.inference.inputs import open_inputs
    rows = [('a/1.png', 'yes'), ('a/2.png', 'no'), ('a/3.png', ''), ('4.png', 'NaN'), ('5.png', 'yes')]
    where = folder(tmp_path/'s', {n: picture(seed=i) for i, (n, _) in enumerate(rows)})
    folder(tmp_path, {'labels.csv': 'image,label\n' + ''.join(f'{n},{c}\n' for n, c in rows)})
    if packed: where = Path(shutil.make_archive(str(tmp_path/'z'), 'zip', where))
    done = audit(where, AuditConfig(labels=str(tmp_path/'labels.csv'), out=str(tmp_path/'a')))
    assert '2 images without a label can be predicted: fastsmile predict' in ' '.join(capsys.readouterr().err.split())
    made = open_inputs(done.path/'unlabelled.txt', root=str(where))
    names = list(made.names)
    assert names == ['4.png', 'a/3.png'] and all(made.reader.read_image(n).size == (24, 24) for n in names)
    whole = audit(where, AuditConfig(labels=str(tmp_path/'labels.csv'), drop_class=('no',), out=str(tmp_path/'b')))
    assert (whole.path/'unlabelled.txt').read_text() == '4.png\na/3.png\n'
