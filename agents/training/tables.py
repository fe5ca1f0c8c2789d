"""Tables of figures as CSV files."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.training.checkpoints import write_atomically


class Table:
    """A CSV file that grows a row at a time and drops what lies after the iteration that a run resumes from.

    Without a path nothing is written.
    """

    def __init__(self, path: Path | None, keep_to: int) -> None:
        self.path = path
        self.columns: list[str] = []
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",", 1)[0]) <= keep_to]
            if kept:
                (self.columns,) = csv.reader(lines[:1])
                write_atomically(path, "".join([lines[0], *kept]))
            else:
                path.unlink()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; its first column is ``iteration``.

        Raises:
            RuntimeError: the rows that are there have no such columns.
        """
        if self.path is None:
            return
        new = not self.columns
        self.columns = self.columns or list(row)
        if other := [name for name in row if name not in self.columns]:
            raise RuntimeError(f"the table {self.path} is another run's: it has no {', '.join(other)}")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def read_table(path: Path) -> list[dict[str, float]]:
    """A table as numbers, one mapping per row; empty where there is no file. A row that is not complete is left out.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader((line for line in file if line.endswith("\n")), strict=True)
            return [{name: float(value) for name, value in row.items()} for row in rows]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"the table {path} is damaged: {error}") from error


def check_table(path: Path, columns: Sequence[str]) -> None:
    """Raise a ``ValueError`` for a run's table that rows cannot be added to or that cannot be told of.

    Args:
        path: the table; there may be none.
        columns: what it must have. Its first column is ``iteration``, in integers; a column of means has its interval.
    """
    for row in read_table(path):
        needed = ["iteration", *columns]
        for name in row:
            if name.endswith("_low"):
                kind = name.removesuffix("_low")
                needed += [kind.removesuffix("_prompts"), f"{kind}_high"]
        missing = [name for name in needed if name not in row]
        if missing or next(iter(row)) != "iteration":
            raise ValueError(f"the table {path} is damaged: it lacks {missing or 'iteration as its first column'}")
        if not row["iteration"].is_integer():
            raise ValueError(f"the table {path} is damaged: there is no iteration {row['iteration']}")
