"Zips, tables and arrays that would fill the memory, or say what is not so: refused in words, at once, and nothing is written."
import io
import struct
import zipfile

import numpy as np
import pytest
from conftest import cheap, folder, picture

import fastsmile.data.archives as archives
import fastsmile.data.cells as cells
from fastsmile.data.archives import MAX_UNPACK_RATIO, open_zip, read_member
from fastsmile.core.errors import SmileError
from fastsmile.data.images import ImageError
from fastsmile.data.readers import ZipReader
from fastsmile.inference.inputs import open_inputs
from fastsmile.config.fields import SourceOptions
from fastsmile.data.source import read_source

def zipped(path, how=zipfile.ZIP_DEFLATED, **members):
    with zipfile.ZipFile(path, 'w', how) as z:
        for n, d in members.items(): z.writestr(n, d)
    return path


def lying(path, declared: int):
    "A zip whose only member says that it has so many bytes, in both of its headers"
    data = bytearray(path.read_bytes())
    local, central = data.index(b'PK\x03\x04'), data.index(b'PK\x01\x02')
    data[local + 22:local + 26] = data[central + 24:central + 28] = struct.pack('<I', declared)
    path.write_bytes(data)
    return path


def test_names_that_lead_out_are_text(tmp_path, monkeypatch):
    "`..`, absolute paths, drives, links: their pictures are read where they are pictures, and no file appears anywhere"
    inside, names = tmp_path/'inside', ['../../up.png', '/abs.png', 'C:\\x.png', '..\\b.png', 'a/./../c.png', 'nul\x01.png']
    inside.mkdir()
    monkeypatch.chdir(inside)
    path = zipped(inside/'faces.zip', **{n: picture(seed=i) for i, n in enumerate(names)})
    link = zipfile.ZipInfo('link.png')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, 'a') as z: z.writestr(link, '/etc/passwd')
    reader = ZipReader(path)
    seen = ['/abs.png', 'C:/x.png', 'nul\x01.png']  # parts that begin with a dot are hidden
    assert sorted(reader.names()) == sorted([*seen, 'link.png'])
    for n in names: assert reader.read_image(n.replace('\\', '/')).size == (24, 24)
    with pytest.raises(ImageError, match='not an image'): reader.read_image('link.png')
    from fastsmile.config.commands import AuditConfig
    from fastsmile.reports.audit import audit
    rows = 'path,label\n' + ''.join(f'"{n}",{"ab"[i % 2]}\n' for i, n in enumerate([*names, 'link.png']))
    (inside/'rows.csv').write_text(rows)
    done = audit(path, AuditConfig(out=str(inside/'out'), labels=str(inside/'rows.csv')))
    assert sorted(done.table.path[done.table.reason == '']) == sorted(seen)
    assert sorted(p.name for p in inside.iterdir()) == ['faces.zip', 'out', 'rows.csv'] and [p.name for p in tmp_path.iterdir()] == ['inside']


def test_a_link_in_a_folder_that_leads_out_is_a_file_like_others(tmp_path):
    "A folder is the user's own: what a link in it names is read, and a loop ends"
    folder(tmp_path, {'in/a.png': picture(), 'secret.txt': 'words'})
    (tmp_path/'in'/'b.png').symlink_to(tmp_path/'secret.txt')
    (tmp_path/'in'/'loop').symlink_to(tmp_path/'in')
    made = open_inputs(tmp_path/'in')
    assert list(made.names) == ['a.png', 'b.png']
    with pytest.raises(ImageError, match='not an image'): made.reader.read_image('b.png')


def test_bombs(tmp_path):
    "One member that unpacks to gigabytes, many that do so together, members that overlap, ways of packing that unpack in one step"
    big = zipped(tmp_path/'ratio.zip', **{'a.png': bytes(64 * 2**20), 'train.csv': b'0' * (64 * 2**20)})
    others = [zipped(tmp_path/f'other{how}.zip', how, **{'a.png': bytes(2**20)}) for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)]
    with cheap():
        with pytest.raises(ImageError, match='bytes that unpack to 67,108,864'): ZipReader(big).read_image('a.png')
        with pytest.raises(SmileError, match=r'train.csv.*bytes that unpack'): read_source(big)
        for other in others:
            with pytest.raises(ImageError, match='another way than deflate'): ZipReader(other).read_image('a.png')
    data = bytearray(zipped(tmp_path/'many.zip', **{f'{i}.png': b'x' for i in range(40)}).read_bytes())
    at = -1
    while (at := data.find(b'PK\x01\x02', at + 1)) >= 0: data[at + 24:at + 28] = struct.pack('<I', 2**31)
    (tmp_path/'many.zip').write_bytes(data)
    with cheap(), pytest.raises(SmileError, match='times its size, as a bomb does'): ZipReader(tmp_path/'many.zip').names()
    first = bytearray(zipped(tmp_path/'twice.zip', zipfile.ZIP_STORED, **{f'{i}.png': picture() for i in range(30)}).read_bytes())
    at, where = -1, first.index(b'PK\x01\x02')
    while (at := first.find(b'PK\x01\x02', at + 1)) >= 0: first[at + 20:at + 24] = struct.pack('<I', where - 100)  # each is packed in all bytes before
    (tmp_path/'twice.zip').write_bytes(first)
    with cheap(), pytest.raises(SmileError, match='its members overlap'): ZipReader(tmp_path/'twice.zip').names()


