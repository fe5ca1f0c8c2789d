"""Measured memory of published presets on their true architecture, shallow and with random weights, against `plan`.

``python -m benchmarks.real_models run`` measures every setting in a process of its own, a rollout and an update on the
CPU, and writes ``benchmarks/results/real-models.json`` and ``.md``. ``python -m benchmarks.real_models page`` computes
presets at full size and depth, without weights, and writes the table in ``docs/real-models.md``: all published ones, or
those that are named behind it.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"
BEGIN, END = "<!-- table: python -m benchmarks.real_models page -->\n", "<!-- end of table -->\n"


@dataclass(frozen=True)
class Setting:
    """A published preset, made small enough for a CPU: what is reduced, and nothing else.

    Attributes:
        preset: the preset's name; others with the same model and the same trained weights stand behind it.
        network: blocks of the network, as in `benchmarks.architectures.Depth`.
        side: height and width of the images in pixels.
        microbatch: images in a network call.
        dtype: instead of the preset's own precision.
    """

    preset: str
    network: tuple[int, ...]
    side: int
    microbatch: int = 1
    dtype: str | None = None


SETTINGS = (
    Setting("ddpo-is", (3, 1), 256, dtype="fp32"),
    Setting("flow-grpo", (1, 1), 256),
    Setting("dancegrpo-flux-lora", (1, 1), 256),
    Setting("dancegrpo", (3, 1), 256, dtype="fp32"),
    Setting("dancegrpo-flux", (1, 0), 256),
    Setting("ddpo-is", (3, 1), 256),
)
"""One for each model and choice of trained weights among the published presets."""


def brightness(images: Any, prompts: Any, metadata: Any) -> Any:
    """A reward that takes no memory."""
    return images.mean((1, 2, 3))


def configuration(setting: Setting, directory: str) -> Any:
    """The preset's configuration with a shallow checkpoint, two steps, one update and few images."""
    from agents.training.presets import make_config

    config = make_config(setting.preset, model=directory)
    options = {"height": setting.side, "width": setting.side}
    if setting.dtype:
        options["dtype"] = setting.dtype
    agent = {"group_size": 2 * setting.microbatch, "updates_per_rollout": 1, "timestep_fraction": 1.0}
    return dataclasses.replace(
        config,
        model_options=dataclasses.replace(config.model_options, **options),
        agent_options=dataclasses.replace(config.agent_options, **agent),
        rewards={"benchmarks.real_models:brightness": 1.0},
        prompts=("a red circle on gray",),
        num_steps=2,
        prompts_per_iteration=1,
        microbatch=setting.microbatch,
        device="cpu",
    )


