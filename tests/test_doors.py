"What comes in at the doors: read rightly, or refused in one line that names the thing and the cure; and a bundle whose encoder nobody names."
import copy, json, math, shutil, subprocess
from argparse import Namespace
import numpy as np
import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from cycle_nb import Explorer, Inversion, invert, load_bundle, load_encoder, load_generator
from cycle_nb.bundle import Bundle, encode, evaluator
from cycle_nb.cli import main
from cycle_nb.core import InputError, as_codes, as_images, check_number, check_steps, check_whole, make_rng
from cycle_nb.encoder import Encoder
from cycle_nb.evaluate import known_methods
from cycle_nb.features import Perceptual, load_nets
from cycle_nb.files import from_bytes, read_json, to_bytes, write_json
from cycle_nb.folder_inversion import invert_files
from cycle_nb.heldout import cached_tensor, part_path, read_part, read_sheet
from cycle_nb.images import load_images
from cycle_nb.inversion import contact_sheet, invert_batch, join
from cycle_nb.learner import Checkpoint, Recorder
from cycle_nb.models import load_tensors, make_card, save_model
from cycle_nb.path import CodePath, edited, lerp_codes, optimise_from, render_state
from cycle_nb.pipeline import run_pipeline, usual_method
from cycle_nb.project import project
from cycle_nb.refine import refine, refine_latent
from cycle_nb.results import saved_folders, unique_names
from cycle_nb.sdfaces import FACTORS, render, render_dataset, sample_extras, sample_factors
from cycle_nb.stylegan2 import Generator
from cycle_nb.train_generator import PairBank
from cycle_nb.tune import tune
from cycle_nb.tune_fast import tune_batch
from cycle_nb.vis import film, slider_view
from safetensors.torch import save_file
from tiny import BODY, ENV, bundle, command, default_dtype, faces, write_bundle, write_directions

NAN, INF = float('nan'), float('inf')
ENCODED = dict(refine=0, tune=0)
OTHER_NUMBERS = [True, False, np.True_, torch.tensor(True), None, 1.5, -1, '2', NAN, 2**63, [1]]

def refused(f, *words):
    "The one line of an `InputError`."
    with pytest.raises(InputError) as e: f()
    said = str(e.value)
    assert '\n' not in said and len(said) < 1000 and all(w in said for w in words), said
    return said

def contents(folder):
    "All files, to see that none of them changed."
    return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.fixture(scope='module')
def nets(bundle):
    return load_bundle(bundle, 'cpu')

@pytest.fixture(scope='module')
def picture():
    "Two faces of whole bytes."
    return from_bytes(to_bytes(render(sample_factors(2, make_rng(0)), 64)))

@pytest.fixture(scope='module')
def found(nets, picture):
    return invert(picture, nets, refine=1, tune=1)

def moved(folder, to, rename):
    "A bundle's files, some under another name; those named None are left out."
    to.mkdir(parents=True)
    for f in folder.iterdir():
        if (name := rename.get(f.stem, f.stem)) is not None: shutil.copy(f, to/f'{name}{f.suffix}')
    return to

# --- numbers -------------------------------------------------------------------------------

@given(st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.none(), st.lists(st.integers(), max_size=2), st.binary(max_size=3)), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_any_value_is_a_number_or_one_line(v, least):
    whole = type(v) is int and least <= v < 2**63
    if whole: assert check_whole(v, 'n', least) == check_whole(np.int64(v), 'n', least) == check_whole(torch.tensor(v), 'n', least) == v
    else: refused(lambda: check_whole(v, 'n', least), 'n=', f'at least {least}')
    if type(v) in (int, float) and abs(v) < INF and (type(v) is float or abs(v) < 10**300): assert check_number(v, 'x') == float(v)
    elif type(v) is not int: refused(lambda: check_number(v, 'x'), 'x=', 'finite')
    refused(lambda: check_number(10**400, 'x'), 'x=', 'finite')

@pytest.mark.parametrize('name', ['refine', 'tune'])
def test_steps_are_whole_numbers(nets, picture, tmp_path, name):
    doors = [lambda **k: invert(picture, nets, **ENCODED | k), lambda **k: list(run_pipeline(picture, nets, 'cycle', **ENCODED | k)),
             lambda **k: invert_batch(picture, ['a', 'b'], nets, 'cycle', **ENCODED | k), lambda **k: usual_method(nets, **ENCODED | k),
             lambda **k: invert_files([tmp_path], tmp_path/'out', nets, 'cycle', **ENCODED | k)]
    for door in doors:
        for bad in OTHER_NUMBERS: refused(lambda: door(**{name: bad}), f'{name}=', 'use 0')
    assert not (tmp_path/'out').exists()

def test_steps_of_every_optimisation(nets, picture):
    G, E, (P, I, _) = nets.generator, nets.encoder(), nets.nets
    wp = encode(picture, nets)
    for bad in OTHER_NUMBERS:
        for f in (lambda: refine(picture, E, G, P, I, steps=bad), lambda: refine_latent(picture, wp, G, P, I, steps=bad), lambda: project(picture, G, P, steps=bad),
                  lambda: tune(picture, wp, G, P, steps=bad), lambda: tune_batch(picture, wp, G, P, steps=bad)): refused(f, 'steps=', 'use 0')

SETTINGS = dict(batch=[0, -1, True, None, 1.5, '2'], seed=[-1, 2**63, 2**64, 1.5, True, None, '0', NAN], threshold=[-1, NAN, INF, '1', True, [1.]],
                preset=['slow', None, 3], compare=['w', None, 3], encoder=['x', 3, ''])

@pytest.mark.parametrize('name, bad', [(k, v) for k, vs in SETTINGS.items() for v in vs], ids=repr)
def test_settings(nets, picture, name, bad):
    refused(lambda: invert(picture, nets, **dict(refine=1, tune=1) | {name: bad}), str(bad)[:30] if name in ('preset', 'encoder') else name)

def test_numbers_of_other_libraries_are_the_same_numbers(nets, picture, found):
    for kind in (np.int64, torch.tensor):
        again = invert(picture, nets, refine=kind(1), tune=kind(1), batch=kind(3), seed=kind(0))
        assert torch.equal(again.img, found.img) and {k: again.cards[0][k] for k in ('refine', 'tune', 'seed')} == dict(refine=1, tune=1, seed=0)

@pytest.mark.parametrize('share', [(0, 0), (1, 1), (-1, 2), 3, (0., 1), ('0', '1'), (True, 2), (0, 1, 2)], ids=repr)
def test_share(nets, faces, tmp_path, share):
    refused(lambda: invert_files(faces, tmp_path/'out', nets, 'cycle', share=share), 'share')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('edits', ['smile', ['smile'], [('smile', NAN)], [('smile', INF)], [('smile', '1')], [('smile', None)], [('simle', 1)], [(None, 1)],
                                   [('smile', 2, 3)], None, 3, {'smile': NAN}], ids=repr)
def test_edits(nets, found, faces, tmp_path, edits):
    for f in (lambda: invert_files(faces, tmp_path/'out', nets, 'cycle', edits), lambda: found.save(tmp_path/'out', edits), lambda: nets.check_edits(edits)): refused(f)
    assert not any(tmp_path.glob('out/*'))

@pytest.mark.parametrize('strength', [NAN, INF, None, 'much', [1., NAN], [1., 2., 3.]], ids=repr)
def test_strengths(found, strength):
    refused(lambda: found.edit('smile', strength), 'strength of smile', 'finite')

