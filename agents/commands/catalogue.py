"""``denoise-env list``: everything that has a name."""

import argparse
import math

from agents.algorithms import AGENTS
from agents.training.presets import PRESETS
from denoise_env.kernels import KERNELS
from denoise_env.models import families
from denoise_env.naming import load_attribute
from denoise_env.rewards import NAMES
from denoise_env.worlds import PROMPT_SETS, WORLDS


def run(options: argparse.Namespace) -> int:
    """Print models, rewards, kernels, agents, presets and environments; returns the exit status."""
    for title, rows in (
        (
            "models (--model)",
            {name: world.description for name, world in WORLDS.items()}
            | {
                "HUB ID or DIRECTORY": "a checkpoint of one of the families below",
                "module:attribute": "your own family",
            },
        ),
        (
            "families",
            {family.name: family.description for family in families()},
        ),
        (
            "rewards (--rewards REWARD WEIGHT …)",
            {name: _about(target) for name, target in NAMES.items()}
            | {"module:attribute": "your own", "NAME(ARGUMENTS)": 'as in threshold(hps(dtype="bf16"), 0.28)'},
        ),
        (
            "prompts (--prompts)",
            dict.fromkeys(PROMPT_SETS, "") | {"FILE": ".txt, .jsonl or .csv"},
        ),
        (
            "kernels (--kernel)",
            {name: (kernel.__doc__ or "").splitlines()[0] for name, kernel in KERNELS.items()},
        ),
        (
            "agents (--agent)",
            {name: (agent.__doc__ or "").splitlines()[0] for name, agent in AGENTS.items()}
            | {"module:class": "your own"},
        ),
        (
            "presets (--preset)",
            {name: preset.description for name, preset in PRESETS.items()},
        ),
        (
            "environments (gymnasium.make)",
            {world.environment: "" for world in WORLDS.values() if world.environment},
        ),
    ):
        print(title)
        for name, text in rows.items():
            print(f"  {name:<24} {text}".rstrip())
    return 0


def _about(target: str) -> str:
    """The first line of a reward's docstring, with its range where it has ends."""
    reward = load_attribute(target, "reward")
    low, high = getattr(reward, "range", (-math.inf, math.inf))
    ends = "" if (low, high) == (-math.inf, math.inf) else f" [{low:g}, {high:g}]"
    return f"{(reward.__doc__ or '').splitlines()[0]}{ends}"
