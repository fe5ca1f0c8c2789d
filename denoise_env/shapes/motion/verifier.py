"""Reads a clip back and says which parts of its caption are right: how the object looks, and how it moves."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.motion.grammar import MOTIONS, SPEEDS
from denoise_env.shapes.motion.renderer import BOUNCES, FRAMES, TURNS, encode
from denoise_env.shapes.renderer import BASE_SIZE, coverage
from denoise_env.shapes.verifier import resample

_REACHES = (1.0, -1.0, 0.5, -0.5)
"""Pixels over which slopes are taken, step by step, outwards and inwards in turn: a mask has slopes at its rim only."""


@dataclass(frozen=True)
class Reading:
    """What B clips show.

    Attributes:
        background: ``[B, F]`` place in `BACKGROUNDS` of each frame's.
        colour: ``[B, F, 6]`` and ...
        shape: ``[B, F, 4]`` probabilities of each frame's object.
        path: ``[B, F, 3]`` x, y and width of the object, twice its radius, in pixels of a 32-pixel picture.
        clarity: ``[B, F]`` in [0, 1]: 1 where background and object are the whole frame, below 1/e where they leave
            more unexplained than a scene may, 0 where there is no object.
        motion: ``[B, 10]`` probabilities, in the order of `MOTIONS`; the rest to 1 is for none of them.
        speed: ``[B]`` pixels from one frame to the next, of the likeliest motion.
        smoothness: ``[B]`` in [0, 1]: 1 where the path is straight and even, or turns back once.
    """

    background: Tensor
    colour: Tensor
    shape: Tensor
    path: Tensor
    clarity: Tensor
    motion: Tensor
    speed: Tensor
    smoothness: Tensor


class Verifier(nn.Module):
    """A reader of clips by least squares; it has no learned weights.

    Every frame is a background, the nearest to the median of its border, and one object: of the colour that leaves
    the least squared error, of the shape, place and radius whose rendered mask does, found on a grid and then between
    its points. What that leaves lowers the frame's clarity, so that noise, blur and a second object drive the scores
    to 0. The motion is a fit of the ten motions to the path, the frames weighed by their clarity.

    Args:
        temperature: share of an object's energy by which two of its readings must differ for odds of e.
        least: share of its energy that an object must take off the squared error to be there.
        noise: mean squared error of pixels ...
        ghost: ... and squared distance of a colour, averaged over 5 × 5 pixels, that a frame may leave.
        wobble: mean squared distance in pixels from a path by which two motions must differ for odds of e.
        lost: mean squared distance from every motion's path that none of them is taken to have, and by which a path
            that is neither straight nor turns back once is smooth by 1/e.
    """

    backgrounds: Tensor
    contrast: Tensor
    masks: Tensor
    mass: Tensor
    places: Tensor
    ways: Tensor
    curves: Tensor
    fits: Tensor
    speeds: Tensor

    def __init__(
        self,
        temperature: float = 0.02,
        least: float = 0.3,
        noise: float = 0.012,
        ghost: float = 0.1,
        wobble: float = 0.25,
        lost: float = 1.0,
    ) -> None:
        super().__init__()
        self.temperature, self.least, self.noise, self.ghost = temperature, least, noise, ghost
        self.wobble, self.lost = wobble, lost
        backgrounds = torch.tensor(list(BACKGROUNDS.values()))
        axis, radii = torch.arange(3.0, BASE_SIZE - 2, 2), torch.arange(4.5, 13, 2)
        places = torch.cartesian_prod(axis, axis, radii)
        masks = torch.stack([coverage(shape, places[:, :2], places[:, 2]).flatten(1) for shape in SHAPES])
        time = torch.arange(FRAMES)
        turns = torch.arange(TURNS[0], TURNS[1] + 0.1, 0.25)
        curves = torch.cat([time[None], -(time - turns[:, None]).abs()])
        bounces = torch.tensor(BOUNCES)
        for name, value in {
            "backgrounds": backgrounds,
            "contrast": torch.tensor(list(COLOURS.values())) - backgrounds[:, None],  # [3, 6, rgb]
            "masks": masks.flatten(0, 1).T.contiguous(),  # [pixels, shapes · places]
            "mass": masks.square().sum(-1),
            "places": places,
            "ways": torch.tensor(list(MOTIONS.values())).float(),
            "curves": curves,
            "fits": (torch.arange(len(curves)) > 0)[:, None] == bounces,  # [curves, motions]
            "speeds": torch.tensor(list(SPEEDS.values())),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, clips: Tensor) -> Reading:
        """Read clips.

        Args:
            clips: ``[B, FRAMES, 3, H, W]`` in [0, 1], any floating dtype and device; other sizes than 32 are
                resampled by area.

        Returns:
            What they show, float32, on the verifier's device.

        Raises:
            ValueError: if the clips are not floating ``[B, FRAMES, 3, H, W]``.
        """
        if clips.ndim != 5 or clips.shape[1:3] != (FRAMES, 3) or not clips.is_floating_point():
            raise ValueError(
                f"clips must be a floating tensor [B, {FRAMES}, 3, H, W] in [0, 1], "
                f"not {clips.dtype} of shape {list(clips.shape)}."
            )
        background, colour, shape, path, clarity = (
            part.unflatten(0, clips.shape[:2]) for part in self._look(resample(clips.flatten(0, 1), self.backgrounds))
        )
        return Reading(background, colour, shape, path, clarity, *self._follow(path, clarity))

    def _look(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`Reading.background` to `Reading.clarity` of frames ``[N, 3, 32, 32]``."""
        border = torch.cat([frames[:, :, [0, -1]].flatten(2), frames[:, :, 1:-1, [0, -1]].flatten(2)], -1)
        background = (border.median(-1).values[:, None] - self.backgrounds).square().sum(-1).argmin(-1)
        y = (frames - self.backgrounds[background][..., None, None]).flatten(2)
        contrast = self.contrast[background]
        energy = contrast.square().sum(-1)
        alphas = contrast @ y / energy[..., None]  # [N, 6, pixels]
        told = (2 * alphas - alphas.clamp(0, 1)) * alphas.clamp(0, 1)
        explained = energy * told.sum(-1)
        total = y.square().sum((1, 2))
        colours = (explained / (self.temperature * total[:, None].clamp(min=1e-6))).softmax(-1)
        rows, best = torch.arange(len(y), device=y.device), explained.argmax(-1)
        alpha, paint = alphas[rows, best], contrast[rows, best]
        gains, objects, masks = self._fit(alpha)
        mass = masks.square().sum(-1)
        gain, likeliest = gains.max(-1)
        shapes = (gains / (self.temperature * mass.amax(-1, keepdim=True).clamp(min=1e-6))).softmax(-1)
        mask = masks[rows, likeliest]
        rest = (y - paint[..., None] * mask[:, None]).unflatten(-1, (BASE_SIZE, BASE_SIZE))
        ghost = F.avg_pool2d(rest, 5, stride=1).square().sum(1).amax((1, 2))
        excess = rest.square().mean((1, 2, 3)) / self.noise + ghost / self.ghost
        exists = gain > self.least * mass[rows, likeliest]
        return background, colours, shapes, objects[rows, likeliest], (-excess.square()).exp() * exists

    def _fit(self, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best object of each shape for coverages ``[N, pixels]``.

        Returns:
            What it takes off the squared error ``[N, 4]``, its x, y and width ``[N, 4, 3]`` and its mask
            ``[N, 4, pixels]``.
        """
        grid = 2 * (alpha @ self.masks).unflatten(-1, self.mass.shape) - self.mass
        place = self.places[grid.argmax(-1)]  # [N, shapes, (x, y, radius)]
        found = [self._refine(alpha, shape, place[:, i]) for i, shape in enumerate(SHAPES)]
        gains, objects, masks = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
        return gains, objects, masks

    def _refine(self, alpha: Tensor, shape: str, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gauss-Newton steps from places ``[N, 3]``, x, y and radius, of one shape."""
        for reach in _REACHES:
            shifts = reach * torch.cat([torch.zeros_like(place[:1]), torch.eye(3, device=place.device)])
            near = (place[:, None] + shifts).flatten(0, 1)
            masks = coverage(shape, near[:, :2], near[:, 2]).flatten(1).unflatten(0, (-1, 4))
            slopes = (masks[:, 1:] - masks[:, :1]) / reach  # [N, 3, pixels]
            normal = slopes @ slopes.mT + 0.1 * torch.eye(3, device=place.device)
            move = torch.linalg.solve(normal, slopes @ (alpha - masks[:, 0])[..., None])[..., 0]
            place = place + move.clamp(-1.5, 1.5)
        mask = coverage(shape, place[:, :2], place[:, 2]).flatten(1)
        gain = ((2 * alpha - mask) * mask).sum(-1)
        return gain, place * torch.tensor([1.0, 1.0, 2.0], device=place.device), mask

    def _follow(self, path: Tensor, clarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`Reading.motion`, `Reading.speed` and `Reading.smoothness` of paths."""
        weight = clarity / clarity.sum(-1, keepdim=True).clamp(min=1e-6)

        def centred(values: Tensor) -> Tensor:
            """Frames are the last but one dimension."""
            return values - (weight[..., None] * values).sum(-2, keepdim=True)

        away, curves = centred(path), centred(self.curves.T.expand(len(path), -1, -1))
        total = (weight * away.square().sum(-1)).sum(-1)
        spread = (weight[..., None] * curves.square()).sum(1).clamp(min=1e-6)  # [B, curves]
        slopes = (weight[..., None] * curves).mT @ away / spread[..., None]  # [B, curves, 3]
        along = slopes @ self.ways.T
        rate = along.clamp(self.speeds[0] / 2, self.speeds[-1] * 1.5)
        off = total[:, None, None] + spread[..., None] * (rate - 2 * along) * rate
        off, curve = off.masked_fill(~self.fits, torch.inf).min(1)  # [B, motions]
        none = torch.stack([total, torch.full_like(total, self.lost)], -1)
        motion = (torch.cat([off, none], -1) / -self.wobble).softmax(-1)[:, : len(self.ways)]
        best = motion.argmax(-1, keepdim=True)
        speed = rate.gather(1, curve[:, None]).squeeze(1).gather(1, best)[:, 0]
        rest = (total[:, None] - spread * slopes.square().sum(-1)).amin(-1)
        return motion, speed, (-rest.clamp(min=0) / self.lost).exp()

    def parts(self, clips: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """How far each part of the captions is right: ``[B]`` float32 in [0, 1] under each name.

        - "appearance": of background, colour and shape, in the frames as far as they are clear.
        - "direction": the probability of the caption's motion.
        - "speed": how near it is, exp(−(4 difference² / slowest speed²)), as far as there is a motion of any kind.
        - "consistency": how far neighbouring frames show one colour and shape (the Bhattacharyya coefficient of their
          probabilities), on a smooth path.

        The last three too count as far as the frames are clear.

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of clips and captions differ.
        """
        self._wanted(clips, captions)  # refuses what is wrong before the clips are read
        return self.compare(self(clips), captions)

    def compare(self, reading: Reading, captions: Sequence[str]) -> dict[str, Tensor]:
        """`parts` of B clips that have been read."""
        colour, shape, background, motion, speed = self._wanted(reading.speed, captions).unbind(-1)
        rows, clear = torch.arange(len(captions), device=colour.device), reading.clarity.mean(-1)
        looks = reading.colour[rows, :, colour] + reading.shape[rows, :, shape]
        looks = looks + (reading.background == background[:, None])
        error = (reading.speed - self.speeds[speed]) / self.speeds[0]
        same = torch.ones_like(reading.clarity[:, 1:])
        for part in (reading.colour, reading.shape):
            same = same * (part[:, 1:] * part[:, :-1]).sqrt().sum(-1)
        together = (reading.clarity[:, 1:] * reading.clarity[:, :-1]).sqrt()
        return {
            "appearance": (reading.clarity * looks / 3).mean(-1),
            "direction": clear * reading.motion[rows, motion],
            "speed": clear * reading.motion.sum(-1) * (-4 * error.square()).exp(),
            "consistency": reading.smoothness * (together * same).mean(-1),
        }

    def score(self, clips: Tensor, captions: Sequence[str]) -> Tensor:
        """How far each clip shows its own caption: ``[B]`` float32 in [0, 1].

        The consistency times the mean of appearance and motion, which is the direction, half of it as far as the speed
        is right: consistency · (appearance + direction · (1 + speed) / 2) / 2 of `parts`.

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of clips and captions differ.
        """
        return total(self.parts(clips, captions))

    def correct(self, clips: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Which parts of the captions are right.

        Returns:
            ``[B]`` booleans under "colour", "shape", "background" (the likeliest word over all frames is the
            caption's), "motion" (the likeliest of the ten), "speed" (the nearest) and "all" (all of them, in a clip
            that is clear, likelier to show this motion than none, each above 1/e, and smooth: its square above 1/e).

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of clips and captions differ.
        """
        wanted = self._wanted(clips, captions)
        reading = self(clips)
        seen = F.one_hot(reading.background, len(self.backgrounds))
        found = (
            reading.colour.mean(1).argmax(-1),
            reading.shape.mean(1).argmax(-1),
            seen.sum(1).argmax(-1),
            reading.motion.argmax(-1),
            (reading.speed[:, None] - self.speeds).abs().argmin(-1),
        )
        names = ("colour", "shape", "background", "motion", "speed")
        right = {name: word == place for name, word, place in zip(names, found, wanted.unbind(-1), strict=True)}
        sure = (
            torch.stack([reading.clarity.mean(-1), reading.smoothness.square(), reading.motion.amax(-1)]) > torch.e**-1
        )
        return right | {"all": torch.stack([*right.values(), *sure]).all(0)}

    def _wanted(self, clips: Tensor, captions: Sequence[str]) -> Tensor:
        if len(clips) != len(captions):
            raise ValueError(f"{len(clips)} clips need as many captions, not {len(captions)}.")
        return encode(captions).to(self.speeds.device)


def total(parts: dict[str, Tensor]) -> Tensor:
    """`Verifier.score` of `Verifier.parts`."""
    motion = parts["direction"] * (1 + parts["speed"]) / 2
    return parts["consistency"] * (parts["appearance"] + motion) / 2
