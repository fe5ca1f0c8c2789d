import itertools
from collections import Counter

import pytest

from denoise_env.prompt_files import load_prompts
from denoise_env.shapes import grammar
from denoise_env.shapes.compositions.grammar import (
    ALL,
    COUNTS,
    HELD_OUT,
    PRETRAIN,
    RELATIONS,
    THINGS,
    TRAIN,
    Composition,
    Thing,
    caption,
    parse,
)
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.tokenizer import MAX_LENGTH, build_tokenizer

RED, BLUE = Thing("red", "circle"), Thing("blue", "square")


def kinds(captions):
    return Counter(parse(text).kind for text in captions)


def scenes(captions, kind):
    return [scene for scene in map(parse, captions) if scene.kind == kind]


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("a red circle on gray", Composition((RED,), "gray")),
        ("three red circles on black", Composition((RED,) * 3, "black")),
        ("a red circle left of a blue square on white", Composition((RED, BLUE), "white", "left of")),
    ],
)
def test_captions_say_scenes(text, scene):
    assert parse(text) == scene
    assert caption(scene) == text
    assert parse(f"  {text.upper().replace(' ', '  ')} ") == scene


def test_captions_round_trip():
    assert kinds(ALL) == {"one": 72, "count": 216, "relation": 24 * 23 * 4 * 3}
    assert len(set(ALL)) == len({parse(text) for text in ALL}) == len(ALL)
    assert all(caption(parse(text)) == text for text in ALL)


def test_one_object_captions_are_the_old_ones():
    assert [text for text in ALL if parse(text).kind == "one"] == list(grammar.ALL)


def test_indices_locate_the_words():
    assert parse("a red circle on gray").indices == (0, -1, 0, 0, *[-1] * 6)
    assert parse("two cyan crosses on black").indices == (1, -1, 5, 3, 5, 3, *[-1] * 4)
    assert parse("a red circle below a blue square on white").indices == (2, 3, 0, 0, 2, 1, *[-1] * 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "two red circle on gray",
        "a red circles on gray",
        "five red circles on gray",
        "two pink circles on gray",
        "a red circle left of a blue square",
        "a red circle near a blue square on gray",
        "two red circles left of a blue square on gray",
        "a red circle left of a blue star on gray",
    ],
)
def test_other_text_is_refused_with_the_allowed_words(text):
    with pytest.raises(ValueError, match="not a caption") as error:
        parse(text)
    assert all(word in str(error.value) for word in (*COLOURS, *SHAPES, *BACKGROUNDS, *RELATIONS, *COUNTS, "crosses"))


@pytest.mark.parametrize(
    ("things", "relation", "message"),
    [
        ((), None, "one to 4 equal"),
        ((RED, BLUE), None, "one to 4 equal"),
        ((RED,) * 5, None, "one to 4 equal"),
        ((RED, RED), "left of", "equal ones are counted"),
        ((RED, BLUE, RED), "above", "two different"),
    ],
)
def test_other_scenes_are_refused(things, relation, message):
    with pytest.raises(ValueError, match=message):
        Composition(things, "gray", relation)


def test_equal_objects_in_a_relation_are_refused():
    with pytest.raises(ValueError, match="equal ones are counted"):
        parse("a red circle left of a red circle on gray")


# --- Sets ---


def test_sizes_of_the_sets():
    assert kinds(HELD_OUT) == {"count": 36, "relation": 96}
    assert kinds(TRAIN) == {"count": 180, "relation": 504}
    assert kinds(PRETRAIN) == {"one": 60, "count": 180, "relation": 6048}
    assert all(len(set(captions)) == len(captions) for captions in (HELD_OUT, TRAIN, PRETRAIN))


def test_the_sets_are_apart():
    assert set(TRAIN) < set(PRETRAIN) < set(ALL)
    assert not set(PRETRAIN) & (set(HELD_OUT) | set(grammar.HELD_OUT))


def test_what_is_held_out_occurs_nowhere_else():
    def pairs(captions):
        return {frozenset(scene.things) for scene in scenes(captions, "relation")}

    def counts(captions):
        return {scene.things for scene in scenes(captions, "count")}

    assert len(pairs(HELD_OUT)) == 24
    assert not pairs(HELD_OUT) & pairs(PRETRAIN)
    assert all(a.colour != b.colour and a.shape != b.shape for a, b in pairs(HELD_OUT))
    assert len(counts(HELD_OUT)) == 12
    assert not counts(HELD_OUT) & counts(PRETRAIN)
    assert len(pairs(PRETRAIN)) + 24 == 276
    assert len(counts(PRETRAIN)) + 12 == 72


@pytest.mark.parametrize(("captions", "kind"), list(itertools.product([HELD_OUT, TRAIN], ["count", "relation"])))
def test_the_sets_are_balanced(captions, kind):
    shown = scenes(captions, kind)
    attributes = [
        [scene.background for scene in shown],
        [scene.relation or len(scene.things) for scene in shown],
        *([scene.things[i].colour for scene in shown] for i in (0, 1)),
        *([scene.things[i].shape for scene in shown] for i in (0, 1)),
    ]
    for values, number in zip(attributes, (3, 4 if kind == "relation" else 3, 6, 6, 4, 4), strict=True):
        counts = Counter(values)
        assert len(counts) == number
        assert len(set(counts.values())) == 1


def test_every_part_is_seen_in_training():
    related, counted = scenes(TRAIN, "relation"), scenes(TRAIN, "count")
    for i in (0, 1):
        assert {(scene.things[i], scene.relation) for scene in related} == set(itertools.product(THINGS, RELATIONS))
        assert {(scene.things[i], scene.background) for scene in related} == set(itertools.product(THINGS, BACKGROUNDS))
    assert {(scene.relation, scene.background) for scene in related} == set(itertools.product(RELATIONS, BACKGROUNDS))
    assert {scene.things[0] for scene in counted} == set(THINGS)
    for attribute, words in (("colour", COLOURS), ("shape", SHAPES)):
        seen = {(len(scene.things), getattr(scene.things[0], attribute)) for scene in counted}
        assert seen == set(itertools.product(COUNTS.values(), words))
    assert {(len(s.things), s.background) for s in counted} == set(itertools.product(COUNTS.values(), BACKGROUNDS))


@pytest.mark.parametrize(("name", "captions"), [("TRAIN", TRAIN), ("HELD_OUT", HELD_OUT)])
def test_sets_load_by_target(name, captions):
    target = f"denoise_env.shapes.compositions.grammar:{name}"
    assert [prompt.text for prompt in load_prompts("these", {"these": target})] == list(captions)


def test_every_word_is_one_token():
    tokenizer = build_tokenizer(ALL)
    longest = max(len(tokenizer(text).input_ids) for text in ALL)
    assert longest == 2 + 10 <= MAX_LENGTH
    assert all(len(tokenizer(text).input_ids) == 2 + len(text.split()) for text in ALL[::37])
