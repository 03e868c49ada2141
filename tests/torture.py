"""Kill it, spoil its writes, feed it rubbish, give it too much: what must hold, measured.

    python tests/torture.py                          every bar at full size (most of it writes that fail: hours on one core)
    python tests/torture.py --only kill names --share .1 --seed 3 --out record.json
    python tests/torture.py --only kill --job encoder --minutes 5     as many as five minutes allow

Commands run in forked processes: real kills, real writes, without the seconds of an import each time.
Writes fail through `write_faults.c`, compiled and preloaded here; it needs a C compiler (Linux).
"""
import argparse, contextlib, ctypes, errno, hashlib, json, math, os, random, re, shutil, signal, subprocess, sys, tempfile, time, traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ['OMP_NUM_THREADS'] = '1'                       # another number of threads rounds differently
FAULTS = {'ENOSPC': True, 'EROFS': True, 'EIO': False}      # does the fault stay?
PARTS = 'nets', 'generator', 'generator pictures', 'encoder', 'encoder restyle', 'directions'


def preload():
    "Start this program again with the faults loaded."
    if 'CYCLE_NB_FAULTS' in os.environ or not shutil.which('cc'): return
    file = Path(tempfile.mkdtemp(prefix='cycle_nb-torture-'))/'write_faults.so'
    subprocess.run(['cc', '-shared', '-fPIC', '-O1', '-w', '-o', file, HERE/'write_faults.c', '-ldl'], check=True)
    env = os.environ | dict(CYCLE_NB_FAULTS=str(file), LD_PRELOAD=str(file), OMP_NUM_THREADS='1')
    os.execve(sys.executable, [sys.executable, *sys.argv], env)


if __name__ == '__main__': preload()

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from cycle_nb import directions, edit, folder_inversion, generator_quality, price, recipes, report, speed, stylespace      # loaded before the fork
from cycle_nb.bundle import load_bundle
from cycle_nb.core import InputError
from cycle_nb.download import cache_dir
from cycle_nb.export_web import RUNTIME
from cycle_nb.cli import main as cycle_nb
from cycle_nb.files import read_image, save_image, to_pil, to_tensor, write_json
from cycle_nb.folder_inversion import invert_files
from cycle_nb.inversion import Inversion, invert
from cycle_nb.sdfaces import render, sample_factors
from cycle_nb.latents import sample_w
from cycle_nb.learner import Checkpoint
from cycle_nb.models import make_card
from cycle_nb.schedule import SDFACES64, rescale
import fuzz_formats
from tiny import BODY, write_bundle

recipes.RECIPES['torture'] = dict(                          # seconds each; networks as small as the code takes
    nets=dict(steps=4, id_steps=4, images=16, persons=4, per_person=2, batch=4, pairs=4, num_heldout=8, body=BODY),
    generator=dict(pairs=32, stages=[(16, 2), (32, 2)], images=64),
    encoder=dict(sched=rescale(16, SDFACES64), batch=2, bank=16),
    directions=dict(n=16, names=['smile'], ridges=(1.,), candidates=1))


def hurry(init=Checkpoint.__init__):
    "Checkpoints at every second step, so that most kills lie between two of them; directions of 16 faces, not 400."
    def new(self, path, every=250, settings=None): init(self, path, 2, settings)
    Checkpoint.__init__ = new
    for module in (directions, edit, stylespace): module.sample_w = lambda G, n, seed=0: sample_w(G, min(n, 16), seed)


# --- running, and comparing what came out ----------------------------------------------------

