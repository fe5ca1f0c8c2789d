"""The conventions of generic agents as Gymnasium wrappers of `DenoiseVectorEnv`.

    env = DenoiseVectorEnv("points", num_envs=64, autoreset_mode="same_step")
    env = FlatObservation(NoiseAction(env))

They own a frozen copy of the model's network, see `denoise_env.conventions`, and speak numpy or tensors as the
environment beneath them does: with ``output="torch"`` nothing is converted on the way.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorActionWrapper, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from denoise_env.conventions import ActionConvention, Control, Flat, Noise, RowNoise
from denoise_env.gymnasium_vector import DenoiseVectorEnv
from denoise_env.mdp import State

Env = VectorEnv[Any, Any, Any]


class _ActionWrapper(VectorActionWrapper[Any, Any, Any, Any]):
    make: ClassVar[Callable[..., ActionConvention]]

    def __init__(self, env: Env, **options: Any) -> None:
        base = _base(env)
        super().__init__(env)
        self._base = base
        if env.single_action_space != self._base.single_action_space:
            raise ValueError(f"{env} already has an action of its own: wrap the environment beneath it")
        self.convention = self.make(self._base.mdp, **options)
        self._noise = RowNoise(self._base.mdp, self._base.streams) if self.convention.draws_noise else None
        bound = self.convention.bound
        self.single_action_space = spaces.Box(-bound, bound, self.convention.shape, np.float32)
        self.action_space = batch_space(self.single_action_space, env.num_envs)

    def actions(self, actions: Any) -> Any:
        """The next latents."""
        state = self._base.state
        tensor = self.convention.read_action(actions, self.num_envs)
        noise = self._noise(state.step) if self._noise else None
        latents = self.convention.next_latents(state, tensor, noise)
        return latents.float().cpu().numpy() if self._base.output == "numpy" else latents


class NoiseAction(_ActionWrapper):
    """The action is the sampler's noise, see `denoise_env.conventions.Noise`.

    Args:
        env: a `DenoiseVectorEnv`, or a wrapper of one.
        options: the arguments of `Noise`, except ``mdp``.

    Raises:
        ValueError: what `Noise` refuses; an action of another shape, or not finite.

    >>> from denoise_env import DenoiseVectorEnv
    >>> NoiseAction(DenoiseVectorEnv("points", num_envs=3)).action_space.shape
    (3, 2)
    """

    convention: Noise
    make = Noise


class ControlAction(_ActionWrapper):
    """The action is a few numbers per step, see `denoise_env.conventions.Control`.

    Args:
        env: a `DenoiseVectorEnv`, or a wrapper of one.
        options: the arguments of `Control`, except ``mdp``.

    Raises:
        ValueError: what `Control` refuses; an action of another shape, or not finite.
    """

    convention: Control
    make = Control


class FlatObservation(VectorWrapper[Any, Any, Any, Any, Any]):
    """One vector per row, see `denoise_env.conventions.Flat`; terminal observations too.

    Args:
        env: a `DenoiseVectorEnv`, or a wrapper of one with its observations.
        options: the arguments of `Flat`, except ``mdp``.

    Raises:
        ValueError: what `Flat` refuses.
    """

    def __init__(self, env: Env, **options: Any) -> None:
        base = _base(env)
        super().__init__(env)
        self._base = base
        if env.single_observation_space != self._base.single_observation_space:
            raise ValueError(f"{env} already has an observation of its own: wrap the environment beneath it")
        self.flat = Flat(self._base.mdp, **options)
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (self.flat.size,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As in `DenoiseVectorEnv.reset`."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._flatten(observation), infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As in `DenoiseVectorEnv.step`."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            ended = np.flatnonzero(infos["_final_obs"])
            last = infos["final_obs"][ended]
            stack: Any = np.stack if self._base.output == "numpy" else torch.stack
            rows = self._flatten({name: stack([row[name] for row in last]) for name in observation})
            final = np.full(self.num_envs, None, object)
            for i, row in zip(ended, rows, strict=True):
                final[i] = row
            infos = {**infos, "final_obs": final}
        return self._flatten(observation), rewards, terminated, truncated, infos

    def _flatten(self, observation: dict[str, Any]) -> Any:
        device = self._base.mdp.model.device
        state = State(**{name: torch.as_tensor(value, device=device) for name, value in observation.items()})
        flat = self.flat(state)
        return flat.cpu().numpy() if self._base.output == "numpy" else flat


def _base(env: Env) -> DenoiseVectorEnv:
    if not isinstance(env.unwrapped, DenoiseVectorEnv):
        raise ValueError(
            f"this wraps a DenoiseVectorEnv, not {env.unwrapped!r}: gymnasium.make_vec makes one; gymnasium.make takes "
            "wrappers of its single row as wrap=..."
        )
    return env.unwrapped
