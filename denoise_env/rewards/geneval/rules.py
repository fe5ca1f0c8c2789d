"""GenEval's rules: what a prompt asks for, and whether the objects found in a picture are that (arXiv 2310.11513).

The prompts are those of GenEval's file ``evaluation_metadata.jsonl``, or others of its form:

    {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"}, …], "prompt": …}
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}], …}
    {"tag": "position", "include": [{"class": "dog", "count": 1},
                                    {"class": "cat", "count": 1, "position": ["left of", 0]}], …}

A position says where an object is from that of an earlier entry of ``include``, named by its index.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from denoise_env.arguments import integer

Mode = Literal["score", "correct", "strict"]
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in their order; GenEval names three of them otherwise: mouse, remote and keyboard."""
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""What a detection's score must be above, and what it must be above to be counted under the tag "counting"."""
MOST = 16
"""The most detections of one class; those of the lowest scores are dropped."""
MARGIN = 0.1
"""The share of two objects' summed widths (heights) by which they must be apart to be beside (above) each other."""
GRAY = 0x99
"""What stands for all that is not the object, in the crop whose colour is named."""


@dataclass(eq=False)
class Detection:
    """An object found in a picture.

    Attributes:
        label: one of `CLASSES`.
        score: the detector's confidence.
        box: left, top, right and bottom in pixels; the last two are outside.
        mask: bool ``[H, W]``, the object's pixels; ``None``: the whole picture.
        color: one of `COLORS`, once it has been named.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None
    color: str | None = None


class Detector(Protocol):
    """Finds the objects in pictures."""

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """The detections whose score is above `THRESHOLD`, in images ``[b, 3, H, W]`` in [0, 1]."""
        ...


class ColorClassifier(Protocol):
    """Names the colours of objects."""

    def __call__(self, crops: Sequence[np.ndarray], labels: Sequence[str]) -> list[str]:
        """The colour in `COLORS` of each crop, uint8 ``[h, w, 3]``, of an object of the class in ``labels``."""
        ...


@dataclass(frozen=True)
class Clause:
    """``count`` objects of a class, all of the colour and at the position, where these are given."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: every clause of ``include``, and fewer objects than each clause of ``exclude`` counts."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


def read_request(metadata: Mapping[str, Any]) -> Request | None:
    """What GenEval's metadata ask for; ``None`` where they have no ``include``.

    Raises:
        ValueError: an unknown tag, class, colour or position, a count below 1, or another form.
    """
    if "include" not in metadata:
        return None
    tag = _one_of(TAGS, metadata.get("tag"), "tag")
    groups = {name: metadata.get(name) or [] for name in ("include", "exclude")}
    if not metadata["include"] or not all(isinstance(group, list) for group in groups.values()):
        raise ValueError(f"GenEval's 'include' and 'exclude' must be lists, and 'include' not empty: {groups}")
    include, exclude = (tuple(_clause(c, i) for i, c in enumerate(group)) for group in groups.values())
    return Request(tag, include, exclude)


def _clause(columns: Any, place: int) -> Clause:
    if not isinstance(columns, Mapping):
        raise ValueError(f"an entry of GenEval's 'include' and 'exclude' must be an object, not {columns!r}")
    label = _one_of(CLASSES, columns.get("class"), "class")
    count = integer(columns.get("count"), f"GenEval's count of {label!r}", at_least=1)
    color, position = columns.get("color"), columns.get("position")
    if color is not None:
        _one_of(COLORS, color, "color")
    if position is None:
        return Clause(label, count, color)
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        raise ValueError(f"GenEval's position must be a relation and an index, not {position!r}")
    relation = _one_of(RELATIONS, position[0], "relation")
    index = integer(position[1], f"the index of what {label!r} is {relation}", at_least=0)
    if index >= place:
        raise ValueError(f"GenEval's {label!r} is {relation} entry {index}, which must come before it, entry {place}")
    return Clause(label, count, color, (relation, index))


def _one_of(known: Sequence[str], value: Any, what: str) -> str:
    if value not in known:
        raise ValueError(f"unknown GenEval {what} {value!r}; there are {list(known)}")
    return value


