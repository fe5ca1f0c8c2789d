"""Anti-aliased pictures of compositions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from denoise_env.shapes.compositions.grammar import MAX_OBJECTS, RELATIONS, parse
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS
from denoise_env.shapes.renderer import BASE_SIZE, MARGIN, coverage
from denoise_env.shapes.renderer import RADII as RADII_OF_ONE

RADII: dict[int, tuple[float, float]] = {1: RADII_OF_ONE, 2: (4.0, 6.0), 3: (4.0, 5.5), 4: (4.0, 5.0)}
"""Number of objects → smallest and largest radius in pixels of a 32-pixel picture."""
GAP = 1.5
"""Pixels of a 32-pixel picture between the boxes of two objects, along x or along y."""
SLOPE = 1 / 3
"""Two related objects are at most this far apart across the relation's axis, as a share of how far along it."""
FIELD = 16
"""Side of a board's fields in pixels of a 32-pixel picture: an object on a board lies in the middle of one of four."""
_TRIES = 64


def encode(captions: Sequence[str]) -> Tensor:
    """`Composition.indices` of captions: ``[B, 10]`` int64.

    Raises:
        ValueError: if a caption is not of the grammar.
    """
    return torch.tensor([parse(text).indices for text in captions], dtype=torch.long).reshape(-1, 2 + 2 * MAX_OBJECTS)


def place(
    exists: Tensor, relation: Tensor, radius: Tensor, generator: torch.Generator | None = None, board: bool = False
) -> Tensor:
    """Draw places uniformly from those where the objects lie apart and as they are related.

    Args:
        exists: ``[B, 4]`` which objects there are.
        relation: ``[B]`` place in `RELATIONS` of the first two objects' relation, −1 for none.
        radius: ``[B, 4]`` in pixels of a 32-pixel picture.
        generator: the CPU source of randomness.
        board: whether the places are the middles of a board's fields.

    Returns:
        ``[B, 4, 2]`` x and y of the centres in pixels of a 32-pixel picture.
    """
    directions = torch.tensor([*RELATIONS.values(), (0, 0)], dtype=torch.float32)[relation]
    i, j = torch.triu_indices(MAX_OBJECTS, MAX_OBJECTS, 1)
    pairs = exists[:, i] & exists[:, j]
    least = radius[:, i] + radius[:, j] + GAP
    centre = torch.empty(*radius.shape, 2)
    rows = torch.arange(len(radius))
    while len(rows):
        reach = radius[rows, None, :, None] + MARGIN
        draws = torch.rand(len(rows), _TRIES, MAX_OBJECTS, 2, generator=generator)
        if board:
            draws = ((draws * BASE_SIZE / FIELD).floor() + 0.5) * FIELD
        else:
            draws = reach + draws * (BASE_SIZE - 2 * reach)
        apart = (draws[:, :, i] - draws[:, :, j]).abs().amax(-1) >= least[rows, None]
        valid = (apart | ~pairs[rows, None]).all(-1)
        direction = directions[rows, None]
        away = draws[:, :, 0] - draws[:, :, 1]
        along, across = (away * direction).sum(-1), (away * direction.flip(-1)).sum(-1).abs()
        valid &= across <= SLOPE * along  # without a relation both are 0
        found = valid.any(-1)
        chosen = valid.int().argmax(-1)
        centre[rows[found]] = draws[found, chosen[found]]
        rows = rows[~found]
    return centre


def render(
    captions: Sequence[str], generator: torch.Generator | None = None, size: int = BASE_SIZE, *, board: bool = False
) -> Tensor:
    """Draw each caption with random radii and places, every object wholly inside the picture and apart from the rest.

    One object is drawn as large as `denoise_env.shapes.render` draws it, several are smaller.

    Args:
        captions: B captions of the grammar.
        generator: the CPU source of randomness.
        size: side of the pictures in pixels, at least 16.
        board: whether several objects have no random radii and places, but are 6 pixels in radius, each in the middle
            of a quarter of the picture. One object stays as it is.

    Returns:
        ``[B, 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: if a caption is not of the grammar or the size is below 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, not {size}: smaller ones cannot show several shapes.")
    index = encode(captions)
    background, relation, things = index[:, 0], index[:, 1], index[:, 2:].unflatten(1, (MAX_OBJECTS, 2))
    exists = things[..., 0] >= 0
    low, high = torch.tensor([RADII[n] for n in exists.sum(1).tolist()]).reshape(-1, 2, 1).unbind(1)
    radius = low + (high - low) * torch.rand(len(index), MAX_OBJECTS, generator=generator)
    centre = place(exists, relation, radius, generator)
    if board:
        several = exists.sum(1) > 1
        radius[several] = RADII[2][1]
        centre[several] = place(exists[several], relation[several], radius[several], generator, board=True)
    scale = size / BASE_SIZE
    row = exists.nonzero()[:, 0]
    colour, shape = things[exists].unbind(-1)
    alpha = coverage(shape, centre[exists] * scale, radius[exists] * scale, size)[:, None]
    empty = torch.tensor(list(BACKGROUNDS.values()))[background, :, None, None]
    contrast = torch.tensor(list(COLOURS.values()))[colour, :, None, None] - empty[row]
    return empty.repeat(1, 1, size, size).index_add_(0, row, alpha * contrast)
