import pytest
import torch

from denoise_env.shapes.compositions import ALL, parse, render
from denoise_env.shapes.compositions.grammar import COUNTS, RELATIONS
from denoise_env.shapes.compositions.renderer import FIELD, GAP, RADII, SLOPE, encode, place
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS

CAPTIONS = [text for i, text in enumerate(ALL) if parse(text).kind != "relation" or i % 23 == 0]


def regions(mask):
    """Regions [n, H, W] of connected pixels (8 neighbours) of a mask [H, W], by flooding from one pixel at a time."""
    found, rest = [], mask.clone()
    while rest.any():
        region = torch.zeros_like(mask)
        region[tuple(rest.nonzero()[0])] = True
        while True:
            wider = torch.nn.functional.max_pool2d(region[None].float(), 3, 1, 1)[0].bool() & mask
            if torch.equal(wider, region):
                break
            region = wider
        found.append(region)
        rest &= ~region
    return torch.stack(found)


@pytest.mark.parametrize("size", [32, 48, 64])
def test_pictures_have_their_form_and_lie_inside(size, generator):
    images = render(CAPTIONS, generator, size)
    assert images.shape == (len(CAPTIONS), 3, size, size)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    background = torch.tensor([BACKGROUNDS[parse(text).background] for text in CAPTIONS])[:, :, None]
    for edge in (images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]):
        assert (edge - background).abs().max() < 0.15


def test_pictures_show_what_captions_say(generator):
    texts = CAPTIONS[::4]
    for text, image in zip(texts, render(texts, generator, 64), strict=True):
        scene = parse(text)
        background = torch.tensor(BACKGROUNDS[scene.background])[:, None, None]
        objects = regions((image - background).abs().amax(0) > 1e-4)
        assert len(objects) == len(scene.things), text
        corners = [region.nonzero().float().flip(1).aminmax(dim=0) for region in objects]
        centres = torch.stack([(low + high) / 2 for low, high in corners])
        painted = [
            {
                word
                for word, colour in COLOURS.items()
                if ((image - torch.tensor(colour)[:, None, None]).abs().amax(0) < 1e-5)[region].sum() >= 20
            }
            for region in objects
        ]
        if scene.relation is None:
            assert all(colours == {scene.things[0].colour} for colours in painted), text
            continue
        assert {next(iter(colours)) for colours in painted} == {thing.colour for thing in scene.things}
        if scene.things[0].colour != scene.things[1].colour:
            first = painted.index({scene.things[0].colour})
            away = centres[first] - centres[1 - first]
            direction = torch.tensor(RELATIONS[scene.relation]).float()
            along, across = away @ direction, (away @ direction.flip(0)).abs()
            assert along > 2.5 * across, text
            assert along > 2 * (4 + 4), text  # of 64 pixels


def test_places_are_apart_and_related(generator):
    captions = CAPTIONS * 2
    index = encode(captions)
    exists = index[:, 2::2] >= 0
    radius = torch.where(exists, 4 + torch.rand(exists.shape, generator=generator), 100.0)
    radius[exists.sum(1) == 1] = 11.0
    centre = place(exists, index[:, 1], torch.where(exists, radius, 4.0), generator)
    inside = (centre - radius[..., None] >= 1 - 1e-4) & (centre + radius[..., None] <= 31 + 1e-4)
    assert inside[exists].all()
    for i, j in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        gap = (centre[:, i] - centre[:, j]).abs().amax(-1) - radius[:, i] - radius[:, j]
        assert (gap[exists[:, i] & exists[:, j]] >= GAP - 1e-4).all()
    for number, direction in enumerate(RELATIONS.values()):
        x, y = (centre[:, 0] - centre[:, 1])[index[:, 1] == number].T
        along, across = (x * direction[0], y) if direction[0] else (y * direction[1], x)
        assert len(along) > 100
        assert (along >= 8 + GAP).all()
        assert (across.abs() <= SLOPE * along + 1e-4).all()
        assert across.std() > 1


def test_sizes_of_objects(generator):
    """Areas of squares: (2 · 0.86 r)² each."""
    for number, (low, high) in RADII.items():
        numeral = {n: word for word, n in COUNTS.items()}.get(number, "a")
        text = f"{numeral} red square{'s' * (number > 1)} on black"
        area = render([text] * 200, generator)[:, 0].sum((1, 2)) / 0.9 / number
        assert area.min() > (1.72 * low) ** 2 * 0.99
        assert area.max() < (1.72 * high) ** 2 * 1.01
        assert area.max() - area.min() > ((1.72 * high) ** 2 - (1.72 * low) ** 2) * 0.4


def test_objects_on_a_board_lie_in_a_quarter_each(generator):
    several = [text for text in CAPTIONS if len(parse(text).things) > 1]
    images = render(several, generator, board=True)
    background = torch.tensor([BACKGROUNDS[parse(text).background] for text in several])[..., None, None]
    filled = (images - background).abs().amax(1) > 0.1
    quarters = filled.unfold(1, FIELD, FIELD).unfold(2, FIELD, FIELD)
    assert quarters.any(-1).any(-1).sum((1, 2)).tolist() == [len(parse(text).things) for text in several]
    assert not quarters[..., [0, 1, -2, -1], :].any()  # six pixels about the middle of sixteen
    assert not quarters[..., [0, 1, -2, -1]].any()
    assert quarters.any(-1).any(-1).float().mean(0).min() > 0.2  # every quarter, some of the time


def test_a_generator_decides_the_picture():
    first, same = (render(CAPTIONS[::9], torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, same)
    assert not torch.equal(first, render(CAPTIONS[::9], torch.Generator().manual_seed(2)))


def test_no_captions_make_no_pictures():
    assert render([]).shape == (0, 3, 32, 32)


def test_too_small_a_picture_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        render(ALL[:1], size=8)
