"""The one training loop: collect, update, log, look, checkpoint, resume."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agents.base import Agent
from agents.rollout import Rollout, collect
from agents.training import checkpoints
from agents.training.config import TrainConfig, as_dict
from agents.training.experiment import Experiment, restore, warm_up
from agents.training.logging import Logger
from agents.training.looks import Looks
from agents.training.progress import progress
from agents.training.report import write_report
from agents.training.seeding import epoch_order, row_seeds
from agents.training.tables import Table
from agents.training.versions import write_versions
from denoise_env.mdp import row_generators
from denoise_env.weights import is_sharded

MAY_CHANGE = (
    "iterations",
    "eval_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "conditioning_cache",
    "conditioning_host_gib",
    "conditioning_device_gib",
    "wandb",
    "tensorboard",
)
"""What a resumed run's configuration may differ in from what its directory says."""


def check_directory(directory: Path, config: TrainConfig, resume: bool) -> None:
    """Raise an error for beginning a run where there is one, or continuing one with another configuration.

    Raises:
        FileExistsError: the directory already holds a run, and it is not to be resumed.
        ValueError: it is to be resumed, and its configuration differs in more than `MAY_CHANGE`.
    """
    if not (directory / "config.json").exists():
        return
    if not resume:
        raise FileExistsError(
            f"{directory} already holds a run: continue it with --resume {directory}, or choose another --output-dir"
        )
    _refuse_changes(json.loads((directory / "config.json").read_text()), config)


def train(
    experiment: Experiment,
    directory: Path,
    *,
    resume: bool = False,
    report: bool = True,
    command: Sequence[str] = (),
) -> Path:
    """Train, writing everything into ``directory``.

    Args:
        experiment: as `agents.training.experiment.build` made it. Of several ranks every one calls this, and the
            first writes.
        directory: made if absent; must not hold a run unless ``resume``.
        resume: continue from the newest checkpoint there (or from the start, where there is none yet).
        report: whether to draw samples and, at the end, export the model and write the report.
        command: what the user typed, for the report.

    Returns:
        The directory.

    Raises:
        ValueError: the directory holds a run of another configuration, see `check_directory`; or sharded weights are
            to be exported. Nothing has changed then.
        FileExistsError: the directory already holds a run.
        agents.training.checkpoints.CheckpointError: a checkpoint cannot be read or written.
        RuntimeError: too many images could not be scored.
    """
    config = experiment.config
    writes = experiment.agent.ranks.rank == 0
    if writes or resume:
        check_directory(directory, config, resume)
    if report and any(is_sharded(p) for p in experiment.agent.parameters):
        raise ValueError("sharded weights are not exported: train with report=False, and export the run afterwards")
    saved = directory / "checkpoints"
    newest = checkpoints.latest(saved) if resume else None
    done, spent = restore(experiment, newest) if newest else (0, 0)
    with Logger(directory, config if writes else replace(config, wandb=False, tensorboard=False)) as logger:
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            checkpoints.prune(saved, config.keep_checkpoints)
            write_versions(directory / "versions.json", command)
            checkpoints.write_atomically(directory / "config.json", json.dumps(as_dict(config), indent=1))
        metrics = Table(directory / "metrics.csv" if writes else None, done)
        looks = Looks(experiment, directory, logger, done, report)
        if config.compile:
            warm_up(experiment)
        if newest is None:
            looks.first()
        budget = config.network_budget or math.inf
        rest = range(done + 1, 1 + (config.iterations if spent < budget else done))
        bar = progress(
            rest,
            initial=done,
            total=None if config.network_budget else config.iterations,
            desc="train",
            disable=not writes,
        )
        for iteration in bar:
            row = _iterate(experiment, iteration, directory)
            before, spent = spent, spent + int(row["network_calls"])
            row["network_calls"] = spent
            metrics.append(row)
            logger.log(iteration, row)
            bar.set_postfix({name: f"{row[name]:.3g}" for name in _SHOWN if name in row}, refresh=False)
            last = iteration == config.iterations or spent >= budget
            looks.after(iteration, before, spent, last)
            if last or iteration % config.checkpoint_every == 0:
                state = experiment.agent.state()  # of all ranks together
                if writes:
                    model = experiment.mdp.model.architecture()
                    meta = {"config": as_dict(config), "network_calls": spent, "model": model}
                    checkpoints.save(saved, iteration, state, meta)
                    checkpoints.prune(saved, config.keep_checkpoints)
            if last:
                break
    if report and writes:
        with experiment.agent.evaluation_weights():
            experiment.mdp.model.export(directory / "export")
        write_report(directory)
    return directory


