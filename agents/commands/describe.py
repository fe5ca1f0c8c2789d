"""``denoise-env describe``: what a model needs."""

import argparse

from agents.commands.output import check_output, write_json
from agents.commands.settings import with_flags
from denoise_env.models import model_options
from denoise_env.models.description import describe


def run(options: argparse.Namespace) -> int:
    """Print latents, parameters and memory of a model; returns the exit status."""
    check_output(options.json)
    if options.num_steps < 1:
        raise ValueError(f"--num-steps must be at least 1, not {options.num_steps}")
    chosen = with_flags(model_options(options.model), options.model_flags, options.command)
    found = describe(options.model, chosen)
    steps, per_row = options.num_steps, found.rows_per_sample
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
    write_json(options.json, found.as_dict())
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
