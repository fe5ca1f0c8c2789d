"""What agents share that learn from the log-probs of recorded denoising steps."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.advantages import Aggregation, add_losses
from agents.base import Agent, LearningConfig
from agents.policy import DenoisingPolicy
from agents.ranks import Ranks
from agents.rollout import Rollout
from agents.training.seeding import episode_numbers
from denoise_env.kernels import Kernel, Transition


@dataclass
class TrajectoryConfig(LearningConfig):
    """What every agent needs that trains recorded steps."""

    timestep_fraction: float = 0.6
    """Share of the trainable steps that each update recomputes: ceil(fraction · steps)."""
    timestep_selection: Literal["per_sample", "per_group"] = "per_sample"
    """Draw the random subset of steps for every sample (DanceGRPO's code) or once per group (its paper)."""
    step_weighting: Literal["uniform", "std"] = "uniform"
    """Weigh every step's policy loss alike (DDPO, DanceGRPO), or by its std over the trainable steps' mean
    (TempFlow-GRPO, in effect GRPO-Guard): a log-prob's gradient grows as 1/std, and the last steps drown the rest."""
    drop_last: bool = True
    """Never train the last denoising step, as DanceGRPO and Flow-GRPO do."""
    kl_coef: float = 0.0
    """Weight β of the KL to the model before training, in the log-prob's reduction; 0 spares the reference."""


@dataclass(frozen=True)
class Batch:
    """One microbatch of (episode, step) pairs, recomputed with gradient.

    Attributes:
        transition: the present policy's Gaussian.
        log_prob: ``[N]`` under the present policy, with gradient.
        old_log_prob: ``[N]`` as recorded in the rollout.
        advantage: ``[N]``.
        step: ``[N]``, k.
        latents: ``[N, *latent]``, x_k.
        action: ``[N, *latent]``, x_{k+1}.
        old_mean: ``[N, *latent]``, where the agent ``needs_means``.
        examples: ``[N]``, what `TrajectoryAgent.targets` gave.
        conditioning: ``[N]``.
    """

    transition: Transition
    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor
    step: Tensor
    latents: Tensor
    action: Tensor
    old_mean: Tensor | None = None
    examples: TensorDict | None = None
    conditioning: TensorDict | None = None


class TrajectoryAgent(Agent):
    """An agent whose examples are recorded steps; arguments and errors as in `Agent`.

    It says what the advantages of one reward are (``reward_advantages``), or else all that its examples hold
    (``targets``), and what the ``loss`` of a step is.
    """

    config_type = TrajectoryConfig
    aggregations: ClassVar[tuple[Aggregation, ...]] = ("advantages", "losses", "rewards")

    def __init__(
        self,
        policy: DenoisingPolicy,
        config: Any = None,
        seed: int = 0,
        microbatch: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(policy, config, seed, microbatch, ranks)
        stds = policy.kernel.stds.float()
        uniform = self.config.step_weighting == "uniform"
        weights = torch.ones_like(stds) if uniform else stds / stds[self.trainable_steps].mean()
        self.step_weights = weights.to(policy.model.device)

    def _validate(self) -> None:
        super()._validate()
        self.needs_reference = self.needs_reference or self.config.kl_coef > 0
        self.trainable_steps = self.steps_of(self.policy.kernel)
        if not len(self.trainable_steps):
            raise ValueError(
                f"no step of {self.policy.kernel!r} is left to train: use more num_steps, or drop_last=False"
            )
        if not 0 < self.config.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1], not {self.config.timestep_fraction}")

    def steps_of(self, kernel: Kernel) -> Tensor:
        """The steps of a kernel that can be trained."""
        trainable = kernel.stochastic.clone()
        if self.config.drop_last:
            trainable[-1] = False
        return trainable.nonzero().flatten()

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss ``[N]`` of a microbatch and figures ``[N]`` to log."""

    def auxiliary_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A loss ``[N]`` that ``step_weighting`` does not scale, a critic's say, and figures."""
        return None

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the examples hold, ``[B]`` or ``[B, K]`` by name: the "advantage", and what else the loss needs."""
        return self.advantages(rollout)

    def divergence(self, transition: Transition, reference: Transition, step: Tensor) -> Tensor:
        """What ``kl_coef`` weighs, ``[N]``: the KL in the policy's reduction."""
        return transition.kl(reference, self.policy.reduction)

    def select_steps(self, seeds: Sequence[int], kernel: Kernel | None = None) -> Tensor:
        """The steps to train ``[B, T]``, a random subset per row, T = ceil(fraction · trainable steps).

        A row's follow from its episode's seed, or "per_group" from that of its group's first episode.
        """
        trainable = self.trainable_steps if kernel is None else self.steps_of(kernel)
        count = math.ceil(self.config.timestep_fraction * len(trainable) - 1e-9)
        draws = self.group_size if self.config.timestep_selection == "per_group" else 1
        order = episode_numbers(seeds[::draws], "steps", len(trainable))
        return trainable[order.argsort(1)[:, :count]].repeat_interleave(draws, 0)

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`: (episode, step) pairs with their advantages."""
        rows = len(rollout)
        steps = self.select_steps(rollout.seeds, rollout.kernel)
        episode = torch.arange(rows)[:, None].expand(steps.shape)
        picked = {
            name: value.gather(1, steps.to(value.device)) if value.ndim > 1 else value[:, None].expand(steps.shape)
            for name, value in self.targets(rollout).items()
        }
        return TensorDict({"episode": episode, "step": steps, **picked}, batch_size=steps.shape)

    def complete(self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict) -> TensorDict:
        """As in `Agent.complete`: with ``kl_coef`` the reference's outputs ``[n, T, *latent]`` join the examples."""
        if not self.config.kl_coef:
            return examples
        with torch.no_grad(), self.policy.model.reference():
            columns = [
                self.policy.predict(rollout.steps["latents"][episode, step], step, conditioning)
                for episode, step in zip(examples["episode"].unbind(1), examples["step"].unbind(1), strict=True)
            ]
        return examples.copy().set("reference", torch.stack(columns, 1))

    def example_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `Agent.example_loss`."""
        rows, steps = examples["episode"], examples["step"]
        latents, action, old = (rollout.steps[key][rows, steps] for key in ("latents", "action", "action_log_prob"))
        transition = self.policy.transition(latents, steps, conditioning, rollout.kernel)
        log_prob = self.policy.log_prob(transition, action)
        old_mean = rollout.steps["mean"][rows, steps] if self.needs_means else None
        advantage = examples["advantage"]
        batch = Batch(transition, log_prob, old, advantage, steps, latents, action, old_mean, examples, conditioning)
        loss, figures = add_losses(examples, lambda e: self.loss(replace(batch, advantage=e["advantage"], examples=e)))
        loss = loss * self.step_weights[steps.to(loss.device)]
        difference = (log_prob - old).detach()
        dimensions = latents[0].numel() if self.policy.reduction == "mean" else 1
        figures |= {"ratio": difference.exp(), "kl_old": kl_estimate(dimensions * difference.double())}
        if self.config.kl_coef:
            reference = rollout.kernel.transition(latents, examples["reference"], steps)
            kl = self.divergence(transition, reference, steps)
            loss = loss + self.config.kl_coef * kl
            figures["kl_reference"] = kl
        if (more := self.auxiliary_loss(batch)) is not None:
            loss = loss + more[0]
            figures |= more[1]
        return loss, figures


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """KL(old ‖ new) from log new(x) − log old(x) of x ~ old, ``[N]`` float64: unbiased, and at least 0.

    It is k3 = exp(L) − 1 − L of Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), whose
    mean is the KL because exp(L) has the mean 1. L is that of all latent dimensions together. Beyond exp(500), where
    no sample tells the mean any more, it grows no further.
    """
    return log_ratio.clamp(max=500).expm1() - log_ratio
