"""The documentation site, from the notebooks as they are: nothing is executed, nothing is fetched.

    python tools/make_docs.py [--out _docs/html] [--live DIR]     lay out the pages in _proc/, then run Sphinx
    python tools/make_docs.py --house                             only draw docs/house.svg, the picture in CONTRIBUTING.md

--live DIR: a folder with an index.html, a page that runs without a kernel; the front links to it.
"""
import argparse, ast, html, json, re, shutil, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB, STAGE = ROOT/'nbs', ROOT/'cycle_nb', ROOT/'_proc'
LONG = 25       # lines of exported code that a lesson shows unfolded


# --- what there is -------------------------------------------------------------------------

def read(path): return json.loads(path.read_text(encoding='utf-8'))


def text(cell): return ''.join(cell['source'])


def chapters(nbs=NBS):
    "Stem -> title, promise and kind ('lesson', 'tool') of every numbered notebook, in order."
    found = {}
    for path in sorted(nbs.glob('[0-9][0-9]_*.ipynb')):
        first, second = (text(c) for c in read(path)['cells'][:2])
        title, promise = re.match(r'# (.+)\n+> (.+)', first).groups()
        kind = re.search(r'\*(Lesson|Tool)\*', second)
        found[path.stem] = dict(title=title, promise=promise, kind=kind[1].lower() if kind else 'tool')
    return found


def parts(index, stems):
    "Name of each part -> its chapters: those of the index's table, and what it leaves out, by number."
    rows = re.findall(r'^\| ([a-z][^|]*?) \|(.*)\|\s*$', index, re.M)
    listed = [(name, re.findall(r'`(\d\d_\w+)`', rest)) for name, rest in rows]
    starts = sorted((min(found), name) for name, found in listed if found)
    if not starts: raise SystemExit('docs: the index has no table of parts')
    home = {s: name for name, found in listed for s in found}
    for s in stems: home.setdefault(s, max((a, name) for a, name in starts if a <= max(s, starts[0][0]))[1])
    return {name: [s for s in stems if home[s] == name] for _, name in starts}


def book():
    "The chapters, and the parts they belong to by the index."
    found = chapters()
    return found, parts('\n'.join(text(c) for c in read(NBS/'index.ipynb')['cells']), found)


def public_names(lib=LIB):
    "Module -> the names in its `__all__`."
    found = {}
    for path in sorted(lib.glob('[!_]*.py')):
        for n in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '__all__':
                found[path.stem] = ast.literal_eval(n.value)
    return found


