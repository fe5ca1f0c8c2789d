"""Seconds of functions that take turns, and the bytes of this process."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def alternate(functions: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each after a warm-up, taking turns in going first."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name in functions if repeat % 2 else reversed(functions):
            synchronize(device)
            started = time.perf_counter()
            functions[name]()
            synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(bare: list[float], ours: list[float]) -> float:
    return statistics.median(b / o for b, o in zip(bare, ours, strict=True))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident(most: bool = False) -> int:
    """This process's resident bytes, or the most of them since `forget_most`, as Linux counts them."""
    name = "VmHWM" if most else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_most() -> None:
    """Begin anew to count the most resident bytes."""
    Path("/proc/self/clear_refs").write_text("5")
