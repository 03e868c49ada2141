"Encoders of others, ArcFace, direction files, an own bundle: against plain computations on the public names."
import argparse, contextlib, re, zipfile
import numpy as np
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from cycle_nb.core import InputError, make_rng
from cycle_nb.files import save_image
from cycle_nb.models import load_model, make_card, save_model
from cycle_nb.stylegan2 import Generator
from cycle_nb.features import Attributes, Identity, Perceptual, resize_to
from cycle_nb.latents import spread
from cycle_nb.losses import LPIPS
from cycle_nb.encoder import Encoder, encode_with, restyle
from cycle_nb.schedule import SDFACES64
from cycle_nb.train_encoder import start_task
from cycle_nb.directions import load_directions, save_directions
from cycle_nb.archives import read_checkpoint
from cycle_nb.checkpoints import load_generator, read_directions
from cycle_nb.encoder_checkpoints import (ENCODER_TYPES, ArcFace, PublishedEncoder, arcface_from_tensors, check_fit, encoder_from_checkpoint, load_arcface,
    load_encoder, published_key, start_from_arcface)
from cycle_nb.bundle import Bundle, encode, evaluator, load_bundle
from cycle_nb.cli import main
from cycle_nb.inversion import Inversion, invert, measure_reconstruction
from cycle_nb.pipeline import find_pivot, parse_method, run_pipeline
from tiny import default_dtype

UNITS = [(i, o, 2 if k == 0 else 1) for i, o, n in ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
         for k, (i, o) in enumerate([(i, o)] + [(o, o)]*(n - 1))]


# --- the published encoders, written from their names --------------------------------------

class Maker:
    "Random tensors under the public names; batch statistics and slopes that are not trivial."
    def __init__(self, seed): self.g, self.sd = make_rng(seed), {}
    def add(self, name, *shape, scale=1., shift=0.): self.sd[name] = torch.randn(*shape, generator=self.g)*scale + shift
    def conv(self, name, o, i, k, bias=False):
        self.add(f'{name}.weight', o, i, k, k, scale=(i*k*k)**-.5)
        if bias: self.add(f'{name}.bias', o, scale=.1)
    def norm(self, name, c):
        self.add(f'{name}.weight', c, scale=.1, shift=1); self.add(f'{name}.bias', c, scale=.1)
        self.add(f'{name}.running_mean', c, scale=.2)
        self.sd[f'{name}.running_var'] = torch.rand(c, generator=self.g) + .5
        self.sd[f'{name}.num_batches_tracked'] = torch.tensor(7)
    def body(self, channels=3):
        self.conv('input_layer.0', 64, channels, 3); self.norm('input_layer.1', 64); self.add('input_layer.2.weight', 64, scale=.1, shift=.25)
        for n, (i, o, _) in enumerate(UNITS):
            b = f'body.{n}.res_layer'
            if i != o: self.conv(f'body.{n}.shortcut_layer.0', o, i, 1); self.norm(f'body.{n}.shortcut_layer.1', o)
            self.norm(f'{b}.0', i); self.conv(f'{b}.1', o, i, 3); self.add(f'{b}.2.weight', o, scale=.1, shift=.25)
            self.conv(f'{b}.3', o, o, 3); self.norm(f'{b}.4', o)
            self.conv(f'{b}.5.fc1', o//16, o, 1); self.conv(f'{b}.5.fc2', o, o//16, 1)
        return self
    def heads(self, L, D=512, coarse_only=False, res=256):
        for i in range(L):
            n = int(np.log2(res)) - (4 if i < 3 or coarse_only else 3 if i < 7 else 2)
            for k in range(n): self.conv(f'styles.{i}.convs.{2*k}', D if k == n - 1 else 512, 512, 3, bias=True)
            self.add(f'styles.{i}.linear.weight', D, D); self.add(f'styles.{i}.linear.bias', D)
        if not coarse_only: self.conv('latlayer1', 512, 256, 1, bias=True); self.conv('latlayer2', 512, 128, 1, bias=True)
        return self
    def top(self, side=7, affine=True):
        self.norm('output_layer.0', 512); self.norm('output_layer.4', 512)
        self.add('output_layer.3.weight', 512, 512*side**2, scale=.01); self.add('output_layer.3.bias', 512)
        if not affine: del self.sd['output_layer.4.weight'], self.sd['output_layer.4.bias']
        return self


def bn(sd, name, x):
    return F.batch_norm(x, sd[f'{name}.running_mean'], sd[f'{name}.running_var'], sd.get(f'{name}.weight'), sd.get(f'{name}.bias'), False, 0., 1e-5)


def public_body(sd, x):
    "The features after the body's units 6, 20 and 23."
    x = F.prelu(bn(sd, 'input_layer.1', F.conv2d(x, sd['input_layer.0.weight'], padding=1)), sd['input_layer.2.weight'])
    kept = []
    for n, (i, o, stride) in enumerate(UNITS):
        b, s = f'body.{n}.res_layer', f'body.{n}.shortcut_layer'
        side = x[..., ::stride, ::stride] if i == o else bn(sd, f'{s}.1', F.conv2d(x, sd[f'{s}.0.weight'], stride=stride))
        r = F.prelu(F.conv2d(bn(sd, f'{b}.0', x), sd[f'{b}.1.weight'], padding=1), sd[f'{b}.2.weight'])
        r = bn(sd, f'{b}.4', F.conv2d(r, sd[f'{b}.3.weight'], stride=stride, padding=1))
        gate = F.relu(F.conv2d(F.adaptive_avg_pool2d(r, 1), sd[f'{b}.5.fc1.weight']))
        x = r*F.conv2d(gate, sd[f'{b}.5.fc2.weight']).sigmoid() + side
        if n in (6, 20, 23): kept.append(x)
    return kept


def public_heads(sd, feats, L, coarse_only=False):
    "What the heads say, one after the other."
    c1, c2, c3 = feats
    maps = [c3]
    if not coarse_only:
        up = lambda x, y: F.interpolate(x, y.shape[-2:], mode='bilinear', align_corners=True) + y
        maps.append(up(c3, F.conv2d(c2, sd['latlayer1.weight'], sd['latlayer1.bias'])))
        maps.append(up(maps[1], F.conv2d(c1, sd['latlayer2.weight'], sd['latlayer2.bias'])))
    out = []
    for i in range(L):
        x = maps[0 if coarse_only or i < 3 else 1 if i < 7 else 2]
        while x.shape[-1] > 1:
            k = 2*int(np.log2(maps[0 if coarse_only or i < 3 else 1 if i < 7 else 2].shape[-1]/x.shape[-1]))
            x = F.leaky_relu(F.conv2d(x, sd[f'styles.{i}.convs.{k}.weight'], sd[f'styles.{i}.convs.{k}.bias'], 2, 1), .01)
        W = sd[f'styles.{i}.linear.weight']
        out.append(F.linear(x.flatten(1), W*W.shape[1]**-.5, sd[f'styles.{i}.linear.bias']))
    return torch.stack(out, 1)


def close(a, b): assert (a - b).abs().max() <= 1e-4*b.abs().max(), (a - b).abs().max()/b.abs().max()


def img(n=1, res=256, channels=3, seed=1): return torch.rand(n, channels, res, res, generator=make_rng(seed))*2 - 1


def file(sd, avg, kind, **opts):
    opts = dict(encoder_type=kind, start_from_latent_avg=True) | opts
    return dict(state_dict={f'encoder.{k}': v for k, v in sd.items()} | {'decoder.style.0.x': torch.zeros(1)}, latent_avg=avg, opts=opts)


@torch.no_grad()
def test_full_size_e4e_and_cycle():
    "Eighteen heads at 256 px, both ways of inference."
    sd, avg = Maker(0).body().heads(18).sd, torch.randn(512)
    E = encoder_from_checkpoint(file(sd, avg.repeat(18, 1), 'Encoder4Editing'))
    x = img()
    h = public_heads(sd, public_body(sd, x), 18)
    w = h[:, :1].expand(-1, 18, -1)
    released = w + torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:]], 1) + avg
    assert E.stage == 17 and (E.resolution, E.num_ws, E.w_dim, E.size) == (256, 18, 512, 'full')
    close(E(x), released)
    close(E(x, stage=0), w + avg)
    close(E(x, stage=5)[:, :6], released[:, :6])
    assert {published_key(k) for k in E.state_dict()} == set(sd) | {'w_avg'}


