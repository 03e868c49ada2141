"Other people's checkpoints: images against independent computations, round trips, memory, hostile and damaged files."
import http.server, io, json, os, pickle, struct, subprocess, sys, threading, zipfile
from pathlib import Path
import numpy as np
import pytest, torch
from safetensors.torch import save_file
from cycle_nb.core import InputError
from cycle_nb.download import PUBLISHED, download
from cycle_nb.models import save_model
from cycle_nb.stylegan2 import Generator, num_channels
from cycle_nb.unpickle import PickledObject
from cycle_nb.archives import describe_contents, read_checkpoint
from cycle_nb.checkpoints import LAYOUTS, clamp_usage, convert, export_state_dict, layout_misfits, load_generator
import fuzz_formats, layouts
from conftest import ROOT

def z_of(n, dim, seed=9): return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))

def same(a, b):
    "Bit for bit."
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

@torch.no_grad()
def agrees(G, z, want, psi):
    y = G(z, psi)
    assert y.shape == want.shape and want.std() > .1
    assert (y - want).abs().max() <= 1e-3
    assert torch.equal(G(z[:1], psi), G(z[:1], psi))                # constant noise

# ---- images of every format

WIDTHS = {4: [6], 32: [7, 5, 9, 3], 64: [12, 9, 7, 5, 3], 256: [8, 7, 6, 5, 4, 3, 3], 1024: [4, 3, 3, 2, 2, 2, 2, 1, 2]}

NVIDIA = {'pkl': lambda p, t: layouts.write_pkl(p, t), 'pt': lambda p, t: torch.save(t, p),
          'safetensors': lambda p, t: save_file(t, p), 'pkl-protocol-2': lambda p, t: layouts.write_pkl(p, t, False, 2)}

@pytest.mark.parametrize('res,kind', [(4, 'pkl'), *((r, k) for r in (32, 64) for k in NVIDIA), (256, 'pkl'), (256, 'safetensors'), (1024, 'pkl')])
def test_nvidia(tmp_path, res, kind):
    t = layouts.nvidia(res, WIDTHS[res], z_dim=24, w_dim=16, n_map=3)
    NVIDIA[kind](tmp_path/'file.bin', t)
    G, z = load_generator(tmp_path/'file.bin'), z_of(1 if res > 256 else 2, 24)
    assert (G.resolution, G.z_dim, G.w_dim, G.config['num_mapping'], G.card['layout']) == (res, 24, 16, 3, 'nvidia')
    agrees(G, z, layouts.nvidia_images(t, z, .7), .7)

ROSINALITY = {'zip': lambda p, t, m, L: layouts.write_pt(p, t, m), 'training': lambda p, t, m, L: layouts.write_pt(p, t, m, training=True),
              'legacy': lambda p, t, m, L: layouts.write_pt(p, t, m, legacy=True),
              'psp': layouts.write_psp, 'psp-namespace': lambda p, t, m, L: layouts.write_psp(p, t, m, L, True, True),
              'safetensors': lambda p, t, m, L: save_file(t | {'latent_avg': m}, p)}

@pytest.mark.parametrize('res,kind', [*((r, k) for r in (32, 64) for k in ROSINALITY), (256, 'zip'), (256, 'psp'), (1024, 'legacy'), (1024, 'psp')])
def test_rosinality_and_psp(tmp_path, res, kind):
    t, mean = layouts.rosinality(res, WIDTHS[res], n_map=4), torch.linspace(-1, 1, 16)
    ROSINALITY[kind](tmp_path/'file.bin', t, mean, 2 * len(WIDTHS[res]))
    G, z = load_generator(tmp_path/'file.bin'), z_of(1 if res > 256 else 2, 16)
    assert (G.resolution, G.config['channels'], G.card['layout']) == (res, WIDTHS[res], 'rosinality')
    assert torch.equal(G.w_avg, mean)
    agrees(G, z, layouts.rosinality_images(t, mean, z, .6), .6)

@pytest.mark.parametrize('arch', ['skip', 'resnet', 'orig'])
@pytest.mark.parametrize('clamp', [None, .8])
def test_architectures_and_clamp(tmp_path, arch, clamp):
    t = layouts.nvidia(32, WIDTHS[32], arch=arch, seed=3)
    layouts.write_pkl(tmp_path/'g', t, clamp=clamp)
    G, z = load_generator(tmp_path/'g'), z_of(2, 16)
    assert G.config['architecture'] == arch and G.config['clamp'] == clamp
    agrees(G, z, layouts.nvidia_images(t, z, .8, clamp), .8)

def test_grey_images_and_another_speed_of_the_mapping(tmp_path):
    t = layouts.nvidia(16, [4, 3, 5], img=1)
    layouts.write_pkl(tmp_path/'g', t, lr_mul=.01)
    assert load_generator(tmp_path/'g')(z_of(2, 16)).shape == (2, 1, 16, 16)
    layouts.write_pkl(tmp_path/'h', t, lr_mul=.02)
    assert load_generator(tmp_path/'h').config['lr_mul'] == .02

def test_mean_code_is_estimated_and_said(tmp_path):
    t = layouts.rosinality(16, [4, 3, 5])
    torch.save(t, tmp_path/'bare.pt')
    G = load_generator(tmp_path/'bare.pt')
    assert 'mean w estimated' in ' '.join(G.card['notes']) and same(G, load_generator(tmp_path/'bare.pt'))
    with torch.no_grad(): w = G.mapping(z_of(20_000, 16))
    assert (G.w_avg - w.mean(0)).abs().max() < .1 * w.std(0).max()

