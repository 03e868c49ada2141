"The explorer as a reader meets it: a real JupyterLab or Voilà, a real browser, controls that are moved."
import contextlib, os, re, secrets, shutil, socket, subprocess, sys, time, urllib.request
from importlib.metadata import version
from pathlib import Path
import nbformat
import pytest, torch
from cycle_nb.bundle import Bundle
from cycle_nb.encoder import Encoder
from cycle_nb.explore import Explorer
from cycle_nb.features import Perceptual
from cycle_nb.inversion import invert
from cycle_nb.models import pretrained_path
from cycle_nb.stylegan2 import Generator
from tiny import BODY, ENV, ROOT, bundle

FLAGS = ('--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
# The labels of ipywidgets 7 ask for MathJax 2, which JupyterLab 4 does not have; they are drawn all the same.
LABELS = re.compile("reading 'Queue'" if version('ipywidgets').startswith('7.') else '(?!)')
NOISE = re.compile(r'favicon|Failed to load resource|WebSocket|deprecated', re.I)

def need(found, what, demand='CYCLE_NB_DEMAND_BROWSER'):
    "Skip with a reason, or fail where it is demanded."
    if found: return found
    if os.environ.get(demand) == '1': pytest.fail(f'{what}, and {demand}=1 demands it')
    pytest.skip(what)

def find_browser():
    names = os.environ.get('CYCLE_NB_BROWSER'), 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
    return next(filter(None, (shutil.which(n) for n in names if n)), None)

STILL = '''import torch
from cycle_nb.vis import player
player([torch.full((3, 32, 32), k/2 - 1.) for k in range(5)], 'without the kernel', k=range(5))'''

@pytest.fixture
def notebook(bundle, tmp_path):
    "A copy of the chapter; with the untrained bundle where the trained one is not there yet."
    nb = nbformat.read(ROOT/'nbs'/'43_explore.ipynb', 4)
    whole = all((pretrained_path('sdfaces64')/f'{n}.safetensors').is_file() for n in ('generator', 'w', 'wplus', 'cycle', 'directions', 'identity'))
    nb.metadata.kernelspec = dict(display_name='python3', language='python', name='python3')
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs, cell.execution_count = [], None
        if not whole and 'sdfaces64' in cell.source: cell.source = cell.source.replace("'sdfaces64'", repr(str(bundle)))
    nb.cells.append(nbformat.v4.new_code_cell(STILL))
    nbformat.write(nb, tmp_path/'explore.ipynb')
    return tmp_path/'explore.ipynb'

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

@contextlib.contextmanager
def served(cmd, address, env, log):
    "A server that answers at an address and ends with the test."
    with log.open('w') as out: p = subprocess.Popen(cmd, env=env, stdout=out, stderr=out)
    try:
        end = time.time() + 300
        while True:
            assert p.poll() is None and time.time() < end, log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=2); break
            time.sleep(.3)
        yield
    finally:
        p.terminate()
        try: p.wait(15)
        except subprocess.TimeoutExpired: p.kill()

