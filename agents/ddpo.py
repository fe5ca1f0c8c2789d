"""DDPO (Black et al. 2023, arXiv:2305.13301): policy gradients on the denoising MDP.

DDPO-SF, the score function estimator (its eq. 3), makes one optimizer step per rollout:

    L = −mean A ℓ_θ.

DDPO-IS, with importance sampling (its eq. 4), makes several, clipped as PPO does:

    L = mean max( −A ρ, −A clip(ρ, 1 ± ε) ),   ρ = exp(ℓ_θ − ℓ_old).

A is the reward, normalised by the last rewards of its prompt (`PromptTracker`) and clipped to |A| ≤ 5. There are no
groups and no KL, and every step is trained.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from agents.advantages import Aggregation, PromptTracker, whiten
from agents.rollout import Rollout
from agents.surrogate import ClippedSurrogate, SurrogateConfig
from agents.trajectory import Batch, TrajectoryAgent, TrajectoryConfig


@dataclass
class DDPOSFConfig(TrajectoryConfig):
    """DDPO-SF's settings."""

    group_size: int = 1
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    timestep_fraction: float = 1.0
    """Share of the trainable steps that each update trains, drawn at random."""
    drop_last: bool = False
    """Leave the last denoising step out of training."""
    reward_aggregation: Aggregation = "advantages"
    """How several rewards become one loss: add up their advantages, their losses, or the rewards themselves."""
    advantage_clip: float = 5.0
    """Advantages are clipped to the range from minus this to plus this."""
    normalisation: Literal["prompt", "batch"] = "prompt"
    """Normalise rewards by the last rewards of their prompt ("prompt", as published) or over the rollout ("batch")."""
    tracker_size: int = 32
    """Rewards remembered per prompt."""
    tracker_min_count: int = 16
    """A prompt with fewer remembered rewards than this is normalised over the rollout."""


class DDPOSF(TrajectoryAgent):
    """DDPO-SF: REINFORCE with a tracker per prompt."""

    name = "ddpo-sf"
    config_type: ClassVar[type[TrajectoryConfig]] = DDPOSFConfig
    on_policy = True

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("advantage_clip", "tracker_size", "tracker_min_count")
        if self.config.tracker_min_count > self.config.tracker_size:
            raise ValueError(
                f"tracker_min_count={self.config.tracker_min_count} is never reached: the tracker remembers "
                f"tracker_size={self.config.tracker_size} rewards"
            )

    def make_modules(self) -> dict[str, nn.Module]:
        """The trackers, one for each reward that is normalised by itself."""
        if self.config.normalisation == "batch":
            return {}
        prompts, config = int(self.policy.mdp.drawn.max()) + 1, self.config
        return {
            f"tracker {i}": PromptTracker(prompts, config.tracker_size, config.tracker_min_count)
            for i in range(len(self.tracked))
        }

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        names = [name for name in ("tracker_size", "tracker_min_count") if self.chosen(name)]
        idle = dict.fromkeys(names, 'there is no tracker with normalisation "batch"') if not self.modules else {}
        return super().idle_settings() | idle

    @property
    def tracked(self) -> list[str]:
        """The names of the rewards that are normalised by themselves, in the order of the trackers."""
        if self.config.reward_aggregation == "rewards":
            return ["total"]
        mdp = self.policy.mdp
        return [name for name in mdp.rewards if mdp.reward_weights[name]]

    def tracker(self, name: str) -> PromptTracker:
        """The tracker of the reward with this name."""
        tracker = self.modules[f"tracker {self.tracked.index(name)}"]
        assert isinstance(tracker, PromptTracker)
        return tracker

    def reward_advantages(self, name: str, rewards: Tensor, rollout: Rollout) -> Tensor:
        """As in `Agent.reward_advantages`, normalised per prompt; the trackers stay as they are."""
        if self.config.normalisation == "batch":
            return self.over_all_rows(whiten, rewards, rollout.scores.valid)
        normalise = self.tracker(name).normalise
        return self.over_all_rows(normalise, rewards, rollout.scores.valid, rollout.prompt_index)

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """As in `Agent.update`; then the trackers remember the rollout's rewards."""
        figures = super().update(rollout, iteration)
        rewards = {**rollout.scores.values, "total": rollout.scores.total}
        for name in self.tracked if self.modules else ():
            seen = (self.all_rows(rows) for rows in (rewards[name], rollout.scores.valid, rollout.prompt_index))
            self.tracker(name).remember(*seen)
        return figures

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `TrajectoryAgent.loss`: −A ℓ_θ, the score function estimator's loss."""
        return -batch.advantage * batch.log_prob, {}


@dataclass
class DDPOConfig(DDPOSFConfig, SurrogateConfig):
    """DDPO-IS's settings."""


class DDPO(ClippedSurrogate, DDPOSF):
    """DDPO-IS: clipped policy gradients with a tracker per prompt."""

    name = "ddpo-is"
    config_type = DDPOConfig
    on_policy = False
