"""Everything that a configuration stands for, built and checked; and a run's directory read back into it."""

import dataclasses
import json
import math
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from agents.algorithms import find_agent
from agents.base import Agent
from agents.policy import DenoisingPolicy
from agents.ranks import Ranks
from agents.training import checkpoints
from agents.training.config import TrainConfig
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import DenoisingModel
from denoise_env.progress import progress
from denoise_env.prompt_files import load_prompts
from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.worlds import PROMPT_SETS, WORLDS

EVAL_PROMPTS = 32  # of the training prompts, where no others were named
MOST_IMAGES = 10**7
"""The most images that a rollout or an evaluation may have; more could not be held in memory."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything a configuration stands for, built and checked.

    Attributes:
        config: the configuration.
        mdp: the environment that the agent trains in.
        eval_mdp: the environment of evaluations, with the same model: their prompts, rewards and number of steps.
        policy: the policy that acts in ``mdp`` and is trained.
        eval_policy: the policy that acts in ``eval_mdp``: the same network, with the evaluations' kernel.
        agent: the algorithm.
    """

    config: TrainConfig
    mdp: DenoisingMDP
    eval_mdp: DenoisingMDP
    policy: DenoisingPolicy
    eval_policy: DenoisingPolicy
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
    check_numbers(config)
    device = find_device(config.device)
    rows = config.prompts_per_iteration * config.agent_options.group_size
    ranks = ranks or Ranks()
    updates = getattr(config.agent_options, "updates_per_rollout", 1)  # an agent that does not learn has none
    update = max(1, rows // max(1, updates) // ranks.size)  # what one update has at most, of this rank
    microbatch = min(config.microbatch or update, update)
    options = config.model_options
    if getattr(options, "seed", 0) is None:
        options = dataclasses.replace(options, **{"seed": config.seed})
    mdp = DenoisingMDP.make(
        config.model,
        config.rewards or None,
        config.prompts,
        config.num_steps,
        config.microbatch,
        device=device,
        options=options,
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
        config.num_steps if config.eval_num_steps is None else config.eval_num_steps,
        reward_weights={**mdp.reward_weights, **dict.fromkeys(extra, 0.0)},
        microbatch=config.microbatch,
        conditioning=mdp.conditioning,
    )
    kernel = (config.kernel, config.eta, config.last_step)
    policy = DenoisingPolicy(mdp, *kernel, reduction=config.reduction)
    eval_kernel = (config.eval_kernel, None, None) if config.eval_kernel else kernel
    eval_policy = DenoisingPolicy(eval_mdp, *eval_kernel, reduction=config.reduction)
    agent = find_agent(config.agent)(policy, config.agent_options, config.seed, microbatch, ranks)
    agent.check_rows(rows)
    for name, reward in eval_mdp.rewards.items():
        if callable(check := getattr(reward, "check", None)):
            try:
                check()
            except Exception as error:
                raise ValueError(f"the reward {name!r} cannot score: {error}") from error
    if agent.collects_ahead and not mdp.scores_elsewhere:
        raise ValueError(
            "collect_ahead denoises the next rollout while a server or another device scores this one, and here the "
            "rewards are computed on the model's own device: leave it out, or name a reward that is elsewhere, such as "
            "remote(url=…)"
        )
    for name in eval_mdp.compares_groups:
        if min(agent.group_size if name in mdp.rewards else 2, config.eval_images_per_prompt) < 2:
            raise ValueError(
                f"the reward {name!r} compares samples of one prompt: group_size and eval_images_per_prompt must be at "
                f"least 2, not {agent.group_size} and {config.eval_images_per_prompt}"
            )
    if config.eval_kl and config.eval_kernel and not eval_policy.kernel.stochastic.any():
        raise ValueError(
            f"eval_kl is the KL of noisy steps, and the evaluations' kernel {config.eval_kernel!r} has none: leave "
            "eval_kl or eval_kernel out"
        )
    for what, images in (
        ("a rollout", rows),
        ("an evaluation", len(eval_mdp.drawn_prompts) * config.eval_images_per_prompt),
    ):
        if images > MOST_IMAGES:
            raise ValueError(f"{what} of {images:,} images cannot be meant: at most {MOST_IMAGES:,} are taken")
    if config.eval_kl:
        mdp.model.keep_reference()
    return Experiment(config, mdp, eval_mdp, policy, eval_policy, agent)


def check_numbers(config: TrainConfig) -> None:
    """Raise a ``ValueError`` for a count, a seed or a share that is of another type or out of its range."""
    for name, (least, most) in _RANGES.items():
        if (value := getattr(config, name)) is not None or name not in _OPTIONAL:
            _check_integer(name, value, least, most)
    for field in dataclasses.fields(config.agent_options):
        value = getattr(config.agent_options, field.name)
        if isinstance(value, Integral) and int(value) > 10**6:
            raise ValueError(f"{field.name} must be at most 1,000,000, not {int(value):,}")
    if (seed := getattr(config.model_options, "seed", None)) is not None:
        _check_integer("the model's seed", seed, 0, _SEED)
    if config.eval_points and not config.network_budget:
        raise ValueError("eval_points divides the network_budget: give one")
    shares = {"max_unscored": 1.0, "conditioning_host_gib": math.inf, "conditioning_device_gib": math.inf}
    for name, largest in shares.items():
        if isinstance(share := getattr(config, name), bool | str) or not 0 <= share <= largest:
            raise ValueError(f"{name} must lie in [0, {largest:g}], not {share}")


def _check_integer(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if int(value) > most:
        raise ValueError(f"{name} must be at most {most:,}, not {value:,}")


_SEED = 2**63 - 1
_RANGES = {
    "iterations": (1, 10**9),
    "checkpoint_every": (1, 10**9),
    "keep_checkpoints": (1, 10**9),
    "eval_every": (0, 10**9),
    "sample_every": (0, 10**9),
    "eval_points": (0, 10**6),
    "prompts_per_iteration": (1, 10**6),
    "eval_images_per_prompt": (1, 10**6),
    "microbatch": (1, 10**6),
    "network_budget": (1, 10**15),
    "num_steps": (1, 10**6),
    "eval_num_steps": (1, 10**6),
    "seed": (0, _SEED),
    "eval_seed": (0, _SEED),
}
"""A setting's least and largest value; larger ones are mistyped, or no computer could do them."""
_OPTIONAL = ("microbatch", "network_budget", "eval_num_steps")  # these may be None


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


def restore(experiment: Experiment, path: Path) -> dict[str, Any]:
    """Load a checkpoint; returns its meta data, as in `checkpoints.read_meta`.

    Raises:
        agents.training.checkpoints.CheckpointError: it cannot be read or is of another experiment; nothing has changed.
    """
    tensors, meta = checkpoints.load(path)
    if meta["model"] != json.loads(json.dumps(experiment.mdp.model.architecture())):
        raise checkpoints.CheckpointError(f"the checkpoint {path} holds another architecture than the configured model")
    try:
        experiment.agent.load_state(tensors)
    except (ValueError, KeyError) as error:
        raise checkpoints.CheckpointError(f"the checkpoint {path} does not fit: {error}") from error
    return meta


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
