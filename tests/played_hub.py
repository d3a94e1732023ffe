"""A Hugging Face hub on this machine, for one user: as much of it as huggingface_hub's client asks for when it makes a
repository, uploads a folder (weights by Git LFS) and downloads a snapshot."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, READ_TOKEN = "hf_may_write", "hf_may_read"

Files = dict[str, bytes]


class RefusedError(Exception):
    """An answer that is an error: status, the hub's code for it, its message; the URL of what is there already."""


class Hub:
    """What is stored: repositories with the commits of their branches, files of Git LFS, and what was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.user = "ann"
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, Files] = {}
        self.messages: list[str] = []
        self.private: set[str] = set()
        self.large: Files = {}
        self.downloads: list[str] = []
        self.refusal: RefusedError | None = None

    def files(self, repo: str, branch: str = "main") -> Files:
        """The files of a branch by path."""
        return self.commits[self.branches[repo][branch]]

    def commit(self, repo: str, branch: str, files: Files) -> str:
        """Put a commit with these files, and no others, on a branch; its id."""
        number = f"{len(self.commits)}{repo}{branch}"
        commit = hashlib.sha1(number.encode()).hexdigest()  # noqa: S324
        self.commits[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def answer(self, method: str, path: str, query: str, body: bytes, token: str | None) -> Any:
        """JSON values, or (headers, content) of a file."""
        for wanted, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == wanted and found:
                return answer(self, *map(unquote, found.groups()), query=query, body=body, token=token)
        raise RefusedError(404, "", f"nothing is played at {method} {path}")

    def _may_write(self, repo: str, token: str | None) -> None:
        if self.refusal:
            raise self.refusal
        if token not in (TOKEN, READ_TOKEN):
            raise RefusedError(401, "", "Invalid username or password.")
        if token == READ_TOKEN or repo.partition("/")[0] != self.user:
            raise RefusedError(403, "", f"You don't have the rights to write to {repo}")

    def _commit_of(self, repo: str, revision: str, token: str | None) -> str:
        if repo not in self.branches or (repo in self.private and token is None):
            raise RefusedError(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def create(self, *, body: bytes, token: str | None, **_: Any) -> Any:
        """A new repository, which has one file."""
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._may_write(repo, token)
        if repo in self.branches:
            raise RefusedError(409, "", "You already created this model repo", f"{self.url}/{repo}")
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.private.add(repo)
        return {"url": f"{self.url}/{repo}"}

    def branch(self, repo: str, name: str, *, token: str | None, **_: Any) -> Any:
        self._may_write(repo, token)
        if name in self.branches[repo]:
            raise RefusedError(409, "", "Reference already exists")
        self.branches[repo][name] = self.branches[repo]["main"]
        return {}

    def info(self, repo: str, revision: str = "main", *, token: str | None, **_: Any) -> Any:
        commit = self._commit_of(repo, revision, token)
        siblings = [{"rfilename": path} for path in self.commits[commit]]
        return {"id": repo, "sha": commit, "private": repo in self.private, "siblings": siblings}

    def tree(self, repo: str, revision: str, *, token: str | None, **_: Any) -> Any:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
            for path, content in self.commits[self._commit_of(repo, revision, token)].items()
        ]

    def check_card(self, *, body: bytes, **_: Any) -> Any:
        front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], flags=re.DOTALL)
        if front and not isinstance(yaml.safe_load(front[1]), dict):
            raise RefusedError(400, "", "invalid metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str, *, body: bytes, token: str | None, **_: Any) -> Any:
        self._may_write(repo, token)
        self._commit_of(repo, revision, token)
        kinds = [
            (file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular")
            for file in json.loads(body)["files"]
        ]
        return {"files": [{"path": path, "uploadMode": kind, "shouldIgnore": False} for path, kind in kinds]}

    def batch(self, repo: str, *, body: bytes, token: str | None, **_: Any) -> Any:
        self._may_write(repo, token)
        objects = json.loads(body)["objects"]
        return {
            "transfer": "basic",
            "objects": [
                {**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}} for one in objects
            ],
        }

    def store(self, oid: str, *, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "", "another file than was announced")
        self.large[oid] = body
        return {}

    def receive(self, repo: str, branch: str, *, query: str, body: bytes, token: str | None) -> Any:
        """A commit: one JSON object a line."""
        self._may_write(repo, token)
        files = dict(self.files(repo, branch))
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            else:
                assert entry["key"] == "deletedFile"
                del files[value["path"]]
        pull_request = "create_pr=1" in query
        commit = self.commit(repo, "refs/pr/1" if pull_request else branch, files)
        return {
            "commitUrl": f"{self.url}/{repo}/commit/{commit}",
            "commitOid": commit,
            "pullRequestUrl": f"{self.url}/{repo}/discussions/1" if pull_request else None,
        }

    def resolve(self, repo: str, revision: str, path: str, *, token: str | None, **_: Any) -> Any:
        commit = self._commit_of(repo, revision, token)
        if path not in self.commits[commit]:
            raise RefusedError(404, "EntryNotFound", "Entry not found")
        self.downloads.append(path)
        content = self.commits[commit][path]
        return {"X-Repo-Commit": commit, "ETag": f'"{etag(content)}"'}, content


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()  # noqa: S324


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.check_card),
    ("POST", rf"/api/models/{REPO}/branch/([^/]+)", Hub.branch),
    ("POST", rf"/api/models/{REPO}/preupload/([^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{REPO}/commit/([^/]+)", Hub.receive),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", "/lfs/([0-9a-f]+)", Hub.store),
    ("GET", rf"/api/models/{REPO}", Hub.info),
    ("GET", rf"/api/models/{REPO}/revision/([^/]+)", Hub.info),
    ("GET", rf"/api/models/{REPO}/tree/([^/]+)", Hub.tree),
    ("GET", rf"/{REPO}/resolve/([^/]+)/(.+)", Hub.resolve),
    ("HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        url = urlsplit(self.path)
        status, headers = 200, {}
        try:
            answer = self.hub.answer(self.command, url.path, url.query, body, token)
            headers, content = answer if isinstance(answer, tuple) else ({}, json.dumps(answer).encode())
        except RefusedError as refused:
            status, code, message, *where = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            content = json.dumps({"error": message, "url": "".join(where)}).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = reply  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `hub.url`, on this machine alone."""
    hub = Hub()
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
