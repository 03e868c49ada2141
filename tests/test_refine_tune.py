"Project, refine, tune: against plain transcriptions of the equations, and against themselves in other company."
import copy
import pytest, torch
from torch import nn
from torch.nn import functional as F
from cycle_nb.core import InputError, make_rng
from cycle_nb.encoder import Encoder
from cycle_nb.features import Identity, Perceptual
from cycle_nb.project import project, lr_ramp
from cycle_nb.refine import finetune_encoder, microbatched, refine, refine_latent, regularization_images
from cycle_nb.stylegan2 import Generator
from cycle_nb.tune import Tuned, locality_code, stack_params, synthesize_batched, tune
from cycle_nb.tune_fast import (TUNE_PRESETS, BatchedOptimizer, compress, decompress, load_tuned, newton_schulz, pack_bits, pack_tuned, quantize, recover_quantized,
    save_tuned, synthesize_checkpointed, tune_batch, unpack_bits, unpack_tuned, unquantized_params)

GOLD = [("paper", [.870314, .721375, .355961, .503637], .557113), ("fast", [.250146, .178712, .108561, .155969], 7.842238)]

class Smooth(nn.Module):
    "A perceptual distance in float32 all through: two fixed convolutions."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
    def feats(self, x): return torch.tanh(self.b(torch.tanh(self.a(x))))
    def forward(self, x, y): return 10*(self.feats(x) - self.feats(y)).square().mean((1, 2, 3))

@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    G = Generator(16, z_dim=16, w_dim=16, num_mapping=2, channel_base=256, channel_max=16).eval()
    for p in G.parameters():    # noise that matters
        if p.ndim == 0: p.data.fill_(.3)
    G.mapping.w_avg.copy_(G.mapping(torch.randn(500, 16)).mean(0).detach())
    P = Smooth().requires_grad_(False)
    img = F.interpolate(torch.randn(4, 3, 4, 4), (16, 16), mode="bilinear").clamp(-1, 1)
    wp = G.broadcast(G.mapping(torch.randn(4, 16))).detach()
    return G, P, img, wp

def plain_tuning(G, P, x, wp, steps, lr, seed, near=True, alpha=30., psi=.5):
    "The equations of the method, written down for one image: copies, loops, torch's own Adam."
    T, gen, log = copy.deepcopy(G), torch.Generator().manual_seed(seed), []
    opt = torch.optim.Adam(T.parameters(), lr=lr)
    for _ in range(steps):
        z = torch.randn(1, G.z_dim, generator=gen)
        out = T.synthesis(wp, noise="const")
        loss = P(x, out).sum() + 1.*((x - out)**2).mean()
        if near:
            with torch.no_grad():
                w_z = G.w_avg + psi*(G.mapping(z) - G.w_avg)
                way = w_z[:, None, :].repeat(1, G.num_ws, 1) - wp
                w_r = wp + alpha*way/way.pow(2).sum().sqrt()
                assert abs((w_r - wp).norm().item() - alpha) < 1e-3
                old = G.synthesis(w_r, noise="none")
            new = T.synthesis(w_r, noise="none")
            loss = loss + .1*((new - old)**2).mean() + .1*P(new, old).sum()
        log.append(loss.item())
        opt.zero_grad(); loss.backward(); opt.step()
    return T, log

@pytest.mark.parametrize("near", [True, False])
def test_plain_tuning_is_the_equations(world, near):
    "A batch is a loop over images; every step's distance is told; the stack of generators goes the same way."
    G, P, img, wp = world
    seen, far = [], lambda T, i: P(T.synthesis(wp[i:i+1]), img[i:i+1]).item()
    kw = dict(lambda_locality=.1*near, seed=3)
    t = tune(img, wp, G, P, 10, 1e-2, 0., **kw, on_step=lambda step, d: seen.append((step, d)))
    assert [s for s, _ in seen] == [*range(11)]*4 and t.steps.tolist() == [10]*4
    for i in range(4):
        T, log = plain_tuning(G, P, img[i:i+1], wp[i:i+1], 10, 1e-2, 3, near)
        assert seen[11*i + 10][1] == pytest.approx(far(T, i), rel=1e-4) == float(t.perceptual[i].detach())
        assert torch.allclose(t.synthesis(G, wp)[i:i+1], T.synthesis(wp[i:i+1]), atol=1e-4)
    together = tune_batch(img, wp, G, P, 10, 0., "paper", lr=1e-2, locality=near, seed=3)
    assert (together.synthesis(G, wp) - t.synthesis(G, wp)).abs().max() < 1e-3 and t.diff.keys() == together.diff.keys()
    alone = tune(img[2:3], wp[2:3], G, P, 10, 1e-2, 0., **kw)
    assert all(torch.equal(alone.diff[k][0], d[2]) for k, d in t.diff.items())

