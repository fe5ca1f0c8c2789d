"""PPO from TorchRL's own pieces, unmodified: `Collector`, `GAE`, `ClipPPOLoss`, as in its tutorial."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.nn.distributions import NormalParamExtractor
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.modules import MLP, IndependentNormal, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE


@dataclass
class TorchRLPPOConfig:
    """The tutorial's settings, for short episodes whose reward comes at the end."""

    lr: float = 3e-4
    """Adam's learning rate."""
    epochs: int = 10
    """Passes over every rollout."""
    minibatch: int = 256
    """Steps per gradient."""
    clip_epsilon: float = 0.2
    """PPO's clip range."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount; 1, as only the last step is rewarded."""
    gae_lambda: float = 0.95
    """GAE's λ."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to at most this norm."""
    width: int = 64
    """Of the two hidden layers of actor and critic."""


class TorchRLPPO:
    """TorchRL's PPO on flat observations: `learn` in its own loop, or ``act``, ``observe``, ``update`` in `run`.

    Args:
        observation_size: F.
        action_shape: of one row.
        config: see there.
        seed: of the weights and of everything drawn; seeds torch's global generator.
    """

    def __init__(
        self,
        observation_size: int,
        action_shape: tuple[int, ...],
        config: TorchRLPPOConfig | None = None,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.config = config = config or TorchRLPPOConfig()
        ...
