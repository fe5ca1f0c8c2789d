"""The single Gymnasium environment: `DenoiseEnv`, one row of a `DenoiseVectorEnv`."""

from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode

from denoise_env.gymnasium_vector import DenoiseVectorEnv
from denoise_env.mdp import DenoisingMDP
from denoise_env.prompts import Prompt
from denoise_env.worlds import DEFAULT

__all__ = ["DenoiseEnv", "DenoiseVectorEnv"]


class DenoiseEnv(gymnasium.Env[dict[str, Any], Any]):
    """One denoising process: `DenoiseVectorEnv` with one row and autoreset "disabled".

    ``num_steps`` is the number of denoising steps; ``gymnasium.make`` does not hand on ``max_episode_steps``, which it
    uses for a time limit that truncates. With ``output="torch"`` give it ``disable_env_checker=True``: Gymnasium's
    passive checker warns about all that is not numpy.

    Args:
        model: as in `DenoiseVectorEnv`.
        render_mode: as in `DenoiseVectorEnv`.
        options: the other arguments of `DenoiseVectorEnv`.

    >>> env = DenoiseEnv("points", num_steps=1, prompts=["ring"])
    >>> observation, info = env.reset(seed=0)
    >>> info["prompt"], sorted(observation)
    ('ring', ['latents', 'prompt_index', 'step'])
    >>> _, reward, terminated, _, info = env.step(observation["latents"])
    >>> terminated, reward == info["reward_terms"]["points"], info["valid"]
    (True, True, True)
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, model: str | DenoisingMDP = DEFAULT, *, render_mode: str | None = None, **options: Any) -> None:
        self.vector = DenoiseVectorEnv(
            model, 1, render_mode=render_mode, autoreset_mode=AutoresetMode.DISABLED, **options
        )
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

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

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in `DenoiseVectorEnv.reset`."""
        if seed is None:
            self.vector.np_random = self.np_random
        observation, infos = self.vector.reset(seed=seed, options=options)
        super().reset(seed=seed)
        return self.vector.row(observation, 0), _row_info(infos)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As in `DenoiseVectorEnv.step`; ``action`` is ``[*latent]``."""
        shape, wanted = getattr(action, "shape", None), self.action_space.shape
        if shape != wanted:
            raise ValueError(f"the action's shape must be {wanted}, not {shape and tuple(shape)}")
        observation, rewards, terminated, truncated, infos = self.vector.step(action[None])
        row = self.vector.row(observation, 0)
        return row, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _row_info(infos)

    def render(self) -> Any:
        """One uint8 ``[H, W, 3]`` picture, or ``None`` where there is no ``render_mode``."""
        frames = self.vector.render()
        return None if frames is None else frames[0]


def _row_info(infos: dict[str, Any]) -> dict[str, Any]:
    def first(values: Any) -> Any:
        if isinstance(values, dict):
            return _row_info(values)
        return values[0].item() if hasattr(values[0], "item") else values[0]

    return {name: first(values) for name, values in infos.items() if not name.startswith("_")}
