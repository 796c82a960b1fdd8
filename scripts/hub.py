"""Ask the Hugging Face hub, wait where it says so, and fetch a model whole and checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import parse_ratelimit_headers

from scripts.base import RecipeError
from scripts.config import refuse_pickles

TRIES = 4
WAIT = 120  # seconds that a run waits for a hub that says when to come back
BREATH = 1.0  # seconds before the second try; twice as long before each one after it
SMALL = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model"]
Answer = TypeVar("Answer")


class HubError(RecipeError):
    """The model or dataset cannot be had from the hub, and what to do about it."""


class HubBusy(HubError):
    """The hub is overloaded or out of order; it says when to come back, if the hub said so."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of the hub's client, if it has one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _pause(error: HfHubHTTPError, attempt: int) -> float:
    """Seconds until the next try: what the hub asks for, else a little longer each time."""
    headers = error.response.headers
    told = headers.get("Retry-After", "")
    if told.isdecimal():
        return float(told)
    with suppress(ValueError):  # else it is a date, or nothing that can be read
        then = parsedate_to_datetime(told)
        return max(0.0, (then - datetime.now(then.tzinfo)).total_seconds())
    if limit := parse_ratelimit_headers(headers):
        return float(limit.reset_in_seconds)
    return BREATH * 2**attempt


def patiently(ask: Callable[[], Answer], wait: float | None = None) -> Answer:
    """What `ask` gives; a busy hub (429) or one out of order (5xx) is asked again.

    Raises:
        HubBusy: it still is, or asks to wait for more than `wait` seconds (None: `WAIT`).
    """
    wait = WAIT if wait is None else wait
    for attempt in range(TRIES):
        try:
            return ask()
        except HfHubHTTPError as error:
            status = status_of(error)
            if status is None or (status != 429 and status < 500):
                raise
            seconds, last = _pause(error, attempt), attempt == TRIES - 1
            what = "takes no more requests for now (429)" if status == 429 else f"fails ({status})"
            then = datetime.now() + timedelta(seconds=seconds)
            if seconds > wait or (last and status == 429):
                raise HubBusy(
                    f"the hub {what}: come back in {seconds:.0f} s, at {then:%H:%M:%S}"
                    + "; a token (HF_TOKEN) has a higher limit" * (status == 429)
                ) from error
            if last:
                raise HubBusy(f"the hub {what}, {TRIES} times in a row; try again later") from error
            print(f"The hub {what}; asking again in {seconds:.0f} s ...", flush=True)
            time.sleep(seconds)
    raise AssertionError("unreachable")


def fetch(name: str, revision: str = "main", *, weights: bool = True) -> str:
    """Have the model `name` of the hub in the cache, whole and checked.

    What is there already is not fetched again; a download that breaks off goes on where it was.
    The hub's checksums are held against what was fetched, and a damaged file is fetched anew.

    Returns:
        The commit that `revision` stands for, to load that and no other; for a folder, `revision`.

    Raises:
        HubError: it cannot be had; the message says why. A `PlaceError`: its weights are pickles.
    """
    if Path(name).expanduser().is_dir():
        return revision
    patterns = SMALL + (["*.safetensors"] if weights else [])
    wanted = {"revision": revision, "allow_patterns": patterns}
    wanted["ignore_patterns"] = ["*/*"]  # other formats and exports lie in folders
    have = _in_cache(name, wanted)
    trouble = ""
    for attempt in range(TRIES):
        try:
            info = patiently(lambda: HfApi().model_info(name, revision=revision))
            refuse_pickles(name, [file.rfilename for file in info.siblings or []])
            if have and have == info.sha:
                return have
            folder = Path(patiently(lambda: snapshot_download(name, **wanted)))
            damaged = remove_damaged(name, folder.name)
        except RecipeError as error:
            if have and isinstance(error, HubBusy):
                return have
            raise
        except Exception as error:  # the errors of httpx and of sockets share no nearer base
            status = status_of(error)
            if have and status is None:
                return have  # no network: what is in the cache serves
            if status is not None and status < 500:
                raise HubError(f"`{name}`: {_line(error)}") from error
            trouble = _line(error)
        else:
            if not damaged:
                return folder.name
            trouble = f"{', '.join(damaged)} came damaged (checksum)"
        if attempt < TRIES - 1:
            print(f"The download of {name} broke off ({trouble}); going on ...", flush=True)
            time.sleep(BREATH * 2**attempt)
    raise HubError(
        f"the download of `{name}` broke off {TRIES} times, last: {trouble}. Check the network and "
        "the disk, and run the same command again: what is fetched is kept"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _in_cache(name: str, wanted: dict) -> str | None:
    """The commit of `name` in the cache, if all that is `wanted` of it is there."""
    try:
        folder = Path(snapshot_download(name, **wanted, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    weights = "*.safetensors" in wanted["allow_patterns"]
    needed = ["config.json", *(["*.safetensors"] if weights else ["tokenizer*"])]
    whole = all(any(folder.glob(pattern)) for pattern in needed)
    return folder.name if whole else None


def remove_damaged(name: str, commit: str) -> list[str]:
    """Hold the cache against the hub's checksums, and delete what differs: its names."""
    found = patiently(lambda: HfApi().verify_repo_checksums(name, revision=commit))
    for one in found.mismatches:
        path = found.verified_path / one["path"]
        path.resolve().unlink(missing_ok=True)  # the file that the snapshot's link leads to
        path.unlink(missing_ok=True)
    return [one["path"] for one in found.mismatches]


def dataset_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a dataset on the hub, or None if the hub cannot be asked.

    Raises:
        HubError: there is no such dataset or revision for this token.
    """
    try:
        return patiently(lambda: HfApi().dataset_info(name, revision=revision, timeout=20)).sha
    except HubBusy:
        return None
    except HfHubHTTPError as error:
        raise HubError(f"dataset `{name}`, revision {revision or 'main'}: {_line(error)}") from None
    except Exception:  # no network: the errors of httpx and of sockets share no nearer base
        return None
