"""A stand-in for the Hub on the loopback interface, over real HTTP, with faults on demand.

It speaks what huggingface_hub asks for when repositories are made, pushed to and downloaded from: creation, the check
of a card's metadata, preupload, commits (regular files and LFS), branches, pull requests, trees, revisions, and files
with ranges. Repositories live in memory. `Hub.fault` makes requests fail: a status, a cut connection, a late answer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from transformers.utils import hub as transformers_hub

WRITE, READ = "hf_write", "hf_read"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
TASKS = {"image-classification", "text-classification", "text-generation"}
_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Fault:
    """Something that happens to the next requests of a kind instead of, or before, the answer.

    Attributes:
        method: HTTP method.
        path: A regex that the path has to match from its beginning.
        times: How many requests.
        status: Answer with this status.
        headers: And with these headers.
        cut_body: Close the connection after this many bytes of the request's body.
        cut_answer: Close the connection after this many bytes of the answer's.
        lose_answer: Do what was asked for, then close the connection without an answer.
        wait: Wait so many seconds before the answer.
        stall: Wait so many seconds in the middle of the answer.
        before: Called before the request is handled.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_body: int | None = None
    cut_answer: int | None = None
    lose_answer: bool = False
    wait: float = 0
    stall: float = 0
    before: Callable[[], None] | None = None


