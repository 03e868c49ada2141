"Edit directions: planted ones are found, lengths mean what they say, strengths hit the asked change."
import pytest, torch
from torch import nn
from cycle_nb.directions import (apply_direction, attribute_response, calibrate_direction, find_direction, load_directions, predict_attributes, restrict_to_layers,
    ridge_fit, save_directions, train_directions)
from cycle_nb.edit import measure_directions, solve_strength, style_deviation, walk_limit
from cycle_nb.latents import sample_w
from cycle_nb.core import InputError
from cycle_nb.stylegan2 import Generator
from cycle_nb.stylespace import (channel_direction, closed_form_directions, main_channel, measure_styles, pca_directions, search_directions, style_effects, style_layers,
    style_matrix, style_reach, stylespace_directions)

cos = lambda a, b: float(torch.nn.functional.cosine_similarity(a, b, dim=-1))

@pytest.fixture(scope="module")
def codes():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3000, 12, generator=g)*torch.linspace(.3, 2, 12) + 5
    d = torch.randn(12, generator=g)
    return w, d/d.norm(), g

def test_a_planted_direction_is_found(codes):
    w, d, g = codes
    y = w @ d + .2*torch.randn(len(w), generator=g)
    assert cos(find_direction(w, y, ridge=1e-4), d) > .99
    assert cos(find_direction(w, y > y.mean(), ridge=1e-6), d) > .98
    free, firm = (find_direction(w, y, ridge=r) for r in (1e-6, 1e6))
    means = w[y > y.median()].mean(0) - w[y <= y.median()].mean(0)
    assert cos(firm, means) > .99 > cos(free, means)    # with a firm hand: the difference of means
    assert cos(find_direction(w, -y, ridge=1e-4), d) < -.99
    assert find_direction(w, y).norm() == pytest.approx(1, abs=1e-5)

def test_ridge_equals_scikit_free_least_squares(codes):
    w, d, g = codes
    x = (w - w.mean(0)).double()
    y = x @ d.double() + torch.randn(len(w), generator=g).double()
    want = torch.linalg.lstsq(x, (y - y.mean())[:, None]).solution[:, 0]
    assert torch.allclose(ridge_fit(x, y - y.mean(), 0.), want, atol=1e-8)

def test_conditioning_is_orthogonal(codes):
    w, d, g = codes
    others = torch.randn(3, 12, generator=g)
    got = find_direction(w, w @ d, others=others)
    assert (others @ got).abs().max() < 1e-4 and got.norm() == pytest.approx(1, abs=1e-5)

def test_equal_labels_are_refused(codes):
    for y in (torch.zeros(len(codes[0])), torch.ones(len(codes[0])) > 0):
        with pytest.raises(InputError, match="equal"): find_direction(codes[0], y)

def test_edit_moves_what_it_should():
    wp = torch.zeros(3, 4, 5)
    assert torch.equal(apply_direction(wp, torch.ones(5), 2.), torch.full((3, 4, 5), 2.))
    rows = torch.zeros(4, 5); rows[1] = 1
    assert apply_direction(wp, rows, 1.)[:, [0, 2, 3]].abs().max() == 0
    s = apply_direction(wp, torch.ones(5), torch.tensor([1., 2., 3.]))
    assert s[:, 0, 0].tolist() == [1., 2., 3.]

class Linear(nn.Module):
    "A generator whose image is its first code, and a regressor that reads two numbers from it."
    names = ["a", "b"]
    z_dim = w_dim = 6; num_ws = 3
    w_avg = torch.zeros(6)
    def mapping(self, z, truncation=1.): return z*torch.arange(1., 7.)
    def broadcast(self, w): return w[:, None].repeat(1, 3, 1)
    def synthesis(self, wp, noise="const"): return wp.mean(1)
    def forward(self, img): return torch.stack([img[:, 0]*.5 + img[:, 1], img[:, 2]], 1)

def test_strength_one_is_one_standard_deviation():
    G = Linear()
    d = calibrate_direction(-torch.eye(6)[0], G, G, "a", n=500)
    wp = G.broadcast(sample_w(G, 500, 0))
    sigma = predict_attributes(G, G, wp)[:, 0].std()
    assert attribute_response(d, G, G, wp)[0] == pytest.approx(float(sigma), rel=1e-3) and d[0] > 0
    found = train_directions(G, G, names=["a", "b"], n=2000, ridges=(1e-4, 1e3))
    found = {k: d.sum(0) if d.ndim == 2 else d for k, d in found.items()}
    assert cos(found["b"], torch.eye(6)[2]) > .99
    assert cos(found["a"], torch.tensor([.5, 1, 0, 0, 0, 0])) > .99
    assert attribute_response(found["a"], G, G, wp)[1].abs() < .1

