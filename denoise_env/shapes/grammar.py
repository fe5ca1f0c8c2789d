"""Captions of the embedded world: a colour, a shape and a background, 72 scenes in all."""

import re
from dataclasses import dataclass

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.90, 0.10, 0.90),
    "cyan": (0.10, 0.85, 0.90),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
BACKGROUNDS: dict[str, RGB] = {"gray": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0)}

_CAPTION = re.compile(r"a (\w+) (\w+) on (\w+)")


@dataclass(frozen=True)
class Scene:
    """One object on a plain background; the fields are words of the grammar."""

    colour: str
    shape: str
    background: str

    @property
    def indices(self) -> tuple[int, int, int]:
        """Places of the three words in `COLOURS`, `SHAPES` and `BACKGROUNDS`."""
        return _COLOUR_INDEX[self.colour], _SHAPE_INDEX[self.shape], _BACKGROUND_INDEX[self.background]


_COLOUR_INDEX = {word: i for i, word in enumerate(COLOURS)}
_SHAPE_INDEX = {word: i for i, word in enumerate(SHAPES)}
_BACKGROUND_INDEX = {word: i for i, word in enumerate(BACKGROUNDS)}


def caption(scene: Scene) -> str:
    """Say a scene in words: ``"a red circle on gray"``."""
    return f"a {scene.colour} {scene.shape} on {scene.background}"


def parse(text: str) -> Scene:
    """Read a caption back; case and surrounding blanks do not matter.

    Raises:
        ValueError: if the text is not a caption of this grammar.

    >>> parse("a red circle on gray")
    Scene(colour='red', shape='circle', background='gray')
    """
    match = _CAPTION.fullmatch(" ".join(text.lower().split()))
    if match:
        colour, shape, background = match.groups()
        if colour in COLOURS and shape in SHAPES and background in BACKGROUNDS:
            return Scene(colour, shape, background)
    raise ValueError(
        f"{text!r} is not a caption of the shapes world. Write 'a <colour> <shape> on <background>' with "
        f"a colour of {', '.join(COLOURS)}; a shape of {', '.join(SHAPES)}; "
        f"a background of {', '.join(BACKGROUNDS)}."
    )


def _held_out() -> set[Scene]:
    """Twelve scenes: each colour twice, each shape three times, each background four times."""
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    return {Scene(colours[i % 6], SHAPES[i % 4], backgrounds[(i + i // 6) % 3]) for i in range(12)}


SCENES: tuple[Scene, ...] = tuple(Scene(c, s, b) for c in COLOURS for s in SHAPES for b in BACKGROUNDS)
_HELD_OUT = _held_out()

ALL: tuple[str, ...] = tuple(caption(scene) for scene in SCENES)
"""All 72 captions; the place of a caption is ``(colour * 4 + shape) * 3 + background``."""
HELD_OUT: tuple[str, ...] = tuple(caption(scene) for scene in SCENES if scene in _HELD_OUT)
"""The 12 captions that neither pretraining nor reinforcement learning may use."""
TRAIN: tuple[str, ...] = tuple(caption(scene) for scene in SCENES if scene not in _HELD_OUT)
"""The other 60; every pair of attributes occurs in them."""
