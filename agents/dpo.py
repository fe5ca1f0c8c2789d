"""Online Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908): preferences between the model's own samples.

The samples of every group are paired, the better one winning. Both samples of a pair, winner w and loser l, are noised
with the same timestep and noise ε. With ε_θ the network's output,

    L = −log σ( −(β/2) [ (|ε − ε_θ^w|² − |ε − ε_ref^w|²) − (|ε − ε_θ^l|² − |ε − ε_ref^l|²) ] ),

where |·|² is averaged over dimensions, as in the published code, and ε_ref is the output of the model before training,
or of the trained weights some updates ago, as in the online form of Flow-GRPO's code, whose settings are the defaults.
DCPO (Saeidi et al. 2025, arXiv:2502.06023) gives the loser another caption. Here that is another training prompt, one
of those that share the most words with the right one.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import logsigmoid

from agents.draws import StepDraws
from agents.final_samples import Context, FinalSampleAgent, FinalSampleConfig, NoisedBatch, mean_square
from agents.rollout import Rollout
from denoise_env.seeding import episode_numbers
from denoise_env.weights import copies, follow


@dataclass
class DPOConfig(FinalSampleConfig):
    """Online Diffusion-DPO's settings."""

    group_size: int = 24
    """Neighbouring samples of one prompt, G. They form a group."""
    lr: float = 3e-4
    """AdamW's learning rate (published for LoRA)."""
    draws_per_sample: int = 39
    """How many (timestep, noise) pairs each pair of samples is trained at, T. Each takes one forward and one backward
    pass of both."""
    step_draws: StepDraws = "logit_normal"
    """How a sample's T steps are drawn from n noise levels: none twice before all have come once ("even"), one from
    each of T equal parts of them ("stratified"), or most often from the middle ("logit_normal": level ⌊n u⌋, where
    log(u/(1 − u)) is standard normal)."""
    beta: float = 100.0
    """Strength β of the pull towards the reference; 2000 to 5000 in the paper, which learns from given pairs."""
    reference_coef: float = 0.0
    """Weight of mean |output − the reference's output|²."""
    reference_every: int = 40
    """The trained weights become the reference after each so many optimizer steps, at the end of a rollout's update;
    with 0 it stays the model before training."""
    pairing: Literal["best_worst", "ranked"] = "best_worst"
    """Pairs per group: only the best sample with the worst ("best_worst"), or also the second best with the second
    worst and so on ("ranked")."""
    loser_caption: Literal["same", "perturbed"] = "same"
    """The loser's caption: the prompt it was drawn for ("same"), or another, similar prompt ("perturbed", DCPO)."""


