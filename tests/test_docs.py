"The documentation site: its pages are laid out from the notebooks; where Sphinx is installed, it is built and a warning is an error."
import collections, importlib.util, json, re, shutil, subprocess, sys
from configparser import ConfigParser
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree
import nbformat
import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import make_docs

CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
WRITTEN = [ROOT/n for n in ('README.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'teaching/README.md', 'teaching/mistakes.md', 'teaching/glossary.md',
                           'teaching/questions/part1.md', 'teaching/questions/part2.md', 'teaching/questions/reader.md')]
NEEDS = 'sphinx', 'myst_nb', 'sphinx_book_theme', 'fastcore'
MISSING = [m for m in NEEDS if importlib.util.find_spec(m) is None]
built_here = pytest.mark.skipif(bool(MISSING), reason=f'{", ".join(MISSING)} not installed: pip install -e .[docs]')


# --- what is written -----------------------------------------------------------------------

def prose(path):
    "A file's text, or a notebook's Markdown, without code."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb': text = '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
    return re.sub(r'`[^`\n]+`', '`code`', re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S))


def equations(text):
    "Displayed and inline equations of a Markdown text; `None` for a dollar sign that belongs to none."
    for i, piece in enumerate(text.split('$$')):
        if i % 2: yield piece
        else:
            inline = re.split(r'(?<!\\)\$', piece)
            yield from inline[1::2]
            if len(inline) % 2 == 0: yield None
    if text.count('$$') % 2: yield None


def misspelt(tex):
    "What is wrong with an equation, in words."
    if tex is None: return 'a $ without its other half'
    if '\n\n' in tex: return 'an empty line ends the equation'
    depth = 0
    for mark in re.findall(r'(?<!\\)[{}]', tex.replace('\\\\', '')):
        depth += 1 if mark == '{' else -1
        if depth < 0: return 'a } too many'
    if depth: return 'a { too many'
    if len(re.findall(r'\\left\b', tex)) != len(re.findall(r'\\right\b', tex)): return '\\left without \\right'
    if sorted(re.findall(r'\\begin\{(\w+)', tex)) != sorted(re.findall(r'\\end\{(\w+)', tex)): return '\\begin without \\end'


@pytest.mark.parametrize('path', [*CHAPTERS, ROOT/'nbs'/'index.ipynb', *WRITTEN], ids=lambda p: p.stem)
def test_equations_are_whole(path):
    bad = [(w, t) for t in equations(prose(path)) if (w := misspelt(t))]
    assert not bad, bad


def test_equations_are_seen():
    assert list(equations('a $x$ and $$y\n=z$$ and $u$')) == ['x', 'y\n=z', 'u'] and None in equations('5 $ only')
    assert all(misspelt(t) for t in ('a}', '{a', r'\left( a )', 'a\n\nb', r'\begin{cases} a', None)) and not misspelt(r'\{ \left(a\right) {b}')
    assert sum(len(list(equations(prose(p)))) for p in CHAPTERS) > 100


def links(text): return re.findall(r'\]\(\s*([^()\s]*(?:\([^()]*\)[^()\s]*)*)[^)]*\)', text)


