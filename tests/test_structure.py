"""The rooms of the code: what imports what, lazy imports counted, and what stays light."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.base import ROOT
from scripts.cli import COMMANDS

# Downstream order: a room may import from those before it, and from itself. A step of the story
# (a file at the top of scripts/) is a room of its own.
ORDER = [
    "cli", "hosted", "values", "places", "rules", "config", "checkpoints", "hub", "measures",
    "pairs.reading", "plots", "monitoring", "origins", "login", "model", "generation",
    "pairs.building", "sharing", "driver", "plan_memory", "data", "adapter", "plan", "training",
    "preflight", "probes", "evaluate", "doctor", "compare", "lessons", "licences", "card",
    "publish", "shipping", "export", "serve", "chat", "benchmark", "headless", "run",
    "repeat", "site",
]  # fmt: skip
BUILDING = {
    f"scripts.pairs.{name}" for name in ("build", "checker", "judges")
}  # the part of pairs that needs a model
APART = {"launchable"}  # a room that only the first may serve


def modules() -> dict[str, Path]:
    """Every module of scripts/ by its name; a package goes by the name of its folder."""
    found = {}
    for path in (ROOT / "scripts").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of scripts/ that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in known and name != "scripts"}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(path, known) for name, path in known.items()}


def room(module: str) -> str:
    if module in BUILDING:
        return "pairs.building"
    name = module.split(".")[1]
    return "pairs.reading" if name == "pairs" else name


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of an import circle, or an empty list."""
    done, path = set(), []

    def visit(name: str) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for other in sorted(edges[name]):
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    for name in sorted(edges):
        if found := visit(name):
            return found
    return []


def upstream(edges: dict[str, set[str]]) -> list[str]:
    """Imports that run against `ORDER`, or into a room that stands apart."""
    wrong = []
    for name, others in edges.items():
        if name in ("scripts", "scripts.__main__"):
            continue
        for other in others:
            here, there = room(name), room(other)
            if here == there or there == "cli":
                continue
            if {here, there} & APART or ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{name} imports {other}")
    return wrong


def test_no_import_circle():
    assert circle(graph()) == []


def test_no_arrow_runs_upstream():
    assert upstream(graph()) == []


def test_a_circle_and_an_upstream_arrow_would_be_seen(tmp_path):
    lazy = tmp_path / "lazy.py"
    lazy.write_text("def f():\n    from scripts.run import execute\n    import scripts.benchmark\n")
    assert imported(lazy, modules()) == {"scripts.run", "scripts.benchmark"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert upstream({"scripts.plan": {"scripts.benchmark"}}) != []
    assert upstream({"scripts.launchable": {"scripts.config"}}) != []
    assert upstream({"scripts.pairs.formats": {"scripts.pairs.build"}}) != []


def test_every_room_has_its_place():
    rooms = {room(name) for name in modules() if name not in ("scripts", "scripts.__main__")}
    assert rooms == {*ORDER, *APART}


HEAVY = ("torch", "transformers", "trl", "datasets", "pandas", "matplotlib", "numpy")


def loaded_by(*command: str) -> set[str]:
    """Which heavy libraries a command has loaded by the time it ends."""
    code = (
        "import runpy, sys, json\n"
        f"sys.argv = {list(command)!r}\n"
        "try:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    pass\n"
        f"print('\\n' + json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistyped_options_load_no_library(name):
    assert loaded_by(f"scripts.{name}", "--help") == set()
    assert loaded_by(f"scripts.{name}", "--no-such-option") == set()


def test_the_launchable_needs_no_torch():
    assert loaded_by("scripts.launchable") == set()


@pytest.mark.parametrize(
    "command",
    ["data check", "data build", "plan", "export push", "export gguf", "export",
     "serve", "benchmark", "run"],
)  # fmt: skip
def test_help_tells_the_options_of_the_action(command):
    done = subprocess.run(
        [sys.executable, "-m", *f"scripts.{command} --help".split()],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    option = {"data build": "--judge-url", "plan": "--lengths", "benchmark": "--repeats"}
    option |= {"export gguf": "--types", "export": "--rows", "serve": "--least-same"}
    assert option.get(command, "--config") in done.stdout
    assert f"python -m scripts.{command.split()[0]}" in done.stdout
