"""What the rectified-flow families of diffusers share: the noise schedule, and packing latents into tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from denoise_env.arguments import number
from denoise_env.models.pipeline import PipelineOptions
from denoise_env.schedules import Schedule, check_num_steps

ScheduleName = Literal["pipeline", "linspace"]


@dataclass
class FlowOptions(PipelineOptions):
    """The options of a rectified flow."""

    schedule: ScheduleName = "pipeline"
    """Where the noise levels are: "pipeline", where the family's own pipeline has them; or "linspace", on DanceGRPO's
    straight grid from 1 to 0, shifted."""
    shift: float | None = None
    """Shift m of the noise levels, m u / (1 + (m − 1) u); a larger one spends more steps at high noise. Default: the
    checkpoint's own, which may depend on the image's size; with "linspace" DanceGRPO's 3."""


def check_schedule(options: FlowOptions) -> None:
    """Raise a ``ValueError`` for a schedule or shift that does not exist."""
    if options.schedule not in get_args(ScheduleName):
        raise ValueError(f"schedule must be one of {list(get_args(ScheduleName))}, not {options.schedule!r}")
    if options.shift is not None and number(options.shift, "shift") <= 0:
        raise ValueError(f"shift must be positive, not {options.shift}")


def flow_schedule(
    scheduler: Any,
    options: FlowOptions,
    num_steps: int,
    *,
    sigmas: Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
    timestep_scale: float = 1.0,
) -> Schedule:
    """The schedule that a flow's options name.

    Args:
        scheduler: the pipeline's. Whichever it is, its configuration is read as that of a
            ``FlowMatchEulerDiscreteScheduler``, the one that the families' pipelines come with.
        options: the family's options.
        num_steps: K.
        sigmas: ``[K]``, what the pipeline passes to ``set_timesteps``; default: the scheduler's own.
        settings: what it passes besides, such as ``mu`` of a shift that depends on the image's size.
        timestep_scale: the network is told σ times this.

    Raises:
        ValueError: fewer than 1 step, or than 2 where the levels end at one of the checkpoint's own above 0; or levels
            that do not make a `Schedule`.
    """
    check_num_steps(num_steps)
    if options.schedule == "linspace":
        return Schedule.flow(num_steps, 3.0 if options.shift is None else options.shift, timestep_scale)
    from diffusers import FlowMatchEulerDiscreteScheduler

    changes = {} if options.shift is None else {"shift": options.shift, "use_dynamic_shifting": False}
    own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **changes)
    if own.config.shift_terminal and num_steps == 1:
        raise ValueError(
            f"num_steps must be at least 2, not 1: this checkpoint's last step starts at {own.config.shift_terminal:g} "
            'and its first at 1; or choose schedule="linspace"'
        )
    given = dict(settings or {})
    if not own.config.use_dynamic_shifting:
        given.pop("mu", None)
    if sigmas is None:
        own.set_timesteps(num_steps, **given)
    else:
        own.set_timesteps(sigmas=list(sigmas), **given)
    return Schedule.from_sigmas(own.sigmas.double(), timestep_scale=timestep_scale)


def shifted_by_length(scheduler: Any, options: FlowOptions, num_steps: int, tokens: int) -> Schedule:
    """As in `flow_schedule`: the straight grid 1, 1 − 1/K, …, 1/K, shifted by m = exp(μ), and 0.

    FLUX.1's pipeline has it so, and those made after it. μ is linear in the number of image ``tokens``, by the
    scheduler's configuration; a scheduler with a shift of its own has that instead. The network is told σ.
    """
    check_num_steps(num_steps)
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    shortest, longest, low, high = ({**defaults, **scheduler.config}[name] for name in defaults)
    mu = low + (tokens - shortest) * (high - low) / (longest - shortest)
    sigmas = [(num_steps - k) / num_steps for k in range(num_steps)]
    return flow_schedule(scheduler, options, num_steps, sigmas=sigmas, settings={"mu": mu})


def pack(latents: Tensor) -> Tensor:
    """Latents ``[B, C, h, w]`` as tokens ``[B, h/2 · w/2, 4C]`` of 2 × 2 latents each, channels outermost."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """What `pack` made tokens of; ``height`` and ``width`` in latents."""
    b, _, d = tokens.shape
    blocks = tokens.view(b, height // 2, width // 2, d // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, height, width)
