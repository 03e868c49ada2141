"The encoder's stages, the latent measures, the latent discriminator and its pool, against independent computations."
import math
import pytest, torch
import torch.nn.functional as F
from cycle_nb.core import InputError, make_rng
from cycle_nb.latent_discriminator import LatentDiscriminator, LatentPool, latent_g_loss, sample_layer
from cycle_nb.gan import d_loss, r1_penalty
from cycle_nb.encoder import Encoder, add_deltas, encode_with, feature_level, restyle
from cycle_nb.latents import distance_from_w, perturb_in_wplus, pca_w, spread, shrink_to_w
from cycle_nb.encoder_checkpoints import load_encoder
from cycle_nb.models import save_model


@pytest.fixture(scope='module')
def encoder():
    "Offsets that are not zero, batch statistics that are not trivial, a mean w."
    torch.manual_seed(0)
    E = Encoder(64, 10, 32, w_avg=torch.randn(32))
    for h in E.heads[1:]: torch.nn.init.normal_(h.linear.weight)
    with torch.no_grad():
        for _ in range(2): E(torch.randn(8, 3, 64, 64))
    return E.eval()


@pytest.fixture(scope='module')
def img(): return torch.rand(3, 3, 64, 64, generator=make_rng(1))*2 - 1


@torch.no_grad()
def by_hand(E, img, stage):
    "The code from the heads, one by one, as the method writes it."
    fine, middle, coarse = E.body(img)
    up = lambda x, y: F.interpolate(x, y.shape[-2:], mode='bilinear', align_corners=True)
    p = [E.pyramid.coarse(coarse)]
    p.append(up(p[0], middle) + E.pyramid.middle(middle))
    p.append(up(p[1], fine) + E.pyramid.fine(fine))
    w = E.heads[0](p[0])
    rows = [w] + [w + (E.heads[i](p[0] if i < 3 else p[1] if i < 7 else p[2]) if i <= stage else 0) for i in range(1, E.num_ws)]
    return torch.stack(rows, 1) + E.w_avg


@pytest.mark.parametrize('stage', range(10))
def test_code_by_hand(encoder, img, stage):
    with torch.no_grad(): wp = encoder(img, stage)
    assert torch.allclose(wp, by_hand(encoder, img, stage), atol=1e-5)


@torch.no_grad()
def test_a_stage_changes_exactly_its_codes(encoder, img):
    base = encoder(img, 0)
    for k in range(1, 10):
        wp, before = encoder(img, k), encoder(img, k - 1)
        moved = (wp - base).abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [1 <= i <= k for i in range(10)]
        assert [not torch.allclose(wp[:, i], before[:, i], atol=1e-4) for i in range(10)] == [i == k for i in range(10)]


@torch.no_grad()
def test_stage_zero_is_w(encoder, img):
    wp = encoder(img, 0)
    assert all(torch.equal(wp[:, i], wp[:, 0]) for i in range(10)) and spread(wp).max() < 1e-5
    assert encoder.codes(img, 0)[1].abs().max() == 0 and encoder.codes(img, 9)[1].shape == (3, 9, 32)
    w, d = encoder.codes(img, 9)
    assert torch.equal(add_deltas(w, d), encoder(img, 9))


@torch.no_grad()
def test_default_stage_travels_with_the_file(encoder, img, tmp_path):
    for stage in (0, 4, 9):
        encoder.stage = stage
        save_model(encoder, tmp_path/'e.safetensors', half=False)
        E = load_encoder(tmp_path/'e.safetensors')
        assert E.stage == stage and torch.equal(E(img), encoder(img, stage)) and torch.equal(E(img, 2), encoder(img, 2))
    encoder.stage = 0


@pytest.mark.parametrize('stage', [-1, 10, 99])
def test_impossible_stage(encoder, img, stage):
    with pytest.raises(InputError, match=f'stage {stage}.*0.*9'): encoder(img, stage)


