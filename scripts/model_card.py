"""The card of a tuned model, made from what its run left, and what its base model's licence asks.

Nothing in the card is typed by hand: `model_card.md` is its template, and huggingface_hub's own
classes hold its metadata. https://huggingface.co/docs/hub/model-cards says what they mean.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from scripts import tables
from scripts.base import InputError, local_path, one_line
from scripts.config import Config
from scripts.hub import patiently
from scripts.run_folder import read_origins
from scripts.tables import MEASURES

# Keys of a config that say nothing of the model: places, accounts, reporting, resuming.
LEFT_OUT = (
    "model_name_or_path", "dataset_name", "questions", "output_dir", "run_name", "report_to",
    "wandb_project", "project", "logging_dir", "logging_steps", "eval_strategy", "save_strategy",
    "save_steps", "save_total_limit", "resume_from_checkpoint",
)  # fmt: skip
LESS_IS_BETTER = ("refused", "unsupported", "repeated", "base_nll")  # measures; length is neither
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEMPLATE = Path(__file__).with_name("model_card.md")
DATA_CARD = "DATA_CARD.md"


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
    """The terms of a model that was made from `base`: by the base's name; else `given`, the
    identifier that the user names; else by a Llama 3 vocabulary in the model's `folder`.

    Raises:
        InputError: the licence is not known.
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
    raise InputError(
        f"the licence of the base model {base} is not known here: give it with --licence, by the "
        "hub's identifier (https://huggingface.co/docs/hub/repositories-licenses)"
    )


def licence_text(base: str, folder: Path, given: Path | None = None) -> Path:
    """A file with the text of the base model's licence: `given`, or of the base's `folder`, or from
    the hub.

    Raises:
        InputError: there is none, or it could not be fetched.
    """
    if given is not None:
        if not given.is_file():
            raise InputError(f"--licence-file: there is no file {given}")
        return given
    if folder.is_dir():
        if found := sorted(folder.glob("LICENSE*")):
            return found[0]
        reason = f"{folder} has no LICENSE"
    else:
        try:
            return Path(patiently(lambda: HfApi().hf_hub_download(base, "LICENSE")))
        except Exception as error:  # the errors of the hub, httpx and sockets share no nearer base
            reason = one_line(error, 120)
    raise InputError(
        f"the licence of {base} must be sent along, and its text is missing ({reason}): give it "
        "with --licence-file"
    )


# Names


def base_name(cfg: Config, given: str | None) -> str:
    """The base model's name: `owner/model` on the hub, or without a slash that of a folder here."""
    if given is not None:
        if not HUB_NAME.fullmatch(given):
            raise InputError(f"--base takes the hub's name, owner/model; got {given!r}")
        return given
    name = read_origins(cfg.run_dir).get("model", {}).get("name") or cfg.model.model_name_or_path
    on_hub = HUB_NAME.fullmatch(name) and not Path(name).expanduser().is_dir()
    return name if on_hub else Path(name).name


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
    repo = given or made
    owner, slash, name = repo.rpartition("/")
    # `Llama-3-8B` begins as it has to, `Llama-3.1` and `Llama-34B` do not.
    if terms.prefix and not re.match(rf"{re.escape(terms.prefix)}(?![\d.])", name):
        repo = f"{owner}{slash}{terms.prefix}-{name.removeprefix('Meta-')}"
        if given is not None:
            raise InputError(
                f"--repo {given}: by the licence of {base} the name must begin with "
                f"`{terms.prefix}`; take {repo}"
            )
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--repo: {one_line(error)}") from None
    return repo


# The card


def data_card(cfg: Config) -> Path | None:
    """The card beside data on this machine: a README.md with metadata, in its folder or in the one
    above it."""
    there = local_path(cfg.script.dataset_name)
    folders = [] if there is None else [there, *there.parents][there.is_file() :][:2]
    for path in (folder / "README.md" for folder in folders):
        if path.is_file() and path.read_text(encoding="utf-8").startswith("---\n"):
            return path
    return None


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


def limits(figures: dict) -> list[str]:
    """What the model is not for, as far as the run can tell: missed aims, and each measure that got
    worse by more than chance, held out or beside. The template says what no run can."""
    lines = []
    declined = figures["measures"].get("declined")
    if declined and declined["tuned"]["mean"] < 0.5:
        lines.append(
            "Questions that the given text may not answer: it said so in "
            f"{declined['tuned']['mean']:.0%} of such cases, and made something up in the others."
        )
    missed = {text: verdict for text, verdict in figures["targets"].items() if verdict != "met"}
    lines += [f"Missed aim: {text} ({verdict})." for text, verdict in missed.items()]
    for where, measures in {"": figures["measures"], **figures.get("beside", {})}.items():
        for name, measure in measures.items():
            change = measure["change"]
            if name == "length" or name not in MEASURES or change["low"] is None:
                continue
            if change["low"] > 0 if name in LESS_IS_BETTER else change["high"] < 0:
                lines.append(
                    f"Worse than the base model: {MEASURES[name]}{f', on {where}' if where else ''}"
                    f": {measure['base']['mean']:.2f} before, {measure['tuned']['mean']:.2f} after "
                    f"(change {change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}])."
                )
    return lines


def make_card(cfg: Config, *, what: str, repo: str, base: str, terms: Terms) -> ModelCard:
    """The card of what `cfg`'s run made, for the repository `repo`.

    `what` is `adapter` or `merged`, and `base` the base model's name by `base_name`.
    """
    run, (data, data_on_hub), along = cfg.run_dir, data_name(cfg), data_card(cfg)
    figures, environment = (
        json.loads(path.read_bytes()) if path.is_file() else None
        for path in (run / "evaluation.json", run / "environment.json")
    )
    base_on_hub, relation = "/" in base, "adapter" if what == "adapter" else "finetune"
    metadata = ModelCardData(
        base_model=base if base_on_hub else None,
        base_model_relation=relation if base_on_hub else None,  # how the hub draws the model's tree
        datasets=[data] if data_on_hub else None,
        language=DatasetCard.load(along).data.language if along else None,
        library_name="peft" if what == "adapter" else "transformers",
        license=terms.licence,
        pipeline_tag="text-generation",
        tags=["dpo", "trl", "preference-tuning", *(["lora"] if cfg.model.use_peft else [])],
        model_name=repo.split("/")[-1],
        eval_results=eval_results(cfg, figures) if figures else None,
    )
    settings = {
        key: value
        for key, value in cfg.given.items()
        if key not in LEFT_OUT and value is not None and value is not False
        if cfg.model.use_peft or not key.startswith("lora_")
    }
    dropped, log = run / "dropped_rows.jsonl", run / "metrics.jsonl"
    return ModelCard.from_template(
        metadata, template_path=str(TEMPLATE), cfg=cfg, name=repo.split("/")[-1], what=what,
        repo=repo if "/" in repo else f"OWNER/{repo}", base=base, base_on_hub=base_on_hub,
        terms=terms, data=data, data_on_hub=data_on_hub,
        origin=read_origins(run).get("dataset", {}), data_card=DATA_CARD if along else None,
        dropped=len(dropped.read_bytes().splitlines()) if dropped.is_file() else 0,
        steps=json.loads(log.read_text().splitlines()[-1])["step"] if log.is_file() else None,
        settings=yaml.safe_dump(settings, sort_keys=False).strip(), figures=figures, tables=tables,
        figure=(run / "figures" / "before_after.png").is_file(),
        limits=limits(figures) if figures else [], versions=environment,
    )  # fmt: skip
