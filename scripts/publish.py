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
from contextlib import suppress
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import (
    DatasetCard,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from scripts.adapter import require_adapter
from scripts.base import ROOT, InputError, RecipeError, one_line
from scripts.config import Config, config_from_args
from scripts.hub import patiently, status_of
from scripts.origins import read_origins
from scripts.pairs.sources import local_path
from scripts.proof import require_merged
from scripts.tables import BASELINES, MEASURES, baselines_table, evaluation_table, win_rates

# All that is ever sent of a model's folder: what loads it. Optimizer states, checkpoints and logs
# have no way in.
LOADS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "spiece.model", "chat_template.jinja",
)  # fmt: skip
# What of a config a reader can learn from; places, accounts and reporting are left out.
SETTINGS = (
    "beta", "loss_type", "loss_weights", "label_smoothing", "learning_rate", "lr_scheduler_type",
    "warmup_steps", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "optim", "max_grad_norm", "bf16", "seed", "dtype",
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "use_peft",
    "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_target_modules",
    "prefix_sharing", "merge_into", "merge_dtype", "test_split_size", "train_samples",
    "eval_samples",
)  # fmt: skip
LESS_IS_BETTER = ("refused", "unsupported", "repeated", "base_nll")  # measures; length is neither
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEMPLATE = Path(__file__).with_name("model_card.md")
DATA_CARD = "DATA_CARD.md"
# Names of variables that hold secrets, and what tokens look like.
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
SECRET_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}"
    r"|wandb_v1_\w{20,})|-----BEGIN [A-Z ]*PRIVATE KEY"
)
SHORTEST_SECRET = 8  # letters; a shorter value stands in any text by chance


class PushError(RecipeError):
    """The hub does not take it, or what is to be sent is not fit to leave."""


# Licences


@dataclass(frozen=True)
class Terms:
    """A licence by the hub's identifier, and what it asks of a model that is made from its model:
    how its name begins, a line to show, a notice to send along with a copy of the licence."""

    licence: str
    prefix: str = ""
    line: str = ""
    notice: str = ""
    page: str = ""


def _llama(version: str, name: str, line: str, prefix: str, page: str) -> Terms:
    notice = f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, "
    return Terms(f"llama{version}", prefix, line, f"{notice}Inc. All Rights Reserved.", page)


# Section 1.b of each: https://llama.meta.com/llama3/license/ and https://www.llama.com/llama3_1/license/
LLAMA = {"3": _llama("3", "Meta Llama 3", "Built with Meta Llama 3", "Llama-3",
                     "https://llama.meta.com/llama3/license/")}  # fmt: skip
for n in (1, 2, 3):
    page = f"https://www.llama.com/llama3_{n}/license/"
    LLAMA[f"3.{n}"] = _llama(f"3.{n}", f"Llama 3.{n}", "Built with Llama", "Llama", page)
LLAMA3_VOCABULARY = 128_256


def terms_of(base: str, *, given: str | None = None, folder: Path | None = None) -> Terms:
    """The terms of a model that was made from `base`.

    By the base's name; else by a Llama 3 vocabulary in the model's `folder`; else as the hub has
    it. `given` is the identifier that the user names, which settles all but a Llama's terms.

    Raises:
        PushError: the licence is not known and the hub cannot be asked.
    """
    # 3, 3.1, 3.2 or 3.3 of a name such as `Meta-Llama-3.1-8B`.
    named = re.search(r"llama[-_ ]?(3(?:[._][123](?!\d))?)(?![\d.])", base, re.IGNORECASE)
    if named:
        return LLAMA[named[1].replace("_", ".")]
    if given:
        return LLAMA.get(given.removeprefix("llama")) or Terms(given)
    if folder is not None and (folder / "config.json").is_file():
        values = json.loads((folder / "config.json").read_bytes())
        if (values.get("model_type"), values.get("vocab_size")) == ("llama", LLAMA3_VOCABULARY):
            return LLAMA["3"]
    if base.split("/")[-1].startswith("SmolLM2-"):
        return Terms("apache-2.0")
    reason = "it is no name of the hub's"
    if HUB_NAME.fullmatch(base):
        try:
            card = patiently(lambda: HfApi().model_info(base, timeout=20)).card_data
            if card and isinstance(card.get("license"), str):
                return Terms(card["license"])
            reason = "its card on the hub names none"
        except Exception as error:  # the errors of the hub, httpx and sockets share no nearer base
            reason = one_line(error, 120)
    raise PushError(
        f"the licence of the base model {base} is not known ({reason}): give it with --licence, "
        "by the hub's identifier (https://huggingface.co/docs/hub/repositories-licenses)"
    )


