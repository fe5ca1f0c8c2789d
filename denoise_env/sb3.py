"""The Stable-Baselines3 environment: `SB3VecEnv`, a `VecEnv` over a wrapped `DenoiseVectorEnv`.

Needs Stable-Baselines3: ``pip install stable-baselines3``.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from denoise_env.arguments import MAX_SEED, integer, number
from denoise_env.gymnasium_vector import DenoiseVectorEnv

Env = VectorEnv[Any, Any, Any]


class SB3VecEnv(VecEnv):
    """A Gymnasium vector environment as a Stable-Baselines3 one.

    Observations and rewards become numpy here and nowhere before, if the environment was built with
    ``output="torch"``. A row's infos have its ``prompt`` and, where its episode has ended, ``reward_terms``, ``valid``
    and ``terminal_observation``. For Stable-Baselines3's episode statistics put a ``VecMonitor`` around it.

    Args:
        env: the environment. Its autoreset is "disabled", as ended rows are reset here, and its action space is a
            bounded Box, as `NoiseAction` and `ControlAction` make it.
        invalid_reward: what a reward that could not be computed counts as; ``None`` raises an error then, as
            Stable-Baselines3 would learn from the NaN.

    Raises:
        ValueError: an environment that does not fit, and later a reward that is NaN: that step has been made, and a
            reset must follow it.

    >>> from denoise_env import DenoiseVectorEnv
    >>> from denoise_env.wrappers import FlatObservation, NoiseAction
    >>> env = DenoiseVectorEnv("points", num_envs=4, output="torch")
    >>> SB3VecEnv(FlatObservation(NoiseAction(env))).reset().shape
    (4, 9)
    """

    def __init__(self, env: Env, invalid_reward: float | None = None) -> None:
        if env.metadata.get("autoreset_mode") is not AutoresetMode.DISABLED:
            raise ValueError('SB3VecEnv resets rows itself: build the environment with autoreset_mode="disabled"')
        box = env.single_action_space
        if not isinstance(box, spaces.Box) or not box.is_bounded():
            raise ValueError(
                f"Stable-Baselines3 needs a bounded action Box, not {box}: wrap the environment in NoiseAction or "
                "ControlAction"
            )
        self.env = env
        self.invalid_reward = None if invalid_reward is None else number(invalid_reward, "invalid_reward")
        super().__init__(env.num_envs, env.single_observation_space, box)

    def reset(self) -> Any:
        """First observations, with the seeds and options that were set for this reset."""
        observation, infos = self.env.reset(seed=cast(Any, self._seeds), options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [_row(infos, i) for i in range(self.num_envs)]
        return _numpy(observation)

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed the next reset: row i gets ``seed + i``; without a seed, one is drawn from numpy's global generator.

        Raises:
            ValueError: no seed; the next reset is as before.
        """
        return super().seed(None if seed is None else integer(seed, "seed", 0, MAX_SEED - (self.num_envs - 1)))

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Set the options of the next reset: one dictionary, or a list with the same one for every row.

        Raises:
            ValueError: options that differ between rows, or that the environment refuses; the next reset is as before.
        """
        rows = options if isinstance(options, list) else [options or {}] * self.num_envs
        if len(rows) != self.num_envs or any(row != rows[0] for row in rows):
            raise ValueError("options differ between rows: give set_options one dictionary for all")
        if isinstance(self.env.unwrapped, DenoiseVectorEnv):
            self.env.unwrapped.check_options(rows[0])
        super().set_options(rows)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Step all rows, and reset those that have ended."""
        observation, *results, infos = self.env.step(self._actions)
        observation, rewards, terminated, truncated = map(_numpy, (observation, *results))
        missing = np.isnan(rewards)
        if missing.any():
            if self.invalid_reward is None:
                raise ValueError(
                    f"the reward of {missing.sum()} rows could not be computed: mend the reward function, or say with "
                    "invalid_reward=… what such an episode counts as"
                )
            rewards = np.where(missing, np.float32(self.invalid_reward), rewards)
        done = terminated | truncated
        rows = [_row(infos, i) for i in range(self.num_envs)]
        if done.any():
            last = observation
            observation, infos = self.env.reset(options={"reset_mask": done})
            observation = _numpy(observation)
            for i in np.flatnonzero(done).tolist():
                rows[i]["terminal_observation"] = _pick(last, i)
                rows[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
                self.reset_infos[i] = _row(infos, i)
        return observation, rewards, done, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """One picture per row."""
        return cast(Any, self.env.render()) or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The environment's attribute, once per row: the rows share it."""
        owner = self.env if hasattr(self.env, attr_name) else self.env.unwrapped
        return [getattr(owner, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the environment, for all rows."""
        self._need_all(indices)
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Call a method of the environment, once for all rows."""
        self._need_all(indices)
        owner = self.env if hasattr(self.env, method_name) else self.env.unwrapped
        return [getattr(owner, method_name)(*args, **kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether the rows have a wrapper of single environments: they never do."""
        return [False] * len(list(self._get_indices(indices)))

    def _need_all(self, indices: Any) -> None:
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise ValueError("the rows are one environment: leave indices out")


def _numpy(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _numpy(value) for name, value in data.items()}
    return data.cpu().numpy() if isinstance(data, torch.Tensor) else data


def _pick(observation: Any, i: int) -> Any:
    return (
        {name: values[i] for name, values in observation.items()} if isinstance(observation, dict) else observation[i]
    )


def _row(infos: dict[str, Any], i: int) -> dict[str, Any]:
    """Row i's own infos."""
    row = {}
    for name, values in infos.items():
        if not name.startswith("_") and infos.get(f"_{name}", [True] * (i + 1))[i]:
            row[name] = _row(values, i) if isinstance(values, dict) else values[i]
    return row
