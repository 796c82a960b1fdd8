"""Faults done for real to the recipe, area by area: `python -m tests.survival`."""
