"""Work on the chapters: as text, as notebooks, executed.

    python tools/nb.py text 10_layers --to DIR     notebook -> DIR/10_layers.py (percent format)
    python tools/nb.py build 10_layers --from DIR  DIR/10_layers.py -> nbs/10_layers.ipynb, exported and executed
    python tools/nb.py execute [10_layers ...]     run again what is in nbs/ and keep the new outputs
    python tools/nb.py hosted [10_layers ...]      a badge and an install cell, made from settings.ini
    python tools/nb.py readme                      nbs/index.ipynb -> README.md
"""
import argparse, base64, hashlib, io, os, re, subprocess, sys, time
from collections import Counter
from configparser import ConfigParser
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
SKIP = re.compile(r'^#\|\s*(eval:\s*false|slow|gpu)\s*$', re.M)    # as nbdev-test does
PICTURES = ('image/png', 'image/jpeg')
KERNEL = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}


def write(nb, path):
    "Write a notebook in one step, so that nobody reads half of it."
    tmp = path.with_name(f'.{path.stem}.{os.getpid()}.tmp')
    nbformat.write(nb, tmp)
    os.replace(tmp, path)


def stable_ids(nb):
    "Cell ids that depend on the text only: building twice changes nothing."
    seen = Counter()
    for c in nb.cells:
        h = hashlib.sha1(c.source.encode()).hexdigest()[:8]
        c['id'] = f'{h}-{seen[h]}' if seen[h] else h
        seen[h] += 1
    return nb


def small_figure(data, quality=76):
    "Figure bytes as palette PNG where that changes little (plots), else PNG or JPEG, the smaller."
    from PIL import Image, ImageChops, ImageStat
    im = Image.open(io.BytesIO(data)).convert('RGB')
    pal = im.quantize(255, method=Image.Quantize.MAXCOVERAGE)
    off = max(ImageStat.Stat(ImageChops.difference(im, pal.convert('RGB'))).rms)
    tries = [('image/png', dict(format='PNG', optimize=True), pal if off < 2 else im),
             ('image/jpeg', dict(format='JPEG', quality=quality), im)]
    best = ('image/png', data)
    for mime, kw, pic in tries:
        out = io.BytesIO()
        pic.save(out, **kw)
        if out.tell() < .9*len(best[1]): best = mime, out.getvalue()
    return best


def shrink(nb):
    "Re-encode figures and drop what does not belong in git."
    for cell in nb.cells:
        cell.metadata.pop('execution', None)
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            if data.pop('application/vnd.jupyter.widget-view+json', None): data.pop('text/plain', None)
            out.get('metadata', {}).clear()
            pictures = [data.pop(m) for m in PICTURES if m in data]
            if pictures:
                mime, raw = small_figure(base64.b64decode(pictures[0]))
                data[mime] = base64.b64encode(raw).decode()
        cell.metadata.pop('lines_to_next_cell', None)
        if 'outputs' in cell: cell.outputs = [o for o in cell.outputs if not is_bar(o) and o.get('data', True)]
    nb.metadata.pop('widgets', None)


def is_bar(out):
    "Whether an output is what a progress bar leaves."
    html = ''.join(out.get('data', {}).get('text/html', 'x'))
    return not html.strip() or any(w in html for w in ('<progress', 'table.fastprogress', '.progress-bar-'))


def execute(path, timeout=600):
    "Run every cell that nbdev would test, in the notebook's folder; keep the outputs."
    from nbclient import NotebookClient
    nb, skipped = nbformat.read(path, 4), []
    for c in nb.cells:
        if c.cell_type == 'code' and SKIP.search(c.source):
            skipped.append((c, c.source))
            c.source = ''
    t, where = time.time(), {'metadata': {'path': str(path.parent)}}
    try: NotebookClient(nb, timeout=timeout, kernel_name='python3', resources=where).execute()
    finally:
        for c, src in skipped: c.source = src
    shrink(nb)
    nb.metadata = nbformat.from_dict(KERNEL)
    write(nb, path)
    nbdev('clean', '--fname', str(path))
    print(f'{path.name}: {time.time()-t:.1f} s, {path.stat().st_size/1e3:.0f} kB', flush=True)


def nbdev(what, *args):
    "Run one of nbdev's commands from this interpreter's environment."
    subprocess.run([Path(sys.executable).with_name(f'nbdev-{what}'), *args], check=True, cwd=ROOT)


