"""Complete checkpoints: safetensors and JSON, written atomically, refused when damaged or foreign."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

VERSION = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why and what to do."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text so that a reader, or a crash, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def save(directory: Path, iteration: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write ``directory/<iteration>``; it exists whole or not at all.

    Raises:
        CheckpointError: it cannot be written, as when the disk is full. Nothing of it is left then, and older
            checkpoints are as before.
    """
    target = directory / f"{iteration:06d}"
    temporary = directory / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            temporary / "state.safetensors",
        )
        header = {"version": VERSION, "iteration": iteration, **meta}
        (temporary / "meta.json").write_text(json.dumps(header, indent=1))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = latest(directory)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"could not save the checkpoint of iteration {iteration}: {error}; {kept}") from error
    return target


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or ``None``."""
    return max((p for p in directory.glob("[0-9]*") if p.is_dir()), default=None)


def prune(directory: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and what a crash left of an unfinished one."""
    for old in sorted(p for p in directory.glob("[0-9]*"))[:-keep]:
        shutil.rmtree(old)
    for unfinished in directory.glob(".*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta data of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, truncated, or of another version.
    """
    advice = "delete it to resume from the checkpoint before it"
    try:
        meta = json.loads((path / "meta.json").read_text())
        if meta["version"] != VERSION:
            raise CheckpointError(
                f"the checkpoint {path} has version {meta['version']}, this release reads version {VERSION}: "
                "resume it with the release that wrote it"
            )
        return load_file(path / "state.safetensors"), meta
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no complete checkpoint at {path}: {error}") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint {path} is truncated or damaged ({error}); {advice}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
