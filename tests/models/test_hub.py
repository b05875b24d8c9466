"A model to and from the Hugging Face Hub, against a stand-in of the hub on this machine."
import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import TINY, picture

from fastsmile.config.commands import ExportConfig
from fastsmile.core.errors import SmileError
from fastsmile.core.files import read_safe_csv
from fastsmile.inference.export import export
from fastsmile.inference.predict import load_model
from fastsmile.models.bundle import save_bundle
from fastsmile.models.factory import build_network, make_spec
from fastsmile.models.hub import fetch_model
from fastsmile.models.spec import Model, ModelMetadata
from fastsmile.runs.folder import finished_run

TOKEN = 'hf_of_ada'


class Hub(BaseHTTPRequestHandler):
    "The few calls that huggingface_hub makes: repositories are dicts of files, in `server.repos`"
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_): pass

    def answer(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in (headers | {'Content-Length': str(len(body))}).items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)

    def missing(self, code): self.answer(dict(error=code), 404, X_Error_Code=code, X_Error_Message=code)

    def repo(self, name):
        "A repository that the caller may see"
        found = self.server.repos.get(name)
        is_ada = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        return found if found and (is_ada or not found['private']) else None

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        path = self.path.partition('?')[0]
        self.server.asked.append((self.command, path))
        if m := re.fullmatch(r'/api/models/([^/]+/[^/]+)(?:/revision/main|/tree/.*)?', path):
            if not (repo := self.repo(m[1])): return self.missing('RepoNotFound')
            if '/tree/' in path: return self.answer([dict(type='file', path=n, size=len(b), oid='0' * 40) for n, b in repo['files'].items()])
            files = [dict(rfilename=n) for n in repo['files']]
            return self.answer(dict(id=m[1], sha=repo['sha'], private=repo['private'], siblings=files, tags=[], downloads=0))
        if '/revision/' in path: return self.missing('RevisionNotFound')
        m = re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.*)', path)
        if not m or not (repo := self.repo(m[1])): return self.missing('RepoNotFound')
        if m[2] not in repo['files']: return self.missing('EntryNotFound')
        body = repo['files'][m[2]]
        self.answer(body, X_Repo_Commit=repo['sha'], ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    def do_POST(self):
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            body = b''
            while size := int(self.rfile.readline(), 16): body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        else: body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        if self.path == '/api/validate-yaml': return self.answer({})
        if self.headers.get('Authorization') != f'Bearer {TOKEN}': return self.answer(dict(error='Unauthorized'), 401)
        if self.path == '/api/repos/create': return self.create(json.loads(body))
        repo = self.server.repos[re.match('/api/models/([^/]+/[^/]+)/', self.path)[1]]
        if '/preupload/' in self.path:
            return self.answer(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]))
        for line in map(json.loads, body.splitlines()):
            if line['key'] == 'file': repo['files'][line['value']['path']] = base64.b64decode(line['value']['content'])
            if line['key'] == 'deletedFile': del repo['files'][line['value']['path']]
        repo['sha'] = hashlib.sha1(body).hexdigest()
        self.answer(dict(success=True, commitOid=repo['sha'], commitUrl=f'http://{self.headers["Host"]}/ada/x/commit/{repo["sha"]}'))

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'ada'}/{wanted['name']}"
        private = wanted.get('private') or wanted.get('visibility') == 'private'
        url = f'http://{self.headers["Host"]}/{name}'
        if name in self.server.repos: return self.answer(dict(url=url, error='exists'), 409)
        self.server.repos[name] = dict(files={'.gitattributes': b''}, private=bool(private), sha='a' * 40)
        self.answer(dict(url=url, name=name))


