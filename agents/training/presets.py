"""Configurations that stand for an experiment."""

import dataclasses
from collections.abc import Callable

from agents.algorithms import find_agent
from agents.ddpo import DDPOConfig
from agents.dpok import DPOKConfig
from agents.grpo import GRPOConfig
from agents.training.config import TrainConfig
from denoise_env.models import ModelOptions, model_options
from denoise_env.models.stable_diffusion import StableDiffusionOptions
from denoise_env.naming import suggest
from denoise_env.worlds import WORLDS


def shapes() -> TrainConfig:
    """GRPO on the shipped tiny Stable Diffusion: minutes on a laptop. The default."""
    return TrainConfig(
        agent_options=GRPOConfig(lr=1e-4, step_weighting="std", ema_decay=0.97),
        iterations=130,
        eval_rewards=("shapes-correct",),
        eval_images_per_prompt=64,
    )


def points() -> TrainConfig:
    """GRPO on 2-D Gaussian mixtures: seconds."""
    agent = GRPOConfig(lr=3e-3, step_weighting="std", ema_decay=0.9)
    return TrainConfig(
        model="points",
        agent_options=agent,
        prompts_per_iteration=6,
        microbatch=None,
        iterations=100,
        eval_images_per_prompt=128,
        checkpoint_every=50,
    )


def dancegrpo() -> TrainConfig:
    """DanceGRPO's Stable Diffusion 1.4 setting, choice for choice (give --model, --prompts and --rewards).

    512 images an iteration in groups of 16 from shared noise, 50 DDIM steps with η = 1, guidance 5 in rollout
    and training, the last step dropped and the other 49 trained in a random order drawn per sample, mean
    log-prob, unbiased std, clip 1e-4, |A| ≤ 5, two updates, AdamW at 1e-5 with weight decay 1e-4.
    """
    return TrainConfig(
        model="CompVis/stable-diffusion-v1-4",
        model_options=StableDiffusionOptions(
            guidance_scale=5.0, height=512, width=512, dtype="bf16", gradient_checkpointing=True
        ),
        num_steps=50,
        kernel="ddim",
        eta=1.0,
        agent_options=GRPOConfig(lr=1e-5, updates_per_rollout=2, timestep_fraction=1.0),
        iterations=300,
        prompts_per_iteration=32,
        microbatch=8,
        eval_images_per_prompt=4,
    )


def ddpo() -> TrainConfig:
    """DDPO-IS's Stable Diffusion 1.4 setting: 50 steps, η 1, guidance 5, LoRA at 3e-4 (give --prompts and --rewards).

    256 images an iteration, two updates, clip 1e-4 on the mean log-prob, advantages per prompt, |A| ≤ 5.
    """
    config = dancegrpo()
    return dataclasses.replace(
        config,
        model_options=StableDiffusionOptions(**{**vars(config.model_options), "lora_rank": 4}),
        agent="ddpo-is",
        agent_options=DDPOConfig(updates_per_rollout=2),
        prompts_per_iteration=256,
    )


def dpok() -> TrainConfig:
    """DPOK's Stable Diffusion 1.5 setting: 50 steps, η 1, LoRA at 1e-5, α 10, β 0.01 (give --prompts and --rewards)."""
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return dataclasses.replace(
        ddpo(), model=model, agent="dpok", agent_options=DPOKConfig(), prompts_per_iteration=16, iterations=10_000
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    make.__name__: make for make in (shapes, points, dancegrpo, ddpo, dpok)
}


def make_config(
    preset: str, agent: str | None = None, rows: int | None = None, model: str | None = None
) -> TrainConfig:
    """A preset's configuration, with another agent or model in the place of its own.

    The agent comes with its published settings. The preset's learning rate, averaging and step weighting replace them,
    except for settings that belong to the algorithm (`Agent.own_settings`). The group is the largest up to the agent's
    own that divides the episodes.

    Args:
        preset: a name in `PRESETS`.
        agent: a name in `AGENTS`, or ``module:class``; default: the preset's.
        rows: episodes per iteration; default: the preset's.
        model: a model as in `TrainConfig`; default: the preset's. It comes with its own options; the preset's choices
            replace those that both families have.

    Raises:
        ValueError: no such preset, agent or model.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; {suggest(preset, PRESETS)}")
    config = PRESETS[preset]()
    if model is not None and model != config.model:
        config = dataclasses.replace(config, model=model, model_options=_carry(config, model))
    old = config.agent_options
    rows = rows or config.prompts_per_iteration * old.group_size
    if agent is None or agent == config.agent:
        return dataclasses.replace(config, prompts_per_iteration=rows // old.group_size)
    kind = find_agent(agent)
    new = kind.config_type()
    known = {field.name for field in dataclasses.fields(new)}
    for name in ("lr", "step_weighting", "ema_decay"):
        if name in known and name not in kind.own_settings:
            setattr(new, name, getattr(old, name, getattr(new, name)))
    group = max(n for n in range(1, new.group_size + 1) if rows % n == 0)
    new.group_size = group
    return dataclasses.replace(config, agent=agent, agent_options=new, prompts_per_iteration=rows // group)


def _carry(config: TrainConfig, model: str) -> ModelOptions:
    """Another model's options, with the configuration's choices for its own model where both families have them."""
    old, new = config.model_options, model_options(model)
    plain = vars(type(old)()) | (dict(WORLDS[config.model].options) if config.model in WORLDS else {})
    chosen = {name: value for name, value in vars(old).items() if value != plain[name] and hasattr(new, name)}
    return dataclasses.replace(new, **chosen)