@pytest.fixture(scope='module')
def small():
    "Four heads at 64 px, and what they say of one image."
    sd = Maker(1).body().heads(4, res=64).sd
    x = img(res=64)
    with torch.no_grad(): return sd, x, public_heads(sd, public_body(sd, x), 4)


@torch.no_grad()
def test_through_a_file_with_a_namespace(small, tmp_path):
    sd, x, h = small
    opts = argparse.Namespace(encoder_type='Encoder4Editing', start_from_latent_avg=True)
    torch.save(file(sd, torch.ones(4, 512), None) | dict(opts=opts), tmp_path/'e4e.pt')
    E = encoder_from_checkpoint(read_checkpoint(tmp_path/'e4e.pt'), tmp_path/'e4e.pt')
    assert torch.equal(load_encoder(tmp_path/'e4e.pt')(x), E(x))
    close(E(x), torch.cat([h[:, :1], h[:, :1] + h[:, 1:]], 1) + 1)


@torch.no_grad()
def test_psp_gives_codes_not_offsets(small):
    sd, x, h = small
    rows = torch.randn(4, 512)
    E = encoder_from_checkpoint(file(sd, rows, 'GradualStyleEncoder'))
    close(E(x), h + rows)
    assert E.layered and E.config['layered'] and torch.equal(E.w_avg, rows)
    E = encoder_from_checkpoint(file(sd, rows, 'GradualStyleEncoder', start_from_latent_avg=False))
    close(E(x), h)
    E = encoder_from_checkpoint({k: v for k, v in sd.items() if 'num_batches' not in k}, 'old.pt', 'GradualStyleEncoder', rows[0])
    close(E(x), h + rows[0])


@torch.no_grad()
def test_every_kind_of_encoder_is_rebuilt_by_its_card(tmp_path):
    E = Encoder(64, 10, 16, w_avg=torch.randn(10, 16), channels=6, offsets=False, maps=1, stage=9).eval()
    save_model(E, tmp_path/'mine.safetensors', half=False)
    assert torch.equal(load_encoder(tmp_path/'mine.safetensors')(img(2, 64, 6)), E(img(2, 64, 6)))
    pytest.importorskip('huggingface_hub')
    E.save_pretrained(tmp_path/'hub')
    back = Encoder.from_pretrained(tmp_path/'hub')
    assert type(back) is Encoder and back.config == E.config and torch.equal(back(img(2, 64, 6)), E(img(2, 64, 6)))


@pytest.mark.parametrize('change, words', [
    (lambda c: c | dict(opts={}), 'encoder_type='), (lambda c: c | dict(opts=None), 'encoder_type='),
    (lambda c: c | dict(latent_avg=None), 'latent_avg'), (lambda c: c | dict(latent_avg=torch.zeros(3, 512) + torch.arange(3)[:, None]), r'\(3, 512\)'),
    (lambda c: c | dict(opts=dict(encoder_type='SharedWeightsHyperNetResNet')), 'SharedWeightsHyperNetResNet.*known are Encoder4Editing'),
    (lambda c: c | dict(opts=dict(encoder_type='SingleStyleCodeEncoder')), 'input_layer, body, styles'),
    (lambda c: c | dict(state_dict={k: v for k, v in c['state_dict'].items() if 'body.9.res_layer.1.' not in k}), 'missing: body.9.res_layer.1.weight'),
    (lambda c: c | dict(state_dict=c['state_dict'] | {'encoder.neck.weight': torch.zeros(1)}), 'left over: neck.weight'),
    (lambda c: c | dict(state_dict=c['state_dict'] | {'encoder.latlayer1.weight': torch.zeros(512, 128, 1, 1)}), 'wrong shape: latlayer1.weight'),
    (lambda c: dict(state_dict={}, opts=c['opts'], latent_avg=c['latent_avg']), r'no encoder.*state_dict \(0 inside\), opts'),
    (lambda c: dict(net=c['state_dict'], opts=c['opts'], step=3), r'no encoder.*net \(\d+ inside\), opts .*, step')])