class Run:
    "What a forked command did: exit code (None: killed), seconds, what it wrote on its two streams, its writes."
    def __init__(self, args, log, below=None, at=-1, error=0, stays=False, kill_after=None):
        start, calls = time.time(), Path(str(log) + '.calls')
        pid = os.fork()
        if not pid: self.inside(list(map(str, args)), log, calls, below, at, error, stays)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: break
            if kill_after is not None and time.time() - start > kill_after: os.kill(pid, signal.SIGKILL)
            time.sleep(.002)
        self.seconds, self.code = time.time() - start, os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        self.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        self.text = Path(log).read_text(errors='replace')
        self.lines = [l for l in self.text.splitlines() if l.startswith('cycle-nb:')]
        self.calls = [l.split('\t') for l in calls.read_text(errors='replace').splitlines()] if below else []

    def inside(self, args, log, calls, below, at, error, stays):
        try:
            to = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(to, 1), os.dup2(to, 2)
            torch.set_num_threads(1)
            if below:
                fd = os.open(calls, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                lib = ctypes.CDLL(os.environ['CYCLE_NB_FAULTS'])
                lib.faults_arm(os.fsencode(below) + b'/', ctypes.c_long(at), error, int(stays), fd)
            code = cycle_nb(args)
            sys.stdout.flush()
        except BaseException: traceback.print_exc(); code = 70
        finally: sys.stderr.flush(); os._exit(code)


CHANGES = {'date', 'commit', 'seconds', 'command', 'peak_memory_mb', 'device_memory_mb', 'new', 'folder', 'source', 'generator_file'}


def fixed(x):
    "What must be the same every time: no dates, durations, places."
    if isinstance(x, dict): return {k: fixed(v) for k, v in x.items() if k not in CHANGES}
    if isinstance(x, (list, tuple)): return [fixed(v) for v in x]
    if isinstance(x, torch.Tensor): return [str(x.dtype), list(x.shape), hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b'').hexdigest()]
    return x if isinstance(x, (int, float, str, bool, type(None))) else str(x)


def content(path):
    "A file's fixed content; 'damaged' when it cannot be read."
    try:
        if path.suffix == '.json': found = json.loads(path.read_text())
        elif path.suffix == '.jsonl': found = [json.loads(l) for l in path.read_text().splitlines()]
        elif path.suffix == '.pt': found = torch.load(path, weights_only=True)
        elif path.suffix == '.safetensors':
            with safe_open(path, 'pt') as f: found = [json.loads((f.metadata() or {}).get('card', '{}')), {k: f.get_tensor(k) for k in f.keys()}]
        else: found = path.read_bytes().hex()
    except Exception as e: return f'damaged: {type(e).__name__}'
    return hashlib.sha256(json.dumps(fixed(found), sort_keys=True).encode()).hexdigest()


REBUILT = 'record.json', 'metrics.jsonl'                   # made anew from the folders by every run


def tree(folder, all_=False): return {str(f.relative_to(folder)): content(f) for f in sorted(folder.rglob('*')) if f.is_file() and (all_ or not hidden(f, folder))}


def hidden(f, folder): return any(p.startswith('.') for p in f.relative_to(folder).parts)


def leftovers(folder): return [str(f.relative_to(folder)) for f in folder.rglob('*') if hidden(f, folder)]


