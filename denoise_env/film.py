"""Clips where a picture is asked for."""

import math

import torch
from torch import Tensor


def contact_sheet(clips: Tensor) -> Tensor:
    """The frames of clips side by side, row by row, on sheets of about as many rows as columns.

    Args:
        clips: ``[B, F, H, W, C]``.

    Returns:
        ``[B, rows · H, columns · W, C]``; places without a frame are 0. A clip of one frame is that frame.
    """
    count = clips.shape[1]
    columns = math.ceil(math.sqrt(count))
    lines = -(-count // columns)
    missing = clips.new_zeros(len(clips), lines * columns - count, *clips.shape[2:])
    placed = torch.cat([clips, missing], 1).unflatten(1, (lines, columns))
    return placed.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
