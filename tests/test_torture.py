"A small piece of every bar of `make torture`; its tools can tell right from wrong."
import os, random, shutil, subprocess, sys
import pytest
from conftest import ROOT
from cycle_nb.files import read_json

BARS = 'kill', 'faults', 'results', 'bundles', 'images', 'checkpoints', 'many', 'names'


@pytest.mark.skipif(sys.platform != 'linux' or not shutil.which('cc'), reason='writes are spoilt on Linux, with a C compiler')
def test_a_sample_of_everything():
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    r = subprocess.run([sys.executable, ROOT/'tests'/'torture.py', '--sample'], env=env, capture_output=True, text=True, timeout=800)
    assert r.returncode == 0, r.stdout + r.stderr
    lines = [l for l in r.stdout.splitlines() if l.endswith(', 0 wrong')]
    assert {l.split()[0] for l in lines} == set(BARS), r.stdout
    kills = next(l for l in lines if l.startswith('kill invert'))
    assert int(kills.split(', ')[1].split()[0]) >= 1, kills                # somebody was really killed


def test_what_is_not_synced_is_seen():
    from torture import unsynced
    good = [('open', '/a/.x', ''), ('write', '/a/.x', ''), ('fsync', '/a/.x', ''), ('rename', '/a/.x', '/a/x')]
    assert not unsynced(good) and unsynced([c for c in good if c[0] != 'fsync'])
    folder = [('write', '/a/.w/new/x', ''), ('rename', '/a/.w/new', '/a/r')]
    assert unsynced(folder) and not unsynced([folder[0], ('fsync', '/a/.w/new/x', ''), folder[1]])


def test_differences_are_seen(tmp_path):
    from torture import differing, tree
    from cycle_nb.files import write_json
    write_json(dict(a=1, date='today'), tmp_path/'x.json')
    one = tree(tmp_path)
    write_json(dict(a=1, date='tomorrow'), tmp_path/'x.json')
    assert tree(tmp_path) == one
    write_json(dict(a=2), tmp_path/'x.json')
    assert differing(one, tree(tmp_path)) == ['x.json']


def test_every_kind_of_write_comes_before_a_second_of_its_kind():
    from torture import kind_of, spread_out
    calls = [('write', f'/t/out/.cycle_nb-work-{i}-x/a{i}.pt', '') for i in range(9)] + [('fsync', '/t/out/a1.pt', '')]
    assert len({kind_of(c) for c in calls}) == 2
    taken = spread_out(range(10), 2, random.Random(0), lambda i: kind_of(calls[i]))
    assert 9 in taken and len(taken) == 2
    assert sorted(spread_out(range(10), 99, random.Random(0), lambda i: kind_of(calls[i]))) == list(range(10))


def test_a_record_keeps_what_other_runs_gave(tmp_path):
    from torture import keep
    runs = [('names', dict(seed=0, found=1)), ('kill', dict(seed=0, job='nets', found=2)), ('kill', dict(seed=0, job='nets', found=3)), ('kill', dict(seed=1, job='nets', found=4))]
    for name, run in runs: keep(tmp_path/'r.json', name, run)
    record = read_json(tmp_path/'r.json')
    assert list(record) == ['kill', 'names'] and [r['found'] for r in record['kill']] == [3, 4]