def licence_text(base: str, given: Path | None = None) -> Path:
    """A file with the text of the base model's licence: `given`, or the base's own.

    Raises:
        PushError: it is not there and could not be fetched.
    """
    if given is not None:
        if not given.is_file():
            raise InputError(f"--licence-file: there is no file {given}")
        return given
    if (folder := Path(base).expanduser()).is_dir():
        names = ("LICENSE", "LICENSE.txt", "LICENSE.md")
        if found := next((folder / name for name in names if (folder / name).is_file()), None):
            return found
        reason = f"{folder} has none of {', '.join(names)}"
    else:
        try:
            return Path(patiently(lambda: HfApi().hf_hub_download(base, "LICENSE")))
        except Exception as error:  # as above
            reason = one_line(error, 120)
    raise PushError(
        f"the licence of {base} wants a copy of itself sent along, and there is none ({reason}): "
        "give one with --licence-file"
    )


# Names


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


def data_name(cfg: Config) -> tuple[str, bool]:
    """The dataset's name without the place where it lies, and whether it is the hub's."""
    name = cfg.script.dataset_name
    there = local_path(name)
    if there is None:
        return name.split("?")[0], HUB_NAME.fullmatch(name) is not None  # an address may hold a key
    return (name if HUB_NAME.fullmatch(name) and name[0] != "." else there.resolve().name), False


def repo_for(cfg: Config, what: str, base: str, terms: Terms, given: str | None) -> str:
    """The repository's name: `given`, or one made from base and data.

    Raises:
        InputError: the hub takes no such name, or the licence asks for another beginning.
    """
    short = base.split("/")[-1].removeprefix("Meta-")
    made = f"{short}-dpo-{data_name(cfg)[0].split('/')[-1]}" + "-lora" * (what == "adapter")
    made = re.sub(r"[^\w.-]+|--+|\.\.+", "-", made).strip("-.")[:90]
    owner, slash, name = (given or made).rpartition("/")
    # `Llama-3-8B` begins as it has to, `Llama-3.1` and `Llama-34B` do not.
    if terms.prefix and not re.match(rf"{re.escape(terms.prefix)}(?![\d.])", name):
        proposed = f"{owner}{slash}{terms.prefix}-{name.removeprefix('Meta-')}"
        if given is not None:
            raise InputError(
                f"--repo {given}: by the licence of {base} the name has to begin with "
                f"`{terms.prefix}`; take {proposed}"
            )
        made = proposed
    repo = given or made
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo: {one_line(error)}") from None
    return repo


# The card


def read_figures(run_dir: Path) -> dict | None:
    """The run's `evaluation.json`; None if it was not evaluated."""
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise PushError(f"{path} is damaged; python -m scripts.evaluate makes it again") from None


def data_card(cfg: Config) -> tuple[Path | None, dict]:
    """The card beside data on this machine (a README.md with a dataset's metadata, in its folder or
    in the one above it), and its metadata."""
    there = local_path(cfg.script.dataset_name)
    for folder in () if there is None else (there if there.is_dir() else there.parent,):
        for path in (folder / "README.md", folder.parent / "README.md"):
            with suppress(ValueError, TypeError, OSError, yaml.YAMLError):
                found = DatasetCard(path.read_text(encoding="utf-8")).data.to_dict()
                if {"license", "task_categories", "configs", "language"} & set(found):
                    return path, found
    return None, {}


def shown_settings(cfg: Config) -> dict[str, Any]:
    """The settings of `SETTINGS` that the config gives."""
    found = {name: cfg.given[name] for name in SETTINGS if cfg.given.get(name) not in (None, False)}
    if not cfg.model.use_peft:
        found = {k: v for k, v in found.items() if not k.startswith(("lora_", "use_"))}
    return found


