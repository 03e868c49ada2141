"The teaching kit: complete, graded by anyone's tools, and by nbgrader where it is installed."
import importlib.util, json, os, re, shutil, subprocess, sys
from pathlib import Path
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors import safe_open
from safetensors.torch import save_file
from conftest import ROOT

KIT = ROOT/'teaching'
SOURCES = sorted((KIT/'source').glob('*/*.ipynb'))
SOLUTION = re.compile(r'^([ \t]*)### BEGIN SOLUTION.*?### END SOLUTION[ \t]*', re.M | re.S)
STUB = r'\1# YOUR CODE HERE\n\1raise NotImplementedError()'
per_session = pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.stem)
HERE = importlib.util.find_spec('nbgrader')
graded_here = pytest.mark.skipif(not HERE, reason='nbgrader is not installed: pip install -e .[teach]')


def cells(path): return nbformat.read(path, 4).cells


def role(cell, key): return cell.metadata.get('nbgrader', {}).get(key, False)


def exercises(path):
    "Answer and check of each exercise."
    found = cells(path)
    return [(a, b) for a, b in zip(found, found[1:]) if role(a, 'solution')]


def students(nb):
    "What a student gets: solutions taken out."
    for c in nb.cells: c.source = SOLUTION.sub(STUB, c.source)
    return nb


def test_there_are_enough():
    assert len(SOURCES) == 4 and sum(len(exercises(p)) for p in SOURCES) >= 40


def test_names_are_unique_and_points_are_given():
    ids = [role(c, 'grade_id') for p in SOURCES for c in cells(p)]
    assert all(ids) and len(set(ids)) == len(ids)
    for path in SOURCES:
        for answer, check in exercises(path):
            assert SOLUTION.search(answer.source) and role(check, 'grade') and role(check, 'locked') and role(check, 'points') == 1, answer.source
            assert 'assert' in check.source and 'SOLUTION' not in check.source, check.source
        assert sum(bool(role(c, 'grade')) for c in cells(path)) == len(exercises(path))


@per_session
def test_every_exercise_names_its_chapter(path):
    said = [re.search(r'\*From\* `(\d\d_\w+)`', c.source)[1] for c in cells(path) if role(c, 'grade_id').endswith('-text')]
    assert len(said) == len(exercises(path)) and all((ROOT/'nbs'/f'{s}.ipynb').exists() for s in said)
    plan = next(l for l in (KIT/'README.md').read_text().splitlines() if re.match(rf'\| {path.stem[-1]}\. ', l))
    assert set(said) - {'47_statistics'} <= set(re.findall(r'`(\d\d_\w+)`', plan)) and f'| {len(said)} |' in plan


def test_plan_speaks_of_what_is_there():
    plan = (KIT/'README.md').read_text() + (KIT/'mistakes.md').read_text()
    assert all((ROOT/'nbs'/f'{s}.ipynb').exists() for s in re.findall(r'`(\d\d_\w+)`', plan))
    there = {int(p.stem[-1]): len(exercises(p)) for p in SOURCES}
    asked = re.findall(r'(?<![\d.])([1-4])\.(\d+)(?![\d.])', re.sub(r'Python 3[^,.]*|https?://\S+|^\| [1-4]\.', '', plan, flags=re.M))
    assert len(asked) > 40 and all(1 <= int(k) <= there[int(s)] for s, k in asked), asked
    for table in re.findall(r'\| minutes \|.*?\n\n', plan, re.S):
        assert sum(map(int, re.findall(r'^\| (\d+) \|', table, re.M))) == 180, table


@per_session
def test_students_version_is_the_instructors_without_solutions(path):
    ours = students(nbformat.read(path, 4)).cells
    theirs = cells(KIT/'release'/path.parent.name/path.name)
    assert [(c.cell_type, c.source) for c in ours] == [(c.cell_type, c.source) for c in theirs], 'run make teaching'
    for a, b in zip(ours, theirs):
        assert not b.get('outputs') and all(role(a, k) == role(b, k) for k in ('grade', 'grade_id', 'solution', 'points'))


def points(nb, folder):
    "Checks that run without an error."
    NotebookClient(nb, timeout=300, allow_errors=True, kernel_name='python3', resources={'metadata': {'path': str(folder)}}).execute()
    return [role(c, 'grade_id') for c in nb.cells if role(c, 'grade') and not any(o.output_type == 'error' for o in c.outputs)]


@pytest.fixture
def library(monkeypatch): monkeypatch.setenv('PYTHONPATH', str(ROOT))


