"""Create a launchable on Brev, or update one: who provides its machine, what was saved.

Creating is modelled on an unmerged branch of Brev's CLI (`brev launchable create`), the rest on
what that CLI has released.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from scripts.launchable.client import MAY_EXIST, Refused, base_url, call
from scripts.launchable.definition import LaunchableError

PUBLIC_API = "https://api.brev.dev"
CATALOG = "/devplaneapi.v1.InstanceService/ListOrganizationAvailableInstanceTypes"
DISK = 100  # GiB to ask for where the launchable names no size and the disk has no fixed one


@dataclass
class Published:
    """A launchable that exists, and what there is to say about it."""

    id: str
    remarks: list[str] = field(default_factory=list)


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
        base = base_url("BREV_PUBLIC_API_URL", PUBLIC_API)
        options = {"includeUnavailable": False, "uniqueInstanceType": True, "includeCpu": False}
        wanted = {"organizationId": org, "options": options}
        answer = call("POST", CATALOG, token, wanted, base=base)
    return mappings(answer.get("allInstanceTypes") or answer.get("items"))


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a mapping, else an empty one: an answer may hold anything anywhere."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in `value`, if it is a list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def either(entry: dict, *names: str) -> Any:
    """The first of these keys that the entry has: the listings spell them in two ways."""
    return next((entry[name] for name in names if entry.get(name)), None)


def gib(size: Any) -> int:
    """`97GiB` in GiB; 0 where it is no such text."""
    text = size if isinstance(size, str) else ""
    match = re.match(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?$", text, re.IGNORECASE)
    factor = {"M": 1 / 1024, "G": 1, "T": 1024}
    return int(float(match[1]) * factor[match[2].upper()]) if match else 0


def place(workspace: dict[str, Any], org: str, token: str) -> list[str]:
    """Complete the workspace request for its instance type: who provides it, and its disk.

    Returns remarks. A `workspaceGroupId` or `cloudCredId` that is there already is kept, and then
    a type that the listing does not tell of is no failure.

    Raises:
        LaunchableError: the type is not offered, or not with such a disk.
    """
    name = workspace["instanceType"]
    given = workspace.get("workspaceGroupId") or workspace.get("cloudCredId")
    try:
        entry = listed(name, org, token)
    except LaunchableError as error:
        if not given:
            raise
        return [f"the disk of {name} was not checked: {error}"]
    if not given:
        workspace |= provider(entry, name)
    disks = mappings(either(entry, "supported_storage", "supportedStorage"))
    return fit_disk(workspace, disks[0] if disks else {})


def listed(name: str, org: str, token: str) -> dict[str, Any]:
    """What the listing has of an instance type.

    Raises:
        LaunchableError: nothing, or there is no listing.
    """
    entry = next((e for e in instance_types(org, token) if e.get("type") == name), None)
    if entry is None:
        raise LaunchableError(
            f"{name} is not offered to {org} now: `brev search --gpu-name A100` lists what is, "
            "--instance N takes a fallback of brev-launchable.yaml"
        )
    return entry


def provider(entry: dict[str, Any], name: str) -> dict[str, str]:
    """The key of the workspace request that says who provides the machine.

    Raises:
        LaunchableError: the listing does not say.
    """
    groups = mappings(either(entry, "workspace_groups", "workspaceGroups"))
    if group := next((g["id"] for g in groups if g.get("id")), None):
        return {"workspaceGroupId": group}
    if credential := either(entry, "cloud_cred_id", "cloudCredId"):
        return {"cloudCredId": credential}
    raise LaunchableError(
        f"the listing does not say who provides {name}: give --workspace-group or --cloud-cred "
        "(a launchable of that provider names it: `show --id env-…`)"
    )


def fit_disk(workspace: dict[str, Any], disk: dict[str, Any]) -> list[str]:
    """Name a disk size where the type lets one choose, and none where it does not. Bounds that
    cannot be read leave the size as it is. Returns remarks.

    Raises:
        LaunchableError: the size is out of bounds.
    """
    name = workspace["instanceType"]
    least, most = either(disk, "min_size", "minSize"), either(disk, "max_size", "maxSize")
    low, high = gib(least), gib(most)
    if most and not high:
        return [f"the disk of {name} was not checked: its largest size is listed as {most!r}"]
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
        answer = call("POST", f"{path}/edit", token, change, may_be_empty=True)
        identity = answer.get("id") or existing
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
            call("POST", "/file-validation/docker-compose", token, source, may_be_empty=True)
        except Refused as error:
            if error.status not in (404, 405):  # an API without this check
                raise


def read_back(identity: str, token: str | None) -> dict[str, Any]:
    """What Brev keeps, with the text of a set-up script that it keeps by its id."""
    try:  # where the CLI reads it
        kept = call("GET", f"/launchables/{identity}/now", token, patient=True)
    except Refused as error:
        if error.status != 404:
            raise
        kept = call("GET", f"/launchables/{identity}", token)
    machine = mapping(mapping(kept.get("buildRequest")).get("vmBuild"))
    script = mapping(machine.get("lifeCycleScriptAttr"))
    if script.get("id") and not script.get("script"):
        where = f"/launchable/lifecycle-script?envId={identity}&scriptId={script['id']}"
        answer = call("GET", where, token, patient=True)
        script["script"] = mapping(answer.get("attrs")).get("script")
    return kept


def comparable(launchable: dict[str, Any]) -> dict[str, Any]:
    """A launchable in one spelling: Brev keeps some things otherwise than they are sent."""
    values = json.loads(json.dumps({k: v for k, v in launchable.items() if k != "viewAccess"}))
    workspace = mapping(values.get("createWorkspaceRequest"))
    if storage := workspace.get("storage"):
        workspace["storage"] = re.sub(r"\s*Gi?B?$", "", str(storage))
    for key in ("workspaceGroupId", "cloudCredId"):  # one may be kept as the other
        workspace.pop(key, None)
    build = mapping(values.get("buildRequest"))
    compose = mapping(build.get("dockerCompose"))
    for holder, key in ((mapping(values.get("file")), "url"), (compose, "fileUrl")):
        if holder.get(key):
            holder[key] = re.sub(r"/(-/)?(blob|raw)/", "/raw/", str(holder[key]), count=1)
    script = mapping(mapping(build.get("vmBuild")).get("lifeCycleScriptAttr"))
    for holder, key in ((compose, "yamlString"), (script, "script")):
        if holder.get(key):
            holder[key] = str(holder[key]).strip()
    for key in ("ports", "parameters"):
        build[key] = sorted(mappings(build.get(key)), key=lambda entry: str(entry.get("name")))
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