def imports(path):
    "Modules of the package that a module imports."
    tree = ast.parse(path.read_text(encoding='utf-8'))
    mods = ['cycle_nb.'*n.level + n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return sorted({m.split('.')[1] for m in mods if m.startswith('cycle_nb.')})


# --- notebooks -----------------------------------------------------------------------------

def tags(source, kind):
    "How a code cell is shown, from nbdev's directives."
    directives = set(re.findall(r'^#\|\s*(\w+)', source, re.M))
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
    if 'hide' in directives or 'default_exp' in directives: return ['remove-cell']
    if 'hide_input' in directives: return ['remove-input']
    only_imports = all(re.match(r'(from|import|[ )]|#|$)', l) for l in code.splitlines())
    folds = 'export' in directives and (kind == 'tool' or code.count('\n') >= LONG)
    return ['hide-input'] if folds or only_imports else []


def linked(source, stems):
    "Markdown in which `19_encoder` is a link to that chapter; code blocks are left alone."
    pieces = re.split(r'(^```.*?^```|\[[^\]]*\]\([^)]*\))', source, flags=re.M | re.S)
    name = r'`(\d\d_\w+)(\.ipynb)?`'
    link = lambda m: f'[{m[0]}]({m[1]}.ipynb)' if m[1] in stems else m[0]
    return ''.join(p if i % 2 else re.sub(name, link, p) for i, p in enumerate(pieces))


def exports(source, module, names):
    "A chapter's second cell: what it says that it exports links to the reference."
    start = source.find('**It exports**')
    role = lambda m: f'{{py:obj}}`~cycle_nb.{module}.{m[1]}`' if m[1] in names else m[0]
    return source[:start] + re.sub(r'`(\w+)`', role, source[start:]) if start >= 0 else source


def is_widget(out):
    "Whether an output is nothing but a widget's name: without a kernel there is nothing to see."
    data = out.get('data', {})
    return set(data) == {'text/plain'} and bool(re.match(r'\w+\(children=', ''.join(data['text/plain'])))


def page(nb, stems, kind='lesson', extra=(), module='', names=()):
    "A notebook as the site shows it: directives become tags, figures get a text for screen readers."
    heading, cells = 'cycle_nb', []
    for c in nb['cells']:
        src = text(c)
        c = dict(c, metadata=dict(c.get('metadata', {})))
        if c['cell_type'] == 'markdown':
            heading = ([heading] + re.findall(r'^#+ (.+)', src, re.M))[-1]
            src = linked(anywhere(exports(src, module, names)), stems)
        if c['cell_type'] == 'code':
            c['metadata'] |= dict(tags=tags(src, kind), mystnb=dict(image=dict(alt=f'Figure: {heading}')))
            src = re.sub(r'^#\|.*\n?', '', src, flags=re.M)
            c['outputs'] = [o for o in c['outputs'] if not is_widget(o)]
        cells.append(dict(c, source=src))
    cells += [dict(cell_type='markdown', id=f'docs-{i}', metadata={}, source=s) for i, s in enumerate(extra)]
    meta = dict(nb['metadata'], language_info=dict(name='python', pygments_lexer='ipython3'))
    return dict(nb, cells=cells, metadata=meta)


def toctree(caption, entries, *options):
    "A list of pages for the sidebar."
    lines = ['```{toctree}', ':hidden:', f':caption: {caption}', *options, '', *entries, '```']
    return '\n'.join(lines)


def contents(found, by_part):
    "The sidebar: the lessons part by part, as a book; then the tools, the reference, the project."
    short = [c['title'].split(':')[0] for c in found.values()]
    name = lambda c: c['title'] if short.count(c['title'].split(':')[0]) > 1 else c['title'].split(':')[0]
    shown = {s: f'{name(c)} <{s}>' for s, c in found.items()}
    for part, stems in by_part.items():
        lessons = [shown[s] for s in stems if found[s]['kind'] == 'lesson']
        if lessons: yield toctree(part[0].upper() + part[1:], lessons)
    yield toctree('Tools', [shown[s] for s in found if found[s]['kind'] == 'tool'])
    yield toctree('Reference', ['api/index', 'models'])
    yield toctree('Project', ['glossary', 'teaching', 'contributing', 'changelog', 'citation'])


# --- reference -----------------------------------------------------------------------------

def constants(path, names):
    "Public constants of a module with the comment beside each."
    source = path.read_text(encoding='utf-8')
    lines = source.splitlines()
    for n in ast.parse(source).body:
        targets = [t for a in getattr(n, 'targets', [getattr(n, 'target', None)]) if a
                   for t in ast.walk(a) if isinstance(t, ast.Name)]
        if not isinstance(n, (ast.Assign, ast.AnnAssign)): continue
        said = [m[1] for l in lines[n.lineno - 1:n.end_lineno] if (m := re.search(r'\s#:? (.+)$', l))]
        yield from ((t.id, said[0] if len(said) == 1 else '') for t in targets if t.id in names)


def title(words, mark='='): return [words, mark*len(words), '']


def api_page(module, names, stem, promise):
    "One module's page: where it is explained, what it defines."
    lines = [*title(module), f'From :doc:`{stem} <../{stem}>`.', '',
             f'.. automodule:: cycle_nb.{module}', '   :members:', '']
    consts = dict(constants(LIB/f'{module}.py', names))
    if consts: lines += title('Constants', '-')
    for name, said in consts.items():
        said = re.sub(r'([\\*_|`])', r'\\\1', said)
        lines += [f'.. py:data:: cycle_nb.{module}.{name}', *([''] + [f'   {said}'] if said else []), '']
    return '\n'.join(lines)


def top_names():
    "The names of the package itself, as links to where they are described."
    source = (LIB/'__init__.py').read_text(encoding='utf-8')
    homes = re.search(r'_HOMES = dict\((.*?)\)', source, re.S)[1]
    return [f':py:obj:`~cycle_nb.{m}.{n}`' for n, m in re.findall(r"(\w+)='(\w+)'", homes)]


def api(stage, found):
    "Every module's page, and a list of them."
    names, folder = public_names(), stage/'api'
    folder.mkdir()
    rows = [*title('API reference'), f'The names that ``import cycle_nb`` gives: {", ".join(top_names())}. '
            'The rest lies in the modules:', '',
            '.. list-table::', '   :widths: 20 80', '']
    listed = ['', '.. toctree::', '   :hidden:', '']
    for stem, c in found.items():
        module = stem[3:]
        if module not in names: continue
        (folder/f'{module}.rst').write_text(api_page(module, names[module], stem, c['promise']), encoding='utf-8')
        promise = re.sub(r'([\\*_|])', r'\\\1', c['promise'].replace('`', '``'))
        rows += [f'   * - :doc:`{module}`', f'     - {promise}']
        listed.append(f'   {module}')
    (folder/'index.rst').write_text('\n'.join(rows + listed) + '\n', encoding='utf-8')


# --- model cards ---------------------------------------------------------------------------

FACTS = dict(kind='What it is', command='Made by', steps='Steps', batch='Batch', images='Images seen', data='Taught on',
             held='Images held out', seed='Seed', date='Date', device='Device', torch='torch', python='Python',
             commit='Commit', note='Note')


def value(v):
    "A number, a word, a list or a small table, as one cell of a table."
    if isinstance(v, dict): return ', '.join(f'{k} {value(x)}' for k, x in v.items())
    if isinstance(v, list): return ', '.join(value(x) for x in v)
    return f'{v:.4g}' if isinstance(v, float) else str(v)


def table(head, rows):
    "A Markdown table; nothing in it is markup."
    safe = lambda v: f'`{v}`' if v.startswith('cycle-nb ') else re.sub(r'([\\|*_`<$])', r'\\\1', v)
    return '\n'.join([f'| {" | ".join(head)} |', '|---|---|', *(f'| {safe(k)} | {safe(" ".join(value(v).split()))} |' for k, v in rows)])


def card_text(path):
    "A model card as Markdown: what, how well, how made, how to load."
    card = read(path)
    weights = path.with_suffix('.safetensors')
    size = f'{weights.stat().st_size/1e6:.1f} MB' if weights.exists() else 'missing'
    facts = [(FACTS[k], card[k]) for k in FACTS if card.get(k) not in (None, '', {}, [])]
    config = card.get('config') or {}
    out = [f'### {path.parent.name}/{path.stem}', '']
    if card.get('figures'): out += ['Measured when it was made:', '', table(['figure', 'value'], card['figures'].items()), '']
    out += [table(['fact', 'value'], [*facts, ('File', f'{weights.name}, {size}')]), '']
    if config: out += [f'`{card.get("class", "")}` with', '', table(['argument', 'value'], config.items()), '']
    known = {'figures', 'config', 'class', 'name', *FACTS}
    rest = [(k, card[k]) for k in card if k not in known and len(value(card[k])) < 2000]
    if rest: out += [table(['setting', 'value'], rest), '']
    return '\n'.join(out)


def models_page(folder=LIB/'pretrained'):
    "All cards on one page."
    out = ['# Models', '', 'The networks that come with the package, with how they were made and what was measured. '
           '`load_generator`, `load_encoder` and `load_bundle` load them by the names below; the figures are those of the '
           'moment each was made, on images it was not taught on.', '']
    for d in sorted(p for p in folder.iterdir() if p.is_dir()):
        out += [f'## {d.name}', '', *map(card_text, sorted(d.glob('*.json')))]
    return '\n'.join(out)


# --- the picture of the house --------------------------------------------------------------

HOUSE = ROOT/'docs'/'house.svg'
PICTURE = re.compile(r'!\[[^\]]*\]\(docs/house\.svg\)')     # in CONTRIBUTING.md; the site draws it with links
STYLE = ('<style>.house{font:11px sans-serif;background:#fff}.house text{fill:#222}.house .on{fill:#666;font-size:9px}'
         '.house rect{stroke:#999}.house .lesson{fill:#cfe8e8}.house .tool{fill:#f3f4f5}</style>')


def needs(stem, lib=LIB):
    "Modules that a chapter's module imports; none where it has no module."
    path = lib/f'{stem[3:]}.py'
    return imports(path) if path.exists() else []


def stands_on(by_part):
    "Part -> the other parts from which its chapters import, from the ground up."
    home = {s[3:]: part for part, stems in by_part.items() for s in stems}
    return {part: [p for p in by_part if p != part and any(home[m] == p for s in stems for m in needs(s))] for part, stems in by_part.items()}


def house(found, by_part, width=980, links=True):
    "The parts as floors, the chapters as rooms, the ground below; each room is a link. Under a floor's name: which others it imports from."
    box, high, left, out, y = (156, 24), 30, 170, [], 6
    per_row, number, below = (width - left)//(box[0] + 6), {part: i for i, part in enumerate(by_part, 1)}, stands_on(by_part)
    for part, stems in reversed(by_part.items()):
        out.append(f'<text x="4" y="{y + 12}">{number[part]} {html.escape(part)}</text>')
        if below[part]: out.append(f'<text class="on" x="4" y="{y + 24}">on {", ".join(str(number[p]) for p in below[part])}</text>')
        for i, s in enumerate(stems):
            x, yy = left + i % per_row*(box[0] + 6), y + i//per_row*high
            tip = html.escape(f'{found[s]["kind"]}: {found[s]["promise"]} Imports: {", ".join(needs(s)) or "nothing"}')
            room = (f'<title>{tip}</title><rect class="{found[s]["kind"]}" x="{x}" y="{yy}" width="{box[0]}" '
                    f'height="{box[1]}" rx="3"/><text x="{x + 6}" y="{yy + 16}">{s}</text>')
            out.append(f'<a href="{s}.html">{room}</a>' if links else f'<g>{room}</g>')
        y += max(1, -(-len(stems)//per_row))*high + 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" class="house" viewBox="0 0 {width} {y}" role="img" aria-label="The parts of the package as floors, '
            f'each chapter a room; imports go down">{"" if links else STYLE}{"".join(out)}</svg>')


def house_file():
    "The picture as a file of its own, for readers of CONTRIBUTING.md who have no site."
    return house(*book(), links=False).replace('><', '>\n<') + '\n'


# --- the site ------------------------------------------------------------------------------

QUESTIONS = 'part1', 'part2', 'reader'


def anywhere(source):
    "A page of the repository as a page of the site: its links to files become links to pages."
    source = re.sub(r'\]\((?:nbs/)?(\w+)\.ipynb\)', r'](\1.ipynb)', source.replace('](../', ']('))
    pages = {'README.md': 'index.ipynb', 'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md',
             'CITATION.cff': 'citation.md', 'teaching/README.md': 'teaching.md', 'teaching/mistakes.md': 'teaching_mistakes.md',
             'mistakes.md': 'teaching_mistakes.md', 'teaching/glossary.md': 'glossary.md', 'glossary.md': 'glossary.md',
             **{f'questions/{k}.md': f'teaching_questions_{k}.md' for k in QUESTIONS}}
    return re.sub(r'\]\(([\w./]+)\)', lambda m: f']({pages[m[1]]})' if m[1] in pages else m[0], source)


def exercises(save, found):
    "The students' notebooks as pages; gives their names."
    paths = sorted((ROOT/'teaching'/'release').glob('*/*.ipynb'))
    for path in paths: save(f'exercises_{path.stem}', page(read(path), found))
    return [f'exercises_{path.stem}' for path in paths]


def lay_out(stage=STAGE, live=None):
    "Everything Sphinx reads, in one folder."
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    found, by_part = book()
    save = lambda name, nb: (stage/f'{name}.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    names = public_names()
    for stem, c in found.items():
        module = stem[3:]
        save(stem, page(read(NBS/f'{stem}.ipynb'), found, c['kind'], reference(module, names), module, names.get(module, ())))
    front = ['<p><a href="live/index.html">Move the sliders here: the page runs without a kernel.</a></p>'] if live else []
    save('index', page(read(NBS/'index.ipynb'), found, 'lesson', [*front, *contents(found, by_part)]))
    if live: shutil.copytree(live, stage/'live'/'live')
    api(stage, found)
    (stage/'models.md').write_text(models_page(), encoding='utf-8')
    picture = f'```{{raw}} html\n{house(found, by_part)}\n```'
    written = {'glossary': 'teaching/glossary.md', 'contributing': 'CONTRIBUTING.md', 'changelog': 'CHANGELOG.md', 'teaching': 'teaching/README.md',
               'teaching_mistakes': 'teaching/mistakes.md', **{f'teaching_questions_{k}': f'teaching/questions/{k}.md' for k in QUESTIONS}}
    for name, source in written.items():
        body = PICTURE.sub(lambda _: picture, (ROOT/source).read_text(encoding='utf-8'))
        if name == 'teaching': body += '\n' + toctree('Teaching', [*exercises(save, found), *(k for k in written if k.startswith('teaching_'))]) + '\n'
        (stage/f'{name}.md').write_text(linked(anywhere(body), found), encoding='utf-8')
    cite = (ROOT/'CITATION.cff').read_text(encoding='utf-8')
    (stage/'citation.md').write_text(f'# Citing\n\n`CITATION.cff` of this repository:\n\n```yaml\n{cite}```\n', encoding='utf-8')
    return found


def reference(module, names):
    "A line at a chapter's end: its page in the reference."
    return [f'----\n\nReference: [`cycle_nb.{module}`](api/{module}.rst)'] if module in names else []


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=ROOT/'_docs'/'html')
    p.add_argument('--stage', type=Path, default=STAGE)
    p.add_argument('--live', type=Path)
    p.add_argument('--house', action='store_true')
    a = p.parse_args()
    if a.house: return HOUSE.write_text(house_file(), encoding='utf-8')
    if a.live and not (a.live/'index.html').is_file(): p.error(f'{a.live} has no index.html')
    found = lay_out(a.stage, a.live)
    print(f'{len(found)} chapters laid out in {a.stage}', flush=True)
    cmd = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html', '-c', ROOT/'docs', '-d', a.stage/'.doctrees', a.stage, a.out]
    code = subprocess.run([str(c) for c in cmd]).returncode
    if not code: print(f'the site: {a.out/"index.html"}')
    sys.exit(code)


if __name__ == '__main__': main()
