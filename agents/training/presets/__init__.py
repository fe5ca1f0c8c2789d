"""Configurations that stand for an experiment: the demo's, and every algorithm's published one."""

import dataclasses
from typing import Any

from agents.algorithms import find_agent
from agents.base import AgentConfig
from agents.training.config import TrainConfig
from agents.training.presets.demo import DEMO
from agents.training.presets.published import PUBLISHED
from agents.training.presets.record import Preset
from denoise_env.kernels import KERNELS
from denoise_env.models import ModelOptions, check_options, families, model_options, model_path
from denoise_env.naming import suggest
from denoise_env.worlds import WORLDS

PRESETS: dict[str, Preset] = {**DEMO, **PUBLISHED}
"""Name → preset."""
OF_THE_CHECKPOINT = ("height", "width", "num_frames")
"""Settings of a model that another model does not take over: its checkpoint was trained for a size of its own."""
OF_LARGE_MODELS = ("dtype", "gradient_checkpointing")
"""Settings that save memory. The embedded worlds, which are small, do not take them over."""
OF_THE_MODEL = ("lr", "step_weighting", "ema_decay", "ema_warmup", "ema_every")
"""Settings of a preset's agent that another agent takes over, since they depend on the model at least as much."""
MICROBATCH = 128
"""The largest microbatch for a model that the preset is not made for."""


def make_config(
    preset: str, agent: str | None = None, rows: int | None = None, model: str | None = None
) -> TrainConfig:
    """A preset's configuration, with another agent or model in the place of its own.

    Another agent comes with its own settings. The preset's learning rate, averaging and step weighting replace them,
    except for settings that belong to the algorithm (`Agent.own_settings`). The group is the largest up to the agent's
    own that divides the episodes.

    Another model takes the preset's settings that its family has, except for the size of images and clips, which is the
    checkpoint's own; an embedded world, which is small, keeps its precision too. A kernel that the model's path lacks
    (such as "flow_sde" on a diffusion) is left out, and with it its ``eta``, ``last_step`` and ``reduction``: the run
    has the default kernel of that path. A reference is not guided (``reference_guidance``) where the model has no
    guidance. The microbatch is the largest up to `MICROBATCH` that divides the episodes of an update. What a run
    measures beside its rewards is always the model's world's.

    Args:
        preset: a name in `PRESETS`.
        agent: a name in `AGENTS`, or ``module:class``; default: the preset's.
        rows: episodes per iteration; default: the preset's.
        model: a model as in `TrainConfig`; default: the preset's.

    Raises:
        ValueError: no such preset, agent or model, or no family claims the model.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; {suggest(preset, PRESETS)}")
    found = PRESETS[preset]
    name, other = model or found.model, model not in (None, found.model)
    settings, options = dict(found.settings), _model_options(found, name)
    kernel = settings.get("kernel")
    if other and kernel and len(KERNELS[kernel].paths) == 1 and model_path(name, options) not in KERNELS[kernel].paths:
        for key in ("kernel", "eta", "last_step", "reduction"):
            settings.pop(key, None)
    own = find_agent(found.agent).config_type(**found.agent_options)
    rows = rows or settings.pop("prompts_per_iteration", TrainConfig.prompts_per_iteration) * own.group_size
    chosen = own if agent in (None, found.agent) else _agent_options(agent, own, rows)
    settings["prompts_per_iteration"] = rows // chosen.group_size
    if other and not hasattr(options, "guidance_scale") and hasattr(chosen, "reference_guidance"):
        chosen.reference_guidance = 0.0
    settings["eval_rewards"] = tuple(WORLDS[name].eval_rewards) if name in WORLDS else ()
    if other:
        update = rows // getattr(chosen, "updates_per_rollout", 1)
        settings["microbatch"] = max(n for n in range(1, MICROBATCH + 1) if update % n == 0)
    return TrainConfig(model=name, model_options=options, agent=agent or found.agent, agent_options=chosen, **settings)


def _model_options(preset: Preset, model: str) -> ModelOptions:
    """A model's options: a preset's, as far as they are meant for it."""
    known = {family.name: family.options for family in families()}
    if model == preset.model and preset.family in known:
        check_options(known[preset.family], preset.model_options)
        return known[preset.family](**preset.model_options)
    if model == preset.model:
        return model_options(model, **preset.model_options)
    plain = model_options(model)
    left = OF_THE_CHECKPOINT + (OF_LARGE_MODELS if model in WORLDS else ())
    return dataclasses.replace(
        plain, **{n: v for n, v in preset.model_options.items() if hasattr(plain, n) and n not in left}
    )


def _agent_options(agent: str, old: AgentConfig, rows: int) -> AgentConfig:
    """Another agent's options, with what depends on the model as it is in ``old``."""
    kind = find_agent(agent)
    options: Any = kind.config_type()
    known = {field.name for field in dataclasses.fields(options)} - set(kind.own_settings)
    for name in OF_THE_MODEL:
        if name in known and hasattr(old, name):
            setattr(options, name, getattr(old, name))
    options.group_size = max(n for n in range(1, options.group_size + 1) if rows % n == 0)
    return options


__all__ = ["PRESETS", "Preset", "make_config"]
