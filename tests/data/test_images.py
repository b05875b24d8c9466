"Every file ends as a decoded RGB picture or as a reason, and plain timm prepares pictures as we do."
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import cheap, folder, picture
from hypothesis import given, settings, strategies as st
from PIL import Image

from fastsmile.core.errors import SmileError
from fastsmile.data.images import ImageError, Preprocessing, decode_image, resize_and_crop, to_rgb
from fastsmile.data.readers import ArrayReader, FolderReader, ZipReader


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
