import itertools
import math
from collections import Counter

import pytest

from denoise_env.prompt_files import load_prompts
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.motion.grammar import ALL, HELD_OUT, MOTIONS, SCENES, SPEEDS, TRAIN, Motion, caption, parse

ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS, "motion": MOTIONS, "speed": SPEEDS}


def parts(text, *names):
    return tuple(getattr(parse(text), name) for name in names)


def test_captions_round_trip():
    assert caption(Motion("red", "circle", "gray", "moving left", "")) == "a red circle moving left on gray"
    assert parse(" A red Circle growing fast  on gray") == Motion("red", "circle", "gray", "growing", "fast")
    assert tuple(parse(text) for text in ALL) == SCENES
    assert tuple(caption(scene) for scene in SCENES) == ALL
    assert len(set(ALL)) == 1440


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on gray",
        "a pink circle moving left on gray",
        "a red circle moving on gray",
        "a red circle moving left slowly on gray",
        "a red circle fast on gray",
        "a red circle movingleft on gray",
    ],
)
def test_other_text_is_refused_with_the_allowed_words(text):
    with pytest.raises(ValueError, match="not a caption") as error:
        parse(text)
    assert all(word in str(error.value) for word in (*COLOURS, *SHAPES, *BACKGROUNDS, *MOTIONS, "fast"))


def test_indices_locate_the_words():
    for text in ALL[::7]:
        scene = parse(text)
        for (name, words), place in zip(ATTRIBUTES.items(), scene.indices, strict=True):
            assert list(words)[place] == getattr(scene, name)


def test_what_is_held_out_occurs_in_training_on_no_background():
    unseen = {parts(text, "colour", "shape", "motion", "speed") for text in HELD_OUT}
    seen = {parts(text, "colour", "shape", "motion", "speed") for text in TRAIN}
    assert len(set(HELD_OUT)) == len(unseen) == 120
    assert len(set(TRAIN)) == 3 * len(seen) == 1080
    assert not seen & unseen


@pytest.mark.parametrize(
    ("names", "times"), [(["colour", "shape"], 5), (["motion", "speed"], 6), (["background"], 40), (["colour"], 20)]
)
def test_held_out_is_balanced(names, times):
    counts = Counter(parts(text, *names) for text in HELD_OUT)
    assert set(counts.values()) == {times}
    assert len(counts) == math.prod(len(ATTRIBUTES[name]) for name in names)


@pytest.mark.parametrize("pair", list(itertools.combinations(ATTRIBUTES, 2)))
def test_every_pair_is_seen_in_training(pair):
    seen = {parts(text, *pair) for text in TRAIN}
    assert len(seen) == math.prod(len(ATTRIBUTES[name]) for name in pair)


@pytest.mark.parametrize("captions", [TRAIN, HELD_OUT], ids=["train", "held out"])
def test_the_first_few_differ(captions):
    assert len({parts(text, "motion") for text in captions[:6]}) >= 4
    assert len({parts(text, "colour", "shape") for text in captions[:6]}) >= 5


@pytest.mark.parametrize(("name", "captions"), [("TRAIN", TRAIN), ("HELD_OUT", HELD_OUT)])
def test_sets_load_by_target(name, captions):
    target = f"denoise_env.shapes.motion.grammar:{name}"
    assert [prompt.text for prompt in load_prompts("these", {"these": target})] == list(captions)
