"""``denoise-env eval`` and ``denoise-env sample``: what a model or a run's model draws."""

import argparse
from pathlib import Path

from PIL import Image

from agents.commands.output import check_output, write_json
from agents.commands.settings import run_config, with_flags
from agents.training.config import TrainConfig
from agents.training.evaluation import evaluate, sample
from agents.training.experiment import Experiment, build, load_run
from agents.training.pictures import MOVING, check_picture, grid
from agents.training.report import interval
from denoise_env.progress import progress
from denoise_env.worlds import DEFAULT, WORLDS


def run_eval(options: argparse.Namespace) -> int:
    """Measure rewards on fixed prompts and seeds; returns the exit status."""
    check_output(options.json)
    _check_count(options, 1_000_000)
    table = {}
    for target in options.targets:
        found = _experiment(target, options)
        total = len(found.eval_prompts) * options.images_per_prompt
        with progress(total=total, desc=target, leave=False) as bar, found.agent.evaluation_weights():
            result = evaluate(
                found.eval_mdp,
                found.eval_policy,
                found.eval_prompts,
                options.images_per_prompt,
                options.seed,
                found.config.microbatch,
                bar.update,
            )
        table[target] = result.figures()
        for name in result.means:
            row, prompts = table[target], len(found.eval_prompts)
            more = f", {interval(row, f'{name}_prompts')} over {prompts} prompts" if prompts > 1 else ""
            print(f"{target:<24} {name:<16} {figure(name, row)} over {result.images} images{more}")
    print("In brackets are 95 % bootstrap intervals of the mean.")
    print("Over images: for other noise on these prompts. Over prompts: for other prompts of their kind as well.")
    write_json(options.json, table)
    return 0


def figure(name: str, row: dict[str, float]) -> str:
    """A reward's mean in an evaluation's row, and its interval over images."""
    return f"{row[name]:.3f} {interval(row, name)}"


def run_sample(options: argparse.Namespace) -> int:
    """Draw a grid of samples; returns the exit status."""
    Image.init()
    check_output(options.output, MOVING | {end: name for end, name in Image.EXTENSION.items() if name in Image.SAVE})
    _check_count(options, 1_000)
    found = _experiment(options.targets[0], options)
    model = found.mdp.model
    path = Path(options.output)
    check_picture(path, model.makes)
    with found.agent.evaluation_weights():
        latents, _ = sample(
            found.eval_mdp,
            found.eval_policy,
            found.eval_prompts,
            options.images_per_prompt,
            options.seed,
            found.config.microbatch,
        )
    grid(found.mdp.render(latents), options.images_per_prompt, path, frame_rate=model.frame_rate)
    for i, prompt in enumerate(found.eval_prompts):
        print(f"row {i + 1}: {prompt}")
    print(options.output)
    return 0


def _check_count(options: argparse.Namespace, most: int) -> None:
    """Raise a ``ValueError`` for more images per prompt than ``most``, which nobody can mean, or for none."""
    if not 1 <= options.images_per_prompt <= most:
        raise ValueError(f"--images-per-prompt must lie in [1, {most:,}], not {options.images_per_prompt:,}")


def _experiment(target: str, options: argparse.Namespace) -> Experiment:
    path = Path(target)
    is_run = (path / "config.json").is_file() and (path / "metrics.csv").exists()
    config = run_config(path, options.typed) if is_run else TrainConfig(model=target)
    config.model_options = with_flags(config.model_options, options.model_flags, options.command)
    config.conditioning_cache = options.conditioning_cache or config.conditioning_cache
    if options.num_steps is not None:
        config.eval_num_steps = options.num_steps
    named = tuple(getattr(options, "rewards", None) or ())
    if options.prompts:
        config.eval_prompts = options.prompts
    if not is_run and target in WORLDS:
        config.eval_rewards = tuple(WORLDS[target].eval_rewards)
    elif not is_run:
        config.prompts = options.prompts
        # sampling calls no reward, but an environment has one
        config.rewards = dict.fromkeys(named if options.command == "eval" else WORLDS[DEFAULT].rewards, 1.0)
    config.eval_rewards = named or config.eval_rewards
    return load_run(path, config) if is_run else build(config)
