"Several processes train as one: real processes, under torchrun and by the variables that launchers set, on tiny networks."
import json, os, subprocess, sys
import pytest, torch
from conftest import ROOT

SCRIPT = ROOT/'tests'/'distributed.py'
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
ENV = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')} | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')


def run(*args):
    p = subprocess.run([sys.executable, *map(str, args)], env=ENV, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "What one process and two found: (precision, number of the process) -> numbers, states, files."
    one, two = tmp_path_factory.mktemp('one'), tmp_path_factory.mktemp('two')
    run(SCRIPT, 'losses', one)
    run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, SCRIPT, 'losses', two)
    return [{f.stem: torch.load(f) for f in d.glob('*.pt')} for d in (one, two)]


@pytest.fixture(scope='module')
def accidents(tmp_path_factory):
    folder = tmp_path_factory.mktemp('accidents')
    run(SCRIPT, 'accidents', folder)
    return folder, json.loads((folder/'found.json').read_text())


def tensors(x, name=''):
    if isinstance(x, torch.Tensor): yield name, x.double()
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else (): yield from tensors(v, f'{name}.{k}')


def distance(a, b):
    "The largest difference of two states, relative to each tensor's size."
    a, b = dict(tensors(a)), dict(tensors(b))
    assert a.keys() == b.keys() and len(a) > 9
    return max(float((b[k] - v).abs().max()/v.abs().max().clamp(min=1)) for k, v in a.items() if v.numel())


def rows_apart(a, b):
    "The largest difference of the numbers of a training's steps."
    assert [r.keys() for r in a] == [r.keys() for r in b] and len(a) >= 10
    return max(abs(x[k] - y[k])/max(1, abs(x[k])) for x, y in zip(a, b) for k in x)


# In float32 sums of two halves and of a whole differ in the last digit. Adam divides by a gradient's size, and batch normalisation by that of a few numbers: what they
# make of it after a few steps says nothing about the code. In float64 it stays small, whatever the training does.
@pytest.mark.parametrize('precision, most, count', [('float32', 1e-4, 3), ('float64', 1e-8, 6)])
def test_two_processes_find_what_one_finds(runs, precision, most, count):
    one, two = (r[f'{precision}-0']['found'] for r in runs)
    pairs = [(k, a, b) for k in one for a, b in zip(one[k], two[k], strict=True)]
    assert len(pairs) == count and one.keys() == two.keys()
    for kind, (a, _), (b, _) in pairs: assert rows_apart(a, b) < most, kind
    if precision == 'float64':
        for kind, (_, a), (_, b) in pairs: assert distance(a, b) < most, kind


def test_all_processes_hold_the_same_state_to_the_bit(runs):
    for precision in ('float32', 'float64'):
        first, second = (runs[1][f'{precision}-{k}']['found'] for k in (0, 1))
        for kind in first:
            for (a, s), (b, t) in zip(first[kind], second[kind], strict=True): assert a == b and distance(s, t) == 0, kind


def test_only_the_first_process_writes(runs):
    for precision in ('float32', 'float64'):
        one, first, second = runs[0][f'{precision}-0']['files'], runs[1][f'{precision}-0']['files'], runs[1][f'{precision}-1']['files']
        assert first == one and second == []
        assert {'regression/checkpoint.pt', 'cycle/cycle.safetensors', 'cycle/end_of_w.pt'} <= set(first)


def log(folder): return [json.loads(l) for l in (folder/'log.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('killed', [0, 1])
def test_when_one_is_killed_the_other_ends_with_one_line(accidents, killed):
    ends = accidents[1][f'kill {killed}']
    assert ends[killed][0] == -9
    code, text = ends[1 - killed]
    assert code == 2 and [l for l in text.splitlines() if l.startswith('cycle-nb:')] == ['cycle-nb: another process of this run has ended; start all of them again, with --resume']
    assert 'Traceback' not in text


def test_a_killed_run_goes_on_exactly(accidents):
    folder, found = accidents
    assert [e[0] for e in found['whole'] + found['again 0'] + found['again 1']] == [0]*5
    read = lambda name: torch.load(folder/name/'state.pt')
    assert log(folder/'kill 0') == log(folder/'whole') and distance(read('kill 0'), read('whole')) == 0
    assert len(log(folder/'whole')) == 10


def test_another_number_of_processes_goes_on(accidents):
    folder, _ = accidents
    alone, whole = log(folder/'kill 1'), log(folder/'whole')
    assert alone[:5] == whole[:5] and alone[5:] != whole[5:] and rows_apart(alone, whole) < 1e-4


def test_a_batch_that_does_not_divide_is_refused(accidents):
    for code, text in accidents[1]['odd']:
        assert code == 2 and text.count('\n') == 1 and 'half a batch (1) cannot be shared evenly by 2 processes; choose a batch that is a multiple of 4' in text


def results(folder): return {f.parent.name: json.loads(f.read_text()) for f in folder.glob('*/inversion.json')}


def test_a_folder_is_shared(accidents):
    "Nothing lost, nothing done twice, and the record is of all."
    folder, found = accidents
    shared, alone = results(folder/'shared'), results(folder/'alone')
    facts = lambda cards: {k: (c['source'], c['content'], c['metrics'][-1]['mse']) for k, c in cards.items()}
    assert len(shared) == 5
    for k, (source, content, mse) in facts(alone).items(): assert facts(shared)[k] == (source, content, pytest.approx(mse, rel=1e-4))
    first = json.loads((folder/'first.json').read_text())
    again, one = (json.loads((folder/k/'record.json').read_text()) for k in ('shared', 'alone'))
    assert first['images'] == first['new'] == one['new'] == again['images'] == 5 and again['new'] == 0
    assert first['failures'] == again['failures'] == one['failures'] and 'damaged.png' in one['failures'][0]['file']
    assert len((folder/'shared'/'metrics.jsonl').read_text().splitlines()) == len((folder/'alone'/'metrics.jsonl').read_text().splitlines())
    assert sorted(e[0] for e in found['invert']) == [0, 2] and sorted(e[0] for e in found['invert again']) == [0, 0, 2]
