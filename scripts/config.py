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
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from trl import DPOConfig, ModelConfig, ScriptArguments

from scripts.base import ROOT, InputError
from scripts.places import check_dataset, check_model, check_run_folder
from scripts.rules import contradictions
from scripts.values import (
    SECRET,
    BadValue,
    checked,
    hints_of,
    is_harmless,
    missing_package,
    shown,
)

MOST_BRACKETS = 1000
MOST_CHANGES, LONGEST_CHANGES = 4, 80  # overrides, and letters of them, in a run's name
PATHS = ("dataset_name", "model_name_or_path", "output_dir")


class ConfigError(InputError):
    """A mistake in a config file or an override."""


AUTO = "auto"  # a value that the data decides


@dataclass
class RecipeArguments:
    """What the recipe needs beyond TRL's own arguments; ranges are in `values.RANGES`."""

    # By the columns; or the name of one of pairs.formats.FORMATS.
    dataset_format: Literal[
        "auto", "explicit", "implicit", "orca", "sharegpt", "alpaca", "hh", "messages",
        "responses", "llamafactory", "swift", "openai", "stackexchange", "compared", "scored",
        "unpaired",
    ] = "auto"  # fmt: skip
    dataset_columns: dict[str, str] | None = None  # renames, {the source's name: the format's}
    # Of answers with scores: the best against the worst, if they are further apart than this.
    score_margin: float = 0.0
    on_bad_rows: Literal["error", "drop"] = "drop"  # dropped ones are written down
    dataset_revision: str | None = None  # branch, tag or commit of a dataset on the hub
    train_samples: int | None = None  # use this many training pairs (None: all of them)
    eval_samples: int | None = None  # likewise for the held-out pairs
    # Held out when the data has no test split of its own; auto: enough to tell, at most a fifth.
    test_split_size: float | Literal["auto"] = "auto"
    prefix_sharing: bool = True  # run each prompt once (scripts/sharing), not TRL's way
    prefix_attention: Literal["segments", "mask", "flex"] = "segments"
    max_new_tokens: int = 256  # cap on a reply when the model is tried before and after
    generation_batch_size: int = 16
    eval_prompts: int | None = None  # try this many held-out prompts (None: all of them)
    # Try the models on questions about given texts (a file such as data/passages.jsonl), of this
    # level only, instead of on the prompts of the pairs.
    questions: str | None = None
    questions_level: str | None = None
    side_prompts: int = 60  # with questions: so many of what was trained on, and of two harm checks
    baselines: bool = False  # also what the base does by other means: asked to be brief, cut ...
    # {figure: {at_least: ...}} or {at_most: ...}, in place of those set beforehand
    aims: dict[str, dict[Literal["at_least", "at_most"], float]] | None = None
    loader_timeout: int = 600  # seconds that the next batch may take before training stops
    # Of the merged model; bfloat16 rounds a small update away.
    merge_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    # What a 4-bit run's adapter is merged into: the 4-bit weights written out, on which it was
    # trained, or the original ones.
    merge_into: Literal["dequantized", "original"] = "dequantized"
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

    @property
    def length_is_open(self) -> bool:
        """Whether `max_length` is still to be chosen from the data (`auto`); until then
        `dpo.max_length` holds TRL's default, or an estimate."""
        return self.given.get("max_length") == AUTO

    def settle_max_length(self, length: int) -> None:
        """Put the chosen `max_length` in place of `auto`, in this run's saved config too."""
        path = self.run_dir / "config.yaml"
        ours = self.is_main_process and path.is_file() and path.read_text() == self._text()
        self.dpo.max_length = self.given["max_length"] = length
        if ours:
            self.save(path)

    def save(self, path: Path) -> None:
        """Write the config so that `load_config(path)` gives this run again; a kill or a full disk
        leaves what was there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            part.write_text(self._text())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _text(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self.recipe) | self.given, sort_keys=False)


PARTS: dict[str, type] = {
    "recipe": RecipeArguments,
    "script": ScriptArguments,
    "model": ModelConfig,
    "dpo": DPOConfig,
}
HINTS = hints_of(*PARTS.values())
DEFAULTS: dict[str, Any] = {
    f.name: f.default
    for part in reversed(PARTS.values())
    for f in dataclasses.fields(part)
    if f.default is not dataclasses.MISSING
}


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
    if sum(map(text.count, "[{")) > MOST_BRACKETS:  # PyYAML's time grows with their square
        raise ConfigError(f"{name} has more than {MOST_BRACKETS} brackets: that is no config")
    try:
        loader = _UniqueKeys(text)  # which reads the first characters at once
        loader.name = name
        return loader.get_single_data()
    # A list as a key is a TypeError, a date of month 13 a ValueError.
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None


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

    `output_dir`, if given, is the run folder. With `may_lack_gpu` a config for a GPU is read on a
    machine without one, to plan or check a run that another machine will do; the folders that it
    names may be that machine's, too, and are not looked at. What the config itself says stays in
    `given`.

    Raises:
        ConfigError: the file is missing or is no mapping, a key is unknown (the message names the
            nearest one) or stands twice, a value is of the wrong type, out of range or refused by
            TRL, or two settings contradict each other.
        PlaceError: the model's folder is damaged, the run folder cannot be written to, or the
            dataset is not there.
    """
    path, given = _given(path, overrides, output_dir)
    if given.get("max_length") == AUTO and given.get("resume_from_checkpoint"):
        given["max_length"] = _length_of_run(Path(given["output_dir"]) / "config.yaml")
    for key, value in given.items():
        if not may_lack_gpu and (package := missing_package(key, value)):
            raise ConfigError(f"{path.name}: `{key}: {value}` needs {package}, not installed here")
    for key in ("model_name_or_path", "dataset_name"):
        if not given.get(key):
            raise ConfigError(f"{path.name}: `{key}` is not set; name a folder or one of the hub's")
    lacks_gpu = may_lack_gpu and not torch.cuda.is_available()
    parts = _built(path.name, given | {"use_cpu": True} if lacks_gpu else given)
    for problem in contradictions(given, **parts):
        raise ConfigError(f"{path.name}: {problem}")
    if isinstance(targets := given.get("lora_target_modules"), list):
        # TRL makes a list of one its name, which PEFT would read as a pattern for whole names.
        parts["model"].lora_target_modules = targets if targets != ["all-linear"] else targets[0]
    cfg = Config(**parts, given=given)
    if not may_lack_gpu:
        check_places(cfg)
    return cfg


