"""Agents × environments × seeds under one budget of network calls.

    python -m benchmarks.suite run points --jobs 2        # search, runs, results/points.json
    python -m benchmarks.suite report                     # tables, figures and the page from the data files alone

A network call is the forward of one row; forward and backward count as three. For every agent and environment
the same number of settings is searched under the same budget, on a seed and evaluation noise of its own: learning
rates × clips for an agent with a clip, as many learning rates for one without. The setting with the highest
final evaluation reward then runs on seeds 0, 1, … . Each run is a process, cached in ``build/benchmarks`` and never
repeated; a run that fails is reported and does not stop the others. A data file holds what its command asked for.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.algorithms import AGENTS
from agents.training.checkpoints import write_atomically
from agents.training.experiment import build as build_run
from agents.training.seeding import generator
from benchmarks.runs import Run, curve, execute, held_out
from denoise_env.naming import suggest
from denoise_env.shapes import TRAIN
from denoise_env.worlds import SHAPES

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS, BUILD = REPOSITORY / "benchmarks" / "results", REPOSITORY / "build" / "benchmarks"
SEARCH_SEED, SEARCH_EVAL_SEED = 1000, 4321
"""Of the search's training and of its evaluation noise; the runs' are 0, 1, … and the preset's."""
UNTRAINED = ("base", "best-of-n")
UNTUNED = (*UNTRAINED, "zero-lr", "shuffled-reward")
"""Controls that do not train or do not learn: nothing to search."""


@dataclass(frozen=True)
class Environment:
    """One place to train in.

    Attributes:
        preset: as in ``denoise-env list``.
        overrides: setting → value on top of it.
        search: the same for the search alone.
        prompts: train and evaluate on this many of Shapes' training prompts, drawn by the run's seed: one seed's
            smaller set is part of its larger one. ``None``: what the preset says.
        held_out: prompts to evaluate at the end too.
    """

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    prompts: int | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Suite:
    """What is compared, and under which budget.

    Attributes:
        description: a line for ``--help``.
        environments: name → environment.
        reward: the column of ``eval.csv`` that ranks, with a maximum of 1.
        budget: network calls of a run, and of a search trial unless there is a ``trial_budget``.
        seeds: runs per agent and environment.
        trials: search trials per agent and environment; 0 takes the preset's settings.
        lr: learning rates searched, from the lowest to the highest; where the trials ask for another number of them
            they are log-spaced between its ends.
        lr_alone: the same for agents with no second setting to search, which try more of them.
        clips: searched for agents with a clip: (updates per rollout, clip range relative to the agent's default).
            In the only update of a rollout every ratio is 1 and no clip binds; two updates make no more network calls.
        strengths: searched instead for agents with such a setting: factors of the agent's default.
        agents: which; empty: all there are.
        pooled: part of the table over all environments.
    """

    description: str
    environments: dict[str, Environment]
    reward: str
    budget: int
    seeds: int
    trials: int
    lr: tuple[float, ...]
    lr_alone: tuple[float, ...] = ()
    clips: tuple[tuple[int, float], ...] = ((1, 1.0), (2, 100.0))
    strengths: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"beta": (1.0, 0.01), "temperature": (1.0, 0.25)}
    )
    agents: tuple[str, ...] = ()
    pooled: bool = True
    trial_budget: int | None = None


_POINTS = {"device": "cpu", "eval_points": 8, "eval_kl": True}
_SHAPES = {
    "device": "cpu",
    "rows": 64,
    "microbatch": 64,
    "agent.ema_decay": 0.9,
    "eval_points": 4,
    "eval_kl": True,
    "eval_images_per_prompt": 32,
}
_SHAPES_AGENTS = (
    *("base", "best-of-n", "zero-lr", "shuffled-reward"),
    *("grpo", "ddpo-sf", "ddpo-is", "dpok", "ppo", "rloo", "rwr", "nft", "dpo"),
)
_SHAPES_SEARCH = {"eval_prompts": SHAPES, "eval_images_per_prompt": 8}  # not on the held-out prompts


def _points(model: str, text: str) -> Suite:
    # 40 iterations of GRPO: 96 rows · (10 forwards + 6 steps · 3)
    environments = {model: Environment("points", {**_POINTS, "model": model})}
    strengths = {"beta": (0.01, 0.0025), "temperature": (1.0, 0.25)}  # β weighs a mean over two dimensions only
    return Suite(text, environments, "points", 40 * 96 * 28, 10, 6, lr=(2.5e-3, 4e-2), strengths=strengths)


