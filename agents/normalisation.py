"""Advantages within groups of samples of one prompt, and how they are normalised; papers and their code differ in it.

    A = (r − mean of its group) / (std + ε)

| | std of | form | ε |
|---|---|---|---|
| DanceGRPO, MixGRPO | group | unbiased | 1e-8 |
| Flow-GRPO (GenEval), DiffusionNFT, AWM, CRD | rewards | population | 1e-4 |
| GRPO-Guard, TempFlow-GRPO, DGPO | group | population | 1e-4 |
| Flow-DPPO | rewards | unbiased | 1e-8 |
"""

from dataclasses import dataclass

from torch import Tensor

from agents.advantages import StdForm, StdOver, group_advantages
from agents.base import Agent
from agents.rollout import Rollout


@dataclass
class NormalisationConfig:
    """The settings of advantages that are normalised within groups."""

    advantage_std: StdOver = "group"
    """Which std divides the advantages: that of the group ("group"), that of all the rollout's gaps to their group's
    mean ("batch", where groups whose samples hardly differ weigh little), or that of all the rollout's rewards
    ("rewards")."""
    std_form: StdForm = "unbiased"
    """The std's divisor: the number of values less one ("unbiased"), or the number of values ("population")."""
    std_epsilon: float = 1e-8
    """Added to the std that divides the advantages."""


@dataclass
class PopulationNormalisationConfig(NormalisationConfig):
    """The same with the defaults of Flow-GRPO's code and of what was built on it."""

    std_form: StdForm = "population"
    """The std's divisor: the number of values less one ("unbiased"), or the number of values ("population", as
    published)."""
    std_epsilon: float = 1e-4
    """Added to the std that divides the advantages."""


@dataclass
class RolloutNormalisationConfig(PopulationNormalisationConfig):
    """The same with one std for all of a rollout's rewards."""

    advantage_std: StdOver = "rewards"
    """Which std divides the advantages: that of the group ("group"), that of all the rollout's gaps to their group's
    mean ("batch"), or that of all the rollout's rewards ("rewards", as published)."""


class Normalised(Agent):
    """Mixin for agents that compare the samples of a group; their config is a `NormalisationConfig` too."""

    smallest_group = 2

    @property
    def siblings(self) -> int:
        """How many neighbouring samples are compared: here a group."""
        return self.group_size

    def reward_advantages(self, name: str, rewards: Tensor, rollout: Rollout) -> Tensor:
        """As in `Agent.reward_advantages`, normalised within the group."""
        config = self.config
        options = {"over": config.advantage_std, "form": config.std_form, "epsilon": config.std_epsilon}
        valid = rollout.scores.valid
        return self.over_all_rows(group_advantages, rewards, valid, group_size=self.siblings, **options)
