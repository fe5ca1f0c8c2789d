"""Pictures of samples."""

from pathlib import Path

import numpy as np
import torch


def grid(images: torch.Tensor, columns: int, path: Path, scale: int | None = None) -> None:
    """Write uint8 ``[N, H, W, 3]`` as one PNG, ``columns`` pictures a row, small ones enlarged."""
    from PIL import Image

    height, width = images.shape[1:3]
    scale = scale or max(1, 64 // height)
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images.numpy()):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    size = (sheet.shape[1] * scale, sheet.shape[0] * scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(path)
