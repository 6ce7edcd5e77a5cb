"""The part of the Hugging Face Hub's API that a push and a download need, on this machine, and how it can fail.

Files of LFS are stored by their hash before a commit names them; a commit changes all its files at once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
from huggingface_hub import constants


@dataclass
class Hub:
    """What the Hub holds."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """`models/user/name`: the files that readers see."""
    private: set[str] = field(default_factory=set)
    tags: dict[str, set[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was sent by its hash, whether or not a commit names it."""
    sent: list[str] = field(default_factory=list)
    """Hashes in the order in which they were sent."""
    refuse_objects_after: int | None = None
    """The connection is good for so many objects."""
    refuse_commits: bool = False
    refuse_tags: bool = False
    wrong_metadata: str = ""
    """What the Hub finds wrong with a card."""
    commits: int = 0


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self) -> None:
        path, body, hub = unquote(urlparse(self.path).path), self.body(), self.hub
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked.get('organization', 'lab')}/{asked['name']}"
            if name in hub.repositories:
                return self.reply({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
            hub.repositories[name] = {}
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(name)
            return self.reply({"url": f"{hub.address}/{name.removeprefix('models/')}"})
        if path == "/api/validate-yaml":
            errors = [{"message": hub.wrong_metadata}] if hub.wrong_metadata else []
            return self.reply({"warnings": [], "errors": errors}, 400 if errors else 200)
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular" if f["path"].endswith((".md", ".json")) else "lfs"}
                for f in files
            ]
            return self.reply({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            missing = {o["oid"] for o in objects} - hub.objects.keys()
            actions = {
                oid: {"actions": {"upload": {"href": f"{hub.address}/objects/{oid}", "header": {}}}} for oid in missing
            }
            return self.reply({"transfer": "basic", "objects": [o | actions.get(o["oid"], {}) for o in objects]})
        if found := re.fullmatch(r"/objects/(\w+)", path):
            if hub.refuse_objects_after is not None and len(hub.sent) >= hub.refuse_objects_after:
                return self.reply({"error": "no more"}, 403)
            assert hashlib.sha256(body).hexdigest() == found[1]
            hub.objects[found[1]] = body
            hub.sent.append(found[1])
            return self.reply()
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/commit/[^/]+", path):
            if hub.refuse_commits:
                return self.reply({"error": "you may not"}, 403)
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tag/(.+)", path):
            tags = hub.tags.setdefault(found[1], set())
            if hub.refuse_tags:
                return self.reply({"error": "no tags now"}, 403)
            if self.command == "DELETE":
                if found[2] not in tags:
                    return self.reply({"error": "none"}, 404, X_Error_Code="RevisionNotFound")
                tags.remove(found[2])
            else:
                tags.add(json.loads(body)["tag"])
            return self.reply({})
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/[^/]+.*", path):
            files = hub.repositories[found[1]]
            return self.reply([{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in files.items()])
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(/revision/.+)?", path):
            if found[1] not in hub.repositories:
                return self.reply({"error": "none"}, 404, X_Error_Code="RepoNotFound")
            names = hub.repositories[found[1]]
            sha = f"{hub.commits:040x}"
            files = [{"rfilename": name} for name in names]
            return self.reply({"id": found[1], "sha": sha, "private": found[1] in hub.private, "siblings": files})
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = hub.repositories.get(f"{found[1] or 'models'}/{found[2]}", {})
            if found[4] not in files:
                return self.reply({"error": "none"}, 404, X_Error_Code="EntryNotFound")
            content = files[found[4]]
            etag = hashlib.sha256(content).hexdigest()
            return self.reply(content, ETag=f'"{etag}"', X_Repo_Commit=f"{hub.commits:040x}")
        return self.reply({"error": f"{self.command} {path} is not spoken here"}, 501)

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.repositories[repository])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.repositories[repository] = files
        self.hub.commits += 1
        address = f"{self.hub.address}/{repository.removeprefix('models/')}/commit/{self.hub.commits:040x}"
        self.reply({"success": True, "commitUrl": address, "commitOid": f"{self.hub.commits:040x}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()


@contextmanager
def reached(cache: Path) -> Iterator[Hub]:
    """An empty hub, which huggingface_hub takes for the only one; what it downloads lies in `cache`."""
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield hub
