"""One deck of slides for each part of the course, from the lessons as they are: nothing is executed, nothing is fetched.

    python tools/make_slides.py [--out _docs/slides]

A lesson gives its title and promise, then a slide for each question, equation, figure or thing to move, with the words before and
after it, then what fails. Each deck is one HTML file; arrow keys turn its pages, and a browser prints it, a slide a page.
"""
import argparse, html, re, sys
from pathlib import Path
from nbconvert.filters import markdown2html

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT/'tools'), str(ROOT/'docs')]
from conf import mathml
from make_docs import NBS, book, read, text

EQUATION = re.compile(r'\$\$(.+?)\$\$', re.S)
WORDS = 300         # characters of a text on a slide, up to the end of a sentence
STYLE = """
body { margin: 0; font: 24px/1.4 system-ui, sans-serif; color: #222; background: #fff }
section { box-sizing: border-box; min-height: 100vh; padding: 3vh 5vw 7vh; break-after: page; position: relative }
.on section { display: none } .on section.now { display: block }
h1 { margin: 22vh 0 0; font-size: 64px } h2 { margin: 0 0 .5em; font-size: 38px } h1 + p { font-size: 32px; max-width: 26em }
p { max-width: 48em; margin: .5em 0 } math { font-size: 1.1em } .equation { margin: .6em 0; padding: .2em 0; overflow: auto hidden }
img { max-width: 100% } .figure > img { height: 50vh; object-fit: contain; object-position: left }
footer { position: absolute; left: 5vw; right: 5vw; bottom: 2vh; font-size: 16px; opacity: .6 }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616 } .figure > img { background: #fff; padding: 6px } }
@page { size: 1280px 720px; margin: 0 }
@media print {
  body { font-size: 22px; color: #222; background: #fff }
  section, .on section { display: flex; flex-direction: column; height: 100vh; min-height: 0; overflow: hidden }
  section > * { flex-shrink: 0 }
  .figure { flex: 0 1 66vh; min-height: 0 } .figure > img, .figure > svg { height: 100% }
  .cycle-player { display: flex; flex: 0 1 auto; flex-direction: column; min-height: 0 } .cycle-player label { display: none !important }
  .cycle-player > div { flex: 0 1 60vh; min-height: 0 } .cycle-player figure { height: 100% }
  .cycle-player img { height: calc(100% - 2.2em) !important; width: auto !important } .cycle-player figcaption { max-width: none !important }
}
"""
SCRIPT = """
const pages = [...document.querySelectorAll('section')];
let at = Math.min(pages.length, Math.max(1, parseInt(location.hash.slice(1)) || 1)) - 1;
const show = k => { pages[at].classList.remove('now'); at = Math.min(pages.length - 1, Math.max(0, k));
  pages[at].classList.add('now'); history.replaceState(null, '', '#' + (at + 1)); scrollTo(0, 0) };
for (const e of document.querySelectorAll('.equation')) {       // a wide one becomes smaller, on a screen and on paper
  e.style.width = 'max-content';
  e.style.cssText = `font-size: min(1em, ${88*parseFloat(getComputedStyle(e).fontSize)/e.offsetWidth}vw)` }
document.body.classList.add('on'); show(at);
addEventListener('keydown', e => {
  const by = {ArrowRight: 1, PageDown: 1, ' ': 1, ArrowLeft: -1, PageUp: -1, Home: -1e9, End: 1e9}[e.key];
  if (by) { e.preventDefault(); show(at + by) } });
addEventListener('hashchange', () => show((parseInt(location.hash.slice(1)) || 1) - 1));
"""


# --- what a lesson says --------------------------------------------------------------------

def words(source, most=WORDS):
    "The first plain paragraph of a Markdown text, to the end of a sentence; no lists, tables, equations."
    source = EQUATION.sub('', re.sub(r'^```.*?^```', '', source, flags=re.M | re.S))
    for p in re.split(r'\n\s*\n', source):
        p = ' '.join(p.split())
        if not p or re.match(r'[#>|*-] |\d+\. |[#|>]|!\[|---', p): continue
        cut = re.match(rf'(.{{1,{most}}}(?<!\bal)[.?!:])(?= [^a-z]|$)', p)
        return (cut[1] if cut else p).rstrip(':') + ('' if not cut or cut[1][-1] != ':' else '.')
    return ''


def to_html(source):
    "Markdown with formulas as HTML with MathML."
    kept = []
    def keep(m): kept.append(mathml(m[1], False)); return f'\x01{len(kept) - 1}\x01'
    body = markdown2html(re.sub(r'(?<![\\$])\$([^$\n]+?)\$', keep, source))
    return re.sub('\x01(\\d+)\x01', lambda m: kept[int(m[1])], body)


