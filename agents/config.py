"""A run's configuration and its presets."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from agents.base import AgentConfig
from agents.grpo import GRPOConfig


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
    reduction: Literal["mean", "sum"] = "mean"
    """Log-probs averaged over latent dimensions (the field's practice) or summed (the true density)."""

    agent: GRPOConfig = field(default_factory=GRPOConfig)
    """The algorithm."""
    iterations: int = 100
    """Rollouts to train on."""
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


PRESETS: dict[str, Callable[[], TrainConfig]] = {"shapes": shapes, "points": points, "dancegrpo": dancegrpo}
AGENTS: dict[str, type[AgentConfig]] = {"grpo": GRPOConfig}
