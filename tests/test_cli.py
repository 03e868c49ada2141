"The command as a user meets it: real processes, real files, an untrained bundle."
import argparse, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from safetensors.torch import load_file
from PIL import Image
from cycle_nb.files import read_image, read_json, to_tensor
from cycle_nb.inversion import Inversion, invert
from cycle_nb.bundle import load_bundle
from cycle_nb import bundle as bundles, checkpoints, core, export_web, files, folder_inversion, generator_quality, heldout, models, price, recipes, report, speed, statistics
from cycle_nb.benchmark_commands import settle_options
from cycle_nb.cli import main, parser
from cycle_nb.images import samples
from cycle_nb.results import unique_names
from cycle_nb.sdfaces import render
from cycle_nb.stylegan2 import Generator
from cycle_nb.checkpoints import load_generator
from cycle_nb.models import save_model
from tiny import ENV, FAST, bundle, cli, command, faces

STEPS = ['w', 'cycle', 'refine', 'tune']

def results(out): return sorted(p.parent.name for p in out.glob('[!.]*/inversion.json'))

def test_help_everywhere(capsys):
    r = cli('--help')
    assert r.returncode == 0 and all(w in r.stdout for w in ('demo', 'invert', 'train')) and not r.stderr
    for words in (['demo'], ['invert'], ['train'], ['train', 'generator'], ['train', 'nets'], ['train', 'encoder'], ['train', 'directions'],
                  ['benchmark', 'quality'], ['benchmark', 'price'], ['benchmark', 'generator']):
        with pytest.raises(SystemExit) as e: main([*words, '--help'])
        text = capsys.readouterr().out
        assert e.value.code == 0 and '--seed' in text or words == ['train'], (words, text)

# --- an option is used, or refused ----------------------------------------------------------

@pytest.mark.parametrize('line, words', [
    ('invert f.png --out o --tune 0 --preset pti', ['--preset', '--tune 0', 'leave out']),
    ('demo --tune 0 --preset fast', ['--preset', '--tune 0', 'leave out']),               # also what it would be anyway
    ('export-web --out o --tune 0 --threshold .1', ['--threshold', '--tune 0', 'leave out']),
    ('invert f.png --out o --refine 0 --tune 0 --low-memory', ['--low-memory', '--refine 0', '--tune 0', 'leave out']),
    ('invert f.png --out o --encoder opt-w', ['opt-w', '--refine 0']),
    ('train generator --out o --resolution 64', ['--resolution', 'add --images']),
    ('train generator --out o --total 9', ['--total', 'add --images']),
    ('train generator --out o --images . --preset sdfaces64', ['--preset', '--images', '--total', 'leave out']),
    ('train generator --out o --images . --from g.pt --resolution 64', ['--resolution', '--from', 'leave out']),
    ('benchmark quality --out q.json --tune 3', ['--tune', '--methods', 'opt-w+tune']),
    ('benchmark quality --out q.json --methods w,w+refine --preset pti', ['--preset', '--methods', 'opt-w+tune']),
    ('benchmark quality --out q.json --methods w+tune --refine 3', ['--refine', '--methods', 'ENCODER+refine']),
    ('benchmark quality --out q.json --methods w+tune --tune 0 --threshold 1', ['--threshold', '--tune 0']),
    ('benchmark quality --out q.json --images . --outside 3', ['--outside', '--images FOLDER', 'leave out']),
    ('benchmark price --out p.json --tune 0 --preset pti', ['--preset', '--tune 0']),
    ('benchmark demo --out d.json --device cpu', ['--device cpu']), ('benchmark render --out r.json --seed 1', ['--seed 1']),
    ('benchmark speed --out s.json --seed 1', ['--seed 1']), ('benchmark full --out f.json --seed 1', ['--seed 1'])])
def test_an_option_that_does_not_apply_is_refused(tmp_path, monkeypatch, capsys, line, words):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.count('\n') == 1 and all(w in err for w in words) and not out and not list(tmp_path.iterdir()), err

