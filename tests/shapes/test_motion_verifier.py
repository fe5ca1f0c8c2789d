import itertools

import pytest
import torch

from denoise_env.shapes.motion import ALL, FRAMES, Verifier, caption, parse, render
from denoise_env.shapes.motion.grammar import MOTIONS, SPEEDS, Motion
from denoise_env.shapes.motion.renderer import draw, encode, paths
from denoise_env.shapes.motion.verifier import total

PARTS = ("appearance", "direction", "speed", "consistency")
SOME = ALL[::23]
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "growing": "shrinking"}
OPPOSITE |= {"shrinking": "growing"}


@pytest.fixture(scope="module")
def reader():
    return Verifier()


@pytest.fixture(scope="module")
def clips():
    return render(SOME, torch.Generator().manual_seed(0))


def changed(text, **words):
    return caption(Motion(**{**vars(parse(text)), **words}))


def opposite(text):
    *verb, way = parse(text).motion.split()
    return changed(text, motion=" ".join([*verb, OPPOSITE[way]]))


def shuffled(clips, generator):
    order = torch.rand(clips.shape[:2], generator=generator).argsort(1)
    return clips[torch.arange(len(clips))[:, None], order]


def share(hits):
    return hits.float().mean().item()


@pytest.mark.slow
def test_reads_fresh_clips(reader, generator):
    chosen = [ALL[i] for i in torch.randperm(len(ALL), generator=generator)[:1000].tolist()]
    for name, hit in reader.correct(render(chosen, generator), chosen).items():
        assert hit.shape == (1000,)
        assert share(hit) >= 0.99, name


def test_fresh_clips_score_high(reader, clips):
    parts = reader.parts(clips, SOME)
    assert tuple(parts) == PARTS
    for name, values in parts.items():
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.max() <= 1 + 1e-6
        assert values.mean() > 0.95, name
    torch.testing.assert_close(reader.score(clips, SOME), total(parts))


def test_finds_the_paths(reader, generator):
    colour, shape, background, motion, speed = encode(SOME).unbind(-1)
    path = paths(motion, speed, generator)
    reading = reader(draw(path, colour, shape, background))
    torch.testing.assert_close(reading.path, path, rtol=0, atol=0.25)
    rate = torch.tensor(list(SPEEDS.values()))[speed]
    torch.testing.assert_close(reading.speed, rate, rtol=0, atol=0.1)


def test_is_at_chance_on_noise(reader, generator):
    chosen = [ALL[i] for i in torch.randperm(len(ALL), generator=generator)[:120].tolist()]
    noise = torch.rand(len(chosen), FRAMES, 3, 32, 32, generator=generator)
    hits = reader.correct(noise, chosen)
    for name, number in (("colour", 6), ("shape", 4), ("background", 3), ("motion", 10), ("speed", 2)):
        chance = 1 / number
        assert abs(share(hits[name]) - chance) < 4 * (chance * (1 - chance) / len(chosen)) ** 0.5, name
    assert not hits["all"].any()
    assert reader.score(noise, chosen).max() < 1e-3


def test_motion_is_at_chance_on_shuffled_frames(reader, clips, generator):
    mixed = shuffled(clips, generator)
    parts, hits = reader.parts(mixed, SOME), reader.correct(mixed, SOME)
    assert parts["appearance"].mean() > 0.95
    assert all(share(hits[name]) > 0.99 for name in ("colour", "shape", "background"))
    assert parts["direction"].mean() < 1 / len(MOTIONS)
    assert parts["consistency"].mean() < 0.2
    assert share(hits["all"]) < 0.02
    # The axis is left; which way along it is a coin's toss.
    there, back = share(hits["motion"]), share(reader.correct(mixed, [opposite(text) for text in SOME])["motion"])
    assert abs(there - back) < 4 * (2 * 0.25 / len(SOME)) ** 0.5


