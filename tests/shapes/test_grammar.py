import itertools
import math
from collections import Counter

import pytest

from denoise_env.shapes.grammar import (
    ALL,
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SCENES,
    SHAPES,
    TRAIN,
    Scene,
    caption,
    parse,
)


def test_the_split_is_a_partition():
    assert len(ALL) == len(set(ALL)) == 72
    assert len(HELD_OUT) == 12
    assert set(TRAIN) | set(HELD_OUT) == set(ALL)
    assert not set(TRAIN) & set(HELD_OUT)


@pytest.mark.parametrize(("attribute", "times"), [("colour", 2), ("shape", 3), ("background", 4)])
def test_held_out_is_balanced(attribute, times):
    counts = Counter(getattr(parse(text), attribute) for text in HELD_OUT)
    assert set(counts.values()) == {times}
    assert sum(counts.values()) == 12


@pytest.mark.parametrize(
    ("pair", "number"),
    [(("colour", "shape"), 24), (("colour", "background"), 18), (("shape", "background"), 12)],
)
def test_every_pair_is_seen_in_training(pair, number):
    seen = {tuple(getattr(parse(text), name) for name in pair) for text in TRAIN}
    assert len(seen) == number


def test_captions_round_trip():
    assert caption(Scene("red", "circle", "gray")) == "a red circle on gray"
    assert tuple(parse(text) for text in ALL) == SCENES
    assert tuple(caption(scene) for scene in SCENES) == ALL
    assert parse("  A Red circle  on gray ") == Scene("red", "circle", "gray")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a pink circle on gray",
        "a red star on gray",
        "a red circle on red",
        "red circle on gray",
    ],
)
def test_other_text_is_refused_with_the_allowed_words(text):
    with pytest.raises(ValueError, match="not a caption") as error:
        parse(text)
    assert all(word in str(error.value) for word in (*COLOURS, *SHAPES, *BACKGROUNDS))


def test_indices_locate_the_caption():
    for i, scene in enumerate(SCENES):
        colour, shape, background = scene.indices
        assert (colour * 4 + shape) * 3 + background == i


def test_colours_are_well_apart():
    values = [*COLOURS.values(), *BACKGROUNDS.values()]
    assert min(math.dist(a, b) for a, b in itertools.combinations(values, 2)) > 0.5
