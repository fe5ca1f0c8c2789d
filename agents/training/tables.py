"""Tables of figures as CSV files."""

import csv
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
            if keep_to and kept:
                self.columns = lines[0].strip().split(",")
                write_atomically(path, "".join([lines[0], *kept]))
            else:
                path.unlink()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; its first column is ``iteration``."""
        if self.path is None:
            return
        new = not self.columns
        self.columns = self.columns or list(row)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


def read_table(path: Path) -> list[dict[str, float]]:
    """A table as numbers, one mapping per row; empty where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
