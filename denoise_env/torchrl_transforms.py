"""The conventions of generic agents as TorchRL transforms of `DenoiseTorchRLEnv`.

    env = DenoiseTorchRLEnv("points", num_envs=64)
    env = TransformedEnv(env, Compose(ActionTransform(Noise(env.mdp)), FlatTransform(Flat(env.mdp))))

An `ActionConvention` owns a frozen copy of the model's network, see `denoise_env.conventions`.
"""

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import Transform

from denoise_env.conventions import ActionConvention, Flat, RowNoise
from denoise_env.mdp import State


def _state(tensordict: TensorDictBase) -> State:
    return State(*(tensordict[name] for name in ("latents", "step", "prompt_index")))


class ActionTransform(Transform):
    """The agent's ``action`` is the convention's, and is turned into the next latents on its way into the environment.

    Where the convention draws noise, it is the same as under `ControlAction` for the same seed; it belongs to the
    row's present episode and so is not in the tensordict.

    Args:
        convention: a `Noise` or a `Control` of the environment's MDP.

    >>> from denoise_env import DenoiseTorchRLEnv
    >>> from denoise_env.conventions import Control
    >>> from torchrl.envs import TransformedEnv
    >>> env = DenoiseTorchRLEnv("points", num_envs=4)
    >>> env = TransformedEnv(env, ActionTransform(Control(env.mdp)))
    >>> env.action_spec.shape
    torch.Size([4, 3])
    """

    def __init__(self, convention: ActionConvention) -> None:
        super().__init__(in_keys_inv=["action"], out_keys_inv=["action"])
        self.convention = convention
        self._noise: RowNoise | None = None

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.convention.draws_noise and self._noise is None:
            self._noise = RowNoise(self.convention.mdp, self._env.streams)
        state = _state(tensordict)
        action = self.convention.read_action(tensordict["action"], len(state.step))
        noise = self._noise(state.step) if self._noise else None
        return tensordict.set("action", self.convention.next_latents(state, action, noise))

    def transform_action_spec(self, action_spec: Composite) -> Composite:
        """A box of the convention's shape and bound."""
        bound, shape = self.convention.bound, (*action_spec.shape, *self.convention.shape)
        device = self.convention.mdp.model.device
        action = Bounded(-bound, bound, shape=shape, dtype=torch.float32, device=device)
        return Composite(action=action, shape=action_spec.shape, device=device)

    @property
    def _env(self) -> Any:
        assert self.parent is not None
        return self.parent.base_env


class FlatTransform(Transform):
    """Adds ``observation``, one vector per row.

    Args:
        flat: a `Flat` of the environment's MDP.
    """

    def __init__(self, flat: Flat) -> None:
        super().__init__(in_keys=["latents", "step", "prompt_index"], out_keys=["observation"])
        self.flat = flat

    def _call(self, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set("observation", self.flat(_state(next_tensordict)))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return self._call(tensordict_reset)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        """The environment's specification with ``observation`` added."""
        spec = observation_spec.clone()
        shape = (*spec.shape, self.flat.size)
        spec["observation"] = Unbounded(shape=shape, dtype=torch.float32, device=spec.device)
        return spec
