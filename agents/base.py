"""The update loop that policy-gradient agents share; an algorithm adds its advantages and its loss."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.policy import DenoisingPolicy
from agents.rollout import Rollout
from agents.seeding import generator
from denoise_env.kernels import Transition


@dataclass
class AgentConfig:
    """What every policy-gradient agent needs."""

    lr: float = 1e-4
    """AdamW's learning rate, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to at most this norm."""
    updates_per_rollout: int = 1
    """Optimizer steps per rollout, each on its own equal part of the episodes (and whole groups)."""
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
    ema_decay: float = 0.0
    """Evaluate, sample and export an exponential moving average of the weights; 0 is off."""


@dataclass(frozen=True)
class Batch:
    """One microbatch of (episode, step) pairs, recomputed with gradient.

    Attributes:
        transition: the present policy's Gaussian.
        log_prob: ``[N]`` under the present policy, with gradient.
        old_log_prob: ``[N]`` as recorded in the rollout.
        advantage: ``[N]``.
    """

    transition: Transition
    log_prob: Tensor
    old_log_prob: Tensor
    advantage: Tensor


class Agent(ABC):
    """A policy and an ``update``.

    Args:
        policy: acts and is trained.
        config: the algorithm's.
        seed: of the agent's own draws.
        microbatch: (episode, step) pairs per network call; use the rollout's. It bounds the memory and does
            not change the result.

    Raises:
        ValueError: the policy lacks what the algorithm needs.
    """

    name: ClassVar[str]
    group_size: int = 1
    shared_noise: bool = False

    def __init__(
        self, policy: DenoisingPolicy, config: AgentConfig, seed: int = 0, microbatch: int | None = None
    ) -> None:
        self.policy = policy
        self.config = config
        self.seed = seed
        self.microbatch = microbatch
        self.parameters = list(policy.model.trainable().values())
        trainable = policy.kernel.stochastic.clone()
        if config.drop_last:
            trainable[-1] = False
        self.trainable_steps = trainable.nonzero().flatten()
        self._validate()
        stds = policy.kernel.stds.float()
        weights = stds / stds[self.trainable_steps].mean() if config.step_weighting == "std" else torch.ones_like(stds)
        self.step_weights = weights.to(policy.model.device)
        fused = all(p.device.type in ("cpu", "cuda") for p in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.lr, config.betas, weight_decay=config.weight_decay, fused=fused
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay else []
        if config.kl_coef:
            policy.model.keep_reference()

    def _validate(self) -> None:
        config, kernel = self.config, self.policy.kernel
        if not kernel.stochastic.any():
            raise ValueError(
                f"{self.name} needs log-probs, and the kernel {kernel!r} is deterministic: use a stochastic one "
                'with eta > 0 ("ddim" on a diffusion; "dance_sde", "flow_sde" or "cps" on a flow)'
            )
        if not len(self.trainable_steps):
            raise ValueError(f"no step of {kernel!r} is left to train: use more num_steps, or drop_last=False")
        if not 0 < config.timestep_fraction <= 1:
            raise ValueError(f"timestep_fraction must lie in (0, 1], not {config.timestep_fraction}")
        if not 0 <= config.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), not {config.ema_decay}")
        for name in ("lr", "weight_decay", "kl_coef"):
            if not (math.isfinite(getattr(config, name)) and getattr(config, name) >= 0):
                raise ValueError(f"{name} must be a finite number ≥ 0, not {getattr(config, name)}")
        for name in ("max_grad_norm", "updates_per_rollout"):
            if not getattr(config, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(config, name)}")

    def check_rows(self, rows: int) -> None:
        """Refuse a rollout size that groups, updates or microbatches do not divide with a ``ValueError``."""
        updates = self.config.updates_per_rollout
        if rows % (updates * self.group_size):
            raise ValueError(
                f"{rows} episodes per rollout cannot be divided into updates_per_rollout={updates} parts of whole "
                f"groups of {self.group_size}"
            )
        if self.microbatch and (rows // updates) % self.microbatch:
            raise ValueError(
                f"the {rows // updates} episodes of one update cannot be divided into microbatches of {self.microbatch}"
            )

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """``[B]`` float32, one per episode; 0 for episodes that could not be scored."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss ``[N]`` of a microbatch and figures ``[N]`` to log."""

    def select_steps(self, rows: int, iteration: int) -> Tensor:
        """The steps to train ``[B, T]``, a random subset per row, T = ceil(fraction · trainable steps)."""
        available = len(self.trainable_steps)
        count = math.ceil(self.config.timestep_fraction * available - 1e-9)
        draws = self.group_size if self.config.timestep_selection == "per_group" else 1
        order = torch.rand(rows // draws, available, generator=generator(self.seed, "steps", iteration))
        return self.trainable_steps[order.argsort(1)[:, :count]].repeat_interleave(draws, 0)

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Train on a rollout.

        Args:
            rollout: of this agent's policy, with its parameters as they are now.
            iteration: numbers the agent's random draws.

        Returns:
            Figures to log, averages over the rollout's updates.

        Raises:
            FloatingPointError: the gradient is not finite; the weights are as before that step.
        """
        rows, updates = len(rollout), self.config.updates_per_rollout
        self.check_rows(rows)
        advantages = self.advantages(rollout)
        steps = self.select_steps(rows, iteration)
        part = rows // updates
        results = [self._optimize(rollout, advantages, steps, start, start + part) for start in range(0, rows, part)]
        figures = {name: sum(result[name] for result in results) / updates for name in results[0]}
        return {**figures, "ratio_deviation": max(result["ratio_deviation"] for result in results)}

    def _optimize(self, rollout: Rollout, advantages: Tensor, steps: Tensor, start: int, end: int) -> dict[str, float]:
        """One optimizer step on episodes ``start`` to ``end``."""
        size = self.microbatch or end - start
        pairs = (end - start) * steps.shape[1]
        sums: dict[str, Tensor] = {}
        deviation = advantages.new_zeros(())
        for first in range(start, end, size):
            rows = torch.arange(first, first + size)
            conditioning = rollout.conditioning[rollout.row[rows]]
            for j in range(steps.shape[1]):
                loss, figures = self._evaluate(rollout, advantages, rows, steps[rows, j], conditioning)
                (loss.sum() / pairs).backward()
                deviation = torch.maximum(deviation, (figures["ratio"] - 1).abs().max())
                for name, value in {**figures, "loss": loss}.items():
                    sums[name] = sums.get(name, 0) + value.detach().sum()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not norm.isfinite():
            self.optimizer.zero_grad()
            raise FloatingPointError(
                "the gradient is not finite: lower the learning rate, use dtype fp32, or look for a reward that "
                "explodes"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, list[Tensor](self.parameters), 1 - self.config.ema_decay)
        result = {name: value.item() / pairs for name, value in sums.items()}
        return {**result, "ratio_deviation": deviation.item(), "grad_norm": norm.item()}

    def _evaluate(
        self, rollout: Rollout, advantages: Tensor, rows: Tensor, steps: Tensor, conditioning: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        latents, action, old = (rollout.steps[key][rows, steps] for key in ("latents", "action", "action_log_prob"))
        transition = self.policy.transition(latents, steps, conditioning)
        log_prob = self.policy.log_prob(transition, action)
        loss, figures = self.loss(Batch(transition, log_prob, old, advantages[rows]))
        loss = loss * self.step_weights[steps.to(loss.device)]
        # Var[log-ratio] = 2 KL for the joint log-ratio, D times the averaged one
        scale = latents[0].numel() if self.policy.reduction == "mean" else 1
        difference = (log_prob - old).detach()
        figures |= {"ratio": difference.exp(), "kl_old": (scale * difference).square() / 2}
        if self.config.kl_coef:
            with torch.no_grad(), self.policy.model.reference():
                reference = self.policy.transition(latents, steps, conditioning)
            kl = transition.kl(reference, self.policy.reduction)
            loss = loss + self.config.kl_coef * kl
            figures["kl_reference"] = kl
        return loss, figures

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Inside, the policy has the averaged weights, where there are any."""
        for p, average in zip(self.parameters, self.average, strict=False):
            p.data, average.data = average.data, p.data
        try:
            yield
        finally:
            for p, average in zip(self.parameters, self.average, strict=False):
                p.data, average.data = average.data, p.data

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to continue, by name."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.policy.model.trainable().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        return tensors | {f"average.{i}": value for i, value in enumerate(self.average)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from ``state``'s tensors.

        Raises:
            ValueError: they belong to another architecture or configuration.
        """
        parameters = self.policy.model.trainable()
        expected = {f"weights.{name}": tuple(p.shape) for name, p in parameters.items()}
        found = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("weights.")}
        if found != expected:
            odd = sorted(dict(found.items() ^ expected.items()))[0]
            raise ValueError(
                f"the checkpoint holds another architecture: {odd} is {found.get(odd, 'missing')} in it and "
                f"{expected.get(odd, 'absent')} in the model"
            )
        if bool(self.average) != ("average.0" in tensors):
            raise ValueError("the checkpoint and ema_decay disagree on whether weights are averaged")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(tensors[f"weights.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                state.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for i, average in enumerate(self.average):
            average.copy_(tensors[f"average.{i}"])
