"StyleGAN2, its discriminator and its training against independent computations: loops written out, numpy, closed forms."
import math, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest, torch, torch.nn.functional as F
from cycle_nb.core import InputError, make_rng
from cycle_nb.checkpoints import load_generator
from cycle_nb.encoder_checkpoints import load_encoder
from cycle_nb.gan import (Discriminator, d_loss, double_resolution, g_loss, lazy_adam, minibatch_std, mix_codes, path_lengths, r1_penalty, relativistic_loss,
    sample_codes)
from cycle_nb.layers import EqualConv, EqualLinear, StyledConv, ToRGB, demodulation, modulated_conv, style_scaled_conv
from cycle_nb.learner import ema_decay, update_ema
from cycle_nb.models import model_from_card, save_model
from cycle_nb.resample import downsample, filter2d, low_pass_kernel, upsample
from cycle_nb.train_generator import cached_batches
from cycle_nb.stylegan2 import Generator, Mapping

TINY = dict(resolution=16, z_dim=8, w_dim=8, num_mapping=2, channel_base=128, channel_max=16)

@pytest.fixture
def G():
    torch.manual_seed(0)
    return Generator(**TINY).eval()

def codes(G, n, seed=0): return torch.randn(n, G.num_ws, G.w_dim, generator=make_rng(seed))

def upfirdn(x, f, up=1, down=1, pad=(0, 0)):
    "Zero insertion, padding, true convolution and decimation of (H,W) arrays, in plain numpy and float64."
    h, w = x.shape
    y = np.zeros((h * up, w * up))
    y[::up, ::up] = x
    y = np.pad(y, [pad, pad])
    n, k = f.shape[0], f[::-1, ::-1]
    out = np.array([[(y[i:i + n, j:j + n] * k).sum() for j in range(y.shape[1] - n + 1)] for i in range(y.shape[0] - n + 1)])
    return out[::down, ::down]

FIR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64

# ---- layers

def test_equalised_linear_scales_weights_and_bias():
    for lr_mul in (1., .01):
        m = EqualLinear(200, 3000, bias=.5, lr_mul=lr_mul)
        x = torch.randn(4, 200)
        assert torch.allclose(m(x), x @ m.weight.T * lr_mul / math.sqrt(200) + m.bias * lr_mul, atol=1e-4)
        assert abs(m.weight.std().item() * lr_mul - 1) < .01 and torch.allclose(m.bias * lr_mul, torch.tensor(.5))
    m = EqualLinear(64, 64, act=True)
    raw = F.linear(torch.ones(1, 64), m.weight / 8)
    assert torch.allclose(m(torch.ones(1, 64)), torch.where(raw > 0, raw, raw * .2) * 2**.5, atol=1e-6)

def test_equalised_convolution_scale_activation_and_gain():
    x = torch.randn(2, 6, 5, 5)
    for act, gain in ((True, 1.), (True, .5), (False, .7)):
        m = EqualConv(6, 4, act=act, gain=gain)
        m.bias.data.normal_()
        y = F.conv2d(x, m.weight / math.sqrt(6 * 9), m.bias, padding=1)
        y = (torch.where(y > 0, y, .2 * y) * 2**.5 if act else y) * gain
        assert torch.allclose(m(x), y, atol=1e-5)

def test_upsample_is_upfirdn():
    x = torch.randn(2, 3, 6, 6)
    y = upsample(x, low_pass_kernel())
    want = upfirdn(x[1, 2].numpy(), FIR * 4, up=2, pad=(2, 1))
    assert y.shape == (2, 3, 12, 12) and np.abs(y[1, 2].numpy() - want).max() < 1e-6

def test_downsample_is_upfirdn():
    x = torch.randn(2, 3, 8, 8)
    y = downsample(x, low_pass_kernel())
    assert np.abs(y[1, 2].numpy() - upfirdn(x[1, 2].numpy(), FIR, down=2, pad=(1, 1))).max() < 1e-6

