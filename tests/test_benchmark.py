"The benchmark as its readers meet it: killed, resumed, asked for nonsense; its verdicts against a second computation."
import shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from cycle_nb.benchmark import (CHANGES, CLAIMS, PIVOTS, REFINES, axis, contact_sheets, differences, faces_of, frechet_distances, inverted, judge, measure_alone,
                                measure_quality, not_editing, parse_method, quality_summary, quality_table, read_faces, seen_in_truth, verdicts,
                                version_of)
from cycle_nb.core import InputError, generator, make_card, read_json, to_pil, to_tensor
from cycle_nb.encoder import Encoder
from cycle_nb.invert import load_bundle, own_bundle
from cycle_nb.losses import PackagePerceptual, Perceptual, save_net
from cycle_nb.sdfaces import render, sample_factors, with_factor, FACTORS
from cycle_nb.stylegan2 import Generator
from cycle_nb.weights import save_model
from cycle_nb.metrics import linear_probe
from tiny import BODY, ENV, bundle, cli, command, write_bundle

ARGS = ['benchmark', 'quality', '--images', '6', '--outside', '2', '--methods', 'w,cycle+refine,wplus+tune', '--tune', '2']

def test_a_killed_benchmark_goes_on_and_ends_the_same(tmp_path):
    bundle = write_bundle(tmp_path/'small', ('age', 'yaw'))
    args = [*ARGS, '--bundle', bundle]
    whole, cut = tmp_path/'whole.json', tmp_path/'cut.json'
    r = cli(*args, '--work', tmp_path/'a', '--out', whole)
    assert r.returncode == 0, r.stderr
    assert '| cycle+refine |' in r.stdout and 'outside the domain' in r.stdout
    p = subprocess.Popen(command(*args, '--work', tmp_path/'b', '--out', cut), env=ENV, stdout=subprocess.DEVNULL)
    end = time.time() + 120
    while time.time() < end and p.poll() is None and not list((tmp_path/'b').rglob('0*.json')): time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    parts = {f: f.stat().st_mtime_ns for f in (tmp_path/'b').rglob('0*.json')}
    assert parts and not cut.exists()
    assert cli(*args, '--work', tmp_path/'b', '--out', cut).returncode == 0
    assert all(f.stat().st_mtime_ns == t for f, t in parts.items())        # what was measured is kept
    a, b = read_json(whole), read_json(cut)
    assert a['sets'] == b['sets'] and a['verdicts'] == b['verdicts']       # to the last digit
    assert set(a['sets']) == {'in', 'out'} and set(a['sets']['in']) == {'w', 'cycle+refine', 'wplus+tune', 'not editing'}

def state(pid):
    "Of a process, as /proc says it: its letter (Z: dead, not yet buried) and its parent's number; of none a Z."
    try: return (Path('/proc')/str(pid)/'stat').read_text().rsplit(')', 1)[1].split()[:2]
    except OSError: return 'Z', '0'

def children(pid): return [p.name for p in Path('/proc').glob('[0-9]*') if state(p.name)[1] == str(pid)]

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
def test_workers_make_the_same_figures(tmp_path):
    "Shared by two processes and done by one: the same rows. A helper whose parent is killed ends too, and its parts are used."
    bundle = write_bundle(tmp_path/'small', ('age',))
    one = dict(images=5, outside=3, methods=['w', 'cycle'], batch=1, tune=2, seed=0, say=lambda line: None)
    alone = measure_quality(bundle, work=tmp_path/'a', **one)
    assert measure_quality(bundle, work=tmp_path/'b', workers=2, **one) == alone and len(alone) == 16
    n = torch.get_num_threads()
    torch.set_num_threads(3)
    try: assert measure_quality(bundle, work=tmp_path/'d', **one) == alone and torch.get_num_threads() == 3     # nor do cores count
    finally: torch.set_num_threads(n)
    script = f'from cycle_nb.benchmark import measure_quality\nif __name__ == "__main__": measure_quality({str(bundle)!r}, 40, methods=["cycle", "w"], batch=1, work={str(tmp_path/"c")!r}, workers=2)'
    (tmp_path/'run.py').write_text(script)
    p = subprocess.Popen([sys.executable, tmp_path/'run.py'], env=ENV, stdout=subprocess.PIPE, text=True)
    for line in p.stdout:
        if 'of 40' in line: break
    helpers = children(p.pid)
    assert len(helpers) >= 2
    p.kill(); p.wait(); end = time.time() + 120
    while time.time() < end and any(state(h)[0] != 'Z' for h in helpers): time.sleep(.1)
    made = len(list((tmp_path/'c').rglob('0*.json')))
    assert 0 < made < 80

