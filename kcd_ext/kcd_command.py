"""The launcher of `kcd`, which is installed as the module `kcd_command` beside the package and does not import torch.

`kcd --help`, `kcd --version` and the error for a wrong command therefore appear at once. `import kcd_ext` would first import
torch and register the operators.
"""

import os
import sys
from importlib.util import find_spec
from typing import NoReturn


def without_current_folder() -> None:
    """Remove the current folder from `sys.path`, where `python -m` puts it first.

    In a clone, Python would otherwise import the sources, which have no compiled operators, instead of the installed package.
    """
    try:
        folder = os.getcwd()
    except OSError:  # the current folder has been deleted
        return
    if not getattr(sys.flags, "safe_path", False) and sys.path and sys.path[0] == folder:
        del sys.path[0]


if __name__ == "__main__":
    without_current_folder()

# Makes the package's files importable as kcd_command.NAME, so that `cli` runs without the package's __init__.py.
__path__ = find_spec("kcd_ext").submodule_search_locations


def main() -> NoReturn:
    """Run the command line of this process and exit with the code that `kcd_ext.cli.main` returns."""
    from kcd_command.cli import main
    from kcd_command.processes import exit_process

    exit_process(main())


if __name__ == "__main__":
    main()
