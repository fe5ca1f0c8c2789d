"""DPOK (Fan et al. 2023, arXiv:2305.16381): policy gradients with a KL to the model before training.

    min  α E[−r] + β Σ_k E[ KL( π_θ(· | x_k) ‖ π_ref(· | x_k) ) ]        (its eq. 6)

The reward's gradient is REINFORCE's with a value baseline V(x_k, c, k) that is fitted to r; the KL is that of the
steps' Gaussians, |μ_θ − μ_ref|²/(2 std[k]²) at step k, and is differentiated directly. One optimizer step per rollout.
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
    """λ of generalized advantage estimation, from 0 to 1; with 1 the advantage is r − V."""
    drop_last: bool = False
    """Leave the last denoising step out of training."""
    reward_weight: float = 10.0
    """Weight α of the reward's loss."""
    kl_coef: float = 0.01
    """Weight β of the KL to the model before training, in the log-prob's reduction; with 0 the reference is not
    computed."""


class DPOK(ActorCritic):
    """DPOK: REINFORCE with a value baseline and a KL to the base model."""

    name = "dpok"
    config_type = DPOKConfig
    config: DPOKConfig
    on_policy = True

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`: −α A ℓ_θ, α times the score function estimator's loss."""
        return -self.config.reward_weight * batch.advantage * batch.log_prob, {}
