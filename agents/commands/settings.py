"""A configuration from what is typed and from files, and back: flags, TOML and JSON all say the same."""

import argparse
import dataclasses
import json
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from agents.commands import TRAINING
from agents.training.config import TrainConfig
from agents.training.directory import code_among, refuse_code
from agents.training.presets import PRESETS
from denoise_env.models import ModelOptions, check_options, families
from denoise_env.naming import suggest
from denoise_env.worlds import DEFAULT

_TABLES = ("model", "agent", "rewards")  # settings that a file gives as tables
_KEYS = list(dict.fromkeys(["preset", *(f.name.removesuffix("_options") for f in dataclasses.fields(TrainConfig))]))


def flags(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A nested mapping as command-line flags, so that a file says exactly what flags can say.

    Raises:
        ValueError: a value that no flag can say.
    """
    found: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            if prefix or key not in _TABLES:
                raise ValueError(f"{prefix}{key} must be a value, not a table; tables are {', '.join(_TABLES)}")
            pairs = [part for pair in value.items() for part in pair]
            found += _several(name, pairs) if key == "rewards" else flags(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            dot = f"{head}." if head else ""
            found.append(f"--{name}" if value else f"--{dot}no-{last}")
        elif isinstance(value, (list, tuple)):
            found += _several(name, value)
        else:
            found.append(f"--{name}={value}")  # in one piece: the value may begin with a dash
    return found


def _several(name: str, values: Iterable[Any]) -> list[str]:
    texts = [str(value) for value in values]
    for text in texts:
        if (text[:1] == "-" and text[1:2].isalpha()) or text[:2] == "--":
            raise ValueError(f"{name} cannot hold {text!r}, which begins with a dash")
    return [f"--{name}", *texts]


def read_config(path: str) -> list[str]:
    """The flags that a TOML or JSON file stands for; ``preset`` may be among them.

    Raises:
        ValueError: the file cannot be read, holds no table, or one of its keys is no setting.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"it must hold an object with the settings, not {text.strip()[:40]!r}")
        for key in values:
            name = key.replace("-", "_")
            if name not in _KEYS and not name.startswith(("model.", "agent.")):
                raise ValueError(f"there is no setting {key!r}; {suggest(name, _KEYS)}")
        return flags(values)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read the configuration {path!r}: {error}") from error


def parse_config(arguments: Sequence[str], default: TrainConfig) -> TrainConfig:
    """A configuration from flags; an unknown flag ends the program with the nearest name."""
    presets = "\n".join(f"  {name}: {preset.description}" for name, preset in PRESETS.items())
    return tyro.cli(
        TrainConfig,
        prog="denoise-env train",
        args=list(arguments),
        default=default,
        description=f"{TRAINING}\nPresets:\n{presets}",
    )


def model_and_agent(arguments: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """The model's and the agent's name, as flags or a file give them, and the other arguments."""
    find = argparse.ArgumentParser(prog="denoise-env train", add_help=False, allow_abbrev=False)
    find.add_argument("--model", "--model.name")
    find.add_argument("--model.family")  # a saved configuration has it; what counts is the model
    find.add_argument("--agent", "--agent.name")
    found, rest = find.parse_known_args(arguments)
    return found.model, found.agent, rest


def run_config(directory: Path, allowed: Collection[str] = ()) -> TrainConfig:
    """The configuration of a run's directory.

    Args:
        directory: the run's directory.
        allowed: what the user typed. Code that the directory names ("module:attribute") is imported only where it
            is typed too, or ``--trust``.

    Raises:
        ValueError: the directory holds no run, or names code that is not allowed.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(f"there is no run in {directory} (no config.json)")
    typed = read_config(str(directory / "config.json"))
    model, agent, rest = model_and_agent(typed)
    known = {family.name: family.options for family in families()}
    named = next((flag.partition("=")[2] for flag in typed if flag.startswith("--model.family=")), None)
    options: Any = known[named]() if named in known else None  # so that no hub is asked what the model is
    refuse_code(directory, [name for name in (model, agent) if name and ":" in name], allowed)
    config = parse_config(rest, TrainConfig(model=model or DEFAULT, model_options=options, agent=agent or "grpo"))
    refuse_code(directory, code_among(config), allowed)
    return config


def split_model_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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


def check_model_flags(options: ModelOptions, flags: Sequence[str]) -> None:
    """Raise a ``ValueError`` for ``--model.`` flags that a family lacks."""
    names = [flag.removeprefix("--model.").partition("=")[0] for flag in flags if flag.startswith("--model.")]
    check_options(type(options), [name.removeprefix("no-").replace("-", "_") for name in names])


def with_flags(options: ModelOptions, flags: Sequence[str], command: str) -> ModelOptions:
    """A model's options, changed as ``--model.`` flags say.

    Raises:
        ValueError: the family lacks an option.
    """
    check_model_flags(options, flags)
    arguments = [f"--{flag.removeprefix('--model.')}" for flag in flags]
    return tyro.cli(type(options), prog=f"denoise-env {command} MODEL --model.", args=arguments, default=options)
