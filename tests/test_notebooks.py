"Each notebook runs from top to bottom, by nbdev-test in a process of its own, with a time limit."
import os, re, subprocess, sys
from pathlib import Path
import nbformat
import pytest
from conftest import ROOT

LIMIT = int(os.environ.get('CYCLE_NB_NOTEBOOK_SECONDS', 300))
SKIPPED = re.compile(r'^#\|\s*(eval:\s*false|slow|gpu)\s*$', re.M)
NBS = sorted((ROOT/'nbs').glob('[!._]*.ipynb'))


def run(path, limit=LIMIT):
    "nbdev-test on one notebook: exit code (None when it ran too long), all its output."
    cmd = [Path(sys.executable).with_name('nbdev-test'), path, '--n-workers', '0',
           '--cell-timing-min', '-1', '--cell-timeout', str(limit)]
    try:
        p = subprocess.run(cmd, cwd=path.parent, env=dict(os.environ, PYTHONUNBUFFERED='1'),    # a dying process says how far it came
                           capture_output=True, text=True, timeout=limit+30)
        return p.returncode, p.stdout + p.stderr
    except subprocess.TimeoutExpired as e:
        return None, ''.join((x or b'').decode(errors='replace') for x in (e.stdout, e.stderr))


def failing_cell(nb, name, out):
    "Index of the cell that failed: named in the report, else the first that did not finish."
    if m := re.search(r'Cell #(\d+)', out): return int(m[1]) - 1
    done = re.findall(rf'^{re.escape(name)}:(\S+?): [\d.]+s', out, re.M)
    last = max((i for i, c in enumerate(nb.cells) if c.get('id') in done), default=-1)
    ran = [i for i, c in enumerate(nb.cells) if c.cell_type == 'code' and not SKIPPED.search(c.source)]
    return next((i for i in ran if i > last), 0)


def report(path, code, out):
    "Which notebook, which cell, its source, and what was said."
    nb = nbformat.read(path, 4)
    i = failing_cell(nb, path.name, out)
    how = {None: f'ran longer than {LIMIT} s', 1: 'failed'}.get(code, f'died with exit code {code}')
    said = re.sub(rf'^{re.escape(path.name)}:.*\n', '', out, flags=re.M)[-4000:]
    return f'{path.name} {how} in cell {i+1}:\n\n{nb.cells[i].source}\n\n{said}'


@pytest.mark.parametrize('path', NBS, ids=lambda p: p.stem)
def test_notebook(path):
    code, out = run(path)
    if code != 0: pytest.fail(report(path, code, out), pytrace=False)
    assert 'Success' in out, f'{path.name}: nothing ran\n{out}'


def test_there_are_notebooks(): assert len(NBS) >= 20


@pytest.mark.parametrize('source, words', [
    ('# a comment to find\nassert 1 == 2, "not equal"', ['failed in cell 4', 'a comment to find', 'not equal']),
    ('# a comment to find\nimport os; os._exit(9)', ['exit code 9 in cell 4', 'a comment to find']),
    ('# a comment to find\nimport time; time.sleep(60)', ['cell 4', 'a comment to find'])])
def test_failures_are_named(tmp_path, source, words):
    "The report itself: a wrong assertion, a dying process, an endless cell."
    cells = [nbformat.v4.new_markdown_cell('# T\n> d'), nbformat.v4.new_code_cell('x = 1'),
             nbformat.v4.new_code_cell('#| eval: false\nraise SystemExit'), nbformat.v4.new_code_cell(source)]
    spec = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    (tmp_path/'pyproject.toml').write_text((ROOT/'pyproject.toml').read_text())
    (tmp_path/'nbs').mkdir()
    path = tmp_path/'nbs'/'broken.ipynb'
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    code, out = run(path, limit=5)
    assert code != 0
    text = report(path, code, out)
    assert text.startswith('broken.ipynb') and all(w in text for w in words), text
