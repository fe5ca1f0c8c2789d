"""Off-the-shelf agents against the base sampler: PPO and SAC of Stable-Baselines3 and PPO of TorchRL, unmodified.

    python -m benchmarks.generic_agents [--only shapes] [--seeds 3]

Every agent trains from nothing beside the frozen pretrained model, through an action convention: on Points the
*noise* action, on Shapes the *control* action (guidance scale and noise scale). Then base sampler and agent run the
same episodes, with the same first latents and prompts (Shapes: the held-out ones). Writes ``generic-agents.json`` and
``generic-agents.md``.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents.generic import ScriptedAgent, run
from agents.generic.torchrl import TorchRLPPO, TorchRLPPOConfig
from agents.training.evaluation import bootstrap
from denoise_env import DenoiseTorchRLEnv, DenoiseVectorEnv, DenoisingMDP
from denoise_env.conventions import ActionConvention, Control, Flat, Noise
from denoise_env.prompt_files import load_prompts
from denoise_env.sb3 import SB3VecEnv
from denoise_env.torchrl_transforms import ActionTransform, FlatTransform
from denoise_env.worlds import PROMPT_SETS, SHAPES
from denoise_env.wrappers import ControlAction, FlatObservation, NoiseAction

STEPS, ROWS, LEARNING_RATE = 10, 64, 1e-3
EVALUATION_SEED = 1_000_000
Act = Callable[[Any, bool], Any]


@dataclass(frozen=True)
class World:
    """A model, and how agents meet it."""

    model: str
    convention: type[ActionConvention]
    convention_options: dict[str, Any]
    flat_options: dict[str, Any]
    prompts: str
    agents: tuple[str, ...]
    episodes: int
    evaluation: int

    def vector(self, mdp: DenoisingMDP, rows: int, **options: Any) -> FlatObservation:
        wrapper: Any = NoiseAction if self.convention is Noise else ControlAction
        env = DenoiseVectorEnv.from_mdp(mdp, rows, output="torch")
        return FlatObservation(wrapper(env, **{**self.convention_options, **options}), **self.flat_options)

    def torchrl(self, mdp: DenoisingMDP, rows: int) -> TransformedEnv:
        action, flat = self.convention(mdp, **self.convention_options), Flat(mdp, **self.flat_options)
        transforms = Compose(ActionTransform(action), FlatTransform(flat))
        return TransformedEnv(DenoiseTorchRLEnv.from_mdp(mdp, rows), transforms)


WORLDS = [
    World("points", Noise, {}, {}, "points", ("SB3 PPO", "TorchRL PPO", "SB3 SAC"), episodes=6400, evaluation=2048),
    World(
        SHAPES,
        Control,
        {"controls": {"guidance_scale": (0.0, 4.0), "noise_scale": (0.0, 1.5)}},
        {"parts": ("step", "prompt")},
        "shapes-held-out",
        ("constant control", "SB3 PPO", "TorchRL PPO"),
        episodes=3840,
        evaluation=512,
    ),
]


def sb3_ppo(world: World, mdp: DenoisingMDP, episodes: int, seed: int) -> Act:
    env = SB3VecEnv(world.vector(mdp, ROWS))
    options: dict[str, Any] = {"learning_rate": LEARNING_RATE, "n_steps": STEPS, "batch_size": 160, "gamma": 1.0}
    return learn_sb3(PPO("MlpPolicy", env, seed=seed, device="cpu", **options), episodes)


def sb3_sac(world: World, mdp: DenoisingMDP, episodes: int, seed: int) -> Act:
    # SAC's first actions are uniform in the box, so the box is small; a quarter of PPO's episodes
    env = SB3VecEnv(world.vector(mdp, ROWS, bound=2.0))
    options: dict[str, Any] = {"learning_rate": LEARNING_RATE, "learning_starts": 1280, "gradient_steps": 8}
    return learn_sb3(SAC("MlpPolicy", env, gamma=1.0, seed=seed, device="cpu", **options), episodes // 4)


def learn_sb3(model: Any, episodes: int) -> Act:
    model.learn(episodes * STEPS)
    return lambda observation, deterministic: model.predict(observation.numpy(), deterministic=deterministic)[0]


def torchrl_ppo(world: World, mdp: DenoisingMDP, episodes: int, seed: int) -> Act:
    env = world.torchrl(mdp, ROWS)
    env.set_seed(seed)
    sizes = (env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1])
    agent = TorchRLPPO(*sizes, TorchRLPPOConfig(lr=LEARNING_RATE, minibatch=160), seed)
    agent.learn(env, episodes)

    @torch.no_grad()
    def act(observation: torch.Tensor, deterministic: bool) -> torch.Tensor:
        with set_exploration_type(ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM):
            return agent.actor(TensorDict({"observation": observation}, [len(observation)]))["action"]

    return act


def constant(world: World, mdp: DenoisingMDP, episodes: int, seed: int) -> Act:
    """The best of guidance 1, 1.5, 2, 3 and noise scale 0, 0.5, 1 on the training prompts, the same at every step."""
    control = Control(mdp, **world.convention_options).action(guidance_scale=2.0, noise_scale=0.5)
    return lambda observation, deterministic: control.expand(len(observation), -1)


AGENTS: dict[str, Any] = {
    "SB3 PPO": sb3_ppo,
    "TorchRL PPO": torchrl_ppo,
    "SB3 SAC": sb3_sac,
    "constant control": constant,
}
ONCE = {"SB3 SAC", "constant control"}
"""Measured with one seed: a slow learner, and one that does not learn."""


def returns_of(env: FlatObservation, episodes: int, act: Any) -> np.ndarray:
    """Returns ``[episodes]`` of fixed seeds."""
    starts = range(EVALUATION_SEED, EVALUATION_SEED + episodes, env.num_envs)
    parts = [run(env, ScriptedAgent(act), env.num_envs, seed=s, learn=False, desc="evaluate") for s in starts]
    return np.concatenate(parts)


def mean_and_interval(values: np.ndarray) -> list[float]:
    return [float(values.mean()), *bootstrap(values[None], seed=0)]


def evaluation_mdp(world: World, mdp: DenoisingMDP) -> DenoisingMDP:
    """The same model with the prompts of the evaluation."""
    return DenoisingMDP(mdp.model, mdp.rewards, load_prompts(world.prompts, PROMPT_SETS), STEPS)


def base_sampler(world: World, episodes: int) -> np.ndarray:
    """Returns of the neutral control, which is the base sampler to the bit where guidance is not among the controls."""
    env = DenoiseVectorEnv.from_mdp(evaluation_mdp(world, DenoisingMDP.make(world.model, num_steps=STEPS)), ROWS * 2)
    controlled = FlatObservation(ControlAction(env, controls={"noise_scale": (0.0, 1.0)}))
    return returns_of(controlled, episodes, lambda observation: np.zeros((len(observation), 1), np.float32))


def measure(world: World, agent: str, seed: int, base: np.ndarray, episodes: int) -> dict[str, Any]:
    mdp = DenoisingMDP.make(world.model, num_steps=STEPS)
    started = time.perf_counter()
    act = AGENTS[agent](world, mdp, episodes, seed)
    seconds = time.perf_counter() - started
    env = world.vector(evaluation_mdp(world, mdp), ROWS * 2)
    found = {"world": world.model, "action": world.convention.__name__.lower(), "agent": agent, "seed": seed}
    found |= {"train_seconds": round(seconds, 1), "base": mean_and_interval(base)}
    for name, deterministic in (("deterministic", True), ("stochastic", False)):
        torch.manual_seed(EVALUATION_SEED)
        returns = returns_of(env, len(base), lambda observation, mean=deterministic: act(observation, mean))
        found |= {name: mean_and_interval(returns), f"{name}_gain": mean_and_interval(returns - base)}
    return found


def table(found: list[dict[str, Any]], command: str) -> str:
    def cell(values: list[float]) -> str:
        mean, low, high = values
        return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

    lines = [
        "| world | action | agent | seed | base sampler | deterministic | stochastic | gain | training |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [cell(row[name]) for name in ("base", "deterministic", "stochastic", "deterministic_gain")]
        head = [str(row[name]) for name in ("world", "action", "agent", "seed")]
        lines.append(f"| {' | '.join(head + cells)} | {row['train_seconds']:.0f} s |")
    return f"# Generic agents against the base sampler\n\n`{command}`\n\n{NOTES}\n\n" + "\n".join(lines) + "\n"


NOTES = """Mean reward of the evaluation episodes with its 95 % bootstrap interval over episodes (Points 2048, Shapes
512, unless the command says otherwise). The gain is the deterministic policy's, over the same episodes of the base
sampler (paired: same first latents, same prompts). Points: the noise action, all six mixtures. Shapes: the control
action (guidance scale in [0, 4], noise scale in [0, 1.5]); its prompts were never trained on, unless the command has
`--training-prompts`. "Constant control" learns nothing: it is guidance 2 and noise scale 0.5 at every step, the best
of a sweep of twelve on the training prompts (128 episodes each)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of 'world agent', such as 'shapes' or 'points SB3'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, help="of training, instead of the benchmark's")
    parser.add_argument("--evaluation", type=int, help="episodes of evaluation, instead of the benchmark's")
    parser.add_argument("--training-prompts", action="store_true", help="evaluate on the prompts of training")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.generic_agents", *sys.argv[1:]])
    found = []
    worlds = [replace(world, prompts=world.model) if options.training_prompts else world for world in WORLDS]
    for world in worlds:
        agents = [agent for agent in world.agents if options.only in f"{world.model} {agent}"]
        if agents:
            base = base_sampler(world, options.evaluation or world.evaluation)
        for agent, seed in itertools.product(agents, range(options.seeds)):
            if agent in ONCE and seed:
                continue
            found.append(measure(world, agent, seed, base, options.episodes or world.episodes))
            print(table(found[-1:], command).splitlines()[-1], flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchrl", "stable-baselines3")}
    about = {"command": command, "versions": versions, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    options.output.mkdir(parents=True, exist_ok=True)
    result = {**about, "worlds": [str(world) for world in worlds], "results": found}
    name = "generic-agents-training-prompts" if options.training_prompts else "generic-agents"
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / f"{name}.md").write_text(table(found, command), encoding="utf-8")


if __name__ == "__main__":
    main()