def eval_results(cfg: Config, figures: dict) -> list[EvalResult]:
    """The tuned model's figures for the card's metadata, each with its interval and the base's."""
    name, on_hub = data_name(cfg)
    values = {
        key: (MEASURES[key], measure["tuned"], measure["base"]["mean"])
        for key, measure in figures["measures"].items()
        if key in MEASURES
    }
    values["reward_accuracy"] = ("implicit-reward accuracy", figures["reward_accuracy"], 0.5)
    values["reward_margin"] = ("implicit-reward margin (nats)", figures["reward_margin"], 0.0)
    return [
        EvalResult(
            metric_type=key, metric_name=label, metric_value=round(value["mean"], 4),
            metric_args={
                "interval_95": [x if x is None else round(x, 4)
                                for x in (value["low"], value["high"])],
                "base_model": round(base, 4),
            },
            task_type="text-generation", dataset_name=f"{name}, held out", dataset_split="test",
            # An id where it is the hub's; a local name must not pass for one.
            dataset_type=name if on_hub else name.split("/")[-1],
            dataset_revision=read_origins(cfg.run_dir).get("dataset", {}).get("commit"),
        )
        for key, (label, value, base) in values.items()
    ]  # fmt: skip


def got_worse(figures: dict) -> list[str]:
    """A line for each measure that got worse by more than chance, held out or beside."""
    lines = []
    for where, measures in {"": figures["measures"], **figures.get("beside", {})}.items():
        for name, measure in measures.items():
            change = measure["change"]
            if name == "length" or name not in MEASURES or change["low"] is None:
                continue
            if change["low"] > 0 if name in LESS_IS_BETTER else change["high"] < 0:
                lines.append(
                    f"{MEASURES[name]}{f', on {where}' if where else ''}: "
                    f"{measure['base']['mean']:.2f} before, {measure['tuned']['mean']:.2f} after "
                    f"(change {change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}])"
                )
    return lines


def limits(figures: dict) -> list[str]:
    """What the model is not for, as far as the run can tell; the template says what no run can."""
    lines = []
    declined = figures["measures"].get("declined")
    if declined and declined["tuned"]["mean"] < 0.5:
        lines.append(
            "Questions that the given text may not answer: it said so in "
            f"{declined['tuned']['mean']:.0%} of such cases, and made something up in the others."
        )
    missed = {text: verdict for text, verdict in figures["targets"].items() if verdict != "met"}
    lines += [f"Missed aim: {text} ({verdict})." for text, verdict in missed.items()]
    return lines + [f"Worse than the base model: {line}." for line in got_worse(figures)]


def model_card(
    cfg: Config, *, what: str, repo: str, base: str, base_on_hub: bool, terms: Terms
) -> ModelCard:
    """The card of what `cfg`'s run made, for the repository `repo`.

    `what` is `adapter` or `merged`; `base` the base model's name, which `base_on_hub` says is one
    of the hub's.
    """
    run, figures, (data, data_on_hub) = cfg.run_dir, read_figures(cfg.run_dir), data_name(cfg)
    along, about_data = data_card(cfg)
    metadata = ModelCardData(
        base_model=base if base_on_hub else None,
        datasets=[data] if data_on_hub else None,
        language=about_data.get("language"),
        library_name="peft" if what == "adapter" else "transformers",
        license=terms.licence,
        pipeline_tag="text-generation",
        tags=["dpo", "trl", "preference-tuning", *(["lora"] if cfg.model.use_peft else [])],
        model_name=repo.split("/")[-1],
        eval_results=eval_results(cfg, figures) if figures else None,
        # How the hub draws the model's tree.
        base_model_relation=("adapter" if what == "adapter" else "finetune")
        if base_on_hub
        else None,
    )
    dropped, log = run / "dropped_rows.jsonl", run / "metrics.jsonl"
    origin = read_origins(run).get("dataset", {})
    tables: dict[str, Any] = dict.fromkeys(("baselines", "win_rates", "targets", "versions"))
    if figures:
        tables["evaluation"] = evaluation_table(figures)
        known = {k: v for k, v in figures.get("baselines", {}).items() if k in BASELINES.values()}
        if known:
            tables["baselines"] = baselines_table(figures | {"baselines": known}).T
        if "win_rate" in figures:
            tables["win_rates"] = win_rates(figures)
        if figures.get("targets"):
            tables["targets"] = pd.Series(figures["targets"], name="verdict").to_frame()
    if (run / "environment.json").is_file():
        facts = json.loads((run / "environment.json").read_bytes())
        tables["versions"] = pd.Series(facts, name="version").to_frame()
    return ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), what=what, base=base, base_on_hub=base_on_hub,
        terms=terms, repo=repo if "/" in repo else f"OWNER/{repo}", data=data,
        data_on_hub=data_on_hub, data_commit=origin.get("commit"), rank=cfg.model.lora_r,
        data_content=origin.get("content"), data_card=DATA_CARD if along else None,
        dropped=len(dropped.read_bytes().splitlines()) if dropped.is_file() else 0,
        steps=json.loads(log.read_text().splitlines()[-1])["step"] if log.is_file() else None,
        settings=yaml.safe_dump(shown_settings(cfg), sort_keys=False).strip(),
        max_new_tokens=cfg.recipe.max_new_tokens, merge_dtype=cfg.recipe.merge_dtype,
        figures=figures, figure=(run / "figures" / "before_after.png").is_file(),
        limits=limits(figures) if figures else [], **tables,
    )  # fmt: skip


