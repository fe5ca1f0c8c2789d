"""What scoring costs: ``python -m benchmarks.throughput --rewards``.

Every row is measured in a process of its own: first the rewards, those with published weights at their architecture
(`benchmarks.reward_architectures`), then what a server in another process and the overlap of denoising and scoring
cost or save. Images are of 512x512 pixels and clips of 16 frames of 256x256, those of the worlds that ship of their own
size.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.grpo import GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect, denoise
from agents.training.checkpoints import write_atomically
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import Collected, _iterate
from benchmarks.real_models import forget_most, resident
from benchmarks.reward_architectures import PUBLISHED
from benchmarks.throughput import ratio, synchronize
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.prompts import Prompt
from denoise_env.rewards import Reward, load_reward
from denoise_env.rewards.base import DTYPES
from denoise_env.rewards.remote import Remote
from denoise_env.shapes.compositions import TRAIN as COMPOSITIONS
from denoise_env.shapes.grammar import TRAIN as SHAPES

WORLDS = {"shapes": SHAPES, "shapes-clip": SHAPES, "shapes-hps": SHAPES, "compositions": COMPOSITIONS}
"""Rewards whose weights ship → the captions of their world."""
SIDE, ROWS = 32, 128
"""Of a world's pictures: pixels, and how many are scored at a time."""
REWARDS = (*WORLDS, "jpeg_compressibility", *PUBLISHED)
SERVED = "shapes-hps"
HOST_GIB = 14.0
"""The most memory that a network on the CPU may take here."""
SECONDS = 20.0
"""A row is repeated until that much time has passed, at least once."""
OBJECTS = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}


# --- One reward ---


def samples(name: str, rows: int, draw: torch.Generator) -> Tensor:
    """Smooth pictures or clips for a reward, of whole bytes."""
    clips = name == "videoalign"
    count, side = (16 * rows, 256) if clips else (rows, SIDE if name in WORLDS else 512)
    coarse = torch.rand(count, 3, side // 16, side // 16, generator=draw)
    pictures = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).round() / 255
    return pictures.view(rows, 16, *pictures.shape[1:]) if clips else pictures


def prompts(name: str, rows: int) -> list[Prompt]:
    captions = WORLDS.get(name) or [f"a photo of a red dog, number {i} of a series by the sea" for i in range(rows)]
    return [Prompt(captions[i % len(captions)], metadata=OBJECTS) for i in range(rows)]


def measure(name: str, device: torch.device, rows: int, repeats: int) -> dict[str, Any]:
    """A reward's row of the table, measured in this process."""
    published = PUBLISHED.get(name)
    dtype = published.dtype if published and device.type == "cuda" else "fp32"  # slow on a CPU without instructions
    found: dict[str, Any] = {"reward": name, "precision": dtype}
    if published:
        found["parameters"] = published.parameters()
        needed = found["parameters"] * DTYPES[dtype].itemsize
        if needed * 1.1 > (torch.cuda.mem_get_info()[0] if device.type == "cuda" else HOST_GIB * 2**30):
            return {**found, "needed": needed}
    rows = ROWS if name in WORLDS else rows
    draw = torch.Generator().manual_seed(0)
    batches = [samples(name, rows, draw).to(device) for _ in range(1 + repeats)]  # some remember what they have scored
    asked = prompts(name, rows)
    gc.collect()
    before = resident()
    reward: Reward = published.make(dtype) if published else load_reward(name)
    reward(batches[0][:2], asked[:2])
    alive = [p for p in gc.get_objects() if isinstance(p, nn.Parameter) and not p.is_meta]
    found["parameters"] = sum(p.numel() for p in alive)
    forget_most()
    times: list[float] = []
    for batch in batches[1:]:
        synchronize(device)
        started = time.perf_counter()
        reward(batch, asked)
        synchronize(device)
        times.append(time.perf_counter() - started)
        if sum(times) > SECONDS:
            break
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident(most=True) - before
    seconds = statistics.median(times)
    figures = {"samples_per_second": rows / seconds, "ms_per_sample": 1000 * seconds / rows, "peak_bytes": max(0, peak)}
    return {**found, "samples": rows, "repeats": len(times), **figures}


# --- A server in another process ---


@contextlib.contextmanager
def served(reward: str, device: torch.device) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [sys.executable, "-m", "denoise_env", "serve-reward", reward, "--port", "0", "--device", str(device)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" is served on ")[1].split(";")[0]
        finally:
            process.kill()


def alternate(
    functions: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each after a warm-up, taking turns in going first."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = [*functions]
    for repeat in range(repeats + 1):
        for name in names if repeat % 2 else names[::-1]:
            synchronize(device)
            started = time.perf_counter()
            functions[name]()
            synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - started)
    return times


def remote_figures(url: str, device: torch.device, repeats: int) -> dict[str, float]:
    """The served reward's throughput here, and through the server in both formats."""
    images = samples(SERVED, ROWS, torch.Generator().manual_seed(0)).to(device)
    asked = prompts(SERVED, ROWS)
    rewards: dict[str, Reward] = {
        "in this process": load_reward(SERVED),
        "remote, png": Remote(url),
        "remote, float": Remote(url, format="float"),
    }
    times = alternate({name: lambda r=reward: r(images, asked) for name, reward in rewards.items()}, repeats, device)
    here = times["in this process"]
    figures = {f"{SERVED} {name}, samples/s": ROWS / statistics.median(found) for name, found in times.items()}
    for name in [*rewards][1:]:
        figures[f"{SERVED} {name}, speed relative to this process"] = ratio(here, times[name])
    return figures