def test_what_does_not_fit_is_named(small, change, words):
    with pytest.raises(InputError, match=words) as e: encoder_from_checkpoint(change(file(small[0], torch.zeros(512), 'Encoder4Editing')), 'f.pt')
    assert str(e.value).startswith('f.pt') and '\n' not in str(e.value)


@pytest.mark.parametrize('data', [
    None, [], torch.zeros(3), 'x', {}, {'state_dict': None}, {'state_dict': [1]}, {1: torch.zeros(1)}, {'state_dict': {3: 4}},
    {'state_dict': {f'styles.{i}.linear.weight': torch.zeros(2, 2) for i in range(2000)} | {'input_layer.0.weight': torch.zeros(1, 3, 1, 1)}}])
@pytest.mark.parametrize('kind', ['Encoder4Editing', 'BackboneEncoder'])
def test_what_is_no_encoder(data, kind):
    with pytest.raises(InputError, match='^f.pt: '): encoder_from_checkpoint(data, 'f.pt', kind, torch.zeros(512))


@pytest.mark.parametrize('opts', [None, [], 'Encoder4Editing', {'encoder_type': ['Encoder4Editing']}, {'encoder_type': 7}, argparse.Namespace()])
def test_strange_options(small, opts):
    with pytest.raises(InputError, match='^f.pt: .*encoder_type'): encoder_from_checkpoint(file(small[0], torch.zeros(512), '') | dict(opts=opts), 'f.pt')


@pytest.mark.parametrize('avg', ['x', 3, torch.zeros(()), torch.zeros(512, 4), torch.full((512,), np.nan), torch.zeros(2, 2, 512)])
def test_strange_mean_codes(small, avg):
    with pytest.raises(InputError, match='^f.pt: its mean code'): encoder_from_checkpoint(file(small[0], avg, 'Encoder4Editing'), 'f.pt')


def test_numbers_that_are_not_finite(small):
    sd = small[0] | {'body.3.res_layer.4.running_var': torch.full((128,), np.inf)}
    with pytest.raises(InputError, match='f.pt: body.3.res_layer.4.running_var holds'): encoder_from_checkpoint(file(sd, torch.zeros(512), 'Encoder4Editing'), 'f.pt')


@torch.no_grad()
def test_restyle_six_channels_one_map():
    "BackboneEncoder: six channels, all heads on the coarse map; the loop against the formula."
    sd, avg = Maker(2).body(6).heads(6, coarse_only=True, res=64).sd, torch.randn(512)
    E = encoder_from_checkpoint(file(sd, avg, 'BackboneEncoder'))
    x6 = img(res=64, channels=6)
    close(E(x6), public_heads(sd, public_body(sd, x6), 6, True) + avg)
    torch.manual_seed(0)
    G, x = Generator(16, z_dim=8, w_dim=512, channel_base=64, channel_max=8).eval(), img(res=64, seed=3)
    codes, wp = restyle(x, E, G, 2), avg.expand(1, 6, -1)
    for c in codes:
        y = F.interpolate(G.synthesis(wp, noise='const'), (64, 64), mode='bilinear', align_corners=False)
        wp = wp + public_heads(sd, public_body(sd, torch.cat([x, y], 1)), 6, True)
        close(c, wp)
    with pytest.raises(InputError, match='encode_with'): E(x)


# --- one code for all layers, pictures wider than high --------------------------------------

def one_code(seed=7):
    "The tensors of an encoder without heads."
    m = Maker(seed).body()
    m.add('linear.weight', 512, 512); m.add('linear.bias', 512)
    return m.sd


def wide():
    "A picture of 192 rows, as the public car encoders read it."
    return F.interpolate(torch.rand(1, 3, 12, 16, generator=make_rng(5))*2 - 1, (192, 256), mode='bilinear', align_corners=False)


@torch.no_grad()
@pytest.mark.parametrize('kind', [k for k, v in ENCODER_TYPES.items() if 'pooled' in v])
def test_single_code(kind, tmp_path):
    "All layers get the mean of the last map through one linear layer; the public classes' numbers, recorded once."
    sd, avg = one_code(), torch.randn(512, generator=make_rng(2))
    torch.save(file(sd, avg[None], kind, output_size=256), tmp_path/'w.pt')
    E = load_encoder(tmp_path/'w.pt')
    x = F.interpolate(wide(), (256, 256), mode='bilinear', align_corners=False)
    w = public_body(sd, x)[2].mean((2, 3)) @ sd['linear.weight'].T*512**-.5 + sd['linear.bias']
    assert E.num_ws == 14 and E.stage == 0 and E(x).shape == (1, 14, 512)
    close(E(x), (w + avg)[:, None].expand(-1, 14, -1))
    close((E(x) - avg)[0, 13, :4], torch.tensor([.33858663, 3.51176906, .14514422, -1.83590865]))
    assert torch.equal(E(x, stage=0), E(x))
    with pytest.raises(InputError, match='codes in W'): E(x, stage=13)
    save_model(E, tmp_path/'mine.safetensors', half=False)
    back = load_model(tmp_path/'mine.safetensors')
    assert type(back) is PublishedEncoder and torch.equal(back(x), E(x)) and back.config == E.config


