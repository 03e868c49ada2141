"Methods compared as their readers meet it: killed, resumed, asked for nonsense; claims against a second computation."
import ast, hashlib, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from cycle_nb.stylespace import measure_styles
from cycle_nb.generator_quality import measure_generator, render_batches
from cycle_nb.evaluate import EDIT_CHANGES, METHODS, evaluate_batch, evaluate_methods, invert_for, known_methods, used_settings
from cycle_nb.report import contact_sheets
from cycle_nb.cli import main
from cycle_nb.heldout import faces_and_truth, read_faces, save_faces
from cycle_nb.pipeline import OPTIMISED, REFINEMENTS, Method, parse_method
from cycle_nb.inversion import invert
from cycle_nb.statistics import CLAIMS, check_claims, claims_over_seeds, frechet_distances, metric_per_image, no_edit_baseline, paired_differences, quality_summary, quality_table, true_features
from cycle_nb.speed import measure_in_process, measure_training, pipeline_cost, training_cost
from cycle_nb.core import InputError, make_rng, single_threaded
from cycle_nb.models import load_tensors, make_card, save_model, save_tensors
from cycle_nb.files import read_json, to_pil, to_tensor
from cycle_nb.encoder import Encoder
from cycle_nb.bundle import Bundle, load_bundle
from cycle_nb.features import Perceptual
from cycle_nb.losses import LPIPS
from cycle_nb.sdfaces import render, sample_factors, with_factor
from cycle_nb.sdfaces_parts import FACTORS
from cycle_nb.stylegan2 import Generator
from cycle_nb.metrics import linear_probe, mse
from cycle_nb.price import by_step, price_of_leaving_w, price_record, price_table, price_text, walk_out
from cycle_nb.latents import spread
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
    json.loads(whole.read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))
    assert a['seedless'] == ['w'] and a['settings']['preset'] == 'fast'
    assert a['sets'] == b['sets'] and a['claims'] == b['claims']       # to the last digit
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
    one = dict(images=5, outside=3, methods=['w', 'cycle'], batch=1, tune=2, seed=0, log=lambda line: None)
    alone = evaluate_methods(bundle, work=tmp_path/'a', **one)
    assert evaluate_methods(bundle, work=tmp_path/'b', workers=2, **one) == alone and len(alone) == 16
    n = torch.get_num_threads()
    torch.set_num_threads(3)
    try: assert evaluate_methods(bundle, work=tmp_path/'d', **one) == alone and torch.get_num_threads() == 3     # nor do cores count
    finally: torch.set_num_threads(n)
    script = f'from cycle_nb.evaluate import evaluate_methods\nif __name__ == "__main__": evaluate_methods({str(bundle)!r}, 40, methods=["cycle", "w"], batch=1, work={str(tmp_path/"c")!r}, workers=2)'
    (tmp_path/'run.py').write_text(script)
    p = subprocess.Popen([sys.executable, tmp_path/'run.py'], env=ENV, stdout=subprocess.PIPE, text=True)
    end = time.time() + 300                         # until a part is there, and before the helper has done all of its own
    while time.time() < end and p.poll() is None and not (len(children(p.pid)) >= 2 and any((tmp_path/'c').rglob('0*.json'))): time.sleep(.02)
    helpers = children(p.pid)
    assert len(helpers) >= 2
    p.kill(); p.wait(); end = time.time() + 120
    while time.time() < end and any(state(h)[0] != 'Z' for h in helpers): time.sleep(.1)
    assert all(state(h)[0] == 'Z' for h in helpers), 'helpers outlive their parent'
    made = len(list((tmp_path/'c').rglob('0*.json')))
    assert 0 < made < 80

def test_what_is_known_is_not_measured_again(tmp_path):
    "A record's table of faces gives its figures back to the last digit; a new method beside them is compared with them."
    bundle, args = write_bundle(tmp_path/'small', ('age',)), ['benchmark', 'quality', '--images', '4', '--outside', '2']
    def record(name, *more):
        if '+tune' in more[1]: more = *more, '--tune', '2'
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
    out = record('other-seed', '--methods', 'w,w+tune', '--seed', '1', '--known', table)[0]
    assert 'in w+tune: 4 of 4' in out and 'in w:' not in out               # other settings: not the same figures; but w knows no seed
    (tmp_path/'bad_faces.csv.gz').write_bytes(table.read_bytes()[:200])
    for bad in (tmp_path/'bad_faces.csv.gz', tmp_path/'first.json', tmp_path/'none.csv.gz'):
        r = cli(*args, '--methods', 'w', '--bundle', bundle, '--known', bad, '--work', tmp_path/'work-bad', '--out', tmp_path/'refused.json')
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and bad.name in r.stderr, r.stderr
    assert not (tmp_path/'refused.json').exists()

