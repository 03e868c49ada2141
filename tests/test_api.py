"What `import cycle_nb` gives: a few names, at no cost until one is used."
import re, subprocess, sys
from configparser import ConfigParser
import pytest
from conftest import ROOT

HOMES = dict(invert='inversion', Inversion='inversion', load_bundle='bundle', load_generator='checkpoints',
             load_encoder='encoder_checkpoints', Explorer='explore')


def test_import_is_light(python):
    "Neither importing it, nor its version, nor looking around loads torch, or anything but the package itself."
    code = ('import sys; before = set(sys.modules); import cycle_nb; cycle_nb.__version__; dir(cycle_nb); hasattr(cycle_nb, "nothing")\n'
            'print(*sorted({m.split(".")[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))')
    assert python(code) == 'cycle_nb\n'


@pytest.mark.parametrize('name', HOMES)
def test_names_load_when_used(name, python):
    code = ('import sys, importlib, cycle_nb; name, home = sys.argv[1:]\nx = getattr(cycle_nb, name)\n'
            'assert x is getattr(importlib.import_module("cycle_nb." + home), name) and x is vars(cycle_nb)[name]\n'
            'exec(f"from cycle_nb import {name} as y"); print(x is y)')
    assert python(code, name, HOMES[name]) == 'True\n'


def test_what_is_listed(python):
    assert python('import cycle_nb; print(set(cycle_nb.__all__) <= set(dir(cycle_nb)), *cycle_nb.__all__)').split() == ['True', '__version__', *HOMES]
    assert python('from cycle_nb import *; print(invert.__name__, Explorer.__name__, __version__)').split()[:2] == ['invert', 'Explorer']


def test_unknown_names_are_attribute_errors(python):
    said = python('import cycle_nb\ntry: cycle_nb.nothing\nexcept AttributeError as e: print(e)\ntry: from cycle_nb import nothing\nexcept ImportError as e: print(e)')
    assert "module 'cycle_nb' has no attribute 'nothing'" in said and 'cannot import name' in said


def test_one_version():
    ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    init = (ROOT/'cycle_nb'/'__init__.py').read_text()
    assert re.search(r'^__version__ = "(.*)"$', init, re.M)[1] == ini['DEFAULT']['version'] and init.count('__version__ =') == 1


@pytest.mark.parametrize('args, words', [(['--version'], 'cycle'), (['--help'], 'usage'), (['invert', '--help'], 'IMAGES')])
def test_module_is_the_command(args, words, tmp_path):
    "`python -m cycle_nb` answers as `cycle-nb` does, before torch is loaded."
    code = ('import runpy, sys; sys.argv = ["cycle-nb", *sys.argv[1:]]\ntry: runpy.run_module("cycle_nb", run_name="__main__")\n'
            'except SystemExit as e: assert not e.code, e.code\nassert "torch" not in sys.modules')
    p = subprocess.run([sys.executable, '-c', code, *args], cwd=tmp_path, env={'PYTHONPATH': str(ROOT), 'PATH': ''}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 0 and words.lower() in p.stdout.lower(), p.stderr
    assert p.stdout.splitlines()[0].split()[0] in ('usage:', 'cycle-nb'), p.stdout[:100]


def test_bad_command_leaves_with_2(tmp_path):
    p = subprocess.run([sys.executable, '-m', 'cycle_nb', 'nothing'], cwd=tmp_path, env={'PYTHONPATH': str(ROOT), 'PATH': ''}, capture_output=True, text=True, timeout=60)
    assert p.returncode == 2 and p.stderr.count('\n') == 1, p.stderr