def test_an_option_that_applies_is_not_refused():
    for line, want in {'invert f --out o --refine 0 --low-memory': dict(low_memory=True, preset='fast'),
                       'invert f --out o --tune 0 --low-memory': dict(low_memory=True, refine=15, threshold=None),
                       'demo --encoder opt-w --refine 0 --preset pti': dict(preset='pti', tune=100, low_memory=False),
                       'benchmark quality --out q --methods w+latent --refine 3': dict(refine=3, tune=350),
                       'benchmark quality --out q --refine 3 --outside 2': dict(refine=3, outside=2, images=64),
                       'train generator --out o --images . --from g --total 9': dict(total=9, resolution=64, preset='sdfaces64')}.items():
        a = vars(settle_options(parser().parse_args(line.split())))
        assert {k: a[k] for k in want} == want, line

def commands(p, words=()):
    "Every command with its parser."
    subs = [a for a in p._actions if isinstance(a, argparse._SubParsersAction)]
    if not subs: yield words, p
    for name, q in (subs[0].choices.items() if subs else ()): yield from commands(q, (*words, name))

LINES = {'demo': [''], 'invert': ['f.png --out o'], 'export-web': ['--out o'], 'convert': ['a.pt b.pt'], 'train generator': ['--out o', '--out o --images .'],
         'benchmark quality': ['--out o', '--out o --methods w+refine+tune'], 'benchmark seeds': ['--out o a b']}       # what each command is tried with; others: --out o

@pytest.fixture
def calls(monkeypatch):
    "All that the commands ask of the library; nothing is computed."
    seen, b = [], SimpleNamespace(device=torch.device('cpu'), generator=None, encoders=['cycle', 'other'], default_encoder='cycle', directions={}, drawn=True)
    def watch(module, **answers):
        for name, answer in answers.items():
            def called(*args, name=name, answer=answer, **kw):
                seen.append((name, args, kw))
                return answer
            monkeypatch.setattr(module, name, called)
    watch(bundles, load_bundle=b); watch(core, seed_all=None); watch(files, write_json=None, file_hash='')
    monkeypatch.setattr(core, 'pick_device', lambda name: torch.device('cpu')); monkeypatch.setattr(models, 'make_card', lambda *a, **kw: {})     # a fact in a record is no use
    watch(folder_inversion, invert_files=dict(new=0, failures=[], stopped=False)); watch(checkpoints, convert='')
    watch(recipes, make_nets=None, make_generator=None, make_generator_of_images=None, make_encoders=None, make_directions=None)
    watch(heldout, read_faces={}); watch(statistics, claims_over_seeds=[])
    watch(report, check_new=Path('o/index.html'), quality_record=({}, [], {}), quality_text='', write_quality=None); watch(price, price_record=(dict(sets={}), []))
    watch(generator_quality, measure_generator={}, missed_changes={}); watch(export_web, export_images=None, fetch_runtime=None, measure_web={})
    watch(speed, measure_training={}, measure_speed=dict(race={}), measure_in_process={}, measure_demo=dict(cores=1), measure_render=dict(cores=1))
    return seen

def test_every_option_of_every_command_is_used_or_refused(tmp_path, monkeypatch, capsys, calls):
    "With any option the library is asked for something else, or a line names the option; and no option is always refused."
    monkeypatch.chdir(tmp_path)
    def go(words):
        calls.clear()
        code = main([*map(str, words)])
        return code, list(calls), capsys.readouterr().err
    tried = 0
    for words, p in commands(parser()):
        lines = [[*words, *more.split()] for more in LINES.get(' '.join(words), ['--out o'])]
        usual = [go(line) for line in lines]
        assert all(code == 0 and asked and not err for code, asked, err in usual), (words, usual)
        for option in (o for o in p._actions if o.option_strings and o.dest != 'help'):
            name, value = option.option_strings[-1], {'--edit': 'smile=3', '--threshold': '.3'}.get(option.option_strings[-1], '70' if callable(option.type) else 'other')
            more = [name] if option.nargs == 0 else [name, option.choices[-1] if option.choices else value]
            found = [go([*line, *more]) for line in lines]
            used = [code == 0 and asked != before for (code, asked, _), (_, before, _) in zip(found, usual)]
            refused = [code == 2 and not asked and f'{name} does not apply' in err for code, asked, err in found]
            assert all(u or r for u, r in zip(used, refused)) and any(used), (words, more, found)
            tried += 1
    assert tried > 100

