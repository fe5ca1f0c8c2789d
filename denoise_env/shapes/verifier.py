"""Reads a picture back and says which attributes of its caption are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES, parse
from denoise_env.shapes.renderer import BASE_SIZE, mask_grid


def resample(images: Tensor, like: Tensor) -> Tensor:
    """Pictures as ``[B, 3, 32, 32]`` of another tensor's dtype and device; other sizes than 32 are averaged by area.

    Raises:
        ValueError: if the images are not floating ``[B, 3, H, W]``.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be a floating tensor [B, 3, H, W] in [0, 1], "
            f"not {images.dtype} of shape {list(images.shape)}."
        )
    x = images.to(like)
    return x if x.shape[-2:] == (BASE_SIZE, BASE_SIZE) else F.interpolate(x, size=(BASE_SIZE, BASE_SIZE), mode="area")


@dataclass(frozen=True)
class Reading:
    """Posterior over what B pictures show.

    Attributes:
        joint: ``[B, 6, 4, 3]`` probability of each (colour, shape, background); with `none` it sums to 1.
        none: ``[B]`` probability that the picture shows no scene.
    """

    joint: Tensor
    none: Tensor

    @property
    def colour(self) -> Tensor:
        """``[B, 6]`` marginal probabilities, in the order of `COLOURS`."""
        return self.joint.sum((2, 3))

    @property
    def shape(self) -> Tensor:
        """``[B, 4]`` marginal probabilities, in the order of `SHAPES`."""
        return self.joint.sum((1, 3))

    @property
    def background(self) -> Tensor:
        """``[B, 3]`` marginal probabilities, in the order of `BACKGROUNDS`."""
        return self.joint.sum((1, 2))


class Verifier(nn.Module):
    """A Bayesian reader of pictures; it has no learned weights.

    A scene is a · colour + (1 − a) · background for a coverage mask a. For every scene the verifier takes the
    least mean squared error over a grid of masks, and its posterior goes as exp(−error / temperature).
    "None of these" competes as an empty background and as junk of a constant error, so blur, noise and empty
    pictures drive every scene's probability to 0.

    Args:
        temperature: mean squared error by which two scenes must differ for odds of e.
        none_error: mean squared error that junk is taken to have; a scene must be nearer than that.
    """

    masks: Tensor
    backgrounds: Tensor
    contrast: Tensor
    offset: Tensor

    def __init__(self, temperature: float = 0.002, none_error: float = 0.012) -> None:
        super().__init__()
        self.temperature = temperature
        self.none_error = none_error
        grids = [mask_grid(shape).flatten(1) for shape in SHAPES]
        self._counts = [len(grid) for grid in grids]
        masks = torch.cat(grids).T.contiguous()  # [pixels, M]
        backgrounds = torch.tensor(list(BACKGROUNDS.values()))
        contrast = torch.tensor(list(COLOURS.values()))[:, None] - backgrounds  # [6, 3, rgb]
        offset = 2 * (contrast * backgrounds).sum(-1)[..., None] * masks.sum(0)
        offset += contrast.square().sum(-1)[..., None] * masks.square().sum(0)
        self.register_buffer("masks", masks, persistent=False)
        self.register_buffer("backgrounds", backgrounds, persistent=False)
        self.register_buffer("contrast", contrast.flatten(0, 1), persistent=False)
        self.register_buffer("offset", offset.flatten(0, 1), persistent=False)  # [18, M]

    def errors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Least mean squared error of each scene over all places and sizes, and of each empty background.

        With d = colour − background, y = image − background and mask a, the error is the mean of
        |y|² − 2 a d·y + a² |d|²; only the channel sums of a · image depend on both picture and mask.

        Returns:
            ``[B, 6, 4, 3]`` and ``[B, 3]`` float32.

        Raises:
            ValueError: if the images are not floating ``[B, 3, H, W]``.
        """
        x = resample(images, self.masks).flatten(2)
        empty = (x[:, None] - self.backgrounds[:, :, None]).square().mean((2, 3))  # [B, 3]
        sums = x @ self.masks  # [B, rgb, M]
        excess = torch.baddbmm(self.offset[None], self.contrast.expand(len(x), -1, -1), sums, alpha=-2)
        best = torch.stack([part.amin(-1) for part in excess.split(self._counts, dim=-1)], dim=-1)
        best = best.unflatten(1, (len(COLOURS), len(BACKGROUNDS))).transpose(2, 3) / (3 * x.shape[-1])
        return (empty[:, None, None] + best).clamp(min=0), empty

    def forward(self, images: Tensor) -> Reading:
        """Read pictures.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], any floating dtype and device; other sizes than 32 are
                resampled by area.

        Returns:
            The posterior over scenes, float32, on the verifier's device.

        Raises:
            ValueError: if the images are not floating ``[B, 3, H, W]``.
        """
        errors, empty = self.errors(images)
        none = empty.amin(-1, keepdim=True).clamp(max=self.none_error)
        posterior = (torch.cat([errors.flatten(1), none], dim=-1) / -self.temperature).softmax(-1)
        return Reading(posterior[:, :-1].view_as(errors), posterior[:, -1])

    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Posterior probability of each picture's own caption: ``[B]`` float32 in [0, 1].

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of pictures and captions differ.
        """
        rows, wanted = self._wanted(images, captions)
        return self(images).joint[rows, *wanted]

    def correct(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Which attributes are right.

        Returns:
            ``[B]`` booleans under "colour", "shape", "background" (the likeliest word is the caption's) and
            "all" (all three are, and "none" is not the likeliest reading).

        Raises:
            ValueError: if a caption is not of the grammar, or the numbers of pictures and captions differ.
        """
        _, (colour, shape, background) = self._wanted(images, captions)
        reading = self(images)
        right = {
            "colour": reading.colour.argmax(-1) == colour,
            "shape": reading.shape.argmax(-1) == shape,
            "background": reading.background.argmax(-1) == background,
        }
        seen = reading.joint.flatten(1).amax(-1) > reading.none
        return right | {"all": right["colour"] & right["shape"] & right["background"] & seen}

    def _wanted(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images need as many captions, not {len(captions)}.")
        device = self.masks.device
        index = torch.tensor([parse(text).indices for text in captions], dtype=torch.long, device=device)
        index = index.reshape(-1, 3)
        return torch.arange(len(index), device=device), (index[:, 0], index[:, 1], index[:, 2])
