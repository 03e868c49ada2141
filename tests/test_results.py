"A result belongs to exactly one input, is whole or absent, and knows how it was made."
import json, os, shutil, signal, subprocess, sys, time, unicodedata
from pathlib import Path
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from cycle_nb.core import InputError
from cycle_nb.archives import read_checkpoint
from cycle_nb.bundle import evaluator, load_bundle
from cycle_nb.checkpoints import load_generator, read_directions
from cycle_nb.cli import main
from cycle_nb.directions import load_directions
from cycle_nb.encoder_checkpoints import load_encoder
from cycle_nb.features import load_net
from cycle_nb.files import read_image, read_json
from cycle_nb.heldout import read_faces
from cycle_nb.images import image_paths, load_images
from cycle_nb.models import load_model, load_tensors, save_model
from cycle_nb.folder_inversion import invert_files
from cycle_nb.inversion import Inversion, invert
from cycle_nb.results import LONGEST, RESERVED, atomic_folders, clear_remains, each_unique_name, file_label, load_result, safe_filename, save_results, unique_names
from tiny import ENV, bundle, command, faces

ODD = st.sampled_from(['face', 'Face', 'FACE', 'photo.v0', 'photo.v1', 'con', 'CON.txt', 'record.json', 'sheet', '.hidden', '..', 'a/b', 'x'*300, 'é', 'é', 'ﬁn', 'fin', 'ß', 'ss',
                       'İ', 'a b ', 'tab\t', 'new\nline', '\u202egnp', '名前', '🙂', 'face-2', 'face-3', ' lead', 'trail.', 'nul.png', ''])
NAMES = st.one_of(ODD, st.text(max_size=40), st.builds('{}.{}'.format, st.text(max_size=8), ODD))
key = lambda n: unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', n).casefold())

def test_what_is_remembered_of_a_million_names_is_small():
    names = each_unique_name(f'IMG_{i:07d}' for i in range(3000))
    for _ in range(2999): next(names)
    used = names.gi_frame.f_locals['used']
    assert sum(map(len, used)) == 2999 and sum(map(sys.getsizeof, used)) < 150*len(used) + 16*2999         # a set takes 60 to 100 for each

@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, max_size=30))
def test_names_are_unique_safe_and_made_once(labels):
    names = unique_names(labels)
    assert len(names) == len(labels) == len({key(n) for n in names})              # on every file system
    assert unique_names(names) == names and all(safe_filename(n) == n for n in names)
    for n in names:
        assert n and len(n.encode()) <= LONGEST and n == n.strip('. ') and n == unicodedata.normalize('NFC', n)
        assert not set(n) & set('/\\:*?"<>|\0') and not any(unicodedata.category(c) == 'Cc' for c in n)
        assert n.split('.')[0].strip().casefold() not in RESERVED

@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=12), st.integers(1, 5))
def test_names_do_not_depend_on_the_batches(labels, batch):
    "What a batch is called is what it was called among all."
    names = unique_names(labels)
    for i in range(0, len(names), batch): assert unique_names(names[i:i + batch]) == names[i:i + batch]
    more = unique_names(labels, taken=names)
    assert not {key(n) for n in more} & {key(n) for n in names}

def test_only_the_suffix_of_an_image_is_dropped():
    for path, want in {'a/photo.v0.png': 'photo.v0', 'photo.v0': 'photo.v0', 'x.tar.JPG': 'x.tar', 'Screenshot 10.15.30.png': 'Screenshot 10.15.30', '.png': '.png', 'x.doc': 'x.doc'}.items():
        assert file_label(path) == want

@pytest.mark.parametrize('batch', [1, 2, 5])
def test_files_of_any_name_keep_their_results(bundle, faces, tmp_path, batch):
    "Names that lost results before: dots, long prefixes, cases, reserved words. Each result is of its own image."
    names = ['photo.v0.png', 'photo.v1.png', 'photo.v2.png', 'Photo.V0.png', 'x'*150 + 'a.png', 'x'*150 + 'b.png', 'con.png', 'record.png']
    folder = tmp_path/'in'
    folder.mkdir()
    for n, f in zip(names, faces): (folder/n).write_bytes(f.read_bytes())
    record = invert_files([folder], tmp_path/'out', bundle, 'cycle', batch=batch)
    assert record['new'] == record['images'] == len(names)
    for f in (tmp_path/'out').glob('*/inversion.json'):
        source = Path(read_json(f)['source'])
        twin = next(x for x, n in zip(faces, names) if n == source.name)
        alone = invert_files([twin], tmp_path/f'alone-{batch}-{twin.stem}', bundle, 'cycle')
        mine, other = (load_result(p)[0]['target'] for p in (f.parent, next((tmp_path/f'alone-{batch}-{twin.stem}').glob('*/inversion.json')).parent))
        assert torch.equal(mine, other) and alone['images'] == 1

