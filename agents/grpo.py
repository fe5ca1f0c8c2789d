"""GRPO for denoising: DanceGRPO (Xue et al. 2025, arXiv:2505.07818).

For every prompt a group of G samples is drawn from the same initial noise. Each reward j is normalised within the
group,

    A_ij = (r_ij − mean_j) / (std_j + 1e-8),        A_i = Σ_j w_j A_ij,

the same A_i stands for every step of sample i, and a random subset of steps is trained with

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

There is no value function, no discount and no KL. The reduction of ℓ over latent dimensions is the policy's.
"""

import math
from dataclasses import dataclass

from agents.advantages import Aggregation
from agents.base import SharedNoise
from agents.normalisation import NormalisationConfig, Normalised
from agents.surrogate import ClippedSurrogate, SurrogateConfig


@dataclass
class GRPOConfig(NormalisationConfig, SurrogateConfig):
    """DanceGRPO's settings."""

    lr: float = 1e-5
    """AdamW's learning rate (published for full fine-tuning)."""
    shared_noise: SharedNoise = "group"
    """Which samples start from the same initial noise: none ("none"), those of a group ("group", DanceGRPO's paper), or
    all of a rollout ("rollout"; its code has one noise for the four prompts of each GPU)."""
    reward_aggregation: Aggregation = "advantages"
    """How several rewards become one loss: add up their advantages (DanceGRPO's paper), their clipped losses (its video
    code), or the rewards themselves."""


class GRPO(Normalised, ClippedSurrogate):
    """DanceGRPO: group-relative policy optimization from shared noise."""

    name = "grpo"
    config_type = GRPOConfig
    config: GRPOConfig

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        found, config, size = super().idle_settings(), self.config, self.siblings
        weights = self.policy.mdp.reward_weights.values()
        scale = sum(map(abs, weights)) if config.reward_aggregation == "advantages" else 1.0
        largest = scale * math.sqrt(size - 1) * (math.sqrt(1 - 1 / size) if config.std_form == "unbiased" else 1.0)
        if config.advantage_std == "group" and config.advantage_clip >= largest:
            found["advantage_clip"] = f"advantages of a group of {size} are at most {largest:.2f}"
        return found
