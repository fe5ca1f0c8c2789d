"""Everything that a configuration stands for, built and checked; and a run's directory read back into it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch

from agents.algorithms import find_agent
from agents.base import Agent
from agents.policy import DenoisingPolicy
from agents.ranks import Ranks
from agents.training import checkpoints
from agents.training.config import TrainConfig
from agents.training.progress import progress
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import DenoisingModel
from denoise_env.prompt_files import load_prompts
from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.worlds import PROMPT_SETS, WORLDS

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
    def eval_prompts(self) -> list[Prompt]:
        """The prompts that evaluation measures."""
        return self.eval_mdp.drawn_prompts


def build(
    config: TrainConfig, prepare: Callable[[DenoisingModel], object] | None = None, ranks: Ranks | None = None
) -> Experiment:
    """Build a run's parts.

    Args:
        config: the run's configuration.
        prepare: called with the loaded model before anything holds its parameters. This is the place to compile, wrap
            or shard the network (``lambda model: model.wrap(fully_shard)``).
        ranks: the processes that train together (`Ranks.present`); default: this process alone.

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
    device = find_device(config.device)
    rows = config.prompts_per_iteration * config.agent_options.group_size
    ranks = ranks or Ranks()
    updates = getattr(config.agent_options, "updates_per_rollout", 1)  # an agent that does not learn has none
    update = max(1, rows // max(1, updates) // ranks.size)  # what one update has at most, of this rank
    microbatch = min(config.microbatch or update, update)
    mdp = DenoisingMDP.make(
        config.model,
        config.rewards or None,
        config.prompts,
        config.num_steps,
        config.microbatch,
        device=device,
        options=config.model_options,
        conditioning_cache=config.conditioning_cache,
        conditioning_host_gib=config.conditioning_host_gib,
        conditioning_device_gib=config.conditioning_device_gib,
    )
    if config.compile:
        mdp.model.compile()
    if prepare is not None:
        prepare(mdp.model)
    world = WORLDS.get(config.model)
    held_out = config.eval_prompts or next(iter(world.held_out if world else ()), None)
    extra = {name: load_reward(name) for name in config.eval_rewards if name not in mdp.rewards}
    eval_mdp = DenoisingMDP(
        mdp.model,
        {**mdp.rewards, **extra},
        load_prompts(held_out, PROMPT_SETS) if held_out else mdp.drawn_prompts[:EVAL_PROMPTS],
        config.num_steps,
        reward_weights={**mdp.reward_weights, **dict.fromkeys(extra, 0.0)},
        microbatch=config.microbatch,
        conditioning=mdp.conditioning,
    )
    policy = DenoisingPolicy(mdp, config.kernel, config.eta, reduction=config.reduction)
    agent = find_agent(config.agent)(policy, config.agent_options, config.seed, microbatch, ranks)
    agent.check_rows(rows)
    if config.eval_kl:
        mdp.model.keep_reference()
    return Experiment(config, mdp, eval_mdp, policy, agent)


def find_device(name: str) -> str:
    """The name of a device that can be used; "auto" is the GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch raises many kinds, AssertionError and ImportError among them
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def warm_up(experiment: Experiment) -> None:
    """Compile the network for a microbatch without and with gradient, with a progress bar; weights and draws stay."""
    mdp, policy, agent = experiment.mdp, experiment.policy, experiment.agent
    rows = agent.microbatch or experiment.config.prompts_per_iteration * agent.group_size
    latents = torch.zeros(rows, *mdp.model.latent_shape, dtype=mdp.model.dtype, device=mdp.model.device)
    conditioning, spent = mdp.conditioning.rows(mdp.drawn[:1].expand(rows)), policy.network_calls
    with progress(total=2, desc="compile", leave=False, disable=agent.ranks.rank > 0) as bar:
        with torch.no_grad():
            policy.predict(latents, 0, conditioning)
        bar.update()
        policy.predict(latents, 0, conditioning).float().mean().backward()
        agent.optimizer.zero_grad()
        bar.update()
    policy.network_calls = spent


def restore(experiment: Experiment, path: Path) -> tuple[int, int]:
    """Load a checkpoint; returns its iteration and the network calls that were made up to there."""
    tensors, meta = checkpoints.load(path)
    if meta["model"] != json.loads(json.dumps(experiment.mdp.model.architecture())):
        raise checkpoints.CheckpointError(f"the checkpoint {path} holds another architecture than the configured model")
    try:
        experiment.agent.load_state(tensors)
    except (ValueError, KeyError) as error:
        raise checkpoints.CheckpointError(f"the checkpoint {path} does not fit: {error}") from error
    return int(meta["iteration"]), int(meta["network_calls"])


def load_run(directory: Path, config: TrainConfig) -> Experiment:
    """A run's parts with the weights of its newest checkpoint.

    Raises:
        agents.training.checkpoints.CheckpointError: the run has no checkpoint, or it does not fit.
    """
    newest = checkpoints.latest(directory / "checkpoints")
    if newest is None:
        raise checkpoints.CheckpointError(f"{directory} has no checkpoint yet")
    experiment = build(config)
    restore(experiment, newest)
    return experiment