@pytest.mark.parametrize('size', [1, 3])
def test_downsampling_convolution_is_blur_then_stride(size):
    x, m = torch.randn(1, 2, 8, 8), EqualConv(2, 3, size, down=True, bias=False, act=False)
    p = size // 2 + 1
    blurred = np.stack([upfirdn(c.numpy(), FIR, pad=(p, p)) for c in x[0]])
    want = F.conv2d(torch.tensor(blurred, dtype=torch.float32)[None], m.weight / math.sqrt(2 * size**2), stride=2)
    assert torch.allclose(m(x), want, atol=1e-5) and m(x).shape == (1, 3, 4, 4)

def test_resampling_gradients_are_right_to_second_order():
    k = low_pass_kernel().double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.double, requires_grad=True)
    for f in (lambda x: upsample(x, k), lambda x: downsample(x, k), lambda x: filter2d(x, k, 2, 4.)):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(lambda x: f(x).square(), x)

def grown(x, w):
    "Zeros in between, true convolution with `w`, low-pass filter with gain 4: (I,H,W) → (O,2H,2W)."
    big = torch.zeros(x.shape[0], 2 * x.shape[1] - 1, 2 * x.shape[2] - 1)
    big[:, ::2, ::2] = x
    y = F.conv2d(big[None], w.flip(2, 3), padding=2)[0]
    return torch.tensor(np.stack([upfirdn(c.numpy(), FIR * 4, pad=(1, 1)) for c in y]), dtype=torch.float32)

