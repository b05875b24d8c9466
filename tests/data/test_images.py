"Every file ends as a decoded RGB picture or as a reason, and plain timm prepares pictures as we do."
import io
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import cheap, folder, picture
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from fastsmile.core.errors import SmileError
from fastsmile.data.images import ImageError, Preprocessing, _png_chunks, decode_image, plain_jpeg_size, resize_and_crop, to_rgb
from fastsmile.data.readers import ArrayReader, FolderReader, ZipReader, left_aside_note


@pytest.mark.parametrize('mode,fmt', [('L', 'PNG'), ('LA', 'PNG'), ('1', 'PNG'), ('P', 'PNG'), ('P', 'GIF'), ('RGBA', 'PNG'), ('RGBA', 'WEBP'),
                                      ('CMYK', 'JPEG'), ('CMYK', 'TIFF'), ('YCbCr', 'JPEG'), ('LAB', 'TIFF'), ('RGB', 'BMP'), ('L', 'PPM')])
def test_modes_become_rgb(mode, fmt):
    img = decode_image(picture(mode=mode, fmt=fmt))
    assert img.mode == 'RGB' and img.size == (24, 24)


@pytest.mark.parametrize('dtype,top', [(np.uint16, 65535), (np.int32, 65535), (np.float32, 1.0), (np.float32, 255.0), (np.float32, 4000.0)])
def test_deep_greys_keep_their_range(dtype, top):
    ramp = np.linspace(0, top, 1024).reshape(32, 32).astype(dtype)
    buf = io.BytesIO()
    Image.fromarray(ramp).save(buf, 'TIFF')
    out = np.asarray(decode_image(buf.getvalue()))[..., 0].astype(float)
    assert out.min() < 5 and (np.diff(out.ravel()) >= 0).all()
    assert out.max() > (250 if top != 4000 else 10)  # 4000 of 65535 stays dark: the values use a 16-bit scale


def test_transparency_shows_the_background():
    img = Image.new('P', (8, 8))
    img.info['transparency'] = 0
    buf = io.BytesIO()
    img.save(buf, 'PNG', transparency=0)
    assert decode_image(buf.getvalue()).getpixel((3, 3)) == (255, 255, 255)


