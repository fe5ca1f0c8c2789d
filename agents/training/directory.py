"""A run's directory: one writer, nothing of anybody else's, no way out of it, and no code that nobody asked for."""

import contextlib
import fcntl
import itertools
import os
import shutil
import socket
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from denoise_env.rewards.expressions import own_code, strings

if TYPE_CHECKING:
    from agents.training.config import TrainConfig

LOCK = ".lock"
_LEFT_BY_A_CRASH = {LOCK, ".config.json.tmp"}


@contextlib.contextmanager
def claim(directory: Path, resume: bool = False, numbered: bool = False) -> Iterator[Path]:
    """A context in which this process is the only one that writes a run's directory; it is made where there is none.

    The claim is a lock on the file ``.lock`` in it, and ends with the context or with the process, however that dies.
    A directory that was made here, and in which no run has begun at the end, is removed.

    Args:
        directory: the run's directory.
        resume: whether it may hold a run. Otherwise it must be absent or empty.
        numbered: take the first of ``directory``, ``directory-2``, ``directory-3``, … that does not exist. Two
            processes never get the same.

    Yields:
        The directory.

    Raises:
        FileExistsError: another process holds it, or it holds a run or something else. Nothing has changed then.
        ValueError: a link in it leads out of it.
    """
    made = True
    if numbered:
        directory = _new(directory)
    else:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            directory.mkdir()
        except FileExistsError:
            if not directory.is_dir():
                raise FileExistsError(f"{directory} is not a directory: choose another --output-dir") from None
            made = False
    lock = _lock(directory)
    try:
        if not (resume and (directory / "config.json").exists()):
            refuse_foreign(directory)
        refuse_links(directory)
        yield directory
    finally:
        empty = made and not (directory / "config.json").exists()
        if empty:
            _clear(directory)
        (directory / LOCK).unlink(missing_ok=True)
        os.close(lock)
        if empty:
            with contextlib.suppress(OSError):  # another process has it by now
                directory.rmdir()


def _new(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise AssertionError


def _clear(directory: Path) -> None:
    """Remove what a start that failed has left, such as a logger's folder, but not the lock."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink()


def _lock(directory: Path) -> int:
    """The open file that holds the lock."""
    path = directory / LOCK
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="replace").strip()
            os.close(lock)
            who = holder if holder and holder.isprintable() else "another process"
            raise FileExistsError(f"{directory} is being written by {who}: wait for it, or stop it first") from None
        except OSError as error:
            warnings.warn(
                f"{directory} cannot be locked ({error.strerror}): see to it that no second run writes there",
                stacklevel=4,
            )
        with contextlib.suppress(FileNotFoundError):  # another process removed its lock between our two calls
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                os.truncate(lock, 0)
                os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return lock
        os.close(lock)


def refuse_foreign(directory: Path) -> None:
    """Raise a ``FileExistsError`` for a directory that a new run cannot have, as there is something in it."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise FileExistsError(f"{directory} is not a directory: choose another --output-dir")
    found = sorted({path.name for path in directory.iterdir()} - _LEFT_BY_A_CRASH)
    if "config.json" in found:
        raise FileExistsError(
            f"{directory} already holds a run: continue it with --resume {directory}, or choose another --output-dir"
        )
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise FileExistsError(
            f"{directory} is not empty, it holds {', '.join(found[:3])}{more}: a run wants a directory of its own, so "
            "choose another --output-dir"
        )


def refuse_links(directory: Path) -> None:
    """Raise a ``ValueError`` for a link in a directory that leads out of it: a run would write elsewhere through it."""
    root = os.path.realpath(directory)
    for folder, folders, files in os.walk(directory):
        for path in (os.path.join(folder, name) for name in (*folders, *files)):
            if os.path.islink(path) and not os.path.realpath(path).startswith(f"{root}{os.sep}"):
                raise ValueError(
                    f"{path} is a link that leads out of the run's directory, to {os.readlink(path)}: put the files "
                    "themselves there"
                )


def code_among(config: "TrainConfig") -> list[str]:
    """The agent, the model and the parts of rewards that are "module:attribute", whose module would be imported and
    run, and the strings in rewards: paths that would be read, and addresses that pictures would be sent to."""
    rewards = [*config.rewards, *config.eval_rewards]
    named = {name for name in (config.agent, config.model) if ":" in name}
    return sorted(named.union(*(parts(reward) for reward in rewards)))


def parts(reward: str) -> list[str]:
    """What a reward's expression names that is not the package's own: code, and strings."""
    return [*own_code(reward), *strings(reward)]


def refuse_code(directory: Path, names: Iterable[str], typed: Collection[str]) -> None:
    """Raise a ``ValueError`` for what a run's directory names (`code_among`) and the user did not.

    Args:
        directory: the run's directory.
        names: what its configuration names.
        typed: what the user typed; whoever types a name again, or ``--trust``, allows it.
    """
    allowed = {part for argument in typed for part in (argument, argument.partition("=")[2], *parts(argument))}
    if "--trust" in allowed or not (unknown := [name for name in names if name not in allowed]):
        return
    raise ValueError(
        f"the run in {directory} names {', '.join(unknown)}: that would be imported and run, read or called from your "
        "machine. If you know it, add --trust or type its name again"
    )
