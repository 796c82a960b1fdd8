"""Read a run's YAML file into TRL's own argument classes, strictly.

The keys are those of TRL's `ScriptArguments`, `ModelConfig` and `DPOConfig`, flat in one file, as
`trl dpo --config` reads them; what is ours alone is `RecipeArguments`. An unknown key, a key
set twice, or a value of the wrong type or out of range is an error before anything loads. Most
values TRL and transformers check themselves; the ranges here are of keys that the configs set.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import hashlib
import json
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from safetensors import SafetensorError, safe_open
from transformers import AttentionInterface
from transformers.integrations.integration_utils import get_available_reporting_integrations
from trl import DPOConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from scripts.base import (
    ROOT,
    InputError,
    RecipeError,
    existing,
    local_path,
    one_line,
    write_whole,
)
from scripts.pairs.files import READ, kind_of
from scripts.pairs.sources import is_url, looks_like_a_path

AUTO = "auto"  # a value that the data decides
MOST_CHANGES, LONGEST_CHANGES = 4, 80  # overrides, and letters of them, in a run's name
PATHS = ("dataset_name", "model_name_or_path", "output_dir")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|(?<=//)[^/@\s:]*:[^/@\s]+@")


class ConfigError(InputError):
    """A mistake in a config file, an override, or a folder that they name."""


@dataclass
class RecipeArguments:
    """What the recipe needs beyond TRL's own arguments."""

    # By the columns; or the name of one of pairs.formats.FORMATS.
    dataset_format: Literal[
        "auto", "explicit", "implicit", "orca", "sharegpt", "alpaca", "hh", "messages",
        "responses", "llamafactory", "swift", "openai", "stackexchange", "compared", "scored",
    ] = "auto"  # fmt: skip
    dataset_columns: dict[str, str] | None = None  # renames, {the source's name: the format's}
    # Of answers with scores: the best against the worst, if they are further apart than this.
    score_margin: NonNegativeFloat = 0.0
    on_bad_rows: Literal["error", "drop"] = "drop"  # dropped ones are written down
    dataset_revision: str | None = None  # branch, tag or commit of a dataset on the hub
    train_samples: PositiveInt | None = None  # use this many training pairs (None: all of them)
    eval_samples: PositiveInt | None = None  # likewise for the held-out pairs
    # Held out when the data has no test split of its own; auto: enough to tell, at most a fifth.
    test_split_size: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] = "auto"
    prefix_sharing: bool = True  # run each prompt once (scripts/sharing), not TRL's way
    max_new_tokens: PositiveInt = 256  # cap on a reply when the model is tried before and after
    generation_batch_size: PositiveInt = 16
    eval_prompts: PositiveInt | None = None  # try this many held-out prompts (None: all of them)
    # Try the models on questions about given texts (a file such as data/passages.jsonl), of this
    # level only, instead of on the prompts of the pairs.
    questions: str | None = None
    questions_level: str | None = None
    # With questions: so many of what was trained on, and of two harm checks.
    side_prompts: NonNegativeInt = 60
    baselines: bool = False  # also what the base does by other means: asked to be brief, cut ...
    # {figure: {at_least: ...}} or {at_most: ...}, in place of those set beforehand
    aims: dict[str, dict[Literal["at_least", "at_most"], float]] | None = None
    # Of the merged model; bfloat16 rounds a small update away.
    merge_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    # What a 4-bit run's adapter is merged into: the 4-bit weights written out, on which it was
    # trained, or the original ones.
    merge_into: Literal["dequantized", "original"] = "dequantized"
    wandb_project: str = "llama3-dpo"


