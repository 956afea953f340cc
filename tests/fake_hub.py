"""A hub on this machine: a server that answers as huggingface.co does, and a cache as its client fills it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+?)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
Repositories = Mapping[str, Mapping[str, Path]]  # name → revision → folder


def commit_of(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def fill_cache(cache: Path, name: str, folder: Path, revision: str = "main", only: set[str] | None = None) -> Path:
    """Put a folder, or those files of it that are named, into a hub cache as its client would."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit_of(name, revision))
    snapshot = place / "snapshots" / commit_of(name, revision)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and (only is None or path.name in only):
            shutil.copyfile(path, snapshot / path.name)
    return snapshot


@contextmanager
def serve(repositories: Repositories, token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """A server of these repositories. Yields its address and the paths that were asked for, a list that grows."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repositories, token, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(repositories: Repositories, token: str | None, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "give a token"})
            found = _FILE.fullmatch(path) or _API.fullmatch(path)
            if found is None or found["name"] not in repositories:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            revisions = repositories[found["name"]]
            by_commit = {commit_of(found["name"], revision): revision for revision in revisions}
            revision = found["revision"] or "main"
            revision = by_commit.get(revision, revision)
            if revision not in revisions:
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            commit, folder = commit_of(found["name"], revision), revisions[revision]
            if found.re is _API:
                value = _tree(folder) if found["what"] == "tree" else _info(found["name"], commit, folder)
                return self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})
            place = folder / found["file"]
            if not place.is_file():
                return self.answer(404, b"", {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"})
            return self.answer(200, place.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_blob(place)}"'})

        def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _blob(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _blob(path)}
        for path in _files(folder)
    ]


def _info(name: str, commit: str, folder: Path) -> dict[str, object]:
    siblings = [{"rfilename": str(path.relative_to(folder))} for path in _files(folder)]
    return {
        "id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0,
        "siblings": siblings,
    }  # fmt: skip
