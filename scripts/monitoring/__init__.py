"""Watching a run: memory (`memory`), the step log (`steps`), W&B (`tracking`), less noise
(`quiet`)."""
