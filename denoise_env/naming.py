"""What an error says about a name that is not known."""

import difflib
from collections.abc import Iterable


def suggest(name: str, names: Iterable[str]) -> str:
    """ "did you mean …?" with the nearest of ``names``, or all of them where none is near.

    >>> suggest("shaeps", ["points", "shapes"]), suggest("x", ["points", "shapes"])
    ("did you mean 'shapes'?", "there are ['points', 'shapes']")
    """
    known = list(names)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {known}"
