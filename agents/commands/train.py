"""``denoise-env train``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from agents.commands.cost import Forecast, start
from agents.commands.look import figure
from agents.commands.settings import check_model_flags, model_and_agent, parse_config, read_config, run_config
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import train
from agents.training.presets import make_config
from agents.training.report import headline
from agents.training.resuming import check_directory
from agents.training.stopping import Stopping
from agents.training.tables import read_table
from denoise_env.models import find_family
from denoise_env.rewards import load_reward
from denoise_env.worlds import DEFAULT, WORLDS


def run(arguments: Sequence[str], stopping: Stopping) -> int:
    """Train as the arguments behind ``train`` say; returns the exit status.

    Args:
        arguments: what is typed behind ``train``.
        stopping: the signals that ask the program to stop.
    """
    command = ["denoise-env", "train", *arguments]
    typed, rest = _first(arguments)
    resume = typed.resume is not None
    if resume:
        directory, config = _continued(typed, rest, arguments)
        preset = f"the configuration of {directory}"
    else:
        directory, config, preset = _begun(typed, rest)
    numbered = not resume and not config.output_dir
    if not numbered:
        check_directory(directory, config, resume)
    experiment = build(config)
    print("\n".join([preset, *start(experiment)]), flush=True)
    forecast = Forecast(experiment)
    directory = train(
        experiment,
        directory,
        resume=resume,
        command=command,
        after_first=forecast,
        numbered=numbered,
        stopping=stopping,
    )
    for what, name in (("report", "report.html"), ("picture", "before_after.*"), ("model", "export")):
        for path in directory.glob(name):
            print(f"{what:<8} {path}")
    held_out = config.model in WORLDS and WORLDS[config.model].held_out and not config.eval_prompts
    kind = "held-out prompts" if held_out else "evaluation prompts"
    for name, before, after in headline(read_table(directory / "eval.csv")):
        what = getattr(load_reward(name), "meaning", f"mean reward {name!r}")
        figures = f"{figure(name, before)} before, {figure(name, after)} after"
        print(f"{kind}, {what} ({after['images']:.0f} images each, 95 % intervals over images): {figures}")
    return 0


def _first(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that say where a configuration comes from, and the other arguments."""
    parser = argparse.ArgumentParser(prog="denoise-env train", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--resume", metavar="DIR")
    parser.add_argument("--trust", action="store_true")
    return parser.parse_known_args(arguments)


def _continued(typed: argparse.Namespace, rest: Sequence[str], arguments: Sequence[str]) -> tuple[Path, TrainConfig]:
    """The directory and the configuration of a run that is resumed."""
    if not typed.resume:
        raise ValueError("--resume needs the directory of a run")
    for name in ("preset", "config"):
        if getattr(typed, name) is not None:
            raise ValueError(
                f"--{name} does not go with --resume: a resumed run has the configuration of its directory; change "
                "single settings by their own flags"
            )
    directory = Path(typed.resume)
    return directory, parse_config(rest, run_config(directory, arguments))


def _begun(typed: argparse.Namespace, rest: Sequence[str]) -> tuple[Path, TrainConfig, str]:
    """The directory and the configuration of a new run, and which preset it is made from, in words."""
    if typed.config is not None:
        named = [] if typed.preset is None else [f"--preset={typed.preset}"]
        typed, rest = _first([*read_config(typed.config), *named, *rest])
    model, agent, rest = model_and_agent(rest)
    preset = typed.preset if typed.preset is not None else _preset_of(DEFAULT if model is None else model)
    default = make_config(preset, agent, model=model)
    check_model_flags(default.model_options, rest)
    config = parse_config(rest, default)
    name = f"{preset}-{agent}".replace(":", "-") if agent else preset
    directory = Path(config.output_dir or f"runs/{name}-seed{config.seed}")
    why = "" if typed.preset is not None else f", which goes with {config.model}; --preset chooses another"
    return directory, config, f"preset {preset}{why}"


def _preset_of(model: str) -> str:
    """The preset that goes with a model, where none was named."""
    return WORLDS[model].preset if model in WORLDS else find_family(model)[0].preset
