"""The commands, their options, and how they end. No library is loaded here.

    python -m scripts            # lists the commands

A command's file asks for its options before it imports torch and the rest, so `--help` and a
mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from scripts.base import CTRL_C, DEFAULT_CONFIG, STOPPED, RecipeError, disk_is_full

# What `python -m scripts` lists; every entry but the last also has its options here.
COMMANDS = {
    "run": "execute the notebook headless and print what came of it",
    "preflight": "check in seconds what would otherwise fail after a long download",
    "plan": "memory, fit, time and cost of a run, from its config alone",
    "model": "say where the model comes from; for the default, fetch and convert it once",
    "data": "look at preference pairs, check them, or build your own",
    "training": "train the adapter and save it",
    "evaluate": "measure a finished run's tuned model against its base model",
    "export": "merge a finished run's adapter into 16-bit weights, and prove the merge",
    "serve": "ask a server of the tuned model the held-out questions, and compare its replies",
    "chat": "ask a finished run's base and tuned model side by side, and keep what you prefer",
    "doctor": "say in words what happened in a finished run, with the evidence and what to try",
    "compare": "show two runs side by side: settings, figures with intervals, curves",
    "lessons": "train short runs that go wrong, and their cures, for the notebook to draw",
    "benchmark": "time and memory of a DPO step against TRL's own trainer",
    "launchable": "check the Brev launchable, and print the clicks that make it",
}


UNREAD = 141  # 128 + SIGPIPE


def terminated(signum, frame) -> None:
    """What a command does on SIGTERM while it does not train."""
    print("error: stopped by SIGTERM; the same command begins again or goes on", file=sys.stderr)
    sys.exit(STOPPED)


def _unread(error: BrokenPipeError) -> None:
    """End a command whose output nobody reads any more, as after `| head`."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        raise error  # another pipe broke
    kept = " ".join(getattr(error, "__notes__", []))  # of a training that it broke off
    line = f"error: what reads this command's output has gone (broken pipe). {kept}"
    with suppress(OSError):
        print(line.strip(), file=sys.stderr, flush=True)
    for stream in (1, 2):  # what is buffered must not fail again at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.exit(UNREAD)


def command(main: Callable[..., None], *arguments) -> None:
    """Run `main` as a program. A `RecipeError`, Ctrl-C, SIGTERM, a full disk and a closed pipe end
    it with one line and an exit code."""
    signal.signal(signal.SIGTERM, terminated)
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
        _stopped(KeyboardInterrupt, error, None)
        sys.exit(CTRL_C)
    except Exception as error:
        if not disk_is_full(error):
            raise
        sys.exit(
            f"error: a file could not be written, no room: {error}; make room and run it again"
        )


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or len(text) > 18 or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return read


def json_object(text: str) -> dict:
    """The type of an option that takes a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def number(least: float, most: float = 1e9, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a number from `least`, or only `above` it, to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"must be a number {'above' if above else 'from'} {least:g} "
                f"{'and at most' if above else 'to'} {most:g}, got {text!r}"
            )
        return value

    return read


def _stopped(kind: type[BaseException], error: BaseException, trace) -> None:
    """Ctrl-C ends a command with one line, also while its libraries load. One that says what it
    kept has put its work away: it ends at once, without seconds of tidying up after torch."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    line = "stopped by Ctrl-C; the same command begins again or goes on"
    print(error if error.args else f"\n{line}", file=sys.stderr, flush=True)
    if error.args:
        sys.stdout.flush()
        os._exit(CTRL_C)


def argument_parser(name: str, **more) -> argparse.ArgumentParser:
    """A parser with the options that every command over a config shares."""
    purpose = COMMANDS[name.split()[0]]
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.{name}",
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        **more,
    )
    if name in WITHOUT_CONFIG:
        return parser
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="the run's YAML file")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="replace a value of the config; may be repeated",
    )  # fmt: skip
    parser.add_argument("--output-dir", help="the run folder (default: the config's)")
    return parser


WITHOUT_CONFIG = ("doctor", "compare")  # which are not about a run to be made