Objects = Mapping[str, Sequence[Detection]]
"""The detections that count, by class, the most confident first."""


def keep(detections: Sequence[Detection], tag: str) -> Objects:
    """The detections that count under a tag: at most `MOST` of each class, above the tag's threshold.

    They may overlap as they like.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    objects: dict[str, list[Detection]] = defaultdict(list)
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold and len(objects[detection.label]) < MOST:
            objects[detection.label].append(detection)
    return {label: found for label, found in objects.items() if found}


def group(objects: Objects, clause: Clause, mode: Mode) -> Sequence[Detection]:
    """The detections that a clause is about: all of its class, and under "correct" only as many as it counts."""
    found = objects.get(clause.label, [])
    return found[: clause.count] if mode == "correct" else found


def to_color(objects: Objects, request: Request, mode: Mode) -> list[Detection]:
    """The detections whose colours `grade` reads."""
    groups = [(clause, group(objects, clause, mode)) for clause in request.include if clause.color]
    return [detection for clause, found in groups if len(found) == clause.count for detection in found]


def crop(image: Tensor, detection: Detection) -> np.ndarray:
    """The box of a detection in a picture, uint8 ``[H, W, 3]``, with `GRAY` for all pixels that are not the object."""
    left, top, right, bottom = (round(edge) for edge in detection.box)
    if detection.mask is not None:
        image = image.where(detection.mask[..., None].to(image.device), torch.tensor(GRAY, dtype=torch.uint8))
    return image[top:bottom, left:right].numpy()


def grade(objects: Objects, request: Request, mode: Mode) -> float:
    """How far the objects in a picture are what was asked for.

    "correct" is GenEval's own rule: 1 where each clause finds its count or more, the most confident of which have the
    colour and the position, and nothing excluded is there, else 0. "strict" is 1 where each clause finds exactly its
    count, and reads no ``exclude``. "score" is the mean of terms, as the reward server of Flow-GRPO
    (yifan123/reward-server) computes them. Each clause that counts n and finds m adds 1 - |n - m| / n. A colour or
    position adds 0 more where m is not n; else a colour adds the share of the n that have it. Where all have it, or
    none is asked for, a position adds 1; it adds 0 where the other object did not match its clause, and 0 *and* 1
    where the two are not in the relation.

    Args:
        objects: as `keep` returns them, with the colours of those in `to_color`.
        request: what the prompt asks for.
        mode: which of the three.
    """
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in request.include:
        found = group(objects, clause, mode)
        matched = len(found) == clause.count
        terms.append(1 - abs(clause.count - len(found)) / clause.count)
        if not matched and (clause.color or clause.position):
            terms.append(0.0)
        if matched and clause.color:
            hits = sum(detection.color == clause.color for detection in found)
            terms.append(hits / clause.count)
            matched = hits == clause.count
        if matched and clause.position:
            relation, index = clause.position
            others = groups[index]
            matched = others is not None and all(relation in relations(a.box, b.box) for a in found for b in others)
            terms += [0.0] * (not matched) + [1.0] * (others is not None)
        groups.append(found if matched else None)
    if mode == "score":
        return sum(terms) / len(terms)
    right = None not in groups
    if mode == "correct":
        right = right and all(len(objects.get(clause.label, [])) < clause.count for clause in request.exclude)
    return float(right)


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box ``a`` is from box ``b``: a relation to the side, one up or down, both, or none.

    The offset of the centres is brought nearer to 0 along each axis by `MARGIN` times the summed extents, then divided
    by its length before that. A coordinate beyond ±0.5 is a relation.

    >>> relations((12, 30, 22, 40), (0, 0, 10, 10)), relations((1, 0, 11, 10), (0, 0, 10, 10))
    ({'below'}, set())
    """
    offsets = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    extents = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - MARGIN * e, 0), o) for o, e in zip(offsets, extents, strict=True)]
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    x, y = (value / math.hypot(*offsets) for value in shrunk)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in found.items() if holds}
