"""Published presets on their true architecture, shallow and with random weights: they train, and take what `plan` says.

``python -m benchmarks.real_models run`` runs every preset in a process of its own on the CPU (prompts encoded
together, a rollout of two steps, an update) and writes ``benchmarks/results/real-models.json`` and ``.md``; with names
behind it, those alone anew. Gigabytes of weights are written to the temporary directory: ``TMPDIR=/dev/shm`` keeps them
in memory.
``python -m benchmarks.real_models page`` computes presets at full size and depth, without weights, and writes the table
in ``docs/real-models.md``: all published ones, or those that are named behind it.
"""

import argparse
import ctypes
import dataclasses
import itertools
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from agents.rollout import collect
from agents.training.checkpoints import write_atomically
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.memory import plan
from agents.training.presets import make_config
from agents.training.presets.published import FLUX, HUNYUAN, PUBLISHED, SD14, SD15, SD35, SKYREELS
from benchmarks.architectures import Depth, write_configuration, write_weights
from benchmarks.timing import forget_most, resident
from denoise_env.conditioning import ENCODED_TOGETHER
from denoise_env.mdp import row_generators
from denoise_env.models import outline
from denoise_env.models.base import example_prompt
from denoise_env.models.video import VideoOptions

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"
BEGIN, END = "<!-- table: python -m benchmarks.real_models page -->\n", "<!-- end of table -->\n"


MAIN = (
    *("ddpo-is", "dancegrpo", "flow-grpo", "dancegrpo-flux-lora", "dancegrpo-flux"),
    *("dancegrpo-hunyuan", "dancegrpo-skyreels"),
)
"""One for each model and choice of trained weights among the published presets: these draw larger images."""
BLOCKS = {SD14: (3, 1), SD15: (3, 1), SD35: (1, 1), FLUX: (1, 1), HUNYUAN: (1, 1), SKYREELS: (1, 1)}
"""A model → the blocks that are left of its network, as in `benchmarks.architectures.Depth`."""
REDUCED = {
    **dict.fromkeys(("group_size", "branches"), 2),
    **dict.fromkeys(("updates_per_rollout", "epochs", "draws_per_sample", "window_size"), 1),
    "timestep_fraction": 1.0,
    "window_reach": "all",
}
"""Instead of a preset's own, where its agent has such a setting."""


def side(name: str) -> int:
    """Height and width of a preset's images in pixels, where it is measured."""
    return 256 if name in MAIN else 128


FRAMES = 5
"""Frames of a clip where it is measured."""


def brightness(samples: Any, prompts: Any) -> Any:
    """A reward that takes no memory."""
    return samples.flatten(1).mean(1)


def configuration(name: str, directory: str) -> TrainConfig:
    """A preset's configuration with a shallow checkpoint, two steps, one update and few images, in fp32: bf16 is many
    times slower on a CPU without instructions for it, and its convolutions take buffers of their own there."""
    config = make_config(name, model=directory)
    agent = {key: value for key, value in REDUCED.items() if getattr(config.agent_options, key, None) is not None}
    options = {"height": side(name), "width": side(name), "dtype": "fp32"}
    if isinstance(config.model_options, VideoOptions):
        options["num_frames"] = FRAMES
    return dataclasses.replace(
        config,
        model_options=dataclasses.replace(config.model_options, **options),
        agent_options=dataclasses.replace(config.agent_options, **agent),
        rewards={"benchmarks.real_models:brightness": 1.0},
        prompts=(example_prompt(outline(directory, config.model_options), "a red circle on gray"),),
        num_steps=2,
        prompts_per_iteration=1,
        microbatch=1,
        device="cpu",
    )


def forget_mapped_weights() -> None:
    """Let go of the pages of weights files that are mapped: they are no longer read, and would count as resident."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            if libc.madvise(start, end - start, mmap.MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), f"madvise: {line}")


def measure(name: str, directory: str) -> dict[str, Any]:
    """A preset's row of the table, measured in this process."""
    torch.set_num_threads(1)
    config = configuration(name, directory)
    memory = plan(config, cuda=False)
    # Libraries that a first call loads are there before anything is measured.
    torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3, requires_grad=True), torch.ones(1, 1, 3, 3)).sum().backward()
    before = resident()
    experiment = build(config)
    agent, measured = experiment.agent, {}
    for module in (experiment.mdp.model.network, *experiment.mdp.model.frozen().values()):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
    forget_mapped_weights()  # a mapped file's pages come and go
    seconds = time.perf_counter()
    for parameter in agent.parameters:
        parameter.grad = torch.zeros_like(parameter)
    agent.optimizer.step()  # with the moments that a run has from its second iteration on
    agent.optimizer.zero_grad()
    forget_most()
    with torch.no_grad():
        model = experiment.mdp.model
        model.encode([example_prompt(model, f"a red circle on gray {i}") for i in range(ENCODED_TOGETHER)])
    measured["encode prompts"] = resident(most=True) - before
    forget_most()
    rows = row_generators(range(memory.images))
    with agent.rollout_weights():
        prompts = experiment.mdp.drawn_prompts
        rollout = collect(experiment.mdp, experiment.policy, rows, prompts, **agent.rollout_options(1))
    measured["rollout"] = resident(most=True) - before
    forget_most()
    agent.update(rollout, 1)
    measured["update"] = resident(most=True) - before
    phases = memory.phases
    predicted = {phase: phases[phase] for phase in measured}
    predicted["rollout"] = max(phases["rollout"], phases["decode"])
    return {
        "preset": name,
        "parameters": sum(p.numel() for p in experiment.mdp.model.network.parameters()),
        "lora_rank": config.model_options.lora_rank,
        "predicted": predicted,
        "measured": measured,
        "standing": memory.standing,
        "frames": getattr(config.model_options, "num_frames", 1),
        "seconds": time.perf_counter() - seconds,
    }


