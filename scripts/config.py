"""Read a run's YAML file into TRL's own argument classes, strictly.

The keys are those of TRL's `ScriptArguments`, `ModelConfig` and `DPOConfig`, flat in one file, as
`trl dpo --config` reads them; what is ours alone is `RecipeArguments`. A key nobody knows, a key
that stands twice, or a value of the wrong type or out of range is an error before anything is
loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from trl import DPOConfig, ModelConfig, ScriptArguments

from scripts.cli import ROOT, RecipeError


class ConfigError(RecipeError):
    """A mistake in a config file or an override."""


AtLeast1 = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


@dataclass
class RecipeArguments:
    """What the recipe needs beyond TRL's own arguments, each with what it may be."""

    # By the columns; or the name of one of pairs.formats.FORMATS.
    dataset_format: Literal[
        "auto", "explicit", "implicit", "orca", "sharegpt", "alpaca", "hh"
    ] = "auto"  # fmt: skip
    dataset_columns: dict[str, str] | None = None  # renames, {the source's name: the format's}
    on_bad_rows: Literal["error", "drop"] = "drop"  # dropped ones are written down
    train_samples: AtLeast1 | None = None  # use this many training pairs (None: all of them)
    eval_samples: AtLeast1 | None = None  # likewise for the held-out pairs
    test_split_size: Share = 0.02  # held out when the data has no test split of its own
    prefix_sharing: bool = True  # run each prompt once (scripts/sharing), not TRL's way
    prefix_attention: Literal["segments", "mask", "flex"] = "segments"
    max_new_tokens: AtLeast1 = 256  # cap on a reply when the model is tried before and after
    generation_batch_size: AtLeast1 = 16
    eval_prompts: AtLeast1 | None = None  # try this many held-out prompts (None: all of them)
    loader_timeout: AtLeast1 = 600  # seconds that the next batch may take before training stops
    # Of the merged model; bfloat16 rounds a small update away.
    merge_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    wandb_project: Annotated[str, Field(min_length=1)] = "llama3-dpo"


@dataclass
class Config:
    """One run: the four argument objects, and the values the file and the overrides gave."""

    recipe: RecipeArguments
    script: ScriptArguments
    model: ModelConfig
    dpo: DPOConfig
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        """The folder that everything this run makes goes into."""
        return Path(self.dpo.output_dir)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes, prints and logs: the first, or the only."""
        return self.dpo.process_index == 0

    def save(self, path: Path) -> None:
        """Write the config so that `load_config(path)` gives this run again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = dataclasses.asdict(self.recipe) | self.given
        path.write_text(yaml.safe_dump(values, sort_keys=False))


PARTS: dict[str, type] = {
    "recipe": RecipeArguments,
    "script": ScriptArguments,
    "model": ModelConfig,
    "dpo": DPOConfig,
}
# Of TRL's own arguments those whose senseless values neither TRL nor transformers refuses.
RANGES = {
    "lora_r": Field(ge=1),
    "lora_alpha": Field(ge=1),
    "max_length": Field(ge=2),
    "beta": Field(gt=0, allow_inf_nan=False),
    "lora_dropout": Field(ge=0, lt=1),
    "ld_alpha": Field(ge=0, le=1),
    "label_smoothing": Field(ge=0, lt=0.5),
    "weight_decay": Field(ge=0),
    "max_grad_norm": Field(ge=0),
    "seed": Field(ge=0),
    "learning_rate": Field(ge=0, allow_inf_nan=False),
    "num_train_epochs": Field(gt=0, allow_inf_nan=False),
    "per_device_train_batch_size": Field(ge=1),
    "per_device_eval_batch_size": Field(ge=1),
    "gradient_accumulation_steps": Field(ge=1),
}
HINTS: dict[str, Any] = {
    f.name: typing.get_type_hints(part, include_extras=True)[f.name]
    for part in reversed(PARTS.values())
    for f in dataclasses.fields(part)
    if f.init
}
HINTS |= {name: Annotated[HINTS[name], limits] for name, limits in RANGES.items()}


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets the last of several equal keys win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"{self.name}: `{key.value}` stands twice, in lines {lines[key.value]} and "
                    f"{line}; keep one of them"
                )
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


def _read_yaml(name: str, text: str) -> Any:
    """`text` as YAML.

    Raises:
        ConfigError: it is no YAML, or a key stands twice in a mapping.
    """
    try:
        loader = _UniqueKeys(text)  # which reads the first characters at once
        loader.name = name
        return loader.get_single_data()
    except (yaml.YAMLError, TypeError) as error:  # a list as a key is a TypeError
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