def test_what_is_known_is_not_measured_again(tmp_path):
    "A record's table of faces gives its figures back to the last digit; a new method beside them is compared with them."
    bundle, args = write_bundle(tmp_path/'small', ('age',)), ['benchmark', 'quality', '--images', '4', '--outside', '2', '--tune', '2']
    def record(name, *more):
        r = cli(*args, *more, '--bundle', bundle, '--work', tmp_path/f'work-{name}', '--out', tmp_path/f'{name}.json')
        assert r.returncode == 0, r.stderr
        return r.stdout, read_json(tmp_path/f'{name}.json')
    table = tmp_path/'first_faces.csv.gz'
    out, first = record('first', '--methods', 'w,w+tune,cycle')
    out, more = record('more', '--methods', 'w,wplus,w+tune', '--known', table)
    assert 'in wplus: 4 of 4' in out and 'in w:' not in out and 'w+tune: ' not in out
    for kind in ('in', 'out'):
        assert set(more['sets'][kind]) == {'w', 'wplus', 'w+tune', 'not editing'}
        for m in ('w', 'w+tune', 'not editing'):
            faces = {k: v for k, v in first['sets'][kind][m].items() if 'frechet' not in k}   # those belong to a set, not to a face
            assert more['sets'][kind][m] == faces and 'edit' in faces
        assert 'frechet' in more['sets'][kind]['wplus']
    alone = record('alone', '--methods', 'w,wplus')[1]
    assert alone['differences']['out']['wplus − w'] == more['differences']['out']['wplus − w']
    assert 'in w: 4 of 4' in record('other-seed', '--methods', 'w', '--seed', '1', '--known', table)[0]       # other settings: not the same figures
    (tmp_path/'bad_faces.csv.gz').write_bytes(table.read_bytes()[:200])
    for bad in (tmp_path/'bad_faces.csv.gz', tmp_path/'first.json', tmp_path/'none.csv.gz'):
        r = cli(*args, '--methods', 'w', '--bundle', bundle, '--known', bad, '--work', tmp_path/'work-bad', '--out', tmp_path/'bad.json')
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and bad.name in r.stderr, r.stderr
    assert not (tmp_path/'bad.json').exists()

def test_few_faces_are_the_first_of_many(tmp_path):
    "So the quick set is the beginning of the full one, and measuring more faces goes on from it."
    for kind in ('in', 'out'):
        (few, a), (many, b) = faces_of(kind, 3, 32), faces_of(kind, 7, 32)
        assert torch.equal(a.u, b.u[:3]) and torch.allclose(few, many[:3], atol=1e-6)
        assert kind == 'in' or torch.equal(a.extras, b.extras[:3]) and (b.extras > 0).any(1).all()
    bundle, said = write_bundle(tmp_path/'small', ('age',)), []
    kw = dict(methods=['w'], batch=2, work=tmp_path/'work', tune=2, seed=0, say=said.append)
    few = measure_quality(bundle, 3, 2, **kw)
    many = measure_quality(bundle, 6, 2, **kw)
    of = lambda rows, kind, n: [r for r in rows if r['set'] == kind and r['image'] < n]
    assert of(few, 'in', 2) == of(many, 'in', 2) and of(few, 'out', 2) == of(many, 'out', 2) and len(many) == 8
    assert len(said) == 3 + 2                                              # the part of one face, and the last two of six
    alone = measure_quality(bundle, 6, 2, **kw | dict(work=tmp_path/'other'))
    assert alone == many                                                   # to the last digit, begun with few or not

