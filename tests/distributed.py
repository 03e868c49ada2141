"""The trainings of the package on tiny networks, alone or in several processes; what `test_distributed.py` starts.

    python tests/distributed.py losses OUT                      numbers and states of every training, alone
    torchrun --nproc-per-node 2 tests/distributed.py losses OUT
    python tests/distributed.py accidents OUT                   forked processes: killed, gone on with, refused; a folder shared
    python tests/distributed.py speed [--batch 32]              images a second of one process, and of two of one thread each
"""
import argparse, json, os, shutil, signal, socket, subprocess, sys, tempfile, time, traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import torch
from cycle_nb import core, sdfaces, train_encoder, train_features, train_generator
from cycle_nb.core import joined_processes, joined_share, make_rng, process_share
from cycle_nb.features import Identity, Perceptual
from cycle_nb.bundle import load_bundle
from cycle_nb.cli import main as cycle_nb
from cycle_nb.files import save_image
from cycle_nb.folder_inversion import invert_files
from cycle_nb.gan import Discriminator
from cycle_nb.learner import AtSteps, Checkpoint, Recorder, fit
from cycle_nb.schedule import Schedule, w_only
from cycle_nb.sdfaces import render, sample_factors
from cycle_nb.stylegan2 import Generator
from cycle_nb.train_generator import AdversarialTask, PairBank, RegressionTask, random_batches
from tiny import BODY, write_bundle

BATCH = 4                   # two images for each of two processes: groups of four reach over both


