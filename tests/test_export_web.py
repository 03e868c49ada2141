"The live page as a reader meets it: a real browser, a file, no network; and its graph, drawn by another runtime."
import base64, importlib.util, io, json, re
from pathlib import Path
import pytest, torch
from PIL import Image
from cycle_nb.core import InputError
from cycle_nb.download import cache_dir
from cycle_nb.export_web import (LIMIT, RUNTIME, export_images, export_web, measure_web, open_page, path_codes, sample_order,
                                 synthesis_graph, to_text, web_page, web_weights)
from cycle_nb.bundle import load_bundle, synthesize
from cycle_nb.directions import apply_direction
from cycle_nb.path import lerp_codes
from cycle_nb.files import to_bytes
from cycle_nb.images import samples
from cycle_nb.inversion import invert
from cycle_nb.stylegan2 import Generator
from test_explore_browser import find_browser, need
from tiny import ENV, bundle, cli, faces


@pytest.fixture(scope='module')
def onnx(): need(importlib.util.find_spec('onnx'), 'onnx is not installed (pip install "cycle-nb[web]")')


@pytest.fixture(scope='module')
def runtime(onnx):       # not every machine reaches the npm registry
    need((cache_dir()/RUNTIME).is_file(), f'{RUNTIME} is not in the cache (make vendor)', 'CYCLE_NB_DEMAND_RUNTIME')


# --- the graph, by onnx's own interpreter ---------------------------------------------------

@pytest.mark.usefixtures('onnx')
@pytest.mark.parametrize('clamp', [None, 1.5])
@pytest.mark.parametrize('architecture', ['skip', 'resnet', 'orig'])
def test_graph_draws_what_the_library_draws(architecture, clamp):
    from onnx.reference import ReferenceEvaluator
    torch.manual_seed(0)
    G = Generator(resolution=16, w_dim=12, channels=[10, 8, 6], architecture=architecture, clamp=clamp).eval().requires_grad_(False)
    for p in G.synthesis.parameters(): p.add_(.3*torch.randn_like(p))       # biases and noise strengths begin at zero
    wp = torch.randn(G.num_ws, 12)
    def drawn(tensors, codes):
        feed = {'wp': codes} | web_weights(tensors)
        return torch.from_numpy(run(None, {k: v.numpy() for k, v in feed.items()})[0])
    run = ReferenceEvaluator(synthesis_graph(G)).run
    want = G.synthesis(wp[None])
    assert (drawn(G.synthesis.state_dict(), wp) - want).abs().max() < 1e-4
    other = {k: v + .1*torch.randn_like(v) for k, v in G.synthesis.state_dict().items()}       # weights are inputs
    G.synthesis.load_state_dict(other)
    now = G.synthesis(wp[None])
    assert (drawn(other, wp) - now).abs().max() < 1e-4 and (now - want).abs().max() > .01


# --- what needs nothing that may be missing ---------------------------------------------------

def test_text_survives_html():
    data = torch.randint(256, (5003,), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy().tobytes()
    for d in (data, b'', b'\0', bytes(range(256))*3):
        text = to_text(d)
        bits = ''.join(f'{ord(c) & 127:07b}' for c in text)
        assert bytes(int(bits[i:i + 8], 2) for i in range(0, 8*len(d), 8)) == d and len(text)*7 < 8*len(d) + 7
        assert not set(text) & set('\0\r<') and max(map(ord, text), default=0) < 256
    assert len(to_text(data).encode()) < 1.18*len(data)


def test_samples_begin_with_something_never_seen():
    paths, truth = samples()
    strange = {p for p, e in zip(paths, truth.extras) if e.any()}
    order = sample_order()
    assert sorted(order) == sorted(paths) and [p in strange for p in order[:4]] == [True, False]*2


def test_missing_parts_are_one_line(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv('CYCLE_NB_CACHE', str(tmp_path/'empty'))
    monkeypatch.setitem(ENV, 'CYCLE_NB_CACHE', str(tmp_path/'empty'))
    with pytest.raises(InputError, match='make vendor'): export_images([], tmp_path, load_bundle(bundle, 'cpu'))
    p = cli('export-web', '--out', tmp_path/'page', '--bundle', bundle)
    assert p.returncode == 2 and p.stderr.count('\n') == 1 and '--fetch' in p.stderr and not (tmp_path/'page').exists()


@pytest.mark.usefixtures('runtime')
def test_missing_onnx_is_one_line(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)
    with pytest.raises(InputError, match=r'cycle-nb\[web\]'): export_images([], tmp_path, load_bundle(bundle, 'cpu'))


# --- the page ---------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def inv():
    "Two faces by the shipped networks, tuned shortly: what is compared is the drawing."
    b = load_bundle('sdfaces64', 'cpu')
    return invert(sample_order()[:2], b, refine=3, tune=8, compare=[k for k in ('w', 'wplus') if k in b.encoders])


@pytest.fixture(scope='module')
def written(runtime, inv, tmp_path_factory):
    need(find_browser(), 'no Chromium or Chrome found (set CYCLE_NB_BROWSER to its path)')
    pytest.importorskip('playwright')
    return export_web(inv, tmp_path_factory.mktemp('web'))


def pixels(page, name):
    "What a canvas shows (3,H,W), from the browser's own memory."
    uri = page.evaluate('id => document.getElementById(id).toDataURL("image/png")', name)
    im = Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1]))).convert('RGB')
    return torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(*im.size[::-1], 3).permute(2, 0, 1).int()