def test_plain_tuning_stops_at_the_threshold_and_changes_nothing_else(world):
    G, P, img, wp = world
    before, seen = {k: v.clone() for k, v in G.state_dict().items()}, []
    start = torch.cat([P(G.synthesis(w[None]), x[None]).detach() for w, x in zip(wp, img)])     # one by one, as it tunes: a batch rounds differently
    t = tune(img[:2], wp[:2], G, P, 30, 1e-2, .5*float(start[0]), on_step=lambda step, d: seen.append(d))
    assert 0 < t.steps[0] < 30 and t.perceptual[0] <= .5*start[0] < seen[int(t.steps[0]) - 1]
    done = tune(img, wp, G, P, threshold=float(start.max()))
    assert done.steps.tolist() == [0]*4 and all(v.abs().max() == 0 for v in done.diff.values())
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items()) and all(p.grad is None for p in G.parameters())

@pytest.mark.parametrize("preset,far,size", GOLD)
def test_presets_give_what_they_gave(world, preset, far, size):
    "Distances after eight steps and the length of all differences, recorded before tuning was divided into a plain loop and a batch of stacks."
    G, P, img, wp = world
    t = tune_batch(img, wp, G, P, 8, 0., preset, seed=3)
    assert t.perceptual.tolist() == pytest.approx(far, rel=2e-3)
    assert sum(float(d.square().sum()) for d in t.diff.values())**.5 == pytest.approx(size, rel=2e-3)

@pytest.mark.parametrize("near", [True, False])
def test_tune_is_the_equations(world, near):
    G, P, img, wp = world
    seen = []
    total = lambda p: p["perceptual"] + p["mse"] + .1*(p.get("locality_mse", 0*p["mse"]) + p.get("locality_perceptual", 0*p["mse"]))
    t = tune_batch(img, wp, G, P, steps=10, preset="paper", lr=1e-2, threshold=0., locality=near, seed=3,
             on_step=lambda s, live, p: seen.append(total(p)))
    seen = torch.stack(seen)
    for i in range(2):
        T, log = plain_tuning(G, P, img[i:i+1], wp[i:i+1], 10, 1e-2, 3, near)
        assert torch.allclose(seen[:10, i], torch.tensor(log), atol=1e-5, rtol=1e-5)
        assert log[-1] < log[0]
        want = T.synthesis(wp[i:i+1])
        assert torch.allclose(t.synthesis(G, wp)[i:i+1], want, atol=1e-4)
        assert torch.allclose(t.generator(G, i).synthesis(wp[i:i+1]), want, atol=1e-4)

def test_paper_preset_is_the_published_rate_and_weights(world):
    G, P, img, wp = world
    paper = TUNE_PRESETS["paper"]
    assert (paper["lr"], paper["threshold"], paper["locality_every"], paper["muon"], paper["lr_by_distance"]) == (3e-4, .07, 1, False, False)
    assert paper["lambdas"] == dict(perceptual=1., mse=1., locality_mse=.1, locality_perceptual=.1)
    assert TUNE_PRESETS["pti"]["threshold"] == .06 and not TUNE_PRESETS["pti"]["locality"]
    t = tune_batch(img[:1], wp[:1], G, P, steps=10, preset="paper", threshold=0., seed=3)
    T, _ = plain_tuning(G, P, img[:1], wp[:1], 10, 3e-4, 3)
    with torch.no_grad(): assert (t.synthesis(G, wp[:1]) - T.synthesis(wp[:1])).abs().max() < 1e-5
    with pytest.raises(InputError, match="'papre'.*paper"): tune_batch(img, wp, G, P, preset="papre")

