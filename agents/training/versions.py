"""What a run was made with, each time that it was started."""

import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.training.checkpoints import write_atomically
from denoise_env.prompts import Prompt

PACKAGES = ("denoise-env", "torch", "torchrl", "tensordict", "gymnasium", "diffusers", "transformers", "peft")


def write_versions(path: Path, command: Sequence[str], prompts: dict[str, str], resumed: bool = False) -> None:
    """Write as JSON what a run starts with, or add to its file what it is resumed with.

    The file has the first start's ``command`` as a shell would take it, the ``commit`` of this package where it lies in
    a git repository, the versions of Python, platform and packages, and the digests of the ``prompts``; and in
    ``resumed`` a list of the same for every later start.

    Raises:
        ValueError: the run is resumed and its file is damaged.
    """
    found: dict[str, Any] = {"command": shlex.join(command), "commit": _commit(), "python": sys.version.split()[0]}
    found["platform"] = platform.platform()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    before = _read(path) if resumed else {}
    if before:
        found = {**before, "resumed": [*before.get("resumed", []), found]}
    write_atomically(path, json.dumps({**found, "prompts": prompts}, indent=1))


def prompt_digests(trained: Sequence[Prompt], evaluated: Sequence[Prompt]) -> dict[str, str]:
    """Digests of the content of the prompts that are trained on ("training") and evaluated on ("evaluation")."""
    kinds = {"training": trained, "evaluation": evaluated}
    return {
        kind: hashlib.blake2b("".join(p.key for p in prompts).encode(), digest_size=16).hexdigest()
        for kind, prompts in kinds.items()
    }


def check_prompts(path: Path, prompts: dict[str, str]) -> None:
    """Raise a ``ValueError`` for a run that was started with prompts of another content.

    Args:
        path: what `write_versions` wrote; a run without it began before there were digests, or has not begun.
        prompts: the digests of the prompts now.
    """
    before = _read(path).get("prompts", {})
    for kind, digest in prompts.items():
        if before.get(kind, digest) != digest:
            raise ValueError(
                f"the {kind} prompts have changed since the run began: put the file back as it was to resume, or begin "
                "another run with the new prompts"
            )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        resumed, prompts = found.get("resumed", []), found.get("prompts", {})
        if not isinstance(resumed, list) or not isinstance(prompts, dict):
            raise ValueError("it is not what a run writes")
        return found
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to resume without it") from error


def _commit() -> str | None:
    """The commit of this file's repository, with "-dirty" behind it where files have changed since; else ``None``."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        known = subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, timeout=10)
        if known.returncode:
            return None  # installed below somebody else's repository
        found = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
