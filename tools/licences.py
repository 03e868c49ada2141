"""The licences of what this package requires, as the installed packages state them.

    python tools/licences.py            print the table
    python tools/licences.py --write    ... into LICENCES.md
"""
import re, sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Licences of what is required

cycle_nb itself is under Apache-2.0 (`LICENSE`). The packages it requires are not part of it; each comes under its own licence, as it states
it. The second table is needed only for the extras and for work on the project. Made by `python tools/licences.py --write`; a test compares.
"""


NOT_IN_DEV = dict(nbgrader='BSD-3-Clause')      # need not be installed where the table is made; as its repository states


def required(*keys):
    "Names of packages in sections of settings.ini; without names, in all that end in `requirements`."
    ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    keys = keys or [k for k in ini['DEFAULT'] if k.endswith('requirements')]
    lines = [l for k in keys for l in ini['DEFAULT'].get(k, '').splitlines() if l.strip()]
    return sorted({re.match(r'[\w.-]+', l.strip())[0] for l in lines}, key=str.lower)


def licence(name):
    "What a package says of itself, in few words; None when it is not installed."
    try: m = metadata(name)
    except PackageNotFoundError: return NOT_IN_DEV.get(name)
    if found := m.get('License-Expression'): return found
    kinds = [c.split(' :: ')[-1] for c in m.get_all('Classifier', []) if c.startswith('License ::')]
    text = (m.get('License') or '').strip().splitlines()
    return ', '.join(k for k in kinds if k != 'OSI Approved') or (text[0][:60] if text else 'unknown')


def table(names):
    "Rows of Markdown."
    return ['| package | licence |', '|---|---|', *(f'| {n} | {licence(n) or "not installed"} |' for n in names)]


def page():
    "The whole file."
    first = required('requirements')
    more = [n for n in required() if n not in first]
    return '\n'.join([HEAD, *table(first), '', '## Extras', '', *table(more), ''])


if __name__ == '__main__':
    if '--write' in sys.argv: (ROOT/'LICENCES.md').write_text(page(), encoding='utf-8')
    else: print(page())