def test_no_file_of_a_record_is_replaced_unasked(bundle, tmp_path):
    "Neither the record nor what lies beside it, and this is said before anything is measured."
    args = ['benchmark', 'quality', '--images', '2', '--methods', 'w', '--bundle', bundle, '--work', tmp_path/'w', '--out', tmp_path/'q.json']
    assert cli(*args).returncode == 0
    before = {f: f.read_bytes() for f in tmp_path.glob('q*')}
    for gone in ([], ['q.json'], ['q.json', 'q.md']):
        for name in gone: (tmp_path/name).unlink(missing_ok=True)
        r = cli(*args)
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'exists' in r.stderr and 'of 2 faces' not in r.stdout, r.stderr
    assert all(f.read_bytes() == before[f] for f in tmp_path.glob('q*')) and len(before) == 5
    assert cli(*args, '--overwrite').returncode == 0 and {f.name for f in tmp_path.glob('q*')} == {f.name for f in before}

def test_mistakes_in_a_helper_reach_the_user(tmp_path):
    "A damaged network that only the helpers read; one line, and nobody is left running."
    bundle = write_bundle(tmp_path/'small', ('age',))
    (bundle/'wplus.safetensors').write_bytes((bundle/'wplus.safetensors').read_bytes()[:5000])
    r = cli('benchmark', 'quality', '--images', '4', '--methods', 'w,wplus', '--workers', '2', '--bundle', bundle, '--work', tmp_path/'w', '--out', tmp_path/'q.json')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'wplus.safetensors' in r.stderr and not (tmp_path/'q.json').exists(), r.stderr

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
@pytest.mark.parametrize('at', ['start', 'middle'])
def test_ctrl_c_ends_all_processes_in_one_line(tmp_path, at):
    "A terminal sends it to every process at once: one line, exit code 130, no helper left; the finished parts are kept."
    bundle = write_bundle(tmp_path/'small', ('age',))
    p = subprocess.Popen(command('benchmark', 'quality', '--images', '64', '--methods', 'cycle,w', '--workers', '2', '--bundle', bundle, '--work', tmp_path/'w', '--out', tmp_path/'q.json'),
                         env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))      # a shell's background jobs ignore it
    end, helpers = time.time() + 120, []
    while time.time() < end and p.poll() is None and len(helpers := children(p.pid)) < 3: time.sleep(.02)
    while at == 'middle' and time.time() < end and p.poll() is None and not list((tmp_path/'w').rglob('0*.json')): time.sleep(.02)
    for h in helpers: os.kill(int(h), signal.SIGINT)                       # they do not hear it: whoever started them ends them
    time.sleep(1)
    assert p.poll() is None and all(state(h)[0] != 'Z' for h in helpers)
    os.killpg(p.pid, signal.SIGINT)
    said = p.communicate(timeout=120)[1]
    assert p.returncode == 130 and said.count('\n') == 1 and 'stopped' in said, said
    end = time.time() + 60
    while time.time() < end and any(state(h)[0] != 'Z' for h in helpers): time.sleep(.1)
    assert all(state(h)[0] == 'Z' for h in helpers) and not (tmp_path/'q.json').exists()

def test_few_faces_are_the_first_of_many(tmp_path):
    "So the quick set is the beginning of the full one, and measuring more faces goes on from it."
    for kind in ('in', 'out'):
        (few, a), (many, b) = faces_and_truth(kind, 3, 32), faces_and_truth(kind, 7, 32)
        assert torch.equal(a.u, b.u[:3]) and torch.allclose(few, many[:3], atol=1e-6)
        assert kind == 'in' or torch.equal(a.extras, b.extras[:3]) and (b.extras > 0).any(1).all()
    bundle, said = write_bundle(tmp_path/'small', ('age',)), []
    kw = dict(methods=['w'], batch=2, work=tmp_path/'work', tune=2, seed=0, log=said.append)
    few = evaluate_methods(bundle, 3, 2, **kw)
    many = evaluate_methods(bundle, 6, 2, **kw)
    of = lambda rows, kind, n: [r for r in rows if r['set'] == kind and r['image'] < n]
    assert of(few, 'in', 2) == of(many, 'in', 2) and of(few, 'out', 2) == of(many, 'out', 2) and len(many) == 8
    assert len(said) == 3 + 2                                              # the part of one face, and the last two of six
    alone = evaluate_methods(bundle, 6, 2, **kw | dict(work=tmp_path/'other'))
    assert alone == many                                                   # to the last digit, begun with few or not

def test_judges_read_in_full_precision(bundle, monkeypatch):
    "Also where bfloat16 would be faster: what a referee sees must not depend on the processor."
    img, truth = faces_and_truth('in', 3, 64)
    b = load_bundle(bundle, 'cpu')
    G, wp = b.generator, b.encoder('w')(img).detach()
    go = lambda: evaluate_batch(img, truth, wp, lambda c: G.synthesis(c), b.nets, {k: b.directions[k] for k in list(b.directions)[:1]}, cloud=measure_styles(G))
    plain = go()
    monkeypatch.setattr('cycle_nb.core.has_bf16', lambda device: True)
    assert b.perceptual(img, G.synthesis(wp)).dtype == torch.float32 and go() == plain