def test_absent_noise(tmp_path):
    "Layers without noise have strength zero; lost noise images are drawn, and the card says so."
    t = layouts.nvidia(16, [4, 3, 5])
    torch.save({k: v for k, v in t.items() if 'noise' not in k}, tmp_path/'none.pt')
    G, z = load_generator(tmp_path/'none.pt'), z_of(2, 16)
    agrees(G, z, layouts.nvidia_images({k: v * 0 if 'noise' in k else v for k, v in t.items()}, z), 1.)
    r = layouts.rosinality(16, [4, 3, 5])
    torch.save({k: v for k, v in r.items() if 'noises' not in k}, tmp_path/'lost.pt')
    assert 'noise images drawn' in ' '.join(load_generator(tmp_path/'lost.pt').card['notes'])

def test_half_precision_files(tmp_path):
    t = layouts.nvidia(32, WIDTHS[32])
    save_file({k: v.half() for k, v in t.items()}, tmp_path/'h')
    G, z = load_generator(tmp_path/'h'), z_of(2, 16)
    assert G.w_avg.dtype == torch.float32
    agrees(G, z, layouts.nvidia_images({k: v.half().float() for k, v in t.items()}, z), 1.)

# ---- what is no generator

def refused(path, *words):
    for load in (load_generator,):
        with pytest.raises(InputError) as e: load(path)
        text = str(e.value)
        assert text.startswith(str(path)) and '\n' not in text, text
        for w in words: assert w in text, text

def test_others_are_named(tmp_path):
    f, t = tmp_path/'f', layouts.nvidia(16, [4, 3, 5])
    for tensors, word in (({'b4.fc.weight': torch.ones(2, 2)}, 'discriminator'), ({'final_linear.0.weight': torch.ones(2)}, 'discriminator'),
                          ({'input_layer.0.weight': torch.ones(2)}, 'load_encoder'), ({'encoder.input_layer.0.weight': torch.ones(2)}, 'load_encoder'),
                          ({'synthesis.input.freqs': torch.ones(2)}, 'StyleGAN3'), ({'mapping.embed.weight': torch.ones(2)}, 'conditional'),
                          ({'a.weight': torch.ones(2)}, 'a.weight')):
        torch.save(tensors, f); refused(f, word)
    layouts.write_pkl(f, t, c_dim=10); refused(f, 'conditional')
    layouts.write_pkl(f, t, others=False, cls='Discriminator'); refused(f, 'Discriminator')
    layouts.write_pkl(f, t, activation='relu'); refused(f, 'activation', 'relu')
    torch.save(torch.ones(3), f); refused(f, 'no generator')
    np.save(tmp_path/'a.npy', np.ones(3)); refused(tmp_path/'a.npy', 'no generator')

def test_what_does_not_fit_is_named(tmp_path):
    f, t = tmp_path/'f', layouts.nvidia(16, [4, 3, 5])
    torch.save(t | {'surplus': torch.ones(2)}, f); refused(f, 'left over: surplus')
    torch.save({k: v for k, v in t.items() if k != 'synthesis.b8.conv0.bias'}, f); refused(f, 'missing: synthesis.b8.conv0.bias')
    torch.save(t | {'synthesis.b8.conv0.bias': torch.ones(9)}, f); refused(f, 'wrong shape: synthesis.b8.conv0.bias (9,)')
    torch.save(t | {'synthesis.b8.resample_filter': torch.ones(4, 4) / 16}, f); refused(f, 'low-pass', 'b8.resample_filter')
    torch.save(t | {'synthesis.b8.conv0.bias': t['synthesis.b8.conv0.bias'] * float('nan')}, f); refused(f, 'not finite', 'b8.conv0.bias')
    for data, word in ((b'<!doctype html>', 'web page'), (b'version https://git-lfs.github.com', 'git-lfs'), (b'\x1f\x8b\x08', 'packed'), (b'', 'empty'), (b'x', 'damaged')):
        f.write_bytes(data); refused(f, word)

@pytest.mark.parametrize('data, words', [
    ({'epoch': 3, 'model': {'a.weight': torch.ones(1), 'b': torch.ones(1)}, 'optimizer': {}}, ['epoch', 'model (2 inside)', 'optimizer (0 inside)']),
    ({'state_dict': {'net.0.weight': torch.ones(1)}}, ['net.0.weight']), ({'g_ema': {}}, ['g_ema (0 inside)']), ({}, ['empty dict']),
    ([1, 2], ['a list']), (torch.ones(2, 3), ['single tensor (2, 3)']), ({f'k{i}': i for i in range(30)}, ['k0', 'k7', '22 more']),
    ({'a\nb': 1, 'c' * 500: 2, 3: 4, None: 5}, ['a b', 'c' * 40, '3', 'NoneType'])], ids=str)
def test_unknown_containers_say_what_they_hold(tmp_path, data, words):
    torch.save(data, tmp_path/'f')
    refused(tmp_path/'f', 'no', *words)
    assert len(describe_contents(data)) < 500