@pytest.mark.parametrize('path', [*CHAPTERS, ROOT/'nbs'/'index.ipynb', *WRITTEN], ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    "Files are there; addresses are complete, encrypted, and of no machine of ours."
    bad = []
    for link in links(prose(path)):
        url = urlparse(link)
        if not url.scheme: bad += [] if not url.path or (path.parent/unquote(url.path)).exists() else [link]
        elif url.scheme not in ('https', 'mailto') or '.' not in url.netloc or re.search(r'localhost|127\.0', link): bad.append(link)
    assert not bad, bad


def test_links_are_seen():
    assert links('[a](b.md), ![c](d.png "t") and [e](https://x.org/f_(g))') == ['b.md', 'd.png', 'https://x.org/f_(g)']
    assert sum(len(links(prose(p))) for p in CHAPTERS) > 30


@pytest.mark.parametrize('path', WRITTEN, ids=lambda p: p.stem)
def test_make_targets_exist(path):
    rules = set(re.findall(r'^([a-z]+):', (ROOT/'Makefile').read_text(), re.M))
    named = set(re.findall(r'\bmake ([a-z]+)', ' '.join(re.findall(r'`[^`]+`|^make .*$', path.read_text(), re.M))))
    assert not named - rules, named - rules


# --- what stands beside the code -----------------------------------------------------------

def settings():
    ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']


def test_citation_agrees_with_the_package():
    cite = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert {'cff-version', 'message', 'title', 'authors'} <= set(cite)      # what the format demands
    assert (cite['version'], cite['license']) == (settings()['version'], settings()['license'])
    assert any('2207.09367' in r['url'] and r['type'] == 'article' for r in cite['references'])


def test_workflow_runs_what_is_here():
    flow = yaml.safe_load((ROOT/'.github'/'workflows'/'check.yml').read_text())
    assert {'push', 'pull_request'} <= set(flow[True])        # `on:` is a boolean to YAML
    steps = {job: [s for s in spec['steps']] for job, spec in flow['jobs'].items()}
    runs = {job: [s['run'] for s in ss if 'run' in s] for job, ss in steps.items()}
    assert 'bash .ci/run' in runs['test'] and 'make docs' in runs['docs']
    said = {c.split()[-1] for c in settings()['classifiers'].splitlines() if re.search(r'Python :: 3\.\d+$', c)}
    tried = set(flow['jobs']['test']['strategy']['matrix']['python'])
    key = lambda v: int(v.split('.')[1])
    assert {min(said, key=key), max(said, key=key)} <= tried <= said
    upload = next(s for s in steps['docs'] if 'upload' in s.get('uses', ''))
    assert (ROOT/upload['with']['path']) == ROOT/'_docs'/'html' and "ROOT/'_docs'/'html'" in (ROOT/'tools'/'make_docs.py').read_text()


# --- the pages as they are laid out --------------------------------------------------------

@pytest.fixture(scope='module')
def stage(tmp_path_factory):
    d = tmp_path_factory.mktemp('site')/'_proc'
    make_docs.lay_out(d)
    return d


def test_every_chapter_is_in_the_contents_once(stage):
    front = '\n'.join(''.join(c['source']) for c in json.loads((stage/'index.ipynb').read_text())['cells'])
    listed = re.findall(r'^[^`\n]+ <(\d\d_\w+)>$', front, re.M)
    assert sorted(listed) == [p.stem for p in CHAPTERS]
    found = make_docs.chapters()
    lessons = [s for s in listed if found[s]['kind'] == 'lesson']
    assert listed[:len(lessons)] == lessons, 'lessons come first, tools after them'
    path = front[front.index('course path'):front.index('| part')]
    course = re.findall(r'\b\d\d_\w+(?=`)', path)
    assert len(course) > 20 and [s for s in lessons if s in course] == sorted(course)


def test_parts_take_in_what_the_table_leaves_out():
    index = '| part | lessons | tools |\n|---|---|---|\n| low | `01_b` | `00_a` |\n| high | `04_e` | `02_c` |\n'
    assert make_docs.parts(index, ['00_a', '01_b', '02_c', '03_d', '04_e']) == {'low': ['00_a', '01_b'], 'high': ['02_c', '03_d', '04_e']}
    with pytest.raises(SystemExit): make_docs.parts('no table', ['00_a'])


@pytest.mark.parametrize('source, kind, want', [
    ('#| hide\nassert 1', 'lesson', ['remove-cell']), ('#| default_exp x', 'tool', ['remove-cell']), ('#| hide_input\nf()', 'lesson', ['remove-input']),
    ('#| export\ndef f(): pass', 'lesson', []), ('#| export\ndef f(): pass', 'tool', ['hide-input']), ('#| export\n' + 'x = 1\n'*30, 'lesson', ['hide-input']),
    ('#| export\nimport torch\nfrom a import (b,\n    c)', 'lesson', ['hide-input']), ('show(x)', 'tool', []), ('for x in y: import_it(x)', 'lesson', [])])
def test_directives_become_tags(source, kind, want): assert make_docs.tags(source, kind) == want


def test_pages_keep_the_notebooks(stage):
    "No output and no line of code is lost on the way, only directives and the names of widgets; each figure has words."
    shown = lambda c: [o for o in c.get('outputs', []) if not re.search(r'"text/plain": \["\w+\(children=', json.dumps(o))]
    for path in CHAPTERS:
        old, new = (json.loads(f.read_text())['cells'] for f in (path, stage/path.name))
        assert [shown(c) for c in old] == [c.get('outputs', []) for c in new[:len(old)]]
        code = [(re.sub(r'^#\|.*\n?', '', ''.join(a['source']), flags=re.M), b['source']) for a, b in zip(old, new) if a['cell_type'] == 'code']
        assert code and all(a == b for a, b in code)
        assert all(c['metadata']['mystnb']['image']['alt'].startswith('Figure: ') for c in new if c['cell_type'] == 'code')
    nbformat.validate(nbformat.read(stage/'19_encoder.ipynb', 4))


def test_chapter_names_become_links():
    text = 'See `00_core`, [`01_files`](x), `99_none`\n```sh\n`00_core`\n```\n'
    assert make_docs.linked(text, {'00_core', '01_files'}) == text.replace('See `00_core`', 'See [`00_core`](00_core.ipynb)')


def test_exports_become_links():
    text = '`Encoder` first. **It exports** `Encoder` and `nothing`.'
    assert make_docs.exports(text, 'encoder', ['Encoder']) == '`Encoder` first. **It exports** {py:obj}`~cycle_nb.encoder.Encoder` and `nothing`.'
    assert make_docs.exports('`Encoder`', 'encoder', ['Encoder']) == '`Encoder`'


def test_reference_has_every_public_name(stage):
    names = make_docs.public_names()
    assert sum(map(len, names.values())) > 200
    import cycle_nb
    top = re.findall(r'py:obj:`~cycle_nb\.(\w+)\.(\w+)`', (stage/'api'/'index.rst').read_text())
    assert {n for _, n in top} == set(cycle_nb.__all__) - {'__version__'} and all(n in names[m] for m, n in top)
    for module, public in names.items():
        page = (stage/'api'/f'{module}.rst').read_text()
        assert f'automodule:: cycle_nb.{module}' in page and f'{module}`' in (stage/'api'/'index.rst').read_text()
        tree = (ROOT/'cycle_nb'/f'{module}.py').read_text()
        defined = set(re.findall(r'^(?:class|def) (\w+)', tree, re.M))
        rest = {n for n in public if n not in defined}
        assert rest <= set(re.findall(rf'py:data:: cycle_nb\.{module}\.(\w+)', page)), (module, rest)


def test_models_page_tells_all_that_cards_tell(stage):
    page, cards = (stage/'models.md').read_text(), sorted((ROOT/'cycle_nb'/'pretrained').rglob('*.json'))
    assert len(cards) > 5
    for path in cards:
        card = json.loads(path.read_text())
        part = page[page.index(f'### {path.parent.name}/{path.stem}\n'):].split('\n### ')[0]
        assert str(card['seed']) in part and all(re.sub(r'([\\|*_`<$])', r'\\\1', k) in part for k in card['figures']), path
        assert f'{path.with_suffix(".safetensors").stat().st_size/1e6:.1f} MB' in part


def test_exercises_are_pages_without_solutions(stage):
    pages = sorted(stage.glob('exercises_*.ipynb'))
    assert len(pages) == 4 and all(f'\n{p.stem}\n' in (stage/'teaching.md').read_text() for p in pages)
    for p in pages: assert 'raise NotImplementedError()' in p.read_text() and 'SOLUTION' not in p.read_text()


def test_house_has_a_room_for_each_chapter(stage):
    page = (stage/'contributing.md').read_text()
    assert 'house.svg' not in page
    assert re.findall(r'href="(\d\d_\w+)\.html"', page) and sorted(re.findall(r'href="(\d\d_\w+)\.html"', page)) == [p.stem for p in CHAPTERS]


def test_picture_of_the_house_is_drawn_from_the_imports():
    "The file in CONTRIBUTING.md is the present one, it has every chapter, and no floor leans on one above it."
    assert '](docs/house.svg)' in (ROOT/'CONTRIBUTING.md').read_text()
    drawn = make_docs.HOUSE.read_text(encoding='utf-8')
    assert drawn == make_docs.house_file(), 'run make export'
    svg = ElementTree.fromstring(drawn)
    said = [t.text for t in svg.iter('{http://www.w3.org/2000/svg}text')]
    assert [p.stem for p in CHAPTERS] == sorted(t for t in said if re.match(r'\d\d_', t))
    found = make_docs.chapters()
    by_part = make_docs.parts((ROOT/'README.md').read_text(), found)
    below = make_docs.stands_on(by_part)
    assert below['ground'] == [] and 'ground' in below['the generator'] and all(list(by_part).index(q) < i for i, p in enumerate(by_part) for q in below[p])
    assert 'core' in make_docs.needs('01_files') and make_docs.needs('53_paper') == []


# --- the site, built -----------------------------------------------------------------------

def build(*args, timeout=900):
    return subprocess.run([sys.executable, ROOT/'tools'/'make_docs.py', *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    d = tmp_path_factory.mktemp('built')
    (d/'live').mkdir()
    (d/'live'/'index.html').write_text('<title>live</title>')
    p = build('--stage', d/'_proc', '--out', d/'html', '--live', d/'live')
    assert p.returncode == 0, (p.stdout + p.stderr)[-4000:]
    return d/'html'


@built_here
def test_site_needs_no_network(site):
    "Nothing a page needs to be read is fetched from elsewhere; only a picture of another house, a badge, may be missing."
    for page in site.rglob('*.html'):
        loads = re.findall(r'<(?:script|link|iframe)[^>]*(?:src|href)="(https?://[^"]+)', page.read_text(encoding='utf-8'))
        assert not loads, (page.name, loads)


@built_here
def test_site_links_are_alive(site):
    "Every link inside the site: the page, and the place in it."
    pages = {p: p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    ids = {p: set(map(unescape, re.findall(r'\b(?:id|name)="([^"]+)"', t))) for p, t in pages.items()}
    dead, seen = [], 0
    for p, t in pages.items():
        for href in set(re.findall(r'<a[^>]+href="([^"]+)"', t)) - {'#', ''}:
            url = urlparse(unescape(href))
            if url.scheme: continue
            to, seen = (p.parent/unquote(url.path)).resolve() if url.path else p, seen + 1
            if not to.exists() or url.fragment and to in ids and unquote(url.fragment) not in ids[to]: dead.append(f'{p.name}: {href}')
    assert seen > 2000 and not dead, dead[:20]


@built_here
def test_site_shows_equations_figures_and_parameters(site):
    text = (site/'19_encoder.html').read_text(encoding='utf-8')
    assert '<math' in text and '$$' not in re.sub(r'<pre.*?</pre>', '', text, flags=re.S) and 'VBox(children' not in text
    figures = re.findall(r'<img alt="([^"]*)" src="_images/', text)
    assert len(figures) >= 3 and all(f.startswith('Figure: ') for f in figures)
    plain = ' '.join(unescape(re.sub(r'<[^>]+>', '', (site/'api'/'encoder.html').read_text(encoding='utf-8'))).split())
    assert 'add_deltas(w, delta)' in plain and 'delta (Tensor) – (B,L-1,D)' in plain
    assert 'pixels' in plain and 'mean w included' in plain and '\\' not in plain.split('Contents')[0].split('From an image')[-1]
    assert 'live/index.html' in (site/'index.html').read_text() and (site/'live'/'index.html').exists()


@pytest.fixture(scope='module')
def browser():
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not path: pytest.skip('no browser')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield b
        b.close()


def opened(browser, page, width=1280):
    "A page from its file, with whatever it asks the network for."
    tab, asked = browser.new_page(viewport=dict(width=width, height=900)), []
    tab.route(re.compile('^https?:'), lambda r: (asked.append(r.request.url), r.abort()))
    tab.goto(page.as_uri())
    return tab, asked


@built_here
def test_site_can_be_searched(site, browser):
    "In a browser, from the files: a word of a lesson and a name of the library are found."
    for words, want in (('pivotal tuning', '26_tune.html'), ('add_deltas', 'api/encoder.html')):
        tab, asked = opened(browser, site/'search.html')
        tab.goto((site/'search.html').as_uri() + '?q=' + words.replace(' ', '+'))
        tab.wait_for_selector(f'#search-results a[href*="{want}"]', timeout=60_000)
        assert not asked
        tab.close()


@built_here
@pytest.mark.parametrize('width', [1280, 390])
def test_site_fits_the_screen(site, browser, width):
    "Nothing is wider than the window; equations have a height; the house leads into its rooms."
    for name in ('index', '12_gan', '53_paper', 'models', 'api/encoder', 'contributing', 'teaching'):
        tab, asked = opened(browser, site/f'{name}.html', width)
        assert tab.evaluate('document.scrollingElement.scrollWidth <= innerWidth + 1'), name
        if name == '12_gan': assert all(h > 10 for h in tab.evaluate('[...document.querySelectorAll("div.equation math")].map(m => m.getBoundingClientRect().height)'))
        if name == 'contributing':
            tab.click('svg.house a[href="19_encoder.html"]')
            tab.wait_for_url('**/19_encoder.html')
        assert not [a for a in asked if 'badge' not in a], asked
        tab.close()


@built_here
@pytest.mark.parametrize('body, words', [
    ('[nowhere](nowhere.ipynb)', 'nowhere'), ('$$ \\nosuchcommand{b} $$', 'equation'), ('$\\nosuchcommand$', 'equation'), ('fine: $\\big(a\\big)$', '')])
def test_a_flaw_stops_the_build(tmp_path, body, words):
    "The checks above can fail: the same configuration on one page."
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/'index.md').write_text(f'# T\n\n{body}\n')
    cmd = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-c', ROOT/'docs', tmp_path/'in', tmp_path/'out']
    p = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, timeout=120)
    assert (p.returncode != 0) == bool(words) and words in p.stderr, p.stderr


def test_live_page_must_be_one(tmp_path):
    p = build('--stage', tmp_path/'_proc', '--live', tmp_path)
    assert p.returncode == 2 and 'index.html' in p.stderr and not (tmp_path/'_proc').exists()


@pytest.mark.parametrize('path', sorted((ROOT/'nbs').glob('*.ipynb')), ids=lambda p: p.stem)
def test_no_paragraph_stands_twice(path):
    "What an edit left behind: a cell or a paragraph that a reader meets a second time."
    texts = [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown']
    said = collections.Counter(p.strip() for t in texts for p in t.split('\n\n') if len(p) > 80)
    assert not [p[:80] for p, n in said.items() if n > 1]


def test_glossary_sends_to_chapters_that_explain_its_terms():
    "In the order of the alphabet, each term once; the chapter's prose has the word."
    rows = [[c.strip() for c in line.split('|')[1:-1]] for line in (ROOT/'teaching'/'glossary.md').read_text().splitlines() if line.startswith('| ')][1:]
    terms = [r[0].casefold() for r in rows]
    assert terms == sorted(set(terms)) and len(terms) > 50
    for term, what, stem in rows:
        text = '\n'.join(''.join(c['source']) for c in json.loads((ROOT/'nbs'/f"{stem.strip('`')}.ipynb").read_text())['cells'] if c['cell_type'] == 'markdown')
        words = [w.strip(' )') for w in re.split(r',| \(| ψ| Δ| of leaving W', term) if w.strip(' )')]
        assert what.endswith('.') and any(re.search(re.escape(w), text, re.I) for w in words), (term, stem)
