"Encoders of others, ArcFace, direction files, an own bundle: against plain computations on the public names."
import argparse, zipfile
import numpy as np
import pytest, torch
import torch.nn.functional as F
from cycle_nb.core import InputError, generator, save_image
from cycle_nb.cycle import start_task
from cycle_nb.edit import load_directions, read_directions, save_directions
from cycle_nb.encoder import (ArcFace, Encoder, arcface_from_tensors, encoder_from_checkpoint, encoder_from_tensors, load_arcface,
                              public_name, restyle, start_from_arcface)
from cycle_nb.invert import Inversion, invert, measure, own_bundle
from cycle_nb.losses import PackagePerceptual
from cycle_nb.schedule import SDFACES64
from cycle_nb.stylegan2 import Generator
from cycle_nb.weights import load_encoder, read_checkpoint, save_model

UNITS = [(i, o, 2 if k == 0 else 1) for i, o, n in ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3))
         for k, (i, o) in enumerate([(i, o)] + [(o, o)]*(n - 1))]


# --- the published encoders, written from their names --------------------------------------

class Maker:
    "Random tensors under the public names; batch statistics and slopes that are not trivial."
    def __init__(self, seed): self.g, self.sd = generator(seed), {}
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


def img(n=1, res=256, channels=3, seed=1): return torch.rand(n, channels, res, res, generator=generator(seed))*2 - 1


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
    assert {public_name(k) for k in E.state_dict()} == set(sd) | {'w_avg'}


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
    (lambda c: c | dict(opts=dict(encoder_type='SingleStyleCodeEncoder')), 'SingleStyleCodeEncoder'),
    (lambda c: c | dict(state_dict={k: v for k, v in c['state_dict'].items() if 'body.9.res_layer.1.' not in k}), 'missing: body.9.res_layer.1.weight'),
    (lambda c: c | dict(state_dict=c['state_dict'] | {'encoder.neck.weight': torch.zeros(1)}), 'left over: neck.weight'),
    (lambda c: c | dict(state_dict=c['state_dict'] | {'encoder.latlayer1.weight': torch.zeros(512, 128, 1, 1)}), 'wrong shape: latlayer1.weight'),
    (lambda c: dict(state_dict={}, opts=c['opts'], latent_avg=c['latent_avg']), 'no encoder')])
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
    with pytest.raises(InputError, match='restyle'): E(x)


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
    names = {public_name(k, 'resnet34') for k in E.state_dict() if k.startswith('body')}
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
    return own_bundle(G, E, PackagePerceptual(pnet_rand=True), directions={'a': torch.randn(24), 'b': torch.randn(G.num_ws, 24)}, device='cpu')


def test_own_bundle_goes_the_whole_road(own, tmp_path):
    "No feature networks of SDFaces, no W encoder, no identity; saved and read again."
    for i, x in enumerate(img(2, 32)): save_image(x, tmp_path/'in'/f'{i}.png')
    inv = invert(tmp_path/'in', own, refine=2, tune=3, preset='paper', threshold=0.)
    assert list(inv.steps) == ['cycle', '+refine', '+tune'] and inv.card['preset'] == 'paper'
    assert all(set(m) == {'image', 'step', 'mse', 'perceptual', 'seconds'} for m in inv.metrics) and 'identity' not in repr(inv)
    assert torch.allclose(inv.codes['cycle'], own.encoder()(inv.target), atol=1e-5)
    moved = inv.edit('b', 1.5)
    assert torch.allclose(moved, inv.synthesis(inv.wp + 1.5*own.directions['b']), atol=1e-5)
    inv.save(tmp_path/'out')
    back = Inversion.load(tmp_path/'out', bundle=own)
    assert torch.equal(back.wp, inv.wp) and (back.edit('b', 1.5) - moved).abs().max() < .02
    with pytest.raises(InputError, match="known edits: a, b"): inv.edit('c')


def test_own_bundle_refuses_directions_of_others(own):
    with pytest.raises(InputError, match=r'\(512,\).*\(24,\)'):
        own_bundle(own.generator, own.encoder(), own.perceptual, directions={'age': torch.randn(512)})


