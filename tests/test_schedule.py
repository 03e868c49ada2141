"The plan against the method's table, and the promise that a killed run is the unbroken run."
import json
from dataclasses import replace
import pytest, torch
from safetensors.torch import load_file
from cycle_nb.core import InputError, make_rng
from cycle_nb.cycle import CycleTask, cooldown, encoder_loss_parts, training_batch
from cycle_nb.encoder import Encoder, add_deltas
from cycle_nb.latent_discriminator import LatentDiscriminator
from cycle_nb.learner import AtSteps, Checkpoint, Recorder, fit
from cycle_nb.features import Identity, Perceptual
from cycle_nb.schedule import PAPER, SDFACES64, Schedule, rescale, schedule, w_only, wplus_only
from cycle_nb.stylegan2 import Generator
from cycle_nb.train_encoder import ReStyleTask, train_cycle, train_restyle


def retold(step):
    "The paper's plan told as events on a time line, one after the other: another way to compute it."
    stage, delta, adv = 0, 2e-4, .1
    for t in range(0, step + 1, 1000):
        if 20_000 <= t < 500_000 and (t - 20_000) % 2000 == 0: stage = min(17, stage + 1)
        if 500_000 < t and (t - 500_000) % 10_000 == 0:
            adv /= 2
            if t <= 650_000: delta *= 1.2
        if t >= 650_000 and (t - 650_000) % 4000 == 0: stage = max(0, stage - 1)
    return stage, delta, adv


@pytest.mark.parametrize('step', [*range(0, 750_000, 7919), 19_999, 20_000, 51_999, 52_000, 499_999, 500_000, 509_999, 510_000,
                                  649_999, 650_000, 653_999, 654_000, 713_999, 714_000, 717_999, 718_000, 749_999])
def test_paper_schedule(step):
    p = schedule(step)
    stage, delta, adv = retold(step)
    assert p.stage == stage and p.lambda_delta == pytest.approx(delta) and p.lambda_adv == pytest.approx(adv)


def test_the_table_of_the_method():
    assert schedule(0) == schedule(19_999) and schedule(0).stage == 0 and schedule(0).lambda_delta == 2e-4
    assert schedule(51_999).stage == 16 and schedule(52_000).stage == 17                       # "all 17 by 52k"
    assert all(schedule(t).stage == 17 for t in range(52_000, 650_000, 500))
    assert len({schedule(t).lambda_delta for t in range(500_000, 650_001, 1000)}) == 16         # 15 times × 1.2
    assert schedule(650_000).lambda_delta == pytest.approx(3.08e-3, rel=2e-3)                  # "2e-4 → 3.08e-3"
    assert schedule(714_000).stage == 0 and schedule(713_999).stage == 1                       # "pure W from 714k"
    assert all(schedule(t).stage == 0 for t in range(714_000, 750_000, 100))
    adv = [schedule(t).lambda_adv for t in range(500_000, 750_000, 10_000)]
    assert all(b == pytest.approx(a/2) for a, b in zip(adv, adv[1:])), 'keeps halving'
    assert [schedule(t).name for t in (0, 30_000, 60_000, 600_000, 700_000)] == ['W', 'W to W+', 'W+', 'regularise', 'retract']


