"Files from outside: every kind of image, every kind of damage, killed writers, unreliable servers."
import hashlib, http.server, io, math, os, random, signal, struct, subprocess, sys, threading, time, zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from conftest import ROOT
from cycle_nb import files
from cycle_nb.core import InputError
from cycle_nb.files import atomic, center_crop, read_image, read_json, save_image, save_torch, to_pil, to_tensor, write_json
from cycle_nb.download import cache_dir, fetch
from cycle_nb.models import load_tensors, save_tensors
from cycle_nb.images import (SUFFIXES, UNREADABLE, ImageFolder, align, crop_transform, image_paths, landmarks, load_images, pad_square, paste_back,
    unpad_square)


def refused(f, *args, **kw):
    "The one line in which something is refused."
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value)
    return str(e.value)


def photo(w=40, h=30):
    y, x = np.mgrid[:h, :w]
    return Image.fromarray(np.stack([x*255//max(w-1, 1), y*255//max(h-1, 1), (x*7+y*5) % 256], -1).astype('uint8'))


# --- every mode ----------------------------------------------------------------------------

def test_grey(tmp_path):
    photo().convert('L').save(tmp_path/'a.png')
    im = read_image(tmp_path/'a.png')
    assert im.mode == 'RGB' and np.array_equal(np.asarray(im)[..., 0], np.asarray(photo().convert('L')))


@pytest.mark.parametrize('mode', ['LA', 'RGBA', 'PA'])
def test_transparent_becomes_white(tmp_path, mode):
    im = Image.new('RGBA', (4, 2), (0, 0, 0, 255))
    im.paste((10, 20, 30, 0), (0, 0, 2, 2))
    suffix = 'tif' if mode == 'PA' else 'png'
    (im.convert(mode) if mode != 'PA' else im).save(tmp_path/f'a.{suffix}')
    out = read_image(tmp_path/f'a.{suffix}')
    assert out.getpixel((0, 0)) == (255,)*3 and out.getpixel((3, 1)) == (0,)*3


def test_half_transparent_is_mixed(tmp_path):
    Image.new('RGBA', (2, 2), (0, 0, 0, 128)).save(tmp_path/'a.png')
    assert abs(read_image(tmp_path/'a.png').getpixel((0, 0))[0] - 127) <= 1


def test_palette(tmp_path):
    im = Image.new('P', (2, 1)); im.putpalette([255, 0, 0, 0, 255, 0]); im.putpixel((1, 0), 1)
    im.save(tmp_path/'a.png'); im.save(tmp_path/'t.png', transparency=0)
    assert [read_image(tmp_path/'a.png').getpixel((i, 0)) for i in (0, 1)] == [(255, 0, 0), (0, 255, 0)]
    assert [read_image(tmp_path/'t.png').getpixel((i, 0)) for i in (0, 1)] == [(255,)*3, (0, 255, 0)]


def test_rgb_with_a_transparent_colour(tmp_path):
    im = Image.new('RGB', (2, 1), (1, 2, 3)); im.putpixel((1, 0), (9, 9, 9))
    im.save(tmp_path/'a.png', transparency=(1, 2, 3))
    assert [read_image(tmp_path/'a.png').getpixel((i, 0)) for i in (0, 1)] == [(255,)*3, (9, 9, 9)]


def test_cmyk(tmp_path):
    Image.new('CMYK', (8, 8), (0, 255, 255, 0)).save(tmp_path/'a.jpg', quality=95)
    r, g, b = read_image(tmp_path/'a.jpg').getpixel((4, 4))
    assert r > 240 and g < 20 and b < 20


def test_one_bit(tmp_path):
    Image.new('1', (3, 3), 1).save(tmp_path/'a.png')
    assert read_image(tmp_path/'a.png').getpixel((1, 1)) == (255,)*3


@pytest.mark.parametrize('suffix', ['png', 'tif'])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    a = np.array([[0, 255, 256, 32768, 65535]], 'uint16')
    Image.fromarray(a).save(tmp_path/f'a.{suffix}')
    assert np.asarray(read_image(tmp_path/f'a.{suffix}'))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize('values, want', [([0, .5, 1], [0, 128, 255]), ([0, 128, 255], [0, 128, 255]),
                                          ([0, float('nan'), 65535], [0, 0, 255]), ([-5, 0, 1e6], [0, 0, 255])])
def test_floating_tiff(tmp_path, values, want):
    Image.fromarray(np.array([values], 'float32')).save(tmp_path/'a.tif')
    assert np.asarray(read_image(tmp_path/'a.tif'))[0, :, 0].tolist() == want


def test_int32_tiff(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], 'int32')).save(tmp_path/'a.tif')
    assert np.asarray(read_image(tmp_path/'a.tif'))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize('turn', range(1, 9))
def test_exif_rotation(tmp_path, turn):
    "All eight ways a camera can be held; red is where the top left corner belongs."
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}     # Pillow's transpose that undoes each
    im = Image.new('RGB', (32, 16)); im.paste((255, 0, 0), (0, 0, 8, 8))
    stored = im.transpose(back[turn]) if turn > 1 else im
    exif = Image.Exif(); exif[0x112] = turn
    stored.save(tmp_path/'a.png', exif=exif)
    out = read_image(tmp_path/'a.png')
    assert out.size == (32, 16) and out.getpixel((2, 2)) == (255, 0, 0) and out.getpixel((30, 14)) == (0,)*3


