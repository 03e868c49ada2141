"Packaging: everything is said in settings.ini, this only reads it. The same commit gives the same wheel, byte for byte."
import os
import subprocess
from configparser import ConfigParser
from contextlib import suppress
from pathlib import Path
from shutil import copytree, ignore_patterns
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def lines(key):
    "A many-line setting as a list."
    return [x.strip() for x in cfg[key].splitlines() if x.strip()]


def commit_time():
    "When the commit was made that is built, in seconds; empty outside a repository."
    try: return subprocess.run(['git', '-C', str(here), 'log', '-1', '--format=%ct'], capture_output=True, text=True).stdout.strip()
    except OSError: return ''


os.umask(0o022)                                     # modes and times of files are written into a wheel, too
with suppress(OSError): (here/'LICENSE').chmod(0o644)
if (here/'.git').exists() and commit_time(): os.environ.setdefault('SOURCE_DATE_EPOCH', commit_time())


class BuildWithData(build_py):
    "Sample images and records live in data/, where readers look; a wheel carries them inside the package."
    def run(self):
        super().run()
        if self.editable_mode: return
        for at, name in {'samples': 'samples', 'results': 'records'}.items():
            to = Path(self.build_lib)/'cycle_nb'/name
            copytree(here/'data'/at, to, dirs_exist_ok=True, ignore=ignore_patterns('.*'))
        for f in Path(self.build_lib).rglob('*'): f.chmod(0o755 if f.is_dir() else 0o644)


def shipped(f):
    "Whether a file among the data belongs into the package: no folders, nothing half-written."
    return f.is_file() and not f.name.startswith('.')


lib, home = here/cfg['lib_name'], cfg['repository']
extras = {k: lines(f'{k}_requirements') for k in ('lab', 'hub', 'web', 'dev')}
data = [f.relative_to(lib).as_posix() for d in ('pretrained', 'web') for f in (lib/d).rglob('*') if shipped(f)]
apart = {k: lines(f'{k}_requirements') for k in ('docs', 'teach')}      # not part of [dev]

setup(
    cmdclass={'build_py': BuildWithData},
    name=cfg['dist_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
    url=home, project_urls={'Source': home, 'Issues': f'{home}/issues'},
    classifiers=lines('classifiers'),
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['cycle_nb', 'cycle_nb.*']),
    package_data={'cycle_nb': data},
    python_requires=f">={cfg['min_python']}", install_requires=lines('requirements'),
    extras_require=extras | apart | {'dev': extras['lab'] + extras['hub'] + extras['web'] + extras['dev']},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
