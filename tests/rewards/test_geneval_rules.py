import json

import numpy as np
import pytest
import torch
from PIL import Image

from denoise_env.prompt_files import load_prompts
from denoise_env.rewards.geneval.rules import (
    CLASSES,
    Clause,
    Detection,
    Request,
    crop,
    grade,
    keep,
    read_request,
    relations,
    to_color,
)

LEFT, MIDDLE, RIGHT = (0, 0, 10, 10), (30, 0, 40, 10), (60, 0, 70, 10)


def dog(score=0.8, box=LEFT, color=None, label="dog"):
    return Detection(label, score, box, color=color)


def cat(score=0.8, box=MIDDLE, color=None):
    return dog(score, box, color, "cat")


def ask(tag, *include, exclude=()):
    def columns(label, count=1, color=None, position=None):
        optional = {"color": color, "position": position}
        return {"class": label, "count": count, **{key: value for key, value in optional.items() if value}}

    metadata = {"tag": tag, "include": [columns(*clause) for clause in include], "prompt": "a photo"}
    return metadata | ({"exclude": [columns(*clause) for clause in exclude]} if exclude else {})


ONE = ask("single_object", ("dog",))
BOTH = ask("two_object", ("dog",), ("cat",))
TWO = ask("counting", ("dog", 2), exclude=[("dog", 3)])
RED = ask("colors", ("dog", 1, "red"))
ATTR = ask("color_attr", ("dog", 1, "red"), ("cat", 1, "blue"))
POSITION = ask("position", ("cat",), ("dog", 1, None, ["left of", 0]))
RED_POSITION = ask("position", ("cat", 1, "blue"), ("dog", 1, "red", ["left of", 0]))
TWO_RED = ask("colors", ("dog", 2, "red"))
SURE = 0.95


@pytest.mark.parametrize(
    ("metadata", "detections", "correct", "strict", "score"),
    [
        # measured with the original code
        (ONE, [dog(), dog()], 1, 0, 0),
        (ONE, [dog(), dog(), dog()], 1, 0, -1),
        (TWO, [dog(SURE)], 0, 0, 0.5),
        (TWO, [dog(SURE)] * 3, 0, 0, 0.5),
        (RED, [dog(color="blue")], 0, 0, 0.5),
        (RED, [], 0, 0, 0),
        (ATTR, [dog(color="red"), cat(color="red")], 0, 0, 0.75),
        (POSITION, [cat(), dog(box=RIGHT)], 0, 0, 0.75),
        (POSITION, [dog()], 0, 0, 1 / 3),
        (POSITION, [cat(), dog(0.8), dog(0.7)], 1, 0, 1 / 3),
        # everything right
        (ONE, [dog(), cat()], 1, 1, 1),
        (BOTH, [dog(), cat()], 1, 1, 1),
        (TWO, [dog(SURE)] * 2, 1, 1, 1),
        (RED, [dog(color="red")], 1, 1, 1),
        (ATTR, [dog(color="red"), cat(color="blue")], 1, 1, 1),
        (POSITION, [cat(), dog()], 1, 1, 1),
        # something wrong
        (ONE, [cat()], 0, 0, 0),
        (BOTH, [dog()], 0, 0, 0.5),
        (BOTH, [dog(), cat(), cat()], 1, 0, 0.5),
        (TWO, [dog(SURE), dog(0.9)], 0, 0, 0.5),  # 0.9 is not above 0.9
        (ATTR, [dog(color="red"), dog(color="red"), cat(color="blue")], 1, 0, (0 + 0 + 1 + 1) / 4),
        (TWO_RED, [dog(color="red"), dog(color="pink")], 0, 0, (1 + 0.5) / 2),
        # "correct" looks at the most confident only
        (RED, [dog(0.5, color="red"), dog(0.6, color="blue")], 0, 0, 0),
        (RED, [dog(0.6, color="red"), dog(0.5, color="blue")], 1, 0, 0),
        (POSITION, [cat(), dog(0.6, RIGHT), dog(0.5, LEFT)], 0, 0, (1 + 0 + 0) / 3),
        (POSITION, [cat(0.6, LEFT), cat(0.5, RIGHT), dog(0.5, MIDDLE)], 0, 0, (0 + 1 + 0) / 3),
        # a wrong colour ends its clause, and the clauses that refer to it
        (RED_POSITION, [cat(color="blue"), dog(color="red")], 1, 1, 1),
        (RED_POSITION, [cat(color="blue"), dog(color="blue")], 0, 0, (1 + 1 + 1 + 0) / 4),
        (RED_POSITION, [cat(color="red"), dog(color="red")], 0, 0, (1 + 0 + 1 + 1 + 0) / 5),
        (RED_POSITION, [cat(color="blue"), dog(color="red", box=RIGHT)], 0, 0, (1 + 1 + 1 + 1 + 0 + 1) / 6),
    ],
)
def test_grades(metadata, detections, correct, strict, score):
    request = read_request(metadata)
    objects = keep(detections, request.tag)
    modes = {"correct": correct, "strict": strict, "score": score}
    assert {mode: grade(objects, request, mode) for mode in modes} == pytest.approx(modes)