def test_nonsense_is_one_line(bundle, tmp_path):
    for words in (['--methods', 'cycel'], ['--images', '-3'], ['--methods', 'opt-w+refine'], ['--images', '1'], ['--methods', 'w,w+tune+refine'], ['--referee', 'nobody']):
        r = cli('benchmark', 'quality', *words, '--bundle', bundle, '--out', tmp_path/'r.json')
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr, r.stderr
    assert not (tmp_path/'r.json').exists()

def test_every_part_of_full_size_is_timed():
    "Each case in its own process; a step that is not walked is not in the figures."
    cases = dict(pipeline=(pipeline_cost, dict(res=32, low_memory=True, refine=1, tune=0)), training=(training_cost, dict(res=32, batch=1, steps=1)))
    found = measure_in_process(cases, 'cpu')
    assert set(found['pipeline']) == {'cycle', 'refine', 'steps', 'peak_memory_mb'} and set(found['training']) == {'w', 'wplus', 'peak_memory_mb'}
    assert all(found['pipeline'][k] > 0 for k in ('cycle', 'refine', 'peak_memory_mb')) and min(found['training'].values()) > 0

def test_methods_are_read_back():
    for name in METHODS: assert str(parse_method(name)) == name and parse_method(f'{name}+tune').tune
    for way in REFINEMENTS:
        assert parse_method(f'w+{way}') == Method('w', way) and parse_method(f'cycle-all+{way}+tune') == Method('cycle-all', way, True)
    for text in ('', 'w+', '+tune', 'w+tune+tune', 'w+Tune', 'w tune', 'w+latent+refine', 'opt-w+refine', 'w+tune+refine'):
        with pytest.raises(InputError): parse_method(text, ['w'])
    assert parse_method('opt-w+latent').encoder is None and set(OPTIMISED) == {'opt-w', 'opt-wplus', 'opt-w-long'}
    for a, b, _ in CLAIMS: parse_method(a), parse_method(b)

def test_what_is_measured_is_what_a_user_receives(bundle, tmp_path):
    "The images of a tuned method, bit for bit, compressed as they would be stored: by default settings of both, in two batches."
    b, n = load_bundle(bundle), 14
    img, _ = faces_and_truth('in', n, b.generator.resolution)
    for encoder, method in ('cycle', 'cycle+tune'), ('wplus', 'wplus+refine+tune'):
        few = dict(refine=1, tune=2)
        rows = evaluate_methods(b, n, methods=[method], work=tmp_path, **few, log=lambda line: None)
        with single_threaded(): inv = invert(img, b, encoder, **few | dict(refine=int('refine' in method)))
        assert [r['mse'] for r in rows] == mse(inv.img.clamp(-1, 1), img).tolist()
        with single_threaded():
            wp, draw = invert_for(img[:12], b, method, **few)
            with torch.no_grad(): assert torch.equal(draw(wp), inv.img[:12]) and torch.equal(wp, inv.wp[:12])

def test_threads_round_and_no_more(bundle):
    "What `invert` gives on several threads is what was measured on one, up to rounding that tuning magnifies."
    b = load_bundle(bundle)
    img, _ = faces_and_truth('in', 3, b.generator.resolution)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = invert(img, b, refine=1, tune=2)
    finally: torch.set_num_threads(before)
    with single_threaded(): one = invert(img, b, refine=1, tune=2)
    assert (many.img - one.img).abs().max() < .02 and (many.wp - one.wp).abs().max() < .02

def test_one_encoder_is_enough(bundle, tmp_path):
    "Of a bundle with nothing but a cycle encoder, all that can be measured is measured."
    b, folder = load_bundle(bundle), tmp_path/'one'
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns('w.*', 'wplus.*'))
    assert known_methods(load_bundle(folder)) == ['opt-w', 'opt-wplus', 'cycle', 'cycle-all', 'cycle+refine'] and set(known_methods(b)) == set(METHODS) - {'w_long', 'wplus_long'}
    go = lambda b: evaluate_methods(b, 2, methods=['cycle', 'cycle+tune'], tune=2, seed=0, work=tmp_path/'w', log=lambda line: None)
    drop = lambda rows: [{k: v for k, v in r.items() if k != 'version'} for r in rows]
    assert drop(go(load_bundle(folder))) == drop(go(b))

def test_a_method_is_measured_once_for_all_settings_that_it_does_not_know():
    uses = lambda m, **kw: used_settings(parse_method(m), kw)
    assert uses('w', seed=5) == {} and uses('wplus+latent', seed=5) == dict(refine=15) and uses('opt-w', seed=5) == dict(seed=5)
    assert uses('cycle+refine', tune=3) == dict(seed=0, refine=15) and uses('w+tune', threshold=.1) == dict(seed=0, tune=350, threshold=.1, preset='fast')

