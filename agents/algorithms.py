"""The agents by name."""

from agents.awm import AWM
from agents.base import Agent, AgentConfig
from agents.controls import Base, BestOfN, ShuffledReward, ZeroLR
from agents.crd import CRD
from agents.ddpo import DDPO, DDPOSF
from agents.dgpo import DGPO
from agents.dpo import DCPO, DPO
from agents.dpok import DPOK
from agents.flow_dppo import FlowDPPO
from agents.flow_grpo import FlowGRPO
from agents.flow_grpo_fast import FlowGRPOFast
from agents.grpo import GRPO
from agents.grpo_guard import GRPOGuard
from agents.mix_grpo import MixGRPO
from agents.nft import NFT
from agents.ppo import PPO
from agents.rloo import RLOO
from agents.rwr import RWR
from agents.tempflow import TempFlow
from denoise_env.naming import load_attribute, suggest

AGENTS: dict[str, type[Agent]] = {
    agent.name: agent
    for agent in (
        GRPO,
        FlowGRPO,
        FlowGRPOFast,
        MixGRPO,
        TempFlow,
        GRPOGuard,
        FlowDPPO,
        DDPOSF,
        DDPO,
        DPOK,
        PPO,
        RLOO,
        RWR,
        NFT,
        AWM,
        DGPO,
        CRD,
        DPO,
        DCPO,
        Base,
        BestOfN,
        ZeroLR,
        ShuffledReward,
    )
}
"""Name → agent. A new agent is a file of its own, an import and a line here."""


def find_agent(name: str) -> type[Agent]:
    """The agent of a name in `AGENTS`, or of ``module:attribute`` for one of your own.

    Raises:
        ValueError: there is no such agent, or what was found is no subclass of `Agent` an abstract one,
            or one without settings.
    """
    if name in AGENTS:
        return AGENTS[name]
    if ":" not in name:
        raise ValueError(f"unknown agent {name!r}; {suggest(name, AGENTS)} Or name your own as 'module:class'.")
    found = load_attribute(name, "agent")
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ValueError(f"the agent {name!r} must be a subclass of agents.base.Agent")
    if missing := ", ".join(sorted(found.__abstractmethods__)):
        raise ValueError(f"the agent {name!r} is abstract: it lacks {missing}")
    settings: object = found.config_type
    if not (isinstance(settings, type) and issubclass(settings, AgentConfig)):
        raise ValueError(f"the config_type of the agent {name!r} must be a subclass of agents.base.AgentConfig")
    return found
