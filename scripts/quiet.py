"""Keep the libraries' chatter out of a notebook that people read."""

from __future__ import annotations

import os
import re
import sys
import warnings

from scripts.base import in_notebook

LONG = 40  # letters: a table with such a cell is one of texts


def quiet(progress_bars: bool = False) -> None:
    """Show warnings that a reader can act on; hide progress bars unless something is downloaded.

    Call it before the model is loaded. What is hidden: notices that a library falls back to an
    equivalent path, and deprecations inside TRL and transformers, for their authors.
    """
    if in_notebook():
        _readable()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl|peft")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    import datasets
    import transformers
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    transformers.utils.logging.set_verbosity_error()
    if progress_bars:
        datasets.enable_progress_bars()
        enable_progress_bars()
        transformers.utils.logging.enable_progress_bar()
    else:
        datasets.disable_progress_bars()
        disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _readable() -> None:
    """In a notebook: an interrupt is one line, and text in tables is aligned left.

    JupyterLab aligns all cells of tables right, and IPython shows an interrupt with the whole way
    through the libraries, some hundred lines.
    """
    shell = sys.modules["IPython"].get_ipython()
    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("pandas", "DataFrame", text_to_the_left)

    def interrupted(shell, kind, value, trace, tb_offset=None) -> list[str]:
        line = str(value) or "interrupted. The cell can be run again; nothing after it was run"
        shell._showtraceback(kind, value, [line])
        return [line]

    shell.set_custom_exc((KeyboardInterrupt,), interrupted)


def text_to_the_left(frame) -> str | None:
    """A `DataFrame` as IPython shows it; one of texts, not of figures, is aligned left."""
    shown = frame._repr_html_()
    if shown and re.search(rf"<td>[^<]{{{LONG},}}</td>", shown):
        shown = shown.replace("text-align: right", "text-align: left")
        shown = shown.replace("<td>", '<td style="text-align:left">')
    return shown