def test_every_pair_must_be_in_the_relation():
    dogs, cats = [dog(box=LEFT), dog(box=(4, 0, 14, 10))], [cat(), cat(box=RIGHT)]
    two = read_request(ask("position", ("cat", 2), ("dog", 2, None, ["left of", 0])))
    assert grade(keep(dogs + cats, "position"), two, "correct") == 1
    assert grade(keep([dogs[0], dog(box=(45, 0, 55, 10)), *cats], "position"), two, "correct") == 0
    assert grade(keep([dogs[0], dog(box=(45, 0, 55, 10)), *cats], "position"), two, "score") == (1 + 1 + 0 + 1) / 4


def test_exclude_counts_another_class_too():
    request = read_request(ask("single_object", ("dog",), exclude=[("cat", 1)]))
    objects = keep([dog(), cat()], request.tag)
    assert [grade(objects, request, mode) for mode in ("correct", "strict", "score")] == [0, 1, 1]


def test_what_is_kept():
    found = [dog(score) for score in np.linspace(0.31, 0.99, 20)] + [cat(0.3), cat(0.31), dog(0.1)]
    kept = keep(found, "colors")
    assert [one.score for one in kept["dog"]] == sorted((one.score for one in found[:20]), reverse=True)[:16]
    assert [one.score for one in kept["cat"]] == [0.31]
    counted = keep(found, "counting")
    assert {label: min(one.score for one in kept) for label, kept in counted.items()} == {
        "dog": pytest.approx(np.linspace(0.31, 0.99, 20)[18 - 1])
    }
    assert keep([], "counting") == {}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (30, 0, 40, 10), {"left of"}),
        ((30, 0, 40, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (12, 30, 22, 40), {"above"}),
        ((12, 30, 22, 40), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (30, 30, 40, 40), {"left of", "above"}),
        ((1, 0, 11, 10), (0, 0, 10, 10), set()),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        # offsets of 4 and 5 with extents of 20: 4 - 2 = 2 of 4, which is not above 0.5, and 5 - 2 = 3 of 5
        ((4, 0, 14, 10), (0, 0, 10, 10), set()),
        ((5, 0, 15, 10), (0, 0, 10, 10), {"right of"}),
        # extents of 10 + 30: 8 - 4 = 4 of 8; with height 2 + 2 the same offset is 8 - 0.4
        ((18, 0, 28, 10), (0, 0, 30, 10), set()),
        ((0, 8, 10, 10), (0, 0, 30, 2), {"below"}),
    ],
)
def test_relations(a, b, expected):
    assert relations(a, b) == expected


def test_whose_colour_is_named():
    request = read_request(ATTR)
    red, other, blue, third = dog(0.9), dog(0.8), cat(0.9), cat(0.5)
    objects = keep([red, other, blue, dog(0.95, label="cow")], "color_attr")
    assert to_color(objects, request, "correct") == [red, blue]
    assert to_color(objects, request, "score") == to_color(objects, request, "strict") == [blue]
    assert to_color(keep([blue, third], "color_attr"), request, "correct") == [blue]
    assert to_color(objects, read_request(BOTH), "correct") == []
    assert to_color(keep([red], "colors"), read_request(TWO_RED), "correct") == []


