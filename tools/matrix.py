"""Run the tests of a library that we need, with the oldest and the newest version that settings.ini allows.

    python tools/matrix.py [fastprogress ipywidgets] [--keep DIR]

Each version is installed into an environment of its own, which sees the packages of the present
one behind it. That needs a package index; the tests themselves need no network.
"""
import argparse, configparser, os, re, subprocess, sys, sysconfig, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = {'ipywidgets': ['jupyterlab_widgets']}     # its other half, in the browser, has to fit
TESTS = {       # library -> the tests in which it is used
    'fastprogress': ['tests/test_learner.py', '-k', 'bar or lines'],
    'ipywidgets': ['tests/test_explore_browser.py'],
}


def bounds(requirements, name):
    "What to install for the oldest and for the newest version that a requirement allows."
    line = next(l.strip() for l in requirements.splitlines() if re.match(rf'\s*{name}\b', l))
    oldest = re.search(r'>=([0-9.]+)', line)[1]
    return [f'{name}=={oldest}' + '.*'*(oldest.count('.') < 2), line]


def environment(folder, name, requirement):
    "An environment with this version; everything else comes from the present environment. Gives its Python."
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    python = folder/'bin'/'python'
    own = said(python, 'import sysconfig; print(sysconfig.get_path("purelib"))')
    (Path(own)/'behind.pth').write_text(sysconfig.get_path('purelib') + '\n')
    pip = [python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check']
    subprocess.run([*pip, '--ignore-installed', '--no-deps', requirement], check=True)
    needs = said(python, f'from importlib.metadata import requires; print(*requires("{name}") or [], sep="\\n")')
    beside = [r.split(';')[0].strip() for r in needs.splitlines()
              if re.match('|'.join(BESIDE.get(name, ['$'])), r.replace('-', '_'))]
    if beside: subprocess.run([*pip, '--ignore-installed', '--no-deps', *beside], check=True)
    subprocess.run([*pip, requirement], check=True)       # what else it needs and is not here
    lab = folder/'bin'/'jupyter-lab'        # a test starts the one beside its own Python
    lab.write_text(f'#!{python}\nfrom jupyterlab.labapp import main\nmain()\n')
    lab.chmod(0o755)
    return python


def said(python, code):
    "What a line of code prints in another environment."
    return subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout.strip()


def try_version(name, requirement, folder):
    "The tests with one version; the last line that pytest says, and whether all passed."
    python = environment(folder, name, requirement)
    found = said(python, f'from importlib.metadata import version; print(version("{name}"))')
    lab = Path(sys.prefix)/'share'/'jupyter'/'lab'
    env = os.environ | dict(PYTHONPATH=str(ROOT), JUPYTERLAB_DIR=str(lab))
    env.pop('JUPYTER_PATH', None)       # kernels and widgets' scripts are those of the new environment
    cmd = [python, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-rs', *TESTS[name]]
    p = subprocess.run(cmd, cwd=ROOT, env=env, capture_output=True, text=True)
    if p.returncode: print(p.stdout[-5000:], p.stderr[-2000:], sep='\n')
    print(f'{name} {found}: {p.stdout.strip().splitlines()[-1]}', flush=True)
    return p.returncode == 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help=', '.join(TESTS))
    p.add_argument('--keep', type=Path, help='folder for the environments; default: a temporary one')
    a = p.parse_args()
    if odd := set(a.names) - TESTS.keys():
        p.error(f'no tests are named for {", ".join(odd)}; there are {", ".join(TESTS)}')
    ini = configparser.ConfigParser(delimiters=['='], inline_comment_prefixes=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    with tempfile.TemporaryDirectory() as tmp:
        home, wanted = a.keep or Path(tmp), ini['DEFAULT']['requirements']
        good = [try_version(n, r, home/f'{n}-{i}')
                for n in a.names or TESTS for i, r in enumerate(bounds(wanted, n))]
    sys.exit(not all(good))


if __name__ == '__main__': main()