@torch.no_grad()
def test_any_image_size(encoder, img):
    big = img.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.allclose(encoder(big, 9), encoder(img, 9), atol=1e-4)
    assert encoder(torch.zeros(1, 3, 40, 40)).shape == (1, 10, 32)


def test_gradients_reach_live_heads_only(encoder, img):
    encoder.zero_grad()
    encoder(img, 4).square().sum().backward()
    live = [h.linear.weight.grad is not None for h in encoder.heads]
    assert live == [i <= 4 for i in range(10)]
    encoder.zero_grad()


@pytest.mark.parametrize('res,num_ws', [(16, 6), (32, 8), (64, 10), (128, 12), (256, 14)])
def test_sizes(res, num_ws):
    E = Encoder(res, num_ws, 16).eval()
    with torch.no_grad(): assert E(torch.zeros(1, 3, res, res), num_ws - 1).shape == (1, num_ws, 16)


def test_full_is_ir_se_50():
    "Parameter count of the published structure, added up independently."
    with torch.device('meta'): E = Encoder(256, 18, 512, 'full')
    unit = lambda i, o: 2*i + 9*i*o + o + 9*o*o + 2*o + 2*o*(o//16) + (0 if i == o else i*o + 2*o)
    body = 3*9*64 + 2*64 + 64
    for i, o, n in ((64, 64, 3), (64, 128, 4), (128, 256, 14), (256, 512, 3)): body += unit(i, o) + (n - 1)*unit(o, o)
    assert sum(p.numel() for p in E.body.parameters()) == body
    heads = sum(n*(9*512*512 + 512) + 512*512 + 512 for n in [4]*3 + [5]*4 + [6]*11)
    assert sum(p.numel() for p in E.heads.parameters()) == heads
    assert sum(p.numel() for p in E.pyramid.parameters()) == (256 + 128)*512 + 2*512
    f = E.body(torch.empty(1, 3, 256, 256, device='meta'))
    assert [tuple(x.shape[1:]) for x in f] == [(128, 64, 64), (256, 32, 32), (512, 16, 16)]
    assert [feature_level(i) for i in range(18)] == [0]*3 + [1]*4 + [2]*11


# --- ReStyle -------------------------------------------------------------------------------

class Painter:
    "A linear generator: the first 27 numbers of the mean code, as pixels."
    def synthesis(self, wp, noise=None): return F.interpolate(wp.mean(1)[:, :27].view(-1, 3, 3, 3), (64, 64))


def test_restyle_by_hand(img):
    torch.manual_seed(0)
    E, G = Encoder(64, 10, 32, w_avg=torch.randn(32), channels=6, maps=1, stage=9).eval(), Painter()
    for h in E.heads[1:]: torch.nn.init.normal_(h.linear.weight)
    for stage in (None, 0, 4):
        wp = E.w_avg.expand(3, 10, 32)
        with torch.no_grad():
            for k in range(1, 4):
                wp = wp + E(torch.cat([img, G.synthesis(wp)], 1), stage) - E.w_avg
                assert torch.allclose(restyle(img, E, G, k, stage)[-1], wp, atol=1e-4)
                assert torch.allclose(encode_with(E, img, G, stage, passes=k), wp, atol=1e-4)
    assert not restyle(img, E, G, 2)[-1].requires_grad
    encode_with(E, img, G, 4, passes=2).square().sum().backward()
    assert [h.linear.weight.grad is not None for h in E.heads] == [i <= 4 for i in range(10)]


def test_one_look_is_enough_for_the_others(encoder, img):
    with torch.no_grad(): assert torch.equal(encode_with(encoder, img, None, 3), encoder(img, 3))


# --- latents -------------------------------------------------------------------------------

def test_spread_and_its_movers():
    wp = torch.randn(5, 7, 11, generator=make_rng(0))
    m = wp.numpy().mean(1, keepdims=True)
    want = ((wp.numpy() - m)**2).sum(2)**.5
    assert torch.allclose(spread(wp), torch.from_numpy(want.mean(1)), rtol=1e-5)
    assert torch.allclose(spread(shrink_to_w(wp, .25)), .25*spread(wp), rtol=1e-4)
    flat = wp[:, :1].repeat(1, 7, 1)
    assert torch.allclose(spread(perturb_in_wplus(flat, 3., make_rng(1))), torch.full((5,), 3.), rtol=1e-4)
    assert torch.allclose(perturb_in_wplus(flat, 3., make_rng(1)).mean(1), flat[:, 0], atol=1e-5)


def test_mahalanobis_against_the_covariance():
    g = make_rng(0)
    w = torch.randn(5000, 6, generator=g) @ torch.randn(6, 6, generator=g) + 2
    wp = torch.randn(4, 3, 6, generator=g)
    inv = torch.linalg.inv(torch.cov(w.T))
    x = wp - w.mean(0)
    want = (torch.einsum('bld,de,ble->bl', x, inv, x)/6).sqrt().mean(1)
    assert torch.allclose(distance_from_w(wp, pca_w(w), floor=0.), want, rtol=1e-3)


# --- latent discriminator --------------------------------------------------------------------------------

def test_r1_closed_form():
    A = torch.randn(6, 6, generator=make_rng(0))
    w = torch.randn(50, 6, generator=make_rng(1))
    S = A + A.T                                            # the gradient of wᵀAw is (A + Aᵀ)w
    got = r1_penalty(lambda w: torch.einsum('bi,ij,bj->b', w, A, w), w).mean()
    assert torch.allclose(got, (w @ S).square().sum(1).mean(), rtol=1e-4)
    D = LatentDiscriminator(6)
    x = w.clone().requires_grad_()
    grads = torch.stack([torch.autograd.grad(D(x)[i], x, retain_graph=True)[0][i] for i in range(5)])
    assert torch.allclose(r1_penalty(D, w[:5]).mean(), grads.square().sum(1).mean(), rtol=1e-4)


def test_losses_by_formula():
    a, b = torch.randn(20, generator=make_rng(0)), torch.randn(20, generator=make_rng(1))
    want = sum(math.log1p(math.exp(-v)) for v in a.tolist())/20 + sum(math.log1p(math.exp(v)) for v in b.tolist())/20
    assert abs(float(d_loss(a, b)) - want) < 1e-5
    assert torch.allclose(latent_g_loss(a.view(4, 5)), torch.log1p(torch.exp(-a.view(4, 5))).mean(1), rtol=1e-5)


def test_pool_statistics():
    "Fills first; afterwards half of what comes out is old, nothing is lost and nothing doubled."
    p, g, out = LatentPool(50), make_rng(0), []
    for t in range(200): out.append(p.query(torch.arange(10.*t, 10.*t + 10)[:, None], g)[:, 0])
    out = torch.stack(out)
    assert torch.equal(out[:5], torch.arange(50.).view(5, 10))
    new = torch.arange(2000.).view(200, 10)
    assert abs(float((out[5:] == new[5:]).float().mean()) - .5) < .04
    late = torch.cat([out[5:].flatten(), p.codes[:, 0]])
    assert torch.equal(late.sort().values, torch.arange(2000.))     # the first 50 come out a second time, or are kept
    assert abs(float((new[50:] - out[50:]).mean()) - 50) < 6        # mean age in codes: the size of the pool


def test_pool_resumes_exactly():
    a, b, g = LatentPool(8), LatentPool(8), make_rng(0)
    x = torch.randn(40, 3, generator=g)
    a.query(x[:20], make_rng(1))
    b.codes = a.codes.clone()
    assert torch.equal(a.query(x[20:], make_rng(2)), b.query(x[20:], make_rng(2))) and torch.equal(a.codes, b.codes)


def test_sample_layer_takes_live_codes():
    wp = torch.arange(10.)[None, :, None].expand(4000, -1, 2)
    for stage in (0, 3, 9):
        i = sample_layer(wp, stage, make_rng(0))[:, 0]
        assert sorted(i.unique().tolist()) == list(map(float, range(stage + 1)))
        assert torch.bincount(i.long()).min() > 4000/(stage + 1)*.8
