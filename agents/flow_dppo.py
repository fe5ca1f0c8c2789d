"""Flow-DPPO (Ping et al. 2026, arXiv:2606.11025): the trust region is a divergence, not a clipped ratio.

    L = −A ρ · 1[ not ( KL(π_old ‖ π_θ) ≥ δ  and  (A > 0 and ρ > 1, or A < 0 and ρ < 1) ) ]

A sample takes no part at a step whose policy has already moved by δ if the update would move it further. The KL is that
of the step's Gaussians, |μ_θ − μ_old|²/(2 std²) with the step's std, in the policy's reduction. Three random steps of
the first half are stochastic and trained, all others follow the ODE.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from agents.advantages import StdOver
from agents.base import SharedNoise
from agents.grpo import GRPO, GRPOConfig
from agents.trajectory import Batch
from agents.window import Reach, Strategy, WindowConfig, Windowed


@dataclass
class FlowDPPOConfig(WindowConfig, GRPOConfig):
    """Flow-DPPO's settings."""

    shared_noise: SharedNoise = "none"
    """Which samples start from the same initial noise: none, those of a group, or all of a rollout."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    advantage_std: StdOver = "rewards"
    """Which std divides the advantages: that of the group ("group"), that of all the rollout's gaps to their group's
    mean ("batch"), or that of all the rollout's rewards ("rewards", as published)."""
    timestep_fraction: float = 1.0
    """Share of the window's steps that each update trains, drawn at random."""
    window_size: int = 3
    """Size of the window: how many steps are stochastic and trained. They are neighbours, but with "scattered"."""
    window_strategy: Strategy = "scattered"
    """How the window moves between rollouts: from the noisy end to the clean end and then from the beginning again
    ("progressive"), to a random place ("random"), to random steps that need not be neighbours ("scattered"), like
    "progressive" but ever faster towards the clean end ("decay"), or not at all, at the noisy end ("frozen")."""
    window_reach: Reach = "first_half"
    """Which of the trainable steps the window may hold: all of them ("all"), those among the first K/2 of the K steps
    ("first_half", as published), or among the first K − 2 ("all_but_two")."""
    clip_range: float = 1e-5
    """δ: where a step's KL to the policy that sampled has reached it, only updates that bring the two closer count."""


class FlowDPPO(Windowed, GRPO):
    """Flow-DPPO: GRPO on a few random steps, with a divergence as its trust region."""

    name = "flow-dppo"
    config_type = FlowDPPOConfig
    config: FlowDPPOConfig
    needs_means = True

    def surrogate(self, batch: Batch, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """The unclipped surrogate, without the samples that would leave the trust region."""
        assert batch.old_mean is not None
        old = replace(batch.transition, mean=batch.old_mean)
        far = old.kl(batch.transition, self.policy.reduction).detach() >= self.config.clip_range
        kept = ~(far & ((batch.advantage * (ratio - 1)).detach() > 0))
        return (-batch.advantage * ratio).where(kept, 0.0), ~kept
