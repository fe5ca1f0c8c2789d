"""Pictures in JSON: as base64 of a PNG, or of raw float32 values."""

import base64
import io
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denoise_env.rewards.base import pixels


class TooLargeError(ValueError):
    """More pixels than are allowed."""


def to_uint8(images: Tensor) -> np.ndarray:
    """Images ``[..., 3, H, W]`` in [0, 1], rounded to 8 bits: ``[..., H, W, 3]``."""
    return pixels(images.detach()).numpy()


def encode_png(pixels: np.ndarray, size: int | None = None) -> str:
    """Base64 of the PNG of uint8 ``[H, W, 3]``, resized to a square of ``size`` where it is given (bicubic, PIL's)."""
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    image.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getbuffer()).decode()


def encode_float(image: Tensor) -> dict[str, Any]:
    """``[3, H, W]`` as ``{"shape": [3, H, W], "float32": base64}``, little-endian and in C order."""
    values = image.detach().cpu().numpy().astype("<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(values.tobytes()).decode()}


def decode(value: Any, most: int) -> Tensor:
    """The image of either form: ``[3, H, W]``, uint8 of a PNG, float32 in [0, 1] of raw values.

    Args:
        value: what `encode_png` or `encode_float` returned, or anything else.
        most: bytes that the tensor may take.

    Raises:
        TooLargeError: it would take more.
        ValueError: it is neither form.
    """
    if isinstance(value, dict):
        return _decode_float(value, most)
    return _decode_png(_bytes(value), most)


def _decode_png(data: bytes, most: int) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            if 3 * width * height > most:
                raise TooLargeError(f"an image of {width}x{height} is too large here")
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits a channel")
            pixels = np.array(image.convert("RGB"))
    except TooLargeError:
        raise
    except Exception as error:  # a broken file raises anything, SyntaxError included
        raise ValueError(f"it is no PNG that can be read: {type(error).__name__}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_float(value: dict[str, Any], most: int) -> Tensor:
    shape = value.get("shape")
    if not (isinstance(shape, list) and len(shape) == 3 and shape[0] == 3 and all(type(n) is int for n in shape)):
        raise ValueError("the shape of float values must be [3, H, W]")
    if min(shape) < 1 or 4 * math.prod(shape) > most:
        raise TooLargeError(f"float values of the shape {shape!r:.60} are too many or none")
    data = _bytes(value.get("float32"))
    if len(data) != 4 * math.prod(shape):
        raise ValueError(f"float values of the shape {shape} take {4 * math.prod(shape)} bytes, not {len(data)}")
    values = np.frombuffer(data, "<f4").reshape(shape)
    if not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):  # NaN too
        raise ValueError("float values must lie in [0, 1]")
    return torch.from_numpy(values.astype(np.float32))


def _bytes(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("an image must be a base64 string, or {shape, float32}")
    try:
        return base64.b64decode(value, validate=True)
    except ValueError as error:
        raise ValueError(f"it is not base64: {error}") from None