def test_judges_read_in_full_precision(bundle, monkeypatch):
    "Also where bfloat16 would be faster: what a referee sees must not depend on the processor."
    img, truth = faces_of('in', 3, 64)
    b = load_bundle(bundle, 'cpu')
    G, wp = b.generator, b.encoder('w')(img).detach()
    go = lambda: judge(img, truth, wp, lambda c: G.synthesis(c), b.nets, {k: b.directions[k] for k in list(b.directions)[:1]})
    plain = go()
    monkeypatch.setattr('cycle_nb.core.has_bf16', lambda device: True)
    assert b.perceptual(img, G.synthesis(wp)).dtype == torch.float32 and go() == plain

def test_nonsense_is_one_line(bundle, tmp_path):
    for words in (['--methods', 'cycel'], ['--images', '-3'], ['--methods', 'opt-w+refine'], ['--images', '1'], ['--methods', 'w,w+tune+refine'], ['--referee', 'nobody']):
        r = cli('benchmark', 'quality', *words, '--bundle', bundle, '--out', tmp_path/'r.json')
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr, r.stderr
    assert not (tmp_path/'r.json').exists()

def test_every_part_of_full_size_is_timed():
    "Each case in its own process; a part that is not walked is not in the figures."
    found = measure_alone(dict(road='road_cost(32, True, 1, 0', training='training_cost(32, 1, 1'), 'cpu')
    assert set(found['road']) == {'cycle', 'refine', 'steps', 'peak_memory_mb'} and set(found['training']) == {'w', 'wplus', 'peak_memory_mb'}
    assert all(found['road'][k] > 0 for k in ('cycle', 'refine', 'peak_memory_mb')) and min(found['training'].values()) > 0

def test_methods_are_read_back():
    for name in PIVOTS:
        assert parse_method(name) == (name, None, False) and parse_method(f'{name}+tune') == (name, None, True)
    for way in REFINES:
        assert parse_method(f'w+{way}') == ('w', way, False) and parse_method(f'cycle-all+{way}+tune') == ('cycle-all', way, True)
    for text in ('', 'w+', '+tune', 'w+tune+tune', 'w+Tune', 'w tune', 'w+code+refine', 'opt-w+code', 'w+tune+refine'):
        with pytest.raises(InputError): parse_method(text)
    for a, b, _ in CLAIMS: parse_method(a), parse_method(b)

def rows(method, kind='in', shift=0., seed=0, n=40):
    v = torch.rand(n, 6, generator=generator(seed)) + shift
    keys = 'perceptual', 'mse', 'yaw/error', 'age/error', 'yaw/still', 'age/still'
    rest = dict.fromkeys(['ms_ssim', 'identity', 'spread', 'yaw/leak', 'yaw/hit', 'age/leak', 'age/hit'], 0.)
    return [dict(zip(keys, r), set=kind, image=i, method=method) | rest for i, r in enumerate(v.tolist())]

def test_the_edit_axis_is_the_mean_over_words():
    r = rows('w')
    assert torch.allclose(axis(r, 'edit'), torch.tensor([(x['yaw/error'] + x['age/error'])/2 for x in r]))
    assert torch.allclose(axis(r, 'cost'), axis(r, 'edit') - torch.tensor([x['mse'] for x in r]))
    s = quality_summary(r + rows('w', 'out', 1.))
    assert abs(s['out']['w']['mse']['mean'] - s['in']['w']['mse']['mean'] - 1) < 1e-4

def test_not_editing_by_hand():
    img, truth = faces_of('out', 3, 32)
    far = []
    for k, change in CHANGES.items():
        v = truth.u[:, FACTORS.index(k)]
        then = render(with_factor(truth.u, k, torch.where(v <= 0, v + change, v - change)), 32, truth.extras)
        far.append(((then - img)**2).mean())
    row = not_editing(truth, 32)['edit']
    assert row['mean'] == pytest.approx(float(sum(far)/len(far)), rel=1e-4) and row['low'] < row['mean'] < row['high']

