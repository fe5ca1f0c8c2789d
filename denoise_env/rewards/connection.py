"""JSON over HTTP, with retries: what the rewards that ask another machine share."""

import json
import os
import random
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from denoise_env.arguments import integer, number
from denoise_env.rewards.base import require

if TYPE_CHECKING:
    from httpx2 import Client

BACKOFF = 0.5
"""Seconds before the first retry; they double with each, and are drawn from the upper half."""
LONGEST_WAIT = 30.0
"""Seconds that a server's Retry-After is followed up to."""
SIGN_OF_LIFE = 5.0
"""Seconds that a server that was silent has for an answer to ``/health``."""
_jitter = random.Random()  # the global generators belong to the training run


class RemoteError(RuntimeError):
    """A server gave no answer that can be used; a sentence that says which and why."""


class _Failure(Exception):
    """One try has failed: why, whether another may do better, the seconds that the server asks to wait, and whether it
    gave no answer at all."""

    def __init__(self, why: str, again: bool = True, wait: float = 0.0, silent: bool = False) -> None:
        super().__init__(why)
        self.again, self.wait, self.silent = again, wait, silent


class Connection:
    """Asks one server, from any number of threads at once. Proxies and other settings of the environment are not used.

    A request is sent again after refused and broken connections, timeouts, the statuses 408, 425, 429 and 5xx, and
    answers that cannot be used. Redirections are not followed.

    A server that gave no answer at all to the last try of a request is silent until one is answered: it is first asked
    for ``/health``, where any answer will do, and then sent the request, both once. So an outage costs the retries
    once, and not for every request of a rollout.

    Args:
        url: ``http://`` or ``https://``, with no user, password, query or fragment.
        timeout: seconds for a try.
        retries: how many times a request that failed is sent again.
        token_env: the environment variable with the bearer token; ``None`` or an unset variable sends none.
        max_answer: bytes of an answer; a longer one is refused.

    Raises:
        ValueError: an argument out of its range, or httpx2 is not installed.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 3,
        token_env: str | None = None,
        max_answer: int = 16 * 2**20,
    ) -> None:
        require("httpx2", "denoise-env[serve]", "a reward on another machine")
        self.url = _check_url(url)
        self.timeout = number(timeout, "timeout", at_least=1e-3)
        self.retries = integer(retries, "retries", at_least=0)
        if token_env is not None and not (isinstance(token_env, str) and token_env):
            raise ValueError(f"an environment variable's name must be a string, not {token_env!r}")
        read_token(token_env)
        self.token_env, self.max_answer = token_env, max_answer
        self.silent = False

    @cached_property
    def _client(self) -> "Client":
        from httpx2 import Client, Limits

        return Client(trust_env=False, timeout=self.timeout, limits=Limits(max_connections=None))

    def send(
        self,
        path: str,
        payload: Any = None,
        parse: Callable[[Any], Any] = lambda answer: answer,
        retries: int | None = None,
    ) -> Any:
        """POST a JSON value, or GET where there is none, and return what ``parse`` makes of the answer.

        Args:
            path: what follows the URL.
            payload: the JSON value.
            parse: raises a ``ValueError`` for an answer that cannot be used.
            retries: other than the connection's.

        Raises:
            RemoteError: there is no such answer after the retries.
        """
        body = None if payload is None else json.dumps(payload).encode()
        tries = 1 + (0 if self.silent else self.retries if retries is None else retries)
        for attempt in range(tries):
            try:
                if self.silent:
                    self._seek_sign_of_life()
                answer = self._once(path, body, self.timeout)
                self.silent = False
                return parse(answer)
            except ValueError as error:
                failure = _Failure(f"its answer cannot be used: {error}")
            except _Failure as error:
                failure = error
            if not failure.again or attempt == tries - 1:
                break
            time.sleep(max(failure.wait, BACKOFF * 2**attempt * _jitter.uniform(0.5, 1.0)))
        self.silent = failure.silent
        times = f" (tried {attempt + 1} times)" if attempt else ""
        raise RemoteError(f"{self.url}{path}: {failure}{times}")

    def _seek_sign_of_life(self) -> None:
        """Raise a `_Failure` where the server gives no answer at all."""
        try:
            self._once("/health", None, min(self.timeout, SIGN_OF_LIFE))
        except _Failure as error:
            if error.silent:
                raise _Failure(f"still silent: {error}", silent=True) from error
        except ValueError:  # an answer all the same
            pass

    def _once(self, path: str, body: bytes | None, timeout: float) -> Any:
        from httpx2 import HTTPError, TimeoutException

        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token := read_token(self.token_env):
            headers["Authorization"] = f"Bearer {token}"
        end = time.monotonic() + timeout
        data = bytearray()
        try:
            method = "GET" if body is None else "POST"
            url = f"{self.url}{path}"
            with self._client.stream(method, url, content=body, headers=headers, timeout=timeout) as response:
                for chunk in response.iter_raw():
                    data += chunk
                    if len(data) > self.max_answer:
                        raise _Failure(f"its answer is longer than {self.max_answer:,} bytes", again=False)
                    if time.monotonic() > end:
                        raise _Failure(f"no whole answer in {timeout:g} s", silent=True)
        except TimeoutException:
            raise _Failure(f"no answer in {timeout:g} s", silent=True) from None
        except HTTPError as error:
            raise _Failure(f"{type(error).__name__}: {error}", silent=True) from error
        status = response.status_code
        if status != 200:
            again = status in (408, 425, 429) or status >= 500
            why = f"it answers {status}{_said(bytes(data))}"
            raise _Failure(why, again, _seconds(response.headers.get("Retry-After", "")))
        return parse_json(bytes(data))


def parse_json(data: bytes) -> Any:
    """The value of a JSON text; a ``ValueError`` for anything else, nested too deeply included."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({short(error)})") from None


def read_token(variable: str | None) -> str:
    """The token in an environment variable; empty where there is none.

    Raises:
        ValueError: it has characters that a header cannot have.
    """
    token = os.environ.get(variable, "").strip() if variable else ""
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"the token in {variable} may have printable ASCII characters only")
    return token


def short(text: object, most: int = 200) -> str:
    """What somebody else wrote, on one line of printable characters and cut, for a message."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(text)[: 4 * most])
    line = " ".join(line.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _check_url(url: str) -> str:
    from httpx2 import URL, InvalidURL

    try:
        parsed = URL(url)
    except (InvalidURL, TypeError, ValueError) as error:
        raise ValueError(f"the url {url!r} cannot be read: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"the url must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError("the url must have no user, password, query or fragment: a token belongs in an environment "
                         "variable, whose name is an argument")  # fmt: skip
    return str(parsed).rstrip("/")


def _said(data: bytes) -> str:
    """What an error's body says, where it says it as JSON."""
    try:
        value = parse_json(data)
    except ValueError:
        return ""
    for name in ("detail", "error", "message"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    return f": {short(value)}" if isinstance(value, str) else ""


def _seconds(header: str) -> float:
    return min(float(header), LONGEST_WAIT) if header.isascii() and header.isdigit() else 0.0