def test_damaged_exif_is_no_reason_to_refuse(tmp_path):
    photo().save(tmp_path/'a.jpg', exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff' + b'\x01\x12'*9)
    assert read_image(tmp_path/'a.jpg').size == (40, 30)


@pytest.mark.parametrize('suffix', ['gif', 'webp', 'png', 'tif'])
def test_first_frame(tmp_path, suffix):
    a, b = Image.new('RGB', (16, 16), (255, 0, 0)), Image.new('RGB', (16, 16), (0, 0, 255))
    a.save(tmp_path/f'a.{suffix}', save_all=True, append_images=[b])
    r, g, bl = read_image(tmp_path/f'a.{suffix}').getpixel((8, 8))
    assert r > 240 and bl < 16


@pytest.mark.parametrize('size', [(1, 1), (1, 500), (500, 1)])
def test_one_pixel(tmp_path, size):
    Image.new('RGB', size, (255, 255, 255)).save(tmp_path/'a.png')
    imgs, _ = load_images(tmp_path/'a.png', 64)
    assert imgs.shape == (1, 3, 64, 64) and imgs.min() > .99


# --- the door: images of every form ---------------------------------------------------------

LAYOUTS = {'CHW': lambda x: x, 'HWC': lambda x: x.movedim(-3, -1)}
sizes = st.integers(5, 24)          # a side of 1, 3 or 4 pixels could be taken for colours


def picture(h, w, c=3, seed=0, batch=()):
    "Random bytes (…,C,H,W)."
    return torch.randint(0, 256, (*batch, c, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def grid_of_forms(x):
    "One image, (C,H,W) bytes, in every form that says the same."
    for order, f in LAYOUTS.items():
        y = f(x)
        for batch in (False, True):
            z = y[None] if batch else y
            yield f'{order} tensor', z
            yield f'{order} tensor, not contiguous', z.movedim(0, -1).contiguous().movedim(-1, 0)
            yield f'{order} array', z.numpy()
            yield f'{order} array, Fortran order', np.asfortranarray(z.numpy())
            yield f'{order} array, read-only', np.frombuffer(z.contiguous().numpy().tobytes(), 'uint8').reshape(z.shape)
    yield 'reversed twice', x.numpy()[..., ::-1][..., ::-1]
    yield 'list', [x.numpy()]
    yield 'tuple', (LAYOUTS['HWC'](x),)
    yield 'generator', (y for y in [x])
    yield 'PIL', to_pil(x.float()/127.5 - 1)


@given(sizes, st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_bytes_in_every_form_are_the_same_picture(n, seed):
    x = picture(n, n, seed=seed)
    want = x.float()/127.5 - 1
    for name, form in grid_of_forms(x):
        got, names = load_images(form, n)
        assert got.shape == (1, 3, n, n) and got[0].equal(want) and names == ['image0'], name


@given(sizes, st.sampled_from(['float16', 'float32', 'float64', '>f4', 'longdouble']), st.sampled_from(list(LAYOUTS)))
@settings(max_examples=30, deadline=None)
def test_floats_of_every_width(n, dtype, order):
    x = picture(n, n).float()/127.5 - 1
    a = LAYOUTS[order](x).numpy().astype(dtype)
    got = load_images(a, n)[0]
    assert got.dtype == torch.float32 and (got[0] - x).abs().max() < 1e-3
    if dtype in ('float16', 'float32', 'float64'): assert load_images(torch.from_numpy(a), n)[0].equal(got)
    if dtype == 'float32': assert (load_images(torch.from_numpy(a).bfloat16(), n)[0] - got).abs().max() < .01


@given(st.integers(5, 60), st.integers(5, 60), st.integers(8, 40), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_any_size_becomes_the_middle_square(h, w, size, n):
    x = picture(h, w, batch=(n,))
    for form in (x, x.numpy(), LAYOUTS['HWC'](x).numpy(), list(x)):
        got, names = load_images(form, size)
        assert got.shape == (n, 3, size, size) and got.abs().max() <= 1 and len(set(names)) == n
    s = min(h, w)
    middle = x[..., (h-s)//2:(h-s)//2+s, (w-s)//2:(w-s)//2+s]
    assert load_images(middle, size)[0].equal(load_images(x, size)[0])


def test_a_file_and_its_array_show_the_same(tmp_path):
    im = photo(90, 70)
    im.save(tmp_path/'a.png')
    for size, tol in ((70, 0), (32, .06)):      # two filters: Pillow's and torch's
        assert (load_images(np.asarray(im), size)[0] - load_images(tmp_path/'a.png', size)[0]).abs().mean() <= tol


@given(st.integers(1, 7), sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_channels(c, h, w):
    x = picture(h, w, c)
    if c not in (1, 3, 4):
        assert str(tuple(x.shape)) in refused(load_images, x, 16)
        return
    got = load_images(x, min(h, w))[0]
    if c == 1: assert got[:, 0].equal(got[:, 1]) and got[:, 0].equal(got[:, 2])
    if c == 4:
        s = min(h, w)
        im = Image.fromarray(LAYOUTS['HWC'](x).numpy(), 'RGBA').crop(((w-s)//2, (h-s)//2, (w-s)//2+s, (h-s)//2+s))
        assert (got[0] - to_tensor(im)).abs().max() < .02           # Pillow rounds
        assert '4 channels' in refused(load_images, x.float()/127.5 - 1, 16)


@given(st.floats(-500, 500, width=32), st.floats(-500, 500, width=32))
@settings(max_examples=60, deadline=None)
def test_range_is_checked(a, b):
    x = torch.tensor([a, b]).repeat(3, 8, 4)
    low, high = min(a, b), max(a, b)
    for form in (x, x.numpy(), x.double()):
        if low < -1.05 or high > 1.05:
            said = refused(load_images, form, 8)
            assert f'from {low:.3g} to {high:.3g}' in said and ';' in said
        else: assert load_images(form, 8)[0].abs().max() <= 1


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf'), 1e300])
def test_one_bad_number_is_enough(bad):
    x = torch.zeros(2, 3, 8, 8, dtype=torch.double)
    x[1, 2, 3, 4] = bad
    for form in (x, x.numpy(), list(x)): assert 'not finite' in refused(load_images, form, 8)


@pytest.mark.parametrize('dtype', [torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.complex64])
def test_other_numbers_are_refused(dtype):
    x = torch.zeros(1, 3, 8, 8).to(dtype)
    for form in (x, x.numpy()): assert str(dtype)[6:] in refused(load_images, form, 8)
    assert 'object' in refused(load_images, np.zeros((8, 8, 3), object), 8)


@given(st.lists(st.integers(0, 6), max_size=6))
@example([2, 1, 4])
@settings(max_examples=60, deadline=None)
def test_any_shape_is_read_or_refused_in_a_line(shape):
    for x in (torch.zeros(shape), np.zeros(shape, 'uint8')):
        try: got = load_images(x, 8)[0]
        except InputError as e: assert '\n' not in str(e) and (str(tuple(shape)) in str(e) or 4 in shape and 'has 4 channels' in str(e))
        else: assert got.shape[1:] == (3, 8, 8) and len(shape) in (3, 4) and 0 not in shape


@pytest.mark.parametrize('x, word', [(None, 'NoneType'), (7, 'int'), (1.5, 'float'), (b'png', 'bytes'), ({'a': 1}, 'dict'), (io.BytesIO(b'x'), 'BytesIO'),
                                     ([None], 'NoneType'), ([[1]], 'list'), ([], 'none'), ((), 'none'), ('', 'name'), ([''], 'name'), (object, 'type'),
                                     ('x'*5000, 'check the name')])
def test_what_is_no_image_is_named(x, word):
    assert word in refused(load_images, x, 8)


def test_pil_images_that_cannot_be_read(tmp_path):
    photo(200, 150).save(tmp_path/'a.png')
    whole = (tmp_path/'a.png').read_bytes()
    shut, cut = Image.open(io.BytesIO(whole)), Image.open(io.BytesIO(whole[:len(whole)//2]))
    shut.close()
    for im in (shut, cut, Image.new('RGB', (0, 5))): assert 'PIL' in refused(load_images, im, 8)


def test_hosts_with_other_habits():
    "Default dtypes, modes without gradients, autocast: the result is the same."
    x = picture(20, 20)
    want = load_images(x, 16)[0]
    with torch.inference_mode(): assert load_images(x, 16)[0].equal(want)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert load_images(x, 16)[0].equal(want)
    torch.set_default_dtype(torch.float64)
    try:
        got = load_images(x, 16)[0]
        assert got.dtype == torch.float32 and got.equal(want)
    finally: torch.set_default_dtype(torch.float32)
    held = (want*.5).requires_grad_()
    assert not load_images(held, 16)[0].requires_grad


def test_bad_ones_of_a_list_are_told_and_left_out(tmp_path):
    (tmp_path/'empty').mkdir()
    bad = []
    got, names = load_images([picture(8, 8), None, tmp_path/'empty', np.zeros((8, 8), 'uint8'), tmp_path/'x.png', photo()], 8, on_error=bad.append)
    assert names == ['image0', 'image1'] and len(got) == 2 and len(bad) == 4 and all(isinstance(e, InputError) for e in bad)


# --- folders --------------------------------------------------------------------------------

def test_every_suffix_of_a_readable_format_is_found(tmp_path):
    from cycle_nb.files import FORMATS
    known = {s for s, f in Image.registered_extensions().items() if f in FORMATS}
    assert known <= set(SUFFIXES) and not set(SUFFIXES) & set(UNREADABLE)
    for s in SUFFIXES: (tmp_path/f'a{s}').touch(); (tmp_path/f'b{s.upper()}').touch()
    assert len(image_paths(tmp_path)) == 2*len(SUFFIXES)
    photo().convert('L').save(tmp_path/'real.pgm')
    photo().save(tmp_path/'real.jfif', 'JPEG')
    assert [len(load_images(tmp_path/f'real.{s}', 8)[0]) for s in ('pgm', 'jfif')] == [1, 1]


def test_a_picture_nobody_can_read_is_named(tmp_path, capsys):
    photo().save(tmp_path/'a.png')
    (tmp_path/'IMG_1.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(64))
    (tmp_path/'notes.txt').write_text('not a picture, and not meant')
    assert 'IMG_1.HEIC' in refused(load_images, tmp_path, 8)
    bad = []
    assert load_images(tmp_path, 8, on_error=bad.append)[1] == ['a'] and 'IMG_1.HEIC' in str(bad[0])
    folder = ImageFolder(tmp_path, 8)
    assert len(folder) == 2 and 'IMG_1.HEIC' in folder.drop_unreadable()[0] and len(folder) == 1 and folder(3).shape == (3, 3, 8, 8)
    from cycle_nb.recipes import picture_folder
    assert len(picture_folder(tmp_path, 8)) == 1 and 'IMG_1.HEIC' in capsys.readouterr().err
    (tmp_path/'a.png').unlink()
    assert 'none of the 1 images' in refused(ImageFolder(tmp_path, 8).drop_unreadable)


def test_tilde(tmp_path, monkeypatch):
    "~ is the home folder; a name that only begins with it is a name."
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('USERPROFILE', str(tmp_path)); monkeypatch.chdir(tmp_path)
    for name in ('~f.png', '~$word.png', 'ok.png'): photo().save(tmp_path/name)
    assert image_paths('~/ok.png') == [tmp_path/'ok.png'] and len(image_paths('~')) == 3
    for name in ('~f.png', '~$word.png', './~f.png'): assert load_images(name, 8)[1] == [Path(name).stem]
    assert read_image('~f.png').size == (40, 30)
    write_json([1], '~g.json')
    assert read_json('~g.json') == [1] and (tmp_path/'~g.json').is_file()


def test_folders_in_folders_and_what_is_hidden(tmp_path):
    for name in ('b.png', 'a/c.png', '.hidden.png', '.git/d.png', 'a/.e.png'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        photo().save(tmp_path/name)
    assert image_paths(tmp_path) == [tmp_path/'b.png']
    assert image_paths(tmp_path, recursive=True) == [tmp_path/'a'/'c.png', tmp_path/'b.png']
    assert len(ImageFolder(tmp_path, 8)) == 2


# --- every damage --------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', [f.lower() for f in files.FORMATS if f not in ('PPM', 'AVIF', 'JPEG2000')] + ['jp2', 'ppm'])
def test_every_format(tmp_path, suffix):
    photo().save(tmp_path/f'a.{suffix}')
    assert read_image(tmp_path/f'a.{suffix}').size == photo().size


def test_missing(tmp_path): assert 'no such file' in refused(read_image, tmp_path/'a.png')


def test_empty(tmp_path):
    (tmp_path/'a.png').touch()
    assert 'empty' in refused(read_image, tmp_path/'a.png')


def test_folder(tmp_path): assert 'folder' in refused(read_image, tmp_path)


def test_folder_without_images(tmp_path):
    (tmp_path/'notes.txt').write_text('x')
    assert 'no images' in refused(load_images, tmp_path, 64)


@pytest.mark.parametrize('content', [b'hello', b'\x89PNG\r\n\x1a\n', b'%!PS-Adobe-3.0 EPSF-3.0\n', b'\0'*1000,
                                     b'GIF89a', b'RIFF\0\0\0\0WEBP', b'\xff\xd8\xff'])
def test_not_an_image(tmp_path, content):
    (tmp_path/'a.jpg').write_bytes(content)
    assert 'a.jpg' in refused(read_image, tmp_path/'a.jpg')


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'gif', 'webp', 'bmp', 'tif'])
def test_truncated(tmp_path, suffix):
    "Cut anywhere: either one clear line, or (rarely) a whole picture, never another exception."
    f = tmp_path/f'a.{suffix}'
    photo(200, 150).save(f)
    whole, seen = f.read_bytes(), 0
    for part in np.linspace(1, len(whole)*.8, 25).astype(int):
        f.write_bytes(whole[:part])
        try: read_image(f)
        except InputError as e: seen += 1; assert str(f) in str(e) and '\n' not in str(e)
    assert seen >= 20


@pytest.mark.parametrize('suffix', ['png', 'jpg', 'gif', 'webp', 'tif'])
def test_flipped_bytes(tmp_path, suffix):
    f, rng = tmp_path/f'a.{suffix}', random.Random(0)
    photo(100, 80).save(f)
    whole = f.read_bytes()
    for _ in range(60):
        b = bytearray(whole)
        for _ in range(rng.randint(1, 12)): b[rng.randrange(len(b))] = rng.randrange(256)
        f.write_bytes(b)
        try: assert read_image(f).mode == 'RGB'
        except InputError as e: assert '\n' not in str(e)


def bomb(w, h):
    "A PNG of a few hundred bytes that claims any size."
    def chunk(name, data): return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name+data))
    head = struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0'*999)) + chunk(b'IEND', b'')


@pytest.mark.parametrize('w, h', [(9000, 9000), (40_000, 40_000), (2**31-1, 2**31-1)])
def test_pixel_bomb_is_refused_before_decoding(tmp_path, w, h, monkeypatch):
    (tmp_path/'a.png').write_bytes(bomb(w, h))
    decoded = []
    monkeypatch.setattr(Image.Image, 'convert', lambda *a, **k: decoded.append(1))
    assert 'too large' in refused(read_image, tmp_path/'a.png') and not decoded


def test_bomb_costs_no_memory(tmp_path, python):
    (tmp_path/'a.png').write_bytes(bomb(13_000, 13_000))       # half a gigabyte, if it were decoded
    code = ('import sys, resource; from cycle_nb.core import InputError; from cycle_nb.files import read_image; m = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'a = m()\ntry: read_image(sys.argv[1])\nexcept InputError: print(m()-a)')
    assert int(python(code, tmp_path/'a.png')) < 60_000        # kB


def test_large_jpeg_is_decoded_at_a_fraction(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'MAX_PIXELS', 10_000_000)
    Image.new('RGB', (9000, 6000), 'red').save(tmp_path/'a.jpg')
    im = read_image(tmp_path/'a.jpg')
    assert im.width >= 2000 and abs(im.width/im.height - 1.5) < .01


@pytest.mark.skipif(os.name != 'posix', reason='needs a named pipe')
def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path/'a.png')
    assert 'ordinary' in refused(read_image, tmp_path/'a.png')


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may read everything')
def test_forbidden(tmp_path):
    photo().save(tmp_path/'a.png'); (tmp_path/'a.png').chmod(0)
    assert 'permission' in refused(read_image, tmp_path/'a.png')


def test_others_of_the_batch_are_still_read(tmp_path):
    photo().save(tmp_path/'b.png'); (tmp_path/'a.png').write_bytes(b'x'); (tmp_path/'c.png').touch()
    bad = []
    imgs, names = load_images([tmp_path, tmp_path/'none.jpg'], 32, on_error=bad.append)
    assert names == ['b'] and len(imgs) == 1 and len(bad) == 3


# --- round trips ---------------------------------------------------------------------------

pictures = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32-1))


def random_picture(w, h, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), 'uint8'))


@given(pictures)
@settings(max_examples=60, deadline=None)
def test_bytes_survive(p):
    im = random_picture(*p)
    x = to_tensor(im)
    assert x.shape == (3, p[1], p[0]) and x.min() >= -1 and x.max() <= 1
    assert to_pil(x).tobytes() == im.tobytes()


@given(pictures, st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_resized_stays_in_range(p, size):
    x = to_tensor(random_picture(*p), size)
    assert x.shape == (3, size, size) and -1 <= x.min() and x.max() <= 1 and x.isfinite().all()


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_numbers_become_bytes(v):
    got = to_pil(torch.tensor(v).view(3, 1, 1)).getpixel((0, 0))
    want = [0 if x != x else round((min(max(x, -1), 1)+1)*127.5) for x in v]
    assert all(abs(a-b) <= 1 for a, b in zip(got, want))


@given(pictures)
@settings(max_examples=20, deadline=None)
def test_files_survive(p):
    from tempfile import TemporaryDirectory
    with TemporaryDirectory() as d:
        im = random_picture(*p)
        save_image(to_tensor(im), f'{d}/a.png')
        assert read_image(f'{d}/a.png').tobytes() == im.tobytes() and os.listdir(d) == ['a.png']


# --- writing -------------------------------------------------------------------------------

def test_suffix_and_place_are_checked(tmp_path):
    assert 'png' in refused(save_image, photo(), tmp_path/'a.xyz')
    (tmp_path/'file').touch()
    for bad in (tmp_path/'file'/'a.png', '/proc/none/a.png', tmp_path):
        refused(write_json, {}, bad)
    assert os.listdir(tmp_path) == ['file']


def test_full_disk_is_one_line_and_leaves_the_old_file():
    if not os.path.exists('/dev/full'): pytest.skip('no /dev/full here')
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        write_json({'old': 1}, f'{d}/a.json')
        def full():
            with atomic(f'{d}/a.json'), open('/dev/full', 'w') as f: f.write('x'*10_000)
        assert 'a.json' in refused(full)
        assert read_json(f'{d}/a.json') == {'old': 1} and os.listdir(d) == ['a.json']


FULL = '''
import resource, sys, torch
from cycle_nb.core import InputError
from cycle_nb.files import save_image, save_torch, write_json
from cycle_nb.models import save_tensors
from cycle_nb.checkpoints import convert
folder, kind = sys.argv[1:]
x, save = torch.rand(3, 200, 200), dict(json=lambda p: write_json(list(range(50_000)), p), safetensors=lambda p: save_tensors(p, {"x": x}, {}),
                                        pt=lambda p: save_torch({"x": x}, p), pth=lambda p: convert("sdfaces64", p, "nvidia")).get(kind, lambda p: save_image(x, p))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try: save(folder + "/a." + kind)
except InputError as e: print(e)
'''


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit of file sizes')
@pytest.mark.parametrize('kind', ['json', 'safetensors', 'pt', 'pth', 'png', 'jpg', 'tif', 'webp'])
def test_every_kind_of_file_meets_a_full_disk(tmp_path, python, kind):
    "One line that names the file; what was there stays, and nothing half-written is left."
    (tmp_path/f'a.{kind}').write_text('old')
    said = python(FULL, tmp_path, kind)
    assert said.count('\n') == 1 and f'a.{kind}: cannot be written' in said and 'make room' in said
    assert os.listdir(tmp_path) == [f'a.{kind}'] and (tmp_path/f'a.{kind}').read_text() == 'old'


def test_other_mistakes_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(Exception) as e: save_torch(lambda: 0, tmp_path/'a.pt')
    assert not isinstance(e.value, InputError) and not os.listdir(tmp_path)


def test_middle_square():
    assert center_crop(photo(40, 30)).tobytes() == photo(40, 30).crop((5, 0, 35, 30)).tobytes()


WRITER = '''
import sys, torch
from cycle_nb.files import save_image, write_json
from cycle_nb.models import save_tensors
folder, kind = sys.argv[1:]
print("ready", flush=True)
for i in range(10**6):
    c = [i % 2*2-1.]*3
    if kind == "png": save_image(torch.tensor(c).view(3, 1, 1) + torch.zeros(3, 700, 700), folder+"/a.png")
    if kind == "json": write_json([i]*100_000, folder+"/a.json")
    if kind == "safetensors": save_tensors(folder+"/a.safetensors", {"x": torch.full((10**6,), float(i % 100))}, {"i": i})
'''


def whole(folder, kind):
    "Whether the file is complete and of one piece (or never appeared)."
    f = folder/f'a.{kind}'
    if not f.exists(): return True
    if kind == 'png': return len(set(read_image(f).getdata())) == 1
    if kind == 'json': return len(set(read_json(f))) == 1
    ts, card = load_tensors(f)
    return len(ts['x'].unique()) == 1 and ts['x'][0] == card['i'] % 100


def kill_in_mid_write(folder, kind):
    "Start a writer, stop it while a half-written file lies there, kill it; the size of that file."
    p = subprocess.Popen([sys.executable, '-c', WRITER, folder, kind], stdout=subprocess.PIPE,
                         env=os.environ | {'PYTHONPATH': str(ROOT)})
    try:
        assert p.stdout.readline() == b'ready\n'
        until = time.time() + 60
        while time.time() < until:
            p.send_signal(signal.SIGSTOP)
            os.waitpid(p.pid, os.WUNTRACED)                 # it has stopped
            if sizes := [f.stat().st_size for f in folder.glob('.*.part*')]: return sizes[0]
            p.send_signal(signal.SIGCONT); time.sleep(random.random()*.01)
        pytest.fail('the writer was never seen in mid-write')
    finally: p.kill(); p.wait(); p.stdout.close()


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
@pytest.mark.parametrize('kind', ['png', 'json', 'safetensors'])
def test_killed_in_mid_write(tmp_path, kind):
    "A real process, killed while it writes: the file is whole or not there, and leftovers are swept."
    for _ in range(2):
        kill_in_mid_write(tmp_path, kind)
        assert whole(tmp_path, kind)
    assert len(list(tmp_path.glob('.*.part*'))) == 1, "the second process swept the first one's leftover"
    write_json(0, tmp_path/'a.json'); save_tensors(tmp_path/'a.safetensors', {}, {})
    save_image(photo(), tmp_path/'a.png')
    assert {f.name for f in tmp_path.iterdir()} == {'a.json', 'a.png', 'a.safetensors'}


def test_writers_do_not_sweep_each_other(tmp_path):
    with atomic(tmp_path/'a.txt') as one, atomic(tmp_path/'a.txt') as two:
        assert one != two and one.exists() and two.exists()
        one.write_text('1'); two.write_text('2')
    assert (tmp_path/'a.txt').read_text() == '1' and len(list(tmp_path.iterdir())) == 1


def test_link_stays_a_link(tmp_path):
    (tmp_path/'real.txt').write_text('old'); (tmp_path/'link.txt').symlink_to(tmp_path/'real.txt')
    with atomic(tmp_path/'link.txt') as p: p.write_text('new')
    assert (tmp_path/'link.txt').is_symlink() and (tmp_path/'real.txt').read_text() == 'new'


# --- downloads -----------------------------------------------------------------------------

DATA = random.Random(0).randbytes(300_000)
HASH = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server():
    "A web server whose behaviour a test sets: `.ranges`, `.stop_after`, `.fail`; `.asked` is its log."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            s, want = self.server, self.headers.get('Range')
            s.asked.append(want)
            if 'missing' in self.path: return self.send_error(404)
            if s.fail: s.fail -= 1; return self.send_error(503)
            start = int(want[6:-1]) if want and s.ranges else 0
            if start >= len(DATA): return self.send_error(416)
            self.send_response(206 if want and s.ranges else 200)
            self.send_header('Content-Length', str(len(DATA)-start)); self.end_headers()
            body = DATA[start:]
            self.wfile.write(body[:s.stop_after] if s.stop_after else body)
        def log_message(self, *a): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.asked, s.ranges, s.stop_after, s.fail = [], True, 0, 0
    s.url = f'http://127.0.0.1:{s.server_port}/file.bin'
    threading.Thread(target=s.serve_forever, args=(.02,), daemon=True).start()
    yield s
    s.shutdown(); s.server_close()


def test_fetch_once(server, tmp_path):
    for _ in range(2): assert fetch(server.url, HASH, tmp_path/'deep'/'f').read_bytes() == DATA
    assert server.asked == [None]


def test_fetch_into_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv('CYCLE_NB_CACHE', str(tmp_path/'cache'))
    assert fetch(server.url, HASH.upper()) == tmp_path/'cache'/'file.bin'


def test_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv('CYCLE_NB_CACHE', raising=False); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_dir() == tmp_path/'cycle_nb'
    monkeypatch.setenv('CYCLE_NB_CACHE', '~/x'); assert cache_dir() == type(tmp_path).home()/'x'


def test_interrupted_resumes(server, tmp_path):
    server.stop_after = 100_000
    text = refused(fetch, server.url, HASH, tmp_path/'f', tries=1)
    assert 'again' in text and not (tmp_path/'f').exists()
    server.stop_after = 0
    assert fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA
    assert server.asked == [None, 'bytes=100000-'] and os.listdir(tmp_path) == ['f']


def test_resumes_by_itself(server, tmp_path):
    server.stop_after = 120_000
    assert fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA
    assert server.asked == [None, 'bytes=120000-', 'bytes=240000-']


def test_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path/'f.part').write_bytes(DATA[:1000]); server.ranges = False
    assert fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA and server.asked == ['bytes=1000-']


def test_without_a_hash_never_resumes(server, tmp_path):
    (tmp_path/'f.part').write_bytes(b'something else')
    assert fetch(server.url, to=tmp_path/'f').read_bytes() == DATA and server.asked == [None]


def test_wrong_hash_is_removed(server, tmp_path):
    assert 'wrong content' in refused(fetch, server.url, '0'*64, tmp_path/'f')
    assert os.listdir(tmp_path) == []


def test_poisoned_part_is_removed(server, tmp_path):
    (tmp_path/'f.part').write_bytes(b'x'*1000)
    refused(fetch, server.url, HASH, tmp_path/'f')
    assert os.listdir(tmp_path) == [] and fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA


def test_part_that_is_too_long(server, tmp_path):
    (tmp_path/'f.part').write_bytes(DATA + b'more')
    assert fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA


def test_stale_file_is_replaced(server, tmp_path):
    (tmp_path/'f').write_bytes(b'old')
    assert fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA


def test_404_is_not_asked_again(server, tmp_path):
    assert '404' in refused(fetch, server.url.replace('file', 'missing'), HASH, tmp_path/'f')
    assert len(server.asked) == 1 and os.listdir(tmp_path) == []


def test_busy_server_is_asked_again(server, tmp_path):
    server.fail = 2
    assert fetch(server.url, HASH, tmp_path/'f').read_bytes() == DATA and len(server.asked) == 3


def test_nobody_there(tmp_path): assert 'failed' in refused(fetch, 'http://127.0.0.1:9/x', to=tmp_path/'f', tries=1)


def test_unwritable_target(server, tmp_path):
    (tmp_path/'file').touch()
    assert 'cannot be written' in refused(fetch, server.url, HASH, tmp_path/'file'/'f') and not server.asked


# --- faces in photographs ------------------------------------------------------------------

def smooth(h=90, w=120):
    "A picture without fine texture, so that resampling it changes next to nothing."
    y, x = torch.meshgrid(torch.arange(h)/30, torch.arange(w)/30, indexing='ij')
    return torch.stack([(x + y).sin(), (1.3*x - .7*y).cos(), (.9*y).sin()])*.8


def turned(half, degrees, x, y):
    "A square by its half-side, angle and centre."
    c, s = half*math.cos(math.radians(degrees)), half*math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, x], [s, c, y]])


def outside(square, h, w, by=0.):
    "Pixels that are not inside a square."
    x, y = torch.meshgrid(torch.arange(w), torch.arange(h), indexing='xy')
    ab = torch.linalg.solve(square[:, :2].double(), (torch.stack([x, y]).flatten(1) - square[:, 2:]).double())
    return (ab.abs().amax(0) >= 1 - by).view(h, w)


ANY = given(st.floats(4, 400), st.floats(-180, 180), st.floats(-60, 180), st.floats(-60, 150))


@settings(max_examples=60, deadline=None)
@ANY
def test_an_unedited_crop_pasted_back_changes_nothing(half, degrees, x, y):
    "Any size (far larger than the picture, too), any angle, inside, across the border, outside."
    img, sq = smooth(), turned(half, degrees, x, y)
    back = paste_back(img, align(img, sq, min(1024, 4*math.ceil(half))), sq)
    assert back[:, outside(sq, 90, 120, -1e-4)].equal(img[:, outside(sq, 90, 120, -1e-4)])
    assert (back - img).abs().max() < .03


@settings(max_examples=60, deadline=None)
@ANY
def test_an_edit_arrives_where_it_belongs(half, degrees, x, y):
    "A crop of one colour: that colour inside the rim, the photograph outside, a mixture between."
    img, sq = smooth(), turned(half, degrees, x, y)
    back = paste_back(img, torch.full((3, 16, 16), .9), sq, feather=.2)
    inside = ~outside(sq, 90, 120, .2 + 1e-3)
    assert not inside.any() or (back[:, inside] - .9).abs().max() < 1e-4
    assert back[:, outside(sq, 90, 120, -1e-4)].equal(img[:, outside(sq, 90, 120, -1e-4)])
    assert (back >= torch.minimum(img, torch.tensor(.9)) - 1e-4).all() and (back <= .9 + 1e-4).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(10, 40), st.floats(-180, 180))
def test_a_turned_photograph_gives_the_same_crop(half, degrees):
    img, sq = smooth(), turned(half, degrees, 50., 40.)
    other = torch.stack([sq[1], -sq[0]])
    other[1, 2] += 120 - 1                       # x' = y, y' = W-1-x
    assert (align(img.rot90(1, (1, 2)), other, 32) - align(img, sq, 32)).abs().max() < 1e-4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 500), min_size=10, max_size=10))
