"""What scoring costs: ``python -m benchmarks.throughput --rewards``.

Every reward is measured in a process of its own, those with published weights at their architecture
(`benchmarks.reward_architectures`); then servers are (`benchmarks.remote_scoring`). Images are of 512x512 pixels and
clips of 16 frames of 256x256; pictures of the worlds that ship are of their own size.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.training.checkpoints import write_atomically
from benchmarks.reward_architectures import PUBLISHED
from benchmarks.timing import forget_most, resident, synchronize
from denoise_env.prompts import Prompt
from denoise_env.rewards import Reward, load_reward
from denoise_env.rewards.base import DTYPES
from denoise_env.shapes.compositions import TRAIN as COMPOSITIONS
from denoise_env.shapes.grammar import TRAIN as SHAPES

WORLDS = {"shapes": SHAPES, "shapes-clip": SHAPES, "shapes-hps": SHAPES, "compositions": COMPOSITIONS}
"""Rewards whose weights ship → the captions of their world."""
SIDE, ROWS = 32, 64
"""Of a world's pictures: pixels, and how many are scored at a time, or are in a rollout."""
CLIPS = ("videoalign",)
REWARDS = (*WORLDS, "jpeg_compressibility", *PUBLISHED)
HOST_GIB = 14.0
"""The most memory that a network on the CPU may take here."""
SECONDS = 20.0
"""A row is repeated until that much time has passed, at least once."""
MOST_SECONDS = 600
"""A process that takes longer is given up."""
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ("benchmarks.remote_scoring", "transformers.models.auto", "open_clip", "httpx2")
OBJECTS = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}


# --- One reward ---


def samples(name: str, rows: int, draw: torch.Generator) -> Tensor:
    """Smooth pictures or clips for a reward, of whole bytes."""
    clips = name in CLIPS
    count, side = (16 * rows, 256) if clips else (rows, SIDE if name in WORLDS else 512)
    coarse = torch.rand(count, 3, side // 16, side // 16, generator=draw)
    pictures = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).round() / 255
    return pictures.view(rows, 16, *pictures.shape[1:]) if clips else pictures


def prompts(name: str, rows: int) -> list[Prompt]:
    captions = WORLDS.get(name) or [f"a photo of a red dog, number {i} of a series by the sea" for i in range(rows)]
    return [Prompt(captions[i % len(captions)], metadata=OBJECTS) for i in range(rows)]


def measure(name: str, place: str, rows: int, repeats: int, threads: int) -> dict[str, Any]:
    """A reward's row of the table, measured in this process."""
    torch.set_num_threads(threads)
    device = torch.device(place)
    published = PUBLISHED.get(name)
    dtype = published.dtype if published and device.type == "cuda" else "fp32"  # slow on a CPU without instructions
    found: dict[str, Any] = {"reward": name, "precision": dtype}
    if published:
        found["parameters"] = published.parameters()
        needed = found["parameters"] * DTYPES[dtype].itemsize
        if needed * 1.1 > (torch.cuda.mem_get_info()[0] if device.type == "cuda" else HOST_GIB * 2**30):
            return {**found, "needed": needed}
    rows = ROWS if name in WORLDS else 1 if name in CLIPS else rows
    draw = torch.Generator().manual_seed(0)
    batches = [samples(name, rows, draw).to(device) for _ in range(1 + repeats)]  # some remember what they have scored
    asked = prompts(name, rows)
    gc.collect()
    before = resident()
    reward: Reward = published.make(dtype) if published else load_reward(name)
    reward(batches[0][:1], asked[:1])
    modules = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    alive = {id(p): p.numel() for module in modules for p in module.parameters() if not p.is_meta}
    found["parameters"] = sum(alive.values())
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


# --- All of them ---


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own; a dictionary with "error" where it fails.

    The processes are forked from one that has imported what they need and has done nothing yet.
    """
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    group = process.pid
    assert group is not None
    sender.close()
    try:
        if not receiver.poll(MOST_SECONDS):
            return {"error": f"not done in {MOST_SECONDS} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        return {"error": f"it ended with status {process.exitcode}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)  # with the server that it may have started
        process.join()


def _answer(sender: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    os.setsid()
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send({"error": f"{type(error).__name__}: {error}"})


def run(options: argparse.Namespace) -> None:
    """Measure what ``options.rewards`` names, all by default, and print the table.

    Where ``options.json`` names a file, all known rows are written there after each, and in Markdown beside it.

    Raises:
        ValueError: an unknown name.
    """
    from benchmarks import remote_scoring

    every = (*REWARDS, *remote_scoring.FIGURES)
    if unknown := [name for name in options.rewards if name not in every]:
        raise ValueError(f"there is no {unknown[0]!r} to measure, but {', '.join(every)}")
    CONTEXT.set_forkserver_preload([*PRELOADED])
    threads, file = torch.get_num_threads(), options.json
    known = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
    report = {"rewards": [], "servers": {}, **known}
    report["machine"] = {"device": options.device, "threads": threads, "torch": torch.__version__}
    for name in options.rewards or every:
        if name in remote_scoring.FIGURES:  # trainer and server share the cores
            shared = max(1, threads // 2)
            found = apart(remote_scoring.measure, name, options.device, options.repeats, shared)
            report["servers"][name] = found
            print(name, found, flush=True)
        else:
            row = apart(measure, name, options.device, options.samples, options.repeats, threads)
            rows = {**{row["reward"]: row for row in report["rewards"]}, name: {"reward": name, **row}}
            report["rewards"] = [rows[name] for name in REWARDS if name in rows]
            print(_line(rows[name]), flush=True)
        if file:
            write_atomically(file, json.dumps(report, indent=1) + "\n")
            write_atomically(file.with_suffix(".md"), table(report))
    print(f"\n{table(report)}")


def table(report: dict[str, Any]) -> str:
    """The rows in Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    head = "| reward | parameters | precision | samples/s | ms/sample | peak memory, GiB |\n|---|---|---|---|---|---|"
    figures = [
        f"| {name} | {value} |" if name == "error" else f"| {name} | {_digits(value)} |"
        for found in report["servers"].values()
        for name, value in found.items()
    ]
    lines = [f"{machine}.", "", head, *map(_line, report["rewards"]), "", "| figure | value |", "|---|---|", *figures]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| `{row['reward']}` | | | {row['error']} | | |"
    count = row["parameters"]
    size = f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M" if count else "none"
    start = f"| `{row['reward']}` | {size} | {row['precision']} |"
    if "needed" in row:
        return f"{start} not run: its weights alone take {row['needed'] / 2**30:.1f} GiB | | |"
    times = " | ".join(_digits(row[name]) for name in ("samples_per_second", "ms_per_sample"))
    return f"{start} {times} | {row['peak_bytes'] / 2**30:.2f} |"


def _digits(value: float) -> str:
    """Three significant digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
