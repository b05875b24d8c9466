"Folders named for splits, classes and people: what is read, what is asked, what is refused."
import re

import pytest
from conftest import folder, picture

from fastsmile.config.fields import SourceOptions
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.data.source import read_source

P = picture()
CLASSES = ('smile', 'neutral')


def read(where, names, files=(), **options):
    return read_source(folder(where, dict.fromkeys(names, P) | dict(files)), SourceOptions(**options))


def names(pattern, **values):
    "Names with two of each, such as {c}/{i}.png"
    out = [pattern]
    for key, words in (values | dict(c=CLASSES, i=range(2))).items():
        place = f'{{{key}}}'
        if place in pattern: out = [n.replace(place, str(w)) for n in out for w in words]
    return out


SPELLINGS = [('train', 'test'), ('training_set', 'test_set'), ('Train_Images', 'Val Images'), ('TRAIN', 'HOLDOUT'), ('Training', 'PublicTest'),
             ('trainset', 'evalset'), ('FER2013Train', 'FER2013Test'), ('train2017', 'val2017'), ('learning', 'heldout'), ('train', 'test1')]


@pytest.mark.parametrize('train,other', SPELLINGS)
@pytest.mark.parametrize('pattern', ['{s}/{c}/{i}.png', '{c}/{s}/{i}.png', 'top/{s}/{c}/{i}.png', '{s}/images/{c}/{i}.png'])
def test_folders_of_splits_are_never_classes(tmp_path, train, other, pattern):
    s = read(tmp_path/'s', names(pattern, s=(train, other)))
    assert set(s.kept.label) == set(CLASSES) and len(s.kept) == 8
    assert s.kept.split.value_counts().to_dict().keys() >= {'train'} and (s.kept.split == 'train').sum() == 4 and '' not in set(s.kept.split)


@pytest.mark.parametrize('train,other', SPELLINGS)
def test_folders_of_splits_alone_are_no_source(tmp_path, train, other):
    with pytest.raises(SmileError, match='are folders of splits, not classes.*no table of labels'): read(tmp_path, names('{s}/{i}.png', s=(train, other)))


def test_splits_in_the_names_of_class_folders(tmp_path):
    s = read(tmp_path/'a', names('{s}_{c}/{i}.png', s=('train', 'test')))
    assert set(s.kept.label) == set(CLASSES) and s.kept.split.value_counts().to_dict() == dict(train=4, test=4)
    t = read(tmp_path/'b', names('{c}-{s}/{i}.png', s=('train', 'valid')))
    assert set(t.kept.label) == set(CLASSES) and s.kept.split.nunique() == 2


@pytest.mark.parametrize('test', ['test/{i}.png', 'test/test/{i}.png', 'test/unknown/{i}.png', 'test/images/{i}.png', 'Test_Images/{i}.png'])
@pytest.mark.parametrize('train', ['{c}/{i}.png', 'train/{c}/{i}.png'])
def test_a_test_folder_without_labels_is_left_out_and_said(tmp_path, train, test):
    s = read(tmp_path/'s', [*names(train), *names(test)])
    assert set(s.frame.label) == set(CLASSES) and len(s.frame) == 4 and len(s.images_without_row) == 2
    assert any('2 images below' in n and 'are not used' in n for n in s.notes)


@pytest.mark.parametrize('table,text', [
    ('_classes.csv', 'filename, neutral, smile\n0.png, 1, 0\n1.png, 0, 1\n'), ('metadata.csv', 'file_name,text\n0.png,neutral\n1.png,smile\n'),
    ('metadata.jsonl', '{"file_name": "0.png", "label": "neutral"}\n{"file_name": "1.png", "label": "smile"}\n'), ('label.csv',
                                                            '0.png,neutral\n1.png,smile\n'),
    ('_annotations.coco.json', '{"images": [{"id": 7, "file_name": "0.png"}, {"id": 9, "file_name": "1.png"}], "categories": [{"id": 1, "name": "neutral"}, '
     '{"id": 2, "name": "smile"}], "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 9, "category_id": 2}]}')])