def way(n):
    "Every phase of the cycle in n steps."
    return Schedule(offsets=5, expand_from=n//5, expand_every=1, regularise_from=n//2, regularise_every=1, retract_from=3*n//5, retract_every=1, steps=n, cooldown=1)


FOUND = {}


def listen(module, original=fit):
    "Have a module's trainings note the numbers of every step, and their state at the end."
    def noting(task, steps, callbacks=()):
        log = Recorder(1)
        original(task, steps, [*callbacks, log])
        FOUND.setdefault(type(task).__name__, []).append((log.rows, task.state()))
        return task
    module.fit = noting


def networks(res=16):
    "A generator, its discriminator, feature networks in evaluation."
    torch.manual_seed(0)
    G = Generator(res, z_dim=32, w_dim=16, channel_base=128, channel_max=16, lr_mul=.1)
    nets = Perceptual(**BODY).eval(), Identity(**BODY).eval()
    return G, Discriminator(res, channel_base=128, channel_max=16), nets


def pairs_and(res=16): return PairBank(32, res, z_dim=32), *networks(res)


def adversarial(steps, batch=BATCH):
    "All that this training can do: anchor, R1 and R2, path lengths, mixing, steps of the discriminator alone, EMA."
    pairs, G, D, nets = pairs_and()
    return AdversarialTask(G, D, pairs, steps, batch, anchor=1., distance=nets[0], alone=2, r_every=4, path_every=3, cool=.3, rise=8)


def run_all(shared, work, steps, everything):
    "Every kind of training once, or those whose rounding stays small; `work` is each process's own disk."
    pairs, G, D, nets = pairs_and()
    train_generator.train_generator(RegressionTask(G, pairs, nets[0], steps, batch=BATCH), work/'regression')
    train_generator.train_generator(adversarial(steps), work/'adversarial')
    faces = random_batches(pairs.img)
    common = dict(validation=faces(4, make_rng(0)), batch=BATCH if everything else 16, optimizer='adam' if everything else 'ranger')
    train_encoder.train_cycle(G, nets, faces, way(steps), work/'cycle', synthetic_fraction=.5, adversary=dict(pool=6), **common)
    if not everything: return
    train_encoder.train_restyle(G, nets, faces, way(2*steps), work/'restyle', passes=2, **common)
    train_features.train_nets(shared/'nets', shared/'nets', steps, steps, 32, 4, 4, BATCH, 4, 8, body=BODY)


def losses(out):
    "Numbers of every step of every training, and the states at their ends, into a file: in float32, then in float64."
    torch.set_num_threads(1)
    core.has_bf16 = lambda device: False                                  # three digits would hide what is looked for
    for m in (train_features, train_generator, train_encoder): listen(m)
    with joined_processes():
        for kind, steps in dict(float32=20, float64=10).items():
            torch.set_default_dtype(getattr(torch, kind))
            if kind == 'float64':
                torch.Tensor.float = torch.Tensor.double
                for m in (train_features, sdfaces): m.sample_factors = lambda *a, **k: sample_factors(*a, **k).double()
            with tempfile.TemporaryDirectory() as work:
                run_all(out, Path(work), steps, kind == 'float64')
                files = sorted(f.relative_to(work).as_posix() for f in Path(work).rglob('*.*') if f.is_file())
            torch.save(dict(found=FOUND, files=files), out/f'{kind}-{joined_share()[0]}.pt')
            FOUND.clear()


# --- processes that this one forks, told by the variables that every launcher sets ------------

def forked(work, n, out, timeout=60):
    "Run `work()` in n processes; exit codes (negative: killed by that signal) and what each wrote on its error stream."
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    pids = []
    for k in range(n):
        if pid := os.fork(): pids.append(pid); continue
        os.environ |= dict(RANK=str(k), WORLD_SIZE=str(n), LOCAL_RANK=str(k), MASTER_ADDR='localhost', MASTER_PORT=str(port))
        os.dup2(os.open(f'{out}.{k}', os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
        try: code = work() or 0
        except core.InputError as e: print('cycle-nb:', e, file=sys.stderr); code = 2
        except BaseException: traceback.print_exc(); code = 70
        finally: sys.stdout.flush(), sys.stderr.flush(), os._exit(code)
    end, codes = time.time() + timeout, {}
    while len(codes) < n and time.time() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid: codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    for p in pids:
        if p not in codes: os.kill(p, signal.SIGKILL); os.waitpid(p, 0)          # it hung: no exit code
    return [[codes.get(p), Path(f'{out}.{k}').read_text()] for k, p in enumerate(pids)]


def train(folder, steps=10, batch=BATCH, kill=None):
    "An adversarial training with checkpoints; one of its processes is killed in the seventh step."
    def work():
        die = lambda task: os.kill(os.getpid(), signal.SIGKILL) if process_share()[0] == kill else None
        fit(adversarial(30, batch), steps, [Checkpoint(folder/'state.pt', 5), Recorder(1, path=folder/'log.jsonl'), AtSteps({7: die})])
    return work


def invert_shared(bundle, files, out, *more):
    "`cycle-nb invert`, as a launcher starts it."
    return lambda: cycle_nb([*map(str, ['invert', *files, '--out', out, '--bundle', bundle]), '--batch', '2', '--refine', '0', '--tune', '0', *more])


def accidents(out):
    "What becomes of it, as JSON."
    torch.set_num_threads(1)
    core.has_bf16 = lambda device: False
    found = {}
    for name, n, kw in [('whole', 2, {}), ('kill 0', 2, dict(kill=0)), ('kill 1', 2, dict(kill=1)), ('again 0', 2, {}), ('again 1', 1, {}), ('odd', 2, dict(batch=2))]:
        found[name] = forked(train(out/name.replace('again', 'kill'), **kw), n, out/'errors')
    bundle = write_bundle(out/'bundle')
    for i, img in enumerate(render(sample_factors(5, make_rng(0)), 64)): save_image(img, out/f'faces{i % 2}'/f'{i//2}.png')          # the same names twice
    (out/'faces0'/'damaged.png').write_text('no picture')
    files = [out/'faces0', out/'faces1']
    found['invert'] = forked(invert_shared(bundle, files, out/'shared'), 2, out/'errors')
    shutil.copy(out/'shared'/'record.json', out/'first.json')
    found['invert again'] = forked(invert_shared(bundle, files, out/'shared', '--resume'), 3, out/'errors')
    found['invert alone'] = forked(invert_shared(bundle, files, out/'alone'), 1, out/'errors')
    (out/'found.json').write_text(json.dumps(found))


# --- speed ------------------------------------------------------------------------------------

def speed(batch, steps):
    """Images a second of an encoder's and of a generator's training at 64 px, and of the inversion of files, one thread a process: one process,
    two that share each batch (or the files), and two that know nothing of each other (half of it each). The last is what this machine's cores can give."""
    def rates(kind, batch, n=1, at_once=1):
        run = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), __file__, 'rate', kind, '--batch', str(batch), '--steps', str(steps)]
        with tempfile.TemporaryDirectory() as work:
            started = [subprocess.Popen([*run, '--work', f'{work}/{k}'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1')) for k in range(at_once)]
            said = [p.communicate() for p in started]
        assert not any(p.returncode for p in started), said[0][1][-2000:]
        return sum(float(out.splitlines()[-1]) for out, _ in said)
    for kind in ('encoder', 'generator', 'inversion'):
        one, two, apart = rates(kind, batch), rates(kind, batch, 2), rates(kind, batch//2, 1, 2)
        print(f'{kind}: one process {one:.1f} images/s, two {two:.1f}: {two/one:.2f} times; two apart {apart:.1f}: {apart/one:.2f} times', flush=True)


def rate(kind, batch, steps, work):
    "Print images a second, without the first steps."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind == 'inversion': return inversion_rate(work, batch)
    G, nets = Generator(64, z_dim=32), (Perceptual().eval(), Identity().eval())
    pairs = PairBank(64, 64, z_dim=32)
    if kind == 'encoder': task = train_encoder.start_task(G, nets, random_batches(pairs.img), w_only(way(10)), batch=batch)
    else: task = AdversarialTask(G, Discriminator(64), pairs, 10**6, batch)
    class Clock:
        def after_step(self, task, logs):
            if task.step == 3: self.start = time.time()
            self.seconds = task.step > 3 and time.time() - self.start
    fit(task, steps + 3, [clock := Clock()])
    if not process_share()[0]: print(steps*batch/clock.seconds)


def inversion_rate(folder, n, batch=8):
    "Files a second, with refinement and tuning by the shipped networks; of several processes the last one's end counts."
    own = folder/f'faces-{process_share()[0]}'                    # the same pictures for each process
    for i, img in enumerate(render(sample_factors(n, make_rng(0)), 64)): save_image(img, own/f'{i:03d}.png')
    bundle = load_bundle('sdfaces64')
    with joined_processes():
        core.wait_for_all()
        start = time.time()
        invert_files([own], folder/'out', bundle, batch=batch, refine=2, tune=10)
        core.wait_for_all()
    if not process_share()[0]: print(n/(time.time() - start))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['losses', 'accidents', 'speed', 'rate'])
    p.add_argument('where', nargs='?')
    p.add_argument('--steps', type=int, default=16)
    p.add_argument('--batch', type=int, default=32)
    p.add_argument('--work', type=Path, help='of `rate`: where its files go')
    a = p.parse_args()
    if a.what == 'losses': losses(Path(a.where))
    if a.what == 'accidents': accidents(Path(a.where).resolve())
    if a.what == 'speed': speed(a.batch, a.steps)
    if a.what == 'rate': rate(a.where, a.batch, a.steps, a.work)
