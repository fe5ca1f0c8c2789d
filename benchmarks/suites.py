"""What the suites compare: environments, budgets, seeds, and what is searched for every agent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agents.algorithms import AGENTS, find_agent
from benchmarks.runs import Run
from denoise_env.seeding import generator
from denoise_env.shapes import TRAIN
from denoise_env.worlds import SHAPES, SHAPES_FLUX

SEARCH_SEED, SEARCH_EVAL_SEED, EVAL_SEED = 1000, 4321, 1234
"""Of the search's training and of its evaluation noise, which the runs never see; and of the noise that the run with
seed 0 is evaluated with. The next seed has the next one, the same for all agents, so that an interval over runs covers
the noise of evaluation too."""
UNTRAINED = ("base", "best-of-n")
UNTUNED = (*UNTRAINED, "zero-lr", "shuffled-reward")
"""Controls: nothing to search."""
WIDER = 2.0
"""Factor from the learning rate at the end of a search to the one tried beyond it."""


@dataclass(frozen=True)
class Settings:
    """What a comparison sets and searches for an agent.

    Attributes:
        searched: the setting that is searched beside the learning rate; ``None`` for agents that try more rates.
        values: of that setting; each is tried with every learning rate.
        of_default: whether the values are factors of the agent's own default.
        updates: updates per rollout with each value, where that is searched along: in the only update of a rollout
            every ratio is 1 and no clip binds, and two updates make no more network calls.
        fixed: the agent's settings in all its runs and trials, in the place of its defaults.
    """

    searched: str | None = None
    values: tuple[float, ...] = ()
    of_default: bool = False
    updates: tuple[int, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


_CLIP = Settings("clip_range", (1.0, 100.0), of_default=True, updates=(1, 2))
_FEW = {"draws_per_sample": 6}  # a rollout of 10 steps is then trained at as many places as one of GRPO
SETTINGS: dict[str, Settings] = {
    "grpo": _CLIP,
    "flow-grpo": _CLIP,
    "flow-grpo-fast": _CLIP,
    "mix-grpo": _CLIP,
    "tempflow": _CLIP,
    "grpo-guard": _CLIP,
    "flow-dppo": _CLIP,
    "ddpo-is": _CLIP,
    "ppo": _CLIP,
    "awm": Settings("clip_range", (1e-3, 0.1), updates=(1, 2), fixed=_FEW),
    "nft": Settings(fixed=_FEW),
    "rwr": Settings("temperature", (0.2, 0.05), fixed=_FEW),
    "dpo": Settings("beta", (2000.0, 20.0), fixed=_FEW),
    "dcpo": Settings("beta", (2000.0, 20.0), fixed=_FEW),
    "dgpo": Settings("beta", (100.0, 10.0), fixed=_FEW),
    "crd": Settings("beta", (1.0, 0.1), fixed=_FEW),
}
"""Agent → its settings; one without a line has its defaults and tries learning rates only. An agent of your own takes
the line of the one that it is derived from."""
_ON_POINTS_SETTINGS = {
    "dpo": Settings("beta", (20.0, 5.0), fixed=_FEW),
    "dcpo": Settings("beta", (20.0, 5.0), fixed=_FEW),
    "dgpo": Settings("beta", (5.0, 1.0), fixed=_FEW),
}
"""On Points β weighs a mean over two dimensions only."""


@dataclass(frozen=True)
class Environment:
    """One place to train in.

    Attributes:
        preset: as in ``denoise-env list``.
        overrides: setting → value on top of it.
        search: the same for the search alone.
        prompts: train and evaluate on this many of Shapes' training prompts, drawn by the run's seed: one seed's
            smaller set is part of its larger one. ``None``: what the preset says.
        held_out: prompts to evaluate at the end too.
    """

    preset: str
    overrides: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)
    prompts: int | None = None
    held_out: str | None = None


@dataclass(frozen=True)
class Suite:
    """What is compared, and under which budget.

    Attributes:
        description: a line for ``--help``.
        environments: name → environment.
        reward: the column of ``eval.csv`` that ranks, with a maximum of 1.
        budget: network calls of a run, and of a search trial unless there is a ``trial_budget``.
        seeds: runs per agent and environment.
        trials: search trials per agent and environment; 0 takes the preset's settings.
        lr: learning rates searched, from the lowest to the highest; where the trials ask for another number of them
            they are log-spaced between its ends.
        lr_alone: the same for agents with no second setting to search, which try more of them.
        wider: further trials, at most, while the best one has the lowest or the highest learning rate tried.
        settings: agent → its settings where they are others here than in `SETTINGS`.
        agents: which; empty: all there are.
        pooled: part of the table over all environments.
        trial_budget: network calls of a search trial.
    """

    description: str
    environments: dict[str, Environment]
    reward: str
    budget: int
    seeds: int
    trials: int
    lr: tuple[float, ...]
    lr_alone: tuple[float, ...] = ()
    wider: int = 2
    settings: Mapping[str, Settings] = field(default_factory=dict)
    agents: tuple[str, ...] = ()
    pooled: bool = True
    trial_budget: int | None = None


_ON_POINTS = {"device": "cpu", "eval_points": 8, "eval_kl": True}
_ON_SHAPES = {
    "device": "cpu",
    "rows": 64,
    "microbatch": 64,
    "agent.ema_decay": 0.9,
    "eval_points": 4,
    "eval_kl": True,
    "eval_images_per_prompt": 32,
}
_SHAPES_AGENTS = (
    *("base", "best-of-n", "zero-lr", "shuffled-reward"),
    *("grpo", "ddpo-sf", "ddpo-is", "dpok", "ppo", "rloo", "rwr", "nft", "dpo"),
)
_SHAPES_SEARCH = {"eval_prompts": SHAPES, "eval_images_per_prompt": 8}  # not on the held-out prompts


_ON_SHAPES_FLUX = {**_ON_SHAPES, "eval_points": 3, "eval_images_per_prompt": 4}
_SHAPES_FLUX_AGENTS = (
    *("base", "best-of-n", "zero-lr", "shuffled-reward"),
    *("grpo", "flow-grpo", "flow-grpo-fast", "mix-grpo", "tempflow", "grpo-guard", "flow-dppo"),
    *("ddpo-is", "ppo", "nft", "awm", "dpo"),
)
_SHAPES_FLUX_SEARCH = {"eval_prompts": "compositions", "eval_images_per_prompt": 1}  # not on the held-out prompts


def _points(model: str, text: str) -> Suite:
    # 40 iterations of GRPO: 96 rows · (10 forwards + 6 steps · 3)
    environments = {model: Environment("points", {**_ON_POINTS, "model": model})}
    return Suite(text, environments, "points", 40 * 96 * 28, 10, 6, lr=(2.5e-3, 4e-2), settings=_ON_POINTS_SETTINGS)


SUITES = {
    "points": _points("points", "2-D Gaussian mixtures as a diffusion: minutes"),
    "points-flow": _points("points-flow", "2-D Gaussian mixtures as a rectified flow: minutes"),
    SHAPES: Suite(
        "a tiny Stable Diffusion, evaluated on held-out prompts: hours",
        {SHAPES: Environment(SHAPES, _ON_SHAPES, _SHAPES_SEARCH)},
        SHAPES,
        60 * 64 * 28,
        seeds=3,
        trials=6,
        lr=(1e-5, 1e-4, 3e-4),
        lr_alone=(1e-5, 3e-5, 1e-4, 1.4e-4, 2.1e-4, 3e-4),
        agents=_SHAPES_AGENTS,
        trial_budget=30 * 64 * 28,
    ),
    SHAPES_FLUX: Suite(
        "a tiny FLUX of several shapes, a rectified flow, evaluated on held-out prompts: hours",
        {SHAPES_FLUX: Environment(SHAPES_FLUX, _ON_SHAPES_FLUX, _SHAPES_FLUX_SEARCH)},
        "compositions",
        90 * 64 * 28,
        seeds=3,
        trials=6,
        lr=(3e-5, 1e-4, 3e-4),
        lr_alone=(3e-5, 5e-5, 8e-5, 1.2e-4, 2e-4, 3e-4),
        agents=_SHAPES_FLUX_AGENTS,
        trial_budget=30 * 64 * 28,
    ),
    "prompt-growth": Suite(
        "Shapes as the set of training prompts grows, evaluated on those prompts: an hour",
        {
            f"shapes, {n} prompt{'s' * (n > 1)}": Environment(
                SHAPES,
                {**_ON_SHAPES, "eval_points": 2, "eval_images_per_prompt": max(4, 240 // n)},
                prompts=n,
                held_out="shapes-held-out",
            )
            for n in (1, 10, len(TRAIN))
        },
        SHAPES,
        36 * 64 * 28,
        seeds=3,
        trials=0,  # at the preset's learning rate, which the search on all prompts chooses for all three
        lr=(1e-4,),
        agents=("grpo", "ddpo-sf", "ddpo-is"),
        pooled=False,
    ),
}


def settings_of(suite: Suite, agent: str) -> Settings:
    """An agent's settings in a suite, those of a class of your own ("module:class") included."""
    name = next((kind.name for kind in find_agent(agent).__mro__ if kind in AGENTS.values()), agent)
    return suite.settings.get(name) or SETTINGS.get(name) or Settings()


