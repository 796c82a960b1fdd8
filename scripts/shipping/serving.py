"""Files that serve the tuned model: for Ollama, vLLM and NVIDIA NIM.

    python -m scripts.export serve-files --config outputs/<run>/config.yaml

writes `serve/` in the run folder; its README has the commands. None of the three programs is
needed to write them.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from scripts.adapter import trained_folder
from scripts.base import RecipeError
from scripts.config import Config
from scripts.pairs.tokens import end_tokens
from scripts.shipping.gguf import conversations

ROLES = ("system", "user", "assistant")
# https://docs.vllm.ai/en/latest/api/vllm/config/lora, MaxLoRARanks
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# https://docs.nvidia.com/nim/large-language-models/latest/peft.html
NIM_MODULES = {"gate_proj", "o_proj", "up_proj", "down_proj", "k_proj", "q_proj", "v_proj"}
PREFERRED = ("q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m", "f32")  # GGUF files, for Ollama


class ServingError(RecipeError):
    """The model cannot be served so; the message says what to do instead."""


@dataclass
class Turns:
    """What a chat template writes around the text of each role, before the reply, and by itself."""

    around: dict[str, tuple[str, str]]
    reply: str
    system: str | None  # the system prompt of conversations that have none

    def go_template(self) -> str:
        """The same as Ollama's TEMPLATE, in Go's text/template.

        https://github.com/ollama/ollama/blob/main/docs/template.md
        """
        cases = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for word, (role, (before, after)) in zip(
                ("if", "else if", "else if"), self.around.items(), strict=True
            )
        )
        return f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{self.reply}"

    def prompt(self, messages: list[dict]) -> str:
        """What Ollama makes of a conversation with this template and system prompt.

        It puts the Modelfile's SYSTEM before a conversation that has none, and two messages of one
        role in a row become one (`collate` in its template/template.go).
        """
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        joined: list[dict] = []
        for message in messages:
            if joined and joined[-1]["role"] == message["role"]:
                joined[-1]["content"] += "\n\n" + message["content"]
            else:
                joined.append(dict(message))
        texts = (m["content"].join(self.around[m["role"]]) for m in joined)
        return "".join(texts) + self.reply


def template_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict], reply=True) -> str:
    """The prompt as text, without a begin-of-text that the tokenizer adds to any text itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds and tokenizer.bos_token else text


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Find out what the chat template writes around each role's text, by asking it.

    Raises:
        ServingError: it writes something else than the same marks around every text.
    """
    marks = {"system": "s\u241eS", "user": "u\u241eU", "assistant": "a\u241eA", "again": "v\u241eV"}

    def parts(*roles: str, reply: bool = False) -> list[str]:
        """The text between the marks of `roles`."""
        messages = [{"role": {"again": "user"}.get(r, r), "content": marks[r]} for r in roles]
        text, found = template_text(tokenizer, messages, reply), []
        for role in roles:
            before, mark, text = text.partition(marks[role])
            if not mark:
                raise ServingError(f"the chat template does not write a text of {role} as it is")
            found.append(before)
        return [*found, text]

    try:
        user_end, assistant_end = parts("user")[-1], parts("user", "assistant")[-1]
        start, to_user, to_assistant, to_again, _ = parts("system", "user", "assistant", "again")
        reply = parts("user", reply=True)[-1].removeprefix(user_end)
    except ServingError:
        raise
    except Exception as error:  # a template raises what it likes
        raise ServingError(f"the chat template refuses a plain conversation: {error}") from error
    user = to_again.removeprefix(assistant_end)
    around = {
        "system": (start, to_user.removesuffix(user)),
        "user": (user, user_end),
        "assistant": (to_assistant.removeprefix(user_end), assistant_end),
    }
    alone = parts("user")[0]
    before, after = around["system"]
    default = None
    if alone != user:
        default = alone.removesuffix(user).removeprefix(before).removesuffix(after)
    turns = Turns(around, reply, default)
    if any("{{" in text or '"""' in text for text in (turns.reply, *sum(around.values(), ()))):
        raise ServingError('the chat template writes {{ or """, which a Modelfile cannot hold')
    return turns


def differing(
    turns: Turns, tokenizer: PreTrainedTokenizerBase, talks: dict[str, list[dict]]
) -> list[str]:
    """Names of the conversations whose prompt by Ollama's template is not transformers' own."""
    return [
        name
        for name, messages in talks.items()
        if turns.prompt(messages) != template_text(tokenizer, messages)
    ]


def modelfile(
    turns: Turns, source: str, stops: Iterable[str], length: int, system: str | None
) -> str:
    """Ollama's Modelfile (https://github.com/ollama/ollama/blob/main/docs/modelfile.md).

    Decoding is greedy and without a penalty on repetition, as in the evaluation.
    """
    system = turns.system if system is None else system
    lines = [f"FROM {source}", f'TEMPLATE """{turns.go_template()}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0",
              f"PARAMETER num_ctx {length}"]  # fmt: skip
    return "\n".join(lines) + "\n"


