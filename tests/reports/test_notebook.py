"What a notebook shows of a run, a model, a source and an audit; and what `FitConfig?` says"
import json
import re
import shutil
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest
from conftest import folder, picture

from fastsmile.config.commands import AuditConfig
from fastsmile.config.fields import Options
from fastsmile.config.fit import FitConfig
from fastsmile.core.html import escape_html, html_block, html_table
from fastsmile.data.source import read_source
from fastsmile.inference.load import load_model
from fastsmile.reports.audit import audit
from fastsmile.runs.folder import Run

EVIL = '<img src=x onerror=alert(1)>'


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    "A source whose labels and file names are markup"
    images = {f'{EVIL}{i}.png': picture(seed=i) for i in range(6)}
    rows = [f'{name},{"<script>alert(2)</script>" if i % 2 else "a&b"}' for i, name in enumerate(images)]
    table = '\n'.join(['image,label', *rows, 'gone<b>.png,a&b'])
    return folder(tmp_path_factory.mktemp('hostile'), images | {'labels.csv': table, 'broken<i>.png': b'no image'})


class Tags(HTMLParser):
    "The tags of a page, and what is wrong with them"
    def __init__(self):
        super().__init__()
        self.wrong = []

    def handle_starttag(self, tag, attrs):
        if tag not in ALLOWED: self.wrong.append(tag)
        for name, value in attrs:
            if name.startswith('on') or name in ('src', 'href') and not value.startswith('data:image/jpeg;base64,'): self.wrong.append((name, value))


ALLOWED = set('style div strong p table thead tbody tr th td ul li figure figcaption img br span'.split())


def is_safe(page: str) -> bool:
    "Neither a script nor markup of strangers, nor anything that is loaded"
    tags = Tags()
    tags.feed(page)
    return not tags.wrong and 'url(' not in page and '@import' not in page


def test_a_source_shows_its_classes_and_notes_escaped(hostile):
    page = read_source(hostile)._repr_html_()
    assert is_safe(page) and '&lt;script&gt;alert(2)&lt;/script&gt;' in page and 'a&amp;b' in page
    assert '7 rows, 6 used' in page and 'Read as' in page


def test_a_source_shows_the_rows_of_each_split(tmp_path):
    names = ['train/smile/a.png', 'train/smile/b.png', 'train/no/c.png', 'test/no/d.png']
    page = read_source(folder(tmp_path, {name: picture(seed=i) for i, name in enumerate(names)}))._repr_html_()
    assert '<th>train</th>' in page and '<th>test</th>' in page
    assert '<tr><td>no</td><td>2</td><td>50.0%</td><td>1</td><td>1</td></tr>' in page.replace('<td>test', '<td>')


def test_an_audit_shows_its_findings_with_examples(hostile, tmp_path):
    page = audit(hostile, AuditConfig(out=str(tmp_path/'a')))._repr_html_()
    assert is_safe(page) and 'error: missing-image' in page and 'gone&lt;b&gt;.png' in page


def test_a_model_shows_what_it_is_and_its_test_scores(run):
    model = load_model(run.path)
    assert model.classes == model.spec.classes == tuple(run.config['model']['classes'])
    page = model._repr_html_()
    for text in (model.spec.arch, '32 x 32 pixels', 'balanced', 'temperature', 'score on the test rows', 'macro F1', *model.classes): assert text in page
    assert f"{model.metadata.metrics['test']['macro_f1']:.3f}" in page


def test_a_model_of_strangers_is_escaped(run):
    model = load_model(run.path)
    spec = replace(model.spec, classes=(EVIL, *model.classes[1:]), arch='<script>')
    assert is_safe(replace(model, spec=spec, path='<b>.png')._repr_html_())


def test_a_run_shows_verdict_scores_and_its_worst_mistakes(run):
    page = run._repr_html_()
    assert run.verdict[:40] in page and '95% interval' in page and 'majority' in page and 'true \\ predicted' in page
    assert 1 <= page.count('<img src="data:image/jpeg;base64,') <= 5 and is_safe(page)
    assert len(page) < 100_000


def test_a_run_without_its_images_names_them(run, tmp_path):
    copy = Run(shutil.copytree(run.path, tmp_path/'copy'))
    (copy.path/'config.json').write_text(json.dumps(copy.config | dict(source=str(tmp_path/'gone'))))
    page = Run(copy.path)._repr_html_()
    assert '<img' not in page and '.jpg' in page and 'true:' in page


def test_a_run_that_did_not_finish_shows_its_status(run, tmp_path):
    (tmp_path/'config.json').write_text('{"status": "stopped"}')
    assert 'stopped' in Run(tmp_path)._repr_html_()


def test_tables_escape_and_say_how_many_rows_there_are():
    page = html_table([(f'<{i}>', i) for i in range(40)], ['<i>', 'n'])
    assert page.count('<tr>') == 31 and 'and 10 more' in page and '<i>' not in page and '<0>' not in page
    assert html_block('<t>', '<p>') .count('&lt;') == 2 and escape_html('\x1b[2J') == '\\x1b[2J'


def test_pages_take_the_colours_of_the_notebook():
    page = html_block('x')
    assert 'background: #' not in page and not re.search(r'[^-]color:', page)


@pytest.mark.parametrize('config', [FitConfig, AuditConfig])
def test_a_docstring_has_a_line_for_each_option(config):
    lines = config.__doc__.splitlines()
    assert issubclass(config, Options) and [line for line in lines if line.startswith('Options of')]
    for f in fields(config): assert any(line.startswith(f'    {f.name}: {f.metadata["help"]}') for line in lines), f.name
