"""Agents × environments × seeds under one budget of network calls.

    python -m benchmarks.suite run points --jobs 2        # search, runs, results/points.json
    python -m benchmarks.suite run points --agents my_agent:MyAgent   # joins the others in that file
    python -m benchmarks.suite report                     # tables, figures and the page from the data files alone

A network call is the forward of one row; forward and backward count as three. For every agent and environment
the same number of settings is searched under the same budget, on a seed and evaluation noise of its own: learning
rates × two values of a second setting (`benchmarks.suites.SETTINGS`), or as many learning rates for an agent without
one. Where the best has the lowest or the highest learning rate, one further rate is tried beyond it, twice at most.
The setting with the highest final evaluation reward then runs on seeds 0, 1, … . Each run is a process, cached in
``build/benchmarks`` and never repeated; a run that fails is reported and does not stop the others.

A data file is added to: an agent's runs replace its own there unless fewer of them finished, and a command whose
budget, seeds or trials are not the file's is refused before it runs.
"""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.algorithms import AGENTS, find_agent
from agents.training.experiment import build as build_run
from benchmarks import datafile
from benchmarks.runs import REPOSITORY, Run, code, curve, execute, held_out, made_by
from benchmarks.suites import SEARCH_SEED, SUITES, Suite, beyond, grid, make_run, of_ones_own

RESULTS, BUILD = REPOSITORY / "benchmarks" / "results", REPOSITORY / "build" / "benchmarks"
Pair = tuple[str, str]
"""An environment and an agent."""


def head(name: str, suite: Suite, command: Sequence[str]) -> dict[str, Any]:
    """What a data file says of all its runs."""
    return {
        "suite": name,
        "commands": [shlex.join(command)],
        "versions": {},
        **{key: getattr(suite, key) for key in ("description", "pooled", "reward", "budget", "trial_budget")},
        **{key: getattr(suite, key) for key in ("seeds", "trials")},
        "environments": {where: _about(suite, where) for where in suite.environments},
    }


def run_suite(name: str, suite: Suite, jobs: int, build: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Search, run, and collect what ``results/<name>.json`` holds.

    Args:
        name: of the suite, for the progress bars.
        suite: what to compare.
        jobs: runs at a time.
        build: where the runs are kept.
        about: the file's head, as `head` makes it.
    """
    tried = search(name, suite, jobs, build)
    records, runs = [], []
    for pair, found in tried.items():
        best = max(found, key=_end) if found else None
        setting = best["overrides"] if best else {}
        planned = [(*pair, make_run(suite, *pair, seed, setting)) for seed in range(suite.seeds)]
        if best and all(record["error"] for record in found):
            error = f"every search trial failed, the last with: {found[-1]['error']}"
            records += [_record(suite, *run, build, error) for run in planned]
        else:
            runs += planned
    errors = execute([run for _, _, run in runs], build, jobs, f"{name}: runs")
    records += [_record(suite, where, agent, run, build, errors.get(run.key)) for where, agent, run in runs]
    if stale := sum(record["code"] not in (None, code()) for record in records):
        print(f"{stale} of {len(records)} runs were made with other code than {code()}: delete {build} to repeat them")
    return {
        **about,
        "versions": _versions(build, [run for _, _, run in runs]),
        "search": [_trial(record) for found in tried.values() for record in found],
        "runs": records,
    }


def search(name: str, suite: Suite, jobs: int, build: Path) -> dict[Pair, list[dict[str, Any]]]:
    """Every pair's search trials: its grid, then further learning rates while the best lies at an end."""
    pairs = [(where, agent) for where in suite.environments for agent in suite.agents or AGENTS]
    todo = {pair: settings for pair in pairs if (settings := grid(suite, *pair))}
    found: dict[Pair, list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for wider in range(1 + suite.wider):
        runs = {
            pair: [make_run(suite, *pair, SEARCH_SEED, setting, search=True) for setting in settings]
            for pair, settings in todo.items()
        }
        what = f"{name}: search" + f", wider {wider}" * (wider > 0)
        errors = execute([run for own in runs.values() for run in own], build, jobs, what)
        for pair, own in runs.items():
            for setting, run in zip(todo[pair], own, strict=True):
                record = _record(suite, *pair, run, build, errors.get(run.key))
                found[pair].append({**record, "overrides": setting})
        todo = {}
        for pair in runs:
            tried, ends = zip(*((record["overrides"], _end(record)) for record in found[pair]), strict=True)
            if further := beyond(tried, ends):
                todo[pair] = [further]
        if not todo:
            break
    return found


def _end(record: dict[str, Any]) -> float:
    """The reward at the end of a run; −∞ for one that failed."""
    reward = record["curve"]["reward"][-1] if record["curve"] else None
    return -np.inf if reward is None else float(reward)


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
        "code": None if error else made_by(directory),
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
    shared = {key: record[key] for key in ("environment", "agent", "seed", "setting", "code", "error")}
    return {**shared, **{name: end.get(name) for name in ("reward", "network_calls", "seconds")}}


def _versions(build: Path, runs: Sequence[Run]) -> dict[str, str]:
    """Of the packages, from the first run that has them, and of this repository."""
    found: dict[str, str] = {}
    files = [build / run.key / "run" / "versions.json" for run in runs]
    for file in [file for file in files if file.exists()][:1]:
        saved = json.loads(file.read_text(encoding="utf-8"))
        found = {name: saved[name] for name in saved if name not in ("command", "platform")}
    return {**found, "code": code()}


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
    run.add_argument(
        "--agents", nargs="+", metavar="NAME", help="only these (denoise-env list), or your own: module:class"
    )
    run.add_argument("--model", metavar="MODEL", help="another model in the suite's place, as module:FAMILY")
    run.add_argument("--reward", metavar="NAME", help="that ranks there, as module:function; its maximum should be 1")
    run.add_argument("--prompts", metavar="FILE", help="trained and evaluated on there; default: the model's own")
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
        find_agent(agent)
    changes = {key: getattr(options, key) for key in ("agents", "seeds", "budget", "trials")}
    changes["trial_budget"] = options.budget
    suite = dataclasses.replace(SUITES[options.suite], **{k: v for k, v in changes.items() if v is not None})
    name = options.suite
    if options.model:
        suite = of_ones_own(suite, options.model, options.reward, options.prompts)
        name = re.sub(r"[^\w.-]+", "-", f"{name}-{options.model}")
    elif options.reward or options.prompts:
        raise ValueError("--reward and --prompts go with --model")
    path, about = options.results / f"{name}.json", head(name, suite, options.command)
    datafile.check(path, about)
    data, old = run_suite(name, suite, options.jobs, options.build, about), datafile.read(path)
    datafile.write(datafile.merge(old, data), path)
    for where, agent in sorted(datafile.fewer(old, data)):
        print(f"{path} keeps the earlier runs of {agent} ({where}), of which more had finished")
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