PARTS: dict[str, type] = {
    "recipe": RecipeArguments,
    "script": ScriptArguments,
    "model": ModelConfig,
    "dpo": DPOConfig,
}
FIELDS = {cls: {f.name for f in dataclasses.fields(cls) if f.init} for cls in PARTS.values()}
LOSSES = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Narrower types of TRL's arguments: what is refused otherwise only once the model is loaded.
NARROW: dict[str, Any] = {
    "dtype": Literal["auto", "bfloat16", "float16", "float32"] | None,
    "attn_implementation": Literal[("eager", *AttentionInterface().valid_keys())] | None,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
    "lora_r": PositiveInt,
    "lora_alpha": PositiveInt,
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "beta": Positive,
    "loss_type": list[Literal[tuple(LOSSES)]],
    "max_length": Annotated[int, Field(ge=2)] | Literal["auto"] | None,
    "learning_rate": Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)],
    "num_train_epochs": Positive,
    "per_device_train_batch_size": PositiveInt,
    "per_device_eval_batch_size": PositiveInt,
    "gradient_accumulation_steps": PositiveInt,
    "max_grad_norm": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    "eval_steps": Positive | None,
    "save_steps": Positive,
    "save_total_limit": PositiveInt | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
}
# Of an argument that several classes have, the type in the first of them counts.
HINTS: dict[str, Any] = {
    name: hint
    for cls in reversed(PARTS.values())
    for name, hint in typing.get_type_hints(cls, include_extras=True).items()
    if name in FIELDS[cls]
} | NARROW
# Keys of other trainers: what to set in their place.
FOREIGN = {
    "rpo_alpha": "loss_type: [sigmoid, sft] with loss_weights: [1.0, rpo_alpha]",
    "max_prompt_length": "max_length, which counts prompt and answer",
    "torch_dtype": "dtype",
    "val_set_size": "test_split_size",
    "lora_target": "lora_target_modules",
    "bnb_4bit_compute_dtype": "dtype",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "warmup_ratio": "warmup_steps, which takes a share below 1 too",
}
# Keys that the recipe had; a run folder of an earlier version still has them.
RETIRED = ("loader_timeout", "prefix_attention")
# On a CPU without fast bfloat16; the weights stay in 4 bits.
SLOW_CPU = {"dtype": "float32", "bf16": False}


@dataclass
class Config:
    """One run: the four argument objects, and the values the file and the overrides gave."""

    recipe: RecipeArguments
    script: ScriptArguments
    model: ModelConfig
    dpo: DPOConfig
    given: dict[str, Any] = field(default_factory=dict)
    turned: set[str] = field(default_factory=set)  # keys that `use` or `pin` changed
    slow: list[str] = field(default_factory=list)  # keys that asked a slow CPU for bfloat16
    started: bool = False  # `start_run` has taken the run folder

    @property
    def run_dir(self) -> Path:
        """The folder that everything this run makes goes into."""
        return Path(self.dpo.output_dir)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes, prints and logs: the first, or the only."""
        return self.dpo.process_index == 0

    @property
    def length_is_open(self) -> bool:
        """Whether `max_length` is still to be chosen from the data (`auto`); until then
        `dpo.max_length` holds TRL's default, or an estimate."""
        return self.given.get("max_length") == AUTO

    def settle_max_length(self, length: int) -> None:
        """Put the chosen `max_length` in place of `auto`, in this run's saved config too."""
        before = self._text()
        self.dpo.max_length = self.given["max_length"] = length
        self._save_again(before)

    def arguments(self, cls: type) -> dict[str, Any]:
        """The values that this config gives for one of TRL's argument classes.

        Example:
            >>> DPOConfig(**cfg.arguments(DPOConfig) | {"beta": 0.2})
        """
        given = {k: v for k, v in self.given.items() if k in FIELDS[cls]}
        return given | ({"max_length": self.dpo.max_length} if "max_length" in given else {})

    def use(self, args: DPOConfig) -> None:
        """Train with `args`, a changed `dpo`; what differs goes into the run's saved config."""
        before, then, now = self._text(), self.dpo.to_dict(), args.to_dict()
        changed = {key: value for key, value in now.items() if then.get(key) != value}
        self.turned |= changed.keys()
        self.given |= changed
        self.dpo = args
        self._save_again(before)

    def pin(self, key: str, commit: str) -> None:
        """Name the commit that `key` (a revision) stood for in this run's saved config; this
        process goes on with what it has."""
        path = self.run_dir / "config.yaml"
        if path.is_file() and path.read_text() == self._text():
            self.turned.add(key)
            self.given[key] = commit
            self.save(path)

    def save(self, path: Path) -> None:
        """Write the config so that `load_config(path)` gives this run again."""
        write_whole(path, self._text())

    def _save_again(self, before: str) -> None:
        """Keep the run folder's copy in step, if it holds this very config."""
        path = self.run_dir / "config.yaml"
        if self.is_main_process and path.is_file() and path.read_text() == before:
            self.save(path)

    def _text(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self.recipe) | self.given, sort_keys=False)


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets the last of several equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"{self.name}: `{key.value}` is set twice (lines {lines[key.value]} and "
                    f"{line}); keep one of them"
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def _read_yaml(name: str, text: str) -> Any:
    """`text` as YAML.

    Raises:
        ConfigError: it is no YAML, or a key is set twice in a mapping.
    """
    try:
        loader = _UniqueKeys(text)  # which reads the first characters at once
        loader.name = name
        return loader.get_single_data()
    # A list as a key is a TypeError, a date of month 13 a ValueError.
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {one_line(error)}") from None


