"""The one training loop: collect, update, log, evaluate, checkpoint, resume."""

import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from agents.base import Agent
from agents.ranks import Ranks
from agents.rollout import Rollout, collect
from agents.training import checkpoints
from agents.training.config import TrainConfig, as_dict
from agents.training.evaluation import evaluate, sample
from agents.training.experiment import Experiment, build, restore
from agents.training.logging import Logger
from agents.training.pictures import grid
from agents.training.progress import progress
from agents.training.report import write_report
from agents.training.seeding import epoch_order, row_seeds
from agents.training.tables import Table
from denoise_env.mdp import row_generators
from denoise_env.models import DenoisingModel
from denoise_env.weights import is_sharded

GRID_PROMPTS, GRID_COLUMNS = 6, 8


def train(
    config: TrainConfig,
    directory: Path,
    *,
    resume: bool = False,
    report: bool = True,
    command: Sequence[str] = (),
    prepare: Callable[[DenoisingModel], object] | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Train, writing everything into ``directory``.

    Args:
        config: the run's.
        directory: made if absent; must not hold a run unless ``resume``.
        resume: continue from the newest checkpoint there (or from the start, where there is none yet).
        report: whether to draw samples and, at the end, export the model and write the report.
        command: what the user typed, for the report.
        prepare: as in `agents.training.experiment.build`, and so ``ranks``. Every rank calls this; the first writes.
        ranks: the processes that train together; default: this one alone.

    Returns:
        The directory.

    Raises:
        ValueError: a configuration that does not fit together.
        FileExistsError: the directory already holds a run.
        agents.training.checkpoints.CheckpointError: a checkpoint cannot be read or written.
        RuntimeError: too many images could not be scored.
    """
    ranks = ranks or Ranks()
    writes = ranks.rank == 0
    if writes and not resume and (directory / "config.json").exists():
        raise FileExistsError(
            f"{directory} already holds a run: continue it with --resume {directory}, or choose another --output-dir"
        )
    experiment = build(config, prepare, ranks)
    if report and any(is_sharded(p) for p in experiment.agent.parameters):
        raise ValueError("sharded weights are not exported: train with report=False, and export the run afterwards")
    saved = directory / "checkpoints"
    newest = checkpoints.latest(saved) if resume else None
    done, spent = restore(experiment, newest) if newest else (0, 0)
    with Logger(directory, config if writes else replace(config, wandb=False, tensorboard=False)) as logger:
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            checkpoints.prune(saved, config.keep_checkpoints)
            about = {"command": shlex.join(command), **_versions()}
            checkpoints.write_atomically(directory / "versions.json", json.dumps(about, indent=1))
            checkpoints.write_atomically(directory / "config.json", json.dumps(as_dict(config), indent=1))
        tables = (directory / f"{name}.csv" if writes else None for name in ("metrics", "eval"))
        metrics, evals = (Table(path, done) for path in tables)
        if newest is None:
            _look(experiment, directory, {"iteration": 0, "network_calls": 0}, evals, logger, report)
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
            row = _iterate(experiment, iteration)
            before, spent = spent, spent + int(row["network_calls"])
            row["network_calls"] = spent
            metrics.append(row)
            logger.log(iteration, row)
            bar.set_postfix({name: f"{row[name]:.3g}" for name in _SHOWN if name in row}, refresh=False)
            last = iteration == config.iterations or spent >= budget
            due = config.eval_points and spent * config.eval_points // budget > before * config.eval_points // budget
            counts = {"iteration": iteration, "network_calls": spent}
            _look(experiment, directory, counts, evals, logger, report, bool(due), last)
            if last or iteration % config.checkpoint_every == 0:
                meta = {"config": as_dict(config), "network_calls": spent, "model": experiment.mdp.model.describe()}
                state = experiment.agent.state()  # of all ranks together
                if writes:
                    checkpoints.save(saved, iteration, state, meta)
                    checkpoints.prune(saved, config.keep_checkpoints)
            if last:
                break
    if report and writes:
        with experiment.agent.evaluation_weights():
            experiment.mdp.model.export(directory / "export")
        write_report(directory)
    return directory


_SHOWN = ("reward", "ratio", "clip_fraction", "kl_old", "kl_reference", "grad_norm", "images_per_second")


def _iterate(experiment: Experiment, iteration: int) -> dict[str, float]:
    """One rollout and its update."""
    config, agent = experiment.config, experiment.agent
    started = time.perf_counter()
    count = config.prompts_per_iteration
    prompts = epoch_order(experiment.mdp.prompts.texts, config.seed, (iteration - 1) * count, count)
    rows = count * agent.group_size
    seeds = row_seeds(config.seed, "rollout", iteration, rows)
    before = experiment.policy.network_calls
    options = agent.rollout_options(iteration)
    with agent.rollout_weights():
        generators = row_generators(agent.mine(seeds))
        rollout = collect(experiment.mdp, experiment.policy, generators, agent.mine(prompts), **options)
    row = {"iteration": iteration, **_reward_figures(agent, rollout)}
    if row["unscored"] > config.max_unscored * rows:
        raise RuntimeError(
            f"iteration {iteration}: {row['unscored']} of {rows} images could not be scored, more than "
            f"max_unscored = {config.max_unscored:g} allows: {rollout.scores.errors or 'the reward returned NaN'}"
        )
    row |= agent.update(rollout, iteration)
    row["network_calls"] = (experiment.policy.network_calls - before) * agent.ranks.size
    seconds = time.perf_counter() - started
    return {**row, "seconds": seconds, "images_per_second": rows / seconds}


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


def _look(
    experiment: Experiment,
    directory: Path,
    counts: dict[str, int],
    evals: Table,
    logger: Logger,
    draw: bool,
    wanted: bool = False,
    last: bool = False,
) -> None:
    """Evaluate and draw a grid, where either is due; ``counts`` has the iteration and the network calls so far."""
    config, policy, iteration = experiment.config, experiment.policy, counts["iteration"]

    def due(every: int) -> bool:
        return last or (iteration % every == 0 if every else iteration == 0)

    with experiment.agent.evaluation_weights():
        if wanted or due(0 if config.eval_points else config.eval_every):
            total = len(experiment.eval_prompts) * config.eval_images_per_prompt
            with progress(
                total=total, desc=f"evaluate at {iteration}", leave=False, disable=experiment.agent.ranks.rank > 0
            ) as bar:
                found = evaluate(
                    experiment.eval_mdp,
                    policy,
                    experiment.eval_prompts,
                    config.eval_images_per_prompt,
                    config.eval_seed,
                    config.microbatch,
                    bar.update,
                    best_of=experiment.agent.best_of if iteration else 1,  # what came before is the base model
                    kl=config.eval_kl,
                )
            figures = found.row()
            evals.append({**counts, **figures})
            logger.log(iteration, {f"eval/{name}": value for name, value in figures.items()})
        if draw and due(config.sample_every):
            prompts = experiment.eval_prompts[:GRID_PROMPTS]
            latents, _ = sample(experiment.eval_mdp, policy, prompts, GRID_COLUMNS, config.eval_seed, config.microbatch)
            if experiment.agent.ranks.rank:
                return
            path = directory / "samples" / f"{iteration:06d}.png"
            path.parent.mkdir(exist_ok=True)
            checkpoints.write_atomically(path.with_name("prompts.txt"), "\n".join(prompts))
            grid(experiment.mdp.model.render(latents), GRID_COLUMNS, path)
            logger.image(iteration, path)


def _versions() -> dict[str, str]:
    names = (
        "denoise-env",
        "torch",
        "torchrl",
        "tensordict",
        "gymnasium",
        "diffusers",
        "transformers",
        "peft",
    )
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"python": sys.version.split()[0], "platform": platform.platform(), **found}