def test_verdicts_are_paired():
    "A shift far below the spread of faces is seen when the faces are the same ones, and not when they are others."
    claim = [('cycle', 'w_long', 'perceptual')]
    same = verdicts(rows('cycle') + rows('w_long', shift=.01), claim)
    other = verdicts(rows('cycle') + rows('w_long', shift=.01, seed=2), claim)
    assert same[0]['verdict'] == 'holds' and abs(same[0]['mean'] + .01) < 1e-5 and other[0]['verdict'] == 'open'
    assert verdicts(rows('cycle', shift=.01) + rows('w_long'), claim)[0]['verdict'] == 'fails'

def test_differences_are_taken_face_by_face_from_the_first_method():
    found = differences(rows('cycle') + rows('w', shift=.25) + rows('w+tune', shift=-.5) + rows('cycle+tune', shift=-.75), 'cycle')['in']
    assert list(found) == ['w − cycle', 'w+tune − cycle+tune']
    for k in ('mse', 'perceptual', 'edit'):
        for name in ('w − cycle', 'w+tune − cycle+tune'):
            v = found[name][k]
            assert v['mean'] == pytest.approx(.25, abs=1e-4) and v['high'] - v['low'] < 1e-4

def test_linear_probe_is_least_squares_on_unseen_rows():
    g = generator(0)
    w = torch.randn(300, 5, generator=g)
    y = w @ torch.randn(5, 2, generator=g) + .1*torch.randn(300, 2, generator=g) + 3
    pred, true = linear_probe(w, y, ridge=1e-9)
    A = torch.cat([w, torch.ones(300, 1)], 1).double()
    want = A[240:] @ torch.linalg.lstsq(A[:240], y[:240].double()).solution
    assert torch.equal(true, y[240:]) and torch.allclose(pred.double(), want, atol=1e-4)

@pytest.fixture
def pictures(tmp_path):
    "A folder of five pictures of three formats and sizes."
    folder = tmp_path/'mine'; folder.mkdir()
    for i, x in enumerate(render(sample_factors(5, generator(3)), 48)):
        to_pil(x).resize((48 + 7*i, 48)).save(folder/f'{i}.{("png", "jpg", "bmp")[i % 3]}')
    return folder

def test_a_folder_of_pictures_is_measured_without_truth(bundle, pictures, tmp_path):
    args = ['benchmark', 'quality', '--images', pictures, '--methods', 'w,cycle+tune', '--tune', '2', '--bundle', bundle,
            '--work', tmp_path/'work', '--out']
    r = cli(*args, tmp_path/'a.json')
    assert r.returncode == 0 and 'your own pictures' in r.stdout, r.stderr
    a = read_json(tmp_path/'a.json')
    assert set(a['sets']) == {'own'} and a['images'] == str(pictures)
    m = a['sets']['own']['w']
    assert {'mse', 'perceptual', 'identity', 'kept', 'lec', 'spread'} <= m.keys() and not {'edit', 'still', 'hit'} & m.keys()
    assert len(list((tmp_path/'work').rglob('0*.json'))) == 2
    (pictures/'0.png').unlink()                                            # other pictures: measured anew
    assert cli(*args, tmp_path/'b.json').returncode == 0
    assert read_json(tmp_path/'b.json')['sets']['own']['w']['mse'] != m['mse'] and len(list((tmp_path/'work').rglob('0*.json'))) == 4
    r = cli('benchmark', 'road', '--images', pictures, '--bundle', bundle)
    assert r.returncode == 2 and 'give a number' in r.stderr and r.stderr.count('\n') == 1

def test_networks_of_your_own_are_measured(pictures, tmp_path):
    "No identity network, no regressor, no folder; other weights are other parts."
    def own(seed):
        torch.manual_seed(seed)
        G = Generator(32, z_dim=8, w_dim=16, num_mapping=1, channel_base=256, channel_max=16)
        return own_bundle(G, Encoder(32, G.num_ws, 16), Perceptual(res=32, widths=(4, 4, 4, 4, 4)), directions={'up': torch.ones(16)})
    a, b = own(0), own(1)
    assert version_of(a, 'cycle') == version_of(own(0), 'cycle') != version_of(b, 'cycle')
    go = lambda b: measure_quality(b, pictures, methods=['cycle', 'cycle-all'], work=tmp_path/'w', batch=2, say=lambda line: None)
    x, y = go(a), go(b)
    assert len(x) == 10 and 'identity' not in x[0] and 'up/lec' in x[0] and 'up/kept' not in x[0]
    assert x[0]['mse'] != y[0]['mse'] and go(a) == x
    assert '| cycle-all |' in quality_table(quality_summary(x))

