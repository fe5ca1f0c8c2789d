"""The base of the agents that learn from the log-probs of recorded denoising steps."""

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
from denoise_env.kernels import Kernel, Transition
from denoise_env.seeding import episode_numbers


@dataclass
class TrajectoryConfig(LearningConfig):
    """The settings of every agent that trains recorded steps."""

    timestep_fraction: float = 0.6
    """Share of the trainable steps that each update trains, drawn at random."""
    timestep_rounding: Literal["ceil", "int"] = "ceil"
    """Round the number of these steps up ("ceil", DanceGRPO's paper), or down to at least 1 ("int", its code)."""
    timestep_selection: Literal["per_sample", "per_group"] = "per_sample"
    """Draw the steps to train for every sample ("per_sample", DanceGRPO's code) or once per group ("per_group", its
    paper)."""
    step_weighting: Literal["uniform", "std"] = "uniform"
    """Weigh every step's policy loss alike ("uniform": DDPO, DanceGRPO), or by the step's std divided by the mean std
    of the trainable steps ("std": TempFlow-GRPO, in effect GRPO-Guard). A log-prob's gradient grows as 1/std, so that
    with "uniform" the last steps, which have the smallest std, outweigh the others."""
    drop_last: bool = True
    """Leave the last denoising step out of training, as DanceGRPO and Flow-GRPO do."""
    kl_coef: float = 0.0
    """Weight β of the KL to the model before training, in the log-prob's reduction; with 0 the reference is not
    computed."""


@dataclass(frozen=True)
class Batch:
    """One microbatch of (episode, step) pairs, recomputed with gradient.

    Attributes:
        transition: the Gaussian of the policy as it is now.
        log_prob: ``[N]``, the action's under the policy as it is now, with gradient.
        old_log_prob: ``[N]``, the action's as recorded in the rollout.
        advantage: ``[N]``, of the step's action.
        step: ``[N]``, k.
        latents: ``[N, *latent]``, x_k.
        action: ``[N, *latent]``, x_{k+1}.
        old_mean: ``[N, *latent]``, the mean recorded in the rollout, where the agent ``needs_means``.
        examples: ``[N]``, what `TrajectoryAgent.targets` returned for these episodes and steps.
        conditioning: ``[N]``, of the episodes' prompts.
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

    A subclass defines the advantages of one reward (``reward_advantages``) or all that its examples hold (``targets``),
    and the ``loss`` of a step.
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
        trainable = kernel.stochastic & self.policy.model.trained_steps(kernel.schedule)
        if self.config.drop_last:
            trainable[-1] = False
        return trainable.nonzero().flatten()

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss ``[N]`` of a microbatch and figures ``[N]`` to log."""

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the examples hold by name: the "advantage" and what else the loss needs.

        ``[B, K]`` is of each step, and ``[B]`` or ``[B, 1, ...]`` of each episode.
        """
        return self.advantages(rollout)

    def divergence(self, transition: Transition, reference: Transition, step: Tensor) -> Tensor:
        """The divergence ``[N]`` that ``kl_coef`` weighs: here the KL in the policy's reduction.

        Args:
            transition: the Gaussians of the policy as it is now.
            reference: those of the model before training.
            step: ``[N]``, k.
        """
        return transition.kl(reference, self.policy.reduction)

    def select_steps(self, seeds: Sequence[int], kernel: Kernel | None = None) -> Tensor:
        """The steps to train ``[B, T]``, a random subset per episode, T = timestep_fraction · trainable steps, rounded.

        An episode's steps follow from its own seed, or with "per_group" from the seed of its group's first episode.
        Where a model has several networks, they are in the order of those that they call, so that a column calls few.

        Args:
            seeds: the seeds of B episodes.
            kernel: the kernel of their rollout; default: the policy's.
        """
        kernel = kernel or self.policy.kernel
        trainable = self.steps_of(kernel)
        count = self._counts(len(trainable))[self.config.timestep_rounding]
        draws = self.group_size if self.config.timestep_selection == "per_group" else 1
        order = episode_numbers(seeds[::draws], "steps", len(trainable))
        steps = trainable[order.argsort(1)[:, :count]]
        networks = self.policy.model.network_of(kernel.schedule)[steps]
        return steps.gather(1, networks.argsort(dim=1, stable=True)).repeat_interleave(draws, 0)

    def _counts(self, trainable: int) -> dict[str, int]:
        """How many of the trainable steps are trained, by how their number is rounded."""
        share = self.config.timestep_fraction * trainable
        return {"ceil": math.ceil(share - 1e-9), "int": max(1, int(share + 1e-9))}

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        found, kernel = super().idle_settings(), self.kernel(1)
        trainable = len(self.steps_of(kernel))
        counts = self._counts(trainable)
        if self.chosen("timestep_rounding") and counts["ceil"] == counts["int"]:
            found["timestep_rounding"] = "timestep_fraction times the trainable steps is a whole number"
        if self.chosen("timestep_selection") and counts[self.config.timestep_rounding] == trainable:
            found["timestep_selection"] = "every trainable step is trained"
        if self.chosen("drop_last") and not self.policy.kernel.stochastic[-1]:
            found["drop_last"] = "the last step is deterministic and cannot be trained"
        return found

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`: (episode, step) pairs with their advantages."""
        steps = self.select_steps(rollout.seeds, rollout.kernel)
        episode = torch.arange(len(rollout))[:, None].expand(steps.shape)

        def pick(value: Tensor) -> Tensor:
            if value.ndim == 2:
                return value.gather(1, steps.to(value.device))
            return value.view(len(value), 1, *value.shape[2:]).expand(*steps.shape, *value.shape[2:])

        picked = {name: pick(value) for name, value in self.targets(rollout).items()}
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
        episode, steps = examples["episode"], examples["step"]
        latents, action, old = (rollout.steps[key][episode, steps] for key in ("latents", "action", "action_log_prob"))
        transition = self.policy.transition(latents, steps, conditioning, rollout.kernel)
        log_prob = self.policy.log_prob(transition, action)
        old_mean = rollout.steps["mean"][episode, steps] if self.needs_means else None
        advantage = examples["advantage"]
        batch = Batch(transition, log_prob, old, advantage, steps, latents, action, old_mean, examples, conditioning)
        loss, figures = add_losses(examples, lambda e: self.loss(replace(batch, advantage=e["advantage"], examples=e)))
        loss = loss * self.step_weights[steps.to(loss.device)]
        difference = (log_prob - old).detach()
        dimensions = transition.dimensions if self.policy.reduction == "mean" else 1
        figures |= {"ratio": difference.exp(), "kl_old": kl_estimate(dimensions * difference.double())}
        if self.config.kl_coef:
            reference = rollout.kernel.transition(latents, examples["reference"], steps)
            kl = self.divergence(transition, reference, steps)
            loss = loss + self.config.kl_coef * kl
            figures["kl_reference"] = kl
        return loss, figures


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """An unbiased estimate of KL(old ‖ new), ``[N]`` float64 and ≥ 0, from L = log new(x) − log old(x), x ~ old.

    It is exp(L) − 1 − L, called k3 in Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).
    Its mean is the KL because exp(L) has the mean 1. L belongs to all latent dimensions together. In exp(L) it is cut
    at 500, so that the result stays finite.
    """
    return log_ratio.clamp(max=500).expm1() - log_ratio
