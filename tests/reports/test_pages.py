"All pages: landmarks, header cells, contrast, what comes first; the slider over the threshold, filters and enlarged images in a browser."
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import faults_of_file, folder, picture

from fastsmile.config.commands import AuditConfig, CompareConfig, ExplainConfig, PredictConfig
from fastsmile.data.readers import FolderReader
from fastsmile.metrics.intervals import evaluate_predictions
from fastsmile.metrics.predictions import read_model_metadata, read_saved_predictions
from fastsmile.metrics.calibration import calibration_from_metadata
from fastsmile.metrics.thresholds import THRESHOLD_BINS, threshold_counts
from fastsmile.reports.audit import audit
from fastsmile.reports.card import verdict
from fastsmile.reports.html import _environment, _template_source, write_gallery
from fastsmile.runs.compare import compare
from fastsmile.runs.explain import explain
from fastsmile.runs.fit import fit
from fastsmile.runs.predict import predict


@pytest.fixture(scope='module')
def two(tiny, tmp_path_factory):
    "A run on two classes of which the pictures overlap"
    tmp, rng = tmp_path_factory.mktemp('two'), np.random.default_rng(0)
    labels = np.where(rng.random(160) < .3, 'smile', 'no')
    files = {f'{i}.png': picture('red' if (label == 'smile') ^ (rng.random() < .2) else 'blue', seed=i) for i, label in enumerate(labels)}
    rows = '\n'.join(f'{i},{label}' for i, label in enumerate(labels))
    return fit(folder(tmp/'faces', files | {'l.csv': f'id,label\n{rows}'}), replace(tiny, near=0, out=str(tmp/'run')))


@pytest.fixture(scope='module')
def pages(run, two, faces, tmp_path_factory):
    "name -> text of every kind of page"
    tmp = tmp_path_factory.mktemp('pages')
    shutil.copytree(run.path, tmp/'again')
    compare([run.path, tmp/'again'], CompareConfig(draws=100, out=str(tmp/'compare.html')))
    known = PredictConfig(model=str(run.path), known=str(faces), out=str(tmp/'p.csv'), html=str(tmp/'gallery.html'), device='cpu')
    predict(faces/'happy_images', known)
    audit(faces, AuditConfig(out=str(tmp/'audit')))
    explain(run.path, (str(faces/'happy_images'),), ExplainConfig(methods=('sensitivity',), out=str(tmp/'e')))
    files = dict(report=run.report, two=two.report, compare=tmp/'compare.html', gallery=tmp/'gallery.html', audit=tmp/'audit'/'audit.html',
                 explain=tmp/'e'/'explain.html')
    return {name: (path, path.read_text()) for name, path in files.items()}


@pytest.mark.parametrize('name', ['report', 'two', 'compare', 'gallery', 'audit', 'explain'])
def test_landmarks_and_header_cells(pages, name):
    html = pages[name][1]
    assert html.count('<main>') == html.count('<header>') == html.count('<h1') == 1 and html.index('<header>') < html.index('<main>')
    assert not re.findall(r'<th(?![a-z])(?![^>]*scope=)[^>]*>', html) and ('scope="row"' in html or name in ('explain', 'audit'))
    assert all('aria-label=' in tag for tag in re.findall(r'<nav[^>]*>', html)) and not re.findall(r'<img(?![^>]*alt="[^"])[^>]*>', html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', re.sub(r'<svg.*?</svg>', '', html, flags=re.S))) <= set(ids)


def test_text_has_contrast_in_light_and_dark():
    def luminance(rgb):
        parts = [v / 255 / 12.92 if v / 255 <= .03928 else ((v / 255 + .055) / 1.055) ** 2.4 for v in rgb]
        return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2]
    for css in (_template_source('_colours.html.j2').partition('@media')[::2]):
        found = {k: tuple(bytes.fromhex(v)) for k, v in re.findall(r'--(\w+): #([0-9a-f]{6})', css)}
        found['hue'] = tuple(map(int, re.search(r'--hue: (\d+) (\d+) (\d+)', css).groups()))
        for back in ('page', 'card'):
            for text in ('ink', 'soft', 'hue', 'bad', 'good', 'warn'):
                a, b = sorted((luminance(found[text]), luminance(found[back])))
                assert (b + .05) / (a + .05) >= 4.5, (text, back)
        cell = tuple(.45 * h + .55 * p for h, p in zip(found['hue'], found['page']))  # the darkest cell of a confusion matrix
        a, b = sorted((luminance(found['ink']), luminance(cell)))
        assert (b + .05) / (a + .05) >= 4.5