def parse(name: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of the command `name`, from `arguments` or the command line.

    `data` and `export` have actions of their own, a first word with options of its own; the
    namespace names it as `action`.
    """
    if arguments is None:
        sys.excepthook = _stopped
        signal.signal(signal.SIGTERM, terminated)  # while the libraries load, too
    words = sys.argv[1:] if arguments is None else list(arguments)
    default, actions = ACTIONS.get(name, ("", ()))
    action = default
    if words and words[0] in actions:
        action, *words = words
    full_name = f"{name} {action}" if action != default else name
    parser = argument_parser(full_name)
    if actions and action == default:
        parser.usage = f"python -m scripts.{name} [{' | '.join(actions)}] [options]"
    if add := OPTIONS.get(full_name):
        add(parser)
    options = parser.parse_args(words)
    options.action = action
    return options


# The action that goes without saying, and all there are.
ACTIONS = {
    "data": ("look", ("look", "check", "build")),
    "export": ("merge", ("merge", "prove", "gguf", "serve-files", "push")),
    "serve": ("check", ("check",)),
}


def _run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the newest whole checkpoint, or refuse")
    add("--overwrite", action="store_true",
        help="begin anew; what an earlier run left in the run folder is set aside")  # fmt: skip


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=whole(1), help="training pairs (default: train_samples)")
    parser.add_argument("--lengths", metavar="P/C/R", help="tokens of a usual pair, for the time")


def _judge_of_its_own(add: Callable) -> None:
    """Where a judge that is a model is found."""
    add("--judge-model", help="the reward model, or the endpoint's model")
    add("--judge-url", help="the endpoint, e.g. http://localhost:8000/v1")


def _build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", type=Path, required=True, help="JSON lines with `prompt`")
    add("--out", type=Path, default=Path("outputs/pairs"), help="folder to fill")
    add("--samples", default="plain=4,brief=2,accurate=2", help="answers by style")
    add("--max-new-tokens", type=whole(1), default=192, help="cap on an answer")
    add("--temperature", type=number(0, 10), default=0.7, help="0 is greedy, 1 the model's own")
    add("--top-p", type=number(0, 1, above=True), default=0.9,
        help="sample from the likeliest tokens of this share")  # fmt: skip
    add("--batch-size", type=whole(1), default=64, help="answers sampled at a time")
    add("--seed", type=whole(0), default=0, help="of the sampling")
    add("--backend", choices=["auto", "transformers", "vllm"], default="auto",
        help="auto: vLLM where it is installed and there is a GPU")  # fmt: skip
    add(
        "--judge",
        choices=["rule", "checker", "reward", "endpoint"],
        default="rule",
        help="who pairs them",
    )
    add("--level", help="of passages: only those of this level")
    _judge_of_its_own(add)
    add("--pairs-per-prompt", type=whole(1), default=1, help="endpoint: at most so many")
    add("--least-gap", type=number(-1e9), default=0.0, help="reward: nearer is a tie")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--judge", choices=["checker", "reward", "endpoint"], default="checker",
        help="who compares the replies of base and tuned")  # fmt: skip
    _judge_of_its_own(add)
    parser.set_defaults(least_gap=0.0, pairs_per_prompt=1)


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=whole(1), default=8, help="held-out answers to score")


def _questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=whole(0),
        help="so many of the evaluation's prompts (default: all)")  # fmt: skip


def _prove(parser: argparse.ArgumentParser) -> None:
    _export(parser)
    _questions(parser)


def _gguf(parser: argparse.ArgumentParser) -> None:
    _prove(parser)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k_m"],
        choices=["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"],
        help="files to write")  # fmt: skip


def _serve_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="what the servers call the model (default: the run's name)")
    parser.add_argument("--system", help="system prompt (default: the chat template's own)")


def _serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", required=True, help="the server, e.g. http://localhost:8000/v1")
    add("--model", help="the model's name there (default: the only one that it lists)")
    add("--workers", type=whole(1), default=4, help="questions asked at a time")
    add("--timeout", type=number(0, 1e5, above=True), default=120.0, help="seconds for a reply")
    add("--body", type=json_object, default={}, metavar="JSON",
        help='more of each request, e.g. \'{"repeat_penalty": 1}\', where a server penalizes '
             "repetition unasked")  # fmt: skip
    add("--least-same", type=number(0, 1), default=0.0,
        help="fail if a smaller share of the replies is the run's own")  # fmt: skip
    _questions(parser)


def _push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--what", choices=["adapter", "merged"],
        help="what to send (default: the adapter, where there is one)")  # fmt: skip
    add("--repo", metavar="[OWNER/]NAME", help="the repository (default: from base and data)")
    add("--public", action="store_true", help="anyone may see it; else it is private")
    add("--send", action="store_true", help="send it; else it is only shown")
    add("--update", action="store_true", help="also into a repository that holds something")
    add("--base", metavar="OWNER/MODEL", help="the hub's name of a base model that was a folder")
    add("--licence", help="the base model's licence, by the hub's identifier, if it is not known")
    add("--licence-file", type=Path, help="its text, where the licence wants a copy sent along")


def _chat(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--web", action="store_true", help="in a browser on this machine (needs gradio)")
    add("--port", type=whole(1), help="with --web: the port (default: a free one)")
    add("--system", help="a system prompt to begin with")


def _benchmark(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", nargs="*", help="P/C/RxPAIRS, or data (default: the README's five)")
    add("--repeats", type=whole(1), default=3, help="processes a case and way to train")
    add("--formats", nargs="*", default=["nf4", "bf16"], choices=["nf4", "bf16"],
        help="how the weights are held")  # fmt: skip
    add("--profile", metavar="CASE", help="only profile prefix sharing on CASE")
    add("--no-growth", action="store_true", help="leave out how time grows")
    add("--child", help=argparse.SUPPRESS)  # one measurement, in a process of its own


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="outputs/<run name>")


def _compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_a", type=Path, metavar="RUN_A", help="outputs/<run name>")
    add("run_b", type=Path, metavar="RUN_B", help="the other run's folder")
    add("--figure", type=Path, help="write the curves of both as a PNG")


def _lessons(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("notebooks/lessons.json"), help="file to write")
    add("--arms", nargs="*", help="only these: alone, sft, sft_fifth, "
        "lopsided, norm")  # fmt: skip
    add("--pairs", type=int, default=32, help="pairs to train on")
    add("--held-out", type=int, default=40, help="held-out pairs to score")
    add("--epochs", type=int, default=2, help="passes over the pairs")
    add("--prompts", type=int, default=16, help="held-out prompts to reply to")
    add("--max-new-tokens", type=int, default=64, help="cap on a reply")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "run": _run,
    "training": _run,
    "plan": _plan,
    "data build": _build,
    "evaluate": _evaluate,
    "export": _export,
    "export prove": _prove,
    "export gguf": _gguf,
    "export serve-files": _serve_files,
    "serve": _serve,
    "export push": _push,
    "chat": _chat,
    "doctor": _doctor,
    "compare": _compare,
    "lessons": _lessons,
    "benchmark": _benchmark,
}
