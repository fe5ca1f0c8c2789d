"""Captions of one object, of two to four of a kind, and of two objects and their relation: 6,912 in all."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from denoise_env.shapes import grammar
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES

RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first object lies, seen from the second: x to the right, y down."""
COUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
MAX_OBJECTS = 4
PLURALS: dict[str, str] = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}

_NUMERALS = {number: word for word, number in COUNTS.items()}
_SINGULARS = {plural: shape for shape, plural in PLURALS.items()}


def _any(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


_ONE = f"a {_any(COLOURS)} {_any(SHAPES)}"
_SINGLE = re.compile(f"{_ONE} on {_any(BACKGROUNDS)}")
_COUNTED = re.compile(f"{_any(COUNTS)} {_any(COLOURS)} {_any(_SINGULARS)} on {_any(BACKGROUNDS)}")
_RELATED = re.compile(f"{_ONE} {_any(RELATIONS)} {_ONE} on {_any(BACKGROUNDS)}")


@dataclass(frozen=True)
class Thing:
    """One object; the fields are words of the grammar."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Composition:
    """Objects on a plain background: one to four equal ones, or two different ones in a relation.

    Attributes:
        things: the objects.
        background: a word of `BACKGROUNDS`.
        relation: of the first to the second, a word of `RELATIONS`; ``None`` for equal objects.

    Raises:
        ValueError: neither of the two.
    """

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None

    def __post_init__(self) -> None:
        different = len(set(self.things))
        if self.relation is None and not (different == 1 and len(self.things) <= MAX_OBJECTS):
            raise ValueError(f"objects without a relation must be one to {MAX_OBJECTS} equal ones, not {self.things}.")
        if self.relation is not None and not len(self.things) == different == 2:
            raise ValueError(f"a relation needs two different objects, not {self.things}; equal ones are counted.")

    @property
    def kind(self) -> str:
        """ "one", "count" or "relation"."""
        return "relation" if self.relation else "one" if len(self.things) == 1 else "count"

    @property
    def indices(self) -> tuple[int, ...]:
        """Places of the words in their lists, ten numbers: background, relation, and `MAX_OBJECTS` times colour and
        shape; −1 for a relation or an object that there is not."""
        places = [place for thing in self.things for place in (_COLOUR[thing.colour], _SHAPE[thing.shape])]
        relation = _RELATION[self.relation] if self.relation else -1
        return _BACKGROUND[self.background], relation, *places, *[-1] * (2 * MAX_OBJECTS - len(places))


_COLOUR, _SHAPE, _BACKGROUND, _RELATION = (
    {word: i for i, word in enumerate(words)} for words in (COLOURS, SHAPES, BACKGROUNDS, RELATIONS)
)


def caption(scene: Composition) -> str:
    """Say a scene in words: ``"three green crosses on black"``."""
    first = scene.things[0]
    if scene.relation:
        second = scene.things[1]
        objects = f"a {first.colour} {first.shape} {scene.relation} a {second.colour} {second.shape}"
    elif len(scene.things) == 1:
        objects = f"a {first.colour} {first.shape}"
    else:
        objects = f"{_NUMERALS[len(scene.things)]} {first.colour} {PLURALS[first.shape]}"
    return f"{objects} on {scene.background}"


def parse(text: str) -> Composition:
    """Read a caption back; case and surrounding blanks do not matter.

    Raises:
        ValueError: if the text is not a caption of this grammar, or relates two equal objects.

    >>> parse("two red circles on gray").things
    (Thing(colour='red', shape='circle'), Thing(colour='red', shape='circle'))
    >>> parse("a red circle left of a blue square on gray").relation
    'left of'
    """
    words = " ".join(text.lower().split())
    if match := _SINGLE.fullmatch(words):
        colour, shape, background = match.groups()
        return Composition((Thing(colour, shape),), background)
    if match := _COUNTED.fullmatch(words):
        count, colour, plural, background = match.groups()
        return Composition((Thing(colour, _SINGULARS[plural]),) * COUNTS[count], background)
    if match := _RELATED.fullmatch(words):
        colour, shape, relation, other_colour, other_shape, background = match.groups()
        return Composition((Thing(colour, shape), Thing(other_colour, other_shape)), background, relation)
    raise ValueError(
        f"{text!r} is not a caption of compositions. Write 'a <colour> <shape> on <background>', "
        f"'<count> <colour> <shapes> on <background>' or 'a <colour> <shape> <relation> a <colour> <shape> on "
        f"<background>' with a colour of {', '.join(COLOURS)}; a shape of {', '.join(SHAPES)}, of several "
        f"{', '.join(_SINGULARS)}; a count of {', '.join(COUNTS)}; a relation of {', '.join(RELATIONS)}; "
        f"a background of {', '.join(BACKGROUNDS)}."
    )


THINGS: tuple[Thing, ...] = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
_STEP = 5
"""Objects this far apart in `THINGS`, which differ in colour and shape, are held out as a pair: 24 pairs of 276."""


def _held_out_counts() -> set[tuple[int, Thing]]:
    """Twelve of the 72 counts of an object: each count four times, each colour twice, each shape three times."""
    colours, counts = tuple(COLOURS), tuple(COUNTS.values())
    return {(counts[(i + i // 6) % 3], Thing(colours[i % 6], SHAPES[i % 4])) for i in range(12)}


_HELD_OUT_COUNTS = _held_out_counts()
_COUNTS_ALL = [(n, thing) for n in COUNTS.values() for thing in THINGS]
_SHIFTS = [shift for shift in range(1, len(THINGS)) if shift not in (_STEP, len(THINGS) - _STEP)]


def _counted(kinds: list[tuple[int, Thing]]) -> tuple[str, ...]:
    return tuple(caption(Composition((thing,) * n, background)) for n, thing in kinds for background in BACKGROUNDS)


def _related(first: int, shift: int, relation: int, background: int) -> str:
    """An object of `THINGS` and the one ``shift`` places on; relation and background count round their lists."""
    things = THINGS[first], THINGS[(first + shift) % len(THINGS)]
    return caption(Composition(things, tuple(BACKGROUNDS)[background % 3], tuple(RELATIONS)[relation % 4]))


def _all_related(shifts: list[int]) -> tuple[str, ...]:
    return tuple(_related(*place) for place in product(range(len(THINGS)), shifts, range(4), range(3)))


_TRAIN_COUNTS = _counted([kind for kind in _COUNTS_ALL if kind not in _HELD_OUT_COUNTS])

ALL: tuple[str, ...] = (*grammar.ALL, *_counted(_COUNTS_ALL), *_all_related(list(range(1, len(THINGS)))))
"""All captions: 72 of one object, 216 counts, 6,624 relations. They hold every word, for a tokenizer to learn from."""
_HELD_OUT = (
    *_counted([kind for kind in _COUNTS_ALL if kind in _HELD_OUT_COUNTS]),
    *(_related(first, _STEP, relation, first + relation) for first in range(len(THINGS)) for relation in range(4)),
)
HELD_OUT: tuple[str, ...] = tuple(_HELD_OUT[25 * i % len(_HELD_OUT)] for i in range(len(_HELD_OUT)))
"""132 captions that neither pretraining nor reinforcement learning may use: 12 counts of an object on every
background, and 24 pairs of objects in every relation. A held-out pair occurs in no other caption of `PRETRAIN`, in
whatever order, and a held-out count of an object on no background; every object, relation and count does. The order
mixes the kinds, so that the first few show both."""
PRETRAIN: tuple[str, ...] = (*grammar.TRAIN, *_TRAIN_COUNTS, *_all_related(_SHIFTS))
"""The 6,288 captions that pretraining may draw from: all that show nothing held out, 60 of one object, 180 counts and
6,048 relations."""
TRAIN: tuple[str, ...] = (
    *_TRAIN_COUNTS,
    *(
        _related(first, shift, first + 3 * j // 2, first + 2 * j)
        for first in range(24)
        for j, shift in enumerate(_SHIFTS)
    ),
)
"""684 captions of `PRETRAIN` with several objects, for reinforcement learning: all its counts, and each ordered pair
of objects once, the relations and backgrounds equally often."""
