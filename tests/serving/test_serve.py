"The server: the same rows as predict, 64 clients at once, limits that hold, hostile uploads, a page that works in a real browser."
import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from conftest import accessibility_faults, picture
from forked import Program
from hypothesis import given, settings, strategies as st
from PIL import Image

pytest.importorskip('fasthtml', reason='the extra serve is not installed')
from fastsmile.models.bundle import load_bundle, save_bundle
from fastsmile.core.errors import OptionError, SmileError
from fastsmile.inference.torch_backend import TorchBackend
from fastsmile.inference.explain import attribution_maps, overlay_heatmap
from fastsmile.inference.export import export
from fastsmile.data.faces import make_face_detector
from fastsmile.data.images import decode_image, resize_and_crop
from fastsmile.data.readers import FolderReader
from fastsmile.serving.uploads import FormBody, RequestError, Upload
from fastsmile.config.commands import PredictConfig, ServeConfig
from fastsmile.inference.load import load_model
from fastsmile.inference.predict import predict_rows
from fastsmile.inference.rows import RowOptions, make_row_format
from fastsmile.data.sample import draw_face, random_face_params
from fastsmile.serving.app import serve
from fastsmile.serving.service import Service, accuracy_sentence

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
ATTACK = '<img src=x onerror=alert(1)>.png'
PLAIN = ServeConfig(port=0, device='cpu', precision='fp32')
IMAGE = {'content-type': 'image/png'}


@contextmanager
def started(model, config=PLAIN):
    "A server in a thread: its address and its service"
    there, got, failed = threading.Event(), [], []
    def ready(*what): got.extend(what); there.set()
    def go():
        try: serve(model, config, ready)
        except BaseException as e: failed.append(e)
        there.set()
    thread = threading.Thread(target=go)
    thread.start()
    assert there.wait(30)
    if failed: raise failed[0]
    try: yield urlsplit(got[0]).netloc, got[1].config.app.state.service
    finally:
        got[1].should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope='module')
def model(run, tmp_path_factory):
    "The tiny run's model, calibrated so that it withholds some labels"
    m, where = load_model(run.path), tmp_path_factory.mktemp('served')/'model'
    c = replace(m.metadata.calibration, min_confidence=0.5, temperature=1.3, set_thresholds=[0.2] * 3, calib_rows=[9, 9, 9])
    save_bundle(replace(m, metadata=m.metadata.calibrated(c)), where)
    return load_bundle(where)


@pytest.fixture(scope='module')
def server(model):
    with started(model.path, replace(PLAIN, timeout=20., max_bytes=3_000_000, max_pixels=2_000_000, max_files=9)) as s: yield s


def form(*files, name='files', boundary='----xyz'):
    "Body and headers of a form with files"
    parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{n}"\r\nContent-Type: image/png\r\n\r\n'.encode() + d + b'\r\n'
             for n, d in files]
    return b''.join(parts) + f'--{boundary}--\r\n'.encode(), {'content-type': f'multipart/form-data; boundary={boundary}'}


def ask(where, path='/predict', body=None, headers=None, method=None):
    "Status, headers and body of an answer; JSON is read"
    c = http.client.HTTPConnection(where, timeout=30)
    try:
        c.request(method or ('GET' if body is None else 'POST'), path, body, headers or {})
        r = c.getresponse()
        data = r.read()
        return r.status, r.headers, json.loads(data) if r.headers.get_content_type() == 'application/json' else data
    finally: c.close()


def raw(where, data, wait=10.):
    "What a server says to bytes, until it closes"
    host, _, port = where.rpartition(':')
    with socket.create_connection((host, int(port)), timeout=wait) as s:
        s.sendall(data)
        out = b''
        while chunk := s.recv(65536): out += chunk
    return out


def line(program, n) -> str:
    "A line of what a program says, once it has said it"
    until = time.monotonic() + 60
    while (said := program.said('stdout')).count('\n') <= n:
        assert program.poll() is None and time.monotonic() < until, program.said('stderr')
        time.sleep(0.01)
    return said.split('\n')[n]


def png_of(width, height):
    "A PNG that claims to be large, in a few bytes"
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(bytes(99))) + chunk(b'IEND', b'')


def files():
    "Pictures of many kinds, and things that are none"
    turned = Image.Exif()
    turned[0x0112] = 6
    return {'plain.png': picture(), 'large.jpg': picture('red', (900, 700), 'JPEG'), 'grey.png': picture(mode='L'), 'glass.png': picture(mode='RGBA'),
            'lying.jpg': picture('olive', (60, 30), 'JPEG', exif=turned), 'cut.jpg': picture('teal', (80, 80), 'JPEG')[:-200], 'empty.png': b'',
            'text.jpg': b'this is no picture', 'web.webp': picture('pink', (50, 70), 'WEBP')}


def rough(rows): return [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in rows]


# the same rows

@pytest.mark.parametrize('options', [{}, dict(tta='full'), dict(uncalibrated=True), dict(threshold='negative smile=0'), dict(abstain=True), dict(sets=True)],
                         ids=lambda o: next(iter(o), 'plain'))
def test_rows_are_those_of_predict(model, tmp_path, options):
    "And no option does nothing: each row differs from the plain one"
    some = files()
    for n, d in some.items(): (tmp_path/n).write_bytes(d)
    asked = {k: v for k, v in options.items() if k != 'tta'}
    row_format = make_row_format(model, request=RowOptions(**asked))
    expected = list(predict_rows(model, FolderReader(tmp_path), list(some), tta=options.get('tta', 'none'), row_format=row_format))
    def rows_of(config):
        service = Service(model, config)
        try: return [r for several in asyncio.run(service.predict([Upload(n, d) for n, d in some.items()])) for r in several]
        finally: service.close()
    rows = rows_of(replace(PLAIN, **options))
    for a, b in zip(rows, expected, strict=True):
        assert list(a) == list(b)
        for k in a: assert abs(a[k] - b[k]) < 1e-6 if isinstance(a[k], float) else a[k] == b[k], (a['path'], k)
    assert [r['path'] for r in rows if r['error']] == ['cut.jpg', 'empty.png', 'text.jpg']
    if options: assert rough(rows) != rough(rows_of(PLAIN))


