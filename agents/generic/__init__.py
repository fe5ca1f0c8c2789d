"""Agents that know nothing of diffusion: their interface, and the one loop that runs them all.

`agents.generic.sb3` and `agents.generic.torchrl` put those libraries' algorithms behind the interface;
`examples/ppo_single_file.py` is an agent written from nothing.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import Space
from gymnasium.vector import AutoresetMode, VectorEnv
from tqdm import tqdm

from denoise_env.progress import progress

__all__ = ["GenericAgent", "RandomAgent", "ScriptedAgent", "check_rewards", "run"]


class GenericAgent(Protocol):
    """What `run` needs of an agent; batches are numpy or tensors, as the environment's are."""

    def act(self, observation: Any) -> Any:
        """Actions ``[n, …]`` for observations ``[n, …]``."""

    def observe(self, observation: Any, action: Any, reward: Any, done: Any, next_observation: Any) -> None:
        """Take note of a step; ``next_observation`` is the last of its own episode where that is ``done``."""

    def update(self) -> dict[str, float]:
        """Learn from what was observed, when there is enough of it; returns figures to show."""


class ScriptedAgent:
    """A function from observations to actions; it learns nothing.

    >>> steady = ScriptedAgent(lambda observation: np.zeros((len(observation), 3), np.float32))
    >>> steady.act(np.ones((2, 9))).shape
    (2, 3)
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.act = function

    def observe(self, observation: Any, action: Any, reward: Any, done: Any, next_observation: Any) -> None:
        """Take note of nothing."""

    def update(self) -> dict[str, float]:
        """Learn nothing."""
        return {}


class RandomAgent(ScriptedAgent):
    """An agent whose actions are uniform in the environment's (bounded) action space.

    Args:
        action_space: the environment's ``action_space``, bounded.
        seed: seed of the draws.
    """

    def __init__(self, action_space: Space[Any], seed: int = 0) -> None:
        action_space.seed(seed)
        super().__init__(lambda observation: action_space.sample())


def run(
    env: VectorEnv[Any, Any, Any],
    agent: GenericAgent,
    episodes: int,
    *,
    seed: int | None = None,
    learn: bool = True,
    desc: str = "episodes",
) -> np.ndarray:
    """Run an agent and report every episode's return.

    Args:
        env: the environment, with autoreset "disabled" and rows that end together.
        agent: the agent that acts, and learns unless ``learn`` is false.
        episodes: at least this many, in whole batches of ``env.num_envs``; ``agent.update`` follows each batch.
        seed: seed of the first reset; later resets continue its random streams.
        learn: whether to call ``observe`` and ``update``.
        desc: the progress bar's title.

    Returns:
        Returns ``[episodes]`` float64 in the order of the episodes, NaN where a reward could not be computed.

    Raises:
        ValueError: the autoreset mode is another, there is less than one episode, or a reward could not be computed
            while learning.
    """
    if env.metadata.get("autoreset_mode") is not AutoresetMode.DISABLED:
        raise ValueError('the loop resets the rows itself: build the environment with autoreset_mode="disabled"')
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, not {episodes}")
    returns: list[np.ndarray] = []
    with progress(total=episodes, desc=desc, leave=False) as bar:
        for first in range(0, episodes, env.num_envs):
            returns.append(_episodes(env, agent, seed if first == 0 else None, learn))
            figures = agent.update() if learn else {}
            _show(bar, returns[-1], figures)
    return np.concatenate(returns)


def _episodes(env: VectorEnv[Any, Any, Any], agent: GenericAgent, seed: int | None, learn: bool) -> np.ndarray:
    """One episode of every row, and their returns."""
    observation, _ = env.reset(seed=seed)
    total, over = np.zeros(env.num_envs), False
    while not over:
        action = agent.act(observation)
        following, reward, terminated, truncated, _ = env.step(action)
        done = terminated | truncated
        numbers = torch.as_tensor(reward).cpu().numpy()
        if learn:
            check_rewards(numbers)
            agent.observe(observation, action, reward, done, following)
        observation, over = following, bool(done.all())
        total += numbers
    return total


def check_rewards(rewards: np.ndarray) -> None:
    """Raise a ``ValueError`` for rewards that are NaN, which would turn the agent's weights into NaN."""
    missing = int(np.isnan(rewards).sum())
    if missing:
        raise ValueError(f"the reward of {missing} rows could not be computed: mend the reward function")


def _show(bar: tqdm, returns: np.ndarray, figures: dict[str, float]) -> None:
    shown = {"return": returns.mean(), **figures}
    bar.set_postfix({name: f"{value:.3g}" for name, value in shown.items()}, refresh=False)
    bar.update(len(returns))