@dataclass
class Repo:
    """Files by commit, and commits by branch."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, ref: str = "main") -> str:
        content = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{message}{content}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        self.refs[ref] = oid
        return oid

    def oid(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


class Hub:
    """The server and what it holds.

    Attributes:
        url: Its address.
        repos: Repositories by id.
        requests: Method and path of every request, in the order of their arrival.
        lfs: Endings of the files that go to LFS.
        sleeps: What the client waited for between attempts; nobody really sleeps.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lfs: tuple[str, ...] = (".safetensors", ".png")
        self.sleeps: list[float] = []
        self.released = threading.Event()  # wakes whoever waits when the server stops
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, files: dict[str, bytes], **how: Any) -> str:
        """Put files into a repository, as if somebody had pushed them; the commit."""
        found = self.repos.setdefault(repo, Repo(**how))
        old = found.files() if "main" in found.refs else {}
        return found.commit({**old, **files}, "by hand")

    def fault(self, method: str, path: str, **what: Any) -> Fault:
        """Make the next request of a kind go wrong; see `Fault`."""
        made = Fault(method, path, **what)
        self.faults.append(made)
        return made

    def due(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.match(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, method: str, path: str = "") -> int:
        """How many requests there were of a kind."""
        return sum(m == method and re.match(path, p) is not None for m, p in self.requests)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub, with huggingface_hub pointed at it, an empty cache, a token that may write, and no sleeping."""
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.setenv("HF_TOKEN", WRITE)
    monkeypatch.setattr(time, "sleep", server.sleeps.append)
    close_session()
    yield server
    close_session()
    server.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, or each request waits for an acknowledgement
    disable_nagle_algorithm = True
    _fault: Fault | None = None

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        fault = self._fault = self.hub.due(self.command, path)
        body = self._body(fault)
        if body is None:
            return
        if fault is not None:
            if fault.before is not None:
                fault.before()
            if fault.wait:
                self.hub.released.wait(fault.wait)
            if fault.status is not None:
                self._answer(fault.status, {"error": "a fault"}, fault.headers)
                return
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if self.command == method and match:
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                getattr(self, name)(body, **groups)
                return
        self._answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self, fault: Fault | None) -> bytes | None:
        length = int(self.headers.get("Content-Length", 0))
        if fault is not None and fault.cut_body is not None:
            self.rfile.read(min(fault.cut_body, length))
            self._cut()
            return None
        return self.rfile.read(length)

    def _cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        fault = self._fault
        if fault is not None and fault.lose_answer:
            self._cut()
            return
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut_answer is not None:
            self.wfile.write(data[: fault.cut_answer])
            self.wfile.flush()
            self._cut()
            return
        if fault is not None and fault.stall:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.hub.released.wait(fault.stall)
            data = data[len(data) // 2 :]
        try:
            self.wfile.write(data)
        except OSError:  # whoever waited too long has gone
            self.close_connection = True

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    # --- who may do what ---

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _repo(self, repo: str, write: bool = False) -> Repo | None:
        """The repository, or None after an answer that says why not, as the Hub says it."""
        token, found = self._token(), self.hub.repos.get(repo)
        if token not in (None, READ, WRITE):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif found is None or (found.private and token is None):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif found.gated and token is None:
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted")
        elif found.gated and token != WRITE:
            self._refuse(403, "GatedRepo", f"Access to model {repo} is restricted and you are not in the list")
        elif write and token != WRITE:
            self._refuse(403, "", "You don't have the rights to write to this repository")
        else:
            return found
        return None

    def _commit(self, repo: str, revision: str) -> tuple[Repo, str] | None:
        found = self._repo(repo)
        if found is None:
            return None
        oid = found.oid(revision)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found, oid

    # --- writing ---

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        if self._token() != WRITE:
            self._refuse(401 if self._token() is None else 403, "", "You don't have the rights to create a model")
        elif repo in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", **answer})
        else:
            made = self.hub.repos[repo] = Repo(private=asked.get("visibility") == "private")
            made.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self._answer(200, answer)

    def _validate(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(400 if errors else 200, answer)

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo, write="create_pr=1" not in self.path)
        if found is None:
            return
        if found.oid(revision) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        there = found.files(revision)
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            lfs = path.endswith(self.hub.lfs)
            oid = None if path not in there else (sha256 if lfs else blob_id)(there[path])
            files.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        # Objects are nobody's until a commit names them: whoever may open a pull request may send them.
        if self._repo(repo) is None:
            return
        objects = []
        for entry in json.loads(body)["objects"]:
            oid = entry["oid"]
            known = {} if oid in self.hub.objects else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{oid}"}}}
            objects.append({**entry, **known})
        self._answer(200, {"objects": objects, "transfer": "basic"})

    def _put(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            self._answer(400, {"error": "the content has another hash"})
            return
        self.hub.objects[oid] = body
        self._answer(200)

    def _make_branch(self, body: bytes, repo: str, branch: str) -> None:
        found = self._repo(repo, write=True)
        if found is None:
            return
        if branch in found.refs:
            self._answer(409, {"error": "the branch exists"})
            return
        found.refs[branch] = found.refs[json.loads(body or b"{}").get("startingPoint", "main")]
        self._answer(200, {})

    def _make_commit(self, body: bytes, repo: str, revision: str) -> None:
        as_pr = "create_pr=1" in self.path
        found = self._repo(repo, write=not as_pr)
        if found is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header, head = lines[0]["value"], found.oid(revision)
        if head is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        if header.get("parentCommit") not in (None, head) and not as_pr:
            self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(found.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._answer(400, {"error": f"no LFS object {value['oid']}"})
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        number = sum(ref.startswith("refs/pr/") for ref in found.refs) + 1
        oid = found.commit(files, header["summary"], f"refs/pr/{number}" if as_pr else revision)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
        if as_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self._answer(200, answer)

    # --- reading ---

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        found = self._commit(repo, revision)
        if found is not None:
            content, oid = found
            siblings = [{"rfilename": path} for path in content.commits[oid]]
            self._answer(
                200,
                {
                    "id": repo,
                    "sha": oid,
                    "private": content.private,
                    "gated": content.gated,
                    "siblings": siblings,
                    "tags": [],
                },
            )

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        entries = []
        for path, data in found[0].commits[found[1]].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if path.endswith(self.hub.lfs):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        oid, data = found[1], found[0].commits[found[1]].get(path)
        if data is None:
            code = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            self._answer(404, {"error": "Entry not found"}, code)
            return
        lfs = path.endswith(self.hub.lfs)
        etag = (sha256 if lfs else blob_id)(data)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206, data[start:], headers)
        elif self.command == "HEAD":
            self._answer(200, None, {**headers, "Content-Length": str(len(data))})
        else:
            self._answer(200, data, headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", "_create"),
    ("POST", "/api/validate-yaml", "_validate"),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", "_preupload"),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", "_make_commit"),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "_make_branch"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", "_put"),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", "_info"),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", "_tree"),
    ("GET", f"/api/models/{_REPO}", "_info"),
    ("HEAD", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
    ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve"),
]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What the Hub would have against a card's metadata, by the rules that it documents for model cards."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["no metadata block"]
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(found, dict):
        return ["the metadata is no mapping"]
    errors = []

    def expect(right: bool, message: str) -> None:
        if not right:
            errors.append(message)

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    expect(found.get("license", "unknown") in LICENSES, f'"license" must be one of {sorted(LICENSES)}')
    expect(found.get("pipeline_tag", "image-classification") in TASKS, '"pipeline_tag" is unknown')
    expect(found.get("base_model_relation", "adapter") in RELATIONS, '"base_model_relation" is unknown')
    base = found.get("base_model", "a/b")
    expect(isinstance(base, str) and _ID.fullmatch(base) is not None, '"base_model" with a value that is no model id')
    for name in ("tags", "datasets", "metrics"):
        expect(texts(found.get(name, [])), f'"{name}" must be an array of strings')
    for model in found.get("model-index", []):
        expect(isinstance(model.get("name"), str), '"model-index[].name" is required')
        for result in model["results"]:
            expect(isinstance(result.get("task", {}).get("type"), str), '"results[].task.type" is required')
            dataset = result.get("dataset", {})
            expect(all(isinstance(dataset.get(k), str) for k in ("type", "name")), '"results[].dataset" lacks a field')
            for metric in result.get("metrics", []):
                good = isinstance(metric.get("type"), str) and isinstance(metric.get("value"), (int, float, str))
                expect(good, '"results[].metrics[]" lacks a field')
    return errors
