"""What a run was made with."""

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from agents.training.checkpoints import write_atomically

PACKAGES = ("denoise-env", "torch", "torchrl", "tensordict", "gymnasium", "diffusers", "transformers", "peft")


def write_versions(path: Path, command: Sequence[str] = ()) -> None:
    """Write the command, as a shell would take it, and the versions of Python, platform and packages as JSON."""
    found = {"command": shlex.join(command), "python": sys.version.split()[0], "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    write_atomically(path, json.dumps(found, indent=1))
