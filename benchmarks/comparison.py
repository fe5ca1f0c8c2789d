"""From the suites' data files to what is told of them: rows, pairwise probabilities and curves per environment."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.statistics import (
    Estimate,
    Floats,
    bootstrap,
    censored_median,
    estimate,
    first_crossing,
    iqm,
    probability_of_improvement,
)

if TYPE_CHECKING:
    from benchmarks.optimum import Frontier

REFERENCE = "grpo"
"""The agent that the others are compared with."""
AXES = ("network_calls", "seconds", "kl")
"""What a curve can run over."""
POINTS, CURVE_DRAWS = 31, 500
Curve = dict[str, Floats]
"""One run's evaluations, column by column."""
OVERALL = "all environments"


@dataclass(frozen=True)
class Row:
    """What the leaderboard tells of one agent; ``None`` where there is nothing to tell.

    Attributes:
        agent: its name.
        runs: how many finished.
        failed: how many did not.
        error: the last line of one that did not.
        setting: what the search chose.
        reward: at the end of the budget; over all environments, the share of the possible gain.
        gain: reward gained over the run's own start.
        reward_at_kl: where at least half of the runs reach that KL.
        reached_kl: how many did.
        kl: at the end.
        diversity: at the end, relative to the base model's.
        calls_to_target: median network calls to the target, infinite where too few arrive to tell.
        reached_target: how many did.
        gap: reward below the optimum at the KL spent.
        held_out: reward on held-out prompts.
        better: P(gains more than the reference agent).
        seconds: of training, median.
    """

    agent: str
    runs: int
    failed: int = 0
    error: str | None = None
    setting: dict[str, float] = field(default_factory=dict)
    reward: Estimate | None = None
    gain: Estimate | None = None
    reward_at_kl: Estimate | None = None
    reached_kl: int | None = None
    kl: float | None = None
    diversity: float | None = None
    calls_to_target: float | None = None
    reached_target: int | None = None
    gap: float | None = None
    held_out: Estimate | None = None
    better: Estimate | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """One environment's agents, compared.

    Attributes:
        environment: its name.
        about: the data file's head: suite, command, versions, budget, seeds, trials.
        rows: one per agent, best first.
        better: agent → agent → P(the first's gain > the second's).
        base: mean reward of the base model.
        kl_level: the KL at which rewards are compared; three quarters of the runs that move reach it.
        target: the reward to reach, half-way from the base model to the maximum of 1.
        curves: agent → x → y → "x", "value", "low", "high", up to where half of the agent's runs reach.
        frontier: "kl" and the largest "reward" of Gaussian policies there, where it was computed.
    """

    environment: str
    about: dict[str, Any]
    rows: list[Row]
    better: dict[str, dict[str, Estimate]]
    base: float = np.nan
    kl_level: float = np.nan
    target: float = np.nan
    curves: dict[str, Any] = field(default_factory=dict)
    frontier: dict[str, list[float]] | None = None


def compare_all(results: Path) -> list[Comparison]:
    """A comparison per environment of the data files in ``results``, and one over all of them.

    Raises:
        ValueError: there is no data file.
    """
    found = []
    for path in sorted(results.glob("*.json"), key=lambda path: path.stem):
        data = json.loads(path.read_text(encoding="utf-8"))
        if "runs" not in data:
            continue
        for environment, about in data["environments"].items():
            comparison = compare(environment, data, _frontier(results / "optimum-points.json", **about))
            if comparison.rows:
                found.append((comparison, _gains(_finished(environment, data))))
    if not found:
        raise ValueError(f"{results} holds no suite's data: python -m benchmarks.suite run SUITE writes it")
    pooled = [(c, gains) for c, gains in found if c.about["pooled"] and gains]
    return [c for c, _ in found] + ([_overall(pooled)] if len(pooled) > 1 else [])


def compare(environment: str, data: dict[str, Any], frontier: "Frontier | None" = None) -> Comparison:
    """One environment's comparison."""
    runs = _finished(environment, data)
    every, gains = [run for own in runs.values() for run in own], _gains(runs)
    base = float(np.mean([run["reward"][0] for run in every])) if every else np.nan
    ends = [np.nan_to_num(run["kl"]).max() for run in every]
    furthest = [kl for kl in ends if kl > 0]
    level = float(f"{np.quantile(furthest, 0.25):.1g}") if furthest else np.nan
    grid = np.linspace(0, np.sqrt(max([1.0, *furthest])), 300) ** 2
    comparison = Comparison(
        environment,
        {key: value for key, value in data.items() if key not in ("runs", "search")},
        [],
        {a: {b: probability_of_improvement([gains[a]], [gains[b]]) for b in gains} for a in gains},
        base,
        level,
        (1 + base) / 2,
        {agent: _curves(found) for agent, found in runs.items()},
        {"kl": grid.tolist(), "reward": frontier.reward_at(grid).tolist()} if frontier else None,
    )
    records = [run for run in data["runs"] if run["environment"] == environment]
    for agent in dict.fromkeys(run["agent"] for run in records):
        own = [run for run in records if run["agent"] == agent]
        comparison.rows.append(_row(comparison, own, runs.get(agent, []), gains.get(agent), frontier))
    comparison.rows.sort(key=_rank)
    return comparison


