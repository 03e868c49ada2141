"The command as a user meets it: real processes, real files, an untrained bundle."
import shutil, signal, subprocess, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from PIL import Image
from cycle_nb.core import read_image, read_json, to_tensor
from cycle_nb.invert import Inversion, invert, load_bundle, main, samples, unique_names
from cycle_nb.sdfaces import render
from cycle_nb.stylegan2 import Generator
from cycle_nb.weights import load_generator, save_generator
from tiny import ENV, FAST, bundle, cli, command, faces

STEPS = ['W', 'cycle', '+refine', '+tune']

def results(out): return sorted(p.parent.name for p in out.glob('[!.]*/inversion.json'))

def test_help_everywhere(capsys):
    r = cli('--help')
    assert r.returncode == 0 and all(w in r.stdout for w in ('demo', 'invert', 'train')) and not r.stderr
    for words in (['demo'], ['invert'], ['train'], ['train', 'generator'], ['train', 'nets'], ['train', 'encoder'], ['train', 'directions']):
        with pytest.raises(SystemExit) as e: main([*words, '--help'])
        text = capsys.readouterr().out
        assert e.value.code == 0 and '--seed' in text or words == ['train'], (words, text)

def test_the_whole_set_trains_from_nothing(tmp_path, monkeypatch):
    "Every part in order, a minute of it; a second call goes on or says that it must be asked to."
    monkeypatch.chdir(tmp_path)
    for part in ('nets', 'generator', 'encoder', 'directions'):
        assert main(['train', part, '--preset', 'tiny', '--out', 'all']) == 0, part
    files = sorted(tmp_path.glob('all/*.safetensors'))
    assert [f.stem for f in files] == sorted(['perceptual', 'identity', 'attributes', 'generator', 'w', 'wplus', 'cycle', 'w_long', 'directions', 'directions_pca', 'directions_closed'])
    for f in files:
        assert all(t.isfinite().all() for t in load_file(f).values()), f.name
        assert {'command', 'seed', 'steps', 'data', 'commit', 'figures'} - {'figures'} <= set(read_json(f.with_suffix('.json'))), f.name
    before = files[0].stat().st_mtime_ns
    assert main(['train', 'nets', '--preset', 'tiny', '--out', 'all']) == 2 and files[0].stat().st_mtime_ns == before
    out = invert(render(torch.zeros(1, 24)), 'all', refine=1, tune=2)
    assert out.img.isfinite().all() and out.img.shape == (1, 3, 64, 64)

def test_convert_there_and_back(tmp_path, capsys):
    torch.manual_seed(0)
    G = Generator(32, z_dim=16, w_dim=16, num_mapping=2, channel_base=256, channel_max=16)
    save_generator(G, tmp_path/'mine.safetensors', half=False)
    mine, pt, again, ours = (str(tmp_path/n) for n in ('mine.safetensors', 'g.pt', 'back.safetensors', 'g.safetensors'))
    assert main(['convert', mine, pt]) == 0 and main(['convert', pt, again]) == 0
    assert main(['convert', pt, ours, '--layout', 'nvidia']) == 0
    z = torch.randn(2, G.z_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): want = G(z)
    for f in (pt, again, ours):
        with torch.no_grad(): assert torch.equal(load_generator(f)(z), want), f
    before = Path(pt).read_bytes()
    assert main(['convert', mine, pt]) == 2 and 'overwrite' in capsys.readouterr().err and Path(pt).read_bytes() == before
    assert main(['convert', mine, pt, '--overwrite']) == 0
    assert main(['convert', 'sdfaces64', str(tmp_path/'no.pt')]) == 2 and 'z_dim=32' in capsys.readouterr().err
    assert not (tmp_path/'no.pt').exists()
    assert main(['convert', str(tmp_path/'no.pt'), str(tmp_path/'x.pt')]) == 2 and not (tmp_path/'x.pt').exists()

