"""The leaderboard as one self-contained web page."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from agents.training.checkpoints import write_atomically
from benchmarks.comparison import REFERENCE, compare_all

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(results: Path) -> Path:
    """Write ``index.html`` beside the data files it is made from: ``page.html`` with the comparisons inlined."""
    data = {"reference": REFERENCE, "comparisons": [dataclasses.asdict(c) for c in compare_all(results)]}
    text = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    path = results / "index.html"
    write_atomically(path, TEMPLATE.read_text(encoding="utf-8").replace("/*data*/null", text))
    return path


def _plain(value: Any) -> Any:
    """For JSON: four significant digits, ``None`` for NaN, the text "inf" for infinity."""
    match value:
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list() | tuple() | np.ndarray():
            return [_plain(item) for item in value]
        case float() if np.isinf(value):
            return "inf"
        case float():
            return None if np.isnan(value) else float(f"{value:.4g}")
    return value
