"""Pictures of samples: still ones, and of clips such as move."""

import base64
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 1  # white pixels between neighbours
_FILM = 6
"""The most frames of a clip that are shown one below the other."""
MOVING = {".webp": "WebP", ".gif": "GIF", ".png": "PNG", ".mp4": "MP4"}
"""The endings of files that can hold clips; browsers play such a PNG, and other programs show its first frame."""


def grid(samples: torch.Tensor, columns: int, path: Path, scale: int | None = None, frame_rate: float = 8.0) -> None:
    """Write samples as one picture, ``columns`` of them a row, small ones enlarged.

    Args:
        samples: uint8 images ``[N, H, W, 3]``; or clips ``[N, F, H, W, 3]``, which make a picture that moves for ever.
        columns: samples a row.
        path: the file; of clips its ending must be in `MOVING`, and ".mp4" needs the extra "video".
        scale: how often each pixel is repeated along both axes; default: small samples are enlarged.
        frame_rate: frames a second of clips.

    Raises:
        ValueError: as in `check_picture`.
    """
    check_picture(path, "clips" if samples.ndim == 5 else "images")
    frames = [_sheet(images, columns, scale) for images in (samples.unbind(1) if samples.ndim == 5 else [samples])]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".mp4":
        _write_mp4(frames, path, frame_rate)
    else:
        save_frames(frames, path, 1000 / frame_rate)


def check_picture(path: Path, shows: Literal["images", "clips"]) -> None:
    """Raise a ``ValueError`` for a file that cannot hold what it shows, or whose package is not installed."""
    ending = path.suffix.lower()
    if shows == "clips" and ending not in MOVING:
        raise ValueError(f"{path} cannot hold clips: a file that moves ends in one of {list(MOVING)}")
    if ending == ".mp4" and shows == "images":
        raise ValueError(f"{path} is for clips, and these are images: let it end in .png")
    if ending == ".mp4" and importlib.util.find_spec("moviepy") is None:
        raise ValueError(f"{path} needs the package moviepy: pip install 'denoise-env[video]'")


def rows(path: Path, count: int) -> "list[list[Image]]":
    """The ``count`` rows of a picture that `grid` wrote, each with its frames: of a still picture one."""
    frames = read_frames(path)
    pitch = (frames[0].height + _GAP) // count
    boxes = [(0, i * pitch, frames[0].width, (i + 1) * pitch - _GAP) for i in range(count)]
    return [[frame.crop(box) for frame in frames] for box in boxes]


def read_frames(path: Path) -> "list[Image]":
    """The frames of a picture: of a still one, one."""
    from PIL import Image, ImageSequence

    with Image.open(path) as picture:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]


def film(frames: "Sequence[Image]") -> "Image":
    """Frames as one still picture, from the first to the last downwards; of many, some that are evenly spaced."""
    places = np.linspace(0, len(frames) - 1, min(len(frames), _FILM)).round().astype(int)
    return _column([frames[i] for i in places])


def _column(pictures: "Sequence[Image]") -> "Image":
    """Pictures of one size, one below the other."""
    from PIL import Image

    pitch = pictures[0].height + _GAP
    sheet = Image.new("RGB", (pictures[0].width, pitch * len(pictures) - _GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (0, i * pitch))
    return sheet


def data_uri(frames: "Sequence[Image]", widest: int = 1040) -> str:
    """Frames as text for a page: a PNG of one, a WebP that moves of several.

    What is wider than ``widest`` pixels is shrunk, and one frame is then a JPEG.
    """
    first, kind = frames[0], "webp" if len(frames) > 1 else "png"
    if first.width > widest:
        size = (widest, max(1, first.height * widest // first.width))
        frames, kind = [frame.resize(size) for frame in frames], "jpeg" if kind == "png" else kind
    buffer = io.BytesIO()
    save_frames(frames, buffer, milliseconds(first), kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gif(frames: "Sequence[Image]") -> bytes:
    """Frames that `read_frames` read as the bytes of a GIF."""
    buffer = io.BytesIO()
    save_frames(frames, buffer, milliseconds(frames[0]), "gif")
    return buffer.getvalue()


def milliseconds(frame: "Image") -> float:
    """How long a frame that was read is shown."""
    return float(frame.info.get("duration", 125))


def _sheet(images: torch.Tensor, columns: int, scale: int | None) -> "Image":
    from PIL import Image

    scale = scale or max(1, 64 // images.shape[1])
    height, width = (size * scale for size in images.shape[1:3])
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for i, image in enumerate(images.numpy()):
        y, x = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
        sheet[y : y + height, x : x + width] = image.repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


def save_frames(
    frames: "Sequence[Image]",
    file: "Path | io.BytesIO",
    duration: float,
    kind: str | None = None,
    lossless: bool = True,
) -> None:
    """Write frames as a picture, of several one that moves for ever, each shown so many milliseconds.

    ``kind`` is the format, where the file's name does not tell it. A WebP that is not lossless is a sixth as large.
    """
    first, *others = frames
    moving = {"save_all": True, "append_images": others, "duration": round(duration), "loop": 0}
    if kind == "webp" or (isinstance(file, Path) and file.suffix.lower() == ".webp"):
        moving["lossless"] = lossless
    first.save(file, kind, **(moving if others else {}))


def _write_mp4(frames: "Sequence[Image]", path: Path, frame_rate: float) -> None:
    from moviepy import ImageSequenceClip

    pictures = [np.asarray(frame) for frame in frames]
    odd = [(0, size % 2) for size in pictures[0].shape[:2]]  # the codec wants even sizes
    padded = [np.pad(picture, (*odd, (0, 0)), constant_values=255) for picture in pictures]
    ImageSequenceClip(padded, fps=frame_rate).write_videofile(str(path), logger=None, audio=False)
