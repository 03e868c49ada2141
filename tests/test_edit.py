"Edit directions: planted ones are found, lengths mean what they say, strengths hit the asked change."
import pytest, torch
from torch import nn
from cycle_nb import edit as E
from cycle_nb.core import InputError
from cycle_nb.stylegan2 import Generator

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
    assert cos(E.find_direction(w, y, ridge=1e-4), d) > .99
    assert cos(E.find_direction(w, y > y.mean(), ridge=1e-6), d) > .98
    free, firm = (E.find_direction(w, y, ridge=r) for r in (1e-6, 1e6))
    means = w[y > y.median()].mean(0) - w[y <= y.median()].mean(0)
    assert cos(firm, means) > .99 > cos(free, means)    # with a firm hand: the difference of means
    assert cos(E.find_direction(w, -y, ridge=1e-4), d) < -.99
    assert E.find_direction(w, y).norm() == pytest.approx(1, abs=1e-5)

def test_ridge_equals_scikit_free_least_squares(codes):
    w, d, g = codes
    x = (w - w.mean(0)).double()
    y = x @ d.double() + torch.randn(len(w), generator=g).double()
    want = torch.linalg.lstsq(x, (y - y.mean())[:, None]).solution[:, 0]
    assert torch.allclose(E.ridge_fit(x, y - y.mean(), 0.), want, atol=1e-8)

def test_conditioning_is_orthogonal(codes):
    w, d, g = codes
    others = torch.randn(3, 12, generator=g)
    got = E.find_direction(w, w @ d, others=others)
    assert (others @ got).abs().max() < 1e-4 and got.norm() == pytest.approx(1, abs=1e-5)

def test_equal_labels_are_refused(codes):
    for y in (torch.zeros(len(codes[0])), torch.ones(len(codes[0])) > 0):
        with pytest.raises(InputError, match="equal"): E.find_direction(codes[0], y)

def test_edit_moves_what_it_should():
    wp = torch.zeros(3, 4, 5)
    assert torch.equal(E.edit(wp, torch.ones(5), 2.), torch.full((3, 4, 5), 2.))
    rows = torch.zeros(4, 5); rows[1] = 1
    assert E.edit(wp, rows, 1.)[:, [0, 2, 3]].abs().max() == 0
    s = E.edit(wp, torch.ones(5), torch.tensor([1., 2., 3.]))
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
    d = E.normalise(-torch.eye(6)[0], G, G, "a", n=500)
    wp = G.broadcast(E.sample_w(G, 500, 0))
    sigma = E.read_codes(G, G, wp)[:, 0].std()
    assert E.response(d, G, G, wp)[0] == pytest.approx(float(sigma), rel=1e-3) and d[0] > 0
    found = E.train_directions(G, G, names=["a", "b"], n=2000, ridges=(1e-4, 1e3))
    found = {k: d.sum(0) if d.ndim == 2 else d for k, d in found.items()}
    assert cos(found["b"], torch.eye(6)[2]) > .99
    assert cos(found["a"], torch.tensor([.5, 1, 0, 0, 0, 0])) > .99
    assert E.response(found["a"], G, G, wp)[1].abs() < .1

def test_strengths_hit_the_asked_change():
    wp = torch.zeros(4, 1, 2); wp[:, 0, 1] = torch.tensor([.5, 1., 2., 4.])
    read = lambda img: torch.tanh(img[:, 0, 0]*img[:, 0, 1])      # every face has a gain of its own
    for change in (.6, -.6):
        s, hit = E.strength_for(wp, torch.tensor([1., 0]), lambda wp: wp, read, change)
        assert hit.all() and torch.allclose(read(E.edit(wp, torch.tensor([1., 0]), s)), torch.full((4,), change), rtol=.05)
    s, hit = E.strength_for(wp, torch.tensor([1., 0]), lambda wp: wp, read, torch.tensor([.3, -.3, 1.5, .6]))
    assert hit.tolist() == [True, True, False, True] and s[1] < 0
    assert torch.isfinite(s).all()

def test_faces_already_found_are_not_drawn_again():
    wp = torch.zeros(5, 1, 2); wp[:, 0, 1] = torch.tensor([.25, .5, 1., 2., 1e-3])       # the last is never reached
    read = lambda img: torch.tanh(img[:, 0, 0]*img[:, 0, 1])
    drawn = []
    def draw(codes, rows=None):
        if rows is not None: assert torch.equal(codes[:, 0, 1], wp[rows, 0, 1])
        drawn.append(len(codes))
        return codes
    a = E.strength_for(wp, torch.tensor([1., 0]), draw, read, .6); every, drawn = sum(drawn), []
    b = E.strength_for(wp, torch.tensor([1., 0]), draw, read, .6, some=True)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and sum(drawn) < .7*every and a[1].tolist() == [True]*4 + [False]

def test_the_nearest_strength_is_taken():
    read = lambda img: torch.sin(img[:, 0, 0])       # reached at many strengths
    s, hit = E.strength_for(torch.zeros(1, 1, 1), torch.ones(1), lambda wp: wp, read, .5, most=6., coarse=12)
    assert hit.all() and s[0] == pytest.approx(.5236, abs=.03)

def test_unsupervised_directions():
    torch.manual_seed(0)
    G = Generator(16, 8, 8, 2, 256, 16)
    p = E.pca_directions(G, 3, 500)
    w = E.sample_w(G, 500, 0)
    lam = torch.linalg.eigvalsh(torch.cov(w.T)).flip(0)
    assert torch.allclose((w @ p.T).var(0), lam[:3], rtol=1e-3)
    for layers in (None, [0, 1], range(3, 5)):
        d = E.closed_form_directions(G, layers, 4)
        assert torch.allclose(d @ d.T, torch.eye(4), atol=1e-5)
    A = torch.cat([m.affine.weight for k, m in G.synthesis.named_modules() if k.endswith(("conv0", "conv1"))])[:].detach()
    A = A/A.norm(dim=1, keepdim=True)
    best = (A @ E.closed_form_directions(G, None, 1)[0]).norm()
    r = torch.randn(500, 8); r = r/r.norm(dim=1, keepdim=True)
    assert best >= (r @ A.T).norm(dim=1).max() and best == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-4)

def test_directions_survive_the_disk(tmp_path):
    d = dict(smile=torch.randn(8), yaw=torch.randn(3, 8))
    E.save_directions(d, tmp_path/"directions.safetensors", dict(kind="directions"))
    for where in (tmp_path, tmp_path/"directions.safetensors"):
        back = E.load_directions(where)
        assert set(back) == set(d) and all(torch.allclose(back[k], d[k], atol=1e-2) for k in d)
    with pytest.raises(InputError): E.load_directions(tmp_path/"none")

def test_a_direction_can_be_kept_to_some_layers():
    d = E.in_layers(torch.ones(5), [1, 2], 4)
    assert d.shape == (4, 5) and d.sum(1).tolist() == [0, 5, 5, 0]
