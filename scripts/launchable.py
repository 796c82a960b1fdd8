"""The Brev launchable of `brev-launchable.yaml`: check it, render it, create and update it.

    python -m scripts.launchable validate | render | show | create | update [options]

`create` and `update` use the credentials of `brev login` (never printed), read the launchable back,
and compare. The API is the one that Brev's own CLI talks to; BREV_API_URL names another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from pathlib import Path
from string import Template
from typing import Any

import requests
import yaml
from jsonschema import Draft202012Validator

from scripts.cli import ROOT, RecipeError, command

FILE = ROOT / "brev-launchable.yaml"
SCHEMA = ROOT / "configs" / "brev-launchable.schema.json"
API = "https://brevapi.us-west-2-prod.control-plane.brev.dev/api"
DEPLOY = "https://brev.nvidia.com/launchable/deploy?launchableID={id}"
BUILDS = ("vmBuild", "containerBuild", "dockerCompose")
SCRIPT_LIMIT = 16 * 1024  # bytes that the API takes of a set-up script
TIMEOUT = 30
PUBLIC_GIT = re.compile(r"https://(github\.com|gitlab\.com)/[\w.-]+/[\w./-]+$")


class LaunchableError(RecipeError):
    """The launchable cannot be made as it is: what, where and how to mend it."""


def load(path: Path = FILE) -> dict[str, Any]:
    """The launchable as written, `${REPOSITORY}` and all.

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