def load_config(
    path: str | Path,
    overrides: dict[str, Any] | None = None,
    *,
    output_dir: str | None = None,
    may_lack_gpu: bool = False,
) -> Config:
    """Read the YAML file `path`, apply `overrides`, and build the run's arguments.

    A `max_length` in the file is for the file's data: with another `dataset_name` among the
    overrides and no `max_length`, it is `auto`. A run that is resumed keeps the one it began with.
    `questions`, too, are then left out, and the models tried on the held-out prompts of the data.

    On a CPU without fast bfloat16, `dtype: bfloat16` and `bf16: true` become float32; `start_run`
    says so.

    `output_dir`, if given, is the run folder. With `may_lack_gpu` a config for a GPU is read on a
    machine without one, to plan or check a run that another machine will do; the folders that it
    names may be that machine's, too, and are not looked at.

    Raises:
        ConfigError: the file is missing or no mapping, keys are unknown or set twice, a value is
            of the wrong type, out of range or refused by TRL, two settings contradict each other,
            or a folder that is named cannot serve.
    """
    path, given, slow = _given(path, overrides, output_dir)
    if given.get("max_length") == AUTO and given.get("resume_from_checkpoint"):
        given["max_length"] = _length_of_run(Path(given["output_dir"]) / "config.yaml")
    for key in ("model_name_or_path", "dataset_name"):
        if not given.get(key):
            raise ConfigError(f"{path.name}: `{key}` is not set; name a folder or one of the hub's")
    lacks_gpu = may_lack_gpu and not torch.cuda.is_available()
    parts = _built(path.name, given | {"use_cpu": True} if lacks_gpu else given)
    cfg = Config(**parts, given=given, slow=slow)
    for problem in _contradictions(cfg):
        raise ConfigError(f"{path.name}: {problem}")
    if isinstance(targets := given.get("lora_target_modules"), list):
        # TRL makes a list of one its name, which PEFT would read as a pattern for whole names.
        cfg.model.lora_target_modules = targets if targets != ["all-linear"] else targets[0]
    if not may_lack_gpu:
        check_places(cfg)
    return cfg


