"""DPO going wrong, and its cures: train a few short runs, and keep what came of them.

    python -m scripts.lessons --out notebooks/lessons.json

Each run takes about two minutes on two cores with the default model. The notebook draws the file.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("lessons")  # before the libraries load, so that --help is answered at once

import argparse
import json
import shlex
import sys

from scripts.base import RecipeError
from scripts.config import parse_overrides
from scripts.lessons.failures import ARMS, Size, in_a_line, run_arms


def main(args: argparse.Namespace) -> None:
    unknown = [name for name in args.arms or [] if name not in ARMS]
    if unknown:
        raise RecipeError(f"--arms: no arm `{unknown[0]}`; there are {', '.join(ARMS)}")
    size = Size(args.pairs, args.held_out, args.epochs, args.prompts, args.max_new_tokens)
    overrides = parse_overrides(args.overrides)
    if args.output_dir:
        overrides["output_dir"] = args.output_dir
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "scripts.lessons", *sys.argv[1:]])
    for results in run_arms(args.config, overrides, size, args.arms):
        kept = {"command": command, **results}
        args.out.write_text(json.dumps(kept, ensure_ascii=False) + "\n")  # what is done is kept
    print(
        f"\nkept in {args.out}; replies of the base model: {results['base']['length']:.0f} tokens"
    )
    for result in results["arms"].values():
        print(f"  {result['title']:<22} {in_a_line(result)}")


if __name__ == "__main__":
    cli.command(main, ARGS)
