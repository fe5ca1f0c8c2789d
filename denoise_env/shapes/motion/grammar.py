"""Captions of one object and its motion, as "a red circle moving left fast on gray": 1,440 in all."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""x to the right, y down."""
MOTIONS: dict[str, tuple[int, int, int]] = {
    **{f"{verb} {word}": (*way, 0) for verb in ("moving", "bouncing") for word, way in DIRECTIONS.items()},
    "growing": (0, 0, 1),
    "shrinking": (0, 0, -1),
}
"""Which way x, y and the width of the object change. One that bounces turns back halfway, at the picture's edge."""
SPEEDS: dict[str, float] = {"": 1.0, "fast": 2.0}
"""Pixels of a 32-pixel picture, from one frame to the next, by which the object moves or its width changes."""


def _any(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_CAPTION = re.compile(f"a {_any(COLOURS)} {_any(SHAPES)} {_any(MOTIONS)}( fast)? on {_any(BACKGROUNDS)}")


@dataclass(frozen=True)
class Motion:
    """One object in motion on a plain background; the fields are words of the grammar, the speed may be empty."""

    colour: str
    shape: str
    background: str
    motion: str
    speed: str

    @property
    def indices(self) -> tuple[int, int, int, int, int]:
        """Places of the five words in `COLOURS`, `SHAPES`, `BACKGROUNDS`, `MOTIONS` and `SPEEDS`."""
        words = (self.colour, self.shape, self.background, self.motion, self.speed)
        colour, shape, background, motion, speed = (place[word] for place, word in zip(_PLACES, words, strict=True))
        return colour, shape, background, motion, speed


_PLACES = [{word: i for i, word in enumerate(words)} for words in (COLOURS, SHAPES, BACKGROUNDS, MOTIONS, SPEEDS)]


def caption(scene: Motion) -> str:
    """Say a scene in words: ``"a blue square bouncing up on black"``."""
    how = f"{scene.motion} {scene.speed}".strip()
    return f"a {scene.colour} {scene.shape} {how} on {scene.background}"


def parse(text: str) -> Motion:
    """Read a caption back; case and surrounding blanks do not matter.

    Raises:
        ValueError: if the text is not a caption of this grammar.

    >>> parse("a red circle moving left fast on gray")
    Motion(colour='red', shape='circle', background='gray', motion='moving left', speed='fast')
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if not match:
        raise ValueError(
            f"{text!r} is not a caption of moving shapes. Write 'a <colour> <shape> <motion> on <background>' or "
            f"'a <colour> <shape> <motion> fast on <background>' with a colour of {', '.join(COLOURS)}; a shape of "
            f"{', '.join(SHAPES)}; a motion of {', '.join(MOTIONS)}; a background of {', '.join(BACKGROUNDS)}."
        )
    colour, shape, motion, fast, background = match.groups()
    return Motion(colour, shape, background, motion, (fast or "").strip())


_EVERY = 4
"""One in so many of an object's motions and speeds is held out."""
SCENES: tuple[Motion, ...] = tuple(
    Motion(colour, shape, background, motion, speed)
    for colour in COLOURS
    for shape in SHAPES
    for motion in MOTIONS
    for speed in SPEEDS
    for background in BACKGROUNDS
)


def _unseen(scene: Motion) -> bool:
    colour, shape, _, motion, speed = scene.indices
    return (colour + shape + len(SPEEDS) * motion + speed) % _EVERY == 0


def _mixed(captions: list[str]) -> tuple[str, ...]:
    """In an order whose first few differ in every word; the step is coprime to the numbers of captions."""
    return tuple(captions[i * 457 % len(captions)] for i in range(len(captions)))


_UNSEEN = [caption(scene) for scene in SCENES if _unseen(scene)]

ALL: tuple[str, ...] = tuple(caption(scene) for scene in SCENES)
"""All captions: 24 objects, 10 motions at 2 speeds, 3 backgrounds."""
HELD_OUT: tuple[str, ...] = _mixed([_UNSEEN[3 * i + i % 3] for i in range(len(_UNSEEN) // 3)])
"""120 captions that neither pretraining nor reinforcement learning may use: each of the 24 objects in five motions it
is never seen in, and each motion at each speed with six objects, on one background each."""
TRAIN: tuple[str, ...] = _mixed([caption(scene) for scene in SCENES if not _unseen(scene)])
"""The 1,080 captions of what is not held out on any background; every pair of attributes occurs in them."""
