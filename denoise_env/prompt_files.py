"""The files and named sets that prompts are read from.

| file | a prompt is | columns |
|---|---|---|
| `.txt` | a line | none, the line is the text |
| `.jsonl` | an object on a line | `prompt`, `negative_prompt`, `image` (a path or a list), `metadata` (an object) |
| `.csv` | a row below the header | `prompt`, `negative_prompt`, `image` (a path) |

Only `prompt` is required. Every other column is metadata, in a `.csv` as a string. Image paths are relative to the
file. A file is UTF-8, with or without a byte order mark; its blank lines are skipped.
"""

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from denoise_env.naming import load_attribute, suggest
from denoise_env.progress import progress
from denoise_env.prompts import Prompt, PromptImage, check_prompts


def load_prompts(source: str, named: Mapping[str, str] = MappingProxyType({})) -> list[Prompt]:
    """The prompts of a named set or of a file, in their order; what is there twice is twice in the list.

    Args:
        source: a name in ``named``, or the path of a `.txt`, `.jsonl` or `.csv` file (see the module).
        named: name → "module:attribute", an iterable of strings and prompts.

    Raises:
        ValueError: ``source`` is neither; the file cannot be read or holds no prompts; or a line is bad, which the
            message names by its number.
    """
    if source in named:
        return check_prompts(load_attribute(named[source], "prompt set"), allow_empty=True)
    if not os.path.isfile(source):
        unknown = f", and it is none of the named sets; {suggest(source, named)}" if named else ""
        raise ValueError(f"there is no prompt file {source!r}{unknown}")
    path = Path(source)
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"the prompt file {source!r} must end in one of {list(_FORMATS)}")
    prompts, paths = [], []
    first: dict[Path, int] = {}
    for number, columns in _FORMATS[path.suffix.lower()](source, _open(source)):
        with _at(source, number):
            prompt, names = _row(**columns)
        prompts.append(prompt)
        paths.append([path.parent / name for name in names])
        for image in paths[-1]:
            first.setdefault(image, number)
    if not prompts:
        raise ValueError(f"the prompt file {source!r} holds no prompts")
    images = _read_images(source, first)
    return [
        replace(prompt, images=tuple(images[path] for path in own)) if own else prompt
        for prompt, own in zip(prompts, paths, strict=True)
    ]


def _read_images(source: str, first: Mapping[Path, int]) -> dict[Path, PromptImage]:
    """The images of a prompt file, each read once; ``first`` is the line that names it first."""
    images = {}
    with ThreadPoolExecutor() as pool:
        made = pool.map(PromptImage, first)
        for path, number in progress(first.items(), f"images of {Path(source).name}", disable=len(first) < 1024):
            with _at(source, number):
                images[path] = next(made)
    return images


@contextmanager
def _at(source: str, number: int) -> Iterator[None]:
    try:
        yield
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{source}, line {number}: {error}") from error


def _open(source: str) -> io.StringIO:
    """The file's lines, each with the end "\\n", whatever it was."""
    try:
        data = Path(source).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise ValueError(f"cannot read the prompt file {source!r}: {error.strerror}") from error
    try:
        return io.StringIO(data.decode(), newline=None)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}, line {line}: not UTF-8 ({error.reason})") from error


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.strip()


def _txt(source: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _numbered(lines):
        yield number, {"prompt": line}


def _jsonl(source: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _numbered(lines):
        with _at(source, number):
            try:
                columns = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"invalid JSON: {error.msg} (character {error.colno})") from error
            if not isinstance(columns, dict):
                raise ValueError(f"a line must be a JSON object, not {line[:80]!r}")
        yield number, columns


def _csv(source: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        number = rows.line_num + 1
        with _at(source, number):
            cells = next(rows, None)
            if cells is None:
                return
            if not cells:
                continue
            if not header:
                header = [name.strip() for name in cells]
                if len(set(header)) < len(header) or "prompt" not in header:
                    raise ValueError(f"the header must have a column 'prompt' and no column twice, not {header}")
                continue
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, but the header has {len(header)}: {header}")
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        own = {name: row.pop(name, "") or None for name in ("negative_prompt", "image")}
        yield number, {"prompt": row.pop("prompt"), **own, "metadata": row}


def _row(
    prompt: Any = None, negative_prompt: Any = None, image: Any = None, metadata: Any = None, **others: Any
) -> tuple[Prompt, list[str]]:
    """A prompt without its images, and their paths."""
    if prompt is None:
        raise ValueError("there is no 'prompt'")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"'prompt' must be a non-empty string, not {prompt!r}")
    if not isinstance(negative_prompt, str | None):
        raise ValueError(f"'negative_prompt' must be a string, not {negative_prompt!r}")
    paths = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"'image' must be a path or a list of paths, not {image!r}")
    if not isinstance(metadata, dict | None):
        raise ValueError(f"'metadata' must be an object, not {metadata!r}")
    if both := others.keys() & (metadata or {}).keys():
        raise ValueError(f"{min(both)!r} is both a column and in 'metadata'")
    return Prompt(prompt, negative_prompt, metadata={**(metadata or {}), **others}), paths


_FORMATS: dict[str, Callable[[str, Iterable[str]], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
}
