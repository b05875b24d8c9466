"Sources of many layouts; counts reconcile; a question where two readings fit."
import io
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import folder, picture
from hypothesis import given, settings, strategies as st

from fastsmile.data.source import unify_labels
from fastsmile.data.cells import parse_table
from fastsmile.data.words import label_key
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.config.fields import SourceOptions
from fastsmile.data.splits import stratified_group_split, weaker_split_rows
from fastsmile.data.source import read_source

P = picture()


def read(tmp_path, files, **options):
    return read_source(folder(tmp_path/'s', files), SourceOptions(**options))


@pytest.mark.parametrize('data', [b'id,label\na,yes\nb,no\n', '\ufeffid;label\r\na;yes\r\nb;no\r\n'.encode(), b'id\tlabel\na\tyes\nb\tno\n',
                                  'id,label\na,yes\nb,no\n'.encode('utf-16'), b',id,label\n0,a,yes\n1,b,no\n', b'"id","label"\n"a","yes"\n\n"b","no"\n'])
def test_csv_dialects(tmp_path, data):
    s = read(tmp_path, {'labels.csv': data, 'img/a.png': P, 'img/b.png': P})
    assert list(s.kept.path) == ['img/a.png', 'img/b.png'] and list(s.kept.label) == ['yes', 'no']


def test_latin1_labels(tmp_path):
    s = read(tmp_path, {'labels.csv': 'id,label\na,Ärger\nb,no\n'.encode('latin-1'), 'a.png': P, 'b.png': P})
    assert set(s.kept.label) == {'Ärger', 'no'}


def test_a_table_with_ragged_lines_names_the_line():
    with pytest.raises(SmileError, match='line 3 has 3 cells'): parse_table(b'a,b\n1,2\n1,2,3\n', 'x.csv')
    with pytest.raises(SmileError, match='is empty'): parse_table(b'  \n', 'x.csv')


def test_windows_and_absolute_paths(tmp_path):
    root = folder(tmp_path/'s', {'faces/a.png': P, 'b.png': P})
    folder(root, {'labels.csv': f'file,label\nC:\\me\\faces\\a.png,yes\n{root}/b.png,no\n'})
    assert list(read_source(root).kept.path) == ['faces/a.png', 'b.png']


def test_a_picture_outside_the_root(tmp_path):
    out = folder(tmp_path/'out', {'x.png': P})
    s = read(tmp_path, {'labels.csv': f'file,label\n{out}/x.png,yes\na.png,no\n', 'a.png': P})
    assert (s.kept.path.iloc[0] == f'{out}/x.png') and s.reader.read_image(s.kept.path.iloc[0]).size == (24, 24)


def test_class_folders_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for n in ('top/train/yes/a.png', 'top/train/no/b.png', 'top/val/yes/c.png', '__MACOSX/top/train/yes/._a.png'): z.writestr(n, P)
    s = read_source(tmp_path/'z.zip')
    assert s.kept[['label', 'split']].values.tolist() == [['no', 'train'], ['yes', 'train'], ['yes', 'valid']]


def test_two_readings_are_a_question(tmp_path):
    files = {'yes/a.png': P, 'no/b.png': P, 'labels.csv': 'id,label\na,1\nb,2\n'}
    with pytest.raises(SmileError, match='--layout folders or --layout csv'): read(tmp_path, files)
    assert set(read(tmp_path, files, layout='folders').kept.label) == {'yes', 'no'}
    assert set(read(tmp_path, files, layout='csv').kept.label) == {'1', '2'}


def test_several_tables_are_a_question(tmp_path):
    with pytest.raises(SmileError, match='--labels FILE'): read(tmp_path, {'one.csv': 'id,label\na,1\n', 'two.csv': 'id,label\na,2\n', 'a.png': P})


def test_no_labels_no_source(tmp_path):
    with pytest.raises(SmileError, match='no labelled images'): read(tmp_path, {'a.png': P, 'b.png': P})
    with pytest.raises(SmileError, match='does not exist'): read_source(tmp_path/'nowhere')


def test_unknown_columns_list_what_there_is(tmp_path):
    with pytest.raises(OptionError, match='It has: id, label'): read(tmp_path, {'l.csv': 'id,label\na,1\n', 'a.png': P}, label_col='smile')


def test_split_and_group_columns(tmp_path):
    s = read(tmp_path, {'l.csv': 'image,label,set,person\na,1,Train,Ann\nb,2,TEST,\n', 'a.png': P, 'b.png': P})
    assert list(s.frame.split) == ['train', 'test'] and list(s.frame.group) == ['Ann', '']