def per_sample(x, weight, s, up, demodulate=True):
    "The published definition, sample by sample: modulate and demodulate the weights themselves."
    out = []
    for xi, si in zip(x, s):
        w = weight * si[None, :, None, None]
        if demodulate: w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        out.append(grown(xi, w) if up else F.conv2d(xi[None], w, padding=w.shape[-1] // 2)[0])
    return torch.stack(out)

@pytest.mark.parametrize('up', [False, True])
def test_modulated_convolution(up):
    x, weight, s = torch.randn(3, 5, 6, 6), torch.randn(4, 5, 3, 3), torch.randn(3, 5)
    kernel = low_pass_kernel() if up else None
    y = modulated_conv(x, weight, s, kernel)
    want = per_sample(x, weight, s, up)
    assert y.shape == want.shape and torch.allclose(y, want, atol=1e-4)
    assert torch.allclose(style_scaled_conv(x, weight, s, kernel), per_sample(x, weight, s, up, False), atol=1e-4)

def test_demodulation_is_safe_for_large_styles():
    s = torch.full((1, 5), 1e6)
    y = modulated_conv(torch.randn(1, 5, 4, 4), torch.randn(4, 5, 3, 3), s)
    assert y.isfinite().all() and y.abs().max() < 10
    with torch.autocast('cpu', dtype=torch.bfloat16): assert demodulation(torch.randn(4, 5, 3, 3), s).dtype == torch.float32

def test_styled_layer_order_is_convolution_noise_bias_activation():
    torch.manual_seed(0)
    m = StyledConv(4, 6, 8, 5)
    m.bias.data.normal_(); m.noise_strength.data.fill_(.7)
    x, w = torch.randn(2, 4, 5, 5), torch.randn(2, 8)
    s = w @ m.affine.weight.T / math.sqrt(8) + m.affine.bias
    y = per_sample(x, m.weight, s, False) + m.noise_const * .7 + m.bias[:, None, None]
    assert torch.allclose(m(x, w), torch.where(y > 0, y, .2 * y) * 2**.5, atol=1e-4)

# ---- generator

def test_num_ws_and_layer_assignment():
    for r in (16, 64, 1024):
        with torch.device('meta'): assert Generator(resolution=r).num_ws == 2 * math.log2(r) - 2
    g = Generator(resolution=64, channel_base=256, channel_max=8)
    seen = {}
    for name, m in g.synthesis.named_modules():
        if name.endswith('affine'): m.register_forward_pre_hook(lambda m, a, name=name: seen.__setitem__(name[:-7], a[0][0, 0].item()))
    g.synthesis(torch.arange(10.)[None, :, None].expand(1, 10, 128))
    want, i = {'b4.conv1': 0, 'b4.torgb': 1}, 1
    for r in (8, 16, 32, 64):
        want |= {f'b{r}.conv0': i, f'b{r}.conv1': i + 1, f'b{r}.torgb': i + 2}
        i += 2
    assert seen == want

def published_count(res=1024, w=512, z=512, n_map=8, base=32768, top=512):
    "The published table of layers, added up by hand."
    ch = lambda r: min(base // r, top)
    n = z * w + w + (n_map - 1) * (w * w + w)
    n += ch(4) * 16
    for i in range(2, int(math.log2(res)) + 1):
        r, c = 2**i, ch(2**i)
        for c_in in ([ch(r // 2)] if i > 2 else []) + [c]:
            n += (w * c_in + c_in) + c_in * c * 9 + c + 1         # affine, convolution, bias, noise strength
        n += (w * c + c) + c * 3 + 3                              # the image layer
    return n

@pytest.mark.parametrize('res,n', [(256, 30_034_338), (512, 30_276_583), (1024, 30_370_060)])
def test_parameter_count_is_the_published_one(res, n):
    with torch.device('meta'): g = Generator(res, 512, 512, 8, 32768, 512)
    assert sum(p.numel() for p in g.parameters()) == published_count(res) == n

def test_mapping_normalises_and_tracks():
    m = Mapping(8, 6, 3)
    z = torch.randn(5, 8)
    assert torch.allclose(m(z), m(z * 7), atol=1e-4)
    x = z / z.square().mean(1, keepdim=True).sqrt()
    for l in m.layers:
        x = x @ l.weight.T * .01 / math.sqrt(l.weight.shape[1])
        x = torch.where(x > 0, x, .2 * x) * 2**.5
    assert torch.allclose(m(z), x, atol=1e-4)
    assert m.w_avg.abs().max() == 0
    m(z, update_w_avg=True)
    assert torch.allclose(m.w_avg, x.mean(0) * .005, atol=1e-6)

def test_truncation(G):
    G.w_avg.normal_()
    z = torch.randn(3, 8)
    w, half, none = (G.mapping(z, t) for t in (1., .5, 0.))
    assert torch.allclose(half, (w + G.w_avg) / 2, atol=1e-6) and torch.allclose(none, G.w_avg.expand(3, -1), atol=1e-6)
    assert torch.equal(G.broadcast(w)[:, 3], w) and G.broadcast(w).shape == (3, 6, 8)

def test_later_styles_change_only_later_layers(G):
    a, b = codes(G, 1), codes(G, 1, 1)
    for cut in range(1, G.num_ws):
        seen = []
        hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o)) for n, m in G.synthesis.named_modules()
                 if isinstance(m, (StyledConv, ToRGB))]
        mixed = torch.cat([a[:, :cut], b[:, cut:]], 1)
        for wp in (a, mixed): G.synthesis(wp)
        for h in hooks: h.remove()
        order = [0, 1] + [i for k in range(1, G.num_ws - 1, 2) for i in (k, k + 1, k + 2)]
        n = len(order)
        same = [torch.equal(seen[j], seen[n + j]) for j in range(n)]
        first = next(j for j in range(n) if order[j] >= cut)
        assert all(same[:first]) and not same[first]

def test_noise_kinds(G):
    wp = codes(G, 2)
    for p in (m for m in G.modules() if isinstance(m, StyledConv)): p.noise_strength.data.fill_(.5)
    assert torch.equal(G.synthesis(wp, 'const'), G.synthesis(wp, 'const'))
    assert not torch.equal(G.synthesis(wp, 'random'), G.synthesis(wp, 'random'))
    assert not torch.equal(G.synthesis(wp, 'none'), G.synthesis(wp, 'const'))
    for p in (m for m in G.modules() if isinstance(m, StyledConv)): p.noise_const.zero_()
    assert torch.allclose(G.synthesis(wp, 'none'), G.synthesis(wp, 'const'), atol=1e-5)
    same = G.synthesis(wp[:1].expand(2, -1, -1), 'random')
    assert (same[0] - same[1]).abs().max() > .01                     # every sample has its own

def test_lower_precision_is_close(G):
    wp = codes(G, 4)
    with torch.autocast('cpu', dtype=torch.bfloat16): y = G.synthesis(wp)
    x = G.synthesis(wp)
    assert y.dtype == torch.float32 and (x - y).abs().mean() < .02 * x.abs().mean()

# ---- discriminator and losses

def test_minibatch_std_by_hand():
    x = torch.randn(8, 3, 2, 2)
    y = minibatch_std(x)
    for i in range(2):
        members = x[i::2]
        sd = (members.var(0, correction=0) + 1e-8).sqrt().mean()
        assert torch.allclose(y[i::2, 3], sd.expand(4, 2, 2), atol=1e-6)
    assert torch.equal(y[:, :3], x)

def test_discriminator_by_hand():
    torch.manual_seed(0)
    D, x = Discriminator(8, 64, 8), torch.randn(4, 3, 8, 8)
    lr = lambda y: torch.where(y > 0, y, .2 * y) * 2**.5
    conv = lambda m, x, **kw: F.conv2d(x, m.weight / math.sqrt(m.weight[0].numel()), m.bias, **kw)
    fir = lambda x, p: torch.tensor(np.stack([[upfirdn(c.numpy(), FIR, pad=(p, p)) for c in s] for s in x]), dtype=torch.float32)
    with torch.no_grad():
        h, b = lr(conv(D.fromrgb, x)), D.blocks[0]
        y = lr(conv(b.conv1, fir(lr(conv(b.conv0, h, padding=1)), 2), stride=2))
        h = (y + conv(b.skip, fir(h, 1), stride=2)) * .5**.5
        h = lr(conv(D.conv, minibatch_std(h), padding=1)).flatten(1)
        h = lr(h @ D.fc.weight.T / math.sqrt(D.fc.weight.shape[1]) + D.fc.bias)
        want = (h @ D.out.weight.T / math.sqrt(8) + D.out.bias)[:, 0]
        assert torch.allclose(D(x), want, atol=1e-4)

def test_losses_closed_form():
    r, f = torch.tensor([2., -1.]), torch.tensor([.5, 3.])
    assert torch.allclose(g_loss(f), -torch.sigmoid(f).log().mean(), atol=1e-6)
    assert torch.allclose(d_loss(r, f), -(torch.sigmoid(r).log() + (1 - torch.sigmoid(f)).log()).mean(), atol=1e-5)

def test_relativistic_loss_closed_form():
    r, f = torch.tensor([2., -1.]), torch.tensor([.5, 3.])
    assert torch.allclose(relativistic_loss(r, f), -torch.sigmoid(r - f).log().mean(), atol=1e-6)
    assert torch.allclose(relativistic_loss(f, r) - relativistic_loss(r, f), (r - f).mean(), atol=1e-6)      # ζ(t) − ζ(−t) = t
    assert relativistic_loss(r.bfloat16() + 300, f.bfloat16()).dtype == torch.float32
    assert relativistic_loss(r, r + 1e5).isfinite()

@pytest.mark.parametrize('shape', [(3, 4, 4), (7, 5), (9,)])
def test_r1_of_a_linear_discriminator(shape):
    "Images, W+ codes or w: any rank behind the batch."
    a = torch.randn(shape, requires_grad=True)
    p = r1_penalty(lambda x: (x * a).flatten(1).sum(1) + 5, torch.randn(6, *shape))
    assert torch.allclose(p, a.square().sum().expand(6))
    g, = torch.autograd.grad(p.mean(), a)
    assert torch.allclose(g, 2 * a)

def test_path_length_against_the_jacobian():
    g = Generator(resolution=4, z_dim=3, w_dim=3, num_mapping=1, channel_base=16, channel_max=4)
    wp = torch.randn(2, 2, 3, requires_grad=True)
    img = g.synthesis(wp)
    y = torch.randn_like(img)
    got = path_lengths(img, wp, y)
    for i in range(2):
        J = torch.autograd.functional.jacobian(lambda c: g.synthesis(c[None])[0].flatten(), wp[i].detach())
        Jty = torch.einsum('pld,p->ld', J, y[i].flatten() / 4)
        assert torch.allclose(got[i], Jty.square().sum(1).mean().sqrt(), rtol=1e-3)
    assert got.requires_grad

def test_style_mixing_and_codes(G):
    wp = mix_codes(torch.zeros(3, 8), torch.ones(3, 8), torch.tensor([1, 4, 6]), 6)
    assert wp[:, :, 0].sum(1).tolist() == [5, 2, 0]
    a, b = sample_codes(G, 64, 0., make_rng(0)), sample_codes(G, 64, 1., make_rng(0))
    spread = lambda wp: (wp - wp[:, :1]).abs().amax((1, 2))
    assert (spread(a) == 0).all() and (spread(b) > 0).all()

def test_ema_half_life(G):
    import copy
    d = ema_decay(16, 10**9, 10_000)
    assert abs(d**(10_000 / 16) - .5) < 1e-9 and ema_decay(16, 0) == 0 and ema_decay(16, 1000) < d
    ema = copy.deepcopy(G)
    before = ema.synthesis.b4.const.detach().clone()
    G.synthesis.b4.const.data += 1
    update_ema(ema, G, .75)
    assert torch.allclose(ema.synthesis.b4.const, before + .25, atol=1e-5)

def test_lazy_adam_corrects_rate_and_memory():
    group = lazy_adam([torch.nn.Parameter(torch.zeros(1))], .002, 16).param_groups[0]
    assert math.isclose(group['lr'], .002 * 16 / 17) and math.isclose(group['betas'][1], .99**(16 / 17))

def test_doubled_networks_start_where_the_small_ones_are():
    G, D = Generator(**TINY), Discriminator(16, 128, 16)
    H, E = double_resolution(G, D)
    z = torch.randn(4, 8)
    with torch.no_grad(): assert torch.allclose(H(z, noise='none'), upsample(G(z, noise='none'), low_pass_kernel()), atol=1e-5)
    assert H.resolution == 32 and E(torch.randn(4, 3, 32, 32)).shape == (4,) and torch.equal(H.w_avg, G.w_avg)
    for k in ('conv', 'fc', 'out'): assert torch.equal(getattr(E, k).weight, getattr(D, k).weight)
    assert all(torch.equal(a.conv0.weight, b.conv0.weight) for a, b in zip(D.blocks, E.blocks[1:]))

def test_cached_batches(tmp_path):
    draw = cached_batches(20, 16, 0, tmp_path/'bank.npy')
    x = draw(6, make_rng(3))
    assert x.shape == (6, 3, 16, 16) and x.abs().max() <= 1
    again = cached_batches(20, 16, 0, tmp_path/'bank.npy')
    assert torch.equal(x, again(6, make_rng(3))) and [p.name for p in tmp_path.iterdir()] == ['bank.npy']

# ---- the loop, killed

SCRIPT = '''
import sys, torch
torch.set_num_threads(1)
from cycle_nb.train_generator import AdversarialTask, train_generator
from cycle_nb.gan import Discriminator
from cycle_nb.stylegan2 import Generator
torch.manual_seed(0)
G = Generator(16, 8, 8, 2, 128, 16)
D = Discriminator(16, 128, 16)
real = lambda n, rng: (torch.randn(n, 8, generator=rng), torch.rand(n, 3, 16, 16, generator=rng)*2 - 1)
look = lambda a, b: (a - b).square().mean((1, 2, 3))
task = AdversarialTask(G, D, real, 60, 4, r_every=4, path_every=4, alone=5, anchor=1., distance=look, rise=40, cool=.3)
E = train_generator(task, sys.argv[1], save_every=10, log_every=10, sheet_every=30)
torch.save([E.state_dict(), D.state_dict()], sys.argv[1] + '/end.pt')
'''

def start(out):
    env = os.environ | {'PYTHONPATH': str(Path(__file__).parent.parent), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(out)], env=env, stdout=subprocess.DEVNULL)

def test_resumed_after_a_kill_equals_unbroken(tmp_path):
    whole, broken = start(tmp_path/'a'), start(tmp_path/'b')
    file, end = tmp_path/'b/checkpoint.pt', time.time() + 50
    while not file.exists() and time.time() < end: time.sleep(.01)
    time.sleep(.1)
    broken.send_signal(signal.SIGKILL)
    assert broken.wait() == -signal.SIGKILL and not (tmp_path/'b/end.pt').exists()
    assert start(tmp_path/'b').wait() == 0 and whole.wait() == 0
    a, b = (torch.load(tmp_path/k/'end.pt', weights_only=True) for k in 'ab')
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert len((tmp_path/'a/log.jsonl').read_text().splitlines()) == 6 and (tmp_path/'a/sheet_000060.png').exists()

# ---- files

def test_round_trip(G, tmp_path):
    G.w_avg.normal_()
    save_model(G, tmp_path/'g.safetensors', half=False)
    H, z = load_generator(tmp_path/'g.safetensors'), torch.randn(4, 8)
    assert torch.equal(G(z, .7), H(z, .7)) and H.config == G.config and H.card['class'] == 'Generator'
    save_model(G, tmp_path/'h.safetensors')
    H = load_generator(str(tmp_path/'h.safetensors'))
    assert (G(z) - H(z)).abs().max() < .03 and H.w_avg.dtype == torch.float32
    assert (tmp_path/'h.safetensors').stat().st_size < .6 * (tmp_path/'g.safetensors').stat().st_size

def test_unknown_names_are_named():
    for load in (load_generator, load_encoder):
        with pytest.raises(InputError, match='no_such_thing'): load('no_such_thing')
        with pytest.raises(InputError, match='package has'): load('no/such')

def test_leftovers_are_named(G, tmp_path):
    sd = G.state_dict()
    sd['surplus'] = sd.pop('mapping.w_avg')
    sd['synthesis.b4.const'] = sd['synthesis.b4.const'][:2]
    with pytest.raises(InputError) as e: model_from_card({'class': 'Generator', 'config': G.config}, sd, 'some.safetensors')
    for s in ('some.safetensors', 'surplus', 'mapping.w_avg', 'synthesis.b4.const'): assert s in str(e.value)

def test_class_table_is_closed(tmp_path):
    for name in ('system', 'os.system', None, 7):
        with pytest.raises(InputError): model_from_card({'class': name, 'config': {}}, {}, 'x')

def test_damaged_file_is_an_input_error(G, tmp_path):
    save_model(G, tmp_path/'g.safetensors')
    data = (tmp_path/'g.safetensors').read_bytes()
    for bad in (b'', data[:7], data[:100], data[:-10], b'\xff' * 64):
        (tmp_path/'bad.safetensors').write_bytes(bad)
        with pytest.raises(InputError): load_generator(tmp_path/'bad.safetensors')

def test_a_width_without_channels_is_refused():
    for make in (Generator, Discriminator):
        for kw in (dict(resolution=4096), dict(resolution=64, channel_base=32), dict(channel_max=0)):
            with pytest.raises(InputError, match='no channel is left'): make(**kw)
    assert Generator(resolution=8, z_dim=4, w_dim=4, channel_base=1, channels=[4, 2]).synthesis.b8.conv1.weight.shape[0] == 2