@per_session
def test_solutions_get_all_points_and_nothing_gets_none(path, tmp_path, library):
    "Without nbgrader: both versions executed, in a folder of their own."
    assert len(points(nbformat.read(path, 4), tmp_path)) == len(exercises(path))
    assert points(students(nbformat.read(path, 4)), tmp_path) == []


def test_exercises_do_not_lean_on_each_other(tmp_path, library):
    "With only every other exercise solved, those and no others are right."
    nb = nbformat.read(SOURCES[-1], 4)
    want, k = [], 0
    for answer, check in zip(nb.cells, nb.cells[1:]):
        if role(answer, 'solution'):
            if k % 2: answer.source = SOLUTION.sub(STUB, answer.source)
            else: want.append(role(check, 'grade_id'))
            k += 1
    assert points(nb, tmp_path) == want


@pytest.mark.parametrize('path', SOURCES[1:3], ids=lambda p: p.stem)
def test_other_networks_change_no_mark(path, tmp_path, monkeypatch):
    "With all shipped networks spoilt by noise, every solution is still right: the checks depend on no network's figures."
    shutil.copytree(ROOT/'cycle_nb', tmp_path/'cycle_nb', ignore=shutil.ignore_patterns('__pycache__'))
    rng = torch.Generator().manual_seed(0)
    for f in (tmp_path/'cycle_nb'/'pretrained'/'sdfaces64').glob('*.safetensors'):
        with safe_open(f, 'pt') as file: meta, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        for k, v in tensors.items():
            if v.is_floating_point() and v.numel() > 1 and 'running' not in k:
                tensors[k] = (v.float() + .3*v.float().std()*torch.randn(v.shape, generator=rng)).to(v.dtype)
        save_file(tensors, f, metadata=meta)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    nb = nbformat.read(path, 4)
    nb.cells.insert(0, nbformat.v4.new_code_cell('import cycle_nb; print(cycle_nb.__file__)'))
    assert len(points(nb, tmp_path)) == len(exercises(path)) and str(tmp_path) in nb.cells[0].outputs[0].text


def test_cleaning_keeps_the_points(tmp_path):
    "nbdev-clean leaves an exercise's metadata as they are; without the setting it would not."
    text, clean = SOURCES[0].read_text(), Path(sys.executable).with_name('nbdev-clean')
    for setting, kept in (('allowed_cell_metadata_keys', True), ('nothing_of_this_name', False)):
        d = tmp_path/setting
        (d/'nbs').mkdir(parents=True)
        (d/'pyproject.toml').write_text((ROOT/'pyproject.toml').read_text().replace('allowed_cell_metadata_keys', setting))
        (d/'nbs'/'00_x.ipynb').write_text(text)
        p = subprocess.run([clean], cwd=d, capture_output=True, text=True, timeout=120)
        assert p.returncode == 0, p.stderr
        assert ((d/'nbs'/'00_x.ipynb').read_text() == text) == kept and ('grade_id' in (d/'nbs'/'00_x.ipynb').read_text()) == kept


def nbgrader(course, *args):
    env = os.environ | dict(PYTHONPATH=str(ROOT), PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    p = subprocess.run([sys.executable, '-m', 'nbgrader', *args], cwd=course, env=env, capture_output=True, text=True, timeout=900)
    assert p.returncode == 0, p.stdout + p.stderr


@graded_here
@per_session
def test_nbgrader_grades(path, tmp_path):
    "Generated by it, handed in solved and empty, graded by it."
    from nbgrader.api import Gradebook
    name = path.stem
    shutil.copy(KIT/'nbgrader_config.py', tmp_path)
    shutil.copytree(path.parent, tmp_path/'source'/name)
    nbgrader(tmp_path, 'generate_assignment', name, '--create')
    made = cells(tmp_path/'release'/name/path.name)
    assert [c.source for c in made] == [c.source for c in cells(KIT/'release'/name/path.name)], 'run make teaching'
    for student, handed_in in (('solved', path), ('empty', tmp_path/'release'/name/path.name)):
        (tmp_path/'submitted'/student/name).mkdir(parents=True)
        shutil.copy(handed_in, tmp_path/'submitted'/student/name)
    nbgrader(tmp_path, 'autograde', name, '--create')
    with Gradebook(f'sqlite:///{tmp_path/"gradebook.db"}') as book:
        full, none = (book.find_submission(name, s) for s in ('solved', 'empty'))
        assert full.max_score == len(exercises(path)) == full.score and none.score == 0 and not full.needs_manual_grade
