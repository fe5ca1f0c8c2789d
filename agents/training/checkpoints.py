"""Complete checkpoints: safetensors and JSON, written atomically, refused when damaged or foreign."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

VERSION = 3
TENSORS, META = "state.safetensors", "meta.json"
_LARGEST = 2**63 - 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why and what to do."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text so that a reader, or a crash, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
            temporary / TENSORS,
        )
        header = {"version": VERSION, "iteration": iteration, "tensors": len(tensors), **meta}
        (temporary / META).write_text(json.dumps(header, indent=1), encoding="utf-8")
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
    """The checkpoint of the last iteration, or ``None``; other names in the directory do not count."""
    return max(_own(directory), default=(0, None))[1]


def prune(directory: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints, and what a crash left of an unfinished one.

    Whatever `save` did not write stays: other names, links, and a checkpoint that somebody has put other files in.
    """
    for _, old in _own(directory)[:-keep]:
        if {path.name for path in old.iterdir()} <= {TENSORS, META}:
            shutil.rmtree(old)
    for unfinished in directory.glob(".*.tmp"):
        if _number(unfinished.name[1:-4]) and unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)


def _number(name: str) -> int | None:
    """The iteration whose checkpoint has this name, or ``None`` where none has."""
    return int(name) if re.fullmatch(r"[0-9]{6}|[1-9][0-9]{6,18}", name) else None


def _own(directory: Path) -> list[tuple[int, Path]]:
    """The checkpoints with their iterations, in order."""
    if not directory.is_dir():
        return []
    named = ((_number(path.name), path) for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
    return sorted((number, path) for number, path in named if number)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and meta data of a checkpoint; both are data, and reading them runs nothing.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, of another version, or its parts disagree.
    """
    for name in (META, TENSORS):
        if not (path / name).is_file():
            raise CheckpointError(f"there is no complete checkpoint at {path}: it has no {name}")
    meta = read_meta(path)
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        _refuse(path, f"{TENSORS} cannot be read: {error}")
    if len(tensors) != meta["tensors"]:
        _refuse(path, f"{TENSORS} holds {len(tensors)} tensors, and {META} says {meta['tensors']}")
    return tensors, meta


def read_meta(path: Path) -> dict[str, Any]:
    """The meta data of a checkpoint, checked.

    ``iteration`` and ``network_calls`` are what was done, ``tensors`` how many there are, ``model`` the architecture,
    and ``config`` the run's configuration. ``pending_look`` is the number of network calls before the iteration, where
    the evaluation and pictures that were due after it may be missing; else ``None``.

    Raises:
        CheckpointError: there is none, or something in it is not as it must be.
    """
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        _refuse(path, f"{META} cannot be read: {error}")
    if not isinstance(meta, dict):
        _refuse(path, f"{META} holds no object but {_short(meta)}")
    if "version" not in meta:
        _refuse(path, f"{META} names no version")
    if type(meta["version"]) is not int or meta["version"] != VERSION:
        raise CheckpointError(
            f"the checkpoint {path} has version {_short(meta['version'])}, this release reads version {VERSION}: "
            "resume it with the release that wrote it"
        )
    for name, least in (("iteration", 1), ("tensors", 0), ("network_calls", 0)):
        value = meta.get(name)
        if type(value) is not int or not least <= value <= _LARGEST:
            _refuse(path, f"{name} in {META} must be a whole number from {least} on, not {_short(value)}")
    if _number(path.name) != meta["iteration"]:
        _refuse(path, f"{META} says that it is of iteration {meta['iteration']}")
    pending = meta.get("pending_look")
    if pending is not None and (type(pending) is not int or not 0 <= pending <= meta["network_calls"]):
        _refuse(path, f"pending_look in {META} must be a number of network calls before, not {_short(pending)}")
    for name in ("model", "config"):
        if not isinstance(meta.get(name), dict):
            _refuse(path, f"{name} in {META} must be an object, not {_short(meta.get(name))}")
    return meta


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _refuse(path: Path, why: str) -> NoReturn:
    advice = "delete it to resume from the checkpoint before it"
    raise CheckpointError(f"the checkpoint {path} is truncated, damaged or not this run's ({why}); {advice}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
