"""What a reward is."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

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
