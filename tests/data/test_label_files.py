"The field's own label files, columns of splits and of votes, and names that nearly fit."
import io
import json
import random

import numpy as np
import pytest
from conftest import folder, picture

from fastsmile.config.fields import SourceOptions
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.data.finder import find_name_rule
from fastsmile.data.source import read_source
from fastsmile.data.words import split_meanings
from fastsmile.inference.inputs import open_inputs

P = picture()
N = 8
IDS = [f'{i:04}' for i in range(1, N + 1)]
FILES = {f'files/img{i}.jpg': P for i in IDS}
LABELS = ['smile' if i % 2 else 'neutral' for i in range(N)]


def read(where, files, **options):
    if 'labels' in options: options['labels'] = str(where/options['labels'])
    if 'label_map' in options: options['label_map'] = str(where/options['label_map'])
    return read_source(folder(where, files), SourceOptions(**options))


def lines(pattern, first=''):
    "A line for each image"
    def line(k, i, label):
        return pattern.format(i=i, n=k, label=label, no=int(label == 'neutral'), yes=int(label == 'smile'), sign='1' if label == 'smile' else '-1')
    return first + ''.join(line(k, i, label) for k, (i, label) in enumerate(zip(IDS, LABELS)))


def json_of(record): return [record(f'img{i}.jpg', label) for i, label in zip(IDS, LABELS)]


COCO = dict(images=[dict(id=k, file_name=f'img{i}.jpg') for k, i in enumerate(IDS)], categories=[dict(id=3, name='neutral'), dict(id=9, name='smile')],
            annotations=[dict(id=k, image_id=k, category_id=9 if label == 'smile' else 3, bbox=[0, 0, 9, 9]) for k, label in enumerate(LABELS)])
STUDIO = json_of(lambda name, label: dict(data=dict(image=f'/data/upload/1/0a1b2c3d-{name}'), annotations=[dict(result=[dict(value=dict(choices=[label]))])]))

# name, text, what the labels are called there
LISTS = [
    ('l.txt', lines('img{i}.jpg {label}\n'), LABELS), ('l.lst', lines('img{i}.jpg {yes}\n'), '01'), ('l.txt', lines('img{i}.jpg   {yes} \n',
                                                            'image label\n'), '01'),
    ('list_attr_celeba.txt', lines('img{i}.jpg {sign} {sign:>2}\n', f'{N}\nSmiling Male \n'), ['1', '-1']),
    ('labels.txt', lines('{yes} -0.0{n}51 0.1{n} 0.02\n'), '01'), ('_classes.csv', lines('img{i}.jpg, {no}, {yes}\n', 'filename, neutral, smile\n'), LABELS),
    ('sep.csv', lines('img{i}.jpg;{label}\n', 'sep=;\nfile;label\n'), LABELS), ('wide.csv', lines('img{i}.jpg;{label};;\n', 'file;label;;\n'), LABELS),
    ('metadata.jsonl', '\n'.join(json.dumps(dict(file_name=n, label=v)) for n, v in zip([f'img{i}.jpg' for i in IDS], LABELS)), LABELS),
    ('coco.json', json.dumps(COCO), LABELS), ('studio.json', json.dumps(STUDIO), LABELS),
    ('min.json', json.dumps(json_of(lambda n, v: dict(image=f'/data/local-files/?d=files%2F{n}', choice=v, id=1, annotator=2, lead_time=.5))), LABELS),
    ('map.json', json.dumps(dict(json_of(lambda n, v: (n, v)))), LABELS), ('by_class.json', json.dumps({c: [f'img{i}.jpg' for i, v in zip(IDS,
                                                            LABELS) if v == c] for c in LABELS}), LABELS),
    ('pandas.json', json.dumps(dict(image={str(k): f'img{i}.jpg' for k, i in enumerate(IDS)}, label=dict(enumerate(LABELS)))), LABELS),
    ('cvat.xml', '<annotations>' + lines('<image name="img{i}.jpg"><tag label="{label}"/></image>') + '</annotations>', LABELS)]


@pytest.mark.parametrize('name,text,labels', LISTS, ids=[f'{k}-{x[0]}' for k, x in enumerate(LISTS)])
def test_label_files_are_read_and_predict_finds_their_images(tmp_path, name, text, labels):
    options = dict(label_col='Smiling') if 'celeba' in name else {}
    s = read(tmp_path, FILES | {name: text}, labels=name, **options)
    assert set(s.kept.label) == set(labels) and len(s.kept) == len(s.frame) == N and not s.images_without_row
    smiles = {p for p, label in zip(s.kept.path, s.kept.label) if label in ('smile', '1')}
    assert smiles == {f'files/img{i}.jpg' for i, v in zip(IDS, LABELS) if v == 'smile'}
    if name == 'labels.txt': assert list(s.frame)[5:] == ['given_2', 'given_3', 'given_4'] and s.frame.given_4.tolist() == ['0.02'] * N
    else:
        inputs = open_inputs(tmp_path/name)
        assert [inputs.reader.read_image(n).size for n in inputs.names] == [(24, 24)] * N


@pytest.mark.parametrize('name', ['labels.txt', 'l.txt', 'coco.json', 'studio.json', 'cvat.xml'])
def test_label_files_are_found_without_being_named(tmp_path, name):
    text = next(text for n, text, _ in LISTS if n == name)
    assert read(tmp_path, FILES | {name: text, 'README.txt': 'GENKI-4K', 'classes.txt': 'neutral\nsmile\n'}).kept.label.nunique() == 2


def test_a_list_for_each_class(tmp_path):
    files = {f'{c}_list.txt': ''.join(f'img{i}.jpg\n' for i, v in zip(IDS, LABELS) if v == c) for c in ('smile', 'neutral')}
    for options in ({}, dict(labels='smile_list.txt')):
        s = read(tmp_path, FILES | files, **options)
        assert s.kept.label.value_counts().to_dict() == dict(smile=4, neutral=4)