def test_anchor_lies_alpha_away(world):
    G, _, _, wp = world
    free = wp + .3*torch.randn(wp.shape, generator=torch.Generator().manual_seed(0))
    for alpha in (1., 30.):
        r = locality_code(free, torch.randn(1, 16), alpha)
        assert torch.allclose((r - free).flatten(1).norm(dim=1), torch.full((4,), alpha), rtol=1e-5)
    w = torch.randn(1, 16)
    d, e = (locality_code(free, w) - free)[2].flatten(), (w[:, None] - free)[2].flatten()
    assert F.cosine_similarity(d, e, dim=0) > 1 - 1e-6

def test_tune_does_not_depend_on_the_company(world):
    G, P, img, wp = world
    kw = dict(steps=50, lr=3e-3, threshold=0., seed=1, bf16=False)
    together, mixed = tune_batch(img, wp, G, P, **kw), tune_batch(img[[2, 0]], wp[[2, 0]], G, P, **kw)
    for i in range(4):
        alone = tune_batch(img[i:i+1], wp[i:i+1], G, P, **kw).synthesis(G, wp[i:i+1])
        assert (together.synthesis(G, wp)[i:i+1] - alone).abs().max() < 1e-3
    assert (mixed.synthesis(G, wp[[2, 0]]) - together.synthesis(G, wp)[[2, 0]]).abs().max() < 1e-3

def test_each_image_stops_on_its_own(world):
    G, P, img, wp = world
    img = torch.cat([G.synthesis(wp[:1]).detach(), img[1:]])    # the first is perfect already
    kw = dict(steps=30, lr=3e-3, bf16=False)
    marks = tune_batch(img, wp, G, P, threshold=0., **kw).perceptual
    goal = float(marks[1:].max())*1.3
    t = tune_batch(img, wp, G, P, threshold=goal, **kw)
    assert t.steps[0] == 0 and all(v[0].abs().max() == 0 for v in t.diff.values())
    assert len(set(t.steps.tolist())) > 1 and (t.steps <= 30).all() and (t.perceptual <= goal).all()
    for i in range(1, 4):
        alone = tune_batch(img[i:i+1], wp[i:i+1], G, P, threshold=goal, **kw)
        assert alone.steps[0] == t.steps[i]
        assert (alone.synthesis(G, wp[i:i+1]) - t.synthesis(G, wp)[i:i+1]).abs().max() < 1e-3
        reached = P(t.synthesis(G, wp), img)
        assert torch.allclose(reached, t.perceptual, atol=1e-5)

def test_tune_leaves_everything_as_it_was(world):
    G, P, img, wp = world
    before = {k: v.clone() for k, v in G.state_dict().items()}
    keep = img.clone(), wp.clone()
    tune_batch(img, wp, G, P, steps=3)
    assert all(torch.equal(v, before[k]) for k, v in G.state_dict().items())
    assert torch.equal(img, keep[0]) and torch.equal(wp, keep[1])
    assert all(p.grad is None for p in G.parameters())

def test_a_broken_image_harms_no_other(world):
    G, P, img, wp = world
    bad = img.clone(); bad[1] = float("nan")
    kw = dict(steps=8, threshold=0., bf16=False)
    t, u = tune_batch(bad, wp, G, P, **kw), tune_batch(img, wp, G, P, **kw)
    assert t.perceptual.isnan().tolist() == [False, True, False, False]
    assert all(torch.isfinite(v).all() for v in t.diff.values())
    assert torch.allclose(t.synthesis(G, wp)[[0, 2, 3]], u.synthesis(G, wp)[[0, 2, 3]], atol=1e-4)

def test_an_image_that_flies_away_is_tried_again_more_slowly(world):
    "The second image's distance explodes, but only after the first step at a full rate."
    G, P, img, wp = world
    class Cliff(nn.Module):
        def forward(self, x, y):
            off = ((x - start).square().mean((1, 2, 3)) > 1e-2) & (y == img[1]).flatten(1).all(1)
            return P(x, y) + torch.where(off, torch.nan, 0.)
    start = G.synthesis(wp).detach()[1]
    kw = dict(steps=3, threshold=0., bf16=False, locality=False)
    rates, own = [], dict(lr=4e-2)
    t = tune_batch(img, wp, G, Cliff(), retries=0, **kw, **own)
    assert t.perceptual.isnan().tolist() == [False, True, False, False]
    assert all(v[1].abs().max() == 0 for v in t.diff.values())       # nothing half-made is kept
    u = tune_batch(img, wp, G, Cliff(), retries=4, on_step=lambda s, live, p: rates.append(len(live)), **kw, **own)
    assert u.perceptual.isfinite().all() and rates[0] == 4 and rates[-1] == 1
    assert torch.equal(u.perceptual[[0, 2, 3]], t.perceptual[[0, 2, 3]]) and any(v[1].abs().max() > 0 for v in u.diff.values())

