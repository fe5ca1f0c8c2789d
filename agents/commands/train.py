"""``denoise-env train``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.commands.look import figure
from agents.commands.settings import check_model_flags, model_and_agent, parse_config, read_config, run_config
from agents.training.experiment import build
from agents.training.loop import check_directory, train
from agents.training.presets import make_config
from agents.training.report import headline
from agents.training.tables import read_table
from denoise_env.models import find_family
from denoise_env.rewards import load_reward
from denoise_env.worlds import DEFAULT, WORLDS


def run(arguments: Sequence[str]) -> int:
    """Train as the arguments behind ``train`` say; returns the exit status."""
    first = argparse.ArgumentParser(prog="denoise-env train", add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--resume", metavar="DIR")
    chosen, rest = first.parse_known_args(arguments)
    if chosen.resume:
        directory = Path(chosen.resume)
        config = parse_config(rest, run_config(directory))
    else:
        rest = [*(read_config(chosen.config) if chosen.config else []), *rest]
        model, agent, rest = model_and_agent(rest)
        chosen.preset = chosen.preset or _preset_of(model or DEFAULT)
        default = make_config(chosen.preset, agent, model=model)
        check_model_flags(default.model_options, rest)
        config = parse_config(rest, default)
        name = f"{chosen.preset}-{agent}".replace(":", "-") if agent else chosen.preset
        directory = Path(config.output_dir) if config.output_dir else _free(Path(f"runs/{name}-seed{config.seed}"))
    check_directory(directory, config, bool(chosen.resume))
    train(build(config), directory, resume=bool(chosen.resume), command=["denoise-env", "train", *arguments])
    for what, name in (("report", "report.html"), ("picture", "before_after.png"), ("model", "export")):
        print(f"{what:<8} {directory / name}")
    held_out = config.model in WORLDS and WORLDS[config.model].held_out and not config.eval_prompts
    kind = "held-out prompts" if held_out else "evaluation prompts"
    for name, before, after in headline(read_table(directory / "eval.csv")):
        what = getattr(load_reward(name), "meaning", f"mean reward {name!r}")
        figures = f"{figure(name, before)} before, {figure(name, after)} after"
        print(f"{kind}, {what} ({after['images']:.0f} images each, 95 % intervals over images): {figures}")
    return 0


def _preset_of(model: str) -> str:
    """The preset that goes with a model, where none was named."""
    return WORLDS[model].preset if model in WORLDS else find_family(model)[0].preset


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that holds no run yet."""
    candidates = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(candidate for candidate in candidates if not (candidate / "config.json").exists())
