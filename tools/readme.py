"README.md from nbs/index.ipynb, without Quarto: `python tools/readme.py` writes it, `--check` compares."
import re
import sys
from pathlib import Path

from nbdev.processors import FilterDefaults
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent


def cell_text(cell) -> str:
    "A processed cell as Markdown: its text, or its code and what it printed"
    if cell.cell_type == 'markdown': return cell.source
    if cell.cell_type != 'code' or not cell.source.strip(): return ''
    shell = cell.source.startswith('!')
    code = re.sub(r'^!', '', cell.source, flags=re.M)
    out = ''.join(''.join(o.get('text') or o.get('data', {}).get('text/plain', '')) for o in cell.get('outputs', []))
    lines = [line.rstrip() for line in out.strip('\n').splitlines()]
    if any(a == b == c != '' for a, b, c in zip(lines, lines[1:], lines[2:])): sys.exit(f'{code}: its output repeats lines, as a moving display does.')
    out = '\n'.join(lines)
    return f'```{"sh" if shell else "python"}\n{code}\n```' + (f'\n\n```text\n{out}\n```' if out else '')


def render() -> str:
    nb = read_nb(ROOT/'nbs'/'index.ipynb')
    title = nb.cells[0].source.strip()  # the processors turn it into front matter
    FilterDefaults()(nb)
    text = '\n\n'.join(filter(None, (cell_text(c).strip() for c in nb.cells))) + '\n'
    return f'<!-- Made from nbs/index.ipynb by tools/readme.py; edit the notebook. -->\n\n{title}\n\n{text}'


if __name__ == '__main__':
    readme, text = ROOT/'README.md', render()
    if '--check' not in sys.argv: readme.write_text(text)
    elif readme.read_text() != text: sys.exit('README.md and nbs/index.ipynb disagree: run make export.')