def test_celeba_with_its_partition_and_people(tmp_path):
    beside = {'list_eval_partition.txt': lines('img{i}.jpg {yes}\n'), 'identity_CelebA.txt': lines('img{i}.jpg 10{no}\n'),
              'list_bbox_celeba.txt': '1\nx y\nimg.jpg 1 2\n'}
    text = next(t for n, t, _ in LISTS if 'celeba' in n)
    for options in ({}, dict(labels='list_attr_celeba.txt')):
        s = read(tmp_path, FILES | beside | {'list_attr_celeba.txt': text}, label_col='Smiling', **options)
        assert s.frame.split.tolist() == ['train', 'valid'] * 4 and set(s.frame.group) == {'100', '101'}
    with pytest.raises(SmileError, match='not clear which column.*label-col.*Smiling'.replace('.*', '[^$]*')): read(tmp_path, {})


def test_labels_by_position_are_asked_about_where_the_order_is_not_clear(tmp_path):
    text = ''.join(f'{k % 2} 0.{k}5\n' for k in range(12))
    with pytest.raises(SmileError, match='which line is of which image'): read(tmp_path/'a', {f'f/{k}.jpg': P for k in range(12)} | {'labels.txt': text})
    with pytest.raises(SmileError, match='which line is of which image'):
        read(tmp_path/'b', {f'{"ab"[k % 2]}x/{k:02}.jpg': P for k in range(12)} | {'l.txt': text}, labels='l.txt')


def test_fer2013_and_the_votes_of_ferplus(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(k % 3, ' '.join(map(str, rng.integers(0, 256, 36))), u) for k, u in enumerate(['Training'] * 4 + ['PublicTest'] * 2 + ['PrivateTest'] * 2)]
    fer = 'emotion,pixels,Usage\n' + ''.join(f'{e},"{p}",{u}\n' for e, p, u in rows)
    votes = 'Usage,Image name,neutral,happiness,unknown,NF\n' + ''.join(f'{u},fer{k:07}.png,{k},{8 - k},2,0\n' for k, (_, _, u) in enumerate(rows))
    s = read(tmp_path, {'fer2013.csv': fer, 'fer2013new.csv': votes}, label_col='emotion')
    assert s.kept.label.tolist() == [str(k % 3) for k in range(8)] and s.kept.split.tolist() == ['train'] * 4 + ['valid'] * 2 + ['test'] * 2
    assert (np.asarray(s.reader.read_image('3'))[..., 0].ravel() == [int(v) for v in rows[3][1].split()]).all()
    assert any('3 happy' in n for n in s.notes)
    plus = read(tmp_path, {})
    assert any('the votes of FER+ are the labels; --label-col emotion' in n for n in plus.notes)
    assert read(tmp_path, {}, labels='fer2013new.csv').frame.equals(plus.frame)
    assert plus.frame.label.tolist() == ['happiness'] * 4 + [''] + ['neutral'] * 3 and plus.frame.reason[4] == 'tie of votes: neutral, happiness'
    assert plus.frame.split.tolist() == s.frame.split.tolist() and read(tmp_path, {}, split_col='none').frame.split.nunique() == 1
    (tmp_path/'bad.csv').write_text('emotion,pixels\n1,1 2 3\n')
    with pytest.raises(SmileError, match='line 2: 3 pixels are no square'): read_source(tmp_path/'bad.csv')


def test_ferplus_has_two_columns_that_are_no_emotions(tmp_path):
    "Rows that most people found to be no face, or of no emotion that has a name, are set aside and are no classes"
    columns = 'neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF'.split(',')
    counts = [dict(neutral=9), dict(happiness=9), dict(NF=10), dict(unknown=6, neutral=4), dict(neutral=6, unknown=4)]
    votes = [[u, f'fer{k}.png', *(c.get(n, 0) for n in columns)] for k, (u, c) in enumerate(zip(['Training'] * 5, counts))]
    write = lambda rows: ''.join(','.join(map(str, row)) + '\n' for row in rows)
    fer = 'emotion,pixels,Usage\n' + ''.join(f'{k % 2},{" ".join(map(str, range(k, k + 16)))},Training\n' for k in range(5))
    s = read(tmp_path, {'fer2013.csv': fer, 'fer2013new.csv': write([['Usage', 'Image name', *columns], *votes])})
    assert s.frame.label.tolist() == ['neutral', 'happiness', '', '', 'neutral']
    assert s.frame.reason.tolist() == ['', '', 'FER+: no face', 'FER+: unknown emotion', '']
    s = read(tmp_path, {'fer2013new.csv': write([['Usage', 'Image name', *columns], *votes[:-1]])})
    assert s.frame.label.tolist() == list('01010') and any('4 rows for 5 images: it is not used' in n for n in s.notes)


def test_ferplus_writes_its_votes_without_a_header(tmp_path):
    rows = {s: ''.join(f'fer{k:07}.png,"(0, 0, 48, 48)",{k},{9 - k},0,0,1,0,0,0,0,0\n' for k in ks) for s, ks in (('Train', range(6)), ('Valid',
                                                            range(6, 9)))}
    images = {f'FER2013{s}/fer{k:07}.png': P for s, ks in (('Train', range(6)), ('Valid', range(6, 9))) for k in ks}
    s = read(tmp_path, images | {f'FER2013{s}/label.csv': t for s, t in rows.items()})
    assert s.frame.label.tolist() == ['happiness'] * 5 + ['neutral'] * 4 and s.frame.split.tolist() == ['train'] * 6 + ['valid'] * 3


