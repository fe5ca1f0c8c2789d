"""The leaderboard in Markdown, with its figures."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from agents.training.checkpoints import write_atomically
from benchmarks.comparison import DEFINITIONS, OVERALL, REFERENCE, Comparison, compare_all
from benchmarks.statistics import Estimate

ACCENT = "#1d4ed8"
_METHOD = f"""\
Rewards are interquartile means over runs (Agarwal et al. 2021) at the end of the budget, with 95 % bootstrap
intervals; over all environments, the mean of each one's. Where the base model's reward has an interval, every seed has
evaluation noise of its own, the same for all agents: intervals are over training seeds and evaluation noise, and the
base model's over the latter alone. Where it has none, all seeds share one evaluation noise. Above each table stands
the code that made it: settings that an agent has had since then are not in it. A network call is the forward of one
row; forward and backward count as three. KL is the trajectory's, to the base model, summed over dimensions, in nats.
*Reward at KL* follows each run's path to where it first spends that much; *calls to target* is the median over runs of
the first crossing, where a run that never crosses counts as later than the budget. *P(> {REFERENCE})* is the
probability that a run gains more than one of {REFERENCE}. Settings were searched by one rule for every agent, on a
seed and evaluation noise of their own: the same number of trials under the same budget, and up to two more where the
best learning rate was the lowest or the highest tried. Seconds are of training alone, and of the machine. With three
seeds an interval is the range of the runs and no more.
"""


def write_leaderboard(results: Path) -> Path:
    """Write ``leaderboard.md`` and its figures beside the data files it is made from."""
    sections = [_section(comparison, results) for comparison in compare_all(results)]
    path = results / "leaderboard.md"
    write_atomically(path, "\n".join(["# Leaderboard", "", _METHOD, *sections]))
    return path


def _section(comparison: Comparison, results: Path) -> str:
    about, lines = comparison.about, [f"## {comparison.environment[0].upper()}{comparison.environment[1:]}", ""]
    lines += [f"{about['description'][0].upper()}{about['description'][1:]}.", ""]
    if comparison.environment != OVERALL:
        each = about.get("trial_budget") or about["budget"]
        search = f"{about['trials']} search trials of {each:,}" if about["trials"] else "no search"
        typed = ", ".join(f"`{command}`" for command in about["commands"])
        lines += [
            f"{typed}: {about['budget']:,} network calls a run, {about['seeds']} seeds, {search}. "
            f"The base model's reward is {figure(comparison.base, '.3f')}, the target {comparison.target:.3f}. "
            f"{made_with(about['code'])}",
            "",
        ]
    lines += [table(comparison), ""]
    if comparison.curves:
        name = comparison.environment.replace(", ", "-").replace(" ", "-")
        for draw, alt in ((curves_figure, "reward over network calls"), (kl_figure, "reward over KL")):
            file = f"{name}-{draw.__name__.removesuffix('_figure')}.svg"
            _save(draw(comparison), results / file)
            lines += [f"![{comparison.environment}: {alt}]({file})", ""]
    return "\n".join(lines)


def table(comparison: Comparison) -> str:
    """A Markdown table of a comparison's rows, without the columns that have nothing to tell."""
    ranked = "reward" if comparison.curves else "share of the possible gain"
    budget = comparison.about.get("budget", 0)
    columns: dict[str, list[str]] = {"agent": [], ranked: []}
    for row in comparison.rows:
        count = f" ({row.runs} of {row.runs + row.failed} runs)" if row.failed else ""
        cells = {
            "agent": row.agent + count,
            ranked: figure(row.reward, ".3f"),
            "Δ base": figure(row.gain and row.gain.value, "+.3f"),
            f"reward at KL {comparison.kl_level:g}": figure(row.reward_at_kl, ".3f")
            + reached(row.reached_kl, row.runs),
            "KL": figure(row.kl, ".2f"),
            "diversity / base": figure(row.diversity, ".2f"),
            "calls to target": calls(row.calls_to_target, budget) + reached(row.reached_target, row.runs),
            "below the optimum": figure(row.gap, ".3f"),
            "held-out prompts": figure(row.held_out, ".3f"),
            f"P(> {REFERENCE})": figure(row.better, ".2f"),
            "setting": setting(row.setting, row.edge),
            "seconds": figure(row.seconds, ".1f"),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    columns = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
    body = [f"| {' | '.join(cells)} |" for cells in zip(*columns.values(), strict=True)]
    errors = [f"\n{row.agent}: {row.error}" for row in comparison.rows if row.error]
    told = {name for name in DEFINITIONS for row in comparison.rows if getattr(row, name) is not None}
    notes = [f"\n{text}" for name, text in DEFINITIONS.items() if name in told]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body, *notes, *errors])