def rows(method, kind='in', shift=0., seed=0, n=40):
    v = torch.rand(n, 6, generator=make_rng(seed)) + shift
    keys = 'perceptual', 'mse', 'yaw/error', 'age/error', 'yaw/no_edit_error', 'age/no_edit_error'
    rest = dict.fromkeys(['ms_ssim', 'identity', 'spread', 'yaw/entanglement', 'age/entanglement'], 0.) | {'yaw/success': 1., 'age/success': 1.}
    return [dict(zip(keys, r), set=kind, image=i, method=method) | rest for i, r in enumerate(v.tolist())]

def test_the_edit_axis_is_the_mean_over_words():
    r = rows('w')
    assert torch.allclose(metric_per_image(r, 'edit'), torch.tensor([(x['yaw/error'] + x['age/error'])/2 for x in r]))
    assert torch.allclose(metric_per_image(r, 'edit_gap'), metric_per_image(r, 'edit') - torch.tensor([x['mse'] for x in r]))
    s = quality_summary(r + rows('w', 'out', 1.))
    assert abs(s['out']['w']['mse']['mean'] - s['in']['w']['mse']['mean'] - 1) < 1e-4

def test_what_the_picture_shows_stands_beside_what_the_regressor_sees():
    "In record and table; figures from before it was measured are read without it, also where some faces have it."
    old = rows('w', n=4)
    new = [r | {f'{e}/{k}': v for e, s in (('yaw', i % 2), ('age', 1)) for k, v in (('pixel_success', float(s)), ('change_drawn', .5*s - .1*i))} for i, r in enumerate(rows('cycle', n=4))]
    s = quality_summary(old + new)['in']
    assert s['cycle']['pixel_success']['mean'] == pytest.approx(.75) and s['cycle']['change_drawn']['mean'] == pytest.approx(.375 - .15) and s['cycle']['success']['mean'] == 1
    assert not {'pixel_success', 'change_drawn'} & s['w'].keys()
    text = quality_table(dict(**{'in': s})).splitlines()
    column = dict(zip(*([c.strip() for c in line.split('|')] for line in (text[3], text[6]))))
    assert column['method'] == 'cycle' and column['pixel_success'].startswith('0.7500') and column['change_drawn'].startswith('0.2250')
    assert dict(zip(*([c.strip() for c in line.split('|')] for line in (text[3], text[5]))))['pixel_success'] == '–'
    mixed = quality_summary(new[:2] + [r | dict(method='cycle') for r in old[2:]])['in']['cycle']
    assert 'pixel_success' not in mixed and mixed['success']['mean'] == 1

def test_not_editing_by_hand():
    img, truth = faces_and_truth('out', 3, 32)
    far = []
    for k, change in EDIT_CHANGES.items():
        v = truth.u[:, FACTORS.index(k)]
        then = render(with_factor(truth.u, k, torch.where(v <= 0, v + change, v - change)), 32, truth.extras)
        far.append(((then - img)**2).mean())
    row = no_edit_baseline(truth, 32)['edit']
    assert row['mean'] == pytest.approx(float(sum(far)/len(far)), rel=1e-4) and row['low'] < row['mean'] < row['high']

def test_an_edit_is_measured_by_perceptual_distance_too(bundle):
    "The strength that is recorded, drawn again, beside the true edit drawn here; and not editing."
    b = load_bundle(bundle)
    img, truth = faces_and_truth('out', 3, b.generator.resolution)
    wp = b.encoder('cycle')(img)
    for r, i in zip(evaluate_batch(img, truth, wp, b.generator.synthesis, b.nets, b.directions, dict(age=1.), cloud=measure_styles(b.generator)), range(3)):
        v = truth.u[i, FACTORS.index('age')]
        then = render(with_factor(truth.u[i:i + 1], 'age', v + (1. if v <= 0 else -1.)), img.shape[-1], truth.extras[i:i + 1])
        moved, out = (b.generator.synthesis(wp[i:i + 1] + s*b.directions['age']).clamp(-1, 1) for s in (r['age/strength']*r['age/success'], 0.))
        assert r['age/perceptual_error'] == pytest.approx(b.perceptual(moved, then).item(), abs=2e-3)
        assert r['age/no_edit_perceptual'] == pytest.approx(b.perceptual(out, then).item(), abs=2e-3)

def test_verdicts_are_paired():
    "A shift far below the spread of faces is seen when the faces are the same ones, and not when they are others."
    claim = [('cycle', 'w_long', 'perceptual')]
    same = check_claims(rows('cycle') + rows('w_long', shift=.01), claim)
    other = check_claims(rows('cycle') + rows('w_long', shift=.01, seed=2), claim)
    assert same[0]['verdict'] == 'holds' and abs(same[0]['mean'] + .01) < 1e-5 and other[0]['verdict'] == 'open'
    assert check_claims(rows('cycle', shift=.01) + rows('w_long'), claim)[0]['verdict'] == 'fails'