def test_images_in_parquet_as_on_the_hub(tmp_path):
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    said = {'huggingface': json.dumps(dict(info=dict(features=dict(label=dict(names=['neutral', 'smile'], _type='ClassLabel')))))}
    (tmp_path/'data').mkdir()
    for split in ('train', 'validation', 'test'):
        cells = dict(image=[dict(bytes=picture(seed=k), path=None) for k in range(6)], label=[k % 2 for k in range(6)])
        parquet.write_table(pa.table(cells).replace_schema_metadata(said), tmp_path/f'data/{split}-00000-of-00001.parquet', row_group_size=4)
    s = read_source(tmp_path)
    assert s.kept.label.tolist() == ['neutral', 'smile'] * 9 and s.kept.split.value_counts().to_dict() == dict(train=6, valid=6, test=6)
    assert s.reader.read_bytes('data/test-00000-of-00001.parquet/5') == picture(seed=5) and len(list(open_inputs(tmp_path).names)) == 18
    one = read_source(tmp_path/'data/train-00000-of-00001.parquet')
    assert len(one.kept) == 6 and one.reader.read_bytes(one.kept.path[4]) == picture(seed=4)
    import pickle
    assert pickle.loads(pickle.dumps(one.reader)).read_bytes(one.kept.path[4]) == picture(seed=4)


def test_excel(tmp_path):
    openpyxl = pytest.importorskip('openpyxl', reason='the extra xlsx is not installed')
    book, buf = openpyxl.Workbook(), io.BytesIO()
    for row in [['file', 'label', None], *([f'img{i}.jpg', v, None] for i, v in zip(IDS, LABELS))]: book.active.append(row)
    book.save(buf)
    s = read(tmp_path, FILES | {'labels.xlsx': buf.getvalue()})
    assert s.kept.label.tolist() == LABELS and len(list(open_inputs(tmp_path/'labels.xlsx').names)) == N
    for name, data, said in (('old.xls', b'\xd0\xcf\x11\xe0' + bytes(99), 'before 2007'), ('no.xlsx', b'PK\x03\x04' + bytes(99), 'cannot be read as a zip')):
        with pytest.raises(SmileError, match=said): read(tmp_path, {name: data}, labels=name)


@pytest.mark.parametrize('text,said', [('{"info": 1, "licences": 2}', 'JSON of a layout that is not known: an object with info, licences'), ('[1, 2]',
                                                            'layout that is not known: list'),
                                       ('{"a": ', 'cannot be read as JSON'), ('<x><y/></x>',
                                                            'not that of CVAT'), ('<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', 'declares entities'),
                                       ('{"images": [{"id": 1}], "annotations": []}',
                                        'looks like COCO JSON, and a part of it is missing'), ('[' * 99_999, 'cannot be read as JSON')])
def test_what_is_not_known_is_named_and_never_cut_at_commas(tmp_path, text, said):
    with pytest.raises(SmileError, match=said) as e: read(tmp_path, FILES | {'x.json': text}, labels='x.json')
    assert len(str(e.value)) < 700


@pytest.mark.parametrize('way', ['labelme', 'voc', 'yolo', 'affectnet'])
def test_a_file_beside_each_image(tmp_path, way):
    def npy(value):
        np.save(buf := io.BytesIO(), value)
        return buf.getvalue()
    made = {'labelme': lambda k: (f'faces/{k}.json', json.dumps(dict(flags={}, shapes=[dict(label='ab'[k % 2])], imagePath='x'))),
            'voc': lambda k: (f'Annotations/{k}.xml', f'<annotation><object><name>{"ab"[k % 2]}</name></object></annotation>'),
            'yolo': lambda k: (f'labels/faces/{k}.txt', f'{k % 2} .5 .5 .1 .1\n'), 'affectnet': lambda k: (f'annotations/{k}_exp.npy', npy(k % 2))}[way]
    s = read(tmp_path, {f'faces/{k}.jpg': P for k in range(6)} | dict(map(made, range(5))))
    assert s.kept.label.tolist() in (['a', 'b', 'a', 'b', 'a'], ['0', '1', '0', '1', '0']) and s.images_without_row == ['faces/5.jpg']


# votes

def test_votes_count_ties_are_set_aside_and_weak_rows_on_request(tmp_path):
    files = {f'{n}.png': P for n in 'abcd'} | {'v.csv': 'file,happy,sad,NF\na,8,1,1\nb,5,5,0\nc,4,6,0\nd,0,0,0\n'}
    s = read(tmp_path, files)
    assert s.frame.label.tolist() == ['happy', '', 'sad', ''] and s.frame.agreement.tolist() == ['0.8', '0.5', '0.6', '0.0']
    assert s.frame.reason.tolist() == ['', 'tie of votes: happy, sad', '', 'unlabelled'] and s.frame.happy.tolist() == ['8', '5', '4', '0']
    assert read(tmp_path, {}, min_agreement=0.7).frame.reason.tolist()[2] == 'agreement below 0.7'
    with pytest.raises(OptionError, match='no columns of votes'):
        read(tmp_path/'x', {f'{n}.png': P for n in 'ab'} | {'l.csv': 'file,label\na,x\nb,y\n'}, min_agreement=0.5)
    odd = {f'{n}.png': P for n in 'abc'} | {'v.csv': 'file,happy,sad\na,8,1\nb,2,5\nc,4,6\n'}
    with pytest.raises(SmileError, match='not clear which column'): read(tmp_path/'odd', odd)
    assert read(tmp_path/'odd', {}, label_col='sad, happy').frame.label.tolist() == ['happy', 'sad', 'sad']


def test_people_who_disagree_in_label_studio(tmp_path):
    tasks = [dict(data=dict(image=f'{n}.png'), annotations=[dict(result=[dict(value=dict(choices=[c]))]) for c in cs]) for n, cs in (('a', 'xxy'),
                                                            ('b', 'xy'), ('c', 'y'), ('d', ''))]
    s = read(tmp_path, {f'{n}.png': P for n in 'abcd'} | {'p.json': json.dumps(tasks)}, min_agreement=0.6)
    assert s.frame.label.tolist() == ['x', '', 'y', ''] and s.frame.reason.tolist() == ['', 'several labels: x, y', '', 'unlabelled']


