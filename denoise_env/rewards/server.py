"""Serves a reward over HTTP, in Flow-Factory's JSON form: ``denoise-env serve-reward``."""

import asyncio
import hmac
import ipaddress
import math
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from denoise_env.arguments import integer
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Reward, UnavailableError
from denoise_env.rewards.connection import parse_json, short
from denoise_env.rewards.pictures import TooLargeError, decode

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from uvicorn import Server

GATHER = 0.005
"""Seconds that a batch waits for the requests of other clients."""
MAX_BODY = 256 * 2**20
"""Bytes of a request."""
MAX_DECODED = 2**30
"""Bytes of a request's decoded samples."""
MAX_WAITING = 4 * 2**30
"""Bytes of all decoded samples that wait."""
BODY_SECONDS = 60.0
"""Seconds for a request's body to arrive."""
CONNECTIONS = 256
"""Connections at a time; more are answered with 503."""


_STOPPING = "the server is stopping"


class Refusal(Exception):
    """A request is answered with a status other than 200 and one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(eq=False)
class Row:
    """A sample that waits for its score.

    Attributes:
        sample: ``[3, H, W]`` (a clip: ``[F, 3, H, W]``), uint8, or float32 in [0, 1].
        prompt: its prompt.
        request: what the rows of one request have in common.
        answer: of the score, of a sentence that says why there is none, or of the whole request's refusal.
    """

    sample: Tensor
    prompt: Prompt
    request: object
    answer: "asyncio.Future[float | str | Refusal]" = field(init=False)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the rows of a batch have in common."""
        return (self.sample.dtype, *self.sample.shape)


