"""The model card of a finished run, made from what the run left: nothing in it is typed by hand.

The metadata are huggingface_hub's own (`ModelCardData`, `EvalResult`), whose `ModelCard.validate`
asks the hub; https://huggingface.co/docs/hub/model-cards says what they mean.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData

from scripts.base import RecipeError
from scripts.config import Config
from scripts.licences import Terms
from scripts.origins import read_origins
from scripts.pairs.sources import local_path
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
# Measures of which more is worse, and those that are neither good nor bad.
LESS_IS_BETTER = ("refused", "unsupported", "repeated", "base_nll")
NEUTRAL = ("length",)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATA_CARD = "DATA_CARD.md"


class CardError(RecipeError):
    """A card cannot be made of this run, or the hub does not take it."""


def read_figures(run_dir: Path) -> dict | None:
    """The run's `evaluation.json`; None if it was not evaluated."""
    path = run_dir / "evaluation.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise CardError(f"{path} is damaged; python -m scripts.evaluate makes it again") from None


def data_card(cfg: Config) -> Path | None:
    """The card that lies beside data on this machine: a README.md with metadata, in its folder or
    in the one above it."""
    there = local_path(cfg.script.dataset_name)
    if there is None:
        return None
    folder = there if there.is_dir() else there.parent
    for path in (folder / "README.md", folder.parent / "README.md"):
        if path.is_file() and _metadata(path):
            return path
    return None


def _metadata(path: Path) -> dict:
    """The metadata of a dataset's card; none of any other file."""
    try:
        found = DatasetCard(path.read_text(encoding="utf-8")).data.to_dict()
    except (ValueError, TypeError, OSError, yaml.YAMLError):
        return {}
    return found if {"license", "task_categories", "configs", "language"} & set(found) else {}


def data_name(cfg: Config) -> str:
    """The dataset's name without the place where it lies on this machine."""
    name = cfg.script.dataset_name
    there = local_path(name)
    if there is None or (HUB_NAME.fullmatch(name) and not name.startswith(".")):
        return name.split("?")[0]  # an address may end with a key
    return there.resolve().name


def on_hub(cfg: Config) -> bool:
    """Whether the dataset is one of the hub's."""
    name = cfg.script.dataset_name
    return local_path(name) is None and HUB_NAME.fullmatch(name) is not None


def settings(cfg: Config) -> dict[str, Any]:
    """The settings of `SETTINGS`, as the config gives them or as TRL has them by default."""
    parts = (cfg.dpo, cfg.model, cfg.recipe)
    found = {}
    for name in SETTINGS:
        value = cfg.given.get(name)
        if value is None:
            value = next((getattr(p, name) for p in parts if hasattr(p, name)), None)
        value = getattr(value, "value", value)  # of an enum
        if value is not None and value is not False and not (name == "max_steps" and value < 0):
            found[name] = value
    if not cfg.model.use_peft:
        found = {k: v for k, v in found.items() if not k.startswith(("lora_", "use_"))}
    return found


def eval_results(cfg: Config, figures: dict) -> list[EvalResult]:
    """The tuned model's figures for the card's metadata, each with its interval and the base's."""
    name = data_name(cfg)
    shared = {
        "task_type": "text-generation", "dataset_name": f"{name}, held out",
        # An id where it is the hub's; a local name must not pass for one.
        "dataset_type": name if on_hub(cfg) else name.split("/")[-1], "dataset_split": "test",
        "dataset_revision": read_origins(cfg.run_dir).get("dataset", {}).get("commit"),
    }  # fmt: skip
    values = {
        MEASURES[key]: (key, measure["tuned"], measure["base"]["mean"])
        for key, measure in figures["measures"].items()
        if key in MEASURES
    }
    values["implicit-reward accuracy"] = ("reward_accuracy", figures["reward_accuracy"], 0.5)
    values["implicit-reward margin (nats)"] = ("reward_margin", figures["reward_margin"], 0.0)
    return [
        EvalResult(
            metric_type=key, metric_name=label, metric_value=round(value["mean"], 4),
            metric_args={
                "interval_95": [_rounded(value["low"]), _rounded(value["high"])],
                "base_model": round(base, 4),
            },
            **shared,
        )
        for label, (key, value, base) in values.items()
    ]  # fmt: skip


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def got_worse(figures: dict) -> list[str]:
    """A line for each measure that got worse by more than chance, held out or beside."""
    lines = []
    for where, measures in {"": figures["measures"], **figures.get("beside", {})}.items():
        for name, measure in measures.items():
            change = measure["change"]
            if name in NEUTRAL or name not in MEASURES or change["low"] is None:
                continue
            worse = change["low"] > 0 if name in LESS_IS_BETTER else change["high"] < 0
            if worse:
                lines.append(
                    f"{MEASURES[name]}{f', on {where}' if where else ''}: "
                    f"{measure['base']['mean']:.2f} before, {measure['tuned']['mean']:.2f} after "
                    f"(change {change['mean']:+.2f} [{change['low']:+.2f}, {change['high']:+.2f}])"
                )
    return lines