# splits in columns

SPLIT_COLUMNS = [('partition', '001122', ['train', 'train', 'valid', 'valid', 'test', 'test']), ('Usage', ['Training'] * 3 + ['PublicTest',
                                                            'PrivateTest', 'PrivateTest'], None),
                 ('is_valid', ['False'] * 4 + ['True'] * 2, ['train'] * 4 + ['valid'] * 2), ('is_test', '000011', ['train'] * 4 + ['test'] * 2),
                 ('is_train', '111100', ['train'] * 4 + ['test'] * 2), ('fold', '012340', ['train', 'train', 'train', 'valid', 'test', 'train']),
                 ('stage', ['TRAIN', 'TRAIN', 'VALIDATE', 'EVAL', 'HOLDOUT', 'TEST'], ['train', 'train', 'valid', 'valid', 'test', 'test'])]


@pytest.mark.parametrize('column,cells,splits', SPLIT_COLUMNS)
def test_a_column_of_splits_is_said_and_obeyed_where_named(tmp_path, column, cells, splits):
    splits = splits or ['train'] * 3 + ['valid', 'test', 'test']
    text = f'image,label,{column}\n' + ''.join(f'{k},{"ab"[k % 2]},{c}\n' for k, c in enumerate(cells))
    s = read(tmp_path, {f'{k}.png': P for k in range(6)} | {'l.csv': text})
    assert set(s.frame.split) == {''} and any(f'column {column} looks like a split: --split-col {column}' in n for n in s.notes)
    assert read(tmp_path, {}, split_col=column).frame.split.tolist() == splits
    assert not any('looks like a split' in n for n in read(tmp_path, {}, split_col='none').notes)


def test_columns_that_are_no_splits_are_not_said():
    assert not split_meanings('colour', ['red', 'blue']) and not split_meanings('partition', ['0', '7']) and not split_meanings('fold', ['0', '1'])


# numbers as labels

@pytest.mark.parametrize('cells', [[f'{k / 24:.3f}' for k in range(24)], list(range(24)), [k % 60 for k in range(400)],
                                   [f'{k % 14 / 10}' for k in range(99)]],
                         ids=['fractions', 'ids', 'ages', 'rounded'])
def test_a_measure_is_no_class(tmp_path, cells):
    files = {f'{k}.png': P for k in range(len(cells))} | {'l.csv': 'image,score\n' + ''.join(f'{k}.png,{v}\n' for k, v in enumerate(cells))}
    with pytest.raises(SmileError, match=rf'score holds {len(set(cells))} different numbers in {len(cells)} rows: a measure, not classes'):
        read(tmp_path, files)


def test_numbers_that_are_classes(tmp_path):
    files = {f'{k}.png': P for k in range(21)} | {'l.csv': 'image,rating\n' + ''.join(f'{k}.png,{k % 7 + 1}\n' for k in range(21))}
    assert read(tmp_path, files).kept.label.nunique() == 7
    texts = {f'{k}.png': P for k in range(24)} | {'l.csv': 'image,remark\n' + ''.join(f'{k}.png,remark {k}\n' for k in range(24))}
    with pytest.raises(SmileError, match='remark holds 24 different values in 24 rows'): read(tmp_path/'t', texts)


def test_a_map_names_numbers(tmp_path):
    files = {f'{k}.png': P for k in range(4)} | {'l.csv': 'image,label\n0,0\n1,1\n2,0\n3,\n', 'classes.json': '{"neutral": 0, "smile": 1}',
                                                 'few.csv': '0,neutral\n'}
    assert any('--label-map' in n and 'classes.json' in n for n in read(tmp_path, files, labels='l.csv').notes)
    assert read(tmp_path, {}, labels='l.csv', label_map='classes.json').frame.label.tolist() == ['neutral', 'smile', 'neutral', '']
    with pytest.raises(OptionError, match='has no name for 1'): read(tmp_path, {}, labels='l.csv', label_map='few.csv')
    with pytest.raises(SmileError, match='gone.json does not exist'): read(tmp_path, {}, labels='l.csv', label_map='gone.json')


# names that nearly fit

NEARLY = {
    'lost zeros': lambda i: str(int(i)), 'a float': lambda i: f'{int(i)}.0', 'another ending': lambda i: f'img{i}.png', 'case': lambda i: f'IMG{i}.JPG',
    'url': lambda i: f'https://host/x/img{i}.jpg?t=1', 'local files': lambda i: f'/data/local-files/?d=files%2Fimg{i}.jpg',
    'spaces': lambda i: f'img%20{i}.jpg', 'hash': lambda i: f'/data/upload/3/0a1b2c3d-img{i}.jpg',
    'roboflow': lambda i: f'img{i}_jpg.rf.0123abcd.jpg', 'prefix': lambda i: f'face_img{i}.jpg', 'no prefix': lambda i: f'{i}.jpg'}


@pytest.mark.parametrize('how', NEARLY)
def test_names_that_nearly_fit_are_found_and_said(tmp_path, how):
    rows = [f'{NEARLY[how](i)},{v}\n' for i, v in zip(IDS, LABELS)]
    s = read(tmp_path, FILES | {'l.csv': 'id,label\n' + ''.join(rows)})
    assert s.frame.path.tolist() == list(FILES) and s.kept.label.tolist() == LABELS
    assert how == 'case' or any('do not fit those of the images' in n for n in s.notes)
    inputs = open_inputs(tmp_path/'l.csv')
    assert [inputs.reader.read_image(n).size for n in inputs.names] == [(24, 24)] * N
    random.Random(0).shuffle(rows)
    shuffled = read(tmp_path/'b', FILES | {'l.csv': 'id,label\n' + ''.join(rows)})
    assert sorted(map(tuple, shuffled.frame.values.tolist())) == sorted(map(tuple, s.frame.values.tolist()))


