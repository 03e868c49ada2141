"Metrics against independent implementations and values worked out by hand."
import math
import numpy as np
import pytest, torch
from cycle_nb.edit_metrics import change_drawn, edit_error, lec
from cycle_nb.metrics import bootstrap, frechet, holm, manifold_coverage, ms_ssim, mse, num_scales, precision_recall, psnr, sign_flip_test, two_way_bootstrap
from cycle_nb.sdfaces import counterfactual_factors
from cycle_nb.stylespace import StyleCloud
from cycle_nb.sdfaces_parts import FACTORS

def pairs(n=3, side=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=g)*2 - 1, (side, side), mode="bilinear")
    return a, (a + .2*torch.randn(a.shape, generator=g)).clamp(-1, 1)

def test_mse_and_psnr():
    from torchmetrics.functional.image import peak_signal_noise_ratio
    a, b = pairs()
    want = peak_signal_noise_ratio(a, b, data_range=2., reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(a, b), want, atol=1e-4)
    assert torch.allclose(mse(a, a + .5), torch.full((3,), .25))
    assert torch.allclose(psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.)), torch.zeros(1))

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
    assert num_scales(side) == scales
    assert torch.allclose(ms_ssim(a, b), reference_ms_ssim(a, b, (betas/betas.sum()).tolist()), atol=1e-4)
    assert torch.allclose(ms_ssim(a, a), torch.ones(2), atol=1e-5)

def test_ms_ssim_is_near_torchmetrics_own():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as theirs
    a, b = pairs(3, 192)
    assert torch.allclose(ms_ssim(a, b), theirs(a, b, data_range=2., normalize="relu", reduction="none"), atol=.02)

def test_frechet_closed_forms():
    from scipy.linalg import sqrtm
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=g) @ torch.randn(6, 6, generator=g)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet(x, x + 2) == pytest.approx(6*4, rel=1e-6)
    assert frechet(x, 3*(x - x.mean(0)) + x.mean(0)) == pytest.approx(4*float(torch.cov(x.T).trace()), rel=1e-5)
    y = torch.randn(300, 6, generator=g) @ torch.randn(6, 6, generator=g) + 1
    (mx, cx), (my, cy) = [(v.double().mean(0).numpy(), np.cov(v.double().numpy().T)) for v in (x, y)]
    want = ((mx - my)**2).sum() + np.trace(cx + cy - 2*sqrtm(cx @ cy).real)
    assert frechet(x, y) == pytest.approx(want, rel=1e-6)
    few = torch.randn(4, 6, generator=g)    # singular covariance
    assert math.isfinite(frechet(few, y))

def test_precision_and_recall():
    g = torch.Generator().manual_seed(0)
    two = torch.cat([torch.randn(100, 2, generator=g), torch.randn(100, 2, generator=g) + 100])
    assert precision_recall(two, two) == (1., 1.)
    assert precision_recall(two + 1000, two) == (0., 0.)
    one = two[:100] + .01*torch.randn(100, 2, generator=g)     # one mode only: all precise, half recalled
    p, r = precision_recall(one, two)
    assert p > .95 and .4 < r <= .5
    x, y = torch.randn(20, 3, generator=g), torch.randn(25, 3, generator=g) + 1
    dist = lambda a, b: np.linalg.norm(a[:, None].numpy() - b[None].numpy(), axis=-1)
    radius = np.sort(dist(y, y), 1)[:, 3]
    assert manifold_coverage(x, y, 3) == pytest.approx(np.mean([(dist(x, y)[i] <= radius).any() for i in range(20)]))

def test_bootstrap():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))*2 + 5
    mean, low, high = bootstrap(x)
    assert mean == pytest.approx(float(x.mean()), abs=1e-6) and low < mean < high
    assert (high - low)/2 == pytest.approx(1.96*float(x.std())/20, rel=.1)
    assert bootstrap(x) == (mean, low, high) and bootstrap(torch.ones(5)) == (1., 1., 1.)

def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap as theirs
    x = torch.rand(60, generator=torch.Generator().manual_seed(1)).square()
    want = theirs((x.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    _, low, high = bootstrap(x, 4000)
    assert (low, high) == pytest.approx((want.low, want.high), abs=float(.1*(want.high - want.low)))

def test_two_ways_to_draw_again():
    "Against loops; with one training as `bootstrap`; holes are passed over; many trainings give the variance of two independent effects."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 40))*.5 + rng.normal(size=(3, 1)) + rng.normal(size=(1, 40)) + 1
    x[0, :7] = np.nan
    means = []
    for _ in range(4000):
        r, c = rng.integers(3, size=3), rng.integers(40, size=40)
        means.append(np.nanmean([[x[i, j] for j in c] for i in r]))
    mean, low, high, p = two_way_bootstrap(x)
    want = np.quantile(means, [.025, .975])
    assert mean == pytest.approx(np.nanmean(x)) and (low, high) == pytest.approx(want, abs=.08*(want[1] - want[0]))
    assert p == pytest.approx(2*min(np.mean(np.array(means) <= 0), np.mean(np.array(means) >= 0)), abs=.03)
    one = torch.rand(1, 50, generator=torch.Generator().manual_seed(0))
    _, low, high = bootstrap(one[0], 4000)
    assert two_way_bootstrap(one)[1:3] == pytest.approx((low, high), abs=.1*(high - low)) and two_way_bootstrap(one)[3] < .001
    many = rng.normal(size=(60, 1)) + 2*rng.normal(size=(1, 80))
    _, low, high, _ = two_way_bootstrap(many)
    assert (high - low)/2 == pytest.approx(1.96*(many.mean(1).var()/60 + many.mean(0).var()/80)**.5, rel=.15)
    assert two_way_bootstrap(many) == two_way_bootstrap(many) and two_way_bootstrap(-many)[0] == -two_way_bootstrap(many)[0]

