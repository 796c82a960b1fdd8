"""Faults of the Hugging Face hub, done by a server on loopback that plays it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

from scripts import hub as client
from scripts.base import RecipeError
from scripts.config import ConfigError
from scripts.hub import WHEELS, HubError, dataset_commit, fetch, hub_login, hub_state
from scripts.model import resolve_model
from tests.survival.bad_input_faults import model_folder
from tests.survival.hub import COMMIT, Fault, Hub, model_files, serving

AREA = "hub faults"
NAME, SMOL = "some/model", next(iter(WHEELS))
WEIGHTS = "model.safetensors"


def files() -> dict[str, bytes]:
    """The files of a small model; its weights are long enough to be cut."""
    with tempfile.TemporaryDirectory() as folder:
        return model_files(model_folder(Path(folder) / "model", width=600))


@contextmanager
def at(hub: Hub, token: str | None = None) -> Iterator[Path]:
    """Have the hub's client talk to `hub` with an empty cache, which is given."""
    names = ("ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGINGFACE_CO_URL_TEMPLATE",
             "DOWNLOAD_CHUNK_SIZE")  # fmt: skip
    kept = {name: getattr(constants, name) for name in names}
    environment = os.environ.pop("HF_TOKEN", None)
    breath, client.BREATH = client.BREATH, 0.02
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache, serving(hub) as url:
        constants.ENDPOINT, constants.HF_HUB_CACHE = url, cache
        constants.HF_TOKEN_PATH = "/nonexistent"
        address = url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # what is kept of a file that is cut
        constants.HUGGINGFACE_CO_URL_TEMPLATE = address
        if token:
            os.environ["HF_TOKEN"] = token
        try:
            yield Path(cache)
        finally:
            client.BREATH = breath
            os.environ.pop("HF_TOKEN", None)
            if environment is not None:
                os.environ["HF_TOKEN"] = environment
            for name, value in kept.items():
                setattr(constants, name, value)


def refused(act: Callable[[], object], *words: str, kind: type = RecipeError) -> str:
    """The one line that `act` is refused with."""
    try:
        with redirect_stdout(StringIO()):
            act()
    except kind as error:
        line = str(error)
    else:
        raise AssertionError("accepted")
    assert "\n" not in line, line
    missing = [word for word in words if word not in line]
    assert not missing, f"without {missing}: {line}"
    return line


