import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from denoise_env.shapes import ALL, TRAIN, caption, parse, render
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES, Scene
from denoise_env.shapes.renderer import mask_grid


def blur(images, sigma):
    radius = math.ceil(3 * sigma)
    taps = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-(taps**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def falls(scores):
    return all(later < earlier for earlier, later in itertools.pairwise(scores))


def test_reads_fresh_pictures(verifier, generator):
    captions = ALL * 28
    hits = verifier.correct(render(captions, generator), captions)
    assert set(hits) == {"colour", "shape", "background", "all"}
    for name, hit in hits.items():
        assert hit.dtype == torch.bool
        assert hit.shape == (2016,)
        assert hit.float().mean() >= 0.99, name


def test_is_at_chance_on_noise(verifier, generator):
    n = 1500
    images = torch.rand(n, 3, 32, 32, generator=generator)
    captions = [ALL[i] for i in torch.randint(72, (n,), generator=generator).tolist()]
    hits = verifier.correct(images, captions)
    for name, chance in (("colour", 1 / 6), ("shape", 1 / 4), ("background", 1 / 3)):
        width = 4 * math.sqrt(chance * (1 - chance) / n)
        assert abs(hits[name].float().mean().item() - chance) < width, name
    assert not hits["all"].any()
    assert verifier.score(images, captions).max() < 1e-3


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
def test_an_empty_picture_shows_nothing(verifier, value):
    images = torch.full((72, 3, 32, 32), value)
    assert verifier(images).none.min() > 0.5
    assert not verifier.correct(images, ALL)["all"].any()


def test_another_caption_is_wrong_in_what_it_changes(verifier, generator):
    images = render(["a red circle on gray"] * 50, generator)
    for other, wrong in (
        ("a blue circle on gray", "colour"),
        ("a red cross on gray", "shape"),
        ("a red circle on black", "background"),
    ):
        hits = verifier.correct(images, [other] * 50)
        for name, hit in hits.items():
            assert hit.all() != (name in (wrong, "all")), (other, name)
        assert verifier.score(images, [other] * 50).max() < 0.3


def test_score_falls_with_blur(verifier, generator):
    images = render(ALL * 4, generator)
    blurred = [images, *(blur(images, sigma) for sigma in (1, 2, 3, 5, 8))]
    scores = [verifier.score(batch, ALL * 4).mean().item() for batch in blurred]
    assert falls(scores)
    assert scores[-1] < 0.05


def test_score_falls_with_noise(verifier, generator):
    images = render(ALL * 4, generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = [(images + sigma * noise).clamp(0, 1) for sigma in (0, 0.05, 0.1, 0.2, 0.4)]
    scores = [verifier.score(batch, ALL * 4).mean().item() for batch in noisy]
    assert falls(scores)
    assert scores[-1] < 0.05


@pytest.mark.parametrize("attribute", ["colour", "shape", "background"])
def test_score_falls_as_an_attribute_changes(verifier, attribute):
    words = {"colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}[attribute]

    def changed(text):
        scene = parse(text)
        word = words[(words.index(getattr(scene, attribute)) + 1) % len(words)]
        return caption(Scene(**{**vars(scene), attribute: word}))

    right = render(TRAIN * 4, torch.Generator().manual_seed(3))
    wrong = render([changed(text) for text in TRAIN * 4], torch.Generator().manual_seed(3))
    mixes = [torch.lerp(right, wrong, w) for w in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    scores = [verifier.score(mix, TRAIN * 4).mean().item() for mix in mixes]
    assert falls(scores)
    assert scores[0] > 0.7
    assert scores[-1] < 0.1


def test_reading_is_a_distribution(verifier, generator):
    reading = verifier(render(ALL, generator))
    assert reading.joint.shape == (72, 6, 4, 3)
    for part, width in ((reading.colour, 6), (reading.shape, 4), (reading.background, 3)):
        assert part.shape == (72, width)
        torch.testing.assert_close(part.sum(-1) + reading.none, torch.ones(72))


def test_errors_equal_the_plain_formula(verifier, generator):
    images = torch.rand(2, 3, 32, 32, generator=generator)
    scene = Scene("yellow", "cross", "white")
    alpha = mask_grid(scene.shape)[:, None]
    colour, background = (
        torch.tensor(value)[:, None, None] for value in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    templates = alpha * colour + (1 - alpha) * background
    plain = (images[:, None] - templates).square().mean((2, 3, 4)).amin(1)
    c, s, b = scene.indices
    torch.testing.assert_close(verifier.errors(images)[0][:, c, s, b], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_takes_any_float(verifier, generator, dtype):
    images = render(ALL, generator)
    score = verifier.score(images.to(dtype), ALL)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, verifier.score(images, ALL), atol=0.05, rtol=0)


@pytest.mark.parametrize("size", [24, 64, 96])
def test_takes_other_sizes(verifier, generator, size):
    hits = verifier.correct(render(ALL * 4, generator, size), ALL * 4)
    assert hits["all"].float().mean() > 0.95


def test_score_has_a_gradient(verifier, generator):
    images = blur(render(ALL, generator), 0.7).requires_grad_()
    verifier.score(images, ALL).sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().amax((1, 2, 3)).gt(0).float().mean() > 0.9


@pytest.mark.parametrize(
    "images", [torch.rand(3, 32, 32), torch.rand(2, 1, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)]
)
def test_other_images_are_refused(verifier, images):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        verifier(images)


def test_counts_must_agree(verifier):
    with pytest.raises(ValueError, match="as many captions"):
        verifier.score(torch.rand(2, 3, 32, 32), ALL[:3])