def shown(page, *at):
    "Both pictures, once they are drawn for `at`."
    page.wait_for_function('at => at.every(a => ` ${document.body.dataset.shown} `.includes(` ${a} `))', arg=list(at), timeout=60_000)
    return {k: pixels(page, k) for k in ('target', 'raw', 'tuned')}


def slide(page, name, key, times):
    page.focus(f'#{name}')
    for _ in range(times): page.keyboard.press(key)


def expected(inv, i, path=None, tuning=1., **edits):
    "The library's pictures of a state of the page."
    stops, pivot = path_codes(inv)
    codes = list(stops.values())
    path = list(stops).index(pivot) if path is None else path
    k = min(int(path), len(codes) - 2)
    wp = lerp_codes(codes[k], codes[k + 1], path - k)[i:i + 1]
    for name, s in edits.items(): wp = apply_direction(wp, inv.bundle.direction(name), s)
    T = inv.generator(i)
    for p, q in zip(T.synthesis.parameters(), inv.bundle.generator.synthesis.parameters()): p.copy_(q.lerp(p, tuning))
    return {n: to_bytes(synthesize(G, wp))[0].int() for n, G in dict(raw=inv.bundle.generator, tuned=T).items()}


def agree(seen, want):
    for k, img in want.items(): assert (seen[k] - img).abs().max() <= 2, (k, (seen[k] - img).abs().max())


def other(a, b, name): return (a[name] - b[name]).abs().max() > 5


@pytest.mark.usefixtures('runtime')
@pytest.mark.timeout(600)
def test_page_draws_what_the_library_draws_and_every_control_moves_it(inv, written):
    assert written['bytes'] <= LIMIT and written['faces'] == inv.names
    problems, asked = [], []
    with open_page(written['path'], find_browser()) as page:
        page.on('pageerror', lambda e: problems.append(str(e)))
        page.on('console', lambda m: problems.append(m.text) if m.type == 'error' else None)
        page.on('request', lambda r: asked.append(r.url))
        page.reload()
        page.wait_for_selector('body[data-shown], body[data-failed]', timeout=120_000)
        edits = sorted(inv.bundle.directions)
        opens = {'yaw': 1.5} if 'yaw' in edits else {}
        first = shown(page, 'face=0')
        agree(first, expected(inv, 0, **opens) | dict(target=to_bytes(inv.target[0]).int()))

        page.click('#reset')
        plain = shown(page, 'face=0', 'tuning=1')
        page.wait_for_function('() => !/yaw/.test(document.body.dataset.shown)')
        plain = shown(page, 'face=0')
        agree(plain, expected(inv, 0))
        slide(page, 'path', 'Home', 1)
        slide(page, 'path', 'ArrowRight', 35)
        moved = shown(page, 'path=0.35')
        agree(moved, expected(inv, 0, .35))
        assert other(moved, plain, 'raw') and other(moved, plain, 'tuned')
        page.click('#stops button:last-child')
        last = len(path_codes(inv)[0]) - 1
        agree(shown(page, f'path={last}'), expected(inv, 0, last))

        slide(page, 'tuning', 'Home', 1)
        untuned = shown(page, 'tuning=0', f'path={last}')
        assert (untuned['raw'] - untuned['tuned']).abs().max() == 0
        slide(page, 'tuning', 'ArrowRight', 40)
        agree(shown(page, 'tuning=0.4'), expected(inv, 0, last, .4))

        so_far, before = {}, shown(page, 'tuning=0.4')
        for name in edits:                                                  # one more edit at a time, all at once in the end
            slide(page, f'edit-{name}', 'ArrowRight', 8)
            so_far[name] = .8
            after = shown(page, f'{name}=0.8')
            assert other(after, before, 'raw') and other(after, before, 'tuned'), name
            before = after
        agree(before, expected(inv, 0, last, .4, **so_far))

        page.focus('#face-0')
        page.keyboard.press('ArrowRight')
        second = shown(page, 'face=1')
        agree(second, expected(inv, 1, last, .4, **so_far) | dict(target=to_bytes(inv.target[1]).int()))
        page.click('#play')
        page.wait_for_function('() => document.getElementById("play").textContent === "Play"', timeout=120_000)
        agree(shown(page, 'face=1', 'tuning=1'), expected(inv, 1, **so_far))
    assert not problems and all(re.match('file:|blob:|data:', u) for u in asked) and asked, (problems, asked)


