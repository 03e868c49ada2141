"What comes from elsewhere, and what goes out: licences are listed, hashes are known, no network is asked, a wheel can be built again."
import os, re, shutil, socket, subprocess, sys, zipfile
import pytest
from conftest import ROOT
from cycle_nb.download import PUBLISHED

sys.path.append(str(ROOT/'tools'))
import licences


def test_every_requirement_has_its_licence_listed():
    text = (ROOT/'LICENCES.md').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| ([\w.-]+) \| (.+) \|$', text, re.M))
    names = licences.required()
    assert {'torch', 'jupyterlab', 'huggingface_hub', 'onnx', 'pytest', 'sphinx', 'nbgrader'} < set(names) == set(rows) - {'package'}
    for n in names:
        assert rows[n] not in ('unknown', 'not installed'), n


def test_licences_are_read_from_the_packages():
    assert licences.licence('no-such-package') is None and 'Apache' in licences.licence('safetensors')


def test_published_files_have_a_hash_or_none_is_published():
    for name, p in PUBLISHED.items():
        assert p['sha256'] is None or re.fullmatch('[0-9a-f]{64}', p['sha256']), name
        assert p['licence'] and p['url'].startswith('https://'), name


def test_importing_asks_no_network(python):
    "Every module, and the command's help, while no connection can be made."
    code = """
import socket, sys, importlib
def refuse(*a, **k): raise AssertionError(f'connects to {a[-1]}')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
for name in sys.argv[1:]: importlib.import_module(f'cycle_nb.{name}')
from cycle_nb.cli import main
try: main(['--help'])
except SystemExit as e: print('code', e.code)
"""
    names = [f.stem for f in (ROOT/'cycle_nb').glob('[a-z]*.py')]
    assert len(names) > 40 and python(code, *names).endswith('code 0\n')


def test_tests_ask_no_network():
    with pytest.raises(OSError, match='asked the network'): socket.create_connection(('192.0.2.1', 80), timeout=1)


@pytest.mark.skipif(not shutil.which('git'), reason='the time of a commit comes from git')
def test_the_same_commit_gives_the_same_wheel(tmp_path):
    "Built from two clones, with other times and permissions of the files."
    def sh(*cmd, **kw):
        p = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=300, **kw)
        assert p.returncode == 0, p.stdout + p.stderr
    home = tmp_path/'home'
    for n in ('cycle_nb', 'data/samples', 'data/results'): shutil.copytree(ROOT/n, home/n, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    for n in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE'): shutil.copy(ROOT/n, home)
    who = dict(GIT_AUTHOR_NAME='a', GIT_AUTHOR_EMAIL='a@b', GIT_COMMITTER_NAME='a', GIT_COMMITTER_EMAIL='a@b', GIT_COMMITTER_DATE='1700000000 +0000')
    for cmd in (['init', '-q'], ['add', '-A'], ['commit', '-q', '-m', 'all']): sh('git', *cmd, cwd=home, env=os.environ | who)
    env, wheels = {k: v for k, v in os.environ.items() if k != 'SOURCE_DATE_EPOCH'}, []
    for name, mask in dict(one=0o022, two=0o077).items():
        sh('git', 'clone', '-q', home, tmp_path/name, umask=mask)
        os.utime(tmp_path/name/'cycle_nb'/'core.py', (1e9, 1e9))
        sh(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-index', '--no-build-isolation', '-w', tmp_path/name/'out', tmp_path/name, env=env, umask=mask)
        wheels.append(next((tmp_path/name/'out').glob('*.whl')))
    a, b = (zipfile.ZipFile(w) for w in wheels)
    differ = [(x.filename, x.date_time, x.external_attr >> 16, y.external_attr >> 16) for x, y in zip(a.infolist(), b.infolist()) if (x.filename, x.date_time, x.CRC, x.external_attr) != (y.filename, y.date_time, y.CRC, y.external_attr)]
    assert not differ and wheels[0].read_bytes() == wheels[1].read_bytes()
    assert {i.date_time[:3] for i in a.infolist()} == {(2023, 11, 14)} and len(a.infolist()) > 60
