"""The command line: ``denoise-env train | eval | sample | list``."""

import argparse
import json
import os
import sys
import tomllib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.algorithms import AGENTS
from agents.training.config import TrainConfig, as_dict
from agents.training.presets import PRESETS, make_config
from denoise_env.models import world

_RESUMABLE = {
    "iterations",
    "eval_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "wandb",
    "tensorboard",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 done, 1 the run failed, 2 bad input)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="denoise-env",
        description="Reinforcement learning in the denoising process of diffusion models.",
        epilog="Try: denoise-env train (the five-minute demo), denoise-env list, denoise-env train --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | eval | sample | list")
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
            help="a text file with one prompt a line, or a named set (denoise-env list)",
        )
        command.add_argument("--images-per-prompt", type=int, default=8 if name == "sample" else 64, metavar="N")
        command.add_argument("--seed", type=int, default=1234, help="of the noise (default %(default)s)")
        command.add_argument("--num-steps", type=int, metavar="K", help="denoising steps (default: the run's, or 10)")
        command.add_argument("--guidance-scale", type=float, metavar="W", help="default: the run's, or the model's")
        if name == "sample":
            command.add_argument("--output", default="samples.png", help="the picture (default %(default)s)")
        else:
            command.add_argument("--rewards", nargs="+", metavar="NAME", help="default: the run's, or the model's own")
            command.add_argument("--json", metavar="FILE", help="write the table there too")
    commands.add_parser("list", help="models, rewards, kernels, agents, presets, environments").set_defaults(run=_list)
    options, rest = parser.parse_known_args(typed)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.path.append(os.getcwd())  # where "module:name" rewards of one's own usually are
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
        ValueError: it cannot be read.
    """
    try:
        text = Path(path).read_text()
        return flags(json.loads(text) if path.endswith(".json") else tomllib.loads(text))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the configuration {path!r}: {error}") from error


def parse_config(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    """A configuration from flags; an unknown one ends the program with the nearest name."""
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
        config, directory = _resumed(Path(chosen.resume), rest)
    else:
        rest = [*(read_config(chosen.config) if chosen.config else []), *rest]
        chosen.preset = chosen.preset or _preset_of(rest)
        agent, rest = _agent_of(rest)
        config = parse_config(rest, make_config(chosen.preset, agent))
        name = f"{chosen.preset}-{agent}".replace(":", "-") if agent else chosen.preset
        directory = Path(config.output_dir) if config.output_dir else _free(Path(f"runs/{name}-seed{config.seed}"))
    from agents.training.loop import train
    from agents.training.report import headline
    from agents.training.tables import read_table

    train(config, directory, resume=bool(chosen.resume), command=["denoise-env", "train", *arguments])
    for what, name in (("report", "report.html"), ("picture", "before_after.png"), ("model", "export")):
        print(f"{what:<8} {directory / name}")
    kind = "held-out prompts" if config.model == "shapes" and not config.eval_prompts else "evaluation prompts"
    for name, before, after in headline(read_table(directory / "eval.csv")):
        what = "share with all attributes right" if name == "shapes-correct" else f"mean reward {name!r}"
        figures = f"{_figure(name, before)} before, {_figure(name, after)} after"
        print(f"{kind}, {what} ({after['images']:.0f} images each): {figures}")
    return 0


def _preset_of(arguments: Sequence[str]) -> str:
    """The preset that goes with the model, where none was named."""
    find = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    find.add_argument("--model", default="shapes")
    model = find.parse_known_args(arguments)[0].model
    return world(model) or "dancegrpo"


def _agent_of(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The agent's name, as a flag or a file gives it, and the other arguments."""
    find = argparse.ArgumentParser(prog="denoise-env train", add_help=False, allow_abbrev=False)
    find.add_argument("--agent", "--agent.name")
    found, rest = find.parse_known_args(arguments)
    return found.agent, rest


def _free(path: Path) -> Path:
    """The path, or the first of path-2, path-3, … that holds no run yet."""
    candidates = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(candidate for candidate in candidates if not (candidate / "config.json").exists())


def _figure(name: str, row: dict[str, float]) -> str:
    return f"{row[name]:.3f} [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"


def _resumed(directory: Path, rest: Sequence[str]) -> tuple[TrainConfig, Path]:
    saved = run_config(directory)
    config = parse_config(rest, saved)
    before, now = as_dict(saved), as_dict(config)
    changed = [name for name in now if now[name] != before[name] and name not in _RESUMABLE]
    if changed:
        raise ValueError(
            f"a resumed run keeps its configuration; {', '.join(changed)} cannot change (only {sorted(_RESUMABLE)} can)"
        )
    return config, directory


def run_config(directory: Path) -> TrainConfig:
    """The configuration of a run's directory.

    Raises:
        ValueError: there is none.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"there is no run in {directory} (no config.json)")
    agent, rest = _agent_of(read_config(str(directory / "config.json")))
    return parse_config(rest, TrainConfig(agent=agent or "grpo"))


def _experiment(target: str, options: argparse.Namespace) -> Any:
    from agents.training.experiment import build, load_run

    path = Path(target)
    is_run = (path / "config.json").is_file() and (path / "metrics.csv").exists()
    config = run_config(path) if is_run else TrainConfig(model=target)
    if not is_run and target == "shapes":
        config.eval_rewards = ("shapes-correct",)
    if options.num_steps is not None:
        config.num_steps = options.num_steps
    if options.guidance_scale is not None:
        config.guidance_scale = options.guidance_scale
    named = tuple(getattr(options, "rewards", None) or ())
    if options.prompts:
        config.eval_prompts = options.prompts
    if not is_run and world(target) is None:
        config.prompts = options.prompts
        # sampling calls no reward, but an environment has one
        config.rewards = dict.fromkeys(named if options.command == "eval" else ("shapes",), 1.0)
    config.eval_rewards = named or config.eval_rewards
    return load_run(path, config) if is_run else build(config)


def _eval(options: argparse.Namespace) -> int:
    from agents.training.evaluation import evaluate
    from agents.training.progress import progress

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
            print(f"{target:<24} {name:<16} {_figure(name, table[target])}   {result.images} images")
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
    grid(found.mdp.model.render(latents), options.images_per_prompt, Path(options.output))
    for i, prompt in enumerate(found.eval_prompts):
        print(f"row {i + 1}: {prompt}")
    print(options.output)
    return 0


def _list(options: argparse.Namespace) -> int:
    from denoise_env import mdp, models, rewards
    from denoise_env.kernels import KERNELS

    for title, rows in (
        ("models (--model)", models.NAMES | {"HUB ID or PATH": "any Stable Diffusion 1.x or 2.x checkpoint"}),
        ("rewards (--rewards NAME WEIGHT …)", rewards.NAMES | {"module:attribute": "your own"}),
        (
            "prompts (--prompts)",
            dict.fromkeys(mdp.PROMPT_SETS, "") | {"FILE": "a text file, one prompt a line"},
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
        ("environments (gymnasium.make)", {"denoise_env/Shapes-v0": "", "denoise_env/Points-v0": ""}),
    ):
        print(title)
        for name, text in rows.items():
            print(f"  {name:<24} {text}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(main())
