"The one loop: settings that differ, files that are damaged, disks that are full, bars that close."
import json, random, zipfile
import nbformat
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from conftest import ROOT
from cycle_nb import learner
from cycle_nb.core import InputError, make_rng
from cycle_nb.learner import (AtSteps, Checkpoint, Progress, Recorder, cosine_lr, cosine_warmup, ema_decay, fit, make_optimizer, plain, progress,
                              run_callbacks, settings_diff, update_ema)


class Task:
    "A small task; the batch of a step depends on the step."
    def __init__(self, opt='adam', width=8):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.opt, self.step = make_optimizer(self.net.parameters(), opt, 1e-2), 0
    def train_step(self):
        x = torch.randn(16, 4, generator=make_rng(self.step))
        for g in self.opt.param_groups: g['lr'] = 1e-2*cosine_warmup(self.step, 100)
        loss = (self.net(x)[:, 0] - x.sum(1)).square().mean()
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        return dict(loss=loss.detach())
    def state(self): return dict(step=self.step, net=self.net.state_dict(), opt=self.opt.state_dict())
    def load(self, s): self.net.load_state_dict(s['net']); self.opt.load_state_dict(s['opt']); self.step = s['step']


def refused(f, *args, **kw):
    "The one line in which something is refused."
    with pytest.raises(InputError) as e: f(*args, **kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 700
    return str(e.value)


# --- settings ------------------------------------------------------------------------------

values = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3)
nested = st.dictionaries(st.text(max_size=3), st.recursive(values, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=2), v, max_size=3), max_leaves=6), max_size=5)


@given(nested, nested)
@settings(max_examples=200, deadline=None)
def test_settings_differ_exactly_when_their_json_does(a, b):
    a, b = plain(a), plain(b)
    assert not settings_diff(a, json.loads(json.dumps(a)))
    assert bool(settings_diff(a, b)) == (json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True))


@given(nested, nested)
@settings(max_examples=25, deadline=None)
def test_resume_under_any_other_settings_is_refused(a, b):
    from tempfile import TemporaryDirectory
    with TemporaryDirectory() as d:
        path = f'{d}/c.pt'
        fit(Task(), 2, [Checkpoint(path, settings=a)])
        assert fit(Task(), 3, [Checkpoint(path, settings=a)]).step == 3
        if settings_diff(plain(a), plain(b)):
            said = refused(fit, Task(), 4, [Checkpoint(path, settings=b)])
            assert path in said and 'other settings' in said and 'delete it' in said


def test_message_names_what_differs(tmp_path):
    old = dict(lr=.01, sizes=(1, 2), data=dict(seed=0, path=tmp_path))
    fit(Task(), 1, [Checkpoint(tmp_path/'c.pt', settings=old)])
    said = refused(fit, Task(), 2, [Checkpoint(tmp_path/'c.pt', settings=old | dict(lr=.02, data=dict(seed=3, path=tmp_path), new=True))])
    assert '(data.seed 0 → 3; lr 0.01 → 0.02; new unset → true)' in said
    assert '3 more' in refused(fit, Task(), 2, [Checkpoint(tmp_path/'c.pt', settings=old | {k: 'x'*500 for k in 'abcdefgh'})])


def test_a_file_without_settings_is_refused_where_they_are_asked(tmp_path):
    fit(Task(), 1, [Checkpoint(tmp_path/'c.pt')])
    assert 'lr unset → 1' in refused(fit, Task(), 2, [Checkpoint(tmp_path/'c.pt', settings=dict(lr=1))])
    assert fit(Task(), 2, [Checkpoint(tmp_path/'c.pt')]).step == 2


# --- checkpoints ---------------------------------------------------------------------------

@pytest.mark.parametrize('opt', ['adam', 'adamw', 'ranger'])
def test_a_broken_run_is_the_unbroken_run(tmp_path, opt):
    whole = fit(Task(opt), 60, [Recorder(10, path=tmp_path/'a.jsonl')])
    class Killed(Exception): pass
    def kill(task): raise Killed
    for at in (7, 23, 41):
        with pytest.raises(Killed): fit(Task(opt), 60, [Checkpoint(tmp_path/'b.pt', 10), Recorder(10, path=tmp_path/'b.jsonl'), AtSteps({at: kill})])
    part = fit(Task(opt), 60, [Checkpoint(tmp_path/'b.pt', 10), Recorder(10, path=tmp_path/'b.jsonl')])
    assert all(a.equal(b) for a, b in zip(whole.net.state_dict().values(), part.net.state_dict().values()))
    assert (tmp_path/'a.jsonl').read_text() == (tmp_path/'b.jsonl').read_text()


