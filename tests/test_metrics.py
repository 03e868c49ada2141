"Metrics against independent implementations and values worked out by hand."
import math
import numpy as np
import pytest, torch
from cycle_nb import metrics as M
from cycle_nb.sdfaces import FACTORS

def pairs(n=3, side=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=g)*2 - 1, (side, side), mode="bilinear")
    return a, (a + .2*torch.randn(a.shape, generator=g)).clamp(-1, 1)

def test_mse_and_psnr():
    from torchmetrics.functional.image import peak_signal_noise_ratio
    a, b = pairs()
    want = peak_signal_noise_ratio(a, b, data_range=2., reduction="none", dim=(1, 2, 3))
    assert torch.allclose(M.psnr(a, b), want, atol=1e-4)
    assert torch.allclose(M.mse(a, a + .5), torch.full((3,), .25))
    assert torch.allclose(M.psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.)), torch.zeros(1))

def reference_ms_ssim(a, b, betas):
    "From torchmetrics' single-scale maps, borders cut as in the paper (its own MS-SSIM keeps a reflected border)."
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    kw, out = dict(data_range=2., reduction="none"), 1.
    for i, beta in enumerate(betas):
        full = ssim(a, b, return_full_image=True, **kw)[1][..., 5:-5, 5:-5].mean((1, 2, 3))
        cs = ssim(a, b, return_contrast_sensitivity=True, **kw)[1]
        out = out*(full if i == len(betas) - 1 else cs).relu()**beta
        a, b = (torch.nn.functional.avg_pool2d(v, 2) for v in (a, b))
    return out

@pytest.mark.parametrize("side,scales", [(64, 3), (176, 5), (32, 2), (12, 1)])
def test_ms_ssim(side, scales):
    a, b = pairs(2, side)
    betas = np.array([.0448, .2856, .3001, .2363, .1333])[:scales]
    assert M.num_scales(side) == scales
    assert torch.allclose(M.ms_ssim(a, b), reference_ms_ssim(a, b, (betas/betas.sum()).tolist()), atol=1e-4)
    assert torch.allclose(M.ms_ssim(a, a), torch.ones(2), atol=1e-5)

def test_ms_ssim_is_near_torchmetrics_own():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs
    a, b = pairs(3, 192)
    assert torch.allclose(M.ms_ssim(a, b), theirs(a, b, data_range=2., normalize="relu", reduction="none"), atol=.02)

def test_frechet_closed_forms():
    from scipy.linalg import sqrtm
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g) @ torch.randn(6, 6, generator=g)
    assert M.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert M.frechet(x, x + 2) == pytest.approx(6*4, rel=1e-6)
    assert M.frechet(x, 3*(x - x.mean(0)) + x.mean(0)) == pytest.approx(4*float(torch.cov(x.T).trace()), rel=1e-5)
    y = torch.randn(300, 6, generator=g) @ torch.randn(6, 6, generator=g) + 1
    (mx, cx), (my, cy) = [(v.double().mean(0).numpy(), np.cov(v.double().numpy().T)) for v in (x, y)]
    want = ((mx - my)**2).sum() + np.trace(cx + cy - 2*sqrtm(cx @ cy).real)
    assert M.frechet(x, y) == pytest.approx(want, rel=1e-6)
    few = torch.randn(4, 6, generator=g)    # singular covariance
    assert math.isfinite(M.frechet(few, y))

def test_precision_and_recall():
    g = torch.Generator().manual_seed(0)
    two = torch.cat([torch.randn(100, 2, generator=g), torch.randn(100, 2, generator=g) + 100])
    assert M.precision_recall(two, two) == (1., 1.)
    assert M.precision_recall(two + 1000, two) == (0., 0.)
    one = two[:100] + .01*torch.randn(100, 2, generator=g)     # one mode only: all precise, half recalled
    p, r = M.precision_recall(one, two)
    assert p > .95 and .4 < r <= .5
    x, y = torch.randn(20, 3, generator=g), torch.randn(25, 3, generator=g) + 1
    dist = lambda a, b: np.linalg.norm(a[:, None].numpy() - b[None].numpy(), axis=-1)
    radius = np.sort(dist(y, y), 1)[:, 3]
    assert M.covered(x, y, 3) == pytest.approx(np.mean([(dist(x, y)[i] <= radius).any() for i in range(20)]))