def repository(given: str | None = None) -> str:
    """The public git URL: `given`, or this checkout's `origin`.

    Raises:
        LaunchableError: it is none on GitHub or GitLab, so that Brev could not clone it.
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


def problems(values: dict[str, Any], repo: str) -> list[str]:
    """All that is wrong with the launchable: the schema's word, then what a schema can't tell."""
    found = [
        f"{'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message[:160]}"
        for error in Draft202012Validator(json.loads(SCHEMA.read_text())).iter_errors(values)
    ]
    if found:
        return sorted(found)
    build = filled(values, repo)["buildRequest"]
    kinds = [kind for kind in BUILDS if kind in build]
    if len(kinds) != 1:
        found.append(f"buildRequest: exactly one of {', '.join(BUILDS)}, not {kinds or 'none'}")
    script = (build.get("vmBuild") or {}).get("lifeCycleScriptAttr", {}).get("script", "")
    if len(script.encode()) > SCRIPT_LIMIT:
        found.append(f"the set-up script has {len(script.encode()):,} bytes, 16,384 at most")
    image = (build.get("containerBuild") or {}).get("containerUrl")
    if image and not re.match(r"(https://)?[\w.-]+(/[\w.-]+)*(:[\w.-]+)?$", image):
        found.append(f"containerUrl: {image!r} names no image")
    if compose := build.get("dockerCompose"):
        found += compose_problems(compose, [p["name"] for p in build.get("parameters", [])])
    if (file := values.get("file")) and not PUBLIC_GIT.match(filled(file, repo)["url"]):
        found.append(f"file.url: {file['url']!r} is no public GitHub or GitLab file")
    workspace = values["createWorkspaceRequest"]
    if "workspaceGroupId" in workspace and "cloudCredId" in workspace:
        found.append("createWorkspaceRequest: workspaceGroupId or cloudCredId, not both")
    open_ports = [r["port"] for r in workspace.get("firewallRules", []) if r["allowedIPs"] == "all"]
    if open_ports:
        found.append(f"firewallRules: port {', '.join(open_ports)} is open to the world")
    return found


def compose_problems(compose: dict, parameters: list[str]) -> list[str]:
    """What is wrong with a compose service: its source, its images, its GPU, its parameters."""
    if ("yamlString" in compose) == ("fileUrl" in compose):
        return ["dockerCompose: exactly one of yamlString and fileUrl"]
    if "fileUrl" in compose:
        public = PUBLIC_GIT.match(compose["fileUrl"])
        return [] if public else [f"fileUrl: {compose['fileUrl']!r} is no public file"]
    try:
        services = yaml.safe_load(compose["yamlString"])["services"]
    except (yaml.YAMLError, TypeError, KeyError) as error:
        return [f"dockerCompose.yamlString is no compose file: {str(error).splitlines()[0]}"]
    found = []
    for name, service in services.items():
        image = service.get("image", "")
        if not re.match(r"[\w.-]+(/[\w.-]+)+:[\w.-]+$", image):
            found.append(f"service {name}: image {image!r} has no registry path and tag")
        if image.endswith(":latest"):
            found.append(f"service {name}: pin {image!r} to a version")
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {})
        if not devices.get("devices"):
            found.append(f"service {name}: no GPU is reserved for it")
    text = compose["yamlString"] + str(compose.get("environmentVariables", ""))
    found += [f"parameter {p} is asked for but never used" for p in parameters if p not in text]
    return found


def filled(values: Any, repo: str) -> Any:
    """`values` with `${REPOSITORY}` replaced; other `${…}` are for Docker Compose."""
    if isinstance(values, dict):
        return {key: filled(value, repo) for key, value in values.items()}
    if isinstance(values, list):
        return [filled(value, repo) for value in values]
    return Template(values).safe_substitute(REPOSITORY=repo) if isinstance(values, str) else values


def render(values: dict[str, Any], repo: str, instance: int = 0) -> dict[str, Any]:
    """The exact body of the request; `instance` N > 0 takes the Nth fallback.

    Raises:
        LaunchableError: the launchable is not valid, or there is no such fallback.
    """
    wrong = problems(values, repo)
    if wrong:
        raise LaunchableError("brev-launchable.yaml: " + "; ".join(wrong))
    body = filled({k: v for k, v in values.items() if k != "fallbacks"}, repo)
    if instance:
        choices = values.get("fallbacks", [])
        if instance > len(choices):
            raise LaunchableError(f"--instance {instance}: there are {len(choices)} fallbacks")
        body["createWorkspaceRequest"]["instanceType"] = choices[instance - 1]
    return body


def credentials() -> str:
    """The access token of `brev login`.

    Raises:
        LaunchableError: there is none.
    """
    path = Path.home() / ".brev" / "credentials.json"
    try:
        return json.loads(path.read_text())["access_token"]
    except (OSError, ValueError, LookupError, TypeError):
        raise LaunchableError(f"no access token in {path}: run `brev login`") from None


CURES = {
    401: "the login has run out: run `brev login`",
    403: "this account may not do that in this organization: check --org",
    404: "there is no such launchable or organization: check the id and --org",
    409: "there is one of this name: change `name`, or use `update --id env-…`",
    422: "the API does not take it as it is; its own words stand above",
}


def call(method: str, path: str, token: str | None = None, body: dict | None = None) -> dict:
    """One request to the API; reading is tried again when the server fails, writing is not.

    Raises:
        LaunchableError: no answer, a refusal, or an answer that is no JSON object.
    """
    url = os.environ.get("BREV_API_URL", API).rstrip("/") + path
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    tries = 3 if method == "GET" else 1
    for attempt in range(1, tries + 1):
        try:
            answer = requests.request(method, url, json=body, headers=headers, timeout=TIMEOUT)
        except requests.RequestException as error:
            if attempt < tries:
                continue
            told = "did not answer in time" if isinstance(error, requests.Timeout) else "broke off"
            hint = (
                "" if method == "GET" else "; look in the console whether it was made all the same"
            )
            raise LaunchableError(f"{method} {path}: the server {told}{hint}") from None
        if answer.status_code < 500 or attempt == tries:
            break
    if not answer.ok:
        text = answer.text[:300].replace(token or "\0", "***")
        cure = CURES.get(answer.status_code, "the server's fault; try again later")
        raise LaunchableError(f"{method} {path}: {answer.status_code} {text}\n{cure}")
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LaunchableError(f"{method} {path}: the answer is no JSON object, cut short perhaps")
    return found


def differences(wanted: Any, found: Any, where: str = "") -> list[str]:
    """Where `found` lacks or contradicts what `wanted` says; what it has besides is no matter."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [d for k, v in wanted.items() for d in differences(v, found.get(k), f"{where}.{k}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [d for i, (w, f) in pairs for d in differences(w, f, f"{where}[{i}]")]
    return [] if wanted == found else [f"{where.lstrip('.')} is {str(found)[:60]!r}"]


