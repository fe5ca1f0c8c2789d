"""Reads a picture of several objects back and says which parts of its caption are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoise_env.shapes.compositions.grammar import MAX_OBJECTS, RELATIONS
from denoise_env.shapes.compositions.renderer import encode
from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.renderer import BASE_SIZE, coverage
from denoise_env.shapes.verifier import resample

SLOTS = MAX_OBJECTS + 1
"""Objects that are looked for: one more than a caption can name, so that one too many is seen."""


@dataclass(frozen=True)
class Reading:
    """What B pictures show.

    Attributes:
        background: ``[B]`` place in `BACKGROUNDS`.
        objects: ``[B, SLOTS, 6, 4]`` probability of each (colour, shape) of each object; all 0 where there is none.
        centre: ``[B, SLOTS, 2]`` x and y of the objects in pixels of a 32-pixel picture.
        clarity: ``[B]`` in [0, 1]: 1 where background and objects are the whole picture, below 1/e where they leave
            more unexplained than a scene may.
    """

    background: Tensor
    objects: Tensor
    centre: Tensor
    clarity: Tensor

    @property
    def exists(self) -> Tensor:
        """``[B, SLOTS]`` booleans: which objects there are."""
        return self.objects.amax((2, 3)) > 0


class _Search(nn.Module):
    """Explains a picture by objects of a range of radii.

    A template a · d, a mask times a contrast, takes 2 a · (d · y) − |a|² |d|² off the squared error of a picture y
    without its background. Objects are taken greedily by this gain on a grid of pixels, each apart from those before;
    then each is refined between the pixels, and stays if it gains the ``least`` share of its energy |a|² |d|².
    """

    coarse: Tensor
    mass: Tensor
    radius: Tensor
    place: Tensor
    fine: Tensor
    fine_mass: Tensor
    fine_radius: Tensor
    shift: Tensor

    def __init__(self, radii: Sequence[float], number: int, temperature: float, least: float) -> None:
        super().__init__()
        self.number, self.temperature, self.least = number, temperature, least
        self.edge, self.reach = int(radii[0]), int(radii[-1]) + 2
        self.width = 2 * self.reach + 1

        def templates(radius: Tensor, shift: Tensor) -> Tensor:
            n, centre = len(radius), shift + self.reach + 0.5
            masks = [coverage(torch.full((n,), i), centre, radius, self.width) for i in range(len(SHAPES))]
            return torch.cat(masks).flatten(1)  # [shapes · n, pixels]

        coarse = templates(torch.tensor(radii), torch.zeros(len(radii), 2))
        steps = torch.arange(-1, 1.1, 0.5)
        fine_radius, x, y = torch.cartesian_prod(torch.arange(radii[0] - 0.5, radii[-1] + 0.6, 0.5), steps, steps).T
        shift = torch.stack([x, y], 1)
        fine = templates(fine_radius, shift)
        pixels = torch.arange(self.edge, BASE_SIZE - self.edge)
        for name, value in {
            "coarse": coarse.view(-1, 1, self.width, self.width),
            "mass": coarse.square().sum(1),
            "radius": torch.tensor(radii).repeat(len(SHAPES)),
            "place": torch.cartesian_prod(pixels, pixels).flip(1),  # x and y; x runs fastest
            "fine": fine.T.contiguous(),
            "fine_mass": fine.square().sum(1),
            "fine_radius": fine_radius.contiguous(),
            "shift": shift,
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, y: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Search pictures less their background ``[B, 3, 32, 32]`` for colours less it ``[B, 6, 3]``.

        Returns:
            `Reading.objects`, `Reading.centre`, and what the objects leave of the pictures.
        """
        padded = F.pad(y, (self.reach - self.edge,) * 4)
        place = self._locate(padded, contrast)
        gains, variant = self._refine(padded, contrast, place)
        gain, best = gains.flatten(2).max(-1)
        colour, shape = best // len(SHAPES), best % len(SHAPES)
        variant = variant.flatten(2).gather(2, best[..., None])[..., 0]
        centre = place + 0.5 + self.shift[variant]
        mask = coverage(shape.flatten(), centre.flatten(0, 1), self.fine_radius[variant].flatten())
        mask = mask.view(*shape.shape, -1)
        paint = contrast.gather(1, colour[..., None].expand(-1, -1, 3))
        overlap = (mask @ mask.mT) * (paint @ paint.mT)
        energy = overlap.diagonal(dim1=1, dim2=2)
        exists = torch.zeros_like(gain)
        for k in range(self.number):  # what an earlier object explains is no gain
            own = gain[:, k] - 2 * (overlap[:, k] * exists).sum(-1)
            exists[:, k] = (own > self.least * energy[:, k]).to(exists)
        rest = y - ((paint * exists[..., None]).mT @ mask).view_as(y)
        odds = gains.flatten(2) / (self.temperature * energy[..., None].clamp(min=1e-6))
        objects = odds.softmax(-1).view_as(gains) * exists[..., None, None]
        spare = SLOTS - self.number
        return F.pad(objects, (0, 0, 0, 0, 0, spare)), F.pad(centre, (0, 0, 0, spare)), rest

    def _locate(self, padded: Tensor, contrast: Tensor) -> Tensor:
        """Pixels ``[B, number, 2]``, x and y, of the best objects."""
        sums = F.conv2d(padded.flatten(0, 1)[:, None], self.coarse).view(len(padded), 3, -1)
        energy = contrast.square().sum(-1)[..., None] * self.mass.repeat_interleave(len(self.place))
        gain = torch.baddbmm(energy, contrast, sums, beta=-1, alpha=2).amax(1)
        gain, template = gain.unflatten(1, (len(self.mass), -1)).max(1)  # [B, places]
        radius = self.radius[template]
        places = []
        for _ in range(self.number):
            best = gain.argmax(-1, keepdim=True)
            places.append(self.place[best])
            away = (self.place - places[-1]).abs().amax(-1)
            gain = gain.masked_fill(away < 0.9 * (radius + radius.gather(1, best)), -torch.inf)
        return torch.cat(places, 1)

    def _refine(self, padded: Tensor, contrast: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Best gain of each (colour, shape) about each place ``[B, number, 6, 4]``, and which shift and radius has
        it."""
        windows = padded.unfold(2, self.width, 1).unfold(3, self.width, 1)
        rows = torch.arange(len(padded), device=padded.device)[:, None]
        x, y = (place - self.edge).unbind(-1)
        sums = windows[rows, :, y, x].flatten(3) @ self.fine  # [B, number, rgb, templates]
        energy = contrast.square().sum(-1)[:, None, :, None] * self.fine_mass
        gains, variant = (2 * contrast[:, None] @ sums - energy).unflatten(-1, (len(SHAPES), -1)).max(-1)
        return gains, variant


class Verifier(nn.Module):
    """A reader of pictures by least squares; it has no learned weights.

    A picture is explained twice, by one large object and by up to `SLOTS` small ones, each of a colour, a shape, a
    place and a radius, on the background nearest to the median of its pixels; the explanation that leaves the smaller
    squared error is what it shows. What is left lowers its clarity, so that noise, blur, ghosts and anything else
    that no scene has drive the score to 0.

    Args:
        temperature: share of an object's energy by which two of its readings must differ for odds of e.
        least: share of its energy |a|² |d|² that an object must gain to be there; one that has faded to the share c
            of its contrast gains 2c − 1.
        noise: mean squared error of pixels ...
        ghost: ... and squared distance of a colour, averaged over 5 × 5 pixels, that a scene may leave.
    """

    palette: Tensor
    colours: Tensor
    directions: Tensor

    def __init__(self, temperature: float = 0.01, least: float = 0.3, noise: float = 0.012, ghost: float = 0.1) -> None:
        super().__init__()
        self.noise, self.ghost = noise, ghost
        self.one = _Search((7.5, 9.0, 10.5), 1, temperature, least)
        self.several = _Search((4.0, 5.0, 6.0), SLOTS, temperature, least)
        for name, words in (("palette", BACKGROUNDS), ("colours", COLOURS), ("directions", RELATIONS)):
            self.register_buffer(name, torch.tensor(list(words.values())).float(), persistent=False)

    def forward(self, images: Tensor) -> Reading:
        """Read pictures.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], any floating dtype and device; other sizes than 32 are
                resampled by area.

        Returns:
            What they show, float32, on the verifier's device.

        Raises:
            ValueError: if the images are not floating ``[B, 3, H, W]``.
        """
        x = resample(images, self.palette)
        median = x.flatten(2).median(-1).values
        background = (median[:, None] - self.palette).square().sum(-1).argmin(-1)
        empty = self.palette[background]
        y, contrast = x - empty[..., None, None], self.colours - empty[:, None]
        one, several = self.one(y, contrast), self.several(y, contrast)
        large = one[-1].square().sum((1, 2, 3)) < several[-1].square().sum((1, 2, 3))
        objects, centre, rest = (
            torch.where(large.view(-1, *[1] * (few.ndim - 1)), few, many)
            for few, many in zip(one, several, strict=True)
        )
        ghost = F.avg_pool2d(rest, 5, stride=1).square().sum(1).amax((1, 2))
        excess = rest.square().mean((1, 2, 3)) / self.noise + ghost / self.ghost
        clarity = (-excess.square()).exp()
        return Reading(background, objects, centre, clarity)

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """How far each picture shows its own caption: ``[B]`` float32 in [0, 1].

        The clarity times the mean over what the caption states: the background (if there is any object), the colours,
        the shapes, the count (the smaller over the larger number) and the relation (as far as the two objects are
        the right ones). Of equal objects colour and shape count as far as the count is right.

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of pictures and captions differ.
        """
        wanted = self._wanted(images, captions)
        reading = self(images)
        parts = self._parts(reading, wanted)
        related = wanted[:, 1] >= 0
        number = torch.where(related, 1, parts["count"])
        looks = parts["colour"] + parts["shape"]
        total = parts["background"] * reading.exists.any(-1) + looks * number + parts["count"]
        total = torch.where(related, (total + parts["relation"] * looks / 2) / 5, total / 4)
        return reading.clarity * total

    def correct(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Which parts of the captions are right.

        Returns:
            ``[B]`` booleans under "background", "colour" and "shape" (of both related objects, or of all that there
            are), "count" (of all that there are), "relation" (true where the caption states none) and "all" (all of
            them, in a picture whose clarity is above 1/e).

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of pictures and captions differ.
        """
        wanted = self._wanted(images, captions)
        reading = self(images)
        flat = reading.objects.flatten(2)
        likeliest = F.one_hot(flat.argmax(-1), flat.shape[-1]) * reading.exists[..., None]
        certain = Reading(reading.background, likeliest.view_as(reading.objects), reading.centre, reading.clarity)
        right = {name: share > 1 - 1e-6 for name, share in self._parts(certain, wanted).items()}
        return right | {"all": torch.stack([*right.values(), reading.clarity > torch.e**-1]).all(0)}

    def _parts(self, reading: Reading, wanted: Tensor) -> dict[str, Tensor]:
        """Share ``[B]`` of each part of the captions that is right."""
        relation, things = wanted[:, 1], wanted[:, 2:].unflatten(1, (MAX_OBJECTS, 2))
        exists = reading.exists
        seen, number = exists.sum(-1), (things[..., 0] >= 0).sum(-1)
        most = torch.maximum(seen, number)
        rows = torch.arange(len(wanted), device=wanted.device)
        # Of each slot, the probability that it has the colour, or the shape, of the first and of the second object.
        colour, shape = (
            [marginal[rows, :, things[:, i, part].clamp(min=0)] for i in range(2)]
            for part, marginal in enumerate((reading.objects.sum(-1), reading.objects.sum(-2)))
        )
        # Related objects are the two slots [B, i, j] that fit the caption best.
        away = reading.centre[:, :, None] - reading.centre[:, None]
        direction = self.directions[relation.clamp(min=0)][:, None, None]
        along, across = (away * direction).sum(-1), (away * direction.flip(-1)).sum(-1).abs()
        holds = ((along > across) & exists[:, :, None] & exists[:, None]).float()
        both_colours, both_shapes = ((first[:, :, None] + second[:, None]) / 2 for first, second in (colour, shape))
        fit = both_colours + both_shapes + holds / 2
        fit = fit.masked_fill(torch.eye(SLOTS, dtype=torch.bool, device=fit.device), -1).flatten(1)
        pair = fit.argmax(-1, keepdim=True)
        related = relation >= 0

        def either(pairs: Tensor, equal: Tensor) -> Tensor:
            return torch.where(related, pairs.flatten(1).gather(1, pair)[:, 0], equal)

        return {
            "background": (reading.background == wanted[:, 0]).float(),
            "colour": either(both_colours, colour[0].sum(-1) / seen.clamp(min=1)),
            "shape": either(both_shapes, shape[0].sum(-1) / seen.clamp(min=1)),
            "count": torch.minimum(seen, number) / most,
            "relation": either(holds, torch.ones_like(fit[:, 0])),
        }

    def _wanted(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}.")
        return encode(captions).to(self.palette.device)