def run(names: list[str]) -> None:
    """Measure presets, each in a process of its own, and write what is known of all."""
    path = RESULTS / "real-models.json"
    rows = {row["preset"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    models = {name: PUBLISHED[name].model for name in names}
    for model, alike in itertools.groupby(sorted(models, key=models.__getitem__), models.__getitem__):
        with tempfile.TemporaryDirectory() as directory:
            write_weights(model, Path(directory), Depth(BLOCKS[model], encoders=1), torch.float32)
            for name in alike:
                rows[name] = measure_apart(name, directory)
                print(json.dumps(rows[name]), flush=True)
                known = sorted(rows.values(), key=lambda row: (row["preset"] not in MAIN, row["preset"]))
                write_atomically(path, json.dumps(known, indent=1) + "\n")
                write_atomically(RESULTS / "real-models.md", table(known))


def measure_apart(name: str, directory: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    # glibc gives large blocks back as soon as they are freed, so that what is resident is what is in use.
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.real_models", "one", name, directory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **limits}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return {"preset": name, "error": error[0]}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The measured rows in Markdown, sizes in GiB."""
    lines = [
        "| preset | trained | parameters | image | weights and moments | "
        f"encode {ENCODED_TOGETHER} prompts: predicted, measured | "
        "rollout: predicted, measured | update: predicted, measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, image = row["preset"], f"{side(row['preset'])}²" + f" × {FRAMES}" * (row.get("frames", 1) > 1)
        if "error" in row:
            lines.append(f"| {name} | – | – | {image} | – | failed: {row['error']} | – | – |")
            continue
        trained = f"LoRA {row['lora_rank']}" if row["lora_rank"] else "all"
        figures = []
        for phase in row["measured"]:
            predicted, measured = row["predicted"][phase], row["measured"][phase]
            figures.append(f"{_gib(predicted)}, {_gib(measured)} ({predicted / measured - 1:+.1%})")
        lines.append(
            f"| {name} | {trained} | {row['parameters'] / 1e6:,.0f} M | {image} | {_gib(row['standing'])} | "
            f"{' | '.join(figures)} |"
        )
    return "\n".join(lines) + "\n"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def page_row(preset: str, directory: Path, known: dict[str, list[int]] | None = None) -> str:
    """A preset's line in the page's table; ``known`` as in `agents.training.memory.plan`."""

    config = make_config(preset)
    checkpoint = directory / config.model.replace("/", "-")
    if not checkpoint.exists():
        checkpoint.mkdir()
        write_configuration(config.model, checkpoint)
    config = dataclasses.replace(config, model=str(checkpoint))
    memory = plan(config, known=known)
    model = outline(config.model, config.model_options)
    trained = sum(p.numel() for p in model.trainable().values())
    total = sum(p.numel() for p in model.network.parameters())
    rank = config.model_options.lora_rank
    what = f"LoRA {rank}, {trained / 1e6:,.1f} M" if rank else "all"
    phase = max(memory.phases, key=memory.phases.__getitem__)
    fits = f"{memory.gpu} GB" if memory.gpu else "none"
    figures = (
        memory.weights + memory.decoder,
        memory.optimizer + memory.gradients,
        memory.copies,
        memory.rollout + memory.noises,
        memory.update_call,
    )
    cells = " | ".join(_gib(figure) for figure in figures)
    return (
        f"| {preset} | {total / 1e9:.2f} B | {what} | {memory.images:,} | {memory.microbatch} | {cells} | "
        f"{_gib(memory.peak)}, {phase} | {fits} |\n"
    )


HEAD = (
    "| preset | parameters | trained | images | microbatch | weights | gradients, moments | copies | latents, noise | "
    "update call | peak | smallest GPU |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def write_page(presets: list[str]) -> None:
    """Write the table of ``docs/real-models.md`` anew, a line at a time."""
    lines, known = HEAD, {}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    with tempfile.TemporaryDirectory() as directory:
        for preset in presets or PUBLISHED:
            lines += page_row(preset, Path(directory), known)
            PAGE.write_text(before + BEGIN + lines + END + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "one", "page"])
    parser.add_argument("arguments", nargs="*")
    typed = parser.parse_args()
    if typed.command == "page":
        write_page(typed.arguments)
    elif typed.command == "one":
        print(json.dumps(measure(*typed.arguments)))
    else:
        run(typed.arguments or list(PUBLISHED))


if __name__ == "__main__":
    main()
