"""Data files as the suite writes them, of invented runs."""

import numpy as np

from benchmarks.suite import write_results


def record(environment, agent, seed, reward, kl=None, error=None):
    steps = np.arange(len(reward or ()))
    curve = {
        "iteration": (5 * steps).tolist(),
        "network_calls": (1000 * steps).tolist(),
        "kl": kl or (2.0 * steps).tolist(),
        "diversity": (0.5 / (1 + steps)).tolist(),
        "seconds": (0.1 * steps).tolist(),
        "reward": reward,
    }
    return {
        "environment": environment,
        "agent": agent,
        "seed": seed,
        "setting": {"lr": 1e-3},
        "error": error,
        "curve": None if error else curve,
        "held_out": {},
    }


def write(path, runs, pooled=True):
    head = {
        "suite": path.stem,
        "command": f"python -m benchmarks.suite run {path.stem}",
        "versions": {"revision": "0"},
        "description": "invented",
        "pooled": pooled,
        "budget": 2000,
        "seeds": 2,
        "trials": 0,
    }
    write_results({**head, "search": [], "runs": runs}, path)
