"""A reward that another process or machine computes: the client of ``denoise-env serve-reward``."""

import math
import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from denoise_env.arguments import integer
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Takes, check_samples
from denoise_env.rewards.connection import Connection, short
from denoise_env.rewards.pictures import encode_float, encode_png, to_uint8


class Remote:
    """What a reward server says (denoise-env serve-reward); higher is better.

    Each microbatch is one POST of ``/compute``: ``prompt``, ``image`` or ``video`` (a list of frames for each clip),
    and, where a prompt has them, ``metadata`` and ``condition_images``, its images. A prompt's negative text is not
    sent.

    ``format="png"`` rounds to 8 bits: scores are those that the reward gives the rounded images. ``format="float"``,
    which only our server reads, sends the float32 values themselves, and scores equal those of the reward in this
    process on contiguous samples, as far as it does not depend on the batch.

    A row that the server could not score is NaN. Where it gives no usable answer after the retries, the call raises.

    Args:
        url: ``http://HOST:PORT``.
        timeout: seconds for a try.
        retries: how many times a request that failed is sent again, after 0.5, 1, 2, … seconds or what the server asks.
        microbatch: samples in a request.
        token_env: the environment variable that holds the server's token; ``None`` for a server without.
        format: "png" or "float".

    Raises:
        ValueError: an argument out of its range, or the variable is not set.
    """

    takes: Takes = "either"

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 3,
        microbatch: int = 16,
        token_env: str | None = None,
        format: Literal["png", "float"] = "png",
    ) -> None:
        self.connection = Connection(url, timeout, retries, token_env)
        self.microbatch = integer(microbatch, "microbatch", at_least=1)
        if format not in ("png", "float"):
            raise ValueError(f"format must be 'png' or 'float', not {format!r}")
        if token_env is not None and not os.environ.get(token_env):
            raise ValueError(f"the environment variable {token_env}, which holds the server's token, is not set")
        self.format = format

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`.

        Raises:
            RemoteError: the server gave no usable answer.
            ValueError: samples of another shape or out of [0, 1].
        """
        check_samples(images, prompts, self.takes)
        scores: list[float] = []
        for start in range(0, len(images), self.microbatch):
            rows = slice(start, start + self.microbatch)
            payload = self._payload(images[rows], prompts[rows])
            parse = partial(_read, count=len(payload["prompt"]))
            found, errors = self.connection.send("/compute", payload, parse)
            if errors:
                count = sum(map(math.isnan, found))
                said = "; ".join(short(error) for error in errors[:2])
                warnings.warn(f"{self.connection.url} did not score {count} rows: {said}", stacklevel=2)
            scores += found
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def check(self) -> str:
        """Ask the server, once, whether it is there.

        Returns:
            A sentence that says so.

        Raises:
            RemoteError: a sentence that says what is wrong.
        """
        answer = self.connection.send("/health", parse=_read_health, retries=0)
        return f"{self.connection.url} answers: {short(answer)}"

    def elsewhere(self, device: torch.device) -> bool:
        """True: the scores are computed in another process."""
        return True

    def _payload(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
        def encode(sample: Any) -> Any:
            if sample.ndim == 4:
                return [encode(frame) for frame in sample]
            return encode_png(sample) if self.format == "png" else encode_float(sample)

        samples = [encode(sample) for sample in (to_uint8(images) if self.format == "png" else images.float())]
        clips = images.ndim == 5
        payload: dict[str, Any] = {
            "prompt": [prompt.text for prompt in prompts],
            "image": None if clips else samples,
            "video": samples if clips else None,
        }
        if any(prompt.metadata for prompt in prompts):
            payload["metadata"] = [prompt.metadata for prompt in prompts]
        if any(prompt.images for prompt in prompts):
            payload["condition_images"] = [[encode_png(i.pixels()) for i in prompt.images] for prompt in prompts]
        return payload


def _read(answer: Any, count: int) -> tuple[list[float], list[Any]]:
    """The scores and the errors of an answer for ``count`` rows; a ``ValueError`` for any other answer."""
    scores = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ValueError("it has no list 'rewards'")
    if len(scores) != count:
        raise ValueError(f"it has {len(scores)} rewards for {count} samples")
    for score in scores:
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float))):
            raise ValueError(f"a reward in it is no number but {short(repr(score), 40)}")
    errors = answer.get("errors") or []
    if not isinstance(errors, list):
        raise ValueError("its 'errors' are no list")
    try:
        return [math.nan if score is None else float(score) for score in scores], errors
    except OverflowError:
        raise ValueError("a reward in it is out of range") from None


def _read_health(answer: Any) -> str:
    if not isinstance(answer, dict) or not isinstance(answer.get("status"), str):
        raise ValueError("it has no 'status'")
    return answer["status"]