@pytest.mark.parametrize("n,shift", [(5, .8), (9, .3), (11, 1.), (40, .35), (40, 0.)])
def test_sign_flips_agree_with_scipy(n, shift):
    "Few faces: every pattern of signs, the same number to the last digit; more: a sample of them."
    from scipy.stats import permutation_test
    d = torch.randn(n, generator=torch.Generator().manual_seed(n)).double() + shift
    want = permutation_test((d.numpy(),), np.mean, permutation_type="samples", n_resamples=4000, rng=np.random.default_rng(0)).pvalue
    exact = 2**n <= 4000
    assert sign_flip_test(d) == pytest.approx(want, abs=1e-9 if exact else .02)
    assert sign_flip_test(d) == sign_flip_test(d) == sign_flip_test(-d) and sign_flip_test(3*d) == sign_flip_test(d)

def test_sign_flips_of_nothing_are_even():
    "Under the null p is uniform, and never 0."
    p = torch.tensor([sign_flip_test(torch.randn(14, generator=torch.Generator().manual_seed(i)), 500) for i in range(300)])
    assert abs((p < .1).float().mean() - .1) < .06 and abs(p.mean() - .5) < .06 and p.min() > 0
    assert sign_flip_test(torch.ones(60)) == pytest.approx(1/4001) and sign_flip_test(torch.zeros(7)) == 1.

def test_holm_is_the_step_down_procedure():
    "Against the definition: a hypothesis is rejected when it and all smaller ones pass their levels."
    g = torch.Generator().manual_seed(0)
    for m in (1, 2, 7, 20):
        p = (torch.rand(m, generator=g)**3).tolist()
        if m > 2: p[1] = p[0]                            # a tie
        fixed = holm(p)
        for level in np.linspace(.001, .999, 200):
            order, rejected = np.argsort(p, kind="stable"), set()
            for rank, i in enumerate(order):
                if p[i] > level/(m - rank): break
                rejected.add(int(i))
            assert rejected == {i for i in range(m) if fixed[i] <= level}, (m, level)
    assert holm([.2, .9]) == [.4, .9] and holm([.6, .7]) == [1., 1.] and holm([]) == []

# --- a world where the image *is* its factors: every edit metric can be worked out ------------------------------------

F = len(FACTORS)
class Reader:
    names = FACTORS
    def __call__(self, img): return img.flatten(1)[:, :F]

def write(u): return torch.nn.functional.pad(u, (0, 48 - F)).reshape(-1, 3, 4, 4)

@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr("cycle_nb.edit_metrics.render", lambda u, res, extras=None: write(u))
    u = torch.rand(5, F, generator=torch.Generator().manual_seed(0))*2 - 1
    return u, u[:, None].repeat(1, 2, 1), lambda wp: write(wp[:, 0])

wide = StyleCloud([str(i) for i in range(F)], torch.zeros(F).long(), torch.zeros(F), torch.ones(F), torch.eye(F), 3*torch.randn(500, F, generator=torch.Generator().manual_seed(0)))

def unit(**parts):
    d = torch.zeros(F)
    for k, v in parts.items(): d[FACTORS.index(k)] = v
    return d

def test_counterfactual_stays_inside():
    u = torch.tensor([[-1.], [0.], [.5], [1.]]).repeat(1, F)
    v = counterfactual_factors(u, "smile", 1.)
    k = FACTORS.index("smile")
    assert v[:, k].tolist() == [0., 1., -.5, 0.]
    assert torch.equal(v[:, :k], u[:, :k]) and torch.equal(v[:, k+1:], u[:, k+1:])

def test_edit_error_of_a_perfect_edit_is_zero(world):
    u, wp, draw = world
    r = edit_error(wp, draw, unit(smile=.5), Reader(), u, "smile", 1., cloud=wide)
    up = (u[:, FACTORS.index("smile")] <= 0).float()*2 - 1
    assert r["success"].all() and torch.allclose(r["strength"], 2*up, atol=.02)
    assert r["error"].max() < 1e-5 and r["entanglement"].max() < 1e-3
    assert torch.allclose(r["no_edit_error"], torch.full((5,), 1/48), atol=1e-6)