@pytest.fixture(scope='module')
def hub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos, server.asked = {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    "A model folder with its ONNX file, a card without a YAML head, and a file that is no part of it"
    where = tmp_path_factory.mktemp('hub')/'model'
    spec = make_spec('resnet10t', ['no', 'yes'], size=32, model_args=TINY)
    save_bundle(Model(spec, ModelMetadata([.5, .5], [0.] * 2, [0.] * 2, 'argmax'), build_network(spec)), where)
    export(where, ExportConfig())
    (where/'README.md').write_text('# Smiles\n')
    (where/'private-notes.csv').write_text('path\n')
    return where


@pytest.fixture
def smile(hub, tmp_path):
    "The command in a process whose hub is the stand-in; `hub=` names another"
    def run(*args, **env):
        env = {k: v for k, v in os.environ.items() if k != 'FASTSMILE_QUIET'} | dict(
            HF_ENDPOINT=f'http://127.0.0.1:{hub.server_port}', HF_HOME=str(tmp_path/'hf'), HF_TOKEN=TOKEN,
            HF_HUB_DISABLE_PROGRESS_BARS='1', COLUMNS='200', TERM='dumb') | env
        return subprocess.run([sys.executable, '-m', 'fastsmile', *map(str, args)], capture_output=True, text=True, cwd=tmp_path, env=env)
    return run


def test_pushed_fetched_and_used_without_a_network(hub, smile, bundle, tmp_path):
    pushed = smile('push', bundle, 'ada/smiles', '--private')
    assert pushed.returncode == 0 and 'private' in pushed.stdout and '--model hf://ada/smiles' in pushed.stdout, pushed.stderr
    repo = hub.repos['ada/smiles']
    assert repo['private'] and set(repo['files']) == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'model.onnx'}
    assert repo['files']['model.safetensors'] == (bundle/'model.safetensors').read_bytes()
    card = repo['files']['README.md'].decode()
    assert card.startswith('---\nlibrary_name') and 'pipeline_tag: image-classification' in card and 'license' not in card and '# Smiles' in card

    repo['files'] |= {'extra.pkl': b'cos\nsystem\n', 'code.py': b'1/0'}
    (tmp_path/'faces').mkdir()
    for i in range(3): (tmp_path/'faces'/f'{i}.png').write_bytes(picture(seed=i))
    local = load_model(bundle).predict(str(tmp_path/'faces'))
    fetched = smile('predict', 'faces', '--model', 'hf://ada/smiles', '--out', 'hub.csv')
    assert fetched.returncode == 0, fetched.stderr
    assert read_safe_csv(tmp_path/'hub.csv', numbers=True).p_yes.tolist() == pytest.approx(local.p_yes.tolist())
    assert not any(path.endswith(('.pkl', '.py')) for _, path in hub.asked)

    offline = smile('predict', 'faces', '--model', 'hf://ada/smiles', '--out', 'off.csv', HF_ENDPOINT='http://127.0.0.1:9')
    assert offline.returncode == 0 and 'copy of hf://ada/smiles in the cache is used' in offline.stderr, offline.stderr
    assert (tmp_path/'off.csv').read_bytes() == (tmp_path/'hub.csv').read_bytes()
    never = smile('predict', 'faces', '--model', 'hf://ada/other', HF_HUB_OFFLINE='1')
    assert never.returncode == 1 and 'No copy of hf://ada/other is in the cache' in never.stderr and 'Traceback' not in never.stderr


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    "This process, whose hub is the stand-in"
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'ENDPOINT', f'http://127.0.0.1:{hub.server_port}')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', constants.ENDPOINT + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    fetch_model.cache_clear()


def test_a_push_replaces_the_model_before_it(hub, here, bundle):
    from fastsmile import push
    hub.repos['ada/kept'] = dict(files={'members/0/config.json': b'{}', 'old.onnx': b'x', 'plot.png': b'x'}, private=False, sha='b' * 40)
    done = push(bundle, 'ada/kept')
    assert done['model'] == 'hf://ada/kept' and not done['private']
    assert set(hub.repos['ada/kept']['files']) == {'plot.png', 'README.md', 'config.json', 'model.safetensors', 'model.onnx'}
    before = dict(hub.repos['ada/kept']['files'])
    with pytest.raises(SmileError, match='exists, and is public'): push(bundle, 'ada/kept', private=True)
    assert hub.repos['ada/kept']['files'] == before


def test_what_cannot_be_pushed_or_fetched(hub, here, bundle, tmp_path, monkeypatch):
    from fastsmile import push
    hub.repos['ada/bert'] = dict(files={'config.json': b'{"model_type": "bert"}', 'model.safetensors': b'x'}, private=False, sha='c' * 40)
    hub.repos['ada/empty'] = dict(files={}, private=False, sha='d' * 40)
    for name in ('bert', 'empty'):
        with pytest.raises(SmileError, match='is no fastsmile model'): fetch_model(f'hf://ada/{name}')
    assert ('GET', '/ada/bert/resolve/main/model.safetensors') not in hub.asked
    with pytest.raises(SmileError, match='no such revision'): fetch_model('hf://ada/bert@v9')
    with pytest.raises(SmileError, match='a model without its run'): finished_run('hf://ada/bert')
    hub.repos['ada/secret'] = dict(files={}, private=True, sha='e' * 40)
    monkeypatch.setenv('HF_TOKEN', 'hf_other')
    with pytest.raises(SmileError, match='does not exist, or it is not yours') as refused: fetch_model('hf://ada/secret')
    assert 'hf auth login' in refused.value.hint
    with pytest.raises(SmileError, match='not yours'): push(bundle, 'ada/new')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    with pytest.raises(SmileError, match='no token'): push(bundle, 'ada/new')


def test_a_model_of_the_hub_is_measured_on_a_labelled_source(hub, here, bundle, tmp_path, monkeypatch):
    from fastsmile import evaluate, push
    push(bundle, 'ada/measured')
    for i in range(6):
        (tmp_path/'faces'/('no', 'yes')[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path/'faces'/('no', 'yes')[i % 2]/f'{i}.png').write_bytes(picture(seed=i))
    monkeypatch.chdir(tmp_path)
    done = evaluate('hf://ada/measured', tmp_path/'faces', tta='none')
    assert done['metrics']['rows'] == 6 and done['out'] == 'evaluations/faces'
    with pytest.raises(SmileError, match='a model without its run'): evaluate('hf://ada/measured')