class RewardServer:
    """A reward, the rows that wait for it, and the thread that scores them.

    ``POST /compute`` takes ``{"prompt": [str], "image": [image] | null, "video": [[image]] | null}``, an image being
    base64 of a PNG, or ``{"shape": [3, H, W], "float32": base64}``; and also ``"metadata": [object]`` and
    ``"condition_images": [[image]]``, the prompts' own. It answers ``{"rewards": [float | null], "errors": [str]}``;
    null marks a row that could not be scored. Any other answer is ``{"detail": sentence}``: 401 the token, 408 and
    413 the body, 415 and 422 its form, 500 the reward cannot score at all, 503 the queue is full (with Retry-After).
    ``GET /health`` answers ``{"status": "ok"}``.

    Rows of the same size are scored together, whichever clients they are from. Where that fails, each request's rows
    are scored by themselves.

    Args:
        reward: what scores; it must not compare groups.
        token: what clients must send as bearer token; empty for none.
        device: where the reward is given its samples.
        max_batch: rows that are scored together.
        max_queue: rows that may wait.
        max_body: bytes of a request.
        max_decoded: bytes of a request's decoded samples.

    Raises:
        ValueError: an argument out of its range, or a reward that compares groups.
    """

    def __init__(
        self,
        reward: Reward,
        token: str = "",
        device: str = "cpu",
        max_batch: int = 64,
        max_queue: int = 1024,
        max_body: int = MAX_BODY,
        max_decoded: int = MAX_DECODED,
    ) -> None:
        if getattr(reward, "compares_group", False):
            raise ValueError("a reward that compares the samples of a group cannot be served, since a request need not "
                             "hold whole groups: put it around the client, as in win_rate(remote(url=…))")  # fmt: skip
        try:
            self.device = torch.device(device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use the device {device!r}: {str(error).splitlines()[0]}") from error
        self.reward, self.token = reward, token.encode()
        self.max_batch = integer(max_batch, "max_batch", at_least=1)
        self.max_queue = integer(max_queue, "max_queue", at_least=1)
        self.max_body, self.max_decoded = max_body, max_decoded
        self.waiting: deque[Row] = deque()
        self.batch: list[Row] = []
        self.stopping = False

    def app(self) -> "FastAPI":
        """The application, for any ASGI server; one process of one worker."""
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            self.filled, self.decoding = asyncio.Event(), asyncio.Semaphore(2)
            thread = ThreadPoolExecutor(1, "reward")
            batches = asyncio.create_task(self._score_batches(thread))
            yield
            batches.cancel()
            thread.shutdown(wait=False, cancel_futures=True)  # the reward may hang

        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

        @app.exception_handler(Refusal)
        async def refuse(_: Request, error: Refusal) -> JSONResponse:
            headers = {"Retry-After": "1"} if error.status == 503 else None
            return JSONResponse({"detail": str(error)}, error.status, headers)

        @app.get("/health")
        async def health(request: Request) -> JSONResponse:
            self._check_token(request)
            return JSONResponse({"status": "ok"})

        @app.post("/compute")
        async def compute(request: Request) -> JSONResponse:
            self._check_token(request)
            body = await self._body(request)
            async with self.decoding:
                rows = await asyncio.to_thread(self._rows, body)
            del body
            answers = await asyncio.gather(*self._enqueue(rows))
            if refusal := next((answer for answer in answers if isinstance(answer, Refusal)), None):
                raise Refusal(refusal.status, str(refusal))
            errors = dict.fromkeys(answer for answer in answers if isinstance(answer, str))
            rewards = [a if isinstance(a, float) and math.isfinite(a) else None for a in answers]
            return JSONResponse({"rewards": rewards, "errors": list(errors)})

        return app

    def _check_token(self, request: "Request") -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if self.token and not hmac.compare_digest(given, self.token):
            raise Refusal(401, "this server wants a token, in the header Authorization: Bearer TOKEN")

    async def _body(self, request: "Request") -> bytes:
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the request must be of the type application/json")  # browsers then ask before they send
        too_large = Refusal(413, f"a request may have {self.max_body:,} bytes: send fewer samples in one")
        length = request.headers.get("Content-Length", "")
        if length.isascii() and length.isdigit() and (len(length) > 15 or int(length) > self.max_body):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.max_body:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
        return bytes(body)

    def _rows(self, body: bytes) -> list[Row]:
        """The rows of a request's body."""
        try:
            value = parse_json(body)
            return _read(value, self.max_decoded, self.max_queue)
        except TooLargeError as error:
            raise Refusal(413, short(error)) from error
        except (ValueError, RecursionError) as error:
            raise Refusal(422, short(error)) from error

    def _enqueue(self, rows: Sequence[Row]) -> "list[asyncio.Future[float | str | Refusal]]":
        if self.stopping:
            raise Refusal(503, _STOPPING)
        size = sum(row.sample.nbytes for row in (*self.waiting, *rows))
        if len(self.waiting) + len(rows) > self.max_queue or (self.waiting and size > MAX_WAITING):
            raise Refusal(503, f"{len(self.waiting)} samples wait already: try again")
        for row in rows:
            row.answer = asyncio.get_running_loop().create_future()
        self.waiting.extend(rows)
        self.filled.set()
        return [row.answer for row in rows]

    async def _score_batches(self, thread: ThreadPoolExecutor) -> None:
        while True:
            await self.filled.wait()
            if len(self.waiting) < self.max_batch:
                await asyncio.sleep(GATHER)
            self.batch = self._take()
            answers = await asyncio.get_running_loop().run_in_executor(thread, self._score, self.batch)
            for row, answer in zip(self.batch, answers, strict=True):
                if not row.answer.done():  # its client may have gone
                    row.answer.set_result(answer)

    def stop(self) -> None:
        """Refuse what is waiting, what is being scored and what still comes."""
        self.stopping = True
        for row in (*self.batch, *self.waiting):
            if not row.answer.done():
                row.answer.set_result(Refusal(503, _STOPPING))

    def _take(self) -> list[Row]:
        """The rows that waited longest and have the size of the first."""
        batch: list[Row] = []
        rest: deque[Row] = deque()
        for row in self.waiting:
            fits = len(batch) < self.max_batch and row.kind == self.waiting[0].kind
            (batch if fits else rest).append(row)
        self.waiting = rest
        if not rest:
            self.filled.clear()
        return batch

    @torch.no_grad()
    def _score(self, rows: list[Row]) -> "list[float | str | Refusal]":
        """A score, or why there is none, for each row of a batch."""
        try:
            samples = torch.stack([row.sample for row in rows]).to(self.device)
            if samples.dtype == torch.uint8:
                samples = samples.float() / 255
            scores = torch.as_tensor(self.reward(samples, [row.prompt for row in rows]))
            if scores.shape != (len(rows),):
                raise ValueError(f"the reward returned shape {tuple(scores.shape)} for {len(rows)} samples")
            return [float(score) for score in scores.cpu().float()]
        except (Exception, SystemExit) as error:
            requests = dict.fromkeys(row.request for row in rows)
            if len(requests) > 1:
                found = {request: iter(self._score([r for r in rows if r.request is request])) for request in requests}
                return [next(found[row.request]) for row in rows]
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                why = f"out of memory with {len(rows)} samples: serve with a smaller --max-batch"
                return [Refusal(503, why)] * len(rows)
            if isinstance(error, UnavailableError):
                return [Refusal(500, short(error))] * len(rows)
            return [_said(error)] * len(rows)


def _said(error: BaseException) -> str:
    return short(f"{type(error).__name__}: {error}")


def _read(value: Any, most: int, max_rows: int) -> list[Row]:
    """The rows of a request's JSON value, with ``most`` bytes in all.

    Raises:
        TooLargeError: more rows or bytes.
        ValueError: it is not of the form.
    """
    if not isinstance(value, dict):
        raise ValueError("the request must be a JSON object")
    texts = value.get("prompt")
    if not isinstance(texts, list) or not texts:
        raise ValueError("prompt must be a list of at least one string")
    if len(texts) > max_rows:
        raise TooLargeError(f"{len(texts)} samples are more than may wait, {max_rows}: send fewer in one request")
    images, clips = value.get("image") or None, value.get("video") or None
    if (images is None) == (clips is None):
        raise ValueError("one of image and video must be a list, and the other null")
    if value.get("condition_videos"):
        raise ValueError("condition_videos are not supported")
    name, samples = ("image", images) if clips is None else ("video", clips)
    columns: dict[str, Any] = {name: samples}
    for optional in ("metadata", "condition_images"):
        columns[optional] = value[optional] if value.get(optional) is not None else [None] * len(texts)
    for column, items in columns.items():
        if not isinstance(items, list) or len(items) != len(texts):
            raise ValueError(f"{column} must be a list as long as prompt, {len(texts)}")

    def image(encoded: Any, where: str) -> Tensor:
        nonlocal most
        try:
            tensor = decode(encoded, most)
        except ValueError as error:
            raise type(error)(f"{where}: {error}") from error
        most -= tensor.nbytes
        return tensor

    def clip(encoded: Any, where: str) -> list[Tensor]:
        if not isinstance(encoded, list):
            raise ValueError(f"{where} must be a list of images")
        return [image(item, f"{where}[{i}]") for i, item in enumerate(encoded)]

    request, rows = object(), []
    for i, text in enumerate(texts):
        sample, metadata, conditions = (items[i] for items in columns.values())
        where = f"{name}[{i}]"
        if clips is None:
            tensor = image(sample, where)
        else:
            frames = clip(sample, where)
            if not frames or len({(frame.dtype, frame.shape) for frame in frames}) > 1:
                raise ValueError(f"{where} must be a list of at least one image, all of one size and form")
            tensor = torch.stack(frames)
        references = [] if conditions is None else clip(conditions, f"condition_images[{i}]")
        rows.append(
            Row(tensor, Prompt(text, images=references, metadata={} if metadata is None else metadata), request)
        )
    return rows


def serve(server: RewardServer, host: str, port: int, announce: Callable[[str], Any]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        server: what is served.
        host: the address to listen on; any but a loopback address wants a token.
        port: 0 takes a free one.
        announce: is called with the URL once clients can connect.

    Raises:
        ValueError: other machines would be let in without a token.
        OSError: the address cannot be listened on.
    """
    if not server.token and not is_loopback(host):
        raise ValueError(f"with the host {host} any machine could send requests: name the environment variable that "
                         "holds a token, with --token-env")  # fmt: skip
    with listen(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        announce(f"http://{name}:{listener.getsockname()[1]}")
        http_server(server).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. An ``OSError`` where it cannot."""
    # with the protocol named, asyncio sets TCP_NODELAY; without that, answers wait 40 ms for the client's ACK
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(CONNECTIONS)
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def http_server(server: RewardServer) -> "Server":
    """The HTTP server that runs a reward server's application."""
    from uvicorn import Config, Server

    class Stopping(Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            server.stop()
            await super().shutdown(sockets)

    config = Config(
        server.app(),
        log_level="warning",
        access_log=False,
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    return Stopping(config)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