def test_conditioning_is_tried_and_kept_where_it_leaks_less():
    "Labels that go together: without conditioning the direction of one moves the other too."
    G = Linear()
    G.forward = lambda img: torch.stack([img[:, 0], .6*img[:, 0] + img[:, 1]], 1)        # the second follows the first
    leak = lambda d: float((m := attribute_response(d, G, G, G.broadcast(sample_w(G, 300, 5))))[1].abs()/m[0].abs())
    free, held = (train_directions(G, G, ["a", "b"], 2000, ridges=(1e-4,), condition=c)["a"] for c in (False, True))
    assert leak(held) < .1 < leak(free)

def test_strengths_hit_the_asked_change():
    wp = torch.zeros(4, 1, 2); wp[:, 0, 1] = torch.tensor([.5, 1., 2., 4.])
    read = lambda img: torch.tanh(img[:, 0, 0]*img[:, 0, 1])      # every face has a gain of its own
    for change in (.6, -.6):
        s, hit = solve_strength(wp, torch.tensor([1., 0]), lambda wp: wp, read, change, 6.)
        assert hit.all() and torch.allclose(read(apply_direction(wp, torch.tensor([1., 0]), s)), torch.full((4,), change), rtol=.05)
    s, hit = solve_strength(wp, torch.tensor([1., 0]), lambda wp: wp, read, torch.tensor([.3, -.3, 1.5, .6]), 6.)
    assert hit.tolist() == [True, True, False, True] and s[1] < 0
    assert torch.isfinite(s).all()

def test_no_strength_beyond_the_limit():
    "Neither tried nor given back; what lies beyond is not reached, and what lies before is found to the same strength."
    wp = torch.zeros(4, 1, 2); wp[:, 0, 1] = torch.tensor([.5, 1., 2., 4.])
    read, tried = lambda img: img[:, 0, 0]*img[:, 0, 1], []
    def draw(codes):
        tried.append(codes[:, 0, 0].abs())
        return codes
    limit = torch.tensor([1., 1.5, 0., 6.])
    s, hit = solve_strength(wp, torch.tensor([1., 0]), draw, read, torch.tensor([1., -1., 1., -1.]), limit)
    assert hit.tolist() == [False, True, False, True] and (torch.stack(tried) <= limit + 1e-6).all()
    assert s.tolist() == pytest.approx([1., -1., 0., -.25], rel=.02)

def test_faces_already_found_are_not_drawn_again():
    wp = torch.zeros(5, 1, 2); wp[:, 0, 1] = torch.tensor([.25, .5, 1., 2., 1e-3])       # the last is never reached
    read = lambda img: torch.tanh(img[:, 0, 0]*img[:, 0, 1])
    drawn = []
    def draw(codes, rows=None):
        if rows is not None: assert torch.equal(codes[:, 0, 1], wp[rows, 0, 1])
        drawn.append(len(codes))
        return codes
    a = solve_strength(wp, torch.tensor([1., 0]), draw, read, .6, 6.); every, drawn = sum(drawn), []
    b = solve_strength(wp, torch.tensor([1., 0]), draw, read, .6, 6., by_rows=True)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and sum(drawn) < .7*every and a[1].tolist() == [True]*4 + [False]

def test_the_nearest_strength_is_taken():
    read = lambda img: torch.sin(img[:, 0, 0])       # reached at many strengths
    s, hit = solve_strength(torch.zeros(1, 1, 1), torch.ones(1), lambda wp: wp, read, .5, 6., intervals=12)
    assert hit.all() and s[0] == pytest.approx(.5236, abs=.03)

# --- styles ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Generator(16, 8, 24, 2, 256, 16).eval()       # 24 numbers for up to 32 styles at a position

@pytest.fixture(scope="module")
def cloud(tiny): return measure_styles(tiny, 1000)

def styles_drawn_with(G, wp):
    "What every affine layer gives while the generator draws: by hooks, in the order of `style_layers`."
    found, names = {}, {m: n for _, n, m in style_layers(G)}
    hooks = [m.register_forward_hook(lambda m, args, out: found.__setitem__(names[m], out)) for m in names]
    with torch.no_grad(): G.synthesis(wp)
    for h in hooks: h.remove()
    return torch.cat([found[n] for n in names.values()], 1)