def test_a_clock_leaves_a_record(tmp_path):
    "Its facts and the machine's in one; a record that is there stays."
    line = ['benchmark', 'render', '--images', '4', '--out', str(tmp_path/'r.json')]
    assert main(line) == 0
    record = read_json(tmp_path/'r.json')
    assert record['kind'] == 'benchmark render' and record['images'] == 4 and record['cores'] >= 1 and len(record['repeats']) == 5
    assert main(line) == 2 and read_json(tmp_path/'r.json') == record

# --- what the commands leave ----------------------------------------------------------------

def test_the_whole_set_trains_from_nothing(tmp_path, monkeypatch):
    "Every part in order, a minute of it; a second call goes on or says that it must be asked to."
    monkeypatch.chdir(tmp_path)
    for part in ('nets', 'generator', 'encoder', 'directions'):
        assert main(['train', part, '--preset', 'tiny', '--out', 'all']) == 0, part
    files = sorted(tmp_path.glob('all/*.safetensors'))
    assert [f.stem for f in files] == sorted(['perceptual', 'identity', 'attributes', 'generator', 'w', 'wplus', 'cycle', 'w_long', 'directions', 'directions_pca', 'directions_closed', 'directions_stylespace'])
    for f in files:
        assert all(t.isfinite().all() for t in load_file(f).values()), f.name
        assert {'command', 'seed', 'steps', 'data', 'commit', 'figures'} - {'figures'} <= set(read_json(f.with_suffix('.json'))), f.name
    soft, finished = (load_file(tmp_path/'all'/f) for f in ('work/generator/regression.safetensors', 'generator.safetensors'))
    assert soft.keys() == finished.keys() and any(not torch.equal(soft[k], finished[k]) for k in soft)       # as it was before the discriminator
    before = files[0].stat().st_mtime_ns
    assert main(['train', 'nets', '--preset', 'tiny', '--out', 'all']) == 2 and files[0].stat().st_mtime_ns == before
    out = invert(render(torch.zeros(1, 24)), 'all', refine=1, tune=2)
    assert out.img.isfinite().all() and out.img.shape == (1, 3, 64, 64)

def test_convert_there_and_back(tmp_path, capsys):
    torch.manual_seed(0)
    G = Generator(8, z_dim=512, w_dim=512, num_mapping=2, channel_base=2**15, channel_max=512)        # the widths that the public class has
    save_model(G, tmp_path/'mine.safetensors', half=False)
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
    assert main(['convert', 'sdfaces64', str(tmp_path/'no.pt')]) == 2 and 'z of 32 numbers' in capsys.readouterr().err
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
    assert record['images'] == 5 and not record['failures'] and not record['stopped'] and len((out/'metrics.jsonl').read_text().splitlines()) == 20

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

def test_low_memory_is_the_same_inversion(bundle, faces, tmp_path):
    args = ['--bundle', bundle, '--refine', '2', '--tune', '3']
    for name, more in dict(a=[], b=['--low-memory']).items():
        assert main(['invert', str(faces[0]), '--out', str(tmp_path/name), *map(str, args), *more]) == 0
    a, b = (Inversion.load(tmp_path/k) for k in 'ab')
    assert torch.allclose(a.wp, b.wp, atol=.02) and (a.img - b.img).abs().mean() < .01

