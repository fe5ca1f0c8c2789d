"""DPOK (Fan et al. 2023, arXiv:2305.16381): policy gradients with a KL to the model before training.

    min  α E[−r] + β Σ_k E[ KL( π_θ(· | x_k) ‖ π_ref(· | x_k) ) ]        (its eq. 6)

The reward's gradient is REINFORCE's with a value baseline V(x_k, c, k) that is fitted to r; the KL is that of the
steps' Gaussians, |μ_θ − μ_ref|²/(2k²), and is differentiated itself. One optimizer step per rollout.
"""

from dataclasses import dataclass

from torch import Tensor

from agents.critic import ActorCritic, ActorCriticConfig
from agents.trajectory import Batch


@dataclass
class DPOKConfig(ActorCriticConfig):
    """DPOK's settings."""

    lr: float = 1e-5
    """AdamW's learning rate (published for LoRA)."""
    gae_lambda: float = 1.0
    """λ of generalized advantage estimation; 1 is the baseline r − V."""
    drop_last: bool = False
    """Never train the last denoising step."""
    reward_weight: float = 10.0
    """Weight α of the reward's loss; kl_coef is that of the KL."""
    kl_coef: float = 0.01
    """Weight β of the KL to the model before training, in the log-prob's reduction; 0 spares the reference."""


class DPOK(ActorCritic):
    """DPOK: REINFORCE with a value baseline and a KL to the base model."""

    name = "dpok"
    config_type = DPOKConfig
    config: DPOKConfig
    on_policy = True

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`: α times the score function estimator's."""
        return -self.config.reward_weight * batch.advantage * batch.log_prob, {}
