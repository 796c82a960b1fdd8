"""Options, and how a command ends: whatever happens, one line and an exit code."""

import signal
import subprocess
import sys

import pytest
from IPython.core.interactiveshell import InteractiveShell

from scripts.base import ROOT, InputError, RecipeError, write_whole
from scripts.cli import GONE, command, parse


def shown(code: str, capsys) -> str:
    InteractiveShell.instance().run_cell(code)
    return capsys.readouterr().out


def ended(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def test_a_mistake_is_one_line_in_a_notebook_too(capsys):
    lines = ["from scripts.base import InputError as Mistake", "def deep():",
             "    raise Mistake('beta is 0')", "deep()"]  # fmt: skip
    assert shown("\n".join(lines), capsys).strip() == "error: beta is 0"


def test_any_other_error_keeps_its_traceback_in_a_notebook(capsys):
    assert "Traceback" in shown("1 / 0", capsys)


def test_any_other_error_of_a_command_is_one_line_and_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/training.py"])
    with pytest.raises(SystemExit) as end:
        command(write_whole, tmp_path / "file", 3)
    (file,) = tmp_path.glob("outputs/errors/*-training.txt")
    line = str(end.value.code)  # a text as exit code is printed, and the code is 1
    assert line.startswith("error: training failed in write_whole (scripts/base.py): TypeError: ")
    assert str(file.relative_to(tmp_path)) in line and "\n" not in line
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [(RecipeError("no"), 1), (InputError("no"), 2), (KeyboardInterrupt(), 130)],
)
def test_exit_codes(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_sigterm_says_that_the_command_may_be_given_again(capsys):
    with pytest.raises(SystemExit) as end:
        command(signal.raise_signal, signal.SIGTERM)
    assert end.value.code == 75
    assert capsys.readouterr().err.startswith("error: stopped by SIGTERM")


def test_a_full_disk_is_one_line():
    def main():
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit, match="no room to write a file"):
        command(main)


def test_output_that_nobody_reads_is_one_line():
    words = ["bash", "-c", '"$0" -m scripts | true; exit ${PIPESTATUS[0]}', sys.executable]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 141 and done.stdout == ""
    assert done.stderr.startswith("error: what reads") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["repeat", "plan validate"])
def test_a_command_that_is_gone_says_what_to_use_instead(name):
    first, *rest = name.split()
    code, line = ended(f"scripts.{first}", *rest)
    assert (code, line) == (2, f"error: `{name}` is gone: {GONE[name]}")


def test_an_action_is_the_first_word():
    assert parse("data", []).action == "look"
    assert parse("data", ["check", "--set", "beta=1"]).overrides == ["beta=1"]
    assert parse("export", []).action == "merge"
    assert parse("export", ["gguf", "--types", "f16"]).types == ["f16"]
    build = parse("data", ["build", "--prompts", "p.jsonl", "--top-p", "0.5"])
    assert (build.action, build.top_p, build.max_new_tokens) == ("build", 0.5, 192)


@pytest.mark.parametrize(
    "words",
    [
        "plan --pairs 0", "plan --pairs 1.5", "data build", "data build --prompts p --top-p 0",
        "data build --prompts p --judge coin", "serve --url u --body [1]", "run --resume=3",
    ],
)  # fmt: skip
def test_a_bad_option_is_refused(words, capsys):
    name, *rest = words.split()
    with pytest.raises(SystemExit) as end:
        parse(name, rest)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
