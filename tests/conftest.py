"Shared by all tests."
import errno, os, socket, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ['OMP_NUM_THREADS'] = '1'      # several processes at once: a core for each


def pytest_collection_modifyitems(items):
    "The tests of a module share their fixtures, so they stay in one process; notebooks go wherever there is room."
    for i in items:
        if i.path.stem != 'test_notebooks': i.add_marker(pytest.mark.xdist_group(i.path.stem))


def connect_nearby(self, address, connect=socket.socket.connect):
    "Tests talk to this computer only."
    near = self.family == getattr(socket, 'AF_UNIX', None) or address[0] in ('localhost', '127.0.0.1', '::1')
    if not near: raise OSError(errno.ENETUNREACH, f'a test asked the network for {address[0]}')
    return connect(self, address)


@pytest.fixture(autouse=True, scope='session')
def no_network():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(socket.socket, 'connect', connect_nearby)
        yield


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
