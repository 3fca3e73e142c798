"""An imitation of the Hugging Face Hub on this machine, for the real client to talk to."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

COMMIT = "c0ffee" + "0" * 34


class FakeHub(ThreadingHTTPServer):
    """Serves the files of `folder` as the model owner/name, and takes what is uploaded into it.

    `log` holds what was asked: GET or HEAD, file, range; `posts` what was sent: path, JSON or its lines. `faults` has
    by file what becomes of the next answers with its data: `drop` ends one half way, `cut` has half of it for the
    whole, `hold` waits for `released`. `watch` is called with the name and size of what is about to be sent.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.log = list[tuple[str, str, str | None]]()
        self.posts = list[tuple[str, Any]]()
        self.large = dict[str, bytes]()
        self.faults = dict[str, list[str]]()
        self.released = threading.Event()
        self.watch: Callable[[str, int], object] = lambda *_: None
        self.address = f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """Files fetched in full."""
        return [name for method, name, span in self.log if method == "GET" and span is None]


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        kind, *rest = self.path.split("?")[0].strip("/").removeprefix("datasets/").split("/")
        if kind == "api" and rest[1:3] == ["owner", "name"]:
            self._describe(rest[3:])
        elif [kind, *rest[:2]] == ["owner", "name", "resolve"]:
            self._send_file("/".join(rest[3:]))
        elif "gated" in self.path:
            self._refuse(403, "GatedRepo")
        else:
            self._refuse(404, "RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        raw = self._body()
        lines = [json.loads(line) for line in raw.splitlines() if line]
        path = self.path.split("?")[0]
        self.server.posts.append((path, lines[0] if len(lines) == 1 else lines))
        answer: dict[str, Any] = {}
        if "gated" in raw.decode():
            self._refuse(403, "Forbidden")
            return
        if path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/owner/name"}
        elif "/preupload/" in path:
            names = [file["path"] for file in lines[0]["files"]]
            modes = {name: "lfs" if name.endswith("safetensors") else "regular" for name in names}
            answer["files"] = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]
        elif path.endswith("/objects/batch"):
            upload = {"upload": {"href": f"{self.server.address}/large"}}
            answer = {"transfer": "basic", "objects": [{**entry, "actions": upload} for entry in lines[0]["objects"]]}
        elif "/commit/" in path:
            self._commit(lines)
            answer = {"commitUrl": f"{self.server.address}/owner/name/commit/{COMMIT}", "commitOid": COMMIT}
        self._send(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        content = self._body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self._send(200, b"")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _commit(self, operations: list[dict[str, Any]]) -> None:
        for operation in operations[1:]:
            value = operation["value"]
            path = self.server.folder / value["path"]
            if operation["key"] == "deletedFile":
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            is_large = operation["key"] == "lfsFile"
            path.write_bytes(self.server.large[value["oid"]] if is_large else base64.b64decode(value["content"]))

    def _describe(self, asked: list[str]) -> None:
        if len(asked) > 1 and asked[1] not in ("main", "branch", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif asked[:1] == ["tree"]:
            files = [path for path in self.server.folder.iterdir() if path.is_file()]
            entries = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]
            self._send(200, json.dumps(entries).encode())
        else:
            self._send(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode())

    def _send_file(self, name: str) -> None:
        span = self.headers.get("range")
        self.server.log.append((self.command, name, span))
        path = self.server.folder / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status, fault = 200, None
        if span is not None:
            start, end = span.removeprefix("bytes=").split("-")
            status, content = 206, content[int(start) : int(end) + 1 if end else None]
        if self.command == "GET":
            self.server.watch(name, len(content))
            if waiting := self.server.faults.get(name):
                fault = waiting.pop(0)
        if fault == "hold":
            self.server.released.wait(10)
        half = content[: len(content) // 2]
        if fault == "drop":
            headers["Content-Length"] = str(len(content))
        self._send(status, half if fault in ("drop", "cut") else content, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the test's output quiet."""


@contextlib.contextmanager
def running_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The client's Hub is the imitation, its cache another folder."""
    server = FakeHub(folder)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    files = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
