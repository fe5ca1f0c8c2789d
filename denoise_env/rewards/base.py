"""What a reward is, and what rewards that hold a network share."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from denoise_env.arguments import integer
from denoise_env.prompts import Prompt

Takes = Literal["images", "clips", "either"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Reward(Protocol):
    """Scores decoded samples against their prompts.

    Any callable of this form is a reward, a plain function included. It may say more of itself in attributes:

    - ``takes``: "images", "clips" or "either" (the default).
    - ``range``: the lowest and highest score; by default unbounded.
    - ``citation``: where the score is from.
    - ``compares_group``: whether it scores every sample against the others of its group, and has to be called with
      whole groups (by default it has not). It is then called with ``group_size`` too.
    - ``check()``: raises where it can be known at the start that it will not score, as when its server is down.
    - ``only_pairs``: whether it compares pairs and scores nothing alone, as in ``win_rate(pairwise_judge(…))``.
    - ``elsewhere(device)``: whether it computes on another machine or device than this one, the model's: a rollout then
      scores each microbatch while it denoises the next.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score a whole batch.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1] (clips: ``[B, F, 3, H, W]``).
            prompts: the B prompts, each with its text, metadata and images.

        Returns:
            ``[B]`` float32; NaN marks a row that could not be scored.
        """
        ...


class UnavailableError(ValueError):
    """A reward that cannot score at all: its weights cannot be loaded. Other errors cost the rows they happened on."""


class RewardModel(ABC):
    """A reward that holds a network: loaded when it is first called, kept, and called in microbatches of its own.

    A subclass says how to load the network (`load_network`) and how to score with it (`score`).

    Args:
        device: where the network runs; default: where the images are.
        dtype: precision of the weights: "fp32", "bf16" or "fp16".
        microbatch: samples per call of the network.

    Attributes:
        packages: what the reward imports beyond the package's own dependencies: module → what to install.

    Raises:
        ValueError: an argument out of its range, or a package that is not installed, with the command that installs it.
    """

    takes: Takes = "images"
    range: tuple[float, float] = (-float("inf"), float("inf"))
    citation: str = ""
    packages: ClassVar[Mapping[str, str]] = {}

    def __init__(self, device: str | None = None, dtype: str = "fp32", microbatch: int = 32) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, not {dtype!r}")
        for module, install in self.packages.items():
            require(module, install, type(self).__name__)
        self.device = device
        self.dtype = DTYPES[dtype]
        self.microbatch = integer(microbatch, "microbatch", at_least=1)
        self.network: nn.Module | None = None

    @abstractmethod
    def load_network(self) -> nn.Module:
        """The network on the CPU, in any precision, with its weights."""

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score one microbatch with ``self.network``: ``[b]``, on the network's device.

        Args:
            images: ``[b, 3, H, W]`` (clips: ``[b, F, 3, H, W]``) float32 in [0, 1], on the network's device.
            prompts: the b prompts.
        """

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `Reward`.

        Raises:
            UnavailableError: the network cannot be loaded.
            ValueError: samples of another shape or out of [0, 1].
        """
        check_samples(images, prompts, self.takes)
        device = torch.device(self.device or images.device)
        if self.network is None:
            try:
                self.network = self.load_network().eval().requires_grad_(False).to(self.dtype)
            except (Exception, SystemExit) as error:
                why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                raise UnavailableError(f"{type(self).__name__} cannot be loaded: {' '.join(why.split())}") from error
        self.network.to(device)
        scores = []
        for start in range(0, len(images), self.microbatch):
            rows = slice(start, start + self.microbatch)
            scores.append(self.score(images[rows].to(device, torch.float32), prompts[rows]).float())
        return torch.cat(scores).to(images.device)

    def elsewhere(self, device: torch.device) -> bool:
        """Whether the network runs on another device."""
        return self.device is not None and torch.device(self.device) != device

    def offload(self) -> None:
        """Move the network to the host's memory; the next call brings it back."""
        if self.network is not None:
            self.network.to("cpu")

    def free(self) -> None:
        """Forget the network; the next call loads it again."""
        self.network = None


def computes_elsewhere(reward: Any, device: torch.device) -> bool:
    """Whether a reward says that it computes on another machine or device than this one."""
    return callable(at := getattr(reward, "elsewhere", None)) and bool(at(device))


def require(module: str, install: str, who: str) -> None:
    """Raise a ``ValueError`` with the command that installs it for a module that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{who} needs the package {module!r}: pip install '{install}'")


def check_samples(images: Tensor, prompts: Sequence[Any], takes: Takes = "either") -> None:
    """Raise a ``ValueError`` for samples that are not what a reward takes, one for each prompt, in [0, 1]."""
    shapes = {"images": (4,), "clips": (5,), "either": (4, 5)}[takes]
    if images.ndim not in shapes or images.shape[-3] != 3 or not images.is_floating_point():
        wanted = " or ".join({4: "images [B, 3, H, W]", 5: "clips [B, F, 3, H, W]"}[n] for n in shapes)
        raise ValueError(f"samples must be floating {wanted}, not {str(images.dtype)[6:]} {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images need as many prompts, not {len(prompts)}")
    if images.numel():
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN too
            raise ValueError(f"samples must lie in [0, 1]; these go from {low:g} to {high:g}")


def frames(images: Tensor) -> Tensor:
    """Images as clips of one frame, clips as they are: ``[B, F, 3, H, W]``."""
    return images[:, None] if images.ndim == 4 else images


def pixels(images: Tensor) -> Tensor:
    """Samples in [0, 1] as bytes: uint8 ``[..., H, W, 3]`` on the CPU, each value times 255 and rounded."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).contiguous().cpu()


def score_captions(
    images: Tensor,
    prompts: Sequence[Prompt],
    parse: Callable[[str], Any],
    score: Callable[[Tensor, Sequence[str]], Tensor],
) -> Tensor:
    """Score the rows whose prompt is a caption of a grammar.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        prompts: the B prompts.
        parse: reads a caption, and raises a ``ValueError`` for any other text.
        score: scores n pictures against n captions: ``[n]``.

    Returns:
        ``[B]`` float32; NaN where the prompt is no caption.

    Raises:
        ValueError: if the numbers of pictures and prompts differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images need as many prompts, not {len(prompts)}.")
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            parse(prompt.text)
        except ValueError:
            continue
        rows.append(i)
    scores = torch.full((len(images),), torch.nan, device=images.device)
    if rows:
        scores[rows] = score(images[rows], [prompts[i].text for i in rows])
    return scores