def tensorflow_pickle():
    "The opcodes with which the files of the TensorFlow era begin."
    return b'\x80\x03cdnnlib.tflib.network\nNetwork\nq\x00)\x81q\x01}q\x02(X\x07\x00\x00\x00versionK\x04ub.'

def test_tensorflow_files_are_refused_with_the_cure(tmp_path):
    (tmp_path/'f.pkl').write_bytes(tensorflow_pickle())
    refused(tmp_path/'f.pkl', 'dnnlib.tflib.network.Network', 'TensorFlow', 'legacy.py')

# ---- conversion

WIDE = {8: [512, 512], 16: [512, 512, 512]}            # widths that rosinality's class has

@pytest.mark.parametrize('suffix', ['.safetensors', '.pt'])
def test_round_trips_are_exact(tmp_path, suffix):
    t, mean = layouts.rosinality(8, WIDE[8]), torch.linspace(-2, 1, 16)
    layouts.write_pt(tmp_path/'src.pt', t, mean)
    old, G = tmp_path/'src.pt', load_generator(tmp_path/'src.pt')
    for i, layout in enumerate(('nvidia', 'rosinality', 'ours', 'nvidia', 'ours', 'rosinality')):
        new = convert(old, tmp_path/f'{layout}{i}{suffix}', layout)
        old.unlink()
        H, old = load_generator(new), new
        assert same(G, H) and H.w_avg.equal(mean)
    back = read_checkpoint(old)
    assert same(back['g_ema'] if suffix == '.pt' else {k: v for k, v in back.items() if k != 'latent_avg'}, t)

def test_nvidia_state_dict_comes_back(tmp_path):
    for arch in ('skip', 'resnet', 'orig'):
        t = layouts.nvidia(32, [9, 9, 4, 2], arch=arch)             # base 72, at most 9
        torch.save(t, tmp_path/'n.pt')
        convert(tmp_path/'n.pt', tmp_path/'o.safetensors')
        convert(tmp_path/'o.safetensors', tmp_path/'back.safetensors', 'nvidia')
        assert same(read_checkpoint(tmp_path/'back.safetensors'), t)

# ---- the bound of NVIDIA's layers

def test_a_default_ada_network_becomes_rosinalitys(tmp_path):
    "conv_clamp=256, as training writes it: dropped with a note, and both references draw the same."
    t, z, said = layouts.nvidia(16, WIDE[16]), z_of(2, 16), []
    layouts.write_pkl(tmp_path/'net.pkl', t, others=False, clamp=256)
    convert(tmp_path/'net.pkl', tmp_path/'net.pt', log=said.append)
    data = read_checkpoint(tmp_path/'net.pt')
    assert len(said) == 1 and 'bound of 256 dropped' in said[0] and '300 samples' in said[0] and data['notes'] == said
    theirs = layouts.rosinality_images(data['g_ema'], data['latent_avg'], z, .7)
    assert (layouts.nvidia_images(t, z, .7, 256) - theirs).abs().max() < 1e-3
    H = load_generator(tmp_path/'net.pt')
    assert H.config['clamp'] is None
    agrees(H, z, theirs, .7)
    f = convert(tmp_path/'net.pkl', tmp_path/'net.safetensors', 'rosinality', log=said.append)
    card = json.loads(f.with_suffix('.json').read_text())
    assert card['notes'] == said[:1] and card['config']['clamp'] is None and load_generator(f).config['clamp'] is None

def test_clamp_survives_and_is_dropped_only_where_it_never_acts(tmp_path):
    "Whatever the bound: the file is written exactly when no sample reaches it, and then draws the same."
    layouts.write_pkl(tmp_path/'free.pkl', t := layouts.nvidia(8, WIDE[8]), others=False)
    G = load_generator(tmp_path/'free.pkl')
    peaks = []
    for m in G.synthesis.modules():
        if hasattr(m, 'clamp'): m.register_forward_hook(lambda m, args, out: peaks.append(float(out.abs().max())))
    with torch.no_grad(): G(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)))
    for i, share in enumerate((.1, .5, .99, 1.01, 2., 100.)):
        clamp = max(peaks)*share
        layouts.write_pkl(tmp_path/'g.pkl', t, others=False, clamp=clamp)
        H = load_generator(convert(tmp_path/'g.pkl', tmp_path/'a.safetensors', 'nvidia'))
        assert same(G, H) and H.config['clamp'] == clamp
        used, n = clamp_usage(H)
        assert n == 300 and (used == 1 if share < 1 else abs(used - 1/share) < 1e-4)
        if share > 1: assert same(load_generator(convert(tmp_path/'g.pkl', tmp_path/'r.pt', log=[].append)), G); (tmp_path/'r.pt').unlink()
        else:
            with pytest.raises(InputError, match='acts .*--layout nvidia'): convert(tmp_path/'g.pkl', tmp_path/'r.pt')
        assert not (tmp_path/'r.pt').exists()

# ---- what the target class could not load

def any_generator(channels, **kw):
    with torch.device('meta'): return Generator(4 * 2**(len(channels) - 1), kw.pop('z_dim', 8), 8, 1, channels=channels, **kw)

def test_widths_of_nvidias_class():
    "Against the rule itself, tried with every base and maximum."
    rule = {tuple(num_channels(r, base, top) for r in (4, 8, 16)) for base in range(16, 200) for top in range(1, 50)}
    for c in ((a, b, d) for a in range(1, 9) for b in range(1, 9) for d in range(1, 9)):
        assert (not layout_misfits(any_generator(list(c)), 'nvidia')) == (c in rule), c