class DPO(FinalSampleAgent):
    """Online Diffusion-DPO: preferences between the model's own samples."""

    name = "dpo"
    config_type = DPOConfig
    config: DPOConfig
    smallest_group = 2
    rows_per_example = 2
    whole_groups = True
    joins_rewards = "a sample has one place in its group's ranking"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.config.reference_every:
            self.kept["reference"] = copies(self.trained)

    def _validate(self) -> None:
        super()._validate()
        self.require_positive("beta")
        if self.config.reference_every < 0:
            raise ValueError(f"reference_every must be at least 0, not {self.config.reference_every}")
        self.needs_reference = not self.config.reference_every
        if self.config.loser_caption == "perturbed" and len(self.policy.mdp.drawn) < 2:
            raise ValueError(f"{self.name} needs at least two prompts for a loser's caption to differ")

    def targets(self, rollout: Rollout) -> dict[str, Tensor]:
        """P pairs: the winner's ``episode [P]``, the ``loser``'s ``[P]``, and whether a pair ``counts [P]``.

        A pair counts where both samples were scored and the winner's score is higher.
        """
        size, device = self.group_size, rollout.scores.total.device
        total = rollout.scores.total.view(-1, size).nan_to_num(nan=-torch.inf)
        order = total.argsort(stable=True, dim=1, descending=True)  # the unscored come last
        first = torch.arange(1 if self.config.pairing == "best_worst" else size // 2, device=device)
        last = rollout.scores.valid.view(-1, size).sum(1, keepdim=True) - 1 - first
        sides = order[:, : len(first)], order.gather(1, last.clamp(min=0))
        winner, loser = ((torch.arange(len(total), device=device)[:, None] * size + side).flatten() for side in sides)
        scores = total.flatten()
        counts = (last > first).flatten() & (scores[winner] > scores[loser])
        return {"episode": winner, "loser": loser, "counts": counts}

    def examples(self, rollout: Rollout, iteration: int) -> TensorDict:
        """As in `Agent.examples`: pairs, both samples noised with the winner's noise."""
        targets = self.targets(rollout)
        if self.config.loser_caption == "perturbed":
            numbers = episode_numbers([rollout.seeds[i] for i in targets["loser"].tolist()], "caption").flatten()
            prompts = rollout.prompt_index[targets["loser"]]
            wrong = [self._perturb(i, n) for i, n in zip(prompts.tolist(), numbers.tolist(), strict=True)]
            targets["caption"] = torch.tensor(wrong)
        draws = self.draws([rollout.seeds[i] for i in targets["episode"].tolist()], iteration)
        return draws.update({name: value[:, None].expand(draws.shape) for name, value in targets.items()})

    def _perturb(self, prompt: int, number: int) -> int:
        mdp = self.policy.mdp
        words = set(mdp.prompts[prompt].text.split())
        others = [i for i in mdp.drawn.tolist() if i != prompt]
        shared = torch.tensor([len(words & set(mdp.prompts[i].text.split())) for i in others])
        nearest = (shared == shared.max()).nonzero().flatten()
        return others[int(nearest[number % len(nearest)])]

    def others(self) -> dict[str, Context]:
        """As in `FinalSampleAgent.others`, with the kept weights as the reference where it is renewed."""
        kept = self.kept.get("reference")
        return {"reference": functools.partial(self.weights, kept)} if kept else super().others()

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """As in `Agent.update`; afterwards the trained weights may become the reference."""
        figures = super().update(rollout, iteration)
        every, steps = self.config.reference_every, self.config.updates_per_rollout * self.config.epochs
        if every and iteration * steps // every > (iteration - 1) * steps // every:
            follow(self.kept["reference"], self.trained, 0.0)
        return figures

    def conditioning(self, rollout: Rollout, examples: TensorDict) -> TensorDict:
        """The conditioning of the pairs' winners and then of their losers, ``[2n]``."""
        first = examples[:, 0]
        winner, loser = rollout.prompt_index[first["episode"]], rollout.prompt_index[first["loser"]]
        if self.config.loser_caption == "perturbed":
            loser = first["caption"].to(loser)
        return rollout.store.rows(torch.cat([winner, loser]))

    def complete(self, rollout: Rollout, examples: TensorDict, conditioning: TensorDict) -> TensorDict:
        """As in `FinalSampleAgent.complete`: the winners and then the losers ``[2n, T]``, in the same network calls."""
        sides = torch.cat([examples, examples.copy().set("episode", examples["loser"])])
        return super().complete(rollout, sides, conditioning)

    def loss(self, batch: NoisedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As in `FinalSampleAgent.loss`, ``[N/2]``; 0 for pairs that do not count."""
        reference: Any = batch.reference
        gap = mean_square(batch.output - batch.target) - mean_square(reference - batch.target)
        winner, loser = gap.chunk(2)
        logits = -self.config.beta / 2 * (winner - loser)
        counts = batch.examples["counts"].chunk(2)[0]
        figures = {"accuracy": (logits > 0).float(), "margin": logits.detach()}
        return (-logsigmoid(logits)).where(counts, 0.0), {n: value.where(counts, 0.0) for n, value in figures.items()}


@dataclass
class DCPOConfig(DPOConfig):
    """DCPO's settings."""

    loser_caption: Literal["same", "perturbed"] = "perturbed"
    """The loser's caption: the prompt it was drawn for ("same"), or another, similar prompt ("perturbed", DCPO)."""


class DCPO(DPO):
    """DCPO: online Diffusion-DPO with another caption for the loser."""

    name = "dcpo"
    config_type = DCPOConfig
