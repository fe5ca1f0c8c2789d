import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from denoise_env.shapes.compositions import ALL, Composition, Thing, Verifier, caption, parse, render
from denoise_env.shapes.compositions.grammar import COUNTS, RELATIONS
from denoise_env.shapes.compositions.verifier import SLOTS
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES

KINDS = {kind: [text for text in ALL if parse(text).kind == kind] for kind in ("one", "count", "relation")}
PARTS = {"background", "colour", "shape", "count", "relation", "all"}


@pytest.fixture(scope="module")
def verifier():
    return Verifier()


def draw(kind, n, generator):
    return [KINDS[kind][i] for i in torch.randint(len(KINDS[kind]), (n,), generator=generator).tolist()]


def shares(verifier, images, captions, batch=400):
    """Share of pictures with each part right, and the mean score."""
    hits = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            part, texts = images[start : start + batch], captions[start : start + batch]
            hits.append(verifier.correct(part, texts) | {"score": verifier.score(part, texts)})
    return {name: torch.cat([hit[name] for hit in hits]).float().mean().item() for name in hits[0]}


def blur(images, sigma):
    taps = torch.exp(-torch.arange(-3.0, 4).square() / (2 * sigma**2))
    kernel = (taps / taps.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (3,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def changes(text):
    """Captions that differ from a caption in one part: part → captions."""
    scene = parse(text)
    first, rest = scene.things[0], scene.things[1:]
    found = {"background": [replace(scene, background=word) for word in BACKGROUNDS if word != scene.background]}
    related = scene.relation is not None
    for part, words in (("colour", COLOURS), ("shape", SHAPES)):
        things = [replace(first, **{part: word}) for word in words if word != getattr(first, part)]
        found[part] = [
            replace(scene, things=(thing, *(rest if related else [thing] * len(rest))))
            for thing in things
            if not (related and thing in rest)
        ]
    if related:
        found["relation"] = [replace(scene, relation=word) for word in RELATIONS if word != scene.relation]
    else:
        found["count"] = [replace(scene, things=(first,) * n) for n in range(1, 5) if n != len(scene.things)]
    return {part: [caption(other) for other in scenes] for part, scenes in found.items()}


@pytest.mark.parametrize(("kind", "n"), [("one", 400), ("count", 800), ("relation", 800)])
def test_reads_fresh_pictures(verifier, generator, kind, n):
    captions = draw(kind, n, generator)
    right = shares(verifier, render(captions, generator), captions)
    assert set(right) == PARTS | {"score"}
    assert right["all"] >= 0.99
    assert right["score"] > 0.9


@pytest.mark.parametrize("kind", ["count", "relation"])
def test_reads_boards(verifier, generator, kind):
    captions = draw(kind, 400, generator)
    right = shares(verifier, render(captions, generator, board=True), captions)
    assert right["all"] >= 0.99
    assert right["score"] > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("one", 1), *(("count", n) for n in COUNTS.values()), ("relation", 2)])
def test_reads_two_thousand_fresh_pictures(verifier, kind, number):
    generator = torch.Generator().manual_seed(100 + number)
    captions = [text for text in draw(kind, 7_000, generator) if len(parse(text).things) == number][:2_000]
    assert len(captions) == 2_000
    images = render(captions, generator)
    with torch.no_grad():
        right = [verifier.correct(images[i : i + 400], captions[i : i + 400]) for i in range(0, 2_000, 400)]
    for part in PARTS:
        assert torch.cat([found[part] for found in right]).float().mean() >= 0.99, part


@pytest.mark.parametrize("kind", KINDS)
def test_each_part_that_is_changed_is_noticed(verifier, generator, kind):
    captions = draw(kind, 200, generator)
    images = render(captions, generator)
    for part in changes(captions[0]):
        options = [changes(text)[part] for text in captions]
        told = [words[i % len(words)] for i, words in enumerate(options)]
        right = shares(verifier, images, told)
        assert right[part] <= 0.01, part
        assert right["all"] <= 0.01, part
        assert right["score"] < 0.9, part
        assert all(right[name] >= 0.99 for name in PARTS - {part, "all"}), part


