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
    """A world (denoise-env list), the directory or hub id of a checkpoint, or "module:attribute" of a family of your
    own."""
    model_options: Annotated[ModelOptions, tyro.conf.arg(name="model")] = None  # type: ignore[assignment]
    """The model's settings, its family's; default: as the model has them."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Reward name → weight; empty: the embedded world's own. Your own: "module:name"."""
    prompts: str | None = None
    """A named set (denoise-env list), or a .txt, .jsonl or .csv file; default: the world's training prompts."""
    num_steps: int = 10
    """Denoising steps per image, K."""
    device: str = "auto"
    """"cpu", "cuda", …; "auto" takes the GPU where there is one."""
    compile: bool = False
    """Compile the network with torch.compile: for accelerators and large networks."""
    conditioning_cache: str | None = None
    """Keep encoded prompts in this directory, for later runs with the same checkpoint."""
    conditioning_host_gib: float = 8.0
    """Host memory for encoded prompts, in GiB; those beyond it are encoded anew when they are drawn again."""
    conditioning_device_gib: float = 0.5
    """Device memory for encoded prompts beside those in use, in GiB."""

    kernel: str | None = None
    """Transition kernel: ddim, dance_sde, flow_sde, cps. Default: ddim on a diffusion, dance_sde on a flow."""
    eta: float | None = None
    """The kernel's noise level; default: the kernel's own (ddim 1.0, dance_sde 0.3)."""
    reduction: Literal["mean", "sum", "squared_error"] = "mean"
    """Log-probs averaged over latent dimensions (the field's practice) or summed (the true density); or minus the mean
    squared error, which is no density but what published code for CPS takes for one."""

    agent: str = "grpo"
    """The algorithm: a name of denoise-env list, or "module:class" for one of your own."""
    agent_options: Annotated[AgentConfig, tyro.conf.arg(name="agent")] = None  # type: ignore[assignment]
    """The algorithm's settings; default: its own."""
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
    """Prompts to evaluate on, given as prompts are; default: the world's held-out ones, else the first 32 training
    prompts."""
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

    def __post_init__(self) -> None:
        if self.model_options is None:
            self.model_options = model_options(self.model)
        if self.agent_options is None:
            self.agent_options = find_agent(self.agent).config_type()


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """A configuration as JSON has it: ``model`` and ``agent`` hold their ``name`` and their settings."""
    values = dataclasses.asdict(config)
    options = {name: values.pop(f"{name}_options") for name in ("model", "agent")}
    model = {"name": config.model, "family": config.model_options.family, **options["model"]}
    return {**values, "model": model, "agent": {"name": config.agent, **options["agent"]}}
