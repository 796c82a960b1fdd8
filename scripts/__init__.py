"""Thin helpers behind the notebook: a file per step of the story, rooms for what is not a step."""

import logging
import os
import sys

# On import, bitsandbytes names an optional faster CPU kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# One process trains on one GPU, and which one must be settled before torch starts: with several in
# sight, transformers splits each batch over all of them, which TRL's trainer refuses. Several GPUs
# want one process each, which `accelerate launch` starts, with LOCAL_RANK set.
if "LOCAL_RANK" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

if sys.argv[:1] == ["-m"]:  # `python -m scripts.NAME` looks for NAME now
    from scripts.cli import refuse_gone

    refuse_gone([sys.orig_argv[sys.orig_argv.index("-m") + 1].removeprefix("scripts.")])
