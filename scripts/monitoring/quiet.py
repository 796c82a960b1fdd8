"""Keep the libraries' chatter out of a notebook that people read."""

from __future__ import annotations

import os
import warnings


def quiet(progress_bars: bool = False) -> None:
    """Show warnings that a reader can act on; hide progress bars unless something is downloaded.

    Call it before the model is loaded. What is hidden: notices that a library falls back to an
    equivalent path, and deprecations inside TRL and transformers, for their authors.
    """
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
