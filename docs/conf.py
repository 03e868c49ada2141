"Sphinx reads this; `make docs` runs tools/make_docs.py first, which lays out the pages in _proc/."
import inspect, re, sys
from configparser import ConfigParser
from pathlib import Path
from docutils.utils.math.latex2mathml import tex2mathml
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tools')]
from make_docs import public_names

ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
ini.read(ROOT/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

project, release, author = cfg['lib_name'], cfg['version'], cfg['author']
project_copyright = f'{author}, {cfg["license"]}'
extensions = ['myst_nb', 'sphinx.ext.autodoc']
exclude_patterns = ['_build']
nb_execution_mode = 'off'           # the notebooks keep their outputs
nb_render_markdown_format = 'myst'  # their tables are drawn as tables
nb_code_prompt_show, nb_code_prompt_hide = 'Show the code', 'Hide the code'
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 3
myst_update_mathjax = False
smartquotes_action = 'D'            # dashes only: "small" is a string of Python's
html_math_renderer = 'mathml'       # browsers draw MathML by themselves: no script, no network
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'          # types stand beside the parameters
html_theme = 'sphinx_book_theme'
html_title = f'{project} {release}'
html_static_path = [str(ROOT/'docs'/'_static')]
html_css_files = ['site.css']
html_theme_options = dict(show_toc_level=2, home_page_in_toc=True, use_download_button=True,
                          navbar_persistent=[])
if '/your_name/' not in cfg['repository']:
    html_theme_options |= dict(repository_url=cfg['repository'], use_repository_button=True)


# --- equations -----------------------------------------------------------------------------

SPELLED = {r'\\([bB]ig{1,2})(?![a-zA-Z])': r'\\\1l', r'\\dots(?![a-zA-Z])': r'\\ldots', r'\\texttt\b': r'\\text'}


def mathml(tex, block):
    "MathML of an equation; commands that docutils spells otherwise are translated."
    for old, new in SPELLED.items(): tex = re.sub(old, new, tex)
    return tex2mathml(tex.strip(), as_block=block)


def visit_math(self, node, block=False):
    "Write an equation into the page, or warn and show its source."
    from docutils.nodes import SkipNode
    from docutils.utils.math.latex2mathml import MathError
    from sphinx.util import logging
    try: html = mathml(node.astext(), block)
    except MathError as e:
        logging.getLogger(__name__).warning('equation: %s: %s', e, node.astext(), location=node)
        html = f'<code>{self.encode(node.astext())}</code>'
    self.body.append(f'<div class="equation">{html}</div>\n' if block else html)
    raise SkipNode


def visit_block(self, node): visit_math(self, node, True)


# --- parameters ----------------------------------------------------------------------------

NAMES = {name: f'cycle_nb.{module}.{name}' for module, names in public_names().items() for name in names}


def rst(text):
    "A docstring's plain text as reStructuredText: `name` is a link or code, nothing else is markup."
    parts = re.split(r'`([^`]+)`', text)
    for i, p in enumerate(parts):
        if i % 2 == 0: parts[i] = re.sub(r'([\\*_|`])', r'\\\1', p); continue
        name = p.removesuffix('()')
        code = f':py:obj:`~{NAMES[name]}`' if name in NAMES else f'``{p}``'
        apart = [r'\ ' if c and not c.isspace() else '' for c in (parts[i - 1][-1:], parts[i + 1][:1])]
        parts[i] = code.join(apart)      # markup must be set apart from its neighbours
    return ''.join(parts)


def type_name(anno):
    "How an annotation is written."
    if anno in (inspect.Parameter.empty, None): return ''
    text = anno if isinstance(anno, str) else getattr(anno, '__name__', '') if isinstance(anno, type) else str(anno)
    return text.replace('typing.', '').replace('torch.', '')


def add_parameters(app, what, name, obj, options, lines):
    "Docstring lines with the comments on parameters and result below."
    lines[:] = [rst(l) for l in lines]
    if what not in ('function', 'method', 'class', 'exception', 'property'): return
    target = getattr(obj, 'fget', obj) if what == 'property' else obj
    try: args = docments(target, full=True, returns=True)
    except (TypeError, ValueError, OSError): return
    if lines and lines[-1]: lines.append('')
    for arg, v in (args or {}).items():
        text, kind = rst(' '.join((v.get('docment') or '').split())), rst(type_name(v.get('anno')))
        if arg == 'return':
            if what in ('class', 'exception'): continue
            if text: lines.append(f':returns: {text}')
            if kind and kind != 'None': lines.append(f':rtype: {kind}')
        elif arg not in ('self', 'cls') and what != 'property' and (text or kind):
            lines.append(f':param {arg}: {text}')
            if kind: lines.append(f':type {arg}: {kind}')
    lines.append('')


def add_live_page(app, config):
    "A page that was laid out with the rest, copied as it is."
    live = Path(app.srcdir)/'live'
    if live.is_dir(): config.html_extra_path = [str(live)]


def setup(app):
    app.connect('config-inited', add_live_page)
    app.add_html_math_renderer('mathml', (visit_math, None), (visit_block, None))
    app.connect('autodoc-process-docstring', add_parameters)
