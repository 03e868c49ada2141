"What comes from elsewhere: licences are listed, hashes are known."
import re, sys
from conftest import ROOT
from cycle_nb.download import PUBLISHED

sys.path.append(str(ROOT/'tools'))
import licences


def test_every_requirement_has_its_licence_listed():
    text = (ROOT/'LICENCES.md').read_text(encoding='utf-8')
    rows = dict(re.findall(r'^\| ([\w.-]+) \| (.+) \|$', text, re.M))
    names = licences.required('requirements', 'lab_requirements', 'hub_requirements', 'distributed_requirements', 'dev_requirements')
    assert len(names) > 15 and set(rows) - {'package'} == set(names)
    for n in names:
        assert rows[n] not in ('unknown', 'not installed'), n


def test_licences_are_read_from_the_packages():
    assert licences.licence('no-such-package') is None and 'Apache' in licences.licence('safetensors')


def test_published_files_have_a_hash_or_none_is_published():
    for name, p in PUBLISHED.items():
        assert p['sha256'] is None or re.fullmatch('[0-9a-f]{64}', p['sha256']), name
        assert p['licence'] and p['url'].startswith('https://'), name
