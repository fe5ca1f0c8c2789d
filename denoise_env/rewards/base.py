"""What a reward is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """Scores decoded samples against their prompts.

    Any callable of this form is a reward, a plain function included.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        """Score a whole batch.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1] (video: ``[B, F, 3, H, W]``).
            prompts: the B prompts.
            metadata: the B prompts' metadata, empty mappings where there is none.

        Returns:
            ``[B]`` float32; NaN marks a row that could not be scored.
        """
        ...


def score_captions(
    images: Tensor,
    prompts: Sequence[str],
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
            parse(prompt)
        except ValueError:
            continue
        rows.append(i)
    scores = torch.full((len(images),), torch.nan, device=images.device)
    if rows:
        scores[rows] = score(images[rows], [prompts[i] for i in rows])
    return scores