def test_invert_files_and_folder(bundle, faces, tmp_path):
    odd = tmp_path/'näme with späces — 顔.jpg'
    Image.open(faces[0]).rotate(90).save(odd)
    same, folder = tmp_path/'other', tmp_path/'folder'
    same.mkdir(); folder.mkdir()
    shutil.copy(faces[1], same/faces[0].name)               # same stem as faces[0], another face
    Image.open(faces[2]).convert('CMYK').save(folder/'cmyk.tif')
    Image.new('I;16', (50, 90), 30000).save(folder/'grey16.png')
    out = tmp_path/'out'
    r = cli('invert', faces[0], same/faces[0].name, odd, folder, '--out', out, '--bundle', bundle, '--edit', 'smile=2', '--edit', 'age=-1.5', *FAST)
    assert r.returncode == 0, r.stderr
    assert 'Traceback' not in r.stderr and str(out) in r.stdout
    assert results(out) == sorted(['f0', 'f0-2', odd.stem, 'cmyk', 'grey16'])
    inv = Inversion.load(out)
    assert inv.wp.ndim == 3 and inv.img.shape == inv.target.shape == (5, 3, 64, 64)
    a, b = (inv.target[inv.names.index(n)] for n in ('f0', 'f0-2'))
    assert (a - b).abs().mean() > .01                       # neither overwrote the other
    for i, name in enumerate(inv.names):
        assert {p.name for p in (out/name).iterdir()} == {'target.png', 'inverted.png', 'smile+2.png', 'age-1.5.png',
                                                          'inversion.safetensors', 'inversion.json'}
        drawn = to_tensor(read_image(out/name/'smile+2.png'))
        assert (inv.edit('smile', 2.)[i].clamp(-1, 1) - drawn).abs().mean() < .01
        assert [m['step'] for m in inv.metrics if m['image'] == name] == STEPS
    record = read_json(out/'record.json')
    assert len(record['metrics']) == 20 and not record['failures'] and not record['stopped']

def test_existing_results(bundle, faces, tmp_path):
    out, args = tmp_path/'out', ['--bundle', bundle, *FAST]
    assert cli('invert', faces[0], '--out', out, *args).returncode == 0
    before = (out/'f0'/'inversion.json').stat().st_mtime_ns
    r = cli('invert', faces[0], faces[1], '--out', out, *args)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and str(out/'f0') in r.stderr and '--overwrite' in r.stderr
    assert results(out) == ['f0'] and (out/'f0'/'inversion.json').stat().st_mtime_ns == before
    assert cli('invert', faces[0], faces[1], '--out', out, '--resume', *args).returncode == 0
    assert results(out) == ['f0', 'f1'] and (out/'f0'/'inversion.json').stat().st_mtime_ns == before
    assert main(['invert', str(faces[0]), '--out', str(out), '--overwrite', *map(str, args)]) == 0
    assert (out/'f0'/'inversion.json').stat().st_mtime_ns > before and not list(out.glob('.*'))

def test_frugal_is_the_same_inversion(bundle, faces, tmp_path):
    args = ['--bundle', bundle, '--refine', '2', '--tune', '3']
    for name, more in dict(a=[], b=['--frugal']).items():
        assert main(['invert', str(faces[0]), '--out', str(tmp_path/name), *map(str, args), *more]) == 0
    a, b = (Inversion.load(tmp_path/k) for k in 'ab')
    assert torch.allclose(a.wp, b.wp, atol=.02) and (a.img - b.img).abs().mean() < .01
    assert read_json(tmp_path/'b'/'record.json')['frugal'] and not read_json(tmp_path/'a'/'record.json')['frugal']