@pytest.fixture
def lab(notebook, tmp_path):
    "A JupyterLab on loopback with a token; its address."
    jupyter = Path(sys.executable).with_name('jupyter-lab')
    need(jupyter.exists(), 'JupyterLab is not installed here')
    token, home, port = secrets.token_hex(12), tmp_path/'home', free_port()
    settings = home/'settings'/'@jupyterlab'
    for name, text in {'notebook-extension/tracker': '{"windowingMode": "none"}', 'apputils-extension/notification': '{"fetchNews": "false", "checkForUpdates": false}'}.items():
        (settings/name).parent.mkdir(parents=True, exist_ok=True)
        (settings/f'{name}.jupyterlab-settings').write_text(text)
    env = dict(ENV, JUPYTERLAB_SETTINGS_DIR=str(home/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(home/'spaces'), JUPYTER_CONFIG_DIR=str(home/'config'),
               JUPYTER_RUNTIME_DIR=str(home/'run'), IPYTHONDIR=str(home/'ipython'))
    cmd, base = [jupyter, '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}', '--ServerApp.port_retries=0',
        f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={notebook.parent}', '--LabApp.expose_app_in_browser=True'], f'http://127.0.0.1:{port}'
    with served(cmd, f'{base}/api/status?token={token}', env, tmp_path/'lab.log'): yield f'{base}/lab/tree/{notebook.name}?token={token}'

@pytest.fixture
def voila(notebook, tmp_path):
    "The chapter as a page that Voilà makes, from a folder with nothing else; its address. CYCLE_NB_VOILA names the program of another environment, whose package is shown then."
    other = os.environ.get('CYCLE_NB_VOILA')
    program = Path(other or Path(sys.executable).with_name('voila'))
    need(program.exists(), 'Voilà is not installed here (set CYCLE_NB_VOILA to its path)', 'CYCLE_NB_DEMAND_VOILA')
    folder, home, port = tmp_path/'pages', tmp_path/'home', free_port()
    folder.mkdir()
    shutil.move(notebook, folder)
    env = {k: v for k, v in ENV.items() if not (other and k in ('PYTHONPATH', 'JUPYTER_PATH', 'JUPYTERLAB_DIR'))}
    env |= dict(JUPYTER_CONFIG_DIR=str(home/'config'), JUPYTER_RUNTIME_DIR=str(home/'run'), IPYTHONDIR=str(home/'ipython'))
    base = f'http://127.0.0.1:{port}'
    with served([program, folder, '--no-browser', '--Voila.ip=127.0.0.1', f'--port={port}'], base, env, tmp_path/'voila.log'):
        yield f'{base}/voila/render/{notebook.name}'

@pytest.fixture
def page(tmp_path):
    need(find_browser(), 'no Chromium or Chrome found (set CYCLE_NB_BROWSER to its path)')
    playwright = pytest.importorskip('playwright.sync_api') if os.environ.get('CYCLE_NB_DEMAND_BROWSER') != '1' else __import__('playwright.sync_api').sync_api
    with playwright.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=find_browser(), args=FLAGS)
        page = browser.new_page(viewport=dict(width=1300, height=1000))
        page.set_default_timeout(180_000)      # what is not found yet is computed first, as long as that takes
        page.problems = []
        page.on('console', lambda m: page.problems.append(m.text) if m.type == 'error' and not NOISE.search(m.text) else None)
        page.on('pageerror', lambda e: page.problems.append(str(e)) if not LABELS.search(str(e)) else None)
        yield page
        browser.close()

PANEL = '.cycle-explorer-panel'

RUN_ALL = '''async () => { const context = jupyterapp.shell.currentWidget.context;
    await context.ready; await context.sessionContext.ready; await context.sessionContext.session.kernel.info;
    jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ranAll = true }) }'''

def shown(page, *at):
    "What the panel shows, pictures and numbers, once it stands at `at` (such as 't=0.5')."
    end, there = time.time() + 180, set()
    while time.time() < end and not set(at) <= there:
        page.wait_for_timeout(100)
        there = set((page.locator(f'{PANEL} [data-at]').get_attribute('data-at') or '').split())
    assert set(at) <= there, f'expected {at}, the panel stands at {there}'
    return page.evaluate('''s => { const p = document.querySelector(s);
        return {imgs: Object.fromEntries([...p.querySelectorAll('img')].map(i => [i.alt, i.src])),
                numbers: Object.fromEntries([...p.querySelectorAll('[data-number]')].map(b => [b.dataset.number, +b.textContent]))} }''', PANEL)

def press(page, control, key, times):
    "Move a slider by its handle and the keyboard."
    page.locator(f'.cycle-explorer-{control} :is(.noUi-handle, .ui-slider-handle)').first.focus()
    for _ in range(times): page.keyboard.press(key)

def move_everything(page, picture):
    "Every control, by mouse and keyboard: what it has to change changes, and nothing else."
    page.locator(PANEL).scroll_into_view_if_needed()
    first = shown(page, 't=4')
    assert {'target', 'reconstruction', 'edit', 'true edit', 'difference', 'tuned: reconstruction', 'tuned: edit'} <= set(first['imgs'])
    assert page.locator(f'{PANEL} svg [data-here]').count() == 2 and page.locator(f'{PANEL} svg circle title').count() == 10
    press(page, 't', 'ArrowLeft', 16)
    slid = shown(page, 't=0', 'tuned=True')
    assert slid['imgs']['reconstruction'] != first['imgs']['reconstruction'] and slid['imgs']['target'] == first['imgs']['target']
    assert slid['imgs']['tuned: edit'] != first['imgs']['tuned: edit']
    assert slid['numbers']['from_w'] == 0 < first['numbers']['from_w'] and slid['numbers']['mse'] > first['numbers']['mse']
    page.locator('.cycle-explorer-tuned input').click()
    untuned = shown(page, 'tuned=False')
    assert 'tuned: edit' not in untuned['imgs'] and untuned['imgs']['edit'] == slid['imgs']['edit']
    press(page, 'strength', 'ArrowRight', 6)
    edited = shown(page, 't=0', 'strength=-1.2')
    assert edited['imgs']['edit'] != slid['imgs']['edit'] and edited['imgs']['reconstruction'] == slid['imgs']['reconstruction']
    page.locator('.cycle-explorer-edit2 select').select_option('age')
    press(page, 'strength2', 'ArrowRight', 20)
    both = shown(page, 'edit2=age', 'strength2=1')
    assert both['imgs']['edit'] != edited['imgs']['edit'] and both['imgs']['true edit'] != edited['imgs']['true edit']
    press(page, 't', 'ArrowRight', 16)
    press(page, 'layers', 'ArrowRight', 5)
    mixed = shown(page, 't=4', 'layers=5-10')
    assert mixed['imgs']['reconstruction'] not in (first['imgs']['reconstruction'], both['imgs']['reconstruction'])
    page.screenshot(path=picture)
    page.locator('.cycle-explorer-edit select').select_option('smile')
    smiling = shown(page, 'edit=smile')
    assert smiling['imgs']['edit'] != mixed['imgs']['edit'] and smiling['imgs']['reconstruction'] == mixed['imgs']['reconstruction']
    page.locator('.cycle-explorer-i select').select_option(index=1)
    assert shown(page, 'i=1')['imgs']['target'] != untuned['imgs']['target']
    with page.expect_file_chooser() as chosen: page.locator('.cycle-explorer-upload').first.click()
    chosen.value.set_files(ROOT/'data'/'samples'/'face_5.png')
    mine = shown(page, 'i=6')
    assert 'true edit' not in mine['imgs'] and {'target', 'reconstruction', 'edit'} <= set(mine['imgs'])
    assert page.locator('.cycle-explorer-i select option').last.inner_text() == 'face_5'
    # one output, one of its kinds: the explorer is live; what stands below needs no kernel, and keeps the arrow keys to itself
    assert page.locator('.cycle-player').count() == 1 and page.locator('.cycle-player figcaption:visible').inner_text() == 'k = 0'
    page.locator('.cycle-player input').focus()
    for key in ('ArrowUp', 'ArrowRight', 'ArrowRight', 'ArrowDown'): page.keyboard.press(key)
    assert page.locator('.cycle-player figcaption:visible').inner_text() == 'k = 2'
    assert not page.locator('text=Traceback').count() and not page.locator('.cycle-explorer-error').count()
    assert not page.problems, page.problems

def on_a_telephone(page, picture):
    "The same page, narrow: all of it is seen, and a slider moves the picture."
    page.set_viewport_size(dict(width=390, height=844))
    page.locator('.cycle-explorer-i select').select_option(index=0)
    first = shown(page, 'i=0', 't=4')           # with all numbers
    page.locator(PANEL).scroll_into_view_if_needed()
    page.screenshot(path=picture)
    wide = page.evaluate('s => Math.max(...[...document.querySelectorAll(`${s} *, [class*=cycle-explorer]`)].map(e => e.getBoundingClientRect().right))', PANEL)
    assert {'mse', 'edit_error', 'no_edit_error'} <= set(first['numbers']) and wide <= 390, f'something ends at {wide} pixels'
    tops = page.evaluate('s => [...document.querySelectorAll(`${s} img`)].map(e => e.getBoundingClientRect().top)', PANEL)
    assert tops[0] == tops[1] < tops[2] == tops[3]                # two by two
    press(page, 'strength', 'ArrowRight', 1)
    assert shown(page, 'strength=-1.15')['imgs']['edit'] != first['imgs']['edit']

@pytest.mark.timeout(1200)
def test_the_explorer_explores(lab, page, tmp_path):
    page.goto(lab)
    page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=300_000)
    page.wait_for_function('() => window.jupyterapp?.shell?.currentWidget?.context', timeout=300_000)
    page.evaluate(RUN_ALL)
    page.wait_for_selector(f'{PANEL} img', timeout=600_000)
    page.wait_for_function('() => window.ranAll', timeout=600_000)
    move_everything(page, os.environ.get('CYCLE_NB_SCREENSHOT', tmp_path/'explorer.png'))
    page.evaluate("() => jupyterapp.commands.execute('application:toggle-left-area')")      # the files' list would leave it no room
    on_a_telephone(page, os.environ.get('CYCLE_NB_SCREENSHOT_PHONE', tmp_path/'explorer_phone.png'))