@torch.no_grad()
@pytest.mark.parametrize('facts, L', [
    (dict(opts=dict(output_size=1024)), 18), (dict(opts=dict(stylegan_size=512)), 16), (dict(latent_avg=torch.zeros(10, 512)), 10),
    (dict(decoder=6), 8), (dict(decoder=6, opts=dict(output_size=1024), latent_avg=torch.zeros(18, 512)), 8), (dict(), None), (dict(opts=dict(output_size='big')), None)])
def test_how_many_codes_a_single_one_becomes(facts, L):
    "The generator inside says it first, then the mean code's rows, then the options; nothing: a question."
    sd = {f'encoder.{k}': v for k, v in one_code().items()} | {f'decoder.convs.{i}.conv.weight': torch.zeros(1) for i in range(facts.get('decoder', 0))}
    data = dict(state_dict=sd, latent_avg=facts.get('latent_avg', torch.zeros(512)), opts=dict(encoder_type='WEncoder') | facts.get('opts', {}))
    if L and facts.get('latent_avg', torch.zeros(1, 1)).shape[0] in (1, 512, L): assert encoder_from_checkpoint(data).num_ws == L
    else:
        with pytest.raises(InputError, match='mean code is' if L else 'give num_ws'): encoder_from_checkpoint(data)
    assert encoder_from_checkpoint(data | dict(latent_avg=torch.zeros(512)), num_ws=12).num_ws == 12


@torch.no_grad()
def test_the_mean_code_of_a_single_code():
    "HyperStyle's class always adds it, the others when their options say so."
    sd = one_code()
    for kind, option, added in (('WEncoder', False, 1), ('WEncoder', True, 1), ('SingleStyleCodeEncoder', False, 0), ('SingleStyleCodeEncoder', True, 1)):
        E = encoder_from_checkpoint(file(sd, torch.ones(512), kind, start_from_latent_avg=option, output_size=16))
        assert torch.equal(E.w_avg, torch.full((512,), float(added)))
    with pytest.raises(InputError, match='latent_avg'): encoder_from_checkpoint(file(sd, None, 'WEncoder', output_size=16))


@torch.no_grad()
def test_cars(tmp_path):
    "192x256, as e4e's own class reads it (its numbers, recorded once), and from a square the rows between the bars."
    sd, avg = Maker(6).body().heads(6).sd, torch.randn(512, generator=make_rng(2))*.3
    torch.save(file(sd, avg.repeat(6, 1), 'Encoder4Editing', dataset_type='cars_encode', stylegan_size=16), tmp_path/'cars.pt')
    E, x = load_encoder(tmp_path/'cars.pt'), wide()
    h = public_heads(sd, public_body(sd, x), 6)
    close(E(x), torch.cat([h[:, :1], h[:, :1] + h[:, 1:]], 1) + avg)
    close((E(x) - avg)[0, [0, 3, 5], :4], torch.tensor([[-.25131494, 2.5291574, 1.12277699, -.46549675], [-.11194259, 1.02554739, 1.03479159, .85967803],
                                                        [.60301596, 5.18477058, .29999244, -1.00206351]]))
    bars = F.pad(x, [0, 0, 32, 32], value=-1.)
    large = F.interpolate(bars, (512, 512), mode='nearest')               # a generator's picture, its bars included
    for y in (bars, large, large[:, :, 64:448], F.pad(x, [0, 0, 32, 32], value=1.)): close(E(y), E(x))
    assert (E(F.interpolate(x, (256, 256), mode='area')) - E(x)).norm() > .02*(E(x) - avg).norm()      # stretched: another picture
    save_model(E, tmp_path/'mine.safetensors', half=False)
    assert torch.equal(load_encoder(tmp_path/'mine.safetensors')(x), E(x))
    assert load_encoder(tmp_path/'cars.pt').rows == 192 and type(encoder_from_checkpoint(file(sd, avg, 'Encoder4Editing', dataset_type='ffhq_encode'))) is Encoder