def test_kept_and_the_way_back_by_hand(bundle):
    b = load_bundle(bundle)
    img, truth = faces_of('in', 3, b.generator.resolution)
    wp, draw = inverted(img, b, 'w')
    enc = lambda x: b.encoder('w')(x)
    r = judge(img, truth, wp, draw, b.nets, b.directions, encode=enc)
    for k, d in b.directions.items():
        with torch.no_grad():
            s = torch.tensor([x[f'{k}/strength'] for x in r])
            moved = draw(wp + s.view(-1, 1, 1)*d).clamp(-1, 1)
            kept = (b.identity.embed(moved)*b.identity.embed(draw(wp).clamp(-1, 1))).sum(1)
            home = enc(draw(wp + d)) - d
        assert torch.allclose(kept, torch.tensor([x[f'{k}/kept'] for x in r]), atol=2e-2)
        assert torch.allclose((home - wp).norm(dim=2).mean(1), torch.tensor([x[f'{k}/lec'] for x in r]), atol=2e-2)
    assert all('yaw/kept' in x for x in judge(img, None, wp, draw, b.nets, b.directions))

def test_frechet_distances_are_zero_for_the_truth_and_grow_with_a_shift(bundle):
    b, k = load_bundle(bundle), FACTORS.index('age')
    _, truth = faces_of('in', 60, b.generator.resolution)
    v = truth.u[:, k]
    with torch.no_grad(): true = b.attributes(render(with_factor(truth.u, 'age', torch.where(v <= 0, v + 1, v - 1)), b.generator.resolution))
    known = seen_in_truth(truth, b.attributes, b.generator.resolution)
    far = lambda shift: frechet_distances([{'age/seen': (x + shift).tolist()} for x in true], known)['edit_frechet']['mean']
    assert far(0) < 1e-3 and far(.1) == pytest.approx(true.shape[1]*.01, rel=.05) and far(.2) > far(.1)
    with torch.no_grad(): now = b.attributes(render(truth.u, b.generator.resolution))
    found = frechet_distances([dict(seen=x.tolist()) for x in now], known)
    assert set(found) == {'frechet'} and found['frechet']['mean'] < 1e-3       # of edits nobody says anything
    assert frechet_distances([dict(seen=now[0].tolist()), {}], known) == {}

def test_a_referee_measures_and_the_bundle_inverts(bundle, tmp_path):
    "A folder with nothing but three feature networks: other distances, the same codes; parts are not mixed up."
    apart = write_bundle(tmp_path/'full')
    (tmp_path/'referee').mkdir()
    torch.manual_seed(5)
    for name in ('perceptual', 'identity', 'attributes'):
        for end in ('safetensors', 'json'): shutil.copy(apart/f'{name}.{end}', tmp_path/'referee')
    save_net(Perceptual(**BODY), tmp_path/'referee'/'perceptual.safetensors', make_card('perceptual', seed=5))
    args = ['benchmark', 'quality', '--images', '2', '--methods', 'w', '--bundle', bundle, '--work', tmp_path/'w', '--out']
    own, other = tmp_path/'own.json', tmp_path/'other.json'
    assert cli(*args, own).returncode == 0
    r = cli(*args, other, '--referee', tmp_path/'referee')
    assert r.returncode == 0, r.stderr
    a, b = (read_json(f)['sets']['in']['w'] for f in (own, other))
    assert a['mse'] == b['mse'] and a['spread'] == b['spread'] and a['perceptual'] != b['perceptual']
    assert b['frechet']['mean'] >= 0 and b['edit_frechet']['mean'] >= 0 and b['psnr']['low'] < b['psnr']['high']

