"""Send a finished run's adapter or merged model to the Hugging Face hub, with its card.

    python -m scripts.export push --config outputs/<run>/config.yaml             # only shows it
    python -m scripts.export push --config outputs/<run>/config.yaml --send

What would be sent is put together in `hub/` of the run folder, large files as links, and shown;
nothing leaves this machine without `--send`. The card is made from what the run left
(`model_card.md` is its template), and huggingface_hub does the upload.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, ModelCard, constants, get_token

from scripts.adapter import copy_config, require_adapter
from scripts.base import ROOT, InputError, RecipeError, one_line
from scripts.config import Config, config_from_args
from scripts.hub import patiently, status_of
from scripts.model_card import (
    DATA_CARD,
    base_name,
    data_card,
    licence_text,
    make_card,
    repo_for,
    terms_of,
)
from scripts.proof import require_merged

# All that is ever sent of a model's folder: what loads it. Optimizer states, checkpoints and logs
# have no way in.
LOADS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model", "chat_template.jinja",
)  # fmt: skip
NAME_A_FOLDER = ("adapter_config.json", "config.json", "tokenizer_config.json")
# Names of variables that hold secrets, and what tokens look like.
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}"
    r"|wandb_v1_\w{20,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SHORTEST_SECRET = 8  # letters; a shorter value stands in any text by chance


class PushError(RecipeError):
    """The hub does not take it, or what is to be sent must not leave this machine."""


class Parcel(NamedTuple):
    """What is to be sent: a folder with the card in it, and where it goes."""

    folder: Path
    repo: str
    card: ModelCard


def make_parcel(
    cfg: Config, what: str, *, repo: str | None = None, base: str | None = None,
    licence: str | None = None, licence_file: Path | None = None,
) -> Parcel:  # fmt: skip
    """Put together what is to be sent in `hub/adapter` or `hub/merged` of the run folder.

    `what` is `adapter` or `merged`, and the rest as the command's options. The hub is asked only
    for the text of a licence that must be sent along.

    Raises:
        RecipeError: something is missing, is named as the licence does not allow, or would give a
            secret or a place of this machine away.
    """
    if what == "adapter" and not cfg.model.use_peft:
        raise InputError("--what adapter: this run has none (use_peft: false); take --what merged")
    source = require_merged(cfg) if what == "merged" else require_adapter(cfg)
    base = base_name(cfg, base)
    if what == "adapter" and "/" not in base:
        raise InputError(
            f"the base model is a folder of this machine ({base}), where nobody finds it: name the "
            "hub's model with --base owner/model, or push --what merged"
        )
    weights = Path(cfg.model.model_name_or_path).expanduser()
    terms = terms_of(base, given=licence, folder=weights if weights.is_dir() else source)
    repo = repo_for(cfg, what, base, terms, repo)
    folder = cfg.run_dir / "hub" / what
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name in NAME_A_FOLDER:
            copy_config(path, folder / path.name, base)
        elif path.is_file() and any(path.match(pattern) for pattern in LOADS):
            (folder / path.name).symlink_to(path.resolve())
    for extra in (cfg.run_dir / "figures" / "before_after.png", cfg.run_dir / "evaluation.json"):
        if extra.is_file():
            shutil.copy(extra, folder / extra.name)
    if along := data_card(cfg):
        shutil.copy(along, folder / DATA_CARD)
    if terms.notice:
        shutil.copy(licence_text(base, weights, licence_file), folder / "LICENSE")
        (folder / "NOTICE").write_text(terms.notice + "\n")
    card = make_card(cfg, what=what, repo=repo, base=base, terms=terms)
    card.save(folder / "README.md")
    refuse_leaks(folder)
    return Parcel(folder, repo, card)


def secrets_here() -> set[str]:
    """The secrets at hand: the hub's token, variables whose names say what they are, and what
    `wandb login` and others keep in ~/.netrc."""
    values = {get_token() or ""}
    with suppress(OSError, NetrcParseError):
        values |= {password or "" for _, _, password in netrc().hosts.values()}
    values |= {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    return {value for value in values if len(value) >= SHORTEST_SECRET}


def refuse_leaks(folder: Path) -> None:
    """Raise a `PushError` if a file of `folder` holds a secret, or a path of this machine.

    It names the file and the line, and does not show the secret.
    """
    secrets = secrets_here()
    places = {f"{place}/" for place in (Path.home(), ROOT) if len(place.parts) > 1}
    for path in sorted(folder.iterdir()):
        for number, line in enumerate(_texts(path), start=1):
            found, cure = "", ""
            if any(secret in line for secret in secrets) or SECRET_SHAPES.search(line):
                found, cure = "what looks like a token or key", ", and revoke it if it was shown"
            elif place := next((place for place in places if place in line), None):
                found = f"a path of this machine ({place})"
            if found:
                raise PushError(
                    f"{path.name}, line {number}, holds {found}; nothing was sent. Take it out of "
                    f"{path.resolve()}{cure}"
                )


def _texts(path: Path) -> Iterator[str]:
    """The lines of a text, or the header of a file of weights; nothing of pictures."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            yield file.read(min(size, 100_000_000)).decode(errors="replace")
    elif path.suffix != ".png":
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def send(parcel: Parcel, *, private: bool = True, update: bool = False) -> str:
    """Make the repository and upload the folder; returns the address of the commit.

    A repository that holds something is left alone, unless `update` adds a commit to it. What has
    arrived of an upload that broke off is not sent again.

    Raises:
        RecipeError: the hub refuses, or the upload broke off; the message says what to do.
    """
    api, repo = HfApi(), parcel.repo
    with _hub_errors(repo):
        patiently(lambda: api.create_repo(repo, private=private, exist_ok=True))
        info = patiently(lambda: api.model_info(repo))
        files = [f.rfilename for f in info.siblings or [] if f.rfilename != ".gitattributes"]
        if private and not info.private:
            raise PushError(
                f"{repo} is public: add --public if you mean that, or name another with --repo"
            )
        if files and not update:
            raise PushError(
                f"{repo} holds {len(files)} files ({files[0]}, ...): add this model to them with "
                "--update, or name another with --repo"
            )
        done = patiently(  # which has the hub check the card before anything is uploaded
            lambda: api.upload_folder(
                repo_id=repo, folder_path=parcel.folder, commit_message="Add the tuned model"
            )
        )
    return str(done.commit_url)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """An error of the hub or of the network becomes a `PushError` that says what to do."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # httpx's, the hub's and sockets' errors share no nearer base
        cause: BaseException = error
        while status_of(cause) is None and cause.__cause__ is not None:
            cause = cause.__cause__
        if (status := status_of(cause)) is not None:
            page = f"{constants.ENDPOINT}/settings/tokens"
            cure = f"; check at {page} that your token may write to {repo}"
            raise PushError(
                f"the hub refuses ({status}): {one_line(cause)}{cure * (status in (401, 403))}"
            ) from error
        raise PushError(
            f"the upload broke off ({type(cause).__name__}: {one_line(cause)}). What arrived is "
            "kept: the same command goes on from there"
        ) from error


def listing(parcel: Parcel, private: bool) -> str:
    """The files of a parcel with their sizes, and where they would go."""
    sizes = {path.name: path.stat().st_size for path in sorted(parcel.folder.iterdir())}
    wide = max(map(len, sizes))
    lines = [f"  {name:<{wide}}  {size / 1e6:>10,.2f} MB" for name, size in sizes.items()]
    head = (
        f"{constants.ENDPOINT}/{parcel.repo} ({'private' if private else 'PUBLIC'}), "
        f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB:"
    )
    return "\n".join([head, *lines])


def push(args: argparse.Namespace) -> None:
    """The action `push` of `python -m scripts.export`."""
    cfg = config_from_args(args, may_lack_gpu=True)
    what = args.what or ("adapter" if cfg.model.use_peft else "merged")
    options = {"base": args.base, "licence": args.licence, "licence_file": args.licence_file}
    parcel, private = make_parcel(cfg, what, repo=args.repo, **options), not args.public
    if args.send and not get_token():
        raise PushError(
            "no token for the hub: make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it"
        )
    if args.send and "/" not in parcel.repo:  # the card names the whole address
        with _hub_errors(parcel.repo):
            owner = patiently(HfApi().whoami)["name"]
        parcel = make_parcel(cfg, what, repo=f"{owner}/{parcel.repo}", **options)
    print(listing(parcel, private))
    if args.send:
        print(f"sent: {send(parcel, private=private, update=args.update)}")
    else:
        print(f"\n{parcel.folder / 'README.md'}:\n\n{parcel.card.content}")
        print("Nothing was sent: this is what --send would send.")
