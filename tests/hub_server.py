"""A small Hugging Face Hub for tests: a local HTTP server, and a helper that runs clients against it.

It speaks the endpoints for models that `push_to_hub`, `from_pretrained` by repo id and `HfApi` use (huggingface_hub
2.4 without Xet) and keeps everything in memory. Where clients can tell it behaves like the Hub: files are inline or
LFS, every commit stays readable by its id, unchanged files are recognized, errors carry `X-Error-Code`. The client
library reads `HF_ENDPOINT` at import, so a client is always a subprocess:

    with HubServer() as server:
        run_client("from huggingface_hub import HfApi; print(HfApi().whoami()['name'])", server, tmp_path)
    assert not server.unknown_requests and not server.internal_errors
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "user", "hf_test"  # the one account; only writing needs its token
REPO = r"/(?P<repo_id>[^/]+/[^/]+)"
API = r"/api/models" + REPO


class HubError(Exception):
    """An answer other than success: HTTP status, text for people, the Hub's error code for the client."""

    def __init__(self, status: int, message: str, code: str = "", commit_id: str = "", **body: Any):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit_id}
        self.response = Response({"error": message, **body}, status, {k: v for k, v in headers.items() if v})


@dataclass
class Request:
    method: str
    path: str  # percent-encoded: a revision such as refs/pr/1 is one segment of it
    query: dict[str, list[str]]
    headers: Any
    body: bytes


@dataclass
class Response:
    body: bytes | list | dict = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFile:
    """One version of a file in a repository."""

    content: bytes
    is_lfs: bool = False

    @cached_property
    def etag(self) -> str:
        """The id by which clients compare contents: sha256 for LFS files, git's sha1 for the others."""
        blob = b"blob %d\0" % len(self.content) + self.content
        return (hashlib.sha256(self.content) if self.is_lfs else hashlib.sha1(blob)).hexdigest()

    def entry(self, path: str) -> dict:
        """The file as listed in a tree (`path`, `oid`) and as in a repository's info (`rfilename`, `blobId`)."""
        size, oid = len(self.content), self.etag[:40]
        entry = {"type": "file", "path": path, "rfilename": path, "size": size, "oid": oid, "blobId": oid}
        lfs = {"oid": self.etag, "sha256": self.etag, "size": size, "pointerSize": 130}
        return {**entry, "lfs": lfs} if self.is_lfs else entry


class Repository:
    """The files of every commit, and the branches. A new repository has one commit, as on the Hub."""

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private = repo_id, private
        self.commits: dict[str, dict[str, StoredFile]] = {}
        self.branches: dict[str, str] = {}
        self.add_commit("main", {".gitattributes": StoredFile(b"*.safetensors filter=lfs\n")}, "initial commit")

    def resolve(self, revision: str = "main") -> str:
        """The id of the commit that a branch or a full commit id names."""
        commit_id = self.branches.get(revision, revision)
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit_id

    def files(self, revision: str = "main") -> dict[str, StoredFile]:
        return self.commits[self.resolve(revision)]

    def add_commit(self, branch: str, files: dict[str, StoredFile], title: str) -> str:
        identity = [self.repo_id, len(self.commits), title, sorted((path, files[path].etag) for path in files)]
        commit_id = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[commit_id], self.branches[branch] = dict(files), commit_id
        return commit_id


def route(methods: str, pattern: str, writes: bool = False) -> Callable:
    """Marks the function that answers these HTTP methods on paths that match; `writes`: only with the token."""
    return lambda function: setattr(function, "route", (methods.split(), re.compile(pattern), writes)) or function


