"""What a run shows of itself: evaluations on fixed prompts and grids of samples, both from fixed seeds."""

from pathlib import Path

import torch

from agents.training.checkpoints import write_atomically
from agents.training.evaluation import evaluate, sample
from agents.training.experiment import Experiment
from agents.training.logging import Logger
from agents.training.pictures import grid
from agents.training.tables import Table
from denoise_env.progress import progress

GRID_PROMPTS, GRID_COLUMNS = 6, 8


class Looks:
    """Writes ``eval.csv`` and the pictures in ``samples`` when they are due.

    Args:
        experiment: the run's parts; the averaged weights are used where there are any.
        directory: the run's directory.
        logger: where figures and pictures are sent too.
        done: the iteration that the run resumes from; later rows of ``eval.csv`` are dropped.
        draw: whether pictures are wanted.

    With several ranks all of them sample, since sharded weights need all, and the first one writes.
    """

    def __init__(self, experiment: Experiment, directory: Path, logger: Logger, done: int, draw: bool) -> None:
        self._experiment = experiment
        self._pictures = directory / "samples" if draw else None
        self._logger = logger
        self._first_rank = experiment.agent.ranks.rank == 0
        self._table = Table(directory / "eval.csv" if self._first_rank else None, done)

    def first(self) -> None:
        """Evaluate and draw the base model, before the first iteration."""
        self._look(0, 0, evaluation=True, picture=True)

    def after(self, iteration: int, before: int, spent: int, last: bool) -> None:
        """Evaluate and draw what is due after an iteration.

        Args:
            iteration: at least 1.
            before: network calls spent before it.
            spent: network calls spent with it.
            last: whether it was the run's last iteration, after which everything is due.
        """
        config = self._experiment.config
        if config.eval_points:
            budget = config.network_budget or 1
            due = spent * config.eval_points // budget > before * config.eval_points // budget
        else:
            due = _due(iteration, config.eval_every)
        self._look(iteration, spent, evaluation=last or due, picture=last or _due(iteration, config.sample_every))

    def _look(self, iteration: int, spent: int, *, evaluation: bool, picture: bool) -> None:
        with self._experiment.agent.evaluation_weights():
            if evaluation:
                self._evaluate(iteration, spent)
            if picture and self._pictures:
                self._draw(iteration, self._pictures)

    def _evaluate(self, iteration: int, spent: int) -> None:
        experiment, config = self._experiment, self._experiment.config
        total = len(experiment.eval_prompts) * config.eval_images_per_prompt
        disable = not self._first_rank
        with progress(total=total, desc=f"evaluate at {iteration}", leave=False, disable=disable) as bar:
            found = evaluate(
                experiment.eval_mdp,
                experiment.eval_policy,
                experiment.eval_prompts,
                config.eval_images_per_prompt,
                config.eval_seed,
                config.microbatch,
                bar.update,
                best_of=experiment.agent.best_of if iteration else 1,  # what came before is the base model
                kl=config.eval_kl,
            )
        figures = found.figures()
        self._table.append({"iteration": iteration, "network_calls": spent, **figures})
        self._logger.log(iteration, {f"eval/{name}": value for name, value in figures.items()})

    def _draw(self, iteration: int, pictures: Path) -> None:
        experiment, config = self._experiment, self._experiment.config
        prompts, model = experiment.eval_prompts[:GRID_PROMPTS], experiment.mdp.model
        count = model.portrait_size or GRID_COLUMNS
        latents, _ = sample(
            experiment.eval_mdp, experiment.eval_policy, prompts, count, config.eval_seed, config.microbatch
        )
        if not self._first_rank:
            return
        path = pictures / f"{iteration:06d}{'.webp' if model.makes == 'clips' else '.png'}"
        if model.portrait_size:
            pairs = zip(latents.split(count), prompts, strict=True)
            grid(torch.stack([model.portrait(own, prompt) for own, prompt in pairs]), 1, path)
        else:
            grid(experiment.mdp.render(latents), GRID_COLUMNS, path, frame_rate=model.frame_rate)
        write_atomically(pictures / "prompts.txt", "".join(" ".join(prompt.text.split()) + "\n" for prompt in prompts))
        self._logger.picture(iteration, path)


def _due(iteration: int, every: int) -> bool:
    return bool(every) and iteration % every == 0