def resident(most: bool = False) -> int:
    """This process's resident bytes, or the most of them since `forget_most`, as Linux counts them."""
    name = "VmHWM" if most else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_most() -> None:
    """Begin anew to count the most resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(setting: Setting, directory: str) -> dict[str, Any]:
    """One row of the table, measured in this process."""
    import torch

    from agents.rollout import collect
    from agents.training.experiment import build
    from agents.training.memory import plan
    from denoise_env.mdp import row_generators

    torch.set_num_threads(1)
    config = configuration(setting, directory)
    memory = plan(config, cuda=False)
    # Libraries that a first call loads are there before anything is measured.
    torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3, requires_grad=True), torch.ones(1, 1, 3, 3)).sum().backward()
    before = resident()
    experiment = build(config)
    agent, measured = experiment.agent, {}
    for module in (experiment.mdp.model.network, *experiment.mdp.model.frozen().values()):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()  # a mapped file's pages come and go
    seconds = time.perf_counter()
    for parameter in agent.parameters:
        parameter.grad = torch.zeros_like(parameter)
    agent.optimizer.step()  # with the moments that a run has from its second iteration on
    agent.optimizer.zero_grad()
    forget_most()
    rollout = collect(
        experiment.mdp,
        experiment.policy,
        row_generators(range(memory.images)),
        experiment.mdp.drawn_prompts,
        **agent.rollout_options(1),
    )
    measured["rollout"] = resident(most=True) - before
    forget_most()
    agent.update(rollout, 1)
    measured["update"] = resident(most=True) - before
    predicted = {
        "rollout": max(memory.phases[phase] for phase in ("encode prompts", "rollout", "decode")),
        "update": memory.phases["update"],
    }
    return {
        "preset": setting.preset,
        "setting": dataclasses.asdict(setting),
        "parameters": sum(p.numel() for p in experiment.mdp.model.network.parameters()),
        "dtype": config.model_options.dtype,
        "lora_rank": config.model_options.lora_rank,
        "predicted": predicted,
        "measured": measured,
        "standing": memory.standing,
        "seconds": time.perf_counter() - seconds,
    }


def run_one(setting: Setting) -> dict[str, Any]:
    """One row of the table, measured in a process of its own on a checkpoint that is made for it."""
    import torch

    from agents.training.presets import PRESETS
    from benchmarks.architectures import Depth, write_weights

    with tempfile.TemporaryDirectory() as directory:
        full = not PRESETS[setting.preset].model_options.get("lora_rank")
        dtype = torch.float32 if full else torch.bfloat16
        write_weights(PRESETS[setting.preset].model, Path(directory), Depth(setting.network, encoders=1), dtype)
        command = [sys.executable, "-m", "benchmarks.real_models", "one", directory]
        # glibc gives large blocks back as soon as they are freed, so that what is resident is what is in use.
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        text = json.dumps(dataclasses.asdict(setting))
        done = subprocess.run([*command, text], env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            error = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            return {"preset": setting.preset, "setting": dataclasses.asdict(setting), "error": error[0]}
        return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The measured rows in Markdown."""
    lines = [
        "| preset | trained | blocks | parameters | image | microbatch | weights and moments | rollout: predicted, "
        "measured | update: predicted, measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        setting = row["setting"]
        start = f"| {row['preset']} | "
        blocks = "+".join(map(str, setting["network"]))
        if "error" in row:
            size = f"{setting['side']}² | {setting['microbatch']}"
            lines.append(f"{start}– | {blocks} | – | {size} | not run: {row['error']} | – | – |")
            continue
        rank = row["lora_rank"]
        trained = f"{f'LoRA {rank}' if rank else 'all'}, {row['dtype']}"
        figures = []
        for phase in ("rollout", "update"):
            predicted, measured = row["predicted"][phase], row["measured"][phase]
            figures.append(f"{_gib(predicted)}, {_gib(measured)} ({predicted / measured - 1:+.1%})")
        lines.append(
            f"{start}{trained} | {blocks} | {row['parameters'] / 1e6:,.0f} M | {setting['side']}² | "
            f"{setting['microbatch']} | {_gib(row['standing'])} | {figures[0]} | {figures[1]} |"
        )
    return "\n".join(lines) + "\n"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def page_row(preset: str, directory: Path, known: dict[str, list[int]] | None = None) -> str:
    """A preset's line in the page's table; ``known`` as in `agents.training.memory.plan`."""
    from agents.training.memory import plan
    from agents.training.presets import make_config
    from benchmarks.architectures import write_configuration
    from denoise_env.models import outline

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
    from agents.training.presets.published import PUBLISHED

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
        values = json.loads(typed.arguments[1])
        setting = Setting(**{**values, "network": tuple(values["network"])})
        print(json.dumps(measure(setting, typed.arguments[0])))
    else:
        rows = []
        for setting in SETTINGS:
            rows.append(run_one(setting))
            print(json.dumps(rows[-1]), flush=True)
            (RESULTS / "real-models.json").write_text(json.dumps(rows, indent=1) + "\n")
            (RESULTS / "real-models.md").write_text(table(rows))


if __name__ == "__main__":
    main()
