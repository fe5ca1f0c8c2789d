"""PPO with a critic (Schulman et al. 2017, arXiv:1707.06347) on the denoising MDP.

The advantages A_k of `agents.critic` are whitened over the rollout, and the loss is clipped,

    L = mean max( −A_k ρ, −A_k clip(ρ, 1 ± ε) ).
"""

from dataclasses import dataclass

from torch import Tensor

from agents.advantages import whiten
from agents.critic import ActorCritic, ActorCriticConfig
from agents.surrogate import ClippedSurrogate, SurrogateConfig


@dataclass
class PPOConfig(ActorCriticConfig, SurrogateConfig):
    """PPO's settings."""


class PPO(ActorCritic, ClippedSurrogate):
    """PPO with a critic on latents, step and prompt."""

    name = "ppo"
    config_type = PPOConfig
    config: PPOConfig

    def scale(self, raw: Tensor, valid: Tensor) -> Tensor:
        """As in `ActorCritic.scale`; here whitened, and clipped to ± ``advantage_clip``."""
        return self.over_all_rows(whiten, raw, valid).clamp(-self.config.advantage_clip, self.config.advantage_clip)
