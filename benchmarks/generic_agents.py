"""Off-the-shelf agents against the base sampler: PPO and SAC of Stable-Baselines3 and PPO of TorchRL, unmodified.

    python -m benchmarks.generic_agents [--only shapes] [--seeds 3]

Every agent trains from nothing beside the frozen pretrained model, through an action convention: on Points the
*noise* action, on Shapes the *control* action (guidance scale, noise scale, drift of the four latent channels). Then
base sampler and agent run the same episodes, the same first latents and prompts (Shapes: the held-out ones), so the
differences are paired; intervals are 95 % bootstrap intervals over episodes. Writes ``generic-agents.json`` and
``generic-agents.md`` into ``benchmarks/results``.
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from agents.evaluate import bootstrap
from agents.generic import ScriptedAgent, run
from agents.generic.torchrl import TorchRLPPO, TorchRLPPOConfig
from denoise_env import DenoiseTorchRLEnv, DenoiseVectorEnv, DenoisingMDP
from denoise_env.conventions import ActionConvention, Control, Flat, Noise
from denoise_env.mdp import load_prompts
from denoise_env.sb3 import SB3VecEnv
from denoise_env.torchrl_transforms import ActionTransform, FlatTransform
from denoise_env.wrappers import ControlAction, FlatObservation, NoiseAction

STEPS = 10
EVALUATION_SEED = 1_000_000
WRAPPERS: dict[str, Any] = {"noise": NoiseAction, "control": ControlAction}
CONVENTIONS: dict[str, type[ActionConvention]] = {"noise": Noise, "control": Control}
Act = Callable[[Any, bool], Any]

WORLDS: dict[str, dict[str, Any]] = {
    "points": {"action": "noise", "rows": 64, "episodes": 6400, "evaluation": 2048, "prompts": "points"},
    "shapes": {"action": "control", "rows": 128, "episodes": 6400, "evaluation": 512, "prompts": "shapes-held-out"},
}


def sb3_ppo(mdp: DenoisingMDP, action: str, rows: int, episodes: int, seed: int) -> Act:
    model = PPO(
        "MlpPolicy", sb3_env(mdp, action, rows), n_steps=STEPS, batch_size=256, gamma=1.0, seed=seed, device="cpu"
    )
    return learn_sb3(model, episodes)


def sb3_sac(mdp: DenoisingMDP, action: str, rows: int, episodes: int, seed: int) -> Act:
    # SAC's first actions are uniform in the box, so the box is small; a quarter of PPO's episodes
    env = sb3_env(mdp, action, rows, bound=2.0)
    model = SAC("MlpPolicy", env, learning_starts=2560, gradient_steps=8, gamma=1.0, seed=seed, device="cpu")
    return learn_sb3(model, episodes // 4)


def sb3_env(mdp: DenoisingMDP, action: str, rows: int, **options: Any) -> SB3VecEnv:
    return SB3VecEnv(FlatObservation(WRAPPERS[action](vector_env(mdp, rows), **options)))


def learn_sb3(model: Any, episodes: int) -> Act:
    model.learn(episodes * STEPS)
    return lambda observation, deterministic: model.predict(observation.numpy(), deterministic=deterministic)[0]


def torchrl_ppo(mdp: DenoisingMDP, action: str, rows: int, episodes: int, seed: int) -> Act:
    flat = Flat(mdp)
    transforms = Compose(ActionTransform(CONVENTIONS[action](mdp)), FlatTransform(flat))
    env = TransformedEnv(DenoiseTorchRLEnv.from_mdp(mdp, rows), transforms)
    env.set_seed(seed)
    agent = TorchRLPPO(flat.size, env.action_spec.shape[-1], TorchRLPPOConfig(), seed)
    agent.learn(env, episodes)

    @torch.no_grad()
    def act(observation: torch.Tensor, deterministic: bool) -> torch.Tensor:
        with set_exploration_type(ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM):
            return agent.actor(TensorDict({"observation": observation}, [len(observation)]))["action"]

    return act


AGENTS: dict[str, Any] = {"SB3 PPO": sb3_ppo, "TorchRL PPO": torchrl_ppo, "SB3 SAC": sb3_sac}


def vector_env(mdp: DenoisingMDP, rows: int) -> DenoiseVectorEnv:
    return DenoiseVectorEnv.from_mdp(mdp, rows, output="torch")


def evaluate(mdp: DenoisingMDP, action: str, rows: int, episodes: int, act: Any) -> np.ndarray:
    """Returns ``[episodes]`` of fixed seeds."""
    found = []
    for first in range(0, episodes, rows):
        env = FlatObservation(WRAPPERS[action](vector_env(mdp, rows)))
        found.append(run(env, ScriptedAgent(act), rows, seed=EVALUATION_SEED + first, learn=False, desc="evaluate"))
    return np.concatenate(found)


def mean_and_interval(values: np.ndarray) -> list[float]:
    return [float(values.mean()), *bootstrap(values[None], seed=0)]


def measure(world: str, agent: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    settings = WORLDS[world]
    action, rows = settings["action"], settings["rows"]
    episodes, evaluation = options.episodes or settings["episodes"], options.evaluation or settings["evaluation"]
    mdp = DenoisingMDP.make(world, num_steps=STEPS)
    test = DenoisingMDP(mdp.model, mdp.rewards, load_prompts(settings["prompts"]), STEPS)
    base = evaluate(test, "control", rows, evaluation, lambda observation: neutral(test, len(observation)))
    started = time.perf_counter()
    act = AGENTS[agent](mdp, action, rows, episodes, seed)
    seconds = time.perf_counter() - started
    found = {"world": world, "action": action, "agent": agent, "seed": seed, "train_seconds": round(seconds, 1)}
    found |= {"evaluation_episodes": evaluation, "base": mean_and_interval(base)}
    for name, deterministic in (("deterministic", True), ("stochastic", False)):
        torch.manual_seed(EVALUATION_SEED)
        returns = evaluate(test, action, rows, evaluation, lambda observation, d=deterministic: act(observation, d))
        found |= {name: mean_and_interval(returns), f"{name}_gain": mean_and_interval(returns - base)}
    return found


def neutral(mdp: DenoisingMDP, rows: int) -> torch.Tensor:
    return torch.zeros(rows, *Control(mdp).shape)


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
    return f"# Generic agents against the base sampler\n\n`{command}`\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of 'world agent', such as 'shapes' or 'points SB3'")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, help="of training, instead of the benchmark's")
    parser.add_argument("--evaluation", type=int, help="episodes of evaluation, instead of the benchmark's")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.generic_agents", *sys.argv[1:]])
    found = []
    for world in WORLDS:
        for agent in AGENTS:
            if options.only in f"{world} {agent}" and (world, agent) != ("shapes", "SB3 SAC"):
                for seed in range(options.seeds):
                    found.append(measure(world, agent, seed, options))
                    print(table(found[-1:], command).splitlines()[-1], flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchrl", "stable-baselines3")}
    machine = {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "versions": versions, "machine": machine, "worlds": WORLDS, "results": found}
    (options.output / "generic-agents.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / "generic-agents.md").write_text(table(found, command))


if __name__ == "__main__":
    main()