def test_bfloat16_ends_near_float32(world):
    G, P, img, wp = world
    kw = dict(steps=40, lr=3e-3, threshold=0., locality_every=1)
    a, b = (tune_batch(img, wp, G, P, bf16=h, **kw) for h in (False, True))
    start = tune_batch(img, wp, G, P, steps=0, threshold=0.).perceptual
    gap = (P(a.synthesis(G, wp), img) - P(b.synthesis(G, wp), img)).abs()
    assert (gap < .1*start).all() and all(v.dtype == torch.float32 for v in b.diff.values())

@pytest.mark.parametrize("near", [True, False])
def test_frugal_tuning_is_the_same_tuning(world, near):
    G, P, img, wp = world
    kw = dict(steps=6, lr=3e-3, threshold=0., locality=near, bf16=False)
    a, b = (tune_batch(img, wp, G, P, low_memory=f, **kw) for f in (False, True))
    own = stack_params(G, 4)
    g, h = (torch.autograd.grad(f(G, own, wp).square().sum(), list(own.values())) for f in (synthesize_batched, synthesize_checkpointed))
    assert all(torch.allclose(x, y, atol=1e-4*float(x.abs().max())) for x, y in zip(g, h))
    assert (a.synthesis(G, wp) - b.synthesis(G, wp)).abs().max() < 1e-3

@pytest.mark.parametrize("every", [2, 3])
def test_lazy_locality_looks_every_kth_step_and_counts_k_times(world, every):
    G, P, img, wp = world
    seen = []
    t = tune_batch(img[:1], wp[:1], G, P, steps=6, preset="paper", lr=1e-2, locality_every=every, threshold=0., seed=3,
             on_step=lambda s, live, p: seen.append("locality_mse" in p))
    assert seen == [s % every == 0 for s in range(7)]
    T, gen = copy.deepcopy(G), torch.Generator().manual_seed(3)
    opt = torch.optim.Adam(T.parameters(), lr=1e-2)
    for step in range(6):
        z, x = torch.randn(1, G.z_dim, generator=gen), img[:1]
        out = T.synthesis(wp[:1])
        loss = P(x, out).sum() + ((x - out)**2).mean()
        if step % every == 0:
            w_r = locality_code(wp[:1], (G.w_avg + .5*(G.mapping(z) - G.w_avg)).detach())
            new, old = T.synthesis(w_r, noise="none"), G.synthesis(w_r, noise="none").detach()
            loss = loss + every*.1*(((new - old)**2).mean() + P(new, old).sum())
        opt.zero_grad(); loss.backward(); opt.step()
    assert torch.allclose(t.synthesis(G, wp[:1]), T.synthesis(wp[:1]), atol=1e-4)

def test_squeezing_loses_what_its_bits_say(world):
    "More bits are never worse, each is worth about six decibels, and squeezing twice is squeezing once."
    G, P, img, wp = world
    t = tune_batch(img[:1], wp[:1], G, P, steps=20, lr=1e-2, threshold=0.)
    whole = {k: v[0] for k, v in t.diff.items()}
    lost = []
    for bits in (2, 3, 4, 6, 8):
        packed = compress(whole, bits)
        back = decompress(packed, G)
        assert back.keys() == whole.keys() and all(back[k].shape == v.shape for k, v in whole.items())
        assert all(torch.allclose(back[k], whole[k].half().float(), atol=1e-6) for k in unquantized_params(whole))
        lost.append(sum(float((back[k] - v).square().sum()) for k, v in whole.items() if k not in unquantized_params(whole)))
        again = decompress(compress(back, bits), G)
        assert all(torch.allclose(again[k], back[k], rtol=1e-5, atol=1e-9) for k in back)
    assert all(a > 2*b for a, b in zip(lost, lost[1:])) and lost[-1] < 1e-3*lost[0]
    nothing = {k: torch.zeros_like(v) for k, v in whole.items()}
    assert all(v.abs().max() < 1e-15 for v in decompress(compress(nothing), G).values())

