"""The entry point of `python -m kcd_ext`, which is the same as `kcd`."""

from .cli import main
from .kcd_command import without_current_folder
from .processes import exit_process

if __name__ == "__main__":
    without_current_folder()
    exit_process(main())
