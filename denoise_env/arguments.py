"""What counts as an integer, a number and a boolean in an argument.

NumPy's scalars are as good as Python's. A boolean is no number, and a string is neither.
"""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_SEED = 2**64 - 1
"""The largest seed that PyTorch's generators take."""


def integer(value: Any, what: str, at_least: int | None = None, at_most: int | None = None) -> int:
    """``value`` as a Python integer.

    Args:
        value: an integer of Python's or NumPy's.
        what: what it is, for the error.
        at_least: the smallest integer allowed.
        at_most: the largest integer allowed.

    Raises:
        ValueError: another type, or out of range.

    >>> integer(np.int64(3), "rows", at_least=1)
    3
    >>> integer(True, "rows")
    Traceback (most recent call last):
    ValueError: rows must be an integer, not True
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{what} must be an integer, not {value!r}")
    return int(_within(value, what, at_least, at_most))


def number(value: Any, what: str, at_least: float | None = None, at_most: float | None = None) -> float:
    """``value`` as a Python float, finite; the arguments and errors are those of `integer`.

    >>> number(np.float32(0.5), "weight")
    0.5
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, not {value!r}")
    return float(_within(value, what, at_least, at_most))


def boolean(value: Any, what: str) -> bool:
    """``value``, true or false of Python's or NumPy's, as a Python boolean.

    >>> boolean("no", "shared_noise")
    Traceback (most recent call last):
    ValueError: shared_noise must be True or False, not 'no'
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{what} must be True or False, not {value!r}")
    return bool(value)


def _within(value: Any, what: str, at_least: float | None, at_most: float | None) -> Any:
    if at_least is not None and value < at_least:
        raise ValueError(f"{what} must be at least {at_least}, not {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{what} must be at most {at_most}, not {value}")
    return value
