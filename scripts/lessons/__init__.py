"""Lessons of the notebook: DPO by hand, DPO that fails and is cured, 4 bits and low rank."""
