"""What holds for the repository as a whole. Every check first makes sure that it found something.

    python tests/test_contracts.py [module …]    what is still to do, module by module
"""
import ast, filecmp, json, re, shutil, statistics, subprocess, sys, zipfile
from functools import cache
from pathlib import Path
import nbformat
import pytest
import cycle_nb
from conftest import ROOT

sys.path.append(str(ROOT/'tools'))
import matrix

LIB, BIN = ROOT/'cycle_nb', Path(sys.executable).parent
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
NOTEBOOKS = CHAPTERS + [ROOT/'nbs'/'index.ipynb']
HANDWRITTEN = '__init__.py', '__main__.py'      # in the library, but from no notebook
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
    return ast.parse('\n'.join(map(plain_python, cells)))


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
    for f in HANDWRITTEN: shutil.copy(LIB/f, tmp_path/'cycle_nb')
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
    nb = notebook(path)
    assert path.stat().st_size <= 300_000, f'{path.stat().st_size} bytes'
    assert 'widgets' not in nb.metadata and 'application/vnd.jupyter.widget' not in str([c.get('outputs') for c in nb.cells])
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


@cache
def names():
    "Module name -> chapter number, from the file names."
    return {p.stem[3:]: int(p.stem[:2]) for p in CHAPTERS}


def chapter(path): return next(p for p in CHAPTERS if p.stem[3:] == path.stem)


def kind(path):
    "What a chapter says it is, in its second cell: lesson or tool; None when it does not."
    found = re.findall(r'\*(Lesson|Tool)\*', notebook(path).cells[1].source)
    return found[0].lower() if len(found) == 1 else None


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_chapter_says_what_it_is(path):
    cells = notebook(path).cells
    assert cells[1].cell_type == 'markdown' and kind(path), cells[1].source[:80]
    exports = [c.source for c in cells if is_exported(c)]
    if exports: assert cells[2].source.strip() == f'#| default_exp {path.stem[3:]}' and 'import' in exports[0]


def listed(text):
    "Column -> chapters of the index's table, and those of the course path."
    rows = re.findall(r'^\| [a-z][^|]*? \|(.*?)\|(.*?)\|$', text, re.M)
    of = lambda s: re.findall(r'`(\d\d_\w+)`', s)
    return dict(lesson=of(' '.join(a for a, _ in rows)), tool=of(' '.join(b for _, b in rows)), path=of(re.search(r'\*\*The course path:\*\*(.*?)\n\n', text, re.S)[1]))


def test_index_lists_every_chapter():
    "Once, in the column of its kind; the course path is all lessons in their order."
    found = listed('\n\n'.join(c.source for c in notebook(ROOT/'nbs'/'index.ipynb').cells))
    for k in ('lesson', 'tool'): assert sorted(found[k]) == [p.stem for p in CHAPTERS if kind(p) == k], k
    assert found['path'] == [p.stem for p in CHAPTERS if kind(p) == 'lesson']


def test_kinds_are_both_there(tmp_path):
    "The check above can fail."
    assert {kind(p) for p in CHAPTERS} >= {'lesson', 'tool'}
    cells = [nbformat.v4.new_markdown_cell(x) for x in ('# T', '**You have** nothing.')]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'00_x.ipynb')
    assert kind(tmp_path/'00_x.ipynb') is None


def is_exported(cell): return cell.cell_type == 'code' and bool(re.match(r'#\|\s*export', cell.source))


@per_module
def test_module_belongs_to_its_chapter(path):
    assert path.stem in names(), f'{path.name} has no chapter'
    source = f'{names()[path.stem]:02d}_{path.stem}.ipynb'
    cells = set(re.findall(r'^# %% \.\./nbs/(\S+)', path.read_text(), re.M))
    assert cells == {source}, cells


def origin(n):
    "What follows `from` in an import, with the package's name also where it is a dot."
    return '.'.join(filter(None, ['cycle_nb' if n.level else '', n.module]))


def imported(tr):
    """Modules of this package that a syntax tree imports, wherever in it, with the line. `cycle_nb` stands for the whole package:
    `import cycle_nb`, and also `import cycle_nb.x`, give a name through which every module can be reached."""
    for n in ast.walk(tr):
        mods = []
        if isinstance(n, ast.Import):
            mods = [a.name for a in n.names]
            if any(m.startswith('cycle_nb.') and not a.asname for m, a in zip(mods, n.names)): mods.append('cycle_nb')
        elif isinstance(n, ast.ImportFrom):
            base = origin(n)
            mods = [f'{base}.{cycle_nb._HOMES.get(a.name, a.name)}' for a in n.names] if base == 'cycle_nb' else [base]
        yield from ((m.removeprefix('cycle_nb.').split('.')[0], n.lineno) for m in mods if re.match(r'cycle_nb(\.|$)', m) and not m.endswith('__'))


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_chapters_use_earlier_ones_only(path):
    up = [m for m, _ in imported(code(path)) if names().get(m, 99) >= int(path.stem[:2])]
    assert not up, up


