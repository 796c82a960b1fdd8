"""A server on loopback that plays the Hugging Face hub: two repositories, and any fault."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlparse

from tests import loopback

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# From method, path and how often that was asked before: None to answer as the hub does; (status,
# headers, body); or a word: "cut" (half of the body) or "stall" (a pause).
Fault = Callable[[str, str, int], "tuple[int, dict, bytes] | str | None"]


class Hub:
    """What the server has, what was asked of it, and what it does wrong."""

    def __init__(self, files: dict[str, bytes], fault: Fault | None = None, gated=False) -> None:
        self.files, self.fault, self.gated = files, fault, gated
        self.asked: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.tokens: list[str | None] = []

    def tree(self) -> list[dict]:
        entries = []
        for name, content in self.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha(content)}
            if name.endswith((".safetensors", ".bin")):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries

    def info(self) -> dict:
        names = [{"rfilename": name} for name in self.files]
        return {"id": "some/model", "sha": COMMIT, "gated": self.gated, "siblings": names,
                "private": False, "tags": [], "downloads": 0}  # fmt: skip

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        parts = unquote(urlparse(path).path).strip("/").split("/")
        if parts[:1] == ["api"]:
            if parts[-1] == "auth-check":
                return 200, {}, b"{}"
            body = self.tree() if "tree" in parts else self.info()
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        name = "/".join(parts[parts.index("resolve") + 2 :])
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = self.files[name]
        lfs = name.endswith((".safetensors", ".bin"))
        etag = hashlib.sha256(content).hexdigest() if lfs else git_sha(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return 200, headers, content


def git_sha(content: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def model_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address of a server that answers as `hub`."""

    class Handler(loopback.Quiet):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.tokens.append(self.headers.get("Authorization"))
            key = (self.command, urlparse(self.path).path)
            before = hub.asked.count(key)
            hub.asked.append(key)
            fault = hub.fault(self.command, key[1], before) if hub.fault else None
            status, headers, body = fault if isinstance(fault, tuple) else hub.answer(self.path)
            wanted = self.headers.get("Range")
            whole = len(body)
            if wanted and status == 200 and self.command == "GET":
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers = headers | {"Content-Range": f"bytes {start}-{whole - 1}/{whole}"}
                status, body = 206, body[start:]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            half = len(body) // 2
            if fault in ("cut", "stall"):
                self.wfile.write(body[:half])
                self.wfile.flush()
                if fault == "cut":
                    self.close_connection = True
                    self.connection.close()
                    return
                time.sleep(1)
                self.wfile.write(body[half:])
            else:
                self.wfile.write(body)

        do_HEAD = do_POST = do_GET

        def handle(self) -> None:
            with suppress(OSError, ValueError):  # the connection that a "cut" closed
                super().handle()

    with loopback.serving(Handler) as address:
        yield address