def test_bootstrap():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))*2 + 5
    mean, low, high = M.bootstrap(x)
    assert mean == pytest.approx(float(x.mean()), abs=1e-6) and low < mean < high
    assert (high - low)/2 == pytest.approx(1.96*float(x.std())/20, rel=.1)
    assert M.bootstrap(x) == (mean, low, high) and M.bootstrap(torch.ones(5)) == (1., 1., 1.)

# --- a world where the image *is* its factors: every edit metric can be worked out ------------------------------------

F = len(FACTORS)
class Reader:
    names = FACTORS
    def __call__(self, img): return img.flatten(1)[:, :F]

def write(u): return torch.nn.functional.pad(u, (0, 48 - F)).reshape(-1, 3, 4, 4)

@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(M, "render", lambda u, res, extras=None: write(u))
    u = torch.rand(5, F, generator=torch.Generator().manual_seed(0))*2 - 1
    return u, u[:, None].repeat(1, 2, 1), lambda wp: write(wp[:, 0])

def unit(**parts):
    d = torch.zeros(F)
    for k, v in parts.items(): d[FACTORS.index(k)] = v
    return d

def test_counterfactual_stays_inside():
    u = torch.tensor([[-1.], [0.], [.5], [1.]]).repeat(1, F)
    v = M.counterfactual(u, "smile", 1.)
    k = FACTORS.index("smile")
    assert v[:, k].tolist() == [0., 1., -.5, 0.]
    assert torch.equal(v[:, :k], u[:, :k]) and torch.equal(v[:, k+1:], u[:, k+1:])

def test_edit_error_of_a_perfect_edit_is_zero(world):
    u, wp, draw = world
    r = M.edit_error(wp, draw, unit(smile=.5), Reader(), u, "smile", 1.)
    up = (u[:, FACTORS.index("smile")] <= 0).float()*2 - 1
    assert r["hit"].all() and torch.allclose(r["strength"], 2*up, atol=.02)
    assert r["error"].max() < 1e-5 and r["leak"].max() < 1e-3
    assert torch.allclose(r["still"], torch.full((5,), 1/48), atol=1e-6)

def test_edit_error_of_an_entangled_edit(world):
    u, wp, draw = world
    r = M.edit_error(wp, draw, unit(smile=1., age=.5), Reader(), u, "smile", 1.)
    assert r["hit"].all()
    assert torch.allclose(r["error"], torch.full((5,), .25/48), rtol=.05)
    assert torch.allclose(r["leak"], torch.full((5,), math.sqrt(.25/(F - 1))), rtol=.05)

def test_what_is_known_is_not_drawn_again(world):
    u, wp, draw = world
    calls, args = [], (unit(smile=1., age=.5), Reader(), u, "smile", 1.)
    def counted(codes):
        calls.append(1)
        return draw(codes)
    a = M.edit_error(wp, counted, *args); first = len(calls)
    b = M.edit_error(wp, counted, *args, still=draw(wp))
    assert len(calls) - first == first - 1 and all(torch.equal(a[k], b[k]) for k in a)

def test_what_cannot_be_edited_is_counted(world):
    u, wp, draw = world
    r = M.edit_error(wp, draw, unit(age=1.), Reader(), u, "smile", 1.)
    assert not r["hit"].any() and r["hit"].shape == (5,)

def test_reconstruction_error_enters_the_edit_error(world):
    u, wp, draw = world
    off = wp + unit(yaw=.3)
    r = M.edit_error(off, draw, unit(smile=1.), Reader(), u, "smile", 1.)
    assert torch.allclose(r["error"], torch.full((5,), .09/48), rtol=.05)

def test_lec():
    wp = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    d = torch.randn(5, generator=torch.Generator().manual_seed(1))
    same = lambda x: x
    assert M.lec(wp, same, same, d, 2.).max() < 1e-5
    assert torch.allclose(M.lec(wp, lambda x: x*0, same, d, 2.), (wp + 2*d).norm(dim=-1).mean(1))
