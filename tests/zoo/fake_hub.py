"""Fake Hugging Face hub with the endpoints that ``huggingface_hub`` uses to download, and to upload without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


@dataclass
class Repository:
    """Repository on the hub."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    commits: int = 0


class FakeHub(ThreadingHTTPServer):
    """Hub with one user, ``me``, whose token is :data:`TOKEN`.

    Attributes:
        repositories: repositories by name.
        requests: all requests, ``"METHOD path"``.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}  # uploaded files by SHA-256, before they are committed

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub within the context."""
    hub = FakeHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.record()
        parts = path.removeprefix("/api/models").split("/")
        name = "/".join(parts[1:3])
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.authorized()):
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/") and parts[3:4] == ["tree"]:
            self.answer([{"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in repository.files.items()])
        elif path.startswith("/api/models/"):
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in repository.files]})
        else:  # /me/model/resolve/REVISION/FILE
            content = repository.files[parts[-1]]
            tag = hashlib.sha256(content).hexdigest()
            self.answer(content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def do_POST(self) -> None:
        path = self.record()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":  # needs no token
            self.answer({"errors": [], "warnings": []})
        elif not self.authorized():
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(content))
        elif path.startswith("/api/models/") and "/preupload/" in path:
            files = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            self.answer({"files": [{"path": f, "uploadMode": modes[f], "shouldIgnore": False} for f in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            actions = {"upload": {"href": f"{self.server.address}/upload"}}
            self.answer({"objects": [{**item, "actions": actions} for item in objects], "transfer": "basic"})
        else:  # /api/models/me/model/commit/REVISION
            self.commit("/".join(path.split("/")[3:5]), [json.loads(line) for line in content.splitlines()])

    def do_PUT(self) -> None:
        self.record()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(b"")

    def create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        url = f"{self.server.address}/{name}"
        if request["organization"] != "me":
            self.answer({"error": f"You don't have the rights to create a model under {name}"}, 403)
        elif name in self.server.repositories:
            self.answer({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.server.repositories[name] = Repository(private=request["visibility"] == "private")
            self.answer({"url": url})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large[value["oid"]]
        repository.commits += 1
        self.answer(
            {"success": True, "commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        )

    def record(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return self.path.partition("?")[0]

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...