def test_group_from_the_name(tmp_path):
    files = {'yes/Ann_Lee_0001.png': P, 'no/Ann_Lee_0002.png': P, 'no/x.png': P}
    assert sorted(read(tmp_path, files, group_from=r'(.+)_\d+').frame.group) == ['', 'Ann_Lee', 'Ann_Lee']
    with pytest.raises(OptionError, match='has no'): read(tmp_path, files, group_from='Ann')


def test_classes_are_left_out_by_name_and_size(tmp_path):
    files = {f'{c}/{i}.png': P for c, n in dict(yes=3, no=3, skip=2, rare=1).items() for i in range(n)}
    s = read(tmp_path, files, drop_class=('Skip',), min_count=2)
    assert set(s.kept.label) == {'yes', 'no'} and s.frame.reason.value_counts().to_dict() == {'': 6, 'class left out': 2, 'class with fewer than 2 rows': 1}
    assert set(read(tmp_path, files, keep_class=('YES', 'no')).kept.label) == {'yes', 'no'}


def test_arrays(tmp_path):
    np.save(tmp_path/'x.npy', np.zeros((4, 8, 8, 3), np.uint8))
    np.save(tmp_path/'x_labels.npy', np.array([0, 1, 0, 1]))
    assert list(read_source(tmp_path/'x.npy').kept.label) == ['0', '1', '0', '1']
    (tmp_path/'x_labels.npy').unlink()
    (tmp_path/'few.txt').write_text('0\n1\n')
    with pytest.raises(SmileError, match='2 labels for 4 images'): read_source(tmp_path/'x.npy', SourceOptions(labels=str(tmp_path/'few.txt')))


@given(st.lists(st.text(max_size=8), max_size=30))
@settings(max_examples=200, deadline=None)
def test_tidy_labels_join_what_has_one_key_and_nothing_else(labels):
    tidy, _ = unify_labels(pd.Series(labels, dtype=object))
    keys = [label_key(t) for t in labels]
    assert [label_key(t) for t in tidy] == keys and [t == '' for t in tidy] == [k == '' for k in keys]
    assert len(set(tidy)) == len(set(keys))