def always(status: int, **headers: str) -> Fault:
    """Every request is answered so."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda method, path, before: (status, named, b"{}")


def first(times: int, fault, on: str = "/api/") -> Fault:
    """The first `times` requests of the paths with `on` in them go wrong."""
    return lambda method, path, before: fault if on in path and before < times else None


def on_weights(word: str, times: int) -> Fault:
    def fault(method: str, path: str, before: int):
        return word if method == "GET" and path.endswith(WEIGHTS) and before < times else None

    return fault


def _refused(fault: Fault, token: str | None, *words: str) -> None:
    """The one line of the login."""
    hub = Hub(files(), fault)
    with at(hub, token):
        line = refused(lambda: hub_login(NAME), *words, kind=HubError)
        assert not token or token not in line
        assert ("is gated" in line) == (fault is GATED), line


def _falls_back(fault: Fault) -> None:
    """The default model comes from PyPI, whatever the hub says."""
    from scripts import model as step

    with at(Hub(files(), fault)):
        said = StringIO()
        with redirect_stdout(said):
            hub_login(SMOL)
        kept, step.model_from_wheel = step.model_from_wheel, lambda name: Path("/from/pypi")
        try:
            path, where = resolve_model(SMOL)
        finally:
            step.model_from_wheel = kept
        assert path == "/from/pypi" and "from PyPI" in where, where


def _fetched(fault: Fault | None, resumes: bool = False) -> None:
    """The model comes whole in spite of `fault`."""
    hub = Hub(files(), fault)
    with at(hub) as cache, redirect_stdout(StringIO()):
        assert fetch(NAME) == COMMIT
        got = next(cache.rglob(WEIGHTS)).read_bytes()
        assert got == hub.files[WEIGHTS], "other bytes than the hub has"
        asked = len(hub.asked)
        assert fetch(NAME) == COMMIT
        assert not [p for _, p in hub.asked[asked:] if "/resolve/" in p], "fetched twice"
    assert not resumes or hub.ranges, "began anew"


def _not_fetched(fault: Fault, *words: str) -> None:
    with at(Hub(files(), fault)):
        refused(lambda: fetch(NAME), *words, kind=HubError)


def _waits(fault: Fault, least: float) -> None:
    """A hub that says when to come back is asked again then, and not before."""
    out = StringIO()
    with at(Hub(files(), fault)), redirect_stdout(out):
        start = time.monotonic()
        assert hub_state(NAME) == "open"
        assert time.monotonic() - start >= least
    assert "asking again in" in out.getvalue()


def _pickle(*names: str) -> None:
    """Weights that are pickles are refused by name, and not fetched."""
    have = {k: v for k, v in files().items() if k != WEIGHTS} | dict.fromkeys(names, b"\x80\x02")
    hub = Hub(have)
    with at(hub):
        refused(lambda: fetch(NAME), names[0], "safetensors only", kind=ConfigError)
    assert not [p for _, p in hub.asked if p.endswith(names)], "the pickle was fetched"


def _cached(fault: Fault) -> None:
    """What was downloaded before serves while the hub does not."""
    hub = Hub(files())
    with at(hub):
        fetch(NAME)
        hub.fault = fault
        with redirect_stdout(StringIO()):
            assert hub_state(NAME, wait=0) == "cached"
            assert fetch(NAME) == COMMIT


def _small_only() -> None:
    """For the tokenizer alone no weights are fetched."""
    hub = Hub(files())
    with at(hub):
        assert fetch(NAME, weights=False) == COMMIT
    assert not [p for _, p in hub.asked if p.endswith(WEIGHTS)]


def _pinned() -> None:
    """A commit that is named is the one that is asked for."""
    hub = Hub(files())
    with at(hub):
        assert fetch(NAME, COMMIT) == COMMIT
    asked = [path for _, path in hub.asked if "/revision/" in path or "/resolve/" in path]
    assert asked and all(COMMIT in path for path in asked), asked


def _dataset(fault: Fault | None, *words: str) -> None:
    """The commit of a dataset is told, or why it is not."""
    with at(Hub(files(), fault)):
        if words:
            refused(lambda: dataset_commit(NAME), *words, kind=HubError)
        else:
            with redirect_stdout(StringIO()):
                assert dataset_commit(NAME) == COMMIT


def _token_stays(fault: Fault) -> None:
    """The token goes to the hub alone: into no message and no file of the cache."""
    canary = "hf_canaryCANARYcanaryCANARY1234"
    hub = Hub(files(), fault)
    out = StringIO()
    with at(hub, canary) as cache, redirect_stdout(out):
        try:
            fetch(NAME)
        except RecipeError as error:
            assert canary not in str(error)
        assert f"Bearer {canary}" in hub.tokens, "the token was not used"
        for path in cache.rglob("*"):
            assert not path.is_file() or canary.encode() not in path.read_bytes(), path
    assert canary not in out.getvalue()


GATED = always(403, X_Error_Code="GatedRepo")
MISSING, NO_REVISION = (always(404, X_Error_Code=f"{w}NotFound") for w in ("Repo", "Revision"))
PRIVATE = always(401, X_Error_Code="RepoNotFound")
UNKNOWN = always(401)
LATER = always(429, Retry_After="900")


def faults() -> Iterable[tuple[str, Callable[[], None]]]:
    """Each fault by its name; the callable raises `AssertionError` where it is not survived."""
    yield "gated, no token", partial(_refused, GATED, None, "is gated", "set HF_TOKEN")
    yield "gated, token may not", partial(_refused, GATED, "hf_other", "may not read it")
    yield "401, no token", partial(_refused, UNKNOWN, None, "no model", "set HF_TOKEN")
    yield "401, unknown token", partial(_refused, UNKNOWN, "hf_old", "does not know your")
    yield "401 of a private model", partial(_refused, PRIVATE, "hf_any", "can see")
    yield "404", partial(_refused, MISSING, None, "no model", "spelling")
    yield "404 with token", partial(_refused, MISSING, "hf_any", "this token can see")
    yield "no such revision", partial(_refused, NO_REVISION, None, "model_revision")
    yield "429 for long", partial(_refused, LATER, None, "come back in 900 s", "HF_TOKEN")
    yield "429 until nonsense", partial(_refused, always(429, Retry_After="soon"), None)
    yield "500 for good", partial(_refused, always(500), None, "fails (500)")
    codes = {"401": UNKNOWN, "403": GATED, "429": LATER, "500": always(500)}
    for code, fault in codes.items():
        yield f"default model, {code}", partial(_falls_back, fault)
    yield "429, then well", partial(_waits, first(1, (429, {"Retry-After": "1"}, b"")), 1)
    limit = {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    yield "429 by RateLimit, then well", partial(_waits, first(1, (429, limit, b"")), 1)
    yield "503 twice, then well", partial(_fetched, first(2, (503, {}, b"")))
    fault = first(2, (503, {}, b""), "/resolve/")
    yield "503 of files twice, then well", partial(_fetched, fault)
    yield "nothing wrong", partial(_fetched, None)
    yield "download cut three times", partial(_fetched, on_weights("cut", 3), resumes=True)
    yield "download slow", partial(_fetched, on_weights("stall", 1))
    gone = first(99, (404, {"X-Error-Code": "EntryNotFound"}, b""), "/resolve/")
    yield "files listed and not there", partial(_not_fetched, gone, "404")
    yield "a .bin model", partial(_pickle, "pytorch_model.bin")
    yield "hub down, model cached", partial(_cached, always(500))
    yield "tokenizer alone", _small_only
    yield "commit pinned", _pinned
    yield "dataset's commit", partial(_dataset, None)
    yield "dataset's commit after a 503", partial(_dataset, first(1, (503, {}, b"")))
    yield "dataset missing", partial(_dataset, MISSING, "dataset `some/model`")
    for name, fault in {"well": None, "403": GATED}.items():
        yield f"token stays, {name}", partial(_token_stays, fault)
