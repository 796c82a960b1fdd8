"""The house: who imports whom, how much a command loads, and one meaning for every name."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from scripts.base import ROOT
from scripts.cli import COMMANDS

GROUND = {"scripts.base", "scripts.progress"}  # what every room may stand on
PRODUCTS = ("scripts.sharing", "scripts.pairs")  # usable without the recipe
HEAVY = ("torch", "transformers", "trl", "datasets", "pandas", "matplotlib", "numpy")


def modules() -> dict[str, Path]:
    """Every module of scripts/ by its name; a package goes by the name of its folder."""
    found = {}
    for path in (ROOT / "scripts").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """The modules among `known` that `source` imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name in known and name != "scripts"}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(path.read_text(), set(known)) for name, path in known.items()}


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

    return next((found for name in sorted(edges) if (found := visit(name))), [])


def borrowed(edges: dict[str, set[str]]) -> list[str]:
    """Imports by which one of the `PRODUCTS` leans on the recipe or on the other."""
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for product in PRODUCTS
        if name.startswith(product)
        for other in sorted(others - GROUND)
        if not other.startswith(product)
    ]


def test_no_import_circle():
    assert circle(graph()) == []


def test_the_trainer_and_the_data_tools_stand_alone():
    assert borrowed(graph()) == []


def test_faults_of_these_kinds_would_be_seen():
    known = {"scripts.run", "scripts.plan", "scripts.base"}
    lazy = "def f():\n    from scripts.run import execute\n    import scripts.plan\n"
    assert imported(lazy, known) == {"scripts.run", "scripts.plan"}
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]
    assert borrowed({"scripts.pairs.files": {"scripts.config", "scripts.base"}}) != []
    assert borrowed({"scripts.sharing.row": {"scripts.pairs.tokens"}}) != []


def test_one_name_has_one_meaning():
    """No public function or class of the same name in two modules, and no two modules either."""
    where = defaultdict(set)
    for module, path in modules().items():
        where[module.rsplit(".", 1)[-1]].add(module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].add(module)
    # every command has its `main`, and packages their `__main__`
    twice = {n: found for n, found in where.items() if len(found) > 1 and n.strip("_") != "main"}
    assert twice == {}


def test_training_loads_few_modules_of_ours():
    ours = "[m for m in sys.modules if m.split(chr(46))[0] == 'scripts']"
    code = f"import sys, scripts.training; print(*{ours})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) <= 36, done.stdout


def loaded_by(*command: str) -> set[str]:
    """Which heavy libraries a command has loaded by the time it ends."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {list(command)!r}\n"
        "try:\n    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit:\n    pass\n"
        f"print('\\nloaded', *[n for n in {HEAVY!r} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistyped_options_load_no_library(name):
    assert loaded_by(f"scripts.{name}", "--help") == set()
    assert loaded_by(f"scripts.{name}", "--no-such-option") == set()
