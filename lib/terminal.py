"""Whether progress bars can be drawn. Imports no torch."""

import os
import sys


def draws_bars() -> bool:
    """Return whether stderr is a terminal with a width, as progress bars need. Otherwise progress is logged in lines.

    Some terminals report a width of 0, such as those of ``docker exec -t`` and of some CI services.
    """
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError, AttributeError):  # not a terminal, or not a file at all
        return False