def test_what_rosinalitys_class_cannot_be():
    wide = lambda n, m=1: [512 if r <= 32 else 16384*m//r for r in (4 * 2**i for i in range(n))]
    for good in (wide(1), wide(3), wide(4), wide(5), wide(5, 2), wide(7, 3), wide(9, 2)): assert not layout_misfits(any_generator(good), 'rosinality')
    for word, G in {'widths': any_generator([512, 512, 256]), 'img_channels 1': any_generator(wide(3), img_channels=1), 'z of 16': any_generator(wide(3), z_dim=16),
                    "architecture 'resnet'": any_generator(wide(3), architecture='resnet'), 'lr_mul 0.02': any_generator(wide(3), lr_mul=.02),
                    'widths [512, 512, 512, 512, 128]': any_generator([512]*4 + [128]), '16]': any_generator(wide(9, 2) + [16])}.items():
        assert word in ' '.join(layout_misfits(G, 'rosinality')), word
        with pytest.raises(InputError, match='choose --layout (nvidia|ours)$') as e: export_state_dict(G, 'rosinality')
        assert word in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(InputError, match='--layout ours'): export_state_dict(any_generator([5, 9, 3]), 'nvidia')

def test_the_shipped_generator_to_pt_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r'z of 32 numbers beside a w of 128.*--layout nvidia'): convert('sdfaces64', tmp_path/'g.pt')
    assert not list(tmp_path.iterdir()) and same(load_generator(convert('sdfaces64', tmp_path/'g.pt', 'nvidia')), load_generator('sdfaces64'))

@pytest.mark.parametrize('n', [1, 4])
def test_other_image_channels(tmp_path, n):
    "Grey networks load as NVIDIA's draw them and go out under NVIDIA's names; rosinality's class has three."
    t, z = layouts.nvidia(16, [9, 9, 4], img=n), z_of(2, 16)
    layouts.write_pkl(tmp_path/'g.pkl', t)
    agrees(load_generator(tmp_path/'g.pkl'), z, layouts.nvidia_images(t, z), 1.)
    assert same(load_generator(tmp_path/'g.pkl'), load_generator(convert(tmp_path/'g.pkl', tmp_path/'n.pt', 'nvidia')))
    with pytest.raises(InputError, match=f'img_channels {n}'): convert(tmp_path/'g.pkl', tmp_path/'r.pt')

def test_psp_becomes_ours(tmp_path):
    t, mean = layouts.rosinality(32, WIDTHS[32]), torch.ones(16)
    layouts.write_psp(tmp_path/'p.pt', t, mean, 8)
    G = load_generator(convert(tmp_path/'p.pt', tmp_path/'o.safetensors'))
    agrees(G, z_of(2, 16), layouts.rosinality_images(t, mean, z_of(2, 16), .5), .5)
    assert G.card['class'] == 'Generator' and 'p.pt' in G.card['source']

def test_bad_requests_write_nothing(tmp_path):
    layouts.write_pt(tmp_path/'g.pt', layouts.rosinality(16, [4, 3, 5]), torch.ones(16))
    for dst, layout in (('x.pkl', None), ('x.pt', 'tf'), ('x', None), ('no\0name.pt', None)):
        with pytest.raises((InputError, ValueError)): convert(tmp_path/'g.pt', tmp_path/dst, layout)
    with pytest.raises(InputError): convert(tmp_path/'none.pt', tmp_path/'x.pt')
    assert os.listdir(tmp_path) == ['g.pt']

def test_ordinary_loader_reads_what_we_write(tmp_path):
    layouts.write_pt(tmp_path/'g.pt', layouts.rosinality(8, WIDE[8]), torch.ones(16))
    for layout in LAYOUTS: torch.load(convert(tmp_path/'g.pt', tmp_path/'x.pt', layout), weights_only=True)

def test_shipped_generator_round_trip(tmp_path):
    G = load_generator('sdfaces64')
    H = load_generator(convert('sdfaces64', tmp_path/'n.pt', 'nvidia'))
    assert same(G, H) and same(G, load_generator(convert(tmp_path/'n.pt', tmp_path/'o.safetensors')))

# ---- the reader

def test_reader_values(tmp_path):
    x = torch.randn(4, 5)
    data = dict(x=x, t=x.t(), s=x[1:3, ::2], h=x.half(), i=torch.arange(3), e=torch.empty(0, 2), b=torch.tensor([True]), n=np.arange(6.).reshape(2, 3),
                f=np.asfortranarray(np.arange(6).reshape(2, 3)), l=[1, (2.5, None, 'ü')], p=torch.nn.Parameter(x), q={'a': {'b': b'c'}}, big=2**70, rep=x[:1].expand(3, 5))
    files = [tmp_path/f'{i}' for i in range(8)]
    torch.save(data, files[0]); torch.save(data, files[1], _use_new_zipfile_serialization=False)
    for i in range(6):
        with open(files[2 + i], 'wb') as f: pickle.dump(data, f, i)
    for f in files:
        out = read_checkpoint(f)
        assert out.keys() == data.keys()
        for k, v in data.items():
            v = torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            if isinstance(v, torch.Tensor): assert torch.equal(out[k], v) and out[k].dtype == v.dtype and out[k].shape == v.shape, (f.name, k)
            elif k == 'q' and f.name in '0123': assert out[k]['a']['b'] == b'c'
            else: assert out[k] == v, (f.name, k)