def test_differences_are_taken_face_by_face_from_the_first_method():
    found = paired_differences(rows('cycle') + rows('w', shift=.25) + rows('w+tune', shift=-.5) + rows('cycle+tune', shift=-.75), 'cycle')['in']
    assert list(found) == ['w − cycle', 'w+tune − cycle+tune']
    for k in ('mse', 'perceptual', 'edit'):
        for name in ('w − cycle', 'w+tune − cycle+tune'):
            v = found[name][k]
            assert v['mean'] == pytest.approx(.25, abs=1e-4) and v['high'] - v['low'] < 1e-4

def test_linear_probe_is_least_squares_on_unseen_rows():
    g = make_rng(0)
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
    for i, x in enumerate(render(sample_factors(5, make_rng(3)), 48)):
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
    assert {'mse', 'perceptual', 'identity', 'identity_preserved', 'lec', 'spread'} <= m.keys() and not {'edit', 'no_edit_error', 'success'} & m.keys()
    assert len(list((tmp_path/'work').rglob('0*.json'))) == 2
    (pictures/'0.png').unlink()                                            # other pictures: measured anew
    assert cli(*args, tmp_path/'b.json').returncode == 0
    assert read_json(tmp_path/'b.json')['sets']['own']['w']['mse'] != m['mse'] and len(list((tmp_path/'work').rglob('0*.json'))) == 4
    r = cli('benchmark', 'generator', '--images', pictures, '--bundle', bundle, '--out', tmp_path/'c.json')
    assert r.returncode == 2 and 'whole number' in r.stderr and r.stderr.count('\n') == 1

def test_networks_of_your_own_are_measured(pictures, tmp_path):
    "No identity network, no regressor, no folder; other weights are other parts."
    def own(seed):
        torch.manual_seed(seed)
        G = Generator(32, z_dim=8, w_dim=16, num_mapping=1, channel_base=256, channel_max=16)
        return Bundle.from_networks(G, Encoder(32, G.num_ws, 16), Perceptual(res=32, widths=(4, 4, 4, 4, 4)), directions={'up': torch.ones(16)})
    a, b = own(0), own(1)
    assert a.fingerprint('cycle') == own(0).fingerprint('cycle') != b.fingerprint('cycle')
    go = lambda b: evaluate_methods(b, pictures, methods=['cycle', 'cycle-all'], work=tmp_path/'w', batch=2, log=lambda line: None)
    x, y = go(a), go(b)
    assert len(x) == 10 and 'identity' not in x[0] and 'up/lec' in x[0] and 'up/identity_preserved' not in x[0]
    assert x[0]['mse'] != y[0]['mse'] and go(a) == x
    assert '| cycle-all |' in quality_table(quality_summary(x))

def test_kept_and_the_way_back_by_hand(bundle):
    b = load_bundle(bundle)
    img, truth = faces_and_truth('in', 3, b.generator.resolution)
    wp, draw = invert_for(img, b, 'w')
    enc = lambda x: b.encoder('w')(x)
    r = evaluate_batch(img, truth, wp, draw, b.nets, b.directions, encode=enc, cloud=measure_styles(b.generator))
    for k, d in b.directions.items():
        with torch.no_grad():
            s = torch.tensor([x[f'{k}/strength']*x[f'{k}/success'] for x in r])
            moved = draw(wp + s.view(-1, 1, 1)*d).clamp(-1, 1)
            kept = (b.identity.embed(moved)*b.identity.embed(draw(wp).clamp(-1, 1))).sum(1)
            home = enc(draw(wp + d)) - d
        assert torch.allclose(kept, torch.tensor([x[f'{k}/identity_preserved'] for x in r]), atol=2e-2)
        assert torch.allclose((home - wp).norm(dim=2).mean(1), torch.tensor([x[f'{k}/lec'] for x in r]), atol=2e-2)
    assert all('yaw/identity_preserved' in x for x in evaluate_batch(img, None, wp, draw, b.nets, b.directions))

