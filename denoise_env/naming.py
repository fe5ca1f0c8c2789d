"""Names: what an error says about one that is not known, and what "module:attribute" stands for."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def suggest(name: str, names: Iterable[str]) -> str:
    """ "did you mean …?" with the nearest of ``names``, or all of them where none is near.

    >>> suggest("pionts", ["points", "lines"]), suggest("x", ["points", "lines"])
    ("did you mean 'points'?", "there are ['points', 'lines']")
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {known}"


def load_attribute(target: str, what: str) -> Any:
    """What "module:attribute" names.

    Importing the module runs its code.

    Raises:
        ValueError: it is not of this form, or cannot be imported, whatever the module raises at that; the message calls
            it a ``what``.

    >>> load_attribute("math:pi", "number")
    3.141592653589793
    """
    module, _, attribute = target.partition(":")
    if not module.strip(".") or module.startswith(".") or not attribute:
        raise ValueError(f"name the {what} {target!r} as 'module:attribute', with the module's whole name")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"cannot load the {what} {target!r}: {error}") from error
    except (Exception, SystemExit) as error:  # the module is somebody's own, and does anything
        raise ValueError(f"cannot load the {what} {target!r}: {type(error).__name__}: {error}") from error
