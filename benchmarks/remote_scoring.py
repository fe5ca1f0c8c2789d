"""What a reward server in another process costs, and what scoring there while denoising here saves.

A part of ``python -m benchmarks.throughput --rewards``.
"""

import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from agents.grpo import GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect, denoise
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import Collected, _iterate
from benchmarks.reward_throughput import ROWS, prompts, samples
from benchmarks.timing import alternate, ratio
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.rewards import Reward, load_reward
from denoise_env.rewards.remote import Remote

SERVED = "shapes-hps"


@contextlib.contextmanager
def served(reward: str, device: torch.device, threads: int) -> Iterator[str]:
    """The URL of a server in a process of its own."""
    command = [sys.executable, "-m", "denoise_env", "serve-reward", reward, "--port", "0", "--device", str(device)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split(" is served on ")[1].split(";")[0]
        finally:
            process.kill()


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
            agent_options=GRPOConfig(group_size=8, collect_ahead=collect_ahead),
            prompts_per_iteration=ROWS // 8,
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


FIGURES = {"remote": remote_figures, "overlap": overlap_figures, "collect_ahead": ahead_figures}


def measure(name: str, place: str, repeats: int, threads: int) -> dict[str, float]:
    """One of `FIGURES`, with so many threads here and as many in the server."""
    torch.set_num_threads(threads)
    with served(SERVED, torch.device(place), threads) as url:
        return FIGURES[name](url, torch.device(place), repeats)