def test_over_http_a_form_and_raw_bytes_say_the_same(server, model):
    where, service = server
    some = files()
    status, headers, got = ask(where, '/predict', *form(*some.items()))
    assert status == 200 and [r['path'] for r in got['predictions']] == list(some) and 'set-cookie' not in headers
    for row in got['predictions']:
        assert list(row) == service.columns
        if not some[row['path']]: continue  # alone it is an empty request
        status, _, one = ask(where, f"/predict?name={row['path']}", some[row['path']], IMAGE)
        assert status == (422 if row['error'] else 200) and one['predictions'][0].keys() == row.keys()
        assert all(abs(a - b) < 1e-6 if isinstance(a, float) else a == b for a, b in zip(one['predictions'][0].values(), row.values()))
        assert (row['label'] is None) == bool(row['error'])


def test_64_clients_get_their_own_answers(server, model):
    "Each sends a picture of its own many times, and none is lost or mixed up"
    where, service = server
    mine = {f'{i}.png': picture(('red', 'teal', 'white', 'navy')[i % 4], (20 + i, 90 - i), seed=i) for i in range(64)}
    expected, engine = {}, TorchBackend(model, device='cpu')
    for n, d in mine.items():
        x = resize_and_crop(decode_image(d, prep=model.spec.prep), model.spec.prep)[None].copy()
        expected[n] = model.metadata.calibration.apply(model.probabilities_and_labels(engine.logits(x))[0])[1][0]
    assert len({p.round(5).tobytes() for p in expected.values()}) > 48  # rows can be told apart
    before, start = service.batcher.batches, threading.Barrier(64)
    def client(name):
        start.wait(30)
        return [ask(where, '/predict', *form((name, mine[name]))) for _ in range(4)]
    with ThreadPoolExecutor(64) as pool: answers = dict(zip(mine, pool.map(client, mine)))
    for name, got in answers.items():
        for status, _, said in got:
            row, = said['predictions']
            assert status == 200 and row['path'] == name
            assert np.allclose([row[f'p_{c}'] for c in model.spec.classes], expected[name], atol=1e-5)
    assert service.batcher.batches - before < 4 * 64  # some went together
    assert service.limiter.active == service.limiter.bytes_held == service.batcher.expected == 0


def test_the_explanation_is_that_of_explain(server, model):
    where, _ = server
    data = picture('olive', (70, 50), seed=3)
    x = resize_and_crop(decode_image(data, prep=model.spec.prep), model.spec.prep).copy()
    got = {}
    for method in ('gradcam', 'sensitivity'):
        status, headers, image = ask(where, f'/explain?method={method}&label={quote(model.spec.classes[1])}', data, IMAGE)
        assert status == 200 and headers['content-type'] == 'image/png'
        got[method] = np.asarray(Image.open(io.BytesIO(image)))
        assert np.abs(got[method].astype(int) - overlay_heatmap(x, attribution_maps(model, x[None], [1], method)[0])).max() <= 2
    assert (got['gradcam'] != got['sensitivity']).any()
    label = ask(where, '/predict', data, IMAGE)[2]['predictions'][0]['label']
    own, named = (ask(where, f'/explain{q}', data, IMAGE)[2] for q in ('', f'?method=gradcam&label={quote(label)}'))
    assert own == named
    for query, status in [('?method=magic', 422), ('?label=frown', 422), ('?lable=frown', 422)]: assert ask(where, f'/explain{query}', data, IMAGE)[0] == status
    assert ask(where, '/predict?tta=flip', data, IMAGE)[2]['error'] == "'tta' is not a parameter of this address."
    assert ask(where, '/explain', b'no', IMAGE)[0] == 422
    assert ask(where, '/explain', *form(('a', data), ('b', data)))[0] == 413


# what is refused

REFUSED = [
    ('nothing', IMAGE, b'', 422), ('no type', {}, b'x', 415), ('json', {'content-type': 'application/json'}, b'{}', 415),
    ('curl -d', {'content-type': 'application/x-www-form-urlencoded'}, b'a=b', 415), ('gzip', IMAGE | {'content-encoding': 'gzip'}, b'x', 415),
    ('text as picture', {'content-type': 'image/jpeg'}, b'hello', 422), ('cut', {'content-type': 'image/jpeg'}, picture(fmt='JPEG')[:-50], 422),
    ('bomb', IMAGE, png_of(1500, 1500), 422), ('larger bomb', IMAGE, png_of(50000, 50000), 422),
    ('no boundary', {'content-type': 'multipart/form-data'}, b'x', 422), ('no form', {'content-type': 'multipart/form-data; boundary=a'}, b'x' * 99, 422),
    ('form without end', form(('a', b'b'))[1], form(('a', b'b'))[0][:-12], 422), ('form without file', *form()[::-1], 422),
    ('long boundary', {'content-type': f'multipart/form-data; boundary={"a" * 5000}'}, b'--a--', 422),
    ('parts', *form(*((f'{i}', b'x') for i in range(5000)))[::-1], 413),
    ('fields', form()[1], b''.join(b'------xyz\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n' for _ in range(5000)) + b'------xyz--\r\n', 413),
    ('part headers', form()[1], b'------xyz\r\n' + b'a: b\r\n' * 5000 + b'\r\n\r\n------xyz--\r\n', 422),
    ('bytes', IMAGE, bytes(3_000_001), 413), ('postscript', IMAGE, b'%!PS-Adobe-3.0 EPSF-3.0\n', 422)]


