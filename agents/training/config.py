"""A run's configuration."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from agents.algorithms import find_agent
from agents.base import AgentConfig
from denoise_env.models import ModelOptions, model_options
from denoise_env.worlds import DEFAULT


@dataclass
class TrainConfig:
    """One training run."""

    model: str = DEFAULT
    """The model to train: a world (denoise-env list shows them), the directory or hub id of a checkpoint, or
    "module:attribute" for a family of your own."""
    model_options: Annotated[ModelOptions, tyro.conf.arg(name="model")] = None  # type: ignore[assignment]
    """The settings that the model's family has; each defaults to the model's own."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Rewards by name, each with its weight; a reward of your own is "module:name". Default: the world's own reward."""
    prompts: str | None = None
    """Prompts to train on: a named set (denoise-env list shows them), or a .txt, .jsonl or .csv file. Default: the
    world's training prompts."""
    num_steps: int = 10
    """Denoising steps per image, K."""
    device: str = "auto"
    """"cpu", "cuda", …; "auto" takes the GPU where there is one."""
    compile: bool = False
    """Compile the network with torch.compile, which pays on accelerators and with large networks."""
    conditioning_cache: str | None = None
    """Keep encoded prompts in this directory too, for later runs with the same checkpoint."""
    conditioning_host_gib: float = 8.0
    """Host memory for encoded prompts, in GiB. Prompts that no longer fit are encoded again when they are drawn
    again."""
    conditioning_device_gib: float = 0.5
    """Device memory for encoded prompts that are not in use at the moment, in GiB."""

    kernel: str | None = None
    """Transition kernel, which adds the noise of every step: ode, ddim, dance_sde, flow_sde or cps (denoise-env list).
    Default: ddim for a diffusion model, dance_sde for a flow model."""
    eta: float | None = None
    """How much noise the kernel adds; 0 adds none. Default: the kernel's own (ddim 1.0, dance_sde 0.3)."""
    last_step: Literal["sde", "ode"] | None = None
    """Whether the kernel's last step is noisy too ("sde") or deterministic ("ode"). Default: the kernel's own (ddim
    "sde", the others "ode")."""
    reduction: Literal["mean", "sum", "squared_error"] = "mean"
    """How a step's log-prob is reduced over latent dimensions: averaged, as is common ("mean"), or summed, which is the
    true log-density ("sum"). "squared_error" is minus the mean squared error; it is no density, and only there for
    comparison with published code for CPS."""

    agent: str = "grpo"
    """The algorithm: a name that denoise-env list shows, or "module:class" for one of your own."""
    agent_options: Annotated[AgentConfig, tyro.conf.arg(name="agent")] = None  # type: ignore[assignment]
    """The settings that the algorithm has; each defaults to the published value or the preset's."""
    iterations: int = 100
    """How many iterations to train; each collects one rollout and trains on it."""
    network_budget: int | None = None
    """Stop after the iteration in which this many network calls have been made. An image counts 1 in each call (2 with
    guidance), and three times that where a backward pass follows."""
    prompts_per_iteration: int = 8
    """Prompts per rollout. Times the agent's group_size, this is the number of images per rollout."""
    microbatch: int | None = 128
    """The most images per network call. It bounds the memory and does not change the result."""
    seed: int = 0
    """Seed of the run's random draws, and of first weights that are random (adapters, critics, Points' network)."""
    max_unscored: float = 0.5
    """Stop when more than this share of a rollout's images could not be scored."""

    eval_every: int = 50
    """Iterations between evaluations. There is always one before training and one after it; 0 makes only those two."""
    eval_points: int = 0
    """Divide the network_budget into this many equal parts and evaluate after each, instead of every eval_every
    iterations; 0 turns this off."""
    eval_num_steps: int | None = None
    """Denoising steps of an image in evaluations and pictures. Default: num_steps."""
    eval_kernel: str | None = None
    """Transition kernel of evaluations and pictures, with its own noise level; "ode" samples without noise. Default:
    the training's kernel and noise level."""
    eval_kl: bool = False
    """Measure in every evaluation the KL of the policy's trajectories to the base model. It doubles the evaluation's
    network calls."""
    eval_prompts: str | None = None
    """Prompts to evaluate on: a named set, or a .txt, .jsonl or .csv file. Default: the world's held-out prompts, or
    where there are none, the first 32 training prompts."""
    eval_rewards: tuple[str, ...] = ()
    """Further rewards to measure in evaluations; the trained rewards are always measured."""
    eval_images_per_prompt: int = 8
    """Images per prompt in an evaluation."""
    eval_seed: int = 1234
    """Seed of the evaluations' noise; it does not depend on the run's seed."""
    sample_every: int = 50
    """Iterations between pictures of samples, always from the same noise. There is always one before training and one
    after it; 0 makes only those two."""
    checkpoint_every: int = 25
    """Iterations between checkpoints. There is always one at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""

    output_dir: str | None = None
    """The run's directory, absent or empty. Default: runs/<preset>-seed<seed>, followed by -2, -3 and so on where that
    exists."""
    wandb: bool = False
    """Log to Weights & Biases too, to the project that WANDB_PROJECT names or else "denoise-env"; needs the package
    wandb."""
    tensorboard: bool = False
    """Log to TensorBoard too; needs the package tensorboard."""

    def __post_init__(self) -> None:
        if self.model_options is None:
            self.model_options = model_options(self.model)
        if self.agent_options is None:
            self.agent_options = find_agent(self.agent).config_type()


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """A configuration as nested dicts for JSON; ``model`` and ``agent`` each hold their ``name`` and their settings."""
    values = dataclasses.asdict(config)
    options = {name: values.pop(f"{name}_options") for name in ("model", "agent")}
    model = {"name": config.model, "family": config.model_options.family, **options["model"]}
    return {**values, "model": model, "agent": {"name": config.agent, **options["agent"]}}
