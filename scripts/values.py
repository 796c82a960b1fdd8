"""What a value of the config may be: its type, its range or names, and the nearest good value.

Types, defaults and most names are read from TRL's and transformers' own dataclasses and enums; the
ranges are those that neither of them checks before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from enum import Enum
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from annotated_types import Interval
from peft import TaskType
from pydantic import AllowInfNan, TypeAdapter, ValidationError
from transformers import AttentionInterface
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from trl import DPOConfig

Positive, NotNegative = Interval(gt=0), Interval(ge=0)
Count, Share = Interval(ge=1), Interval(ge=0, lt=1)
SIZE = Interval(ge=1, le=65_536)
SEED = Interval(ge=0, le=2**32 - 1)  # NumPy takes no other

# Upper bounds are far beyond all use: a value above them is a slip.
RANGES = {
    # RecipeArguments
    "train_samples": Count,
    "eval_samples": Count,
    "eval_prompts": Count,
    "side_prompts": Interval(ge=0),
    "loader_timeout": Count,
    "score_margin": NotNegative,
    "test_split_size": Interval(gt=0, lt=1),
    "max_new_tokens": Interval(ge=1, le=131_072),
    "generation_batch_size": SIZE,
    # ModelConfig
    "lora_r": Interval(ge=1, le=8192),
    "lora_alpha": SIZE,
    "lora_dropout": Share,
    # DPOConfig
    "beta": Interval(gt=0, le=100),
    "max_length": Interval(ge=2),
    "pad_to_multiple_of": Count,
    "precompute_ref_batch_size": SIZE,
    "dataset_num_proc": Count,
    "loss_weights": NotNegative,
    "ld_alpha": Interval(ge=0, le=1),
    "label_smoothing": Interval(ge=0, lt=0.5),
    "f_alpha_divergence_coef": Interval(gt=0, lt=1),
    "discopop_tau": Positive,
    "ref_model_mixup_alpha": Interval(ge=0, le=1),
    "ref_model_sync_steps": Count,
    "router_aux_loss_coef": NotNegative,
    # TrainingArguments
    "learning_rate": Interval(ge=0, le=1),
    "num_train_epochs": Interval(gt=0, le=1000),
    "max_steps": Interval(ge=-1),
    "warmup_steps": NotNegative,
    "per_device_train_batch_size": SIZE,
    "per_device_eval_batch_size": SIZE,
    "gradient_accumulation_steps": SIZE,
    "eval_accumulation_steps": Count,
    "weight_decay": Interval(ge=0, le=1),
    "max_grad_norm": NotNegative,
    "adam_beta1": Share,
    "adam_beta2": Share,
    "adam_epsilon": Positive,
    "label_smoothing_factor": Share,
    "neftune_noise_alpha": NotNegative,
    "torch_empty_cache_steps": Count,
    "logging_steps": Positive,
    "eval_steps": Positive,
    "save_steps": Positive,
    "eval_delay": NotNegative,
    "save_total_limit": Count,
    "seed": SEED,
    "data_seed": SEED,
    "dataloader_num_workers": Interval(ge=0, le=1024),
    "dataloader_prefetch_factor": Count,
    "ddp_bucket_cap_mb": Count,
    "ddp_timeout": Count,
}
NOT_EMPTY = {
    "model_name_or_path", "model_revision", "dataset_name", "dataset_revision", "dataset_config",
    "dataset_train_split", "dataset_test_split", "output_dir", "run_name", "wandb_project",
    "resume_from_checkpoint", "lora_target_modules", "loss_type", "questions", "questions_level",
}  # fmt: skip


def _listed(name: str, after: str = "Possible values are") -> list[str]:
    """The names that TRL's argument `name`, which has no `choices`, lists in its help."""
    text = DPOConfig.__dataclass_fields__[name].metadata["help"]
    (names,) = re.findall(after + r": (.*?)\. ", text)
    return re.findall(r"`'?(\w+)'?`", names)


