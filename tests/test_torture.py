"A small piece of every bar of `make torture`; its tools can tell right from wrong."
import os, shutil, subprocess, sys
import pytest
from conftest import ROOT

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
