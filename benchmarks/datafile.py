"""The data files of `benchmarks.suite`: what is in them, and what may replace it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.training.checkpoints import write_atomically

FIXED = ("reward", "budget", "trial_budget", "seeds", "trials", "environments")
"""What all runs of a file have in common."""


def read(path: Path) -> dict[str, Any] | None:
    """A data file, or ``None`` where there is none.

    Raises:
        ValueError: the file is no data file of a suite.
    """
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(data, dict) and "runs" in data
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{path} is no data file of benchmarks.suite")
    return data


def check(path: Path, head: Mapping[str, Any]) -> None:
    """Refuse, before anything runs, to mix runs of different settings in one file.

    Args:
        path: the file to write later.
        head: what it shall say of its runs; `FIXED` names what counts.

    Raises:
        ValueError: the file is there and says otherwise.
    """
    old = read(path)
    if old is None:
        return
    now = json.loads(json.dumps({name: head[name] for name in FIXED}))
    changed = [f"{name} {old.get(name)!r}, not {now[name]!r}" for name in FIXED if old.get(name) != now[name]]
    if changed:
        raise ValueError(
            f"{path} holds runs of other settings ({'; '.join(changed)}): give --results DIR to write elsewhere, or "
            "move that file away first"
        )


Pair = tuple[str, str]
"""An environment and an agent."""


def _pair(record: Mapping[str, Any]) -> Pair:
    return record["environment"], record["agent"]


def fewer(old: dict[str, Any] | None, new: dict[str, Any]) -> set[Pair]:
    """The pairs of the new file of which more runs had finished in the old one."""

    def finished(data: dict[str, Any], pair: Pair) -> int:
        return sum(_pair(run) == pair and not run["error"] for run in data["runs"])

    return {pair for pair in map(_pair, new["runs"]) if old and finished(new, pair) < finished(old, pair)}


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """New runs in the place of the old ones of the same agents, but for those in `fewer`; the other agents' stay."""
    if old is None:
        return new
    taken = set(map(_pair, new["runs"])) - fewer(old, new)
    kept = set(map(_pair, old["runs"])) - taken
    commands = [*(old["commands"] if kept else []), *(new["commands"] if taken else [])]
    merged = {**new, "commands": list(dict.fromkeys(commands))}
    for name in ("search", "runs"):
        own: dict[Pair, list[Any]] = {_pair(record): [] for record in [*old[name], *new[name]]}  # the old file's order
        for data, chosen in ((old, kept), (new, taken)):
            for record in data[name]:
                if _pair(record) in chosen:
                    own[_pair(record)].append(record)
        merged[name] = [record for records in own.values() for record in records]
    return merged


def write(data: Mapping[str, Any], path: Path) -> None:
    """Write a data file: JSON with one run a line."""

    def lines(rows: list[Any]) -> str:
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]"

    body = ",\n".join(
        f'"{name}": {lines(value) if name in ("search", "runs") else json.dumps(value)}' for name, value in data.items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{{\n{body}\n}}\n")
