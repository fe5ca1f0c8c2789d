"""The base of the agents that noise finished samples anew and learn to denoise them: no log-probs and no SDE needed."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.advantages import add_losses
from agents.base import Agent, LearningConfig
from agents.rollout import Rollout
from agents.training.seeding import episode_numbers


@dataclass
class FinalSampleConfig(LearningConfig):
    """The settings of every agent that trains on finished samples."""

    draws_per_sample: int = 6
    """How many (timestep, noise) pairs each sample is trained at, T. Each takes one forward and one backward pass."""
    reference_coef: float = 0.0
    """Weight of mean |output − base model's output|²; with 0 the reference is not computed."""


@dataclass(frozen=True)
class NoisedBatch:
    """One microbatch of finished samples, noised and denoised.

    Attributes:
        x0: ``[N, *latent]``, the samples.
        noisy: ``[N, *latent]``, x_t = α x0 + σ ε, as the network saw it.
        step: ``[N]``, the denoising step whose α, σ and timestep were used.
        output: ``[N, *latent]``, the network's output, with gradient.
        target: ``[N, *latent]``, the output that would be right for x0 and ε.
        reference: ``[N, *latent]``, the base model's output, where it is needed.
        examples: ``[N]``, what `FinalSampleAgent.targets` returned for these samples.
        conditioning: ``[N]``, of these samples' prompts.
    """

    x0: Tensor
    noisy: Tensor
    step: Tensor
    output: Tensor
    target: Tensor
    reference: Tensor | None
    examples: TensorDict
    conditioning: TensorDict


class FinalSampleAgent(Agent):
    """An agent whose examples are finished samples; arguments and errors as in `Agent`."""

    config_type = FinalSampleConfig
    needs_density = False

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("draws_per_sample")
        self.needs_reference = self.needs_reference or self.config.reference_coef > 0

    @abstractmethod
    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the loss needs of each episode, by name: tensors ``[B]``, which join the examples."""

    @abstractmethod
    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss ``[N]`` of a microbatch and figures ``[N]`` to log."""

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`: every sample with T steps, evenly spread and in random order, and T noises."""
        entries = self.targets(rollout)
        draws = self.draws(rollout.seeds)
        spread = {name: value[:, None].expand(-1, draws.shape[1]) for name, value in entries.items()}
        episode = torch.arange(len(rollout))[:, None].expand(draws.shape)
        return draws.update({"episode": episode, **spread})

    def draws(self, seeds: Sequence[int]) -> TensorDict:
        """``step [N, T]`` and ``noise [N, T, *latent]`` for N episodes.

        An episode's T steps are drawn from the K noise levels; none comes twice before all have come once. Everything
        follows from the episode's seed.
        """
        policy, times, episodes = self.policy, self.config.draws_per_sample, len(seeds)
        steps = policy.mdp.num_steps
        laps = -(-times // steps)
        step = (
            episode_numbers(seeds, "steps", laps * steps).view(episodes, laps, steps).argsort(2).flatten(1)[:, :times]
        )
        noise, random = torch.empty(episodes, times, *policy.model.latent_shape), torch.Generator()
        for own, seed in zip(noise.unbind(), episode_numbers(seeds, "noise").flatten().tolist(), strict=True):
            own.normal_(generator=random.manual_seed(seed))
        return TensorDict({"step": step, "noise": noise.to(policy.model.device)}, batch_size=(episodes, times))

    def noised(self, x0: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Samples ``x0 [N, *latent]`` noised to ``step [N]``, in their storage dtype, and the right output."""
        schedule, kind, stored = self.policy.mdp.schedule, self.policy.model.prediction_type, x0.dtype
        x0 = precise(x0)
        shape = (-1, *[1] * (x0.ndim - 1))
        alpha, sigma = (t[step.cpu()].to(x0).view(shape) for t in (schedule.alphas, schedule.sigmas))
        noise = noise.to(x0)
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: x0,
            "v_prediction": lambda: alpha * noise - sigma * x0,
            "flow_prediction": lambda: noise - x0,
        }[kind]()
        return (alpha * x0 + sigma * noise).to(stored), target

    def predict(self, noisy: Tensor, step: Tensor, conditioning: TensorDict) -> Tensor:
        """The network's output in float32 or better: the losses take differences that bf16 would round away."""
        return precise(self.policy.predict(noisy, step, conditioning))

    def others(self) -> dict[str, Callable[[], contextlib.AbstractContextManager[None]]]:
        """The other weights whose outputs the loss needs: a name → a context in which the policy has those weights."""
        return {"reference": self.policy.model.reference} if self.needs_reference else {}

    def complete(self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict) -> TensorDict:
        """As in `Agent.complete`: the outputs ``[n, T, *latent]`` of the weights in `others` join the examples."""
        found = {}
        for name, weights in self.others().items():
            with torch.no_grad(), weights():
                columns = [
                    self.predict(self.noised(*self.sample(rollout, column))[0], column["step"], conditioning)
                    for column in examples.unbind(1)
                ]
            found[name] = torch.stack(columns, 1)
        return examples.copy().update(found)

    def sample(self, rollout: Rollout, examples: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `noised` for examples ``[N]``: samples, steps and noises."""
        return rollout.final_latents[examples["episode"]], examples["step"], examples["noise"]

    def example_loss(
        self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `Agent.example_loss`."""
        x0, step, noise = self.sample(rollout, examples)
        noisy, target = self.noised(x0, step, noise)
        output = self.predict(noisy, step, conditioning)
        batch = NoisedBatch(x0, noisy, step, output, target, examples.get("reference"), examples, conditioning)
        loss, figures = add_losses(batch.examples, lambda e: self.loss(replace(batch, examples=e)))
        if self.config.reference_coef:
            assert batch.reference is not None
            distance = mean_square(batch.output - batch.reference).view(self.rows_per_example, -1).mean(0)
            loss = loss + self.config.reference_coef * distance
            figures["reference_distance"] = distance
        return loss, figures


def precise(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_square(x: Tensor) -> Tensor:
    """Mean over all but the first dimension, ``[B]``."""
    return x.flatten(1).square().mean(1)
