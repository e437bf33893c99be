"""The house's statics: who may import whom, and what must not be loaded just to say hello."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samovar.stages import KINDS

ROOT = Path(__file__).parents[1]

# A room may import from the rooms of lower floors; rooms of one floor never import each other.
FLOOR = {
    "foundation": 0,
    "corpora": 1,
    "adaptation": 2, "distill": 2, "prune": 2, "evaluation": 2, "export": 2,
    "serving": 3,
    "samovar": 4,
    "tui": 5,
}  # fmt: skip

# Each takes from a tenth of a second to several: imported where they are used, never at a module's top.
HEAVY = {
    "torch", "transformers", "peft", "datasets", "accelerate", "llama_cpp", "sentencepiece", "unsloth",
    "bitsandbytes", "trl",
    "matplotlib", "sklearn", "scipy", "datasketch", "pyarrow",
}  # fmt: skip

# What the command line must not load before it knows what is asked for.
NOT_AT_START = HEAVY | {"numpy", "gguf", "tokenizers", "safetensors", "huggingface_hub"}

MODULES = [
    pytest.param(path, id=str(path.relative_to(ROOT)))
    for room in FLOOR
    for path in sorted((ROOT / room).rglob("*.py"))
]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules imported anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this house"
            yield node.module or ""


def at_import(tree: ast.Module) -> Iterator[str]:
    """Modules imported when the file itself is: outside functions, and not for type checkers only."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", MODULES)
def test_a_room_imports_from_lower_floors_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name in imports(ast.parse(path.read_text())):
        other = name.partition(".")[0]
        if other in FLOOR and other != room:
            assert FLOOR[other] < FLOOR[room], f"{room} must not import {name}"


@pytest.mark.parametrize("path", MODULES)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    found = {name.partition(".")[0] for name in at_import(ast.parse(path.read_text()))}
    assert not found & HEAVY, f"imported at the top: {sorted(found & HEAVY)}"


def test_the_checks_see_what_they_should() -> None:
    tree = ast.parse(
        "import torch.nn\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import peft\nelse:\n    import datasets\n"
        "class A:\n    import gguf\n    def f(self):\n        import transformers\n"
        "try:\n    from llama_cpp import x\nexcept ImportError: pass\n"
    )
    assert set(at_import(tree)) == {"torch.nn", "typing", "datasets", "gguf", "llama_cpp"}
    assert {"peft", "transformers"} <= set(imports(tree))


def test_every_kind_lies_in_its_room_and_what_it_is_handed_in_another() -> None:
    for name, kind in KINDS.items():
        room = name.partition(".")[0]
        for target in (kind.settings, kind.run):
            assert target.startswith(name), f"{name} names {target}"
        for target in kind.handed.values():
            other = target.partition(".")[0]
            assert other != room and FLOOR[other] == FLOOR[room], "lower rooms are imported, not handed"


def loaded(code: str) -> set[str]:
    """Top-level packages in sys.modules after `code`."""
    code += "\nimport sys; print('loaded', *{name.partition('.')[0] for name in sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(said.stdout.splitlines()[-1].split()[1:])


HELP = """
import sys
sys.argv = ["samovar", "--help"]
from samovar.cli import main
try: main()
except SystemExit: pass
"""


@pytest.mark.parametrize("code", ["import samovar.cli", HELP])
def test_the_command_line_starts_light(code: str) -> None:
    assert not loaded(code) & (NOT_AT_START | {"rich", "pydantic"})


def test_checking_a_recipe_loads_nothing_heavy() -> None:
    """All settings classes at once: whatever a recipe names, `samovar check` stays quick."""
    code = "from samovar.stages import KINDS\nfor kind in KINDS.values(): kind.settings_class()"
    assert not loaded(code) & NOT_AT_START


def test_running_a_recipe_loads_nothing_heavy_in_the_parent() -> None:
    assert not loaded("import samovar.run, samovar.alone, samovar.screen, samovar.pages") & NOT_AT_START
