"""Thin helpers behind the notebook: one module per step of the story."""