def test_tables_in_each_folder_of_a_split(tmp_path, table, text):
    splits = ('train', 'valid', 'test_set')
    s = read(tmp_path/'s', names('{s}/{i}.png', s=splits), {f'{x}/{table}': text for x in splits})
    assert s.frame[['path', 'label', 'split']].values.tolist() == [
        [f'{x}/{i}.png', label, given] for x, given in zip(splits, ('train', 'valid', 'test')) for i, label in ((0, 'neutral'), (1, 'smile'))]


def test_kaggle_has_a_table_of_train_and_a_submission(tmp_path):
    files = {'train.csv': 'id,label\n0,smile\n1,neutral\n', 'sample_submission.csv': 'id,label\n5,smile\n6,smile\n'}
    s = read(tmp_path/'a', [*names('train/{i}.png'), 'test/5.png', 'test/6.png'], files)
    assert s.frame.path.tolist() == ['train/0.png', 'train/1.png'] and s.images_without_row == ['test/5.png', 'test/6.png']
    t = read(tmp_path/'b', [*names('train/{i}.png'), 'test/5.png', 'test/6.png'], files | {'test.csv': 'id,age\n5,30\n6,31\n'})
    assert t.frame.reason.tolist() == ['', '', 'unlabelled', 'unlabelled'] and t.frame.split.tolist() == ['train', 'train', 'test', 'test']


def test_the_makers_split_is_kept_where_paths_name_it(tmp_path):
    table = {'labels.csv': 'img,emotion\n' + ''.join(f'{i}.png,{"ab"[i % 2]}\n' for i in range(6))}
    paths = [f'{"Train" if i < 4 else "Test"}_Images/{i}.png' for i in range(6)]
    s = read(tmp_path/'s', paths, table)
    assert s.frame.split.tolist() == ['train'] * 4 + ['test'] * 2 and any('name a split (train, test)' in n for n in s.notes)
    assert set(read(tmp_path/'s', [], split_col='none').frame.split) == {''}
    raf = read(tmp_path/'raf', ['train_1.png', 'train_2.png', 'test_1.png'], {'l.txt': 'train_1.png 1\ntrain_2.png 2\ntest_1.png 1\n'},
               labels=str(tmp_path/'raf/l.txt'))
    assert raf.frame.split.tolist() == ['train', 'train', 'test']


# people

@pytest.mark.parametrize('pattern,classes', [('S{p}/{c}/{i}.png', 2), ('{c}/S{p}/{i}.png', 1), ('top/S{p}/{c}/{i}.png', 3), ('train/S{p}/{c}/{i}.png', 3)])
def test_people_that_cross_classes_are_a_question(tmp_path, pattern, classes):
    files = names(pattern, p=(1, 2, 3))
    group = {1: 2, 2: 1, 3: 2}[classes]
    with pytest.raises(SmileError, match=f'--label-level {classes} --group-level {group}'): read(tmp_path/'s', files)
    s = read(tmp_path/'s', [], label_level=classes, group_level=group)
    assert set(s.kept.label) == set(CLASSES) and set(s.kept.group) == {'S1', 'S2', 'S3'}


def test_people_below_one_class_each(tmp_path):
    s = read(tmp_path/'s', ['smile/S1/0.png', 'smile/S1/1.png', 'neutral/S2/0.png', 'neutral/S3/0.png'])
    assert set(s.kept.label) == set(CLASSES) and any('--group-level 2' in n for n in s.notes)
    for options in (dict(group_level=2), dict(group_from=r'(S\d+)'), dict(group_from=r'/([^/]+)/'), dict(group_level=-1)):
        g = read(tmp_path/'s', [], **options)
        assert sorted(g.kept.group) == ['S1', 'S1', 'S2', 'S3'] and not any('may be people' in n for n in g.notes)
        assert any('4 of 4' in n for n in g.notes)


@pytest.mark.parametrize('pattern', ['{p}/{p}_000{i}.png', '{p}/x/{p}_000{i}.png'])
def test_folders_of_people_are_no_classes(tmp_path, pattern):
    files = names(pattern, p=('Ann_Lee', 'Bob_Ray', 'Cy_Moe'))
    with pytest.raises(SmileError, match='look like those of people'): read(tmp_path/'s', files)
    assert read(tmp_path/'s', [], label_level=1).kept.label.nunique() == 3