# What is sent


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
    card = model_card(cfg, what=what, repo=repo, base=base, base_on_hub=on_hub, terms=terms)
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
    try:
        try:
            patiently(parcel.card.validate)
        except ValueError as error:
            raise PushError(f"the hub does not take the card: {one_line(error)}") from error
        repo = _create(api, parcel, update)
        upload = {"repo_id": repo, "folder_path": parcel.folder}
        done = patiently(lambda: api.upload_folder(**upload, commit_message="Add the tuned model"))
    except RecipeError:
        raise
    except Exception as error:  # httpx's, the hub's and sockets' errors share no nearer base
        raise _refused(error, parcel) from error
    return str(getattr(done, "commit_url", done))


def owner_here(parcel: Parcel) -> str:
    """The name of the token's account, to which a repository without an owner's name goes."""
    if not get_token():
        raise PushError(
            "no token for the hub: make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens and set HF_TOKEN to it"
        )
    try:
        return patiently(HfApi().whoami)["name"]
    except RecipeError:
        raise
    except Exception as error:  # as in `send`
        raise _refused(error, parcel) from error


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


def _refused(error: BaseException, parcel: Parcel) -> PushError:
    """What to do about an error of the hub or of the network."""
    while status_of(error) is None and error.__cause__ is not None:
        error = error.__cause__
    status, page = status_of(error), f"{constants.ENDPOINT}/settings/tokens"
    known = {
        401: f"the hub does not know your token (401): make a new one at {page}",
        403: f"this token may not write to {parcel.repo} (403): give it the right to write at "
        f"{page}, and check the owner's name and its storage",
        413: "the hub takes no file or commit of this size (413): check your account's limits, or "
        "push --what adapter",
    }
    if status is None:
        return PushError(
            f"the upload broke off ({type(error).__name__}: {one_line(error)}). What arrived is "
            "kept: the same command with --update goes on from there"
        )
    return PushError(
        f"{known.get(status, f'the hub refuses with {status}')}. It says: {one_line(error)}"
    )


def push(args: argparse.Namespace) -> None:
    """The action `push` of `python -m scripts.export`."""
    cfg = config_from_args(args, may_lack_gpu=True)
    what = args.what or ("adapter" if cfg.model.use_peft else "merged")
    options = {"base": args.base, "licence": args.licence, "licence_file": args.licence_file,
               "private": not args.public}  # fmt: skip
    parcel = pack(cfg, what, repo=args.repo, **options)
    if args.send and "/" not in parcel.repo:  # the card names the whole address
        parcel = pack(cfg, what, repo=f"{owner_here(parcel)}/{parcel.repo}", **options)
    print(parcel.described())
    if not args.send:
        print(f"\n{parcel.folder / 'README.md'}:\n\n{parcel.card.content}")
        print("Nothing was sent: this is what --send would send.")
        return
    print(f"sent: {send(parcel, update=args.update)}")