def test_results_come_first_under_a_title_that_says_model_and_data(pages, run):
    html = pages['report'][1]
    assert re.search(r'<title>fastsmile: resnet10t on faces: tiny', html) and '<h1>resnet10t on faces</h1>' in html
    order = ['class="verdict', 'class="headline"', 'id="confusion"', 'id="next"', 'id="mistakes"', 'id="thresholds"', 'id="calibration"', 'id="data"',
             'id="training"', 'id="reproduce"']
    places = [html.index(part) for part in order]
    assert places == sorted(places)
    m = run.metrics['test']
    for name in ('balanced_accuracy', 'macro_f1', 'accuracy', 'auc'):
        assert f"<b>{m[name]['value']:.3f}</b><span>{m[name]['low']:.3f} to {m[name]['high']:.3f}</span>" in html
    assert f"majority {m['baseline']['accuracy']:.3f}" in html and 'ROC curves: ' in html and 'precision-recall curves: ' in html
    assert f'fastsmile predict FOLDER --model {run.path}' in html and 'id="slider"' not in html and 'id="slider"' in pages['two'][1]


def test_amber_where_accuracy_does_not_beat_the_majority():
    y = np.repeat([0, 1], [140, 60])
    pred = y.copy()
    pred[:60] = 1  # all of the rare class is found; accuracy is that of the majority
    m = evaluate_predictions(y, pred, np.eye(2)[pred] * .8 + .1, ['no', 'smile'])
    said = verdict(dict(test=m, monitor='balanced_accuracy'))
    assert m['accuracy']['value'] == m['baseline']['accuracy'] and said['tone'] == 'mixed' and 'right no more often' in said['text']
    template = '{% from "_macros.html.j2" import headline_scores %}{{ headline_scores(m, ["accuracy", "macro_f1"], names) }}'
    html = _environment().from_string(template).render(m=m, names=dict(accuracy='accuracy', macro_f1='macro F1'))
    assert re.findall(r'<li class="(\w+)">', html) == ['mixed', 'good'] and 'not above the majority' in html


def test_a_hundred_classes_are_folded():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(100), 3)
    pred = np.where(rng.random(300) < .6, y, rng.integers(0, 100, 300))
    names = [f'class {i}' for i in range(100)]
    m = evaluate_predictions(y, pred, np.eye(100)[pred] * .5 + .005, names)
    html = _environment().from_string('{% from "_macros.html.j2" import classes, confusion %}{{ classes(m) }}{{ confusion(m) }}').render(m=m)
    seen = re.sub(r'<details>.*?</details>', '', html, flags=re.S)
    assert seen.count('<tr>') < 35 and seen.count('<th scope="col">') < 15 and 'and 88 more' in html and html.count('<tr>') > 200


def test_the_verdict_of_a_comparison_comes_first_and_winners_are_marked(pages, run, tmp_path):
    html = pages['compare'][1]
    assert html.index('class="verdict') < html.index('<table') and 'No run is clearly better than' in html and 'class="best"' not in html
    worse = tmp_path/'worse'
    shutil.copytree(run.path, worse)
    table = (worse/'predictions_test.csv').read_text().splitlines()
    columns = [i for i, c in enumerate(table[0].split(',')) if c.startswith('p_')]
    for n, line in enumerate(table[1:], 1):  # the probabilities of the classes, turned
        cells = line.split(',')
        turned = [cells[i] for i in columns[1:] + columns[:1]]
        for i, value in zip(columns, turned): cells[i] = value
        table[n] = ','.join(cells)
    (worse/'predictions_test.csv').write_text('\n'.join(table) + '\n')
    compare([run.path, worse], CompareConfig(draws=200, out=str(tmp_path/'c.html')))
    compare([run.path, worse], CompareConfig(draws=200, out=str(tmp_path/'c.html')))  # its own page is replaced
    html = (tmp_path/'c.html').read_text()
    assert 'class="best"><span class="win">best</span>' in html


