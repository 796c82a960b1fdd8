"""Send a finished run's adapter or merged model to the Hugging Face hub, with its card.

    python -m scripts.export push --config outputs/<run>/config.yaml             # only shows it
    python -m scripts.export push --config outputs/<run>/config.yaml --send

What would be sent is put together in `hub/` of the run folder first, large files as links, and
shown; nothing leaves this machine without `--send`. The upload itself is huggingface_hub's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from scripts.adapter import require_adapter
from scripts.base import ROOT, InputError, RecipeError
from scripts.card import (
    DATA_CARD,
    HUB_NAME,
    CardError,
    check_card,
    data_card,
    data_name,
    model_card,
)
from scripts.config import Config, config_from_args
from scripts.hub import HubBusy, patiently, status_of
from scripts.licences import Terms, licence_text, terms_of
from scripts.origins import read_origins

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

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    def described(self) -> str:
        """The files with their sizes, and where they would go."""
        sizes = {path.name: path.stat().st_size for path in self.files()}
        wide = max(map(len, sizes))
        lines = [f"  {name:<{wide}}  {size / 1e6:>10,.2f} MB" for name, size in sizes.items()]
        return "\n".join(
            [
                f"{constants.ENDPOINT}/{self.repo} ({'private' if self.private else 'PUBLIC'}), "
                f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB:",
                *lines,
            ]
        )


def base_name(cfg: Config, given: str | None) -> tuple[str, bool]:
    """The base model's name without a place of this machine, and whether it is the hub's."""
    if given is not None:
        if not HUB_NAME.fullmatch(given):
            raise InputError(f"--base takes a name of the hub's, owner/model; got {given!r}")
        return given, True
    name = read_origins(cfg.run_dir).get("model", {}).get("name") or cfg.model.model_name_or_path
    if Path(name).expanduser().is_dir() or not HUB_NAME.fullmatch(name):
        return Path(name).name, False
    return name, True


def repo_for(cfg: Config, what: str, base: str, terms: Terms, given: str | None) -> str:
    """The repository's name: `given`, or one made from base and data.

    Raises:
        InputError: the hub takes no such name, or the licence asks for another beginning.
    """
    short = base.split("/")[-1].removeprefix("Meta-")
    made = f"{short}-dpo-{data_name(cfg).split('/')[-1]}" + "-lora" * (what == "adapter")
    made = re.sub(r"[^\w.-]+|--+|\.\.+", "-", made).strip("-.")[:90]
    name = (given or made).split("/")[-1]
    if not _begins(name, terms.prefix):
        proposed = f"{terms.prefix}-{name.removeprefix('Meta-')}"
        if given is not None:
            owner = given.rpartition("/")[0]
            raise InputError(
                f"--repo {given}: the licence of {base} has a model's name begin with "
                f"`{terms.prefix}`; take {owner + '/' * bool(owner)}{proposed}"
            )
        made = proposed
    repo = given or made
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo: {' '.join(str(error).split())}") from None
    return repo


def _begins(name: str, prefix: str) -> bool:
    """Whether a name begins with the licence's words: `Llama-3-8B`, but not `Llama-3.1` or
    `Llama-34B`."""
    return not prefix or re.match(rf"{re.escape(prefix)}(?![\d.])", name) is not None


def source_folder(cfg: Config, what: str) -> Path:
    """The folder of the run that holds what is to be sent.

    Raises:
        RecipeError: it is not there; the message says which command makes it.
    """
    if what == "merged":
        if not (cfg.run_dir / "merged" / "config.json").is_file():
            raise PushError(
                f"no merged model in {cfg.run_dir}; make it first: python -m scripts.export "
                f"--config {cfg.run_dir / 'config.yaml'}"
            )
        return cfg.run_dir / "merged"
    if not cfg.model.use_peft:
        raise InputError("--what adapter: this run has none (use_peft: false); --what merged")
    return require_adapter(cfg)


def pack(
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
    source = source_folder(cfg, what)
    base, on_hub = base_name(cfg, base)
    if what == "adapter" and not on_hub:
        raise InputError(
            f"the base model is a folder of this machine ({base}), where nobody finds it: name the "
            "hub's model that it is with --base owner/model, or push --what merged"
        )
    weights = Path(cfg.model.model_name_or_path).expanduser()
    terms = terms_of(base, given=licence, folder=weights if weights.is_dir() else source)
    repo = repo_for(cfg, what, base, terms, repo)
    folder = cfg.run_dir / "hub" / what
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and any(path.match(pattern) for pattern in LOADS):
            _put(path, folder / path.name, base)
    figure = cfg.run_dir / "figures" / "before_after.png"
    for extra in (figure, cfg.run_dir / "evaluation.json"):
        if extra.is_file():
            shutil.copy(extra, folder / extra.name)
    if along := data_card(cfg):
        shutil.copy(along, folder / DATA_CARD)
    if terms.wants_copy:
        asked = str(weights) if weights.is_dir() and licence_file is None else base
        shutil.copy(licence_text(asked, licence_file), folder / "LICENSE")
        (folder / "NOTICE").write_text(terms.notice + "\n")
    card = model_card(cfg, what=what, repo=repo, base=base, base_on_hub=on_hub, terms=terms,
                      figure=figure.is_file())  # fmt: skip
    check_card(card)
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
            if any(secret in line for secret in secrets) or SECRET_SHAPES.search(line):
                raise PushError(
                    f"{path.name}, line {number}, holds what looks like a token or key; nothing "
                    f"was sent. Take it out of {path.resolve()}, and revoke it if it was shown"
                )
            if place := next((place for place in places if place in line), None):
                raise PushError(
                    f"{path.name}, line {number}, names a place of this machine ({place}); nothing "
                    f"was sent. Take it out of {path.resolve()}"
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
    """Make the repository and upload the folder; the address of the commit.

    An upload that broke off goes on with the same call: what has arrived is not sent again. A
    repository that holds something else is left alone, unless `update` adds a commit to it.

    Raises:
        PushError: the hub refuses, or the upload broke off; the message says what to do.
        CardError: the hub's validator does not take the card.
    """
    _require_token()
    begun = parcel.folder.with_suffix(".begun")
    api = HfApi()
    try:
        _validate(parcel.card)
        repo = _create(api, parcel, begun, update)
        done = patiently(
            lambda: api.upload_folder(
                repo_id=repo, folder_path=parcel.folder, commit_message="Send the tuned model"
            )
        )
    except (HubBusy, PushError, CardError):
        raise
    except Exception as error:  # httpx's, the hub's and sockets' errors share no nearer base
        raise _refused(error, parcel) from error
    begun.unlink(missing_ok=True)
    return str(getattr(done, "commit_url", done))


def _require_token() -> None:
    if not get_token():
        raise PushError(
            "no token for the hub: make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it"
        )


def _owner(parcel: Parcel) -> str:
    """The name of the token's account, to which a repository without an owner's name goes."""
    _require_token()
    try:
        return patiently(HfApi().whoami)["name"]
    except HubBusy:
        raise
    except Exception as error:  # as in `send`
        raise _refused(error, parcel) from error


def _validate(card: ModelCard) -> None:
    """Have the hub's own validator look at the card."""
    try:
        patiently(card.validate)
    except ValueError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        raise CardError(f"the hub does not take the card: {_faults(str(error))}") from error