def test_tuning_begins_at_the_kept_pivot(bundle, tmp_path):
    "What refinement found is not sought again, and a method measured behind another one gets the figures it gets alone."
    go = lambda work, *methods: measure_quality(bundle, 2, methods=methods, work=tmp_path/work, tune=2, seed=3, say=lambda line: None)
    go('a', 'cycle+refine')
    (file,) = (tmp_path/'a').rglob('*.safetensors')
    at = file.stat().st_mtime_ns
    behind = go('a', 'cycle+refine', 'cycle+refine+tune')[2:]
    assert behind == go('b', 'cycle+refine+tune') and file.stat().st_mtime_ns == at
    assert [f.name for f in (tmp_path/'a').rglob('*.safetensors')] == ['00000-00002.safetensors']
    go('a', 'cycle', 'w')                                          # other codes, other places
    assert len(list((tmp_path/'a').rglob('*.safetensors'))) == 3

def test_pictures_beside_the_record(bundle, tmp_path):
    "Every cell of the sheet is the picture it says: targets, reconstructions, and each face under its own word."
    args = ['benchmark', 'quality', '--images', '3', '--outside', '2', '--methods', 'w,cycle', '--bundle', bundle, '--work', tmp_path/'w']
    r = cli(*args, '--out', tmp_path/'deep'/'q.json')
    assert r.returncode == 0, r.stderr
    names = {'q.json', 'q.md', 'q_faces.csv.gz', 'q_in.png', 'q_in_sheet.png', 'q_out.png', 'q_out_sheet.png'}
    assert {f.name for f in (tmp_path/'deep').iterdir()} == names
    text = (tmp_path/'deep'/'q.md').read_text()
    assert '| cycle |' in text and 'outside the domain' in text and '- in: mse' not in text      # w_long was not measured
    b = load_bundle(bundle)
    sheet = to_tensor(contact_sheets(b, 3, 0, ['w', 'cycle'], work=tmp_path/'w', tune=350, seed=0)['in'])
    img, truth = faces_of('in', 3, 64)
    wp, draw = inverted(img, b, 'cycle')
    row = judge(img, truth, wp, draw, b.nets, b.directions)
    words = [k for k in b.directions if f'{k}/error' in row[0]][:3]
    left, top = (size - 67*n + 3 for size, n in ((sheet.shape[2], 3 + len(words)), (sheet.shape[1], 3)))
    cell = lambda i, j: sheet[:, top + 67*i:top + 67*i + 64, left + 67*j:left + 67*j + 64]
    close = lambda a, b: (a - b.clamp(-1, 1)).abs().max() < .02
    with torch.no_grad(): drawn = draw(wp)
    for i, k in enumerate(words):
        u = with_factor(truth.u[i:i+1], k, truth.u[i:i+1, FACTORS.index(k)] + (CHANGES[k] if truth.u[i, FACTORS.index(k)] <= 0 else -CHANGES[k]))
        with torch.no_grad(): moved = draw(wp[i:i+1] + row[i][f'{k}/strength']*b.directions[k])
        assert close(cell(0, i), img[i]) and close(cell(2, i), drawn[i])
        assert close(cell(0, 3 + i), render(u, 64)[0]) and close(cell(2, 3 + i), moved[0])