def test_crop():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[4:10, 5:18] = True
    mask[6:8, 9:12] = False
    box = (5, 4, 18, 10)
    whole = Image.fromarray(image)
    shown = Image.composite(whole, Image.new("RGB", whole.size, "#999"), Image.fromarray(mask)).crop(box)
    found = crop(torch.from_numpy(image), Detection("dog", 1, box, torch.from_numpy(mask)))
    np.testing.assert_array_equal(found, np.asarray(shown))
    bare = crop(torch.from_numpy(image), Detection("dog", 1, (4.6, 4.4, 18.4, 9.6)))
    np.testing.assert_array_equal(bare, np.asarray(whole.crop((4.6, 4.4, 18.4, 9.6))))


# --- Metadata ---


def test_a_prompt_file_of_geneval_is_a_prompt_file(tmp_path):
    lines = [
        {"tag": "counting", "include": [{"class": "tv remote", "count": 2}],
         "exclude": [{"class": "tv remote", "count": 3}], "prompt": "a photo of two tv remotes"},
        {"tag": "position", "include": [{"class": "dog", "count": 1},
                                        {"class": "cat", "count": 1, "position": ["left of", 0]}],
         "prompt": "a photo of a cat left of a dog"},
        {"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"},
                                          {"class": "computer mouse", "count": 1, "color": "white"}], "prompt": "x"},
    ]  # fmt: skip
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = load_prompts(str(file))
    assert [prompt.text for prompt in prompts] == [line["prompt"] for line in lines]
    assert [read_request(prompt.metadata) for prompt in prompts] == [
        Request("counting", (Clause("tv remote", 2),), (Clause("tv remote", 3),)),
        Request("position", (Clause("dog", 1), Clause("cat", 1, position=("left of", 0))), ()),
        Request("color_attr", (Clause("cup", 1, "red"), Clause("computer mouse", 1, "white")), ()),
    ]


def test_metadata_of_something_else():
    assert read_request({}) is read_request({"tag": "whatever", "text": "x"}) is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (ask("shape", ("dog",)), "unknown GenEval tag 'shape'"),
        ({"include": [{"class": "dog", "count": 1}]}, "unknown GenEval tag None"),
        (ask("colors", ("dragon",)), "unknown GenEval class 'dragon'"),
        (ask("colors", ("mouse",)), "unknown GenEval class 'mouse'"),
        (ask("colors", ("dog",), exclude=[("dragon", 2)]), "unknown GenEval class 'dragon'"),
        (ask("colors", ("dog", 1, "beige")), "unknown GenEval color 'beige'"),
        (ask("position", ("cat",), ("dog", 1, None, ["near", 0])), "unknown GenEval relation 'near'"),
        (
            ask("position", ("cat",), ("dog", 1, None, ["above", 1])),
            "'dog' is above entry 1, which must come before it, entry 1",
        ),
        (ask("position", ("cat",), ("dog", 1, None, ["above", -1])), "what 'dog' is above must be at least 0, not -1"),
        (ask("position", ("cat",), ("dog", 1, None, "above")), "must be a relation and an index, not 'above'"),
        (ask("position", ("dog", 1, None, ["above", 0])), "entry 0, which must come before it, entry 0"),
        (ask("counting", ("dog", 0)), "GenEval's count of 'dog' must be at least 1, not 0"),
        (ask("counting", ("dog", "2")), "GenEval's count of 'dog' must be an integer, not '2'"),
        (ask("counting"), "'include' not empty"),
        ({"tag": "colors", "include": ["dog"]}, "must be an object, not 'dog'"),
        ({"tag": "colors", "include": {"class": "dog"}}, "must be lists"),
    ],
)
def test_bad_metadata_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        read_request(metadata)


def test_the_classes_are_cocos_in_their_order():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    places = {0: "person", 15: "cat", 32: "sports ball", 49: "orange", 62: "tv", 64: "computer mouse",
              65: "tv remote", 66: "computer keyboard", 67: "cell phone", 79: "toothbrush"}  # fmt: skip
    assert {place: CLASSES[place] for place in places} == places
