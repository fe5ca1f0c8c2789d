"""The one training loop: collect, update, log, look, checkpoint, resume."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from agents.base import Agent
from agents.policy import DenoisingPolicy, nothing
from agents.rollout import Rollout, collect
from agents.training import checkpoints
from agents.training.config import as_dict
from agents.training.directory import claim
from agents.training.experiment import Experiment, restore, warm_up
from agents.training.logging import Logger
from agents.training.looks import Looks
from agents.training.report import write_report
from agents.training.resuming import check_directory, refuse_changes, resume_command, tell_learning_rate
from agents.training.stopping import Stopped, Stopping
from agents.training.tables import Table, check_table
from agents.training.versions import check_prompts, prompt_digests, write_versions
from denoise_env.mdp import row_generators
from denoise_env.models import DenoisingModel
from denoise_env.progress import progress
from denoise_env.seeding import epoch_order, row_seeds
from denoise_env.weights import is_sharded


class UnscoredError(RuntimeError):
    """Too many images of a rollout could not be scored."""


def train(
    experiment: Experiment,
    directory: Path,
    *,
    resume: bool = False,
    report: bool = True,
    command: Sequence[str] = (),
    after_first: Callable[[int, int, float], object] = lambda iteration, calls, seconds: None,
    numbered: bool = False,
    stopping: Stopping | None = None,
) -> Path:
    """Train, writing everything into ``directory``.

    Args:
        experiment: as `agents.training.experiment.build` made it. Of several ranks every one calls this, and the
            first writes.
        directory: made if absent; must be empty unless ``resume``. No other process may write there meanwhile.
        resume: continue from the newest checkpoint there (or from the start, where there is none yet).
        report: whether to draw samples and, at the end, export the model and write the report.
        command: what the user typed, for the report.
        after_first: called by the first rank after the first iteration that is trained here, with its number, its
            network calls and its seconds.
        numbered: take the first of ``directory``, ``directory-2``, ``directory-3``, … that does not exist.
        stopping: the signals that ask this process to stop; by default none are heeded. When one comes, the iteration
            at hand is given up, or finished if its update has begun, and a checkpoint is saved.

    Returns:
        The directory.

    Raises:
        ValueError: the directory holds a run of another configuration (see `agents.training.resuming`) or of other
            prompts, or sharded weights are to be exported. Nothing has changed then.
        FileExistsError: the directory already holds a run or something else, or another process writes there.
        agents.training.checkpoints.CheckpointError: a checkpoint cannot be read or written.
        UnscoredError: too many images could not be scored; what was trained before is saved.
        FloatingPointError: the policy or its gradient is not finite any more.
        agents.training.stopping.Stopped: a signal came; what was trained is saved.
    """
    config, stopping = experiment.config, stopping or Stopping()
    writes = experiment.agent.ranks.rank == 0
    if report and any(is_sharded(p) for p in experiment.agent.parameters):
        raise ValueError("sharded weights are not exported: train with report=False, and export the run afterwards")
    prompts = prompt_digests(experiment.mdp.drawn_prompts, experiment.eval_prompts)
    with contextlib.ExitStack() as held:
        with stopping.held():
            if writes:
                directory = held.enter_context(claim(directory, resume, numbered))
            if writes or resume:
                check_directory(directory, config, resume)
            if resume:
                check_prompts(directory / "versions.json", prompts)
                check_table(directory / "metrics.csv", ["network_calls", "seconds"])
                check_table(directory / "eval.csv", ["images"])
            saved = directory / "checkpoints"
            newest = checkpoints.latest(saved) if resume else None
            meta = restore(experiment, newest) if newest else {}
            if meta:
                refuse_changes(meta["config"], config)
            logged = config if writes else replace(config, wandb=False, tensorboard=False)
            logger = held.enter_context(Logger(directory, logged))
            if writes:
                if resume:
                    tell_learning_rate(directory, config)
                text = json.dumps(as_dict(config), indent=1)
                checkpoints.write_atomically(directory / "config.json", text)
                write_versions(directory / "versions.json", command, prompts, resumed=resume)
                checkpoints.prune(saved, config.keep_checkpoints)
                for name, why in experiment.agent.idle_settings().items():
                    print(f"{name} has no effect in this run: {why}", file=sys.stderr)
            again = resume_command(directory, config)
            stopping.message = f"stopped; continue with: {again}"
        try:
            _train(experiment, directory, meta, logger, stopping, report, after_first)
        except UnscoredError as error:
            why = f"{error}; what was trained before is saved. Once the rewards can score, continue with: {again}"
            raise UnscoredError(why) from error
        except FloatingPointError as error:
            lower = f"{again} --agent.lr {getattr(config.agent_options, 'lr', 0) / 10:g}"
            raise FloatingPointError(
                f"{error}; continue from the last checkpoint with, for example: {lower}"
            ) from error
    if report and writes:
        stopping.message = f"stopped; the model is trained and saved, and what follows is made by: {again}"
        with experiment.agent.evaluation_weights():
            _export(experiment.mdp.model, directory / "export")
        try:
            write_report(directory)
        except Exception as error:  # a page is no reason to fail a run that has trained
            logging.getLogger(__name__).info("the report failed", exc_info=True)
            kind = type(error).__name__
            print(f"the report could not be written ({kind}: {error}); the run is complete", file=sys.stderr)
    return directory


def _export(model: DenoisingModel, path: Path) -> None:
    """Export the model; raise a ``RuntimeError`` where that cannot be written."""
    try:
        model.export(path)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"the run has trained, but its model cannot be written to {path}: {error}") from error


def _train(
    experiment: Experiment,
    directory: Path,
    meta: dict[str, Any],
    logger: Logger,
    stopping: Stopping,
    report: bool,
    after_first: Callable[[int, int, float], object],
) -> None:
    """The iterations that are left behind a checkpoint with this meta data; without any, all of them."""
    config = experiment.config
    writes = experiment.agent.ranks.rank == 0
    saved = directory / "checkpoints"
    done, spent, pending = meta.get("iteration", 0), meta.get("network_calls", 0), meta.get("pending_look")
    on_disk = done
    budget = config.network_budget or math.inf
    metrics = Table(directory / "metrics.csv" if writes else None, done if meta else -1)
    looks = Looks(experiment, directory, logger, done - (pending is not None) if meta else -1, report)
    if config.compile:
        warm_up(experiment)
    if not meta:
        looks.first()

    def save() -> None:
        state = experiment.agent.state()  # of all ranks together
        if writes:
            model = experiment.mdp.model.architecture()
            about = {"config": as_dict(config), "network_calls": spent, "model": model, "pending_look": pending}
            checkpoints.save(saved, done, state, about)
            checkpoints.prune(saved, config.keep_checkpoints)

    ahead: dict[int, Collected] = {}
    cost = 0  # network calls of the last iteration
    rest = range(done + 1, 1 + (config.iterations if spent < budget else done))
    bar = progress(
        rest,
        initial=done,
        total=None if config.network_budget else config.iterations,
        desc="train",
        disable=not writes,
    )
    with stopping.held(), _may_give_up(experiment, stopping):
        try:
            if pending is not None:
                looks.after(done, pending, spent, done >= config.iterations or spent >= budget)
                pending = None
            for iteration in bar:
                stopping.check()
                more = iteration < config.iterations and iteration % config.checkpoint_every and spent + cost < budget
                figures = _iterate(experiment, iteration, directory, ahead, bool(more))
                cost = int(figures["network_calls"])
                before, spent = spent, spent + cost
                metrics.append({**figures, "network_calls": spent})
                done, pending = iteration, before
                if iteration == rest[0] and writes:
                    after_first(iteration, int(figures["network_calls"]), figures["seconds"])
                logger.log(iteration, {**figures, "network_calls": spent})
                bar.set_postfix({name: f"{figures[name]:.3g}" for name in _SHOWN if name in figures}, refresh=False)
                last = iteration == config.iterations or spent >= budget
                looks.after(iteration, before, spent, last)
                pending = None
                if last or iteration % config.checkpoint_every == 0:
                    save()
                    on_disk = iteration
                if last:
                    break
            stopping.check()
        except (Stopped, UnscoredError) as error:
            if done > on_disk:
                save()
            if done and isinstance(error, Stopped):
                again = resume_command(directory, config)
                stopping.message = f"stopped after iteration {done}, which is saved; continue with: {again}"
            raise
        finally:
            bar.close()


@contextlib.contextmanager
def _may_give_up(experiment: Experiment, stopping: Stopping) -> Iterator[None]:
    """A context in which rollouts and evaluations end with `Stopped` before a network call, once a signal has come."""
    policies = [part for part in vars(experiment).values() if isinstance(part, DenoisingPolicy)]
    for policy in policies:
        policy.before_call = stopping.check
    try:
        yield
    finally:
        for policy in policies:
            policy.before_call = nothing


@contextlib.contextmanager
def _to_its_end(policy: DenoisingPolicy) -> Iterator[None]:
    """A context whose network calls are all made: weights that are half updated are no place to stop."""
    before, policy.before_call = policy.before_call, nothing
    try:
        yield
    finally:
        policy.before_call = before


_SHOWN = ("reward", "ratio", "clip_fraction", "kl_old", "kl_reference", "grad_norm", "images_per_second")


Collected = tuple[Rollout, int]
"""A rollout, and how many network calls of this rank it cost."""


def _collect(experiment: Experiment, iteration: int) -> Collected:
    config, agent = experiment.config, experiment.agent
    count = config.prompts_per_iteration
    prompts = epoch_order(experiment.mdp.drawn_prompts, config.seed, (iteration - 1) * count, count)
    seeds = row_seeds(config.seed, "rollout", iteration, count * agent.group_size)
    before = experiment.policy.network_calls
    options = agent.rollout_options(iteration)
    with agent.rollout_weights():
        generators = row_generators(agent.mine(seeds))
        rollout = collect(experiment.mdp, experiment.policy, generators, agent.mine(prompts), **options)
    return rollout, experiment.policy.network_calls - before


def _iterate(
    experiment: Experiment,
    iteration: int,
    directory: Path | None = None,
    ahead: dict[int, Collected] | None = None,
    more: bool = False,
) -> dict[str, float]:
    """One rollout and its update.

    Args:
        experiment: the run's parts.
        iteration: its number.
        directory: where what a reward raised is kept.
        ahead: the rollouts that were collected before, by their iteration; a new one is put there.
        more: whether the next rollout may be collected before this update.
    """
    config, agent = experiment.config, experiment.agent
    started = time.perf_counter()
    ahead = {} if ahead is None else ahead
    rollout, calls = ahead.pop(iteration) if iteration in ahead else _collect(experiment, iteration)
    if more and agent.collects_ahead:
        ahead[iteration + 1] = _collect(experiment, iteration + 1)
    rows = config.prompts_per_iteration * agent.group_size
    before = experiment.policy.network_calls - calls
    errors = _write_errors(directory, iteration, rollout, agent.ranks.rank)
    figures = {"iteration": iteration, **_reward_figures(agent, rollout)}
    if figures["unscored"] > config.max_unscored * rows:
        raise UnscoredError(
            f"iteration {iteration}: {figures['unscored']} of {rows} images could not be scored, more than "
            f"max_unscored = {config.max_unscored:g} allows: {errors or 'the reward returned NaN'}"
        )
    with _to_its_end(experiment.policy):
        figures |= agent.update(rollout, iteration)
    figures["network_calls"] = (experiment.policy.network_calls - before) * agent.ranks.size
    seconds = time.perf_counter() - started
    return {**figures, "seconds": seconds, "images_per_second": rows / seconds}


def _write_errors(directory: Path | None, iteration: int, rollout: Rollout, rank: int) -> str:
    """Write the tracebacks of rewards that raised; returns what they are and where to read more, "" for none."""
    scores = rollout.scores
    if not scores.errors or directory is None:
        return str(scores.errors or "")
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
