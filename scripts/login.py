"""Who may download the model: the Hugging Face login, asked for only where it is needed."""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import (
    HfApi,
    constants,
    get_token,
    login,
    notebook_login,
    try_to_load_from_cache,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from scripts.config import RecipeError

TIMEOUT = 10  # seconds the hub has to answer the first question


class HubError(RecipeError):
    """The model cannot be had from the hub, and what to do about it."""


def hub_state(name: str, revision: str = "main") -> str:
    """Where the model `name` stands, without downloading it.

    Returns:
        "local" (a folder), "open" (anyone may download it), "granted" (gated, and the token at
        hand may), "login" (gated or private, and the token at hand, if any, may not), "missing"
        (no such repository for this token), "cached" (hub out of reach, already downloaded) or
        "unreachable".
    """
    if Path(name).expanduser().is_dir():
        return "local"
    if name.startswith(("/", ".", "~")):
        raise HubError(f"there is no folder {name}; check model_name_or_path")
    api = HfApi()
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        info = api.model_info(name, revision=revision, timeout=TIMEOUT)
        if not info.gated:
            return "open"
        api.auth_check(name)  # the model's page is public even when its files are not
        return "granted"
    except GatedRepoError:
        return "login"
    except RepositoryNotFoundError:  # the hub also says this of a private model without a token
        return "missing" if get_token() else "login"
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            return "login"
        return _without_the_hub(name, revision)
    except Exception:  # no network: the errors of httpx and of sockets share no nearer base
        return _without_the_hub(name, revision)


def _without_the_hub(name: str, revision: str) -> str:
    config_file = try_to_load_from_cache(name, "config.json", revision=revision)
    return "cached" if isinstance(config_file, str) else "unreachable"


def someone_is_there() -> bool:
    """Whether a person can answer a prompt: JupyterLab or a terminal, not papermill or CI."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and hasattr(shell, "kernel"):
        # The front end says with every cell whether it can ask; papermill says it cannot.
        return bool(getattr(shell.kernel, "_allow_stdin", False))
    return sys.stdin is not None and sys.stdin.isatty()


def hub_login(name: str, revision: str = "main") -> str:
    """Log in to the hub if the model `name` needs it, and return the state of `hub_state`.

    The token comes from `HF_TOKEN` or an earlier `hf auth login`; only when it is missing, and a
    person is there to answer, is one asked for.

    Raises:
        HubError: the model is gated and the token may not read it, or there is no such model.
    """
    state = hub_state(name, revision)
    if state == "login" and someone_is_there() and not get_token():
        if "ipykernel" in sys.modules:
            notebook_login()
            print("Paste your token above, then run this cell again.")
            return state
        login()
        state = hub_state(name, revision)
    page = f"{constants.ENDPOINT}/{name}"
    if state == "missing":
        raise HubError(f"the hub has no model `{name}` that this token can see; check {page}")
    if state == "login" and get_token():
        raise HubError(
            f"`{name}` is gated and this token may not read it. Accept its licence at {page} "
            "(approval can take a while), and give the token the right to read gated repositories."
        )
    if state == "login":
        raise HubError(
            f"`{name}` is gated and there is no token. Accept its licence at {page}, make a token "
            f"at {constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it."
        )
    print(_MESSAGES[state].format(name=name))
    return state


_MESSAGES = {
    "local": "{name} is a folder on this machine: no login needed.",
    "open": "{name} is open to everyone: no login needed.",
    "granted": "{name} is gated, and your token may read it.",
    "cached": "The hub cannot be reached; {name} was downloaded before: no login needed.",
    "unreachable": "The hub cannot be reached from here: no login possible.",
}
