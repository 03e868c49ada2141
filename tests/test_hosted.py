"The badge and the install cell that tools/nb.py puts into the notebooks."
import json, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pytest
from nbclient import NotebookClient
from conftest import ROOT

NAMES = '00_core', '10_layers', '54_real_faces', 'index'      # with and without an export, a lesson that exports nothing, the front page


@pytest.fixture
def copy(tmp_path):
    "Part of the repository, elsewhere."
    for n in ('tools', 'settings.ini', 'pyproject.toml'):
        (shutil.copytree if (ROOT/n).is_dir() else shutil.copy)(ROOT/n, tmp_path/n)
    (tmp_path/'nbs').mkdir()
    (tmp_path/'cycle_nb').mkdir()
    for n in NAMES: shutil.copy(ROOT/'nbs'/f'{n}.ipynb', tmp_path/'nbs')
    return tmp_path


def run(copy, *args): return subprocess.run([sys.executable, copy/'tools'/'nb.py', 'hosted', *args], cwd=copy, capture_output=True, text=True, timeout=200)


def sources(copy): return {n: (copy/'nbs'/f'{n}.ipynb').read_text() for n in NAMES}


def is_install(cell): return '%pip install' in ''.join(cell['source'])


def test_once_twice_and_with_another_address(copy):
    "Twice is as good as once; a new address replaces the old one; all else stays, and nbdev finds it clean and exports the same."
    old = {n: json.loads(t)['cells'] for n, t in sources(copy).items()}
    had_some = any(is_install(c) for c in old['10_layers'])
    assert run(copy).returncode == 0
    once = sources(copy)
    assert run(copy).returncode == 0 and sources(copy) == once
    ini = (copy/'settings.ini').read_text()
    (copy/'settings.ini').write_text(ini.replace('github.com/your_name/cycle_nb', 'github.com/somebody/other'))
    assert run(copy).returncode == 0
    for name, text in sources(copy).items():
        cells = json.loads(text)['cells']
        install = [c for c in cells if is_install(c)]
        assert len(install) == 1 and 'somebody/other"' in ''.join(install[0]['source']) and 'your_name' not in text
        assert text.count(f'colab.research.google.com/github/somebody/other/blob/main/nbs/{name}.ipynb') == 1
        kept = [c for c in cells if not is_install(c)]
        before = [c for c in old[name] if not is_install(c)]
        assert kept[0] == before[0] and kept[2:] == before[2:] and len(kept) == len(before)
        assert had_some or ''.join(kept[1]['source']).startswith(''.join(before[1]['source']))
        assert cells.index(install[0]) == (3 if 'default_exp' in ''.join(cells[2]['source']) else 2)
    assert len({''.join(c['source']) for t in sources(copy).values() for c in json.loads(t)['cells'] if is_install(c)}) == 1
    last = sources(copy)
    p = subprocess.run([Path(sys.executable).with_name('nbdev-clean')], cwd=copy, capture_output=True, text=True)
    assert p.returncode == 0 and sources(copy) == last


def test_address_that_gives_no_badge_is_refused(copy):
    ini = (copy/'settings.ini').read_text()
    (copy/'settings.ini').write_text(ini.replace('https://github.com/your_name/cycle_nb', 'https://example.org/cycle_nb'))
    before = sources(copy)
    p = run(copy, '10_layers')
    assert p.returncode == 1 and p.stderr.count('\n') == 1 and 'github.com/OWNER/NAME' in p.stderr and sources(copy) == before


def test_cell_does_nothing_where_the_package_is(copy, monkeypatch):
    "In a real kernel: no pip, no output. Where the package is missing it asks pip, and pip says what it was asked for."
    assert run(copy, '10_layers').returncode == 0
    cell = next(c for c in nbformat.read(copy/'nbs'/'10_layers.ipynb', 4).cells if is_install(c))
    def executed(source):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        NotebookClient(nb, timeout=100, kernel_name='python3', allow_errors=True).execute()
        return str(nb.cells[0].outputs)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('GIT_ALLOW_PROTOCOL', 'none')        # whatever happens, nothing is fetched
    assert executed(cell.source) == '[]'
    assert 'your_name' in executed(cell.source.replace('"cycle_nb"', '"no_such_package"'))


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('[!._]*.ipynb')), ids=lambda p: p.stem)
def test_every_notebook_runs_where_nothing_is_installed(path):
    "One badge, which opens this notebook and no other, and one install cell, before the first import of the package."
    cells = json.loads(path.read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells)
    assert text.count('colab-badge.svg') == 1 and text.count(f'/blob/main/nbs/{path.stem}.ipynb)') == 1
    first = next((i for i, c in enumerate(cells) if c['cell_type'] == 'code' and 'cycle_nb' in ''.join(c['source']) and not is_install(c)), len(cells))
    assert [i < first for i, c in enumerate(cells) if is_install(c)] == [True]
