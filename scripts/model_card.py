"""The card of a tuned model, made from what its run left, and what its base model's licence asks.

Nothing in the card is typed by hand: `model_card.md` is its template, and huggingface_hub's own
classes hold its metadata. https://huggingface.co/docs/hub/model-cards says what they mean.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import DatasetCard, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from scripts.base import InputError, RecipeError, local_path, one_line
from scripts.config import Config
from scripts.hub import patiently
from scripts.run_folder import read_origins
from scripts.tables import BASELINES, MEASURES, baselines_table, evaluation_table, win_rates

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


class CardError(RecipeError):
    """The run's figures or the base model's licence are not what a card needs."""


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
        CardError: the licence is not known and the hub cannot be asked.
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
    raise CardError(
        f"the licence of the base model {base} is not known ({reason}): give it with --licence, "
        "by the hub's identifier (https://huggingface.co/docs/hub/repositories-licenses)"
    )


def licence_text(base: str, given: Path | None = None) -> Path:
    """A file with the text of the base model's licence: `given`, or the base's own.

    Raises:
        CardError: it is not there and could not be fetched.
    """
    if given is not None and not given.is_file():
        raise InputError(f"--licence-file: there is no file {given}")
    folder, names = Path(base).expanduser(), ("LICENSE", "LICENSE.txt", "LICENSE.md")
    there = [given] if given else [folder / name for name in names if (folder / name).is_file()]
    if there:
        return there[0]
    reason = f"{folder} has none of {', '.join(names)}"
    if not folder.is_dir():
        try:
            return Path(patiently(lambda: HfApi().hf_hub_download(base, "LICENSE")))
        except Exception as error:  # as above
            reason = one_line(error, 120)
    raise CardError(
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
        raise CardError(f"{path} is damaged; python -m scripts.evaluate makes it again") from None


def data_card(cfg: Config) -> tuple[Path | None, dict]:
    """The card beside data on this machine (a README.md with a dataset's metadata, in its folder or
    in the one above it), and its metadata."""
    there = local_path(cfg.script.dataset_name)
    folders = [] if there is None else [there, there.parent, there.parent.parent][there.is_file() :]
    for path in (folder / "README.md" for folder in folders[:2]):
        with suppress(ValueError, TypeError, OSError, yaml.YAMLError):
            found = DatasetCard(path.read_text(encoding="utf-8")).data.to_dict()
            if {"license", "task_categories", "configs", "language"} & set(found):
                return path, found
    return None, {}


def shown_settings(cfg: Config) -> dict[str, Any]:
    """The settings of `SETTINGS`, as the config gives them or as TRL has them by default."""
    found = {}
    for name in SETTINGS:
        value = cfg.given.get(name)
        if value is None:
            parts = (cfg.dpo, cfg.model, cfg.recipe)
            value = next((getattr(p, name) for p in parts if hasattr(p, name)), None)
        value = getattr(value, "value", value)  # of an enum
        if value is not None and value is not False and not (name == "max_steps" and value < 0):
            found[name] = value
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


def make_card(
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
        metadata, template_path=str(TEMPLATE), name=repo.split("/")[-1], what=what,
        base=base, base_on_hub=base_on_hub, terms=terms, data=data,
        repo=repo if "/" in repo else f"OWNER/{repo}",
        data_on_hub=data_on_hub, data_commit=origin.get("commit"), rank=cfg.model.lora_r,
        data_content=origin.get("content"), data_card=DATA_CARD if along else None,
        dropped=len(dropped.read_bytes().splitlines()) if dropped.is_file() else 0,
        steps=json.loads(log.read_text().splitlines()[-1])["step"] if log.is_file() else None,
        settings=yaml.safe_dump(shown_settings(cfg), sort_keys=False).strip(),
        max_new_tokens=cfg.recipe.max_new_tokens, merge_dtype=cfg.recipe.merge_dtype,
        figures=figures, figure=(run / "figures" / "before_after.png").is_file(),
        limits=limits(figures) if figures else [], **tables,
    )  # fmt: skip
