"""Data files as the suite writes them, of invented runs."""

import json

import numpy as np

from benchmarks import datafile


def record(environment, agent, seed, reward, kl=None, error=None, lr=1e-3, code="v1 aa"):
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
        "setting": {"lr": lr},
        "code": None if error else code,
        "error": error,
        "curve": None if error else curve,
        "held_out": {},
    }


def write(path, runs, pooled=True, search=()):
    head = {
        "suite": path.stem,
        "commands": [f"python -m benchmarks.suite run {path.stem}"],
        "versions": {"code": "v1 aa"},
        "description": "invented",
        "pooled": pooled,
        "environments": {run["environment"]: {"model": run["environment"], "kernel": "ddim"} for run in runs},
        "reward": "points",
        "budget": 2000,
        "trial_budget": None,
        "seeds": 2,
        "trials": 0,
    }
    datafile.write({**head, "search": list(search), "runs": runs}, path)


def write_optimum(directory):
    """Points' frontier, as benchmarks.optimum writes it."""
    about = {"model": "points", "kernel": "ddim", "eta": 1.0, "num_steps": 10, "policies": "gaussian", "prompt": "mean"}
    frontier = {"betas": [None, 0.2, 0.1], "rewards": [0.2, 0.7, 0.9], "kls": [0.0, 2.0, 4.0], "highest": 1.0}
    (directory / "optimum-points.json").write_text(json.dumps([{**about, **frontier}]))
