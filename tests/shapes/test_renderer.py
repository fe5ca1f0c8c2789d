import pytest
import torch

from denoise_env.shapes import ALL, render
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.renderer import coverage, mask_grid


@pytest.mark.parametrize("size", [32, 48, 64])
def test_pictures_have_their_form_and_lie_inside(size, generator):
    images = render(ALL, generator, size)
    assert images.shape == (72, 3, size, size)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    corner = images[:, :, :1, :1]
    for edge in (images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]):
        # An object cut off at the edge would differ by 0.4; smoothing spills a little over an acute corner.
        assert (edge - corner[:, :, 0]).abs().max() < 0.15
    assert ((images - corner).abs().amax((1, 2, 3)) > 0.3).all()


def test_background_and_colour_are_exact(generator):
    images = render(ALL, generator)
    background = torch.tensor(list(BACKGROUNDS.values()))[torch.arange(72) % 3]
    assert torch.equal(images[:, :, 0, 0], background)
    colour = torch.tensor(list(COLOURS.values()))[torch.arange(72) // 12]
    distance = (images - colour[:, :, None, None]).abs().sum(1).flatten(1)
    assert ((distance < 1e-6).sum(1) >= 20).all()


def test_a_generator_decides_the_picture():
    first, same = (render(ALL, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, same)
    assert not torch.equal(first, render(ALL, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize(
    ("shape", "area"),
    # Of a box of side 2: the disc, a square of 1.72, half the box, two bars of 0.68 less their crossing.
    [("circle", torch.pi), ("square", 1.72**2), ("triangle", 2.0), ("cross", 2 * 2 * 0.68 - 0.68**2)],
)
def test_coverage_sums_to_the_area(shape, area):
    index, centre, radius = (
        torch.tensor([SHAPES.index(shape)]),
        torch.full((1, 2), 32.0),
        torch.tensor([25.0]),
    )
    mask = coverage(index, centre, radius, 64)
    assert mask.sum().item() == pytest.approx(area * 25**2, rel=0.01)


def test_edges_are_smooth(generator):
    mask = mask_grid("circle")
    partial = ((mask > 0) & (mask < 1)).flatten(1).sum(1)
    assert (partial > 10).all()


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="at least 8"):
        render(ALL, size=4)