def limits(cfg: Config, figures: dict | None) -> list[str]:
    """What the model is not for, as far as the run can tell, and what no run can."""
    lines = [
        "Decisions about health, law, money or safety, or about a person: it states false things "
        "as plainly as true ones, and nothing here measures such use.",
        f"Tasks, languages and styles other than those of its {_pairs(cfg)}: what tuning did to "
        "them is only known where a table above says so.",
        "Use without safeguards of your own: tuning added none, and may have weakened those of the "
        "base model; that was not measured.",
    ]
    if figures is None:
        return ["**Any use yet: this run was not evaluated.**", *lines]
    declined = figures["measures"].get("declined")
    if declined and declined["tuned"]["mean"] < 0.5:
        lines.append(
            "Questions that the given text may not answer: it said so in "
            f"{declined['tuned']['mean']:.0%} of such cases, and made something up in the others."
        )
    missed = [text for text, verdict in figures["targets"].items() if verdict != "met"]
    lines += [f"Missed aim: {text} ({figures['targets'][text]})." for text in missed]
    lines += [f"Worse than the base model: {line}." for line in got_worse(figures)]
    return lines


def _pairs(cfg: Config) -> str:
    return f"preference pairs (`{data_name(cfg)}`)"


def markdown(frame: pd.DataFrame) -> str:
    """A frame of texts as a Markdown table, its index first."""
    rows = [["", *map(str, frame.columns)], ["---"] * (len(frame.columns) + 1)]
    rows += [[str(name), *map(str, row)] for name, *row in frame.itertuples()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _data_section(cfg: Config, along: bool) -> str:
    origin = read_origins(cfg.run_dir).get("dataset", {})
    name = data_name(cfg)
    public = on_hub(cfg)
    lines = [
        f"Preference pairs: [{name}](https://huggingface.co/datasets/{name})" if public
        else f"Preference pairs: `{name}`"
    ]  # fmt: skip
    if origin.get("commit"):
        lines[0] += f" at commit `{origin['commit']}`"
    if origin.get("content"):
        lines[0] += f" (digest of its files: `{origin['content']}`)"
    lines[0] += "."
    dropped = cfg.run_dir / "dropped_rows.jsonl"
    if dropped.is_file() and (count := len(dropped.read_bytes().splitlines())):
        lines.append(f"{count} {'finding' if count == 1 else 'findings'} of bad rows: left out.")
    if along:
        lines.append(f"How they were made: [{DATA_CARD}]({DATA_CARD}), the data's own card.")
    elif public:
        lines.append("How they were made: see there.")
    else:
        lines.append("They came without a card that says how they were made.")
    return " ".join(lines)


def _metrics_section(figures: dict | None) -> str:
    if figures is None:
        return "Not evaluated."
    parts = [
        f"Greedy replies of at most {figures['max_new_tokens']} tokens to {figures['prompts']} "
        f"held-out prompts, and {figures['pairs']} held-out pairs. In brackets: "
        f"{figures['interval']}.",
        markdown(evaluation_table(figures)),
    ]
    if figures.get("baselines"):
        known = {k: v for k, v in figures["baselines"].items() if k in BASELINES.values()}
        table = baselines_table(figures | {"baselines": known})
        parts += ["Against what the base model does without training:", markdown(table.T)]
    if "win_rate" in figures:
        rates = win_rates(figures)
        parts += [f"Judge: {figures['win_rate']['judge']}.", markdown(rates)]
    if figures.get("targets"):
        verdicts = pd.Series(figures["targets"], name="verdict").to_frame()
        parts += ["Aims, set before the run:", markdown(verdicts)]
    return "\n\n".join(parts)


def _use(cfg: Config, what: str, base: str, repo: str) -> str:
    repo = repo if "/" in repo else f"OWNER/{repo}"
    if what == "adapter":
        load = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")  # fetches {base}, too'
        )
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")'
        )
    return (
        f"```python\n{load}\n\n"
        'messages = [{"role": "user", "content": "..."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        f"output = model.generate(**inputs, max_new_tokens={cfg.recipe.max_new_tokens}, "
        "do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], '
        "skip_special_tokens=True))\n```"
    )


