"""What a run's directory says of the run, and what a resumed one may change of it."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from agents.training.config import TrainConfig, as_dict
from agents.training.directory import code_among, refuse_foreign

MAY_CHANGE = (
    "iterations",
    "eval_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "conditioning_cache",
    "conditioning_host_gib",
    "conditioning_device_gib",
    "wandb",
    "agent.lr",
    "tensorboard",
)
"""What a resumed run's configuration may differ in from what its directory says."""


def check_directory(directory: Path, config: TrainConfig, resume: bool) -> None:
    """Raise an error for beginning a run where there is something, or continuing one with another configuration.

    Raises:
        FileExistsError: the directory already holds a run, and it is not to be resumed; or it holds something else.
        ValueError: it is to be resumed, and its configuration cannot be read or differs in more than `MAY_CHANGE`.
    """
    if resume and (directory / "config.json").exists():
        refuse_changes(_read_config(directory), config)
    else:
        refuse_foreign(directory)


def resume_command(directory: Path, config: TrainConfig) -> str:
    """The command that continues a run, as a shell takes it."""
    own = code_among(config)
    return shlex.join(["denoise-env", "train", "--resume", str(directory), *(["--trust"] if own else [])])


def refuse_changes(saved: dict[str, Any], config: TrainConfig) -> None:
    """Raise a ``ValueError`` that names the settings which a resumed run may not change."""
    before, now = _flat(saved), _flat(json.loads(json.dumps(as_dict(config))))
    changed = [name for name in sorted({*before, *now} - {*MAY_CHANGE}) if before.get(name) != now.get(name)]
    if changed:
        told = ", ".join(f"{name} (now {now.get(name)!r}, was {before.get(name)!r})" for name in changed)
        raise ValueError(
            f"a resumed run keeps its configuration, and this one changes {told}; only {', '.join(MAY_CHANGE)} may "
            "change"
        )


def tell_learning_rate(directory: Path, config: TrainConfig) -> None:
    """Say so where a resumed run has another learning rate than before."""
    if not (directory / "config.json").exists():
        return
    before, now = (_flat(values).get("agent.lr") for values in (_read_config(directory), as_dict(config)))
    if before != now:
        print(f"the learning rate is {now} from here on; it was {before}", file=sys.stderr)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object with the run's settings")
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping's settings by their dotted names, ``agent.lr``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
