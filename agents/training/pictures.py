"""Pictures of samples."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 1  # white pixels between neighbours


def grid(images: torch.Tensor, columns: int, path: Path, scale: int | None = None) -> None:
    """Write uint8 ``[N, H, W, 3]`` as one PNG, ``columns`` pictures a row, small ones enlarged."""
    from PIL import Image

    scale = scale or max(1, 64 // images.shape[1])
    height, width = (size * scale for size in images.shape[1:3])
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for i, image in enumerate(images.numpy()):
        y, x = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
        sheet[y : y + height, x : x + width] = image.repeat(scale, 0).repeat(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def rows(path: Path, count: int) -> "list[Image]":
    """The ``count`` rows of a picture that `grid` wrote."""
    from PIL import Image

    with Image.open(path) as sheet:
        pitch = (sheet.height + _GAP) // count
        return [sheet.crop((0, i * pitch, sheet.width, (i + 1) * pitch - _GAP)) for i in range(count)]


def data_uri(image: "Image", widest: int = 1040) -> str:
    """A picture as text for a page: PNG, or a JPEG where it was wider than ``widest`` pixels and had to be shrunk."""
    buffer, kind = io.BytesIO(), "png" if image.width <= widest else "jpeg"
    if kind == "jpeg":
        image = image.resize((widest, max(1, image.height * widest // image.width)))
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