def test_a_suffix_of_all_images(tmp_path):
    s = read(tmp_path, {f'aligned/{i}_aligned.jpg': P for i in IDS} | {'l.txt': lines('{i}.jpg {label}\n')}, labels='l.txt')
    assert s.kept.label.tolist() == LABELS


def test_names_are_not_bent_until_they_fit(tmp_path):
    names = [f'img{i}.jpg' for i in IDS]
    for cells in (['Ann', 'Bob'], ['img9999'], ['smile', 'neutral'], ['img0001.png', 'img0001.gif']): assert find_name_rule(names, cells) is None, cells
    with pytest.raises(SmileError, match='None of the 2 rows of l.csv names an image that is there: they say Ann, Bob; the images are called'):
        read(tmp_path/'a', FILES | {'l.csv': 'id,label\nAnn,x\nBob,y\n'})
    with pytest.raises(SmileError, match='Each name fits several images'):
        read(tmp_path/'b', {f'{d}/{n}.png': P for d in 'xy' for n in 'ab'} | {'l.csv': 'id,label\na,x\nb,y\n'}, layout='csv')
    with pytest.raises(SmileError, match='These are links'):
        read(tmp_path/'c', FILES | {'l.csv': 'id,label\nhttps://drive.google.com/open?id=1,x\nhttps://drive.google.com/open?id=2,y\n'})
    some = read(tmp_path/'d', FILES | {'l.csv': 'id,label\n' + ''.join(f'img{i}.jpg,x\n' for i in IDS[:6]) + 'gone,y\n'})
    assert some.frame.reason.tolist() == [''] * 6 + ['no such file']


RAF = {f'Image/{{kind}}/{s}_{i:05}{{end}}.jpg': P for s in ('train', 'test') for i in range(1, 7)}
RAF_LABELS = ''.join(f'{s}_{i:05}.jpg {i % 3 + 1}\n' for s in ('train', 'test') for i in range(1, 7))


def raf(kind, end=''): return {name.format(kind=kind, end=end): data for name, data in RAF.items()}


@pytest.mark.parametrize('files,kind', [(raf('original'), 'original'), (raf('aligned', '_aligned'), 'aligned'),
                                        (raf('original') | raf('aligned', '_aligned'), 'original')])
@pytest.mark.parametrize('where', ['', 'EmoLabel/', 'basic/EmoLabel/'])
def test_raf_db_as_its_makers_pack_it(tmp_path, files, kind, where):
    top = 'basic/' if where.startswith('basic') else ''
    s = read(tmp_path, {top + n: d for n, d in files.items()} | {where + 'list_patition_label.txt': RAF_LABELS})
    assert s.kept.label.value_counts().to_dict() == {'1': 4, '2': 4, '3': 4} and s.kept.split.value_counts().to_dict() == dict(train=6, test=6)
    assert all(f'Image/{kind}/' in p for p in s.kept.path) and any('7 neutral' in n for n in s.notes)


def test_folders_that_say_nothing_are_no_classes(tmp_path):
    with pytest.raises(SmileError, match='folders, aligned, original, are none of classes'): read(tmp_path, raf('original') | raf('aligned', '_aligned'))
    assert set(read(tmp_path, {}, label_level=-1).kept.label) == {'aligned', 'original'}


@pytest.mark.parametrize('files', [('SMILE_list.txt',), ('train.txt', 'test.txt')])
def test_names_without_any_label_are_refused(tmp_path, files):
    lists = {name: ''.join(f'img{i}.jpg\n' for i in IDS[k::2]) for k, name in enumerate(files)}
    with pytest.raises(SmileError, match=f'None of the {4 * len(files)} rows .* has a label') as e: read(tmp_path, FILES | lists)
    assert 'NON-SMILE_list.txt' in e.value.hint


def test_tables_named_for_splits_in_their_stems(tmp_path):
    "FairFace: fairface_label_train.csv and fairface_label_val.csv; other tables stay a question"
    rows = {s: 'file,age,gender\n' + ''.join(f'{s}/{i}.png,20-29,{"MF"[i % 2]}\n' for i in range(4)) for s in ('train', 'val')}
    images = {f'{s}/{i}.png': P for s in ('train', 'val') for i in range(4)}
    s = read(tmp_path/'a', images | {f'fairface_label_{s}.csv': t for s, t in rows.items()}, label_col='gender')
    assert s.frame.split.tolist() == ['train'] * 4 + ['valid'] * 4 and s.frame.label.tolist() == ['M', 'F'] * 4
    with pytest.raises(SmileError, match='several tables'):
        read(tmp_path/'b', images | {'smile_train.csv': rows['train'], 'age_val.csv': rows['val']})


def test_a_manifest_of_sagemaker(tmp_path):
    lines = [{'source-ref': f's3://bucket/images/{i}.png', 'expression': i % 2,
              'expression-metadata': {'class-name': 'ab'[i % 2], 'confidence': 0.9, 'type': 'groundtruth/image-classification'}} for i in range(4)]
    s = read(tmp_path, {f'images/{i}.png': P for i in range(4)} | {'train.manifest': '\n'.join(map(json.dumps, lines))})
    assert s.frame.label.tolist() == ['a', 'b'] * 2 and not any('left aside' in n for n in s.notes)


@pytest.mark.parametrize('project', [False, True])
@pytest.mark.parametrize('attributes', [lambda c: (dict(expression=c), {}), lambda c: ({}, dict(name=c)),
                                        lambda c: (dict(expression={c: True, 'other': False}), {})], ids=['image', 'region', 'boxes'])
