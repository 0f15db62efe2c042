"""`python -m kcd_ext` is `kcd`."""

import sys

from .cli import main
from .kcd_command import without_current_folder

if __name__ == "__main__":
    without_current_folder()
    sys.exit(main())
