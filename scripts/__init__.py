"""Thin helpers behind the notebook: one module per step of the story."""

import logging

# On import, bitsandbytes names an optional faster CPU kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
