"""Build a chapter: text -> notebook -> exported module -> executed notebook with small figures.

    python tools/nb.py text 04_layers --to DIR     notebook -> DIR/04_layers.py (percent format)
    python tools/nb.py build 04_layers --from DIR  DIR/04_layers.py -> nbs/04_layers.ipynb, exported and executed
    python tools/nb.py execute [04_layers ...]     run again what is in nbs/ and keep the new outputs
"""
import argparse, base64, io, os, re, subprocess, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
SKIP = re.compile(r'^#\|\s*eval:\s*false', re.M)

def small_png(data, quality=82):
    "Figure bytes as JPEG where that is smaller (photographs), else as a palette PNG."
    from PIL import Image
    im = Image.open(io.BytesIO(data)).convert('RGB')
    best = ('image/png', data)
    for mime, kw, pic in (('image/png', dict(format='PNG', optimize=True), im.quantize(128)),
                          ('image/jpeg', dict(format='JPEG', quality=quality), im)):
        out = io.BytesIO()
        pic.save(out, **kw)
        if out.tell() < .9*len(best[1]): best = (mime, out.getvalue())
    return best

def shrink(nb):
    "Re-encode figures and drop what does not belong in git."
    for cell in nb.cells:
        cell.metadata.pop('execution', None)
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            data.pop('application/vnd.jupyter.widget-view+json', None)
            out.get('metadata', {}).clear()
            if 'image/png' in data:
                mime, raw = small_png(base64.b64decode(data.pop('image/png')))
                data[mime] = base64.b64encode(raw).decode()
    nb.metadata.pop('widgets', None)

def execute(path, timeout=600):
    "Run every cell that nbdev would test, in the notebook's folder; keep the outputs."
    nb, skipped = nbformat.read(path, 4), []
    for c in nb.cells:
        if c.cell_type == 'code' and SKIP.search(c.source):
            skipped.append((c, c.source)); c.source = ''
    t = time.time()
    try: NotebookClient(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    finally:
        for c, src in skipped: c.source = src
    shrink(nb)
    nb.metadata = nbformat.from_dict({'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}})
    nbformat.write(nb, path)
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', str(path)], check=True, cwd=ROOT)
    print(f'{path.name}: {time.time()-t:.1f} s, {path.stat().st_size/1e3:.0f} kB', flush=True)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['text', 'build', 'execute'])
    p.add_argument('names', nargs='*')
    p.add_argument('--to', type=Path); p.add_argument('--from', dest='src', type=Path)
    p.add_argument('--no-run', action='store_true', help='build: convert and export only')
    a = p.parse_args()
    os.environ['PYTHONPATH'] = str(ROOT) + os.pathsep + os.environ.get('PYTHONPATH', '')
    names = a.names or [f.stem for f in sorted(NBS.glob('*.ipynb'))]
    if a.what in ('text', 'build'): import jupytext
    for name in names:
        f = NBS/f'{name}.ipynb'
        if a.what == 'text': jupytext.write(jupytext.read(f), a.to/f'{name}.py', fmt='py:percent')
        if a.what == 'build':
            jupytext.write(jupytext.read(a.src/f'{name}.py', fmt='py:percent'), f)
            subprocess.run([Path(sys.executable).with_name('nbdev-export')], check=True, cwd=ROOT)
        if a.what != 'text' and not a.no_run: execute(f)

if __name__ == '__main__': main()