class Endpoints:
    """One method an endpoint; the groups of the route's pattern are its arguments."""

    def __init__(self, server: "HubServer"):
        self.server = server
        self.routes = [(*method.route, method) for method in vars(Endpoints).values() if hasattr(method, "route")]

    def answer(self, request: Request) -> Response:
        for methods, pattern, writes, method in self.routes:
            match = pattern.fullmatch(request.path)
            if match and request.method in methods:
                if writes and request.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise HubError(401, "Invalid username or password.")
                return method(self, request, **{name: unquote(text or "") for name, text in match.groupdict().items()})
        self.server.unknown_requests.append((request.method, request.path))
        raise HubError(404, f"No such endpoint: {request.method} {request.path}")

    def find(self, repo_id: str) -> Repository:
        if repo_id not in self.server.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.server.repositories[repo_id]

    @route("GET", r"/api/whoami-v2", writes=True)
    def whoami(self, request: Request) -> Response:
        return Response({"type": "user", "name": USER, "auth": {"accessToken": {"displayName": "t", "role": "write"}}})

    @route("POST", r"/api/repos/create", writes=True)
    def create_repo(self, request: Request) -> Response:
        wanted = json.loads(request.body)
        if wanted.get("type", "model") != "model":
            raise HubError(400, f"This server holds models only, got {wanted['type']}")
        repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
        url = f"{self.server.url}/{repo_id}"
        if repo_id in self.server.repositories:  # with exist_ok=True the client reads the url out of the error
            raise HubError(409, "You already created this model repo", url=url)
        self.server.repositories[repo_id] = Repository(repo_id, wanted.get("visibility") == "private")
        return Response({"url": url, "name": repo_id})

    @route("POST", API + r"/branch/(?P<branch>[^/]+)", writes=True)
    def create_branch(self, request: Request, repo_id: str, branch: str) -> Response:
        repo = self.find(repo_id)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(json.loads(request.body).get("startingPoint", "main"))
        return Response({})

    @route("GET", API + r"(?:/revision/(?P<revision>[^/]+))?")
    def info(self, request: Request, repo_id: str, revision: str) -> Response:
        repo = self.find(repo_id)
        files = repo.files(revision or "main")
        card = card_metadata(files["README.md"].content.decode()) if "README.md" in files else {}
        info = {"id": repo_id, "private": repo.private, "gated": False, "sha": repo.resolve(revision or "main")}
        info |= {"cardData": card, "tags": card.get("tags") or [], "library_name": card.get("library_name")}
        return Response({**info, "siblings": [files[path].entry(path) for path in sorted(files)]})

    @route("GET", API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
    def tree(self, request: Request, repo_id: str, revision: str, folder: str) -> Response:
        files = self.find(repo_id).files(revision)
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if request.query.get("recursive") != ["true"]:
            inside = sorted({prefix + path.removeprefix(prefix).split("/")[0] for path in inside})
        return Response([tree_entry(files, path) for path in inside])

    @route("POST", API + r"/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, request: Request, repo_id: str, revision: str) -> Response:
        files = self.find(repo_id).files(revision)
        wanted = parse_qs(request.body.decode())["paths"]  # a form, not JSON
        known = [path for path in wanted if any(f"{name}/".startswith(f"{path}/") for name in files)]
        return Response([tree_entry(files, path) for path in known])

    @route("GET HEAD", REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def download(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        repo = self.find(repo_id)
        commit_id = repo.resolve(revision)
        if path not in repo.commits[commit_id]:  # with the commit: the client remembers that the file is not there
            raise HubError(404, "Entry not found", "EntryNotFound", commit_id)
        file = repo.commits[commit_id][path]
        headers = {"X-Repo-Commit": commit_id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        start, stop, size = 0, len(file.content), len(file.content)
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start, stop = int(part[1]), min(int(part[2] or size) + 1, size)
            if start >= stop:
                return Response(status=416, headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(file.content[start:stop], 206 if part else 200, headers)

    @route("POST", r"/api/validate-yaml")
    def validate_yaml(self, request: Request) -> Response:
        try:
            card_metadata(json.loads(request.body)["content"])
        except (yaml.YAMLError, ValueError) as error:
            return Response({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return Response({"errors": [], "warnings": []})

    @route("POST", API + r"/preupload/(?P<revision>[^/]+)", writes=True)
    def preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        existing = self.find(repo_id).files(revision)
        answers = []
        for wanted in json.loads(request.body)["files"]:
            path, size = wanted["path"], wanted["size"]
            is_lfs = size >= self.server.lfs_threshold_bytes or path.endswith(self.server.lfs_suffixes)
            answer = {"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            answer["oid"] = existing[path].etag if path in existing else None  # the client leaves out unchanged files
            answers.append(answer)
        return Response({"files": answers})

    @route("POST", REPO + r"\.git/info/lfs/objects/batch", writes=True)
    def lfs_batch(self, request: Request, repo_id: str) -> Response:
        self.find(repo_id)
        objects = json.loads(request.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.server.lfs_objects:  # without actions the client uploads nothing
                links = {"upload": wanted["oid"], "verify": "verify"}
                wanted["actions"] = {key: {"href": f"{self.server.url}/lfs/{link}"} for key, link in links.items()}
        return Response({"transfer": "basic", "objects": objects})

    @route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")  # without the token: on the Hub this is a signed URL of a bucket
    def lfs_upload(self, request: Request, oid: str) -> Response:
        actual = hashlib.sha256(request.body).hexdigest()
        if actual != oid:
            raise HubError(400, f"The content's sha256 is {actual}, expected {oid}")
        self.server.lfs_objects[oid] = request.body
        return Response()

    @route("POST", r"/lfs/verify", writes=True)
    def lfs_verify(self, request: Request) -> Response:
        wanted = json.loads(request.body)
        if len(self.server.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, f"LFS object {wanted['oid']} is missing or has another size")
        return Response({"message": "verified"})

    @route("POST", API + r"/commit/(?P<revision>[^/]+)", writes=True)
    def commit(self, request: Request, repo_id: str, revision: str) -> Response:
        repo = self.find(repo_id)
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header["value"].get("parentCommit", repo.resolve(revision)) != repo.resolve(revision):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(revision))
        for operation in operations:
            self.apply(files, operation["key"], operation["value"])
        number, web = sum("refs/pr/" in name for name in repo.branches) + 1, f"{self.server.url}/{repo_id}"
        branch = f"refs/pr/{number}" if "create_pr" in request.query else revision
        commit_id = repo.add_commit(branch, files, header["value"]["summary"])
        urls = {"commitUrl": f"{web}/commit/{commit_id}", "pullRequestUrl": f"{web}/discussions/{number}"}
        return Response({"success": True, "commitOid": commit_id, **urls})

    def apply(self, files: dict[str, StoredFile], key: str, value: dict) -> None:
        """Does one operation of a commit to `files`."""
        path = value["path"]
        if key == "file" and value["encoding"] == "base64":
            files[path] = StoredFile(base64.b64decode(value["content"]))
        elif key == "lfsFile" and value["oid"] in self.server.lfs_objects:
            files[path] = StoredFile(self.server.lfs_objects[value["oid"]], is_lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise HubError(400, f"Cannot do '{key}' to {path}: unknown operation, or its object does not exist")


def card_metadata(readme: str) -> dict:
    """The YAML block at the top of a README; {} without one."""
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    metadata = yaml.safe_load(block[1]) if block else {}
    if not isinstance(metadata or {}, dict):
        raise ValueError(f"The metadata must be a mapping, got {metadata!r}")
    return metadata or {}


def tree_entry(files: dict[str, StoredFile], path: str) -> dict:
    folder = {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return files[path].entry(path) if path in files else folder


class Handler(BaseHTTPRequestHandler):
    """HTTP to `Request`, `Response` to HTTP."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each answer on a kept connection waits 40 ms

    def respond(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        response = self.server.handle(Request(self.command, url.path, parse_qs(url.query), self.headers, body))
        content, kind = response.body, "application/octet-stream"
        if not isinstance(content, bytes):
            content, kind = json.dumps(content).encode(), "application/json"
        self.send_response(response.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `HubServer.requests` is the log."""


class HubServer(ThreadingHTTPServer):
    """The server, on a free port of 127.0.0.1, answering for the length of a `with` block.

    Args:
        lfs_threshold_bytes: Files of at least this size go through LFS; `math.inf`: none for its size.
        lfs_suffixes: Files with these endings go through LFS, whatever their size.

    Attributes:
        url: The address, for `HF_ENDPOINT`.
        repositories: By repo id; `repositories[repo_id].files(revision)[path].content` is what was pushed.
        requests: Every request so far, as (method, path); `unknown_requests`: those that no endpoint answers.
        internal_errors: Tracebacks of this server's own faults.
    """

    request_queue_size = 64  # snapshot_download opens its connections at once

    def __init__(
        self, lfs_threshold_bytes: float = 10 * 2**20, lfs_suffixes: tuple[str, ...] = (".safetensors", ".bin")
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lfs_threshold_bytes, self.lfs_suffixes = lfs_threshold_bytes, lfs_suffixes
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}  # by sha256
        self.requests, self.unknown_requests, self.internal_errors = [], [], []
        self.endpoints, self.lock = Endpoints(self), threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()

    def handle(self, request: Request) -> Response:
        """Answers one request at a time, so that the endpoints need no locks."""
        with self.lock:
            self.requests.append((request.method, request.path))
            try:
                return self.endpoints.answer(request)
            except HubError as error:
                return error.response
            except Exception:  # noqa: BLE001 - a fault of this server must reach the test, not only the client
                self.internal_errors.append(traceback.format_exc())
                return Response({"error": "Internal Server Error"}, 500)


def run_client(
    code: str, server: HubServer, home: str | os.PathLike, *, blocked: Iterable[str] = (), **env: str
) -> subprocess.CompletedProcess:
    """Runs a Python snippet, in a fresh process and a temporary working folder, whose Hub is `server`.

    Args:
        code: The snippet; it may be indented as a whole.
        server: A running server.
        home: `HF_HOME` of the process, with its download cache and its copies of remote code; made if missing.
        blocked: Packages whose import fails in the process, as if they were not installed.
        **env: More environment variables. Settings of Python, Hugging Face and proxies are not inherited.

    Returns:
        The finished process, with `stdout` and `stderr` as text.

    Raises:
        RuntimeError: If the process fails; the message holds what it printed.
    """
    left_out = re.compile(r"PYTHON.*|HF_.*|HUGGING.*|TRANSFORMERS_.*|.*_proxy", re.IGNORECASE)
    inherited = {name: value for name, value in os.environ.items() if not left_out.fullmatch(name)}
    hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": os.path.abspath(home), "NO_PROXY": "127.0.0.1"}
    dead_ends = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")  # calls to other hosts fail
    flags = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
    threads = {"OMP_NUM_THREADS": "1"}  # as in conftest.py: results agree to the last bit
    env = {**inherited, **hub, **dead_ends, **flags, **threads, **env}
    blocks = "".join(f"import sys; sys.modules[{name!r}] = None\n" for name in blocked)
    command = [sys.executable, "-c", blocks + textwrap.dedent(code)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if process.returncode:
        raise RuntimeError(f"The client failed ({process.returncode}).\n{process.stdout}\n{process.stderr}")
    return process
