"The sliders of the lessons as a reader without a kernel meets them: a page in a real browser, from a file, with no network and with no scripts."
import json, os, re, sys
import nbformat
import pytest, torch
from nbclient import NotebookClient
from conftest import ROOT
from cycle_nb.vis import player, slider_view
from test_explore_browser import FLAGS, find_browser, need

LIMIT = 150_000
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))


def grey(v, size=32): return torch.full((3, size, size), v*2 - 1.)


@pytest.fixture(scope='module')
def browser():
    need(find_browser(), 'no Chromium or Chrome found (set CYCLE_NB_BROWSER to its path)')
    playwright = pytest.importorskip('playwright.sync_api') if os.environ.get('CYCLE_NB_DEMAND_BROWSER') != '1' else __import__('playwright.sync_api').sync_api
    with playwright.sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    "Opens HTML from a file; whatever asks for a network, and every error, is written down."
    contexts = []
    def open_page(body, style='', **settings):
        path = tmp_path/'page.html'
        path.write_text(f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{style}</style><body>{body}', encoding='utf-8')
        contexts.append(context := browser.new_context(offline=True, **settings))
        page = context.new_page()
        page.asked, page.problems = [], []
        page.on('request', lambda r: page.asked.append(r.url) if not r.url.startswith(('data:', 'file:')) else None)
        page.on('pageerror', lambda e: page.problems.append(str(e)))
        page.goto(path.as_uri())
        return page
    yield open_page
    for c in contexts: c.close()


def shown(page, which='.cycle-player'):
    "Captions of the pictures that can be seen, and what is drawn in the middle of each (grey, 0 to 255)."
    return page.evaluate('''which => [...document.querySelectorAll(which + ' figure')].filter(f => f.offsetParent).map(f => {
        const c = document.createElement('canvas'), i = f.querySelector('img');
        c.width = c.height = 1; c.getContext('2d').drawImage(i, -i.naturalWidth/2, -i.naturalHeight/2);
        return [f.querySelector('figcaption').textContent, c.getContext('2d').getImageData(0, 0, 1, 1).data[0]] })''', which)


def test_slider_shows_one_picture_at_a_time(opened):
    "By the keyboard and by dragging; what is seen is the picture of that position, in words for who cannot see it."
    page = opened(player([(grey(k/4), f'note {k}') for k in range(5)], 'Five <b> greys', 3, dict(shade=1), shade=range(5)).html)
    bar = page.locator('input[type=range]')
    assert bar.count() == 1 and page.locator('label').inner_text().strip() == 'shade'
    assert page.get_by_role('group', name='Five <b> greys').count() == 1 and page.get_by_role('slider', name='shade').count() == 1
    (caption, level), = shown(page)
    assert caption == 'shade = 1: note 1' and abs(level - 255/4) < 3 and page.locator('img:visible').bounding_box()['width'] == 96
    bar.focus()
    for key, want in dict(ArrowRight=2, ArrowUp=3, ArrowLeft=2, ArrowDown=1, End=4, Home=0).items():
        page.keyboard.press(key)
        (caption, level), = shown(page)
        assert caption == f'shade = {want}: note {want}' and abs(level - 255*want/4) < 3, key
        assert bar.get_attribute('aria-valuetext') == caption and page.locator('img:visible').get_attribute('alt') == caption
    box = bar.bounding_box()
    page.mouse.move(box['x'] + 4, box['y'] + box['height']/2)
    page.mouse.down()
    page.mouse.move(box['x'] + box['width']*.75, box['y'] + box['height']/2, steps=4)
    page.mouse.up()
    assert shown(page)[0][0] == 'shade = 3: note 3'
    assert not page.asked and not page.problems


def test_two_sliders_and_two_players_on_a_page(opened):
    "Each position of both has its picture, players do not move each other, and the same one may stand there twice."
    first = player([grey((3*i + k)/8) for i in range(3) for k in range(3)], 'both', i=range(3), k=['a', 'b', 'c']).html
    page = opened(first + player([grey(.1), grey(.9)], 'other', j=[0, 1]).html + first)
    bars = page.locator('input')
    assert bars.count() == 2 + 1 + 2
    want = [0, 0]
    for axis, key in ((1, 'ArrowRight'), (0, 'End'), (1, 'ArrowRight'), (0, 'ArrowLeft')):
        bars.nth(axis).focus(); page.keyboard.press(key)
        want[axis] = 2 if key == 'End' else want[axis] + (1 if key == 'ArrowRight' else -1)
        (caption, level), other, again = shown(page)
        assert caption == f'i = {want[0]}, k = {"abc"[want[1]]}' and abs(level - 255*(3*want[0] + want[1])/8) < 3
        assert other[0] == 'j = 0' and again[0] == 'i = 0, k = a'
    assert not page.problems


def test_the_notebook_around_it_does_not_take_the_arrow_keys(opened):
    "Notebooks move from cell to cell by the arrows; their shortcuts must not hear those of a slider."
    page = opened('<div tabindex="0" onkeydown="window.heard = true">' + player([grey(0), grey(1)], 'x', k=[0, 1]).html + '</div>')
    page.locator('input').focus(); page.keyboard.press('ArrowDown'); page.keyboard.press('ArrowUp')
    assert shown(page)[0][0] == 'k = 1' and page.evaluate('window.heard') is None


@pytest.mark.parametrize('lost', ['scripts are off', 'scripts are cut out'])
@pytest.mark.parametrize('axes, seen', [(dict(k=range(4)), 4), (dict(k=range(20)), 7), (dict(i=range(4), k=range(5)), 9), (dict(k=[0]), 1)], ids=str)
def test_without_scripts_a_strip_remains(opened, axes, seen, lost):
    n = torch.tensor([len(v) for v in axes.values()]).prod().item()
    html = player([grey(k/max(1, n - 1)) for k in range(n)], 'A strip', **axes).html
    if 'cut' in lost: html = re.sub(r'<script>.*?</script>', '', html, flags=re.S)
    page = opened(html, java_script_enabled='cut' in lost)
    pictures = page.locator('figure:visible')
    assert pictures.count() == seen and page.locator('input').count() == 0 and page.locator('text=A strip').is_visible()
    captions = pictures.all_inner_texts()
    assert len(set(captions)) == seen
    for name, values in axes.items(): assert f'{name} = {values[0]}' in captions[0] and f'{name} = {values[-1]}' in captions[-1]


@pytest.mark.parametrize('ink, paper', [('#ddd', '#111'), ('#222', '#fff')], ids=['dark', 'light'])
def test_phone_width_and_colours_of_the_page(opened, ink, paper):
    "Nothing is wider than a phone, the slider can be hit by a finger, words have the colour of the page they stand on."
    page = opened(player([grey(.5, 600)]*3, 'wide', 2, k=range(3)).html, f'body {{color: {ink}; background: {paper}}} figcaption {{color: #888}}', viewport=dict(width=390, height=800))
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    box = page.locator('input').bounding_box()
    assert box['width'] > 250 and box['height'] >= 24
    for what in ('p', 'figcaption:visible', 'label', 'figure:visible', '.cycle-player', '.cycle-player > div'):
        look = page.locator(what).first.evaluate('e => [getComputedStyle(e).color, getComputedStyle(document.body).color, getComputedStyle(e).backgroundColor]')
        assert look[0] == look[1] and look[2] == 'rgba(0, 0, 0, 0)', what


# --- beside a widget -------------------------------------------------------------------------

KERNEL = '''import torch
from cycle_nb.vis import slider_view
view = slider_view(lambda v, k: (torch.full((3, 8, 8), v), f'at {v:g} {k}'), 'T', v=(0., 1., .5), k=['a', 'b'])
view'''
DRIVE = '''_, v, k, panel = view.widget.children
v.value, k.value = 1., 'b'
print('at 1 b' in panel.value, v.value)'''


def test_a_kernel_gives_both_and_the_widget_moves():
    "In a real kernel, with whichever ipywidgets is here: one output holds the view and the player, and never a widget's name as text."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in (KERNEL, DRIVE, 'view.player')])
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    NotebookClient(nb, timeout=100, kernel_name='python3').execute(env=env)
    (out,), (said,), (still,) = (c.outputs for c in nb.cells)
    view = out.data['application/vnd.jupyter.widget-view+json']
    assert re.fullmatch(r'[0-9a-f-]{32,36}', view['model_id']) and view['version_major'] == 2
    assert 'class="cycle-player"' in out.data['text/html'] and 'children' not in out.data['text/plain'] and said.text == 'True 1.0\n'
    assert still.data == {'text/html': out.data['text/html'], 'text/plain': 'Player()'}          # not the pictures a second time, as text