def test_styles_are_those_that_the_generator_uses(tiny, cloud):
    G, g = tiny, torch.Generator().manual_seed(1)
    wp = G.broadcast(sample_w(G, 5, 3)) + .3*torch.randn(5, G.num_ws, G.w_dim, generator=g)
    mean = styles_drawn_with(G, G.broadcast(cloud.mean[None]))
    assert torch.allclose(cloud.styles(wp)*cloud.std, styles_drawn_with(G, wp) - mean, atol=1e-4)
    d = torch.randn(G.num_ws, G.w_dim, generator=g)
    assert torch.allclose(cloud.change(d), cloud.styles(wp + d)[0] - cloud.styles(wp)[0], atol=1e-3)
    assert torch.allclose(cloud.change(d[0]), cloud.change(d[:1].repeat(G.num_ws, 1)), atol=1e-5)
    assert cloud.samples.std(0).sub(1).abs().max() < 1e-3 and len(set(cloud.names)) == len(cloud.names) == cloud.samples.shape[1]
    for kind in ("resnet", "orig"):                       # no torgb but the last
        H = Generator(16, 8, 24, 2, 256, 16, architecture=kind)
        assert [n for _, n, _ in style_layers(H) if "torgb" in n] == ["b16.torgb"] and style_layers(H)[-1][0] == H.num_ws - 1
        measure_styles(H, 50)

def test_one_channel_moves_and_no_other_where_there_is_room(tiny, cloud):
    for c in (cloud.names.index(n) for n in ("b4.conv1/3", "b8.conv1/0", "b16.torgb/2")):
        d = channel_direction(cloud, c)
        change = styles_drawn_with(tiny, tiny.broadcast(cloud.mean[None]) + d) - styles_drawn_with(tiny, tiny.broadcast(cloud.mean[None]))
        assert change[0, c] == pytest.approx(float(cloud.std[c]), rel=1e-2)
        change[0, c] = 0
        assert (change/cloud.std).abs().max() < .02 and main_channel(d, cloud)[0] == cloud.names[c]
    tight = cloud.names.index("b8.conv0/3")               # here 32 styles hang on 24 numbers: no step changes less besides
    d, row = channel_direction(cloud, tight), cloud.rows == cloud.rows[tight]
    share = main_channel(d, cloud)[1]
    B = cloud.maps[row].double()
    assert .3 < share < .99 and share == pytest.approx(float((B @ torch.linalg.pinv(B)).diagonal()[int(row[:tight].sum())]), rel=1e-3)
    with pytest.raises(AssertionError):                   # the check above can fail
        other = torch.randn_like(d)*(d != 0)
        assert main_channel(other, cloud)[1] > share

def test_effects_are_differences(tiny, cloud):
    "Against finite differences through the generator: one channel at a time, by its bias."
    G, w = tiny, sample_w(tiny, 6, 2)
    read = lambda img: torch.stack([img.mean((1, 2, 3)), img[:, 0].std((1, 2))], 1)
    got = style_effects(G, read, w, chunk=4)
    assert got.shape == (len(cloud.names), 2)
    for c in (0, 20, 50, len(got) - 1):
        name, i = cloud.names[c].split("/")
        bias, seen = G.synthesis.get_submodule(name).affine.bias, []
        for e in (.01, -.01):
            with torch.no_grad():
                bias[int(i)] += e; seen.append(read(G.synthesis(G.broadcast(w))).mean(0)); bias[int(i)] -= e
        assert torch.allclose((seen[0] - seen[1])/.02, got[c], atol=2e-3, rtol=.03)

def test_a_planted_channel_is_found(tiny):
    "A regressor that reads what one style of the last layer paints: stylespace finds that style, its unit and its reach."
    G = tiny
    class Reader(nn.Module):
        names = ["a", "b"]
        def forward(self, img): return torch.stack([direction @ img.mean((2, 3)).T, img[:, 0].std((1, 2))], 1)
    c = 5
    with torch.no_grad():
        direction = G.synthesis.b16.torgb.weight[:, c, 0, 0].clone()
        others = G.synthesis.b16.torgb.weight.clone()
        G.synthesis.b16.torgb.weight *= .05; G.synthesis.b16.torgb.weight[:, c] *= 200
    try:
        found = stylespace_directions(G, Reader(), ["a"], n=16, tries=3)
        cloud = measure_styles(G)
        assert main_channel(found["a"], cloud)[0] == f"b16.torgb/{c}"
        limit = walk_limit(G.broadcast(cloud.mean[None]), found["a"], cloud)
        assert limit[0] == pytest.approx(style_reach(found["a"], cloud), rel=.05)
    finally:
        with torch.no_grad(): G.synthesis.b16.torgb.weight.copy_(others)