def test_a_resume_redoes_what_differs_and_says_so(bundle, faces, tmp_path):
    out, lines = tmp_path/'out', []
    go = lambda method='cycle', **kw: invert_files(faces[:3], out, bundle, method, existing='skip', log=lines.append, **kw)['new']
    assert go() == 3 and go() == 0
    assert go('cycle+tune', tune=1) == 3 and any('method' in l and 'f0: again' in l for l in lines)
    assert go('cycle+tune', tune=1) == 0 and go('cycle+tune', tune=1, seed=4) == 3
    (out/'f1'/'inversion.safetensors').write_bytes(b'')                            # an emptied result does not count as done
    assert go('cycle+tune', tune=1, seed=4) == 1
    rows = [json.loads(l) for l in (out/'metrics.jsonl').read_text().splitlines()]
    record = read_json(out/'record.json')
    assert {r['image'] for r in rows} == {'f0', 'f1', 'f2'} and record['images'] == 3
    for step, means in record['means'].items():
        mine = [r['mse'] for r in rows if r['step'] == step]
        assert means['mse'] == pytest.approx(sum(mine)/3)

def test_two_processes_share_a_folder(bundle, faces, tmp_path):
    "A launcher starts two: every image once, names as one process gives them, one whole record."
    twin = tmp_path/'other'/faces[0].name                                          # its name meets another's
    twin.parent.mkdir()
    twin.write_bytes(faces[1].read_bytes())
    args = ['invert', *faces, twin, '--bundle', bundle, '--refine', '0', '--tune', '0', '--batch', '2']
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '0', '-m', 'cycle_nb']
    r = subprocess.run([*map(str, [*launch, *args, '--out', tmp_path/'two'])], env=ENV, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    invert_files([*faces, twin], tmp_path/'one', bundle, 'cycle', refine=0, tune=0)
    two, one = ({f.parent.name: read_json(f) for f in (tmp_path/k).glob('*/inversion.json')} for k in ('two', 'one'))
    assert two.keys() == one.keys() and len(one) == len(faces) + 1 and not list((tmp_path/'two').glob('.*'))
    assert {n: c['source'] for n, c in two.items()} == {n: c['source'] for n, c in one.items()}
    record = read_json(tmp_path/'two'/'record.json')
    assert record['images'] == record['new'] == len(one) and r.stdout.count(' images in ') == 2
    assert len((tmp_path/'two'/'metrics.jsonl').read_text().splitlines()) == 2*len(one)

def test_another_run_does_not_write_into_the_same_folder(bundle, faces, tmp_path):
    "The second would give away the same names, and replace results of other settings. Processes of one run share the folder."
    out, said = tmp_path/'out', []
    def second(_=None, **kw):
        with pytest.raises(InputError, match='another run writes into it') as e: invert_files(faces[2:4], out, bundle, 'cycle', existing='skip', **kw)
        said.append(str(e.value))
    def third(_):
        second()
        assert main(['invert', str(faces[2]), '--out', str(out), '--bundle', str(bundle), '--resume']) == 2
        invert_files(faces[2:4], out, bundle, 'cycle', existing='skip', share=(1, 2))
    invert_files(faces[:1], out, bundle, 'cycle', on_batch=lambda _: second(share=(0, 2)))
    invert_files(faces[1:3], out, bundle, 'cycle', existing='skip', share=(0, 2), on_batch=third)
    assert len(said) == 2 and str(out) in said[0] and {f.parent.name for f in out.glob('*/inversion.json')} == {'f0', 'f1', 'f3'}
    assert invert_files(faces[2:4], out, bundle, 'cycle', existing='skip')['new'] == 1

def test_the_record_is_true_after_a_kill(bundle, faces, tmp_path):
    out = tmp_path/'out'
    args = ['invert', *faces, '--out', out, '--bundle', bundle, '--batch', '1', '--refine', '1', '--tune', '3']
    p = subprocess.Popen(command(*args), env=ENV, stdout=subprocess.DEVNULL)
    end = time.time() + 300
    while time.time() < end and p.poll() is None and len(list(out.glob('[!.]*/inversion.json'))) < 2: time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    assert not (out/'record.json').exists()                                        # better none than an old one
    r = subprocess.run(command(*args, '--resume'), env=ENV, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr
    record = read_json(out/'record.json')
    assert record['images'] == len(faces) > record['new'] and not list(out.glob('.*'))
    assert len(Inversion.load(out)) == len(faces)

def die_at(rename_number, death, out, results):
    "Save results in a process of its own that dies at a rename: killed, interrupted, or the disk is full."
    if pid := os.fork(): return os.waitpid(pid, 0)
    rename, calls = os.rename, []
    def dies(a, b):
        calls.append(b)
        if len(calls) != rename_number: rename(a, b)
        elif death is None: os.kill(os.getpid(), signal.SIGKILL)
        else: raise death
    os.rename = dies
    try: save_results(out, results)
    except BaseException: pass
    finally: os._exit(0)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked')
@pytest.mark.parametrize('death', [None, KeyboardInterrupt(), OSError(28, 'full')], ids=['killed', 'interrupted', 'full'])
def test_a_death_at_any_rename_leaves_a_whole_batch(tmp_path, death):
    "Both results are the old ones or both the new ones, once the next run has looked."
    t = {'wp': torch.zeros(2, 3), 'img': torch.zeros(3, 4, 4), 'target': torch.zeros(3, 4, 4), 'step:w': torch.zeros(3, 4, 4, dtype=torch.uint8), 'code:w': torch.zeros(2, 3)}
    card, seen = dict(name='a', steps=['w'], metrics=[], bundle='x'), []
    for at in range(1, 6):                                                          # whole; then old aside and new in its place, twice
        save_results(tmp_path, {n: ({}, t, card | dict(version=1)) for n in 'ab'})
        die_at(at, death, tmp_path, {n: ({}, t, card | dict(version=2)) for n in 'ab'})
        clear_remains(tmp_path)
        versions = {load_result(tmp_path/n)[1]['version'] for n in 'ab'}
        assert len(versions) == 1 and not list(tmp_path.glob('.*')), at
        seen += versions
    assert seen == [1, 2, 2, 2, 2]

def test_a_link_is_never_followed(tmp_path):
    (tmp_path/'elsewhere').mkdir()
    (tmp_path/'elsewhere'/'inversion.json').write_text('{}')
    (tmp_path/'a').symlink_to(tmp_path/'elsewhere')
    with pytest.raises(InputError, match='no result of this program'):
        with atomic_folders(tmp_path, ['a'], True): pass
    assert (tmp_path/'elsewhere'/'inversion.json').read_text() == '{}'

def test_results_of_other_networks_are_refused(bundle, faces, tmp_path):
    invert_files(faces[:1], tmp_path/'out', bundle, 'cycle')
    with pytest.raises(InputError, match='another generator'): Inversion.load(tmp_path/'out', 'sdfaces64')
    assert len(Inversion.load(tmp_path/'out', load_bundle(bundle))) == 1

# --- a tilde ---------------------------------------------------------------------------------

READS = dict(bundle=load_bundle, generator=load_generator, encoder=load_encoder, model=load_model, net=load_net,
             tensors=load_tensors, directions=load_directions, foreign_directions=read_directions, checkpoint=read_checkpoint, inversion=Inversion.load, images=lambda p: load_images(p, 8),
             image=read_image, json=read_json, faces=read_faces)

@settings(max_examples=40, deadline=None)
@example('x'*300).via('too long')
@example('~' + 'x/'*3000).via('too long')
@example('a\0b').via('no character of a name')
@example('a\nb/c').via('two lines')
@given(st.text('~$./ab-é ', max_size=12).map(lambda t: '~' + t))
def test_an_odd_name_is_never_a_traceback(name):
    "There is no such file, and each door says so in one line."
    for what, door in READS.items():
        with pytest.raises(InputError) as e: door(name)
        assert '\n' not in str(e.value), (what, name)

def test_a_tilde_is_home_at_every_door(bundle, faces, tmp_path, monkeypatch):
    "What was written to ~/x is read from ~/x, and lies at home, not in a folder called ~."
    monkeypatch.setenv('HOME', str(tmp_path/'home')); monkeypatch.setenv('USERPROFILE', str(tmp_path/'home')); monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle, tmp_path/'home'/'nets')
    b = load_bundle('~/nets')
    assert b.name == 'nets' and b.folder == tmp_path/'home'/'nets' and evaluator(b, '~/nets').identity is not None
    inv = invert(faces[:1], b, refine=0, tune=0)
    assert inv.save('~/out') == [tmp_path/'home'/'out'/'f0'] and torch.equal(Inversion.load('~/out').wp, inv.wp)
    assert invert_files(faces[:1], '~/files', b, 'cycle')['new'] == 1 and Inversion.load('~/files', '~/nets').names == ['f0']
    assert load_generator('~/nets').num_ws == load_encoder('~/nets/cycle.safetensors').num_ws == 10
    assert load_directions('~/nets').keys() == read_directions('~/nets/directions.safetensors').keys() == b.directions.keys()
    save_model(b.generator, '~/g.safetensors', half=False)
    assert load_model('~/g.safetensors').num_ws == 10 and len(load_tensors('~/g.safetensors')[0]) == len(read_checkpoint('~/g.safetensors'))
    assert len(image_paths('~/out/f0')) == 2 and {p.name for p in tmp_path.iterdir()} == {'home'}

@pytest.mark.parametrize('what', [['.'], ['ok.png', '~f.png', '~$word.png'], ['./~f.png'], ['~f.png']])
def test_files_that_begin_with_a_tilde_are_inverted(bundle, faces, tmp_path, monkeypatch, capsys, what):
    "Office and editors leave ~$name and ~name beside the others."
    names = ['ok.png', '~f.png', '~$word.png']
    for n, f in zip(names, faces): (tmp_path/n).write_bytes(f.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(['invert', *what, '--out', 'out', '--bundle', str(bundle), '--refine', '0', '--tune', '0', '--device', 'cpu']) == 0
    want = names if what == ['.'] else [Path(n).name for n in what]
    assert not capsys.readouterr().err
    assert {Path(read_json(f)['source']).name for f in (tmp_path/'out').glob('*/inversion.json')} == set(want)
