"""Prompts, each a text with what belongs to it."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    ImageSource = str | os.PathLike[str] | Image | np.ndarray | Tensor


@dataclass(frozen=True, init=False, eq=False, repr=False)
class PromptImage:
    """An RGB image; equal pixels are equal images, wherever they come from.

    One made from a path keeps the path and the digest of its pixels and reads the file again when they are asked
    for, so that many first frames take no memory. One made from memory keeps a copy of its pixels.

    Args:
        source: a path, a PIL image, a uint8 array ``[H, W, 3]``, or a tensor ``[3, H, W]``, uint8 or float in
            [0, 1]. A file or PIL image is turned as its EXIF orientation says, and loses its transparency.

    Attributes:
        path: absolute; ``None`` for an image from memory.
        size: width and height in pixels.
        digest: digest of the size and the pixels, 32 hexadecimal digits.

    Raises:
        ValueError: a file that is missing or broken, or a source of another type, shape or range.
    """

    path: Path | None
    size: tuple[int, int]
    digest: str
    _data: bytes | None

    def __init__(self, source: "ImageSource") -> None:
        path = Path(source).absolute() if isinstance(source, (str, os.PathLike)) else None
        pixels = _rgb(source) if path is None else _read_image(path)
        height, width, _ = pixels.shape
        data = pixels.tobytes() if path is None else None
        vars(self).update(path=path, size=(width, height), digest=_pixel_digest(pixels), _data=data)

    def pixels(self) -> np.ndarray:
        """The image as uint8 ``[H, W, 3]``, the caller's to change.

        Raises:
            ValueError: the file can no longer be read, or holds other pixels than when this was made.
        """
        width, height = self.size
        if self._data is not None:
            return np.frombuffer(self._data, np.uint8).reshape(height, width, 3).copy()
        assert self.path is not None
        pixels = _read_image(self.path)
        if _pixel_digest(pixels) != self.digest:
            raise ValueError(f"the image {str(self.path)!r} has changed since the prompt was made")
        return pixels

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, PromptImage) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        size = "{}x{}".format(*self.size)
        return f"PromptImage({size})" if self.path is None else f"PromptImage({self.path.name!r}, {size})"


@dataclass(frozen=True, init=False, eq=False)
class Prompt:
    """What an image or video is generated from. A prompt is read-only, and equal to every prompt of the same content.

    Args:
        text: the prompt; empty for an unconditional model.
        negative: the text that guidance leads away from; ``None`` leaves it to the model.
        images: first frames or references, one or several of what `PromptImage` takes.
        metadata: what rewards read beside the text: JSON values (strings, finite numbers, booleans, ``None``, lists,
            dicts) by name. NumPy's numbers become Python's.

    Raises:
        ValueError: an argument of another type, or an image that cannot be read.

    >>> a, b = Prompt("two cats", metadata={"count": 2}), Prompt("two cats", metadata={"count": 3})
    >>> a == b, a.conditioning_key == b.conditioning_key, a == Prompt("two cats", metadata={"count": 2})
    (False, True, True)
    """

    text: str
    negative: str | None
    images: tuple[PromptImage, ...]
    metadata: Mapping[str, Any]

    def __init__(
        self,
        text: str,
        negative: str | None = None,
        images: "PromptImage | ImageSource | Sequence[PromptImage | ImageSource]" = (),
        metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _check_text(text, "text")
        if negative is not None:
            _check_text(negative, "negative text")
        if not isinstance(metadata, Mapping):
            raise ValueError(f"a prompt's metadata must be a mapping, not {metadata!r}")
        several: Any = images if isinstance(images, (list, tuple)) else [images]
        vars(self).update(
            text=text,
            negative=negative,
            images=tuple(image if isinstance(image, PromptImage) else PromptImage(image) for image in several),
            metadata=_read_only(metadata, "metadata"),
        )

    @classmethod
    def of(cls, prompt: "str | Prompt") -> "Prompt":
        """The prompt itself; a string is a prompt with nothing but this text."""
        return prompt if isinstance(prompt, Prompt) else cls(prompt)

    @property
    def image(self) -> PromptImage | None:
        """The first image, or ``None``."""
        return self.images[0] if self.images else None

    @cached_property
    def conditioning_key(self) -> str:
        """Digest of what a model encodes: text, negative text and images, not metadata; 32 hexadecimal digits."""
        return _digest([self.text, self.negative, [image.digest for image in self.images]])

    @cached_property
    def key(self) -> str:
        """Digest of the whole content; equal prompts have equal keys, in every process; 32 hexadecimal digits."""
        return _digest([self.conditioning_key, self.metadata])

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Prompt) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __lt__(self, other: "Prompt") -> bool:
        return (self.text, self.key) < (other.text, other.key) if isinstance(other, Prompt) else NotImplemented

    def __str__(self) -> str:
        return self.text


def check_prompts(prompts: Iterable[str | Prompt], allow_empty: bool = False) -> list[Prompt]:
    """The prompts of a list of strings and prompts.

    Args:
        prompts: strings and prompts; their order is kept.
        allow_empty: whether a text may be empty, as an unconditional model's is.

    Raises:
        ValueError: no prompts, one that is neither, or an empty text that is not allowed.
    """
    if isinstance(prompts, (str, Prompt)):
        raise ValueError(f"prompts must be a list of strings; put the one prompt in a list: [{prompts!r}]")
    if isinstance(prompts, (set, frozenset)) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be a list of strings, not {type(prompts).__name__}")
    checked = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Prompt)) or not (allow_empty or str(prompt).strip()):
            raise ValueError(f"prompt {i} must be a non-empty string, not {prompt!r}")
        checked.append(Prompt.of(prompt))
    if not checked:
        raise ValueError("prompts must not be empty")
    return checked


# --- Content ---


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise TypeError("a prompt's metadata is read-only; make another prompt")


class _Dict(dict[str, Any]):
    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore

    def __reduce__(self) -> tuple[Any, ...]:
        return _Dict, (dict(self),)


class _List(list[Any]):
    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = clear = extend = _refuse  # type: ignore
    insert = pop = remove = reverse = sort = _refuse  # type: ignore

    def __reduce__(self) -> tuple[Any, ...]:
        return _List, (list(self),)


def _read_only(value: Any, where: str) -> Any:
    """A read-only copy of a JSON value; ``where`` it is, for the error."""
    if isinstance(value, np.bool_ | np.integer | np.floating):
        value = value.item()
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"the keys of {where} must be strings, not {key!r}")
        return _Dict({key: _read_only(item, f"{where}[{key!r}]") for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return _List(_read_only(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise ValueError(
        f"{where} must be a JSON value (string, finite number, boolean, None, list, dict), "
        f"not {value if isinstance(value, float) else type(value).__name__}"
    )


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a prompt's {what} must be a string, not {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt's {what} has half a character (a lone surrogate) in it: {text!r}") from error


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def _digest(value: Any) -> str:
    return hashlib.blake2b(_canonical(value).encode(), digest_size=16).hexdigest()


# --- Images ---


def _rgb(source: Any) -> np.ndarray:
    """Pixels ``[H, W, 3]`` of what is in memory."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        floating = source.is_floating_point()
        if source.ndim != 3 or len(source) != 3 or not source.numel() or not (floating or source.dtype == torch.uint8):
            raise ValueError(f"an image's tensor must be uint8 or float [3, H, W], not {_form(source)}")
        if floating:
            source = source.detach().float()
            if not ((source >= 0) & (source <= 1)).all():
                low, high = source.aminmax()
                raise ValueError(f"an image's float tensor must lie in [0, 1]; this one goes from {low:g} to {high:g}")
            source = (source * 255).round().to(torch.uint8)
        return source.permute(1, 2, 0).cpu().numpy()
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise ValueError(f"an image's array must be uint8 [H, W, 3], not {_form(source)}")
        return source
    from PIL import Image, ImageOps

    if not isinstance(source, Image.Image):
        raise ValueError(f"an image must be a path, a PIL image, an array or a tensor, not {type(source).__name__}")
    if source.mode.startswith(("I", "F")):
        raise ValueError(f"an image must have 8 bits a channel; its mode is {source.mode!r}")
    return np.array(ImageOps.exif_transpose(source).convert("RGB"))


def _form(array: Any) -> str:
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return _rgb(image)
    except FileNotFoundError:
        raise ValueError(f"there is no image {str(path)!r}") from None
    except Exception as error:  # a broken file raises anything, SyntaxError included
        raise ValueError(f"cannot read the image {str(path)!r}: {error}") from error


def _pixel_digest(pixels: np.ndarray) -> str:
    height, width, _ = pixels.shape
    digest = hashlib.blake2b(b"%dx%d" % (width, height), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