def test_imports_are_seen():
    "The check above can fail: every way to write an import is found."
    src = 'import cycle_nb.a as a\nfrom cycle_nb import b\nfrom cycle_nb.c import x\nfrom . import d\n' \
          'def f():\n  from .e import y\nimport os\nfrom torch import nn'
    assert [m for m, _ in imported(ast.parse(src))] == list('abcde')
    assert sum(len(list(imported(tree(p)))) for p in MODULES) > 20
    whole = {'import cycle_nb': ['cycle_nb'], 'import os, cycle_nb as c': ['cycle_nb'], 'import cycle_nb.core': ['core', 'cycle_nb'],
             'from cycle_nb import *': ['*'], 'from cycle_nb import invert, __version__': ['inversion']}
    for text, found in whole.items(): assert [m for m, _ in imported(ast.parse(text))] == found, text


def test_order_is_seen(tmp_path):
    "The check of a module's imports can fail, too."
    assert not list(upward(LIB/'files.py'))
    assert upward(source(tmp_path, 'core', 'from .files import x\nfrom cycle_nb.core import y')) == ['line 1: files', 'line 2: core']


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


DEF = ast.FunctionDef, ast.AsyncFunctionDef


def statements(node):
    "What runs when a module is imported, or a class made: also what stands inside `if`, `try`, `with`, `for`, `match`; nothing inside functions and classes."
    for part in ('body', 'handlers', 'cases', 'orelse', 'finalbody'):
        for n in getattr(node, part, []):
            yield n
            if not isinstance(n, (*DEF, ast.ClassDef)): yield from statements(n)


def named_lambdas(node):
    "(name, function) of what `f = lambda ...` defines in a module or class."
    for n in statements(node):
        if not isinstance(n, (ast.Assign, ast.AnnAssign)): continue
        v = n.value
        values = v.elts if isinstance(v, (ast.Tuple, ast.List)) else [v.body, v.orelse] if isinstance(v, ast.IfExp) else [v]
        targets = [e for t in getattr(n, 'targets', None) or [n.target] for e in getattr(t, 'elts', [t])]
        found = [f for f in values if isinstance(f, ast.Lambda)]
        if found: yield from ((t.id, found[0]) for t in targets if isinstance(t, ast.Name))


def functions(tr):
    "Every function and method, and the lambdas that have a name for all of a module or class."
    return [n for n in ast.walk(tr) if isinstance(n, DEF)] + [f for c in ast.walk(tr) if isinstance(c, (ast.Module, ast.ClassDef)) for _, f in named_lambdas(c)]


def length(f):
    "Lines; a signature counts as one."
    return f.end_lineno - (f.body[0].lineno - 1 if isinstance(f.body, list) else f.lineno) + 1


def doc(n): return None if isinstance(n, ast.Lambda) else ast.get_docstring(n)


def test_functions_are_short():
    ls = sorted(length(f) for p in MODULES for f in functions(tree(p)))
    assert len(ls) > 100
    median, p90 = statistics.median(ls), ls[int(.9*len(ls))]
    longest = sorted(((length(f), f'{p.stem}.{f.name}') for p in MODULES for f in functions(tree(p))), reverse=True)
    assert median <= 6 and p90 <= 15, (median, p90, longest[:8])


def definitions(tr, owner=''):
    "Functions, classes and their methods, with full names; what is defined inside a function is not."
    for n in statements(tr):
        if isinstance(n, (*DEF, ast.ClassDef)): yield owner + n.name, n
        if isinstance(n, ast.ClassDef): yield from definitions(n, f'{owner}{n.name}.')
    yield from ((owner + name, f) for name, f in named_lambdas(tr))


def stored(n):
    "Names that a statement itself gives a value, at the level where it stands."
    for c in ast.iter_child_nodes(n):
        if isinstance(c, ast.Name) and isinstance(c.ctx, ast.Store): yield c.id
        if not isinstance(c, (ast.stmt, ast.excepthandler, ast.match_case, ast.Lambda, ast.comprehension)): yield from stored(c)


