"Which images are one picture, and which only look alike: honest pairs of a face with two mouths, copies, hostile shapes."
import io

import numpy as np
import pandas as pd
import pytest
from conftest import folder, honest_pairs, picture, png, saved_again
from PIL import Image, ImageOps

from fastsmile.config.commands import AuditConfig
from fastsmile.config.fields import DataOptions, SourceOptions
from fastsmile.core.files import write_json
from fastsmile.data.audit import run_audit
from fastsmile.data.duplicates import CopyIndex, find_look_alikes, near_rows_of_all, picture_groups, same_picture
from fastsmile.data.plan import read_plan
from fastsmile.data.readers import FolderReader
from fastsmile.data.scan import ImageScanner, pack_bits, scan_images
from fastsmile.data.source import read_source, used_rows
from fastsmile.data.splits import TrainingSource, find_training_copies, training_fingerprints
from fastsmile.reports.audit import audit


def opened(data): return Image.open(io.BytesIO(data)).convert('RGB')


@pytest.mark.parametrize('side', [96, 128, 160])
def test_another_mouth_is_another_picture_and_a_copy_is_not(side):
    for neutral, smiling in honest_pairs(side, 20):
        assert not same_picture(neutral, smiling) and not same_picture(opened(saved_again(neutral, 90)), opened(saved_again(smiling, 75)))
        smaller = neutral.resize((side * 3 // 4, side * 3 // 4))
        for copy in (opened(saved_again(neutral, 60)), opened(saved_again(neutral, 80, 'WEBP')), opened(png(neutral)), smaller):
            assert same_picture(neutral, copy) and same_picture(copy, neutral)
        assert not same_picture(smiling, smaller)


def with_mouth_of(one, other):
    "A photograph with the mouth of another, as bright and as contrasted as its own"
    a, b = (np.asarray(img.resize(one.size, Image.Resampling.LANCZOS), dtype=float) for img in (one, other))
    y, x = np.mgrid[:one.height, :one.width]
    mask = np.exp(-(((x / one.width - .5) / .19)**2 + ((y / one.height - .76) / .10)**2)**2)[..., None]
    inside = mask[..., 0] > .3
    b = (b - b[inside].mean(0)) / (b[inside].std(0) + 1e-3) * a[inside].std(0) + a[inside].mean(0)
    return Image.fromarray((a * (1 - mask) + b * mask).clip(0, 255).astype(np.uint8))


def in_frame(img, frame, k):
    "The photograph in a frame that is `k` times as wide"
    wide = frame.resize((round(img.width * k), round(img.height * k)))
    wide.paste(img, ((wide.width - img.width) // 2, (wide.height - img.height) // 2))
    return wide


@pytest.mark.parametrize('k', [1, 2, 4])
def test_photographs_with_another_mouth(shared, k):
    "Of 36 photographs with another mouth most look alike, the more the wider the frame; none is the same picture, and each copy is"
    source = read_source(shared/'data'/'facial_expressions.zip', SourceOptions(labels=str(shared/'data'/'legend.csv')))
    images = [source.reader.read_image(p) for p in source.kept.path[::300]]
    images = [img for img in images if min(img.size) >= 90][:36]
    alike = 0
    for img, other, frame in zip(images, images[1:], images[2:]):
        one, two = in_frame(img, frame, k), in_frame(with_mouth_of(img, other), frame, k)
        one, two, again = opened(saved_again(one, 90)), opened(saved_again(two, 85)), opened(saved_again(one, 60))
        assert not same_picture(one, two) and same_picture(one, again)
        assert same_picture(one, one.resize((one.width * 3 // 4, one.height * 3 // 4), Image.Resampling.LANCZOS))
        bits = ImageScanner().hash_and_thumbnail
        from fastsmile.data.scan import _grey_64x64
        a, b = (bits(x, _grey_64x64(x))[0] for x in (one, two))
        alike += np.bitwise_count(a ^ b).sum() <= 16
    assert alike >= (5 if k == 1 else 24)


@pytest.mark.parametrize('a,b,same', [
    ((80, 80), (80, 80), True), ((160, 80), (80, 160), False), ((1, 1), (1, 1), True), ((3, 400), (3, 400), True),
    ((400, 300), (100, 75), True), ((400, 300), (101, 75), True), ((400, 300), (110, 75), False), ((400, 300), (40, 30), False),
    ((64, 2000), (48, 1500), True)])
def test_sizes_and_shapes(a, b, same):
    img = Image.fromarray((np.add.outer(np.arange(100), np.arange(100)) % 200).astype(np.uint8)).convert('RGB').resize((600, 600), Image.Resampling.BICUBIC)
    one = img.resize(a)
    two = one if a == b else one.resize(b, Image.Resampling.LANCZOS)
    assert same_picture(one, two) is same and same_picture(two, one) is same


def test_blank_pictures_are_one_and_noise_is_not():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)) for _ in range(2)]
    assert same_picture(Image.new('RGB', (90, 90), 'grey'), Image.new('RGB', (90, 90), (130, 130, 130)))
    assert not same_picture(*noise) and not same_picture(Image.new('RGB', (90, 90)), Image.new('RGB', (90, 90), 'white'))


@pytest.fixture(scope='module')
def honest(tmp_path_factory):
    "70 faces before a smile and during it, and three pictures that have both labels: the same bytes, saved again, scaled"
    root = tmp_path_factory.mktemp('honest')
    files = {}
    for i, (neutral, smiling) in enumerate(honest_pairs(112, 70)):
        files |= {f'neutral/{i}.jpg': saved_again(neutral, 92), f'smile/{i}.jpg': saved_again(smiling, 92)}
    faces = [draw[0] for draw in honest_pairs(136, 3)]
    conflicts = [png(faces[0]), saved_again(faces[1], 60), saved_again(faces[2].resize((102, 102)), 80)]
    for i, (face, other) in enumerate(zip(faces, conflicts)):
        files |= {f'neutral/c{i}.png': png(face), f'smile/c{i}.{"png" if i == 0 else "jpg"}': other}
    return folder(root/'f', files)


def test_honest_pairs_keep_every_row(honest):
    "All 140 rows stay, look-alikes in one group; only the three pictures that have two labels conflict"
    done = run_audit(read_source(honest), DataOptions())
    found = {f.kind: f for f in done.findings}
    conflicts = [sorted(group) for group in found['conflicting-label'].groups]
    assert conflicts == [['neutral/c0.png', 'smile/c0.png'], ['neutral/c1.png', 'smile/c1.jpg'], ['neutral/c2.png', 'smile/c2.jpg']]
    used = used_rows(done.table)
    assert len(used) == 140 and used.label.value_counts().to_dict() == {'neutral': 70, 'smile': 70}
    alike = found['look-alike']
    assert alike.severity == 'warning' and len(alike.groups) > 30 and 'near-duplicate' not in found
    for group in alike.groups:
        rows = used[used.path.isin(group)]
        assert len(rows) == len(group) and rows.group.nunique() == 1 and rows.group.iloc[0] and set(rows.label) == {'neutral', 'smile'}


def test_the_page_and_the_plan_name_look_alikes(honest, tmp_path):
    done = audit(honest, AuditConfig(out=str(tmp_path/'a')))
    html, plan = (done.path/'audit.html').read_text(), read_plan(done.path/'plan.csv')
    assert 'images that look alike, with different labels' in html and (plan.reason == 'look-alike').sum() > 60
    assert (plan.action[plan.reason == 'look-alike'] == 'keep').all()
    again = run_audit(read_source(honest), DataOptions(plan=str(done.path/'plan.csv')))
    assert len(used_rows(again.table)) == 140


def test_look_alikes_never_end_up_in_two_splits(tmp_path):
    "Not by chance, and not as a source has them: the split with priority keeps its image"
    pairs = honest_pairs(160, 20, only_alike=True)
    files = {}
    for i, (neutral, smiling) in enumerate(pairs):
        files |= {f'train/no/{i}.png': png(neutral), f'test/yes/{i}.png': png(smiling)}
    for i in range(4): files |= {f'{split}/{label}/own{i}.png': picture(seed=10 * i + k, size=(64, 64))
                                 for k, (split, label) in enumerate([('train', 'yes'), ('train', 'no'), ('test', 'no')])}
    done = run_audit(read_source(folder(tmp_path/'f', files)), DataOptions())
    leak = next(f for f in done.findings if f.kind == 'split-leak')
    assert len(leak.groups) == len(pairs) and not any(f.kind in ('conflicting-label', 'look-alike') for f in done.findings)
    used = used_rows(done.table)
    assert {f'test/yes/{i}.png' for i in range(len(pairs))} <= set(used.path) and not any(f'train/no/{i}.png' in set(used.path) for i in range(len(pairs)))


def test_mirror_images_are_one_picture_on_request_alone(tmp_path):
    neutral, smiling = honest_pairs(160, 20, only_alike=True)[0]
    root = folder(tmp_path/'f', {'a.png': png(neutral), 'm.png': png(ImageOps.mirror(neutral)), 's.png': png(ImageOps.mirror(smiling))})
    def pictures(mirror):
        scan = scan_images(FolderReader(root), ['a.png', 'm.png', 's.png'], ImageScanner(mirror=mirror))
        exact, alike = find_look_alikes(scan, 16)
        a, m, s = picture_groups(scan, exact, alike, FolderReader(root))
        return len(set(alike)), a == m, a == s
    assert pictures(True) == (1, True, False) and pictures(False) == (2, False, False)


def test_an_image_that_vanishes_between_scan_and_comparison_is_no_copy(tmp_path):
    face = honest_pairs(96, 1)[0][0]
    root = folder(tmp_path/'f', {'a.png': png(face), 'b.jpg': saved_again(face, 80)})
    scan = scan_images(FolderReader(root), ['a.png', 'b.jpg'])
    exact, alike = find_look_alikes(scan, 16)
    assert len(set(picture_groups(scan, exact, alike, FolderReader(root)))) == 1
    (root/'b.jpg').unlink()
    assert len(set(picture_groups(scan, exact, alike, FolderReader(root)))) == 2


def test_a_thousand_look_alikes_decode_few(tmp_path):
    "Copies of one picture are compared once each; where thumbnails differ nothing is decoded"
    face = honest_pairs(96, 1)[0][0]
    root = folder(tmp_path/'f', {'0.png': png(face), '1.jpg': saved_again(face, 80)})
    scan = scan_images(FolderReader(root), ['0.png', '1.jpg'])
    n = 1000
    info = pd.concat([scan.info] * (n // 2)).set_axis([f'{i}' for i in range(n)])
    many = type(scan)(info, np.repeat(scan.hashes[:1], n, 0), np.repeat(scan.thumbnails[:1], n, 0))
    class Counted:
        read = 0
        def read_image(self, name):
            self.read += 1
            return face
    reader = Counted()
    assert len(set(picture_groups(many, np.arange(n), np.zeros(n, int), reader))) == 1 and reader.read <= n
    noise = np.random.default_rng(0).integers(0, 255, (n, 32, 32)).astype(np.uint8)
    reader = Counted()
    assert len(set(picture_groups(type(scan)(info, many.hashes, noise), np.arange(n), np.zeros(n, int), reader))) == n and reader.read == 0


@pytest.mark.parametrize('near', [0, 5, 16])
def test_near_rows_of_many_are_those_of_each(near):
    rng = np.random.default_rng(near)
    bits = rng.random((150, 256)) < 0.5
    other = np.concatenate([bits[:60] ^ (rng.random((60, 256)) < 0.05), bits[60:70], rng.random((30, 256)) < 0.5])
    known, asked = pack_bits(np.concatenate([bits, bits[:20]])), pack_bits(other)
    index = CopyIndex([], {}, known, np.arange(len(known)), near, None)
    of_all = list(near_rows_of_all(index, asked))
    distance = np.bitwise_count(asked[:, None] ^ known[None]).sum(-1)
    assert len(of_all) == len(asked) and sum(map(len, of_all)) >= 10
    for one, rows, d in zip(asked, of_all, distance):
        assert set(rows) == set(index.near_rows(one)) == set(np.flatnonzero(d <= near))
        assert (np.diff(d[rows]) >= 0).all()
    nothing = CopyIndex([], {}, np.zeros((0, 4), np.uint64), np.zeros(0, int), near, None)
    assert [len(rows) for rows in near_rows_of_all(nothing, asked[:3])] == [0, 0, 0] and len(nothing.near_rows(asked[0])) == 0


def test_a_person_who_taught_the_model_with_another_mouth_still_measures(tmp_path):
    "Bytes, pixels, or a look-alike of what cannot be read any more: the last is left out, and said"
    pairs = honest_pairs(160, 20, only_alike=True)
    trained = folder(tmp_path/'t', {f'no/{i}.png': png(neutral) for i, (neutral, _) in enumerate(pairs)} | {'yes/x.png': picture(seed=99)})
    names = [f'no/{i}.png' for i in range(len(pairs))]
    table = pd.DataFrame(dict(path=names, split='train', reason=''))
    fingerprints = training_fingerprints(table, scan_images(FolderReader(trained), names))
    (tmp_path/'run').mkdir()
    write_json(tmp_path/'run'/'config.json', dict(source=str(trained), options={}, status='finished', model={}, origin={}))
    new = folder(tmp_path/'n', {f'smile{i}.png': png(smiling) for i, (_, smiling) in enumerate(pairs)}
                 | {'again.jpg': saved_again(pairs[0][0], 70), 'same.png': png(pairs[1][0])})
    reader = FolderReader(new)
    scan = scan_images(reader, reader.names())
    def found(run=tmp_path/'run', given=fingerprints):
        copies = find_training_copies(given, scan, reader, TrainingSource(run, given))
        return {c.path: (c.training_path, c.same) for c in copies.itertuples()}
    exact = {'again.jpg': ('no/0.png', 'pixels'), 'same.png': ('no/1.png', 'bytes')}
    assert found() == exact
    lost = found(tmp_path/'elsewhere')
    assert lost['same.png'] == ('no/1.png', 'bytes') and lost['again.jpg'] == ('no/0.png', 'look-alike')
    assert {same for _, same in lost.values()} == {'bytes', 'look-alike'} and len(lost) == len(pairs) + 2
    (trained/'no/0.png').write_bytes(png(pairs[0][1]))  # another picture under the name of one that was trained on
    changed = found()
    assert changed['smile0.png'] == changed['again.jpg'] == ('no/0.png', 'look-alike') and len(changed) == 3
    assert found(given=fingerprints.assign(hash='')) == {'same.png': ('no/1.png', 'bytes')}
