"Names and labels that attack: pages hold them as text, the terminal obeys none of them, and every command goes on."
import csv
import json
import os
import re
import select
import shutil
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TINY, picture
from forked import Program

from fastsmile.core.errors import printable, printable_lines
from fastsmile.core.files import json_text, read_json, write_json, write_text
from fastsmile.config.commands import CompareConfig, ExplainConfig, PredictConfig
from fastsmile.reports.html import render_template
from fastsmile.core.files import CSV_OPEN_ARGS, read_safe_csv

LABELS = ('<script>alert(1)</script>', '"><img src=x onerror=alert(2)>', "' onmouseover='alert(3)", '](javascript:alert(4)) {{7*7}} `|')
NAMES = ['<script>alert(5)<', '"><svg onload=alert(6)>', '{{7*7}}{% raw %}', '](javascript:alert(7))', '<!--', ']]>', '</style><script>', 'a\u202egnp', '=cmd',
         '&lt;b&gt;']
OURS = r'(data:image/(png|jpeg);base64,|#|fold_|https://github.com/)'
DANGER = ('alert(', '7*7')


class Page(HTMLParser):
    "What a page would run, load or follow"
    def __init__(self, text):
        super().__init__()
        self.bad, self.text, self.scripts, self.policy, self.inside = [], '', [], '', ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for k, v in attrs:
            if k.startswith('on') or (k in ('href', 'src', 'action', 'formaction') and not re.match(OURS, v or '')): self.bad.append((tag, k, v))
            if k == 'http-equiv' and v == 'Content-Security-Policy': self.policy = dict(attrs)['content']
        if tag in ('iframe', 'object', 'embed', 'base', 'link') or tag == 'form' and 'action' in dict(attrs): self.bad.append((tag, attrs))
        self.inside = tag if tag in ('script', 'style') else ''
        if tag == 'script': self.scripts.append([dict(attrs).get('type'), ''])

    def handle_endtag(self, tag): self.inside = ''
    def handle_comment(self, data): self.text += data
    def handle_data(self, data):
        if self.inside == 'script': self.scripts[-1][1] += data
        else: self.text += data