def test_steps_are_as_wide_as_loses_least():
    "Against a fine search over one row; and a row of one number, of none but zeros, of one value."
    x = torch.randn(6, 400, generator=make_rng(0))*torch.logspace(-6, 3, 6)[:, None]
    x[1, 0] = 40*x[1].std()                                       # one far out
    q, width = quantize(x, 3)
    assert q.min() >= -4 and q.max() <= 3 and torch.equal(q, q.round())
    for row, got, w in zip(x, q, width):
        tries = row.abs().max()/3.5*torch.linspace(.3, 1, 400)
        err = lambda w: (((row/w).floor().clamp(-4, 3) + .5)*w - row).square().sum()
        assert ((got + .5)*w - row).square().sum() <= 1.02*min(err(v) for v in tries)
    odd = torch.stack([torch.zeros(5), torch.ones(5), torch.tensor([0., 0, 0, 0, -2])])
    q, width = quantize(odd, 3)
    back = (q + .5)*width[:, None]
    assert back.isfinite().all() and back[0].abs().max() < 1e-15 and torch.allclose(back[1], odd[1])

def test_mending_learns_what_squeezing_has_spoilt(world, tmp_path):
    G, P, img, wp = world
    img = img.clone(); img[3, 0, 0, 0] = torch.nan                # a broken photograph harms nobody
    t = tune_batch(img, wp, G, P, steps=20, lr=1e-2, threshold=0.)
    raw = unpack_tuned([pack_tuned(t, i, 2) for i in range(4)], G)
    far = lambda t: P.precise(t.synthesis(G, wp), img) if hasattr(P, "precise") else P(t.synthesis(G, wp), img)
    m = recover_quantized(t, img, wp, G, P, bits=2)
    assert (far(m) < far(raw))[:3].all() and torch.allclose(far(m)[:3], m.perceptual[:3], atol=1e-5)
    assert all(v[3].abs().max() < 1e-15 for v in m.diff.values()) and m.perceptual[3].isnan()
    save_tuned(m, tmp_path/"t.safetensors", bits=2)
    back = load_tuned(tmp_path/"t.safetensors", G)
    for k in m.diff: assert torch.allclose(back.diff[k][:3], m.diff[k][:3], rtol=2e-3, atol=1e-6), k
    free = set(unquantized_params(m.diff))
    assert all(torch.equal(m.diff[k], raw.diff[k]) for k in m.diff if k not in free)

def test_orthogonal_steps():
    "Same singular vectors, all values near 1; every matrix by itself; zeros stay zeros."
    u, _, v = torch.linalg.svd(torch.randn(3, 12, 40, generator=make_rng(0)), full_matrices=False)
    m = u @ torch.diag_embed(torch.logspace(0, -1.5, 12).expand(3, -1)) @ v
    for x in (m, m.mT, 1e-12*m):
        y = newton_schulz(x)
        assert ((torch.linalg.svdvals(y) - .95).abs() < .3).all()
        inner = (u.mT @ (y if y.shape == m.shape else y.mT) @ v.mT)
        assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    m[1] = 0
    y = newton_schulz(m)
    assert y[1].abs().max() == 0 and torch.allclose(y[2], newton_schulz(m[2:])[0], atol=1e-6)