@pytest.mark.parametrize('s', [PAPER, SDFACES64, rescale(9000, offsets=9), rescale(2000, offsets=13)])
def test_every_instance_makes_the_whole_way(s):
    ps = [schedule(t, s) for t in range(0, s.steps, max(1, s.steps//5000))]
    stages = [p.stage for p in ps]
    assert stages[0] == 0 and max(stages) == s.offsets and stages[-1] == 0
    top = stages.index(s.offsets)
    assert stages[:top + 1] == sorted(stages[:top + 1]) and stages[top:] == sorted(stages[top:], reverse=True)
    assert list(dict.fromkeys(p.name for p in ps)) == ['W', 'W to W+', 'W+', 'regularise', 'retract']
    last = schedule(s.steps - 1, s)
    assert last.lambda_delta == pytest.approx(2e-4*1.2**15, rel=.25) and last.lambda_adv < .1/2**15


def test_rivals_differ_in_the_offsets_alone():
    facts = lambda s: {(p.stage, p.lambda_delta, p.name) for p in (schedule(t, s) for t in range(12_001))}
    adv = lambda s: [schedule(t, s).lambda_adv for t in range(12_001)]
    assert facts(w_only(SDFACES64)) == {(0, 2e-4, 'W')} == facts(w_only(SDFACES64, decay=False))
    assert {n for _, _, n in facts(wplus_only(SDFACES64))} == {'W', 'W to W+', 'W+'} and {d for _, d, _ in facts(wplus_only(SDFACES64))} == {2e-4}
    assert adv(w_only(SDFACES64)) == adv(wplus_only(SDFACES64)) == adv(SDFACES64) and set(adv(w_only(SDFACES64, False))) == {.1} == set(adv(wplus_only(SDFACES64, False)))
    stages = [schedule(t, wplus_only(SDFACES64)).stage for t in range(12_001)]
    assert stages[:9600] == [schedule(t, SDFACES64).stage for t in range(9600)] and set(stages[9600:]) == {9}


# --- the run -------------------------------------------------------------------------------

BODY = dict(widths=(4, 8, 8, 8, 8), depth=(1,)*5)
WAY = Schedule(offsets=7, expand_from=4, expand_every=1, regularise_from=14, regularise_every=1, retract_from=18, retract_every=1,
               steps=27, cooldown=2)


@pytest.fixture(scope='module')
def world():
    "A tiny generator, tiny networks, a few images."
    torch.manual_seed(0)
    G = Generator(32, 16, 16, 2, channel_base=256, channel_max=16)
    nets = Perceptual(**BODY).eval(), Identity(**BODY).eval()
    for n in nets: n.requires_grad_(False).body.fold()
    bank = torch.rand(24, 3, 32, 32, generator=make_rng(0))*2 - 1
    return G, nets, bank


def batches(bank, stop=None):
    n = [0]
    def draw(k, g):
        n[0] += 1
        if n[0] == stop: raise KeyboardInterrupt
        return bank[torch.randint(len(bank), (k,), generator=g)]
    return draw


def run(world, folder, stop=None, **kw):
    G, nets, bank = world
    facts = dict(validation=bank[:6], batch=4, adversary=dict(pool=5), save_every=3, log_every=5, optimizer='ranger')
    return train_cycle(G, nets, batches(bank, stop), WAY, folder/'out', folder/'nets', **(facts | kw))


def equal(x, y):
    "Two states, tensor by tensor."
    if isinstance(x, dict): return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)): return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def same(a, b): return equal(a.state(), b.state())


@pytest.fixture(scope='module')
def unbroken(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    return run(world, folder), folder


def test_killed_run_is_the_unbroken_run(world, unbroken, tmp_path):
    whole, folder = unbroken
    for stop in (10, 9, 6):                                 # in W to W+, while wplus cools down, regularise
        with pytest.raises(KeyboardInterrupt): run(world, tmp_path, stop)
    assert same(whole, run(world, tmp_path))
    for name in ('w', 'wplus', 'cycle'):
        assert (folder/'nets'/f'{name}.safetensors').stat().st_size == (tmp_path/'nets'/f'{name}.safetensors').stat().st_size
        a, b = (json.loads((f/'nets'/f'{name}.json').read_text()) for f in (folder, tmp_path))
        assert a['figures'] == b['figures'] and a['config'] == b['config'] and a['steps'] == b['steps']
    rows = [[json.loads(l)['step'] for l in (f/'out'/'cycle.jsonl').read_text().splitlines()] for f in (folder, tmp_path)]
    assert rows[0] == rows[1] == [5, 10, 15, 20, 25]


def test_weights_of_the_loss_after_a_resume(world, unbroken, tmp_path):
    "λ and stage depend on the step alone."
    with pytest.raises(KeyboardInterrupt): run(world, tmp_path, 22)     # in mid-squeeze
    seen = []
    G, nets, bank = world
    torch.manual_seed(0)
    task = CycleTask(G, Encoder(32, 8, 16, w_avg=G.w_avg), nets, batches(bank), WAY, 4,
                     optimizer='ranger', adversary=dict(pool=5))
    class Look:
        def before_fit(self, task, steps): seen.append((task.step, task.phase))
        def after_step(self, task, logs): seen.append((task.step, task.phase))
    settings = torch.load(tmp_path/'out'/'cycle.pt', weights_only=True)['settings']
    fit(task, 27, [Checkpoint(tmp_path/'out'/'cycle.pt', 100, settings), Look()])
    assert seen[0][0] == 15 and len(seen) == 13
    assert all(p == schedule(t, WAY) for t, p in seen)
    assert same(task, unbroken[0])


@pytest.mark.parametrize('name, stage', [('w_long', 0), ('wplus_long', 7)])
def test_rivals_start_where_the_cycle_leaves_w(world, unbroken, tmp_path, name, stage):
    "From the shared first phase or from nothing: bit by bit the same."
    a = run(world, unbroken[1], name=name)
    b = run(world, tmp_path, name=name)
    assert same(a, b) and not same(a, unbroken[0]) and a.phase.stage == stage
    card = json.loads((tmp_path/'nets'/f'{name}.json').read_text())
    assert card['steps'] == WAY.steps + WAY.cooldown and card['config']['stage'] == stage
    assert [f.name for f in (tmp_path/'nets').glob('*.safetensors')] == [f'{name}.safetensors']


def test_only_known_trainings_and_the_same_settings(world, unbroken, tmp_path):
    with pytest.raises(InputError, match='w_long, wplus_long'): run(world, tmp_path, name='both')
    with pytest.raises(InputError, match='batch 4 → 5'): run(world, unbroken[1], batch=5)
    with pytest.raises(InputError, match='seed 0 → 1'): run(world, unbroken[1], name='w_long', seed=1)     # another first phase


def test_restyle_gradients_are_the_sum_over_passes(world):
    G, nets, bank = world
    torch.manual_seed(0)
    E = Encoder(32, 8, 16, w_avg=G.w_avg, channels=6, maps=1)
    for h in E.heads[1:]: torch.nn.init.normal_(h.linear.weight, std=.1)
    task = ReStyleTask(G, E, nets, batches(bank), wplus_only(WAY), 4, passes=3)
    phase, total, wp, x = schedule(9, WAY), 0, G.w_avg.expand(4, 8, -1), bank[:4]
    for h in E.modules():
        if isinstance(h, torch.nn.BatchNorm2d): h.eval()          # so that both ways see the same statistics
    for _ in range(3):
        with torch.no_grad(): now = G.synthesis(wp)
        wp = wp.detach() + E(torch.cat([x, now], 1), phase.stage) - G.w_avg
        rec, delta = G.synthesis(wp), wp[:, 1:] - wp[:, :1]
        adv = torch.nn.functional.softplus(-task.adversary.net(wp[:, :phase.stage + 1])).mean()
        total = total + (rec - x).square().mean() + .8*nets[0](rec, x).mean() + .1*(1 - nets[1](rec, x)).mean() \
            + phase.lambda_adv*adv + phase.lambda_delta*delta[:, :phase.stage].norm(dim=-1).sum(1).mean()
    want = torch.autograd.grad(total, E.heads[2].linear.weight)[0]
    got, _ = task.backward(x, torch.zeros(0, 16), phase)
    assert torch.allclose(got, wp, atol=.02)
    assert torch.nn.functional.cosine_similarity(want.flatten(), E.heads[2].linear.weight.grad.flatten(), 0) > .99
    assert abs(E.heads[2].linear.weight.grad.norm()/want.norm() - 1) < .05


def test_restyle_training_resumes(world, tmp_path):
    G, nets, bank = world
    go = lambda folder, stop=None: train_restyle(G, nets, batches(bank, stop), rescale(2*WAY.steps, WAY), folder, passes=2,
                                                 validation=bank[:6], batch=4, save_every=3, log_every=9)
    whole = go(tmp_path/'a')
    assert whole.step == WAY.steps                            # as many passes as the cycle would have steps
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'b', 13)
    assert same(whole, go(tmp_path/'b'))
    card = json.loads((tmp_path/'a'/'restyle.json').read_text())
    assert card['config'] | dict(channels=6, maps=1, stage=7) == card['config'] and card['passes'] == 2


def test_cooling_down_leaves_the_run_as_it_was(world, unbroken, tmp_path):
    G, nets, bank = world
    warm = train_cycle(G, nets, batches(bank), replace(WAY, cooldown=0), tmp_path/'out', tmp_path/'nets', validation=bank[:6],
                       batch=4, adversary=dict(pool=5), optimizer='ranger')
    assert same(warm, unbroken[0]) and warm.opt.param_groups[0]['lr'] == unbroken[0].opt.param_groups[0]['lr'] == 1e-3
    tensors = [load_file(f/'nets'/'w.safetensors') for f in (tmp_path, unbroken[1])]
    assert any(not torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])


