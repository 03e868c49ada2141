"A bundle of untrained networks in the shipped layout, so that tests of the pipeline need no trained ones."
import contextlib, os, subprocess, sys
from pathlib import Path
import pytest, torch
from cycle_nb.models import make_card
from cycle_nb.files import save_image
from cycle_nb.core import seed_all
from cycle_nb.encoder import Encoder
from cycle_nb.features import Attributes, Identity, Perceptual
from cycle_nb.sdfaces import render, sample_factors
from cycle_nb.stylegan2 import Generator
from cycle_nb.models import save_model

BODY = dict(widths=(8, 8, 12, 12, 16), depth=(1, 1, 1, 1, 1))

@contextlib.contextmanager
def default_dtype(dtype):
    "Tensors of that type unless told otherwise: a host that changed it."
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(before)

def write_bundle(folder, edits=('age', 'glasses', 'smile', 'yaw')):
    "Generator, feature networks, encoders and directions with random weights."
    seed_all(0)
    folder.mkdir(parents=True, exist_ok=True)
    G = Generator(channel_base=512, channel_max=16)
    save_model(G, folder/'generator.safetensors', make_card('generator', seed=0))
    for name, net in dict(perceptual=Perceptual(**BODY), identity=Identity(**BODY), attributes=Attributes(**BODY)).items():
        save_model(net, folder/f'{name}.safetensors', make_card(name, seed=0))
    for name, stage in dict(w=0, wplus=G.num_ws - 1, cycle=0).items():
        E = Encoder(w_avg=G.w_avg, stage=stage).eval()
        for head in E.heads[1:]: torch.nn.init.normal_(head.linear.bias, std=2.)
        save_model(E, folder/f'{name}.safetensors', make_card(name, seed=0))
    write_directions(folder, {k: torch.randn(G.w_dim) for k in edits})
    return folder

ROOT = Path(__file__).resolve().parent.parent
FAST = ['--refine', '1', '--tune', '2', '--seed', '1']

@pytest.fixture(scope='session')
def bundle(tmp_path_factory):
    "The folder of an untrained bundle."
    return write_bundle(tmp_path_factory.mktemp('bundle')/'tiny')

@pytest.fixture(scope='session')
def faces(tmp_path_factory):
    "Eight image files."
    folder = tmp_path_factory.mktemp('faces')
    for i, img in enumerate(render(sample_factors(8, torch.Generator().manual_seed(0)), 96)): save_image(img, folder/f'f{i}.png')
    return sorted(folder.iterdir())

def command(*args):
    "The installed command, or the same entry point where there is none."
    script = Path(sys.executable).with_name('cycle-nb')
    run = [str(script)] if script.exists() else [sys.executable, '-c', 'import sys; from cycle_nb.cli import main; sys.exit(main())']
    return [*run, *map(os.fspath, args)]

ENV = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))

def cli(*args, **kw):
    "Run `cycle-nb`; gives exit code, stdout and stderr."
    return subprocess.run(command(*args), capture_output=True, text=True, errors='replace', timeout=600, env=ENV, **kw)

def write_directions(folder, directions):
    from cycle_nb.models import save_tensors
    save_tensors(folder/'directions.safetensors', directions, make_card('directions', seed=0))