def test_descent_is_adam_without_muon_and_follows_its_rows():
    "Against torch's own Adam; with Muon, some of the rows go on as if alone."
    g = make_rng(0)
    start = {"a": torch.randn(3, 8, 8, 3, 3, generator=g), "b": torch.randn(3, 8, generator=g)}
    goal = {k: torch.randn(v.shape, generator=g) for k, v in start.items()}
    fresh = lambda rows=slice(None): {k: v[rows].clone().requires_grad_() for k, v in start.items()}
    loss = lambda w, rows=slice(None): sum((w[k] - goal[k][rows]).square().sum() for k in w)
    d, w, one = BatchedOptimizer(fresh()), fresh(), torch.ones(3)
    adam = torch.optim.Adam(w.values(), 1e-2)
    for _ in range(5): d.step(loss(d.weights), 1e-2*one); adam.zero_grad(); loss(w).backward(); adam.step()
    assert all(torch.allclose(d.weights[k], w[k], atol=1e-6) for k in w)
    keep, lr = torch.tensor([True, False, True]), torch.tensor([1e-2, 3e-2, 5e-3])
    both, alone = BatchedOptimizer(fresh(), muon=True), BatchedOptimizer(fresh(keep), muon=True)
    for k in range(8):
        if k == 4: both = both.select(keep)
        rows = keep if k >= 4 else slice(None)
        both.step(loss(both.weights, rows), lr[rows]); alone.step(loss(alone.weights, keep), lr[keep])
    assert all(torch.allclose(both.weights[k], alone.weights[k], atol=1e-5) for k in start)
    moved = (alone.weights["a"].detach() - start["a"][keep]).square().mean((1, 2, 3, 4)).sqrt()
    assert ((moved/(8*lr[keep]) - .8).abs() < .3).all()           # eight steps of about the rate