def public(tr):
    "Names a module defines for others."
    for n in statements(tr):
        if isinstance(n, (*DEF, ast.ClassDef)): yield n.name
        else: yield from stored(n)


def open_names(tr): return [n for n in public(tr) if not n.startswith('_')]


def used(tr):
    "Every identifier of a syntax tree."
    for n in ast.walk(tr):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load): yield n.id
        if isinstance(n, ast.Attribute): yield n.attr
        if isinstance(n, ast.ImportFrom): yield from (a.name for a in n.names)


def borrowed(tr, elsewhere=None):
    "(module, name) of what a syntax tree takes from this package by name and then uses (in `elsewhere`, too)."
    here = [n for t in (tr, *(elsewhere or [])) for n in ast.walk(t)]
    loads = {n.id for n in here if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    modules = {}
    for n in ast.walk(tr):
        if isinstance(n, ast.ImportFrom) and (base := origin(n)).startswith('cycle_nb'):
            for a in n.names:
                if base != 'cycle_nb': yield from [(base.split('.')[1], a.name)]*((a.asname or a.name) in loads)
                elif a.name in cycle_nb._HOMES: yield cycle_nb._HOMES[a.name], a.name
                else: modules[a.asname or a.name] = a.name
        if isinstance(n, ast.Import): modules |= {a.asname: a.name.split('.')[1] for a in n.names if a.asname and a.name.startswith('cycle_nb.')}
    yield from ((modules[n.value.id], n.attr) for n in here if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in modules)


def plain_python(source): return re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M)


