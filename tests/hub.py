"""The Hugging Face hub's client, as tests need it, and a stand-in of the hub to push to."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub.constants
import pytest

TOKEN = "hf_" + "pLaNtEd" * 5


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that a push uses; weights go by LFS, all else inside the commit."""

    address: ClassVar[str] = ""
    status: ClassVar[int] = 200
    private: ClassVar[bool] = True
    created: ClassVar[list[dict[str, object]]] = []
    files: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[set[str | None]] = set()
    objects: ClassVar[dict[str, bytes]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        if self.status != 200:
            self.answer({"error": "no"}, self.status)
        elif self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"{self.address}/me/tiny"})
        elif self.path == "/api/models/me/tiny/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": self.mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path == "/me/tiny.git/info/lfs/objects/batch":
            uploads = [
                {**each, "actions": {"upload": {"href": f"{self.address}/upload/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": uploads})
        elif self.path.startswith("/api/models/me/tiny/commit/main"):
            for line in body.splitlines():
                self.commit(**json.loads(line))
            self.answer({"commitUrl": f"{self.address}/me/tiny/commit/abc", "commitOid": "abc"})
        else:
            self.answer({"warnings": [], "errors": []})

    def do_GET(self) -> None:
        siblings = [{"rfilename": name} for name in self.files]
        self.answer({"id": "me/tiny", "private": self.private, "siblings": siblings})

    def do_PUT(self) -> None:
        self.objects[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    @staticmethod
    def mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def commit(self, key: str, value: dict[str, str]) -> None:
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.objects[value["oid"]]
        elif key == "deletedFile":
            del self.files[value["path"]]

    def answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A server in the hub's place, and a token for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    Hub.address, Hub.status, Hub.private = f"http://127.0.0.1:{server.server_port}", 200, True
    for record in (Hub.created, Hub.files, Hub.tokens, Hub.objects):
        record.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", Hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    forget_sessions()
    try:
        yield Hub
    finally:
        server.shutdown()
        server.server_close()
        forget_sessions()


def forget_sessions() -> None:
    """Make the client read its settings again: sessions made before keep the network."""
    for name in ("reset_sessions", "close_session"):  # the second from 1.0 on
        if hasattr(huggingface_hub.utils, name):
            getattr(huggingface_hub.utils, name)()
