"""Stable-Baselines3's on-policy algorithms behind the generic interface.

``model.learn(…)`` over a `denoise_env.sb3.SB3VecEnv` needs none of this; it is for `agents.generic.run`.
"""

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm


class SB3OnPolicy:
    """PPO or A2C with their own policy, buffer and ``train``, driven by `agents.generic.run`.

    Args:
        model: the algorithm, with ``n_steps`` a multiple of the K steps of an episode. It is trained whenever its
            buffer is full.

    Raises:
        ValueError: ``n_steps`` is no multiple of K.
    """

    def __init__(self, model: OnPolicyAlgorithm) -> None:
        steps = model.get_env().get_attr("mdp")[0].num_steps  # type: ignore[union-attr]
        if model.n_steps % steps:
            raise ValueError(f"n_steps must be a multiple of K steps, {steps}, not {model.n_steps}")
        self.model = model
        model.set_logger(configure(format_strings=[]))
        self._starts = np.ones(model.n_envs, bool)

    def act(self, observation: Any) -> np.ndarray:
        """Sampled actions, clipped to the action space."""
        with torch.no_grad():
            action, self._value, self._log_prob = self.model.policy(_tensor(observation))
        self._action = action.cpu().numpy()
        box: Any = self.model.action_space
        return np.clip(self._action, box.low, box.high)

    def observe(self, observation: Any, action: Any, reward: Any, done: Any, next_observation: Any) -> None:
        """Add a step to the model's rollout buffer."""
        observation, reward = _tensor(observation).cpu().numpy(), _tensor(reward).cpu().numpy()
        self.model.rollout_buffer.add(observation, self._action, reward, self._starts, self._value, self._log_prob)
        self._starts = _tensor(done).cpu().numpy()
        self.model.num_timesteps += len(reward)

    def update(self) -> dict[str, float]:
        """Train if the buffer is full."""
        buffer = self.model.rollout_buffer
        if not buffer.full:
            return {}
        buffer.compute_returns_and_advantage(torch.zeros_like(self._value), self._starts)  # every episode has ended
        self.model.train()
        buffer.reset()
        return {name: float(self.model.logger.name_to_value[f"train/{name}"]) for name in ("loss", "approx_kl")}


def _tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(values)