def shown(cells, own):
    "(module, name) of what a chapter's cells show of their own module: in a demonstration's code, or as code in the prose after the opening."
    cells = cells[2:]
    trees = [ast.parse(plain_python(c.source)) for c in cells if c.cell_type == 'code' and not is_exported(c) and '%%' not in c.source[:2]]
    made = {n.arg if isinstance(n, ast.arg) else n.id for t in trees for n in ast.walk(t)
            if isinstance(n, ast.arg) or isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    loads = {n.id for t in trees for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    prose = ' '.join(' '.join(re.findall(r'`+([^`]+)`', c.source)) for c in cells if c.cell_type == 'markdown')
    yield from ((own, u) for u in loads - made | set(re.findall(r'[A-Za-z_]\w*', prose)))
    for t in trees: yield from borrowed(t, trees)


@cache
def used_outside():
    "(module, name) of what is used outside its module: by another module, a cell that is not exported, or prose. Tests alone do not make a name public."
    pairs = [borrowed(tree(p)) for p in MODULES + [LIB/f for f in HANDWRITTEN]] + [shown(notebook(p).cells, p.stem[3:]) for p in NOTEBOOKS]
    return {x for xs in pairs for x in xs} | {(home, name) for name, home in cycle_nb._HOMES.items()}


# --- what a module must keep: each check gives what is wrong with a module, in words -------

LOADERS = {'import_module', '__import__', '__builtins__', '__loader__', 'exec_module', 'load_module', 'spec_from_file_location', 'module_from_spec',
           'spec_from_loader', 'run_module', 'run_path'}
RUN = {'exec', 'eval', 'compile', 'globals'}        # as names of their own: `model.eval()` and `re.compile` are something else


def dynamic(path): return hidden(tree(path))


def hidden(tr):
    "Imports hidden in strings, and strings that are run, under whatever name."
    modules = '|'.join(names())
    for n in ast.walk(tr):
        said = []
        if isinstance(n, ast.Name): said = [n.id]*(n.id in LOADERS | RUN)
        if isinstance(n, ast.Attribute): said = [n.attr]*(n.attr in LOADERS)
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            from_ = [] if isinstance(n, ast.Import) or n.level else [n.module]
            said = [x for x in from_ + [a.name for a in n.names] if x.split('.')[0] in {'runpy', 'pkgutil', 'imp', 'zipimport', 'builtins', 'codeop'} | LOADERS]
            said += [a.name for a in n.names if a.name.split('.')[0] == 'importlib' and (a.asname or a.name == 'importlib')]
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            if n.value in LOADERS | {'-c'} or re.fullmatch(rf'(cycle_nb)?\.({modules})(:\w+)?', n.value): said = [repr(n.value)]
        yield from (f'line {n.lineno}: {x}' for x in said)


OPTIONAL = {'fastprogress', 'matplotlib', 'ipywidgets', 'IPython', 'torchvision', 'lpips', 'huggingface_hub', 'fcntl', 'resource', 'scipy',
            'facenet_pytorch', 'dlib', 'mediapipe', 'face_alignment', 'onnx', 'playwright',
            'training'}         # of a clone of StyleGAN2-ADA, where somebody times it


def late_imports(path):
    "Imports inside functions: only of what is heavy or need not be there; the command line must answer before torch is loaded."
    if path.stem in ('cli', 'benchmark_commands'): return
    for n in {m: 1 for f in functions(tree(path)) for m in ast.walk(f)}:
        mods = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or '.'] if isinstance(n, ast.ImportFrom) else []
        if getattr(n, 'level', 0): mods = ['.']
        yield from (f'line {n.lineno}: {m}' for m in mods if m.split('.')[0] not in OPTIONAL)


def upward(path):
    own = names()[path.stem]
    return [f'line {l}: {m}' for m, l in imported(tree(path)) if names().get(m, 99) >= own]


MOST = dict(lesson=220, tool=420)       # exported lines of a chapter
SCREEN = 70                             # lines of an exported cell


def too_large(path):
    "A lesson is one idea, a tool can be read in one sitting, and a cell on one screen."
    ch = chapter(path)
    sizes = [c.source.count('\n') for c in notebook(ch).cells if is_exported(c)]     # without the directive
    most = MOST.get(kind(ch), 220)
    if sum(sizes) > most: yield f'{sum(sizes)} exported lines, a {kind(ch) or "lesson"} may have {most}'
    yield from (f'an exported cell of {s} lines' for s in sizes if s > SCREEN)


def twice(path):
    "Public names that another module has as well."
    for other in MODULES:
        if other != path: yield from (f'{n} (also in {other.stem})' for n in set(open_names(tree(path))) & set(open_names(tree(other))))


def unused(path):
    "Public names that no other module uses, no cell shows and no prose mentions."
    return sorted(n for n in set(open_names(tree(path))) if (path.stem, n) not in used_outside())


def private_imports(path):
    "Private names of other modules."
    for n in ast.walk(tree(path)):
        if isinstance(n, ast.ImportFrom): yield from (f'{n.module}.{a.name}' for a in n.names if re.match('_(?!_)', a.name))


def undocumented(path):
    "Public functions and classes without a word; methods are counted by `test_most_things_are_documented`."
    return [name for name, n in definitions(tree(path)) if not re.search(r'^_|\.', name) and not doc(n)]


WORDS = re.compile(r'(?i)frugal|critic(?!al)|judge|companion|(^|_)roads?(_|$)')


def old_words(path):
    "Words that the field has other names for, in names that users meet."
    for name, n in definitions(tree(path)):
        own = name.split('.')[-1]
        if re.match('_(?!_)', own) or name.startswith('_'): continue
        args = [a.arg for a in ast.walk(n) if isinstance(a, ast.arg)] if isinstance(n, (*DEF, ast.Lambda)) else []
        yield from (f'{name}: {w}' for w in [own, *args] if WORDS.search(w))
    for n in ast.walk(tree(path)):
        if isinstance(n, ast.Constant) and re.fullmatch(r'--[\w-]+', str(n.value)) and WORDS.search(n.value): yield n.value


@cache
def ruff():
    "File -> what ruff says about it."
    p = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'json', '.'], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert p.returncode in (0, 1), p.stderr
    said = {}
    for m in json.loads(p.stdout): said.setdefault(Path(m['filename']), []).append(f'line {m["location"]["row"]}: {m["code"]} {m["message"]}')
    return said


def unclean(path): return ruff().get(path, [])


CHECKS = [dynamic, late_imports, upward, too_large, twice, unused, private_imports, undocumented, old_words, unclean]


@pytest.mark.parametrize('check', CHECKS, ids=lambda f: f.__name__)
@per_module
def test_module(path, check):
    found = list(check(path))
    assert not found, found


def source(folder, name, text):
    (folder/f'{name}.py').write_text(text)
    return folder/f'{name}.py'


def test_hidden_imports_are_seen(tmp_path):
    bad = 'import importlib.util, sys\n"core"\nimportlib.import_module("x")\n__import__("y")\nexec("z")\nmodel.eval()\nt = {"a": "cycle_nb.core"}\n' \
          'run([sys.executable, "-c", "x"])\ndef f():\n  import json\n  from .core import x\n  import torchvision\nasync def g():\n  import csv\n' \
          'class A:\n  async def m(self):\n    def inner():\n      from .vis import show'
    path = source(tmp_path, 'a', bad)
    assert [int(re.search(r'\d+', t)[0]) for t in sorted(dynamic(path))] == [3, 4, 5, 7, 8]
    assert set(late_imports(path)) == {'line 10: json', 'line 11: .', 'line 14: csv', 'line 18: .'}