class AtTheEnd(Remote):
    """A server that is asked when all is denoised."""

    def elsewhere(self, device: torch.device) -> bool:
        """False, so that nothing is scored meanwhile."""
        return False


def overlap_figures(url: str, device: torch.device, repeats: int) -> dict[str, float]:
    """A rollout of the tiny Stable Diffusion, scored while it is denoised and afterwards."""
    mdp = DenoisingMDP.make("shapes", f'remote(url="{url}")', num_steps=10, device=device)
    after = DenoisingMDP(mdp.model, {"remote": AtTheEnd(url)}, mdp.drawn_prompts, 10, conditioning=mdp.conditioning)
    policy = DenoisingPolicy(mdp)
    generators, size = range(ROWS), ROWS // 4
    rollout = collect(mdp, policy, row_generators(generators), microbatch=size)
    noise = torch.randn(ROWS, 11, *mdp.model.latent_shape).to(device, mdp.model.dtype)
    index = rollout.prompt_index
    turns: dict[str, Callable[[], object]] = {
        "denoised, not scored": lambda: denoise(mdp, policy, noise.clone(), index, size),
        "scored, not denoised": lambda: after.score(rollout.final_latents, index),
        "denoised, then scored": lambda: collect(after, policy, row_generators(generators), microbatch=size),
        "scored while denoised": lambda: collect(mdp, policy, row_generators(generators), microbatch=size),
    }
    times = alternate(turns, repeats, device)
    figures = {f"rollout of {ROWS}, {name}, s": statistics.median(found) for name, found in times.items()}
    overlapped = ratio(times["denoised, then scored"], times["scored while denoised"])
    return {**figures, "rollout, speed of scoring meanwhile relative to afterwards": overlapped}


def ahead_figures(url: str, device: torch.device, repeats: int) -> dict[str, float]:
    """An iteration of the same, with and without ``collect_ahead``."""

    def iterations(collect_ahead: bool) -> Callable[[], object]:
        config = TrainConfig(
            rewards={f'remote(url="{url}")': 1.0},
            agent_options=GRPOConfig(group_size=16, collect_ahead=collect_ahead),
            prompts_per_iteration=ROWS // 16,
            microbatch=ROWS // 4,
            device=str(device),
        )
        experiment, ahead, count = build(config), dict[int, Collected](), 0

        def one() -> None:
            nonlocal count
            count += 1
            _iterate(experiment, count, None, ahead, more=True)

        return one

    turns = {"as it comes": iterations(False), "collect_ahead": iterations(True)}
    times = alternate(turns, repeats, device)
    figures = {f"iteration of {ROWS}, {name}, s": statistics.median(found) for name, found in times.items()}
    return {**figures, "iteration, speed with collect_ahead relative to without": ratio(*times.values())}


# --- All of them ---


def apart(arguments: Sequence[str], threads: int) -> Any:
    """What this module's `main` prints in a process of its own; a dictionary with "error" where it fails."""
    # glibc gives large blocks back as soon as they are freed, so that what is resident is what is in use.
    limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **limits}
    command = [sys.executable, "-m", "benchmarks.reward_throughput", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> None:
    """Measure, print and, where ``options.json`` names a file, write all rows there and in Markdown beside it."""
    threads = torch.get_num_threads()
    machine = {"device": options.device, "threads": threads, "torch": torch.__version__}
    rows = []
    for name in REWARDS:
        common = [options.device, str(options.samples), str(options.repeats)]
        row = apart([name, *common], threads)
        rows.append(row if "error" not in row else {"reward": name, **row})
        print(_line(rows[-1]), flush=True)
    # trainer and server share the cores
    servers = apart(["servers", *common], max(1, threads // 2))
    report = {"machine": machine, "rewards": rows, "servers": servers}
    page = table(report)
    print(f"\n{page}")
    if options.json:
        write_atomically(options.json, json.dumps(report, indent=1) + "\n")
        write_atomically(options.json.with_suffix(".md"), page)


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    head = "| reward | parameters | precision | samples/s | ms/sample | peak memory, GiB |\n|---|---|---|---|---|---|"
    figures = [f"| {name} | {value:,.3g} |" for name, value in report["servers"].items() if name != "error"]
    failed = [report["servers"]["error"]] if "error" in report["servers"] else []
    lines = [f"{machine}.", "", head, *map(_line, report["rewards"]), "", "| figure | value |", "|---|---|", *figures]
    return "\n".join([*lines, *failed]) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| `{row['reward']}` | | | {row['error']} | | |"
    count = row["parameters"]
    size = f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M" if count else "none"
    start = f"| `{row['reward']}` | {size} | {row['precision']} |"
    if "needed" in row:
        return f"{start} not run: its weights alone take {row['needed'] / 2**30:.1f} GiB | | |"
    return f"{start} {row['samples_per_second']:,.3g} | {row['ms_per_sample']:,.3g} | {row['peak_bytes'] / 2**30:.2f} |"


def main() -> None:
    """A row, or what the servers cost, as JSON: ``NAME DEVICE SAMPLES REPEATS``."""
    name, device, rows, repeats = sys.argv[1], torch.device(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if name != "servers":
        print(json.dumps(measure(name, device, rows, repeats)))
        return
    with served(SERVED, device) as url:
        figures = remote_figures(url, device, repeats)
        figures |= overlap_figures(url, device, repeats) | ahead_figures(url, device, repeats)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