def test_json_of_the_vgg_image_annotator(tmp_path, attributes, project):
    def image(i):
        own, region = attributes('ab'[i % 2])
        return dict(filename=f'{i}.png', size=9, regions=[dict(shape_attributes={}, region_attributes=region)], file_attributes=own)
    images = {f'{i}.png9': image(i) for i in range(4)}
    said = dict(_via_settings={}, _via_img_metadata=images, _via_attributes={}) if project else images
    s = read(tmp_path, {f'{i}.png': P for i in range(4)} | {'via.json': json.dumps(said)})
    assert s.frame.label.tolist() == ['a', 'b'] * 2 and any('VIA JSON' in n for n in s.notes)


def test_broken_files_of_labels_are_no_crash(tmp_path):
    "Empty .npy of AffectNet beside images"
    with pytest.raises(SmileError, match='has no labelled images'):
        read(tmp_path, {f'images/{i}.png': P for i in range(4)} | {f'annotations/{i}_exp.npy': b'' for i in range(4)})


def test_one_hot_columns_with_a_row_of_two_classes(tmp_path):
    "A class that is called as a usual column of labels is still one of the columns; the row of both is set aside"
    rows = [f'{k:02}.jpg,{int(k % 2 == 0)},{int(k % 2)}' for k in range(24)]
    images = {f'images/{k:02}.jpg': P for k in range(24)}
    rows[0] = rows[0].replace('1,0', '1,1')
    s = read(tmp_path, images | {'_classes.csv': 'filename, neutral, smile\n' + '\n'.join(rows)})
    assert s.frame.label.tolist() == ['', 'smile', *['neutral', 'smile'] * 11] and s.frame.reason[0] == 'tie of votes: neutral, smile'


def test_files_left_aside_are_counted_where_nothing_is_left(tmp_path):
    with pytest.raises(SmileError, match=r'has no labelled images\. 3 files are left aside, .*: 2 .cr2, 1 .mp4'):
        read(tmp_path, {'a/1.cr2': b'II', 'b/2.cr2': b'II', 'b/3.mp4': b'x'})


def test_lists_of_classes_beside_folders_of_people(tmp_path):
    "LFW with the lists of who smiles: the folders are people, and the lists say the class"
    images = {f'lfw/Ann_Lee{i}/Ann_Lee{i}_0001.jpg': P for i in range(8)}
    lists = {f'{name}_list.txt': ''.join(f'Ann_Lee{i}_0001.jpg\n' for i in range(8) if i % 2 == k) for k, name in enumerate(('NON-SMILE', 'SMILE'))}
    with pytest.raises(SmileError, match='look like those of people'): read(tmp_path/'a', images)
    assert sorted(read(tmp_path/'b', images | lists).frame.label) == ['NON-SMILE'] * 4 + ['SMILE'] * 4


def test_a_readme_without_an_ending_is_no_image(tmp_path):
    "GENKI in its folder: the Nth line is the Nth image, and README is none"
    files = {f'genki4k/files/file{i + 1:04}.jpg': P for i in range(12)} | {'genki4k/README': 'words', 'genki4k/LICENSE': 'words'}
    s = read(tmp_path, files | {'genki4k/labels.txt': ''.join(f'{i % 2} 0.1 0.2 0.3\n' for i in range(12))})
    assert s.frame.label.tolist() == ['0', '1'] * 6 and not s.images_without_row and not any('left aside' in n for n in s.notes)


def test_a_list_of_numbers_and_classes(tmp_path):
    s = read(tmp_path, {f'images/{i:03}.png': P for i in range(8)} | {'labels.txt': ''.join(f'{i:03} {"ab"[i % 2]}\n' for i in range(8))})
    assert s.frame.label.tolist() == ['a', 'b'] * 4 and s.frame.path[0] == 'images/000.png'


