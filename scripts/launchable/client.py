"""Brev's API as its own CLI uses it: who is logged in, where a machine runs, create and read back.

The way to create a launchable is modelled on an unmerged branch of that CLI (`brev launchable
create`); the rest on what it has released. BREV_API_URL names another API, with or without `/api`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.launchable.definition import LaunchableError

API = "https://brevapi.us-west-2-prod.control-plane.brev.dev"
PUBLIC_API = "https://api.brev.dev"
CATALOG = "/devplaneapi.v1.InstanceService/ListOrganizationAvailableInstanceTypes"
TIMEOUT = 30  # seconds
TRIES = 4  # of a reading request
DELAY = 1.0  # seconds before the second try, then twice as long each time
DISK = 100  # GiB to ask for where the launchable names no size and the disk has no fixed one

ADVICE = {
    401: "the login has expired: `brev ls` renews it, `brev login` makes a new one",
    403: "this login may not do that in this organization, or has expired: run `brev ls`, "
    "then check --org",
    404: "there is no such launchable or organization: check the id and --org",
    409: "there is one of this name: change `name`, or use `update --id env-…`",
}
REFUSED = "the request is at fault, not the server: its words stand above"
SERVER = "the server's fault; try again later"
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


@dataclass
class Published:
    """A launchable that exists, and what there is to say about it."""

    id: str
    remarks: list[str] = field(default_factory=list)


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
    if token == "auto-login":  # what the CLI keeps until it first renews
        return True
    try:
        claims = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
        return float(claims["exp"]) <= time.time()
    except (IndexError, ValueError, KeyError, TypeError):
        return False  # no token that tells


def api_url() -> str:
    """The base of the API, with the `/api` that the CLI adds to its BREV_API_URL."""
    base = os.environ.get("BREV_API_URL", API).rstrip("/")
    return base if base.endswith("/api") else base + "/api"


def send(method: str, path: str, *, base: str | None, patient: bool, **request: Any) -> Any:
    """The answer to one request. Reading is tried again when the server fails, writing is not.

    Raises:
        LaunchableError: there is no answer.
    """
    import requests

    tries = TRIES if method == "GET" else 1
    for attempt in range(tries):
        if attempt:
            time.sleep(DELAY * 2 ** (attempt - 1))
        try:
            url = (base or api_url()) + path
            answer = requests.request(method, url, timeout=TIMEOUT, **request)
        except requests.Timeout:
            failure = "did not answer in time"
        except requests.RequestException:
            failure = "broke off"
        else:
            failure = None
            if not (answer.status_code >= 500 or (patient and answer.status_code == 404)):
                break
    if failure:
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
) -> dict:
    """What the API answers to a request.

    `creates`: a request that breaks off may have been done. `patient`: what was made a moment ago
    may not show yet.

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
        raise Refused(f"{method} {path}: {status} {text}\n{advice}", status)
    try:
        result = answer.json()
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise LaunchableError(f"{method} {path}: the answer is no JSON object, cut short?{hint}")
    return result


def instance_types(org: str, token: str) -> list[dict[str, Any]]:
    """What the organization can rent now, from the listing that the CLI reads.

    Raises:
        LaunchableError: neither the listing nor its successor can be read.
    """
    try:
        answer = call("GET", f"/instances/alltypesavailable/{org}", token)
    except Refused as error:
        if error.status != 404:
            raise
        base = os.environ.get("BREV_PUBLIC_API_URL", PUBLIC_API).rstrip("/")
        options = {"includeUnavailable": False, "uniqueInstanceType": True, "includeCpu": False}
        wanted = {"organizationId": org, "options": options}
        answer = call("POST", CATALOG, token, wanted, base=base)
    return answer.get("allInstanceTypes") or answer.get("items") or []


def either(entry: dict, *names: str) -> Any:
    """The first of these keys that the entry has: the listings spell them in two ways."""
    return next((entry[name] for name in names if entry.get(name)), None)


def gib(size: str) -> int:
    """`97GiB` in GiB; 0 if it is not told."""
    match = re.match(r"([\d.]+)\s*([MGT])i?B?$", size or "", re.IGNORECASE)
    factor = {"M": 1 / 1024, "G": 1, "T": 1024}
    return int(float(match[1]) * factor[match[2].upper()]) if match else 0


def place(workspace: dict[str, Any], org: str, token: str) -> list[str]:
    """Complete the workspace request for its instance type: who provides it, and its disk.

    Returns remarks. A `workspaceGroupId` or `cloudCredId` that is there already is kept.

    Raises:
        LaunchableError: the type is not offered, or not with such a disk.
    """
    name = workspace["instanceType"]
    entry = next((e for e in instance_types(org, token) if e.get("type") == name), None)
    if entry is None:
        raise LaunchableError(
            f"{name} is not offered to {org} now: `brev search --gpu-name A100` lists what is, "
            "--instance N takes a fallback of brev-launchable.yaml"
        )
    if not (workspace.get("workspaceGroupId") or workspace.get("cloudCredId")):
        groups = either(entry, "workspace_groups", "workspaceGroups") or []
        credential = either(entry, "cloud_cred_id", "cloudCredId")
        if groups:
            workspace["workspaceGroupId"] = groups[0]["id"]
        elif credential:
            workspace["cloudCredId"] = credential
        else:
            raise LaunchableError(
                f"the listing does not say who provides {name}: give --workspace-group or "
                "--cloud-cred (a launchable of that provider names it: `show --id env-…`)"
            )
    disks = either(entry, "supported_storage", "supportedStorage") or [{}]
    return fit_disk(workspace, disks[0])