def test_a_strength_is_a_number_of_any_library_or_one_for_each(found):
    want = found.edit('smile', 1.)
    for s in (1, np.float32(1), torch.tensor(1.), [1., 1.], np.ones(2)): assert torch.equal(found.edit('smile', s), want)
    assert torch.equal(found.edit('smile', [1., 0.])[0], want[0]) and found.bundle.check_edits({'smile': np.float32(1)}) == [('smile', 1.)]

def test_streams_of_random_numbers():
    for rng in (5, 'x', np.random.default_rng(0)): refused(lambda: sample_factors(2, rng), 'rng', 'make_rng')
    refused(lambda: sample_extras(2, rng=5), 'make_rng')
    for n in (-1, 1.5, None, '3', True): refused(lambda: sample_factors(n), 'n=')
    want = sample_factors(3, make_rng(0))
    with default_dtype(torch.float64): assert torch.equal(sample_factors(3, make_rng(0)), want)
    for u in (want[0], want[:, :2], want*NAN, want.long(), None, want.tolist()): refused(lambda: render(u, 8), f'(n,{len(FACTORS)})')

# --- images and codes ----------------------------------------------------------------------

HOSTS = dict(no_grad=torch.no_grad, inference=torch.inference_mode, float64=lambda: default_dtype(torch.float64), autocast=lambda: torch.autocast('cpu', dtype=torch.bfloat16))
FORMS = dict(double=lambda x: x.double(), bytes=to_bytes, array=lambda x: x.numpy(), last=lambda x: to_bytes(x).movedim(1, -1).numpy(), floats=lambda x: x.movedim(1, -1).double().numpy(),
             pil=lambda x: [Image.fromarray(a) for a in to_bytes(x).movedim(1, -1).numpy()], rows=list, grad=lambda x: x.clone().requires_grad_())

@pytest.mark.parametrize('form', FORMS)
def test_a_picture_in_every_form_is_inverted_alike(nets, picture, found, form):
    inv = invert(FORMS[form](picture), nets, refine=1, tune=0)
    assert (inv.target - picture).abs().max() < 1e-6 and torch.allclose(inv.wp, found.wp, atol=1e-4) and inv.codes_by_step['w'].allclose(found.codes_by_step['w'], atol=1e-4)

def optimisations(nets, x):
    "What each gives alone; `x` is the caller's."
    G, E, (P, I, _), wp = nets.generator, nets.encoder(), nets.nets, encode(x, nets)
    return [wp, refine(x, E, G, P, I, steps=1), refine_latent(x, wp, G, P, I, steps=1), project(x, G, P, steps=1),
            tune(x, wp, G, P, steps=1).perceptual, tune_batch(x, wp, G, P, steps=1).perceptual]

@pytest.fixture(scope='module')
def in_a_plain_host(nets, picture, found):
    return optimisations(nets, picture), Explorer(found).page(i=0, edit='smile', strength=1.)

@pytest.mark.parametrize('host', HOSTS)
def test_callers_of_any_habit(nets, picture, found, in_a_plain_host, host):
    "Everything that a user is given is the same: codes, images, measures, edits, what a widget shows; and so are the optimisations alone."
    want, shown = in_a_plain_host
    with HOSTS[host]():
        inv, got = invert(picture.clone(), nets, refine=1, tune=1), optimisations(nets, picture.clone())
        assert torch.equal(inv.edit('smile', 1.), found.edit('smile', 1.)) and Explorer(inv).page(i=0, edit='smile', strength=1.) == shown
    drop = lambda rows: [{k: v for k, v in r.items() if k != 'seconds'} for r in rows]
    assert torch.equal(inv.img, found.img) and torch.equal(inv.wp, found.wp) and drop(inv.metrics) == drop(found.metrics)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert invert(picture, nets, refine=1, tune=1).wp.equal(found.wp)           # and what the host used stays usable

BAD_IMAGES = dict(bytes=to_bytes, bytes_as_floats=lambda x: to_bytes(x).float(), nan=lambda x: x*NAN, inf=lambda x: x*INF, array=lambda x: x.numpy(), last=lambda x: x.movedim(1, -1),
                  one=lambda x: x[0], none=lambda x: None, number=lambda x: torch.tensor(0.), empty=lambda x: x[:0], small=lambda x: x[..., ::2, ::2], grey=lambda x: x[:, :1], rows=list)

@pytest.mark.parametrize('name', BAD_IMAGES)
def test_tensors_that_are_no_batch_of_images(nets, picture, name):
    "Below `invert`, which reads any form, doors take one form; what they refuse is what `load_images` is named for."
    x, wp, G, E, (P, I, _) = BAD_IMAGES[name](picture), encode(picture, nets), nets.generator, nets.encoder(), nets.nets
    doors = dict(refine=lambda: refine(x, E, G, P, I, steps=1), refine_latent=lambda: refine_latent(x, wp, G, P, I, steps=1), tune=lambda: tune(x, wp, G, P, steps=1),
                 tune_batch=lambda: tune_batch(x, wp, G, P, steps=1), project=lambda: project(x, G, P, steps=1), encode=lambda: encode(x, nets),
                 pipeline=lambda: list(run_pipeline(x, nets, 'cycle')), batch=lambda: invert_batch(x, ['a', 'b'], nets, 'cycle'))
    for k, f in doors.items():
        allowed = name in ('nan', 'inf') and k in ('tune_batch', 'encode') or name == 'small' and k == 'encode'     # a broken image harms no other; encoders resize
        if not allowed: assert 'load_images' in refused(f), k

@given(st.lists(st.integers(0, 5), max_size=5), st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]), st.sampled_from([0., 1., -1., 200., NAN]))
@settings(max_examples=150, deadline=None)
def test_any_tensor_is_a_batch_or_one_line(shape, dtype, value):
    G = type('G', (), dict(resolution=4, num_ws=2, w_dim=3, config={}))
    x = torch.full(shape, value if dtype.is_floating_point else 1, dtype=dtype)
    for f, want in ((as_images, [3, 4, 4]), (as_codes, [2, 3])):
        good = shape[1:] == want and shape[0] > 0 and dtype.is_floating_point and value == value and (value < 2 or f is as_codes)
        if good: assert f(x, G).dtype == torch.float32 and f(x, G).shape == x.shape
        else: refused(lambda: f(x, G))

def test_codes(nets, picture):
    G, P, wp = nets.generator, nets.perceptual, encode(picture, nets)
    for bad in (wp.numpy(), wp[:, 0], wp[:, :3], wp[:1], wp[:0], None, wp.long(), wp[..., :5]):
        for f in (lambda: tune(picture, bad, G, P, steps=1), lambda: tune_batch(picture, bad, G, P, steps=1), lambda: project(picture, G, P, start=bad) if bad is not None else tune(picture, bad, G, P)):
            refused(f, 'codes must be')
    refused(lambda: tune(picture, wp*NAN, G, P, steps=1), 'finite')

def test_codes_of_another_number_are_not_drawn(found):
    for bad in (found.wp[:1], found.wp[:, :3], found.wp[:, 0], found.wp.numpy(), None): refused(lambda: found.synthesis(bad), 'codes must be')

# --- names, files, folders -----------------------------------------------------------------

DOORS = dict(generator=load_generator, encoder=load_encoder, bundle=load_bundle, inversion=Inversion.load)

@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('name', [None, 3, '', b'x', [], 'x\0y', '~/nope', '/nowhere/x', torch.zeros(2), {}], ids=lambda v: repr(v)[:12])
def test_what_is_no_name_of_a_file(door, name):
    refused(lambda: DOORS[door](name))

