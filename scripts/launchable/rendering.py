"""From the launchable as written to the exact request, with a repository and a machine in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from textwrap import indent
from typing import Any

from scripts.base import ROOT
from scripts.launchable.definition import (
    PUBLIC_GIT,
    LaunchableError,
    request_problems,
    schema_problems,
)

START_SCRIPT = Path(__file__).with_name("start.sh")
OURS = ("config", "fallbacks")  # keys of the file that are not the API's


def repository(given: str | None = None) -> str:
    """The public git URL: `given`, or this checkout's `origin`.

    Raises:
        LaunchableError: it is not on GitHub or GitLab, so that Brev could not clone it.
    """
    if given is None:
        done = subprocess.run(
            ["git", "remote", "get-url", "origin"], cwd=ROOT, capture_output=True, text=True
        )
        given = re.sub(r"^git@([\w.]+):", r"https://\1/", done.stdout.strip())
    given = given.rstrip("/").removesuffix(".git")
    if not PUBLIC_GIT.match(given):
        raise LaunchableError(
            f"repository {given or '(no origin)'!r} is no public GitHub or GitLab URL; give yours "
            "with --repository https://github.com/NAME/REPO"
        )
    return given


def render(values: dict[str, Any], repo: str, instance: int = 0) -> dict[str, Any]:
    """The exact body of the request; `instance` N > 0 takes the Nth fallback.

    Raises:
        LaunchableError: the launchable is not valid, or there is no such fallback.
    """
    if not (problems := schema_problems(values)):
        body = request_body(values, repo, instance)
        problems = request_problems(body)
    if problems:
        raise LaunchableError("brev-launchable.yaml: " + "; ".join(problems))
    return body


def request_body(values: dict[str, Any], repo: str, instance: int = 0) -> dict[str, Any]:
    """The body of the request, unchecked.

    Raises:
        LaunchableError: there is no such fallback.
    """
    fallbacks = values.get("fallbacks", [])
    if not 0 <= instance <= len(fallbacks):
        raise LaunchableError(f"--instance {instance}: there are {len(fallbacks)} fallbacks")
    machine = dict(fallbacks[instance - 1]) if instance else {}
    config = machine.pop("config", values.get("config", ""))
    body = filled({k: v for k, v in values.items() if k not in OURS},
                  {"REPOSITORY": repo, "CONFIG": config})  # fmt: skip
    if instance:  # type and disk are the fallback's own; a type with a fixed disk names none
        body["createWorkspaceRequest"].pop("storage", None)
        body["createWorkspaceRequest"] |= machine
    if "file" in body:
        body["file"]["url"] = raw_url(body["file"]["url"])
    compose = body["buildRequest"].get("dockerCompose", {})
    if "yamlString" in compose:
        compose["yamlString"] = with_start_script(compose["yamlString"])
    return body


def filled(values: Any, words: dict[str, str]) -> Any:
    """`values` with the `${…}` of `words` replaced; others, and `$$`, are for Docker Compose."""
    if isinstance(values, dict):
        return {key: filled(value, words) for key, value in values.items()}
    if isinstance(values, list):
        return [filled(value, words) for value in values]
    if isinstance(values, str):
        for name, word in words.items():
            values = values.replace(f"${{{name}}}", word)
    return values


def raw_url(url: str) -> str:
    """A file's address in the form in which Brev keeps it: the file itself, not its page."""
    slash = "/-/" if url.startswith("https://gitlab.com/") else "/"
    return re.sub(r"/(-/)?(blob|raw)/", f"{slash}raw/", url, count=1)


def with_start_script(compose: str) -> str:
    """The compose file with the text of `start.sh` in the place of `- ${START_SCRIPT}`."""
    script = START_SCRIPT.read_text().replace("$", "$$")  # as Compose wants a dollar written

    def block(match: re.Match) -> str:
        return f"{match[1]}- |\n" + indent(script, match[1] + "  ")

    return re.sub(r"^( *)- \$\{START_SCRIPT\}\n", block, compose, flags=re.MULTILINE)
