"Shared by all tests: where things are, and the browser, which the continuous check demands."
import os, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def root():
    "The repository."
    return ROOT


@pytest.fixture(scope='session')
def browser():
    "Path of a Chromium; without one the test is skipped, or fails where CYCLE_NB_BROWSER=require."
    names = 'chromium', 'chromium-browser', 'google-chrome'
    found = os.environ.get('CYCLE_NB_CHROMIUM') or next(filter(None, map(shutil.which, names)), None)
    if found: return found
    if os.environ.get('CYCLE_NB_BROWSER') == 'require': pytest.fail('no Chromium: apt install chromium')
    pytest.skip('no Chromium here (apt install chromium)')


@pytest.fixture
def python(tmp_path):
    "Run Python code in its own process, outside the repository; returns what it prints."
    def run(code, *args, timeout=120):
        env = os.environ | {'PYTHONPATH': str(ROOT)}
        p = subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=tmp_path, env=env,
                           capture_output=True, text=True, timeout=timeout)
        assert p.returncode == 0, p.stderr
        return p.stdout
    return run