def test_a_device_there_is_not(bundle):
    for f in (lambda: load_generator(bundle, 'abacus'), lambda: load_encoder(bundle/'cycle.safetensors', 'abacus'), lambda: load_bundle(bundle, 'abacus')): refused(f, "device 'abacus'", 'cpu')

def test_files_and_places_to_write(nets, faces, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bad in ([], None, 3, torch.zeros(2, 2)): refused(lambda: invert_files(bad, tmp_path/'out', nets, 'cycle'), 'files')
    for bad in ('', None, 3):
        refused(lambda: invert_files(faces[:1], bad, nets, 'cycle'), 'file or folder')
        refused(lambda: found.save(bad), 'file or folder')
    refused(lambda: invert_files(faces[:1], tmp_path/'out', nets, 'cycle', existing='perhaps'), 'stop, skip or replace')
    assert not list(tmp_path.iterdir())
    record = invert_files([None, faces[0], torch.zeros(2)], tmp_path/'out', nets, 'cycle')      # the others are done
    assert record['new'] == 1 and [f['file'] for f in record['failures']] == ['NoneType', 'Tensor']
    assert invert_files(str(faces[1]), tmp_path/'out', nets, 'cycle')['new'] == 1               # one file needs no list

def test_an_explorer_is_given_what_invert_gives(nets, found):
    for bad in (None, 3, found.img, [found], 'x'): refused(lambda: Explorer(bad), 'Explorer', 'invert')
    u = sample_factors(2)
    for bad in (3, u[:, :2], u*NAN, 'x'): refused(lambda: Explorer(found, bad), 'factors')
    for bad in (0, 'x', NAN, True): refused(lambda: Explorer(found, size=bad), 'size=')
    for bad in (3, dict(i=99), dict(edit='simle'), dict(x=1)): refused(lambda: Explorer(found, start=bad).widget, 'start')
    assert Explorer(found, u.double().numpy()).page(i=0, edit='smile', strength=1.) == Explorer(found, u).page(i=0, edit='smile', strength=1.)
    assert 'finite' in Explorer(found).page(i=0, edit='smile', strength=NAN)

# --- a bundle's default encoder ------------------------------------------------------------

@pytest.fixture(scope='module')
def lone(bundle, tmp_path_factory):
    "A bundle with one encoder, which has a name of its own."
    folder = moved(bundle, tmp_path_factory.mktemp('lone')/'any name', dict(cycle=None, w=None, wplus=None))
    save_model(load_encoder(bundle/'cycle.safetensors'), folder/'mine.safetensors', make_card('encoder', seed=0))
    return folder

def test_one_encoder_of_any_name_is_enough(lone, faces, nets, tmp_path, capsys):
    b = load_bundle(lone, 'cpu')
    assert b.encoders == ['mine'] and b.default_encoder == 'mine' and b.encoder() is b.encoder('mine') and str(usual_method(b)) == 'mine+refine+tune'
    x = load_images(faces[:2], 64)[0]
    want = invert(x, nets, 'cycle', refine=1, tune=1, compare=[])
    assert torch.equal(invert(x, b, refine=1, tune=1).img, want.img) and torch.equal(encode(x, b), encode(x, nets, 'cycle'))
    assert list(run_pipeline(x, b, refine=1, tune=0))[-1].wp.equal(want.codes_by_step['refine'])
    assert invert_batch(x, ['a', 'b'], b, refine=1, tune=1).wp.equal(want.wp)
    quick = ['--bundle', str(lone), '--refine', '0', '--tune', '0', '--device', 'cpu']
    assert main(['invert', str(faces[0]), '--out', str(tmp_path/'o'), *quick]) == 0 and Inversion.load(tmp_path/'o').images_by_step.keys() == {'mine'}
    inv = invert(x, b, **ENCODED)
    assert '<img' in Explorer(inv).widget.children[-1].value and contact_sheet(inv).width
    assert invert_files(faces[:1], tmp_path/'files', b, **ENCODED)['making']['method'] == 'mine'

def test_one_encoder_of_any_name_is_measured(lone, tmp_path, capsys):
    b = load_bundle(lone, 'cpu')
    assert known_methods(b) == ['opt-w', 'opt-wplus', 'mine', 'mine+refine']
    args = ['benchmark', 'quality', '--images', '2', '--bundle', str(lone), '--methods', 'mine', '--work', str(tmp_path/'w'), '--out', str(tmp_path/'q.json'), '--device', 'cpu']
    assert main(args) == 0 and set(read_json(tmp_path/'q.json')['sets']['in']) >= {'mine'}

def test_a_demo_without_some_edits(bundle, tmp_path, capsys):
    "A demo draws those of its edits that a bundle knows."
    few = write_bundle(tmp_path/'few', ('age',))
    inv = invert(torch.zeros(1, 3, 64, 64), load_bundle(few, 'cpu'), **ENCODED)
    assert contact_sheet(inv).width < contact_sheet(invert(torch.zeros(1, 3, 64, 64), load_bundle(bundle, 'cpu'), **ENCODED)).width

def test_of_several_encoders_cycle_is_meant_or_one_is_named(nets, picture, tmp_path, capsys):
    G, E, P = nets.generator, nets.encoder('cycle'), nets.perceptual
    of = lambda **named: Bundle.from_networks(G, named, P, device='cpu')
    assert of(a=E, cycle=E).default_encoder == 'cycle'
    for door in (lambda b: invert(picture, b, **ENCODED), lambda b: encode(picture, b), lambda b: list(run_pipeline(picture, b)), lambda b: b.encoder(), lambda b: invert_files(['x'], tmp_path/'o', b)):
        refused(lambda: door(of(b=E, a=E)), 'a, b', 'encoder=', '--encoder')
        refused(lambda: door(of()), 'no encoder', 'opt-w')
    assert invert(picture, of(b=E, a=E), 'a', **ENCODED).wp.shape[0] == 2 and not (tmp_path/'o').exists()

def test_two_encoders_and_none_called_cycle_on_the_command_line(bundle, faces, tmp_path, capsys):
    two = moved(bundle, tmp_path/'two', dict(cycle=None))
    assert main(['invert', str(faces[0]), '--bundle', str(two), '--out', str(tmp_path/'o')]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'w, wplus' in said and '--encoder' in said and not (tmp_path/'o').exists()

def test_nothing_hangs_on_a_folders_name(bundle, faces, tmp_path, monkeypatch):
    "Renamed, moved, named by a dot: the same encoders, figures and earlier results."
    folders = [moved(bundle, tmp_path/n, {}) for n in ('a', 'sdfaces64', 'cycle')]
    for f in folders: assert invert_files(faces[:1], tmp_path/'out', f, existing='skip', **ENCODED)['new'] == (f == folders[0])
    monkeypatch.chdir(folders[2])
    b = load_bundle('.')
    assert b.name == 'cycle' and b.default_encoder == 'cycle' and invert_files(faces[:1], tmp_path/'out', '.', existing='skip', **ENCODED)['new'] == 0
    inv = invert(faces[:1], b, **ENCODED)
    inv.save(tmp_path/'r'); monkeypatch.chdir(tmp_path)
    assert torch.equal(Inversion.load(tmp_path/'r').wp, inv.wp)

# --- fingerprints --------------------------------------------------------------------------

def own_bundle(nets, spoil=None, **more):
    "The bundle's networks, handed over as copies; a number of one of them changed."
    parts = copy.deepcopy(dict(G=nets.generator, a=nets.encoder('cycle'), b=nets.encoder('w'), perceptual=nets.perceptual, identity=nets.identity))
    d, reg = dict(smile=nets.directions['smile'].clone()), torch.zeros(1, 3, 64, 64)
    if spoil == 'directions': d['smile'][0] += 1
    elif spoil == 'reg_images': reg[0, 0, 0, 0] = .5
    elif spoil: next(parts[spoil].parameters()).data.add_(1)
    return Bundle.from_networks(parts['G'], dict(cycle=parts['a'], w=parts['b']), parts['perceptual'], parts['identity'], d, reg, device='cpu', **more)

def test_a_fingerprint_covers_every_network(nets):
    letters = lambda b: b.networks_hash(['cycle', 'w'], [('smile', 1.)])
    same = letters(own_bundle(nets))
    assert same == letters(own_bundle(nets, name='another'))
    for part in ('G', 'a', 'b', 'perceptual', 'identity', 'directions', 'reg_images'): assert letters(own_bundle(nets, part)) != same, part
    few = lambda b: b.networks_hash(['cycle'])
    for part in ('b', 'directions'): assert few(own_bundle(nets, part)) == few(own_bundle(nets))        # what is not used does not matter
    for name, part in dict(perceptual='perceptual', identity='identity', directions='directions', cycle='a').items():
        assert own_bundle(nets).fingerprint(name) == own_bundle(nets).fingerprint(name) != own_bundle(nets, part).fingerprint(name)
    half = own_bundle(nets)
    half.generator.bfloat16()
    assert letters(half) != same

def test_a_file_that_changed_is_noticed(bundle, faces, tmp_path):
    "Each file that a result stands on, the encoder shown beside it and the edits' directions too."
    folder = moved(bundle, tmp_path/'b', {})
    go = lambda: invert_files(faces[:1], tmp_path/'out', load_bundle(folder, 'cpu'), edits=[('smile', 1.)], existing='skip', **ENCODED)['new']
    assert go() == 1 and go() == 0
    for name in ('w', 'perceptual', 'identity', 'directions'):
        f = folder/f'{name}.safetensors'
        data = bytearray(f.read_bytes())
        data[-2] ^= 1
        f.write_bytes(data)
        assert go() == 1 and go() == 0, name

def test_a_results_card_says_which_networks(nets, picture):
    cards = [invert(picture, own_bundle(nets, part), **ENCODED).cards[0]['networks'] for part in (None, None, 'a', 'b', 'G')]
    assert cards[0] == cards[1] and len(set(cards)) == 4

# --- damaged results -----------------------------------------------------------------------

DAMAGE = dict(junk=lambda f: (f/'inversion.safetensors').write_bytes(b'junk'), cut=lambda f: (f/'inversion.safetensors').write_bytes((f/'inversion.safetensors').read_bytes()[:-9]),
              no_tensors=lambda f: (f/'inversion.safetensors').unlink(), no_card=lambda f: (f/'inversion.json').unlink(), empty_card=lambda f: (f/'inversion.json').write_text(''),
              list_card=lambda f: (f/'inversion.json').write_text('[]'))

@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('which', [0, 1, 2])
def test_a_damaged_result_blocks_no_other(nets, faces, tmp_path, damage, which):
    inv = invert(faces[:3], nets, **ENCODED)
    paths = inv.save(tmp_path/'out')
    DAMAGE[damage](paths[which])
    refused(lambda: Inversion.load(tmp_path/'out', nets), paths[which].name)
    with pytest.warns(UserWarning, match=paths[which].name): again = Inversion.load(tmp_path/'out', nets, skip_damaged=True)
    left = [n for i, n in enumerate(inv.names) if i != which]
    assert again.names == left and torch.equal(again.wp, inv[[inv.names.index(n) for n in left]].wp) and len(saved_folders(tmp_path/'out')) == 3
    for p in paths: DAMAGE['junk'](p) if (p/'inversion.safetensors').exists() else None
    refused(lambda: Inversion.load(tmp_path/'out', nets, skip_damaged=True), 'none of 3')

def test_whole_results_are_loaded_without_a_word(nets, faces, tmp_path, recwarn):
    inv = invert(faces[:2], nets, **ENCODED)
    inv.save(tmp_path/'out')
    assert Inversion.load(tmp_path/'out', nets, skip_damaged=True).names == inv.names and not [w for w in recwarn if 'skipped' in str(w.message)]

def test_some_of_the_results(found):
    assert found[np.int64(1)].names == found[1].names == found[-1].names == found[torch.tensor([1])].names == found[[1]].names
    assert len(found[:0]) == 0 and 'Inversion of 0' in repr(found[:0])
    with pytest.raises(IndexError): found[2]

# --- parts that do not belong together -----------------------------------------------------

def parts(res=64, num_ws=10, dim=32, channels=3, encoder_channels=3, direction=(32,), encoder_res=64):
    torch.manual_seed(0)
    G = Generator(res, 32, 32, 1, 256, 8, img_channels=channels)
    E = Encoder(encoder_res, num_ws=num_ws, w_dim=dim, channels=encoder_channels).eval()
    return G, E, Perceptual(**BODY), {'a': torch.randn(*direction)}

@given(st.sampled_from([16, 32, 64, 128]), st.integers(6, 13), st.sampled_from([32, 48]), st.sampled_from([1, 3, 4, 6]), st.sampled_from([(32,), (31,), (10, 32), (8, 32), (1, 32)]))
@settings(max_examples=25, deadline=None)
def test_any_pair_fits_or_says_all_that_differs(res, num_ws, dim, reads, direction):
    "A kind of fault each: codes, their width, image channels, directions; the line names each that there is, and none that there is not."
    G, E, look, d = parts(res, num_ws, dim, encoder_channels=reads, direction=direction)
    L = G.num_ws
    odd = {f'{num_ws} codes of {dim}': (num_ws, dim) != (L, 32), f'reads {reads} image channels': reads not in (3, 6)}
    edit = {"direction 'a'": direction not in ((32,), (L, 32))}
    make = lambda **k: Bundle.from_networks(G, E, look, device='cpu', **k)
    if not any({**odd, **edit}.values()): return make(directions=d)
    if any(edit.values()): refused(lambda: make(directions=d), *(k for k, v in edit.items() if v))
    if any(odd.values()):
        said = refused(make, 'cycle', *(k for k, v in odd.items() if v))
        assert not [k for k, v in odd.items() if not v and k in said]

@pytest.mark.parametrize('n', [1, 4])
def test_generators_of_other_than_colours(n):
    G, E, look, _ = parts(channels=n)
    refused(lambda: Bundle.from_networks(G, E, look, device='cpu'), f'generator draws {n}', '3 image channels')

def test_an_encoder_that_reads_a_stamp():
    G, E, look, _ = parts(res=256, num_ws=14, encoder_res=16)
    refused(lambda: Bundle.from_networks(G, E, look, device='cpu'), 'reads 16 px', 'draws 256')

def test_feature_networks_of_other_pictures(nets):
    make = lambda P, G=nets.generator, E=nets.encoder('cycle'): Bundle.from_networks(G, E, P, device='cpu')
    refused(lambda: make(torch.nn.Conv2d(1, 8, 3)), 'Conv2d reads 1 image channels', 'draws 3')
    G, E, _, _ = parts(res=256, num_ws=14)
    refused(lambda: make(Perceptual(**BODY | dict(res=16)), G, E), 'Perceptual reads 16 px', 'draws 256')

def test_what_is_no_network(nets):
    G, E, P = nets.generator, nets.encoder('cycle'), nets.perceptual
    make = lambda G=G, E=E, P=P, **k: Bundle.from_networks(G, E, P, device='cpu', **k)
    for bad in (None, 3, E, 'sdfaces64'): refused(lambda: make(G=bad), 'no generator')
    for bad in (None, 3, G, dict(a=None), dict(a=E, b='w')): refused(lambda: make(E=bad), 'no encoder')
    for bad in (3, 'lpips', lambda a, b: 0): refused(lambda: make(P=bad), 'no feature network')
    refused(lambda: make(identity=P), 'identities')
    for bad in ([1, 2], torch.zeros(3), dict(a=[1.]), dict(a=torch.full((128,), NAN))): refused(lambda: make(directions=bad), 'direction')
    for bad in (np.zeros((1, 3, 64, 64), 'f4'), torch.zeros(1, 3, 32, 32), torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)): refused(lambda: make(reg_images=bad), 'load_images')
    sick = Encoder(w_avg=G.w_avg*NAN).eval()
    refused(lambda: make(E=sick), 'Encoder', 'not finite')
    with torch.inference_mode(): made = Encoder(w_avg=G.w_avg).eval()
    refused(lambda: make(E=made), 'Encoder', 'inference_mode')

def test_parts_in_files_are_checked_as_those_handed_over(bundle, tmp_path):
    "A file of another generator among a bundle's own: the line names file and fault, at the first use."
    other = write_bundle(tmp_path/'other')
    G, E, look, d = parts(res=32, num_ws=8)
    save_model(G, other/'generator.safetensors', make_card('generator'))
    b = load_bundle(other, 'cpu')
    refused(lambda: b.encoder('w'), 'other: w', '10 codes of 128', '8 of 32')
    refused(lambda: b.direction('smile'), "'age' is (128,)", '(32,) or (8, 32)')
    assert evaluator(b, bundle).perceptual is not None          # feature networks read any size

# --- what somebody found who tried to break it ---------------------------------------------

@pytest.mark.parametrize('name', ['/tmp/evil', 'a/b', '..', '', 'x'*300, 'nul\0l', 5, None], ids=lambda n: repr(n)[:20])
def test_the_name_of_an_edit_is_a_name(nets, name):
    "It becomes a part of a file's name."
    refused(lambda: Bundle.from_networks(nets.generator, nets.encoder('cycle'), nets.perceptual, directions={name: torch.zeros(nets.generator.w_dim)}), 'direction', 'letters')

@pytest.mark.parametrize('text', ['{"mine": 1}', 'my notes', '[1]'])
def test_records_of_others_are_kept(nets, faces, tmp_path, text):
    for file in ('record.json', 'metrics.jsonl'):
        out = tmp_path/file
        out.mkdir()
        (out/file).write_text(text)
        (out/'record.7.json').write_text(text)
        refused(lambda: invert_files(faces[:1], out, nets, 'cycle', refine=0, tune=0), 'not written by this command')
        assert (out/file).read_text() == text and len(list(out.iterdir())) == 2
        (out/file).unlink()
        invert_files(faces[:1], out, nets, 'cycle', refine=0, tune=0)
        assert (out/'record.7.json').read_text() == text

def test_an_unknown_setting_costs_nothing(nets, faces, tmp_path):
    invert_files(faces[:1], tmp_path, nets, 'cycle', refine=0, tune=0)
    before = contents(tmp_path)
    refused(lambda: invert_files(faces[:1], tmp_path, nets, 'cycle', existing='replace', encoder='w', refine=0, tune=0), "'encoder'", 'seed')
    assert before == contents(tmp_path)

def test_two_images_of_one_name_are_not_saved_as_one(found, tmp_path):
    refused(lambda: found[[0, 0]].save(tmp_path/'o'), 'different names')
    assert not (tmp_path/'o').exists()

def test_a_mask_picks_images(found):
    mask = [True] + [False]*(len(found) - 1)
    for m in (mask, torch.tensor(mask), np.array(mask)): assert found[m].names == found.names[:1] and len(found[m]) == 1
    assert found[-1].names == found.names[-1:]

@pytest.mark.parametrize('edits', [[('smile', 1e38)], [('smile', 2.), ('smile', 2.0000001)]], ids=repr)
def test_edits_that_cannot_be_files(found, tmp_path, edits):
    refused(lambda: found.save(tmp_path/'o', edits), 'edits')
    refused(lambda: found.edit('smile', 1e38), 'finite')

def test_the_truth_of_others_is_not_that_of_an_upload(found, faces):
    e = Explorer(found, sample_factors(len(found) + 3, make_rng(0)))
    e.receive((dict(name='me.png', content=faces[0].read_bytes()),))
    assert e.faces[-1].names == ['me'] and 'true edit' not in e.page(i=len(found), t=0., edit='smile', strength=1.)
    for bad in (None, [5], (dict(name='a'),), (dict(name='letter.txt', content=b'x'),)):
        e.receive(bad)
        assert 'cycle-explorer-error' in e.panel.value and len(e.faces) == len(found) + 1

def test_an_upload_is_read_as_a_file_is(found, tmp_path):
    Image.fromarray(np.full((80, 80), 20000, np.uint16)).save(tmp_path/'deep.png')
    Image.new('RGBA', (80, 80)).save(tmp_path/'clear.png')
    e, size = Explorer(found), found.target.shape[-1]
    for name in ('deep', 'clear'):
        e.receive((dict(name=f'{name}.png', content=memoryview((tmp_path/f'{name}.png').read_bytes())),))
        assert torch.equal(e.faces[-1].target.cpu(), load_images(tmp_path/f'{name}.png', size)[0])

@pytest.mark.parametrize('name', ['a+b', 'x-all', 'tune', 'refine', 'latent-free', 'opt-x', 'a,b', 'target', 'generator', '', '../x', 'a\nb'])
def test_the_name_of_an_encoder_is_its_own(nets, bundle, tmp_path, name):
    "It becomes a part of the names of methods and steps."
    refused(lambda: Bundle.from_networks(nets.generator, {name: nets.encoder('cycle')}, nets.perceptual), 'an encoder cannot be called', 'rename')
    if name in ('', '../x', 'a\nb', 'generator'): return            # no such files, or rightly another part
    folder = moved(bundle, tmp_path/'b', {'cycle': name})
    card = read_json(folder/f'{name}.json')
    write_json(card | dict(kind='encoder'), folder/f'{name}.json')
    for f in (lambda: load_bundle(folder).encoders, lambda: invert(torch.zeros(1, 3, 64, 64), folder, **ENCODED)): refused(f, repr(name), 'rename')

def test_feature_networks_stand_where_their_names_say(bundle, tmp_path):
    folder = moved(bundle, tmp_path/'b', {'perceptual': 'identity', 'identity': 'perceptual'})
    refused(lambda: load_bundle(folder).nets, 'Identity', 'Perceptual', 'name')
    refused(lambda: evaluator(load_bundle(bundle), folder), 'Identity', 'Perceptual')
    refused(lambda: load_nets(folder), 'Identity', 'Perceptual')

@pytest.mark.parametrize('compare', [[None], ['w', 'w'], ['x'], [['w']], {'w': 1}, ['opt-w']], ids=repr)
def test_what_is_shown_beside_the_pivot(nets, picture, tmp_path, compare):
    for f in (lambda: invert(picture, nets, compare=compare, **ENCODED), lambda: list(run_pipeline(picture, nets, 'cycle', compare, 0, 0)),
              lambda: invert_files([tmp_path], tmp_path/'o', nets, 'cycle', compare=compare)): refused(f, 'compare=', 'w, wplus, cycle')

def test_an_unknown_setting_of_invert_is_one_line(nets, picture):
    refused(lambda: invert(picture, nets, bogus=1), "'bogus'", 'threshold')
    with pytest.raises(InputError, match='no setting'): invert(picture, nets, lr=.1, **ENCODED)

def test_inversions_of_one_name_are_not_mixed(nets, picture, found):
    refused(lambda: join([found, found]), 'different names')
    for names in (['a', 'a'], ['a'], ['a', 'b', 'c']): refused(lambda: invert_batch(picture, names, nets, 'cycle', **ENCODED), '2 images', 'different names')

def test_a_copied_result_is_one_more(nets, found, tmp_path):
    "Its folder says its name; the measures follow."
    a, b = found.save(tmp_path)
    shutil.copytree(a, tmp_path/'copy')
    again = Inversion.load(tmp_path, nets)
    assert sorted(again.names) == sorted([a.name, b.name, 'copy']) and again[again.names.index('copy')].metrics[0]['mse'] == found[0].metrics[0]['mse']
    assert len(Inversion.load(tmp_path/'copy', nets)) == 1

def test_measures_that_lack_a_number_are_damage(nets, found, tmp_path):
    folder, other = found.save(tmp_path)
    card = read_json(folder/'inversion.json')
    for k in ('mse', 'perceptual', 'seconds', 'image'):
        write_json(card | dict(metrics=[{x: v for x, v in m.items() if x != k} for m in card['metrics']]), folder/'inversion.json')
        refused(lambda: Inversion.load(tmp_path, nets), folder.name, 'measures')
        with pytest.warns(UserWarning, match='measures'): assert 'perceptual' in repr(Inversion.load(tmp_path, nets, skip_damaged=True))

def test_a_bundle_that_is_gone_blocks_no_result_of_another(bundle, picture, tmp_path):
    homes = [shutil.copytree(bundle, tmp_path/name) for name in ('first', 'second')]
    for home, img in zip(homes, picture): invert_batch(img[None], [home.name], load_bundle(home, 'cpu'), 'w', **ENCODED).save(tmp_path/'out')
    shutil.rmtree(homes[0])
    refused(lambda: Inversion.load(tmp_path/'out'), 'first: no such bundle')
    with pytest.warns(UserWarning, match='first'): both = Inversion.load(tmp_path/'out', skip_damaged=True)
    assert both.names == ['first', 'second'] and both.bundle.name == 'second'          # the same networks: both can be used

@pytest.mark.parametrize('start', [dict(strength=9.), dict(strength=NAN), dict(t=-1.), dict(t=99.), dict(layers=(0, 99)), dict(edit='simle'), dict(i=7), dict(x=1)], ids=repr)
def test_an_explorer_does_not_begin_elsewhere(found, start):
    refused(lambda: Explorer(found, start=start).controls, next(iter(start)), 'not among the controls')

def test_places_on_a_path(found):
    path = CodePath(found)
    for i, t in ((0, -1.), (0, NAN), (0, None), (0, 99.), (-1, 0.), (2, 0.)): refused(lambda: path.between(i, t))
    assert torch.equal(path.between(0, 0.), path.code(0, 0)) and Explorer(found, start=dict(layers=[0, 2])).controls['layers'].value == (0, 2)

def test_pictures_that_are_no_film_and_sliders_that_do_not_slide():
    im = Image.new('RGB', (8, 8))
    for frames in ([], [im, Image.new('RGB', (9, 8))]): refused(lambda: film(frames, 'x'), 'film', 'one size')
    for axis in ((0, 1), (1, 0, 0), (0, 1, 2), (0., NAN, 0.), ('a', 'b', 'a'), (0, 0, 0), [], None): refused(lambda: slider_view(lambda x: im, 'x', x=axis), 'slider_view', 'start')

def test_json_of_great_depth_is_damage(found, tmp_path):
    (folder, _), deep = found.save(tmp_path), '['*100_000 + ']'*100_000
    (folder/'inversion.json').write_text(deep)
    refused(lambda: Inversion.load(tmp_path), 'inversion.json', 'not JSON')
    (tmp_path/'log.jsonl').write_text(deep)
    refused(lambda: Recorder(path=tmp_path/'log.jsonl').before_fit(Namespace(step=1), 1), 'log.jsonl', 'no log')
    save_file({'x': torch.zeros(1)}, tmp_path/'a.safetensors', metadata=dict(card=deep))
    for load in (load_tensors, load_generator, load_encoder): refused(lambda: load(tmp_path/'a.safetensors'), 'a.safetensors')

def one_line(args, capsys, *words):
    "A refusal of the command line."
    capsys.readouterr()
    assert main(list(map(str, args))) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and all(w in said for w in words), said

def test_converting_replaces_no_neighbour(bundle, tmp_path, capsys):
    (tmp_path/'a.json').write_text('mine')
    one_line(['convert', bundle/'generator.safetensors', tmp_path/'a.safetensors'], capsys, 'a.json: exists', '--overwrite')
    assert contents(tmp_path) == {tmp_path/'a.json': b'mine'}
    assert main(['convert', str(bundle/'generator.safetensors'), str(tmp_path/'a.safetensors'), '--overwrite']) == 0
    assert read_json(tmp_path/'a.json')['kind'] == 'generator'

def test_encoders_are_trained_for_the_bundles_generator(bundle, tmp_path, capsys):
    other = Generator(channel_base=512, channel_max=16)
    torch.nn.init.normal_(other.synthesis.b4.const)
    save_model(other, tmp_path/'other.safetensors', make_card('generator'))
    home = moved(bundle, tmp_path/'home', dict(w=None, wplus=None, cycle=None, directions=None))
    before = contents(home)
    one_line(['train', 'encoder', '--preset', 'tiny', '--out', home, '--generator', tmp_path/'other.safetensors'], capsys, 'another generator', '--out')
    assert contents(home) == before

REFUSALS = dict(recipe='nets --preset x', needs='generator --preset tiny', start='generator --preset tiny --from {0}/no.pt', pictures='generator --images {0}/few', few='generator --images {0}/few --total 32',
                folder='encoder --images {0}/none --generator sdfaces64', encoders='encoder --encoders x', generator='encoder --generator {0}/no.pt', directions='directions')

@pytest.mark.parametrize('name', REFUSALS)
def test_a_refused_training_leaves_nothing(tmp_path, capsys, name):
    (tmp_path/'few').mkdir()
    Image.new('RGB', (64, 64)).save(tmp_path/'few'/'a.png')
    one_line(['train', *REFUSALS[name].format(tmp_path).split(), '--out', tmp_path/'deep'/'new'], capsys)
    assert not (tmp_path/'deep').exists()

def test_training_replaces_no_card(tmp_path, capsys):
    (tmp_path/'perceptual.json').write_text('mine')
    one_line(['train', 'nets', '--preset', 'tiny', '--out', tmp_path], capsys, 'perceptual.json: exists')
    assert contents(tmp_path) == {tmp_path/'perceptual.json': b'mine'}

@pytest.mark.parametrize('what', ['generator --images 50', 'price --images 2', 'quality --images 2'])
def test_measuring_needs_what_measures(bundle, tmp_path, capsys, what):
    home = moved(bundle, tmp_path/'home', dict(attributes=None))
    one_line(['benchmark', *what.split(), '--bundle', home, '--out', tmp_path/'r.json'], capsys, 'attributes.safetensors', '--referee')
    if 'price' in what: one_line(['benchmark', *what.split(), '--bundle', moved(bundle, tmp_path/'plain', dict(directions=None)), '--out', tmp_path/'r.json'], capsys, 'directions', 'train directions')
    assert not (tmp_path/'r.json').exists()

@pytest.mark.parametrize('out', ['.', 'file/r.json', '/proc/r.json'])
def test_a_record_has_a_place_before_the_work(tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').write_text('x')
    one_line(['benchmark', 'generator', '--bundle', 'no such bundle', '--out', out], capsys, 'no place')

def test_none_of_a_step_is_no_contradiction(bundle, tmp_path, capsys):
    args = 'benchmark quality --methods cycle --images 2 --tune 0 --refine 0'.split()
    assert main([*args, '--bundle', str(bundle), '--work', str(tmp_path/'w'), '--out', str(tmp_path/'r.json')]) == 0
    one_line([*args[:-4], '--tune', '3', '--bundle', bundle, '--out', tmp_path/'s.json'], capsys, 'opt-w+tune')
    one_line(['invert', 'x.png', '--out', tmp_path/'o', '--seed', '9'*30], capsys, '15 digits')

# --- what the next one found ----------------------------------------------------------------

@pytest.mark.parametrize('part', ['nets', 'generator', 'encoder', 'directions'])
def test_networks_that_were_not_trained_here_are_not_trained_over(bundle, tmp_path, capsys, part):
    "A bundle that was shipped, copied or converted has no training that could go on."
    home = moved(bundle, tmp_path/'home', {})
    before = contents(home)
    for more in ([], ['--resume']): one_line(['train', part, '--preset', 'tiny', '--out', home, *more], capsys, 'exists', 'choose another --out')
    assert contents(home) == before and len(list(tmp_path.rglob('*'))) == len(before) + 1

def test_another_encoder_for_a_bundle_that_came_without_its_trainings(bundle, tmp_path, capsys, monkeypatch):
    home = moved(bundle, tmp_path/'home', {})
    before = contents(home)
    assert main(['train', 'encoder', '--preset', 'tiny', '--encoders', 'restyle', '--out', str(home)]) == 0
    assert before.items() <= contents(home).items() and (home/'restyle.safetensors').exists()

def test_a_generator_that_the_recipe_cannot_go_on_with(bundle, tmp_path, capsys):
    home = moved(bundle, tmp_path/'home', dict(generator=None, w=None, wplus=None, cycle=None, directions=None))
    for name, G in dict(z=Generator(channel_base=256, channel_max=8), large=Generator(128, 32, channel_base=256, channel_max=8)).items():
        save_model(G, tmp_path/f'{name}.safetensors', make_card('generator'))
        one_line(['train', 'generator', '--preset', 'tiny', '--out', home, '--from', tmp_path/f'{name}.safetensors'], capsys, 'from 32', '--images')
    assert not (home/'work').exists()

@pytest.mark.parametrize('text', ['', 'null', '[]', '{}', '[1,2]', '[{"a":1}, {"a":2}]', '[{"mse":1}]', 'nan', '['*9000])
def test_a_part_is_whole_or_named(tmp_path, text):
    file = part_path(tmp_path/'w', 'x', {}, slice(0, 2))
    file.write_text(text)
    refused(lambda: read_part(file, 2), file.name, 'damaged; delete it')
    for read in (read_sheet, lambda f: cached_tensor(lambda: 1/0, f)): refused(lambda: read(file), file.name, 'damaged; delete it')

def test_damaged_parts_of_a_measurement(bundle, tmp_path, capsys):
    "Deleted, as the line says, they are measured again, and the record is the same."
    def measure(name):
        assert main([*args, str(tmp_path/f'{name}.json')]) == 0
        return (tmp_path/f'{name}_faces.csv.gz').read_bytes()
    args = f'benchmark quality --methods w --images 2 --workers 1 --bundle {bundle} --work {tmp_path/"w"} --out'.split()
    first = measure('r')
    assert '| method |\n' not in (tmp_path/'r.md').read_text()       # one method differs from nothing
    for end in ('json', 'png', 'safetensors'):
        (file,) = (tmp_path/'w').rglob(f'*.{end}')
        if end == 'safetensors':        # asked for when the figures are gone
            for part in (tmp_path/'w').rglob('*.json'): part.unlink()
        file.write_text('spoilt')
        one_line([*args, tmp_path/'s.json'], capsys, file.name, 'damaged; delete it')
        file.unlink()
        assert measure(end) == first

def test_a_place_for_parts_is_a_folder(bundle, tmp_path, capsys):
    (tmp_path/'w').write_text('x')
    one_line(['benchmark', 'quality', '--methods', 'w', '--images', '2', '--bundle', bundle, '--work', tmp_path/'w', '--out', tmp_path/'r.json'], capsys, 'w: is a file', '--work')

def test_a_picture_without_a_number_in_it(nets, tmp_path):
    Image.fromarray(np.full((64, 64), np.nan, 'float32')).save(tmp_path/'nan.tif')
    refused(lambda: invert(tmp_path/'nan.tif', nets, **ENCODED), 'nan.tif', 'finite')

def test_nobodys_home_and_links_to_nothing(nets, faces, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: found.save('~nobody_of_this_name/x'), 'no user', 'nobody_of_this_name')
    (tmp_path/'link').symlink_to(tmp_path/'nothing')
    refused(lambda: found.save(tmp_path/'link'), 'link', 'leads to nothing')
    (tmp_path/'loop').symlink_to(tmp_path/'loop')
    refused(lambda: found.save(tmp_path/'loop'), 'loop')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['link', 'loop']
    (tmp_path/'~backup').mkdir()
    assert len(found.save('~backup/x')) == len(found)

@pytest.mark.parametrize('names', ['cycle,', 'w,,cycle', ',', '', 'cycle,cycle', 'cycle, cycle'])
def test_names_and_commas(bundle, tmp_path, capsys, names):
    one_line(['benchmark', 'quality', '--images', '2', '--methods', names, '--bundle', bundle, '--out', tmp_path/'r.json'], capsys, '--methods', 'comma')
    one_line(['train', 'encoder', '--encoders', names, '--out', tmp_path/'o'], capsys, '--encoders', 'comma')
    assert not list(tmp_path.iterdir())

# --- what the third one found ----------------------------------------------------------------

def test_an_edit_without_numbers_is_not_a_black_picture(bundle, picture, tmp_path):
    home = moved(bundle, tmp_path/'home', {})
    write_directions(home, dict(age=torch.full((128,), 1e38)))
    inv = invert(picture, home, **ENCODED)
    refused(lambda: inv.save(tmp_path/'out', [('age', 1.)]), 'age+1', 'not finite')
    assert not list((tmp_path/'out').iterdir()) and len(inv.save(tmp_path/'out', [('age', 0.)])) == 2

SPOILT = dict(cut=lambda f: f.write_bytes(f.read_bytes()[:-1]), text=lambda f: f.write_text('faces'), empty=lambda f: f.write_text(''), objects=lambda f: np.save(f, np.array([None])),
              floats=lambda f: np.save(f, np.zeros((3, 3, 8, 8), np.float32)), fewer=lambda f: np.save(f, np.zeros((2, 3, 8, 8), np.uint8)))

@pytest.mark.parametrize('how', SPOILT)
def test_faces_that_were_drawn_before_are_those(tmp_path, how):
    u, file = sample_factors(3, make_rng(0)), tmp_path/'faces.npy'
    assert torch.equal(render_dataset(u, 8, file), render_dataset(u, 8)) and torch.equal(render_dataset(u, 8, file), render_dataset(u, 8))
    SPOILT[how](file)
    refused(lambda: render_dataset(u, 8, file), 'faces.npy', '3 faces of 8 px', 'delete it')
    refused(lambda: PairBank(3, 8, file=file), 'faces.npy', 'delete it')

@pytest.mark.parametrize('size', [2, 12, 4096, 65536])
def test_sizes_that_no_generator_has(tmp_path, capsys, size):
    (tmp_path/'p').mkdir()
    one_line(['train', 'generator', '--images', tmp_path/'p', '--resolution', size, '--out', tmp_path/'o'], capsys, f'resolution={size}', '1024')
    assert not (tmp_path/'o').exists()

def test_half_a_character_in_a_name(nets, faces, tmp_path):
    assert unique_names(['\ud800', '\ud800']) == ['_', '_-2']
    out = tmp_path/'out'
    invert_files(faces[:2], out, nets, 'cycle', **ENCODED)
    card = read_json(out/'f0'/'inversion.json')
    (out/'f0'/'inversion.json').write_text(json.dumps(card | dict(source='\ud800')))
    refused(lambda: invert_files(faces[:2], out, nets, 'cycle', **ENCODED), 'exists')
    assert invert_files([faces[1]], out, nets, 'cycle', existing='skip', **ENCODED)['new'] == 0

def test_names_beyond_the_locales_letters(bundle, faces, tmp_path):
    photo = tmp_path/'é日.png'
    shutil.copy(faces[0], photo)
    env = ENV | dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    r = subprocess.run(command('invert', photo, '--out', tmp_path/'out', '--bundle', bundle, '--refine', '0', '--tune', '0'), capture_output=True, text=True, env=env, timeout=300)
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'PYTHONUTF8=1' in r.stderr, r.stderr
    r = subprocess.run(command('invert', photo, '--out', tmp_path/'out', '--bundle', bundle, '--refine', '0', '--tune', '0'), capture_output=True, text=True, env=env | dict(PYTHONUTF8='1'), timeout=300)
    assert r.returncode == 0 and (tmp_path/'out'/'é日'/'inverted.png').exists(), r.stderr

@pytest.mark.parametrize('change', [dict(settings=None, model=-5), dict(model=-5), dict(opt=-5), dict(opt=None)], ids=repr)
def test_a_checkpoint_of_other_kinds_of_values(tmp_path, change):
    class Task:
        step, model, opt = 0, torch.nn.Linear(1, 1), None
        def state(self): return dict(step=self.step, model=self.model.state_dict(), opt=self.opt.state_dict())
        def load(self, s): self.model.load_state_dict(s['model']); self.opt.load_state_dict(s['opt'])
    task = Task()
    task.opt = torch.optim.SGD(task.model.parameters(), .1)
    Checkpoint(tmp_path/'c.pt').save(task)
    torch.save(torch.load(tmp_path/'c.pt') | change, tmp_path/'c.pt')
    refused(lambda: Checkpoint(tmp_path/'c.pt').load(task), 'c.pt', 'delete it to begin again')

def test_a_grey_generator_is_not_told_of_a_reader_of_colours(picture):
    G = Generator(64, img_channels=1, channel_base=256, channel_max=8)
    assert 'load_images' not in refused(lambda: as_images(picture, G), '(B,1,64,64)')

# --- what was left ----------------------------------------------------------------------------

def test_another_seed_does_not_go_on_with_a_training(bundle, tmp_path, capsys):
    "Seen before anything is drawn: a bank of faces has hundreds of megabytes."
    train = ['train', 'generator', '--preset', 'tiny', '--out', tmp_path]
    for end in ('safetensors', 'json'): shutil.copy(bundle/f'perceptual.{end}', tmp_path)
    assert main(list(map(str, train))) == 0
    before = contents(tmp_path)
    one_line([*train, '--resume', '--seed', '1'], capsys, 'settings.json', 'seed 0 → 1', 'choose another --out')
    for text in ('[]', '{', 'null', '{"seed": 1}'):
        (tmp_path/'work'/'generator'/'settings.json').write_text(text)
        one_line([*train, '--resume'], capsys, 'settings.json')
    (tmp_path/'work'/'generator'/'settings.json').write_bytes(before[tmp_path/'work'/'generator'/'settings.json'])
    assert contents(tmp_path) == before and main(list(map(str, [*train, '--resume']))) == 0

def test_edits_in_another_order_are_the_same_edits(nets, faces, tmp_path):
    edits = [('smile', 1.), ('age', 2.), ('smile', -1.)]
    go = lambda edits: invert_files(faces[:1], tmp_path/'out', nets, edits=edits, existing='skip', **ENCODED)['new']
    assert go(edits) == 1 and go(edits[::-1]) == 0 and go(edits[1:]) == 1

@pytest.mark.parametrize('bad', [math.nan, math.inf, 'x', None, [1]])
def test_small_functions_take_finite_numbers(nets, bad):
    wp = nets.generator.broadcast(torch.zeros(1, nets.generator.w_dim))
    img = torch.zeros(1, 3, 64, 64)
    refused(lambda: lerp_codes(wp, wp, bad), 't=')
    refused(lambda: optimise_from(img, wp, nets, 1, lr=bad), 'lr=')
    refused(lambda: project(img, nets.generator, nets.perceptual, steps=1, lr=bad), 'lr=')
    refused(lambda: optimise_from(img, wp, nets, 1, warm_up=bad), 'warm_up=')
    refused(lambda: render_state(img, wp, nets, nets.generator, [('smile', bad)]), 'strength of smile')
    refused(lambda: film([Image.new('RGB', (8, 8))], 'x', bad), 'seconds=')
    refused(lambda: slider_view(lambda v: Image.new('RGB', (8, 8)), 'x', stops=bad, v=(0., 1., .5)), 'stops=')

def test_the_same_edit_twice_goes_twice_as_far(nets):
    "Both controls of the explorer may ask for it."
    wp = nets.generator.broadcast(torch.zeros(1, nets.generator.w_dim))
    assert torch.allclose(edited(wp, [('smile', 1.), ('smile', 1.)], nets), edited(wp, [('smile', 2.)], nets), atol=1e-6)
    assert not torch.allclose(edited(wp, [('smile', 1.)], nets), edited(wp, [('smile', 2.)], nets), atol=1e-3)

def test_no_warm_up_is_one_step_of_it(nets):
    wp, img = nets.generator.broadcast(torch.zeros(1, nets.generator.w_dim)), torch.zeros(1, 3, 64, 64)
    assert torch.equal(*(optimise_from(img, wp, nets, 2, warm_up=n) for n in (0, 1)))
    refused(lambda: slider_view(lambda v: Image.new('RGB', (8, 8)), 'x', stops=1, v=(0., 1., .5)), 'stops=1')

@pytest.mark.parametrize('value', [3e38, -3e38])
def test_weights_that_overflow_give_no_result(bundle, tmp_path, value):
    "Finite, so they are loaded; what they draw is not."
    home = moved(bundle, tmp_path/'home', {})
    tensors, card = load_tensors(home/'generator.safetensors')
    tensors = {k: v.float() for k, v in tensors.items()}
    tensors[next(k for k in tensors if k.endswith('b8.conv0.weight'))].view(-1)[0] = value
    save_file(tensors, home/'generator.safetensors', dict(card=json.dumps(card)))
    imgs = render(sample_factors(3, make_rng(0)), 64)
    refused(lambda: invert(imgs, home, refine=0, tune=0, batch=2), str(home), 'for image0 is', 'not finite')
