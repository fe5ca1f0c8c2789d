"""The one training loop: collect, update, log, evaluate, checkpoint, resume."""

import csv
import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents import checkpoint
from agents.base import Agent
from agents.config import AGENTS, TrainConfig, as_dict, name_of
from agents.evaluate import evaluate, grid, sample
from agents.logging import Logger
from agents.policy import DenoisingPolicy
from agents.progress import progress
from agents.report import write_report
from agents.rollout import Rollout, collect
from agents.seeding import epoch_order, row_seeds
from denoise_env.mdp import DenoisingMDP, load_prompts, row_generators
from denoise_env.rewards import load_reward

GRID_PROMPTS, GRID_COLUMNS = 6, 8
EVAL_PROMPTS = 32  # of the training prompts, where no others were named


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a configuration stands for, built and checked."""

    config: TrainConfig
    mdp: DenoisingMDP
    eval_mdp: DenoisingMDP
    policy: DenoisingPolicy
    agent: Agent

    @property
    def eval_prompts(self) -> list[str]:
        """The prompts that evaluation measures."""
        return self.eval_mdp.prompts.texts


def build(config: TrainConfig) -> Experiment:
    """Build a run's parts.

    Raises:
        ValueError: whatever does not fit together, before any work is done.
    """
    counts = ("iterations", "prompts_per_iteration", "checkpoint_every", "keep_checkpoints", "eval_images_per_prompt")
    for name in counts:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.network_budget is not None and config.network_budget < 1:
        raise ValueError(f"network_budget must be at least 1, not {config.network_budget}")
    if config.eval_points and not config.network_budget:
        raise ValueError("eval_points divides the network_budget: give one")
    if config.microbatch is not None and config.microbatch < 1:
        raise ValueError(f"microbatch must be at least 1, not {config.microbatch}")
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    defaults = TrainConfig()
    names = ("height", "width", "dtype", "lora_rank", "lora_alpha", "gradient_checkpointing", "guidance_scale")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(defaults, name)}
    rows = config.prompts_per_iteration * config.agent.group_size
    update = max(1, rows // max(1, config.agent.updates_per_rollout))  # what one update has at most
    microbatch = min(config.microbatch or update, update)
    mdp = DenoisingMDP.make(
        config.model,
        config.rewards or None,
        config.prompts,
        config.num_steps,
        config.microbatch,
        device=device,
        **chosen,
    )
    held_out = config.eval_prompts or ("shapes-held-out" if config.model == "shapes" else None)
    extra = {name: load_reward(name) for name in config.eval_rewards if name not in mdp.rewards}
    eval_mdp = DenoisingMDP(
        mdp.model,
        {**mdp.rewards, **extra},
        load_prompts(held_out) if held_out else mdp.prompts.texts[:EVAL_PROMPTS],
        config.num_steps,
        reward_weights={**mdp.reward_weights, **dict.fromkeys(extra, 0.0)},
        microbatch=config.microbatch,
    )
    policy = DenoisingPolicy(mdp, config.kernel, config.eta, reduction=config.reduction)
    agent = AGENTS[name_of(config.agent)](policy, config.agent, config.seed, microbatch)
    agent.check_rows(rows)
    if config.eval_kl:
        mdp.model.keep_reference()
    return Experiment(config, mdp, eval_mdp, policy, agent)


def train(
    config: TrainConfig, directory: Path, *, resume: bool = False, report: bool = True, command: Sequence[str] = ()
) -> Path:
    """Train, writing everything into ``directory``.

    Args:
        config: the run's.
        directory: made if absent; must not hold a run unless ``resume``.
        resume: continue from the newest checkpoint there (or from the start, where there is none yet).
        report: whether to draw samples and, at the end, export the model and write the report.
        command: what the user typed, for the report.

    Returns:
        The directory.

    Raises:
        ValueError: a configuration that does not fit together.
        FileExistsError: the directory already holds a run.
        agents.checkpoint.CheckpointError: a checkpoint cannot be read or written.
        RuntimeError: too many images could not be scored.
    """
    if not resume and (directory / "config.json").exists():
        raise FileExistsError(
            f"{directory} already holds a run: continue it with --resume {directory}, or choose another --output-dir"
        )
    experiment = build(config)
    checkpoints = directory / "checkpoints"
    newest = checkpoint.latest(checkpoints) if resume else None
    done, spent = _restore(experiment, newest) if newest else (0, 0)
    with Logger(directory, config) as logger:
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.prune(checkpoints, config.keep_checkpoints)
        about = {"command": shlex.join(command), **_versions()}
        checkpoint.write_atomically(directory / "versions.json", json.dumps(about, indent=1))
        checkpoint.write_atomically(directory / "config.json", json.dumps(as_dict(config), indent=1))
        metrics, evals = Table(directory / "metrics.csv", done), Table(directory / "eval.csv", done)
        if newest is None:
            _look(experiment, directory, {"iteration": 0, "network_calls": 0}, evals, logger, report)
        budget = config.network_budget or math.inf
        rest = range(done + 1, 1 + (config.iterations if spent < budget else done))
        bar = progress(rest, initial=done, total=None if config.network_budget else config.iterations, desc="train")
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
                checkpoint.save(checkpoints, iteration, experiment.agent.state(), meta)
                checkpoint.prune(checkpoints, config.keep_checkpoints)
            if last:
                break
    if report:
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
    seeds = row_seeds(config.seed, "rollout", iteration, count * agent.group_size)
    before = experiment.policy.network_calls
    options = agent.rollout_options(iteration)
    with agent.rollout_weights():
        rollout = collect(experiment.mdp, experiment.policy, row_generators(seeds), prompts, **options)
    row = {"iteration": iteration, **_reward_figures(rollout)}
    if row["unscored"] > config.max_unscored * len(rollout):
        raise RuntimeError(
            f"iteration {iteration}: {row['unscored']} of {len(rollout)} images could not be scored, more than "
            f"max_unscored = {config.max_unscored:g} allows: {rollout.scores.errors or 'the reward returned NaN'}"
        )
    row |= agent.update(rollout, iteration)
    row["network_calls"] = experiment.policy.network_calls - before
    seconds = time.perf_counter() - started
    return {**row, "seconds": seconds, "images_per_second": len(rollout) / seconds}


def _reward_figures(rollout: Rollout) -> dict[str, float]:
    scores = rollout.scores
    groups = scores.total.view(-1, rollout.group_size)
    figures = {"reward": scores.total.nanmean().item()}
    figures |= {f"reward/{name}": value.nanmean().item() for name, value in scores.values.items()}
    return {
        **figures,
        "reward_std_in_group": groups.std(1).nanmean().item() if rollout.group_size > 1 else 0.0,
        "unscored": int((~scores.valid).sum()),
    }


def _look(
    experiment: Experiment,
    directory: Path,
    counts: dict[str, int],
    evals: "Table",
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
            with progress(total=total, desc=f"evaluate at {iteration}", leave=False) as bar:
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
            path = directory / "samples" / f"{iteration:06d}.png"
            path.parent.mkdir(exist_ok=True)
            checkpoint.write_atomically(path.with_name("prompts.txt"), "\n".join(prompts))
            grid(experiment.mdp.model.render(latents), GRID_COLUMNS, path)
            logger.image(iteration, path)


def _restore(experiment: Experiment, path: Path) -> tuple[int, int]:
    """Load a checkpoint; its iteration, and the network calls up to there."""
    tensors, meta = checkpoint.load(path)
    if meta["model"] != json.loads(json.dumps(experiment.mdp.model.describe())):
        raise checkpoint.CheckpointError(f"the checkpoint {path} holds another architecture than the configured model")
    try:
        experiment.agent.load_state(tensors)
    except (ValueError, KeyError) as error:
        raise checkpoint.CheckpointError(f"the checkpoint {path} does not fit: {error}") from error
    return int(meta["iteration"]), int(meta["network_calls"])


def load_run(directory: Path, config: TrainConfig) -> Experiment:
    """A run's parts with the weights of its newest checkpoint.

    Raises:
        agents.checkpoint.CheckpointError: it has none, or it does not fit.
    """
    newest = checkpoint.latest(directory / "checkpoints")
    if newest is None:
        raise checkpoint.CheckpointError(f"{directory} has no checkpoint yet")
    experiment = build(config)
    _restore(experiment, newest)
    return experiment


class Table:
    """A CSV file that grows a row at a time and forgets what lies after the iteration a run resumes from."""

    def __init__(self, path: Path, keep_to: int) -> None:
        self.path = path
        self.columns: list[str] = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines[1:] if line.endswith("\n") and int(line.split(",", 1)[0]) <= keep_to]
            if keep_to and kept:
                self.columns = lines[0].strip().split(",")
                checkpoint.write_atomically(path, "".join([lines[0], *kept]))
            else:
                path.unlink()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; its first column is ``iteration``."""
        new = not self.columns
        self.columns = self.columns or list(row)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


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