def test_animation_gives_its_first_frame():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    buf = io.BytesIO()
    frames[0].save(buf, 'GIF', save_all=True, append_images=frames[1:])
    assert decode_image(buf.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_every_cut_of_a_jpeg_is_a_picture_or_a_reason():
    data = picture(fmt='JPEG', size=(64, 64))
    for n in range(0, len(data), 37):
        try: assert decode_image(data[:n]).size == (64, 64)
        except ImageError as e: assert str(e)


@given(st.binary(max_size=400), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_a_picture_or_a_reason(noise, at):
    data = bytearray(picture())
    data[at:at + len(noise)] = noise
    try: assert decode_image(bytes(data), max_pixels=10_000).mode == 'RGB'
    except ImageError as e: assert str(e)


def by_pillow(monkeypatch, data: bytes, **kwargs) -> np.ndarray | str:
    "The pixels, or the reason, without simplejpeg"
    with monkeypatch.context() as m:
        m.setattr('fastsmile.data.images._decode_plain_jpeg', lambda *_: None)
        return pixels_or_reason(data, **kwargs)


def pixels_or_reason(data: bytes, **kwargs) -> np.ndarray | str:
    try: return np.asarray(decode_image(data, **kwargs))
    except ImageError as e: return str(e)


@pytest.mark.parametrize('size', [(1, 1), (7, 13), (64, 64), (101, 50)])
@pytest.mark.parametrize('mode,options', [('RGB', dict(subsampling=0)), ('RGB', dict(subsampling=1)), ('RGB', dict(subsampling=2)), ('L', {}),
                                          ('RGB', dict(progressive=True)), ('RGB', dict(restart_marker_rows=1)), ('RGB', dict(comment=b'by hand'))])
def test_plain_jpegs_have_the_pixels_that_pillow_gives(monkeypatch, size, mode, options):
    data = picture(size=(max(size[0], 2), max(size[1], 2)), fmt='JPEG', mode=mode, quality=85, **options)
    assert plain_jpeg_size(data) and np.array_equal(pixels_or_reason(data), by_pillow(monkeypatch, data))


def exif_turned() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return dict(exif=exif)


@pytest.mark.parametrize('data', [
    picture(size=(40, 20), fmt='JPEG', **exif_turned()), picture(fmt='JPEG', mode='CMYK'), picture(fmt='JPEG', keep_rgb=True), picture(fmt='PNG'),
    picture(fmt='JPEG', icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()),
    picture(fmt='JPEG')[:30], b'\xff\xd8', b'\xff\xd8\xff\xda' + bytes(20), b''],
    ids=['EXIF', 'CMYK', 'RGB', 'PNG', 'profile', 'cut', 'start', 'scan', 'empty'])
def test_other_files_are_left_to_pillow(data): assert plain_jpeg_size(data) is None


@given(st.binary(min_size=1, max_size=40), st.integers(0, 1500), st.integers(0, 1500))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_jpeg_comes_out_as_pillow_has_it(monkeypatch, noise, at, end):
    data = bytearray(picture(fmt='JPEG', size=(48, 40)))
    data[at:at + len(noise)] = noise
    data = bytes(data[:len(data) - end // 2])
    assert np.array_equal(pixels_or_reason(data), by_pillow(monkeypatch, data))


def test_a_plain_jpeg_is_refused_and_reduced_as_others_are(monkeypatch):
    data = picture(fmt='JPEG', size=(400, 300))
    assert pixels_or_reason(data, max_pixels=400 * 300 - 1) == 'more than 119,999 pixels: 400 x 300'
    for options in (dict(at_least=70), dict(at_least=151), dict(prep=Preprocessing(size=32)), dict(prep=Preprocessing(size=74, crop_mode='center'))):
        assert np.array_equal(pixels_or_reason(data, **options), by_pillow(monkeypatch, data, **options))


def test_real_photographs_have_the_pixels_that_pillow_gives(monkeypatch, shared):
    for name in ('smiles.zip', 'clothing.zip', 'facial_expressions.zip'):
        with zipfile.ZipFile(shared/'data'/name) as z:
            files = [z.read(n) for n in sorted(z.namelist())[5::97] if n.lower().endswith(('.jpg', '.jpeg'))]
        assert sum(plain_jpeg_size(data) is not None for data in files) > len(files) / 2
        for data in files: assert np.array_equal(pixels_or_reason(data), by_pillow(monkeypatch, data))


def test_folder_and_zip_agree(tmp_path):
    files = {'a/x.PNG': picture(), 'a/y.jpeg': picture(fmt='JPEG'), 'noext': picture(), '.hidden/z.png': picture(), 'Thumbs.db': b'x', 'a/empty.gif': b''}
    root = folder(tmp_path/'f', files)
    with zipfile.ZipFile(tmp_path/'f.zip', 'w') as z:
        for n, data in files.items(): z.writestr(n, data)
    assert FolderReader(root).names() == ZipReader(tmp_path/'f.zip').names() == ['a/empty.gif', 'a/x.PNG', 'a/y.jpeg', 'noext']
    assert np.array_equal(FolderReader(root).read_image('a/x.PNG'), ZipReader(tmp_path/'f.zip').read_image('a/x.PNG'))
    with pytest.raises(ImageError, match='zero bytes'): ZipReader(tmp_path/'f.zip').read_image('a/empty.gif')
    with pytest.raises(ImageError, match='no such file'): ZipReader(tmp_path/'f.zip').read_image('b.png')


def test_a_link_that_leads_up_ends(tmp_path):
    root = folder(tmp_path/'f', {'a/x.png': picture()})
    (root/'a'/'up').symlink_to(root)
    assert FolderReader(root).names() == ['a/x.png']


def test_raw_arrays(tmp_path):
    (tmp_path/'a.raw').write_bytes(np.arange(2 * 4 * 5 * 3, dtype=np.uint8).tobytes())
    assert ArrayReader(tmp_path/'a.raw', (4, 5, 3)).read_image('1').size == (5, 4)


@pytest.mark.parametrize('mode', ['squash', 'center', 'border'])
@pytest.mark.parametrize('size', [(64, 64), (50, 80), (131, 97), (20, 20)])
@pytest.mark.parametrize('pct', [1.0, 0.875])
def test_prepare_is_timms_own_transform(mode, size, pct):
    from timm.data import create_transform
    prep = Preprocessing(size=48, interpolation='bicubic', crop_mode=mode, crop_pct=pct)
    img = decode_image(picture(size=size))
    theirs = create_transform((3, 48, 48), interpolation='bicubic', mean=prep.mean, std=prep.std, crop_pct=pct, crop_mode=mode, normalize=False)(img)
    assert np.abs(resize_and_crop(img, prep).astype(int) - theirs.permute(1, 2, 0).numpy()).max() == 0


def test_what_could_run_a_program_is_no_picture(tmp_path):
    "EPS goes through Ghostscript; its bytes are refused whatever the file is called"
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n'
    with pytest.raises(ImageError, match='not an image'): decode_image(eps)
    buf = io.BytesIO()
    Image.new('RGB', (20, 20), 'red').save(buf, 'PCX')
    with pytest.raises(ImageError, match='not an image'): decode_image(buf.getvalue())


@pytest.mark.parametrize('fmt', ['JPEG', 'MPO', 'PNG', 'BMP', 'GIF', 'PPM', 'TIFF', 'WEBP', 'JPEG2000', 'TGA', 'ICO'])
def test_every_format_of_photographs_opens(fmt):
    buf = io.BytesIO()
    Image.new('RGB', (32, 32), 'red').save(buf, fmt)
    assert decode_image(buf.getvalue()).size == (32, 32)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes')
def test_a_pipe_or_a_device_called_jpg_is_answered_at_once(tmp_path):
    os.mkfifo(tmp_path/'pipe.jpg')
    (tmp_path/'zero.jpg').symlink_to('/dev/zero')
    for name in ('pipe.jpg', 'zero.jpg'):
        with pytest.raises(ImageError, match='a device or a pipe'): FolderReader(tmp_path).read_bytes(name)


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    "One that went away meanwhile is none; one that nobody may read must not look empty"
    folder(tmp_path, {'a.png': picture(), 'gone/b.png': picture(), 'shut/c.png': picture()})
    real, why = os.scandir, dict(gone=FileNotFoundError(2, 'No such file or directory'))
    def scandir(path):
        if e := why.get(Path(path).name): raise e
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    assert FolderReader(tmp_path).names() == ['a.png', 'shut/c.png']
    for e in (PermissionError(13, 'Permission denied'), OSError(5, 'Input/output error')):
        why['shut'] = e
        with pytest.raises(SmileError, match=f'shut cannot be listed: {e.strerror}'): FolderReader(tmp_path).names()
    with pytest.raises(SmileError, match='nowhere cannot be listed: No such file'): FolderReader(tmp_path/'nowhere').names()


def test_deep_greys_and_arrays_take_the_memory_of_one_picture(tmp_path):
    a = np.arange(12_000_000, dtype=np.uint16).reshape(3000, 4000)
    with cheap(mib=160): deep = to_rgb(Image.fromarray(a))
    assert (np.asarray(deep)[..., 1] == (a * (255 / 65535)).round()).all()
    np.savez(tmp_path/'a.npz', images=np.zeros((60, 1024, 1024), np.uint8))
    with cheap(mib=100): assert len(ArrayReader(tmp_path/'a.npz', keys=['images']).names()) == 60


# What decoders refuse of their own accord

def png(img: Image.Image, **kw) -> bytes:
    buf = io.BytesIO()
    img.save(buf, 'PNG', **kw)
    return buf.getvalue()


@pytest.mark.parametrize('packed', [True, False])
@pytest.mark.parametrize('many', [1, 80])
def test_a_png_with_megabytes_of_text_is_read(packed, many):
    "One text of more than Pillow takes, or many that are too much together; before and after the pixels"
    notes = PngImagePlugin.PngInfo()
    for i in range(many): notes.add_text(f'note {i}', 'smile ' * 200_000 if many == 1 else 'smile ' * 170_000, zip=packed)
    data = png(Image.new('RGB', (9, 7), 'red'), pnginfo=notes)
    if packed or many > 1:
        with pytest.raises(ValueError): Image.open(io.BytesIO(data)).load()
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)
    chunk = len(data) - 12
    texts, at = b''.join(data[a:b] for kind, a, b in _png_chunks(data) if kind in (b'zTXt', b'tEXt')), data.index(b'IDAT') - 4
    assert decode_image(data[:33] + data[at:chunk] + texts + data[chunk:]).size == (9, 7)


def test_a_png_with_a_huge_profile_is_read_and_its_orientation_obeyed():
    data = png(Image.new('RGB', (9, 7), 'red'), icc_profile=np.random.default_rng(0).bytes(2**21))
    with pytest.raises(ValueError): Image.open(io.BytesIO(data))
    assert decode_image(data).size == (9, 7)
    exif = Image.Exif()
    exif[0x112] = 6
    assert decode_image(png(Image.new('RGB', (9, 7)), icc_profile=bytes(2**21), exif=exif)).size == (7, 9)


@pytest.mark.parametrize('fmt', ['PNG', 'TIFF'])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_greys_of_a_camera_use_the_range_of_its_bits(bits, fmt):
    ramp, buf = np.linspace(0, 2**bits - 1, 1024).reshape(32, 32).astype(np.uint16), io.BytesIO()
    Image.fromarray(ramp).save(buf, fmt)
    out = np.asarray(decode_image(buf.getvalue()))[..., 0].astype(float)
    assert np.allclose(out.ravel(), np.linspace(0, 255, 1024), atol=1.1)


def profile(primaries: dict) -> bytes:
    "An ICC matrix profile with a gamma of 2.2; X, Y and Z of r, g, b under D50"
    def fixed(*values): return struct.pack(f'>{len(values)}i', *(round(v * 65536) for v in values))
    white = (0.9642, 1, 0.8249)
    tags = {f'{k}XYZ'.encode(): b'XYZ ' + bytes(4) + fixed(*xyz) for k, xyz in primaries.items()}
    tags |= {b'wtpt': b'XYZ ' + bytes(4) + fixed(*white)} | {f'{k}TRC'.encode(): b'curv' + struct.pack('>IIH2x', 0, 1, round(2.2 * 256)) for k in 'rgb'}
    table, body, start = b'', b'', 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack('>II', start + len(body), len(tag))
        body += tag
    head = struct.pack('>I4sI', start + len(body), b'lcms', 0x02400000) + b'mntrRGB XYZ ' + bytes(12) + b'acsp' + bytes(28) + fixed(*white) + bytes(48)
    return head + struct.pack('>I', len(tags)) + table + body


P3 = profile(dict(r=(0.51512, 0.24120, -0.00105), g=(0.29198, 0.69225, 0.04189), b=(0.15710, 0.06657, 0.78407)))
ADOBE = profile(dict(r=(0.60974, 0.31111, 0.01947), g=(0.20528, 0.62567, 0.06087), b=(0.14919, 0.06322, 0.74457)))


@pytest.mark.parametrize('fmt', ['PNG', 'JPEG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('icc,moved', [(P3, 15), (ADOBE, 25)])
def test_wide_gamut_colours_become_srgb(fmt, icc, moved):
    "As LittleCMS converts them: strong colours become stronger, greys stay"
    kw = dict(lossless=True) if fmt == 'WEBP' else dict(quality=100, subsampling=0) if fmt == 'JPEG' else {}
    for colour in ((200, 60, 70), (128, 128, 128), (255, 255, 255)):
        buf = io.BytesIO()
        Image.new('RGB', (16, 16), colour).save(buf, fmt, icc_profile=icc, **kw)
        got = np.array(decode_image(buf.getvalue()).getpixel((8, 8))).astype(int)
        if len(set(colour)) == 1: assert np.abs(got - colour).max() <= 3
        else: assert got[0] - 200 >= moved and got[1] < 60


def test_a_profile_goes_with_transparency_orientation_and_a_smaller_decode():
    half = Image.new('RGBA', (64, 32), (200, 60, 70, 255))
    assert decode_image(png(half, icc_profile=P3)).getpixel((1, 1))[0] > 210
    half.putalpha(0)
    assert decode_image(png(half, icc_profile=P3)).getpixel((1, 1)) == (255, 255, 255)
    exif, buf = Image.Exif(), io.BytesIO()
    exif[0x112] = 6
    Image.new('RGB', (640, 320), (200, 60, 70)).save(buf, 'JPEG', icc_profile=P3, exif=exif, quality=95)
    img = decode_image(buf.getvalue(), prep=Preprocessing(size=32))
    assert img.height > img.width and img.width < 320 and img.getpixel((9, 9))[0] > 210


@pytest.mark.parametrize('icc', [b'', b'x', bytes(200), P3[:300], P3.replace(b'RGB ', b'GRAY'), b'\xff' * 1000,
                                 ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(),
                                 ImageCms.ImageCmsProfile(ImageCms.createProfile('LAB')).tobytes()])
def test_srgb_broken_and_foreign_profiles_leave_the_pixels(icc):
    for mode, colour in (('RGB', (200, 60, 70)), ('L', 99), ('P', 3)):
        img = Image.new(mode, (8, 8), colour)
        assert np.array_equal(decode_image(png(img, icc_profile=icc)), img.convert('RGB'))


# HEIC, and files that are no picture

def heic() -> bytes:
    pillow_heif = pytest.importorskip('pillow_heif')
    buf = io.BytesIO()
    pillow_heif.from_pillow(Image.new('RGB', (64, 48), (200, 60, 70))).save(buf, format='HEIF', quality=90)
    return buf.getvalue()


@pytest.mark.parametrize('ending', ['.heic', '.HEIC', '.heif', '.hif', '.jpg'])
def test_heic_is_read_with_the_extra_whatever_its_ending(ending, tmp_path):
    root = folder(tmp_path/'f', {f'a{ending}': heic()})
    assert FolderReader(root).names() == [f'a{ending}']
    img = FolderReader(root).read_image(f'a{ending}')
    assert img.size == (64, 48) and np.abs(np.array(img.getpixel((9, 9))).astype(int) - (200, 60, 70)).max() < 8


def test_without_the_extra_the_reason_names_it():
    "In a process of its own: once registered, Pillow reads HEIC"
    code = '''if 1:
    import sys
    sys.modules['pillow_heif'] = None
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == 'pillow_heif' else find(name, *a)
    from fastsmile.data.images import ImageError, decode_image
    for brand in (b'heic', b'heix', b'mif1', b'hevc'):
        try: decode_image(bytes([0, 0, 0, 28]) + b'ftyp' + brand + bytes(99))
        except ImageError as e: print(e)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out == 'HEIC: pip install "fastsmile[heif]"\n' * 4


@pytest.mark.parametrize('start,what', [(b'\xff\x0a', 'JPEG XL'), (b'\0\0\0\x0cJXL \r\n', 'JPEG XL'), (b'%PDF-1.7', 'PDF'), (b'<!DOCTYPE html>', 'a web page'),
                                        (b'\0\0\0\x18ftypmp42', 'a video'),
                                        (b'version https://git-lfs.github.com/spec/v1', 'Git LFS'), (b'8BPS\0\1', 'Photoshop')])
def test_files_that_are_no_pictures_are_named(start, what):
    with pytest.raises(ImageError, match=rf'not an image that can be read \(.*{what}'): decode_image(start + b'x' * 60)


def test_mpo_and_jfif_are_listed_and_read(tmp_path):
    buf = io.BytesIO()
    Image.new('RGB', (8, 8), 'red').save(buf, 'MPO', save_all=True, append_images=[Image.new('RGB', (8, 8), 'blue')])
    root = folder(tmp_path/'f', {'a.mpo': buf.getvalue(), 'b.jfif': picture(fmt='JPEG'), 'c.MPO': buf.getvalue()})
    assert FolderReader(root).names() == ['a.mpo', 'b.jfif', 'c.MPO'] and FolderReader(root).read_image('a.mpo').getpixel((0, 0))[0] > 200


# Files that are left aside

def test_endings_that_are_left_aside_are_counted_alike(tmp_path):
    files = {'a.png': picture(), 'b.jxl': b'x', 'x/c.JXL': b'x', 'x/d.dng': b'x', 'labels.csv': b'', '.e.mov': b'', '__MACOSX/f.mov': b'', 'notes.txt': b''}
    root = folder(tmp_path/'f', files)
    with zipfile.ZipFile(tmp_path/'f.zip', 'w') as z:
        for n, data in files.items(): z.writestr(n, data)
    for reader in (FolderReader(root), ZipReader(tmp_path/'f.zip')):
        for _ in range(2): assert reader.names() == ['a.png'] and reader.left_aside == {'.jxl': 2, '.dng': 1}
        assert left_aside_note(reader) == '3 files are left aside, as the ending is of no image that is read: 2 .jxl, 1 .dng.'
    (root/'b.jxl').unlink(), (root/'x'/'c.JXL').unlink(), (root/'x'/'d.dng').unlink()
    reader = FolderReader(root)
    assert reader.names() == ['a.png'] and left_aside_note(reader) == ''


def test_audit_and_predict_say_what_is_left_aside(tmp_path, capsys, monkeypatch):
    from fastsmile.data.source import read_source
    from fastsmile.inference.inputs import open_inputs
    monkeypatch.delenv('FASTSMILE_QUIET', raising=False)
    root = folder(tmp_path/'f', {'smile/a.png': picture(), 'neutral/b.png': picture(), 'smile/c.dng': b'x', 'neutral/d.mov': b'x'})
    said = '2 files are left aside, as the ending is of no image that is read: 1 .dng, 1 .mov.'
    assert said in read_source(root).notes
    assert open_inputs(root).total == 2 and said in capsys.readouterr().err