@torch.no_grad()
def test_cars_with_restyle_and_with_a_single_code():
    "Both parts of the pair are brought to the rows; the same for a square target and the picture between its bars."
    sd, avg = Maker(2).body(6).heads(6, coarse_only=True, res=64).sd, torch.randn(512)
    E = encoder_from_checkpoint(file(sd, avg, 'BackboneEncoder', dataset_type='cars_encode'))
    torch.manual_seed(0)
    G, x = Generator(16, z_dim=8, w_dim=512, channel_base=64, channel_max=8).eval(), img(res=64, seed=3)[:, :, 8:56]
    wp = avg.expand(1, 6, -1)
    for square, c in zip(restyle(F.pad(x, [0, 0, 8, 8]), E, G, 2), restyle(x, E, G, 2)):
        y = F.interpolate(G.synthesis(wp, noise='const'), (64, 64), mode='bilinear', align_corners=False)[:, :, 8:56]
        wp = wp + public_heads(sd, public_body(sd, torch.cat([x, y], 1)), 6, True)
        close(c, wp); close(square, wp)
    E = encoder_from_checkpoint(file(one_code(), avg, 'WEncoder', output_size=16, dataset_type='cars_encode'))
    w = public_body(one_code(), wide())[2].mean((2, 3)) @ one_code()['linear.weight'].T*512**-.5 + one_code()['linear.bias']
    close(E(F.pad(wide(), [0, 0, 32, 32])), (w + avg)[:, None].expand(-1, 6, -1))


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([(16, 12), (32, 24), (32, 32), (24, 6)]))
@settings(max_examples=30, deadline=None)
def test_pictures_of_any_shape_reach_a_wide_encoder(h, w, size):
    "A square gives up its outer rows, and so does any picture between bars; others are read whole."
    side, rows = size
    with torch.device('meta'): E = PublishedEncoder(rows=rows, resolution=32, num_ws=4, w_dim=8, size='small')
    E.resolution = side
    x = torch.rand(1, 3, h, w, generator=make_rng(h*100 + w))
    y = E.resize(x)
    assert y.shape == (1, 3, rows, side) and y.min() >= 0 and y.max() <= 1 and torch.equal(E.resize(y), y)
    if h == w: assert torch.equal(y, resize_to(x, side)[:, :, (side - rows)//2:(side + rows)//2])
    flat = torch.full((1, 3, h, w), .25)
    assert torch.allclose(E.resize(flat), torch.full_like(y, .25), atol=1e-6)      # nothing is invented at the edges
    k = (side - rows)//2
    assert torch.equal(E.resize(F.pad(y, [0, 0, k, k])), y)


def test_resnet34_body():
    "Against torchvision's own, whose names it has."
    from torchvision.models import resnet34
    torch.manual_seed(0)
    net = resnet34().eval()
    E = Encoder(64, 2, 512, 'resnet34').eval()
    for mine, theirs in zip(E.body.stages, (net.layer1, net.layer2, net.layer3, net.layer4)): mine.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        y = x = E.body.input(img(res=64))
        feats = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4): y = layer(y); feats.append(y)
        for a, b in zip(E.body(img(res=64)), feats[-3:]): assert torch.equal(a, b)
    assert [f.shape[-1] for f in feats] == [32, 16, 8, 4] and x.shape[-1] == 32
    names = {published_key(k, 'resnet34') for k in E.state_dict() if k.startswith('body')}
    assert {'conv1.weight', 'bn1.running_var', 'relu.weight', 'body.15.bn2.weight', 'body.3.downsample.0.weight'} <= names and 'body.16.bn1.weight' not in names


# --- identity ------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize('affine', [True, False])
def test_arcface(tmp_path, affine):
    sd = Maker(3).body().top(affine=affine).sd
    torch.save(sd, tmp_path/'model_ir_se50.pth')
    net = load_arcface(tmp_path/'model_ir_se50.pth')
    x = img(2, 512)
    small = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2)[:, :, 35:223, 32:220], 112)
    y = bn(sd, 'output_layer.0', public_body(sd, small)[-1]).flatten(1)
    y = bn(sd, 'output_layer.4', F.linear(y, sd['output_layer.3.weight'], sd['output_layer.3.bias']))
    want = y/y.norm(dim=1, keepdim=True)
    close(net.embed(x), want)
    assert torch.allclose(net.similarity(x, x.flip(0)), (want*want.flip(0)).sum(1), atol=1e-4)
    assert not any(p.requires_grad for p in net.parameters())


def test_arcface_starts_an_encoder():
    sd = Maker(4).body().top().sd
    E = start_from_arcface(Encoder(64, 1, 512, 'full', channels=6).eval(), sd)
    x = img(res=64)
    E.body.input[0].weight.data[:, 3:] = 0
    with torch.no_grad():
        for a, b in zip(E.body(torch.cat([x, x], 1)), public_body(sd, x)): close(a, b)
    for bad in ({}, {k: v for k, v in sd.items() if 'body.5.' not in k}):
        with pytest.raises(InputError): start_from_arcface(E, bad)
    with pytest.raises(InputError, match='small'): start_from_arcface(Encoder(), sd)
    for bad in ({}, Maker(5).body().sd, {k: v for k, v in sd.items() if 'body.5.' not in k}):
        with pytest.raises(InputError, match='f.pth'): arcface_from_tensors(bad, 'f.pth')


# --- an own bundle -------------------------------------------------------------------------

@pytest.fixture(scope='module')
def own():
    torch.manual_seed(0)
    G = Generator(32, z_dim=8, w_dim=24, channel_base=128, channel_max=16).eval()
    E = Encoder(32, G.num_ws, 24, w_avg=torch.randn(G.num_ws, 24)*.1, stage=3)
    torch.nn.init.normal_(E.heads[2].linear.weight)
    return Bundle.from_networks(G, E, LPIPS(pnet_rand=True), directions={'a': torch.randn(24), 'b': torch.randn(G.num_ws, 24)}, device='cpu')


def test_own_bundle_goes_the_whole_road(own, tmp_path):
    "No feature networks of SDFaces, no W encoder, no identity; saved and read again."
    for i, x in enumerate(img(2, 32)): save_image(x, tmp_path/'in'/f'{i}.png')
    inv = invert(tmp_path/'in', own, refine=2, tune=3, preset='paper', threshold=0.)
    assert list(inv.images_by_step) == ['cycle', 'refine', 'tune'] and inv.cards[0]['preset'] == 'paper'
    assert all(set(m) == {'image', 'step', 'mse', 'perceptual', 'seconds'} for m in inv.metrics) and 'identity' not in repr(inv)
    assert torch.allclose(inv.codes_by_step['cycle'], own.encoder()(inv.target), atol=1e-5)
    moved = inv.edit('b', 1.5)
    assert torch.allclose(moved, inv.synthesis(inv.wp + 1.5*own.directions['b']), atol=1e-5)
    inv.save(tmp_path/'out')
    back = Inversion.load(tmp_path/'out', bundle=own)
    assert torch.equal(back.wp, inv.wp) and (back.edit('b', 1.5) - moved).abs().max() < .02
    with pytest.raises(InputError, match="known edits: a, b"): inv.edit('c')


def test_own_bundle_refuses_directions_of_others(own):
    with pytest.raises(InputError, match=r'\(512,\).*\(24,\)'):
        Bundle.from_networks(own.generator, own.encoder(), own.perceptual, directions={'age': torch.randn(512)})


def test_own_identity_is_measured(own):
    class Who(torch.nn.Module):
        def embed(self, x): return F.normalize(x.flatten(1), dim=1)
        def similarity(self, a, b): return (self.embed(a)*self.embed(b)).sum(1)
    b = Bundle.from_networks(own.generator, {'psp': own.encoder()}, own.perceptual, Who(), reg_images=img(2, 32), device='cpu')
    x = img(2, 32)
    assert [round(m['identity'], 4) for m in measure_reconstruction(x, x, b)] == [1, 1] and b.reg_images().shape[0] == 2
    inv = invert(x, b, encoder='psp', refine=1, tune=0)
    assert list(inv.images_by_step) == ['psp', 'refine'] and 'identity' in inv.metrics[0]
    with pytest.raises(InputError, match='nothing|unknown encoder'): invert(x, b, encoder='other')


