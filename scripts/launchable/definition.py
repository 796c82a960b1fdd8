"""The launchable as written in `brev-launchable.yaml`, and what Brev would refuse about it.

The checks follow those that Brev's own clients make before they send a request.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from scripts.base import ROOT, RecipeError

FILE = ROOT / "brev-launchable.yaml"
SCHEMA = ROOT / "configs" / "brev-launchable.schema.json"
BUILDS = ("vmBuild", "containerBuild", "dockerCompose")
SCRIPT_LIMIT = 16 * 1024  # bytes that the API takes of a set-up script
BUTTON_LIMIT = 2  # links that may show as a button (`cta-enabled`)
PUBLIC_GIT = re.compile(r"https://(github\.com|gitlab\.com)/[\w.-]+/[\w./-]+$")


class LaunchableError(RecipeError):
    """The launchable cannot be made as it is: what, where and how to put it right."""


def load(path: Path = FILE) -> dict[str, Any]:
    """The launchable as written, with its `${REPOSITORY}` and the like.

    Raises:
        LaunchableError: there is no such file, or it is no YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise LaunchableError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise LaunchableError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise LaunchableError(f"{path.name} must hold `key: value` lines")
    return values


def schema_problems(values: dict[str, Any]) -> list[str]:
    """The first thing that the schema has against the file, if anything."""
    import fastjsonschema

    try:
        fastjsonschema.validate(json.loads(SCHEMA.read_text()), values)
    except fastjsonschema.JsonSchemaValueException as error:
        message = error.message.removeprefix("data.")
        value = f", not {str(error.value)[:60]!r}" if isinstance(error.value, str | int) else ""
        return [re.sub(r"^data ", "top level ", message)[:200] + value]
    return []


def request_problems(body: dict[str, Any]) -> list[str]:
    """What is wrong with a rendered request that a schema cannot express."""
    build, workspace = body["buildRequest"], body["createWorkspaceRequest"]
    kinds = [kind for kind in BUILDS if kind in build]
    problems = []
    if len(kinds) != 1:
        problems.append(f"buildRequest: exactly one of {', '.join(BUILDS)}, not {kinds or 'none'}")
    if script := (build.get("vmBuild") or {}).get("lifeCycleScriptAttr", {}).get("script"):
        problems += script_problems(script)
    image = (build.get("containerBuild") or {}).get("containerUrl")
    if image and not re.match(r"(https://)?[\w.-]+(/[\w.-]+)*(:[\w.-]+)?$", image):
        problems.append(f"containerUrl: {image!r} names no image")
    if compose := build.get("dockerCompose"):
        problems += compose_problems(compose, [p["name"] for p in build.get("parameters", [])])
    if file := body.get("file"):
        problems += file_problems("file.url", file["url"])
    if "workspaceGroupId" in workspace and "cloudCredId" in workspace:
        problems.append("createWorkspaceRequest: workspaceGroupId or cloudCredId, not both")
    return problems + port_problems(build.get("ports", []), workspace.get("firewallRules", []))


def script_problems(script: str) -> list[str]:
    """What is wrong with a set-up script for a machine."""
    problems = []
    if (size := len(script.encode())) > SCRIPT_LIMIT:
        problems.append(f"the set-up script has {size:,} bytes, 16,384 at most")
    if not script.lstrip().startswith("#!/bin/bash"):
        problems.append("the set-up script must start with #!/bin/bash")
    return problems


def file_problems(where: str, url: str) -> list[str]:
    """What is wrong with the address of a public file or repository."""
    if not PUBLIC_GIT.match(url):
        return [f"{where}: {url!r} is no public GitHub or GitLab file"]
    if url.endswith("/") or "/tree/" in url:
        return [f"{where}: {url!r} is a folder; name a file or the repository"]
    return []


def compose_problems(compose: dict, parameters: list[str]) -> list[str]:
    """What is wrong with a Compose build: its source, its services, its variables."""
    if ("yamlString" in compose) == ("fileUrl" in compose):
        return ["dockerCompose: exactly one of yamlString and fileUrl"]
    # Brev's clients pass environmentVariables as they are, without looking for ${...} in them.
    problems = [
        f"environmentVariables.{name}: {value} would arrive as that text; leave it out, "
        "parameters are passed without it"
        for name, value in compose.get("environmentVariables", {}).items()
        if "$" in value
    ]
    if "fileUrl" in compose:
        return problems + file_problems("fileUrl", compose["fileUrl"])
    text = compose["yamlString"]
    try:
        services = yaml.safe_load(text)["services"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        return [f"dockerCompose.yamlString is no compose file: {str(error).splitlines()[0]}"]
    for name, service in services.items():
        problems += [f"service {name}: {problem}" for problem in service_problems(service)]
    # Compose replaces ${NAME} by a parameter and $$ by a dollar; it refuses any other dollar.
    used = [a or b for a, b in re.findall(r"\$(?:\{(\w+)[^}]*\}|(\w*))", text.replace("$$", ""))]
    problems += [f"parameter {p} is asked for but never used" for p in parameters if p not in used]
    unknown = sorted({name for name in used if name not in parameters})
    return problems + [f"compose: ${name or ' '} is no parameter; write $$" for name in unknown]


def service_problems(service: dict) -> list[str]:
    """What is wrong with one Compose service: its image, its GPU."""
    problems = []
    image = service.get("image", "")
    if not re.match(r"[\w.-]+(/[\w.-]+)+:[\w.-]+(@sha256:[0-9a-f]{64})?$", image):
        problems.append(f"image {image!r} has no registry path and tag")
    if image.endswith(":latest"):
        problems.append(f"pin {image!r} to a version")
    reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {})
    if not reserved.get("devices"):
        problems.append("no GPU is reserved for it")
    return problems


def port_problems(links: list[dict], rules: list[dict]) -> list[str]:
    """What is wrong with the links and firewall rules: nothing may claim a port twice."""
    problems = []
    claims = [(f"port {link['port']} ({link['name']})", link["port"]) for link in links]
    claims += [(f"firewall rule {rule['port']}", rule["port"]) for rule in rules]
    taken: list[tuple[str, int, int]] = []
    for claim, port in claims:
        start, _, end = port.partition("-")
        first, last = int(start), int(end or start)
        if last > 65535 or (end and first >= last):
            problems.append(f"{claim}: a range must rise, and end at 65535")
        problems += [
            f"{claim} conflicts with {other}"
            for other, low, high in taken
            if first <= high and low <= last
        ]
        taken.append((claim, first, last))
    for rule in rules:
        if rule["allowedIPs"] == "all":
            problems.append(f"firewall rule {rule['port']} is open to the world")
    names = [link["name"] for link in links]
    problems += [f"ports: {name} stands twice" for name in sorted(set(names))
                 if names.count(name) > 1]  # fmt: skip
    buttons = [link for link in links if link.get("labels", {}).get("cta-enabled") == "true"]
    if len(buttons) > BUTTON_LIMIT:
        problems.append(f"ports: {len(buttons)} show as a button, {BUTTON_LIMIT} at most")
    return problems