def load_config(
    path: str | Path, overrides: dict[str, Any] | None = None, *, may_lack_gpu: bool = False
) -> Config:
    """Read the YAML file `path`, apply `overrides`, and build the run's arguments.

    With `may_lack_gpu` a config for a GPU is read on a machine without one, to plan or check a run
    that another machine will do. What the config itself says stays in `given`.

    Raises:
        ConfigError: the file is missing or is no mapping, a key is unknown (the message names the
            nearest one) or stands twice, a value is of the wrong type, out of range or refused by
            TRL, or weights of 4 or 8 bits are to be trained themselves.
    """
    path = Path(path)
    if not path.is_file() and not path.is_absolute():
        path = ROOT / path
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
        raise ConfigError(f"no config file at {path}; configs/ has {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not UTF-8 text") from None
    values = _read_yaml(path.name, text)
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold `key: value` lines")
    given = {key: _checked(path.name, key, value) for key, value in values.items()}
    given |= {key: _checked("override", key, value) for key, value in (overrides or {}).items()}
    given.setdefault("output_dir", f"outputs/{path.stem}")
    values = given | {"use_cpu": True} if may_lack_gpu and not torch.cuda.is_available() else given
    try:
        parts = {
            name: part(**{k: v for k, v in values.items() if k in _field_names(part)})
            for name, part in PARTS.items()
        }
    except (ValueError, TypeError, ImportError) as error:
        no_gpu = "; torch sees no GPU here (scripts.preflight says more)" * ("gpu" in str(error))
        raise ConfigError(f"{path.name}: {error}{no_gpu}") from error
    if not parts["model"].use_peft and (parts["model"].load_in_4bit or parts["model"].load_in_8bit):
        raise ConfigError(
            f"{path.name}: `use_peft: false` trains all of the weights, and weights of 4 or 8 bits "
            "cannot be trained; set load_in_4bit (and load_in_8bit) to false, or use_peft to true"
        )
    if given.get("gradient_checkpointing") and not parts["dpo"].gradient_checkpointing:
        raise ConfigError(
            f"{path.name}: gradient_checkpointing: true is overruled by activation_checkpointing: "
            "false; set activation_checkpointing: true"
        )
    if isinstance(targets := given.get("lora_target_modules"), list):
        # TRL makes a list of one its name, which PEFT would read as a pattern for whole names.
        parts["model"].lora_target_modules = targets if targets != ["all-linear"] else targets[0]
    return Config(**parts, given=given)


def _field_names(part: type) -> set[str]:
    return {f.name for f in dataclasses.fields(part) if f.init}


def _checked(where: str, key: str, value: Any) -> Any:
    """`value` in the type of the argument `key` (YAML reads `5e-5` as text), or a `ConfigError`."""
    if key not in HINTS:
        near = difflib.get_close_matches(str(key), HINTS, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: unknown key `{key}`; did you mean `{near[0]}`?")
    hint = HINTS[key]
    if hint in (list[str], list[str] | None) and isinstance(value, str):
        value = [value]  # TRL's command line takes one name where it takes several
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(
            f"{where}: `{key}` must be {_plain(hint)}, got {value!r} ({reason})"
        ) from None


def _plain(hint: Any) -> str:
    """The type `hint` in few words, its range left to pydantic's own message."""
    if typing.get_origin(hint) is Annotated:
        return _plain(typing.get_args(hint)[0])
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_plain(one) for one in typing.get_args(hint))
    if hint is type(None):
        return "null"
    return hint.__name__ if typing.get_origin(hint) is None else str(hint)


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["beta=0.2", "report_to=none"]` as a mapping, each value read as YAML.

    Raises:
        ConfigError: one of them is no `key=value`, or its value is no YAML.
    """
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {pair!r}")
        overrides[key.strip()] = _read_yaml(f"--set {key.strip()}", value)
    return overrides


def config_from_args(args: argparse.Namespace, *, may_lack_gpu: bool = False) -> Config:
    """The `Config` that a command's options ask for; `may_lack_gpu` as in `load_config`."""
    overrides = parse_overrides(args.overrides)
    if args.output_dir:
        overrides["output_dir"] = args.output_dir
    return load_config(args.config, overrides, may_lack_gpu=may_lack_gpu)
