"""A run's configuration, its presets, and the agents by name."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from agents.awm import AWM
from agents.base import Agent, AgentConfig
from agents.controls import Base, BestOfN, ShuffledReward, ZeroLR
from agents.ddpo import DDPO, DDPOSF, DDPOConfig
from agents.dpo import DCPO, DPO
from agents.dpok import DPOK, DPOKConfig
from agents.flow_dppo import FlowDPPO
from agents.flow_grpo import FlowGRPO
from agents.flow_grpo_fast import FlowGRPOFast
from agents.grpo import GRPO, GRPOConfig
from agents.grpo_guard import GRPOGuard
from agents.mix_grpo import MixGRPO
from agents.nft import NFT
from agents.ppo import PPO
from agents.rloo import RLOO
from agents.rwr import RWR
from agents.tempflow import TempFlow
from denoise_env.naming import load_attribute, suggest

AGENTS: dict[str, type[Agent]] = {
    agent.name: agent
    for agent in (
        GRPO,
        FlowGRPO,
        FlowGRPOFast,
        MixGRPO,
        TempFlow,
        GRPOGuard,
        FlowDPPO,
        DDPOSF,
        DDPO,
        DPOK,
        PPO,
        RLOO,
        RWR,
        NFT,
        AWM,
        DPO,
        DCPO,
        Base,
        BestOfN,
        ZeroLR,
        ShuffledReward,
    )
}
"""Name → agent; a new one is a file, an import and a line here. ``find_agent`` adds those from elsewhere."""


def find_agent(name: str) -> type[Agent]:
    """The agent of a name in `AGENTS`, or of ``module:attribute`` for one of your own.

    Raises:
        ValueError: no such agent, or it is none.
    """
    if name in AGENTS:
        return AGENTS[name]
    if ":" not in name:
        raise ValueError(f"unknown agent {name!r}; {suggest(name, AGENTS)} Or name your own as 'module:class'.")
    found = load_attribute(name, "agent")
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ValueError(f"the agent {name!r} must be a subclass of agents.base.Agent")
    taken = [other for other, agent in AGENTS.items() if agent.config_type is found.config_type]
    if taken:
        raise ValueError(f"the agent {name!r} needs a config_type of its own, not that of {taken[0]!r}: subclass it")
    AGENTS[name] = found
    return found


@dataclass
class TrainConfig:
    """One training run."""

    model: str = "shapes"
    """"shapes", "points", "points-flow", or the path or hub id of a Stable Diffusion checkpoint."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Reward name → weight; empty: the embedded world's own. Your own: "module:name"."""
    prompts: str | None = None
    """"shapes", "points", or a text file with one prompt a line; default: the embedded world's training prompts."""
    num_steps: int = 10
    """Denoising steps per image, K."""
    guidance_scale: float | None = None
    """Classifier-free guidance w, in rollout and training alike; 1 is none. Default: 1 for shapes, else 5."""
    height: int | None = None
    """Image height in pixels; default: what the checkpoint was trained for."""
    width: int | None = None
    """Image width in pixels."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Compute and latent dtype; trained parameters are float32 either way."""
    lora_rank: int = 0
    """LoRA rank; 0 trains every weight of the denoiser."""
    lora_alpha: float | None = None
    """LoRA's alpha; default: the rank."""
    gradient_checkpointing: bool = False
    """Trade compute for memory in the update."""
    device: str = "auto"
    """"cpu", "cuda", …; "auto" takes the GPU where there is one."""

    kernel: str | None = None
    """Transition kernel: ddim, dance_sde, flow_sde, cps. Default: ddim on a diffusion, dance_sde on a flow."""
    eta: float | None = None
    """The kernel's noise level; default: the kernel's own (ddim 1.0, dance_sde 0.3)."""
    reduction: Literal["mean", "sum", "squared_error"] = "mean"
    """Log-probs averaged over latent dimensions (the field's practice) or summed (the true density); or minus the mean
    squared error, which is no density but what published code for CPS takes for one."""

    agent: AgentConfig = field(default_factory=GRPOConfig)
    """The algorithm's settings; --agent NAME chooses the algorithm."""
    iterations: int = 100
    """Rollouts to train on."""
    network_budget: int | None = None
    """Stop after the first iteration that has spent so many network calls (per row: forward 1, with backward 3)."""
    prompts_per_iteration: int = 8
    """Prompts per rollout; times group_size is the number of images (8 · 16 = 128)."""
    microbatch: int | None = 128
    """Images per network call, at most; bounds the memory and does not change the result."""
    seed: int = 0
    """Seeds every random draw of the run."""
    max_unscored: float = 0.5
    """Stop when more than this share of a rollout's images could not be scored."""

    eval_every: int = 50
    """Iterations between evaluations; there is always one before and one after. 0: only those."""
    eval_points: int = 0
    """Evaluate instead whenever another of so many equal parts of the network_budget is spent."""
    eval_kl: bool = False
    """Measure the KL of the policy's trajectories to the base model in every evaluation: twice its network calls."""
    eval_prompts: str | None = None
    """Likewise, "shapes-held-out" too; default: that for shapes, else the first 32 training prompts."""
    eval_rewards: tuple[str, ...] = ()
    """Rewards measured in evaluation beside the trained ones."""
    eval_images_per_prompt: int = 8
    """Images per evaluation prompt, from fixed seeds."""
    eval_seed: int = 1234
    """Seeds the evaluation's noise, whatever the run's seed."""
    sample_every: int = 50
    """Iterations between grids of samples from fixed seeds. 0: only before and after."""
    checkpoint_every: int = 25
    """Iterations between checkpoints; there is always one at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""

    output_dir: str | None = None
    """The run's directory; default: runs/<preset>-seed<seed>, with -2, -3, … where that holds a run."""
    wandb: bool = False
    """Log to Weights & Biases too (extra: wandb)."""
    tensorboard: bool = False
    """Log to TensorBoard too (extra: tensorboard)."""


