"""What is shown of a user's mistake, and how a command ends."""

import subprocess
import sys

from IPython.core.interactiveshell import InteractiveShell

from scripts.base import ROOT, InputError, RecipeError


def shown(code: str, capsys) -> str:
    InteractiveShell.instance().run_cell(code)
    return capsys.readouterr().out


def test_a_mistake_is_one_line_in_a_notebook_too(capsys):
    for kind in (RecipeError, InputError):
        lines = (f"from scripts.cli import {kind.__name__} as Mistake", "def deep():",
                 "    raise Mistake('beta is 0')", "deep()")  # fmt: skip
        code = "\n".join(lines)
        assert shown(code, capsys).strip() == "error: beta is 0"


def test_any_other_error_keeps_its_traceback(capsys):
    assert "Traceback" in shown("1 / 0", capsys)


def test_output_that_nobody_reads_is_one_line():
    words = ["bash", "-c", '"$0" -m scripts | true; exit ${PIPESTATUS[0]}', sys.executable]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 141 and done.stdout == ""
    assert done.stderr.startswith("error: what reads") and len(done.stderr.splitlines()) == 1