@pytest.mark.usefixtures('runtime')
@pytest.mark.timeout(600)
def test_page_is_usable_on_a_phone_and_named_for_screen_readers(written):
    with open_page(written['path'], find_browser(), width=390, height=844) as page:
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        unnamed = page.evaluate("""() => [...document.querySelectorAll('input, button, [role=img], svg, output')].filter(e =>
            !(e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && [...e.labels].some(l => l.textContent.trim())))).map(e => e.outerHTML)""")
        assert not unnamed
        boxes = page.evaluate("""() => Object.fromEntries(['target', 'raw', 'tuned', 'chart'].map(id => {
            const r = document.getElementById(id).getBoundingClientRect(); return [id, [r.left, r.top, r.width]] }))""")
        assert boxes['target'][1] == boxes['raw'][1] < boxes['tuned'][1] == boxes['chart'][1] and boxes['target'][2] > 150
        page.locator('#edits input').last.scroll_into_view_if_needed()
        wide = page.locator('#edits input').last.bounding_box()
        assert wide['width'] > 300 and wide['height'] >= 30
        assert page.evaluate("document.getElementById('raw').getBoundingClientRect().top") >= 0       # the pictures stay in sight
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme='dark')
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


@pytest.mark.usefixtures('runtime')
def test_faces_that_do_not_fit_are_left_out(inv):
    whole, names = web_page(inv)
    small, kept = web_page(inv, limit=len(whole.encode()) - 1)
    assert names == inv.names and kept == inv.names[:1] and len(small.encode()) < len(whole.encode())
    facts = json.loads(re.search('id="facts">(.*?)</script>', small, re.S)[1])
    assert [f['name'] for f in facts['faces']] == kept and 'id="tuned-0"' in small and 'id="tuned-1"' not in small


@pytest.mark.usefixtures('runtime')
@pytest.mark.timeout(600)
def test_command_writes_a_page_of_any_bundle(bundle, faces, tmp_path):
    "Other networks, own pictures, nothing tuned; the clock at the end."
    need(find_browser(), 'no Chromium or Chrome found (set CYCLE_NB_BROWSER to its path)')
    line = ['export-web', *faces[:2], '--out', tmp_path, '--bundle', bundle, '--refine', '1', '--tune', '0', '--device', 'cpu']
    p = cli(*line)
    assert p.returncode == 0 and 'f0, f1' in p.stdout, p.stderr
    assert cli(*line).returncode == 2                                       # nothing is overwritten unasked
    found = measure_web(tmp_path/'index.html', find_browser(), moves=3)
    assert 0 < found['fastest_ms'] <= found['slider_to_paint_ms'] and found['first_face_s'] > 0
    inv = invert(faces[:2], load_bundle(bundle, 'cpu'), refine=1, tune=0, compare=['w', 'wplus'])
    with open_page(tmp_path/'index.html', find_browser()) as page:
        assert sorted(page.locator('#edits label').all_text_contents()) == sorted(inv.bundle.directions)
        agree(shown(page, 'face=0'), expected(inv, 0, yaw=1.5))