def _frontier(path: Path, model: str, kernel: str) -> "Frontier | None":
    """The optimum of Gaussian policies, where it was computed for this model and kernel."""
    if not path.exists():
        return None
    from benchmarks.optimum import load

    try:
        return load(model, kernel, "gaussian", path)["mean"]
    except ValueError:
        return None


def _gains(runs: dict[str, list[Curve]]) -> dict[str, Floats]:
    """Agent → ``[runs]``, how much more reward each run ends with than the base model, its start, has."""
    return {agent: np.array([run["reward"][-1] - run["reward"][0] for run in own]) for agent, own in runs.items()}


def _rank(row: Row) -> float:
    return -row.reward.value if row.reward else np.inf


def _row(
    comparison: Comparison,
    records: Sequence[dict[str, Any]],
    runs: Sequence[Curve],
    gains: Floats | None,
    frontier: "Frontier | None",
) -> Row:
    """Of an agent's records, and of the curves and gains of those that finished."""
    error = next((record["error"] for record in records if record["error"]), None)
    row = Row(records[0]["agent"], len(runs), len(records) - len(runs), error, records[0]["setting"])
    if gains is None:
        return row
    last = {name: np.array([run[name][-1] for run in runs]) for name in ("reward", "kl", "seconds")}
    at_kl = np.concatenate([first_crossing(run["kl"], run["reward"], comparison.kl_level) for run in runs])
    calls = np.concatenate([first_crossing(run["reward"], run["network_calls"], comparison.target) for run in runs])
    held_out = [next(iter(record["held_out"].values())) for record in records if record["held_out"]]
    reached_kl, others = int(np.isfinite(at_kl).sum()), comparison.better[row.agent]
    return replace(
        row,
        reward=estimate(last["reward"]),
        gain=estimate(gains),
        reward_at_kl=estimate(at_kl) if 2 * reached_kl >= len(runs) else None,
        reached_kl=reached_kl,
        kl=float(iqm(last["kl"])),
        diversity=float(iqm([run["diversity"][-1] / run["diversity"][0] for run in runs])),
        calls_to_target=censored_median(calls),
        reached_target=int(np.isfinite(calls).sum()),
        gap=float(iqm(frontier.distance(last["reward"], last["kl"]))) if frontier else None,
        held_out=estimate(held_out) if held_out else None,
        better=others.get(REFERENCE) if row.agent != REFERENCE else None,
        seconds=float(np.median(last["seconds"])),
    )


def _overall(pooled: Sequence[tuple[Comparison, dict[str, Floats]]]) -> Comparison:
    """Agents that ran everywhere, by their share of the possible gain; environments are the bootstrap's strata."""
    strata = [{agent: g / (1 - c.base) for agent, g in gain.items()} for c, gain in pooled]
    agents = [agent for agent in strata[0] if all(agent in gain for gain in strata)]
    better = {
        a: {b: probability_of_improvement([g[a] for g in strata], [g[b] for g in strata]) for b in agents}
        for a in agents
    }
    rows = [
        Row(
            agent,
            sum(len(gain[agent]) for gain in strata),
            reward=estimate(*(gain[agent] for gain in strata)),
            better=better[agent].get(REFERENCE) if agent != REFERENCE else None,
        )
        for agent in agents
    ]
    names = ", ".join(comparison.environment for comparison, _ in pooled)
    about = {"description": f"gain over the base model as a share of the possible one, over {names}"}
    return Comparison(OVERALL, about, sorted(rows, key=_rank), better)


def _finished(environment: str, data: dict[str, Any]) -> dict[str, list[Curve]]:
    """Agent → the curves of its finished runs."""
    found: dict[str, list[Curve]] = {}
    for run in data["runs"]:
        if run["environment"] == environment and run["curve"]:
            curve = {name: np.array(values, float) for name, values in run["curve"].items()}
            found.setdefault(run["agent"], []).append(curve)
    return found


def _curves(runs: Sequence[Curve]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for x in AXES:
        ends = np.array([run[x].max() for run in runs])
        if np.isnan(ends).any():
            continue
        share = np.linspace(0, 1, POINTS)
        grid = np.unique(np.median(ends) * (share**2 if x == "kl" else share))  # even on the KL's root scale
        for y in runs[0]:
            if y in (x, "iteration", "network_calls", "seconds"):
                continue
            values = np.stack([first_crossing(run[x], run[y], grid) for run in runs])
            if np.isnan(values).all():
                continue
            low, high = bootstrap([values], draws=CURVE_DRAWS)
            found.setdefault(x, {})[y] = {"x": grid, "value": iqm(values), "low": low, "high": high}
    return found