SUITES = {
    "points": _points("points", "2-D Gaussian mixtures as a diffusion: minutes"),
    "points-flow": _points("points-flow", "2-D Gaussian mixtures as a rectified flow: minutes"),
    SHAPES: Suite(
        "a tiny Stable Diffusion, evaluated on held-out prompts: hours",
        {SHAPES: Environment(SHAPES, _SHAPES, _SHAPES_SEARCH)},
        SHAPES,
        60 * 64 * 28,
        seeds=3,
        trials=6,
        lr=(1e-5, 1e-4, 3e-4),
        lr_alone=(1e-5, 3e-5, 1e-4, 1.4e-4, 2.1e-4, 3e-4),
        agents=_SHAPES_AGENTS,
        trial_budget=30 * 64 * 28,
    ),
    "prompt-growth": Suite(
        "Shapes as the set of training prompts grows, evaluated on those prompts: an hour",
        {
            f"shapes, {n} prompt{'s' * (n > 1)}": Environment(
                SHAPES,
                {**_SHAPES, "eval_points": 2, "eval_images_per_prompt": max(4, 240 // n)},
                prompts=n,
                held_out="shapes-held-out",
            )
            for n in (1, 10, len(TRAIN))
        },
        SHAPES,
        36 * 64 * 28,
        seeds=3,
        trials=0,  # at the preset's learning rate, which the search on all prompts chooses for all three
        lr=(1e-4,),
        agents=("grpo", "ddpo-sf", "ddpo-is"),
        pooled=False,
    ),
}


def grid(suite: Suite, environment: Environment, agent: str) -> list[dict[str, float]]:
    """The settings to search, as overrides; empty for an agent that has none.

    Raises:
        ValueError: the trials cannot be divided among the clips.
    """
    if agent in UNTUNED or not suite.trials:
        return []
    if suite.trials % len(suite.clips):
        raise ValueError(f"trials must be a multiple of {len(suite.clips)}, not {suite.trials}")
    config = Run(environment.preset, agent, environment.overrides).config()
    others: list[dict[str, float]] = [{}]
    if hasattr(config.agent_options, "clip_range"):
        rows = config.prompts_per_iteration * config.agent_options.group_size
        others = [
            {
                "agent.updates_per_rollout": updates,
                "agent.clip_range": _round(config.agent_options.clip_range * factor),
                "microbatch": min(config.microbatch or rows, rows // updates),
            }
            for updates, factor in suite.clips
        ]
    for name, factors in suite.strengths.items():
        if hasattr(config.agent_options, name):
            others = [{f"agent.{name}": _round(getattr(config.agent_options, name) * factor)} for factor in factors]
    count = suite.trials // len(others)
    named = [rates for rates in (suite.lr, suite.lr_alone) if len(rates) == count]
    rates = named[0] if named else np.geomspace(suite.lr[0], suite.lr[-1], count)
    return [{"agent.lr": _round(lr), **other} for lr in rates for other in others]


def make_run(suite: Suite, where: str, agent: str, seed: int, setting: dict[str, float], search: bool = False) -> Run:
    """One training run; a search trial evaluates before and after only, with noise of its own."""
    environment = suite.environments[where]
    overrides = {**environment.overrides, **setting, "seed": seed, "network_budget": suite.budget}
    # never reached, as an iteration costs more than one call; what does not train needs one to be evaluated after
    overrides["iterations"] = 1 if agent in UNTRAINED else suite.budget
    if search:
        overrides["network_budget"] = suite.trial_budget or suite.budget
        overrides |= {"eval_points": 1, "eval_kl": False, "eval_seed": SEARCH_EVAL_SEED, **environment.search}
    prompts: tuple[str, ...] = ()
    if environment.prompts:
        order = torch.randperm(len(TRAIN), generator=generator(seed, "prompt growth")).tolist()
        prompts = tuple(TRAIN[i] for i in order[: environment.prompts])
    return Run(environment.preset, agent, overrides, prompts, None if search else environment.held_out)


def run_suite(name: str, suite: Suite, jobs: int, build: Path, command: Sequence[str]) -> dict[str, Any]:
    """Search, run, and collect what ``results/<name>.json`` holds."""
    pairs = [(where, agent) for where in suite.environments for agent in suite.agents or AGENTS]
    settings = {pair: grid(suite, suite.environments[pair[0]], pair[1]) for pair in pairs}
    trials = {
        (where, agent): [make_run(suite, where, agent, SEARCH_SEED, setting, search=True) for setting in found]
        for (where, agent), found in settings.items()
    }
    errors = execute([run for found in trials.values() for run in found], build, jobs, f"{name}: search")
    searched, records, runs = [], [], []
    for pair, tried in trials.items():
        found = [_record(suite, *pair, run, build, errors.get(run.key)) for run in tried]
        searched += found
        finals = [record["curve"]["reward"][-1] if record["curve"] else -np.inf for record in found]
        setting = settings[pair][int(np.argmax(finals))] if finals else {}
        planned = [(*pair, make_run(suite, *pair, seed, setting)) for seed in range(suite.seeds)]
        if found and all(record["error"] for record in found):
            error = f"every search trial failed, the last with: {found[-1]['error']}"
            records += [_record(suite, *run, build, error) for run in planned]
        else:
            runs += planned
    errors = execute([run for _, _, run in runs], build, jobs, f"{name}: runs")
    records += [_record(suite, where, agent, run, build, errors.get(run.key)) for where, agent, run in runs]
    return {
        "suite": name,
        "command": shlex.join(command),
        "versions": _versions(build, [run for _, _, run in runs]),
        **{key: getattr(suite, key) for key in ("description", "pooled", "budget", "trial_budget", "seeds", "trials")},
        "environments": {where: _about(suite, where) for where in suite.environments},
        "search": [_trial(record) for record in searched],
        "runs": records,
    }


def _record(suite: Suite, where: str, agent: str, run: Run, build: Path, error: str | None) -> dict[str, Any]:
    directory = build / run.key
    columns = None if error else curve(directory)
    if columns:
        columns["reward"] = columns.pop(suite.reward)
    own = [key for key in run.overrides if key.startswith("agent.") and key not in suite.environments[where].overrides]
    setting = {key.removeprefix("agent."): run.overrides[key] for key in own}
    return {
        "environment": where,
        "agent": agent,
        "seed": run.overrides["seed"],
        "setting": setting,
        "error": error,
        "curve": columns,
        "held_out": {} if error else held_out(directory),
    }


def _about(suite: Suite, where: str) -> dict[str, str]:
    """What an environment's computed optimum goes by."""
    config = make_run(suite, where, "base", 0, {}).config()
    return {"model": config.model, "kernel": build_run(config).policy.kernel.name}


def _trial(record: dict[str, Any]) -> dict[str, Any]:
    """A search trial's record: of its curve the end alone."""
    end = {name: values[-1] for name, values in (record["curve"] or {}).items()}
    shared = {key: record[key] for key in ("environment", "agent", "seed", "setting", "error")}
    return {**shared, **{name: end.get(name) for name in ("reward", "network_calls", "seconds")}}


def _versions(build: Path, runs: Sequence[Run]) -> dict[str, str]:
    """Of the packages, from the first run that has them, and of this repository."""
    found: dict[str, str] = {}
    files = [build / run.key / "versions.json" for run in runs]
    for file in [file for file in files if file.exists()][:1]:
        found = json.loads(file.read_text(encoding="utf-8"))
        del found["command"], found["platform"]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return {**found, "revision": git.stdout.strip() or "unknown"}


def write_results(data: dict[str, Any], path: Path) -> None:
    """JSON with one run a line."""

    def lines(rows: list[Any]) -> str:
        return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]"

    body = ",\n".join(f'"{k}": {lines(v) if isinstance(v, list) else json.dumps(v)}' for k, v in data.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{{\n{body}\n}}\n")


def _round(value: float) -> float:
    return float(f"{value:.2g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0 done, 1 some runs failed, 2 bad input)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="run | report")
    listing = "\n".join(
        f"  {name:<14} {suite.description}; {len(suite.agents or AGENTS)} agents, {suite.seeds} seeds, "
        f"{suite.trials} trials, {suite.budget:,} calls"
        for name, suite in SUITES.items()
    )
    run = commands.add_parser(
        "run",
        help="search, run and collect one suite",
        description=f"Suites:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("suite", choices=SUITES, metavar="SUITE", help="one of the above")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default %(default)s)")
    run.add_argument("--agents", nargs="+", metavar="NAME", help="only these (see denoise-env list)")
    run.add_argument("--seeds", type=int, metavar="N", help="runs per agent and environment")
    run.add_argument("--budget", type=int, metavar="CALLS", help="network calls of a run and of a trial")
    run.add_argument("--trials", type=int, metavar="N", help="search trials per agent and environment; 0: no search")
    run.add_argument("--build", type=Path, default=BUILD, metavar="DIR", help="of the runs (default build/benchmarks)")
    run.set_defaults(do=_run)
    report = commands.add_parser("report", help="rebuild tables, figures and the page from the data files")
    report.set_defaults(do=_report)
    for command in (run, report):
        command.add_argument(
            "--results",
            type=Path,
            default=RESULTS,
            metavar="DIR",
            help="of the data files (default benchmarks/results)",
        )
    options = parser.parse_args(typed)
    options.command = ["python", "-m", "benchmarks.suite", *typed]
    try:
        return options.do(options)
    except ValueError as error:
        print(f"benchmarks.suite: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    for agent in options.agents or ():
        if agent not in AGENTS:
            raise ValueError(f"unknown agent {agent!r}; {suggest(agent, AGENTS)}")
    changes = {key: getattr(options, key) for key in ("agents", "seeds", "budget", "trials")}
    changes["trial_budget"] = options.budget
    suite = dataclasses.replace(SUITES[options.suite], **{k: v for k, v in changes.items() if v is not None})
    data = run_suite(options.suite, suite, options.jobs, options.build, options.command)
    path = options.results / f"{options.suite}.json"
    write_results(data, path)
    failed = [run for run in data["runs"] if run["error"]]
    print(
        f"{path}: {len(data['runs']) - len(failed)} runs, {len(failed)} failed; next: python -m benchmarks.suite report"
    )
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.leaderboard import write_leaderboard
    from benchmarks.page import write_page

    for write in (write_leaderboard, write_page):
        print(write(options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
