"""The start of the command `kcd`: the module `kcd_command` beside the installed package, which imports no torch.

So `kcd` answers `--help`, `--version` and a wrong command at once. `import kcd_ext` imports torch and registers the operators.
"""

import os
import sys
from importlib.util import find_spec


def without_current_folder() -> None:
    """Take away the current folder that `python -m` puts before all other places that modules are imported from.

    The source folder of the package, which has no compiled operators, would be found there instead of the installed one.
    """
    try:
        folder = os.getcwd()
    except OSError:  # it has been deleted
        return
    if not getattr(sys.flags, "safe_path", False) and sys.path and sys.path[0] == folder:
        del sys.path[0]


if __name__ == "__main__":
    without_current_folder()

# The files of the package are found as kcd_command.NAME, too: `cli`, and the few that it needs, without the package's __init__.py.
__path__ = find_spec("kcd_ext").submodule_search_locations


def main() -> int:
    """Run the command that this process was started with. Return its exit code, as `kcd_ext.cli.main` does."""
    from kcd_command.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