@pytest.mark.parametrize('headers,body,status', [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
@pytest.mark.parametrize('path', ['/predict', '/'])
def test_refusals(server, path, headers, body, status):
    where, service = server
    got, _, said = ask(where, path, body, headers)
    assert got == (200 if path == '/' and said and b'data-number' in said else status)
    if path == '/predict':
        assert said['error'] and 'Traceback' not in str(said)
        if 'predictions' in said: assert all(r['error'] and r['label'] is None for r in said['predictions'])
    else: assert b'class="answer bad"' in said
    assert service.limiter.active == service.limiter.bytes_held == 0 and ask(where, '/healthz')[2] == dict(status='ok', waiting=0)


def test_a_length_that_is_a_lie_and_a_body_that_never_ends(server):
    where, _ = server
    head, start = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n', time.monotonic()
    assert b' 413 ' in raw(where, head + b'content-length: 1000000000000\r\n\r\nabc').split(b'\r\n')[0]
    assert b' 413 ' in raw(where, head + b'content-length: 1000000000000\r\nexpect: 100-continue\r\n\r\n').split(b'\r\n')[0]  # and no 100 before it
    endless = head + b'transfer-encoding: chunked\r\n\r\n' + (b'100000\r\n' + bytes(2**20) + b'\r\n') * 4
    assert b' 413 ' in raw(where, endless).split(b'\r\n')[0]
    assert time.monotonic() - start < 5


LOCAL = b'host: localhost\r\nconnection: close\r\n'


@pytest.mark.parametrize('data,status', [
    (b'GET / HTTP/1.1\r\n' + LOCAL + b'x: ' + b'a' * 20_000 + b'\r\n\r\n', b'431'), (b'GET /' + b'a' * 20_000 + b' HTTP/1.1\r\n' + LOCAL + b'\r\n', b'431'),
    (b'GET / HTTP/1.1\r\nhost: localhost\r\n' + b'x: a\r\n' * 10_000, b'400'),
    (b'\x16\x03\x01\x02\x00\x01\x00', b'400'), (b'GET / HTTP/1.1\r\n\r\n', b'400'), (b'GET / HTTP/1.0\r\n\r\n', b'421'),
    (b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n', b'400'),
    (b'GET / HTTP/1.1\r\n' + LOCAL + b'content-type: multipart/form-data; boundary=a\r\ncontent-length: 5\r\n\r\n--a--', b'413'),
    (b'PUT / HTTP/1.1\r\n' + LOCAL + b'\r\n', b'405'), (b'GET /../../etc/passwd HTTP/1.1\r\n' + LOCAL + b'\r\n', b'404'),
    (b'GET /serve.py HTTP/1.1\r\n' + LOCAL + b'\r\n', b'404')],
    ids=['header', 'url', 'headers without end', 'tls', 'no host', 'http 1.0', 'length', 'get with body', 'put', 'traversal', 'source'])
def test_http_that_is_none(server, data, status):
    assert raw(server[0], data).split(b' ')[1] == status and ask(server[0], '/healthz')[0] == 200


def test_names_are_text(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ['../../etc/passwd', '/etc/cron.d/x.png', ATTACK, 'C:\\x\\y.png', 'ä 😀.png', 'a' * 3000 + '.png', 'x\x00.png']
    status, _, got = ask(server[0], '/predict', *form(*((n, picture()) for n in names)))
    said = [r['path'] for r in got['predictions']]
    assert status == 200 and said[:3] == names[:3] and said[4] == names[4] and len(said[5]) == 255 and not any(tmp_path.iterdir())
    page = ask(server[0], '/', *form((ATTACK, picture()), ('x\x1b[31m<b>', b'no')))[2].decode()
    assert '<img' not in page and '<b>' not in page and '\x1b' not in page and '&lt;img' in page


def test_who_asks(server, model):
    where, _ = server
    body, headers = form(('a.png', picture()))
    for more, status in [({'origin': f'http://{where}'}, 200), ({'origin': 'http://evil.example'}, 403), ({'origin': 'null'}, 403),
                         ({'sec-fetch-site': 'cross-site'}, 403), ({'sec-fetch-site': 'same-origin'}, 200), ({'host': 'evil.example'}, 421),
                         ({'host': 'localhost:1'}, 200)]:
        got, answered, _ = ask(where, '/predict', body, headers | more)
        assert got == status and 'access-control-allow-origin' not in answered, more
    with started(model.path, replace(PLAIN, allow_host=('faces.lan',))) as (own, _):
        assert [ask(own, '/healthz', headers={'host': h})[0] for h in ('faces.lan', 'evil.example')] == [200, 421]


def test_the_page_may_load_nothing_from_elsewhere(server):
    status, headers, page = ask(server[0], '/')
    policy = headers['content-security-policy']
    assert status == 200 and "default-src 'none'" in policy and 'unsafe' not in policy and 'http' not in policy and 'set-cookie' not in headers
    assert b'http' not in page and b'style="' not in page and page.count(b'<script') == 1 and b'src="/serve.js"' in page
    for name, kind in [('/serve.css', 'text/css'), ('/serve.js', 'text/javascript')]:
        status, headers, text = ask(server[0], name)
        assert status == 200 and headers.get_content_type() == kind and b'://' not in text and headers['x-content-type-options'] == 'nosniff'


# limits of load and time

def test_too_many_and_too_late(model):
    "429 at the gate; 503 where the model takes too long; the server recovers"
    release = threading.Event()
    with started(model.path, replace(PLAIN, max_waiting=2, timeout=1.)) as (where, service):
        service.batcher.submit(lambda xs: [release.wait(20)], None)  # something keeps the model busy
        with ThreadPoolExecutor(3) as pool:
            def one(_): return ask(where, '/predict', picture(), IMAGE)
            first = [pool.submit(one, i) for i in range(2)]
            while service.limiter.active < 2: time.sleep(0.01)
            status, headers, said = one(2)
            assert status == 429 and headers['retry-after'] == '1' and 'waiting' in said['error']
            assert ask(where, '/healthz')[2] == dict(status='ok', waiting=2)
            assert [f.result()[0] for f in first] == [503, 503]
        release.set()
        assert one(0)[0] == 200 and service.batcher.answered == 2  # those who had left were left out


def test_slow_bodies_and_slow_heads_end(model):
    with started(model.path, replace(PLAIN, timeout=0.5)) as (where, service):
        start = time.monotonic()
        head = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\ncontent-length: 100\r\n\r\nabc'
        with ThreadPoolExecutor(3) as pool:
            body, half, nothing = pool.map(lambda d: raw(where, d), [head, b'POST /predict HTTP/1.1\r\nhost: loc', b''])
        assert b' 408 ' in body and b' 408 ' in half and b' 408 ' in nothing and 0.4 < time.monotonic() - start < 5
        assert service.limiter.active == 0


@pytest.mark.parametrize('sent,status', [(1., 200), (0.5, None)], ids=['after the request', 'in its middle'])
def test_half_closed_sockets(server, sent, status):
    "A client that says that it sends no more: it gets its answer where the request was whole, and holds nothing where it was not"
    where, service = server
    host, _, port = where.rpartition(':')
    body = picture(seed=7)
    head = f'POST /predict HTTP/1.1\r\nhost: {where}\r\ncontent-type: image/png\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n'.encode()
    with socket.create_connection((host, int(port)), timeout=10) as s:
        s.sendall((head + body)[:int(sent * len(head + body))])
        s.shutdown(socket.SHUT_WR)
        out = b''
        while chunk := s.recv(65536): out += chunk
    assert out.startswith(b'HTTP/1.1 200 ') and b'"confidence"' in out if status else b' 200 ' not in out
    until = time.monotonic() + 5
    while service.limiter.active and time.monotonic() < until: time.sleep(0.01)
    assert service.limiter.active == service.limiter.bytes_held == service.batcher.expected == 0


def test_many_connections(model):
    "Hundreds that say nothing: those above the limit are told so, a request among them is answered, and all are closed in time"
    with started(model.path, replace(PLAIN, timeout=3., max_waiting=40)) as (where, service):  # 2 * 40 + 32 connections
        host, _, port = where.rpartition(':')
        some, start = [socket.create_connection((host, int(port)), timeout=10) for _ in range(100)], time.monotonic()
        assert ask(where, '/predict', picture(), IMAGE)[0] == 200
        some += [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
        status = ask(where, '/healthz')[0]
        said = []
        for s in some:
            with s: said.append(s.recv(100)[:12])
        assert status == 503 and set(said) == {b'HTTP/1.1 408'} and time.monotonic() - start < 9
        assert ask(where, '/predict', picture(), IMAGE)[0] == 200


OUTSIDE = ['/..%2f..%2fetc%2fpasswd', '/%2e%2e/%2e%2e/etc/passwd', '//etc/passwd', '/serve.js/../../pyproject.toml', '/serve.css%00.py', '/templates/serve.js',
           '/..\\..\\windows\\win.ini', '/serve.js?../../core.py', '/%c0%ae%c0%ae/etc/passwd', '/static/%252e%252e/core.py', '/core.py', '/file:///etc/passwd']


@pytest.mark.parametrize('path', OUTSIDE)
def test_no_path_leads_out(server, path):
    "Two files are served, by their names; whatever else is asked for is not there"
    got = raw(server[0], f'GET {path} HTTP/1.1\r\n'.encode() + LOCAL + b'\r\n')
    wanted = (b'200', server[1]) if path.startswith('/serve.js?') else (b'404', None)
    assert got.split(b' ')[1] == wanted[0] and b'root:' not in got and b'[project]' not in got and b'import ' not in got
    assert got.count(b'HTTP/1.1') == 1


def test_memory_for_files_is_bounded(model):
    service = Service(model, replace(PLAIN, max_bytes=1000))
    try:
        with service.limiter.admit() as hold:
            hold(2**29)
            with pytest.raises(RequestError, match='Upload memory is full'): hold(1)
        assert service.limiter.bytes_held == 0
    finally: service.close()


def test_pictures_that_would_take_too_much(model):
    "Too many pixels, too many scans, a format that starts programs: a row with its reason, at once"
    service, buf = Service(model, replace(PLAIN, max_pixels=4000)), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(buf, 'JPEG', progressive=True)
    jpeg = buf.getvalue()
    some = dict(good=jpeg, large=picture(size=(80, 60)), bomb=png_of(50000, 50000), scans=jpeg[:-2] + jpeg[jpeg.rindex(b'\xff\xda'):-2] * 20_000,
                eps=b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    start = time.monotonic()
    try: rows = [r for r, in asyncio.run(service.predict([Upload(n, d) for n, d in some.items()]))]
    finally: service.close()
    assert time.monotonic() - start < 5 and not rows[0]['error'] and rows[1]['error'] == 'more than 4,000 pixels: 80 x 60'
    assert rows[2]['error'].startswith('more than 4,000 pixels') and 'scans' in rows[3]['error'] and rows[4]['error'] == 'not an image that can be read'


@pytest.mark.parametrize('options,most', [(dict(max_batch=1), 1), (dict(max_batch=5), 5)])
def test_the_size_of_batches(model, options, most):
    service, seen = Service(model, replace(PLAIN, **options)), []
    rows = service.job.rows
    object.__setattr__(service.job, 'rows', lambda a: seen.append(len(a)) or rows(a))
    try: asyncio.run(service.predict([Upload(str(i), picture()) for i in range(20)]))
    finally: service.close()
    assert max(seen) == most and sum(seen) == 20


def test_a_batch_waits_for_what_is_on_its_way(model):
    def batches(wait):
        service = Service(model, replace(PLAIN, max_wait=wait, max_batch=64))
        async def two():
            service.batcher.expected += 1  # a slow client
            one = asyncio.create_task(service.predict([Upload('a', picture())]))
            await asyncio.sleep(0.1)
            await asyncio.gather(one, service.predict([Upload('b', picture())]))
        try: asyncio.run(two())
        finally: service.close()
        return service.batcher.batches
    assert batches(0) == 2 and batches(1000) == 1


def test_precision_and_device(model):
    for options, seen in [(dict(precision='bf16'), 'bf16'), (dict(precision='fp32'), 'fp32')]:
        service = Service(model, replace(PLAIN, **options))
        assert service.engine.precision == seen == service.model_info['precision']
        service.close()
    with pytest.raises(OptionError, match='nowhere'): Service(model, replace(PLAIN, device='nowhere'))
    with pytest.raises(OptionError, match='neither a rule'): Service(model, replace(PLAIN, threshold='frown'))


def test_addresses_and_missing_packages(server, model, monkeypatch):
    host, _, port = server[0].rpartition(':')
    with pytest.raises(SmileError, match='cannot listen on'): serve(model.path, replace(PLAIN, port=int(port)))
    with pytest.raises(SmileError, match='cannot listen on'): serve(model.path, replace(PLAIN, host='no.such.host.invalid'))
    assert host == '127.0.0.1'
    with started(model.path, replace(PLAIN, host='127.0.0.2')) as (where, _): assert where.startswith('127.0.0.2:') and ask(where, '/healthz')[0] == 200
    import importlib.util as u
    real = u.find_spec
    monkeypatch.setattr(u, 'find_spec', lambda n, *a: None if n == 'fasthtml' else real(n, *a))
    with pytest.raises(SmileError, match=r'fasthtml.*\n.*fastsmile\[serve\]'): serve(model.path, PLAIN)


@pytest.fixture(scope='module')
def group():
    "Three drawn faces in one picture"
    rng, photo, buf = np.random.default_rng(3), Image.new('RGB', (480, 240), (200, 200, 190)), io.BytesIO()
    for side, x, y in ((120, 20, 60), (90, 200, 30), (60, 370, 150)): photo.paste(draw_face(random_face_params(rng, 'positive smile'), side, rng), (x, y))
    photo.save(buf, 'PNG')
    return buf.getvalue()


def test_faces_are_cut_out_as_predict_does(model, group, tmp_path):
    "A row for each face, the same as predict's; each is explained by its number; a picture without a face says so"
    pytest.importorskip('cv2', reason='the extra faces is not installed')
    (tmp_path/'group.png').write_bytes(group)
    options = dict(faces='each', face_margin=0.1, face_score=0.5)
    find = make_face_detector(PredictConfig(**options))
    expected = list(predict_rows(model, FolderReader(tmp_path), ['group.png'], row_format=make_row_format(model, faces=True), faces=find))
    assert len(expected) > 1
    with started(model.path, replace(PLAIN, **options)) as (where, service):
        status, _, got = ask(where, '/predict', *form(('group.png', group), ('none.png', picture('navy', (200, 200)))))
        *rows, none = got['predictions']
        assert status == 200 and none['error'] == 'no face found' and len(rows) == len(expected)
        for a, b in zip(rows, expected):
            for k in a: assert abs(a[k] - b[k]) < 1e-6 if isinstance(a[k], float) else a[k] == b[k], k
        one, two = (ask(where, f'/explain?face={i}', group, IMAGE) for i in (1, 2))
        assert one[0] == two[0] == 200 and one[2] != two[2]
        assert [ask(where, f'/explain?face={i}', group, IMAGE)[0] for i in (99, 'x', '0')] == [422] * 3
        page = ask(where, '/', *form(('group.png', group)))[2].decode()
        assert 'group.png, face 2: ' in page and page.count('data-number="0"') == len(rows)
        spec = ask(where, '/openapi.json')[2]
        jsonschema = pytest.importorskip('jsonschema')
        for row in got['predictions']: jsonschema.Draft202012Validator(spec['components']['schemas']['Row']).validate(row)
    for change in (dict(faces='largest'), dict(face_score=0.95), dict(face_margin=0.4)):  # none of them does nothing
        service = Service(model, replace(PLAIN, **options | change))
        try: assert rough(asyncio.run(service.predict([Upload('group.png', group)]))[0]) != rough(expected)
        finally: service.close()


def test_an_exported_model_is_served_without_torch(run, tmp_path):
    "The rows of the run, and no explanations, for which it says why"
    shutil.copytree(run.path/'model', tmp_path/'run'/'model')
    done = export(tmp_path/'run'/'model')
    file = next(Path(tmp_path).rglob('*.onnx'))
    assert done and file.exists()
    code = """import sys, threading, fastsmile.serving.app as s; from fastsmile.config.commands import ServeConfig
def ready(url, server):
    print(url, flush=True)
    threading.Thread(target=lambda: (sys.stdin.readline(), setattr(server, 'should_exit', True))).start()
s.serve(sys.argv[1], ServeConfig(port=0), ready); print('torch' in sys.modules)"""
    p = subprocess.Popen([sys.executable, '-c', code, str(file)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         env=os.environ | dict(FASTSMILE_QUIET=''))
    try:
        where = urlsplit(p.stdout.readline().strip()).netloc
        row, = ask(where, '/predict', picture(seed=5), IMAGE)[2]['predictions']
        assert ask(where, '/explain', picture(), IMAGE)[0] == 404 and ask(where, '/model')[2]['explain'] == []
        out, talk = p.communicate('\n', timeout=30)
    finally: p.kill()
    assert out.strip() == 'False' and 'no gradients to follow' in talk
    (tmp_path/'a').mkdir()
    (tmp_path/'a'/'picture').write_bytes(picture(seed=5))
    want = next(predict_rows(load_model(run.path), FolderReader(tmp_path/'a'), ['picture']))
    assert row['label'] == want['label'] and all(abs(row[k] - want[k]) < 1e-4 for k in row if k.startswith('p_'))
    with pytest.raises(OptionError, match='--engine torch cannot run'): serve(file, replace(PLAIN, engine='torch'))


def test_a_bundle_is_served_by_onnxruntime_and_explained_by_torch(run, tmp_path):
    "torch is loaded when the first explanation is asked for"
    shutil.copytree(run.path/'model', tmp_path/'model')
    export(tmp_path/'model')
    code = """import signal, sys, fastsmile.serving.app as s; from fastsmile.config.commands import ServeConfig
signal.signal(signal.SIGUSR1, lambda *_: print('torch' in sys.modules, flush=True))
s.serve(sys.argv[1], ServeConfig(port=0, device='cpu', precision='fp32'), lambda url, server: print(url, flush=True))"""
    p = Program(['-c', code, tmp_path/'model'], forget=('torch', 'timm', 'fastai', 'captum'))
    def torch_is_loaded(before):
        os.kill(p.pid, signal.SIGUSR1)
        return line(p, before)
    try:
        where = urlsplit(line(p, 0)).netloc
        assert ask(where, '/predict', picture(seed=5), IMAGE)[0] == 200 and torch_is_loaded(1) == 'False'
        status, headers, _ = ask(where, '/explain', picture(seed=5), IMAGE)
        assert (status, headers['content-type'], torch_is_loaded(2)) == (200, 'image/png', 'True')
    finally: p.kill()


def test_explanations_can_be_turned_off(model):
    with started(model.path, replace(PLAIN, explain='none')) as (where, _):
        assert ask(where, '/explain', picture(), IMAGE)[0] == 404 and b'id="method"' not in ask(where, '/')[2]
        assert '/explain' not in ask(where, '/openapi.json')[2]['paths']
    with started(model.path, replace(PLAIN, explain='sensitivity')) as (where, _):
        assert ask(where, '/model')[2]['explain'] == ['sensitivity', 'gradcam'] and ask(where, '/')[2].index(b'value="sensitivity"') < 3000


NAMES = st.text(st.characters(codec='utf-8', exclude_characters='"\\\r\n\0'), min_size=1, max_size=9)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=40)), min_size=1, max_size=4), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_a_form_is_read_the_same_however_it_is_cut(parts, step):
    data, body = form(*parts)[0], FormBody(b'----xyz', 9)
    for i in range(0, len(data), step): body.write(data[i:i + step])
    assert body.files() == [Upload(n, d) for n, d in parts]


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_no_bytes_break_the_form(data):
    for start in (b'', b'------xyz\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n'):
        try:
            body = FormBody(b'----xyz', 9)
            body.write(start + data)
            body.files()
        except RequestError as e: assert e.status in (413, 422)


# the description

def test_the_api_is_what_its_description_says(model):
    validate = pytest.importorskip('openapi_spec_validator').validate
    jsonschema = pytest.importorskip('jsonschema')
    with started(model.path, replace(PLAIN, abstain=True, sets=True)) as (where, service):
        spec = ask(where, '/openapi.json')[2]
        validate(spec)
        assert spec['openapi'] == '3.1.0'
        def fits(path, method, status, value):
            content = spec['paths'][path][method]['responses'][str(status)]['content']['application/json']['schema']
            jsonschema.Draft202012Validator({**content, 'components': spec['components']}).validate(value)
        some = list(files().items())
        status, _, rows = ask(where, '/predict', *form(*some))
        fits('/predict', 'post', status, rows)
        assert spec['components']['schemas']['Row']['properties']['most_probable']['enum'][-1] is None
        assert any(r['withheld'] for r in rows['predictions']) and spec['components']['schemas']['Row']['required'] == service.columns
        for body, status in ((b'', 422), (b'no picture', 422)):
            got = ask(where, '/predict', body, IMAGE)
            assert got[0] == status
            fits('/predict', 'post', *got[::2])
        for path in ('/healthz', '/model'): fits(path, 'get', *ask(where, path)[::2])
        about = ask(where, '/model')[2]
        assert about['labels'] == list(model.spec.classes) and about['prior'] == model.metadata.prior and about['rule'] == model.metadata.decide
        assert about['preprocessing']['size'] == 32 and about['metrics'] == model.metadata.metrics and str(Path(model.path).parent) not in json.dumps(about)
        bad = dict(rows['predictions'][0], confidence=2)
        with pytest.raises(jsonschema.ValidationError): fits('/predict', 'post', 200, dict(predictions=[bad]))  # the description says something
    assert accuracy_sentence(dict(test=dict(balanced_accuracy=0.5))).startswith('On held-out test images its balanced accuracy is 50%')
    assert accuracy_sentence({}) == ''


# a process of its own

def test_a_process_starts_answers_and_stops(model, tmp_path):
    "Started by the command; nothing uploaded reaches a disk; SIGTERM answers what is inside"
    spool = tmp_path/'tmp'
    spool.mkdir()
    p = Program(['-m', 'fastsmile', 'serve', model.path, '--port', '0', '--tta', '--max-wait', '1', '--json'], tmp_path,
                os.environ | dict(TMPDIR=str(spool), FASTSMILE_QUIET=''))
    try:
        where = urlsplit(line(p, 0)).netloc
        assert ask(where, '/model')[2]['tta'] == 'flip'
        assert ask(where, '/predict', b'--x\r\nb\0d: \x1b[31m\r\n', {'content-type': 'multipart/form-data; boundary=x'})[0] == 422
        large = picture('red', (1400, 1400), 'BMP')
        assert len(large) > 5_000_000 and ask(where, '/predict', *form(('a.bmp', large), ('b.bmp', large)))[0] == 200
        if Path('/proc/self/fd').exists():
            held = [os.readlink(f) for f in Path(f'/proc/{p.pid}/fd').iterdir() if f.is_symlink()]
            assert not [h for h in held if '(deleted)' in h or str(tmp_path) in h]
        host, _, port = where.rpartition(':')
        body, head = form(*((f'{i}.png', picture(seed=i)) for i in range(12)))
        with socket.create_connection((host, int(port)), timeout=20) as s:
            head |= dict(host=where) | {'content-length': len(body)}
            s.sendall('\r\n'.join(['POST /predict HTTP/1.1', *(f'{k}: {v}' for k, v in head.items()), '', '']).encode() + body[:500])
            while ask(where, '/healthz')[2]['waiting'] < 1: time.sleep(0.02)
            os.kill(p.pid, signal.SIGTERM)
            time.sleep(0.3)
            s.sendall(body[500:])
            out = b''
            while chunk := s.recv(65536): out += chunk
        assert b' 200 ' in out.split(b'\r\n')[0] and out.count(b'"path"') == 12
        with pytest.raises(OSError): ask(where, '/healthz')
        said, talk = p.communicate(timeout=20)
    finally: p.kill()
    assert p.returncode == 0
    assert json.loads(said.partition('\n')[2])['pictures'] == 14 and 'Traceback' not in talk and 'invalid' not in talk and not list(spool.iterdir())
    assert sorted(f.name for f in tmp_path.iterdir()) == ['tmp']


def test_the_container_of_the_guide_serves_under_its_name(model):
    "What its Dockerfile installs and starts, read from the docs; no container is built"
    import configparser
    from fastsmile.cli.commands import app
    from typer.main import get_command
    root = Path(__file__).resolve().parents[2]
    text = (root/"docs"/"predicting.md").read_text(encoding="utf-8")
    recipe, head = (re.search(f'```{kind}\n(.*?)```', text, re.S)[1].replace('\\\n', ' ') for kind in ('dockerfile', 'yaml'))
    settings = configparser.ConfigParser()
    settings.read(root/'settings.ini')
    extra, where = re.search(r'"fastsmile\[(\w+)\] @ (\S+)"', recipe).groups()
    assert f'{extra}_requirements' in settings['DEFAULT'] and where.startswith(settings['DEFAULT']['git_url'])
    program, name, source, *options = json.loads(re.search(r'CMD (\[.*\])', recipe)[1])
    assert (program, name) == ('fastsmile', 'serve') and source.startswith('hf://')
    typed = get_command(app).commands['serve'].make_context('serve', [source, *options]).params
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in typed.items() if k in ServeConfig.__dataclass_fields__}
    config = ServeConfig(**fields)
    assert 'sdk: docker' in head and f'app_port: {config.port}' in head and f'EXPOSE {config.port}' in recipe
    with started(model.path, replace(config, port=0, explain='none')) as (address, _):
        port, space = address.rpartition(':')[2], dict(host='USER-NAME.hf.space') | {'sec-fetch-site': 'same-origin'}
        status, headers, _ = ask(f'127.0.0.1:{port}', '/', None, space)
        assert status == 200 and headers['content-security-policy'].endswith('frame-ancestors https://huggingface.co')
        assert ask(f'127.0.0.1:{port}', '/predict', picture(), IMAGE | space)[0] == 200
        assert ask(f'127.0.0.1:{port}', '/', None, dict(host='else.where'))[0] == 421


def test_docs_and_health(server):
    where, _ = server
    assert ask(where, '/health')[2] == ask(where, '/healthz')[2]
    status, headers, page = ask(where, '/docs')
    page = page if isinstance(page, str) else page.decode()
    spec = ask(where, '/openapi.json')[2]
    assert status == 200 and headers['content-type'].startswith('text/html') and '<script' not in page
    assert all(f'<code>{method.upper()} {path}</code>' in page for path, calls in spec['paths'].items() for method in calls)
    assert f'curl -F files=@face.jpg -F files=@another.jpg http://{where}/predict' in page
    assert headers['content-security-policy'].endswith("frame-ancestors 'none'")


@pytest.mark.parametrize('site', ['huggingface.co', 'https://a/b', "https://a; script-src *"])
def test_only_sites_embed_the_page(site):
    with pytest.raises(OptionError, match='is no site'): ServeConfig(embed=(site,))


# the page

@contextmanager
def browser(width=1100, scheme='light', **context):
    "A tab, and what it said and asked for"
    sync_api = pytest.importorskip('playwright.sync_api')
    flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream']
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=flags)
        tab = b.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, **context).new_page()
        tab.set_default_timeout(15000)
        tab.said, tab.asked = [], []
        tab.on('console', lambda m: tab.said.append(m.text))
        tab.on('pageerror', lambda e: tab.said.append(str(e)))
        tab.on('dialog', lambda d: tab.said.append('dialog'))
        tab.on('request', lambda r: tab.asked.append(r.url))
        yield tab
        b.close()


def contrast(tab, selector) -> float:
    "WCAG contrast of an element's text on what is behind it"
    light = '''s => { const e = document.querySelector(s), n = c => c.match(/[0-9.]+/g).map(Number)
      let b = e; while (n(getComputedStyle(b).backgroundColor)[3] === 0) b = b.parentElement ?? document.body
      const one = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
      const l = c => n(c).slice(0, 3).reduce((a, v, i) => a + one(v / 255) * [.2126, .7152, .0722][i], 0)
      return [l(getComputedStyle(e).color), l(getComputedStyle(b).backgroundColor)] }'''
    low, high = sorted(tab.evaluate(light, selector))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine')
@pytest.mark.parametrize('width,scheme', [(1100, 'light'), (390, 'dark')])
def test_the_page_in_a_browser(server, faces, tmp_path, width, scheme):
    where, service = server
    face = next(f for f in sorted((faces/'happy_images').iterdir()) if not service_error(service, f))
    with browser(width, scheme) as tab:
        tab.goto(f'http://{where}/')
        send = dict(name='face.jpg', mimeType='image/jpeg', buffer=face.read_bytes())
        tab.get_by_label('Choose images').set_input_files([send, dict(name=ATTACK, mimeType='text/plain', buffer=b'no picture')])
        label = ask(where, '/predict', face.read_bytes(), {'content-type': 'image/jpeg'})[2]['predictions'][0]
        good = tab.get_by_role('article', name=f"face.jpg: {label['label']}")
        good.wait_for()
        assert good.get_by_role('row').count() == 3 and good.get_by_role('heading').inner_text().startswith(label['label'])
        good.get_by_role('img', name='Where the evidence').wait_for()
        shapes = good.get_by_role('img').evaluate_all('f => f.map(i => [i.complete, i.naturalWidth])')
        assert len(shapes) == 2 and all(done and w > 0 for done, w in shapes) and shapes[1][1] == 32
        bad = tab.get_by_role('article', name='does not look like an image')
        assert 'Not an image that can be read' in bad.inner_text() and ATTACK in bad.inner_text() and not tab.query_selector('.bad img')
        status = tab.get_by_role('status')
        assert label['label'] in status.inner_text() and 'does not look like an image' in status.inner_text()
        tab.get_by_label('Explain with').select_option('none')
        good.get_by_role('img', name='Where the evidence').wait_for(state='detached')
        tab.get_by_label('Explain with').select_option('sensitivity')
        good.get_by_role('img', name='Where the evidence').wait_for()
        for s in ('h1', 'header p', 'form p.script', '.button', '.bad h2', '.answer .name', 'footer p', 'caption', '#status', 'td:last-child'):
            assert contrast(tab, s) >= 4.5, s
        assert not accessibility_faults(tab)
        tab.screenshot(path=str(tmp_path/'page.png'), full_page=True)
        assert tab.evaluate('document.documentElement.scrollWidth') <= width and not tab.said
        assert all(u.startswith((f'http://{where}/', 'blob:', 'data:')) for u in tab.asked)


def service_error(service, path): return asyncio.run(service.load([Upload('x', path.read_bytes())]))[0][0].error


def hide(tab):
    "Another tab is in front"
    tab.evaluate("() => { Object.defineProperty(document, 'hidden', {value: true}); document.dispatchEvent(new Event('visibilitychange')) }")


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine')
def test_keyboard_paste_drop_camera_and_limits(server):
    where, service = server
    with browser() as tab:
        tab.goto(f'http://{where}/')
        seen = []
        for _ in range(3):  # a fourth leaves the page
            tab.keyboard.press('Tab')
            seen.append(tab.evaluate("""() => { const e = document.activeElement; return [e.id, getComputedStyle(e.closest('.button') ?? e).outlineStyle] }"""))
        assert [s[0] for s in seen] == ['files', 'camera', 'method'] and all(s[1] == 'solid' for s in seen)
        with tab.expect_file_chooser() as chooser: tab.locator('#files').press('Enter')
        chooser.value.set_files([dict(name=f'{i}.png', mimeType='image/png', buffer=picture(seed=i)) for i in range(11)])  # more than a request may have
        tab.wait_for_function('() => document.querySelectorAll("figure.why").length === 11')
        names = tab.locator('.answer .name').all_inner_texts()
        assert sorted(names) == sorted(f'{i}.png' for i in range(11)) and '11 answers' in tab.get_by_role('status').inner_text()
        give = '''([kind, name, text]) => { const d = new DataTransfer(), bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
          d.items.add(new File([bytes], name, {type: 'image/png'}))
          const e = kind === 'drop' ? new DragEvent(kind, {dataTransfer: d}) : new ClipboardEvent(kind, {clipboardData: d})
          document.dispatchEvent(e) }'''
        from base64 import b64encode
        for kind in ('drop', 'paste'):
            tab.evaluate(give, [kind, f'{kind}.png', b64encode(picture()).decode()])
            tab.get_by_role('article', name=f'{kind}.png: ').wait_for()
        tab.get_by_role('button', name='Use the camera').click()
        tab.wait_for_function('() => document.getElementById("film").videoWidth > 0')
        def live_requests(): return sum(u.endswith('/predict') for u in tab.asked)
        def status_of_live(): return [tab.locator('#now').is_visible(), tab.locator('#live').inner_text()]
        tab.get_by_role('button', name='Label live').click()
        tab.wait_for_function('() => document.getElementById("now-bar").value > 0')
        with tab.expect_request('**/predict'): pass  # the next second's
        assert re.fullmatch(r'(NOT smile|positive smile|negative smile) [0-9]+%.*', tab.locator('#now-label').inner_text())
        assert contrast(tab, '#now-label') >= 4.5
        for stop in (lambda tab: tab.get_by_role('button', name='Stop').click(), hide):
            if stop is hide: tab.get_by_role('button', name='Label live').click()
            stop(tab)
            seen = live_requests()
            tab.wait_for_timeout(1500)
            assert live_requests() == seen and status_of_live() == [False, 'Label live']
        tab.get_by_role('button', name='Take the picture').click()
        tab.get_by_role('article', name='camera ').wait_for()
        assert not tab.get_by_role('dialog').is_visible()
        tab.get_by_label('Choose images').set_input_files([dict(name='huge.png', mimeType='image/png', buffer=bytes(3_100_000))])
        tab.get_by_role('article', name='This file is too large').wait_for()
        assert not tab.said, tab.said


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason='no Chromium on this machine')
def test_the_page_without_javascript_and_not_sure(model):
    with started(model.path, replace(PLAIN, abstain=True)) as (where, service):
        unsure = next(s for s in range(50) if ask(where, '/predict', picture(seed=s), IMAGE)[2]['predictions'][0]['withheld'])
        with browser(java_script_enabled=False) as tab:
            tab.goto(f'http://{where}/')
            tab.get_by_label('Choose images').set_input_files([dict(name='a.png', mimeType='image/png', buffer=picture(seed=unsure))])
            tab.get_by_role('button', name='Predict').click()
            answer = tab.get_by_role('article', name='a.png: Not sure')
            answer.wait_for()
            assert 'less than this model wants before it gives a label' in answer.inner_text() and answer.get_by_role('row').count() == 3
            assert not tab.get_by_role('button', name='camera').is_visible()


