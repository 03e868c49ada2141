"Packaging: everything is said in settings.ini, this only reads it."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], inline_comment_prefixes=None)
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def lines(key):
    "A many-line setting as a list."
    return [x.strip() for x in cfg[key].splitlines() if x.strip()]


setup(
    name=cfg['dist_name'], version=cfg['version'], description=cfg['description'],
    author=cfg['author'], license=cfg['license'], keywords=cfg['keywords'].split(),
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['cycle_nb', 'cycle_nb.*']),
    package_data={'cycle_nb': ['pretrained/**', 'samples/**']},
    python_requires=f">={cfg['min_python']}", install_requires=lines('requirements'),
    extras_require={'dev': lines('dev_requirements')},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