@pytest.mark.parametrize('text', ['from importlib import import_module as f\nf("x")', 'import importlib as i\ni.reload(x)', 'import importlib', 'import runpy as r',
    'from runpy import run_module', 'from pkgutil import resolve_name as f', 'import pkgutil', 'run = __import__', 'run = exec\nrun("import x")', 'f(eval)',
    'import builtins as b\nb.exec("x")', '__builtins__["exec"]("x")', 'getattr(i, "import_module")("x")', 'globals()["x"] = 1', 'x = compile("a", "", "exec")',
    'import importlib.util\nimportlib.util.spec_from_file_location("a", "b")', 'from importlib.util import module_from_spec as m', 'import imp'])
def test_every_way_to_hide_an_import_is_seen(text): assert list(hidden(ast.parse(text)))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_chapters_hide_no_imports(path):
    "A demonstration may run Python in a process of its own."
    assert not [x for x in hidden(code(path)) if not x.endswith(repr('-c'))]


def test_what_hides_no_import_is_left_alone():
    good = 'import importlib.util, re\nfrom importlib.util import find_spec\nfrom importlib.metadata import version\nfind_spec("torch")\nnet.eval()\nre.compile("a")\n' \
           'importlib.util.find_spec("x")\nself.compile = 1\n"eval"\n"a. core"'
    assert not list(hidden(ast.parse(good)))


def test_every_definition_is_seen(tmp_path):
    "Inside if, try, with, for and match, too, and as a lambda that has a name; not inside a function."
    inside = 'if x:\n  def a(): pass\nelif y:\n  class B:\n    if z:\n      def m(self): pass\nelse: C = 1\n' \
             'try:\n  def d(): pass\nexcept E:\n  def e(): pass\nelse: F: int = 2\nfinally: G = H = 3\n' \
             'with open(p) as i:\n  j: int = 1\nfor k in [q for q in r]: l = 1\nwhile x: m += 1\nmatch x:\n  case 1:\n    def n(): pass\n' \
             'if (o := 1): pass\nasync def p(): pass\ns = lambda x: x\nt: F = lambda: 1\nu, v = 1, lambda: 2\nclass W:\n  f = lambda self: self\n' \
             'T = {"a": lambda: 1}\nx = sorted(y, key=lambda t: t)\ndef z():\n  def hidden(): pass\n  f = lambda: 1\n  alpha = 1'
    path = source(tmp_path, 'bad', inside)
    assert set(open_names(tree(path))) == set('aBCdeFGHijklmnopstuvWTxz')
    found = [name for name, _ in definitions(tree(path))]
    assert sorted(found) == sorted(['a', 'B', 'B.m', 'd', 'e', 'n', 'p', 's', 't', 'u', 'v', 'W', 'W.f', 'z'])
    assert set(undocumented(path)) == {x for x in found if '.' not in x}
    assert set(twice(source(tmp_path, 'b', 'try: pass\nexcept E:\n  if x:\n    def pick_device(): pass\n'))) == {'pick_device (also in core)'}
    assert list(old_words(source(tmp_path, 'c', 'judge = lambda critic: critic\nif x:\n  async def frugal(): pass'))) == ['frugal: frugal', 'judge: judge', 'judge: critic']


def test_every_function_has_a_length():
    "What the limits are set for: all functions, also asynchronous ones and lambdas with a name; a signature is one line."
    tr = ast.parse('f = lambda x: (\n  x,\n  x)\nif x:\n  async def g(\n    a,\n    b,\n  ):\n    "Doc."\n    return 1\nclass A:\n  h = lambda self: 1\n  def i(self):\n    def j(): pass')
    assert sorted(length(n) for n in functions(tr)) == [1, 2, 2, 3, 3]


def test_use_is_seen():
    "A name must be taken from its own module and used: a name or an attribute that only looks alike, or an import that nobody uses, is none."
    tr = lambda text: ast.parse(text)
    assert not set(borrowed(tr('import os\ngrid = 1\nx.grid\ngrid')))
    assert not set(borrowed(tr('from cycle_nb.vis import grid')))
    for text in ('from cycle_nb.vis import grid\ngrid()', 'from .vis import grid as g\nprint(g)', 'from cycle_nb import vis\nvis.grid()', 'from . import vis as v\nv.grid',
                 'import cycle_nb.vis as v\nv.grid'):
        assert set(borrowed(tr(text))) == {('vis', 'grid')}, text
    assert set(borrowed(tr('from cycle_nb import invert'))) == {('inversion', 'invert')}