def figures(cell, about):
    "The pictures and players among a cell's saved outputs, as HTML."
    for out in cell.get('outputs', []):
        data = {k: ''.join(v) for k, v in out.get('data', {}).items() if isinstance(v, (str, list))}
        mime = next((m for m in ('image/png', 'image/jpeg') if m in data), None)
        if mime: yield f'<div class="figure"><img alt="{html.escape(about)}" src="data:{mime};base64,{"".join(data[mime].split())}"></div>'
        elif 'image/svg+xml' in data: yield f'<div class="figure">{data["image/svg+xml"]}</div>'
        elif re.search('<img|<figure|<svg', data.get('text/html', '')): yield data['text/html']


def sections(nb):
    "A lesson's text and figures by heading, in order: (heading, [('text' or 'figure', what)])."
    found, hidden = [], r'^#\|\s*hide\b'
    for c in nb['cells'][2:]:
        if c['cell_type'] == 'markdown':
            for i, piece in enumerate(re.split(r'^#+ (.+)$', text(c), flags=re.M)):
                if i % 2: found.append((piece, []))
                elif piece.strip() and found: found[-1][1].append(('text', piece))
        elif found and not re.search(hidden, text(c), re.M):
            found[-1][1].extend(('figure', f) for f in figures(c, f'Figure: {found[-1][0]}'))
    return found


def fails(items):
    "A section's list, each point to the end of its first sentence."
    whole = '\n'.join(what for kind, what in items if kind == 'text')
    points = [' '.join(p.split()) for p in re.findall(r'^\s*- (.+(?:\n(?!\s*-|\n).+)*)', whole, re.M)]
    return '\n'.join('- ' + (words(p.lstrip('*'), 200) and re.match(r'.+?[.?!](?:\*\*)?(?= |$)(?: .+?[.?!](?= |$))?|.+', p)[0]) for p in points)


def slides(nb):
    "Pairs (heading, HTML) of a lesson, without its title."
    for heading, items in sections(nb):
        if re.match('Exercise', heading): continue
        if heading == 'What fails':
            yield heading, to_html(fails(items))
            continue
        if re.search(r'\?|[Qq]uestion', heading) and all(kind == 'text' and '$$' not in what for kind, what in items):
            yield heading, ''.join(to_html(words(what)) for _, what in items[:1])
            continue
        before, seen, said = '', 0, set()
        def once(source):
            new = (w := words(source)) not in said
            said.add(w)
            return to_html(w) if new and w else ''
        for k, (kind, what) in enumerate(items):
            if kind == 'text':
                formulas = ''.join(f'<div class="equation">{mathml(f, True)}</div>' for f in EQUATION.findall(what))
                lead = once(what)
                if formulas: yield heading, before + lead + formulas
                before = '' if formulas or (k and items[k - 1][0] == 'figure') else before + lead
            elif seen < 3:
                after = items[k + 1][1] if k + 1 < len(items) and items[k + 1][0] == 'text' else ''
                yield heading, before + what + once(after)
                before, seen = '', seen + 1


# --- decks ---------------------------------------------------------------------------------

def deck(part, stems, found):
    "One part as a page."
    body = [f'<section><h1>{html.escape(part.capitalize())}</h1><p>{html.escape(" · ".join(found[s]["title"] for s in stems))}</p></section>']
    for s in stems:
        title, nb = html.escape(found[s]['title']), read(NBS/f'{s}.ipynb')
        body.append(f'<section id="{s}"><h1>{title}</h1>{to_html(found[s]["promise"])}</section>')
        for heading, inside in slides(nb):
            body.append(f'<section><h2>{to_html(heading).replace("<p>", "").replace("</p>", "")}</h2>{inside}<footer>{title} · {s}</footer></section>')
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(part)}</title>'
            f'<style>{STYLE}</style><body>{"".join(body)}<script>{SCRIPT}</script></body></html>')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=ROOT/'_docs'/'slides')
    out, (found, by_part) = p.parse_args().out, book()
    out.mkdir(parents=True, exist_ok=True)
    for part, stems in by_part.items():
        lessons = [s for s in stems if found[s]['kind'] == 'lesson']
        if not lessons: continue
        path = out/f'{re.sub("[^a-z]+", "-", part.lower())}.html'
        path.write_text(deck(part, lessons, found), encoding='utf-8')
        print(f'{path}: {len(lessons)} lessons, {path.read_text(encoding="utf-8").count("<section")} slides, {path.stat().st_size/1e6:.1f} MB')


if __name__ == '__main__': main()