@pytest.mark.parametrize('encoding,name', [('gb18030', '微笑'), ('shift_jis', '笑顔'), ('cp1251', 'Лицо')])
def test_a_table_in_another_encoding_is_named_with_the_line_that_saves_it(tmp_path, monkeypatch, encoding, name):
    rows = 'file,label\n' + ''.join(f'{name}{i}.png,{name if i % 2 else "x"}\n' for i in range(8))
    files = {f'images/{name}{i}.png': P for i in range(8)} | {'labels.csv': rows.encode(encoding)}
    with pytest.raises(SmileError, match=f'in the encoding {encoding}') as e: read(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    exec(e.value.hint[e.value.hint.index('from pathlib'):], {})
    assert read_source(tmp_path).frame.label.tolist() == ['x', name] * 4


# more of the field's own files, and of what people make of their labels

TABLES = dict(
    words_of_ticks=({'l.csv': 'file,smile,neutral\n' + ''.join(f'img{i}.jpg,{v == "smile"},{v != "smile"}\n' for i, v in zip(IDS, LABELS))}, LABELS),
    crosses=({'l.csv': 'file,smile,neutral\n' + ''.join(f'img{i}.jpg,{"x" * (v == "smile")},{"x" * (v != "smile")}\n' for i, v in zip(IDS, LABELS))}, LABELS),
    pairs=({'l.json': json.dumps([[f'img{i}.jpg', v] for i, v in zip(IDS, LABELS)])}, LABELS),
    below_a_key=({'l.json': json.dumps(dict(info='of May', data=json_of(lambda n, v: dict(file=n, label=v))))}, LABELS),
    dlib=({'l.xml': '<dataset><images>' + lines('<image file="img{i}.jpg"><box top="1"><label>{label}</label></box></image>') + '</images></dataset>'}, LABELS),
    expw=({'label.lst': lines('img{i}.jpg {n} 10 20 60 70 81.5 {yes}\n')}, '01'))


@pytest.mark.parametrize('how', TABLES)
def test_tables_of_other_tools_are_read_without_being_named(tmp_path, how):
    files, labels = TABLES[how]
    s = read(tmp_path, FILES | files)
    want = LABELS if labels == LABELS else [labels[v == 'smile'] for v in LABELS]
    assert dict(zip(s.kept.path, s.kept.label)) == {f'files/img{i}.jpg': v for i, v in zip(IDS, want)}


def test_celeba_in_its_folders(tmp_path):
    "Img, Anno and Eval, as its makers pack it: the table is found, its splits and people are in other folders"
    files = {f'Img/img_align_celeba/img{i}.jpg': P for i in IDS} | {
        'Anno/list_attr_celeba.txt': lines('img{i}.jpg {sign} 1\n', f'{N}\nSmiling Male\n'), 'Anno/identity_CelebA.txt': lines('img{i}.jpg p{yes}\n'),
        'Eval/list_eval_partition.txt': ''.join(f'img{i}.jpg {k // 3}\n' for k, i in enumerate(IDS))}
    for options in (dict(), dict(labels='Anno/list_attr_celeba.txt')):
        s = read(tmp_path, files, label_col='Smiling', **options)
        assert s.kept.label.tolist() == ['1' if v == 'smile' else '-1' for v in LABELS] and s.kept.group.nunique() == 2
        assert s.kept.split.tolist() == ['train'] * 3 + ['valid'] * 3 + ['test'] * 2
    with pytest.raises(SmileError, match='not clear which column'): read(tmp_path, {})


def test_celeba_in_csv_as_kaggle_has_it(tmp_path):
    files = {f'img_align_celeba/img_align_celeba/img{i}.jpg': P for i in IDS} | {
        'list_attr_celeba.csv': lines('img{i}.jpg,{sign},1\n', 'image_id,Smiling,Male\n'), 'list_bbox_celeba.csv': lines('img{i}.jpg,1\n', 'image_id,x_1\n'),
        'list_eval_partition.csv': 'image_id,partition\n' + ''.join(f'img{i}.jpg,{k // 3}\n' for k, i in enumerate(IDS))}
    s = read(tmp_path, files, label_col='Smiling')
    assert s.kept.split.tolist() == ['train'] * 3 + ['valid'] * 3 + ['test'] * 2 and any('the split of 8 rows' in n for n in s.notes)


def test_an_option_of_tables_where_no_table_is(tmp_path):
    with pytest.raises(SmileError, match='no labelled images.*one folder tells nothing apart'): read(tmp_path, FILES, label_col='Smiling')


def test_ck_plus_labels_the_last_image_of_a_sequence(tmp_path):
    frames = {f'cohn-kanade-images/S{p:03}/{s:03}/S{p:03}_{s:03}_{f:08}.png': P for p in (5, 6, 7) for s in (1, 2) for f in (1, 2)}
    texts = {f'Emotion/S{p:03}/{s:03}/S{p:03}_{s:03}_{2:08}_emotion.txt': f'   {2 * s + 1}.0000000e+00\n' for p in (5, 6, 7) for s in (1, 2)}
    with pytest.raises(SmileError, match='either may be the class'): read(tmp_path, frames)
    s = read(tmp_path, texts, group_from=r'^(S\d+)_')
    assert s.kept.label.value_counts().to_dict() == dict(disgust=3, happy=3) and len(s.images_without_row) == 6 and s.kept.group.nunique() == 3


def test_people_who_wrote_a_class_each(tmp_path):
    rows = ['smile,smile,neutral', 'neutral,,neutral', 'smile,neutral,', ',,']
    files = FILES | {'l.csv': 'image,ann,ben,cat\n' + ''.join(f'img{i}.jpg,{rows[k % 4]}\n' for k, i in enumerate(IDS))}
    s = read(tmp_path, files, label_col='ann,ben,cat')
    assert s.frame.label[:4].tolist() == ['smile', 'neutral', '', ''] and s.frame.reason[:4].tolist() == ['', '', 'tie of votes: smile, neutral', 'unlabelled']
    assert s.frame.agreement[:2].tolist() == ['0.667', '1.0'] and 'by the majority of' in s.notes[1]
    assert read(tmp_path, {}, label_col='ann,ben,cat', min_agreement=.7).frame.reason[0] == 'agreement below 0.7'


@pytest.mark.parametrize('columns,cell,said', [('split,x', 'A,1', 'column split may say splits'), ('partition,x', '1,9', 'column partition may say splits'),
                                               ('test,x', 'yes,1', 'column test looks like a split')])
def test_columns_that_may_be_splits_are_said(tmp_path, columns, cell, said):
    other = cell.translate(str.maketrans('A1y', 'B2n')).replace('nes', 'no')
    rows = ''.join(f'img{i}.jpg,{v},{cell if k % 2 else other}\n' for k, (i, v) in enumerate(zip(IDS, LABELS)))
    assert any(said in n for n in read(tmp_path, FILES | {'l.csv': f'file,label,{columns}\n' + rows}).notes)


def test_numbers_that_begin_one_too_low_are_no_names(tmp_path):
    "Row 0 is of image 1: each label would be given to the next image, but for the last"
    rows = ''.join(f'{k},{v}\n' for k, v in enumerate(LABELS))
    images = {f'files/{i}.jpg': P for i in IDS}
    with pytest.raises(SmileError, match='names an image that is there: they say 0, 1, 2') as e: read(tmp_path, images | {'l.csv': 'id,label\n' + rows})
    assert 'count the rows' in e.value.hint
    s = read(tmp_path, {'l.csv': 'id,label\n' + ''.join(f'{k + 1},{v}\n' for k, v in enumerate(LABELS))})
    assert s.kept.label.tolist() == LABELS


@pytest.mark.parametrize('channels', [1, 3])
def test_a_column_for_each_pixel_is_refused_with_the_line_that_converts_it(tmp_path, monkeypatch, channels):
    n = 64 * channels
    rows = [f'{k % 2},{",".join(str((k + j) % 256) for j in range(n))}' for k in range(6)]
    files = {'mnist.csv': f'label,{",".join(f"pixel{j}" for j in range(n))}\n' + '\n'.join(rows)}
    with pytest.raises(SmileError, match=f'a column for each of {n} pixels') as e: read_source(folder(tmp_path, files)/'mnist.csv')
    monkeypatch.chdir(tmp_path)
    exec(e.value.hint[e.value.hint.index('import numpy'):], {})
    s = read_source('mnist.npz')
    pixels = np.asarray(s.reader.read_image('2')).reshape(-1)[[0, 3]].tolist()
    assert s.kept.label.tolist() == ['0', '1'] * 3 and pixels == ([2, 3] if channels == 1 else [2, 5])


def test_names_in_the_yaml_of_yolo(tmp_path):
    files = {f'train/images/{i}.jpg': P for i in range(6)} | {f'train/labels/{i}.txt': f'{i % 2} 0.5 0.5 0.1 0.1\n' for i in range(6)}
    s = read(tmp_path, files | {'data.yaml': 'nc: 2\nnames: [neutral, smile]\n'})
    assert any('--label-map' in n and 'data.yaml' in n for n in s.notes)
    assert read(tmp_path, {}, label_map='data.yaml').kept.label.tolist() == ['neutral', 'smile'] * 3
    (tmp_path/'data.yaml').write_text('names: [a')
    with pytest.raises(SmileError, match='cannot be read as YAML'): read(tmp_path, {}, label_map='data.yaml')


def test_json_that_is_not_known_is_named_where_nothing_else_is_there(tmp_path):
    with pytest.raises(SmileError, match='d.json is JSON of a layout that is not known: an object with info, items'):
        read(tmp_path, FILES | {'d.json': '{"info": {}, "items": [{"id": 1}]}'})


@pytest.mark.parametrize('where', ['default/{s}/0000.parquet', '{s}/part-0.parquet', 'data/{s}-00000-of-00001.parquet'])
def test_parquet_of_images_in_any_folder_and_column(tmp_path, where):
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    for s in ('train', 'validation'):
        path = tmp_path/where.format(s=s)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table(dict(png=[None, picture(seed=1), picture(seed=2)], hash=[b'1', b'2', b'3'], label=['x', 'x', 'y'])), path)
    source, inputs = read_source(tmp_path), open_inputs(tmp_path)
    assert source.frame.split.value_counts().to_dict() == dict(train=3, valid=3) and list(inputs.names) == sorted(source.frame.path)
    assert source.reader.read_bytes(source.frame.path[1]) == picture(seed=1)