def test_what_a_chapter_shows_is_seen():
    "Code that is not exported, and prose after the opening; not the opening's list, an exported cell, an attribute, or something else of that name."
    md, py = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    cells = [md('# T\n\n> `title`'), md('*Tool* **It exports** `listed`'), py('#| export\ndef own(): pass\nowns = own()'), md('`told(1)` but not untold'),
             py('%time shown()\nseen(1)\nx.attribute\nmade = 1\nprint(made)\nf = lambda given: given'), py('from cycle_nb.vis import grid'), py('grid(1)')]
    names = {n for m, n in shown(cells, 'me') if m == 'me'}
    assert {'told', 'seen'} <= names and not names & {'title', 'listed', 'own', 'owns', 'untold', 'attribute', 'made', 'given'}
    assert ('vis', 'grid') in set(shown(cells, 'me'))
    assert ('core', 'pick_device') in used_outside() and not {n for _, n in used_outside()} & {'test_use_is_seen', 'not_there'}


def test_sizes_are_seen(monkeypatch):
    monkeypatch.setitem(MOST, 'tool', 10)
    assert 'exported lines' in next(too_large(LIB/'core.py'))
    cell = next(c for c in notebook(CHAPTERS[0]).cells if is_exported(c))
    assert is_exported(cell)
    monkeypatch.setitem(cell, 'source', cell.source + '\n'*80)
    assert 'cell of' in list(too_large(LIB/'core.py'))[1]


def test_names_are_seen(tmp_path, monkeypatch):
    "Doubled, unused, private and old names, and things without a docstring."
    bad = 'from cycle_nb.core import _x\nA = B, C = 1, 2\n_D: int = 3\n' \
          'def pick_device(frugal): pass\nclass LatentCritic:\n  "Yes."\n  def judged(self): pass\n  def _own(self): pass\ndef nobody_calls(): "It."\nopt = "--frugal"\ncritical = 1'
    path = source(tmp_path, 'bad', bad)
    assert open_names(tree(path)) == ['A', 'B', 'C', 'pick_device', 'LatentCritic', 'nobody_calls', 'opt', 'critical']
    assert list(twice(path)) == ['pick_device (also in core)']
    assert set(unused(path)) >= {'LatentCritic', 'nobody_calls'} and not unused(LIB/'core.py')
    assert list(private_imports(path)) == ['cycle_nb.core._x']
    assert undocumented(path) == ['pick_device']
    assert len(list(old_words(path))) == 4


def test_ruff_is_seen(tmp_path):
    "It finds something where there is something, and looks at the library."
    bad = source(tmp_path, 'bad', 'import os\n')
    cmd = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--config', ROOT/'pyproject.toml']
    assert 'F401' in subprocess.run([*cmd, bad], capture_output=True, text=True, timeout=60).stdout
    files = subprocess.run([*cmd, '--show-files', ROOT], capture_output=True, text=True, timeout=60).stdout
    assert all(str(p) in files for p in MODULES) and '_modidx' not in files


def test_the_rest_is_clean():
    rest = {str(p.relative_to(ROOT)): v for p, v in ruff().items() if p not in MODULES}
    assert not rest, rest


def test_most_things_are_documented():
    "Private helpers and methods, too: one line each."
    defs = [(f'{p.stem}.{name}', n) for p in MODULES for name, n in definitions(tree(p)) if not re.search(r'\.__\w+__$', name)]
    bare = [name for name, n in defs if not doc(n)]
    assert len(defs) > 500 and len(bare) <= .05*len(defs), f'{len(bare)} of {len(defs)}: {bare}'


def test_chapters_leave_private_names_alone():
    "A demonstration shows what others may use: private names are shown by their own chapter only."
    bad = [f'{p.stem}: {n.module}.{a.name}' for p in NOTEBOOKS for n in ast.walk(code(p)) if isinstance(n, ast.ImportFrom)
           and (n.module or '').startswith('cycle_nb') for a in n.names if a.name.startswith('_') and not a.name.startswith('__')]
    assert not bad, bad


# --- links ---------------------------------------------------------------------------------

