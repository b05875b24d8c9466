"The page: in a real browser, wide and narrow, light and dark; nothing asked of the network; names are text."
import re
from dataclasses import replace

import pandas as pd
import pytest
from conftest import folder, picture

from fastsmile.reports.card import verdict
from fastsmile.runs.fit import fit


def test_the_page_asks_the_network_for_nothing(run):
    html = run.report.read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:image/jpeg;base64,)[^"]*"', html) and '@import' not in html and len(html) < 5_000_000
    assert verdict(run.metrics)['text'].split(':')[0] in html and run.config['command'].split()[0] in html
    assert '--config RUN/options.toml' in html and (run.path/'options.toml').exists()


def test_without_persons_the_page_says_what_that_means(tmp_path, tiny, no_charts):
    files = {f'{c}/{i}.png': picture(c, seed=i) for c in ('red', 'blue') for i in range(30)}
    named = {f'{c}/{p}_{i}.png': picture(c, seed=10 * i + n) for c in ('red', 'blue') for n, p in enumerate('abcdefghijkl') for i in range(3)}
    pages = [fit(folder(tmp_path/name, made), replace(tiny, epochs=1, tta='none', group_from=regex, out=str(tmp_path/f'run of {name}'))).report.read_text()
             for name, made, regex in (('plain', files, None), ('named', named, '(.)_'))]
    assert ['one person may be in train and in test' in page for page in pages] == [True, False]
    assert ['by person or group' in page for page in pages] == [False, True]


def test_look_alikes_in_a_group_are_no_persons(run):
    groups = set(pd.read_csv(run.path/'table.csv', keep_default_na=False).group) - {''}
    assert groups and all(g.startswith('same-') for g in groups) and run.metrics['test']['groups']
    assert 'by row, look-alikes together: nothing in the source says who is shown' in run.report.read_text()
    assert 'Nothing in the source says who is shown' in (run.path/'model'/'README.md').read_text()


def test_labels_that_attack_are_text(tmp_path, tiny):
    from dataclasses import replace
    from fastsmile.runs.fit import fit
    labels = ['<script>alert(1)</script>', '$x^2$ & "q"']
    rows = [f'{i},"{labels[i % 2].replace(chr(34), chr(34) * 2)}"' for i in range(40)]
    folder(tmp_path/'s', {f'{i}.png': picture(['red', 'blue'][i % 2], seed=i) for i in range(40)} | {'l.csv': 'id,label\n' + '\n'.join(rows)})
    html = fit(tmp_path/'s', replace(tiny, epochs=1, tta='none', out=str(tmp_path/'r'))).report.read_text()
    assert html.count('<script') == 1 and '<script>alert' not in html and '&lt;script&gt;' in html


@pytest.mark.browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1100, 390])
def test_the_page_in_a_browser(run, browser, scheme, width):
    page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    said, asked = [], []
    page.on('console', lambda m: said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    page.goto(run.report.as_uri())
    assert not said and asked == [run.report.as_uri()]
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    assert page.locator('svg[role=img] > title').count() >= 4
    assert page.evaluate('getComputedStyle(document.body).backgroundColor') == ('rgb(255, 255, 255)' if scheme == 'light' else 'rgb(21, 21, 24)')
    screen = page.evaluate('document.documentElement.scrollHeight')
    page.emulate_media(media='print')
    assert page.evaluate('document.documentElement.scrollHeight') > 1.2 * screen  # on paper what is folded lies open
    page.close()