def test_square_by_the_published_formula(values):
    "With complex numbers: x along e - im, of length max(2|e|, 1.8|m|); y is ix; the centre lies .1m below the eyes."
    p = torch.tensor(values, dtype=torch.float64).view(5, 2)
    l, r, _, a, b = torch.view_as_complex(p)
    e, m = r - l, (a + b)/2 - (l + r)/2
    x = e - 1j*m
    if abs(x) < 1: return
    x = x/abs(x)*max(2*abs(e), 1.8*abs(m))
    want = [(l + r)/2 + .1*m + s*x + t*1j*x for s, t in ((-1, -1), (-1, 1), (1, 1), (1, -1))]
    many = p.mean(0).repeat(68, 1)
    many[36:42], many[42:48], many[48], many[54] = p[0], p[1], p[3], p[4]
    for points in (p, many):
        got = crop_transform(points).double() @ torch.tensor([[-1, -1, 1, 1], [-1, 1, 1, -1], [1, 1, 1, 1]]).double()
        assert (torch.view_as_complex(got.T.contiguous()) - torch.stack(want)).abs().max() < 1e-3


def test_soft_margin_is_ffhqs():
    "Thirty pixels are missing on the left: a margin of 30 + a tenth of the side, blurred from a third of it inside, then fading to the median."
    img, sq = smooth(), turned(40, 0, 9.5, 44.5)
    hard, soft = align(img, sq, 80), align(img, sq, 80, blur_outside=True)          # column k shows x = k - 30
    rows = slice(6, 74)                                                     # away from the upper and lower edge
    assert soft[:, rows, 43:].equal(hard[:, rows, 43:]) and not soft[:, rows, 30:43].equal(hard[:, rows, 30:43])
    middle = soft.flatten(1).median(1).values[:, None]
    off = lambda c, k: (c[:, :, k] - middle).abs().mean()
    assert off(soft, 0) < .35*off(hard, 0) and off(soft, 0) < off(soft, 15) < off(soft, 29)
    back = paste_back(img, soft, sq, blur_outside=True)
    assert back[:, :, 0].equal(img[:, :, 0]) and (back - img).abs().max() < .03
    assert align(img, turned(20, 30, 60, 45), 64, blur_outside=True).equal(align(img, turned(20, 30, 60, 45), 64))