def test_reader_shares_and_loops(tmp_path):
    loop = [1]; loop.append(loop)
    x = torch.randn(3)
    torch.save(dict(loop=loop, a=x, b=x), tmp_path/'f')
    out = read_checkpoint(tmp_path/'f')
    assert out['loop'][1] is out['loop'] and out['a'].data_ptr() == out['b'].data_ptr()

def test_records_are_inert(tmp_path):
    layouts.write_pkl(tmp_path/'g', layouts.nvidia(8, [3, 2]))
    G = read_checkpoint(tmp_path/'g')['G_ema']
    assert isinstance(G, PickledObject) and G.name == 'Generator' and set(G.state['_modules']) == {'mapping', 'synthesis'}
    assert not any('source' in str(k) for k in G.state) and not (tmp_path/'source_was_run').exists()

def test_numpy_files(tmp_path):
    for a in (np.arange(12.).reshape(3, 4), np.float32([[1]]), np.arange(3)):
        np.save(tmp_path/'a.npy', a)
        assert torch.equal(read_checkpoint(tmp_path/'a.npy'), torch.from_numpy(a))
    for a in (np.array([{}]), np.array(['x']), np.arange(3.).astype('>f4')):
        np.save(tmp_path/'a.npy', a)
        with pytest.raises(InputError): read_checkpoint(tmp_path/'a.npy')

# ---- memory

PEAK = '''
import sys, time, re
from cycle_nb.checkpoints import load_generator
def status(k): return int(re.search(k + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
load_generator("sdfaces64")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")                  # forget the peak so far
t = time.time()
G = load_generator(sys.argv[1])
t = time.time() - t
print((status("VmHWM") - before) / sum(x.numel() * 4 for x in G.state_dict().values()), t)
'''

