"README.md from nbs/index.ipynb and the pages of docs/ from nbs/01_guide.ipynb, without Quarto: `python tools/readme.py` writes, `--check` compares."
import re
import sys
from pathlib import Path

from nbdev.processors import FilterDefaults
from fastcore.nbio import read_nb

ROOT = Path(__file__).resolve().parent.parent
PAGES = {'Data': 'data', 'Training': 'training', 'Predicting': 'predicting', 'Measuring': 'measuring', 'Python': 'python',
         'The five reports': 'reports'}  # first heading of a part of the guide -> its page


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


def notebook_text(name: str) -> tuple[str, str]: # title; the rest
    "A notebook as Markdown"
    nb = read_nb(ROOT/'nbs'/name)
    title = nb.cells[0].source.strip()  # the processors turn it into front matter
    FilterDefaults()(nb)
    return title, '\n\n'.join(filter(None, (cell_text(c).strip() for c in nb.cells))) + '\n'


def made_from(name: str) -> str: return f'<!-- Made from nbs/{name} by tools/readme.py; edit the notebook. -->\n\n'


def from_docs(text: str) -> str:
    "Links of a text at the root as links of a page in docs/"
    text = re.sub(r'\]\((?!https?://|#|docs/)([^)\s]+)\)', r'](../\1)', text)
    return text.replace('](docs/', '](')


def render() -> dict[Path, str]:
    "All generated pages"
    title, text = notebook_text('index.ipynb')
    pages = {ROOT/'README.md': f'{made_from("index.ipynb")}{title}\n\n{text}'}
    _, *parts = re.split(r'^# (?=[A-Z])', notebook_text('01_guide.ipynb')[1], flags=re.M)
    for part in parts:
        name = PAGES[part.partition('\n')[0]]
        pages[ROOT/'docs'/f'{name}.md'] = made_from('01_guide.ipynb') + from_docs('# ' + part.rstrip('\n') + '\n')
    assert len(pages) == 1 + len(PAGES)
    return pages


if __name__ == '__main__':
    for path, text in render().items():
        if '--check' not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text: sys.exit(f'{path.name} and its notebook disagree: run make export.')
