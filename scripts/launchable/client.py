"""Requests to Brev's API, with the login of its CLI.

BREV_API_URL names another API, with or without `/api`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from scripts.launchable.definition import LaunchableError

if TYPE_CHECKING:
    from requests import Response

API = "https://brevapi.us-west-2-prod.control-plane.brev.dev"
TIMEOUT = 30  # seconds
TRIES = 4  # of a reading request
DELAY = 1.0  # seconds before the second try, then twice as long each time
PATIENCE = 60  # seconds to wait, in all, until a rate limit has passed

ADVICE = {
    401: "the login has expired: `brev ls` renews it, `brev login` makes a new one",
    403: "this login may not do that in this organization, or has expired: run `brev ls`, "
    "then check --org",
    404: "there is no such launchable or organization: check the id and --org",
    409: "there is one of this name: change `name`, or use `update --id env-…`",
}
REFUSED = "the request is at fault, not the server: its words stand above"
SERVER = "the server's fault; try again later"
RATE = "rate limited, too many requests: nothing is wrong with this one; come back "
MAY_EXIST = (
    "it may have been made all the same: look under Launchables at https://brev.nvidia.com "
    "before you try again"
)


class Refused(LaunchableError):
    """The API answered, and not with success."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass
class Login:
    """The token that the CLI sends, and the organization that it works in."""

    token: str
    organization: str | None


def read_json(name: str) -> dict[str, Any]:
    """A file of the CLI's own folder; empty if there is none."""
    try:
        values = json.loads((Path.home() / ".brev" / name).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def login() -> Login:
    """The login of the Brev CLI, by API key or by browser.

    Raises:
        LaunchableError: nobody is logged in, or the login has expired.
    """
    saved = read_json("credentials.json")
    if key := (saved.get("api_key") or "").strip():
        return Login(key, saved.get("api_key_org_id"))
    token = saved.get("access_token")
    if not token:
        raise LaunchableError("no login in ~/.brev/credentials.json: run `brev login`")
    if expired(token):
        raise LaunchableError(ADVICE[401])
    return Login(token, read_json("active_org.json").get("id"))


def expired(token: str) -> bool:
    """Whether an access token says itself that its time is over."""
    if token == "auto-login":  # noqa: S105, what the CLI keeps until it first renews
        return True
    try:
        claims = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return float(claims["exp"]) <= time.time()
    except (IndexError, ValueError, KeyError, TypeError):
        return False  # no token that tells


def base_url(variable: str, default: str) -> str:
    """The address in an environment variable, or `default` where that is unset or empty.

    Raises:
        LaunchableError: it is no http(s) address.
    """
    given = os.environ.get(variable, "").strip()
    base = given or default
    try:
        parts = urlsplit(base)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, brackets that do not close
        usable = False
    if not usable:
        raise LaunchableError(
            f"{variable}={given!r} is no address: write https://HOST, or unset it for {default}"
        )
    return base.rstrip("/")


def api_url() -> str:
    """The base of the API, with the `/api` that the CLI adds to its BREV_API_URL."""
    base = base_url("BREV_API_URL", API)
    return base if base.endswith("/api") else base + "/api"


def retry_after(answer: Response) -> int:
    """Seconds until a rate-limited client may come back, by `Retry-After`; 0 if it does not say."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:  # seconds or a date
        return int(Retry().parse_retry_after(answer.headers.get("Retry-After", "0")))
    except (InvalidHeader, ValueError, OverflowError):
        return 0


def once(method: str, url: str, **request: Any) -> tuple[Response | None, str]:
    """The answer to one request, or None and what became of it."""
    import requests

    try:
        return requests.request(method, url, timeout=TIMEOUT, **request), ""
    except requests.Timeout:
        return None, "did not answer in time"
    except requests.RequestException:
        return None, "broke off"


def send(method: str, path: str, *, base: str | None, patient: bool, **request: Any) -> Response:
    """The answer to a request. Reading is tried again when the server fails, writing is not; what
    was refused for its rate was not done, and is tried again either way, for `PATIENCE` seconds.

    Raises:
        LaunchableError: there is no answer.
    """
    url, waited = (base or api_url()) + path, 0.0
    for attempt in range(TRIES):
        answer, failure = once(method, url, **request)
        status, pause = answer.status_code if answer is not None else None, DELAY * 2**attempt
        if status == 429:
            pause = max(pause, retry_after(answer))
            again = waited + pause <= PATIENCE
        else:
            again = method == "GET" and (failure or status >= 500 or (patient and status == 404))
        if not again or attempt == TRIES - 1:
            break
        if status == 429:
            print(f"rate limited: trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)
        waited += pause
    if answer is None:
        raise LaunchableError(f"{method} {path}: the server {failure}")
    return answer


def call(
    method: str,
    path: str,
    token: str | None = None,
    body: dict | None = None,
    *,
    base: str | None = None,
    creates: bool = False,
    patient: bool = False,
    may_be_empty: bool = False,
) -> dict:
    """What the API answers to a request.

    `creates`: a request that breaks off may have been done. `patient`: what was made a moment ago
    may not show yet. `may_be_empty`: success alone says all, and what comes with it may be nothing.

    Raises:
        LaunchableError: no answer, a refusal, or an answer that is no JSON object.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hint = f"\n{MAY_EXIST}" if creates else ""
    try:
        answer = send(method, path, base=base, patient=patient, json=body, headers=headers)
    except LaunchableError as error:
        raise LaunchableError(f"{error}{hint}") from None
    if not answer.ok:
        status = answer.status_code
        text = answer.text[:300].replace(token or "\0", "***")
        advice = ADVICE.get(status, REFUSED) if status < 500 else SERVER + hint
        if status == 429:
            seconds = retry_after(answer)
            advice = RATE + (f"in {seconds} s" if seconds else "in a few minutes")
        raise Refused(f"{method} {path}: {status} {text}\n{advice}", status)
    try:
        result = answer.json()
    except ValueError:
        result = None
    if not isinstance(result, dict):
        if may_be_empty:
            return {}
        raise LaunchableError(f"{method} {path}: the answer is no JSON object, cut short?{hint}")
    return result
