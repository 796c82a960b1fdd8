"""The commands, their options, and how they end. No library is loaded here.

    python -m scripts            # lists the commands

A command's file calls `start` before it imports torch and the rest, so `--help` and a mistyped
option are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.base import CTRL_C, DEFAULT_CONFIG, ROOT, STOPPED, RecipeError, disk_is_full, one_line

ERRORS = Path("outputs/errors")  # tracebacks of errors that we did not foresee
UNREAD = 141  # 128 + SIGPIPE
AGAIN = "the same command starts again or continues"

# ---- the commands ----


def number(kind: type, least: float, most: float = math.inf) -> Callable:
    """The type of an option that takes an int or float from `least` to `most`.

    Example:
        >>> number(int, 1)("3")
        3
    """

    def read(text: str) -> Any:
        with suppress(ValueError):
            if least <= (value := kind(text)) <= most:
                return value
        what = "a whole number" if kind is int else "a number"
        end = f" to {most:g}" if most < math.inf else ""
        raise argparse.ArgumentTypeError(f"must be {what} from {least:g}{end}, got {text!r}")

    return read


def json_object(text: str) -> dict:
    """The type of an option that takes a JSON object."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")


def option(*names: str, **how: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """One option, as `ArgumentParser.add_argument` takes it."""
    return names, how


def judge(help: str, *choices: str) -> list:
    """The options that say who compares replies, and where a judge that is a model is found."""
    return [
        option("--judge", choices=choices, default=choices[0], help=help),
        option("--judge-model", help="the reward model, or the endpoint's model"),
        option("--judge-url", help="the endpoint, e.g. http://localhost:8000/v1"),
    ]


COMMANDS = {  # what `python -m scripts` lists
    "data": "look at preference pairs, check them, or build your own",
    "model": "say where the model comes from; for the default, fetch and convert it once",
    "preflight": "check in seconds what would otherwise fail after a long download",
    "training": "train the adapter and save it",
    "run": "execute the notebook headless and print the results",
    "plan": "memory, fit, time and cost of a run, from its config alone",
    "evaluate": "measure a finished run's tuned model against its base model",
    "export": "merge a finished run's adapter into 16-bit weights, and prove the merge",
    "serve": "ask a server of the tuned model the held-out questions, and compare its replies",
    "chat": "ask a finished run's base and tuned model side by side, and keep what you prefer",
    "benchmark": "time and memory of a DPO step against TRL's own trainer",
    "doctor": "say in words what happened in a finished run, with the evidence and what to try",
    "compare": "show two runs side by side: settings, figures with intervals, curves",
    "lessons": "train short runs that go wrong, and their cures, for the notebook to draw",
    "launchable": "check the Brev launchable, and print the clicks that make it",
}

# Commands and actions of earlier versions, and what does their work now.
GONE = {
    "repeat": "train with `--config outputs/RUN/config.yaml --output-dir outputs/RUN-again`, then "
    "python -m scripts.compare outputs/RUN outputs/RUN-again",
    "acceptance": "use python -m tests.gpu",
    "selfcheck": "use bash scripts/setup.sh, which checks what it installed, or "
    "python -m scripts.preflight",
    "site": "read README.md and docs/",
    "plan validate": "use python -m scripts.benchmark, which measures a step",
    "launchable create": "python -m scripts.launchable prints the clicks",
    "launchable render": "brev-launchable.yaml is a plain Docker Compose file",
}

COUNT = number(int, 1)
CONFIG = [
    option("--config", default=DEFAULT_CONFIG, help="the run's YAML file"),
    option("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
           help="replace a value of the config; may be repeated"),
    option("--output-dir", help="the run folder (default: the config's)"),
]  # fmt: skip
RUN = [
    *CONFIG,
    option("--resume", action="store_true", help="continue from the newest whole checkpoint, or "
           "fail"),
    option("--overwrite", action="store_true",
           help="start over; what an earlier run left in the run folder is set aside"),
]  # fmt: skip
MERGE = [*CONFIG, option("--rows", type=COUNT, default=8, help="held-out answers to score")]
QUESTIONS = option("--questions", type=number(int, 0),
                   help="so many of the evaluation's prompts (default: all)")  # fmt: skip
SERVE = [
    *CONFIG,
    option("--url", required=True, help="the server, e.g. http://localhost:8000/v1"),
    option("--model", help="the model's name there (default: the only one that it lists)"),
    option("--workers", type=COUNT, default=4, help="questions asked at a time"),
    option("--timeout", type=number(float, 0.1, 1e5), default=120.0, help="seconds for a reply"),
    option("--body", type=json_object, default={}, metavar="JSON",
           help='more of each request, e.g. \'{"repeat_penalty": 1}\', where a server penalizes '
           "repetition unasked"),
    option("--least-same", type=number(float, 0, 1), default=0.0,
           help="fail if a smaller share of the replies is the run's own"),
    QUESTIONS,
]  # fmt: skip
OPTIONS = {  # of each command, and of its actions
    "data": CONFIG,
    "data look": CONFIG,
    "data check": CONFIG,
    "data build": [
        *CONFIG,
        option("--prompts", type=Path, required=True, help="JSON lines with `prompt`"),
        option("--out", type=Path, default=Path("outputs/pairs"), help="folder to fill"),
        option("--samples", default="plain=4,brief=2,accurate=2", help="answers by style"),
        option("--max-new-tokens", type=COUNT, default=192, help="cap on an answer"),
        option("--temperature", type=number(float, 0, 10), default=0.7,
               help="0 is greedy, 1 the model's own"),
        option("--top-p", type=number(float, 0.01, 1), default=0.9,
               help="sample from the likeliest tokens of this share"),
        option("--batch-size", type=COUNT, default=64, help="answers sampled at a time"),
        option("--seed", type=number(int, 0), default=0, help="of the sampling"),
        option("--backend", choices=["auto", "transformers", "vllm"], default="auto",
               help="auto: vLLM where it is installed and there is a GPU"),
        *judge("who pairs them", "rule", "checker", "reward", "endpoint"),
        option("--level", help="of passages: only those of this level"),
        option("--pairs-per-prompt", type=COUNT, default=1, help="endpoint: at most so many"),
        option("--least-gap", type=float, default=0.0, help="reward: nearer is a tie"),
    ],
    "model": CONFIG,
    "preflight": CONFIG,
    "training": RUN,
    "run": RUN,
    "plan": [
        *CONFIG,
        option("--pairs", type=COUNT, help="training pairs (default: train_samples)"),
        option("--lengths", metavar="P/C/R", help="tokens of a usual pair, for the time"),
    ],
    "evaluate": [
        *CONFIG,
        *judge("who compares the replies of base and tuned", "checker", "reward", "endpoint"),
        # What a judge of pairs wants to know.
        option("--least-gap", default=0.0, help=argparse.SUPPRESS),
        option("--pairs-per-prompt", default=1, help=argparse.SUPPRESS),
    ],
    "export": MERGE,
    "export merge": MERGE,
    "export prove": [*MERGE, QUESTIONS],
    "export gguf": [
        *MERGE,
        QUESTIONS,
        option("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"], help="files to write",
               choices=["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]),
    ],
    "export serve-files": [
        *CONFIG,
        option("--name", help="what the servers call the model (default: the run's name)"),
        option("--system", help="system prompt (default: the chat template's own)"),
    ],
    "export push": [
        *CONFIG,
        option("--what", choices=["adapter", "merged"],
               help="what to send (default: the adapter, where there is one)"),
        option("--repo", metavar="[OWNER/]NAME", help="the repository (default: from base and "
               "data)"),
        option("--public", action="store_true", help="anyone may see it; else it is private"),
        option("--send", action="store_true", help="send it; else it is only shown"),
        option("--update", action="store_true", help="also into a repository that holds something"),
        option("--base", metavar="OWNER/MODEL",
               help="the hub's name of a base model that was a folder"),
        option("--licence",
               help="the base model's licence, by the hub's identifier, if it is not known"),
        option("--licence-file", type=Path,
               help="its text, where the licence wants a copy sent along"),
    ],
    "serve": SERVE,
    "serve check": SERVE,
    "chat": [
        *CONFIG,
        option("--web", action="store_true", help="in a browser on this machine (needs gradio)"),
        option("--port", type=COUNT, help="with --web: the port (default: a free one)"),
        option("--system", help="a system prompt to begin with"),
    ],
    "benchmark": [
        *CONFIG,
        option("--cases", nargs="*", help="P/C/RxPAIRS, or data (default: the README's five)"),
        option("--repeats", type=COUNT, default=3, help="processes a case and way to train"),
        option("--formats", nargs="*", default=["nf4", "bf16"], choices=["nf4", "bf16"],
               help="how the weights are held"),
        option("--profile", metavar="CASE", help="only profile prefix sharing on CASE"),
        option("--no-growth", action="store_true", help="leave out how time grows"),
        option("--child", help=argparse.SUPPRESS),  # one measurement, in a process of its own
    ],
    "doctor": [option("folder", type=Path, metavar="RUN_FOLDER", help="outputs/<run name>")],
    "compare": [
        option("run_a", type=Path, metavar="RUN_A", help="outputs/<run name>"),
        option("run_b", type=Path, metavar="RUN_B", help="the other run's folder"),
        option("--figure", type=Path, help="write the curves of both as a PNG"),
    ],
    "lessons": [
        *CONFIG,
        option("--out", type=Path, default=Path("notebooks/lessons.json"), help="file to write"),
        option("--arms", nargs="*", choices=["alone", "sft", "sft_fifth", "lopsided", "norm"],
               help="only these"),
    ],
    "launchable": [
        option("--file", type=Path, default=ROOT / "brev-launchable.yaml", help="the Compose file"),
        option("--repository", help="public git address (default: the file's)"),
    ],
}  # fmt: skip


# ---- reading the command line ----


def refuse_gone(words: list[str]) -> None:
    """Exit with one line if a command or action of an earlier version is asked for."""
    name = " ".join(words[:2]) if " ".join(words[:2]) in GONE else "".join(words[:1])
    if name in GONE:
        print(f"error: `{name}` is gone: {GONE[name]}", file=sys.stderr)
        sys.exit(2)


def parse(name: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command `name`, from `arguments` or the command line.

    `data` and `export` have actions, a first word with options of its own; the namespace names it
    as `action`.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    refuse_gone([name, *words])
    actions = [other.split()[1] for other in OPTIONS if other.startswith(f"{name} ")]
    action = words.pop(0) if words and words[0] in actions else ""
    full_name = f"{name} {action}".strip()
    purpose = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.{full_name}",
        usage=f"%(prog)s [{' | '.join(actions)}] [options]" if actions and not action else None,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for names, how in OPTIONS[full_name]:
        parser.add_argument(*names, **how)
    options = parser.parse_args(words)
    options.action = action or {"data": "look", "export": "merge"}.get(name, "")
    return options


# ---- running a command ----


def start(name: str) -> None:
    """Run the command `name` with the options of the command line, and exit."""

    def parse_and_run() -> None:
        args = parse(name)
        importlib.import_module(f"scripts.{name}").main(args)

    command(parse_and_run)
    sys.exit()


def command(main: Callable[..., None], *arguments) -> None:
    """Run `main` as a program: whatever ends it early is one line and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        main(*arguments)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except BrokenPipeError as error:
        _unread(error)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        _interrupted(error)
    except Exception as error:
        if disk_is_full(error):
            sys.exit(f"error: no room to write a file: {error}; make room and run it again")
        _unforeseen(error)


def _terminated(signum, frame) -> None:
    """What a command does on SIGTERM while it does not train."""
    print(f"error: stopped by SIGTERM; {AGAIN}", file=sys.stderr)
    sys.exit(STOPPED)


def _interrupted(error: KeyboardInterrupt) -> None:
    """End after Ctrl-C. A command that says what it kept has put its work away: it ends at once,
    without the seconds that torch takes to tidy up."""
    print(error if error.args else f"\nstopped by Ctrl-C; {AGAIN}", file=sys.stderr, flush=True)
    if error.args:
        sys.stdout.flush()
        os._exit(CTRL_C)
    sys.exit(CTRL_C)


def _unread(error: BrokenPipeError) -> None:
    """End a command whose output nobody reads any more, as after `| head`."""
    line = f"error: what reads this command's output has gone (broken pipe){_notes(error)}"
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (1, 2):  # what is buffered must not fail again at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.exit(UNREAD)


def _notes(error: Exception) -> str:
    """What a training that `error` broke off says of its checkpoints, to end a line with."""
    return "".join(f". {note}" for note in getattr(error, "__notes__", []))


def _unforeseen(error: Exception) -> None:
    """End after an error that we have no line for: say where, and keep the traceback in a file."""
    name = Path(sys.argv[0]).stem
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(ROOT / "scripts") and frame.filename != __file__
    ]
    where = f" in {ours[-1].name} ({Path(ours[-1].filename).relative_to(ROOT)})" if ours else ""
    file = ERRORS / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}.txt"
    text = "".join(traceback.format_exception(error))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:  # one file for all processes of a run
            opened.write(text)
        kept = f"the traceback is in {file}"
    except OSError:
        kept = f"the traceback could not be written to {file}"
    kind = type(error).__name__
    sys.exit(f"error: {name} failed{where}: {kind}: {one_line(error)}; {kept}{_notes(error)}")
