"""Put what the notebook needs into the Python that runs it, as on Colab or Kaggle.

The notebook's second cell calls this where it stands alone and has fetched the repository. On a
machine of your own `scripts/setup.sh` makes an environment instead.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from importlib import metadata

from scripts.base import ROOT, RecipeError

# What the host's own notebook stands on: an upgrade of it would take the ground away.
HOSTS_OWN = ("jupyter", "jupyterlab", "ipywidgets", "papermill", "nbformat")


class HostedError(RecipeError):
    """The notebook cannot go on in this kernel."""


def wanted(requirements: str, has_torch: bool) -> list[str]:
    """The pins of `requirements.txt` to be installed; a torch that is there is left as it is."""
    lines = (line.split(" #")[0].strip() for line in requirements.splitlines())
    pins = [line for line in lines if line and not line.startswith("#")]
    left = (*HOSTS_OWN, "torch") if has_torch else HOSTS_OWN
    return [pin for pin in pins if re.split(r"[=<>~!; ]", pin)[0] not in left]


def install() -> None:
    """Install the pinned requirements into the running Python, if they are not there already.

    Raises:
        HostedError: pip failed; or a library that this kernel has loaded was replaced, so the
            kernel must be started again.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    pins = wanted((ROOT / "requirements.txt").read_text(), has_torch)
    names = (re.split(r"[=<>~!; ]", pin)[0] for pin in pins)
    loaded = {n: getattr(sys.modules[n], "__version__", None) for n in names if n in sys.modules}
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HostedError(f"pip could not install the requirements: {done.stderr.strip()[-500:]}")
    replaced = [name for name, was in loaded.items() if was not in (None, metadata.version(name))]
    if replaced:
        raise HostedError(
            f"{', '.join(replaced)} had been loaded and was replaced: restart the session (the "
            "kernel), and run all cells again"
        )
