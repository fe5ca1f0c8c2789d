"""The whole state of a face, for tests that compare it before and after a call."""

import types

import gymnasium
import numpy as np
import torch
from torchrl.envs import EnvBase, Transform

# What only remembers what would be computed again: draws that no step has used yet, an action that waits for its step,
# tables by dtype, encoded prompts, digests, TorchRL's names of keys and its transforms' environment.
REMEMBERED = {
    "_ahead",
    "_draws",
    "_noise",
    "_actions",
    "_cast",
    "_cache",
    "_parent",
    "_host",
    "encoded",
    "key",
    "conditioning_key",
}


def snapshot(value, seen=None):
    """Everything reachable from an object of ours, as nested tuples; random streams by their state."""
    seen = set() if seen is None else seen
    if value is None or isinstance(value, bool | int | float | str | bytes | np.generic | np.dtype | torch.dtype):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().double().numpy().tobytes()
    if isinstance(value, np.ndarray):
        items = tuple(snapshot(item, seen) for item in value.flat) if value.dtype == object else value.tobytes()
        return str(value.dtype), value.shape, items
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if id(value) in seen:
        return "seen"
    seen.add(id(value))
    if isinstance(value, dict):
        return tuple((str(key), snapshot(item, seen)) for key, item in value.items() if key not in REMEMBERED)
    if isinstance(value, list | tuple):
        return tuple(snapshot(item, seen) for item in value)
    if isinstance(value, gymnasium.spaces.Space):
        return repr(value), snapshot(value._np_random, seen), snapshot(getattr(value, "spaces", None), seen)
    if isinstance(value, torch.nn.Module) and not isinstance(value, EnvBase | Transform):
        return snapshot(value.state_dict(), seen)
    mine = type(value).__module__.split(".")[0] in ("denoise_env", "gymnasium", "stable_baselines3")
    if mine or isinstance(value, EnvBase | Transform):
        return type(value).__name__, snapshot(vars(value), seen)
    return type(value).__name__ if not isinstance(value, types.FunctionType) else value.__qualname__
