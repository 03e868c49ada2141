"""Damage checkpoint files in many ways and load them: each must give a clear error or a model that works.

    python tests/fuzz_formats.py --n 10000 --seed 0 [--out record.json]
"""
import argparse, io, json, os, pickle, random, struct, sys, tempfile, time, zipfile
from collections import Counter
from pathlib import Path
import numpy as np
import torch
from safetensors.torch import save_file
from cycle_nb.core import InputError
from cycle_nb.models import make_card, save_model
from cycle_nb.stylegan2 import Generator
from cycle_nb.archives import read_checkpoint
from cycle_nb.checkpoints import load_generator, read_directions
import layouts

HOSTILE = (b'cos\nsystem\n(X\x05\x00\x00\x00touch ran\x85tR', b'cbuiltins\neval\n', b'cposix\nsystem\n', b'\x8c\x02os\x8c\x06system\x93', b'R', b'b', b'\x81', b'o', b'(', b't', b'2\x86' * 20,
           b'\x8e' + b'\xff' * 8, b'\x8b\xff\xff\xff\x7f', b'r\xff\xff\xff\xff', b'j\xff\xff\xff\xff', b'X\xff\xff\xff\xff', b'Q', b'P0\n', b'0', b'.', b'}', b']', b'ctorch\nload\n', b'\x97')

def seeds(folder):
    "One small file of every format."
    t, r, mean = layouts.nvidia(16, [4, 3, 5]), layouts.rosinality(16, [4, 3, 5]), torch.ones(16)
    layouts.write_pkl(folder/'n.pkl', t, clamp=2.)
    torch.save(t, folder/'n.pt')
    save_file(t, folder/'n.safetensors')
    layouts.write_pt(folder/'r.pt', r, mean)
    layouts.write_pt(folder/'legacy.pt', r, mean, legacy=True)
    layouts.write_psp(folder/'psp.pt', r, mean, 6, namespace=True)
    save_model(Generator(16, 16, 16, 2, channels=[4, 3, 5]), folder/'ours.safetensors', make_card('generator'), half=False)
    (folder/'ours.json').unlink()
    d = torch.randn(3, 16)
    np.save(folder/'directions.npy', d.numpy())
    np.savez(folder/'directions.npz', lat_comp=d.numpy(), lat_stdev=np.ones(3, 'f'))
    np.savez_compressed(folder/'directions2.npz', a=d.numpy(), b=d[0].numpy())
    torch.save({'comp': d, 'std': torch.ones(3)}, folder/'directions.pt')
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}

def flip(d, rng):
    i = rng.randrange(len(d))
    d[i] ^= 1 << rng.randrange(8)

def flips_in_front(d, rng):
    "Where the structure is."
    for _ in range(rng.randrange(1, 6)): d[rng.randrange(min(len(d), 3000))] = rng.randrange(256)

def truncate(d, rng): del d[rng.randrange(len(d)):]

def cut(d, rng):
    i = rng.randrange(len(d))
    del d[i:i + rng.randrange(1, 200)]

def insert(d, rng): d[(i := rng.randrange(len(d))):i] = rng.choice(HOSTILE)

def overwrite(d, rng):
    op, i = rng.choice(HOSTILE), rng.randrange(len(d))
    d[i:i + len(op)] = op

def double(d, rng):
    i, j, n = rng.randrange(len(d)), rng.randrange(len(d)), rng.randrange(1, 300)
    d[j:j] = d[i:i + n]

def number(d, rng):
    "Some four or eight bytes become a large or negative number."
    i, n = rng.randrange(max(len(d) - 8, 1)), rng.choice((4, 8))
    d[i:i + n] = rng.choice((b'\xff' * n, b'\0' * n, b'\xff' * (n - 1) + b'\x7f', struct.pack('<q', rng.choice((2**31, 2**40, 1, 65536)))[:n]))

def rename(d, rng):
    "One of the names in the file changes, everywhere or once."
    words = b'weight', b'conv1', b'mapping', b'synthesis', b'torgb', b'style', b'to_rgbs', b'g_ema', b'G_ema', b'decoder', b'F32', b'Storage', b'data.pkl', b'storage', b'shape', b'torch', b'_modules', b'class_name'
    w, new = rng.choice(words), bytes(rng.choice(b'abcxyz_.0') for _ in range(6))
    d[:] = bytes(d).replace(w, (new * 3)[:len(w)], rng.choice((1, -1)))

def digits(d, rng):
    "A digit in the table of a file changes: a shape, an offset, a layer's number."
    where = [i for i, c in enumerate(d[:4000]) if 48 <= c < 58]
    if where: d[rng.choice(where)] = rng.choice(b'0123456789')

DAMAGE = flip, flips_in_front, truncate, cut, insert, overwrite, double, number, rename, digits

def outcome(path, name):
    "'error', 'model' or what went wrong."
    try: G = (read_directions if name.startswith('directions') else load_generator)(path)
    except InputError as e: return 'error' if str(e).startswith(str(path)) and '\n' not in str(e) else f'unclear: {e}'
    except BaseException as e: return f'{type(e).__name__}: {e}'
    if isinstance(G, dict): return 'model' if G and all(d.isfinite().all() for d in G.values()) else 'broken directions'
    with torch.no_grad(): img = G(torch.zeros(1, G.z_dim), .5)
    return 'model' if img.shape[2:] == (G.resolution,) * 2 and all(t.isfinite().all() for t in G.state_dict().values()) else 'broken model'

def one(path, name, data, rng, read_too):
    d, kinds = bytearray(data), rng.choices(DAMAGE, k=rng.choice((1, 1, 2, 3)))
    for k in kinds:
        if d: k(d, rng)
    path.write_bytes(d)
    t, what = time.time(), outcome(path, name)
    if read_too:
        try: read_checkpoint(path)
        except InputError: pass
        except BaseException as e: what = f'read_checkpoint: {type(e).__name__}: {e}'
    seconds = time.time() - t
    return (what if seconds < 20 else f'took {seconds:.0f} s'), seconds, '+'.join(k.__name__ for k in kinds)

def run(folder, n, seed):
    "A record of `n` damaged files; `wrong` lists what should not have happened."
    folder = Path(folder)
    (folder/'seeds').mkdir(), (folder/'here').mkdir()
    good, rng, counts, wrong, slowest = seeds(folder/'seeds'), random.Random(seed), Counter(), [], (0,)
    old, per = os.getcwd(), {}
    os.chdir(folder/'here')
    try:
        for i in range(n):
            name = rng.choice(list(good))
            what, seconds, kinds = one(folder/'here'/'file', name, good[name], rng, i % 3 == 0)
            counts[what if what in ('error', 'model') else 'wrong'] += 1
            per.setdefault(name, Counter())[what[:40]] += 1
            slowest = max(slowest, (round(seconds, 2), i, name, kinds))
            if what not in ('error', 'model') or os.listdir() != ['file']: wrong.append((i, name, kinds, what[:200], os.listdir()))
    finally: os.chdir(old)
    return dict(files=n, seed=seed, errors=counts['error'], models=counts['model'], wrong=wrong, slowest=slowest, per_format={k: dict(v) for k, v in per.items()})

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--n', type=int, default=10_000)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder: record = run(folder, a.n, a.seed)
    record |= dict(seconds=round(time.time() - start), python=sys.version.split()[0], torch=torch.__version__)
    print(json.dumps(record, indent=1))
    if a.out: a.out.write_text(json.dumps(record, indent=1) + '\n')
    return bool(record['wrong'])

if __name__ == '__main__': sys.exit(main())