def dead_links(text):
    "Chapters, modules and names of the package that a text mentions and that are not there."
    stems = {p.stem for p in NOTEBOOKS}
    for m in re.finditer(r'(?<![\w.{/-])\d\d_[a-z][a-z_]+(?=\b|\.ipynb)', text):
        if m[0] not in stems: yield m[0]
    for m in re.finditer(r'\b[Cc]hapters? \d+', text): yield m[0] + ' (say its name: numbers move)'
    for m in re.finditer(r'\bcycle_nb\.([a-z_]\w*)(?:\.([A-Za-z]\w*))?', text):
        if m[1] in ('egg', 'ipynb') or m[1].startswith('_'): continue
        if m[1] not in names(): yield m[0]
        elif m[2] and m[2] not in {x for x in public(tree(LIB/f'{m[1]}.py'))} | set(used(tree(LIB/f'{m[1]}.py'))): yield m[0]


@per_notebook
def test_links_are_alive(path):
    cells = [c.source for c in notebook(path).cells]
    found = [d for c in cells for d in dead_links(c)]
    missing = [l for c in notebook(path).cells if c.cell_type == 'markdown' for l in re.findall(r'\]\(([^)#:]+?)(?:#[^)]*)?\)', c.source) if not l.startswith('attachment') and '/' not in l[:1]
               and re.search(r'\.\w+$', l) and not (path.parent/l).exists()]
    assert not found + missing, found + missing


def test_links_of_readme_and_modules_are_alive():
    found = {p.name: d for p in [ROOT/'README.md', *MODULES, *sorted((ROOT/'tools').glob('*.*'))] if (d := list(dead_links(
        re.sub(r'^# (%%|AUTOGENERATED).*$', '', p.read_text(), flags=re.M))))}
    assert not found, found


def test_dead_links_are_seen():
    good = '`00_core` and cycle_nb.core.InputError, cycle_nb.core, nbs/00_core.ipynb'
    assert not list(dead_links(good))
    assert list(dead_links('02_nothing, cycle_nb.nothing, cycle_nb.core.nothing, chapter 7')) == \
        ['02_nothing', 'chapter 7 (say its name: numbers move)', 'cycle_nb.nothing', 'cycle_nb.core.nothing']


@per_module
def test_lines_are_narrow(path):
    text = re.sub(r'^__all__ = \[.*?\]', '', path.read_text(), flags=re.M | re.S)
    wide = [l for l in text.splitlines()[1:] if len(l) > 100]      # line 1: the chapter's promise
    assert not wide, wide


def test_imports_are_light(python):
    "Importing any module, and so the command line, loads nothing that only figures and widgets need."
    mods = [f'cycle_nb.{p.stem}' for p in MODULES]
    assert 'cycle_nb.cli' in mods
    loop = ('import sys, importlib\nfor m in sys.argv[2].split(","):\n  importlib.import_module(m)\n'
            '  for h in sys.argv[1].split(","):\n    if h in sys.modules: print(m, "loads", h); sys.modules.pop(h)')
    assert python(loop, ','.join(HEAVY), ','.join(mods)) == ''


def test_heavy_imports_are_seen(python):
    "The check above can fail."
    assert python('import sys, matplotlib.pyplot; print("matplotlib.pyplot" in sys.modules)') == 'True\n'


# --- weights and packages ------------------------------------------------------------------