def differing(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


def unsynced(calls):
    "Renames to a visible name of what had not reached the disk, of a log of writes."
    dirty, wrong = set(), []
    for what, path, to in calls:
        if what in ('open', 'write', 'truncate'): dirty.add(path)
        if what == 'fsync': dirty.discard(path)
        if what == 'unlink': dirty.discard(path)
        if what == 'rename':
            moved = {d for d in dirty if d == path or d.startswith(path + '/')}
            if moved and not Path(to).name.startswith('.') and not any(p.startswith('.') for p in Path(to).parts): wrong.append(f'{to}: {sorted(moved)[0]}')
            dirty = {to + d[len(path):] if d in moved else d for d in dirty}
    return wrong


def copy(a, b):
    shutil.rmtree(b, ignore_errors=True)
    if a.exists(): shutil.copytree(a, b, symlinks=True)
    else: b.mkdir(parents=True)
    return b


class World:
    "A bundle without training, some faces, and the four trainings of the tiny preset, done once."
    def __init__(self, folder):
        self.folder, self.log = Path(folder).resolve(), Path(folder).resolve()/'log'
        self.bundle, self.faces = write_bundle(self.folder/'bundle'), self.folder/'faces'
        self.faces.mkdir()
        for i, img in enumerate(render(sample_factors(6, torch.Generator().manual_seed(0)), 64)): save_image(img, self.faces/f'f{i}.png')
        self.n, self.trained = 0, {}

    def new(self):
        "An empty folder to work in."
        self.n += 1
        (d := self.folder/'runs'/str(self.n)).mkdir(parents=True)
        return d

    def invert(self, out, *more, n=4): return ['invert', *sorted(self.faces.iterdir())[:n], '--out', out, '--bundle', self.bundle, '--batch', 2, '--refine', 1, '--tune', 2, *more]

    def train(self, job, out, *more):
        "The command of a training: a part, or a part and a way of training it."
        part, _, way = job.partition(' ')
        how = dict(restyle=['--preset', 'torture', '--encoders', 'restyle'], pictures=['--images', self.pictures(), '--resolution', 32, '--total', 128])
        return ['train', part, '--out', out, *how.get(way, ['--preset', 'torture']), *more]

    def pictures(self):
        "A folder of as many pictures as a training on pictures takes."
        if not (to := self.folder/'pictures').exists():
            to.mkdir()
            for i, img in enumerate(render(sample_factors(100, torch.Generator().manual_seed(1)), 32)): save_image(img, to/f'p{i}.png')
        return to

    def before(self, job):
        "The folder of a bundle that has all that a training needs."
        part = job.split(' ')[0]
        to = self.folder/'before'/part
        if not to.exists():
            copy(self.bundle, to)
            made = dict(nets=('perceptual', 'identity', 'attributes'), generator=('generator',), directions=('directions',))
            for k in made.get(part, ('w', 'wplus', 'cycle')):
                for f in to.glob(f'{k}.*'): f.unlink()
        return to


MINUTES = math.inf


def within(each):
    "All of them, or as many as there are minutes for (`--minutes`)."
    end = time.time() + 60*MINUTES
    for x in each:
        if time.time() > end: return
        yield x


def tell(bar, job, found):
    "Print what was measured, as soon as it is."
    numbers = ', '.join(f'{v} {k}' for k, v in found.items() if k != 'wrong')
    print(f'{bar} {job}: {numbers}, {len(found["wrong"])} wrong', *(' '.join(str(w).split())[:700] for w in found['wrong'][:20]), sep='\n    ', flush=True)
    return found


# --- kill -9 ----------------------------------------------------------------------------------

def kill(world, rng, n, only=None):
    "Killed at random moments and gone on with: is the end the same, the record whole, nothing left over?"
    found = {}
    for job in ('invert', *PARTS):
        if not only or only in job: found[job] = tell('kill', job, kill_job(world, rng, n, job))
    return found


def kill_job(world, rng, n, job):
    args = (lambda out, *m: world.invert(out, '--edit', 'smile=2', *m)) if job == 'invert' else (lambda out, *m: world.train(job, out, *m))
    start = None if job == 'invert' else world.before(job)
    new = lambda: copy(start or Path('/nowhere'), world.new()/'out')
    whole = new()
    run = Run(args(whole), world.log, below=whole)
    want, wrong, killed, calls = tree(whole), [], 0, len(run.calls)
    if run.code: wrong.append(f'undisturbed: {run.text[-300:]}')
    wrong += [f'not synced: {w}' for w in unsynced(run.calls)]
    i = -1
    for i in within(range(n)):
        out, more = new(), []
        while not more or rng.random() < .4:                        # some are killed again while they go on
            how = dict(below=out, at=rng.randint(1, calls), error=-1) if i % 2 == 0 else dict(kill_after=rng.uniform(0, run.seconds))
            one = Run(args(out, *more), world.log, **how)
            killed, more = killed + (one.code is None), ['--resume']
            if 'Traceback' in one.text: wrong.append(f'{i}: {one.text[-300:]}')
        end = Run(args(out, *more), world.log)
        what = differing(want, tree(out))
        if end.code or what or leftovers(out): wrong.append(f'{i} {how}: code {end.code}, differ {what[:4]}, left {leftovers(out)[:3]}, {end.text[-300:]}')
        shutil.rmtree(out.parent)
    return dict(runs=i + 1, kills=killed, writes=calls, wrong=wrong)


# --- writes that fail -------------------------------------------------------------------------

def fault_jobs(world):
    "Name -> (what is there before, command, command that goes on, files that must never be lost)."
    b, jobs = world.bundle, {}
    few = lambda out, *m: ['invert', *sorted(world.faces.iterdir())[:2], '--out', out, '--bundle', b, '--batch', 2, '--refine', 0, '--tune', 0, '--edit', 'smile=2', *m]
    def earlier(out): return Run([*few(out)[:2], *few(out)[3:]], world.log)
    jobs['invert'] = earlier, lambda d: few(d/'out', '--resume'), None
    jobs['invert --overwrite'] = lambda out: Run(few(out), world.log), lambda d: few(d/'out', '--overwrite'), None
    demo = lambda d: ['demo', sorted(world.faces.iterdir())[0], '--out', d/'out', '--bundle', b, '--refine', 0, '--tune', 0, '--overwrite']
    jobs['demo'] = lambda out: Run(demo(out.parent), world.log), demo, None
    for p in PARTS:
        jobs[f'train {p}'] = (lambda out, p=p: copy(world.before(p), out)), (lambda d, p=p: world.train(p, d/'out')), (lambda d, p=p: world.train(p, d/'out', '--resume'))
    for kind in ('safetensors', 'pt'):
        conv = lambda d, k=kind: ['convert', world.folder/'wide.safetensors', d/'out'/f'g.{k}', '--overwrite']
        jobs[f'convert .{kind}'] = (lambda out, c=conv: Run(c(out.parent), world.log)), conv, None
    quality = lambda d: ['benchmark', 'quality', '--images', 2, '--methods', 'w,cycle', '--workers', 1, '--bundle', b, '--work', d/'out'/'work', '--out', d/'out'/'q.json', '--overwrite']
    gen = lambda d: ['benchmark', 'generator', '--images', 50, '--bundle', b, '--out', d/'out'/'g.json', '--overwrite']
    if (cache_dir()/RUNTIME).is_file():                                # `cycle-nb export-web --fetch` puts it there
        web = lambda d: ['export-web', sorted(world.faces.iterdir())[0], '--out', d/'out', '--bundle', b, '--refine', 0, '--tune', 0, '--overwrite']
        jobs['export-web'] = lambda out: Run(web(out.parent), world.log), web, None
    jobs['benchmark quality'] = lambda out: (out/'q.json').write_text('{"earlier": 1}\n'), quality, None
    jobs['benchmark generator'] = lambda out: (out/'g.json').write_text('{"earlier": 1}\n'), gen, None
    return jobs


def faults(world, rng, n, only=None):
    "Every write call of every command fails once: one line, earlier results there, the next run ends well."
    from cycle_nb.models import save_model
    from cycle_nb.stylegan2 import Generator
    torch.manual_seed(0)
    save_model(Generator(8, z_dim=512, w_dim=512, num_mapping=1, channels=[512, 512]), world.folder/'wide.safetensors')
    return {k: tell('faults', k, fault_job(world, rng, n, *job)) for k, job in fault_jobs(world).items() if not only or only in k}


def kind_of(call):
    "A write call without the digits and chance in its names: the same place in the program."
    return (call[0], *(re.sub(r'[0-9a-f]{6,}|[0-9]+|(?<=work-)[^/]+', '#', p.split('/out/', 1)[-1]) for p in call[1:]))


def spread_out(each, n, rng, kind):
    "`n` of them by chance, those whose kind has not been taken yet before the others."
    seen, first, rest = set(), [], []
    for e in rng.sample(each, len(each)):
        (rest if kind(e) in seen else first).append(e)
        seen.add(kind(e))
    return (first + rest)[:n]


def fault_job(world, rng, n, prepare, command, again):
    start = world.new()/'start'
    start.mkdir()
    prepare(start)
    had = tree(start)
    d = world.new()
    copy(start, d/'out')
    run = Run(command(d), world.log, below=d/'out')
    want, wrong = tree(d/'out'), []
    if run.code: return dict(calls=len(run.calls), wrong=[f'undisturbed: {run.text[-600:]}'])
    wrong += [f'not synced: {w}' for w in unsynced(run.calls)]
    each = spread_out([(name, at) for name in FAULTS for at in range(1, len(run.calls) + 1)], n, rng, lambda f: (f[0], kind_of(run.calls[f[1] - 1])))
    done = []
    for name, at in within(each):
        done.append(at)
        copy(start, d/'out')
        one = Run(command(d), world.log, below=d/'out', at=at, error=getattr(errno, name), stays=FAULTS[name])
        now = tree(d/'out')
        where = f'{name} at {at} ({" ".join(run.calls[at - 1][:2]).replace(str(d), "")})'
        whole = {k.split('/whole/')[1]: v for k, v in tree(d/'out', True).items() if '/whole/' in k}     # the next run brings it to its place
        lost = [k for k, v in had.items() if now.get(k, whole.get(k)) not in (v, want.get(k)) and k not in REBUILT]
        if 'Traceback' in one.text or one.code not in (0, 2): wrong.append(f'{where}: traceback {one.code} {one.signal} {one.text[-500:]}')
        elif one.code == 2 and len(one.lines) != 1: wrong.append(f'{where}: {len(one.lines)} lines {one.lines}')
        if one.code == 0 and differing(now, want): wrong.append(f'{where}: said to be done, differs in {differing(now, want)[:4]}')
        if lost: wrong.append(f'{where}: lost {lost[:4]}')
        end = Run((again or command)(d), world.log)
        if end.code or differing(tree(d/'out'), want) or leftovers(d/'out'):
            wrong.append(f'{where}: then code {end.code}, differs {differing(tree(d/"out"), want)[:4]}, left {leftovers(d/"out")[:4]} {end.text[-300:]}')
    shutil.rmtree(d), shutil.rmtree(start.parent)
    kinds = {kind_of(c) for c in run.calls}
    return dict(calls=len(run.calls), possible=len(FAULTS)*len(run.calls), tried=len(done), kinds=len(kinds), kinds_tried=len({kind_of(run.calls[at - 1]) for at in done}), seconds=round(run.seconds, 2), wrong=wrong)


# --- damage -----------------------------------------------------------------------------------

STRANGE = None, -1, 0, 1e308, float('nan'), float('inf'), '', 'x', '\0', '../..', [], {}, [None], {'a': 1}, True, 2**63, 'x'*5000


def spoil_json(text, rng):
    "A value, or a key, somewhere in it becomes another."
    top = at = json.loads(text)
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        k = rng.choice(list(keys))
        if not isinstance(at[k], (dict, list)) or not at[k] or rng.random() < .4: break
        at = at[k]
    if rng.random() < .3: del at[k]
    else: at[k] = rng.choice(STRANGE)
    return json.dumps(rng.choice([top]*30 + list(STRANGE))).encode()


def spoil_tensors(file, rng):
    "A tensor becomes another: not a number, other sizes, other kind, gone, another name."
    with safe_open(file, 'pt') as f: card, t = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    k = rng.choice(list(t))
    x = t.pop(k)
    big = x.clone().float()
    if big.numel(): big.view(-1)[rng.randrange(big.numel())] = rng.choice((float('nan'), float('inf'), -float('inf'), 1e38, -3e38))
    news = [big, big.half(), x[:-1] if x.ndim and len(x) else x.new_zeros(3), x[None], x.flatten()[:0], x.double(), (x*0 - 1).to(x.dtype), x.to(torch.int64),
            x.transpose(0, -1).contiguous() if x.ndim > 1 else x[None], torch.zeros(0), torch.tensor(7.), x.bool()]
    if rng.random() < .8: t[rng.choice((k, k, k, k, k + 'x'))] = rng.choice(news)
    return safetensors_bytes(t, card)


def spoil(folder, rng):
    "Damage one file of a folder in one of many ways; gives what was done."
    f = rng.choice([f for f in sorted(folder.rglob('*')) if f.is_file()])
    data, how = f.read_bytes(), rng.choice(('bytes', 'content', 'content', 'content', 'gone', 'empty', 'folder', 'link', 'swap'))
    if how == 'content' and f.suffix == '.json': f.write_bytes(spoil_json(data, rng))
    elif how == 'content' and f.suffix == '.safetensors': f.write_bytes(spoil_tensors(f, rng))
    elif how in ('bytes', 'content'):
        d = bytearray(data)
        for k in rng.choices(fuzz_formats.DAMAGE, k=rng.choice((1, 1, 2, 3))):
            if d: k(d, rng)
        f.write_bytes(d)
    elif how == 'empty': f.write_bytes(b'')
    elif how == 'swap': f.write_bytes(rng.choice([g for g in sorted(folder.rglob('*')) if g.is_file()]).read_bytes())
    else:
        f.unlink()
        if how == 'folder': f.mkdir()
        if how == 'link': f.symlink_to(folder/'nowhere')
    return f'{f.relative_to(folder)} {how}'


def one_line(e, folder): return str(folder) in str(e) and '\n' not in str(e) and len(str(e)) < 1500


def finite(inv, name='smile'):
    "Whether every number of an inversion, and of an edit, is one."
    all_ = [inv.wp, inv.img, inv.target, *inv.images_by_step.values(), *inv.codes_by_step.values(), inv.edit(name, 1.), inv.edit(name, -1., tuned=False)]
    rows = [v for m in inv.metrics for v in m.values() if isinstance(v, float)]
    return all(bool(t.isfinite().all()) for t in all_) and all(map(math.isfinite, rows)) and repr(inv)


def damaged(start, folder, rng, n, use):
    "Use so many damaged copies of a folder: how many gave one line, how many a result, what went wrong."
    found, wrong, where = dict(tried=0, lines=0, results=0), [], folder/'copy'
    for i in within(range(n)):
        found['tried'] += 1
        copy(start, where)
        what = spoil(where, rng)
        try:
            good = use(where)
            if good: found['results'] += 1
            else: wrong.append(f'{i} {what}: not finite')
        except InputError as e:
            found['lines'] += 1
            if not one_line(e, where): wrong.append(f'{i} {what}: unclear: {e}')
        except Exception as e: wrong.append(f'{i} {what}: {type(e).__name__}: {e} {traceback.format_exc()[-300:]}')
    return found | dict(wrong=wrong)


def results(world, rng, n, only=None):
    "Damaged folders of results: loaded and edited; some are gone on with, and must be whole again."
    out, G = world.new()/'out', load_bundle(world.bundle)
    if (run := Run(world.invert(out, '--edit', 'smile=2', n=2), world.log)).code: return dict(results=dict(wrong=[run.text[-300:]]))
    found = dict(loaded=tell('results', 'loaded', damaged(out, world.new(), rng, n, lambda d: finite(Inversion.load(d, rng.choice((G, None)))))))
    want, wrong, healed, where = tree(out), [], max(1, n//40), world.new()/'copy'
    i = -1
    for i in within(range(healed)):
        copy(out, where)
        what = spoil(where, rng)
        one = Run(world.invert(where, '--edit', 'smile=2', '--resume', n=2), world.log)
        now, other = tree(where), [k for k in want if '/' in k and not k.startswith(what.split('/')[0] + '/')]     # made again alone, it may round otherwise
        whole = now.keys() == want.keys() and len(Inversion.load(where, G)) == 2 and all(now[k] == want[k] for k in other) if one.code == 0 else True
        if 'Traceback' in one.text or one.code not in (0, 2) or not whole: wrong.append(f'{i} {what}: {one.code} {differing(want, tree(where))} {one.text[-300:]}')
    return found | dict(resumed=tell('results', 'resumed', dict(tried=i + 1, wrong=wrong)))


def bundles(world, rng, n, only=None):
    "Damaged bundles: one image is inverted and edited."
    img = render(sample_factors(1, torch.Generator().manual_seed(3)), 64)
    def use(d):
        if not (d/'perceptual.safetensors').is_file(): raise InputError(f'{d}: LPIPS would be fetched in its place; a test has no network')
        b = load_bundle(d)
        if b.directions and 'smile' not in b.directions: raise InputError(f'{d}: the other edits are there; the line names them, not the folder')
        return finite(invert(img, b, refine=0, tune=0))
    return dict(bundles=tell('bundles', 'used', damaged(world.bundle, world.new(), rng, n, use)))


def images(world, rng, n, only=None):
    "Damaged image files of every format: one line, or a picture."
    good, folder, found, wrong = {}, world.new(), dict(tried=0, lines=0, pictures=0), []
    for kind, mode in (('png', 'RGBA'), ('png', 'P'), ('png', 'I;16'), ('jpg', 'CMYK'), ('jpg', 'RGB'), ('webp', 'RGB'), ('gif', 'P'), ('bmp', 'RGB'), ('tif', 'F'), ('tif', 'RGB'), ('ppm', 'RGB'), ('jp2', 'RGB'), ('avif', 'RGB')):
        im = to_pil(render(sample_factors(1, torch.Generator().manual_seed(0)), 32)[0])
        im = Image.fromarray(np.asarray(im.convert('L')).astype('u2')*200) if mode == 'I;16' else im.convert(mode)
        with contextlib.suppress(Exception): im.save(folder/f'{mode[0]}.{kind}'); good[f'{mode[0]}.{kind}'] = (folder/f'{mode[0]}.{kind}').read_bytes()
    for i in within(range(n)):
        found['tried'] += 1
        name, kinds = rng.choice(sorted(good)), rng.choices(fuzz_formats.DAMAGE, k=rng.choice((1, 1, 2, 3)))
        d = bytearray(good[name])
        for k in kinds:
            if d: k(d, rng)
        (folder/name).write_bytes(d)
        try:
            x = to_tensor(read_image(folder/name), 64)
            found['pictures'] += 1
            if x.shape != (3, 64, 64) or not x.isfinite().all(): wrong.append(f'{i} {name}: {x.shape}')
        except InputError as e:
            found['lines'] += 1
            if not one_line(e, folder): wrong.append(f'{i} {name}: unclear: {e}')
        except BaseException as e: wrong.append(f'{i} {name}: {type(e).__name__}: {e}')
    return dict(images=tell('images', f'{len(good)} formats', found | dict(wrong=wrong)))


def checkpoints(world, rng, n, only=None):
    "Damaged checkpoints of every layout, by `fuzz_formats`; and damaged folders of a training that is gone on with."
    r = fuzz_formats.run(world.new(), n, rng.randrange(2**30))
    found = dict(foreign=tell('checkpoints', 'foreign', dict(tried=n, lines=r['errors'], models=r['models'], wrong=r['wrong'])))
    if only: return found
    out, where, wrong, counts = copy(world.before('nets'), world.new()/'out'), world.new()/'copy', [], [0, 0]
    Run(world.train('nets', out), world.log)
    want = tree(out)
    for i in within(range(max(1, n//100))):
        copy(out, where)
        what = spoil(where/'work', rng)
        for k in ('perceptual', 'identity'): (where/f'{k}.safetensors').unlink(missing_ok=True)
        one = Run(world.train('nets', where, '--resume'), world.log)
        if 'Traceback' in one.text or one.code not in (0, 2) or one.code == 2 and len(one.lines) != 1: wrong.append(f'{i} {what}: {one.code} {one.text[-400:]}')
        elif not one.code and (d := [k for k in differing(want, tree(where)) if k.endswith('.safetensors')]): wrong.append(f'{i} {what}: other networks {d}')
        else: counts[one.code == 0] += 1
    return found | dict(training=tell('checkpoints', 'of a training', dict(tried=sum(counts) + len(wrong), lines=counts[0], ends=counts[1], wrong=wrong)))


# --- many -------------------------------------------------------------------------------------

def memory(of='VmRSS'): return int(re.search(rf'{of}:\s*(\d+)', Path('/proc/self/status').read_text())[1])/1024


def forked(f):
    "What a function gives in a process of its own."
    to, from_ = os.pipe()
    if not (pid := os.fork()):
        try: answer = f()
        except BaseException: answer = dict(wrong=[traceback.format_exc()[-500:]])
        os.write(from_, json.dumps(answer).encode()); os._exit(0)
    os.close(from_)
    with open(to, 'rb') as r: data = r.read()
    os.waitpid(pid, 0)
    return json.loads(data)


def many(world, rng, n, only=None):
    "So many images, one step each: does the memory grow?"
    d, seen = world.new(), []
    (d/'in').mkdir()
    data = (world.faces/'f0.png').read_bytes()
    for i in range(n): (d/'in'/f'{i:07d}.png').write_bytes(data + str(i).encode())
    def work():
        torch.set_num_threads(1)
        start = time.time()
        record = invert_files([d/'in'], d/'out', world.bundle, 'cycle', on_batch=lambda inv: seen.append(memory()), batch=10, refine=0, tune=0)
        growth = max(seen) - max(seen[:max(1, len(seen)//10)])
        right = record['images'] == record['new'] == n
        return dict(images=n, growth_mb=round(growth, 1), seconds=round(time.time() - start), wrong=[] if right and growth <= 50 else [f'{record["images"]} images, {growth:.0f} MB'])
    return dict(many=tell('many', 'images', forked(work)))


def names(world, rng, n, only=None):
    "So many files, some of whose names meet: the memory that planning takes."
    d = world.new()
    (d/'in').mkdir()
    for i in range(n): os.close(os.open(d/'in'/(f'IMG_{i:07d}.png' if i % 100 else f'img_{i + 1:07d}.PNG'), os.O_CREAT))
    out = d/'out'
    out.mkdir()
    def work():
        before, start = memory(), time.time()
        paths = folder_inversion._find_files([d/'in'], [])
        odd = folder_inversion._assign_folders(paths, out)
        took = memory('VmHWM') - before
        different = len({hash((odd.get(p) or folder_inversion._name_of(p)).lower()) for p in paths}) == n
        return dict(files=n, renamed=len(odd), mb=round(took, 1), seconds=round(time.time() - start), wrong=[] if different and took <= 200 else [f'{took:.0f} MB, different {different}'])
    return dict(names=tell('names', 'planned', forked(work)))


# --- all of it --------------------------------------------------------------------------------

BARS = dict(kill=(kill, 50, 1), faults=(faults, 10**9, 2), results=(results, 1000, 10), bundles=(bundles, 1000, 3), images=(images, 5000, 100),
            checkpoints=(checkpoints, 5000, 40), many=(many, 10_000, 30), names=(names, 1_000_000, 20_000))    # all, and a sample


def keep(file, name, run):
    "Put a run of one bar into the record: in the place of the one with its seed and job, beside all others."
    record = json.loads(file.read_text()) if file.exists() else {}
    others = [r for r in record.get(name, []) if any(r.get(k) != run.get(k) for k in ('seed', 'job'))]
    record[name] = others + [run]
    write_json({k: record[k] for k in BARS if k in record}, file)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='*', choices=BARS, default=list(BARS))
    p.add_argument('--share', type=float, default=1., help='of the full sizes')
    p.add_argument('--sample', action='store_true', help='a small piece of each bar, as the test suite does')
    p.add_argument('--n', type=int, help='instead: so many of each')
    p.add_argument('--minutes', type=float, default=math.inf, help='for each command or kind: as many as this allows')
    p.add_argument('--job', help='only commands with this in their names')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='a record (JSON); what other runs gave stays in it')
    a, bad = p.parse_args(), 0
    globals()['MINUTES'] = a.minutes
    hurry()
    if a.sample: a.job = a.job or 'invert'
    memory_disk = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None         # where an fsync takes no time
    with tempfile.TemporaryDirectory(prefix='cycle_nb-torture-', dir=memory_disk) as folder:
        world = World(folder)
        for name in a.only:
            f, full, sample = BARS[name]
            start, n, rng = time.time(), a.n or (sample if a.sample else max(1, round(full*a.share))), random.Random(f'{a.seed} {name}')
            card = make_card('torture', seed=a.seed)
            found = f(world, rng, n, **(dict(only=a.job) if a.job else {}))
            bad += sum(len(r['wrong']) for r in found.values())
            print(f'{name}: {time.time() - start:.0f} s', flush=True)
            if a.out: keep(a.out, name, card | dict(job=a.job, asked=full, at_most=n, seconds=round(time.time() - start), found=found))
    return bool(bad)


if __name__ == '__main__': sys.exit(main())
