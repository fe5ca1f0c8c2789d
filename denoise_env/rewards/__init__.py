"""Rewards: one file each; `base.py` holds what a reward is, `load_reward` finds one by name."""

import inspect
from typing import Any

from denoise_env.naming import load_attribute, suggest
from denoise_env.rewards.base import Reward
from denoise_env.worlds import WORLDS

NAMES: dict[str, str] = {
    name: target for world in WORLDS.values() for name, target in {**world.rewards, **world.eval_rewards}.items()
}
"""Name → ``module:attribute``; a class is instantiated without arguments, a function is the reward."""


def load_reward(name: str) -> Reward:
    """The reward of a name in `NAMES`, or of ``module:attribute`` for one of your own.

    Raises:
        ValueError: no such reward (the message has the nearest name), one that cannot be imported or built, or what
            `check_reward` refuses.
    """
    target = NAMES.get(name, name)
    if not isinstance(target, str) or ":" not in target:
        raise ValueError(
            f"unknown reward {name!r}; {suggest(str(name), NAMES)} Or name your own as 'module:attribute'."
        )
    reward = load_attribute(target, "reward")
    if isinstance(reward, type):
        try:
            reward = reward()
        except (Exception, SystemExit) as error:
            raise ValueError(f"cannot build the reward {name!r}: {type(error).__name__}: {error}") from error
    check_reward(name, reward)
    return reward


def check_reward(name: str, reward: Any) -> None:
    """Raise a ``ValueError`` for a reward that cannot be called with (images, prompts, metadata)."""
    if not isinstance(name, str):
        raise ValueError(f"a reward's name must be a string, not {name!r}")
    if not callable(reward):
        raise ValueError(f"the reward {name!r} is not callable but {type(reward).__name__}")
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError as error:
        raise ValueError(f"the reward {name!r} must take (images, prompts, metadata): {error}") from error
    except ValueError:  # some built-in functions do not tell their arguments
        pass
