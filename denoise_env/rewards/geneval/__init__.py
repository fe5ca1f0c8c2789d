"""The reward of GenEval: are the objects that the prompt asks for in the picture?

`rules.py` says what is right, `networks.py` finds the objects and names their colours.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from denoise_env.arguments import integer
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel, pixels
from denoise_env.rewards.geneval.networks import ClipColors, Mask2FormerDetector, load_mask2former
from denoise_env.rewards.geneval.rules import (
    MOST,
    ColorClassifier,
    Detector,
    Mode,
    crop,
    grade,
    keep,
    read_request,
    to_color,
)
from denoise_env.rewards.pretrained import check_reference, local


class Networks(nn.Module):
    """What GenEval sees with: a detector and what names colours."""

    def __init__(self, detector: Detector, colors: ColorClassifier) -> None:
        super().__init__()
        self.detector, self.colors = detector, colors


class GenEval(RewardModel):
    """Whether the objects, numbers, colours and positions asked for are there; higher is better.

    The prompts' metadata are those of GenEval's ``evaluation_metadata.jsonl``, which is a prompt file as it is; a
    prompt without them gets NaN.

    The detector is Mask2Former with a Swin-S backbone, as in GenEval, which uses weights that mmdetection trained. The
    default is the same network with its authors' weights: single pictures differ from GenEval's own results.

    Args:
        mode: "correct" is GenEval's rule, 0 or 1; "strict" is the same with exact numbers of objects; "score" is the
            graded mean that Flow-GRPO trains on (see `rules.grade`).
        detector: a Mask2Former for the instances of COCO, a directory or a name on the hub.
        clip: a CLIP, likewise.
        resolution: the shortest side of the pictures that the detector sees.
        device: as in `RewardModel`.
        microbatch: as in `RewardModel`.

    Raises:
        ValueError: an argument out of its range, or a directory that is not there. When called: metadata that are not
            of GenEval's form.
    """

    range = (2.0 - MOST, 1.0)
    citation = "GenEval, arXiv 2310.11513"

    def __init__(
        self,
        mode: Mode = "score",
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        resolution: int = 800,
        device: str | None = None,
        microbatch: int = 8,
    ) -> None:
        super().__init__(device, microbatch=microbatch)
        if mode not in get_args(Mode):
            raise ValueError(f"the mode must be one of {list(get_args(Mode))}, not {mode!r}")
        self.mode: Mode = mode
        if mode != "score":
            self.range = (0.0, 1.0)
        check_reference(detector, "detector", 2)
        check_reference(clip, "clip", 2)
        self.detector, self.clip = local(detector), local(clip)
        self.resolution = integer(resolution, "resolution", at_least=32)

    def load_network(self) -> nn.Module:
        """The two networks."""
        detector = Mask2FormerDetector(load_mask2former(self.detector), self.resolution)
        return Networks(detector, ClipColors(self.clip))

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        requests = [read_request(prompt.metadata) for prompt in prompts]
        rows = [i for i, request in enumerate(requests) if request]
        scores = torch.full((len(prompts),), torch.nan, device=images.device)
        if not rows:
            return scores
        bytes_ = pixels(images)
        detections = network.detector(bytes_[rows].to(images.device).movedim(-1, -3) / 255)
        for i, found in zip(rows, detections, strict=True):
            request = requests[i]
            assert request is not None
            objects = keep(found, request.tag)
            colored = to_color(objects, request, self.mode)
            names = network.colors([crop(bytes_[i], one) for one in colored], [one.label for one in colored])
            for detection, name in zip(colored, names, strict=True):
                detection.color = name
            scores[i] = grade(objects, request, self.mode)
        return scores