def test_frechet_distances_are_zero_for_the_truth_and_grow_with_a_shift(bundle):
    b, k = load_bundle(bundle), FACTORS.index('age')
    _, truth = faces_and_truth('in', 60, b.generator.resolution)
    v = truth.u[:, k]
    with torch.no_grad(): true = b.attributes(render(with_factor(truth.u, 'age', torch.where(v <= 0, v + 1, v - 1)), b.generator.resolution))
    known = true_features(truth, b.attributes, b.generator.resolution)
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
    save_model(Perceptual(**BODY), tmp_path/'referee'/'perceptual.safetensors', make_card('perceptual', seed=5))
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
    go = lambda work, *methods: evaluate_methods(bundle, 2, methods=methods, work=tmp_path/work, tune=2, seed=3, log=lambda line: None)
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
    assert '| change_drawn | success | pixel_success |' in text
    b = load_bundle(bundle)
    sheet = to_tensor(contact_sheets(b, 3, 0, ['w', 'cycle'], work=tmp_path/'w', tune=350, seed=0)['in'])
    img, truth = faces_and_truth('in', 3, 64)
    wp, draw = invert_for(img, b, 'cycle')
    row = evaluate_batch(img, truth, wp, draw, b.nets, b.directions, cloud=measure_styles(b.generator))
    words = [k for k in b.directions if f'{k}/error' in row[0]][:3]
    left, top = (size - 67*n + 3 for size, n in ((sheet.shape[2], 3 + len(words)), (sheet.shape[1], 3)))
    cell = lambda i, j: sheet[:, top + 67*i:top + 67*i + 64, left + 67*j:left + 67*j + 64]
    close = lambda a, b: (a - b.clamp(-1, 1)).abs().max() < .02
    with torch.no_grad(): drawn = draw(wp)
    for i, k in enumerate(words):
        u = with_factor(truth.u[i:i+1], k, truth.u[i:i+1, FACTORS.index(k)] + (EDIT_CHANGES[k] if truth.u[i, FACTORS.index(k)] <= 0 else -EDIT_CHANGES[k]))
        with torch.no_grad(): moved = draw(wp[i:i+1] + row[i][f'{k}/strength']*row[i][f'{k}/success']*b.directions[k])
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
    r = cli('benchmark', 'quality', '--images', '3', '--methods', 'cycle', '--bundle', bare, '--out', tmp_path/'b.json')
    assert r.returncode == 2 and '--images FOLDER' in r.stderr and r.stderr.count('\n') == 1, r.stderr
    b.nets = LPIPS(pnet_rand=True), None, None         # such weights, without their download
    (row,) = evaluate_methods(b, pictures, methods=['cycle'], work=tmp_path/'w', batch=8, log=lambda line: None)[:1]
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
        r = subprocess.run(command(*args, tmp_path/'q.json', '--overwrite', *more), capture_output=True, text=True, env=home)
        assert r.returncode == 0, r.stderr
    assert '| lpips_squeeze |' in r.stdout and len(list((tmp_path/'w').rglob('0*.json'))) == 2
    b = load_bundle(bundle)
    img, _ = faces_and_truth('in', 2, b.generator.resolution)
    net = lpips.LPIPS(net='squeeze', pnet_rand=True, verbose=False).eval()
    state = torch.load(tmp_path/'hub'/'checkpoints'/'squeezenet1_1-b8a52dc0.pth')
    features = torchvision.models.squeezenet1_1(); features.load_state_dict(state)
    pieces = [getattr(net.net, f'slice{i}') for i in range(1, 8)]
    for piece in pieces:
        for k, layer in piece._modules.items(): layer.load_state_dict(features.features[int(k)].state_dict())
    with torch.no_grad():
        wp, draw = invert_for(img, b, 'w')
        far = net(draw(wp).clamp(-1, 1), img).mean()
    assert read_json(tmp_path/'q.json')['sets']['in']['w']['lpips_squeeze']['mean'] == pytest.approx(float(far), rel=1e-3)

def test_an_encoder_of_your_own_is_a_method(tmp_path):
    "A file in the bundle's folder with a card that says encoder; other files are no methods."
    folder = write_bundle(tmp_path/'mine', ('age',))
    b = load_bundle(folder)
    assert b.encoders == ['w', 'wplus', 'cycle']
    save_model(b.encoder('wplus'), folder/'twin.safetensors', make_card('encoder', seed=0))
    assert b.encoders == ['w', 'wplus', 'cycle', 'twin']
    rows = evaluate_methods(b, 2, methods=['wplus', 'twin', 'twin-all'], work=tmp_path/'w', log=lambda line: None)
    drop = lambda r: {k: v for k, v in r.items() if k not in ('method', 'version')}
    assert [drop(r) for r in rows[:2]] == [drop(r) for r in rows[2:4]] and rows[2]['method'] == 'twin'
    r = cli('benchmark', 'quality', '--bundle', folder, '--methods', 'perceptual', '--out', tmp_path/'q.json')
    assert r.returncode == 2 and 'twin' in r.stderr and r.stderr.count('\n') == 1
    r = cli('invert', tmp_path/'nothing.png', '--bundle', folder, '--encoder', 'generator', '--out', tmp_path/'o')
    assert r.returncode == 2 and r.stderr.count('\n') == 1

@pytest.fixture
def out_of_w(bundle, tmp_path_factory):
    "Five faces and three edits, and how to measure what they cost outside W, shortly."
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp('priced')/'tiny')
    known, card = load_tensors(folder/'directions.safetensors')
    save_tensors(folder/'directions.safetensors', {k: known[k] for k in ('yaw', 'age', 'smile')}, card)
    b = load_bundle(folder)
    img, truth = faces_and_truth('out', 5, b.generator.resolution)
    short = dict(steps=(0, 3, 6), in_w=4, tune=2, threshold=.01, batch=2, log=lambda line: None)
    return b, img, truth, short