def cpu_computes_bfloat16() -> bool:
    """Whether this CPU has fast bfloat16 products (AVX-512). Without them torch falls back to a
    loop that takes a hundred times as long, where float32 takes about twice as long."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _given(
    path: str | Path, overrides: dict[str, Any] | None, output_dir: str | None
) -> tuple[Path, dict[str, Any], list[str]]:
    """The config file; the values that it and the overrides give, checked one by one; and which of
    them were turned into float32's."""
    path, values = _read_file(path)
    overrides = (overrides or {}) | ({"output_dir": output_dir} if output_dir is not None else {})
    file = _checked(path.name, values)
    given = file | _checked("override", overrides)
    given.setdefault("output_dir", f"outputs/{run_name(path.stem, file, given)}")
    other_data = given.get("dataset_name") != values.get("dataset_name")
    if other_data and "max_length" not in overrides:
        given["max_length"] = AUTO
    if other_data and "questions" not in overrides:
        given.pop("questions", None)
    slow = []
    if given.get("use_cpu") and not cpu_computes_bfloat16():
        slow = [key for key in SLOW_CPU if given.get(key) in ("bfloat16", True)]
        given |= {key: SLOW_CPU[key] for key in slow}
    return path, given, slow


def _read_file(path: str | Path) -> tuple[Path, dict]:
    """The config file `path`, looked for here and in the project, and the mapping in it."""
    path = next((p for p in (Path(path), ROOT / path) if os.path.isfile(p)), ROOT / path)
    if not os.path.isfile(path):  # unlike Path.is_file, it bears with a name that is too long
        known = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
        raise ConfigError(f"no config file at {str(path)[:200]}; configs/ has {known}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} could not be read: {error.strerror}") from None
    values = _read_yaml(path.name, text)
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold `key: value` lines")
    return path, values


