"""Preference pairs: read (`sources`), understood (`formats`), tokenised (`tokens`), checked
(`checks`, `report`), and built from a model's own answers (`build`, `judges`)."""
