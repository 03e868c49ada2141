"The decks: every lesson is there, in words and figures of its own; a browser turns the pages, with no network."
import importlib.util, re, subprocess, sys
import nbformat
import pytest
from conftest import ROOT
from test_player import browser, opened

pytestmark = pytest.mark.skipif(any(importlib.util.find_spec(m) is None for m in ('docutils', 'fastcore', 'nbconvert')), reason='pip install -e .[docs]')
LESSONS = [p for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb')) if '*Lesson*' in nbformat.read(p, 4).cells[1].source]


@pytest.fixture(scope='module')
def decks(tmp_path_factory):
    out = tmp_path_factory.mktemp('slides')
    p = subprocess.run([sys.executable, ROOT/'tools'/'make_slides.py', '--out', out], capture_output=True, text=True, timeout=200)
    assert p.returncode == 0, p.stderr
    return {f.stem: f.read_text(encoding='utf-8') for f in out.glob('*.html')}


def of_lesson(decks, stem):
    "The slides of a lesson, its title first."
    whole = next(t for t in decks.values() if f'<section id="{stem}"' in t)
    pages = re.findall(r'<section.*?</section>', whole, re.S)
    first = next(i for i, s in enumerate(pages) if f'id="{stem}"' in s)
    return [s for i, s in enumerate(pages) if i == first or f'· {stem}</footer>' in s]


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_every_lesson_is_there(decks, path):
    nb, pages = nbformat.read(path, 4), of_lesson(decks, path.stem)
    assert nb.cells[0].source.split('\n')[0][2:] in re.sub('&.*?;', "'", pages[0])
    assert len(pages) >= 3 and any('<img' in s or '<svg' in s for s in pages)
    if any('## What fails' in c.source for c in nb.cells): assert '<h2>What fails' in pages[-1] and '<li>' in pages[-1]
    formulas = sum(len(re.findall(r'\$\$', c.source))//2 for c in nb.cells if c.cell_type == 'markdown')
    assert sum(s.count('class="equation"') for s in pages) >= .8*formulas
    unread = '<style.*?</style>|<script.*?</script>|<math.*?</math>|<figcaption.*?</figcaption>'     # a player shows one caption at a time
    assert all(len(re.sub('<.*?>', '', re.sub(unread, '', s, flags=re.S))) < 1500 for s in pages if 'What fails' not in s)


def test_a_deck_needs_nothing_else(decks):
    assert len(decks) >= 7
    for text in decks.values():
        assert not re.findall(r'(?:src|<link[^>]*href)="(?!data:)[^"]*"', text) and '$$' not in text and '\x01' not in text
        assert '```' not in re.sub('base64,[^"]*', '', text)


def test_pages_turn(decks, opened, tmp_path):
    page = opened('')
    (tmp_path/'deck.html').write_text(decks['the-generator'], encoding='utf-8')
    page.goto((tmp_path/'deck.html').as_uri())
    seen = lambda: page.locator('section:visible').all_inner_texts()
    first, = seen()
    page.keyboard.press('ArrowRight'); second, = seen()
    page.keyboard.press('ArrowLeft')
    assert seen() == [first] and second != first
    page.keyboard.press('End'); last, = seen()
    page.keyboard.press('ArrowRight')
    assert seen() == [last] and page.url.endswith('#' + str(page.locator('section').count()))
    page.reload()
    assert seen() == [last] and not page.asked and not page.problems
    page.emulate_media(media='print')
    assert page.locator('section:visible').count() == page.locator('section').count()


def test_no_equation_is_cut_off(decks, opened, tmp_path):
    "However wide it is, on a small projector all of it is seen."
    page, wide = opened('', viewport=dict(width=800, height=600)), 0
    for name in ('from-pivot-to-edit', 'the-encoder-and-its-cycle'):
        (tmp_path/f'{name}.html').write_text(decks[name], encoding='utf-8')
        page.goto((tmp_path/f'{name}.html').as_uri())
        for _ in range(page.locator('section').count()):
            found = page.evaluate("[...document.querySelectorAll('section.now .equation')].map(e => [e.scrollWidth - e.clientWidth, e.style.fontSize])")
            assert all(over <= 0 for over, _ in found), (name, page.url, found)
            wide += sum(bool(size) for _, size in found)
            page.keyboard.press('ArrowRight')
    assert wide and not page.problems


def test_a_printed_slide_is_a_page(decks, opened, tmp_path):
    "Nothing flows over to another page, nothing lies on the line below, and sliders that nobody can move are gone."
    page = opened('', viewport=dict(width=1280, height=720))
    for name, text in decks.items():
        (tmp_path/f'{name}.html').write_text(text, encoding='utf-8')
        page.goto((tmp_path/f'{name}.html').as_uri())
        page.emulate_media(media='print')
        over = page.evaluate("""[...document.querySelectorAll('section')].map(s => { const foot = s.querySelector('footer'), inside = [...s.querySelectorAll('p, li, img, svg, figcaption, .equation')];
            const low = Math.max(...inside.map(e => e.getBoundingClientRect().bottom)), right = Math.max(...inside.map(e => e.getBoundingClientRect().right));
            return [s.innerText.slice(0, 60), low - (foot || s).getBoundingClientRect()[foot ? 'top' : 'bottom'], right - innerWidth] }).filter(([_, a, b]) => a > 1 || b > 1)""")
        assert not over, (name, over)
        assert not page.locator('input[type=range]:visible').count()
        count = page.locator('section').count()
        assert len(re.findall(rb'/MediaBox ?\[0 0 960 540\]', page.pdf(prefer_css_page_size=True, print_background=True))) == count, name
