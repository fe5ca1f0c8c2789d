"""PPO with a critic (Schulman et al. 2017, arXiv:1707.06347) on the denoising MDP.

The reward comes after the last step; with ``kl_reward`` every step costs β (ℓ_old − ℓ_ref) of its action besides, whose
mean is KL(π_old ‖ π_ref). (The KL itself would not do: the same for every action, it is no reason to choose another.)
With δ_k = r_k + γ V_{k+1} − V_k the advantages are GAE's (Schulman et al. 2015, arXiv:1506.02438, eq. 16), whitened
over the rollout,

    A_k = Σ_j (γλ)^j δ_{k+j},      L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ) + c (V − (A_k + V_k))².

γ = λ = 1 gives A_k = r − V(x_k, k, c).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agents.advantages import whiten
from agents.critic import Critic
from agents.grpo import GRPO, GRPOConfig
from agents.rollout import Rollout
from agents.trajectory import Batch


@dataclass
class PPOConfig(GRPOConfig):
    """PPO with a critic on latents, step and prompt."""

    group_size: int = 1
    """Neighbouring samples of one prompt."""
    shared_noise: bool = False
    """A group starts from the same initial noise."""
    gamma: float = 1.0
    """Discount γ per denoising step."""
    gae_lambda: float = 0.95
    """λ of GAE."""
    critic_width: int = 256
    """Hidden width of the critic."""
    critic_lr: float = 1e-3
    """The critic's learning rate."""
    value_coef: float = 1.0
    """Weight c of the critic's loss; it scales the critic's gradient only."""
    kl_reward: float = 0.0
    """β of a KL to the base model in every step's reward, in the log-prob's reduction."""


class PPO(GRPO):
    """See the module's text; arguments as in `Agent`, with a `PPOConfig`."""

    name = "ppo"
    config_type = PPOConfig
    config: PPOConfig
    smallest_group = 1

    def _validate(self) -> None:
        super()._validate()
        if self.config.critic_width < 1 or self.config.critic_lr <= 0:
            raise ValueError(
                f"{self.name} needs a critic: critic_width and critic_lr must be positive (rloo, grpo and ddpo-is "
                "do without one)"
            )
        if not (self.config.gamma <= 1 and self.config.gae_lambda <= 1):
            raise ValueError("gamma and gae_lambda must lie in [0, 1]")
        if self.config.reward_aggregation != "advantages":
            raise ValueError(
                f"{self.name} has one critic for the weighted sum of the rewards: reward_aggregation "
                'must be "advantages"'
            )
        self.needs_reference = self.needs_reference or self.config.kl_reward > 0

    def make_modules(self) -> dict[str, nn.Module]:
        """The critic."""
        return {"critic": Critic(self.policy, self.config.critic_width, self.seed)}

    @property
    def critic(self) -> Critic:
        """V."""
        critic = self.modules["critic"]
        assert isinstance(critic, Critic)
        return critic

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The policy's parameters and the critic's, which have a learning rate of their own."""
        return [*super().parameter_groups(), {"params": list(self.critic.parameters()), "lr": self.config.critic_lr}]

    def step_rewards(self, rollout: Rollout) -> Tensor:
        """``[B, K]``: what each step earns; NaN in the last column of episodes that could not be scored."""
        rewards = torch.zeros_like(rollout.steps["action_log_prob"])
        rewards[:, -1] = rollout.scores.total
        if self.config.kl_reward:
            rewards -= self.config.kl_reward * self.reference_log_ratio(rollout)
        return rewards

    @torch.no_grad()
    def reference_log_ratio(self, rollout: Rollout) -> Tensor:
        """ℓ_old − ℓ_ref ``[B, K]`` of a rollout's actions; 0, without a network call, at deterministic steps."""
        found = torch.zeros_like(rollout.steps["action_log_prob"])
        size = self.microbatch or len(rollout)
        with self.policy.model.reference():
            for start in range(0, len(rollout), size):
                rows = slice(start, start + size)
                conditioning = rollout.conditioning[rollout.row[rows]]
                for k in rollout.kernel.stochastic.nonzero().flatten().tolist():
                    step = rollout.steps[rows, k]
                    reference = self.policy.transition(step["latents"], k, conditioning, rollout.kernel)
                    found[rows, k] = step["action_log_prob"] - self.policy.log_prob(reference, step["action"]).to(found)
        return found

    def gae(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Advantages before whitening and the critic's targets, both ``[B, K]``; 0 where there is no score."""
        values = self.critic.values(self.policy, rollout)
        rewards = self.step_rewards(rollout)
        after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
        deltas = rewards + self.config.gamma * after - values
        advantages = torch.zeros_like(deltas)
        running = torch.zeros_like(deltas[:, 0])
        for k in reversed(range(deltas.shape[1])):
            running = deltas[:, k] + self.config.gamma * self.config.gae_lambda * running
            advantages[:, k] = running
        valid = rollout.scores.valid[:, None]
        return advantages.where(valid, 0.0), (advantages + values).where(valid, values)

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """As in `TrajectoryAgent.targets`: the advantages and what the critic is fitted to, ``[B, K]``."""
        raw, returns = self.gae(rollout)
        return {"advantage": self.scale(raw, rollout.scores.valid[:, None].expand_as(raw)), "return": returns}

    def scale(self, raw: Tensor, valid: Tensor) -> Tensor:
        """Advantages as the loss takes them: whitened, clipped."""
        return self.over_all_rows(whiten, raw, valid).clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def auxiliary_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's squared error."""
        assert batch.examples is not None
        assert batch.conditioning is not None
        value = self.critic(batch.latents, batch.step, self.policy.model.pool(batch.conditioning))
        error = (value - batch.examples["return"]).square()
        return self.config.value_coef * error, {"value_loss": error}
