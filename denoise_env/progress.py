"""Progress bars: live on a terminal, a line now and then in a log file."""

import sys
from typing import Any

from tqdm import tqdm


def progress(*arguments: Any, **options: Any) -> Any:
    """A tqdm bar; where standard error is no terminal it writes at most every ten seconds."""
    live = sys.stderr.isatty()
    return tqdm(*arguments, **options, mininterval=0.1 if live else 10, maxinterval=10, dynamic_ncols=live)
