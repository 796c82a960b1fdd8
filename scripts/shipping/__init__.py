"""The forms in which a tuned model leaves its run, each held against the evaluated policy."""
