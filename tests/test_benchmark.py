"The benchmark as its readers meet it: killed, resumed, asked for nonsense; its verdicts against a second computation."
import signal, subprocess, time
import pytest, torch
from cycle_nb.benchmark import CLAIMS, PIVOTS, REFINES, axis, parse_method, quality_summary, verdicts
from cycle_nb.core import InputError, generator, read_json
from cycle_nb.metrics import linear_probe
from tiny import ENV, bundle, cli, command, write_bundle

ARGS = ['benchmark', 'quality', '--images', '6', '--outside', '2', '--methods', 'w,cycle,wplus+tune', '--tune', '2']

def test_a_killed_benchmark_goes_on_and_ends_the_same(tmp_path):
    bundle = write_bundle(tmp_path/'small', ('age', 'yaw'))
    args = [*ARGS, '--bundle', bundle]
    whole, cut = tmp_path/'whole.json', tmp_path/'cut.json'
    r = cli(*args, '--work', tmp_path/'a', '--out', whole)
    assert r.returncode == 0, r.stderr
    assert '| cycle |' in r.stdout and 'outside the domain' in r.stdout
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
    assert set(a['sets']) == {'in', 'out'} and set(a['sets']['in']) == {'w', 'cycle', 'wplus+tune'}

def test_nonsense_is_one_line(bundle, tmp_path):
    for words in (['--methods', 'cycel'], ['--images', '-3'], ['--methods', 'opt-w+refine'], ['--images', '1'], ['--methods', 'w,w+tune+refine']):
        r = cli('benchmark', 'quality', *words, '--bundle', bundle, '--out', tmp_path/'r.json')
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr, r.stderr
    assert not (tmp_path/'r.json').exists()

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
    s = quality_summary(r + rows('w', 'out', 1.))
    assert abs(s['out']['w']['mse']['mean'] - s['in']['w']['mse']['mean'] - 1) < 1e-4

def test_verdicts_are_paired():
    "A shift far below the spread of faces is seen when the faces are the same ones, and not when they are others."
    claim = [('cycle', 'w_long', 'perceptual')]
    same = verdicts(rows('cycle') + rows('w_long', shift=.01), claim)
    other = verdicts(rows('cycle') + rows('w_long', shift=.01, seed=2), claim)
    assert same[0]['verdict'] == 'holds' and abs(same[0]['mean'] + .01) < 1e-5 and other[0]['verdict'] == 'open'
    assert verdicts(rows('cycle', shift=.01) + rows('w_long'), claim)[0]['verdict'] == 'fails'

def test_linear_probe_is_least_squares_on_unseen_rows():
    g = generator(0)
    w = torch.randn(300, 5, generator=g)
    y = w @ torch.randn(5, 2, generator=g) + .1*torch.randn(300, 2, generator=g) + 3
    pred, true = linear_probe(w, y, ridge=1e-9)
    A = torch.cat([w, torch.ones(300, 1)], 1).double()
    want = A[240:] @ torch.linalg.lstsq(A[:240], y[:240].double()).solution
    assert torch.equal(true, y[240:]) and torch.allclose(pred.double(), want, atol=1e-4)
