"""The base of agents on finished samples whose loss compares samples at the weights of each optimizer step."""

import contextlib
from abc import abstractmethod

import torch
from tensordict import TensorDict
from torch import Tensor

from agents.final_samples import Context
from agents.old_weights import OldWeights
from agents.rollout import Rollout


class ComparingAgent(OldWeights):
    """An agent that compares all samples of an optimizer step; arguments and errors as in `Agent`.

    Before each optimizer step the samples' ``distance`` is measured at the present weights and at those of
    ``measured``: a pass without gradient, in the microbatches of the step, so that they do not change the result. From
    the distances ``compare`` makes what the loss of a single sample needs.
    """

    whole_groups = True

    @abstractmethod
    def distance(self, gap: Tensor) -> Tensor:
        """How far the outputs are from the right ones, ``[N]``; ``gap [N, *latent]`` is their difference."""

    @abstractmethod
    def measured(self) -> dict[str, Context]:
        """The other weights that samples are measured at: a name → a context in which the policy has those weights."""

    @abstractmethod
    def compare(self, examples: TensorDict) -> dict[str, Tensor]:
        """What joins the examples ``[N, T]`` of an optimizer step.

        They hold the distances ``[N, T]`` as ``now`` and by the names in ``measured``.
        """

    def others(self) -> dict[str, Context]:
        """As in `FinalSampleAgent.others`: the reference, where it pulls."""
        return {"reference": self.policy.model.reference} if self.config.reference_coef else {}

    def _optimize(self, rollout: Rollout, examples: TensorDict) -> dict[str, float]:
        size = self.microbatch or len(examples)
        distances = torch.cat([self._measure(rollout, chunk) for chunk in examples.split(size)])
        examples = examples.copy().update(distances)
        return super()._optimize(rollout, examples.update(self.compare(examples)))

    @torch.no_grad()
    def _measure(self, rollout: Rollout, examples: TensorDict) -> TensorDict:
        """The distances ``[n, T]`` of a microbatch, by the names of the weights."""
        conditioning = self.conditioning(rollout, examples)
        found: dict[str, Tensor] = {}
        for name, weights in {"now": contextlib.nullcontext, **self.measured()}.items():
            with weights():
                columns = []
                for column in examples.unbind(1):
                    noisy, target = self.noised(*self.sample(rollout, column))
                    columns.append(self.distance(self.predict(noisy, column["step"], conditioning) - target))
            found[name] = torch.stack(columns, 1)
        return TensorDict(found, batch_size=examples.batch_size)
