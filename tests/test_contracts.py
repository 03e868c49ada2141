"What holds for the repository as a whole. Every check first makes sure that it found something."
import ast, filecmp, json, re, shutil, statistics, subprocess, sys, zipfile
from functools import cache
from pathlib import Path
import nbformat
import pytest
from conftest import ROOT

LIB, BIN = ROOT/'cycle_nb', Path(sys.executable).parent
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
NOTEBOOKS = CHAPTERS + [ROOT/'nbs'/'index.ipynb']
MODULES = sorted(f for f in LIB.glob('*.py') if not f.name.startswith('_'))
WEIGHTS = sorted((LIB/'pretrained').rglob('*.safetensors'))
HEAVY = 'IPython', 'matplotlib.pyplot', 'lpips', 'torchvision', 'ipywidgets'
per_module = pytest.mark.parametrize('path', MODULES, ids=lambda p: p.stem)
per_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)


@cache
def tree(path): return ast.parse(path.read_text())


@cache
def notebook(path): return nbformat.read(path, 4)


def code(path):
    "A notebook's code as one syntax tree, magics and shell lines left out."
    cells = [c.source for c in notebook(path).cells if c.cell_type == 'code' and '%%' not in c.source[:2]]
    return ast.parse('\n'.join(re.sub(r'^(\s*)[%!].*$', r'\1pass', s, flags=re.M) for s in cells))


def test_something_is_here():
    assert len(CHAPTERS) >= 20 and len(MODULES) >= 18 and len(WEIGHTS) >= 7


def copy(to, *names):
    "Part of the repository, elsewhere."
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.*')
    for n in names:
        if (ROOT/n).is_dir(): shutil.copytree(ROOT/n, to/n, ignore=skip)
        else: shutil.copy(ROOT/n, to/n)
    return to


