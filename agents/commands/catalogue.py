"""``denoise-env list``: everything that has a name."""

import argparse

from agents.algorithms import AGENTS
from agents.training.presets import PRESETS
from denoise_env import rewards
from denoise_env.kernels import KERNELS
from denoise_env.models import families
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
        ("rewards (--rewards NAME WEIGHT …)", rewards.NAMES | {"module:attribute": "your own"}),
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