# Names that are neither in `choices` nor in an enum of the argument's type.
NAMES: dict[str, list[str]] = {
    "loss_type": _listed("loss_type"),
    "f_divergence_type": _listed("f_divergence_type"),
    "report_to": ["none", "all", *INTEGRATION_TO_CALLBACK],
    "attn_implementation": ["eager", *AttentionInterface().valid_keys()],
    "lora_task_type": [TaskType.CAUSAL_LM.value],  # the head that DPO trains
    "bnb_4bit_quant_storage": ["uint8", "int8", "float16", "bfloat16", "float32", "float64"],
    "pad_to_multiple_of": ["auto"],
    "max_length": ["auto"],
    "test_split_size": ["auto"],
    "include_num_input_tokens_seen": ["all", "non_padding", "no"],
}
F_DIVERGENCE_LOSSES = _listed("f_divergence_type", "support a non-default value")
# Optimisers by the package that transformers asks for only when training begins.
# https://huggingface.co/docs/transformers/optimizers
PACKAGE_OF_OPTIMISER = {
    "galore": "galore_torch", "apollo": "apollo_torch", "lomo": "lomo_optim",
    "adalomo": "lomo_optim", "grokadamw": "grokadamw", "schedule_free": "schedulefree",
    "stable_adamw": "optimi", "apex": "apex", "torch_4bit": "torchao", "torch_8bit": "torchao",
    "npu": "torch_npu", "xla": "torch_xla", "anyprecision": "torchdistx"
}  # fmt: skip
TOKEN = re.compile(r"hf_\w{8,}|(?<=//)[^/@\s]+@")
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|(?<=//)[^/@\s:]*:[^/@\s]+@")  # surely one


def shown(value: Any) -> str:
    """`value` for a message, in one short line and without a token that stands in it."""
    try:
        text = TOKEN.sub("***", repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in itself
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else text[:110] + " ... " + text[-5:]


def hints_of(*parts: type) -> dict[str, Any]:
    """The type of every argument of the dataclasses `parts`, with its range or names.

    Of an argument that several have, the type in the first of them counts.
    """
    hints: dict[str, Any] = {}
    for part in reversed(parts):
        typed = typing.get_type_hints(part, include_extras=True)
        for field in dataclasses.fields(part):
            if field.init:
                hints[field.name] = _narrowed(field, typed[field.name])
    return hints


def _narrowed(field: dataclasses.Field, hint: Any) -> Any:
    """The type `hint` of `field`: numbers finite and in their range, text one of its names."""
    options = list(_options(hint))
    names = NAMES.get(field.name) or [*field.metadata.get("choices", ())]
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    if enums and str in options:
        names, options = [member.value for one in enums for member in one], [str]
    narrow = Literal[tuple(names)] if names else str
    limits = RANGES.get(field.name, Interval())
    replaced = {
        str: narrow,
        list[str]: list[narrow],
        int: Annotated[int, limits],
        float: Annotated[float, limits, AllowInfNan(False)],
        list[float]: list[Annotated[float, limits, AllowInfNan(False)]],
    }
    if names and not {str, list[str]} & set(options):  # a number, or a name in its place
        options.append(str)
    return typing.Union[tuple(replaced.get(option, option) for option in options)]  # noqa: UP007


def _options(hint: Any) -> tuple:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


class BadValue(ValueError):
    """The value cannot be one of its key; the text is all that follows the key."""


def checked(key: str, hint: Any, value: Any, default: Any = None) -> Any:
    """`value` in the type `hint` of the argument `key` (YAML reads `5e-5` as text).

    Raises:
        BadValue: what it must be, what it is, and the nearest value that it may be.
    """
    names, options = _names(hint), _options(hint)
    if value is False and "no" in names and bool not in options:
        value = "no"  # which YAML reads as false
    if _is_list(hint) and isinstance(value, str):
        value = [value]  # TRL's command line takes one name where it takes several
    try:
        if isinstance(value, bool) and bool not in options and Any not in options:
            raise BadValue("true and false are no such value")  # pydantic takes true as 1
        good = TypeAdapter(hint).validate_python(value)
        words = good if isinstance(good, list) else [good]
        if key in NOT_EMPTY and good is not None and not all(str(w).strip() for w in words or [""]):
            raise BadValue("it is empty")
        if isinstance(good, str) and ("\0" in good or _lone_surrogate(good)):
            raise BadValue("it holds a character that no name has")
    except ValidationError as error:
        reason = _reason(error)
    except (BadValue, RecursionError) as error:
        reason = str(error)
    else:
        return good
    near = nearest(key, hint, value, default)
    suggestion = "" if near is None else f"; the nearest good value is {near}"
    because = f" ({reason})" if reason else ""
    raise BadValue(f"must be {plain(hint)}, got {shown(value)}{because}{suggestion}")


def _reason(error: ValidationError) -> str:
    """Pydantic's message on the option of a union that the value comes nearest to."""
    errors = error.errors(include_input=False, include_url=False)
    if any(one["type"] == "literal_error" for one in errors):
        return ""  # the names are told already
    limits = [one for one in errors if one["type"].startswith(("greater", "less", "finite"))]
    return " ".join((limits or errors)[0]["msg"].split())[:160]


def _lone_surrogate(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_list(hint: Any) -> bool:
    """Whether `hint` takes a list, and no single name."""
    kinds = {typing.get_origin(option) or option for option in _options(hint)}
    return list in kinds and not kinds & {str, Literal}


def _names(hint: Any) -> list[str]:
    """The names that `hint` allows, whether alone or in a list."""
    names = []
    for option in _options(hint):
        inner = typing.get_args(option) if typing.get_origin(option) is list else (option,)
        for one in inner:
            if typing.get_origin(one) is Literal:
                names += [name for name in typing.get_args(one) if isinstance(name, str)]
    return names


def nearest(key: str, hint: Any, value: Any, default: Any) -> str | None:
    """The value that `key` may have which is nearest to `value`, as it is written in a config."""
    number, limits = _number(value), RANGES.get(key)
    if (names := _names(hint)) and (number is None or limits is None):
        words = value if isinstance(value, list) else [value]
        wrong = next((word for word in words if word not in names), names[0])
        near = _near_name(str(wrong).lower(), names, default)
        return near if near != "no" else '"no"'
    if limits is None or number is None:
        return None if default is None else _written(default)
    low, high = limits.ge, limits.le
    if low is not None and number < low:
        return _written(low)
    if high is not None and number > high:
        return _written(high)
    if any(option is int or typing.get_args(option)[:1] == (int,) for option in _options(hint)):
        return _written(round(number))
    return None if default is None else _written(default)  # beyond an open end, or not a number


def _near_name(wrong: str, names: list[str], default: Any) -> str:
    """The name that begins with `wrong` or is spelt most like it; else the default."""
    begin = [name for name in names if wrong.strip() and name.startswith(wrong.strip())]
    near = begin or difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return near[0] if near else _written(default) if _written(default) in names else names[0]


def _number(value: Any) -> float | None:
    """`value` as a finite number, if it is one."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _written(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def plain(hint: Any) -> str:
    """The type `hint` with its range or names, in few words."""
    if typing.get_origin(hint) is Annotated:
        kind, *limits = typing.get_args(hint)
        ends = [text for one in limits if isinstance(one, Interval) for text in _ends(one)]
        return " ".join([plain(kind), *([" and ".join(ends)] if ends else [])])
    if typing.get_origin(hint) is Literal:
        names = [str(name) for name in typing.get_args(hint)]
        more = f", ... ({len(names)} names)" * (len(names) > 16)
        return "one of " + ", ".join(names[:16]) + more
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        whole = list(typing.get_args(hint))
        if any(typing.get_origin(one) is Literal for one in whole):  # and a list of the same names
            whole = [one for one in whole if typing.get_origin(one) is not list]
        return " or ".join(plain(one) for one in whole)
    if typing.get_origin(hint) is list and typing.get_args(hint) != (str,):
        return f"list of {plain(typing.get_args(hint)[0])}"
    if hint is type(None):
        return "null"
    return hint.__name__ if typing.get_origin(hint) is None else str(hint)


def _ends(limits: Interval) -> list[str]:
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    ends = {word: getattr(limits, name) for name, word in words.items()}
    return [f"{word} {end:,}" for word, end in ends.items() if end is not None]


def missing_package(key: str, value: Any) -> str | None:
    """What is not installed here of that which the checked `value` of `key` needs, if anything."""
    if key == "optim":
        names = [name for part, name in PACKAGE_OF_OPTIMISER.items() if part in str(value)]
        return next((name for name in names if find_spec(name) is None), None)
    if key == "report_to":
        have = {"none", "all", *get_available_reporting_integrations()}
        words = value if isinstance(value, list) else [value or "none"]
        return next((word for word in words if word not in have), None)
    if key == "attn_implementation" and str(value) == "flash_attention_2":
        return None if find_spec("flash_attn") else "flash_attn"
    return None


# Arguments that the trained weights do not depend on: where things go, what is logged, kept or
# measured, how batches are fetched. Whatever is not named here counts.
HARMLESS = {
    "output_dir", "run_name", "resume_from_checkpoint", "report_to", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "disable_tqdm", "log_level",
    "log_level_replica", "log_on_each_node", "logging_dir", "logging_strategy",
    "logging_first_step", "logging_steps", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "include_num_input_tokens_per_second", "save_strategy",
    "save_steps", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint",
    "restore_callback_states_from_checkpoint", "push_to_hub", "eval_strategy", "eval_steps",
    "eval_delay", "eval_on_start", "eval_do_concat_batches", "eval_accumulation_steps",
    "eval_use_gather_object", "per_device_eval_batch_size", "do_train", "do_eval", "do_predict",
    "prediction_loss_only", "bf16_full_eval", "fp16_full_eval", "batch_eval_metrics",
    "include_for_metrics", "metric_for_best_model", "greater_is_better", "skip_memory_metrics",
    "torch_empty_cache_steps", "ddp_timeout", "dataset_num_proc", "local_rank", "debug",
    # recomputed activations are the same numbers
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "activation_offloading",
    # the recipe's own
    "max_new_tokens", "generation_batch_size", "eval_prompts", "eval_samples", "merge_dtype",
    "merge_into", "wandb_project", "on_bad_rows", "loader_timeout", "ignore_bias_buffers",
    "questions", "questions_level", "side_prompts", "baselines", "aims",
}  # fmt: skip
HARMLESS_PREFIXES = (
    "hub_",
    "dataloader_num",
    "dataloader_multi",
    "dataloader_pin",
    "dataloader_pre",
    "dataloader_per",
)


def is_harmless(key: str) -> bool:
    """Whether the trained weights do not depend on the argument `key`."""
    return key in HARMLESS or key.startswith(HARMLESS_PREFIXES)