def fit_disk(workspace: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    """Name a disk size where the type lets one choose, and none where it does not.

    Raises:
        LaunchableError: the size is out of bounds.
    """
    name = workspace["instanceType"]
    low, high = gib(either(disk, "min_size", "minSize")), gib(either(disk, "max_size", "maxSize"))
    if not high:
        size = disk.get("size") or "unknown size"
        wanted = workspace.pop("storage", None)
        remark = f"{name} has a fixed disk ({size}): the {wanted} GiB are left out"
        return [remark] if wanted else []
    size = int(workspace.get("storage") or min(max(DISK, low), high))
    if not low <= size <= high:
        raise LaunchableError(f"{name} takes {low} to {high} GiB of disk, not {size}")
    workspace["storage"] = str(size)
    return []


def publish(body: dict, org: str, token: str, existing: str | None = None) -> Published:
    """Create the launchable, or update the `existing` one, and read it back.

    Raises:
        LaunchableError: the API refuses, or what it keeps is not what was sent.
    """
    have_compose_checked(body["buildRequest"].get("dockerCompose", {}), token)
    path = f"/organizations/{org}/v2/launchables"
    if existing:  # who may see it stays as it is: the API takes that only when creating
        change = {k: v for k, v in body.items() if k != "viewAccess"} | {"id": existing}
        identity = call("POST", f"{path}/edit", token, change).get("id") or existing
    else:
        identity = call("POST", path, token, body, creates=True).get("id")
    if not identity:
        raise LaunchableError(f"the API gave no id\n{MAY_EXIST}")
    result = Published(identity)
    try:
        kept = read_back(identity, token)
    except LaunchableError as error:
        result.remarks.append(f"saved, but not read back: {error}")
        return result
    if wrong := differences(comparable(body), comparable(kept)):
        raise LaunchableError(
            f"{identity} exists, but was saved otherwise than sent: {'; '.join(wrong[:5])}"
        )
    return result


def have_compose_checked(compose: dict[str, Any], token: str) -> None:
    """Ask Brev whether it takes the Compose file, before anything is made.

    Raises:
        LaunchableError: it does not.
    """
    if source := {k: compose[k] for k in ("fileUrl", "yamlString") if k in compose}:
        try:
            call("POST", "/file-validation/docker-compose", token, source)
        except Refused as error:
            if error.status not in (404, 405):  # an API without this check
                raise


def read_back(identity: str, token: str | None) -> dict[str, Any]:
    """What Brev keeps, with the text of a set-up script that it keeps by its id."""
    kept = call("GET", f"/launchables/{identity}", token, patient=True)
    script = ((kept.get("buildRequest") or {}).get("vmBuild") or {}).get("lifeCycleScriptAttr")
    if script and script.get("id") and not script.get("script"):
        where = f"/launchable/lifecycle-script?envId={identity}&scriptId={script['id']}"
        answer = call("GET", where, token, patient=True)
        script["script"] = (answer.get("attrs") or {}).get("script")
    return kept


def comparable(launchable: dict[str, Any]) -> dict[str, Any]:
    """A launchable in one spelling: Brev keeps some things otherwise than they are sent."""
    values = json.loads(json.dumps({k: v for k, v in launchable.items() if k != "viewAccess"}))
    workspace = values.get("createWorkspaceRequest") or {}
    if storage := workspace.get("storage"):
        workspace["storage"] = re.sub(r"\s*Gi?B?$", "", str(storage))
    for key in ("workspaceGroupId", "cloudCredId"):  # one may be kept as the other
        workspace.pop(key, None)
    build = values.get("buildRequest") or {}
    compose = build.get("dockerCompose") or {}
    for holder, key in ((values.get("file") or {}, "url"), (compose, "fileUrl")):
        if holder.get(key):
            holder[key] = re.sub(r"/(-/)?(blob|raw)/", "/raw/", holder[key], count=1)
    script = (build.get("vmBuild") or {}).get("lifeCycleScriptAttr") or {}
    for holder, key in ((compose, "yamlString"), (script, "script")):
        if holder.get(key):
            holder[key] = holder[key].strip()
    for key in ("ports", "parameters"):
        build[key] = sorted(build.get(key) or [], key=lambda entry: entry.get("name", ""))
    return values


def differences(wanted: Any, kept: Any, where: str = "") -> list[str]:
    """Where `kept` lacks or contradicts `wanted`; more than was asked for is no matter.

    What is empty, zero or false may be left out: Brev does not write it.
    """
    if isinstance(wanted, dict) and isinstance(kept, dict):
        return [d for k, v in wanted.items() for d in differences(v, kept.get(k), f"{where}.{k}")]
    if isinstance(wanted, list) and isinstance(kept, list) and len(wanted) == len(kept):
        pairs = enumerate(zip(wanted, kept, strict=True))
        return [d for i, (w, k) in pairs for d in differences(w, k, f"{where}[{i}]")]
    same = wanted == kept or not (wanted or kept)
    return [] if same else [f"{where.lstrip('.')} is {str(kept)[:60]!r}"]