def test_encoder_of_a_large_generator_reads_256_pixels():
    "Images are pooled, as published; any w width."
    G = Generator(512, z_dim=8, w_dim=12, channel_base=2048, channel_max=4)
    E = start_task(G, (None, None), None, SDFACES64, 'small', 0).E.eval()
    assert (E.resolution, E.num_ws, E.w_dim) == (256, 16, 12)
    with torch.no_grad(): assert torch.allclose(E(img(1, 512)), E(F.avg_pool2d(img(1, 512), 2)), atol=1e-5)


# --- parts that were not made for one another ------------------------------------------------

BODY = dict(widths=(8, 8, 12, 12, 16), depth=(1, 1, 1, 1, 1))


def any_part(i):
    "A generator, and what fits it, of random sizes."
    rng = np.random.default_rng(i)
    res, D, c = int(rng.choice([32, 64, 128])), int(rng.choice([8, 24])), int(rng.choice([1, 3, 3, 4]))
    with torch.device('meta'): G = Generator(res, 8, D, 1, 256, 8, img_channels=c)
    with torch.device('meta'): E = Encoder(int(rng.choice([32, 64])), G.num_ws, D, channels=c*int(rng.choice([1, 2])))
    return G, E, {'a': torch.ones(D), 'b': torch.ones(G.num_ws, D)}


def test_parts_fit_exactly_when_their_sizes_do():
    "Over random pairs: no word where all sizes agree, else one line that names each difference and no other."
    said = 0
    for i in range(12):
        for j in range(12):
            (G, _, _), (H, E, directions) = any_part(i), any_part(j)
            c = G.config['img_channels']
            odd = {'codes of': (E.num_ws, E.w_dim) != (G.num_ws, G.w_dim), 'encoder reads': E.channels not in (c, 2*c), "'a' is (": H.w_dim != G.w_dim,
                   "'b' is (": (H.num_ws, H.w_dim) != (G.num_ws, G.w_dim)}
            try: check_fit(G, E, directions, name='n'); line = ''
            except InputError as e: line = str(e)
            assert '\n' not in line and (not line or line.startswith('n: ')) and {k: k in line for k in odd} == odd, (line, odd)
            said += bool(line)
    assert 30 < said < 144


@pytest.mark.parametrize('n', [1, 4])
def test_feature_networks_need_the_generators_channels(n):
    G = Generator(64, 32, 32, 2, 512, 16, img_channels=n)
    nets = Perceptual(**BODY), Identity(**BODY), Attributes(**BODY), LPIPS(pnet_rand=True), None
    for net in nets[:4]:
        with pytest.raises(InputError, match=f'{type(net).__name__} reads 3 image channels, the generator draws {n}'): check_fit(G, nets=[net])
    check_fit(Generator(64, 32, 32, 2, 512, 16), Encoder(64, 10, 32), nets=nets)


def test_a_sixteenth_of_the_side_is_too_small():
    with torch.device('meta'): full, arc = Generator(1024, 512, 512, 2, 2048, 4), ArcFace()
    check_fit(full, Encoder(256, 18, 512), nets=[LPIPS(pnet_rand=True), arc])
    with pytest.raises(InputError, match='Perceptual reads 64 px, the generator draws 1024'): check_fit(full, nets=[Perceptual(**BODY)])
    with pytest.raises(InputError, match='encoder reads 64 px, the generator draws 1024'): check_fit(full, Encoder(64, 18, 512))


@pytest.mark.parametrize('res, codes, dim', [(32, 10, 32), (128, 10, 32), (64, 10, 48)])
def test_a_wrong_pair_is_refused_before_anything_runs(res, codes, dim):
    "More codes than the generator takes, fewer, of another length."
    G, E = Generator(res, 32, 32, 2, 512, 16), Encoder(64, num_ws=codes, w_dim=dim, stage=codes - 1).eval()
    with pytest.raises(InputError, match=f'{codes} codes of {dim} numbers, the generator takes {G.num_ws} of 32') as e:
        invert(torch.zeros(1, 3, 64, 64), Bundle.from_networks(G, E, Perceptual(**BODY), device='cpu'), refine=0, tune=0)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('n, reads', [(1, 3), (4, 3), (1, 1), (4, 4)])
def test_grey_generators_are_refused_by_the_pipeline(n, reads):
    "They load and convert; inversion compares colours."
    G = Generator(64, 32, 32, 2, 512, 16, img_channels=n)
    with pytest.raises(InputError, match=f'draws {n}'):
        Bundle.from_networks(G, Encoder(64, num_ws=G.num_ws, w_dim=32, channels=reads).eval(), Perceptual(**BODY), device='cpu')


def small_bundle(folder, G, **parts):
    "A folder with a generator and what else is given, by its file's name."
    for name, net in dict(generator=G, **parts).items():
        if name == 'directions': save_directions(net, folder/'directions.safetensors')
        else: save_model(net, folder/f'{name}.safetensors', make_card('encoder' if isinstance(net, Encoder) else name, seed=0), half=False)
    return load_bundle(folder, 'cpu')