def test_landmarks_from_anything(tmp_path):
    pts = np.array([[30., 30], [60, 30], [45, 45], [35, 60], [55, 60]])
    save_image(smooth(), tmp_path/'a.png')
    for f in (lambda im: [pts], lambda im: np.array([pts], dtype=object), lambda im: [torch.tensor(pts*.5), pts.tolist()]):
        for x in (smooth(), to_pil(smooth()), tmp_path/'a.png'): assert torch.equal(landmarks(x, f)[0], torch.tensor(pts).float())
    assert 'no face' in refused(landmarks, smooth(), lambda im: [])
    assert '5 or 68' in refused(landmarks, smooth(), lambda im: [pts[:4]])
    assert 'facenet, dlib' in refused(landmarks, smooth(), 'haar')


@pytest.mark.parametrize('name, module, package', [('facenet', 'facenet_pytorch', 'facenet-pytorch --no-deps'), ('dlib', 'dlib', 'dlib'),
                                                   ('mediapipe', 'mediapipe', 'mediapipe'), ('face_alignment', 'face_alignment', 'face-alignment')])
def test_missing_detector_is_one_line_with_its_cure(name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)          # as if it were not installed
    assert refused(landmarks, smooth(), name).endswith(f'pip install {package}')


# --- pictures that are not square ----------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4))
def test_padding_is_undone(h, w, k):
    img = torch.rand(2, 3, h, w)
    sq = pad_square(img, .25)
    s = max(h, w)
    assert sq.shape == (2, 3, s, s) and unpad_square(sq, (h, w)).equal(img)
    assert int((sq == .25).all(1).sum()) >= 2*(s*s - h*w) and sq.sum().isclose(img.sum() + 6*.25*(s*s - h*w), rtol=1e-4)
    big = sq.repeat_interleave(k, 2).repeat_interleave(k, 3)        # a generator of another resolution
    assert unpad_square(big, (h, w)).equal(img.repeat_interleave(k, 2).repeat_interleave(k, 3))


