"""Vision-language models behind an OpenAI-compatible endpoint as rewards."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from denoise_env.arguments import integer, number
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import Takes, UnavailableError, check_samples, frames
from denoise_env.rewards.connection import Connection, RemoteError, short
from denoise_env.rewards.judge_templates import PAIRS, SCORES
from denoise_env.rewards.pictures import encode_png, to_uint8

YES_NO = 'Does this show "{prompt}"? Answer with Yes or No.'
SCORE = 'Rate from 0 to 10 how well this shows "{prompt}". End with a line "Final Score: X".'
SCORE_PATTERN = r"Final Score:\s*(-?\d+(?:\.\d+)?)"
PAIR = (
    'Image 1 and Image 2 were made for "{prompt}". Which is better? End with <answer>Image 1 is better</answer>, '
    "<answer>Image 2 is better</answer> or <answer>Tie</answer>."
)

Parse = Callable[[dict[str, Any]], tuple[float, str]]
"""Reads an answer's first choice: a score, and where it is NaN what the model said instead."""


class Chat:
    """Asks a model about pictures: one user message, the pictures first and then the question.

    Args:
        url: of the server, ``http://HOST:PORT`` or with the path up to ``/v1``.
        model: the model's name there.
        question: the text; ``{prompt}`` in it is replaced by the prompt's.
        every: show each so many-th frame of a clip only, the first included.
        size: resize every picture to a square of so many pixels; ``None`` leaves them.
        max_tokens: of the answer.
        temperature: of the answer; ``None`` leaves it to the server.
        api_key_env: the environment variable that holds the API key; where it is not set, none is sent.
        concurrency: requests at a time.
        timeout: seconds for a try.
        retries: how many times a request that failed is sent again, after 0.5, 1, 2, … seconds or what the server asks.

    Raises:
        ValueError: an argument out of its range.
    """

    takes: Takes = "either"
    range = (0.0, 1.0)

    def __init__(
        self,
        url: str,
        model: str,
        question: str,
        every: int,
        size: int | None,
        max_tokens: int,
        temperature: float | None,
        api_key_env: str,
        concurrency: int,
        timeout: float,
        retries: int,
    ) -> None:
        for name, text in (("model", model), ("question", question)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the {name} must be a text, not {text!r}")
        if not isinstance(url, str):
            raise ValueError(f"the url must be a string, not {url!r}")
        base = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.connection = Connection(base, timeout, retries, api_key_env)
        self.question = question
        self.every = integer(every, "every", at_least=1)
        self.size = None if size is None else integer(size, "size", at_least=1, at_most=4096)
        self.concurrency = integer(concurrency, "concurrency", at_least=1, at_most=1024)
        self.body: dict[str, Any] = {
            "model": model,
            "max_completion_tokens": integer(max_tokens, "max_tokens", at_least=1),
        }
        if temperature is not None:
            self.body["temperature"] = number(temperature, "temperature", at_least=0)

    def elsewhere(self, device: torch.device) -> bool:
        """True: another process answers."""
        return True

    def ask(self, samples: Iterable[np.ndarray], prompts: Sequence[Prompt], parse: Parse) -> Tensor:
        """What a model says of each sample, with a warning about those it says nothing usable of.

        After as many failures in a row as there are requests at a time, the rest is not asked.

        Args:
            samples: pictures ``[n, H, W, 3]`` uint8 of each.
            prompts: as many.
            parse: reads the answers.

        Returns:
            ``[B]`` float32 on the CPU; NaN where there is no answer or no score in it.

        Raises:
            RemoteError: no request was answered.
        """
        problems: list[str] = []
        failed = 0

        def one(sample: np.ndarray, prompt: Prompt) -> float | RemoteError:
            nonlocal failed
            if failed >= self.concurrency:
                return RemoteError("not asked")
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encode_png(picture, self.size)}"}}
                for picture in sample
            ]
            content.append({"type": "text", "text": self.question.replace("{prompt}", prompt.text)})
            body = {**self.body, "messages": [{"role": "user", "content": content}]}
            try:
                score, said = self.connection.send("/v1/chat/completions", body, lambda x: parse(_choice(x)))
            except RemoteError as error:
                failed += 1
                problems.append(str(error))
                return error
            failed = 0
            if math.isnan(score):
                problems.append(said)
            return score

        with ThreadPoolExecutor(self.concurrency) as pool:
            found = list(pool.map(one, samples, prompts))
        errors = [score for score in found if isinstance(score, RemoteError)]
        if found and len(errors) == len(found):
            raise errors[0]
        scores = torch.tensor([math.nan if isinstance(score, RemoteError) else score for score in found])
        if missing := int(scores.isnan().sum()):
            warnings.warn(f"the judge gave no score for {missing} of {len(found)} rows: {problems[0]}", stacklevel=3)
        return scores

    def pictures(self, samples: Tensor) -> np.ndarray:
        """The frames that are shown: ``[B, n, H, W, 3]`` uint8."""
        return to_uint8(frames(samples)[:, :: self.every])


