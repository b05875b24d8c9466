"""LICENCES.md from settings.ini and the metadata of what is installed: every requirement, who needs it, under which licence.

    python tools/licences.py            # write it; everything must be installed (pip install -e '.[dev]' and the extras)
    python tools/licences.py --check    # does it name every requirement, and none besides? needs nothing installed
"""
import re
import sys
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, files, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT/'LICENCES.md'
HEAD = """# Licences

fastsmile is under Apache-2.0 ([LICENSE](LICENSE)). It contains none of the packages below: pip installs them, each under its own licence. What they need
in turn is said by `pip show`. Written by `python tools/licences.py` from what the packages say of themselves.

| package | needed by | licence |
|---|---|---|
"""


def requirements() -> dict[str, list[str]]: # package -> who needs it: fastsmile itself, or extras
    "The names in settings.ini"
    cfg, out = ConfigParser(delimiters=['=']), {}
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    for key, text in cfg['DEFAULT'].items():
        if key != 'requirements' and not key.endswith('_requirements'): continue
        for need in text.split(): out.setdefault(re.match(r'[\w.-]+', need)[0], []).append(key.removesuffix('requirements').rstrip('_') or 'fastsmile')
    return out


def first_line(name: str) -> str: # empty where there is no such file
    "Of the licence file that a package brings"
    return next((f.read_text().strip().split('\n')[0] for f in files(name) or () if f.name.upper().startswith('LICEN')), '')


def licence(name: str) -> str:
    "What a package says: SPDX where it has that, else its classifier, else its own words"
    try: said = metadata(name)
    except PackageNotFoundError: sys.exit(f'{name} is not installed, so its licence is not known.')
    kinds = [c.rpartition(' :: ')[2] for c in said.get_all('Classifier') or [] if c.startswith('License')]
    found = said.get('License-Expression') or ', '.join(kinds) or (said.get('License') or '').strip().split('\n')[0]
    return found or first_line(name) or sys.exit(f'{name} does not say its licence.')


def named() -> list[str]:
    "The packages in the table"
    return re.findall(r'^\| ([\w.-]+) \| (?!needed)', TABLE.read_text(encoding='utf-8'), re.M)


def main():
    needs = requirements()
    if '--check' in sys.argv[1:]:
        off = sorted(set(named()) ^ set(needs))
        sys.exit(f'LICENCES.md and settings.ini disagree about {", ".join(off)}: run python tools/licences.py' if off else 0)
    TABLE.write_text(HEAD + ''.join(f'| {n} | {", ".join(who)} | {licence(n)} |\n' for n, who in sorted(needs.items())), encoding='utf-8')


if __name__ == '__main__': main()