@pytest.mark.parametrize(
    ("change", "wrong", "part"),
    [
        (lambda t: changed(t, colour="red" if "blue" in t else "blue"), "colour", "appearance"),
        (lambda t: changed(t, shape="cross" if "circle" in t else "circle"), "shape", "appearance"),
        (lambda t: changed(t, background="gray" if "black" in t else "black"), "background", "appearance"),
        (opposite, "motion", "direction"),
        (lambda t: changed(t, speed="" if "fast" in t else "fast"), "speed", "speed"),
    ],
    ids=["colour", "shape", "background", "motion", "speed"],
)
def test_parts_move_apart(reader, clips, change, wrong, part):
    """With another caption only the part that it changes falls."""
    others = [change(text) for text in SOME]
    own, parts = reader.parts(clips, SOME), reader.parts(clips, others)
    assert parts[part].mean() < own[part].mean() - 0.3
    for name in set(PARTS) - {part}:
        torch.testing.assert_close(parts[name], own[name])
    for name, hit in reader.correct(clips, others).items():
        assert share(hit) > 0.99 if name not in (wrong, "all") else share(hit) < 0.02, name
    assert reader.score(clips, others).mean() < reader.score(clips, SOME).mean() - 0.1


def test_backwards_a_straight_motion_is_its_opposite(reader, clips):
    straight = [i for i, text in enumerate(SOME) if "bouncing" not in text]
    others = [opposite(SOME[i]) for i in straight]
    assert share(reader.correct(clips[straight].flip(1), others)["all"]) > 0.98


def test_a_still_clip_has_looks_and_no_motion(reader, clips):
    still = clips[:, :1].expand_as(clips)
    parts = reader.parts(still, SOME)
    assert parts["appearance"].mean() > 0.95
    assert parts["consistency"].mean() > 0.95
    assert parts["direction"].mean() < 0.1
    assert parts["speed"].mean() < 0.2
    assert not reader.correct(still, SOME)["all"].any()
    assert 0.4 < reader.score(still, SOME).mean() < 0.55


def test_an_object_that_changes_is_not_consistent(reader):
    path = paths(*encode(SOME)[:, 3:].unbind(-1), torch.Generator().manual_seed(0))
    colour, shape, background = encode(SOME)[:, :3].unbind(-1)
    first, second = (draw(path, colours, shape, background) for colours in (colour, (colour + 1) % 6))
    odd = (torch.arange(FRAMES) % 2)[:, None, None, None] == 1
    parts = reader.parts(torch.where(odd, second, first), SOME)
    assert parts["consistency"].mean() < 0.05
    assert parts["direction"].mean() > 0.95


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
def test_empty_clips_score_nothing(reader, value):
    empty = torch.full((8, FRAMES, 3, 32, 32), value)
    assert not reader.correct(empty, SOME[:8])["all"].any()
    assert all(values.max() < 1e-3 for values in reader.parts(empty, SOME[:8]).values())


def test_score_falls_with_noise(reader, clips, generator):
    noise = torch.randn(clips.shape, generator=generator)
    scores = [reader.score((clips + level * noise).clamp(0, 1), SOME).mean() for level in (0, 0.05, 0.1, 0.2)]
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))
    assert scores[-1] < 0.05


@pytest.mark.parametrize("size", [24, 64])
def test_takes_other_sizes(reader, generator, size):
    assert share(reader.correct(render(SOME, generator, size), SOME)["all"]) > 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_takes_any_float(reader, clips, dtype):
    score = reader.score(clips[:32].to(dtype), SOME[:32])
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, reader.score(clips[:32], SOME[:32]), atol=0.05, rtol=0)


def test_rows_do_not_depend_on_each_other(reader, clips):
    whole = reader.score(clips[:12], SOME[:12])
    torch.testing.assert_close(whole[5:7], reader.score(clips[5:7], SOME[5:7]))
    assert torch.equal(whole, reader.score(clips[:12], SOME[:12]))


@pytest.mark.parametrize(
    "clips",
    [torch.rand(2, 3, 32, 32), torch.rand(2, 8, 3, 32, 32), torch.zeros(2, FRAMES, 3, 32, 32, dtype=torch.uint8)],
)
def test_other_clips_are_refused(reader, clips):
    with pytest.raises(ValueError, match=r"\[B, 9, 3, H, W\]"):
        reader(clips)


def test_counts_must_agree(reader, clips):
    with pytest.raises(ValueError, match="as many captions"):
        reader.score(clips[:2], SOME[:3])
