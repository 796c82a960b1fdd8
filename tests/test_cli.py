"""What a notebook shows of a user's mistake."""

from IPython.core.interactiveshell import InteractiveShell

from scripts.cli import InputError, RecipeError


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
