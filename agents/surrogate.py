"""PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7), whatever the advantages are.

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

The ratio is that of the policy's log-prob, which is averaged or summed over latent dimensions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agents.trajectory import Batch, TrajectoryAgent, TrajectoryConfig


@dataclass
class SurrogateConfig(TrajectoryConfig):
    """The settings of every agent whose ratio is clipped."""

    clip_range: float = 1e-4
    """The ratio is clipped to 1 ± this value, ε. The default is for the mean log-prob, whose ratio is the D-th root of
    the true ratio, D being the number of latent dimensions."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this."""
    collect_ahead: bool = False
    """Denoise the next rollout while the rewards of this one are computed on a server or another device, with the
    weights from before this one's update. Such a rollout is one update old: the ratio accounts for that, and its clip
    binds. None is collected ahead of a checkpoint, so that a run continues from one exactly; a run that is stopped
    between two begins its next rollout anew. It takes the memory of a second rollout."""


class ClippedSurrogate(TrajectoryAgent):
    """The base of agents whose ratio is clipped; arguments and errors as in `Agent`."""

    config_type = SurrogateConfig

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("clip_range", "advantage_clip")

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        return super().idle_settings() | self.idle_clip()

    @property
    def collects_ahead(self) -> bool:
        """As in `Agent.collects_ahead`."""
        return bool(self.config.collect_ahead)

    def rollout_options(self, iteration: int) -> dict[str, Any]:
        """As in `Agent.rollout_options`."""
        return {**super().rollout_options(iteration), "wait": not self.config.collect_ahead}

    def ratio(self, batch: Batch) -> Tensor:
        """The ratio ρ ``[N]`` that the loss clips."""
        return (batch.log_prob - batch.old_log_prob).exp()

    def surrogate(self, batch: Batch, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped loss ``[N]``, and a mask ``[N]`` of where the ratio lies outside 1 ± ε."""
        clip = self.config.clip_range
        return clipped(batch.advantage, ratio, clip), (ratio - 1).abs() > clip

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`: the clipped surrogate."""
        loss, outside = self.surrogate(batch, self.ratio(batch))
        return loss, {"clip_fraction": outside.float()}


def clipped(advantage: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """max( −A ρ, −A clip(ρ, 1 ± ε) ), ``[N]``."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
