"""Check the Brev launchable, and print the clicks that make one in Brev's console.

    python -m scripts.launchable [--repository https://github.com/NAME/REPO]

`brev-launchable.yaml` is a Docker Compose file; what only Brev needs stands under its `x-brev` key.
This command creates nothing, and needs neither Docker nor a Brev account.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("launchable")

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from scripts.base import ROOT, InputError, RecipeError, one_line

FILE = ROOT / "brev-launchable.yaml"
BREV_KEYS = {"description", "instance", "disk", "link", "parameters"}
REPOSITORY = re.compile(r"https://(github|gitlab)\.com/[\w.-]+/[\w.-]+")
PLACEHOLDER = "https://github.com/NAME/REPO"


class LaunchableError(RecipeError):
    """The launchable does not work as it is written: what is wrong, and how to fix it."""


def read(path: Path) -> dict[str, Any]:
    """The file's keys and values.

    Raises:
        InputError: there is no such file, or it is no Compose file.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} could not be read: {one_line(error)}") from None
    services = values.get("services") if isinstance(values, dict) else None
    if not isinstance(services, dict) or not all(isinstance(s, dict) for s in services.values()):
        raise InputError(f"{path.name} must have `services`, as a Docker Compose file has")
    return values


def variables(values: dict[str, Any]) -> dict[str, str | None]:
    """The variables that Compose fills in, with their defaults; None where there is no default."""
    text = json.dumps(values["services"])
    return {m[1]: m[2] for m in re.finditer(r"(?<!\$)\$\{(\w+)(?::-([^}]*))?\}", text)}


def faults_of(values: dict[str, Any]) -> Iterator[str]:
    """What a machine that runs the file, or Brev, would not accept, or would leave open."""
    brev = values.get("x-brev")
    if not isinstance(brev, dict) or set(brev) != BREV_KEYS:
        yield f"`x-brev` must have exactly the keys {', '.join(sorted(BREV_KEYS))}"
        return
    for name, service in values["services"].items():
        if re.search(r":latest$|^[^:]*$", str(service.get("image", ""))):
            yield f"service {name}: the image needs a fixed tag, not latest"
        reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        if not reserved.get("devices"):
            yield f"service {name} reserves no GPU (deploy.resources.reservations)"
    known, required = variables(values), {p["name"]: p["required"] for p in brev["parameters"]}
    for name in required.keys() - known:
        yield f"parameter {name} is used nowhere"
    for name, default in known.items():
        if default is None and not required.get(name):
            yield f"${{{name}}} has no default and is no required parameter"
    if not required.get("JUPYTER_TOKEN"):
        yield "JUPYTER_TOKEN must be a required parameter: it protects the notebook"
    port = brev["link"]["port"]
    published = [
        str(p) for service in values["services"].values() for p in service.get("ports", [])
    ]
    if not any(p.endswith(f":{port}") for p in published):
        yield f"no service publishes port {port}, which the link leads to"


def check_file(values: dict[str, Any], path: Path = FILE) -> None:
    """Check the file; by Docker Compose too, where it is installed.

    Raises:
        LaunchableError: with everything that is wrong.
    """
    if found := list(faults_of(values)):
        raise LaunchableError(f"{path.name}: {'; '.join(found)}")
    compose = [shutil.which("docker"), "compose"]
    if compose[0] and not subprocess.run([*compose, "version"], capture_output=True).returncode:
        check = [*compose, "-f", path, "config", "-q"]
        done = subprocess.run(check, capture_output=True, text=True)
        if done.returncode:
            raise LaunchableError(f"docker compose: {' '.join(done.stderr.split())[:500]}")


def clicks(values: dict[str, Any], repository: str) -> str:
    """How to make the launchable in Brev's console, in the words on its buttons."""
    brev = values["x-brev"]
    asked = ", ".join(
        p["name"] + (" (required)" if p["required"] else "") for p in brev["parameters"]
    )
    steps = [
        "https://brev.nvidia.com: Launchables, Create Launchable",
        f'Code: "I have code files in a git repository", {repository}, "With container(s)", Next',
        'Container: "Docker Compose", "I have an existing docker-compose.yaml file", "Provide '
        f'GitHub/GitLab URL", {repository}/blob/main/{FILE.name}, Validate, Next',
        f"Parameters, as text: {asked}",
        f'Services: "No, I don\'t want Jupyter"; Secure Links: {brev["link"]["name"]} on port '
        f"{brev['link']['port']}, shown as a button; delete the other links, Next",
        f"Compute: {brev['instance']}, Data Storage {brev['disk']} GiB, Next",
        f"Review: name {values['name']}, Anyone with the link, Create Launchable",
        "View Deploy Page: copy its address into the badge of your README (docs/brev.md)",
    ]
    return "\n".join(f"  {number}. {step}" for number, step in enumerate(steps, start=1))


def main(args: argparse.Namespace) -> None:
    values = read(args.file)
    check_file(values, args.file)
    repository = args.repository or variables(values).get("REPOSITORY") or PLACEHOLDER
    repository = repository.rstrip("/").removesuffix(".git")
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} is no public GitHub or GitLab repository ({PLACEHOLDER})")
    print(f"{args.file.name} is valid. To make the launchable:\n\n{clicks(values, repository)}")
    if variables(values).get("REPOSITORY") == PLACEHOLDER:
        print(
            f"\nBefore: write your fork's address for {PLACEHOLDER} in {args.file.name}, and push"
        )
