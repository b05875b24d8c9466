"The gallery: bounded, offline, names are text; sort and filter work in a real browser, wide and narrow, light and dark."
import re
from dataclasses import replace

import pytest
from conftest import folder, picture
from hypothesis import given, settings, strategies as st

from fastsmile.models.bundle import save_bundle
from fastsmile.reports.html import pick_gallery_rows
from fastsmile.config.commands import PredictConfig
from fastsmile.inference.load import load_model
from fastsmile.runs.predict import predict

ATTACK = '<script>alert(1)<\\script>\x1b[31m"\'.png'


@pytest.fixture(scope='module')
def page(run, tmp_path_factory):
    "The gallery of 60 pictures, one named like an attack, two broken"
    tmp = tmp_path_factory.mktemp('gallery')
    colours = ['navy', 'red', 'olive', 'white', 'teal', 'gray']
    files = {f'{i:02}.png': picture(colours[i % 6], (40 + i, 60)) for i in range(60)} | {ATTACK: picture(), 'a.jpg': b'<b>no</b>', 'b.jpg': b''}
    ask = PredictConfig(overwrite=True, model=str(run.path), out=str(tmp/'p.csv'), html=str(tmp/'g.html'), device='cpu', raw=True, threshold='balanced')
    return predict(folder(tmp/'faces', files), ask), tmp/'g.html', ask, tmp


def test_the_page_is_whole_offline_and_text(page):
    done, path, _, _ = page
    html = path.read_text()
    assert html.count('<figure') == 61 == done.rows - done.failed and html.count('src="data:image/jpeg') == 61
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!data:)[^"]*"', html) and '@import' not in html and "default-src 'none'" in html
    assert html.count('<script') == 1 and '&lt;script&gt;alert' in html and '\x1b' not in html
    assert 'not an image that can be read' in html and 'zero bytes' in html
    assert 'corrected' in html and 'calibrated at temperature' in html and 'raw_' in html


def test_the_page_does_not_grow_with_the_pictures(page):
    _, path, ask, tmp = page
    predict(tmp/'faces', replace(ask, html=str(tmp/'small.html'), thumbs=12))
    html = (tmp/'small.html').read_text()
    assert html.count('<figure') <= 12 and len(html) < len(path.read_text()) / 2 and 'the most confident, the least confident' in html


def test_withheld_labels_and_sets_are_shown(page):
    "Rows without a label on purpose have a section of their own, which says what they would have been"
    _, _, ask, tmp = page
    model = load_model(ask.model)
    unsure = replace(model, metadata=model.metadata.calibrated(replace(model.metadata.calibration, min_confidence=1.)))
    save_bundle(unsure, tmp/'unsure')
    done = predict(tmp/'faces', replace(ask, model=str(tmp/'unsure'), abstain=True, sets=True, html=str(tmp/'w.html'), out=str(tmp/'w.csv')))
    html = (tmp/'w.html').read_text()
    assert done.labels['withheld'] == 61 and html.count('<section') == 1 and '<h2>withheld ' in html
    assert html.count('withheld: ') == 61 == html.count('set: ') and 'withheld: ' not in page[1].read_text()


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from('abc')), max_size=200), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_ends_of_each_class_are_shown(pairs, most):
    rows = [dict(path=str(i), label=c, confidence=p, error='') for i, (p, c) in enumerate(pairs)]
    picked, each = pick_gallery_rows(rows, 'abc', most), max(3, most // 3)
    for c in 'abc':
        want = sorted((r['confidence'] for r in rows if r['label'] == c), reverse=True)
        got = [r['confidence'] for r in picked.get(c, [])]
        assert len(got) == min(len(want), each) and got == sorted(got, reverse=True)
        if want: assert got[0] == want[0] and got[-1] == want[-1]


@pytest.mark.browser
@pytest.mark.parametrize('width,scheme', [(1100, 'light'), (390, 'dark')])
def test_sort_and_filter_in_a_browser(page, browser, width, scheme):
    done, path, _, _ = page
    tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    said, asked = [], []
    tab.on('console', lambda m: said.append(m.text))
    tab.on('pageerror', lambda e: said.append(str(e)))
    tab.on('dialog', lambda d: said.append('dialog'))
    tab.on('request', lambda r: asked.append(r.url) if not r.url.startswith('data:') else None)
    tab.goto(path.as_uri())
    def shown(what='confidence'): return tab.eval_on_selector_all('section:not([hidden]) figure:not([hidden])', f'f => f.map(x => x.dataset.{what})')
    def sections():
        return tab.eval_on_selector_all('section:not([hidden])', 's => s.map(x => [...x.querySelectorAll("figure")].map(f => +f.dataset.confidence))')
    assert len(shown()) == 61 and all(s == sorted(s, reverse=True) for s in sections())
    tab.select_option('#sort', 'up')
    assert all(s == sorted(s) for s in sections())
    tab.fill('#name', '1')
    assert 0 < len(shown()) < 61 and all('1' in n for n in shown('name')) and f'{len(shown())} shown' == tab.inner_text('#count')
    tab.fill('#name', '')
    middle = sorted(map(float, shown()))[30]
    tab.fill('#low', str(round(middle, 3)))
    assert 0 < len(shown()) < 61 and all(float(c) >= round(middle, 3) for c in shown())
    tab.fill('#low', '0')
    before = len(sections())
    tab.uncheck('.class >> nth=0')
    assert len(sections()) == before - 1
    tab.click('summary >> visible=true >> nth=0')
    assert tab.locator('details[open] tr').count() == len(done.labels)
    assert tab.evaluate('document.documentElement.scrollWidth') <= width and not said and asked == [path.as_uri()]
    tab.close()
