"""What a training run is and costs, as the command line tells it: at its start, and after its first iteration."""

import math
import time

from tqdm import tqdm

from agents.training.config import TrainConfig
from agents.training.experiment import Experiment


def start(experiment: Experiment) -> list[str]:
    """Lines about a run that begins: its model with size and precision, and the network calls that it is sure of.

    What an iteration spends on learning is the agent's affair; `Forecast` tells it once there has been one.
    """
    config, mdp, agent = experiment.config, experiment.mdp, experiment.agent
    model, images = mdp.model, config.prompts_per_iteration * agent.group_size
    size, dtype = " × ".join(map(str, model.latent_shape)), str(model.dtype).removeprefix("torch.")
    trained = sum(parameter.numel() for parameter in agent.parameters)
    calls = images * config.num_steps * model.rows_per_sample
    shown = len(experiment.eval_prompts) * config.eval_images_per_prompt
    times = f"{evaluations(config)} evaluations" + (" or more" if config.network_budget else "")
    return [
        f"model {config.model}: latents {size}, {dtype}, on {model.device}; {trained:,} parameters are trained",
        f"agent {config.agent}: {config.iterations:,} iterations; each draws {images:,} images in {config.num_steps} "
        f"steps, {calls:,} network calls, and learns from them",
        f"{times} of {shown:,} images, {evaluation_calls(experiment):,} network calls each",
    ]


def evaluations(config: TrainConfig) -> int:
    """How many evaluations a run makes, that before training included; no network_budget is thought of."""
    if config.eval_points:
        return 1 + config.eval_points
    inner, left = divmod(config.iterations, config.eval_every) if config.eval_every else (0, 1)
    return 1 + inner + bool(left)


def evaluation_calls(experiment: Experiment) -> int:
    """Network calls of an evaluation."""
    config = experiment.config
    images = len(experiment.eval_prompts) * config.eval_images_per_prompt * experiment.agent.best_of
    return images * experiment.eval_mdp.num_steps * experiment.mdp.model.rows_per_sample * (2 if config.eval_kl else 1)


class Forecast:
    """Prints, after the first iteration, what the whole run will take; time counts from when this is made."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment, self._began = experiment, time.perf_counter()

    def __call__(self, iteration: int, calls: int, seconds: float) -> None:
        """Print it.

        Args:
            iteration: the first iteration that was trained here.
            calls: its network calls.
            seconds: its time.
        """
        experiment, config = self._experiment, self._experiment.config
        before = max(0.0, time.perf_counter() - self._began - seconds)  # of the first evaluation, unless it is resumed
        rest = config.iterations - iteration
        if config.network_budget:
            rest = min(rest, math.ceil(config.network_budget / max(1, calls)) - iteration)
        looks = evaluations(config) - 1
        total = calls * (iteration + rest) + evaluation_calls(experiment) * (looks + 1)
        tqdm.write(
            f"iteration {iteration} took {calls:,} network calls and {_time(seconds)}: about {total:,} network calls "
            f"in all, and {_time(rest * seconds + looks * before)} from now"
        )


def _time(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