def _refuse_changes(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise a ``ValueError`` that names the settings which a resumed run may not change."""
    before, now = _flat(saved), _flat(json.loads(json.dumps(as_dict(config))))
    changed = [name for name in sorted({*before, *now} - {*MAY_CHANGE}) if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name} (now {now.get(name)!r}, was {before.get(name)!r})" for name in changed)
        raise ValueError(
            f"a resumed run keeps its configuration, and this one changes {told}; only {', '.join(MAY_CHANGE)} may "
            "change"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's settings by their dotted names, ``agent.lr``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


_SHOWN = ("reward", "ratio", "clip_fraction", "kl_old", "kl_reference", "grad_norm", "images_per_second")


def _iterate(experiment: Experiment, iteration: int, directory: Path) -> dict[str, float]:
    """One rollout and its update; what a reward raised is kept in ``directory``."""
    config, agent = experiment.config, experiment.agent
    started = time.perf_counter()
    count = config.prompts_per_iteration
    prompts = epoch_order(experiment.mdp.drawn_prompts, config.seed, (iteration - 1) * count, count)
    rows = count * agent.group_size
    seeds = row_seeds(config.seed, "rollout", iteration, rows)
    before = experiment.policy.network_calls
    options = agent.rollout_options(iteration)
    with agent.rollout_weights():
        generators = row_generators(agent.mine(seeds))
        rollout = collect(experiment.mdp, experiment.policy, generators, agent.mine(prompts), **options)
    errors = _write_errors(directory, iteration, rollout, agent.ranks.rank)
    row = {"iteration": iteration, **_reward_figures(agent, rollout)}
    if row["unscored"] > config.max_unscored * rows:
        raise RuntimeError(
            f"iteration {iteration}: {row['unscored']} of {rows} images could not be scored, more than "
            f"max_unscored = {config.max_unscored:g} allows: {errors or 'the reward returned NaN'}"
        )
    row |= agent.update(rollout, iteration)
    row["network_calls"] = (experiment.policy.network_calls - before) * agent.ranks.size
    seconds = time.perf_counter() - started
    return {**row, "seconds": seconds, "images_per_second": rows / seconds}


def _write_errors(directory: Path, iteration: int, rollout: Rollout, rank: int) -> str:
    """Write the tracebacks of rewards that raised; returns what they are and where to read more, "" for none."""
    scores = rollout.scores
    if not scores.errors:
        return ""
    path = directory / ("reward_errors.txt" if rank == 0 else f"reward_errors-{rank}.txt")
    texts = [f"iteration {iteration}, the reward {name!r}\n{text}" for name, text in scores.tracebacks.items()]
    checkpoints.write_atomically(path, "\n".join(texts))
    return f"{scores.errors} (the traceback is in {path})"


def _reward_figures(agent: Agent, rollout: Rollout) -> dict[str, float]:
    scores, total = rollout.scores, agent.all_rows(rollout.scores.total)
    groups = total.view(-1, rollout.group_size)
    figures = {"reward": total.nanmean().item()}
    figures |= {f"reward/{name}": agent.all_rows(value).nanmean().item() for name, value in scores.values.items()}
    return {
        **figures,
        "reward_std_in_group": groups.std(1).nanmean().item() if rollout.group_size > 1 else 0.0,
        "unscored": int((~agent.all_rows(scores.valid)).sum()),
    }