@pytest.mark.timeout(1200)
def test_the_explorer_explores_without_its_code(voila, page, tmp_path):
    "As a page of Voilà's, which appears when every cell has run; then on a telephone."
    page.goto(voila, timeout=900_000, wait_until='commit')
    page.wait_for_selector(f'{PANEL} img', timeout=900_000)
    assert not page.locator('text=load_bundle(').count()
    move_everything(page, os.environ.get('CYCLE_NB_SCREENSHOT', tmp_path/'voila.png'))
    on_a_telephone(page, os.environ.get('CYCLE_NB_SCREENSHOT_PHONE', tmp_path/'voila_phone.png'))


# --- without a browser -----------------------------------------------------------------------

@pytest.mark.parametrize('directions', [(), ('a',), ('smile', 'a')], ids=str)
@pytest.mark.parametrize('encoders', [('cycle',), ('w',), ('wplus',), ('w', 'mine'), ('cycle', 'wplus')], ids=str)
def test_whatever_a_bundle_lacks_the_explorer_shows(encoders, directions):
    "Own networks with few encoders and edits: pictures at every position, and what is not there cannot be moved."
    torch.manual_seed(0)
    G = Generator(64, 32, 32, 2, 512, 16)
    nets = {k: Encoder(64, G.num_ws, 32, stage=9 if k == 'wplus' else 0).eval() for k in encoders}
    b = Bundle.from_networks(G, nets, Perceptual(**BODY), directions={k: torch.randn(32) for k in directions}, device='cpu')
    e = Explorer(invert(torch.zeros(2, 3, 64, 64), b, encoder=encoders[0], refine=0, tune=0))
    c, panel, end = e.controls, e.panel, 1 + ('wplus' in encoders and encoders != ('wplus',)) + len({'w', 'cycle'} & set(encoders) or encoders[:1])
    e.widget
    assert c['t'].max == end and c['edit'].value == ('smile' if 'smile' in directions else None)
    assert [v for _, v in c['edit'].options] == [None, *sorted(directions)]
    for name, values in dict(i=(0, 1), t=(0., .5), edit=(None, *directions), strength=(-1., 2.), layers=((0, 3), (2, G.num_ws))).items():
        for v in values:
            c[name].value = v
            at = f'{name}={v:g}' if isinstance(v, float) else f'{name}={"-".join(map(str, v))}' if isinstance(v, tuple) else f'{name}={v}'
            assert panel.value.count('<img') == 3 and 'cycle-explorer-error' not in panel.value and at in panel.value