def _versions(run_dir: Path) -> str:
    try:
        facts = json.loads((run_dir / "environment.json").read_bytes())
    except (OSError, ValueError):
        return "Not noted."
    return markdown(pd.Series(facts, name="version").to_frame())


def _licence_section(base: str, terms: Terms, copy: bool) -> str:
    lines = [f"That of the base model, {base}: `{terms.licence}`."]
    if terms.page:
        lines.append(f"[The agreement]({terms.page}) and its Acceptable Use Policy bind you, too.")
    if terms.notice:
        lines.append(f"{terms.notice}")
    if copy:
        lines.append("A copy is in [LICENSE](LICENSE), the notice in [NOTICE](NOTICE).")
    return "\n\n".join(lines)


def model_card(
    cfg: Config, *, what: str, repo: str, base: str, base_on_hub: bool, terms: Terms,
    figure: bool = False,
) -> ModelCard:  # fmt: skip
    """The card of what `cfg`'s run made, for the repository `repo`.

    `what` is `adapter` or `merged`; `base` the base model's name, which `base_on_hub` says is one
    of the hub's. With `figure`, `before_after.png` goes along.

    Raises:
        CardError: the run's evaluation is damaged.
    """
    figures, along = read_figures(cfg.run_dir), data_card(cfg)
    name = repo.split("/")[-1]
    data = data_name(cfg)
    language = _metadata(along).get("language") if along else None
    metadata = ModelCardData(
        base_model=base if base_on_hub else None,
        datasets=[data] if on_hub(cfg) else None,
        language=language,
        library_name="peft" if what == "adapter" else "transformers",
        license=terms.licence,
        pipeline_tag="text-generation",
        tags=["dpo", "trl", "preference-tuning", *(["lora"] if cfg.model.use_peft else [])],
        model_name=name,
        eval_results=eval_results(cfg, figures) if figures else None,
        # How the hub draws the model's tree.
        base_model_relation=("adapter" if what == "adapter" else "finetune")
        if base_on_hub
        else None,
    )
    steps = _steps(cfg.run_dir)
    kind = (
        f"a LoRA adapter (rank {cfg.model.lora_r})" if what == "adapter"
        else f"the whole model, in {cfg.recipe.merge_dtype}"
    )  # fmt: skip
    sections = {
        "": f"[{base}](https://huggingface.co/{base})" if base_on_hub else f"`{base}`",
        "How to use it": _use(cfg, what, base, repo),
        "Data": _data_section(cfg, along is not None),
        "How it was trained": "Settings, in the names of TRL's `DPOConfig` and `ModelConfig`"
        + (f"; {steps} optimiser steps" if steps else "")
        + f":\n\n```yaml\n{yaml.safe_dump(settings(cfg), sort_keys=False).strip()}\n```",
        "What was measured": _metrics_section(figures)
        + ("\n\n![Before and after](before_after.png)" if figure else ""),
        "What it is not for": "\n".join(f"- {line}" for line in limits(cfg, figures)),
        "Versions": _versions(cfg.run_dir),
        "Licence": _licence_section(base, terms, terms.wants_copy),
    }
    sections[""] += (
        " tuned with [Direct Preference Optimization](https://arxiv.org/abs/2305.18290) on "
        f"{_pairs(cfg)}: {kind}."
    )
    head = f"# {name}\n" + (f"\n**{terms.line}**\n" if terms.line else "")
    body = "\n\n".join(f"## {t}\n\n{text}" if t else text for t, text in sections.items())
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{head}\n{body}\n")


def _steps(run_dir: Path) -> int | None:
    """The optimiser steps of the run, by its log."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError):
        return None


def check_card(card: ModelCard) -> None:
    """What of the hub's rules can be looked at without it: the card reads back as it was written.

    Raises:
        CardError: its metadata do not come back, or the text has a gap.
    """
    again = ModelCard(card.content)
    if again.data.to_dict() != card.data.to_dict():
        raise CardError("the card's metadata change when they are read back; please report it")
    for name, pattern in {"base_model": HUB_NAME, "datasets": HUB_NAME}.items():
        values = again.data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not pattern.fullmatch(value):
                raise CardError(f"the card's {name} {value!r} is no name of the hub's")