@pytest.mark.parametrize('people', [('S001', 'S002', 'S003'), ('subject1', 'subject2', 'subject3'), ('Actor_01', 'Actor_02', 'Actor_03')])
def test_numbered_people_are_no_classes(tmp_path, people):
    with pytest.raises(SmileError, match='look like those of people'): read(tmp_path, names('{p}/{i}.png', p=people))


SYLLABLES = ('an', 'bo', 'ci', 'du', 'eve', 'fay', 'gus', 'hal', 'ida', 'jo', 'kim', 'lee')


@pytest.mark.parametrize('name', ['{p}_{i}', 'Mary {p}_n{i}', '{p}-lee-p{i}', '{p}.{i}', "o'{p} {i}"])
def test_names_that_recur_may_be_people_and_the_option_that_is_named_reads_them(tmp_path, name):
    files = [f'{("smile", "no smile")[i % 2]}/{name.format(p=p, i=i)}.png' for p in SYLLABLES for i in range(10, 13)]
    said, = (n for n in read(tmp_path/'s', files).notes if '--group-from' in n)
    regex = re.search("--group-from '(.+)' keeps", said)[1]
    assert read(tmp_path/'s', [], group_from=regex).kept.group.nunique() == len(SYLLABLES)


@pytest.mark.parametrize('files', [[f'{c}/{c}_{i}.png' for c in ('smile', 'neutral') for i in range(20)],  # classes
                                   [f'{("a", "b")[i % 2]}/{("IMG", "DSC", "face")[i % 3]}_{i}.png' for i in range(40)],  # cameras
                                   [f'{("a", "b")[i % 2]}/2024-01-{i:02}_12-30-{i}.png' for i in range(10, 30)],
                                   [f'{("a", "b")[i % 2]}/{p} {i}.png' for i, p in enumerate(SYLLABLES)]])  # each once
def test_names_of_classes_cameras_and_times_are_no_people(tmp_path, files):
    assert not any('--group-from' in n for n in read(tmp_path/'s', files).notes)


def test_patterns_that_match_nothing_or_some(tmp_path):
    where = names('{c}/Ann_Lee_{i}.png') + ['smile/x.png']
    s = read(tmp_path/'s', where, group_from=r'(.+)_\d+')
    assert sorted(s.frame.group) == ['', *['Ann_Lee'] * 4] and '--group-from: 4 of 5 file names match, 1 different.' in s.notes
    for options in (dict(group_from='(Zoe)'), dict(label_from='(Zoe)'), dict(group_level=3), dict(label_level=3), dict(label_level=0)):
        with pytest.raises(OptionError, match='matches none of the 5 paths|no image is in such a folder'): read(tmp_path/'s', [], **options)
    for options in (dict(label_from='(', ), dict(label_from='smile'), dict(label_from='(a)', label_level=1), dict(group_from='(a)', group_level=1)):
        with pytest.raises(OptionError, match='not a regular expression|has no|one of them is enough'): read(tmp_path/'s', [], **options)


@pytest.mark.parametrize('people', ['LFW', 'CK+', 'id'])
def test_names_that_may_say_who_is_shown(tmp_path, people):
    name = {'LFW': 'Ann_{p}_000{i}', 'CK+': 'S0{p}_001_{i}', 'id': 'person{p}_{i}'}[people]
    s = read(tmp_path/'s', names('{c}/' + name + '.png', p=('10', '20') if people != 'LFW' else ('Lee', 'Ray')))
    hint = next(n for n in s.notes if 'may say who is shown' in n)
    found = read(tmp_path/'s', [], group_from=hint.split("'")[1])
    assert found.frame.group.nunique() == 2 and not any('may say who is shown' in n for n in found.notes)
    assert not any('who is shown' in n for n in read(tmp_path/'plain', names('{c}/{c}_{i}.png')).notes)


@pytest.mark.parametrize('stems,labels', [(['KA.NE1.1', 'KA.HA2.2', 'KL.HA1.3'], {'NE', 'HA'}), (['AF01HAS', 'BM02NEHL', 'AF03HAS'], {'HA', 'NE'}),
                                          (['Rafd090_01_Caucasian_female_happy_frontal', 'Rafd090_02_Caucasian_male_sad_left'], {'happy', 'sad'}),
                                          (['subject01.happy', 'subject02.sad'], {'happy', 'sad'}), (['smile_1', 'smile_2', 'sad_1', 'sad_2'],
                                                            {'smile', 'sad'})])
