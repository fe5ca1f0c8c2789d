"""The demo on several training seeds: a row a seed, and an interval over training seeds.

    python -m benchmarks.demo                  # five seeds, six to seven minutes each; resumes where it stopped
    python -m benchmarks.demo --seeds 3 --reward compositions -- --preset shapes-flux
    python -m benchmarks.demo --seeds 3 --reward motion motion-appearance motion-direction -- --preset shapes-video

Each run is ``denoise-env train --seed N`` with whatever follows ``--``, in ``build/demo/<code>/<flags>``, and is not
repeated while neither the code nor the flags change.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.cli import main as denoise_env
from agents.training.report import headline, interval
from agents.training.tables import read_table
from benchmarks.runs import REPOSITORY, code

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, … degrees of freedom."""


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean, and the half-widths of two 95 % intervals: of the mean over training seeds, and for one further seed.

    Both are Student's, for 2 to 10 values that are taken to be normally distributed.
    """
    n = len(values)
    if not 2 <= n <= len(STUDENT) + 1:
        raise ValueError(f"an interval over seeds takes 2 to {len(STUDENT) + 1} of them, not {n}")
    spread = STUDENT[n - 2] * float(np.std(values, ddof=1))
    return float(np.mean(values)), spread / n**0.5, spread * (1 + 1 / n) ** 0.5


def table(runs: Sequence[Path], rewards: Sequence[str] = ()) -> str:
    """Rewards before and after training in Markdown, a row a run, and the mean.

    Args:
        runs: directories of finished runs, 2 to 10.
        rewards: evaluated rewards' names; the last one by default.

    Raises:
        ValueError: a reward that was not evaluated.
    """
    lines: list[str] = []
    after: dict[str, list[float]] = {}
    for run in runs:
        evals = read_table(run / "eval.csv")
        found = [name for name, *_ in headline(evals)]
        names = rewards or found[-1:]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"the runs evaluate no reward {missing[0]!r}, but {', '.join(found)}")
        first, last = evals[0], evals[-1]
        if not lines:
            heads = [*(f"{name}: before | after" for name in names), "diversity: before | after"]
            lines = [f"| seed | {' | '.join(heads)} | training, s |", "|---" * (2 * len(heads) + 2) + "|"]
        seed = json.loads((run / "config.json").read_text(encoding="utf-8"))["seed"]
        seconds = sum(row["seconds"] for row in read_table(run / "metrics.csv"))
        cells = [f"{row[name]:.3f} {interval(row, name)}" for name in names for row in (first, last)]
        cells += [f"{row['diversity']:.3f}" for row in (first, last)]
        lines.append(f"| {seed} | {' | '.join(cells)} | {seconds:.0f} |")
        for name in names:
            after.setdefault(name, []).append(last[name])
    means = {name: over_seeds(values) for name, values in after.items()}
    cells = [f"| {mean:.3f} [{mean - half:.3f}, {mean + half:.3f}] |" for mean, half, _ in means.values()]
    lines.append(f"| mean of {len(runs)} | {' '.join(cells)} | | |")
    further = [f"{name} in [{mean - half:.3f}, {mean + half:.3f}]" for name, (mean, _, half) in means.items()]
    return "\n".join(
        [
            *lines,
            "",
            f"Brackets of a seed: 95 % bootstrap interval over {last['images']:.0f} samples, over evaluation noise.",
            "Brackets of the mean: Student's 95 % interval over training seeds; a further training seed is expected to "
            f"have {', '.join(further)}.",
            "Diversity is the std of the final latents among a prompt's samples.",
        ]
    )


def run_seed(seed: int, root: Path, flags: Sequence[str]) -> Path:
    """One run, from where it stopped; returns its directory.

    Raises:
        RuntimeError: it failed.
    """
    directory = root / f"seed{seed}"
    if not (directory / "report.html").exists():
        started = (directory / "config.json").exists()
        fresh = ["--seed", str(seed), "--output-dir", str(directory), *flags]
        if status := denoise_env(["train", *(["--resume", str(directory)] if started else fresh)]):
            raise RuntimeError(f"the run in {directory} ended with exit status {status}")
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0 done, 1 a run failed, 2 bad input)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    own, flags = (typed[: typed.index("--")], typed[typed.index("--") + 1 :]) if "--" in typed else (typed, [])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="of them, from 0 (default %(default)s)")
    help = "of those evaluated, the table's (default: the last)"
    parser.add_argument("--reward", nargs="+", default=(), metavar="NAME", help=help)
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build" / "demo", metavar="DIR", help="of the runs")
    options = parser.parse_args(own)
    if not 2 <= options.seeds <= len(STUDENT) + 1:
        parser.error(f"--seeds must be 2 to {len(STUDENT) + 1}")
    root = options.build / code().split()[-1] / hashlib.sha256(repr(flags).encode()).hexdigest()[:8]
    try:
        runs = [run_seed(seed, root, flags) for seed in range(options.seeds)]
        print(f"{table(runs, options.reward)}\nCode: {code()}.")
    except (RuntimeError, ValueError) as error:
        print(f"benchmarks.demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