def test_edit_error_of_an_entangled_edit(world):
    u, wp, draw = world
    r = edit_error(wp, draw, unit(smile=1., age=.5), Reader(), u, "smile", 1., cloud=wide)
    assert r["success"].all()
    assert torch.allclose(r["error"], torch.full((5,), .25/48), rtol=.05)
    assert torch.allclose(r["entanglement"], torch.full((5,), math.sqrt(.25/(F - 1))), rtol=.05)

def test_what_is_known_is_not_drawn_again(world):
    u, wp, draw = world
    calls, args = [], (unit(smile=1., age=.5), Reader(), u, "smile", 1.)
    def counted(codes):
        calls.append(1)
        return draw(codes)
    a = edit_error(wp, counted, *args, cloud=wide); first = len(calls)
    b = edit_error(wp, counted, *args, still=draw(wp), cloud=wide)
    assert len(calls) - first == first - 1 and all(torch.equal(a[k], b[k]) for k in a)

def test_what_cannot_be_edited_is_counted_and_left_as_it_is(world):
    u, wp, draw = world
    r = edit_error(wp, draw, unit(age=1.), Reader(), u, "smile", 1., cloud=wide)            # another attribute's direction
    assert not r["success"].any() and not r["pixel_success"].any() and r["success"].shape == (5,)
    assert torch.equal(r["edited"], draw(wp)) and torch.equal(r["error"], r["no_edit_error"]) and r["change_drawn"].abs().max() == 0
    assert (r["strength"].abs() > 0).all()               # the limit that was tried

def test_no_edit_leaves_the_cloud(world):
    "Samples have smiles of a quarter of a unit: an edit that ends beyond is not made."
    u, wp, draw = world
    narrow = StyleCloud(**{**vars(wide), "samples": .25*wide.samples.sign()})
    r, k = edit_error(wp, draw, unit(smile=1.), Reader(), u, "smile", 1., cloud=narrow), FACTORS.index("smile")
    end = counterfactual_factors(u, "smile", 1.)[:, k]
    assert torch.equal(r["success"], end.abs() < .25) and 0 < r["success"].sum() < 5
    assert torch.equal(r["edited"][~r["success"]], draw(wp)[~r["success"]]) and r["error"][r["success"]].max() < 1e-4
    stop = u[:, k] + r["strength"]
    assert torch.allclose(stop[~r["success"]].abs(), torch.tensor(.25), atol=1e-3)

def test_share_of_the_true_change():
    "By hand: one pixel of a 6x6 image changes by 1; what happens away from it does not count."
    now = torch.zeros(1, 3, 6, 6); then, far = now.clone(), now.clone()
    then[0, 1, 1, 1] = 1.; far[0, 0, 4, 4] = 1.
    share = lambda edited, still=now: float(change_drawn(edited, still, then, now))
    assert share(then) == 1 and share(now) == 0 and share(then + far) == 1 and share(now + far) == 0
    assert share(.5*then) == pytest.approx(.75) and share(2*then) == 0 and share(3*then) == -1
    near = now.clone(); near[0, 2, 2, 2] = .5            # the pixel beside it does count, in any channel
    assert share(then + near) == pytest.approx(.75)
    still = now - .5*then                                # the reconstruction is a little off to begin with
    assert share(then, still) == 1 and share(still, still) == 0 and share(now, still) == pytest.approx(1 - 1/1.5**2)
    assert float(change_drawn(far, now, now, now)) == 0 == float(change_drawn(far, now, now + .01, now))         # nothing visible to draw
    assert float(change_drawn(now, then, then, now)) == 0                                    # drawn already, nothing left to gain

def test_a_regressor_that_is_pleased_is_not_enough(world):
    "The asked factor moves as asked, and its neighbours in the picture much more: success, but not of pixels."
    u, wp, draw = world
    k = FACTORS.index("smile")
    beside = FACTORS[k - 4 if k % 16 >= 4 else k + 4]
    good, bad = (edit_error(wp, draw, unit(**{"smile": .5, beside: x}), Reader(), u, "smile", 1., cloud=wide) for x in (.1, 2.))
    assert good["success"].all() and good["pixel_success"].all() and bad["success"].all() and not bad["pixel_success"].any()
    assert torch.allclose(good["change_drawn"], torch.full((5,), 1 - .2**2), atol=.01) and bad["change_drawn"].max() == -1

def test_reconstruction_error_enters_the_edit_error(world):
    u, wp, draw = world
    off = wp + unit(yaw=.3)
    r = edit_error(off, draw, unit(smile=1.), Reader(), u, "smile", 1., cloud=wide)
    assert torch.allclose(r["error"], torch.full((5,), .09/48), rtol=.05)

def test_lec():
    wp = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    d = torch.randn(5, generator=torch.Generator().manual_seed(1))
    same = lambda x: x
    assert lec(wp, same, same, d, 2.).max() < 1e-5
    assert torch.allclose(lec(wp, lambda x: x*0, same, d, 2.), (wp + 2*d).norm(dim=-1).mean(1))
