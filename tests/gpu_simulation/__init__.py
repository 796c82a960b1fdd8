"""An 8B step on a GPU, simulated on a machine without one: see `__main__.py`."""