def _faults(text: str) -> str:
    """The validator's words, which it gives as JSON."""
    try:
        return "; ".join(fault["message"] for fault in json.loads(text)["errors"])
    except (ValueError, TypeError, KeyError):
        return " ".join(text.split())[:300]


def _create(api: HfApi, parcel: Parcel, begun: Path, update: bool) -> str:
    """Make the repository, or find that this may go on with the one that is there; its name."""
    try:
        made = patiently(lambda: api.create_repo(parcel.repo, private=parcel.private)).repo_id
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
        made = parcel.repo
        _may_go_on(api, made, parcel, update or _begun(begun) == made)
    begun.write_text(json.dumps({"endpoint": constants.ENDPOINT, "repo": made}))
    return made


def _begun(path: Path) -> str | None:
    """The repository that an earlier call began to fill at the same hub."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return values["repo"] if values.get("endpoint") == constants.ENDPOINT else None


def _may_go_on(api: HfApi, repo: str, parcel: Parcel, ours: bool) -> None:
    info = patiently(lambda: api.model_info(repo))
    if parcel.private and info.private is False:
        raise PushError(
            f"{repo} is there already, and public: say --public if this is meant, or name another "
            "with --repo"
        )
    files = [file.rfilename for file in info.siblings or [] if file.rfilename != ".gitattributes"]
    if files and not ours:
        raise PushError(
            f"{repo} is there already, with {len(files)} files ({files[0]}, ...): --update puts "
            "this on top of them, in a commit of its own, or name another with --repo"
        )


def _refused(error: BaseException, parcel: Parcel) -> PushError:
    """What to do about an error of the hub or of the network."""
    cause, status = error, status_of(error)
    while status is None and cause.__cause__ is not None:
        cause = cause.__cause__
        status = status_of(cause)
    page = f"{constants.ENDPOINT}/settings/tokens"
    said = _line(cause)
    known = {
        401: f"the hub does not know your token (401): make a new one at {page}",
        403: f"this token may not write to {parcel.repo} (403): give it the right to write at "
        f"{page}, and check the owner's name and its storage",
        404: f"the hub has no {parcel.repo} that this token can see (404)",
        413: "the hub takes no file or commit of this size (413): check the limits of the "
        "account, or push --what adapter",
    }
    if status in known:
        return PushError(f"{known[status]}. It says: {said}")
    if status is not None:
        return PushError(f"the hub refuses with {status}: {said}")
    return PushError(
        f"the upload broke off ({type(cause).__name__}: {said}). What has arrived is kept: the "
        "same command goes on from there"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def push(args: argparse.Namespace) -> None:
    """The action `push` of `python -m scripts.export`."""
    cfg = config_from_args(args, may_lack_gpu=True)
    what = args.what or ("adapter" if cfg.model.use_peft else "merged")
    options = {"base": args.base, "licence": args.licence, "licence_file": args.licence_file,
               "private": not args.public}  # fmt: skip
    parcel = pack(cfg, what, repo=args.repo, **options)
    if args.send and "/" not in parcel.repo:  # the card names the whole address
        parcel = pack(cfg, what, repo=f"{_owner(parcel)}/{parcel.repo}", **options)
    print(parcel.described())
    if not args.send:
        print(f"\n{parcel.folder / 'README.md'}:\n\n{parcel.card.content}")
        print("Nothing was sent: this is what --send would send.")
        return
    print(f"sent: {send(parcel, update=args.update)}")