def test_the_path_leaves_w_and_draws_better(out_of_w):
    "The same path however far it goes; every stop is further out and nearer to the picture."
    b, img, *_ = out_of_w
    path, longer = walk_out(img, b, (0, 6, 40), in_w=20), walk_out(img, b, (6, 60), in_w=20)
    assert list(path) == [0, 6, 40] and torch.allclose(path[6], longer[6], atol=1e-5)
    with torch.no_grad(): far = [(mse(x := b.generator.synthesis(wp), img) + .8*b.perceptual(x, img)).sum() for wp in path.values()]
    away = [spread(wp).mean() for wp in path.values()]
    assert far == sorted(far)[::-1] and away == sorted(away) and away[0] < 1e-5

def test_the_price_is_measured_once(out_of_w, tmp_path):
    "From files, with another number of faces, with more steps, and by two processes: the same figures; other settings are other files."
    b, img, truth, short = out_of_w
    go = lambda work, n=5, **kw: price_of_leaving_w(b, img[:n], truth[:n], work=tmp_path/work, **short | kw)
    rows = go('a')
    assert [(r['face'], r['step'], r['tuned']) for r in rows if r['face'] == 4] == [(4, s, t) for s in (0, 3, 6) for t in (False, True)] and len(rows) == 30
    made = {f: f.stat().st_mtime_ns for f in (tmp_path/'a').rglob('0*')}
    of = lambda rows, n: [r for r in rows if r['face'] < n]
    assert go('a') == rows and of(go('a', 4), 4) == of(rows, 4)
    assert all(f.stat().st_mtime_ns == t for f, t in made.items())
    more = go('a', steps=(0, 3, 6, 8))
    assert [r for r in more if r['step'] < 8] == rows and all(f.stat().st_mtime_ns == t for f, t in made.items())
    assert go('b', workers=2) == rows
    assert go('a', tune=3) != rows and len(list((tmp_path/'a').rglob('0*.safetensors'))) == len({r['step'] for r in more})*3

def test_the_price_by_hand(out_of_w, tmp_path):
    "Differences to W, on faces where both reach the edit; what tuning does not bring to the threshold is counted."
    b, img, truth, short = out_of_w
    record, rows = price_record(b, 2, 3, work=tmp_path, **short)
    assert record['settings']['threshold'] == .01 and set(record['sets']) == {'in', 'out'} and len(rows['out']) == 18
    for tuned, stage in ((False, 'before'), (True, 'after')):
        of, t = by_step(rows['out'], tuned), record['sets']['out'][stage]
        assert t[6]['missed'] == sum(not r['reached'] for r in of[6]) and t[3]['mse'] == pytest.approx(sum(r['mse'] for r in of[3])/3, abs=1e-6)
        for k in ('yaw', 'age', 'smile'):
            d = [x[f'{k}/error'] - y[f'{k}/error'] for x, y in zip(of[6], of[0]) if all(r[f'{k}/pixel_success'] for r in (x, y))]
            if d: assert t[6][k]['mean'] == pytest.approx(sum(d)/len(d), abs=1e-6) and t[6][k]['faces'] == len(d) and t[6][k]['reached'] == pytest.approx(len(d)/3, abs=1e-6)
            else: assert t[6][k] is None
    assert price_text(record['sets']['in']['after']).count('\n') == 4 and 'W+ 6' in price_text(price_table(rows['in']))

def test_portraits_are_no_test_faces(bundle, monkeypatch):
    "A generator is compared with two sets of drawn faces that are neither each other's nor those on which methods are tested."
    drawn = []
    def watched(n, res, seed, *more):
        drawn.append(render(sample_factors(n, make_rng(seed)), res))
        yield from render_batches(n, res, seed, *more)
    monkeypatch.setattr('cycle_nb.generator_quality.render_batches', watched)
    assert measure_generator(bundle, 60)['images'] == 60 and len(drawn) == 2
    sets = [*drawn, *(faces_and_truth(k, 60, 64)[0] for k in ('in', 'out'))]
    for i, a in enumerate(sets):
        for b in sets[:i]: assert torch.cdist(a.flatten(1), b.flatten(1)).min() > 1

NETWORKS = '''
import torch
class Net(torch.nn.Module):
    def __init__(self, sizes):
        super().__init__()
        assert sizes['channel_base'] == 2048 and sizes['channel_max'] == 128
        self.weight = torch.nn.Parameter(torch.zeros(1))
class Generator(Net):
    z_dim = 128
    def __init__(self, z, c, w, res, channels, mapping_kwargs, synthesis_kwargs):
        super().__init__(synthesis_kwargs)
        self.mapping = self.synthesis = None
class Discriminator(Net):
    def __init__(self, c, res, channels, **sizes): super().__init__(sizes)
'''
LOSS = '''
class StyleGAN2Loss:
    def __init__(self, device, mapping, synthesis, D, r1_gamma): self.n = 0
    def accumulate_gradients(self, phase, real, real_c, z, c, sync, gain): print(phase, *real.shape, *z.shape, gain)
'''

