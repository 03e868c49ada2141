"Perceptual distance, identity, calibration and figures of merit, against independent computations."
import math, platform
from pathlib import Path
import pytest, torch
from scipy import stats
import torch.nn.functional as F
from cycle_nb.core import InputError, autocast, make_rng, has_bf16
from cycle_nb.features import Attributes, FeatureNet, Identity, Perceptual, arcface_loss, load_net, load_nets
from cycle_nb.models import load_model, pretrained_path, save_model
from cycle_nb.train_features import (DISTORTIONS, auc, blur, calibrate, distorted_pairs, feature_differences, fit_attributes, identity_factors, r2,
    ridge_nnls, train_nets, verification_accuracy)
from cycle_nb.losses import reconstruction_parts, weighted_sum
from cycle_nb.sdfaces import render_dataset, sample_factors
from cycle_nb.sdfaces_parts import FACTORS, IDENTITY

BODY = dict(widths=(8, 8, 12, 12, 16), depth=(1, 2, 1, 1, 1))


def with_statistics(net):
    "Batch statistics as after a training."
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(); m.running_var.uniform_(.5, 2); m.weight.data.uniform_(.5, 2); m.bias.data.normal_()
    return net.eval()


@pytest.fixture(scope='module')
def perceptual():
    torch.manual_seed(0)
    net = with_statistics(Perceptual(**BODY))
    for w in net.weights: w.data.uniform_(0, 1)
    return net.requires_grad_(False)


@pytest.fixture(scope='module')
def imgs(): return torch.rand(2, 4, 3, 64, 64, generator=make_rng(0))*2 - 1


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    "Float32, so that small tolerances mean something."
    import contextlib, cycle_nb.features
    monkeypatch.setattr(cycle_nb.features, 'autocast', lambda *a, **k: contextlib.nullcontext())


def test_perceptual_by_hand(perceptual, imgs):
    a, b = imgs
    want = torch.zeros(4)
    for fa, fb, w in list(zip(perceptual.body(a)[1:], perceptual.body(b)[1:], perceptual.weights)):
        for i in range(4):
            H, W = fa.shape[2:]
            na, nb = (f[i]/torch.sqrt((f[i]**2).sum(0) + 1e-5) for f in (fa, fb))
            want[i] += sum(float(w[c])*float(((na[c] - nb[c])**2).sum()) for c in range(len(w)))/(H*W)
    assert torch.allclose(perceptual(a, b), want, rtol=1e-3)


def test_perceptual_is_a_distance_like_lpips(perceptual, imgs):
    a, b = imgs
    d = perceptual(a, b)
    assert (perceptual(a, a) == 0).all() and (d > 0).all() and torch.allclose(d, perceptual(b, a))
    assert torch.allclose(perceptual(a[:1], b[:1]), d[:1], rtol=1e-4)                    # no image sees another
    big = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(perceptual(big(a), big(b)), d, rtol=1e-3)                      # any size
    assert torch.equal(perceptual.distance(perceptual.features(a), perceptual.features(b)), d)