def test_labels_in_names_are_named_in_the_error(tmp_path, stems, labels):
    with pytest.raises(SmileError, match='--label-from') as e: read(tmp_path/'s', [f'{s}.png' for s in stems])
    regex = str(e.value).partition("--label-from '")[2].partition("'")[0]
    s = read(tmp_path/'s', [], label_from=regex)
    assert set(s.kept.label) == labels and s.notes[0].startswith('Read as labels in names')
    assert set(read(tmp_path/'s', [], label_from=regex, rename=(f'{min(labels)}=x',)).kept.label) == labels - {min(labels)} | {'x'}


@pytest.mark.parametrize('name', ['unlabeled', 'Unlabelled', 'images', 'no_label', 'train/unlabeled'])
def test_a_folder_that_says_no_class_is_none_beside_classes(tmp_path, name):
    top = 'train/{c}/{i}.png' if name.startswith('train') else '{c}/{i}.png'
    s = read(tmp_path, [*names(top), *names(name + '/{i}.png')])
    assert set(s.kept.label) == set(CLASSES) and len(s.images_without_row) == 2
    assert any('2 images below' in n and 'are not used' in n for n in s.notes)


def test_words_of_few_letters_are_splits(tmp_path):
    for at, words in enumerate([('tr', 'va', 'te'), ('trn', 'vld', 'tst'), ('train_v2', 'val_v2', 'test_v2')]):
        s = read(tmp_path/str(at), names('{s}/{c}/{i}.png', s=words))
        assert set(s.kept.label) == set(CLASSES) and sorted(set(s.kept.split)) == ['test', 'train', 'valid']
        with pytest.raises(SmileError, match='are folders of splits'): read(tmp_path/f'bare{at}', names('{s}/{i}.png', s=words))


def test_a_class_folder_without_images_is_said(tmp_path):
    files = {'angry/.gitkeep': '', 'docs/notes.txt': 'x', '.git/x': ''}
    s = read(tmp_path, names('{c}/{i}.png'), files)
    assert [n for n in s.notes if 'beside the class folders' in n] == ['angry is beside the class folders, without any file.']
    assert not any('beside the class' in n for n in read(tmp_path/'b', names('{c}/{i}.png')).notes)


def test_links_to_folders_do_not_take_their_images_away(tmp_path):
    folder(tmp_path, dict.fromkeys(names('{c}/{i}.png'), P))
    for at, to in (('neutral/loop', '../smile'), ('smile/itself', '.'), ('aaa', 'smile')):
        try: (tmp_path/at).symlink_to(to, target_is_directory=True)
        except OSError: pytest.skip('this system makes no links')
    s = read_source(tmp_path)
    assert s.kept.label.value_counts().to_dict() == dict(smile=2, neutral=2) and not s.images_without_row


def test_three_levels_are_named(tmp_path):
    with pytest.raises(SmileError, match='either may be the class') as e: read(tmp_path, names('{v}/{p}/{c}/{i}.png', v=('s1', 's2'), p=('p1', 'p2')))
    assert '--label-level 3 --group-level 2 where neutral, smile below them are' in e.value.hint
    assert set(read(tmp_path, [], label_level=3, group_level=2).kept.label) == set(CLASSES)


@pytest.mark.parametrize('pattern,where', [('{c}{i}.png', 'begin with'), ('img{i}_{c}.png', 'end with'), ('train_{c}_{i}.png', 'hold')])
def test_words_in_names_are_shown_with_the_option_that_takes_them(tmp_path, pattern, where):
    with pytest.raises(SmileError, match='no labelled images') as e: read(tmp_path, names(pattern))
    assert f'The names {where} neutral, smile: --label-from' in e.value.hint
    option = e.value.hint.split("--label-from '")[1].split("'")[0]
    assert set(read(tmp_path, [], label_from=option).kept.label) == set(CLASSES)


def test_a_table_decides_where_the_levels_of_folders_are_not_clear(tmp_path):
    own = names('{p}/{c}/{i}.png', p=('ann', 'ben'))
    rows = 'path,label\n' + ''.join(f'{n},{"yes" if "smile" in n else "no"}\n' for n in own)
    assert set(read(tmp_path, own, {'labels.csv': rows}).kept.label) == {'yes', 'no'}
