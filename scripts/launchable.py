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
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from scripts.base import ROOT, InputError, RecipeError

FILE = ROOT / "brev-launchable.yaml"
COMPOSE_KEYS = {"name", "services", "volumes", "networks", "configs", "secrets"}
BREV_KEYS = {"description", "instance", "disk", "link", "parameters"}
REPOSITORY = re.compile(r"https://(github|gitlab)\.com/[\w.-]+/[\w.-]+")
PLACEHOLDER = "https://github.com/NAME/REPO"
# Compose fills in ${NAME} and ${NAME:-default}; a dollar that is meant is written $$.
VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::-([^}]*))?\}|)")


class LaunchableError(RecipeError):
    """The launchable does not work as it is written: what is wrong, and how to fix it."""


def read(path: Path) -> dict[str, Any]:
    """The file's keys and values.

    Raises:
        InputError: there is no such file, or it isn't YAML with `key: value` lines.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path.name} must have `key: value` lines")
    return values


def texts(values: Any) -> list[str]:
    """Every text in nested lists and mappings."""
    if isinstance(values, dict | list):
        inner = values.values() if isinstance(values, dict) else values
        return [text for value in inner for text in texts(value)]
    return [values] if isinstance(values, str) else []


def compose_problems(values: dict[str, Any]) -> list[str]:
    """What Docker Compose, or a machine that runs the file, would not accept."""
    problems = [
        f"`{key}` is no key of a Compose file; extra keys begin with x-"
        for key in values
        if key not in COMPOSE_KEYS and not str(key).startswith("x-")
    ]
    services = values.get("services")
    if not isinstance(services, dict) or not services:
        return [*problems, "`services` must hold at least one service"]
    for name, service in services.items():
        if not isinstance(service, dict):
            problems.append(f"service {name} must have `key: value` lines")
            continue
        image = str(service.get("image", ""))
        if not re.fullmatch(r"[\w./-]+:(?!latest$)[\w.-]+(@sha256:\w{64})?", image):
            problems.append(f"service {name}: image {image!r} needs a fixed tag, not latest")
        reserved = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        if not reserved.get("devices"):
            problems.append(f"service {name} reserves no GPU (deploy.resources.reservations)")
        for volume in service.get("volumes", []):
            source = str(volume).split(":")[0]
            if re.fullmatch(r"[\w-]+", source) and source not in (values.get("volumes") or {}):
                problems.append(f"service {name}: volume {source} is not under `volumes`")
    problems += [
        f"{text.strip()[:40]!r}: a dollar must be ${{NAME}}, ${{NAME:-default}} or $$"
        for text in texts(services)
        if any(match[0] == "$" for match in VARIABLE.finditer(text))
    ]
    return problems


def variables(values: dict[str, Any]) -> dict[str, str | None]:
    """The variables that Compose fills in, with their defaults; None where there is no default."""
    matches = (m for text in texts(values.get("services")) for m in VARIABLE.finditer(text))
    return {match[1]: match[2] for match in matches if match[1]}


def brev_problems(values: dict[str, Any]) -> list[str]:
    """What would go wrong on Brev: missing keys, lost parameters, an open or unreachable port."""
    brev = values.get("x-brev")
    if not isinstance(brev, dict) or set(brev) != BREV_KEYS:
        return [f"`x-brev` must have exactly the keys {', '.join(sorted(BREV_KEYS))}"]
    known = variables(values)
    parameters = {p["name"]: p["required"] for p in brev["parameters"]}
    problems = [f"parameter {name} is used nowhere" for name in parameters if name not in known]
    problems += [
        f"${{{name}}} has no default and is no required parameter"
        for name, default in known.items()
        if default is None and not parameters.get(name)
    ]
    if not parameters.get("JUPYTER_TOKEN"):
        problems.append("JUPYTER_TOKEN must be a required parameter: it protects the notebook")
    port = str(brev["link"]["port"])
    published = [str(p) for s in values["services"].values() for p in s.get("ports", [])]
    if not any(p.endswith(f":{port}") for p in published):
        problems.append(f"no service publishes port {port}, which the link leads to")
    return problems


def check_file(values: dict[str, Any], path: Path = FILE) -> None:
    """Check the file; by Docker Compose too, where it is installed.

    Raises:
        LaunchableError: with everything that is wrong.
    """
    if problems := compose_problems(values) or brev_problems(values):
        raise LaunchableError(f"{path.name}: {'; '.join(problems)}")
    if not (docker := shutil.which("docker")):
        return
    compose = [docker, "compose"]
    if subprocess.run([*compose, "version"], capture_output=True).returncode:
        return
    done = subprocess.run([*compose, "-f", path, "config", "-q"], capture_output=True, text=True)
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
