"""What Ctrl-C and SIGTERM do: what is trained is saved, the way to go on is said, and there is never a traceback."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Stopped(KeyboardInterrupt):
    """The program was asked to stop, and is at a place where it can."""


class Stopping:
    """A context in which Ctrl-C (SIGINT) and SIGTERM end the process in order.

    The first signal ends it at once with `message` and exit status 128 + the signal's number, which is 130 or 143;
    nothing is unwound then, so that nothing can print a traceback. Inside `held` it only takes note, and `check` raises
    `Stopped` where the program can stop. A second signal ends the process at once wherever it is.

    Signals that were ignored stay ignored (as in ``nohup``), and outside the main thread nothing is changed.

    Attributes:
        message: what is said at the end, such as how to go on.
        signal: the number of the signal that came, or ``None``.
    """

    def __init__(self, message: str = "stopped") -> None:
        self.message = message
        self.signal: int | None = None
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context that a first signal does not end; where none is raised by `check`, it takes effect behind it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signal is not None:
            self._end(self.signal)

    def check(self) -> None:
        """Raise `Stopped` where a signal has come."""
        if self.signal is not None:
            raise Stopped

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or not self._held:
            self._end(number)
        self.signal = number
        _say("stopping at the next place where nothing is lost; once more stops at once")

    def _end(self, number: int) -> None:
        with contextlib.suppress(Exception):  # a signal may come in the middle of a print
            sys.stdout.flush()
        _say(self.message)
        os._exit(128 + number)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\ndenoise-env: {text}\n".encode())
