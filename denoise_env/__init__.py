"""Denoising with diffusion and flow models as a reinforcement-learning environment.

Importing this registers the worlds (``denoise_env/Shapes-v0``, …) with Gymnasium and imports
nothing heavy; the names in ``__all__`` are loaded when they are first used.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

import gymnasium

from denoise_env.shadowing import shadowed
from denoise_env.worlds import WORLDS

if TYPE_CHECKING:
    from denoise_env.checks import check_denoising_env, check_vector_env
    from denoise_env.gymnasium_env import DenoiseEnv, DenoiseVectorEnv
    from denoise_env.kernels import CPS, DDIM, KERNELS, ODE, DanceSDE, FlowSDE, Kernel, Transition
    from denoise_env.mdp import DenoisingMDP, Scores, State
    from denoise_env.models import DenoisingModel, Family, ModelOptions, load_model
    from denoise_env.prompt_files import load_prompts
    from denoise_env.prompts import Prompt
    from denoise_env.rewards import Reward, RewardModel, load_reward
    from denoise_env.schedules import Schedule
    from denoise_env.torchrl_env import DenoiseTorchRLEnv
    from denoise_env.wrappers import ControlAction, FlatObservation, NoiseAction

__version__ = "0.1.0"
__all__ = [
    "CPS",
    "DDIM",
    "KERNELS",
    "ODE",
    "ControlAction",
    "DanceSDE",
    "DenoiseEnv",
    "DenoiseTorchRLEnv",
    "DenoiseVectorEnv",
    "DenoisingMDP",
    "DenoisingModel",
    "Family",
    "FlatObservation",
    "FlowSDE",
    "Kernel",
    "ModelOptions",
    "NoiseAction",
    "Prompt",
    "Reward",
    "RewardModel",
    "Schedule",
    "Scores",
    "State",
    "Transition",
    "check_denoising_env",
    "check_vector_env",
    "load_model",
    "load_prompts",
    "load_reward",
]

_HOMES = {
    "checks": ("check_denoising_env", "check_vector_env"),
    "gymnasium_env": ("DenoiseEnv", "DenoiseVectorEnv"),
    "kernels": ("CPS", "DDIM", "KERNELS", "ODE", "DanceSDE", "FlowSDE", "Kernel", "Transition"),
    "mdp": ("DenoisingMDP", "Scores", "State"),
    "models": ("DenoisingModel", "Family", "ModelOptions", "load_model"),
    "prompt_files": ("load_prompts",),
    "prompts": ("Prompt",),
    "rewards": ("Reward", "RewardModel", "load_reward"),
    "schedules": ("Schedule",),
    "torchrl_env": ("DenoiseTorchRLEnv",),
    "wrappers": ("ControlAction", "FlatObservation", "NoiseAction"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# No max_episode_steps here: `gymnasium.make` would add a TimeLimit that truncates at the very step that
# terminates. The number of denoising steps is the environment's own `num_steps`.
for _name, _world in WORLDS.items():
    if _world.environment:
        gymnasium.register(
            _world.environment,
            entry_point="denoise_env.gymnasium_env:DenoiseEnv",
            vector_entry_point="denoise_env.gymnasium_env:DenoiseVectorEnv",
            kwargs={"model": _name},
        )

if _hidden := shadowed():
    warnings.warn(_hidden, stacklevel=2)