def test_full_memory_is_one_line(bundle, faces, tmp_path, monkeypatch, capsys):
    "No graphics card here to fill: the error itself is thrown."
    def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 18.00 GiB.')
    monkeypatch.setattr('cycle_nb.invert.walk', full)
    assert main(['invert', str(faces[0]), '--out', str(tmp_path/'out'), '--bundle', str(bundle)]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '--frugal' in err and '--batch' in err and not (tmp_path/'out').exists()

def test_demo(bundle, faces, tmp_path):
    r = cli('demo', '--out', tmp_path/'demo', '--bundle', bundle, *FAST)
    assert r.returncode == 0, r.stderr
    rows = [line.split() for line in r.stdout.splitlines()]
    assert sum('+tune' in row for row in rows) >= 13        # 12 images and the mean
    assert 'mean' in r.stdout and 'sheet.png' in r.stdout
    assert Image.open(tmp_path/'demo'/'sheet.png').width > 1200
    assert list(read_json(tmp_path/'demo'/'record.json')['means']) == STEPS
    quick = ['--out', str(tmp_path/'demo'), '--bundle', str(bundle), '--refine', '0', '--tune', '0']
    assert main(['demo', str(faces[0]), *quick]) == 0       # once more, in place of the first, with a file
    assert len(Inversion.load(tmp_path/'demo')) == 13 and not list((tmp_path/'demo').glob('.*'))

def start(bundle, faces, out, *more):
    "A long run, one image at a time; returns the process once the first image is finished."
    p = subprocess.Popen(command('invert', *faces, '--out', out, '--bundle', bundle, '--batch', '1', '--tune', '6', '--refine', '1', *more),
                         env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a shell may have it ignored
    end = time.time() + 400
    while time.time() < end and p.poll() is None and not results(out): time.sleep(.02)
    return p

@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle(bundle, faces, tmp_path, how):
    out = tmp_path/'out'
    p = start(bundle, faces, out)
    p.send_signal(how)
    _, err = p.communicate(timeout=300)
    done = results(out)
    assert 1 <= len(done) < len(faces), (done, err)
    assert len(Inversion.load(out)) == len(done)            # everything in sight is whole
    assert all(p.name in done or p.name == 'record.json' or p.name.startswith('.') for p in out.iterdir())
    if how == signal.SIGKILL: assert p.returncode == -9
    else: assert p.returncode == 130 and 'Traceback' not in err and '--resume' in err and not list(out.glob('.*'))
    if how != signal.SIGINT: return
    r = cli('invert', *faces, '--out', out, '--bundle', bundle, '--resume', '--tune', '0', '--refine', '0')
    assert r.returncode == 0 and len(results(out)) == len(faces), r.stderr

def test_leftovers_of_a_kill_are_swept(bundle, faces, tmp_path):
    out = tmp_path/'out'
    (out/'.cycle_nb-partial-x'/'new').mkdir(parents=True)
    import os
    os.utime(out/'.cycle_nb-partial-x', (0, 0))
    assert main(['invert', str(faces[0]), '--out', str(out), '--bundle', str(bundle), '--tune', '0', '--refine', '0']) == 0
    assert not list(out.glob('.*'))

def test_same_seed_same_result(bundle, faces):
    a, b = (invert(faces[:2], bundle, refine=2, tune=3, seed=5) for _ in 'ab')
    assert torch.equal(a.wp, b.wp) and torch.equal(a.img, b.img)
    assert len(a[1]) == 1 and torch.equal(a[1].img[0], a.img[1])

def test_companions_in_a_batch_do_not_matter(bundle, faces):
    both, one = (invert(f, load_bundle(bundle), refine=2, tune=3) for f in (faces[:2], faces[1:2]))
    assert torch.allclose(both.img[1], one.img[0], atol=1e-2)

def test_ten_thousand_names():
    t = time.time()
    names = unique_names(['a/face.png', 'b/FACE.jpg', 'face-2.png', '..png', 'x\ny.png']*2000)
    assert len({n.casefold() for n in names}) == 10000 and time.time() - t < 5
    assert all(n and n[0] != '.' and '\n' not in n for n in names)

def test_samples_are_what_their_factors_say():
    paths, truth = samples()
    assert len(paths) == 12 and (truth.extras[:6] == 0).all() and (truth.extras[6:] > 0).any(1).all()
    for p, img in zip(paths, render(truth.u, 256, truth.extras)):
        assert (to_tensor(read_image(p)) - img).abs().mean() < .01, p
