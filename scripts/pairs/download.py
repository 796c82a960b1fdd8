"""Fetch a data file from an http or https address."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import requests

from scripts.pairs.files import DataError, refuse

PATIENCE = (10, 60)  # seconds to connect, and for each piece to come
PAGES = (b"<!doctype html", b"<html")


def is_url(name: str) -> bool:
    """Whether `name` is an http or https address."""
    return name.lower().startswith(("http://", "https://"))


def download(url: str) -> Path:
    """The file at `url`, fetched anew, in the cache of `datasets`; whole, or there is an error.

    Raises:
        DataError: the address names no file of a format that is read, does not answer, refuses, or
            sends a web page or less than it announced.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url} is no address: {error}") from None
    name = Path(unquote(parts.path)).name
    if parts.hostname == "huggingface.co" and parts.path.startswith("/datasets/"):
        owner_and_name = "/".join(parts.path.split("/")[2:4])
        if "/resolve/" not in parts.path:
            raise DataError(f"{url} is a page of the hub; set dataset_name={owner_and_name}")
    if not name:
        raise DataError(f"{url} names no file")
    refuse(Path(name))
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    path = Path(datasets.config.HF_CACHE_HOME) / "dpo_downloads" / folder / name
    partial = path.with_name(f"{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with requests.get(url, stream=True, timeout=PATIENCE) as response:
            if response.status_code != 200:
                said = f"{response.status_code} {response.reason}".strip()
                raise DataError(f"cannot download {url}: the server said {said}")
            with partial.open("wb") as file:
                for piece in response.iter_content(2**20):
                    file.write(piece)
        with partial.open("rb") as file:
            if file.read(200).lstrip().lower().startswith(PAGES):
                raise DataError(
                    f"{url} is a web page, not a data file; name the raw file's address"
                )
        partial.replace(path)
    except OSError as error:  # what requests raises, too, as for an answer that is cut off
        raise DataError(f"cannot download {url}: {error}; try again, or copy it here") from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return path