def test_what_git_keeps_of_it_is_the_player():
    "The tool that tidies saved notebooks takes the view away, which no reader could open, and leaves the rest."
    sys.path.insert(0, str(ROOT/'tools'))
    import nb as tool
    view = slider_view(lambda k: grey(k), 'T', k=(0., 1., 0.))
    cell = nbformat.v4.new_code_cell('', outputs=[nbformat.v4.new_output('execute_result', data=view._repr_mimebundle_())])
    kept = nbformat.v4.new_notebook(cells=[cell])
    tool.shrink(kept)
    assert kept.cells[0].outputs[0].data == {'text/html': view.player.html}


# --- the lessons -----------------------------------------------------------------------------

def players(path):
    "HTML of every player among a notebook's saved outputs."
    nb = nbformat.read(path, 4)
    return [h for c in nb.cells for o in c.get('outputs', []) if 'cycle-player' in (h := ''.join(o.get('data', {}).get('text/html', '')))]


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_saved_players_are_light_and_whole(path):
    for html in players(path):
        assert len(html.encode()) <= LIMIT and html.count('<script>') == html.count('</script>') == 1
        axes = json.loads(re.search(r'data-axes="(.*?)"', html)[1].replace('&quot;', '"'))
        assert html.count('<figure') == torch.tensor([n for _, n, _ in axes]).prod() and not re.search(r'(src|href)="(?!data:)', html)


WITH_SLIDERS = '11_stylegan2 12_gan 13_latents 19_encoder 21_schedule 22_cycle 23_project 25_refine 26_tune 28_directions 43_explore 46_evaluate 48_price'.split()

@pytest.mark.parametrize('name', WITH_SLIDERS)
def test_lesson_has_something_to_move(name):
    "By the small layer, not by ipywidgets of its own."
    source = '\n'.join(c.source for c in nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4).cells if c.cell_type == 'code')
    assert re.search(r'^(slider_view|player|explorer)\b', source, re.M)
    assert name == '43_explore' or 'ipywidgets' not in source