def test_folding_changes_nothing(imgs):
    torch.manual_seed(1)
    net = with_statistics(FeatureNet(**BODY))
    before = net(imgs[0])
    after = net.fold()(imgs[0])
    assert all(torch.allclose(x, y, atol=1e-3, rtol=1e-3) for x, y in zip(before, after))
    assert not [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_identity_by_hand(imgs):
    torch.manual_seed(2)
    net = with_statistics(Identity(**BODY))
    a, b = imgs
    ea, eb = (net.head(net.body(x)[-1]) for x in (a, b))
    want = (ea*eb).sum(1)/(ea.norm(dim=1)*eb.norm(dim=1))
    assert torch.allclose(net.similarity(a, b), want, atol=1e-5)
    assert torch.allclose(net.embed(a).norm(dim=1), torch.ones(4)) and torch.allclose(net(a, a), torch.ones(4))


def test_angular_margin_by_hand():
    g = make_rng(0)
    e, c, y = F.normalize(torch.randn(6, 5, generator=g), dim=1), torch.randn(4, 5, generator=g), torch.tensor([0, 1, 2, 3, 0, 1])
    want = 0.
    for i in range(6):
        cos = [float(e[i] @ c[j])/float(c[j].norm()) for j in range(4)]
        s = [7*(math.cos(math.acos(cos[j]) + .25) if j == y[i] else cos[j]) for j in range(4)]
        want += math.log(sum(map(math.exp, s))) - s[y[i]]
    assert abs(float(arcface_loss(e, c, y, .25, 7.)) - want/6) < 1e-4


def test_parts_and_weights(perceptual, imgs):
    a, b = imgs
    torch.manual_seed(2)
    idn = with_statistics(Identity(**BODY)).requires_grad_(False)
    x = a.clone().requires_grad_()
    parts = reconstruction_parts(x, b, perceptual, idn)
    assert {k: v.shape for k, v in parts.items()} == dict(mse=(4,), perceptual=(4,), identity=(4,))
    assert torch.allclose(parts['mse'], ((a - b)**2).flatten(1).mean(1))
    assert torch.allclose(parts['perceptual'], perceptual(a, b)) and torch.allclose(parts['identity'], 1 - idn(a, b), atol=1e-5)
    total = weighted_sum(parts, dict(mse=2., perceptual=.5, identity=3.))
    assert torch.allclose(total, 2*parts['mse'] + .5*parts['perceptual'] + 3*parts['identity'])
    grads = torch.autograd.grad(total.sum(), x)[0]
    assert grads.isfinite().all() and (grads.abs().amax((1, 2, 3)) > 0).all()
    assert set(reconstruction_parts(a, b, perceptual)) == {'mse', 'perceptual'}
    known = reconstruction_parts(a, b, perceptual, target_feats=perceptual.features(b))
    assert torch.equal(known['perceptual'], reconstruction_parts(a, b, perceptual)['perceptual'])


def test_blur_by_hand():
    x = torch.zeros(1, 3, 64, 64); x[..., 32, 32] = 1
    y = blur(x, 1.5)
    t = torch.arange(-5., 6); k = torch.exp(-t**2/(2*1.5**2)); k /= k.sum()
    assert torch.allclose(y[0, 0, 27:38, 27:38], torch.outer(k, k), atol=1e-4) and abs(float(y.sum()) - 3) < 1e-3


def test_distortions_have_the_severity_they_say():
    a, b, sev, kind = distorted_pairs(40, 64, 3)
    assert len(a) == 40*(len(DISTORTIONS) + 1) and kind.bincount().tolist() == [40]*(len(DISTORTIONS) + 1)
    assert b.abs().max() <= 1 and 0 <= sev.min() and sev.max() <= 1
    for k in range(5):
        err, s = (a - b).square().mean((1, 2, 3))[kind == k], sev[kind == k]
        assert stats.spearmanr(err, s).statistic > .5, k
        assert torch.equal(distorted_pairs(40, 64, 3)[1][kind == k], b[kind == k])


def test_calibration_improves_the_fit():
    torch.manual_seed(0)
    net = with_statistics(Perceptual(**BODY))
    a, b, sev, _ = distorted_pairs(40, 64, 9)
    net.requires_grad_(False)
    def error(): return float((net(a, b) - .5*sev).square().mean())
    before = error()
    calibrate(net, 60)
    best = min(float((k*net(a, b) - .5*sev).square().mean()) for k in (.6, .8, 1., 1.2, 1.5, 2.))
    assert error() < before and error() < 1.25*best and all((w >= 0).all() for w in net.weights)


def test_weights_are_those_of_many_small_steps():
    "SciPy's exact answer against projected gradient descent, on the differences of a network's features."
    torch.manual_seed(0)
    net = with_statistics(Perceptual(**BODY)).requires_grad_(False)
    a, b, sev, _ = distorted_pairs(30, 64, 9)
    x = feature_differences(net, a, b).double()
    x = x[:, x.mean(0) > 0]                              # a channel may be silent in so small a network
    x, y, prior, ridge = x/x.mean(0), .5*sev.double(), torch.full((x.shape[1],), .01).double(), .03
    A, r = x.T @ x/len(x) + ridge*torch.eye(x.shape[1]), x.T @ y/len(x) + ridge*prior
    w, lr = prior.clone(), 1/torch.linalg.eigvalsh(A)[-1]
    for _ in range(60_000): w = (w - lr*(A @ w - r)).clamp(min=0)
    found = ridge_nnls(x, y, prior, ridge)
    assert torch.allclose(found, w, atol=1e-6) and (found == 0).any()


def test_figures_by_hand():
    g = make_rng(0)
    s, p = torch.randn(60, generator=g), torch.rand(60, generator=g) < .4
    pairs = [(a, b) for a in s[p].tolist() for b in s[~p].tolist()]
    assert abs(auc(s, p) - sum(a > b for a, b in pairs)/len(pairs)) < 1e-9
    s = s.round()                                          # many ties: each counts half
    pairs = [(a, b) for a in s[p].tolist() for b in s[~p].tolist()]
    assert abs(auc(s, p) - sum((a > b) + (a == b)/2 for a, b in pairs)/len(pairs)) < 1e-9
    x, y = torch.randn(50, 3, generator=g), torch.randn(50, 3, generator=g)
    want = [1 - float(((x[:, j] - y[:, j])**2).sum()/((y[:, j] - y[:, j].mean())**2).sum()) for j in range(3)]
    assert torch.allclose(r2(x, y), torch.tensor(want), rtol=1e-4)
    same, other = torch.randn(400, generator=g) + 1, torch.randn(400, generator=g) - 1
    assert abs(verification_accuracy(same, other)[0] - .841) < .04                   # Φ(1)


def test_persons_share_identity_only():
    u, label = identity_factors(20, 5, 1)
    who = [FACTORS.index(k) for k in IDENTITY]
    rest = [i for i in range(len(FACTORS)) if i not in who]
    v = u.view(20, 5, -1)
    assert (v[:, :1, who] == v[:, :, who]).all() and len(v[:, 0, who].unique(dim=0)) == 20
    assert (v[:, 0, rest] != v[:, 1, rest]).all() and label.bincount().tolist() == [5]*20


def test_files_round_trip(imgs, tmp_path):
    torch.manual_seed(3)
    for net in (Attributes(['yaw', 'smile'], **BODY), Identity(dim=7, **BODY), Perceptual(first=2, **BODY)):
        with_statistics(net)
        save_model(net, tmp_path/'n.safetensors', dict(seed=0))
        back = load_net(tmp_path/'n.safetensors')
        args = imgs if isinstance(net, (Identity, Perceptual)) else imgs[:1]
        with torch.no_grad(): assert torch.allclose(back(*args), net(*args), atol=2e-2)
        assert back.card['config'] == net.config and not any(p.requires_grad for p in back.parameters())
        assert type(load_model(tmp_path/'n.safetensors')) is type(net)                   # the same file, not folded
    (tmp_path/'bad.safetensors').write_bytes(b'no')
    with pytest.raises(InputError, match='bad'): load_net(tmp_path/'bad.safetensors')


def test_unknown_factor_is_named():
    with pytest.raises(InputError, match="'simle'.*smile"): Attributes(**BODY).read(torch.zeros(1, 3, 64, 64), 'simle')


class Killed(Exception): pass


def test_training_resumes_exactly(tmp_path):
    u = sample_factors(60, rng=make_rng(0))
    bank = render_dataset(u)
    def run(file, stop=None):
        torch.manual_seed(0)
        net, n = Attributes(**BODY), [0]
        if stop is not None:
            def hook(*a):
                n[0] += 1
                if n[0] == stop: raise Killed
            net.register_forward_hook(hook)
        return fit_attributes(net, u, bank, 13, 6, file=file, every=3)
    whole = run(None)
    for stop in (5, 4, 2):
        with pytest.raises(Killed): run(tmp_path/'a.pt', stop)
    again = run(tmp_path/'a.pt')
    with pytest.raises(InputError, match='batch 6 → 7'): fit_attributes(Attributes(**BODY), u, bank, 13, 7, file=tmp_path/'a.pt')
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_train_nets_writes_a_bundle(tmp_path):
    nets = train_nets(tmp_path/'bundle', tmp_path/'work', steps=4, id_steps=4, images=40, persons=5, per_person=4, batch=8,
                      pairs=12, num_heldout=30, body=BODY)
    assert [type(n).__name__ for n in nets] == ['Perceptual', 'Identity', 'Attributes']
    for n in nets:
        lacks = [k for k in ('command', 'seed', 'steps', 'data', 'figures', 'config') if n.card.get(k) in (None, '', {})]
        assert not lacks, lacks
    assert set(nets[2].card['figures']['r2']) == set(FACTORS)


def test_shipped_networks():
    "The figures on the cards, measured again on other faces."
    if not pretrained_path('sdfaces64/identity.safetensors').exists(): pytest.skip('not trained yet')
    from cycle_nb.train_features import measure_attributes, measure_identity, measure_perceptual
    per, idn, att = load_nets('sdfaces64')
    found = measure_attributes(att, 300, seed=1)
    for k, v in att.card['figures']['r2'].items(): assert abs(found['r2'][k] - v) < .08, k
    assert abs(measure_identity(idn, 300, seed=1)['accuracy'] - idn.card['figures']['accuracy']) < .05
    rank = measure_perceptual(per, 60, seed=1)['rank']
    assert min(rank.values()) > .8, rank
    size = sum(pretrained_path(f'sdfaces64/{k}.safetensors').stat().st_size for k in ('perceptual', 'identity', 'attributes'))
    assert size <= 3e6


# --- precision -----------------------------------------------------------------------------

@pytest.mark.skipif(not Path('/proc/cpuinfo').exists() or platform.machine() != 'x86_64', reason='asks Linux what its x86 processor can do')
def test_bfloat16_only_where_the_processor_has_it():
    flags = Path('/proc/cpuinfo').read_text().partition('flags')[2].partition('\n')[0].split()
    native = bool({'avx512_bf16', 'amx_bf16', 'amx_tile'} & set(flags))
    assert has_bf16(torch.device('cpu')) == native
    x = torch.randn(8, 8)
    with autocast(x): assert (x @ x).dtype == (torch.bfloat16 if native else torch.float32)
    with autocast(x, enabled=False): assert (x @ x).dtype == torch.float32