def build(name, src):
    "Text to notebook, exported; a cell whose source has not changed keeps its output."
    import jupytext
    from jupytext.combine import combine_inputs_with_outputs
    nb = jupytext.read(src/f'{name}.py', fmt='py:percent')
    if (NBS/f'{name}.ipynb').exists():
        nb = combine_inputs_with_outputs(nb, nbformat.read(NBS/f'{name}.ipynb', 4), 'py:percent')
    nb.metadata = nbformat.from_dict(KERNEL)
    write(stable_ids(nb), NBS/f'{name}.ipynb')
    nbdev('export')
    nbdev('clean', '--fname', str(NBS/f'{name}.ipynb'))


def readme():
    "README.md from the index, its figures as files in nbs/figures."
    from nbconvert import MarkdownExporter
    nb = nbformat.read(NBS/'index.ipynb', 4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not re.search(r'^#\|\s*hide\b', c.source, re.M)]
    for c in nb.cells:
        if re.search(r'^#\|\s*hide_input\b', c.source, re.M): c.source = ''
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
    text, extra = MarkdownExporter().from_notebook_node(nb)
    folder = NBS/'figures'
    for name, data in extra['outputs'].items():
        folder.mkdir(exist_ok=True)
        (folder/f'index_{name}').write_bytes(data)
        text = text.replace(f']({name})', f'](nbs/figures/index_{name})')
    for k, (uri, data) in enumerate(re.findall(r'src="(data:image/webp;base64,([^"]*))"', text)):    # a README shows files only
        (folder/f'index_film_{k}.webp').write_bytes(base64.b64decode(data))
        text = text.replace(uri, f'nbs/figures/index_film_{k}.webp')
    text = text.replace('](../', '](')                  # the README stands one folder higher
    text = re.sub(r'```python\s*```', '', re.sub(r'[ \t]+$', '', text, flags=re.M))
    note = '<!-- Generated from nbs/index.ipynb by `make readme`: edit that. -->\n\n'
    (ROOT/'README.md').write_text(note + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n')


BADGE = re.compile(r'\n\n\[!\[Open in Colab\]\([^)]*\)\]\(https://colab\S*?/github/[^)]*\)(?=\n|$)')
INSTALL = """#| hide
# On a hosted notebook this installs the package; where it is there already, nothing happens.
from importlib.util import find_spec
if find_spec("cycle_nb") is None:
    %pip install -q "cycle-nb @ git+{}"
"""


def repository():
    "Where the project lives, from settings.ini: the address itself, and its owner and name."
    ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    home = ini['DEFAULT']['repository'].strip().rstrip('/')
    if m := re.fullmatch(r'https://github\.com/([^/]+/[^/]+)', home): return home, m[1]
    raise SystemExit(f'settings.ini: repository = {home}: the badge needs https://github.com/OWNER/NAME')


def host(nb, name):
    "A notebook with its badge and its install cell, once each, whatever it had before; nothing else moves."
    home, slug = repository()
    link = f'https://colab.research.google.com/github/{slug}/blob/main/nbs/{name}.ipynb'
    badge = f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})'
    nb.cells = [c for c in nb.cells if INSTALL.split('\n')[1] not in c.source]
    second = nb.cells[1]
    second.source = f'{BADGE.sub("", second.source).rstrip()}\n\n{badge}'
    cell = nbformat.v4.new_code_cell(INSTALL.format(home).strip())
    cell.id = hashlib.sha1(cell.source.encode()).hexdigest()[:8]
    at = 3 if nb.cells[2].source.startswith('#| default_exp') else 2
    nb.cells.insert(at, cell)
    return nb


def hosted(names):
    "Badge and install cell for all notebooks, or for some; running it again changes nothing."
    for name in names or [f.stem for f in sorted(NBS.glob('[!.]*.ipynb'))]:
        path = NBS/f'{name}.ipynb'
        write(host(nbformat.read(path, 4), name), path)
        nbdev('clean', '--fname', str(path))


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['text', 'build', 'execute', 'hosted', 'readme'])
    p.add_argument('names', nargs='*')
    p.add_argument('--to', type=Path)
    p.add_argument('--from', dest='src', type=Path)
    p.add_argument('--no-run', action='store_true', help='build: convert and export only')
    a = p.parse_args()
    os.environ['PYTHONPATH'] = str(ROOT) + os.pathsep + os.environ.get('PYTHONPATH', '')
    os.environ['PYDEVD_DISABLE_FILE_VALIDATION'] = '1'
    if a.what == 'readme': return readme()
    if a.what == 'hosted': return hosted(a.names)
    for name in a.names or [f.stem for f in sorted(NBS.glob('[!.]*.ipynb'))]:
        path = NBS/f'{name}.ipynb'
        if a.what == 'text':
            import jupytext
            jupytext.write(jupytext.read(path), a.to/f'{name}.py', fmt='py:percent')
        if a.what == 'build': build(name, a.src)
        if a.what != 'text' and not a.no_run: execute(path)


if __name__ == '__main__': main()
