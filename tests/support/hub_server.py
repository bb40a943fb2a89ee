"""A Hugging Face hub on loopback with one repository: what huggingface_hub asks of it to download one, no more."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

NAME = "tiny-org/tiny-bagel"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@dataclass
class Hub:
    """The repository ``name`` with ``files``, the same at each of its revisions.

    ``broken`` says how many times the file is broken off after half of its bytes, by its name;
    ``stalled`` files stop there and keep the connection. ``failure`` is the status, the error code and
    the body that everything is answered with.
    """

    files: dict[str, bytes]
    name: str = NAME
    broken: dict[str, int] = field(default_factory=dict)
    stalled: set[str] = field(default_factory=set)
    failure: tuple[int, str, bytes] | None = None
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    reached_half: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, folder: Path, extra: Mapping[str, bytes]) -> Self:
        """A repository of the files in ``folder`` and some more."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir()} | dict(extra))

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def downloaded(self) -> list[str]:
        """The names of the files that were asked for, one for each time."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.hub = hub
                super().__init__(*args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if hub.failure is not None:
            status, code, body = hub.failure
            return self._answer(status, body, {"X-Error-Code": code} if code else {})
        if path.startswith(f"/api/models/{hub.name}"):
            return self._api(path.removeprefix(f"/api/models/{hub.name}").strip("/").split("/"))
        if path.startswith(f"/{hub.name}/resolve/"):
            revision, _, file = path.removeprefix(f"/{hub.name}/resolve/").partition("/")
            return self._file(_commit(revision), file)
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _api(self, parts: list[str]) -> None:
        files = [
            {
                "rfilename": name,
                "path": name,
                "type": "file",
                "size": len(data),
                "oid": _digest(data),
                "blobId": _digest(data),
            }
            for name, data in self.hub.files.items()
        ]
        commit = _commit(parts[1] if len(parts) > 1 else "main")
        if not commit:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        reply = files if parts[0] == "tree" else {"id": self.hub.name, "sha": commit, "siblings": files}
        return self._answer(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})

    def _file(self, commit: str, name: str) -> None:
        if not commit or name not in self.hub.files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = self.hub.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._answer(206 if start else 200, data[start:], headers, name)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], name: str = "") -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.stalled or self.hub.broken.get(name, 0):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.hub.reached_half.set()
            if name in self.hub.stalled:
                self.hub.closing.wait()
            else:
                self.hub.broken[name] -= 1
            self.close_connection = True
            return
        self.wfile.write(body)


def _commit(revision: str) -> str:
    """The commit of a branch or tag, a commit itself, or "" where there is no such revision."""
    return COMMITS.get(revision, revision if revision in COMMITS.values() else "")


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
