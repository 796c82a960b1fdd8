"""What a GPU machine proves in twenty minutes: `python -m scripts.acceptance`."""
