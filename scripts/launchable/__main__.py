"""Check, render, create and update the Brev launchable.

    python -m scripts.launchable validate | render | compose | show | create | update [options]

`create` and `update` use the login of the Brev CLI (never printed), look up who provides the
machine, read the launchable back, and compare.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scripts.cli import command
from scripts.launchable import client, publishing
from scripts.launchable.console import by_hand, how_to_deploy
from scripts.launchable.definition import FILE, LaunchableError, load
from scripts.launchable.rendering import render, repository

ACTIONS = ("validate", "render", "compose", "show", "create", "update")


def options() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.launchable", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("action", choices=ACTIONS)
    add("--file", type=Path, default=FILE)
    add("--repository", help="public git URL (default: this checkout's origin)")
    add("--instance", type=int, default=0, metavar="N", help="take the Nth fallback")
    add("--org", help="organization, org-… (default: the Brev CLI's; `brev ls orgs`)")
    add("--id", help="launchable, env-… (update, show)")
    provider = parser.add_mutually_exclusive_group()
    provider.add_argument("--workspace-group", metavar="ID", help="who provides the machine")
    provider.add_argument("--cloud-cred", metavar="ID", help="the same, by cloud credential")
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


def publish(body: dict[str, Any], args: argparse.Namespace) -> None:
    """Create or update the launchable and say how to deploy it."""
    if args.action == "update" and not args.id:
        raise LaunchableError("update needs --id")
    login = client.login()
    if not (org := args.org or login.organization):
        raise LaunchableError(f"{args.action} needs --org org-…: `brev ls orgs` lists yours")
    remarks = publishing.place(body["createWorkspaceRequest"], org, login.token)
    existing = args.id if args.action == "update" else None
    published = publishing.publish(body, org, login.token, existing)
    print(f"{published.id} is saved in {org}" + ("" if published.remarks else ", as it was sent"))
    for remark in remarks + published.remarks:
        print(f"remark: {remark}")
    print(how_to_deploy(published.id, body), by_hand(body), sep="\n\n")


def main() -> None:
    args = options().parse_args()
    if args.action == "show" and args.id:
        try:
            token = client.login().token
        except LaunchableError:
            token = None  # a public one is shown to anybody
        print(json.dumps(publishing.read_back(args.id, token), indent=2))
        return
    values = load(args.file)
    if args.action == "validate":
        return validate(values, args)
    body = render(values, repository(args.repository), args.instance)
    if args.workspace_group:
        body["createWorkspaceRequest"]["workspaceGroupId"] = args.workspace_group
    if args.cloud_cred:
        body["createWorkspaceRequest"]["cloudCredId"] = args.cloud_cred
    if args.action == "render":
        print(json.dumps(body, indent=2))
    elif args.action == "compose":
        print(body["buildRequest"].get("dockerCompose", {}).get("yamlString", ""))
    elif args.action == "show":
        print(by_hand(body))
    else:
        publish(body, args)


if __name__ == "__main__":
    command(main)