@pytest.mark.parametrize('made,labels', [(np.eye(3)[[0, 2, 1, 2]], '0212'), (np.eye(2, dtype=bool)[[1, 0, 1, 0]], '1010'),
                                         (np.array([[3.], [1.], [3.], [1.]]), '3131'), (np.array([0., 1., 0., 1.]), '0101')])
def test_labels_in_arrays_one_hot_or_as_floats(tmp_path, made, labels):
    "The first column of one-hot labels would be another question"
    x = np.zeros((4, 8, 8), np.uint8)
    np.save(folder(tmp_path, {})/'x.npy', x), np.save(tmp_path/'y.npy', made)
    np.savez(tmp_path/'z.npz', images=x, labels=made, **dict(boxes=np.ones((4, 4))) if made.ndim == 1 else {})
    for name in ('x.npy', 'z.npz'): assert ''.join(read_source(tmp_path/name).frame.label) == labels
    np.save(tmp_path/'y.npy', np.array([[1, 5], [2, 6], [1, 7], [2, 8]])), np.savez(tmp_path/'z.npz', images=x, labels=np.full((4, 2), .5))
    for name in ('x.npy', 'z.npz'):
        with pytest.raises(SmileError, match='has 2 values for each image'): read_source(tmp_path/name)


@pytest.mark.parametrize('where', ['annotations/{s}_labels.csv', 'metadata/{s}.csv', 'labels/labels_{s}.tsv'])
def test_tables_in_folders_for_them(tmp_path, where):
    images = {f'images/{s}/{s}{i}.png': P for s in ('train', 'val') for i in range(4)}
    cut = '\t' if where.endswith('tsv') else ','
    tables = {where.format(s=s): ''.join(f'{s}{i}.png{cut}{"ab"[i % 2]}\n' for i in range(4)) for s in ('train', 'val')}
    s = read(tmp_path, images | tables)
    assert s.kept.label.value_counts().to_dict() == dict(a=4, b=4) and s.kept.split.value_counts().to_dict() == dict(train=4, valid=4)


def test_coco_with_a_file_for_each_split_in_a_folder(tmp_path):
    def coco(s): return json.dumps(COCO | dict(images=[dict(id=k, file_name=f'{s}{k}.jpg') for k in range(N)]))
    images = {f'{s}2017/{s}{k}.jpg': P for s in ('train', 'val') for k in range(N)}
    s = read(tmp_path, images | {f'annotations/instances_{s}2017.json': coco(s) for s in ('train', 'val')})
    assert s.kept.split.value_counts().to_dict() == dict(train=N, valid=N) and set(s.kept.label) == set(LABELS)


@pytest.mark.parametrize('name', ['class_indices.json', 'class_to_idx.json', 'label2id.json', 'id2label.json', 'classes.txt', 'label_map.csv'])
def test_files_that_name_numbers_are_said(tmp_path, name):
    s = read(tmp_path, FILES | {'l.csv': lines('img{i}.jpg,{yes}\n', 'file,label\n'), name: '{"neutral": 0, "smile": 1}'}, labels='l.csv')
    assert any(name in n and '--label-map' in n for n in s.notes)
    if name.endswith('json') and name != 'id2label.json': assert read(tmp_path, {}, labels='l.csv', label_map=name).kept.label.tolist() == LABELS