def test_the_audit_names_splits_identical_copies_and_the_option_for_persons(tmp_path):
    rows = [(f'{part}/{c}/{who}_{n}.png', picture('red' if c == 'yes' else 'blue', seed=len(who) * ord(who[0]) + n))
            for c, people in (('yes', ('Ann_Lee', 'Bob_Ray')), ('no', ('Cy_Poe', 'Di_Fox'))) for who in people for n in range(1, 5)
            for part in (('train',) if n < 4 else ('test',))]
    files = dict(rows)
    files['test/yes/Ann_Lee_9.png'] = files['train/yes/Ann_Lee_1.png']
    html = (audit(folder(tmp_path/'f', files), AuditConfig(out=str(tmp_path/'a'))).path/'audit.html').read_text()
    leak = html[html.index('<h2 id="split-leak"'):]
    assert '>in train</b>' in leak and '>in test</b>' in leak and 'identical files' in leak
    assert re.search(r'class="hint">[^<]*--group-from', html) and 'href="#split-leak" aria-label="images of split-leak"' in html
    assert 'width, pixels' in html and 'height, pixels' in html


def test_the_gallery_marks_right_wrong_and_unlike(pages, run, faces, tmp_path):
    html = pages['gallery'][1]
    right, wrong = html.count('<figure class="right"'), html.count('<figure class="wrong"')
    assert right + wrong > 20 and html.count('✓ right') == right and html.count('✗ wrong') == wrong and '<option value="right">' in html
    reader, summary = FolderReader(faces/'happy_images'), SimpleNamespace(rows=3, failed=0, labels={}, errors=[], run_info={})
    rows = [dict(path=n, label='a', confidence=.9, error='', p_a=.9, p_b=.1, unlike=share) for n, share in zip(reader.names(), (.2, .95, .99))]
    html = write_gallery(tmp_path/'g.html', dict(a=rows), reader, summary).read_text()
    assert html.count('class="flag unlike"') == 2 and '<option value="unlike">' in html and '<option value="right">' not in html


@pytest.fixture
def tab(browser):
    "A page of a browser; what it logs and requests is kept"
    page = browser.new_page(viewport=dict(width=1100, height=900))
    page.said = []
    page.on('console', lambda m: page.said.append(m.text))
    page.on('pageerror', lambda e: page.said.append(str(e)))
    yield page
    page.close()
    assert not page.said


@pytest.mark.browser
@pytest.mark.parametrize('scheme,width', [('light', 1280), ('dark', 390)])
@pytest.mark.parametrize('name', ['report', 'two', 'compare', 'gallery', 'audit', 'explain'])
def test_axe_finds_no_fault(pages, browser, name, scheme, width):
    assert not faults_of_file(browser, pages[name][0], scheme, width)


@pytest.mark.browser
def test_the_slider_measures_any_threshold(two, tab):
    saved, calibration = read_saved_predictions(two.path, 'test'), calibration_from_metadata(read_model_metadata(two.path))
    counts = threshold_counts(saved.y, calibration.apply(saved.probs)[1], saved.classes)
    tab.goto(two.report.as_uri())
    def shown(name): return tab.text_content(f'#slider output[name={name}]')
    start, m = shown('recall'), two.metrics['test']
    rare = next(c for c in m['per_class'] if c['label'] == counts.label)
    assert start == f"{100 * rare['recall']:.1f}%" and shown('accuracy') == f"{100 * m['accuracy']['value']:.1f}%"
    for threshold, least in ((.2, 0), (.5, .7), (.8, .6)):
        for n, value in enumerate((threshold, least)):
            move = '(e, v) => { e.value = v; e.dispatchEvent(new Event("input", {bubbles: true})) }'
            tab.locator('#slider input').nth(n).evaluate(move, round(value * THRESHOLD_BINS))
        for name, value in counts.scores(threshold, least).items():
            assert shown(name) == ('no rows' if value != value else f'{100 * value:.1f}%'), (name, threshold, least)


@pytest.mark.browser
def test_mistakes_are_filtered_and_images_enlarged(run, tab):
    tab.goto(run.report.as_uri())
    box = tab.locator('.filtered').first
    predicted = box.locator('select').nth(1)
    labels = [o for o in predicted.locator('option').all_text_contents() if o != 'all']
    predicted.select_option(labels[0])
    shown = box.locator('figure:not([hidden])')
    assert shown.count() and all(label == labels[0] for label in shown.evaluate_all('f => f.map(x => x.dataset.predicted)'))
    shown.first.locator('button.zoom').first.click()
    large = tab.locator('dialog.large[open] img')
    assert large.bounding_box()['width'] > 400
    tab.keyboard.press('Escape')
    assert not tab.locator('dialog.large[open]').count()
