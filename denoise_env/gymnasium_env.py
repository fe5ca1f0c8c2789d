"""The single Gymnasium environment: `DenoiseEnv`, one row of a `DenoiseVectorEnv`."""

from collections.abc import Callable
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv

from denoise_env.arguments import MAX_SEED, integer
from denoise_env.gymnasium_vector import DenoiseVectorEnv
from denoise_env.mdp import DenoisingMDP
from denoise_env.prompts import Prompt
from denoise_env.worlds import DEFAULT

__all__ = ["DenoiseEnv", "DenoiseVectorEnv"]


class DenoiseEnv(gymnasium.Env[Any, Any]):
    """One denoising process: `DenoiseVectorEnv` with one row and autoreset "disabled".

    ``num_steps`` is the number of denoising steps; ``gymnasium.make`` does not hand on ``max_episode_steps``, which it
    uses for a time limit that truncates. With ``output="torch"`` give it ``disable_env_checker=True``: Gymnasium's
    passive checker warns about all that is not numpy.

    Args:
        model: as in `DenoiseVectorEnv`.
        render_mode: as in `DenoiseVectorEnv`.
        wrap: what to put around the row, a class or function from a vector environment to one: `NoiseAction`,
            `ControlAction` or `FlatObservation` of `denoise_env.wrappers`, or several of them, with options,
            ``lambda env: FlatObservation(NoiseAction(env, bound=2.0))``.
        options: the other arguments of `DenoiseVectorEnv`.

    Raises:
        ValueError: what `DenoiseVectorEnv` or ``wrap`` refuses.

    >>> env = DenoiseEnv("points", num_steps=1, prompts=["ring"])
    >>> observation, info = env.reset(seed=0)
    >>> info["prompt"], sorted(observation)
    ('ring', ['latents', 'prompt_index', 'step'])
    >>> _, reward, terminated, _, info = env.step(observation["latents"])
    >>> terminated, reward == info["reward_terms"]["points"], info["valid"]
    (True, True, True)
    >>> from denoise_env import ControlAction
    >>> gymnasium.make("denoise_env/Points-v0", wrap=ControlAction).action_space.shape
    (3,)
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        model: str | DenoisingMDP = DEFAULT,
        *,
        render_mode: str | None = None,
        wrap: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.vector = DenoiseVectorEnv(
            model, 1, render_mode=render_mode, autoreset_mode=AutoresetMode.DISABLED, **options
        )
        self._row: VectorEnv[Any, Any, Any] = self.vector if wrap is None else wrap(self.vector)
        if not isinstance(self._row, VectorEnv) or self._row.unwrapped is not self.vector:
            raise ValueError(f"wrap must put a vector wrapper around the environment it is given, not {self._row!r}")
        self.render_mode = render_mode
        self.observation_space = self._row.single_observation_space
        self.action_space = self._row.single_action_space

    @classmethod
    def from_mdp(cls, mdp: DenoisingMDP, **options: Any) -> "DenoiseEnv":
        """An environment over a live MDP."""
        return cls(mdp, **options)

    @property
    def mdp(self) -> DenoisingMDP:
        """The MDP beneath."""
        return self.vector.mdp

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that ``prompt_index`` points into."""
        return self.vector.prompts

    @property
    def _np_random(self) -> Any:  # type: ignore[override]
        return self.vector._np_random

    @_np_random.setter
    def _np_random(self, value: Any) -> None:
        self.vector._np_random = value

    @property
    def _np_random_seed(self) -> Any:  # type: ignore[override]
        return self.vector._np_random_seed

    @_np_random_seed.setter
    def _np_random_seed(self, value: Any) -> None:
        self.vector._np_random_seed = value

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As in `DenoiseVectorEnv.reset`; ``seed`` is one integer."""
        seed = None if seed is None else integer(seed, "seed", 0, MAX_SEED)
        observation, infos = self._row.reset(seed=seed, options=options)
        return self._first(observation), _row_info(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As in `DenoiseVectorEnv.step`; ``action`` is ``[*latent]``, or what ``wrap`` made of it."""
        shape, wanted = getattr(action, "shape", None), self.action_space.shape
        if shape != wanted:
            raise ValueError(f"the action's shape must be {wanted}, not {shape and tuple(shape)}")
        if self.vector.state.step[0] == self.mdp.num_steps:
            raise ResetNeeded(f"the episode is over after {self.mdp.num_steps} steps: call reset()")
        observation, rewards, terminated, truncated, infos = self._row.step(action[None])
        return (
            self._first(observation),
            float(rewards[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            _row_info(infos),
        )

    def _first(self, observation: Any) -> Any:
        return self.vector.row(observation, 0) if isinstance(observation, dict) else observation[0]

    def render(self) -> Any:
        """As in `DenoiseVectorEnv.render`, of the one row."""
        frames = self.vector.render()
        return None if frames is None else frames[0]


def _row_info(infos: dict[str, Any]) -> dict[str, Any]:
    def first(values: Any) -> Any:
        if isinstance(values, dict):
            return _row_info(values)
        return values[0].item() if hasattr(values[0], "item") else values[0]

    return {name: first(values) for name, values in infos.items() if not name.startswith("_")}