@pytest.mark.parametrize('part', ['cycle', 'mine', 'directions', 'perceptual', 'identity', 'attributes'])
def test_parts_are_checked_when_they_are_read(tmp_path, part):
    "A folder's part is refused in the very words in which `from_networks` refuses it, and nothing else of the folder is."
    D, L, narrow = 16, 8, dict(widths=(4, 4, 4, 4, 4), depth=(1, 1, 1, 1, 1), res=32)
    odd = 1 if part in ('perceptual', 'identity', 'attributes') else 3
    G = Generator(32, 8, D, 1, 64, 8, img_channels=odd)
    more = dict(perceptual=Perceptual(**narrow)) if part in ('identity', 'attributes') else {}       # without one: LPIPS, and its download
    make = dict(cycle=lambda: Encoder(32, L + 2, D), mine=lambda: Encoder(32, L, D + 8), directions=lambda: {'a': torch.ones(D), 'b': torch.ones(L + 1, D)},
                perceptual=lambda: Perceptual(**narrow), identity=lambda: Identity(**narrow), attributes=lambda: Attributes(**narrow))
    b = small_bundle(tmp_path/'b', G, good=Encoder(32, L, D, channels=odd), **more, **{part: make[part]()})
    ask = dict(directions=lambda: b.directions).get(part, (lambda: b.encoder(part)) if part in ('cycle', 'mine') else lambda: b.nets)
    for _ in range(2):                                     # a refusal is not forgotten
        with pytest.raises(InputError) as said: ask()
    net = make[part]()
    kind = dict(directions=net) if part == 'directions' else dict(E=net) if part in ('cycle', 'mine') else dict(nets=[*more.values(), net])
    with pytest.raises(InputError) as direct: check_fit(G, name='x', **kind)
    assert str(said.value).split(': ')[-1] == str(direct.value).split(': ')[-1] and str(tmp_path/'b') in str(said.value) and '\n' not in str(said.value)
    assert b.encoder('good').num_ws == L and b.generator.w_dim == D
    if part in ('perceptual', 'identity', 'attributes'):                # the same networks as a referee
        small_bundle(tmp_path/'referee', make[part]())
        (tmp_path/'referee'/'generator.safetensors').rename(tmp_path/'referee'/f'{part}.safetensors')
        (tmp_path/'referee'/'generator.json').rename(tmp_path/'referee'/f'{part}.json')
        if part != 'perceptual': save_model(Perceptual(**narrow), tmp_path/'referee'/'perceptual.safetensors', half=False)
        with pytest.raises(InputError, match=f'reads 3 image channels, the generator draws {odd}'): evaluator(b, tmp_path/'referee')


def test_all_offsets_of_a_single_code_are_one_clear_line(tmp_path, capsys):
    "An encoder whose code is the same for all layers has no offsets to add; said before anything is computed."
    torch.manual_seed(0)
    G = Generator(32, 8, 16, 1, 64, 8)
    single = PublishedEncoder(pooled=True, num_ws=G.num_ws, resolution=32, w_dim=16, maps=1, size='small')
    narrow = Perceptual(widths=(4, 4, 4, 4, 4), depth=(1, 1, 1, 1, 1), res=32)
    b = small_bundle(tmp_path/'b', G, single=single, w=Encoder(32, G.num_ws, 16), perceptual=narrow)
    x, seen = img(1, 32), []
    assert invert(x, b, encoder='single', refine=0, tune=0).wp.shape == (1, G.num_ws, 16)
    for method in ('single-all', 'single-all+refine+tune'):
        with pytest.raises(InputError, match=f"no method '{re.escape(method)}': the encoder 'single' gives codes in W only.*use 'single'$"):
            for step in run_pipeline(x, b, method, compare=['w']): seen.append(step)
    with pytest.raises(InputError, match='in W only'): find_pivot(x, b, parse_method('single-all'))
    assert not seen
    save_image(x[0], tmp_path/'x.png')
    assert main(['invert', str(tmp_path/'x.png'), '--out', str(tmp_path/'out'), '--bundle', str(tmp_path/'b'), '--encoder', 'single-all']) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'in W only' in err and not (tmp_path/'out').exists()


@torch.no_grad()
def test_a_stage_reaches_every_kind_of_encoder():
    "A bundle encodes as `encode_with` does: at the stage asked for, also by ReStyle, whose stages were passed over before."
    torch.manual_seed(0)
    G = Generator(8, 8, 16, 1, 64, 8)
    E = {k: Encoder(16, G.num_ws, 16, w_avg=torch.randn(16)*.1, channels=c, stage=2).eval() for k, c in dict(once=3, restyle=6).items()}
    for e in E.values():
        for head in e.heads: torch.nn.init.normal_(head.linear.weight)
    b = Bundle.from_networks(G, E, Perceptual(**BODY), device='cpu')
    x = img(1, 16)
    for k, e in E.items():
        codes = [encode(x, b, k, s) for s in (None, *range(G.num_ws))]
        for c, s in zip(codes, (None, *range(G.num_ws))): assert torch.equal(c, encode_with(e, x, G, s))
        assert torch.equal(codes[0], codes[3]) and spread(codes[1]).max() < 1e-5 < spread(codes[-1]).min()
        assert torch.equal(find_pivot(x, b, parse_method(f'{k}-all')), codes[-1])


HOSTS = {'float64': lambda: default_dtype(torch.float64), 'bfloat16': lambda: default_dtype(torch.bfloat16), 'no_grad': torch.no_grad, 'grad disabled': lambda: torch.set_grad_enabled(False), 'inference': torch.inference_mode,
         'autocast': lambda: torch.autocast('cpu', dtype=torch.bfloat16), 'plain': contextlib.nullcontext}


@pytest.fixture(scope='module')
def in_a_plain_host(own):
    x = img(2, 32)
    return x, invert(x, own, refine=1, tune=2)


