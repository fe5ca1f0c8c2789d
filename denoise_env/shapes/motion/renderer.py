"""Anti-aliased clips of moving shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS
from denoise_env.shapes.motion.grammar import MOTIONS, SPEEDS, parse
from denoise_env.shapes.renderer import BASE_SIZE, MARGIN, coverage

FRAMES = 9
"""Frames of a clip: 1 more than a multiple of 4, as the video models' autoencoders make them."""
RADII = (4.5, 6.5)
"""Smallest and largest radius of a moving object, and ..."""
GROWN = (4.0, 13.0)
"""... of one that grows or shrinks, in pixels of a 32-pixel picture."""
TURNS = (3.0, 5.0)
"""Earliest and latest time, in frames, at which an object that bounces turns back."""
BOUNCES = tuple(motion.startswith("bouncing") for motion in MOTIONS)
"""Which of `MOTIONS` turn back."""


def encode(captions: Sequence[str]) -> Tensor:
    """`Motion.indices` of captions: ``[B, 5]`` int64.

    Raises:
        ValueError: if a caption is not of the grammar.
    """
    return torch.tensor([parse(text).indices for text in captions], dtype=torch.long).reshape(-1, 5)


def paths(motion: Tensor, speed: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw paths uniformly from those on which the object stays inside the picture.

    Args:
        motion: ``[B]`` places in `MOTIONS`.
        speed: ``[B]`` places in `SPEEDS`.
        generator: the CPU source of randomness.

    Returns:
        ``[B, FRAMES, 3]`` x, y and width, twice the radius, in pixels of a 32-pixel picture.
    """
    draws = torch.rand(len(motion), 4, generator=generator)
    way = torch.tensor(list(MOTIONS.values())).float()[motion]
    rate = torch.tensor(list(SPEEDS.values()))[speed]
    bounces = torch.tensor(BOUNCES)[motion]
    turn = TURNS[0] + (TURNS[1] - TURNS[0]) * draws[:, 0]
    time = torch.arange(FRAMES).expand(len(motion), -1)
    run = torch.where(bounces[:, None], turn[:, None] - (time - turn[:, None]).abs(), time)
    moved = (rate[:, None] * run)[..., None] * way[:, None]  # [B, F, 3] from the start
    low, high = moved.amin(1), moved.amax(1)
    grows = (way[:, 2] != 0)[:, None]
    least, most = torch.where(grows, torch.tensor(GROWN), torch.tensor(RADII)).mul(2).unbind(-1)
    width = least - low[:, 2] + draws[:, 1] * (most - least - high[:, 2] + low[:, 2])
    reach = ((width + high[:, 2]) / 2 + MARGIN)[:, None]
    room = BASE_SIZE - 2 * reach - (high - low)[:, :2]
    share = draws[:, 2:]
    # The far end of a bounce touches the edge.
    share = torch.where(bounces[:, None] & (way[:, :2] != 0), (way[:, :2] > 0).float(), share)
    start = torch.cat([reach - low[:, :2] + share * room, width[:, None]], 1)
    return start[:, None] + moved


def draw(path: Tensor, colour: Tensor, shape: Tensor, background: Tensor, size: int = BASE_SIZE) -> Tensor:
    """Draw objects on their paths.

    Args:
        path: ``[B, F, 3]`` as `paths` returns them.
        colour: ``[B]`` places in `COLOURS`.
        shape: ``[B]`` places in `SHAPES`.
        background: ``[B]`` places in `BACKGROUNDS`.
        size: side of the frames in pixels.

    Returns:
        ``[B, F, 3, size, size]`` float32 in [0, 1].
    """
    scaled = path.flatten(0, 1) * (size / BASE_SIZE)
    alpha = coverage(shape.repeat_interleave(path.shape[1]), scaled[:, :2], scaled[:, 2] / 2, size)
    alpha = alpha.view(*path.shape[:2], 1, size, size)
    paint = torch.tensor(list(COLOURS.values()))[colour, None, :, None, None]
    empty = torch.tensor(list(BACKGROUNDS.values()))[background, None, :, None, None]
    return alpha * paint + (1 - alpha) * empty


def render(
    captions: Sequence[str], generator: torch.Generator | None = None, size: int = BASE_SIZE, frames: int = FRAMES
) -> Tensor:
    """Draw each caption with a random place and radius, the object wholly inside every frame.

    Args:
        captions: B captions of the grammar.
        generator: the CPU source of randomness.
        size: side of the frames in pixels, at least 16.
        frames: how many of the clip's frames are drawn, from the first; what they show is the same for any number.

    Returns:
        ``[B, frames, 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: if a caption is not of the grammar or the size is below 16.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels, not {size}: smaller ones cannot show motion.")
    colour, shape, background, motion, speed = encode(captions).unbind(-1)
    return draw(paths(motion, speed, generator)[:, :frames], colour, shape, background, size)
