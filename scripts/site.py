"""Build the web site: README, guide for contributors, data card and both notebooks, as committed.

    python -m scripts.site            # outputs/site/index.html

Sphinx with MyST-NB and the Furo theme, which follows the reader's light or dark setting. Nothing is
executed. A link or an anchor that leads nowhere fails the build. Equations are set by MathJax in
the reader's browser, from its usual address or from `--mathjax`.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("site")

import argparse
import io
import re
import shutil
from pathlib import Path

from scripts.cli import ROOT, RecipeError

PAGES = ["index.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md",
         "notebooks/llama3_dpo.ipynb", "notebooks/preference_data.ipynb"]  # fmt: skip
INDEX = """```{include} README.md
```

```{toctree}
:hidden:

notebooks/llama3_dpo
notebooks/preference_data
data/README
CONTRIBUTING
CHANGELOG
```
"""
SETTINGS = {
    "project": "Llama 3, tuned with DPO",
    "extensions": ["myst_nb"],
    "include_patterns": PAGES,
    "root_doc": "index",
    "html_theme": "furo",
    "html_title": "Llama 3, tuned with DPO",
    "html_copy_source": False,
    "nb_execution_mode": "off",
    "myst_heading_anchors": 4,  # as GitHub makes them
    "myst_enable_extensions": ["dollarmath", "amsmath"],
    # Of a figure's two forms, the image with its words goes before the bare PNG.
    "nb_mime_priority_overrides": [("html", "text/html", 0), ("html", "image/png", 10)],
}


class SiteError(RecipeError):
    """The site cannot be built."""


def build(out: Path, mathjax: str | None = None) -> Path:
    """Build the site into `out`, replacing what an earlier build left there.

    Returns:
        Its first page.

    Raises:
        SiteError: Sphinx is not installed, or a link or an anchor leads nowhere; all are named.
    """
    try:
        from sphinx.application import Sphinx
    except ImportError:
        raise SiteError("no Sphinx: .venv/bin/pip install -r requirements-dev.txt") from None
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").is_file():
        raise SiteError(f"{out} holds something else than a site; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    source = out.parent / f".{out.name}.source"
    shutil.rmtree(source, ignore_errors=True)
    settings = SETTINGS | ({"mathjax_path": mathjax} if mathjax else {})
    warnings = io.StringIO()
    try:
        _gather(source)
        app = Sphinx(
            source, None, out, source / ".doctrees", "html", settings,
            status=None, warning=warnings, freshenv=True,
        )  # fmt: skip
        app.build()
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if found := [line for line in _plain(warnings.getvalue()).splitlines() if line.strip()]:
        raise SiteError("\n  ".join(["the site has faults:", *found[:20]]))
    return out / "index.html"


def _gather(source: Path) -> None:
    """Copy what the site is made of, and what it links to, to `source`."""
    for folder in ("configs", "data", "notebooks"):
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(ROOT / folder, source / folder, ignore=hidden)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, source)
    (source / "index.md").write_text(INDEX)


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def main(args: argparse.Namespace) -> None:
    print(build(args.out, args.mathjax))


if __name__ == "__main__":
    cli.command(main, ARGS)
