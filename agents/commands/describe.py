"""``denoise-env describe``: what a model needs, and what a training run on it needs."""

import argparse
import dataclasses
from collections.abc import Iterator

from agents.commands.output import check_output, write_json
from agents.commands.settings import with_flags
from agents.training.config import TrainConfig
from agents.training.memory import FRAGMENTATION, RESERVE, Memory, plan
from agents.training.presets import make_config
from denoise_env.models import find_family, model_options
from denoise_env.models.description import describe


def run(options: argparse.Namespace) -> int:
    """Print latents, parameters and memory of a model, and of a training run on it; returns the exit status."""
    check_output(options.json)
    for name in ("num_steps", "microbatch", "images"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    config = _config(options)
    found = describe(options.model, config.model_options)
    steps, per_row = config.num_steps, found.rows_per_sample
    entries = ", ".join(f"{name} {list(shape)}" for name, shape in found.conditioning.items())
    share = found.trainable / found.parameters
    lines = {
        "family": found.family,
        "latents": f"{list(found.latents)}, {_size(found.latent_bytes)} a sample and step",
        f"a sample, {steps} steps": f"{_size(found.latent_bytes * (steps + 1))}, {steps * per_row} rows of the network",
        "conditioning": f"{entries}: {_size(found.conditioning_bytes)} a prompt",
        "parameters": f"{found.parameters:,}, of which {found.trainable:,} are trained ({share:.2%})",
        "weights": f"{_size(found.weight_bytes)}, encoders and decoder {_size(found.frozen_bytes)}",
        "gradients": _size(found.gradient_bytes),
        "optimizer (AdamW)": _size(found.optimizer_bytes),
    }
    for name, text in lines.items():
        print(f"{name:<24} {text}")
    figures = found.as_dict()
    if find_family(options.model)[0].outline:
        memory = plan(config)
        print("\n".join(_lines(memory, config)))
        figures["training"] = memory.as_dict()
    write_json(options.json, figures)
    return 0


def _config(options: argparse.Namespace) -> TrainConfig:
    """The run that is described: a preset's, or with the model's own settings, changed as the flags say."""
    if options.preset is None:
        config = TrainConfig(options.model, model_options(options.model), microbatch=1)
    else:
        config = make_config(options.preset, model=options.model)
    config.model_options = with_flags(config.model_options, options.model_flags, options.command)
    changes = {name: getattr(options, name) for name in ("num_steps", "microbatch")}
    if options.images is not None:
        size = config.agent_options.group_size
        if options.images % size:
            raise ValueError(f"--images must be a multiple of the {size} of a group, not {options.images}")
        changes["prompts_per_iteration"] = options.images // size
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def _lines(memory: Memory, config: TrainConfig) -> Iterator[str]:
    """What is printed of a run's memory."""
    images = f"{memory.images:,} images, {memory.microbatch} in a network call"
    yield f"\nTraining with {config.agent} on a GPU, {images}:"
    kept = {
        "network": memory.weights,
        "decoder": memory.decoder,
        "optimizer (AdamW)": memory.optimizer,
        "copies of weights": memory.copies,
        "encoded prompts": memory.kept_conditioning,
    }
    yield from (f"  {name:<22} {_size(size):>10}" for name, size in kept.items())
    added = {
        "encode prompts": {"encoders": memory.encoders, "activations": memory.encoding},
        "rollout": {
            "latents": memory.rollout,
            "weights set aside": memory.swapped,
            "network call": memory.rollout_call,
        },
        "decode": {"latents": memory.rollout, "weights set aside": memory.swapped, "decoder call": memory.decoding},
        "update": {
            "latents": memory.rollout,
            "noise": memory.noises,
            "gradients": memory.gradients,
            "network call and backward": memory.update_call,
        },
    }
    for phase, size in memory.phases.items():
        parts = ", ".join(f"{name} {_size(part)}" for name, part in added[phase].items() if part)
        yield f"  {phase:<22} {_size(size):>10}   with {parts}"
    yield f"  {'an image more':<22} {_size(memory.row):>10}   in a network call and its backward pass"
    fits = f"fits a GPU of {memory.gpu} GB" if memory.gpu else "fits no single GPU"
    yield f"  {'peak':<22} {_size(memory.peak):>10}   {fits}, with {FRAGMENTATION:.0%} and {RESERVE:g} GiB to spare"
    yield "Not counted: rewards, and what kernels take for themselves while they run. Encoders wait on the host."


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