def test_weights_are_small():
    total = sum(f.stat().st_size for f in (LIB/'pretrained').rglob('*') if f.is_file())
    assert 0 < total <= 33e6, f'{total/1e6:.1f} MB'             # five encoders of 4.8 MB, a generator of 2.3, feature networks twice


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
    sh(d, sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-index', '--no-build-isolation', '-w', d/'out', d)
    return next((d/'out').glob('*.whl'))


def test_wheel_has_everything(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    want = [p.relative_to(ROOT).as_posix() for p in MODULES + [LIB/f for f in HANDWRITTEN] + WEIGHTS + [w.with_suffix('.json') for w in WEIGHTS]]
    want += ['cycle_nb/web/page.html']
    want += [f'cycle_nb/samples/{p.name}' for p in (ROOT/'data'/'samples').glob('*.png')]
    want += [f'cycle_nb/records/{p.name}' for p in (ROOT/'data'/'results').glob('*.json')]
    assert not set(want) - inside and sum('/samples/' in w for w in want) >= 12
    meta = {n.split('/')[-1]: zipfile.ZipFile(wheel).read(n).decode() for n in inside if 'dist-info' in n}
    assert 'cycle-nb = cycle_nb.cli:main' in meta['entry_points.txt'] and 'LICENSE' in meta
    assert 'Requires-Python: >=3.11' in meta['METADATA'] and 'torch>=2.6' in meta['METADATA']
    tops = {n.split('/')[0] for n in inside}
    assert len(tops) == 2, f'only the package and its metadata: {tops}'


def test_wheel_runs_elsewhere(wheel, tmp_path):
    "Unpacked in another place, it finds its own weights and its command answers."
    zipfile.ZipFile(wheel).extractall(tmp_path)
    show = ('import sys; sys.path.insert(0, "."); import cycle_nb.checkpoints as w, cycle_nb.models as c; '
            'assert c.package_dir().parent.samefile("."); print(w.load_generator("sdfaces64").resolution)')
    sh(tmp_path, sys.executable, '-c', show)
    sh(tmp_path, sys.executable, '-c', 'from cycle_nb.cli import main; main(["--help"])')


@pytest.mark.parametrize('name', ['08_images', '13_latents'])      # sample images, weights
def test_notebooks_run_with_only_the_wheel(wheel, tmp_path, name):
    "From an empty folder; `make matrix` does so with all of them, and with other versions of what they need."
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    nb = nbformat.from_dict(notebook(ROOT/'nbs'/f'{name}.ipynb'))
    source = f'from cycle_nb.models import package_dir, records_dir\nassert str(package_dir()).startswith({str(tmp_path)!r}), package_dir()\nassert (records_dir()/"quality.json").is_file()'
    nb.cells.append(nbformat.v4.new_code_cell(source))
    nbformat.write(nb, tmp_path/f'{name}.ipynb')
    wrong, _, seconds = matrix.run_alone(sys.executable, tmp_path/f'{name}.ipynb', tmp_path, PYTHONPATH=str(tmp_path/'site'))
    assert not wrong and seconds > 0, wrong


def test_notebook_that_fails_is_said(tmp_path):
    "The program of `make matrix` itself: an error, and a kernel that dies."
    for source in ('1/0', 'import os; os._exit(3)'):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path/'x.ipynb')
        wrong, *_ = matrix.run_alone(sys.executable, tmp_path/'x.ipynb', tmp_path)
        assert ('ZeroDivisionError' in wrong) if '/' in source else ('died' in wrong), wrong


def test_every_cell_can_be_run():
    "Who runs a notebook as a whole runs cells that tests leave out, too; what takes hours stands behind a flag."
    left_out = [p.stem for p in NOTEBOOKS for c in notebook(p).cells if re.search(r'^#\|\s*(eval:\s*false|slow|gpu)\s*$', c.source, re.M)]
    assert NOTEBOOKS and not left_out

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


def test_matrix_tries_what_is_required(monkeypatch):
    "The oldest and the newest version of settings.ini's own bounds; its tests are there."
    monkeypatch.syspath_prepend(str(ROOT/'tools'))
    import matrix
    wanted = 'torch>=2.6\n  fastprogress>=1.0.3\n  ipywidgets>=7.7,<9\n'
    assert matrix.bounds(wanted, 'ipywidgets') == ['ipywidgets==7.7.*', 'ipywidgets>=7.7,<9']
    assert matrix.bounds(wanted, 'fastprogress')[0] == 'fastprogress==1.0.3'
    ini = (ROOT/'settings.ini').read_text()
    for name, (file, *_) in matrix.TESTS.items():
        oldest, newest = matrix.bounds(ini, name)
        assert oldest.startswith(f'{name}==') and newest in ini and (ROOT/file).exists()
    assert re.search('bar|lines', ' '.join(n for n, _ in definitions(tree(ROOT/'tests'/'test_learner.py'))))


def test_continuous_check_is_runnable():
    run = ROOT/'.ci'/'run'
    text = run.read_text()
    assert run.stat().st_mode & 0o111 and 'make test' in text
    demands = re.search(r'export (\w+)=1', text)[1]
    assert demands in (ROOT/'tests'/'test_explore_browser.py').read_text()


def to_do(modules):
    "What each module still has to do, as a list."
    for path in sorted(MODULES, key=lambda p: names().get(p.stem, 99)):
        if modules and path.stem not in modules: continue
        found = [f'  {check.__name__}: {x}' for check in CHECKS for x in check(path)]
        ch = chapter(path)
        if not kind(ch): found.append('  the second cell says neither *Lesson* nor *Tool*')
        found += dict.fromkeys(f'  link: {d}' for c in notebook(ch).cells for d in dead_links(c.source))
        if found: print(f'{ch.stem}', *found, sep='\n')
    rest = {p.name: dict.fromkeys(dead_links(p.read_text())) for p in (ROOT/'README.md', ROOT/'nbs'/'index.ipynb')}
    for name, found in rest.items():
        if found and not modules: print(name, *(f'  link: {d}' for d in found), sep='\n')


if __name__ == '__main__': to_do(sys.argv[1:])