def test_own_identity_is_measured(own):
    class Who(torch.nn.Module):
        def embed(self, x): return F.normalize(x.flatten(1), dim=1)
        def similarity(self, a, b): return (self.embed(a)*self.embed(b)).sum(1)
    b = own_bundle(own.generator, {'psp': own.encoder()}, own.perceptual, Who(), companions=img(2, 32), device='cpu')
    x = img(2, 32)
    assert [round(m['identity'], 4) for m in measure(x, x, b)] == [1, 1] and b.companions().shape[0] == 2
    inv = invert(x, b, encoder='psp', refine=1, tune=0)
    assert list(inv.steps) == ['psp', '+refine'] and 'identity' in inv.metrics[0]
    with pytest.raises(InputError, match='nothing|unknown encoder'): invert(x, b, encoder='other')


def test_encoder_of_a_large_generator_reads_256_pixels():
    "Images are pooled, as published; any w width."
    G = Generator(512, z_dim=8, w_dim=12, channel_base=2048, channel_max=4)
    E = start_task(G, (None, None), None, SDFACES64, 'small', 0).E.eval()
    assert (E.resolution, E.num_ws, E.w_dim) == (256, 16, 12)
    with torch.no_grad(): assert torch.allclose(E(img(1, 512)), E(F.avg_pool2d(img(1, 512), 2)), atol=1e-5)


# --- direction files -----------------------------------------------------------------------

class Ws:      # what a direction must fit
    w_dim, num_ws = 24, 8


@pytest.mark.parametrize('shape', [(24,), (1, 24), (1, 1, 24), (8, 24), (1, 8, 24)])
@pytest.mark.parametrize('kind', ['npy', 'pt', 'old', 'npz', 'safetensors'])
def test_one_direction_in_every_kind_of_file(tmp_path, shape, kind):
    d, f = torch.randn(*shape, generator=generator(0)), tmp_path/'smile.x'
    if kind == 'npy': np.save(open(f, 'wb'), d.double().numpy())
    if kind == 'pt': torch.save(d, f)
    if kind == 'old': torch.save({'smile': d}, f, _use_new_zipfile_serialization=False)
    if kind == 'npz': np.savez_compressed(open(f, 'wb'), smile=d.numpy())
    if kind == 'safetensors': save_directions({'smile': d}, tmp_path/'smile.safetensors'); f = tmp_path/'smile.safetensors'
    got = load_directions(f, Ws)
    assert list(got) == ['smile'] and torch.allclose(got['smile'], d.reshape((24,) if 8 not in shape else (8, 24)), atol=1e-3)


def test_ganspace_strength_is_one_deviation(tmp_path):
    "Components found by hand: strength 1 moves the projection by one standard deviation."
    x = torch.randn(500, 24, generator=generator(0))*torch.linspace(.2, 3, 24) + 1
    U, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    std = S/499**.5
    torch.save(dict(comp=V[:5], mean=x.mean(0)[None], std=std[:5]), tmp_path/'pca.pt')
    np.savez(tmp_path/'g.npz', lat_comp=V[:5, None].numpy(), lat_mean=x.mean(0)[None, None].numpy(), lat_stdev=std[:5].numpy(), act_comp=np.zeros((5, 999), 'f'))
    for f in ('pca.pt', 'g.npz'):
        d = load_directions(tmp_path/f, Ws)
        assert list(d) == [f'pc{i}' for i in range(5)]
        for i in range(5): assert torch.allclose((d[f'pc{i}'] @ V[i]), ((x - x.mean(0)) @ V[i]).std(), rtol=1e-4)


@pytest.mark.parametrize('shape', [(512,), (1, 512), (18, 24), (7, 24), (24, 8)])
def test_directions_of_another_generator(tmp_path, shape):
    torch.save(torch.randn(*shape), tmp_path/'age.pt')
    assert load_directions(tmp_path/'age.pt')['age'].shape == (shape[1:] if shape[0] == 1 else shape)
    with pytest.raises(InputError, match=r"age.pt: direction 'age' is .*takes \(24,\) or \(8, 24\)"): load_directions(tmp_path/'age.pt', Ws)


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
    assert sorted(load_directions(tmp_path, Ws)) == ['age', 'pose']
    save_directions(dict(own=torch.randn(24)), tmp_path/'directions.safetensors')
    assert list(load_directions(tmp_path, Ws)) == ['own']          # a bundle's own file comes first


def test_shipped_directions_are_as_before():
    d = load_directions('sdfaces64')
    assert {'smile', 'yaw', 'age'} <= set(d) and all(v.shape[-1] == 128 and v.dtype == torch.float32 for v in d.values())