def setting(values: Mapping[str, float], edge: str | None) -> str:
    """What the search chose, marked where its learning rate lies at an end of those that were tried."""
    short = {name.removesuffix("_range").removesuffix("_per_rollout"): value for name, value in values.items()}
    mark = {"lr": f" ({edge} tried)"} if edge else {}
    return ", ".join(f"{name} {value:g}{mark.get(name, '')}" for name, value in short.items()) or "–"


def made_with(code: Mapping[str, int]) -> str:
    """Which code the runs were made with: a revision and a digest of the sources."""
    each = [f"{name} ({count} runs)" if len(code) > 1 else name for name, count in code.items()]
    return f"Code: {', '.join(each)}."


def figure(value: float | Estimate | None, style: str) -> str:
    """A number, with its interval where it has one; a dash where there is none."""
    if isinstance(value, Estimate):
        return f"{value.value:{style}} [{value.low:{style}}, {value.high:{style}}]"
    return "–" if value is None or np.isnan(value) else f"{value:{style}}"


def calls(value: float | None, budget: int) -> str:
    """Thousands of network calls, or more than the budget."""
    if value is None or np.isfinite(value):
        return figure(value and value / 1000, ".0f") + " k" * (value is not None)
    return f"> {budget / 1000:.0f} k"


def reached(count: int | None, runs: int) -> str:
    """How many runs arrived, where some and not all did."""
    return f" ({count}/{runs})" if count and count < runs else ""


def curves_figure(comparison: Comparison) -> Figure:
    """Reward over network calls, a panel per agent with its interval; the others' curves in the background."""
    names = [row.agent for row in comparison.rows if row.agent in comparison.curves]
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    drawing, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 1.8 * rows + 0.4), squeeze=False, sharex=True, sharey=True
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for other in names:
            curve = comparison.curves[other]["network_calls"]["reward"]
            own = other == name
            axis.plot(
                curve["x"] / 1000,
                curve["value"],
                color=ACCENT if own else "#d4d8dd",
                lw=1.6 if own else 0.7,
                zorder=2 + own,
            )
            if own:
                axis.fill_between(curve["x"] / 1000, curve["low"], curve["high"], color=ACCENT, alpha=0.25, lw=0)
        axis.set_title(name, fontsize=9)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    drawing.supxlabel("network calls, thousands", fontsize=9)
    drawing.supylabel("reward", fontsize=9)
    return drawing


def kl_figure(comparison: Comparison) -> Figure:
    """The path of every agent through (KL, reward), its end named, and the optimum's frontier."""
    drawing, axis = plt.subplots(figsize=(8, 5))
    for agent, axes in comparison.curves.items():
        if curve := axes.get("kl", {}).get("reward"):
            (line,) = axis.plot(curve["x"], curve["value"], lw=1, alpha=0.7)
            end, color = (curve["x"][-1], curve["value"][-1]), line.get_color()
            axis.plot(*end, "o", color=color, ms=4)
            axis.annotate(agent, end, (4, 2), textcoords="offset points", fontsize=8, color=color)
    axis.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    right = axis.get_xlim()[1]
    if comparison.frontier:
        axis.plot(comparison.frontier["kl"], comparison.frontier["reward"], "k--", lw=1, label="optimum")
        axis.legend(frameon=False)
    axis.set_xlim(0, right)
    axis.set_xlabel("KL to the base model, nats (square-root scale)")
    axis.set_ylabel("reward")
    return drawing


def _save(drawing: Figure, path: Path) -> None:
    for axis in drawing.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    drawing.set_layout_engine("constrained")
    with plt.rc_context({"svg.hashsalt": path.name}):
        drawing.savefig(path, metadata={"Date": None})  # the same data give the same file
    plt.close(drawing)
