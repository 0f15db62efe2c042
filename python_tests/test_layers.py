"""Dependencies point down: the layers of the package, and which may import which."""

import ast
import re
from pathlib import Path

import pytest

import kcd_ext

# From top to bottom. A layer is a package or module of kcd_ext. It may import only those after it, also inside functions.
LAYERS = (
    "__main__",
    "cli",
    "kcd_command",
    "__init__",
    "commands",
    "reports",
    "training",
    "evaluation",
    "exporting",
    "students",
    "methods",
    "models",
    "loops",
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
NAMED = re.compile(r"kcd_ext(\.\w+)+(:\w+)?")  # a string that registries and importlib import by


def room_of(module):
    """Return the layer of a module, which is given as the names after kcd_ext, such as ("methods", "kd")."""
    return module[0] if module and module[0] in LAYERS else "__init__"


def imported(path, root):
    """Yield (line, names after kcd_ext) for every module that a file imports or names in a string."""
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
    """Return a line `file:line: layer imports layer` for every import that points up."""
    found = []
    for path in sorted(root.rglob("*.py")):
        module_path = path.relative_to(root).with_suffix("").parts
        for line, module in imported(path, root):
            if LAYERS.index(room_of(module)) < LAYERS.index(room_of(module_path)):
                found.append(f"{path.relative_to(root)}:{line}: {room_of(module_path)} imports {room_of(module)}")
    return found


def test_no_import_points_up():
    assert upward(Path(kcd_ext.__file__).parent) == []


def test_every_module_is_listed():
    root = Path(kcd_ext.__file__).parent
    modules = {path.relative_to(root).with_suffix("").parts[0] for path in root.rglob("*.py")}
    assert sorted(LAYERS) == sorted(modules)


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
def test_import_that_points_up_is_reported(code, above, tmp_path):
    (tmp_path / "methods").mkdir()
    allowed = "import torch\nfrom torch import nn\nfrom . import REGISTRY\nfrom ..checks import check_int\n"
    (tmp_path / "methods" / "kd.py").write_text(allowed + "import kcd_ext.models\nfrom kcd_ext.losses import select\n")
    assert upward(tmp_path) == []
    (tmp_path / "methods" / "kd.py").write_text(allowed + code)
    (found,) = upward(tmp_path)
    assert found.startswith("methods/kd.py:") and found.endswith(f": methods imports {above}")