def sh(cwd, *cmd):
    p = subprocess.run([str(c) for c in cmd], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr


# --- notebooks and library -----------------------------------------------------------------

def test_export_in_sync(tmp_path):
    "Exporting every notebook into an empty library gives the committed one."
    copy(tmp_path, 'nbs', 'pyproject.toml', 'settings.ini')
    (tmp_path/'cycle_nb').mkdir()
    shutil.copy(LIB/'__init__.py', tmp_path/'cycle_nb')
    sh(tmp_path, BIN/'nbdev-export')
    ours, new = ({f.name for f in d.glob('*.py')} for d in (LIB, tmp_path/'cycle_nb'))
    assert ours == new and len(new) > 3
    differ = [n for n in ours if not filecmp.cmp(LIB/n, tmp_path/'cycle_nb'/n, shallow=False)]
    assert not differ, f'run nbdev-export: {differ}'


def test_notebooks_are_clean(tmp_path):
    "nbdev-clean would change nothing."
    copy(tmp_path, 'nbs', 'pyproject.toml', 'settings.ini')
    sh(tmp_path, BIN/'nbdev-clean')
    differ = [p.name for p in NOTEBOOKS if p.read_bytes() != (tmp_path/'nbs'/p.name).read_bytes()]
    assert not differ, f'run nbdev-clean: {differ}'


def test_readme_is_generated(tmp_path):
    copy(tmp_path, 'nbs', 'tools', 'pyproject.toml')
    sh(tmp_path, sys.executable, 'tools/nb.py', 'readme')
    assert (tmp_path/'README.md').read_text() == (ROOT/'README.md').read_text(), 'run make readme'


@per_notebook
def test_notebook_is_light(path):
    nb, text = notebook(path), path.read_text()
    assert path.stat().st_size <= 300_000, f'{path.stat().st_size} bytes'
    assert 'widgets' not in nb.metadata and 'application/vnd.jupyter.widget' not in text
    assert all('execution' not in c.metadata for c in nb.cells)


@per_notebook
def test_notebook_opens_with_title_and_promise(path):
    first = notebook(path).cells[0]
    assert first.cell_type == 'markdown' and re.match(r'# .+\n+> .+', first.source), first.source[:80]


@per_notebook
def test_notebook_shows_an_executed_figure(path):
    outs = [o for c in notebook(path).cells for o in c.get('outputs', [])]
    data = [o.get('data', {}) for o in outs]
    shown = [d for d in data if {'image/png', 'image/jpeg', 'image/svg+xml'} & set(d)
             or '<img' in ''.join(d.get('text/html', '')) or '<svg' in ''.join(d.get('text/html', ''))]
    assert shown, 'no executed figure'
    assert not [o for o in outs if o.output_type == 'error']


def names():
    "Module name -> chapter number, from the file names."
    return {p.stem[3:]: int(p.stem[:2]) for p in CHAPTERS}


@per_module
def test_module_belongs_to_its_chapter(path):
    assert path.stem in names(), f'{path.name} has no chapter'
    source = f'{names()[path.stem]:02d}_{path.stem}.ipynb'
    cells = set(re.findall(r'^# %% \.\./nbs/(\S+)', path.read_text(), re.M))
    assert cells == {source}, cells


def imported(tr):
    "Modules of this package that a syntax tree imports, wherever in it, with the line."
    for n in ast.walk(tr):
        mods = []
        if isinstance(n, ast.Import): mods = [a.name for a in n.names]
        elif isinstance(n, ast.ImportFrom):
            base = 'cycle_nb' + (f'.{n.module}' if n.module else '') if n.level else n.module
            mods = [f'{base}.{a.name}' for a in n.names] if base == 'cycle_nb' else [base]
        yield from ((m.split('.')[1], n.lineno) for m in mods if m.startswith('cycle_nb.'))


@per_module
def test_imports_go_down(path):
    own = names()[path.stem]
    up = [f'line {l}: {m}' for m, l in imported(tree(path)) if names().get(m, 99) >= own]
    assert not up, up


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_chapters_use_earlier_ones_only(path):
    up = [m for m, _ in imported(code(path)) if names().get(m, 99) >= int(path.stem[:2])]
    assert not up, up


def test_imports_are_seen():
    "The check above can fail: every way to write an import is found."
    src = 'import cycle_nb.a\nfrom cycle_nb import b\nfrom cycle_nb.c import x\nfrom . import d\n' \
          'def f():\n  from .e import y\nimport os\nfrom torch import nn'
    assert [m for m, _ in imported(ast.parse(src))] == list('abcde')
    assert sum(len(list(imported(tree(p)))) for p in MODULES) > 20


# --- code ----------------------------------------------------------------------------------

def device_names(tr):
    "Lines that name an accelerator, outside `pick_device`."
    skip = {id(m) for n in ast.walk(tr) if getattr(n, 'name', '') == 'pick_device' for m in ast.walk(n)}
    for n in ast.walk(tr):
        if id(n) in skip: continue
        if isinstance(n, ast.Attribute) and n.attr in ('cuda', 'mps', 'xpu'): yield n.lineno
        if isinstance(n, ast.Constant) and re.fullmatch(r'(cuda|mps|xpu)(:\d+)?', str(n.value)): yield n.lineno


@per_module
def test_no_device_names(path): assert not list(device_names(tree(path)))


@pytest.mark.parametrize('path', CHAPTERS[1:], ids=lambda p: p.stem)     # 00 chooses the device
def test_no_device_names_in_chapters(path): assert not list(device_names(code(path)))


def test_device_names_are_seen():
    bad = 'a = x.cuda()\nb = x.to("cuda:0")\nc = torch.mps.x\ndef pick_device(): return "cuda"\nd = "cpu"'
    assert sorted(device_names(ast.parse(bad))) == [1, 2, 3]
    whole = ast.parse((LIB/'core.py').read_text().replace('def pick_device', 'def other'))
    assert list(device_names(whole)), 'pick_device is where they are'


def functions(path): return [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]


@per_module
def test_public_things_are_documented(path):
    defs = [n for n in tree(path).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert defs, 'nothing defined'
    bare = [n.name for n in defs if not n.name.startswith('_') and not ast.get_docstring(n)]
    assert not bare, bare


def length(f): return f.end_lineno - f.body[0].lineno + 2      # the signature counts as one line


def test_functions_are_short():
    ls = sorted(length(f) for p in MODULES for f in functions(p))
    assert len(ls) > 100
    median, p90 = statistics.median(ls), ls[int(.9*len(ls))]
    longest = sorted(((length(f), f'{p.stem}.{f.name}') for p in MODULES for f in functions(p)), reverse=True)
    assert median <= 8 and p90 <= 20, (median, p90, longest[:8])


@per_module
def test_lines_are_narrow(path):
    text = re.sub(r'^__all__ = \[.*?\]', '', path.read_text(), flags=re.M | re.S)
    wide = [l for l in text.splitlines()[1:] if len(l) > 100]      # line 1: the chapter's promise
    assert not wide, wide


def test_imports_are_light(python):
    "Importing any module, and so the command line, loads nothing that only figures and widgets need."
    mods = [f'cycle_nb.{p.stem}' for p in MODULES]
    assert 'cycle_nb.invert' in mods
    loop = ('import sys, importlib\nfor m in sys.argv[2].split(","):\n  importlib.import_module(m)\n'
            '  for h in sys.argv[1].split(","):\n    if h in sys.modules: print(m, "loads", h); sys.modules.pop(h)')
    assert python(loop, ','.join(HEAVY), ','.join(mods)) == ''


def test_heavy_imports_are_seen(python):
    "The check above can fail."
    assert python('import sys, matplotlib.pyplot; print("matplotlib.pyplot" in sys.modules)') == 'True\n'


# --- weights and packages ------------------------------------------------------------------

def test_weights_are_small():
    total = sum(f.stat().st_size for f in (LIB/'pretrained').rglob('*') if f.is_file())
    assert 0 < total <= 30e6, f'{total/1e6:.1f} MB'


@pytest.mark.parametrize('path', WEIGHTS, ids=lambda p: f'{p.parent.name}/{p.stem}')
def test_weights_have_a_card(path):
    card = json.loads(path.with_suffix('.json').read_text())
    lacks = [k for k in ('command', 'seed', 'steps', 'data', 'commit', 'figures') if card.get(k) in (None, '', {})]
    assert not lacks, lacks


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel of this repository, built elsewhere."
    d = tmp_path_factory.mktemp('wheel')
    copy(d, 'cycle_nb', 'data', 'setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'LICENSE')
    sh(d, sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', d/'out', d)
    return next((d/'out').glob('*.whl'))


def test_wheel_has_everything(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    want = [p.relative_to(ROOT).as_posix() for p in MODULES + WEIGHTS + [w.with_suffix('.json') for w in WEIGHTS]]
    want += [f'cycle_nb/samples/{p.name}' for p in (ROOT/'data'/'samples').glob('*.png')]
    assert not set(want) - inside and sum('/samples/' in w for w in want) >= 12
    meta = {n.split('/')[-1]: zipfile.ZipFile(wheel).read(n).decode() for n in inside if 'dist-info' in n}
    assert 'cycle-nb = cycle_nb.invert:main' in meta['entry_points.txt'] and 'LICENSE' in meta
    assert 'Requires-Python: >=3.11' in meta['METADATA'] and 'torch>=2.6' in meta['METADATA']
    tops = {n.split('/')[0] for n in inside}
    assert len(tops) == 2, f'only the package and its metadata: {tops}'


def test_wheel_runs_elsewhere(wheel, tmp_path):
    "Unpacked in another place, it finds its own weights and its command answers."
    zipfile.ZipFile(wheel).extractall(tmp_path)
    show = ('import sys; sys.path.insert(0, "."); import cycle_nb.weights as w, cycle_nb.core as c; '
            'assert c.package_dir().parent.samefile("."); print(w.load_generator("sdfaces64").resolution)')
    sh(tmp_path, sys.executable, '-c', show)
    sh(tmp_path, sys.executable, '-c', 'from cycle_nb.invert import main; main(["--help"])')


# --- setting up ----------------------------------------------------------------------------

def venv_script(tmp_path, **found):
    "tools/venv.sh in an empty folder, with only these programs on the path."
    (tmp_path/'bin').mkdir()
    for name, text in found.items():
        (tmp_path/'bin'/name).write_text(f'#!/bin/sh\n{text}\n')
        (tmp_path/'bin'/name).chmod(0o755)
    return subprocess.run(['/bin/sh', ROOT/'tools'/'venv.sh'], cwd=tmp_path, env={'PATH': str(tmp_path/'bin')},
                          capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize('found', [{}, {'python3': 'exit 1'}, {'python': 'exit 127', 'python3': 'exit 1'}])
def test_no_suitable_python_is_one_clear_line(tmp_path, found):
    p = venv_script(tmp_path, **found)
    assert p.returncode == 1 and p.stderr.count('\n') == 1 and 'Python 3.11' in p.stderr and not p.stdout


def test_first_suitable_python_is_taken(tmp_path):
    "An old one is passed over, a good one makes the environment."
    good = f'[ "$1" = -c ] && exec {sys.executable} "$@"; echo "$@" >> said'
    p = venv_script(tmp_path, python3='exit 1', **{'python3.12': good})
    assert p.returncode == 0, p.stderr
    assert (tmp_path/'said').read_text().splitlines()[-1] == '-m venv --clear .venv'


def test_python_versions_are_checked():
    "The test in the script itself, against this interpreter with other version numbers."
    ok = re.search(r"^ok='(.*)'$", (ROOT/'tools'/'venv.sh').read_text(), re.M)[1]
    for version, want in {(3, 10): 1, (3, 11): 0, (3, 13): 0, (3, 14): 1}.items():
        src = f'import venv, ensurepip, sys; sys.version_info = {version}; {ok}'
        assert subprocess.run([sys.executable, '-c', src], timeout=60).returncode == want, version


def test_continuous_check_is_runnable():
    run = ROOT/'.ci'/'run'
    text = run.read_text()
    assert run.stat().st_mode & 0o111 and 'make test' in text
    demands = re.search(r'export (\w+)=1', text)[1]
    assert demands in (ROOT/'tests'/'test_explore_browser.py').read_text()