def test_a_member_that_says_it_is_small(tmp_path):
    "Ten bytes in the header and 64 MiB in the data: ten bytes are unpacked, and the checksum says the rest"
    path = zipped(tmp_path/'a.zip', **{'a.png': bytes(64 * 2**20)})
    assert path.stat().st_size < 2**18
    lying(path, 10)
    with cheap(mib=20), pytest.raises(ImageError, match='cannot be unpacked.*CRC'): ZipReader(path).read_image('a.png')
    lying(path, 2**32 - 2)
    with cheap(), pytest.raises(SmileError, match='as a bomb does'): ZipReader(path).read_image('a.png')


def test_limits_that_cannot_be_reached_here(tmp_path, monkeypatch):
    path = zipped(tmp_path/'a.zip', **{f'{i}.png': picture() for i in range(5)})
    monkeypatch.setattr(archives, 'MAX_ZIP_MEMBERS', 4)
    with pytest.raises(SmileError, match='it has 5 members, and 4 are the most'): open_zip(path)
    monkeypatch.setattr(archives, 'MAX_ZIP_MEMBERS', 5)
    with open_zip(path) as z, pytest.raises(ValueError, match='more than 10 bytes'): read_member(z, '0.png', 10)


def test_zips_within_zips_encrypted_and_broken_ones(tmp_path):
    "A zip within a zip stays closed, whatever it holds, itself included"
    inner = zipped(tmp_path/'inner.zip', **{'b.png': picture()}).read_bytes()
    path = zipped(tmp_path/'outer.zip', **{'a.png': picture(), 'inner.zip': inner, 'c.png': inner})
    reader = ZipReader(path)
    assert reader.names() == ['a.png', 'c.png']
    with pytest.raises(ImageError, match='not an image'): reader.read_image('c.png')
    data = bytearray(zipped(tmp_path/'locked.zip', **{'a.png': picture()}).read_bytes())
    for mark, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)): data[data.index(mark) + at] |= 1
    (tmp_path/'locked.zip').write_bytes(data)
    with pytest.raises(ImageError, match='encrypted'): ZipReader(tmp_path/'locked.zip').read_image('a.png')
    for n, d in (('cut', path.read_bytes()[:-30]), ('none', b'PK'), ('empty', b'')):
        (tmp_path/f'{n}.zip').write_bytes(d)
        with pytest.raises(SmileError, match='cannot be read as a zip'): ZipReader(tmp_path/f'{n}.zip').names()


def test_photographs_and_tables_stay_within_the_limits(tmp_path):
    "What people pack is nowhere near them"
    rows = ''.join(f'{i:06}.jpg,NOT smile\n' for i in range(200_000)).encode()
    path = zipped(tmp_path/'a.zip', **{'train.csv': rows, 'a.bmp': picture(size=(900, 700), fmt='BMP')})
    with open_zip(path) as z:
        assert read_member(z, 'train.csv', 2**30) == rows
        assert all(i.file_size < MAX_UNPACK_RATIO / 4 * i.compress_size for i in z.infolist())