def publish(body: dict, org: str, existing: str | None = None) -> str:
    """Create the launchable, or update the `existing` one; read it back, and return its id.

    Raises:
        LaunchableError: the API refuses, or what it keeps is not what was sent.
    """
    token = credentials()
    path = f"/organizations/{org}/v2/launchables"
    if existing:  # who may see it stays as it is: the API takes that only when creating
        change = {k: v for k, v in body.items() if k != "viewAccess"} | {"id": existing}
        found = call("POST", f"{path}/edit", token, change).get("id", existing)
    else:
        found = call("POST", path, token, body).get("id")
    if not found:
        raise LaunchableError("the API gave no id; look in the console whether it was made")
    kept = call("GET", f"/launchables/{found}", token)
    wrong = differences({k: v for k, v in body.items() if k != "viewAccess"}, kept)
    if wrong:
        raise LaunchableError(f"{found} was saved otherwise than sent: {'; '.join(wrong[:5])}")
    return found


def clicks(body: dict) -> str:
    """The same by hand, in Brev's console."""
    workspace, build = body["createWorkspaceRequest"], body["buildRequest"]
    names = ", ".join(p["name"] + ("" if p["required"] else " (optional)")
                      for p in build.get("parameters", []))  # fmt: skip
    ports = ", ".join(f"{p['name']} {p['port']}" for p in build.get("ports", []))
    return "\n".join(
        [
            "The same by hand, at https://brev.nvidia.com -> Launchables -> Create Launchable:",
            f"  1. Code: paste {body.get('file', {}).get('url', 'the repository')}",
            "  2. Runtime: Docker Compose, and paste `python -m scripts.launchable compose`"
            if "dockerCompose" in build else "  2. Runtime: as buildRequest says",
            f"  3. Parameters: {names}",
            f"  4. JupyterLab: no; ports: {ports}",
            f"  5. Compute: {workspace['instanceType']}, disk {workspace['storage']} GiB",
            f"  6. Name: {body['name']}; access: {body['viewAccess']}; create, and copy the link",
        ]
    )  # fmt: skip


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "action", choices=["validate", "render", "compose", "show", "create", "update"]
    )
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--repository", help="public git URL (default: this checkout's origin)")
    parser.add_argument("--instance", type=int, default=0, help="take the Nth fallback")
    parser.add_argument("--org", help="organization, org-… (create, update)")
    parser.add_argument("--id", help="launchable, env-… (update, show)")
    return parser


def validate(values: dict[str, Any], args: argparse.Namespace) -> None:
    """Say whether the launchable is valid; a checkout without a public origin is only a remark."""
    try:
        repo, remark = repository(args.repository), ""
    except LaunchableError as error:
        if args.repository:
            raise
        repo, remark = "https://github.com/NAME/REPO", f"\nremark: {error}"
    body = render(values, repo, args.instance)
    print(f"{args.file.name} is valid: {body['createWorkspaceRequest']['instanceType']}{remark}")


def main() -> None:
    args = options().parse_args()
    if args.action == "show" and args.id:
        print(json.dumps(call("GET", f"/launchables/{args.id}"), indent=2))
        return
    values = load(args.file)
    if args.action == "validate":
        return validate(values, args)
    body = render(values, repository(args.repository), args.instance)
    if args.action == "render":
        print(json.dumps(body, indent=2))
    elif args.action == "compose":
        print(body["buildRequest"].get("dockerCompose", {}).get("yamlString", ""))
    elif args.action == "show":
        print(clicks(body))
    else:
        needed = ["org"] if args.action == "create" else ["org", "id"]
        if missing := [name for name in needed if not getattr(args, name)]:
            raise LaunchableError(f"{args.action} needs --{' and --'.join(missing)}")
        found = publish(body, args.org, args.id if args.action == "update" else None)
        print(f"{found}: saved, read back, the same as sent")
        print("deploy:", DEPLOY.format(id=found))
        print(f"or:     brev create --launchable {found}\n\n{clicks(body)}")


if __name__ == "__main__":
    command(main)
