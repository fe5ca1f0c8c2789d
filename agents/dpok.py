"""DPOK (Fan et al. 2023, arXiv:2305.16381): policy gradients with a KL to the model before training.

    min  α E[−r] + β Σ_k E[ KL( π_θ(· | x_k) ‖ π_ref(· | x_k) ) ]        (its eq. 6)

The reward's gradient is REINFORCE's with a value baseline V(x_k, c, k) that is fitted to r; the KL is that of the
steps' Gaussians, |μ_θ − μ_ref|²/(2 std[k]²) at step k, and is differentiated directly. As in the published code,

    L = mean −α A clip(ρ, 1 ± ε) + β mean (output_θ − output_ref)²,      ρ = exp(ℓ_θ − ℓ_old),   A = r − V,

where a ratio outside 1 ± ε has no gradient, whatever the sign of A. The five updates per rollout of that code draw
their steps from the last two rollouts; here every update has its own part of the newest one.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from agents.critic import ActorCritic, ActorCriticConfig
from agents.trajectory import Batch
from denoise_env.kernels import Transition


@dataclass
class DPOKConfig(ActorCriticConfig):
    """DPOK's settings."""

    lr: float = 1e-5
    """AdamW's learning rate (published for LoRA)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 0.1
    """A gradient with a larger norm than this is scaled down to it."""
    critic_lr: float = 1e-4
    """The critic's learning rate."""
    gae_lambda: float = 1.0
    """λ of generalized advantage estimation, from 0 to 1; with 1 the advantage is r − V."""
    drop_last: bool = False
    """Leave the last denoising step out of training."""
    reward_weight: float = 10.0
    """Weight α of the reward's loss."""
    clip_range: float = 1e-4
    """The ratio is clipped to 1 ± this value, ε."""
    kl_coef: float = 0.01
    """Weight β of the KL to the model before training, scaled as kl_scaling says; with 0 the reference is not
    computed."""
    kl_scaling: Literal["code", "paper"] = "code"
    """Which KL kl_coef weighs: the published code's mean (output − base model's output)² ("code"), or the KL of the
    steps' Gaussians in the log-prob's reduction ("paper")."""


class DPOK(ActorCritic):
    """DPOK: REINFORCE with a value baseline and a KL to the base model."""

    name = "dpok"
    config_type = DPOKConfig
    config: DPOKConfig

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("clip_range")

    def divergence(self, transition: Transition, reference: Transition, step: Tensor) -> Tensor:
        """The divergence ``[N]`` that ``kl_scaling`` names."""
        if self.config.kl_scaling == "paper":
            return super().divergence(transition, reference, step)
        gains = self.policy.kernel.gains[step.cpu()].to(transition.mean)
        return transition.reduce((transition.mean - reference.mean).square()) / gains.square()

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        idle = {"kl_scaling": "kl_coef is 0"} if self.chosen("kl_scaling") and not self.config.kl_coef else {}
        return super().idle_settings() | self.idle_clip() | idle

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`: −α A clip(ρ, 1 ± ε)."""
        ratio, clip = (batch.log_prob - batch.old_log_prob).exp(), self.config.clip_range
        loss = -self.config.reward_weight * batch.advantage * ratio.clamp(1 - clip, 1 + clip)
        return loss, {"clip_fraction": ((ratio - 1).abs() > clip).float()}
