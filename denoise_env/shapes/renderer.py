"""Anti-aliased pictures of scenes, and the coverage masks they are made of."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES, parse

RADII = (7.0, 11.0)
"""Smallest and largest radius in pixels of a 32-pixel picture; an object fits a box of 2 · radius."""
MARGIN = 1.0
"""Pixels of a 32-pixel picture that stay free between that box and the edge."""
BASE_SIZE = 32


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    bar = 0.34 * r
    return torch.minimum(torch.maximum(x - r, y.abs() - bar), torch.maximum(x - bar, y.abs() - r))


_OUTLINES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y, r: (x**2 + y**2).sqrt() - r,
    "square": lambda x, y, r: torch.maximum(x, y.abs()) - 0.86 * r,
    "triangle": lambda x, y, r: torch.maximum(y - r, (2 * x - y - r) / 5**0.5),  # the slope of its sides is 2
    "cross": _cross,
}
"""Signed distances in pixels, negative inside, of points at y and at x to either side of the centre."""


def coverage(shape: Tensor | str, centre: Tensor, radius: Tensor, size: int = BASE_SIZE) -> Tensor:
    """Share of every pixel that an object covers.

    Args:
        shape: ``[N]`` indices into `SHAPES`, or one of them for all.
        centre: ``[N, 2]`` x and y in pixels.
        radius: ``[N]`` in pixels.
        size: side of the picture in pixels.

    Returns:
        ``[N, size, size]`` float32 in [0, 1].
    """
    grid = torch.arange(size, device=centre.device) + 0.5
    x = (grid[None, None, :] - centre[:, 0, None, None]).abs()
    y = grid[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    if isinstance(shape, str):
        return (0.5 - _OUTLINES[shape](x, y, r)).clamp(0, 1)
    distance = torch.empty(len(radius), size, size, device=centre.device)
    for i, word in enumerate(SHAPES):
        distance = torch.where(shape[:, None, None] == i, _OUTLINES[word](x, y, r), distance)
    return (0.5 - distance).clamp(0, 1)


def mask_grid(shape: str, spacing: float = 1.0, radius_step: float = 1.0) -> Tensor:
    """Coverage masks of one shape at every radius and place of a grid: ``[M, 32, 32]`` in [0, 1]."""
    low, high = RADII
    masks = []
    for r in torch.linspace(low, high, round((high - low) / radius_step) + 1).tolist():
        room = BASE_SIZE - 2 * (r + MARGIN)
        axis = torch.linspace(r + MARGIN, BASE_SIZE - r - MARGIN, round(room / spacing) + 1)
        centre = torch.cartesian_prod(axis, axis)
        masks.append(coverage(shape, centre, torch.full((len(centre),), r)))
    return torch.cat(masks)


def render(captions: Sequence[str], generator: torch.Generator | None = None, size: int = BASE_SIZE) -> Tensor:
    """Draw each caption with a random radius and place, the object wholly inside the picture.

    Args:
        captions: B captions of the grammar.
        generator: the CPU source of randomness.
        size: side of the pictures in pixels, at least 8.

    Returns:
        ``[B, 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: if a caption is not of the grammar or the size is below 8.
    """
    if size < 8:
        raise ValueError(f"size must be at least 8 pixels, not {size}: smaller ones cannot show shapes.")
    index = torch.tensor([parse(text).indices for text in captions], dtype=torch.long).reshape(-1, 3)
    scale = size / BASE_SIZE
    draws = torch.rand(len(index), 3, generator=generator)
    radius = (RADII[0] + (RADII[1] - RADII[0]) * draws[:, 0]) * scale
    reach = (radius + MARGIN * scale)[:, None]
    centre = reach + draws[:, 1:] * (size - 2 * reach)
    alpha = coverage(index[:, 1], centre, radius, size)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[index[:, 0], :, None, None]
    background = torch.tensor(list(BACKGROUNDS.values()))[index[:, 2], :, None, None]
    return alpha * colour + (1 - alpha) * background