TELL = '''
import sys
from cycle_nb.speed import measure_training
from cycle_nb.train_generator import AdversarialTask
def tell(name, call):
    def new(task): print(name); return call(task)
    setattr(AdversarialTask, name, new)
for name in ('penalty', 'path_step'): tell(name, getattr(AdversarialTask, name))
'''

def test_training_is_timed_beside_a_clone(tmp_path, python):
    "The clone's code is called on the schedule of its own loop: here it only says what it is asked for. Ours regularises as often as in a training."
    for name, text in dict(networks=NETWORKS, loss=LOSS).items():
        (tmp_path/'clone'/'training').mkdir(parents=True, exist_ok=True)
        (tmp_path/'clone'/'training'/f'{name}.py').write_text(text)
    *said, found = python(TELL + 'print(measure_training(16, 4, 1, sys.argv[1], "cpu"))', tmp_path/'clone').splitlines()
    once = [f'{p} 4 3 16 16 4 128 {gain}' for k in range(16) for p, gain in (('Gmain', 1), ('Greg', 4), ('Dmain', 1), ('Dreg', 16)) if k % gain == 0]
    found = ast.literal_eval(found)
    assert said == 2*['penalty', 'path_step', 'path_step', *once] and found['images_per_s'] > 0 and found['times'] == pytest.approx(found['images_per_s']/found['reference'], abs=.006)
    with pytest.raises(InputError, match='no clone'): measure_training(16, 4, 1, tmp_path)

def test_claims_over_several_trainings(tmp_path, capsys):
    "Figures of three trainings, from their files: faces paired, what was measured once used in each, few trainings no certainty."
    g = torch.Generator().manual_seed(0)
    hard, noise = torch.rand(40, generator=g)*.02, lambda: .0005*float(torch.randn((), generator=g))
    def training(k, luck, opt):
        methods = dict(cycle=0., w_long=.002 + luck) | ({'opt-w': -.004, 'opt-wplus': -.004} if opt else {})
        row = lambda m, i, less: dict(set='in', method=m, version=m, image=i, mse=float(hard[i]) + less + noise(), perceptual=.1 + less + noise(), **{'yaw/error': .01 + less + noise(), 'yaw/success': float(i % 4 > 0)})
        save_faces([row(m, i, less) for m, less in methods.items() for i in range(40)], tmp_path/f'{k}_faces.csv.gz')
        return str(tmp_path/f'{k}_faces.csv.gz')
    files = [training(k, luck, not k) for k, luck in enumerate((0., .0004, -.0004))]
    out = tmp_path/'seeds.json'
    assert main(['benchmark', 'seeds', '--out', str(out), *files]) == 0
    said, found = capsys.readouterr().out, read_json(out)
    claims = {c['claim']: c for c in found['claims']}
    assert list(claims) == [f'{x}: {a} < {b}' for a, b, x in CLAIMS if {a, b} <= {'cycle', 'w_long', 'opt-w', 'opt-wplus'}] and said.count('  each ') == len(claims)
    assert found['figures'] == {f: hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files}
    mse = claims['mse: cycle < w_long']
    read = [{(r['method'], r['image']): r['mse'] for of in read_faces(f).values() for r in of.values()} for f in files]
    assert mse['each'] == pytest.approx([sum(r['cycle', i] - r['w_long', i] for i in range(40))/40 for r in read], abs=2e-6)
    assert mse['verdict'] == 'holds' and mse['faces'] == 40 and mse['mean'] == pytest.approx(sum(mse['each'])/3, abs=2e-6)
    assert claims['edit: cycle < w_long']['faces'] == 30 and claims['edit: cycle < w_long']['reached'] == .75
    assert len({*claims['perceptual: opt-wplus < opt-w']['each']}) == 1                     # measured once
    rows = [[r for of in read_faces(f).values() for r in of.values()] for f in files[:2]]
    lone = [r for r in rows[1] if r['method'] == 'cycle']       # its rival was not trained again, and another training's does not stand for it
    assert {c['claim'] for c in claims_over_seeds([rows[0], lone])} == {'perceptual: opt-wplus < opt-w'}
    assert main(['benchmark', 'seeds', '--out', str(tmp_path/'r.json'), files[0]]) == 2 and 'two or more' in capsys.readouterr().err
    save_faces([r for of in read_faces(files[1]).values() for i, r in of.items() if i < 39], tmp_path/'fewer_faces.csv.gz')
    assert main(['benchmark', 'seeds', '--out', str(tmp_path/'r.json'), files[0], str(tmp_path/'fewer_faces.csv.gz')]) == 2 and 'same faces' in capsys.readouterr().err