@given(st.lists(st.tuples(st.sampled_from('abc'), st.sampled_from(['', 'p', 'q', 'r', 's'])), min_size=1, max_size=60), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_divide_places_every_row_and_keeps_groups_whole(rows, seed):
    labels, groups = zip(*rows)
    split = stratified_group_split(labels, groups, dict(train=0.6, valid=0.2, test=0.2), seed)
    assert set(split) <= {'train', 'valid', 'test'} and len(split) == len(rows)
    named = pd.DataFrame(dict(s=split, g=groups)).query('g != ""')
    assert named.empty or named.groupby('g').s.nunique().max() == 1


@given(st.lists(st.tuples(st.sampled_from(['', 'train', 'valid', 'test']), st.sampled_from(['', 'p', 'q'])), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_what_gives_way_leaves_no_group_on_two_sides(rows):
    splits, groups = zip(*rows)
    gone = weaker_split_rows(splits, groups)
    left = pd.DataFrame(dict(s=splits, g=groups))[~gone].query('g != "" and s != ""')
    assert left.empty or left.groupby('g').s.nunique().max() == 1
    assert not any(g == '' for g, x in zip(groups, gone) if x)


def test_npy_is_read_without_pickle(tmp_path):
    buf = io.BytesIO()
    np.save(buf, np.array([{'a': 1}], dtype=object), allow_pickle=True)
    (tmp_path/'x.npy').write_bytes(buf.getvalue())
    (tmp_path/'x_labels.txt').write_text('1\n')
    with pytest.raises((SmileError, ValueError)): read_source(tmp_path/'x.npy')


def test_npz_with_splits_and_without(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (10, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path/'a.npz', x_train=x[:6], y_train=np.arange(6)[:, None] % 2, x_test=x[6:], y_test=np.arange(4) % 2, note=np.zeros(3))
    s = read_source(tmp_path/'a.npz')
    assert s.frame.split.tolist() == ['train'] * 6 + ['test'] * 4 and s.frame.label.tolist() == ['0', '1'] * 5
    assert (np.asarray(s.reader.read_image('7')) == x[7]).all()
    np.savez_compressed(tmp_path/'b.npz', images=x, labels=np.array(['smile', 'Not smile'] * 5))
    assert read_source(tmp_path/'b.npz').kept.label.value_counts().to_dict() == {'smile': 5, 'Not smile': 5}
    np.savez(tmp_path/'c.npz', images=x, one=np.zeros(10, int), two=np.ones(10, int))
    with pytest.raises(SmileError, match='more than one array of labels'): read_source(tmp_path/'c.npz')
    (tmp_path/'d.npz').write_bytes(b'PK no zip')
    with pytest.raises(SmileError, match='cannot be read'): read_source(tmp_path/'d.npz')


def test_raw_bytes_whose_number_does_not_fit(tmp_path):
    (tmp_path/'x.raw').write_bytes(bytes(100))
    (tmp_path/'l.txt').write_text('0\n1\n')
    opts = SourceOptions(raw_shape='7,7,3', labels=str(tmp_path/'l.txt'))
    with pytest.raises(SmileError, match='cannot be read as an array'): read_source(tmp_path/'x.raw', opts)


def test_parquet(tmp_path):
    pytest.importorskip('pyarrow')
    folder(tmp_path, {'p/a.png': P, 'p/b.png': P})
    pd.DataFrame(dict(file_name=['a.png', 'b.png', 'b.png'], label=[1, 0, None])).to_parquet(tmp_path/'t.parquet')
    t = read_source(tmp_path/'t.parquet').frame
    assert t.label.tolist() == ['1', '0', ''] and t.path.tolist() == ['p/a.png', 'p/b.png', 'p/b.png']
    (tmp_path/'t.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(SmileError, match='cannot be read as Parquet'): read_source(tmp_path/'t.parquet')


@pytest.mark.parametrize('text,labels', [
    ('a\na\na\nb\nb\nb\n', 'aaabbb'), ('label\na\na\na\nb\nb\nb\n', 'aaabbb'), ('what\na\na\na\nb\nb\nb\n', 'aaabbb'),
    ('id,what\n0,a\n1,a\n2,a\n3,b\n4,b\n5,b\n', 'aaabbb'),
    ('label\na\na\n\nb\nb\nb\n', 'aa-bbb'), ('a\na\n\nb\nb\nb\n', 'aa-bbb'), ('a\na\na\nb\nb\n\n', 'aaabb-'), ('a\na\na\nb\nb\nb\n\n\n', 'aaabbb'),
    ('label\na\na\na\nb\nb\n\n', 'aaabb-'), ('a\na\na\nb\nb\nb\nb\n', 7), ('label\na\na\na\nb\nb\n', 5), ('a\na\nb\n', 3), ('x\na\na\na\nb\nb\n\n', 7)])
def test_the_labels_of_an_array_stay_with_their_pictures(tmp_path, capsys, monkeypatch, text, labels):
    "A header goes, a blank line is a picture without a label, and what cannot be paired is said"
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    np.save(tmp_path/'x.npy', np.zeros((6, 8, 8), np.uint8))
    (tmp_path/'labels.txt').write_text(text)
    if isinstance(labels, int):
        with pytest.raises(SmileError, match=f'has {labels} labels for 6 images'): read_source(tmp_path/'x.npy')
    else: assert [v or '-' for v in read_source(tmp_path/'x.npy').frame.label] == list(labels)
    assert ('its first line is taken for a header: what' in capsys.readouterr().err) == ('what' in text)


def test_an_array_of_labels_has_no_header(tmp_path):
    np.save(tmp_path/'x.npy', np.zeros((6, 8, 8), np.uint8))
    np.save(tmp_path/'labels.npy', np.array([9, 0, 0, 1, 1, 1, 1]))
    with pytest.raises(SmileError, match='has 7 labels for 6 images'): read_source(tmp_path/'x.npy')


FIVE = {f'{i}.png': P for i in range(6)}


@pytest.mark.parametrize('first,rows,said', [
    ('gone.png,c', 7, False), ('9,c', 7, False), ('gone,a', 7, False), ('9,smile', 7, False), ('gone,c', 6, True), ('id,c', 6, False), ('who,label', 6, False)])
def test_a_first_row_whose_picture_is_missing(tmp_path, capsys, monkeypatch, first, rows, said):
    "It is data where it looks like data; a header that is only guessed is said"
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    s = read(tmp_path, FIVE | {'train.csv': f'{first}\n' + ''.join(f'{i},{"aab"[i % 3]}\n' for i in range(6))})
    assert len(s.frame) == rows and len(s.kept) == 6 and set(s.kept.label) == {'a', 'b'}
    assert (f'train.csv: its first row is taken for a header: {first.replace(",", ", ")}' in capsys.readouterr().err) == said


def test_a_cell_that_no_system_takes_costs_its_row(tmp_path):
    s = read(tmp_path, {'labels.csv': f'file,label\n/{"a" * 300}.png,yes\n/{"b/" * 3000}b.png,yes\na.png,no\n', 'a.png': P})
    assert list(s.frame.reason) == ['no such file', 'no such file', '']


def test_names_that_our_own_tables_made_harmless(tmp_path):
    s = read(tmp_path, {'labels.csv': "path,label\n'=a.png,yes\n'-b.png,no\nc.png,no\n", '=a.png': P, "'-b.png": P, '-b.png': P, 'c.png': P})
    assert list(s.frame.path) == ['=a.png', "'-b.png", 'c.png'] and (s.frame.reason == '').all()


def parquet_of(path, **how):
    "A Parquet file of a pyarrow table"
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    parquet.write_table(pa.table(how.pop('columns')).replace_schema_metadata(how.pop('says', None)), path, **how)
    return path


def test_parquet_keeps_its_cells(tmp_path):
    "Numbers with gaps, truth values, bytes; lists and pandas' own row numbers are left out"
    import io
    frame = pd.DataFrame(dict(path=['a.png', 'b.png', None], label=[1, None, 0], ok=[True, None, False], raw=[b'x', b'x', None],
                              box=[[1, 2], [3], None], tags=[['x'], ['y', 'z'], None]), index=[5, 7, 9])
    buf = io.BytesIO()
    try: frame.to_parquet(buf)
    except ImportError: pytest.skip('the extra parquet is not installed')
    cells = parse_table(buf.getvalue(), 'x.parquet').values.tolist()
    assert cells == [['path', 'label', 'ok', 'raw'], ['a.png', '1', 'True', "b'x'"], ['b.png', '', '', "b'x'"], ['', '0', 'False', '']]


def test_parquet_with_spoilt_notes(tmp_path):
    path = parquet_of(tmp_path/'x.parquet', columns=dict(path=['a.png', 'b.png'], label=['x', 'y']), says={'pandas': '{}'})
    assert parse_table(path.read_bytes(), 'x.parquet').values.tolist() == [['path', 'label'], ['a.png', 'x'], ['b.png', 'y']]


THREE = {f'{n}.png': P for n in 'abc'}


def test_a_split_column_is_obeyed_or_a_question(tmp_path, capsys):
    "Blanks name no split; an odd word is no reason to forget the others"
    s = read(tmp_path, {**THREE, 'labels.csv': 'path,label,split\na,yes,train\nb,no,Test\nc,yes,\n'})
    assert s.frame.split.tolist() == ['train', 'test', ''] and any('train 1, test 1' in n for n in s.notes)
    odd = {**THREE, 'labels.csv': 'path,label,split\na,yes,train\nb,no,elsewhere\nc,yes,test\n'}
    for options in ({}, dict(split_col='split')):
        with pytest.raises(SmileError, match=r"'elsewhere' \(1 rows\)"): read(tmp_path/'odd', odd, **options)
    held = read(tmp_path/'held', {**THREE, 'labels.csv': 'path,label,split\na,yes,train\nb,no,hold-out\nc,yes,test\n'})
    assert held.frame.split.tolist() == ['train', 'test', 'test']
    assert read(tmp_path/'odd', odd, split_col='none').frame.split.tolist() == ['', '', '']
    other = read(tmp_path/'other', {**THREE, 'labels.csv': 'path,label,set\na,yes,A\nb,no,B\nc,yes,A\n'})
    assert other.frame.split.tolist() == ['', '', '']


def test_a_folder_beside_those_of_splits(tmp_path):
    files = {f'{s}/{c}/{i}.png': P for s in ('train', 'validation', 'elsewhere') for c in ('smile', 'not') for i in range(2)}
    with pytest.raises(SmileError, match='The folder elsewhere is next to train, validation'): read(tmp_path, files)
    held = {n.replace('elsewhere', 'holdout'): P for n in files}
    assert read(tmp_path/'held', held).frame.split.value_counts().to_dict() == dict(train=4, valid=4, test=4)
    nested = {f'train/{c}/{i}.png': P for c in ('a', 'b') for i in range(2)} | {f'c/deep/{i}.png': P for i in range(2)}
    assert set(read(tmp_path/'nested', nested).frame.label) == {'a', 'b', 'c'}


@pytest.mark.parametrize('line', ['b,"no\nc,yes\n', '"b,no\nc,yes\n'])
def test_a_quote_that_is_not_closed(tmp_path, line):
    with pytest.raises(SmileError, match='runs over several lines, in row 3|cannot be read as a table'):
        read(tmp_path, {**THREE, 'labels.csv': 'path,label\na,yes\n' + line})
    fine = read(tmp_path/'fine', {**THREE, 'labels.csv': 'path,label,words\na,yes,"two\nlines"\nb,no,x\nc,yes,y\n'})
    assert len(fine.kept) == 3


def packed(*names, flag=True) -> bytes:
    "A zip of pictures; without the flag, names are bytes of UTF-8 that nothing marks as such"
    buf = io.BytesIO()
    with zipfile.ZipFile(buf, 'w') as z:
        for n in names: z.writestr(n, P)
    data = bytearray(buf.getvalue())
    for mark, at in ((b'PK\x03\x04', 7), (b'PK\x01\x02', 9)):  # the second byte of the flags in each header
        where = -1
        while not flag and (where := data.find(mark, where + 1)) >= 0: data[where + at] &= ~8
    return bytes(data)


def test_a_table_beside_a_zip(tmp_path, capsys):
    "The only one in a folder without pictures; of several, a question"
    files = {'labels.csv': 'path,label\nimages/a.png,yes\nimages/b.png,no\n', 'bilder.zip': packed('images/a.png', 'images/b.png')}
    where = folder(tmp_path/'z', files)
    for source in (where, where/'labels.csv'):
        assert read_source(source).kept.label.tolist() == ['yes', 'no']
    folder(where, {'more.zip': packed('images/a.png')})
    with pytest.raises(SmileError, match='several zips: bilder.zip, more.zip'): read_source(where)
    folder(where, {'own/a.png': P, 'own/b.png': P})
    assert read_source(where).kept.path.tolist() == ['own/a.png', 'own/b.png']  # its own pictures come first


def test_accents_in_names(tmp_path):
    "UTF-8 without its mark, as zip on Linux writes it; accents as macOS writes them"
    import unicodedata
    data = packed('Lächeln/Jürgen.png', 'ernst/a.png', flag=False)
    with zipfile.ZipFile(io.BytesIO(data)) as z: assert 'Lächeln/Jürgen.png' not in z.namelist()
    s = read_source(folder(tmp_path/'z', {'z.zip': data})/'z.zip')
    assert set(s.frame.label) == {'Lächeln', 'ernst'} and s.reader.read_image('Lächeln/Jürgen.png').size
    apart = unicodedata.normalize('NFD', 'Jürgen')
    assert apart != 'Jürgen'
    t = read(tmp_path, {'Jürgen.png': P, 'a.png': P, 'labels.csv': f'path,label\n{apart}.png,yes\na,no\n'})
    assert t.kept.path.tolist() == ['Jürgen.png', 'a.png']


def test_two_columns_that_may_be_the_label(tmp_path):
    with pytest.raises(SmileError, match='two columns that may be the label: label and class'):
        read(tmp_path, {**THREE, 'labels.csv': 'path,class,label\na,x,yes\nb,x,no\nc,y,yes\n'})
    with pytest.raises(SmileError, match='may be the label: label and label.2'):
        read(tmp_path/'twice', {**THREE, 'labels.csv': 'path,label,label\na,x,yes\nb,x,no\nc,y,yes\n'})
    same = read(tmp_path/'same', {**THREE, 'labels.csv': 'path,label,class_name\na,0,no\nb,1,yes\nc,0,no\n'})
    assert set(same.frame.label) == {'0', '1'}
    asked = read(tmp_path/'asked', {**THREE, 'labels.csv': 'path,class,label\na,x,yes\nb,x,no\nc,y,yes\n'}, label_col='class')
    assert set(asked.frame.label) == {'x', 'y'}


def test_a_place_or_a_number_of_each_row_is_no_second_label(tmp_path):
    rows = [(f'{i:02}', 'yes' if i % 2 else 'no', i // 4, i // 2) for i in range(44)]
    def table(head, take): return {f'{r[0]}.png': P for r in rows} | {'labels.csv': '\n'.join([head, *(','.join(map(str, take(r))) for r in rows)])}
    place, number = table('path,label,x,y', lambda r: (*r[:3], r[2])), table('path,label,target', lambda r: (*r[:2], r[0]))
    for name, files in (('place', place), ('number', number)): assert set(read(tmp_path/name, files).frame.label) == {'yes', 'no'}
    with pytest.raises(SmileError, match='label and y'): read(tmp_path/'y', place | {'labels.csv': place['labels.csv'].replace('label,x,y', 'label,z,y')})