def _checked(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, each in the type of its argument.

    Raises:
        ConfigError: keys are unknown (all of them are named), or a value does not fit.
    """
    if unknown := [key for key in values if key not in (*HINTS, *RETIRED)]:
        what = "unknown key" + "s" * (len(unknown) > 1)
        raise ConfigError(f"{where}: {what} {'; '.join(map(_instead, unknown))}")
    for key in [key for key in RETIRED if key in values]:
        print(f"{where}: `{key}` is no longer a setting and has no effect")
    return {k: _typed(where, k, value) for k, value in values.items() if k not in RETIRED}


def _instead(key: Any) -> str:
    """An unknown key, and what to write in its place."""
    shown = f"`{_shown(str(key))[1:-1]}`"
    if key in FOREIGN:
        return f"{shown} (instead: {FOREIGN[key]})"
    near = difflib.get_close_matches(str(key), HINTS, n=1, cutoff=0.75)
    return f"{shown} (did you mean `{near[0]}`?)" if near else shown


def _options(hint: Any) -> tuple:
    """The types that a union is of, or the one type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _typed(where: str, key: str, value: Any) -> Any:
    """`value` in the type of the argument `key` (YAML reads `5e-5` as text, and `no` as false)."""
    if key == "hub_token" or (isinstance(value, str) and SECRET.search(value)):
        raise ConfigError(
            f"{where}: `{key}` holds a password or a token, and a config is saved, logged and "
            "shown; export HF_TOKEN for the hub, and put an address's password into ~/.netrc"
        )
    options = _options(HINTS[key])
    if value is False and bool not in options and str in options:
        value = "no"
    lists = any(typing.get_origin(one) is list for one in options)
    if isinstance(value, str) and lists and str not in options:
        value = [value]  # TRL's command line takes one name where it takes several
    adapter = TypeAdapter(HINTS[key], config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        wrong = [re.sub(r", (unable|got) .*", "", one["msg"]) for one in error.errors()]
        must = " or ".join(text.removeprefix("Input should be ") for text in wrong)
        raise ConfigError(f"{where}: `{key}` must be {must}, got {_shown(value)}") from None


def _shown(value: Any) -> str:
    """`value` for a message, in one short line and without a password that stands in it."""
    text = re.sub(r"hf_\w{8,}|(?<=//)[^/@\s]+@", "***", repr(value))
    return text if len(text) <= 120 else text[:110] + " ... " + text[-5:]


def _built(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """The argument objects of `PARTS` with `values` in them."""
    if values.get("max_length") == AUTO:  # TRL's default stands until the data is read
        values = {k: v for k, v in values.items() if k != "max_length"}
    try:
        return {
            name: cls(**{k: v for k, v in values.items() if k in FIELDS[cls]})
            for name, cls in PARTS.items()
        }
    except Exception as error:  # what TRL and transformers check of all that they take, they raise
        reason = one_line(error)
        no_gpu = "; torch sees no GPU here (scripts.preflight says more)" * ("gpu" in reason)
        raise ConfigError(f"{where}: {reason}{no_gpu}") from error


def _contradictions(cfg: Config) -> Iterator[str]:
    """Settings that are each good and together not, as people have set them."""
    script, model, dpo = cfg.script, cfg.model, cfg.dpo
    if dpo.fp16 and cfg.given.get("use_cpu"):
        yield "`fp16: true` needs a GPU; with `use_cpu: true` leave it out"
    if dpo.max_steps == 0:
        yield "`max_steps: 0` trains nothing; -1 trains for `num_train_epochs`"
    if script.dataset_streaming:
        yield "`dataset_streaming: true` is not supported: all data is checked before training"
    if script.dataset_train_split == script.dataset_test_split:
        yield (
            f"dataset_train_split and dataset_test_split are both {script.dataset_train_split!r}: "
            "held-out pairs must not be trained on"
        )
    if not model.use_peft and (model.load_in_4bit or model.load_in_8bit):
        yield (
            "`use_peft: false` trains all weights, and 4-bit or 8-bit weights cannot be trained; "
            "set load_in_4bit (and load_in_8bit) to false, or use_peft to true"
        )
    if model.dtype in (AUTO, None) and model.load_in_4bit:
        yield f"`dtype: {model.dtype}` names no type to compute 4-bit weights in; set bfloat16"
    else:
        try:
            get_quantization_config(model)
            get_peft_config(model)
        except (ValueError, AttributeError, TypeError) as error:
            yield f"the 4-bit or LoRA settings: {one_line(error)}"
    targets = model.lora_target_modules or []
    if model.use_peft and "lm_head" in ([targets] if isinstance(targets, str) else targets):
        yield "`lora_target_modules` names lm_head, which TRL's DPO does not train; leave it out"
    if dpo.push_to_hub:
        yield (
            "`push_to_hub` would publish replies and logs unseen; leave it out, and afterwards: "
            "python -m scripts.export push"
        )
    if cfg.given.get("gradient_checkpointing") and not dpo.gradient_checkpointing:
        yield (
            "gradient_checkpointing: true is overruled by activation_checkpointing: false; set "
            "activation_checkpointing: true"
        )
    if re.search(r"[/\\#?%:]", cfg.recipe.wandb_project):
        yield "`wandb_project` may have none of / \\ # ? % :"
    if (checkpoint := dpo.resume_from_checkpoint) and not Path(checkpoint).is_dir():
        yield f"`resume_from_checkpoint`: there is no folder {checkpoint}"


def _length_of_run(path: Path) -> int | str | None:
    """The `max_length` that the run with this saved config chose, or `auto` if there is none."""
    saved = _read_yaml(path.name, path.read_text()) if path.is_file() else None
    return saved.get("max_length", AUTO) if isinstance(saved, dict) else AUTO


# ---- a run's name, and what it depends on ----

# Arguments that the trained weights do not depend on: where things go, what is logged, kept or
# measured, how batches are fetched, what is recomputed. Whatever is not named here counts.
HARMLESS = {
    "output_dir", "run_name", "resume_from_checkpoint", "report_to", "project", "disable_tqdm",
    "push_to_hub", "per_device_eval_batch_size", "prediction_loss_only", "metric_for_best_model",
    "greater_is_better", "skip_memory_metrics", "torch_empty_cache_steps", "ddp_timeout",
    "dataset_num_proc", "local_rank", "debug", "max_new_tokens", "generation_batch_size",
    "on_bad_rows", "side_prompts", "baselines", "aims",
}  # fmt: skip
HARMLESS_BEGINNINGS = (
    "log_", "logging_", "save_", "eval_", "include_", "hub_", "dataloader_", "trackio_", "wandb_",
    "gradient_checkpointing", "activation_", "merge_", "questions",
)  # fmt: skip


def is_harmless(key: str) -> bool:
    """Whether the trained weights do not depend on the argument `key`."""
    return key in HARMLESS or key.startswith(HARMLESS_BEGINNINGS)


def run_name(stem: str, file: dict[str, Any], given: dict[str, Any]) -> str:
    """The run's name: that of its config, and what `given` says otherwise than the `file`.

    Only what the trained weights depend on is in it, so a run that goes on with another way to log
    or to save goes on in its own folder; and not the processor. Many or long values become a
    digest.

    Example:
        >>> run_name("llama3-8b-a100", {"beta": 0.1}, {"beta": 0.2})
        'llama3-8b-a100-beta-0.2'
    """
    changed = {
        key: value
        for key, value in sorted(given.items())
        if not is_harmless(key) and key != "use_cpu" and (key not in file or file[key] != value)
    }
    as_name = {k: re.sub(r"[^\w.+-]+", "_", str(v)).strip("_") for k, v in changed.items()}
    name = "-".join([stem, *(f"{key}-{value}" for key, value in as_name.items())])
    if len(name) - len(stem) <= LONGEST_CHANGES and len(changed) <= MOST_CHANGES:
        return name
    digest = hashlib.sha256(json.dumps(changed, default=str).encode()).hexdigest()[:8]
    return f"{stem}-{digest}"


def refuse_changed(
    cfg: Config, path: str | Path, overrides: dict[str, Any] | None, output_dir: str | None
) -> None:
    """Raise a `ConfigError` if `cfg` is not what `load_config` would make of these any more.

    For a notebook, where a value can be changed without running what depends on it. The config is
    not built again: that would reset what a trainer in the same process stands on.
    """
    _, now, _ = _given(path, overrides, output_dir)
    then, free = cfg.given, {*cfg.turned, "resume_from_checkpoint"}
    if now.get("max_length") == AUTO:
        free.add("max_length")
    found = [
        f"`{key}` is {_shown(now.get(key))} there and {_shown(then.get(key))} here"
        for key in dict.fromkeys([*now, *then])
        if now.get(key) != then.get(key) and key not in free
    ]
    if found:
        raise ConfigError(
            f"the first cell asks for another run: {'; '.join(found[:4])}. Run the cells from "
            "there to this one again (Run, Run All Above Selected Cell), or put the values back"
        )


# ---- the folders and files that a config names ----


def check_places(cfg: Config) -> None:
    """Look at the folders, files and packages that `cfg` names.

    Raises:
        ConfigError: one of them cannot serve.
    """
    model, data = cfg.model.model_name_or_path, cfg.script.dataset_name
    have = get_available_reporting_integrations()
    if missing := [name for name in cfg.dpo.report_to if name not in have]:
        raise ConfigError(
            f"`report_to: {missing[0]}` is unknown or not installed; set report_to to wandb or none"
        )
    if cfg.model.attn_implementation == "flash_attention_2" and find_spec("flash_attn") is None:
        raise ConfigError("`attn_implementation: flash_attention_2` needs flash_attn; set sdpa")
    _check_model(model)
    _check_dataset(data)
    if questions := cfg.recipe.questions:
        from scripts.pairs.passages import read_questions

        try:
            read_questions(ROOT / questions, "test", cfg.recipe.questions_level)
        except RecipeError as error:
            raise ConfigError(f"questions: {error}") from None
    if cfg.is_main_process:
        _check_run_folder(cfg.run_dir, model, data)


def refuse_pickles(name: str, files: list[str]) -> None:
    """Refuse a model whose weights are pickles, which run code as they are loaded.

    Raises:
        ConfigError: none of `files` is a `.safetensors`; it names what there is.
    """
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth")) and "training_args" not in f]
    what = f"its weights in {pickles[0]}, a pickle" if pickles else "no .safetensors file"
    raise ConfigError(
        f"{name} has {what}; this recipe reads safetensors only, convert it: "
        "https://huggingface.co/docs/safetensors/convert-weights"
    )


def _check_model(name: str) -> None:
    """Refuse what cannot be a model: a file, an address, a folder without whole safetensors.

    A name of the hub is only looked at, not asked for.
    """
    folder = Path(os.path.expanduser(name))
    if not os.path.isdir(folder):
        if os.path.isfile(folder) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise ConfigError(
                f"model_name_or_path: {name} is no folder here, and no name on the hub, which is "
                "OWNER/MODEL"
            )
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model_name_or_path: {name} has no config.json: it holds no model")
    refuse_pickles(name, sorted(path.name for path in folder.iterdir()))
    refuse_cut_weights(folder)


def refuse_cut_weights(folder: Path) -> None:
    """Refuse a folder with a `.safetensors` that is not whole.

    Raises:
        ConfigError: it names the file.
    """
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{path} is cut or damaged ({one_line(error, 80)}); copy or download it again (git "
                "clone needs git-lfs)"
            ) from None


def _check_dataset(name: str) -> None:
    """Refuse a file or folder that is not there, or that has no data in it."""
    if is_url(name):  # fetched when it is read
        return
    path = local_path(name)
    if path is None:
        if looks_like_a_path(name):
            raise ConfigError(f"dataset_name: there is no file or folder {name}")
        return
    if path.is_file() and not path.stat().st_size:
        raise ConfigError(f"dataset_name: {name} is empty: there is no data in it")
    files = [path] if path.is_file() else path.rglob("*")
    if not any(kind_of(file) in READ and file.stat().st_size for file in files):
        raise ConfigError(
            f"dataset_name: no data in {name} ({', '.join(READ)}); save a spreadsheet as CSV, "
            "unpack an archive"
        )


def _check_run_folder(folder: Path, *others: str) -> None:
    """Refuse a run folder that cannot be written to, or that holds what is not the run's.

    It is tried by a folder that is made there and removed. `others` are the model and the dataset.
    """
    whole = folder.absolute().resolve()
    read = {path.resolve() for name in others if (path := local_path(name)) is not None}
    if whole in {ROOT, *ROOT.parents, Path.home(), ROOT / "data", *read}:
        raise ConfigError(f"output_dir: {folder} holds more than a run; name another folder")
    try:
        with tempfile.TemporaryDirectory(prefix=".try-", dir=existing(whole)):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"output_dir: {folder} cannot be written to ({reason})") from None


# ---- the command line ----


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["beta=0.2", "report_to=none"]` as a mapping, each value read as YAML.

    Raises:
        ConfigError: one of them is no `key=value`, or its value is no YAML.
    """
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {_shown(pair)}")
        is_path = key.strip() in PATHS and value and os.path.exists(os.path.expanduser(value))
        # What is there is meant by its name, though YAML would read `my #1.jsonl` as `my`.
        overrides[key.strip()] = value if is_path else _read_yaml(f"--set {key.strip()}", value)
    return overrides


def config_from_args(args: argparse.Namespace, *, may_lack_gpu: bool = False) -> Config:
    """The `Config` that a command's options ask for; `may_lack_gpu` as in `load_config`."""
    return load_config(
        args.config,
        parse_overrides(args.overrides),
        output_dir=args.output_dir,
        may_lack_gpu=may_lack_gpu,
    )
