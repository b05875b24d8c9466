"Lists of splits beside images: test rows that a data set's makers set apart are never trained on."
import json
import zipfile

import pytest
from conftest import folder, picture

from fastsmile.config.fields import SourceOptions
from fastsmile.core.errors import SmileError
from fastsmile.data.source import read_source

P = picture()
IMAGES = {f'{c}/{i:02}.png': P for c in ('smile', 'neutral') for i in range(8)}
SPLITS = {name: 'train' if int(name[-6:-4]) < 5 else 'valid' if int(name[-6:-4]) == 5 else 'test' for name in IMAGES}
NUMBERS = dict(train=0, valid=1, test=2)


def names_of(split): return [n for n, s in SPLITS.items() if s == split]


def lists(pattern, line='{name}', ending=''):
    "A file for each split, called by `pattern`"
    def row(name): return line.format(name=name.removesuffix(ending), label=name.split('/')[0], code=int('smile' in name)) + '\n'
    return {pattern.format(s): ''.join(map(row, names_of(s))) for s in NUMBERS}


def rows(line): return ''.join(line.format(name=n, split=s, number=NUMBERS[s], is_test=s == 'test') + '\n' for n, s in SPLITS.items())


LISTS = {
    'names': lists('{}.txt'), 'names and numbers': lists('{}_list.txt', '{name} {code}'), 'names and labels': lists('{}set.lst', '{name}\t{label}'),
    'stems in a folder': lists('meta/{}.txt', ending='.png'), 'VOC': lists('ImageSets/Main/{}.txt', ending='.png'), 'CSV': lists('{}_files.csv'),
    'a column': {'splits.csv': 'image,split\n' + rows('{name},{split}')}, 'CelebA': {'list_eval_partition.txt': rows('{name} {number}')},
    'JSON': {'split.json': json.dumps({s: names_of(s) for s in NUMBERS})}, 'JSON lists': {f'{s}.json': json.dumps(names_of(s)) for s in NUMBERS},
    'backslashes': {n: t.replace('/', '\\') for n, t in lists('Annotations/{}.txt').items()}}


def in_zip(where, files):
    with zipfile.ZipFile(where.with_suffix('.zip'), 'w') as z:
        for name, data in files.items(): z.writestr(name, data)
    return where.with_suffix('.zip')


@pytest.mark.parametrize('make', [folder, in_zip])
@pytest.mark.parametrize('files', LISTS.values(), ids=LISTS)
def test_lists_of_splits_are_kept(tmp_path, files, make):
    source = make(tmp_path/'s', IMAGES | files)
    s = read_source(source)
    assert s.kind == 'folders' and dict(zip(s.kept.path, s.kept.split)) == SPLITS
    assert any('16 of 16 rows are kept' in n for n in s.notes)
    assert set(read_source(source, SourceOptions(split_col='none')).frame.split) == {''}


def test_a_list_of_the_test_alone_and_names_without_images(tmp_path):
    text = ''.join(n + '\n' for n in [*names_of('test'), 'smile/99.png'])
    s = read_source(folder(tmp_path, IMAGES | {'Testing_ids.txt': text}))
    assert set(s.kept.path[s.kept.split == 'test']) == set(names_of('test')) and set(s.kept.split) == {'', 'test'}
    assert any('1 names are of no image' in n for n in s.notes)


def test_lists_beside_a_table_of_labels(tmp_path):
    table = 'path,label\n' + ''.join(f'{n},{n.split("/")[0]}\n' for n in IMAGES)
    folder(tmp_path, IMAGES | lists('{}.txt') | {'labels.csv': table})
    for s in (read_source(tmp_path), read_source(tmp_path/'labels.csv')):
        assert s.kind == 'csv' and dict(zip(s.kept.path, s.kept.split)) == SPLITS