def shapes() -> TrainConfig:
    """GRPO on the shipped tiny Stable Diffusion: minutes on a laptop. The default."""
    return TrainConfig(
        agent=GRPOConfig(step_weighting="std", ema_decay=0.97),
        iterations=130,
        eval_rewards=("shapes-correct",),
        eval_images_per_prompt=64,
    )


def points() -> TrainConfig:
    """GRPO on 2-D Gaussian mixtures: seconds."""
    agent = GRPOConfig(lr=3e-3, step_weighting="std", ema_decay=0.9)
    return TrainConfig(
        model="points",
        agent=agent,
        prompts_per_iteration=6,
        microbatch=None,
        iterations=100,
        eval_images_per_prompt=128,
        checkpoint_every=50,
    )


def dancegrpo() -> TrainConfig:
    """DanceGRPO's Stable Diffusion 1.4 setting, choice for choice (give --model, --prompts and --rewards).

    512 images an iteration in groups of 16 from shared noise, 50 DDIM steps with η = 1, guidance 5 in rollout
    and training, the last step dropped and the other 49 trained in a random order drawn per sample, mean
    log-prob, unbiased std, clip 1e-4, |A| ≤ 5, two updates, AdamW at 1e-5 with weight decay 1e-4.
    """
    return TrainConfig(
        model="CompVis/stable-diffusion-v1-4",
        num_steps=50,
        guidance_scale=5.0,
        height=512,
        width=512,
        dtype="bf16",
        kernel="ddim",
        eta=1.0,
        agent=GRPOConfig(lr=1e-5, updates_per_rollout=2, timestep_fraction=1.0),
        iterations=300,
        prompts_per_iteration=32,
        microbatch=8,
        eval_images_per_prompt=4,
        gradient_checkpointing=True,
    )


def ddpo() -> TrainConfig:
    """DDPO-IS's Stable Diffusion 1.4 setting: 50 steps, η 1, guidance 5, LoRA at 3e-4 (give --prompts and --rewards).

    256 images an iteration, two updates, clip 1e-4 on the mean log-prob, advantages per prompt, |A| ≤ 5.
    """
    agent = DDPOConfig(updates_per_rollout=2)
    return dataclasses.replace(dancegrpo(), agent=agent, lora_rank=4, prompts_per_iteration=256)


def dpok() -> TrainConfig:
    """DPOK's Stable Diffusion 1.5 setting: 50 steps, η 1, LoRA at 1e-5, α 10, β 0.01 (give --prompts and --rewards)."""
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return dataclasses.replace(ddpo(), model=model, agent=DPOKConfig(), prompts_per_iteration=16, iterations=10_000)


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "shapes": shapes,
    "points": points,
    "dancegrpo": dancegrpo,
    "ddpo": ddpo,
    "dpok": dpok,
}


def make_config(preset: str, agent: str | None = None, rows: int | None = None) -> TrainConfig:
    """A preset's configuration, with another agent in the place of its own.

    The agent comes with its published settings, but for what the preset says of the learning rate, the averaging and,
    where the algorithm has none of its own, the step weighting; and with the largest group up to its own that divides
    the episodes.

    Args:
        preset: a name in `PRESETS`.
        agent: a name in `AGENTS`, or ``module:class``; default: the preset's.
        rows: episodes per iteration; default: the preset's.

    Raises:
        ValueError: no such preset or agent.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; {suggest(preset, PRESETS)}")
    config = PRESETS[preset]()
    old = config.agent
    rows = rows or config.prompts_per_iteration * old.group_size
    if agent is None or agent == name_of(old):
        return dataclasses.replace(config, prompts_per_iteration=rows // old.group_size)
    new = find_agent(agent).config_type()
    for name in ("lr", "step_weighting", "ema_decay"):
        if hasattr(new, name) and not (name == "step_weighting" and AGENTS[agent].weighs_steps):
            setattr(new, name, getattr(old, name, getattr(new, name)))
    group = max(n for n in range(1, new.group_size + 1) if rows % n == 0)
    new.group_size = group
    return dataclasses.replace(config, agent=new, prompts_per_iteration=rows // group)


def name_of(config: AgentConfig) -> str:
    """The name of the agent that a configuration belongs to."""
    return next(name for name, agent in AGENTS.items() if agent.config_type is type(config))


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON has it; ``agent`` has a ``name``."""
    values = dataclasses.asdict(config)
    return {**values, "agent": {"name": name_of(config.agent), **values["agent"]}}
