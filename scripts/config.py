"""Read a run's YAML file into TRL's own argument classes, strictly.

The keys are those of TRL's `ScriptArguments`, `ModelConfig` and `DPOConfig`, flat in one file, as
`trl dpo --config` reads them; what is ours alone is `RecipeArguments`. A key nobody knows or a
value of the wrong type is an error before anything is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from trl import DPOConfig, ModelConfig, ScriptArguments

from scripts.cli import ROOT, RecipeError


class ConfigError(RecipeError):
    """A mistake in a config file or an override."""


@dataclass
class RecipeArguments:
    """What the recipe needs beyond TRL's own arguments."""

    dataset_format: str = "auto"  # by the columns; or the name of one of formats.FORMATS
    dataset_columns: dict[str, str] | None = None  # renames, {the source's name: the format's}
    on_bad_rows: typing.Literal["error", "drop"] = "drop"  # dropped ones are written down
    train_samples: int | None = None  # use this many training pairs (None: all of them)
    eval_samples: int | None = None  # likewise for the held-out pairs
    test_split_size: float = 0.02  # share held out when the data has no test split of its own
    prefix_sharing: bool = True  # run each prompt once (scripts/sharing), not TRL's way
    prefix_attention: typing.Literal["segments", "mask", "flex"] = "segments"
    max_new_tokens: int = 256  # cap on a reply when the model is tried before and after
    generation_batch_size: int = 16
    eval_prompts: int | None = None  # try this many held-out prompts (None: all of them)
    merge_dtype: str = "float16"  # of the merged model; bfloat16 rounds a small update away
    wandb_project: str = "llama3-dpo"


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
HINTS: dict[str, Any] = {
    f.name: typing.get_type_hints(part)[f.name]
    for part in reversed(PARTS.values())
    for f in dataclasses.fields(part)
    if f.init
}


def load_config(
    path: str | Path, overrides: dict[str, Any] | None = None, *, may_lack_gpu: bool = False
) -> Config:
    """Read the YAML file `path`, apply `overrides`, and build the run's arguments.

    With `may_lack_gpu` a config for a GPU is read on a machine without one, to plan or check a run
    that another machine will do. What the config itself says stays in `given`.

    Raises:
        ConfigError: the file is missing or is no mapping, a key is unknown (the message names the
            nearest one), a value is of the wrong type or refused by TRL, or weights of 4 or 8 bits
            are to be trained themselves.
    """
    path = Path(path)
    if not path.is_file() and not path.is_absolute():
        path = ROOT / path
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
        raise ConfigError(f"no config file at {path}; configs/ has {known}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from None
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
    return Config(**parts, given=given)


def _field_names(part: type) -> set[str]:
    return {f.name for f in dataclasses.fields(part) if f.init}


def _checked(where: str, key: str, value: Any) -> Any:
    """`value` in the type of the argument `key` (YAML reads `5e-5` as text), or a `ConfigError`."""
    if key not in HINTS:
        near = difflib.get_close_matches(str(key), HINTS, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: unknown key `{key}`; did you mean `{near[0]}`?")
    hint = HINTS[key]
    if hint == list[str] and isinstance(value, str):
        value = [value]  # TRL's command line takes one name where it takes several
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        wanted = getattr(hint, "__name__", None) or str(hint)
        wanted = wanted if typing.get_origin(hint) is None else str(hint)
        raise ConfigError(
            f"{where}: `{key}` must be {wanted}, got {value!r} ({error.errors()[0]['msg']})"
        ) from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["beta=0.2", "report_to=none"]` as a mapping, each value read as YAML."""
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {pair!r}")
        overrides[key.strip()] = yaml.safe_load(value)
    return overrides


def config_from_args(args: argparse.Namespace, *, may_lack_gpu: bool = False) -> Config:
    """The `Config` that a command's options ask for; `may_lack_gpu` as in `load_config`."""
    overrides = parse_overrides(args.overrides)
    if args.output_dir:
        overrides["output_dir"] = args.output_dir
    return load_config(args.config, overrides, may_lack_gpu=may_lack_gpu)