def test_a_test_table_without_labels_beside_class_folders(tmp_path):
    train = 'path,label\n' + ''.join(f'{n},{n.split("/")[0]}\n' for n in names_of('train'))
    files = {'train.csv': train, 'test.csv': 'path\n' + ''.join(n + '\n' for n in names_of('test'))}
    s = read_source(folder(tmp_path, IMAGES | files))
    assert set(s.kept.path) == set(names_of('train')) and set(s.kept.split) == {'train'}
    by_folder = read_source(tmp_path, SourceOptions(layout='folders'))
    assert set(by_folder.kept.path[by_folder.kept.split == 'test']) == set(names_of('test'))


OTHERS = {
    'no list': ({'test.txt': 'a note\nabout tests\n'}, 'test.txt is named for a split .test., and 0 of its 2 rows'),
    'of another set': ({'train.txt': 'a/1.jpg\na/2.jpg\nsmile/01.png\n'}, '1 of its 3 rows name an image'),
    'folds': ({'train1.txt': 'smile/01.png\n', 'test1.txt': 'smile/02.png\n', 'train2.txt': 'smile/02.png\n'}, 'lists of different splits: test1.txt'),
    'a code': ({'train_test_split.txt': ''.join(f'{n} {i % 2}\n' for i, n in enumerate(IMAGES))}, 'not clear which split each is in'),
    'labels': ({'test.txt': ''.join(f'{n} {i % 2}\n' for i, n in enumerate(IMAGES))}, 'in two ways: by its class folders, or by the labels in test.txt')}


@pytest.mark.parametrize('files,message', OTHERS.values(), ids=OTHERS)
def test_lists_that_do_not_fit_stop_and_name_the_flag(tmp_path, files, message):
    folder(tmp_path, IMAGES | files)
    with pytest.raises(SmileError, match=message) as e: read_source(tmp_path)
    assert '--split-col none' in e.value.hint or '--layout' in e.value.hint
    assert len(read_source(tmp_path, SourceOptions(split_col='none')).kept) == 16


def test_an_image_in_two_lists_is_in_the_one_held_out(tmp_path):
    files = {'train.txt': ''.join(n + '\n' for n in IMAGES), 'test.txt': 'smile/01.png\nneutral/01.png\n'}
    s = read_source(folder(tmp_path, IMAGES | files))
    assert set(s.kept.path[s.kept.split == 'test']) == {'smile/01.png', 'neutral/01.png'}


def test_json_of_splits_is_no_json_of_classes(tmp_path):
    images = {f'images/{k}.png': P for k in range(6)}
    pairs = dict(train=[['0.png', 'a'], ['1.png', 'b'], ['2.png', 'a']], test=[['3.png', 'a'], ['4.png', 'b']])
    s = read_source(folder(tmp_path, images | {'data.json': json.dumps(pairs)}))
    assert set(s.kept.label) == {'a', 'b'} and s.kept.split.tolist() == ['train'] * 3 + ['test'] * 2


def test_another_table_of_labels_is_no_list_of_splits(tmp_path):
    images = {f'images/{k}.png': P for k in range(6)}
    def table(column, values): return f'path,label,{column}\n' + ''.join(f'{k}.png,{"ab"[k % 2]},{v}\n' for k, v in enumerate(values))
    folder(tmp_path, images | {'celeba.csv': table('partition', '000012'), 'fastai.csv': table('is_valid', ['False', 'True'] * 3)})
    s = read_source(tmp_path, SourceOptions(labels=str(tmp_path/'celeba.csv')))
    assert set(s.kept.split) == {''} and any('column partition looks like a split' in n for n in s.notes)


def test_a_named_table_of_labels_overrules_the_tables_beside_it_and_that_is_said(tmp_path):
    rows = [f'{k}.png,{"ab"[k % 2]}\n' for k in range(6)]
    tables = {'train.csv': ''.join(rows[:4]), 'test.csv': ''.join(rows[4:])}
    folder(tmp_path/'s', {f'images/{k}.png': P for k in range(6)} | tables)
    (tmp_path/'all.csv').write_text('id,label\n' + ''.join(rows))
    s = read_source(tmp_path/'s', SourceOptions(labels=str(tmp_path/'all.csv')))
    assert set(s.kept.split) == {''} and len(s.kept) == 6 and any('test.csv' in n and 'other tables of labels' in n for n in s.notes)
