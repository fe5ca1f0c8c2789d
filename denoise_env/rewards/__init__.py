"""Rewards: one file each; `base.py` holds what a reward is, `load_reward` finds one by name."""

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
        ValueError: no such reward; the message has the nearest name.
    """
    target = NAMES.get(name, name)
    if ":" not in target:
        raise ValueError(f"unknown reward {name!r}; {suggest(name, NAMES)} Or name your own as 'module:attribute'.")
    found = load_attribute(target, "reward")
    reward = found() if isinstance(found, type) else found
    if not callable(reward):
        raise ValueError(f"the reward {name!r} is not callable but {type(reward).__name__}")
    return reward