def test_full_memory_is_one_line(bundle, faces, tmp_path, monkeypatch, capsys):
    "No graphics card here to fill: the error itself is thrown."
    def full(*_, **__): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 18.00 GiB.')
    monkeypatch.setattr('cycle_nb.folder_inversion.invert_batch', full)
    assert main(['invert', str(faces[0]), '--out', str(tmp_path/'out'), '--bundle', str(bundle)]) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and '--low-memory' in err and '--batch' in err and not (tmp_path/'out').exists()

def test_demo(bundle, faces, tmp_path):
    r = cli('demo', '--out', tmp_path/'demo', '--bundle', bundle, *FAST)
    assert r.returncode == 0, r.stderr
    rows = [line.split() for line in r.stdout.splitlines()]
    assert sum('tune' in row for row in rows) >= 13        # 12 images and the mean
    assert 'mean' in r.stdout and 'sheet.png' in r.stdout
    assert Image.open(tmp_path/'demo'/'sheet.png').width > 1200
    assert list(read_json(tmp_path/'demo'/'record.json')['means']) == STEPS
    quick = ['--out', str(tmp_path/'demo'), '--bundle', str(bundle), '--refine', '0', '--tune', '0']
    assert main(['demo', str(faces[0]), *quick, '--overwrite']) == 0       # once more, in place of the first, with a file
    assert len(Inversion.load(tmp_path/'demo')) == 13 and not list((tmp_path/'demo').glob('.*'))

def test_demo_replaces_nothing_unasked(bundle, tmp_path, monkeypatch, capsys):
    "Neither results nor a sheet; `make demo` asks, also where an earlier run was killed."
    monkeypatch.chdir(tmp_path)
    quick = ['--bundle', str(bundle), '--refine', '0', '--tune', '0']
    def refused(name):
        before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        assert main(['demo', *quick]) == 2
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and name in err and '--overwrite' in err
        assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    (tmp_path/'out'/'demo').mkdir(parents=True)
    (tmp_path/'out'/'demo'/'sheet.png').write_bytes(b'mine')
    refused('sheet.png')
    asked = subprocess.run(['make', '-n', 'demo'], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout
    words = next(line for line in asked.splitlines() if 'cycle-nb ' in line).split('cycle-nb ')[1].split()   # a make within `make test` says more
    assert main([*words, *quick]) == 0 and Image.open('out/demo/sheet.png').width > 500
    refused('sheet.png')
    for name in ('sheet.png', 'record.json', 'metrics.jsonl'): (tmp_path/'out'/'demo'/name).unlink()
    first = results(tmp_path/'out'/'demo')
    shutil.rmtree(tmp_path/'out'/'demo'/first.pop())
    refused(first[0])
    capsys.readouterr()
    assert main([*words, *quick]) == 0 and len(results(tmp_path/'out'/'demo')) == 12 and Image.open('out/demo/sheet.png').width > 500

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
    assert all(p.name in done or p.name in ('record.json', 'metrics.jsonl') or p.name.startswith('.') for p in out.iterdir())
    if how == signal.SIGKILL: assert p.returncode == -9
    else: assert p.returncode == 130 and 'Traceback' not in err and '--resume' in err and not list(out.glob('.*'))
    if how != signal.SIGINT: return
    r = cli('invert', *faces, '--out', out, '--bundle', bundle, '--resume', '--tune', '0', '--refine', '0')
    assert r.returncode == 0 and len(results(out)) == len(faces), r.stderr

def test_leftovers_of_a_kill_are_swept(bundle, faces, tmp_path):
    out = tmp_path/'out'
    out.mkdir()
    dies = 'import os, sys; from pathlib import Path; from cycle_nb.results import atomic_folders\nwith atomic_folders(Path(sys.argv[1]), ["f0"]): os._exit(0)'
    subprocess.run([sys.executable, '-c', dies, out], env=ENV, check=True)
    assert list(out.glob('.*'))
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
