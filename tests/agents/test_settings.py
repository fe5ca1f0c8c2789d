"""No agent has a setting that nothing reads."""

import copy
import dataclasses
import sys
import typing

import pytest

from agents.algorithms import AGENTS
from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators

ON = {"kl_coef": 0.1, "kl_reward": 0.1, "reference_coef": 0.1, "ema_decay": 0.5, "old_decay_slope": 0.2}
SMALL = {"group_size": 4, "window_size": 2, "window_every": 1, "critic_width": 8, "tracker_size": 6}
CHECKS = {"_validate", "require_positive"}


def spied(config, read):
    """A copy of the configuration that notes which settings are read: not by being checked, copied or written down."""

    class Spied(type(config)):
        def __getattribute__(self, name):
            caller = sys._getframe(1)
            if caller.f_code.co_name not in CHECKS and caller.f_globals["__name__"] != "dataclasses":
                read.add(name)
            return super().__getattribute__(name)

    found = copy.copy(config)
    found.__class__ = Spied
    return found


def variants(kind):
    """(setting, configuration): everything on that costs something, and then every choice there is."""
    fields, hints = dataclasses.fields(kind.config_type), typing.get_type_hints(kind.config_type)
    several = {} if kind.on_policy else {"updates_per_rollout": 2, "epochs": 2}
    changes = {**ON, **SMALL, "tracker_min_count": 6, **several}
    known = {field.name for field in fields}
    config = kind.config_type(**{name: value for name, value in changes.items() if name in known})
    yield None, config
    for name in known:
        for choice in (False, True) if hints[name] is bool else typing.get_args(hints[name]):
            if isinstance(choice, bool | str) and choice != getattr(config, name):
                yield name, dataclasses.replace(config, **{name: choice})


def unread(kind):
    """The settings that nothing reads, whatever is chosen, in an iteration; one with one choice is never ignored."""
    read, accepted, refused = set(), set(), set()
    for name, config in variants(kind):
        mdp = DenoisingMDP.make("points", num_steps=5)
        try:
            agent = kind(DenoisingPolicy(mdp), spied(config, read))
        except ValueError:
            refused.add(name)
            continue
        accepted.add(name)
        prompts = ["ring", "line"] if agent.group_size == 4 else ["ring"] * 8
        with agent.rollout_weights():
            rollout = collect(mdp, agent.policy, row_generators(range(8)), prompts, **agent.rollout_options(1))
        agent.update(rollout, 1)
        assert agent.best_of >= 1
    return {field.name for field in dataclasses.fields(kind.config_type)} - read - (refused - accepted)


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_every_setting_is_read(name):
    assert unread(AGENTS[name]) == set()


def test_a_setting_that_nothing_reads_is_found():
    @dataclasses.dataclass
    class Config(GRPOConfig):
        forgotten: float = 1.0
        only_checked: float = 1.0
        used: float = 1.0

    class Forgetful(GRPO):
        config_type = Config

        def _validate(self):
            super()._validate()
            assert self.config.only_checked
            self.require_positive("only_checked")
            assert dataclasses.asdict(self.config)

        def loss(self, batch):
            loss, figures = super().loss(batch)
            return self.config.used * loss, figures

    assert unread(Forgetful) == {"forgotten", "only_checked"}
