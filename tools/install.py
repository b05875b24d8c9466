"Make the virtual environment and install the package with its dev extra, but only what has changed since the last time."
import hashlib
import os
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path


def stamps(root: Path) -> dict:
    "What decides whether something must be installed: the requirements, and where the package stands"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    wanted = sorted((k, v) for k, v in cfg['DEFAULT'].items() if 'requirements' in k)
    place = [str(root), *(hashlib.sha256((root/f).read_bytes()).hexdigest() for f in ('settings.ini', 'setup.py', 'pyproject.toml'))]
    return dict(requirements=repr((sys.version_info[:2], wanted)), place=repr(place))


def main(venv: Path):
    root = Path(__file__).resolve().parent.parent
    if sys.version_info < (3, 11):  # noqa: UP036 - the Python that make found may be any
        sys.exit(f'fastsmile needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Use make PYTHON=python3.12.')
    python = venv/'bin'/'python'
    if not python.exists(): subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    pip = [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    certified = dict(UV_SYSTEM_CERTS='1') | os.environ  # uv's own certificates do not know those of a company, which pip takes
    for name, stamp in stamps(root).items():
        file = venv/f'.fastsmile-{name}'
        if file.exists() and file.read_text() == stamp: continue
        print(f'installing ({name} changed): once, a minute or two', flush=True)
        what = ['-e', f'{root}[dev]'] if name == 'requirements' else ['--no-deps', '-e', f'{root}']
        if not (venv/'bin'/'uv').exists(): subprocess.run([*pip, 'uv'], check=True)  # installs in under half of pip's time
        subprocess.run([venv/'bin'/'uv', 'pip', 'install', '--quiet', '--python', python, *what], check=True, env=certified)
        file.write_text(stamp)


if __name__ == '__main__': main(Path(sys.argv[1]))
