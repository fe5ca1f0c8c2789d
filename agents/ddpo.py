"""DDPO (Black et al. 2023, arXiv:2305.13301): policy gradients on the denoising MDP.

DDPO-SF, the score function estimator (its eq. 3), makes one optimizer step per rollout:

    L = −mean A ℓ_θ.

DDPO-IS, with importance sampling (its eq. 4), makes several, clipped as PPO does:

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

A is the reward normalised per prompt by a tracker of its last rewards, |A| ≤ 5; no groups, no KL, every step trained.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from agents.advantages import PromptTracker, whiten
from agents.grpo import GRPO, GRPOConfig
from agents.rollout import Rollout
from agents.trajectory import Batch


@dataclass
class DDPOConfig(GRPOConfig):
    """DDPO-IS: clipped policy gradients with a tracker per prompt."""

    group_size: int = 1
    """Neighbouring samples of one prompt."""
    shared_noise: bool = False
    """A group starts from the same initial noise."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update recomputes."""
    drop_last: bool = False
    """Never train the last denoising step."""
    normalisation: Literal["prompt", "batch"] = "prompt"
    """Normalise rewards per prompt by its last ones (published), or over the rollout."""
    tracker_size: int = 16
    """Rewards remembered per prompt."""
    tracker_min_count: int = 16
    """A prompt with fewer is normalised by the rollout."""


class DDPO(GRPO):
    """DDPO-IS; see the module's text; arguments as in `Agent`, with a `DDPOConfig`."""

    name = "ddpo-is"
    config_type = DDPOConfig
    config: DDPOConfig
    smallest_group = 1

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("tracker_size", "tracker_min_count")
        if self.config.tracker_min_count > self.config.tracker_size:
            raise ValueError(
                f"tracker_min_count={self.config.tracker_min_count} is never reached: the tracker remembers "
                f"tracker_size={self.config.tracker_size} rewards"
            )

    def make_modules(self) -> dict[str, nn.Module]:
        """The trackers, one per reward."""
        if self.config.normalisation == "batch":
            return {}
        prompts, config = len(self.policy.mdp.prompts.texts), self.config
        return {
            f"tracker {i}": PromptTracker(prompts, config.tracker_size, config.tracker_min_count)
            for i in range(len(self.policy.mdp.rewards))
        }

    def reward_advantages(self, rollout: Rollout) -> dict[str, Tensor]:
        """As in `GRPO.reward_advantages`; the trackers remember the rollout's rewards."""
        scores, prompts = rollout.scores, rollout.prompt_index
        if self.config.normalisation == "batch":
            return {name: self.over_all_rows(whiten, values, scores.valid) for name, values in scores.values.items()}
        named = zip(self.modules.values(), scores.values.items(), strict=True)
        found = {}
        for tracker, (name, values) in named:
            assert isinstance(tracker, PromptTracker)
            found[name] = self.over_all_rows(tracker.normalise, values, scores.valid, prompts)
        return found


@dataclass
class DDPOSFConfig(DDPOConfig):
    """DDPO-SF: REINFORCE with a tracker per prompt."""


class DDPOSF(DDPO):
    """DDPO-SF; see the module's text; arguments as in `Agent`, with a `DDPOSFConfig`."""

    name = "ddpo-sf"
    config_type = DDPOSFConfig
    on_policy = True

    def surrogate(self, batch: Batch, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The score function estimator's loss."""
        return -advantage * batch.log_prob, ratio != ratio
