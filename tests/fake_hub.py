"""A model hub on this machine: the few routes of the real one that a download needs, over real HTTP, with Range.

It can refuse (gated, no such thing), break off in the middle of a file, and send something else than it announced.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files of one commit; big ones (not .json or .txt) are announced with their SHA-256, as LFS files are."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False

    def siblings(self) -> list[dict[str, object]]:
        return [self._sibling(name, data) for name, data in self.files.items()]

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        told: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": blob}
        if not name.endswith((".json", ".txt")):
            told["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return told


@dataclass
class Hub:
    """What it has and how it behaves; `asked` is every request as "GET /path" with its Range."""

    repositories: dict[str, Repository]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    break_after: list[int] = field(default_factory=list)  # bytes of a body, for the next downloads
    spoiled: set[str] = field(default_factory=set)
    status: int = 0  # answer everything with it

    def downloads(self, file: str) -> list[str]:
        return [line for line in self.asked if line.startswith("GET") and f"/{file} " in line]


@contextmanager
def fake_hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    hub = Hub(repositories)

    class Handler(Routes):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Routes(BaseHTTPRequestHandler):
    """/api/models/ORG/REPO/revision/REV and /ORG/REPO/resolve/COMMIT/FILE."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"GET {path} {self.headers.get('Range', '-')}")
        if self.hub.status:
            return self._refuse(self.hub.status, "Broken")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = self.hub.repositories.get("/".join(parts[2:4] if api else parts[:2]))
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        return self._tell(repo, "/".join(parts[5:])) if api else self._send(repo, parts[3], "/".join(parts[4:]))

    def _tell(self, repo: Repository, revision: str) -> None:
        if revision not in (*repo.revisions, repo.commit):
            return self._refuse(404, "RevisionNotFound")
        told = {"id": "x/y", "sha": repo.commit, "private": False, "siblings": repo.siblings()}
        return self._answer(200, json.dumps(told).encode())

    def _send(self, repo: Repository, commit: str, file: str) -> None:
        if repo.gated and self.headers.get("authorization") != "Bearer hf_good":
            return self._refuse(403, "GatedRepo")
        if commit != repo.commit or file not in repo.files:
            return self._refuse(404, "EntryNotFound")
        data = repo.files[file]
        if file in self.hub.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if wanted else {}
        return self._answer(206 if wanted else 200, data[start:], **headers)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", **{"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        stop = (
            self.hub.break_after.pop(0)
            if self.hub.break_after and status in (200, 206) and "resolve" in self.path
            else None
        )
        self.wfile.write(body[:stop])
        if stop is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...
