"""A small stand-in of the Hub's HTTP API on localhost: repositories, LFS uploads, commits, downloads, and faults.

As far as `huggingface_hub` uses it: whoami, create, refs, branch, validate-yaml, preupload, LFS batch, upload and
verify, commit, info, tree, resolve. Tokens: `writer` may do everything, `reader` may read.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

USER = "me"
LFS_FROM = 4096  # bytes; the Hub goes by kind of file and size as well
BROKEN = -1  # as a fault's status: take a part of the request, then close the connection


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)  # of the branch main
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the others
    tags: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)  # messages
    private: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}{sorted(self.files)}".encode()).hexdigest()


@dataclass
class Fault:
    """Answer requests whose `METHOD path` matches with `status` instead, `times` times."""

    pattern: str
    status: int
    times: int = 10**6


class StandIn(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):  # a connection that a fault closed is no news
        pass


@contextmanager
def running() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *args):
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        with self.server.lock:
            self.server.requests.append(line)
            fault = next((f for f in self.server.faults if f.times > 0 and re.search(f.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.status == BROKEN:
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0) // 2))
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self._body()
        if fault is not None:
            self._json({"error": f"made-up fault {fault.status}"}, fault.status)
            return
        for method, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                action(self, body, *found.groups())
                return
        self._json({"error": f"the stand-in has no {line}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    # --- who may do what --------------------------------------------------------------------------

    def _writer(self) -> bool:
        """Whether the token may write; otherwise the refusal is sent."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "writer":
            return True
        status, text = (403, "no write permission") if token == "reader" else (401, "Invalid credentials")
        self._json({"error": text}, status)
        return False

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return found

    def _has(self, repository: Repository, revision: str) -> bool:
        """Whether there is such a branch; otherwise the refusal is sent."""
        if revision == "main" or revision in repository.branches:
            return True
        self._json({"error": f"Invalid rev id: {revision}"}, 404, X_Error_Code="RevisionNotFound")
        return False

    # --- routes -----------------------------------------------------------------------------------

    def refs(self, body: bytes, name: str) -> None:
        if (repository := self._repository(name)) is not None:
            branches = [
                {"name": b, "ref": f"refs/heads/{b}", "targetCommit": "x"} for b in ("main", *repository.branches)
            ]
            tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": "x"} for t in repository.tags]
            self._json({"branches": branches, "converts": [], "tags": tags, "pullRequests": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if not self._writer() or (repository := self._repository(name)) is None:
            return
        if branch.startswith("refs/") or " " in branch:
            self._json({"error": f"Invalid reference for a branch: {branch}"}, 400)
        elif branch in repository.branches:
            self._json({"error": "Reference already exists"}, 409)
        else:
            repository.branches[branch] = dict(repository.files)
            self._json({})

    def whoami(self, body: bytes) -> None:
        if self._writer():
            self._json({"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        if not self._writer():
            return
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        address = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            self._json({"error": "You already created this model repo", **address}, 409)
            return
        self.server.repositories[name] = Repository(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        self._json(address)

    def validate_yaml(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        try:
            errors = [] if found and isinstance(yaml.safe_load(found.group(1)), dict) else ["no metadata"]
        except yaml.YAMLError as error:
            errors = [str(error)]
        self._json({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._writer() and (repository := self._repository(name)) is not None and self._has(repository, revision):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular"} for f in files]
            self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def lfs_batch(self, body: bytes, name: str) -> None:
        if not self._writer():
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.url}/lfs-verify"},
                }
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json({"error": "content and hash differ"}, 400)
            return
        self.server.objects[oid] = body
        self._send(b"")

    def lfs_verify(self, body: bytes) -> None:
        asked = json.loads(body)
        known = len(self.server.objects.get(asked["oid"], b"")) == asked["size"]
        self._json({}, 200 if known else 404)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._writer() or (repository := self._repository(name)) is None:
            return
        if not self._has(repository, revision):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        branch = repository.files if revision == "main" else repository.branches[revision]
        branch |= files
        repository.commits.append(lines[0]["value"]["summary"])
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": f"{self.server.url}/{name}/commit/x"})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        if (repository := self._repository(name)) is not None:
            siblings = [{"rfilename": path} for path in repository.files]
            self._json({"_id": "1", "id": name, "modelId": name, "sha": repository.sha, "siblings": siblings,
                        "private": repository.private, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self._repository(name)) is not None:
            self._json([{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for path, content in repository.files.items()])  # fmt: skip

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        if path not in repository.files:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repository.sha)
            return
        content = repository.files[path]
        self._send(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=repository.sha)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_upload),
    ("POST", r"/lfs-verify", _Handler.lfs_verify),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}/refs", _Handler.refs),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(.+)", _Handler.tree),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
