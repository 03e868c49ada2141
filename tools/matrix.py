"""Try other versions of what we need. Both ways need a package index; what they try needs no network.

    python tools/matrix.py [fastprogress ipywidgets] [--keep DIR]

The tests of a library, with the oldest and the newest version that settings.ini allows. Each version is
installed into an environment of its own, which sees the packages of the present one behind it.

    python tools/matrix.py --wheel python3.13 [ipywidgets==8.* voila] [--only 07_sdfaces index] [--keep DIR]

As a user has it: a new environment of that Python gets our wheel, its extra `lab` and what else is named. Every
notebook runs in it, whole, alone in an empty folder. With Voilà among the packages its page is tried in a browser.
"""
import argparse, configparser, os, re, shutil, subprocess, sys, sysconfig, tempfile
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


EXECUTE = '''
import resource, sys, time, nbformat
from nbclient import NotebookClient
start = time.time()
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=900, kernel_name="python3").execute()
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.time() - start, used.ru_utime + used.ru_stime)
'''


def run_alone(python, path, home, **more):
    "A notebook, by another Python, in an empty folder. What went wrong, or ''; seconds, and CPU seconds."
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'JUPYTER_PATH', 'IPYTHONDIR')}
        p = subprocess.run([python, '-c', EXECUTE, path.name], cwd=folder, env=env | dict(HOME=str(home)) | more,
                           capture_output=True, text=True)
    if p.returncode: return p.stderr[-3000:] or f'exit code {p.returncode}', 0., 0.
    return '', *map(float, p.stdout.split()[-2:])


def as_a_user(folder, python, packages):
    "An environment with the wheel of this repository and nothing behind it. Gives its Python."
    shutil.rmtree(ROOT/'build', ignore_errors=True)
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--outdir', folder/'dist', ROOT], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([python, '-m', 'venv', '--clear', folder/'env'], check=True)
    wheel, python = next((folder/'dist').glob('*.whl')), folder/'env'/'bin'/'python'
    subprocess.run([python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', f'{wheel}[lab]', *packages], check=True)
    return python


def try_wheel(python, only, home):
    "Every notebook, a line each, and what the lessons took together; whether all ran."
    lessons, bad = [0., 0.], []
    for path in [ROOT/'nbs'/f'{n}.ipynb' for n in only] or sorted((ROOT/'nbs').glob('[!._]*.ipynb')):
        wrong, *seconds = run_alone(python, path, home)
        print(f'{path.stem:22} {seconds[0]:6.1f} s, {seconds[1]:6.1f} s of CPU', wrong and f'failed\n{wrong}', flush=True)
        if wrong: bad.append(path.stem)
        if '*Lesson*' in path.read_text(encoding='utf-8'): lessons = [a + b for a, b in zip(lessons, seconds)]
    print(f'lessons: {lessons[0]/60:.1f} min, {lessons[1]/60:.1f} min of CPU; failed: {", ".join(bad) or "none"}')
    return not bad


def try_voila(program):
    "The test of the page that Voilà makes of the explorer, with the Voilà of another environment."
    env = os.environ | dict(CYCLE_NB_VOILA=str(program), CYCLE_NB_DEMAND_VOILA='1', PYTHONPATH=str(ROOT))
    test = 'tests/test_explore_browser.py::test_the_explorer_explores_without_its_code'
    return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-rs', test], cwd=ROOT, env=env).returncode == 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', help=f'{", ".join(TESTS)}; with --wheel what else to install')
    p.add_argument('--keep', type=Path, help='folder for the environments; default: a temporary one')
    p.add_argument('--wheel', metavar='PYTHON', help='the wheel, in a new environment of this Python')
    p.add_argument('--only', nargs='+', default=[], metavar='NOTEBOOK', help='with --wheel: not every notebook')
    a = p.parse_args()
    if a.wheel:
        with tempfile.TemporaryDirectory() as tmp:
            python = as_a_user((a.keep or Path(tmp)/'made').resolve(), a.wheel, a.names)
            good = [try_wheel(python, a.only, tmp)]         # nothing of ours in the home folder
            if (voila := python.with_name('voila')).exists(): good.append(try_voila(voila))
        sys.exit(not all(good))
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