class Judge(Chat):
    """A vision-language model's yes, or its score, to a question; higher is better.

    ``mode="yes_no"``: the probability of Yes against No as the first token, σ(log p(Yes) - log p(No)), whichever way
    the words are written (VQAScore, arXiv 2404.01291; Flow-Factory's vllm_evaluate). A word that is not among the 20
    most probable tokens counts 0; where neither is, the row is NaN.

    ``mode="score"``: the numbers in the answer, averaged and rescaled. A number that is missing or not on the scale
    makes the row NaN.

    Args:
        url: of the server, ``http://HOST:PORT`` or with the path up to ``/v1``.
        model: the model's name there.
        question: what is asked; ``{prompt}`` in it is replaced by the prompt's text.
        mode: "yes_no" or "score".
        template: the question, patterns, scale and size of a published model, in `judge_templates.SCORES`; mode is
            then "score", and what else is given takes precedence.
        pattern: a regular expression, or a list of some, each with the number as its first group; the first match
            counts.
        low: the number that becomes 0.
        high: the number that becomes 1.
        every: as in `Chat`, and so are the others.
    """

    citation = "Lin et al. 2024, arXiv 2404.01291; Wang et al. 2025, arXiv 2503.05236"

    def __init__(
        self,
        url: str,
        model: str,
        question: str | None = None,
        mode: Literal["yes_no", "score"] = "yes_no",
        template: str | None = None,
        pattern: str | Sequence[str] | None = None,
        low: float | None = None,
        high: float | None = None,
        every: int = 4,
        size: int | None = None,
        max_tokens: int = 1024,
        temperature: float | None = 0.0,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
    ) -> None:
        if mode not in ("yes_no", "score"):
            raise ValueError(f"mode must be 'yes_no' or 'score', not {mode!r}")
        if template is not None and template not in SCORES:
            raise ValueError(f"template must be one of {list(SCORES)}, not {template!r}")
        self.mode = mode if template is None else "score"
        if self.mode == "yes_no" and (pattern, low, high) != (None, None, None):
            raise ValueError('pattern, low and high belong to mode="score"')
        preset = SCORES.get(template or "")
        default = (YES_NO if mode == "yes_no" else SCORE) if preset is None else preset.question
        size = preset.size if preset is not None and size is None else size
        tokens = 1 if self.mode == "yes_no" else max_tokens
        super().__init__(
            *(url, model, default if question is None else question, every, size, tokens, temperature),
            *(api_key_env, concurrency, timeout, retries),
        )
        if self.mode == "yes_no":
            self.body |= {"logprobs": True, "top_logprobs": 20}
        pattern = pattern or (SCORE_PATTERN if preset is None else preset.patterns)
        self.patterns = [_compile(text) for text in ([pattern] if isinstance(pattern, str) else pattern)]
        ends = (0.0, 10.0) if preset is None else (preset.low, preset.high)
        self.low = number(ends[0] if low is None else low, "low")
        self.high = number(ends[1] if high is None else high, "high")
        if not self.low < self.high:
            raise ValueError(f"low must be below high, not {self.low} and {self.high}")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`, with a warning about rows without a score.

        Raises:
            RemoteError: no request was answered.
            ValueError: samples of another shape or out of [0, 1].
        """
        check_samples(images, prompts, self.takes)
        parse = _yes_no if self.mode == "yes_no" else self._score
        return self.ask(self.pictures(images), prompts, parse).to(images.device)

    def _score(self, choice: dict[str, Any]) -> tuple[float, str]:
        text = _text(choice)
        matches = [pattern.search(text) for pattern in self.patterns]
        found = [float(match[1]) if match else math.nan for match in matches]
        if not all(self.low <= value <= self.high for value in found):
            return math.nan, f"no score from {self.low:g} to {self.high:g} in its answer {short(text)!r}"
        return (math.fsum(found) / len(found) - self.low) / (self.high - self.low), ""


class PairwiseJudge(Chat):
    """Which of two is better, by a vision-language model: win_rate(pairwise_judge(…)).

    What is in the answer's last ``<answer>`` decides; without one, the whole answer does where it names one only.

    Args:
        url: of the server, ``http://HOST:PORT`` or with the path up to ``/v1``.
        model: the model's name there.
        question: what is asked; ``{prompt}`` in it is replaced by the prompt's text. The model is shown the first
            sample and then the second; it must answer that "Image 1 is better", "Image 2 is better", or neither.
        template: the question of a published model, in `judge_templates.PAIRS`.
        every: as in `Chat`, and so are the others.
    """

    citation = "Pref-GRPO, arXiv 2508.20751"
    only_pairs = True

    def __init__(
        self,
        url: str,
        model: str,
        question: str | None = None,
        template: str | None = None,
        every: int = 4,
        size: int | None = None,
        max_tokens: int = 4096,
        temperature: float | None = 0.0,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 3,
    ) -> None:
        if template is not None and template not in PAIRS:
            raise ValueError(f"template must be one of {list(PAIRS)}, not {template!r}")
        default = PAIRS.get(template or "", PAIR)
        super().__init__(
            *(url, model, default if question is None else question, every, size, max_tokens, temperature),
            *(api_key_env, concurrency, timeout, retries),
        )

    def compare(self, images: Tensor, others: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Compare n pairs.

        Args:
            images: ``[n, 3, H, W]`` (clips: ``[n, F, 3, H, W]``) in [0, 1].
            others: of the same shape.
            prompts: the n prompts that both of a pair were made for.

        Returns:
            ``[n]`` float32: 1 where the first is better, 0 where the other is, 0.5 for neither; NaN where the model did
            not say.

        Raises:
            RemoteError: no request was answered.
            ValueError: samples of another shape or out of [0, 1].
        """
        check_samples(images, prompts, self.takes)
        check_samples(others, prompts, self.takes)
        pairs = np.concatenate([self.pictures(images), self.pictures(others)], axis=1)
        return self.ask(pairs, prompts, _better).to(images.device)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Raise an ``UnavailableError``: a single sample has no comparison."""
        raise UnavailableError("pairwise_judge compares two samples: write win_rate(pairwise_judge(…))")


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError):
        choice = None
    if not isinstance(choice, dict):
        raise ValueError("it has no 'choices'")
    return choice


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if text is not None and not isinstance(text, str):
        raise ValueError("the message's content is no text")
    return text or ""


def _yes_no(choice: dict[str, Any]) -> tuple[float, str]:
    try:
        tokens = [
            (entry["token"], float(entry["logprob"])) for entry in choice["logprobs"]["content"][0]["top_logprobs"]
        ]
        words = [(token.strip(" \n▁Ġ").lower(), logprob) for token, logprob in tokens]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ValueError("it has no top_logprobs") from None
    yes, no = (
        torch.tensor([logprob for word, logprob in words if word == wanted], dtype=torch.float64).logsumexp(0).item()
        for wanted in ("yes", "no")
    )
    if not (yes < math.inf and no < math.inf):  # NaN too
        raise ValueError("a logprob in it is no number")
    if yes == no == -math.inf:
        said = ", ".join(repr(word) for word, _ in words[:3])
        return math.nan, f"neither Yes nor No among its first tokens, which are {short(said)}"
    return torch.tensor(yes - no, dtype=torch.float64).sigmoid().item(), ""


def _better(choice: dict[str, Any]) -> tuple[float, str]:
    text = _text(choice)
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    last = answers[-1] if answers else text
    first, second = (re.search(rf"\b(?:image|video) {n} is better", last, re.IGNORECASE) for n in (1, 2))
    if (first and second) or not (first or second or answers):
        return math.nan, f"it does not say which is better: {short(text[-200:])!r}"
    return 1.0 if first else 0.0 if second else 0.5, ""


def _compile(pattern: Any) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"the pattern {pattern!r} cannot be read: {error}") from error
    if compiled.groups < 1:
        raise ValueError(f"the pattern {pattern!r} must have the number as its first group: ({pattern})")
    return compiled