@pytest.mark.parametrize('first', HOSTS)
@pytest.mark.parametrize('host', HOSTS)
def test_the_host_changes_nothing(own, in_a_plain_host, first, host):
    "A host that switches gradients or precision: the same numbers, and a bundle it used first stays usable."
    x, want = in_a_plain_host
    b = Bundle.from_networks(own.generator, own.encoder(), own.perceptual, directions=own.directions, device='cpu')
    before = torch.is_grad_enabled()
    with HOSTS[first](): invert(x, b, refine=0, tune=0)
    with HOSTS[host](): inv = invert(x, b, refine=1, tune=2)
    torch.set_grad_enabled(before)
    assert torch.equal(inv.wp, want.wp) and torch.equal(inv.img, want.img) and torch.equal(inv.edit('a', 1.), want.edit('a', 1.))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_networks_are_float32_under_any_default_type(dtype):
    want = load_generator('sdfaces64/generator').w_avg
    with default_dtype(dtype): G, E = load_generator('sdfaces64/generator'), load_encoder('sdfaces64/w')
    assert {t.dtype for m in (G, E) for t in m.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert torch.equal(G.w_avg, want)


def test_an_encoder_is_no_generator_and_an_optimised_code_is_not_refined(own):
    with pytest.raises(InputError, match='holds no encoder but a Generator'): load_encoder('sdfaces64/generator')
    with pytest.raises(InputError, match='refine=0'): invert(img(1, 32), own, encoder='opt-w', refine=1, tune=0)
    with pytest.raises(InputError, match="unknown encoder 'nobody'"): invert(img(1, 32), own, encoder='nobody', tune=0)


# --- direction files -----------------------------------------------------------------------

class Ws:      # what a direction must fit
    w_dim, num_ws = 24, 8


@pytest.mark.parametrize('shape', [(24,), (1, 24), (1, 1, 24), (8, 24), (1, 8, 24)])
@pytest.mark.parametrize('kind', ['npy', 'pt', 'old', 'npz', 'safetensors'])
def test_one_direction_in_every_kind_of_file(tmp_path, shape, kind):
    d, f = torch.randn(*shape, generator=make_rng(0)), tmp_path/'smile.x'
    if kind == 'npy': np.save(open(f, 'wb'), d.double().numpy())
    if kind == 'pt': torch.save(d, f)
    if kind == 'old': torch.save({'smile': d}, f, _use_new_zipfile_serialization=False)
    if kind == 'npz': np.savez_compressed(open(f, 'wb'), smile=d.numpy())
    if kind == 'safetensors': save_directions({'smile': d}, tmp_path/'smile.safetensors'); f = tmp_path/'smile.safetensors'
    got = read_directions(f, Ws)
    assert list(got) == ['smile'] and torch.allclose(got['smile'], d.reshape((24,) if 8 not in shape else (8, 24)), atol=1e-3)


def test_ganspace_strength_is_one_deviation(tmp_path):
    "Components found by hand: strength 1 moves the projection by one standard deviation."
    x = torch.randn(500, 24, generator=make_rng(0))*torch.linspace(.2, 3, 24) + 1
    U, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    std = S/499**.5
    torch.save(dict(comp=V[:5], mean=x.mean(0)[None], std=std[:5]), tmp_path/'pca.pt')
    np.savez(tmp_path/'g.npz', lat_comp=V[:5, None].numpy(), lat_mean=x.mean(0)[None, None].numpy(), lat_stdev=std[:5].numpy(), act_comp=np.zeros((5, 999), 'f'))
    for f in ('pca.pt', 'g.npz'):
        d = read_directions(tmp_path/f, Ws)
        assert list(d) == [f'pc{i}' for i in range(5)]
        for i in range(5): assert torch.allclose((d[f'pc{i}'] @ V[i]), ((x - x.mean(0)) @ V[i]).std(), rtol=1e-4)


@pytest.mark.parametrize('shape', [(512,), (1, 512), (18, 24), (7, 24), (24, 8)])
def test_directions_of_another_generator(tmp_path, shape):
    torch.save(torch.randn(*shape), tmp_path/'age.pt')
    assert read_directions(tmp_path/'age.pt')['age'].shape == (shape[1:] if shape[0] == 1 else shape)
    with pytest.raises(InputError, match=r"age.pt: direction 'age' is .*takes \(24,\) or \(8, 24\)"): read_directions(tmp_path/'age.pt', Ws)


def test_hostile_direction_files(tmp_path):
    "Pickled objects, bombs, cut and mixed files: one line each, nothing run, nothing written."
    class Evil:
        def __reduce__(self): return open, (str(tmp_path/'ran'), 'w')
    np.save(tmp_path/'object.npy', np.array([Evil()], dtype=object), allow_pickle=True)
    np.savez(tmp_path/'object.npz', a=np.array([Evil()], dtype=object))
    torch.save(Evil(), tmp_path/'evil.pt')
    with zipfile.ZipFile(tmp_path/'bomb.npz', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('a.npy', b'\0'*(2**28 + 1))
    head = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(127) + b'\n'
    (tmp_path/'huge.npy').write_bytes(head)
    with zipfile.ZipFile(tmp_path/'huge.npz', 'w') as z: z.writestr('a.npy', head)
    torch.save(torch.randn(1, 24), tmp_path/'good.pt')
    data = (tmp_path/'good.pt').read_bytes()
    (tmp_path/'cut.pt').write_bytes(data[:len(data)//2])
    for bad in ('nan', 'text', 'none', 'ints'):
        torch.save(dict(nan=torch.full((24,), np.nan), text='smile', none=None, ints=torch.ones(24, dtype=torch.long))[bad], tmp_path/f'{bad}.pt')
    torch.save(dict(a=torch.randn(24), b='x'), tmp_path/'mixed.pt')
    files = set(tmp_path.iterdir())
    for f in sorted(files - {tmp_path/'good.pt'}):
        with pytest.raises(InputError) as e: read_directions(f)
        assert f.name in str(e.value) and '\n' not in str(e.value)
    assert set(tmp_path.iterdir()) == files


def test_folder_of_directions(tmp_path):
    for n in ('age', 'pose'): torch.save(torch.randn(1, 24), tmp_path/f'{n}.pt')
    (tmp_path/'read.me').write_text('x')
    assert sorted(read_directions(tmp_path, Ws)) == ['age', 'pose']
    save_directions(dict(own=torch.randn(24)), tmp_path/'directions.safetensors')
    assert list(load_directions(tmp_path, Ws)) == ['own']          # a bundle's own file comes first


def test_shipped_directions_are_as_before():
    d = load_directions('sdfaces64')
    assert {'smile', 'yaw', 'age'} <= set(d) and all(v.shape[-1] == 128 and v.dtype == torch.float32 for v in d.values())