def harmless(path, *words):
    "Nothing of a stranger's in the page is code, and what it should say stands in it as text"
    page = Page(Path(path).read_text(encoding='utf-8'))
    assert page.bad == [] and "default-src 'none'" in page.policy and 'http' not in page.policy
    templates = Path(__file__).parent.parent/'fastsmile'/'templates'
    ours = ['\n'.join((templates/f'{n}.js').read_text() for n in ('zoom', own)) for own in ('audit', 'gallery', 'report')]
    for kind, code in page.scripts: assert kind == 'application/json' and json.loads(code) is not None or code in ours
    if page.scripts: assert "script-src 'sha256-" in page.policy and 'unsafe-inline' not in page.policy.partition('script-src')[2]
    else: assert 'script-src' not in page.policy
    for w in words: assert w in page.text, w
    assert '\u202e' not in Path(path).read_text(encoding='utf-8')
    return page


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    "A folder of pictures with such names, and a CSV with such labels"
    root = tmp_path_factory.mktemp('hostile')/'<img src=x onerror=alert(8)>'
    rows = []
    for i in range(48):
        name = f'{NAMES[i % len(NAMES)].replace("/", "-")}{i}.png'
        (root/'pics').mkdir(parents=True, exist_ok=True)
        (root/'pics'/name).write_bytes(picture(('red', 'navy', 'white', 'teal')[i % 4], (40, 40), seed=i))
        rows.append((f'pics/{name}', LABELS[i % 4], NAMES[i % 3]))
    (root/'pics'/f'{NAMES[0]}copy.png').write_bytes((root/'pics'/f'{NAMES[0]}0.png').read_bytes())
    rows.append((f'pics/{NAMES[0]}copy.png', LABELS[1], ''))
    with open(root/'labels.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([('path', 'label', LABELS[0]), *rows])
    return root


@pytest.fixture(scope='module')
def made(hostile, tiny, tmp_path_factory):
    "A run on them"
    from fastsmile.runs.fit import fit
    return fit(hostile/'labels.csv', replace(tiny, epochs=1, out=str(tmp_path_factory.mktemp('runs')/LABELS[1].replace('/', '-')), near=0, size=32))


def test_the_pages_of_a_run_hold_them_as_text(hostile, made, tmp_path):
    from fastsmile.reports.audit import audit
    from fastsmile.runs.compare import compare
    from fastsmile.config.commands import AuditConfig
    from fastsmile.runs.predict import predict
    from fastsmile.runs.explain import explain
    page = harmless(made.report, *LABELS[:2])
    assert '49' not in re.findall(r'\{\{.{0,20}', page.text)
    audit(hostile/'labels.csv', AuditConfig(out=str(tmp_path/'audit')))
    page = harmless(tmp_path/'audit'/'audit.html', *LABELS[:2], NAMES[0])
    held = [kind for kind, code in page.scripts if 'alert(5)' in code]  # the plan, as JSON that is not run
    assert held and set(held) == {'application/json'}
    predict(hostile/'pics', PredictConfig(model=str(made.path), out=str(tmp_path/'p.csv'), html=str(tmp_path/'g.html')))
    harmless(tmp_path/'g.html', NAMES[0], '{{7*7}}{% raw %}')
    explain(made.path, (str(hostile/'pics'),), ExplainConfig(methods=('sensitivity',), out=str(tmp_path/'e')))
    harmless(tmp_path/'e'/'explain.html', NAMES[0])
    other = tmp_path/NAMES[1]
    shutil.copytree(made.path, other)
    compare([made.path, other], CompareConfig(out=str(tmp_path/'c.html')))
    harmless(tmp_path/'c.html', NAMES[1])


def test_the_card_holds_them_as_text(made):
    "Markdown: no link, no tag, no table that breaks, no end of a block of code"
    text = (made.path/'model'/'README.md').read_text(encoding='utf-8')
    body = text.split('---\n', 2)[2]
    outside = re.sub(r'^(`{3,}).*?^\1$', '', body, flags=re.S | re.M)
    assert '<' not in outside.replace('&lt;', '') and not re.search(r'(?<!\\)\]\((?!https://github.com/)', outside) and r'\{\{7\*7\}\}' in outside
    rows = [r for r in outside.split('\n') if 'javascript' in r and r.startswith('|')]
    assert rows and all(len(re.findall(r'(?<!\\)\|', r)) == 7 for r in rows)
    assert json.loads(text.split('model-index: ')[1].split('\n')[0])


def test_a_command_cannot_leave_its_block(tmp_path, made):
    run = tmp_path/'run'
    shutil.copytree(made.path, run)
    config = read_json(run/'config.json')
    write_json(run/'config.json', config | dict(command="fastsmile fit 'a\n```\n<script>alert(1)</script>\n```` \x1b[31m'"))
    from fastsmile.reports.card import write_card
    text = write_card(run).read_text()
    fence = re.search(r'^(`{3,})sh$', text.split('Where it comes from')[1], re.M)[1]
    assert len(fence) == 5 and '\x1b' not in text and '<script' not in re.sub(rf'^{fence}sh$.*?^{fence}$', '', text, flags=re.S | re.M)
    from fastsmile.reports.run import write_report
    harmless(write_report(run))


def test_the_pages_of_the_server_hold_them_as_text(made):
    pytest.importorskip('fasthtml', reason='the extra serve is not installed')
    from fasthtml.common import to_xml
    from fastsmile.serving.page import PageInfo, error_article, full_page, result_articles
    row = dict(path=NAMES[0], label=LABELS[1], confidence=.5, error='', set='|'.join(LABELS), **{f'p_{c}': .25 for c in LABELS})
    bad = dict(row, label='', error=LABELS[0])
    about = PageInfo(LABELS[0], LABELS, LABELS[1], ('gradcam',), True, 3, 100)
    text = to_xml(full_page(about, *result_articles([[row], [bad]]), error_article(LABELS[0], LABELS[2])))
    page = Page(text.replace('src="/serve.js"', 'data-x=""').replace('href="/serve.css"', '').replace('href="data:,"', '').replace('action="/"', '')
                .replace('href="/docs"', ''))
    assert [b for b in page.bad if b[0] != 'link'] == [] and all(w in page.text for w in LABELS[:2]) and [c for _, c in page.scripts] == ['']
    from fastsmile.config.commands import ServeConfig
    from fastsmile.serving.app import openapi_description
    from fastsmile.serving.page import api_page
    page = Page(to_xml(api_page(openapi_description(list(row), LABELS, ServeConfig(), ('gradcam',)), 'http://<b>')))
    ours = [('a', 'href', '/openapi.json'), ('a', 'href', '/')]
    assert [b for b in page.bad if b[0] != 'link' and b not in ours] == []
    assert all(f'p_{w}' in page.text for w in LABELS[:2]) and not page.scripts


def test_a_study_and_the_folds_hold_them_as_text(tmp_path):
    note, value = LABELS[1], dict(value=.5, low=.4, high=.6)
    entry = dict(name=LABELS[0], network=note, size=32, epochs=1, collapsed=0, seconds=1., note=note, reported={}, measured=dict(accuracy=value),
                 recipe='')
    from fastsmile.reports.html import escape_markdown
    seen = dict(report=1, title='t', setup='s', command=f'fastsmile study `{LABELS[0]}', source=LABELS[3], rows={}, classes=LABELS, seeds=1, quick=False,
                machine='m', majority=.5, names=dict(accuracy='accuracy'), shown=[entry], entries=[], own_method=None, metric='accuracy', chart='',
                md=escape_markdown, claims=[dict(statement=LABELS[0], result='v', figure='f')])
    write_text(tmp_path/'s.html', render_template('study.html.j2', seen))
    harmless(tmp_path/'s.html', *LABELS[:2])
    text = render_template('study.md.j2', seen)
    assert '<script' not in text and not re.search(r'(?<!\\)\]\(javascript', text) and len(re.findall(r'(?<!\\)`', text.split('\n')[4])) == 2


def test_text_that_turns_or_commands_is_shown():
    raw = 'a\x1b[31m\x07\r\n\x9b31m\u202e\u2066\u200f\ud800-\udcff\x7fé😀'
    shown = printable(raw)
    assert shown == r'a\x1b[31m\x07\x0d\x0a\x9b31m\u202e\u2066\u200f\ud800-\xff\x7f' + 'é😀' and printable_lines('a\n\x1bb') == 'a\n\\x1bb'
    text = json_text(dict(a=raw))
    assert json.loads(text) == dict(a=raw) and not re.search('[\x00-\x1f\x7f-\x9f\u202e\ud800-\udfff]', text) and 'é😀' in text


def test_json_and_text_hold_what_utf8_cannot(tmp_path):
    write_json(tmp_path/'a.json', dict(path='\udcff.jpg', half='\ud83d'))
    assert read_json(tmp_path/'a.json') == dict(path='\udcff.jpg', half='\ud83d') and (tmp_path/'a.json').read_bytes().decode()
    write_text(tmp_path/'list.txt', '\udcff.jpg\n\ud83d\n')
    assert (tmp_path/'list.txt').read_bytes() == b'\xff.jpg\n\xef\xbf\xbd\n'  # the bytes of a file name, and a mark


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM or sys.platform != 'linux', reason='no Chromium on this machine, or a system that refuses such names')
def test_a_plan_made_in_the_page_names_the_same_files(tmp_path):
    "Names that are no UTF-8, begin with a sign or hold quotes: what is chosen in the page and downloaded is obeyed, and no cell is a formula"
    sync_api = pytest.importorskip('playwright.sync_api')
    from fastsmile.reports.audit import audit
    from fastsmile.data.audit import run_audit
    from fastsmile.config.commands import AuditConfig
    from fastsmile.config.fields import DataOptions
    from fastsmile.data.source import read_source
    root, label = tmp_path/'s', ('=a<b>', "it's")
    names = ['=1"<b>\'.png', os.fsdecode(b'\xff\xe9.png'), "'=x.png", 'Zo\xeb \U0001f600.png']
    for i in range(16):
        path = root/label[i % 2]/(names[i // 2] if i < 8 else f'{i}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(size=(40, 40), seed=i // 2 if i < 8 else i))  # the first four stand in both classes
    done = audit(root, AuditConfig(out=str(tmp_path/'a'), near=0))
    harmless(tmp_path/'a'/'audit.html')
    mine = {f'{label[0]}/{n}' for n in names}
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        page, said = browser.new_page(), []
        page.on('console', lambda m: said.append(m.text))
        page.on('pageerror', lambda e: said.append(str(e)))
        page.on('dialog', lambda d: said.append('dialog'))
        page.goto((done.path/'audit.html').as_uri())
        places = page.locator('select.label').evaluate_all('all => all.map(e => JSON.parse(e.dataset.path))')
        broken = [n for n in places if n.startswith(label[0]) and not n.isprintable() or '\ufffd' in n]  # half characters do not travel to us
        for n in {*mine & {*places}, *broken[:1]}: page.locator('select.label').nth(places.index(n)).select_option(label[1])
        assert '4 images changed' in page.locator('#changes').text_content()
        with page.expect_download() as got: page.click('#download')
        got.value.save_as(tmp_path/'plan.csv')
        browser.close()
    assert not said
    with open(tmp_path/'plan.csv', **CSV_OPEN_ARGS) as f: assert not [c for r in csv.reader(f) for c in r if c[:1] in ('=', '+', '-', '@')]
    kept = run_audit(read_source(root), DataOptions(plan=str(tmp_path/'plan.csv'), near=0)).table
    kept = kept[kept.reason == '']
    assert mine <= set(kept.path) and set(kept.label[kept.path.isin(mine)]) == {label[1]} and len(kept) == 12


# a real terminal

STRANGE = ['\x1b]0;owned\x07', '\x1b[31m\x1b[2J', 'new\nline', 'carriage\rreturn', 'bidi\u202egnp', '\x9b31m', '[bold red]rich[/]',
           os.fsdecode(b'latin-\xe9\xff'), 'tab\t', 'n' * 245]
COMMANDS = """
import os
import socket
import sys
terminal = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
for n in (1, 2): os.dup2(terminal, n)
from fastsmile.cli.commands import app
def connect(self, *to): print('CONNECTS', to)
socket.socket.connect = socket.socket.connect_ex = connect
for line in open(sys.argv[2]).read().split('\\0'):
    print('exit', app(line.split('\\1'), standalone_mode=False))
    print('== done', flush=True)
"""


def at_a_terminal(code, asked, cwd, seconds=240) -> bytes:
    "What a program writes to a terminal, whose name is its first argument"
    pty = pytest.importorskip('pty', reason='no pseudo-terminals on this system')
    ours, theirs = pty.openpty()
    env = os.environ | dict(FASTSMILE_QUIET='', TERM='xterm-256color', COLUMNS='200', NO_COLOR='1')
    p, end, out = Program(['-c', code, os.ttyname(theirs), asked], cwd, env), time.monotonic() + seconds, b''
    try:
        while time.monotonic() < end:
            ended = p.poll() is not None
            if select.select([ours], [], [], 0.1)[0]: out += os.read(ours, 65536)
            elif ended: break
        assert p.poll() == 0, out[-3000:]
    finally:
        p.kill()
        for fd in (ours, theirs): os.close(fd)
    return out


@pytest.mark.skipif(sys.platform != 'linux', reason='such names are refused by other systems')
def test_no_name_reaches_the_terminal_as_a_command(tmp_path):
    "audit, fit, predict, evaluate and what they refuse, on a folder whose names hold escapes, newlines, half characters and 255 bytes; it stays as it was"
    root, labels = tmp_path/'faces', [f'ernst{STRANGE[1]}', f'lacht{STRANGE[4]}']
    for c, label in enumerate(labels):
        for i in range(20):
            path = root/label/f'{STRANGE[i % len(STRANGE)]}{i}{c}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(('red', 'navy')[c], (40, 40), seed=40 * c + i) if i < 18 else b'broken')
    assert max(len(os.fsencode(p.name)) for p in root.rglob('*.png')) > 250
    fit = ['--arch', 'resnet10t', '--weights', 'none', '--model-args', TINY, '--size', '32', '--epochs', '1', '--lr', '0.01', '--tta', 'none', '--no-onnx',
           '--workers', '0', '--out', 'run']
    evil = f'gone{STRANGE[0]}.csv'
    (tmp_path/evil).write_text('a\n')
    asked = [['audit', 'faces', '--out', 'audit'], ['fit', 'faces', *fit], ['predict', 'faces', '--model', 'run', '--out', 'p.csv', '--html', 'g.html'],
             ['predict', 'faces', '--model', 'run', '--out', f'p{STRANGE[1]}.csv', '--json'], ['evaluate', 'run'], ['audit', evil],
             ['predict', f'no{STRANGE[0]}', '--model', 'run'],
             ['fit', 'faces', '--keep-class', STRANGE[1]], ['fit', 'faces', '--plan', 'audit/plan.csv', *fit[:-1], 'run2']]
    (tmp_path/'asked').write_text('\0'.join('\1'.join(a) for a in asked), encoding='utf-8')
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob('*.png')}
    out = at_a_terminal(COMMANDS, 'asked', tmp_path)
    text = out.decode('utf-8')  # nothing that is no UTF-8 came through
    assert text.count('== done') == len(asked) and 'Traceback' not in text and 'inside fastsmile' not in text, text[-3000:]
    assert re.findall(r'exit (\w+)', text) == ['None'] * 5 + ['1', '1', '2', 'None']
    clean = re.sub(r'\x1b\[\?25[lh]|\x1b\[[0-9]*[A-KST]|\x1b\[[0-9;]*m|\r\n|\r', '', text)  # a bar of Rich's: the cursor moves, lines are deleted
    assert not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066]', clean), re.findall('.{30}[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2066].{30}', clean)
    assert '\x1b[31m' not in text and '\x1b[2J' not in text and r'\x1b' in text
    assert 'CONNECTS' not in text and before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob('*') if p.is_file()}
    audit, table = read_safe_csv(tmp_path/'audit'/'table.csv'), read_safe_csv(tmp_path/'run2'/'table.csv')
    want = {str(p.relative_to(root)) for p in root.rglob('*.png')}
    assert set(audit.path) == set(table.path) == set(read_safe_csv(tmp_path/'p.csv').path) == want
    assert set(table.label) == set(labels)
    harmless(tmp_path/'audit'/'audit.html')
    harmless(tmp_path/'run'/'report.html')
    harmless(tmp_path/'g.html')
    with open(tmp_path/'p.csv', **CSV_OPEN_ARGS) as f: assert sum(1 for _ in csv.reader(f)) == 41
