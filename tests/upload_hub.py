"""A server on loopback that plays the part of the hub's API that receives: repositories, the card's
validator, preupload, LFS batch with its uploads, and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import unquote, urlparse

import yaml
from loopback import Quiet, serving

TOKEN = "hf_" + "uploadCANARY" * 3
OWNER = "someone"
# From method, path and how often that was asked before: None to answer as the hub does; (status,
# words); or "cut": half of the body is read, then the connection is gone.
Fault = Callable[[str, str, int], "tuple[int, str] | str | None"]
LICENCES = ("apache-2.0", "mit", "llama3", "llama3.1", "llama3.2", "llama3.3", "other")


def card_errors(content: str) -> list[str]:
    """What of https://github.com/huggingface/hub-docs/blob/main/modelcard.md a card lacks."""
    block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    values = (yaml.safe_load(block[1]) if block else None) or {}
    errors = []
    if values.get("license") not in LICENCES:
        errors.append(f'"license" must be one of {LICENCES}')
    for name in (values.get("base_model"), *(values.get("datasets") or [])):
        if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f"no repository: {name}")
    for model in values.get("model-index") or []:
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append('"model-index[].name" and results are required')
        for result in model.get("results") or []:
            if not result["task"].get("type") or not result["dataset"].get("type"):
                errors.append('"model-index[].results[]" lacks task or dataset')
            if any(metric.get("value") is None for metric in result["metrics"]):
                errors.append('"metrics[]" needs a value')
    return errors


class UploadHub:
    """What was asked of the server, what it holds, and what it does wrong."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.url = ""
        self.asked: list[tuple[str, str]] = []
        self.repos: dict[str, dict] = {}  # name: private, files
        self.objects: dict[str, bytes] = {}  # what the store has, whole, by its sha256

    def count(self, word: str) -> int:
        return sum(word in path for _, path in self.asked)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict | None]:
        if method == "PUT":
            return self._receive(path, body)
        sent = json.loads(body) if body.startswith(b"{") and b"\n{" not in body else {}
        if path == "/api/validate-yaml":
            errors = card_errors(sent["content"])
            return (400 if errors else 200), {
                "errors": [{"message": error} for error in errors], "warnings": [],
            }  # fmt: skip
        if path == "/api/whoami-v2":
            return 200, {"name": OWNER, "type": "user"}
        if path == "/api/repos/create":
            name = f"{sent['organization'] or OWNER}/{sent['name']}"
            if name in self.repos:
                told = {"error": "You already created this model repo"}
                return 409, told | {"url": f"{self.url}/{name}"}
            self.repos[name] = {"private": sent.get("visibility") == "private", "files": {}}
            return 200, {"url": f"{self.url}/{name}"}
        for pattern in (
            r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit)/main)?",
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)",
        ):
            if found := re.fullmatch(pattern, path):
                name, action = found.groups()
                if name not in self.repos:
                    return 404, {"error": "Repository not found"}
                return 200, self._of_repo(self.repos[name], name, action, sent, body)
        return 404, {"error": f"no such path {path}"}

    def _of_repo(self, repo: dict, name: str, action: str | None, sent: dict, body: bytes) -> dict:
        if action == "preupload":
            large = (".safetensors", ".png", "tokenizer.json")
            return {"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                 "shouldIgnore": False} for f in sent["files"]]}  # fmt: skip
        if action == "batch":
            return {"transfer": "basic", "objects": [self._upload(o) for o in sent["objects"]]}
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo["files"][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    repo["files"][value["path"]] = self.objects[value["oid"]]
            return {"commitUrl": f"{self.url}/{name}/commit/abc", "commitOid": "abc"}
        files = [{"rfilename": file} for file in (".gitattributes", *repo["files"])]
        return {"id": name, "sha": "abc", "private": repo["private"], "siblings": files,
                "tags": [], "downloads": 0}  # fmt: skip

    def _upload(self, wanted: dict) -> dict:
        oid, size = wanted["oid"], wanted["size"]
        entry = {"oid": oid, "size": size}
        if oid in self.objects:  # as git-lfs has it: no action, nothing to send
            return entry
        return entry | {"actions": {"upload": {"href": f"{self.url}/store/{oid}"}}}

    def _receive(self, path: str, body: bytes) -> tuple[int, None]:
        oid = path.removeprefix("/store/")
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, None
        self.objects[oid] = body
        return 200, None


@contextmanager
def receiving(hub: UploadHub) -> Iterator[str]:
    """The address of a server that answers as `hub`."""

    class Handler(Quiet):
        def respond(self) -> None:
            path = unquote(urlparse(self.path).path)
            before = hub.asked.count((self.command, path))
            hub.asked.append((self.command, path))
            fault = hub.fault(self.command, path, before) if hub.fault else None
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "cut":
                self.rfile.read(length // 2)
                self.connection.close()
                return
            body = self.rfile.read(length)
            allowed = path.startswith(("/store", "/api/validate")) or (
                self.headers.get("Authorization") == f"Bearer {TOKEN}"
            )
            if fault:
                status, answer = fault[0], {"error": fault[1]}
            elif not allowed:
                status, answer = 401, {"error": "Invalid username or password."}
            else:
                status, answer = hub.answer(self.command, path, body)
            data = json.dumps(answer).encode() if answer is not None else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", '"part"')
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = respond

        def handle(self) -> None:
            with suppress(OSError, ValueError):  # the connection that a "cut" closed
                super().handle()

    with serving(Handler) as hub.url:
        yield hub.url