@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_come_back(bits):
    q = torch.randint(-2**(bits - 1), 2**(bits - 1), (13, 7), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(q, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-q.numel()*bits//8)
    assert torch.equal(unpack_bits(packed, bits, q.numel()).view(q.shape), q.float())

def test_a_tuned_generator_survives_the_disk(world, tmp_path):
    G, P, img, wp = world
    t = tune_batch(img, wp, G, P, steps=8, lr=3e-3, threshold=0.)
    save_tuned(t, tmp_path/"t.safetensors", bits=8)
    back = load_tuned(tmp_path/"t.safetensors", G)
    assert (back.synthesis(G, wp) - t.synthesis(G, wp)).abs().max() < 2e-2
    free = {k: p.numel() for k, p in G.synthesis.named_parameters() if k in unquantized_params(t.diff)}
    rows = sum(len(p) for k, p in G.synthesis.named_parameters() if k not in free)
    rest = sum(p.numel() for k, p in G.synthesis.named_parameters() if k not in free)
    for bits in (3, 6):
        used = sum(v.numel()*v.element_size() for v in pack_tuned(t, 1, bits).values())
        assert used <= rest*bits/8 + 2*sum(free.values()) + 4*rows + 2*len(t.diff) + 16, (bits, used)
    assert torch.equal(back.steps, t.steps) and len(back[1:3]) == 2
    assert torch.equal(back[[2]].synthesis(G, wp[[2]]), back.synthesis(G, wp[[2]].repeat(4, 1, 1))[[2]]) or \
        torch.allclose(back[[2]].synthesis(G, wp[[2]]), back.synthesis(G, wp[[2]].repeat(4, 1, 1))[[2]], atol=1e-5)
    from cycle_nb.models import save_tensors
    save_tensors(tmp_path/"other.safetensors", dict(a=torch.zeros(2)), {})
    with pytest.raises(InputError): load_tuned(tmp_path/"other.safetensors", G)

def test_stack_draws_what_the_generator_draws(world):
    G, _, _, wp = world
    for noise in ("const", "none"):
        assert torch.allclose(synthesize_batched(G, stack_params(G, 4), wp, noise), G.synthesis(wp, noise=noise), atol=1e-5)

# --- refine ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def coder(world):
    G, P, img, wp = world
    torch.manual_seed(1)
    E = Encoder(32, G.num_ws, G.w_dim, w_avg=G.w_avg.clone(), stage=2)
    for _ in range(3): E.train()(G.synthesis(wp).detach())    # batch statistics that are not the default
    body = dict(widths=(4, 8, 8), depth=(1, 1, 1), res=16)
    return E.eval(), Perceptual(**body).eval().requires_grad_(False), Identity(8, **body).eval().requires_grad_(False)

def test_refine_leaves_the_encoder_alone_and_takes_images_in_any_order(world, coder):
    G, _, img, _ = world
    E, P, I = coder
    before = {k: v.clone() for k, v in E.state_dict().items()}
    for train_mode in (False, True):
        kw = dict(reg_images=regularization_images(G, 3), steps=3, lr=1e-3, train_mode=train_mode)
        a = refine(img, E, G, P, I, **kw)
        b = refine(img.flip(0), E, G, P, I, **kw).flip(0)
        assert torch.allclose(a, b, atol=1e-5)
        assert all(torch.equal(v, before[k]) for k, v in E.state_dict().items())
        assert not E.training and all(p.grad is None for p in E.parameters())
    assert a.shape == (4, G.num_ws, G.w_dim)
    assert (a - E(img)).abs().max() > 1e-4

def plain_refinement(E, G, P, I, x, batch, steps, lr, lam, every=1):
    "The equation, image by image: L_S(x) + λ/M Σ L_S(x*), the sum only at every so many steps and as many times."
    E = copy.deepcopy(E)
    opt = torch.optim.Adam(E.parameters(), lr=lr)
    def L_S(y):
        out = G.synthesis(E(y))
        return ((out - y)**2).mean() + .8*P(out, y).sum() + .1*(1 - (I.embed(out)*I.embed(y)).sum())
    for step in range(steps):
        loss = L_S(x)
        if step % every == 0: loss = loss + every*lam/len(batch)*sum(L_S(y[None]) for y in batch)
        opt.zero_grad(); loss.backward(); opt.step()
    return E(x).detach()

@pytest.mark.parametrize("every", [1, 3])
def test_refine_is_the_equation(world, coder, monkeypatch, every):
    import contextlib
    for module in ("features", "refine"):     # full precision, so that rounding does not hide a wrong term
        monkeypatch.setattr(f"cycle_nb.{module}.autocast", lambda *_: contextlib.nullcontext())
    G, _, img, _ = world
    E, P, I = coder
    batch = regularization_images(G, 3, seed=5)
    got = refine(img[:2], E, G, P, I, reg_images=batch, steps=4, lr=1e-3, lambda_reg=2., reg_interval=every)
    for i in range(2):
        want = plain_refinement(E, G, P, I, img[i:i+1], batch, 4, 1e-3, 2., every)
        assert torch.allclose(got[i:i+1], want, atol=2e-3)

@pytest.mark.parametrize("train_mode", [False, True])
def test_low_memory_refinement_is_the_same_refinement(world, coder, train_mode):
    """In training mode a bias before a normalisation has no gradient but its rounding error, and Adam makes whole steps
    of it: they change no loss, and the code by little."""
    G, _, img, _ = world
    E, P, I = coder
    def go(low_memory, log):
        on_step = lambda step, wp, loss: log.append(loss.item())
        return refine(img[:2], E, G, P, I, regularization_images(G, 3), steps=4, lr=1e-3, train_mode=train_mode, low_memory=low_memory, on_step=on_step)
    one, two = [], []
    a, b = go(False, one), go(True, two)
    assert one == pytest.approx(two, rel=1e-3) and len(one) == 8 and max(one) > 1.01*min(one)
    assert torch.allclose(a, b, atol=.01 if train_mode else 1e-3) and (a - E(img[:2])).abs().max() > .02

def test_microbatches_keep_nothing_of_a_row_but_the_row():
    "The same sums and gradients, and what is kept for the gradient does not grow with the work on a row."
    x, seen = torch.randn(6, 1000, requires_grad=True), []
    def run(x):
        for _ in range(20): x = torch.sin(x)
        return dict(a=x.sum(1), b=x.square().mean(1))
    def kept(look):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel()) or t, lambda t: t):
            seen.clear()
            out = look()
        return out, torch.autograd.grad(out["a"].sum() + out["b"].sum(), x)[0], sum(seen)
    (a, ga, many), (b, gb, few) = kept(lambda: run(x)), kept(lambda: microbatched(run, x))
    assert all(torch.allclose(a[k], b[k]) for k in ("a", "b")) and torch.allclose(ga, gb, atol=1e-6)
    assert many > 20*x.numel() and few <= 2*x.numel()

def test_train_mode_depends_on_the_other_images_frozen_does_not(world, coder):
    G, _, img, _ = world
    E, P, I = coder
    one, other = regularization_images(G, 3, seed=1), regularization_images(G, 3, seed=2)
    code = lambda batch, mode: refine(img[:1], E, G, P, I, reg_images=batch, steps=0, train_mode=mode)
    assert torch.equal(code(one, False), code(other, False))
    assert (code(one, True) - code(other, True)).abs().max() > 1e-3