def test_damage_is_one_line(tmp_path):
    "Cut anywhere, or bytes changed: the run goes on, or one line names the file."
    path, rng, seen = tmp_path/'c.pt', random.Random(0), 0
    fit(Task(), 1, [Checkpoint(path)])
    whole = path.read_bytes()
    bad = [whole[:n] for n in range(0, len(whole), len(whole)//20)] + [b'hello', b'']
    for _ in range(30):
        b = bytearray(whole)
        for _ in range(rng.randint(1, 40)): b[rng.randrange(len(b))] = rng.randrange(256)
        bad.append(bytes(b))
    for b in bad:
        path.write_bytes(b)
        try: Checkpoint(path).load(Task())
        except InputError as e: seen += 1; assert str(path) in str(e) and '\n' not in str(e) and ('delete' in str(e))
    assert seen > 25
    path.unlink(); path.mkdir()
    assert 'c.pt' in refused(fit, Task(), 2, [Checkpoint(path)])


def test_another_training_is_one_line(tmp_path):
    fit(Task(), 1, [Checkpoint(tmp_path/'c.pt')])
    for other in (Task(width=9), Task('ranger')): assert 'not of this training' in refused(Checkpoint(tmp_path/'c.pt').load, other)
    torch.save([1, 2], tmp_path/'list.pt'); assert 'list.pt' in refused(Checkpoint(tmp_path/'list.pt').load, Task())
    torch.save(dict(step=1), tmp_path/'few.pt'); assert 'few.pt' in refused(Checkpoint(tmp_path/'few.pt').load, Task())


def test_another_computer_has_no_such_device(tmp_path):
    "A checkpoint of an accelerator is read where there is none."
    if torch.backends.mps.is_available(): pytest.skip('this one has it')
    fit(Task(), 1, [Checkpoint(tmp_path/'c.pt')])
    with zipfile.ZipFile(tmp_path/'c.pt') as a, zipfile.ZipFile(tmp_path/'d.pt', 'w') as b:
        for n in a.namelist(): b.writestr(n, a.read(n).replace(b'cpu', b'mps') if n.endswith('data.pkl') else a.read(n))
    with pytest.raises(RuntimeError): torch.load(tmp_path/'d.pt')
    assert fit(Task(), 2, [Checkpoint(tmp_path/'d.pt')]).step == 2


def test_full_disk_is_one_line_and_keeps_the_old_checkpoint(tmp_path, python):
    code = ('import resource, sys, torch; sys.path.insert(0, sys.argv[2])\nfrom test_learner import *\nc = Checkpoint(sys.argv[1] + "/c.pt", 5)\n'
            'fit(Task(width=64), 5, [c])\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n'
            'try: fit(Task(width=64), 10, [c])\nexcept InputError as e: print(e)')
    said = python(code, tmp_path, ROOT/'tests')
    assert 'c.pt: cannot be written' in said and said.count('\n') == 1
    assert [f.name for f in tmp_path.iterdir()] == ['c.pt'] and fit(Task(width=64), 6, [Checkpoint(tmp_path/'c.pt')]).step == 6


def test_saved_once(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(learner, 'save_torch', lambda x, path: saved.append(x['step']))
    fit(Task(), 25, [Checkpoint(tmp_path/'c.pt', 10)])
    fit(Task(), 20, [Checkpoint(tmp_path/'c.pt', 10)])
    assert saved == [10, 20, 25, 10, 20]


# --- callbacks -----------------------------------------------------------------------------

def test_callbacks_have_any_of_three_methods():
    seen = []
    class All:
        def before_fit(self, task, steps): seen.append(('before', task.step, steps))
        def after_step(self, task, logs): seen.append(('step', task.step, sorted(logs)))
        def after_fit(self, task): seen.append(('end', task.step))
    fit(Task(), 2, [object(), All()])
    assert seen == [('before', 0, 2), ('step', 1, ['loss']), ('step', 2, ['loss']), ('end', 2)]
    run_callbacks([object()], 'nothing')


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    fit(Task(), 40, [Checkpoint(tmp_path/'c.pt', 20), Recorder(10, lambda t: dict(twice=2*t.step), tmp_path/'log.jsonl')])
    state = Checkpoint(tmp_path/'c.pt').read()
    task = Task(); task.load(state); task.step = 20
    r = Recorder(10, path=tmp_path/'log.jsonl'); r.before_fit(task, 40)
    assert r.series('twice') == ([10, 20], [20, 40]) and len(r.series('loss')[0]) == 2
    for bad in ('nothing', '[1]', '{"loss": 1}', '{"step": "x"}'):
        (tmp_path/'log.jsonl').write_text(bad + '\n')
        assert 'log.jsonl' in refused(Recorder(path=tmp_path/'log.jsonl').before_fit, task, 40)


def test_progress_lines(capsys):
    fit(Task(), 25, [Progress(10, 'toy', 16)])
    lines = capsys.readouterr().out.splitlines()
    assert [l.split(' loss')[0] for l in lines] == ['toy 10/25', 'toy 20/25', 'toy 25/25'] and all('images/s' in l and 'min left' in l for l in lines)


# --- rates and averages --------------------------------------------------------------------

@given(st.integers(1, 5000), st.integers(1, 500), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_rates_rise_and_fall(steps, warmup, least):
    rates = [cosine_warmup(i, steps, warmup, least) for i in range(steps + 1)]
    assert all(0 <= r <= 1 for r in rates)
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    if steps > warmup: assert abs(rates[-1] - least) < 1e-9
    assert [cosine_lr(i, steps, warmup) for i in range(steps + 1)] == [cosine_warmup(i, steps, min(warmup, max(1, steps//5)), 0.) for i in range(steps + 1)]


@given(st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_slow_copy_is_the_average(decay):
    a, b = Task().net, Task('adam').net
    for p in b.parameters(): p.data.normal_(generator=make_rng(1))
    b(torch.randn(5, 4))
    was = {k: v.clone() for k, v in a.state_dict().items()}
    update_ema(a, b, decay)
    for k, v in a.state_dict().items():
        want = was[k]*decay + b.state_dict()[k]*(1 - decay) if v.is_floating_point() else b.state_dict()[k]
        assert torch.allclose(v, want, atol=1e-5), k
    assert 0 <= ema_decay(16, 0) < 1e-9 and abs(ema_decay(10_000, 10**9) - .5) < 1e-9


# --- bars ----------------------------------------------------------------------------------

LEAVE = dict(end='for i in progress(range(5), desc="x"): pass',
             left='for i in progress(range(50), desc="x"):\n  if i == 3: break',
             error='for i in progress(range(50), desc="x"):\n  if i == 3: raise ValueError',
             stopped='for i in progress(range(50), desc="x"):\n  if i == 3: raise KeyboardInterrupt',
             short='for i in progress(iter(range(3)), total=5): pass',
             long='for i in progress(iter(range(9)), total=5): pass',
             returned='def f():\n  for i in progress(range(50)):\n    if i == 3: return i\nf()')


@pytest.mark.parametrize('how', LEAVE)
def test_terminal_bar_closes(how, monkeypatch, capsys):
    "However the loop is left, the last thing written wipes the line."
    from fastprogress import fastprogress
    monkeypatch.setattr(learner, '_is_interactive', lambda: True)
    monkeypatch.setattr(fastprogress, 'progress_bar', fastprogress.ConsoleProgressBar)
    code = compile(LEAVE[how], how, 'exec')
    if how in ('error', 'stopped'):
        with pytest.raises((ValueError, KeyboardInterrupt)): exec(code, dict(progress=progress))
    else: exec(code, dict(progress=progress))
    out = capsys.readouterr().out
    assert '|' in out and out.endswith('\r') and not out.rstrip('\r').split('\r')[-1].strip(), repr(out[-200:])


def test_notebook_bars_close(tmp_path):
    "In a real kernel: when the cells have ended, no bar is left on the page."
    from nbclient import NotebookClient
    first = "from cycle_nb.learner import progress"
    cells = [nbformat.v4.new_code_cell(c) for c in (first, *LEAVE.values())]
    nb = nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}})
    NotebookClient(nb, timeout=100, kernel_name='python3', allow_errors=True, resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert not [o for o in nb.cells[0].outputs if o.output_type == 'error'], nb.cells[0].outputs
    for name, cell in zip(LEAVE, nb.cells[1:]):
        shown = [''.join(o.get('data', {}).get('text/html', 'none')) for o in cell.outputs if o.output_type == 'display_data']
        assert '' in shown, f'{name}: there was a bar, and it went'
        assert not [s for s in shown if '<progress ' in s.replace('\n', ' ')], name
        errors = [o.ename for o in cell.outputs if o.output_type == 'error']
        assert errors == dict(error=['ValueError'], stopped=['KeyboardInterrupt']).get(name, []), (name, errors)


def test_lines_where_nobody_watches(capsys, monkeypatch):
    monkeypatch.setattr(learner, '_is_interactive', lambda: False)
    assert list(progress(range(3))) == [0, 1, 2] and not capsys.readouterr().err
    for _ in learner._with_lines(range(9), 9, 'x', every=-1):
        if _ == 2: break
    assert capsys.readouterr().err.splitlines()[-1].startswith('x: 3/9')


def test_optimiser_needs_a_known_name(): assert 'ranger' in refused(make_optimizer, [], 'sgd')