def _given(
    path: str | Path, overrides: dict[str, Any] | None, output_dir: str | None
) -> tuple[Path, dict[str, Any]]:
    """The config file, and the values that it and the overrides give, checked one by one."""
    path, values = _read_file(path)
    if not isinstance(overrides, dict | None):
        raise ConfigError(
            f"overrides must be a mapping such as {{'beta': 0.2}}, got {shown(overrides)}"
        )
    file = {key: _checked(path.name, key, value) for key, value in values.items()}
    overrides = (overrides or {}) | ({"output_dir": output_dir} if output_dir is not None else {})
    given = file | {key: _checked("override", key, value) for key, value in overrides.items()}
    given.setdefault("output_dir", f"outputs/{run_name(path.stem, file, given)}")
    other_data = given.get("dataset_name") != values.get("dataset_name")
    if other_data and "max_length" not in overrides:
        given["max_length"] = AUTO
    if other_data and "questions" not in overrides:
        given.pop("questions", None)
    return path, given


def run_name(stem: str, file: dict[str, Any], given: dict[str, Any]) -> str:
    """The run's name: that of its config, and what `given` says otherwise than the `file`.

    Only what the trained weights depend on is in it, so a run that goes on with another way to log
    or to save goes on in its own folder; and not the processor. Many or long values are told by a
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
    words = [f"{key}-{_as_name(value)}" for key, value in changed.items()]
    name = "-".join([stem, *words])
    if len(name) - len(stem) <= LONGEST_CHANGES and len(words) <= MOST_CHANGES:
        return name
    digest = hashlib.sha256(json.dumps(changed, default=str).encode()).hexdigest()[:8]
    return f"{stem}-{digest}"


def _as_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def refuse_changed(
    cfg: Config, path: str | Path, overrides: dict[str, Any] | None, output_dir: str | None
) -> None:
    """Raise a `ConfigError` if `cfg` is not what `load_config` would make of these any more.

    For a notebook, where a value can be changed without running what depends on it. The config is
    not built again: that would reset what a trainer in the same process stands on.
    """
    _, now = _given(path, overrides, output_dir)
    then = cfg.given
    found = [
        f"`{key}` is {shown(now.get(key))} there and {shown(then.get(key))} here"
        for key in dict.fromkeys([*now, *then])
        if now.get(key) != then.get(key)
        and not (key == "max_length" and now.get(key) == AUTO)
        and key != "resume_from_checkpoint"
    ]
    if found:
        raise ConfigError(
            f"the first cell asks for another run: {'; '.join(found[:4])}. Run the cells from "
            "there to this one again (Run, Run All Above Selected Cell), or put the values back"
        )


def check_places(cfg: Config) -> None:
    """Look at the folders and files that `cfg` names.

    Raises:
        PlaceError: one of them cannot serve.
    """
    model, data = cfg.model.model_name_or_path, cfg.script.dataset_name
    check_model(model)
    check_dataset(data)
    if cfg.is_main_process:
        check_run_folder(cfg.run_dir, model, data)


def _read_file(path: str | Path) -> tuple[Path, dict]:
    """The config file `path`, looked for here and in the project, and the mapping in it."""
    if not isinstance(path, str | Path) or not str(path).strip() or "\0" in str(path):
        raise ConfigError(f"the config must be the name of a YAML file, got {shown(path)}")
    path = next((p for p in (Path(path), ROOT / path) if os.path.isfile(p)), ROOT / path)
    if not os.path.isfile(path):  # unlike Path.is_file, it bears with a name that is too long
        known = ", ".join(sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
        raise ConfigError(f"no config file at {str(path)[:200]}; configs/ has {known}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path.name} is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    values = _read_yaml(path.name, text)
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold `key: value` lines")
    return path, values


def _built(where: str, values: dict[str, Any]) -> dict[str, Any]:
    """The argument objects of `PARTS` with `values` in them."""
    if values.get("max_length") == AUTO:  # TRL's default stands until the data is read
        values = {k: v for k, v in values.items() if k != "max_length"}
    try:
        return {
            name: part(**{k: v for k, v in values.items() if k in _field_names(part)})
            for name, part in PARTS.items()
        }
    except Exception as error:  # what TRL and transformers check of all that they take, they raise
        reason = " ".join(str(error).split()) or type(error).__name__
        no_gpu = "; torch sees no GPU here (scripts.preflight says more)" * ("gpu" in reason)
        about = "".join(f" `{key}`:" for key in _culprits(values) if key not in reason)
        raise ConfigError(f"{where}:{about} {reason}{no_gpu}") from error


def _culprits(values: dict[str, Any]) -> list[str]:
    """The keys without which the arguments can be built, at most two."""
    found = []
    for key in values:
        rest = {k: v for k, v in values.items() if k != key}
        with suppress(Exception):
            for part in PARTS.values():
                part(**{k: v for k, v in rest.items() if k in _field_names(part)})
            found.append(key)
    return found[:2]


def _length_of_run(path: Path) -> int | str | None:
    """The `max_length` that the run with this saved config chose, or `auto` if there is none."""
    saved = _read_yaml(path.name, path.read_text()) if path.is_file() else None
    return saved.get("max_length", AUTO) if isinstance(saved, dict) else AUTO


def _field_names(part: type) -> set[str]:
    return {f.name for f in dataclasses.fields(part)}


def _checked(where: str, key: str, value: Any) -> Any:
    """`value` in the type of the argument `key`, or a `ConfigError`."""
    if key not in HINTS:
        near = difflib.get_close_matches(str(key), HINTS, n=1, cutoff=0.0)
        raise ConfigError(f"{where}: unknown key `{shown(key)[1:-1]}`; did you mean `{near[0]}`?")
    if key == "hub_token":
        raise ConfigError(
            f"{where}: `hub_token`: a config is saved, logged and shown, so it is no place for a "
            "token; export HF_TOKEN instead"
        )
    if isinstance(value, str) and SECRET.search(value):
        raise ConfigError(
            f"{where}: `{key}` holds a password or a token, and a config is saved, logged and "
            "shown; export HF_TOKEN for the hub, and put an address's password into ~/.netrc"
        )
    try:
        return checked(key, HINTS[key], value, DEFAULTS.get(key))
    except BadValue as error:
        raise ConfigError(f"{where}: `{key}` {error}") from None


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """`["beta=0.2", "report_to=none"]` as a mapping, each value read as YAML.

    Raises:
        ConfigError: one of them is no `key=value`, or its value is no YAML.
    """
    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes key=value, got {shown(pair)}")
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