def test_swapped_objects_are_noticed(verifier, generator):
    captions = draw("relation", 300, generator)
    swapped = [caption(replace(scene, things=scene.things[::-1])) for scene in map(parse, captions)]
    right = shares(verifier, render(captions, generator), swapped)
    assert right["all"] <= 0.01
    assert right["relation"] <= 0.01
    assert min(right["colour"], right["shape"], right["count"]) >= 0.99
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    same = [caption(replace(parse(text), relation=mirrored[parse(text).relation])) for text in swapped]
    assert shares(verifier, render(captions, generator), same)["all"] >= 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_stands_a_little_blur_and_noise(verifier, generator, kind):
    captions = draw(kind, 200, generator)
    images = blur(render(captions, generator), 0.7)
    noisy = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    right = shares(verifier, noisy, captions)
    assert right["all"] >= 0.97
    assert right["score"] > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_score_falls_with_fading_blur_and_noise(verifier, generator, kind):
    captions = draw(kind, 60, generator)
    images = render(captions, generator)
    empty = torch.tensor([BACKGROUNDS[parse(text).background] for text in captions])[:, :, None, None]
    noise = torch.randn(images.shape, generator=generator)
    for series, least in (
        ([torch.lerp(images, empty, w) for w in (0, 0.2, 0.4, 0.6)], 0.01),
        ([images, *(blur(images, sigma) for sigma in (1, 1.5, 2, 3))], 0.5),
        ([(images + sigma * noise).clamp(0, 1) for sigma in (0, 0.05, 0.1, 0.2)], 0.01),
    ):
        scores = [verifier.score(batch, captions).mean().item() for batch in series]
        assert all(later < earlier for earlier, later in itertools.pairwise(scores))
        assert scores[-1] < least


def junk(name, n, generator):
    if name == "pixels":
        return torch.rand(n, 3, 32, 32, generator=generator)
    if name == "patches":
        return F.interpolate(torch.rand(n, 3, 4, 4, generator=generator), size=(32, 32), mode="nearest")
    if name == "clouds":
        return F.interpolate(torch.rand(n, 3, 8, 8, generator=generator), size=(32, 32), mode="bilinear")
    if name == "palette patches":
        palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()])
        patches = palette[torch.randint(9, (n, 4, 4), generator=generator)].permute(0, 3, 1, 2)
        return F.interpolate(patches, size=(32, 32), mode="nearest")
    return torch.full((n, 3, 32, 32), float(name))


@pytest.mark.parametrize("name", ["pixels", "patches", "clouds", "palette patches", "0", "0.25", "0.5", "1"])
def test_junk_scores_nothing(verifier, generator, name):
    captions = [text for kind in KINDS for text in draw(kind, 60, generator)]
    images = junk(name, len(captions), generator)
    assert verifier.score(images, captions).max() < 0.02
    assert not verifier.correct(images, captions)["all"].any()


def test_blends_score_little(verifier, generator):
    """Neither two pictures of a caption at once nor the mean of many shows it."""
    captions = [text for kind in ("count", "relation") for text in draw(kind, 100, generator)]
    pictures = [render(captions, generator) for _ in range(8)]
    assert verifier.score((pictures[0] + pictures[1]) / 2, captions).mean() < 0.15
    assert verifier.score(torch.stack(pictures).mean(0), captions).mean() < 0.05
    both = torch.maximum(*(render(["two red circles on black"] * 100, generator) for _ in range(2)))
    assert verifier.correct(both, ["two red circles on black"] * 100)["all"].float().mean() < 0.05


