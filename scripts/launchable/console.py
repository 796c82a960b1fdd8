"""What to do with a launchable: its deploy link and command, and how to make it by hand."""

from __future__ import annotations

from typing import Any

DEPLOY = "https://brev.nvidia.com/launchable/deploy?launchableID={id}"
BADGE = "https://brev-assets.s3.us-west-1.amazonaws.com/nv-lb-dark.svg"


def how_to_deploy(identity: str, body: dict[str, Any]) -> str:
    """The link, the badge for a README, and the command that passes the parameters on."""
    link = DEPLOY.format(id=identity)
    required, optional = [], []
    for parameter in body["buildRequest"].get("parameters", []):
        option = f'--param {parameter["name"]}="${parameter["name"]}"'
        (required if parameter["required"] else optional).append(option)
    command = " ".join([f"brev launch {identity}", *required, *(f"[{o}]" for o in optional)])
    return "\n".join(
        [
            f"deploy:  {link}",
            f"badge:   [![Deploy on Brev]({BADGE})]({link})",
            f"command: {command}",
            "         Where the CLI has no `launch` yet, deploy with the link: `brev create",
            "         --launchable` passes no parameters on.",
        ]
    )


def by_hand(body: dict[str, Any]) -> str:
    """The same by hand, in Brev's console."""
    workspace, build = body["createWorkspaceRequest"], body["buildRequest"]
    names = ", ".join(p["name"] + ("" if p["required"] else " (optional)")
                      for p in build.get("parameters", []))  # fmt: skip
    ports = ", ".join(f"{p['name']} {p['port']}" for p in build.get("ports", []))
    disk = f", disk {workspace['storage']} GiB" if "storage" in workspace else ", its fixed disk"
    runtime = "as buildRequest says"
    if "dockerCompose" in build:
        runtime = "Docker Compose, and paste `python -m scripts.launchable compose`"
    steps = [
        f"Code: paste {body.get('file', {}).get('url', 'the repository')}",
        f"Runtime: {runtime}",
        f"Parameters: {names}",
        f"JupyterLab: no; secure links: {ports}",
        f"Compute: {workspace['instanceType']}{disk}",
        f"Name: {body['name']}; access: {body['viewAccess']}; create, and copy the link",
    ]
    title = "The same by hand, at https://brev.nvidia.com -> Launchables -> Create Launchable:"
    return "\n".join([title, *(f"  {i}. {step}" for i, step in enumerate(steps, start=1))])
