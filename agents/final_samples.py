"""The base of the agents that noise finished samples anew and learn to denoise them: no log-probs and no SDE needed."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.advantages import add_losses
from agents.base import Agent, LearningConfig
from agents.draws import StepDraws, draw_noise, draw_steps
from agents.rollout import Rollout
from denoise_env.seeding import row_seeds

Context = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass
class FinalSampleConfig(LearningConfig):
    """The settings of every agent that trains on finished samples."""

    draws_per_sample: int = 6
    """How many (timestep, noise) pairs each sample is trained at, T, in every epoch anew. Each takes one forward and
    one backward pass."""
    rollout_solver: Literal["kernel", "dpm_solver"] = "kernel"
    """What collects the rollouts: the policy's transition kernel ("kernel"), or the deterministic DPM-Solver++ 2M
    ("dpm_solver")."""
    step_draws: StepDraws = "even"
    """How a sample's T steps are drawn from n noise levels: none twice before all have come once ("even"), one from
    each of T equal parts of them ("stratified"), or most often from the middle ("logit_normal": level ⌊n u⌋, where
    log(u/(1 − u)) is standard normal)."""
    step_range: tuple[float, float] = (0.0, 1.0)
    """Which of the K noise levels are drawn from: those between these two shares of them, counted from the noisiest and
    rounded to more levels. 0 and 0.5 are the noisier half."""
    shared_steps: bool = False
    """Draw the T steps once for all samples of a rollout, instead of for each."""
    reference_coef: float = 0.0
    """Weight of mean |output − base model's output|²; with 0 the reference is not computed."""
    reference_guidance: float = 0.0
    """Scale of the classifier-free guidance of the base model's output in it; with 0 that of the policy."""


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
        low, high = self.config.step_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"step_range must be two shares between 0 and 1, the first smaller, not {low} and {high}")
        self.needs_reference = self.needs_reference or self.config.reference_coef > 0
        if self.config.reference_guidance and self.policy.model.guidance_scale is None:
            raise ValueError(f"{type(self.policy.model).__name__} has no guidance: set reference_guidance to 0")

    def idle_settings(self) -> dict[str, str]:
        """As in `Agent.idle_settings`."""
        idle = self.config.reference_guidance and not self.config.reference_coef
        return super().idle_settings() | ({"reference_guidance": "reference_coef is 0"} if idle else {})

    def rollout_options(self, iteration: int) -> dict[str, Any]:
        """As in `Agent.rollout_options`, with the solver that ``rollout_solver`` names."""
        options = super().rollout_options(iteration)
        if self.config.rollout_solver == "dpm_solver":
            options["solver_steps"] = range(self.policy.mdp.num_steps)
        return options

    @abstractmethod
    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the loss needs of each episode, by name: tensors ``[B]``, which join the examples."""

    @abstractmethod
    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss ``[N]`` of a microbatch and figures ``[N]`` to log."""

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`: every sample with the steps and noises that `draws` gives it."""
        entries = self.targets(rollout)
        draws = self.draws(rollout.seeds, iteration)
        spread = {name: value[:, None].expand(-1, draws.shape[1]) for name, value in entries.items()}
        episode = torch.arange(len(rollout))[:, None].expand(draws.shape)
        return draws.update({"episode": episode, **spread})

    def draws(self, seeds: Sequence[int], iteration: int) -> TensorDict:
        """``step`` and ``noise [N, E T]`` for N episodes of an iteration, T for each of its E epochs.

        Everything follows from the episode's seed; with ``shared_steps`` the steps follow from the agent's seed and the
        iteration.
        """
        config, times = self.config, self.config.draws_per_sample * self.config.epochs
        own = row_seeds(self.seed, "steps", iteration, 1) if config.shared_steps else seeds
        step = draw_steps(own, times, self.policy.mdp.num_steps, config.step_draws, config.step_range)
        noise = self.draw_noise(seeds, times).to(self.policy.model.device)
        return TensorDict({"step": step.expand(len(seeds), -1), "noise": noise}, batch_size=(len(seeds), times))

    def draw_noise(self, seeds: Sequence[int], times: int) -> Tensor:
        """The noises ``[N, times, *latent]`` of N episodes."""
        return draw_noise(seeds, times, self.policy.model.latent_shape)

    def visit(self, examples: TensorDict, epoch: int) -> TensorDict:
        """As in `Agent.visit`: every epoch has T draws of its own."""
        times = self.config.draws_per_sample
        return examples[:, epoch * times : (epoch + 1) * times]

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

    def predict(self, noisy: Tensor, step: Tensor, conditioning: TensorDict, guidance: float | None = None) -> Tensor:
        """The network's output in float32 or better: the losses take differences that bf16 would round away."""
        return precise(self.policy.predict(noisy, step, conditioning, guidance))

    def others(self) -> dict[str, Context]:
        """The other weights whose outputs the loss needs: a name → a context in which the policy has those weights."""
        return {"reference": self.policy.model.reference} if self.needs_reference else {}

    def complete(self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict) -> TensorDict:
        """As in `Agent.complete`: the outputs ``[n, T, *latent]`` of the weights in `others` join the examples."""
        found = {}
        for name, weights in self.others().items():
            guidance = self.config.reference_guidance or None if name == "reference" else None
            with torch.no_grad(), weights():
                columns = [
                    self.predict(self.noised(*self.sample(rollout, column))[0], column["step"], conditioning, guidance)
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
        more, shown = self.penalty(batch)
        return loss + more, {**figures, **shown}

    def penalty(self, batch: NoisedBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        """A loss ``[n]`` beside that of the rewards, here the pull to the reference, and figures ``[n]`` to log."""
        if not self.config.reference_coef:
            return 0.0, {}
        assert batch.reference is not None
        distance = mean_square(batch.output - batch.reference).view(self.rows_per_example, -1).mean(0)
        return self.config.reference_coef * distance, {"reference_distance": distance}


def precise(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_square(x: Tensor) -> Tensor:
    """Mean over all but the first dimension, ``[B]``."""
    return x.flatten(1).square().mean(1)