def test_a_walk_ends_where_the_samples_do(tiny, cloud):
    G, g = tiny, torch.Generator().manual_seed(4)
    wp = G.broadcast(sample_w(G, 40, 7)) + .2*torch.randn(40, G.num_ws, G.w_dim, generator=g)
    for d in (torch.randn(G.w_dim, generator=g), restrict_to_layers(torch.randn(G.w_dim, generator=g), [1, 2], G.num_ws)):
        change = cloud.change(d)
        most = style_deviation(cloud.samples, change).quantile(.999)
        u = lambda s: style_deviation(cloud.styles(apply_direction(wp, d, s)), change)
        inside = u(0.) < most
        for sign in (1., -1.):
            s = walk_limit(wp, d, cloud, sign)
            assert torch.allclose(u(sign*s)[inside], most.expand(40)[inside], rtol=1e-3) and (s[inside] > 0).all() and (s >= 0).all()
            assert (u(.5*sign*s)[inside] <= most*1.001).all() and (u(1.1*sign*s)[inside] > most).all()
        mixed = torch.where(torch.arange(40) % 2 == 0, 1., -1.)
        assert torch.allclose(walk_limit(wp, d, cloud, mixed), torch.where(mixed > 0, walk_limit(wp, d, cloud), walk_limit(wp, d, cloud, -1.)))
    far = wp + 50*d                                       # outside: outwards not at all, inwards to where it is nearest
    assert walk_limit(far, d, cloud).max() == 0 and (walk_limit(far, d, cloud, -1.) > 40).all()

def test_the_card_of_a_direction(tiny):
    class Reader(nn.Module):
        names = ["a", "b"]
        def forward(self, img): return torch.stack([img.mean((1, 2, 3)), img[:, 0].std((1, 2))], 1)
    found = train_directions(tiny, Reader(), ["a"], n=200, ridges=(1.,))
    card = measure_directions(found, tiny, Reader())["a"]
    assert set(card) == {"moves", "leaks", "layers", "reach", "ends", "fails"} and card["moves"] == pytest.approx(1, abs=.4)
    assert card["reach"][0] < 0 < card["reach"][1] and card["ends"][0] < 0 < card["ends"][1] and 0 <= card["fails"] <= 1
    weak = measure_directions({"a": found["a"]*1e3}, tiny, Reader())["a"]       # the same direction in another unit goes as far
    assert weak["ends"] == pytest.approx(card["ends"], abs=.02) and weak["fails"] == card["fails"]

def test_unsupervised_directions():
    torch.manual_seed(0)
    G = Generator(16, 8, 8, 2, 256, 16)
    p = pca_directions(G, 3, 500)
    w = sample_w(G, 500, 0)
    lam = torch.linalg.eigvalsh(torch.cov(w.T)).flip(0)
    assert torch.allclose((w @ p.T).var(0), lam[:3], rtol=1e-3)
    for layers in (None, [0, 1], range(3, 5)):
        d = closed_form_directions(G, layers, 4)
        assert torch.allclose(d @ d.T, torch.eye(4), atol=1e-5)
    A = torch.cat([m.affine.weight for k, m in G.synthesis.named_modules() if k.endswith(("conv0", "conv1"))])[:].detach()
    A = A/A.norm(dim=1, keepdim=True)
    best = (A @ closed_form_directions(G, None, 1)[0]).norm()
    r = torch.randn(500, 8); r = r/r.norm(dim=1, keepdim=True)
    assert best >= (r @ A.T).norm(dim=1).max() and best == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-4)

def test_axes_get_the_names_that_fit_them():
    G = Linear()
    found = search_directions(torch.eye(6)[[3, 1, 2]], G, G, ["a", "b"])
    assert cos(found["a"], torch.eye(6)[1]) > .99 and cos(found["b"], torch.eye(6)[2]) > .99

def test_directions_survive_the_disk(tmp_path):
    d = dict(smile=torch.randn(8), yaw=torch.randn(3, 8))
    save_directions(d, tmp_path/"directions.safetensors", dict(kind="directions"))
    for where in (tmp_path, tmp_path/"directions.safetensors"):
        back = load_directions(where)
        assert set(back) == set(d) and all(torch.allclose(back[k], d[k], atol=1e-2) for k in d)
    with pytest.raises(InputError): load_directions(tmp_path/"none")

def test_a_direction_can_be_kept_to_some_layers():
    d = restrict_to_layers(torch.ones(5), [1, 2], 4)
    assert d.shape == (4, 5) and d.sum(1).tolist() == [0, 5, 5, 0]
