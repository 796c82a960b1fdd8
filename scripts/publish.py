"""Send a finished run's adapter or merged model to the Hugging Face hub, with its card.

    python -m scripts.export push --config outputs/<run>/config.yaml             # only shows it
    python -m scripts.export push --config outputs/<run>/config.yaml --send

What would be sent is put together in `hub/` of the run folder, large files as links, and shown;
nothing leaves this machine without `--send`. The card is made from what the run left
(`model_card.md` is its template), and huggingface_hub does the upload.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from scripts.adapter import require_adapter
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
# Names of variables that hold secrets, and what tokens look like.
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}"
    r"|wandb_v1_\w{20,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SHORTEST_SECRET = 8  # letters; a shorter value stands in any text by chance


class PushError(RecipeError):
    """The hub does not take it, or what is to be sent is not fit to leave."""


@dataclass(frozen=True)
class Parcel:
    """What is to be sent: a folder, its card, and where it goes."""

    folder: Path
    repo: str
    card: ModelCard
    private: bool

    def described(self) -> str:
        """The files with their sizes, and where they would go."""
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        wide = max(map(len, sizes))
        lines = [f"  {name:<{wide}}  {size / 1e6:>10,.2f} MB" for name, size in sizes.items()]
        head = (
            f"{constants.ENDPOINT}/{self.repo} ({'private' if self.private else 'PUBLIC'}), "
            f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB:"
        )
        return "\n".join([head, *lines])


def make_parcel(
    cfg: Config, what: str, *, repo: str | None = None, base: str | None = None,
    licence: str | None = None, licence_file: Path | None = None, private: bool = True,
) -> Parcel:  # fmt: skip
    """Put together what is to be sent in `hub/adapter` or `hub/merged` of the run folder.

    Large files are links into the run. `what` is `adapter` or `merged`, and the rest as the
    command's options. No network is asked, but for a licence that is not known here.

    Raises:
        RecipeError: something is missing, is named as the licence does not allow, or would give a
            secret or a place of this machine away.
    """
    if what == "adapter" and not cfg.model.use_peft:
        raise InputError("--what adapter: this run has none (use_peft: false); take --what merged")
    source = require_merged(cfg) if what == "merged" else require_adapter(cfg)
    base, on_hub = base_name(cfg, base)
    if what == "adapter" and not on_hub:
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
        if path.is_file() and any(path.match(pattern) for pattern in LOADS):
            _put(path, folder / path.name, base)
    for extra in (cfg.run_dir / "figures" / "before_after.png", cfg.run_dir / "evaluation.json"):
        if extra.is_file():
            shutil.copy(extra, folder / extra.name)
    if (along := data_card(cfg)[0]) is not None:
        shutil.copy(along, folder / DATA_CARD)
    if terms.notice:
        asked = str(weights) if weights.is_dir() and licence_file is None else base
        shutil.copy(licence_text(asked, licence_file), folder / "LICENSE")
        (folder / "NOTICE").write_text(terms.notice + "\n")
    card = make_card(cfg, what=what, repo=repo, base=base, base_on_hub=on_hub, terms=terms)
    card.save(folder / "README.md")
    refuse_leaks(folder)
    return Parcel(folder, repo, card, private)


def _put(path: Path, target: Path, base: str) -> None:
    """Link a file; those that name the folder which the base was loaded from are written anew."""
    if path.name not in ("adapter_config.json", "config.json", "tokenizer_config.json"):
        target.symlink_to(path.resolve())
        return
    values = json.loads(path.read_bytes())
    for key in ("_name_or_path", "name_or_path"):
        values.pop(key, None)
    if "base_model_name_or_path" in values:
        values["base_model_name_or_path"] = base
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def secrets_here() -> set[str]:
    """The secrets at hand: the hub's token, variables whose names say what they are, and what
    `wandb login` and others keep in ~/.netrc."""
    values = {get_token() or ""}
    with suppress(OSError, NetrcParseError):
        values |= {password or "" for _, _, password in netrc().hosts.values()}
    values |= {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    return {value for value in values if len(value) >= SHORTEST_SECRET}


def refuse_leaks(folder: Path) -> None:
    """Refuse to send a secret, or a path of this machine, in any file of `folder`.

    Of weights the header is read, which may hold texts.

    Raises:
        PushError: the file and the line, without the secret itself.
    """
    secrets = secrets_here()
    places = {f"{place}/" for place in (Path.home(), ROOT) if len(place.parts) > 1}
    for path in sorted(folder.iterdir()):
        for number, line in enumerate(_texts(path), start=1):
            where, cure = f"{path.name}, line {number},", f"Take it out of {path.resolve()}"
            if any(secret in line for secret in secrets) or SECRET_SHAPES.search(line):
                raise PushError(
                    f"{where} holds what looks like a token or key; nothing was sent. {cure}, and "
                    "revoke it if it was shown"
                )
            if place := next((place for place in places if place in line), None):
                raise PushError(
                    f"{where} names a place of this machine ({place}); nothing was sent. {cure}"
                )


def _texts(path: Path) -> Iterator[str]:
    """The lines of a text, or the header of a file of weights; nothing of pictures."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            yield file.read(min(size, 100_000_000)).decode(errors="replace")
    elif path.suffix != ".png":
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def send(parcel: Parcel, *, update: bool = False) -> str:
    """Make the repository and upload the folder; returns the address of the commit.

    A repository that holds something is left alone, unless `update` adds a commit to it. What of an
    upload that broke off has arrived is not sent again.

    Raises:
        RecipeError: the hub refuses, or the upload broke off; the message says what to do.
    """
    api = HfApi()
    with _hub_errors(parcel.repo):
        try:
            patiently(parcel.card.validate)
        except ValueError as error:
            raise PushError(f"the hub does not take the card: {one_line(error)}") from error
        upload = {"repo_id": _create(api, parcel, update), "folder_path": parcel.folder}
        done = patiently(lambda: api.upload_folder(**upload, commit_message="Add the tuned model"))
    return str(getattr(done, "commit_url", done))


