"""The entry point of `python -m kcd_ext`, which is the same as `kcd`."""

import sys

from .cli import main
from .kcd_command import without_current_folder

if __name__ == "__main__":
    without_current_folder()
    sys.exit(main())
