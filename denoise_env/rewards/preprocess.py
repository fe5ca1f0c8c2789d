"""What published image processors do to a picture before a network sees it, on batches of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FRACTION_BITS = 22  # of Pillow's fixed-point coefficients

Filter = Literal["bilinear", "bicubic"]


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


_FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {"bilinear": (1, _triangle), "bicubic": (2, _cubic)}


@lru_cache(maxsize=64)
def _coefficients(source: int, target: int, name: Filter, device: torch.device) -> Tensor:
    """Pillow's fixed-point weights of ``source`` pixels in each of ``target``: ``[target, source]``, whole float64."""
    support, function = _FILTERS[name]
    scale = source / target
    stretch = max(scale, 1.0)  # shrinking widens the filter
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(source, dtype=torch.float64)
    first = (centre - support * stretch + 0.5).trunc().clamp(min=0)
    end = (centre + support * stretch + 0.5).trunc().clamp(max=source)
    weights = function((pixel - centre + 0.5) / stretch) * ((pixel >= first) & (pixel < end))
    weights = weights / weights.sum(1, keepdim=True) * 2**FRACTION_BITS
    return (weights.abs() + 0.5).floor().mul(weights.sign()).to(device)


def to_levels(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the 8-bit levels that a saved file holds: whole numbers 0..255, in float."""
    return images.mul(255).round().clamp(0, 255)


def resize(levels: Tensor, size: tuple[int, int], name: Filter = "bicubic") -> Tensor:
    """Resize 8-bit pictures as Pillow's ``Image.resize`` does, bit for bit, on any device that has float64.

    Args:
        levels: ``[b, 3, H, W]``, whole numbers 0..255.
        size: height and width afterwards.
        name: the filter.

    Returns:
        ``[b, 3, *size]`` float32, whole numbers 0..255.
    """
    levels = levels.double()  # sums of 8 bits x 22 bits: exact, in any order
    for axis, target in ((-1, size[1]), (-2, size[0])):
        if levels.shape[axis] != target:
            weights = _coefficients(levels.shape[axis], target, name, levels.device)
            levels = levels @ weights.T if axis == -1 else weights @ levels
            levels = levels.div(2**FRACTION_BITS).add(0.5).floor().clamp(0, 255)
    return levels.float()


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(pixels - mean) / std, by channel."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def pad(pixels: Tensor, size: tuple[int, int], value: float = 0.0) -> Tensor:
    """Pad to ``size`` around the centre; of an odd number of lines the last side gets one more."""
    height, width = (target - have for target, have in zip(size, pixels.shape[-2:], strict=True))
    sides = (width // 2, width - width // 2, height // 2, height - height // 2)
    return torch.nn.functional.pad(pixels, sides, value=value)


@dataclass(frozen=True)
class Preprocess:
    """An image processor of open_clip or transformers (its Pillow backend): round to 8 bits, resize, crop, normalise.

    The resized levels are equal to the processor's own, and the normalised values to within float32 rounding (1e-6).

    Args:
        size: the network's height and width.
        mode: what meets the size: both sides ("squash"), the shorter one, the longer side being cropped ("shortest"),
            or the longer one, the shorter side being padded ("longest").
        mean: subtracted from each channel of [0, 1].
        std: that it is divided by.
        filter: how pixels are interpolated.
        crop: where the crop begins when an odd number of lines goes: the nearest even ("round", torchvision) or the
            first half ("floor", transformers).
        fill: level of the padding.
    """

    size: tuple[int, int]
    mode: Literal["squash", "shortest", "longest"] = "shortest"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    filter: Filter = "bicubic"
    crop: Literal["round", "floor"] = "round"
    fill: float = 0.0

    def __post_init__(self) -> None:
        if self.mode == "shortest" and self.size[0] != self.size[1]:
            raise ValueError(f"a crop to {list(self.size)} is not supported: it must be square")

    @classmethod
    def of_open_clip(cls, config: dict[str, Any]) -> "Preprocess":
        """That of an open_clip model's ``visual.preprocess_cfg``."""
        size = config["size"]
        return cls(
            (size, size) if isinstance(size, int) else tuple(size),
            config["resize_mode"] or "shortest",
            tuple(config["mean"]),
            tuple(config["std"]),
            "bilinear" if config["interpolation"] == "bilinear" else "bicubic",
            fill=config["fill_color"],
        )

    @classmethod
    def of_transformers(cls, processor: Any) -> "Preprocess":
        """That of an image processor of transformers.

        Raises:
            ValueError: one that does something else.
        """
        filters: dict[int, Filter] = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them
        size, crop = (dict(getattr(processor, key, None) or {}) for key in ("size", "crop_size"))
        size, crop = ({key: value for key, value in each.items() if value is not None} for each in (size, crop))
        cropped = getattr(processor, "do_center_crop", None) or False
        edge, target = size.get("shortest_edge"), (crop.get("height"), crop.get("width"))
        squash = set(size) == {"height", "width"} and (not cropped or size == crop)
        shortest = set(size) == {"shortest_edge"} and cropped and target == (edge, edge)
        if (
            not (squash or shortest)
            or not (processor.do_resize and processor.do_rescale and processor.do_normalize)
            or processor.resample not in filters
            or abs(processor.rescale_factor * 255 - 1) > 1e-6
        ):
            raise ValueError(f"what this {type(processor).__name__} does is not supported: {processor.to_dict()}")
        return cls(
            (size["height"], size["width"]) if squash else (size["shortest_edge"],) * 2,
            "squash" if squash else "shortest",
            tuple(processor.image_mean),
            tuple(processor.image_std),
            filters[processor.resample],
            crop="floor",
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Turn pictures ``[b, 3, H, W]`` in [0, 1] into the network's input ``[b, 3, *size]``."""
        levels = to_levels(images)
        height, width = levels.shape[-2:]
        if self.mode == "squash":
            levels = resize(levels, self.size, self.filter)
        elif self.mode == "longest":
            ratio = max(height / self.size[0], width / self.size[1])
            levels = resize(levels, (round(height / ratio), round(width / ratio)), self.filter)
            levels = pad(levels, self.size, self.fill)
        else:
            edge, short = self.size[0], min(height, width)
            height, width = (edge if side == short else int(edge * side / short) for side in (height, width))
            levels = resize(levels, (height, width), self.filter)
            top, left = (
                round(extra / 2) if self.crop == "round" else extra // 2 for extra in (height - edge, width - edge)
            )
            levels = levels[..., top : top + edge, left : left + edge]
        return normalize(levels / 255, self.mean, self.std)