@pytest.mark.parametrize('optimizer', ['adam', 'ranger'])
def test_rate_falls_in_the_phase_that_ends(world, optimizer):
    G, nets, bank = world
    torch.manual_seed(0)
    task = CycleTask(G, Encoder(32, 8, 16, w_avg=G.w_avg), nets, batches(bank), WAY, 4, optimizer=optimizer)
    task.step, rates, stages = WAY.expand_from, [], []
    step = task.train_step
    def look():
        rates.append(task.opt.param_groups[0]['lr']); stages.append(task.phase.stage)
        return step()
    task.train_step = look
    cooldown(task, 4)
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4]) and stages == [0]*4
    assert task.phase.stage == 5 and task.step == WAY.expand_from + 4     # the schedule holds again


def test_cards_tell_the_stage(unbroken):
    for name, stage, steps in (('w', 0, 6), ('wplus', 7, 16), ('cycle', 0, 29)):
        card = json.loads((unbroken[1]/'nets'/f'{name}.json').read_text())
        assert card['config']['stage'] == stage and card['steps'] == steps and card['seed'] == 0
        assert Schedule(**card['schedule']) == WAY
        assert not [k for k in ('command', 'data', 'figures') if not card.get(k)]


def test_parts_of_the_loss_by_hand(world):
    G, nets, bank = world
    torch.manual_seed(0)
    E = Encoder(32, 8, 16, w_avg=G.w_avg)
    for h in E.heads[1:]: torch.nn.init.normal_(h.linear.weight, std=.1)
    D = LatentDiscriminator(16)
    def parts_at(stage):
        w, delta = E.codes(bank[:4], stage)
        wp = add_deltas(w, delta)
        return wp, encoder_loss_parts(wp, delta, bank[:4], G, nets, D, stage)
    wp, parts = parts_at(5)
    delta = wp[:, 1:] - wp[:, :1]
    assert torch.allclose(parts['delta'], sum(delta[:, i].norm(dim=1) for i in range(5)), rtol=1e-4)
    assert delta[:, 5:].abs().max() == 0
    score = torch.stack([D(wp[:, i]) for i in range(6)], 1)
    assert torch.allclose(parts['adv'], torch.log1p(torch.exp(-score)).mean(1), rtol=1e-4)
    assert 'delta' not in parts_at(0)[1]
    parts_at(5)[1]['delta'].sum().backward()
    assert all(p.grad is None for p in G.parameters())


def test_generated_images_are_the_first_of_the_batch(world):
    G, nets, bank = world
    img, w = training_batch(G, batches(bank), 8, 4, make_rng(0))
    assert img.shape == (8, 3, 32, 32) and w.shape == (4, 16)
    with torch.no_grad(): own = G.synthesis(G.broadcast(w)).clamp(-1, 1)
    assert (own - img[:4]).abs().mean() < .02
    task = CycleTask(G, Encoder(32, 8, 16, w_avg=G.w_avg), nets, batches(bank), WAY, 8, synthetic_fraction=.5)
    assert 'w_mse' in task.train_step()


def test_training_lowers_the_loss(world):
    G, nets, bank = world
    torch.manual_seed(0)
    task = CycleTask(G, Encoder(32, 8, 16, w_avg=G.w_avg), nets, batches(bank[:8]), w_only(WAY), 8, lr=3e-3, optimizer='adam')
    rec = Recorder(5)
    fit(task, 40, [rec, AtSteps({})])
    mse = rec.series('mse')[1]
    assert mse[-1] < mse[0]