def adapter_problem(cfg: Config) -> str | None:
    """Why neither vLLM nor NIM takes the adapter by itself, if they do not."""
    model = cfg.model
    if not model.use_peft:
        return "the run has no adapter"
    if model.use_dora or model.lora_modules_to_save:
        return "DoRA and lora_modules_to_save are more than A and B; serve the merged model"
    if model.lora_r > VLLM_RANKS[-1]:
        return f"rank {model.lora_r} is above vLLM's {VLLM_RANKS[-1]}; serve the merged model"
    return None


def copy_adapter(cfg: Config, target: Path) -> None:
    """The adapter as NIM and vLLM read it: config and weights, with the base's name in it and not
    the path that the base had on the machine that trained it."""
    source = trained_folder(cfg)
    target.mkdir(parents=True)
    shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    values = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = cfg.model.model_name_or_path
    (target / "adapter_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


def write_serving(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, name: str | None = None,
    system: str | None = None,
) -> tuple[Path, list[str]]:  # fmt: skip
    """Write `serve/` into the run folder: Modelfile, vLLM's commands, NIM's adapter folder, README.

    Returns the folder, and remarks on what could not be written or is not the same there.

    Raises:
        ServingError: nothing is merged yet, or the chat template is none that Ollama could have.
    """
    run, name = cfg.run_dir, name or cfg.run_dir.name
    if not (run / "merged").is_dir():
        raise ServingError(f"there is no {run / 'merged'}; first: python -m scripts.export ...")
    turns, remarks = read_turns(tokenizer), []
    if other := differing(turns, tokenizer, conversations(tokenizer)):
        remarks.append(f"Ollama's prompt is not the chat template's for: {', '.join(other)}")
    folder = run / "serve"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "ollama").mkdir(parents=True)
    files = (run / "gguf" / f"{run.name}-{kind}.gguf" for kind in PREFERRED)
    source = next((file for file in files if file.is_file()), run / "merged")
    generation = GenerationConfig.from_pretrained(run / "merged")
    stops = tokenizer.convert_ids_to_tokens(sorted(end_tokens(tokenizer, generation)))
    length = (cfg.dpo.max_length or 2048) + cfg.recipe.max_new_tokens
    text = modelfile(turns, f"../../{source.relative_to(run)}", stops, max(length, 2048), system)
    (folder / "ollama" / "Modelfile").write_text(text, encoding="utf-8")
    problem = adapter_problem(cfg)
    if problem:
        remarks.append(f"no adapter for vLLM and NIM: {problem}")
    else:
        copy_adapter(cfg, folder / "loras" / name)
        if more := sorted(set(cfg.model.lora_target_modules or []) - NIM_MODULES):
            remarks.append(f"NIM's documentation does not list the modules {', '.join(more)}")
    (folder / "README.md").write_text(_commands(cfg, name, problem is None), encoding="utf-8")
    return folder, remarks


def _commands(cfg: Config, name: str, adapter: bool) -> str:
    """The README of `serve/`; its commands are given in that folder."""
    base, quoted = cfg.model.model_name_or_path, shlex.quote(name)
    dtype = cfg.recipe.merge_dtype
    lines = [f"# Serve {name}", "", "Run these in this folder. Ollama:", "",
             f"    ollama create {quoted} -f ollama/Modelfile && ollama run {quoted}", "",
             "vLLM, the merged model:", "",
             f"    vllm serve ../merged --served-model-name {quoted} --dtype {dtype}"]  # fmt: skip
    if adapter:
        rank = next(rank for rank in VLLM_RANKS if rank >= cfg.model.lora_r)
        lines += ["", "vLLM, the adapter on the base (16-bit weights, not the 4-bit ones it was "
                  "trained on; `python -m scripts.export prove` tells the difference):", "",
                  f"    vllm serve {shlex.quote(base)} --revision {cfg.model.model_revision} "
                  f"--dtype {dtype} --enable-lora --max-lora-rank {rank} \\\n"
                  f"        --lora-modules {shlex.quote(f'{name}=loras/{name}')} "
                  "--chat-template ../adapter/chat_template.jinja", "",
                  "NIM for the base model, with `loras/` mounted as its store of adapters:", "",
                  "    docker run --gpus all -e NGC_API_KEY -e NIM_PEFT_SOURCE=/opt/nim/loras \\\n"
                  f"        -e NIM_MAX_LORA_RANK={rank} -v \"$PWD/loras:/opt/nim/loras\" "
                  "-p 8000:8000 <the NIM image of the base model>"]  # fmt: skip
    lines += ["", "Then, in the project, hold the server's replies against the run's own:", "",
              "    python -m scripts.serve check --url http://localhost:8000/v1 "
              f"--model {quoted} --config {cfg.run_dir / 'config.yaml'}"]  # fmt: skip
    return "\n".join(lines) + "\n"