def test_a_member_without_a_name(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        z.writestr('a.png', picture())
        z.writestr(zipfile.ZipInfo(''), b'x')
    assert ZipReader(tmp_path/'a.zip').names() == ['a.png']


def sparse(path, size: int):
    "A file of zeros that takes no room on the disk"
    with open(path, 'wb') as f: f.truncate(size)
    return path


def test_tables_of_gigabytes(tmp_path):
    folder(tmp_path, {'a.png': picture(), 'b.png': picture()})
    with cheap():
        with pytest.raises(SmileError, match='labels.csv has more than 268,435,456 bytes'): read_source(sparse(tmp_path/'labels.csv', 5 * 2**30))
        with pytest.raises(SmileError, match='more than 268,435,456 bytes'): read_source(tmp_path)
        from fastsmile.data.plan import read_plan
        with pytest.raises(SmileError, match='more than 268,435,456 bytes'): read_plan(tmp_path/'labels.csv')
        for name in ('list.txt', 'list.csv'):
            with pytest.raises(SmileError, match='Line 1 of .* has more than 65,536 characters'): open_inputs(sparse(tmp_path/name, 5 * 2**30))
        (tmp_path/'labels.csv').write_bytes(b'a,' * 1_000_000)
        with pytest.raises(SmileError, match='has 1,000,001 columns'): read_source(tmp_path/'labels.csv')


def test_a_table_of_parquet_that_says_a_billion_rows(tmp_path):
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    parquet.write_table(pa.table(dict(path=pa.nulls(30_000_000, pa.string()), label=pa.nulls(30_000_000, pa.string()))), tmp_path/'t.parquet')
    assert (tmp_path/'t.parquet').stat().st_size < 2**20
    with cheap(), pytest.raises(SmileError, match='30,000,000 rows of 2 columns are too many'): read_source(tmp_path/'t.parquet')


def test_a_table_of_parquet_whose_groups_say_other_rows(tmp_path):
    "A kilobyte that says three rows, and 93,795,055,226 in its group, kept pyarrow busy without end"
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    where, rows = tmp_path/'t.parquet', 100_000
    parquet.write_table(pa.table(dict(path=['a.png'] * rows)), where, store_schema=False)
    data = where.read_bytes()
    at = data.rfind(bytes([0xc0, 0x9a, 0x0c]))  # 100,000 as Thrift writes it: the last is that of the group
    where.write_bytes(data[:at] + bytes([0xfe, 0xff, 0x7f]) + data[at + 3:])
    with cheap(), pytest.raises(SmileError, match='it says 100,000 rows, and its groups 1,048,575'): read_source(where)


def test_a_small_file_of_parquet_that_unpacks_to_gigabytes(tmp_path, monkeypatch):
    "A text that its dictionary holds once is held once; pages that hold it again and again, and bytes of fixed length, are measured unpacked"
    pa = pytest.importorskip('pyarrow', reason='the extra parquet is not installed')
    from pyarrow import parquet
    folder(tmp_path, {'a.png': picture()})
    where, one = tmp_path/'t.parquet', pa.DictionaryArray.from_arrays(np.zeros(30_000, np.int32), ['x' * 8000])
    parquet.write_table(pa.table(dict(path=one, label=one)), where, compression='zstd', store_schema=False)
    assert where.stat().st_size < 2**16
    with cheap(mib=200), pytest.raises(SmileError, match='None of the 30000 rows of t.parquet names an image'): read_source(where)
    monkeypatch.setattr(cells, 'MAX_TABLE_BYTES', 2**24)
    parquet.write_table(pa.table(dict(path=['x' * 8000] * 4000)), where, compression='zstd', use_dictionary=False)
    with cheap(), pytest.raises(SmileError, match='it unpacks to 32,.* bytes, and 16,777,216 are the most'): read_source(where)
    parquet.write_table(pa.table(dict(path=pa.array([b'x' * 8000] * 4000, pa.binary(8000)))), where, compression='zstd')
    with cheap(), pytest.raises(SmileError, match='it unpacks to 32,000,000 bytes'): read_source(where)
    parquet.write_table(pa.table(dict(path=['a.png'] * 40, label=['smile', 'neutral'] * 20, box=[[7] * 400_000] * 40)), where, compression='zstd')
    assert where.stat().st_size < 2**16
    with cheap(mib=100): assert list(read_source(where).frame.path) == ['a.png'] * 40


def test_arrays_that_would_fill_the_memory(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path/'a.npz', images=np.zeros((900, 64, 64, 3), np.uint8), labels=np.arange(900))
    import fastsmile.data.arrays as arrays
    monkeypatch.setattr(arrays, 'free_memory', lambda: 2**20)
    with pytest.raises(SmileError, match='GiB of memory and 0.0 are free'): read_source(tmp_path/'a.npz')
    monkeypatch.undo()
    np.savez_compressed(tmp_path/'bomb.npz', images=np.zeros((2**24, 1, 1), np.uint8))
    monkeypatch.setattr(archives, 'MIN_BOMB_TOTAL_BYTES', 2**20)
    with cheap(), pytest.raises(SmileError, match='as a bomb does'): read_source(tmp_path/'bomb.npz')
    buf = io.BytesIO()
    np.lib.format.write_array_header_1_0(buf, dict(descr='|u1', fortran_order=False, shape=(10**12, 64, 64)))
    (tmp_path/'b.npy').write_bytes(buf.getvalue() + bytes(100))
    (tmp_path/'labels.txt').write_text('1\n0\n')
    with cheap(), pytest.raises(SmileError, match='cannot be read as an array'): read_source(tmp_path/'b.npy', SourceOptions(labels=str(tmp_path/'labels.txt')))
    np.save(tmp_path/'c.npy', np.zeros((2, 8, 8), np.uint8))
    for bad in (buf.getvalue(), b'', pickled(), b'\x93NUMPY'):
        (tmp_path/'labels.npy').write_bytes(bad)
        with cheap(), pytest.raises(SmileError, match='cannot be read as an array of labels'): read_source(tmp_path/'c.npy')


def pickled() -> bytes:
    "An array of objects, which only a pickle can hold"
    buf = io.BytesIO()
    np.save(buf, np.array([{}, {}], dtype=object), allow_pickle=True)
    return buf.getvalue()