def test_options_that_predict_shares_are_the_same():
    ours, theirs = ServeConfig.__dataclass_fields__, PredictConfig.__dataclass_fields__
    for n in ('engine', 'tta', 'uncalibrated', 'threshold', 'abstain', 'sets', 'faces', 'face_margin', 'face_score', 'precision', 'device'):
        assert ours[n].default == theirs[n].default and ours[n].metadata == theirs[n].metadata


@pytest.mark.parametrize('path,status', [('/nope', b' 404 '), ('/model', b' 405 '), ('/healthz', b' 405 ')])
def test_a_body_that_nobody_reads_ends_with_its_answer(model, path, status):
    "A client that sends a byte now and then to an address that reads none does not keep its connection"
    with started(model.path, replace(PLAIN, timeout=1., max_waiting=2)) as (where, _):
        host, _, port = where.rpartition(':')
        some = [socket.create_connection((host, int(port)), timeout=10) for _ in range(20)]
        for s in some: s.sendall(f'POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000000\r\n\r\n'.encode())
        start, said = time.monotonic(), []
        for s in some:
            with s:
                out = b''
                while chunk := s.recv(65536): out += chunk
                said.append(out)
        assert all(status in out.split(b'\r\n')[0] and b'connection: close' in out for out in said) and time.monotonic() - start < 4
        assert ask(where, '/healthz')[0] == 200 and ask(where, '/nope', b'x')[0] == 404  # a body that is there does no harm


@contextmanager
def narrow(model, seconds: float, patience: float):
    "A server that waits so long, and a client whose system takes little of an answer at once"
    with started(model.path, replace(PLAIN, timeout=seconds)) as (where, _), socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = where.rpartition(':')
        s.connect((host, int(port)))
        s.settimeout(patience)
        yield where, s


def test_who_never_reads_is_cut_off(model):
    "A client that asks and asks, and takes no answer"
    with narrow(model, 0.5, 3) as (where, s):
        with pytest.raises(ConnectionError):
            for _ in range(5000):
                s.sendall(b'GET / HTTP/1.1\r\nhost: localhost\r\n\r\n')
                time.sleep(0.001)
        assert ask(where, '/healthz')[0] == 200


def test_who_reads_slowly_gets_it_all(model):
    "A large answer in small portions, within the time"
    with narrow(model, 5., 5) as (where, s):
        s.sendall(b'GET /serve.js HTTP/1.1\r\nhost: localhost\r\n\r\n' * 20 + b'GET /serve.js HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n')
        out = b''
        while chunk := s.recv(2048): out += chunk; time.sleep(0.0005)
        assert out.count(b'HTTP/1.1 200') == 21 and len(out) > 21 * len(ask(where, '/serve.js')[2])
