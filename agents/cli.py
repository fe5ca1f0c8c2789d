"""The command line: ``denoise-env train | eval | sample | describe | list``."""

import argparse
import dataclasses
import io
import json
import os
import sys
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.algorithms import AGENTS
from agents.training.config import TrainConfig
from agents.training.presets import PRESETS, make_config
from denoise_env.models import ModelOptions, check_options, families, find_family, model_options
from denoise_env.rewards import load_reward
from denoise_env.worlds import DEFAULT, PROMPT_SETS, WORLDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 done, 1 the run failed, 2 bad input)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test's or a notebook's may be another
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="denoise-env",
        description="Reinforcement learning in the denoising process of diffusion models.",
        epilog="Try: denoise-env train (the five-minute demo), denoise-env list, denoise-env train --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | eval | sample | describe | list")
    train = commands.add_parser("train", help="train an agent; --help lists every setting", add_help=False)
    train.set_defaults(run=_train)
    for name, run, text in (
        ("eval", _eval, "measure rewards on fixed prompts and seeds"),
        ("sample", _sample, "draw a grid of samples"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.set_defaults(run=run)
        command.add_argument(
            "targets",
            nargs="+" if name == "eval" else 1,
            metavar="TARGET",
            help="a run's directory, or a model (see denoise-env list)",
        )
        command.add_argument(
            "--prompts",
            metavar="FILE",
            help="a .txt, .jsonl or .csv file, or a named set (denoise-env list)",
        )
        command.add_argument("--images-per-prompt", type=int, default=8 if name == "sample" else 64, metavar="N")
        command.add_argument("--seed", type=int, default=1234, help="of the noise (default %(default)s)")
        command.add_argument("--num-steps", type=int, metavar="K", help="denoising steps (default: the run's, or 10)")
        command.add_argument("--conditioning-cache", metavar="DIR", help="keep encoded prompts there")
        command.epilog = _MODEL_OPTIONS
        if name == "sample":
            command.add_argument("--output", default="samples.png", help="the picture (default %(default)s)")
        else:
            command.add_argument("--rewards", nargs="+", metavar="NAME", help="default: the run's, or the model's own")
            command.add_argument("--json", metavar="FILE", help="write the table there too")
    command = commands.add_parser(
        "describe",
        help="latents, parameters and memory of a model, without loading weights",
        description="Latents, parameters and memory of a model, from its configuration files, without its weights.",
        epilog=_MODEL_OPTIONS,
    )
    command.set_defaults(run=_describe)
    command.add_argument("model", metavar="MODEL", help="a world, a directory or a hub id (denoise-env list)")
    command.add_argument("--num-steps", type=int, default=10, metavar="K", help="denoising steps (default %(default)s)")
    command.add_argument("--json", metavar="FILE", help="write the figures there too, in bytes")
    commands.add_parser("list", help="models, rewards, kernels, agents, presets, environments").set_defaults(run=_list)
    sys.path.append(os.getcwd())  # where models, rewards and agents of one's own ("module:name") usually are
    plain, model_flags = (typed, []) if typed[:1] == ["train"] else _split_model_flags(typed)
    options, rest = parser.parse_known_args(plain)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.model_flags = model_flags
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return options.run(rest if options.command == "train" else options)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (ValueError, FileExistsError) as error:
        print(f"denoise-env: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, FloatingPointError, OSError) as error:
        print(f"denoise-env: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("denoise-env: stopped; continue with denoise-env train --resume DIRECTORY", file=sys.stderr)
        return 130


_MODEL_OPTIONS = (
    "The model's own settings go with it as they do in denoise-env train: --model.guidance-scale 3, --model.lora DIR."
)


def _split_model_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments in two lists: all but the ``--model.`` flags; and these, each as "--model.name=value"."""
    switches = {f.name for family in families() for f in dataclasses.fields(family.options) if f.type in (bool, "bool")}
    plain: list[str] = []
    model: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name = argument.removeprefix("--model.").removeprefix("no-").replace("-", "_")
        if not argument.startswith("--model."):
            plain.append(argument)
        elif "=" in argument or name in switches:
            model.append(argument)
        else:
            model.append(f"{argument}={next(rest, '')}")
    return plain, model


def _check_model_flags(options: ModelOptions, flags: Sequence[str]) -> None:
    """Raise a ``ValueError`` for ``--model.`` flags that a family lacks."""
    names = [flag.removeprefix("--model.").partition("=")[0] for flag in flags if flag.startswith("--model.")]
    check_options(type(options), [name.removeprefix("no-").replace("-", "_") for name in names])


def _with_flags(options: ModelOptions, flags: Sequence[str], command: str) -> ModelOptions:
    """A model's options, changed as ``--model.`` flags say.

    Raises:
        ValueError: the family lacks an option.
    """
    import tyro

    _check_model_flags(options, flags)
    arguments = [f"--{flag.removeprefix('--model.')}" for flag in flags]
    return tyro.cli(type(options), prog=f"denoise-env {command} MODEL --model.", args=arguments, default=options)


def flags(values: dict[str, Any], prefix: str = "") -> list[str]:
    """A nested mapping as command-line flags, so that a file says exactly what flags can say."""
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict) and key == "rewards":
            found += [f"--{name}", *(str(part) for pair in value.items() for part in pair)]
        elif isinstance(value, dict):
            found += flags(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            dot = f"{head}." if head else ""
            found.append(f"--{name}" if value else f"--{dot}no-{last}")
        elif isinstance(value, (list, tuple)):
            found += [f"--{name}", *map(str, value)]
        else:
            found += [f"--{name}", str(value)]
    return found


def read_config(path: str) -> list[str]:
    """The flags that a TOML or JSON file stands for.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        text = Path(path).read_text()
        return flags(json.loads(text) if path.endswith(".json") else tomllib.loads(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the configuration {path!r}: {error}") from error


def parse_config(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    """A configuration from flags; an unknown flag ends the program with the nearest name."""
    import tyro

    presets = "\n".join(f"  {name}: {(make.__doc__ or '').strip().splitlines()[0]}" for name, make in PRESETS.items())
    return tyro.cli(
        TrainConfig,
        prog="denoise-env train",
        args=list(arguments),
        default=default,
        description=(
            "Train an agent. Without flags: the five-minute demo on the tiny Stable Diffusion.\n\n"
            "First the preset, then the file, then the flags:\n"
            "  --preset NAME   where the defaults below come from; by default what goes with --model\n"
            "  --agent NAME    the algorithm, with its published settings (denoise-env list); by default grpo\n"
            "  --config FILE   TOML or JSON with any of the settings below\n"
            "  --resume DIR    continue the run in DIR from its newest checkpoint\n\n"
            f"Presets:\n{presets}"
        ),
    )


def _train(arguments: Sequence[str]) -> int:
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
        model, agent, rest = _names(rest)
        chosen.preset = chosen.preset or _preset_of(model or DEFAULT)
        default = make_config(chosen.preset, agent, model=model)
        _check_model_flags(default.model_options, rest)
        config = parse_config(rest, default)
        name = f"{chosen.preset}-{agent}".replace(":", "-") if agent else chosen.preset
        directory = Path(config.output_dir) if config.output_dir else _free(Path(f"runs/{name}-seed{config.seed}"))
    from agents.training.experiment import build
    from agents.training.loop import check_directory, train
    from agents.training.report import headline
    from agents.training.tables import read_table

    check_directory(directory, config, bool(chosen.resume))
    train(build(config), directory, resume=bool(chosen.resume), command=["denoise-env", "train", *arguments])
    for what, name in (("report", "report.html"), ("picture", "before_after.png"), ("model", "export")):
        print(f"{what:<8} {directory / name}")
    held_out = config.model in WORLDS and WORLDS[config.model].held_out and not config.eval_prompts
    kind = "held-out prompts" if held_out else "evaluation prompts"
    for name, before, after in headline(read_table(directory / "eval.csv")):
        what = getattr(load_reward(name), "meaning", f"mean reward {name!r}")
        figures = f"{_figure(name, before)} before, {_figure(name, after)} after"
        print(f"{kind}, {what} ({after['images']:.0f} images each, 95 % intervals over images): {figures}")
    return 0


def _preset_of(model: str) -> str:
    """The preset that goes with a model, where none was named."""
    return WORLDS[model].preset if model in WORLDS else find_family(model)[0].preset


def _names(arguments: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """The model's and the agent's name, as flags or a file give them, and the other arguments."""
    find = argparse.ArgumentParser(prog="denoise-env train", add_help=False, allow_abbrev=False)
    find.add_argument("--model", "--model.name")
    find.add_argument("--model.family")  # a saved configuration has it; what counts is the model
    find.add_argument("--agent", "--agent.name")
    found, rest = find.parse_known_args(arguments)
    return found.model, found.agent, rest


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that holds no run yet."""
    candidates = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(candidate for candidate in candidates if not (candidate / "config.json").exists())


def _figure(name: str, row: dict[str, float]) -> str:
    from agents.training.report import interval

    return f"{row[name]:.3f} {interval(row, name)}"


def run_config(directory: Path) -> TrainConfig:
    """The configuration of a run's directory.

    Raises:
        ValueError: the directory holds no run.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"there is no run in {directory} (no config.json)")
    flags = read_config(str(directory / "config.json"))
    model, agent, rest = _names(flags)
    known = {family.name: family.options for family in families()}
    named = flags[flags.index("--model.family") + 1] if "--model.family" in flags else None
    options: Any = known[named]() if named in known else None  # so that no hub is asked what the model is
    return parse_config(rest, TrainConfig(model=model or DEFAULT, model_options=options, agent=agent or "grpo"))


def _experiment(target: str, options: argparse.Namespace) -> Any:
    from agents.training.experiment import build, load_run

    path = Path(target)
    is_run = (path / "config.json").is_file() and (path / "metrics.csv").exists()
    config = run_config(path) if is_run else TrainConfig(model=target)
    config.model_options = _with_flags(config.model_options, options.model_flags, options.command)
    config.conditioning_cache = options.conditioning_cache or config.conditioning_cache
    if options.num_steps is not None:
        config.num_steps = options.num_steps
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


def _eval(options: argparse.Namespace) -> int:
    from agents.training.evaluation import evaluate
    from agents.training.progress import progress
    from agents.training.report import interval

    table = {}
    for target in options.targets:
        found = _experiment(target, options)
        total = len(found.eval_prompts) * options.images_per_prompt
        with progress(total=total, desc=target, leave=False) as bar, found.agent.evaluation_weights():
            result = evaluate(
                found.eval_mdp,
                found.policy,
                found.eval_prompts,
                options.images_per_prompt,
                options.seed,
                found.config.microbatch,
                bar.update,
            )
        table[target] = result.row()
        for name in result.means:
            row, prompts = table[target], len(found.eval_prompts)
            more = f", {interval(row, f'{name}_prompts')} over {prompts} prompts" if prompts > 1 else ""
            print(f"{target:<24} {name:<16} {_figure(name, row)} over {result.images} images{more}")
    print("In brackets are 95 % bootstrap intervals of the mean.")
    print("Over images: for other noise on these prompts. Over prompts: for other prompts of their kind as well.")
    if options.json:
        Path(options.json).write_text(json.dumps(table, indent=1))
    return 0


def _sample(options: argparse.Namespace) -> int:
    from agents.training.evaluation import sample
    from agents.training.pictures import grid

    found = _experiment(options.targets[0], options)
    with found.agent.evaluation_weights():
        latents, _ = sample(
            found.eval_mdp,
            found.policy,
            found.eval_prompts,
            options.images_per_prompt,
            options.seed,
            found.config.microbatch,
        )
    grid(found.mdp.render(latents), options.images_per_prompt, Path(options.output))
    for i, prompt in enumerate(found.eval_prompts):
        print(f"row {i + 1}: {prompt}")
    print(options.output)
    return 0


def _describe(options: argparse.Namespace) -> int:
    from denoise_env.models.description import describe

    chosen = _with_flags(model_options(options.model), options.model_flags, options.command)
    found = describe(options.model, chosen)
    steps, per_row = options.num_steps, found.rows_per_sample
    entries = ", ".join(f"{name} {list(shape)}" for name, shape in found.conditioning.items())
    share = found.trainable / found.parameters
    lines = {
        "family": found.family,
        "latents": f"{list(found.latents)}, {_size(found.latent_bytes)} a sample and step",
        f"a sample, {steps} steps": f"{_size(found.latent_bytes * (steps + 1))}, {steps * per_row} rows of the network",
        "conditioning": f"{entries}: {_size(found.conditioning_bytes)} a prompt",
        "parameters": f"{found.parameters:,}, of which {found.trainable:,} are trained ({share:.2%})",
        "weights": f"{_size(found.weight_bytes)}, encoders and decoder {_size(found.frozen_bytes)}",
        "gradients": _size(found.gradient_bytes),
        "optimizer (AdamW)": _size(found.optimizer_bytes),
    }
    for name, text in lines.items():
        print(f"{name:<24} {text}")
    if options.json:
        Path(options.json).write_text(json.dumps(found.as_dict(), indent=1))
    return 0


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _list(options: argparse.Namespace) -> int:
    from denoise_env import rewards
    from denoise_env.kernels import KERNELS

    for title, rows in (
        (
            "models (--model)",
            {name: world.description for name, world in WORLDS.items()}
            | {
                "HUB ID or DIRECTORY": "a checkpoint of one of the families below",
                "module:attribute": "your own family",
            },
        ),
        (
            "families",
            {family.name: family.description for family in families()},
        ),
        ("rewards (--rewards NAME WEIGHT …)", rewards.NAMES | {"module:attribute": "your own"}),
        (
            "prompts (--prompts)",
            dict.fromkeys(PROMPT_SETS, "") | {"FILE": ".txt, .jsonl or .csv"},
        ),
        (
            "kernels (--kernel)",
            {name: (kernel.__doc__ or "").splitlines()[0] for name, kernel in KERNELS.items()},
        ),
        (
            "agents (--agent)",
            {name: (agent.__doc__ or "").splitlines()[0] for name, agent in AGENTS.items()}
            | {"module:class": "your own"},
        ),
        (
            "presets (--preset)",
            {name: (make.__doc__ or "").splitlines()[0] for name, make in PRESETS.items()},
        ),
        (
            "environments (gymnasium.make)",
            {world.environment: "" for world in WORLDS.values() if world.environment},
        ),
    ):
        print(title)
        for name, text in rows.items():
            print(f"  {name:<24} {text}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
