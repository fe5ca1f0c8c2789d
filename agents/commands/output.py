"""The files that a command is asked to write."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_output(path: str | None, suffixes: Mapping[str, str] | None = None) -> None:
    """Raise a ``ValueError`` where a file cannot be written, before there is anything to write.

    Args:
        path: the file, or ``None`` for none.
        suffixes: the endings that it may have, as keys; default: any.
    """
    if path is None:
        return
    file = Path(path)
    if not path or file.is_dir():
        raise ValueError(f"{path!r} is a directory: name a file in it")
    there = next(folder for folder in file.absolute().parents if folder.exists())
    if not there.is_dir():
        raise ValueError(f"{path!r} cannot be written: {str(there)!r} is no directory")
    if suffixes is not None and file.suffix.lower() not in suffixes:
        raise ValueError(f"{path!r} must end in the name of a picture format, such as .png")


def write_json(path: str | None, values: Mapping[str, Any]) -> None:
    """Write strict JSON: a number that is not finite is ``null``. Where ``path`` is ``None`` nothing is written."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_strict(values), indent=1, allow_nan=False), encoding="utf-8")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _strict(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
