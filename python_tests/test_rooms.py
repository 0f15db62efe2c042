"""Dependencies point down: which part of the package may import which."""

import ast
import re
from pathlib import Path

import pytest

import kcd_ext

# From the top down. A room is a package or a module of kcd_ext; it may import those after it, also inside functions.
ROOMS = (
    "__main__",
    "cli",
    "kcd_command",
    "__init__",
    "commands",
    "reports",
    "training",
    "evaluation",
    "methods",
    "models",
    "data",
    "condensation",
    "losses",
    "reference",
    "networks",
    "module_state",
    "randomness",
    "environment",
    "ops",
    "torch_internals",
    "knowledge",
    "arguments",
    "files",
    "registry",
    "import_path",
    "checks",
    "describe",
    "terminal",
    "processes",
    "_extension",
)
NAMED = re.compile(r"kcd_ext(\.\w+)+(:\w+)?")  # a string by which registries and importlib import


def room_of(module):
    """`module`: the names after kcd_ext, as ("methods", "kd")."""
    return module[0] if module and module[0] in ROOMS else "__init__"


def imported(path, root):
    """(line, names after kcd_ext) of every module that a file imports or names for a registry."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [(*base, *(node.module or "").split("."), alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(*node.module.split("."), alias.name)[1:] for alias in node.names if is_ours(node.module)]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")[1:]) for alias in node.names if is_ours(alias.name)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            names = [tuple(node.value.partition(":")[0].split(".")[1:])]
        else:
            continue
        for name in names:
            yield node.lineno, tuple(part for part in name if part)


def is_ours(module):
    return module.partition(".")[0] == "kcd_ext"


def upward(root):
    """Every import that points up, as a line that says where it is."""
    found = []
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).with_suffix("").parts
        for line, module in imported(path, root):
            if ROOMS.index(room_of(module)) < ROOMS.index(room_of(own)):
                found.append(f"{path.relative_to(root)}:{line}: {room_of(own)} imports {room_of(module)}")
    return found


def test_imports_point_down():
    assert upward(Path(kcd_ext.__file__).parent) == []


def test_every_room_is_listed():
    root = Path(kcd_ext.__file__).parent
    there = {path.relative_to(root).with_suffix("").parts[0] for path in root.rglob("*.py")}
    assert sorted(ROOMS) == sorted(there)


@pytest.mark.parametrize(
    ("code", "above"),
    [
        ("from ..training import distill", "training"),
        ("from .. import evaluation", "evaluation"),
        ("from ..reports.runs import Run", "reports"),
        ("import kcd_ext.commands.demo", "commands"),
        ("from kcd_ext import cli", "cli"),
        ("from .. import condense", "__init__"),
        ("def late():\n    if True:\n        from ..training.loop import distill", "training"),
        ("REGISTRY = {'x': 'kcd_ext.training.recipe:Recipe'}", "training"),
        ("import_module('kcd_ext.cli')", "cli"),
    ],
)
def test_an_import_that_points_up_is_found(code, above, tmp_path):
    (tmp_path / "methods").mkdir()
    allowed = "import torch\nfrom torch import nn\nfrom . import REGISTRY\nfrom ..checks import check_int\n"
    (tmp_path / "methods" / "kd.py").write_text(allowed + "import kcd_ext.models\nfrom kcd_ext.losses import select\n")
    assert upward(tmp_path) == []
    (tmp_path / "methods" / "kd.py").write_text(allowed + code)
    (found,) = upward(tmp_path)
    assert found.startswith("methods/kd.py:") and found.endswith(f": methods imports {above}")