def grid(suite: Suite, where: str, agent: str) -> list[dict[str, float]]:
    """The settings to search, as overrides; empty for an agent that has none.

    Raises:
        ValueError: the trials cannot be divided among the values of the second setting.
    """
    if agent in UNTUNED or not suite.trials:
        return []
    config, own = make_run(suite, where, agent, 0, {}).config(), settings_of(suite, agent)
    others: list[dict[str, float]] = [{}]
    if own.searched:
        rows = config.prompts_per_iteration * config.agent_options.group_size
        scale = getattr(config.agent_options, own.searched) if own.of_default else 1
        others = [{f"agent.{own.searched}": _round(scale * value)} for value in own.values]
        for other, updates in zip(others, own.updates, strict=False):
            other["agent.updates_per_rollout"] = updates
            other["microbatch"] = min(config.microbatch or rows, rows // updates)
    if suite.trials % len(others):
        raise ValueError(f"the trials of {agent} must be a multiple of {len(others)}, not {suite.trials}")
    count = suite.trials // len(others)
    named = [rates for rates in (suite.lr, suite.lr_alone) if len(rates) == count]
    rates = named[0] if named else np.geomspace(suite.lr[0], suite.lr[-1], count)
    return [{"agent.lr": _round(lr), **other} for lr in rates for other in others]


def beyond(settings: Sequence[dict[str, float]], rewards: Sequence[float]) -> dict[str, float] | None:
    """The best of the tried settings with a learning rate beyond all others, where its own is the lowest or highest."""
    best = settings[int(np.argmax(rewards))]
    rates = {setting["agent.lr"] for setting in settings}
    if len(rates) < 2 or best["agent.lr"] not in (min(rates), max(rates)):
        return None
    factor = WIDER if best["agent.lr"] == max(rates) else 1 / WIDER
    return {**best, "agent.lr": _round(best["agent.lr"] * factor)}


def make_run(suite: Suite, where: str, agent: str, seed: int, setting: dict[str, float], search: bool = False) -> Run:
    """One training run; a search trial evaluates before and after only, with noise of its own."""
    environment = suite.environments[where]
    fixed = {f"agent.{name}": value for name, value in settings_of(suite, agent).fixed.items()}
    overrides = {**environment.overrides, **fixed, **setting, "seed": seed, "network_budget": suite.budget}
    # never reached, as an iteration costs more than one call; what does not train needs one to be evaluated after
    overrides["iterations"] = 1 if agent in UNTRAINED else suite.budget
    overrides["eval_seed"] = EVAL_SEED + seed
    if search:
        overrides["network_budget"] = suite.trial_budget or suite.budget
        overrides |= {"eval_points": 1, "eval_kl": False, "eval_seed": SEARCH_EVAL_SEED, **environment.search}
    prompts: tuple[str, ...] = ()
    if environment.prompts:
        order = torch.randperm(len(TRAIN), generator=generator(seed, "prompt growth")).tolist()
        prompts = tuple(TRAIN[i] for i in order[: environment.prompts])
    return Run(environment.preset, agent, overrides, prompts, None if search else environment.held_out)


def of_ones_own(suite: Suite, model: str, reward: str | None, prompts: str | None) -> Suite:
    """A suite on another model: a family of your own, "module:FAMILY", with a reward and prompts of your own.

    Args:
        suite: whose budget, seeds, search and settings are taken.
        model: as in ``denoise-env train``.
        reward: "module:function" or a name; it ranks and should have a maximum of 1. Default: the suite's.
        prompts: a named set or a file, trained and evaluated on. Default: the model's own.

    Raises:
        ValueError: the suite compares several environments.
    """
    if len(suite.environments) > 1:
        raise ValueError("a suite of several environments takes no other --model")
    (old,) = suite.environments.values()
    reward = reward or suite.reward
    own = {"model": model, "rewards": {reward: 1.0}, "prompts": prompts, "eval_prompts": prompts, "eval_rewards": ()}
    environments = {model: Environment(old.preset, {**old.overrides, **own})}
    changes: dict[str, Any] = {"environments": environments, "reward": reward, "pooled": False}
    return Suite(**{**vars(suite), "description": f"{model}, rewarded by {reward}", **changes})


def _round(value: float) -> float:
    return float(f"{value:.2g}")