def owner_here(repo: str) -> str:
    """The name of the token's account, to which `repo` without an owner's name goes."""
    if not get_token():
        raise PushError(
            "no token for the hub: make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it"
        )
    with _hub_errors(repo):
        return patiently(HfApi().whoami)["name"]


def _create(api: HfApi, parcel: Parcel, update: bool) -> str:
    """Make the repository, or find that the one that is there may be filled; its name."""
    try:
        return patiently(lambda: api.create_repo(parcel.repo, private=parcel.private)).repo_id
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
    info = patiently(lambda: api.model_info(parcel.repo))
    files = [file.rfilename for file in info.siblings or [] if file.rfilename != ".gitattributes"]
    if parcel.private and info.private is False:
        raise PushError(
            f"{parcel.repo} exists and is public: say --public if you mean that, or name another "
            "with --repo"
        )
    if files and not update:
        raise PushError(
            f"{parcel.repo} exists, with {len(files)} files ({files[0]}, ...): --update adds a "
            "commit with this model to it, or name another with --repo"
        )
    return parcel.repo


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
        said, status = one_line(cause), status_of(cause)
        page = f"{constants.ENDPOINT}/settings/tokens"
        known = {
            None: f"the upload broke off ({type(cause).__name__}). What arrived is kept: the same "
            "command with --update goes on from there",
            401: f"the hub does not know your token (401): make a new one at {page}",
            403: f"this token may not write to {repo} (403): give it the right to write at {page}, "
            "and check the owner's name and its storage",
            413: "the hub takes no file or commit of this size (413): check your account's limits, "
            "or push --what adapter",
        }
        told = known.get(status, f"the hub refuses with {status}")
        raise PushError(f"{told}. It says: {said}") from error


def push(args: argparse.Namespace) -> None:
    """The action `push` of `python -m scripts.export`."""
    cfg = config_from_args(args, may_lack_gpu=True)
    what = args.what or ("adapter" if cfg.model.use_peft else "merged")
    options = {"base": args.base, "licence": args.licence, "licence_file": args.licence_file,
               "private": not args.public}  # fmt: skip
    parcel = make_parcel(cfg, what, repo=args.repo, **options)
    if args.send and "/" not in parcel.repo:  # the card names the whole address
        parcel = make_parcel(cfg, what, repo=f"{owner_here(parcel.repo)}/{parcel.repo}", **options)
    print(parcel.described())
    if not args.send:
        print(f"\n{parcel.folder / 'README.md'}:\n\n{parcel.card.content}")
        print("Nothing was sent: this is what --send would send.")
        return
    print(f"sent: {send(parcel, update=args.update)}")