@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs Linux to measure')
@pytest.mark.parametrize('kind', ['pkl', 'pt', 'ours'])
def test_memory_of_loading_1024_px(tmp_path, python, kind):
    c = [min(32768 // 2**i, 512) for i in range(2, 11)]
    if kind == 'pkl': layouts.write_pkl(tmp_path/'g', layouts.nvidia(1024, c, 512, 512, 8))
    if kind == 'pt': layouts.write_psp(tmp_path/'g', layouts.rosinality(1024, c, 512, 8), torch.zeros(512), 18, legacy=True)
    if kind == 'ours': save_model(Generator(1024, 512, 512, 8, 32768, 512), tmp_path/'g.safetensors', half=False)
    ratio, seconds = map(float, python(PEAK, tmp_path/('g.safetensors' if kind == 'ours' else 'g')).split())
    print(f'{kind}: {ratio:.2f} x its float32 size, {seconds:.1f} s')
    assert ratio <= 2.2

# ---- hostile files

class Calls:
    "Pickles as a call of a function."
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call

class SetsState:
    def __reduce__(self): return bytearray, (), {'x': 1}

def raw(*ops): return b'\x80\x04' + b''.join(ops) + b'.'

def text(s): return b'X' + struct.pack('<I', len(s)) + s.encode()

def call(module, name, *args): return b'c' + f'{module}\n{name}\n'.encode() + b'(' + b''.join(args) + b'tR'

MARKER = 'touch ran'
HOSTILE = {
    'os.system': pickle.dumps(Calls(os.system, MARKER)), 'eval': pickle.dumps({'G_ema': Calls(eval, '1')}), 'exec-0': pickle.dumps(Calls(exec, 'open("ran","w")'), 0),
    'getattr': raw(call('builtins', 'getattr', text('x'), text('y'))), 'import': raw(call('builtins', '__import__', text('os'))),
    'partial': raw(call('functools', 'partial')), 'operator': raw(call('operator', 'attrgetter', text('x'))),
    'inst': b'(' + text(MARKER) + b'ios\nsystem\n.', 'obj': b'(cos\nsystem\n' + text(MARKER) + b'o.', 'ext': raw(b'\x82\x01'),
    'newobj_ex': raw(b'cargparse\nNamespace\n)}\x92'), 'setstate': pickle.dumps(SetsState()),
    'build-on-list': raw(b']}b'), 'call-a-list': raw(b']' + b')R'), 'call-a-record': raw(b'cargparse\nNamespace\n)R' + b')R'),
    'numpy-object': raw(call('numpy', 'dtype', text('O8'), b'K\x00', b'K\x01')), 'numpy-load': raw(call('numpy', 'load', text('x'))),
    'numpy-runstring': raw(call('numpy.testing._private.utils', 'runstring', text('x'), b'}')), 'numpy-fromfile': raw(call('numpy', 'fromfile', text('/etc/passwd'))),
    'torch-load': raw(call('torch', 'load', text('x'))), 'torch-hub': raw(call('torch.hub', 'load', text('x'), text('y'))), 'torch-from_file': raw(call('torch', 'from_file', text('ran'), b'\x88')),
    'torch-save': raw(call('torch', 'save', b'N', text('ran'))), 'storage-from_file': raw(call('torch.storage', 'UntypedStorage.from_file', text('ran'))),
    'jit': raw(call('torch.jit', 'load', text('x'))), 'device-tensor': raw(call('torch._utils', '_rebuild_device_tensor_from_numpy', b'N', b'N')),
    'wrapper': raw(call('torch._utils', '_rebuild_wrapper_subclass', b'N')), 'sparse': raw(call('torch._utils', '_rebuild_sparse_tensor', b'N', b'N')),
    'from-type': raw(call('torch._tensor', '_rebuild_from_type_v2', b'cos\nsystem\n', b'N', b'(' + text(MARKER) + b't', b'N')), 'stack-global': raw(text('os'), text('system'), b'\x93', text(MARKER), b'\x85R'),
    'name-is-a-list': raw(b']]\x93'), 'dotted': raw(text('torch'), text('serialization.os.system'), b'\x93'), 'persistent': raw(text('x'), b'Q'), 'persistent-0': b'Pabc\n.',
    'no-bytes': raw(call('torch.storage', '_load_from_bytes', b'K\x05')), 'false-bytes': raw(call('torch.storage', '_load_from_bytes', b'C\x05hello')),
    'underflow': raw(b'0'), 'no-mark': raw(b't'), 'memo': raw(b'h\x07'), 'empty': b'\x80\x04.', 'unhashable': raw(b'}]Ns'), 'tuple-key': raw(b'})Ns'), 'next-buffer': raw(b'\x97'),
    'endless': b'\x80\x04' + b'(' * 100_000, 'long-bytes': raw(b'B\xff\xff\xff\xff'), 'long-bytes-8': raw(b'\x8e' + b'\xff' * 8), 'long-text': raw(b'X\xff\xff\xff\xff'),
    'long-int': raw(b'\x8b\xff\xff\xff\x7f'), 'long-frame': raw(b'\x95' + b'\xff' * 8), 'digits': b'L' + b'9' * 100_000 + b'L\n.', 'codec': raw(call('_codecs', 'encode', text('x'), text('rot13')))[:-1] + b'\x85R.',
}

@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path('f.pkl').write_bytes(HOSTILE[name])
    with pytest.raises(InputError) as e: print(read_checkpoint('f.pkl'), load_generator('f.pkl'))
    assert str(e.value).startswith('f.pkl') and '\n' not in str(e.value) and os.listdir() == ['f.pkl']

def test_refusal_names_the_function(tmp_path):
    (tmp_path/'f').write_bytes(HOSTILE['os.system'])
    with pytest.raises(InputError, match=r'(posix|nt)\.system'): read_checkpoint(tmp_path/'f')
    torch.save(torch.nn.Linear(2, 2), tmp_path/'m.pt')
    with pytest.raises(InputError, match='Linear.*state_dict'): read_checkpoint(tmp_path/'m.pt')

def bombs():
    "Small files that ask for much."
    yield 'laughs', raw(b']q\x00', *(b'](' + b'h' + bytes([i]) + (b'h' + bytes([i])) * 9 + b'eq' + bytes([i + 1]) for i in range(60)))
    yield 'tuples', raw(b')', b'2\x86' * 200)
    yield 'tuple-as-key', raw(b'}', b')', b'2\x86' * 60, b'Ns')
    yield 'deep', raw(b']' * 5000, b'a' * 4999)
    yield 'copies', raw(b'(', b'K\x00' * 1000, b'lq\x000ccollections\nOrderedDict\nq\x010', b'h\x01h\x00\x85R0' * 3000, b'N')
    yield 'steps', raw(b'N0' * 400_000, b'N')
    laugh = b'\x80\x04]q\x00' + b''.join(b'](' + (b'h' + bytes([i])) * 10 + b'eq' + bytes([i + 1]) for i in range(60))
    for name, use in dict(device=call('torch', 'device', b'h\x3c'), dtype=call('numpy', 'dtype', b'h\x3c'), path=call('pathlib', 'PosixPath', b'h\x3c'),
                          size=call('torch._utils', '_rebuild_tensor', b'h\x3c', b'h\x3c', b'h\x3c', b'h\x3c'), encode=call('_codecs', 'encode', b'h\x3c', b'h\x3c'),
                          name=b'h\x3ch\x3c\x93').items(): yield f'text-{name}', laugh + use + b'.'
    meta = b'}(' + text('class_name') + b'h\x3c' + text('state') + b'}u'
    yield 'text-class', laugh + b'ctorch_utils.persistence\n_reconstruct_persistent_obj\n(' + meta + b'tR.'
    array = b'cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(' + text('x') + b'\x8a\x06' + b'\xff' * 4 + b'\x03\x00' + b't' + call('numpy', 'dtype', text('f4')) + b'\x89' + text('x') + b'tb'
    yield 'text-times-number', raw(array)
    yield 'modules', raw(b'cargparse\nNamespace\n)R')                  # a record is no network

def test_bombs(tmp_path, python):
    "Each ends soon, in an error or in a small answer, with little memory."
    for name, data in bombs(): (tmp_path/name).write_bytes(data)
    code = ('import sys, resource\nfrom pathlib import Path\nresource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\nfrom cycle_nb.archives import read_checkpoint\nfrom cycle_nb.checkpoints import load_generator\n'
            'from cycle_nb.core import InputError\nfor f in sorted(Path(sys.argv[1]).iterdir()):\n  for read in (read_checkpoint, load_generator):\n'
            '    try: read(f)\n    except InputError as e: assert str(e).startswith(str(f))\n  print(f.name)')
    assert python(code, tmp_path).split() == sorted(n for n, _ in bombs())

def rebuilt(numel, offset, size, stride, dtype='Float', file=None, **parts):
    "A torch file whose single tensor is declared as we like."
    num = lambda n: b'\x8a\x08' + struct.pack('<q', n)
    tup = lambda xs: b'(' + b''.join(map(num, xs)) + b't'
    storage = b'(' + text('storage') + f'ctorch\n{dtype}Storage\n'.encode() + text('0') + text('cpu') + num(numel) + b'tQ'
    p = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(' + storage + num(offset) + tup(size) + tup(stride) + b'\x89}tR.'
    with zipfile.ZipFile(file, 'w', parts.pop('method', zipfile.ZIP_STORED)) as f:
        f.writestr('archive/data.pkl', p)
        f.writestr('archive/data/0', parts.pop('data', bytes(64)))

BAD_TENSORS = [(16, 0, [17], [1]), (16, 15, [2], [1]), (16, 0, [4, 5], [4, 1]), (16, 0, [2], [100]), (16, 0, [-1], [1]), (16, 0, [2], [-1]), (16, -1, [1], [1]),
               (17, 0, [1], [1]), (2**40, 0, [1], [1]), (2**62, 0, [2**62], [1]), (-1, 0, [0], [1]), (16, 0, [2**31, 2**31], [0, 0]), (16, 0, [2**39], [0]),
               (16, 0, [2], [1, 1]), (16, 0, [1] * 64, [1] * 64), (16, 2**62, [1], [1])]

@pytest.mark.parametrize('bad', BAD_TENSORS, ids=str)
def test_bounds_of_tensors(tmp_path, bad):
    rebuilt(16, 0, [4, 4], [4, 1], file=tmp_path/'good')
    assert read_checkpoint(tmp_path/'good').shape == (4, 4)
    rebuilt(*bad, file=tmp_path/'bad')
    with pytest.raises(InputError): read_checkpoint(tmp_path/'bad')

def test_zip_tricks(tmp_path):
    f = tmp_path/'f'
    rebuilt(2**20, 0, [2**20], [1], file=f, method=zipfile.ZIP_DEFLATED, data=bytes(2**22))
    refused(f, 'packed')
    for names in (['a/data.pkl', 'b/data.pkl'], ['x/version'], ['x/data.pkl', 'x/code/__torch__.py'], ['../../data.pkl']):
        with zipfile.ZipFile(f, 'w') as z:
            for n in names: z.writestr(n, b'\x80\x02}.')
        refused(f)
    rebuilt(16, 0, [16], [1], file=f)
    data = f.read_bytes()
    for start in (data.find(b'PK\x01\x02') + 42, data.find(b'PK\x01\x02') + 24, len(data) - 10, len(data) - 6):      # offsets and sizes in the table
        f.write_bytes(data[:start] + b'\xff\xff\xff\x7f' + data[start + 4:])
        with pytest.raises(InputError): read_checkpoint(f)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f']

def test_cards_cannot_ask_for_much(tmp_path):
    G = Generator(8, 4, 4, 1, channels=[3, 2])
    for change in (dict(num_mapping=10**9), dict(resolution=2**30), dict(channels=[10**9, 2]), dict(z_dim='x'), dict(clamp='x'), dict(architecture='new'), dict(colour=1)):
        save_model(G, tmp_path/'g.safetensors', half=False)
        sd = {k: v.clone() for k, v in G.state_dict().items()}
        save_file(sd, tmp_path/'g.safetensors', {'card': json.dumps({'class': 'Generator', 'config': G.config | change})})
        with pytest.raises(InputError): load_generator(tmp_path/'g.safetensors')
    save_file(sd, tmp_path/'g.safetensors')                             # without a card the shapes say all
    assert same(load_generator(tmp_path/'g.safetensors'), G)

def test_mutated_files(tmp_path):
    record = fuzz_formats.run(tmp_path, n=300, seed=1)
    assert record['files'] == 300 and record['errors'] > 50 and record['models'] > 10 and not record['wrong'], record

# ---- downloads and the hub

class Server(http.server.BaseHTTPRequestHandler):
    "Serves one file; breaks off in the middle the first time."
    data, broken, asked = b'', False, []
    def log_message(self, *args): pass
    def do_GET(self):
        start = int((self.headers.get('Range') or 'bytes=0-').split('=')[1].rstrip('-'))
        type(self).asked.append(start)
        body = self.data[start:]
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.broken: type(self).broken, body = False, body[:len(body) // 2]
        self.wfile.write(body)

@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv('CYCLE_NB_CACHE', str(tmp_path/'cache'))
    layouts.write_pt(tmp_path/'g.pt', layouts.rosinality(16, [4, 3, 5]), torch.ones(16))
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    Server.data, Server.broken, Server.asked = (tmp_path/'g.pt').read_bytes(), True, []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}/g.pt'
    s.shutdown()

def test_download_resumes_verifies_and_shows_the_licence(server, monkeypatch, capsys, tmp_path):
    import hashlib
    entry = dict(url=server, licence='You may look at it.', sha256=hashlib.sha256(Server.data).hexdigest(), size=None, what='a test')
    monkeypatch.setitem(PUBLISHED, 'mine', entry)
    path = download('mine')
    assert path.read_bytes() == Server.data and Server.asked == [0, len(Server.data) // 2]
    assert 'You may look at it.' in capsys.readouterr().out
    assert download('mine') == path and len(Server.asked) == 2 and capsys.readouterr().out == ''
    assert same(load_generator('mine'), load_generator(tmp_path/'g.pt'))
    monkeypatch.setitem(PUBLISHED, 'false', entry | dict(sha256='0' * 64))
    with pytest.raises(InputError, match='wrong content'): download('false')
    assert [p.name for p in path.parent.iterdir()] == [path.name]

def test_registry_is_well_formed(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('CYCLE_NB_CACHE', str(tmp_path))
    assert len(PUBLISHED) >= 10
    for name, p in PUBLISHED.items():
        assert p['url'].startswith('https://') and p['licence'] and p['what'] and '/' not in name
        assert p['sha256'] is None or len(bytes.fromhex(p['sha256'])) == 32 and p['size'] > 10**7
    with pytest.raises(InputError, match='Google Drive'): download('cycle-ffhq')
    assert 'licence' in capsys.readouterr().out and not list(tmp_path.rglob('*.*'))
    with pytest.raises(InputError, match='ffhq1024'): download('nothing')

def test_hub_is_optional(python):
    assert python('import sys; sys.modules["huggingface_hub"] = None\nfrom cycle_nb.stylegan2 import Generator\nfrom cycle_nb.core import InputError\n'
                  'try: Generator.from_pretrained("x")\nexcept InputError as e: print(e)').startswith('huggingface_hub is missing')
    assert python('import sys, cycle_nb.encoder_checkpoints; print("huggingface_hub" in sys.modules)') == 'False\n'

@pytest.mark.parametrize('name', ['~f.pt', 'plain.pt', 'with space ü.pt', '~'])
def test_names_with_a_tilde(tmp_path, monkeypatch, name):
    "A tilde is the home folder where there is one of that name; a file that is called so is a file."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    (tmp_path/'home').mkdir()
    t = layouts.nvidia(8, [3, 2])
    if name != '~':
        torch.save(t, name)
        assert load_generator(name).resolution == 8 and len(read_checkpoint(name)) == len(t)
        assert convert(name, '~out.safetensors').is_file() and Path('~out.safetensors').is_file()
    torch.save(t, tmp_path/'home'/'g.pt')
    assert load_generator('~/g.pt').resolution == 8 and convert('~/g.pt', '~/o.safetensors') == tmp_path/'home'/'o.safetensors'
    refused('~/none.pt'); refused('~nobody/none.pt'); refused('~')

def test_folders(tmp_path):
    "A bundle's folder and a hub folder are read, others refused."
    G = Generator(8, 4, 4, 1, channels=[3, 2])
    (tmp_path/'bundle').mkdir(), (tmp_path/'else').mkdir()
    save_model(G, tmp_path/'bundle'/'generator.safetensors', half=False)
    assert same(load_generator(tmp_path/'bundle'), G)
    refused(tmp_path/'else', 'folder')

ODD_HUB_NAMES = [f'hf:{n}' for n in ('/', '..', '~', '~nobody/x', 'a/..', '-a/b', 'a/b.git', 'a//b', 'ä/ö', 'a b/c', 'a/b@main', 'a/b:c', 'x'*300, 'a\nb/c', 'hf:a/b', 'https://a/b')]

def test_hub_offline_is_one_line(python, tmp_path):
    pytest.importorskip('huggingface_hub')
    Generator(8, 4, 4, 1, channels=[3, 2]).save_pretrained(tmp_path/'hub')
    (tmp_path/'empty').mkdir()
    out = python('import os, sys; os.environ["HF_HUB_OFFLINE"] = "1"\nfrom cycle_nb.checkpoints import load_generator\nfrom cycle_nb.core import InputError\n'
                 'for name in sys.argv[1:]:\n  try: print("ok", load_generator(name).resolution)\n  except InputError as e: print("refused", str(e).count("\\n"))',
                 f'hf:{tmp_path/"hub"}', tmp_path/'hub', 'hf:nobody/none', f'hf:{tmp_path/"empty"}', f'hf:{tmp_path/"hub"}-misspelt', 'hf:', 'hf:a/b/c', *ODD_HUB_NAMES)
    assert out.splitlines() == ['ok 8'] * 2 + ['refused 0'] * (5 + len(ODD_HUB_NAMES))

def test_nothing_touches_the_network_at_import(python):
    code = ('import socket\ndef no(*a, **k): raise AssertionError("network")\nsocket.socket.connect = no; socket.getaddrinfo = no\n'
            'import cycle_nb.encoder_checkpoints, cycle_nb.checkpoints\nprint(cycle_nb.checkpoints.load_generator("sdfaces64").resolution)')
    assert python(code) == '64\n'

def test_hub_round_trip(tmp_path):
    pytest.importorskip('huggingface_hub')
    G = Generator(16, 8, 12, 2, channels=[4, 3, 5], architecture='resnet', clamp=3.)
    G.save_pretrained(tmp_path/'hub')
    H = Generator.from_pretrained(tmp_path/'hub')
    assert type(H) is Generator and same(G, H) and H.config == G.config and not H.training
    assert same(load_generator(f'hf:{tmp_path/"hub"}'), G) and {'config.json', 'model.safetensors', 'README.md'} == set(os.listdir(tmp_path/'hub'))