def test_padded_folder(tmp_path):
    save_image(smooth(40, 100), tmp_path/'wide.png'); save_image(smooth(90, 30), tmp_path/'tall.png')
    tall, wide = (ImageFolder(tmp_path, 50, flip=False, pad=True)[i] for i in (0, 1))
    assert (wide[:, :12] == -1).all() and (wide[:, 38:] == -1).all() and (tall[..., :13] == -1).all()      # the filter reaches 3 pixels
    part = unpad_square(wide, (40, 100))
    assert part.shape == (3, 20, 50) and (part - torch.nn.functional.avg_pool2d(smooth(40, 100), 2)).abs()[:, 2:-2].max() < .05
    cut = ImageFolder(tmp_path, 50, flip=False)[1]
    assert (cut != -1).any(0).all()


def test_a_first_download_is_pinned(server, tmp_path, capsys, monkeypatch):
    "What has no published hash: the first download's is said, kept, and asked of the file from then on."
    from cycle_nb import download as d
    url = f'http://127.0.0.1:{server.server_address[1]}/net.pt'
    monkeypatch.setitem(d.PUBLISHED, 'mine', dict(what='a network', url=url, licence='mine', sha256=None, size=None))
    file = d.download('mine', tmp_path/'net.pt')
    assert HASH in capsys.readouterr().out and (tmp_path/'net.pt.sha256').read_text().strip() == HASH
    asked = len(server.asked)
    assert d.download('mine', file) == file and len(server.asked) == asked        # not fetched again
    file.write_bytes(b'changed')
    assert d.download('mine', file).read_bytes() == DATA                           # noticed, and fetched again
    (tmp_path/'net.pt.sha256').write_text('0'*64)
    with pytest.raises(InputError, match='wrong content'): d.download('mine', file)
