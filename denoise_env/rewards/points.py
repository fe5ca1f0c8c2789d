"""The reward of Points."""

from collections.abc import Sequence

import torch
from torch import Tensor

from denoise_env.models.points import MIXTURES
from denoise_env.prompts import Prompt

WIDTH = 0.5


class PointsReward:
    """exp(−|x − target|²/(2·0.5²)) in (0, 1]; the target is the first component of the prompt's mixture."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score points ``[B, 2]``; NaN for a prompt that names no mixture."""
        nowhere = [(float("nan"),) * 2]
        targets = torch.tensor([MIXTURES.get(p.text, nowhere)[0] for p in prompts], device=images.device)
        return (-(images.float() - targets).square().sum(1) / (2 * WIDTH**2)).exp()