@pytest.mark.parametrize("interval", [1, 3])
def test_fresh_images_at_every_look(world, coder, interval):
    "A function draws new ones for every look, for each target the same; what it draws is what counts."
    G, _, img, _ = world
    E, P, I = coder
    drawn = []
    def fresh(n, rng):
        drawn.append(torch.randn(n, 3, 16, 16, generator=rng).clamp(-1, 1))
        return drawn[-1]
    kw = dict(steps=5, lr=1e-3, reg_interval=interval, seed=4)
    a = refine(img[:2], E, G, P, I, fresh, num_reg=2, **kw)
    looks = len(range(0, 5, interval))
    assert len(drawn) == 2*looks and all(len(d) == 2 for d in drawn) and not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(drawn[i], drawn[looks + i]) for i in range(looks))
    if interval == 1:
        one = finetune_encoder(img[:1], drawn[0], E, G, P, I, steps=1, lr=1e-3, reg_interval=1)
        two = finetune_encoder(img[:1], fresh, E, G, P, I, steps=1, lr=1e-3, reg_interval=1, num_reg=2, seed=4)
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not torch.allclose(a, refine(img[:2], E, G, P, I, drawn[0], **kw), atol=1e-6)
    refine(img[:1], E, G, P, I, fresh, train_mode=True, **kw)

def test_restyle_encoders_are_refined(world, coder):
    G, _, img, _ = world
    _, P, I = coder
    torch.manual_seed(2)
    E = Encoder(16, G.num_ws, G.w_dim, w_avg=G.w_avg.clone(), stage=G.num_ws - 1, channels=6, maps=1).eval()
    for low_memory in (False, True):
        log = []
        wp = refine(img[:1], E, G, P, I, regularization_images(G, 2), steps=8, lr=1e-3, reg_interval=1, low_memory=low_memory,
                    on_step=lambda s, w, l: log.append(l.item()))
        assert wp.shape == (1, G.num_ws, G.w_dim) and log[-1] < log[0]

def test_refined_codes_stay_in_w_at_stage_0(world, coder):
    G, _, img, _ = world
    E, P, I = coder
    wp = refine(img[:1], E, G, P, I, steps=2, stage=0)
    assert (wp - wp[:, :1]).abs().max() == 0

def test_refine_latent_lowers_the_loss_and_the_regulariser_keeps_it_near_w(world, coder):
    G, _, img, wp = world
    _, P, I = coder
    from cycle_nb.latents import spread
    log = []
    free = refine_latent(img, wp, G, P, I, steps=30, lr=.05, lambda_w=0., on_step=lambda s, w, l: log.append(l.mean()))
    held = refine_latent(img, wp, G, P, I, steps=30, lr=.05, lambda_w=1.)
    assert log[-1] < log[0] and spread(held).mean() < .5*spread(free).mean()
    assert torch.allclose(refine_latent(img[1:2], wp[1:2], G, P, I, steps=5), refine_latent(img, wp, G, P, I, steps=5)[1:2], atol=1e-2)

# --- project --------------------------------------------------------------------------------------------------------

def test_project_finds_what_is_there(world):
    G, P, _, wp = world
    x = G.synthesis(wp[:2]).detach()
    start = P(G.synthesis(G.broadcast(G.w_avg[None].repeat(2, 1))), x)
    for space in ("w", "w+"):
        got = project(x, G, P, space, steps=80, lr=.2)
        assert (P(G.synthesis(got), x) < .3*start).all()
        assert got.shape == (2, G.num_ws, G.w_dim)
        assert ((got - got[:, :1]).abs().max() == 0) == (space == "w")
    with pytest.raises(InputError, match="'z'"): project(x, G, P, "z", steps=1)

def test_ramp():
    assert lr_ramp(0) == 0 and lr_ramp(.025) == pytest.approx(.5) and lr_ramp(.5) == 1
    assert lr_ramp(.875) == pytest.approx(.5) and lr_ramp(1.) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('outer', [False, True])
def test_a_host_that_autocasts_keeps_no_old_weights(outer):
    "Every step sees the weights of the step before, also inside another autocast."
    from cycle_nb.core import autocast
    layer, x = torch.nn.Linear(4, 4, bias=False), torch.eye(4)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=outer):
        for k in range(1, 4):
            with torch.no_grad(): layer.weight.fill_(k)
            with autocast(x): assert (layer(x) == k).all()
