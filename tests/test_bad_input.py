"Bad input: one clear line that names the thing and the cure, exit code 2, the other images done, nothing half-written."
import os, shutil, struct, subprocess, zlib
from pathlib import Path
import pytest
from cycle_nb.bundle import load_bundle
from cycle_nb.core import InputError
from cycle_nb.files import read_json
from cycle_nb.inversion import Inversion, invert
from cycle_nb.cli import main
from tiny import ENV, FAST, bundle, cli, command, faces

def huge_png(path):
    "A few hundred bytes that promise 50,000 x 50,000 pixels."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', 50000, 50000, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'\0'*1000)) + chunk(b'IEND', b''))

@pytest.fixture
def bad(faces, tmp_path):
    "Every kind of unusable input, with a word its line must hold."
    d = tmp_path/'bad'
    d.mkdir()
    whole = faces[0].read_bytes()
    (d/'empty.png').write_bytes(b'')
    (d/'truncated.png').write_bytes(whole[:len(whole)//2])
    (d/'text.jpg').write_text('not an image at all')
    huge_png(d/'huge.png')
    (d/'no images here').mkdir()
    (d/'no images here'/'notes.txt').write_text('x')
    os.mkfifo(d/'pipe.png')
    return {d/'missing.png': 'no such file', d/'empty.png': 'empty', d/'truncated.png': 'damaged', d/'text.jpg': 'not an image',
            d/'huge.png': 'too large', d/'no images here': 'no images', d/'pipe.png': 'not an ordinary file'}

def test_bad_files_do_not_stop_the_others(bundle, faces, bad, tmp_path):
    out = tmp_path/'out'
    r = cli('invert', *list(bad)[:4], faces[0], *list(bad)[4:], faces[1], '--out', out, '--bundle', bundle, *FAST)
    lines = r.stderr.splitlines()
    assert r.returncode == 2 and 'Traceback' not in r.stderr
    for path, word in bad.items():
        mine = [line for line in lines if str(path) in line]
        assert len(mine) == 1 and word in mine[0].lower() and mine[0].startswith('cycle-nb: '), (path, mine)
    assert Inversion.load(out).names == ['f0', 'f1']
    record = read_json(out/'record.json')
    assert {f['file'] for f in record['failures']} == set(map(str, bad)) and record['images'] == 2
    assert {p.name for p in out.iterdir()} == {'f0', 'f1', 'record.json', 'metrics.jsonl'}

def test_nothing_usable_leaves_nothing(bundle, bad, tmp_path):
    r = cli('invert', *bad, '--out', tmp_path/'out', '--bundle', bundle, *FAST)
    assert r.returncode == 2 and not (tmp_path/'out').exists() and 'Traceback' not in r.stderr

def complaint(capsys, *args):
    "Run in this process; the one line on stderr."
    code = main([str(a) for a in args])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith('cycle-nb: ') and err.count('\n') == 1, (code, err)
    return err

@pytest.mark.parametrize('edit, words', [
    ('simle=2', ["'simle'", "did you mean 'smile'", 'age, glasses, smile, yaw']), ('nothing=1', ["'nothing'", 'known edits']),
    ('smile', ['--edit smile', '--edit smile=2']), ('smile=', ['smile=2']), ('=2', ['smile=2']), ('smile=big', ['smile=big']),
    ('smile=nan', ['smile=nan']), ('smile=inf', ['smile=inf'])])
def test_edits(bundle, faces, tmp_path, capsys, edit, words):
    err = complaint(capsys, 'invert', faces[0], '--out', tmp_path/'out', '--bundle', bundle, '--edit', edit)
    assert all(w in err for w in words), err
    assert not (tmp_path/'out').exists()

def test_outputs_that_cannot_be(bundle, faces, tmp_path, capsys):
    args = ['--bundle', bundle, *FAST]
    (tmp_path/'file').write_text('mine')
    for out in (tmp_path/'file', tmp_path/'file'/'below', '/proc/cycle_nb_test', '/dev/null'):
        err = complaint(capsys, 'invert', faces[0], '--out', out, *args)
        assert str(out) in err and '--out' in err, err
    assert (tmp_path/'file').read_text() == 'mine'

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='permissions do not bind root')
def test_read_only_output(bundle, faces, tmp_path, capsys):
    (tmp_path/'locked').mkdir(mode=0o555)
    assert 'locked' in complaint(capsys, 'invert', faces[0], '--out', tmp_path/'locked'/'out', '--bundle', bundle)

def test_a_folder_that_is_no_result_is_kept(bundle, faces, tmp_path, capsys):
    (tmp_path/'out'/'f0').mkdir(parents=True)
    (tmp_path/'out'/'f0'/'diary.txt').write_text('mine')
    for flag in ([], ['--overwrite'], ['--resume']):
        assert 'f0' in complaint(capsys, 'invert', faces[0], '--out', tmp_path/'out', '--bundle', bundle, *flag)
    assert (tmp_path/'out'/'f0'/'diary.txt').read_text() == 'mine'

def test_result_of_another_file_is_not_taken_for_ours(bundle, faces, tmp_path):
    "Another file of the same name gets a folder of its own, whether it is asked to go on or to replace."
    other = tmp_path/'other'/faces[0].name
    other.parent.mkdir()
    other.write_bytes(faces[1].read_bytes())
    quick = ['--out', tmp_path/'out', '--bundle', bundle, '--tune', '0', '--refine', '0']
    assert main([str(a) for a in ('invert', faces[0], *quick)]) == 0
    first = (tmp_path/'out'/'f0'/'inversion.json').read_bytes()
    for flag in ('--resume', '--overwrite'):
        assert main([str(a) for a in ('invert', other, *quick, flag)]) == 0
        assert (tmp_path/'out'/'f0'/'inversion.json').read_bytes() == first
        assert read_json(tmp_path/'out'/'f0-2'/'inversion.json')['source'] == str(other)
    assert not (tmp_path/'out'/'f0-3').exists()

@pytest.mark.parametrize('args, words', [
    (['--device', 'abacus'], ['abacus']), (['--bundle', 'nowhere'], ['nowhere']), (['--tune', '-3'], ["'-3'", '--tune']),
    (['--batch', '0'], ['--batch']), (['--encoder', 'magic'], ['magic', 'cycle']), (['--colour'], ['--colour', '--help']),
    (['--seed', 'x'], ['--seed'])])
def test_options(bundle, faces, tmp_path, capsys, args, words):
    base = ['invert', faces[0], '--out', tmp_path/'out'] + ([] if '--bundle' in args else ['--bundle', bundle])
    err = complaint(capsys, *base, *args)
    assert all(w in err for w in words), err
    assert not (tmp_path/'out').exists()

def test_no_arguments_and_a_real_process():
    for args in ([], ['fly'], ['invert'], ['invert', 'x.png'], ['train'], ['train', 'cats']):
        r = cli(*args) if args == [] else None
        if r is None: assert main(args) == 2
        else: assert r.returncode == 2 and 'Traceback' not in r.stderr and r.stderr.count('\n') == 1, r.stderr

def test_broken_bundles(bundle, faces, tmp_path, capsys):
    import shutil
    for name, spoil in dict(cycle=None, generator=None, directions=None, perceptual=b'junk', wplus=b'').items():
        copy = tmp_path/f'without-{name}'
        shutil.copytree(bundle, copy)
        f = copy/f'{name}.safetensors'
        f.unlink() if spoil is None else f.write_bytes(spoil)
        encoder = name if name == 'wplus' else 'cycle'
        err = complaint(capsys, 'invert', faces[0], '--out', tmp_path/'out', '--bundle', copy, '--encoder', encoder, '--edit', 'smile=1', *FAST)
        assert name in err, err
    assert not (tmp_path/'out').exists()

def test_full_disk(bundle, faces, tmp_path):
    "A limit on the size of files stands in for a full disk."
    run = command('invert', faces[0], '--out', tmp_path/'out', '--bundle', bundle, *FAST)
    r = subprocess.run(['bash', '-c', 'ulimit -f 4; exec "$@"', 'run', *run], env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode == 2 and 'Traceback' not in r.stderr and str(tmp_path/'out') in r.stderr, r.stderr
    assert not (tmp_path/'out').exists() or not list((tmp_path/'out').iterdir())

def test_the_library_says_the_same(bundle, faces, tmp_path):
    inv = invert(faces[:1], bundle, refine=0, tune=0)
    with pytest.raises(InputError, match='known edits: age, glasses, smile, yaw'): inv.edit('simle', 2.)
    with pytest.raises(InputError, match='no inversion here'): Inversion.load(tmp_path)
    with pytest.raises(InputError, match='no such file'): invert(tmp_path/'missing.png', bundle)
    with pytest.raises(InputError, match="unknown encoder 'x'"): invert(faces[:1], bundle, encoder='x')


def test_what_a_bundle_lacks_is_said_with_its_whole_place(bundle, tmp_path):
    shutil.copytree(bundle, d := tmp_path/'mine')
    (d/'directions.safetensors').unlink(), (d/'directions.safetensors').symlink_to(tmp_path/'nowhere')
    (d/'cycle.safetensors').unlink()
    b = load_bundle(d)
    for lacks in (lambda: b.direction('smile'), lambda: b.encoder(), lambda: b.encoder('x')):
        with pytest.raises(InputError) as e: lacks()
        assert str(d) in str(e.value)


@pytest.mark.parametrize('name, text', [('record.json', '{"kind": "benchmark quality", "images": 3}'), ('metrics.jsonl', '{"mine": 1}\n')])
def test_a_record_of_something_else_is_kept(bundle, faces, tmp_path, capsys, name, text):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/name).write_text(text)
    assert name in complaint(capsys, 'invert', faces[0], '--out', tmp_path/'out', '--bundle', bundle, *FAST)
    assert (tmp_path/'out'/name).read_text() == text and len(list((tmp_path/'out').iterdir())) == 1

def test_a_record_of_something_else_is_kept_beside_results(bundle, faces, tmp_path, capsys):
    args = ['--bundle', bundle, '--tune', '0', '--refine', '0']
    assert main(['invert', *map(str, [faces[0], '--out', tmp_path/'out', *args])]) == 0
    capsys.readouterr()
    (tmp_path/'out'/'record.json').write_text(text := '{"kind": "benchmark quality"}')
    assert 'record.json' in complaint(capsys, 'invert', faces[1], '--out', tmp_path/'out', *args)
    assert (tmp_path/'out'/'record.json').read_text() == text

@pytest.mark.parametrize('part, name', [('nets', 'perceptual'), ('encoder', 'w'), ('encoder', 'wplus'), ('directions', 'directions_pca')])
def test_a_training_replaces_nothing_unasked(tmp_path, capsys, part, name):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/f'{name}.safetensors').write_bytes(b'mine')
    assert name in complaint(capsys, 'train', part, '--preset', 'tiny', '--out', tmp_path/'mine')
    assert (tmp_path/'mine'/f'{name}.safetensors').read_bytes() == b'mine'

def test_digits_are_a_number_whatever_folders_there_are(tmp_path, monkeypatch):
    from cycle_nb.cli import parser
    monkeypatch.chdir(tmp_path)
    for name in ('64', 'faces', 'sdfaces64'): (tmp_path/name).mkdir()
    read = lambda text: parser().parse_args(['benchmark', 'quality', '--out', 'x.json', '--images', text]).images
    assert read('64') == 64 and read('faces') == Path('faces')
    assert load_bundle('sdfaces64').has('generator')                # an empty folder hides no shipped bundle