def test_a_folder_with_only_generator_and_encoder(pictures, tmp_path):
    "What a folder lacks is left out; distance is then LPIPS, whose weights need a network, and that is said in one line."
    full, bare = write_bundle(tmp_path/'full'), tmp_path/'bare'
    bare.mkdir()
    for name in ('generator', 'cycle'):
        for end in ('safetensors', 'json'): shutil.copy(full/f'{name}.{end}', bare)
    b = load_bundle(bare)
    assert b.encoders == ['cycle'] and b.directions == {}
    with pytest.raises(InputError, match='no directions'): b.direction('age')
    args = ['benchmark', 'quality', '--images', pictures, '--methods', 'cycle', '--bundle', bare, '--work', tmp_path/'w', '--out']
    dead = dict(https_proxy='http://127.0.0.1:9', TORCH_HOME=str(tmp_path/'torch'))
    r = subprocess.run(command(*args, tmp_path/'a.json'), capture_output=True, text=True, env=ENV | dead)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'LPIPS needs the weights of alex' in r.stderr, r.stderr
    shutil.copy(full/'perceptual.safetensors', bare)
    r = cli('benchmark', 'quality', '--images', '3', '--methods', 'cycle', '--bundle', bare)
    assert r.returncode == 2 and '--images FOLDER' in r.stderr and r.stderr.count('\n') == 1, r.stderr
    b.nets = PackagePerceptual(pnet_rand=True), None, None         # such weights, without their download
    (row,) = measure_quality(b, pictures, methods=['cycle'], work=tmp_path/'w', batch=8, say=lambda line: None)[:1]
    assert set(row) == {'set', 'image', 'method', 'version', 'mse', 'psnr', 'perceptual', 'ms_ssim', 'spread'}
    assert contact_sheets(b, pictures, 0, ['cycle'], batch=8, work=tmp_path/'w')['own'].height > 2*64

def test_the_original_lpips_measures_too(bundle, tmp_path):
    "As its package says it, image by image; with such a column the part is another one. The body's weights are random: no download here."
    import lpips, torchvision
    (tmp_path/'hub'/'checkpoints').mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path/'hub'/'checkpoints'/'squeezenet1_1-b8a52dc0.pth')
    home = ENV | dict(TORCH_HOME=str(tmp_path))
    args = ['benchmark', 'quality', '--images', '2', '--methods', 'w', '--bundle', bundle, '--work', tmp_path/'w', '--out']
    for more in ([], ['--lpips', 'squeeze']):
        r = subprocess.run(command(*args, tmp_path/'q.json', *more), capture_output=True, text=True, env=home)
        assert r.returncode == 0, r.stderr
    assert '| lpips_squeeze |' in r.stdout and len(list((tmp_path/'w').rglob('0*.json'))) == 2
    b = load_bundle(bundle)
    img, _ = faces_of('in', 2, b.generator.resolution)
    net = lpips.LPIPS(net='squeeze', pnet_rand=True, verbose=False).eval()
    state = torch.load(tmp_path/'hub'/'checkpoints'/'squeezenet1_1-b8a52dc0.pth')
    features = torchvision.models.squeezenet1_1(); features.load_state_dict(state)
    pieces = [getattr(net.net, f'slice{i}') for i in range(1, 8)]
    for piece in pieces:
        for k, layer in piece._modules.items(): layer.load_state_dict(features.features[int(k)].state_dict())
    with torch.no_grad():
        wp, draw = inverted(img, b, 'w')
        far = net(draw(wp).clamp(-1, 1), img).mean()
    assert read_json(tmp_path/'q.json')['sets']['in']['w']['lpips_squeeze']['mean'] == pytest.approx(float(far), rel=1e-3)

def test_an_encoder_of_your_own_is_a_method(tmp_path):
    "A file in the bundle's folder with a card that says encoder; other files are no methods."
    folder = write_bundle(tmp_path/'mine', ('age',))
    b = load_bundle(folder)
    assert b.encoders == ['w', 'wplus', 'cycle']
    save_model(b.encoder('wplus'), folder/'twin.safetensors', make_card('encoder', seed=0))
    assert b.encoders == ['w', 'wplus', 'cycle', 'twin']
    rows = measure_quality(b, 2, methods=['wplus', 'twin', 'twin-all'], work=tmp_path/'w', say=lambda line: None)
    drop = lambda r: {k: v for k, v in r.items() if k not in ('method', 'version')}
    assert [drop(r) for r in rows[:2]] == [drop(r) for r in rows[2:4]] and rows[2]['method'] == 'twin'
    r = cli('benchmark', 'quality', '--bundle', folder, '--methods', 'perceptual')
    assert r.returncode == 2 and 'twin' in r.stderr and r.stderr.count('\n') == 1
    r = cli('invert', tmp_path/'nothing.png', '--bundle', folder, '--encoder', 'generator', '--out', tmp_path/'o')
    assert r.returncode == 2 and r.stderr.count('\n') == 1