def test_score_counts_what_is_right(verifier):
    """Of background, colour, shape and count (and relation), on a picture that is read clearly."""
    image = render(["three green crosses on black"], torch.Generator().manual_seed(2))
    clarity = verifier(image).clarity
    for text, share in (
        ("three green crosses on black", 1),
        ("three green crosses on gray", 3 / 4),
        ("three red crosses on black", 3 / 4),
        ("three red circles on black", 2 / 4),
        ("two green crosses on black", (1 + 3 * 2 / 3) / 4),
        ("four green crosses on black", (1 + 3 * 3 / 4) / 4),
        ("a red cross left of a red circle on black", (1 + 0 + 1 / 2 + 2 / 3 + 1 / 4 * 1) / 5),
    ):
        score = (verifier.score(image, [text]) / clarity).item()
        if "left of" in text:  # the relation may hold or not between two of three crosses
            assert score <= share + 0.02
        else:
            assert score == pytest.approx(share, abs=0.02), text


def test_right_objects_in_the_wrong_place_score_without_the_relation(verifier):
    image = render(["a blue square left of a red circle on white"], torch.Generator().manual_seed(2))
    clarity = verifier(image).clarity.item()
    for text, share in (
        ("a blue square left of a red circle on white", 1),
        ("a red circle right of a blue square on white", 1),
        ("a red circle left of a blue square on white", 4 / 5),
        ("a red circle above a blue square on white", 4 / 5),
    ):
        assert verifier.score(image, [text]).item() / clarity == pytest.approx(share, abs=0.02), text


def test_a_fifth_object_is_seen(verifier):
    """Five circles on a quincunx, drawn as a count of four and one more."""
    one = render(["a red circle on black"], torch.Generator().manual_seed(0))
    small = F.interpolate(one, size=(16, 16), mode="area")[0]
    y, x = (small[0] > 0.5).nonzero().float().mean(0).round().int().tolist()
    blob = small[:, y - 5 : y + 6, x - 5 : x + 6]
    image = torch.zeros(1, 3, 32, 32)
    for row, column in ((0, 0), (0, 21), (21, 0), (21, 21), (10, 10)):
        image[0, :, row : row + 11, column : column + 11] = blob
    assert verifier(image).exists.sum() == 5
    assert not verifier.correct(image, ["four red circles on black"])["count"].any()


def test_reading_says_where_objects_are(verifier, generator):
    captions = draw("relation", 100, generator)
    images = render(captions, generator)
    reading = verifier(images)
    assert reading.objects.shape == (100, SLOTS, 6, 4)
    total = reading.objects.sum((2, 3))
    torch.testing.assert_close(total, reading.exists.float())
    background = torch.tensor(list(BACKGROUNDS.values()))[reading.background]
    assert torch.equal(background, images[:, :, 0, 0])
    for i in range(100):
        for (x, y), exists in zip(reading.centre[i].tolist(), reading.exists[i], strict=True):
            if exists:
                assert (images[i, :, int(y), int(x)] - background[i]).abs().max() > 0.3


def test_rows_do_not_depend_on_their_batch(verifier, generator):
    captions = [text for kind in KINDS for text in draw(kind, 10, generator)]
    images = render(captions, generator)
    alone = torch.cat([verifier.score(images[i : i + 1], captions[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(alone, verifier.score(images, captions), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_takes_any_float(verifier, generator, dtype):
    captions = [text for kind in KINDS for text in draw(kind, 20, generator)]
    images = render(captions, generator)
    score = verifier.score(images.to(dtype), captions)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, verifier.score(images, captions), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [48, 64])
def test_takes_other_sizes(verifier, generator, size):
    captions = [text for kind in KINDS for text in draw(kind, 60, generator)]
    assert shares(verifier, render(captions, generator, size), captions)["all"] > 0.95


@pytest.mark.parametrize(
    "images", [torch.rand(3, 32, 32), torch.rand(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)]
)
def test_other_images_are_refused(verifier, images):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        verifier(images)


def test_counts_must_agree(verifier):
    with pytest.raises(ValueError, match="as many captions"):
        verifier.score(torch.rand(2, 3, 32, 32), ALL[:3])


def test_changes_are_what_they_say():
    found = changes(caption(Composition((Thing("red", "circle"), Thing("blue", "circle")), "gray", "above")))
    assert {part: len(texts) for part, texts in found.items()} == {
        "background": 2,
        "colour": 4,
        "shape": 3,
        "relation": 3,
    }
