"""Measures of replies: their text (`text`) and what a mean over prompts is worth (`statistics`)."""
