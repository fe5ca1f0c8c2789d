"""Prompts by index and their encodings, which are made once, kept on the host or on disk, and brought to the device."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from denoise_env.arguments import number
from denoise_env.models import DenoisingModel
from denoise_env.progress import progress
from denoise_env.prompts import Prompt, check_prompts

GIB = 2**30
ENCODED_TOGETHER = 16
SMALL = 2**20  # bytes up to which the last batch is kept: gathering it again would take as long as a small network
Row = dict[str, Tensor]


class ConditioningStore:
    """The prompts that an environment knows, and their conditioning.

    A prompt is encoded when its row is first asked for, in batches, and kept on the host. Rows go to the model's
    device when they are asked for, and the last ones stay there. Prompts that differ by their metadata alone share
    their conditioning.

    Args:
        model: the model that encodes the prompts.
        host_bytes: budget of rows kept on the host. Beyond it the least recently used row is dropped, and encoded again
            (or read from disk) when it is next asked for.
        device_bytes: budget of rows kept on the device, not counting those that a caller holds. For a model on the
            CPU there is no second copy.
        directory: where to keep rows on disk too, memory-mapped; other processes may share it. Default: nowhere.

    Attributes:
        prompts: the prompts that indices point into; a prompt never changes its place.
        encoded: how many prompts have been encoded.

    Raises:
        ValueError: the directory holds the conditioning of another checkpoint.
    """

    def __init__(
        self,
        model: DenoisingModel,
        *,
        host_bytes: float = 8 * GIB,
        device_bytes: float = GIB / 2,
        directory: str | Path | None = None,
    ) -> None:
        self.model = model
        self.prompts: list[Prompt] = []
        self.encoded = 0
        self._places: dict[Prompt, int] = {}
        self._host = _Recent(host_bytes)
        self._device = _Recent(device_bytes if model.device.type != "cpu" else 0)
        self._files = _Files(Path(directory), fingerprint(model)) if directory else None
        self._last: tuple[list[int], TensorDict] | None = None

    @property
    def host_bytes(self) -> int:
        """Bytes of the rows on the host."""
        return self._host.size

    @property
    def device_bytes(self) -> int:
        """Bytes of the rows kept on the device."""
        return self._device.size

    def index(self, prompts: Sequence[str | Prompt]) -> Tensor:
        """Indices ``[P]`` int64 on the CPU of P prompts. New prompts join the store; nothing is encoded yet.

        Raises:
            ValueError: there are no prompts, or one that the model does not take; none has joined then.
        """
        found = self.check(prompts)
        for prompt in found:
            if self._places.setdefault(prompt, len(self.prompts)) == len(self.prompts):
                self.prompts.append(prompt)
        return torch.tensor([self._places[prompt] for prompt in found])

    def check(self, prompts: Sequence[str | Prompt]) -> list[Prompt]:
        """The prompts, as `index` takes them; it raises the same ``ValueError``."""
        found = check_prompts(prompts, allow_empty="" in (self.model.vocabulary or ()))
        self.model.check_prompts([prompt for prompt in dict.fromkeys(found) if prompt not in self._places])
        return found

    def rows(self, index: Tensor) -> TensorDict:
        """Conditioning ``[n]`` of ``index [n]``, on the model's device.

        Entries that the model masks are padded to the longest of these rows (`DenoisingModel.collate`).
        """
        places = index.tolist()  # the one device sync
        if self._last is None or self._last[0] != places:
            batch = self._gather(places)
            if _bytes(batch) > SMALL:
                return batch
            self._last = places, batch
        return self._last[1].copy()

    def _gather(self, places: list[int]) -> TensorDict:
        wanted = [self.prompts[i].conditioning_key for i in places]
        first = dict(zip(wanted, places, strict=True))
        rows = self._fetch(first)
        batch = self.model.collate([rows[key] for key in first])
        if len(first) == len(wanted):
            return batch
        order = {key: place for place, key in enumerate(first)}
        return batch[torch.tensor([order[key] for key in wanted], device=self.model.device)]

    def prepare(self, index: Tensor) -> None:
        """Encode the prompts of ``index [n]`` that are kept nowhere yet, in large batches.

        ``rows`` does so by itself, for the rows at hand: call this where many calls of ``rows`` are to follow.
        """
        prompts = {self.prompts[i].conditioning_key: self.prompts[i] for i in sorted(set(index.tolist()))}
        for _ in self._encode({key: prompt for key, prompt in prompts.items() if not self._keeps(key)}):
            pass

    def _keeps(self, key: str) -> bool:
        return key in self._device or key in self._host or bool(self._files and self._files.has(key))

    def _fetch(self, first: Mapping[str, int]) -> dict[str, Row]:
        """Rows on the model's device, by conditioning key."""
        device = self.model.device
        found: dict[str, Row] = {}
        unknown = {}
        for key, place in first.items():
            row = self._device.get(key) or self._host.get(key)
            if row is None and self._files and (row := self._files.read(key)) is not None:
                self._host.put(key, row)
            if row is None:
                unknown[key] = self.prompts[place]
            else:
                found[key] = {name: tensor.to(device) for name, tensor in row.items()}
        for key, row in self._encode(unknown):
            found[key] = {name: tensor.to(device) for name, tensor in row.items()}
        for key, row in found.items():
            self._device.put(key, row)
        return found

    @torch.no_grad()
    def _encode(self, prompts: Mapping[str, Prompt]) -> Iterator[tuple[str, Row]]:
        """Rows on the host, each as soon as it is kept."""
        if not prompts:
            return
        alike: dict[bool, list[str]] = {}
        for key, prompt in prompts.items():
            alike.setdefault(prompt.negative is not None, []).append(key)
        size = ENCODED_TOGETHER
        batches = [keys[i : i + size] for keys in alike.values() for i in range(0, len(keys), size)]
        with (
            self.model.encoding(),
            progress(total=len(prompts), desc="encode prompts", disable=len(prompts) < 1024) as bar,
        ):
            for keys in batches:
                rows = self.model.split(self.model.encode([prompts[key] for key in keys]))
                self.encoded += len(keys)
                bar.update(len(keys))
                for key, row in zip(keys, rows, strict=True):
                    on_host = {name: tensor.cpu() for name, tensor in row.items()}
                    self._host.put(key, on_host)
                    if self._files:
                        self._files.write(key, on_host)
                    yield key, on_host


class _Recent:
    """The most recently used rows, up to a number of bytes."""

    def __init__(self, limit: float) -> None:
        self.limit = number(limit, "a budget of bytes", at_least=0)
        self.size = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def get(self, key: str) -> Row | None:
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def put(self, key: str, row: Row) -> None:
        size = _bytes(row)
        if key in self._rows or size > self.limit:
            return
        self._rows[key] = row
        self.size += size
        while self.size > self.limit:
            self.size -= _bytes(self._rows.popitem(last=False)[1])


def _bytes(row: Row | TensorDict) -> int:
    return sum(tensor.nbytes for tensor in row.values())


class _Files:
    """Rows on disk: a file each, replaced whole, so that a reader never sees a part of one."""

    def __init__(self, directory: Path, checkpoint: str) -> None:
        self.directory, self._label = directory, directory / "checkpoint.json"
        self._checkpoint, self._begun = checkpoint, False
        there = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
        if not there.is_dir():
            raise ValueError(f"the conditioning cache {directory} cannot be used: {there} is no directory")
        if directory.exists():
            self._check()

    def _check(self) -> None:
        """Raise a ``ValueError`` for a directory that holds something else than this checkpoint's rows."""
        try:
            others = [
                path for path in self.directory.iterdir() if not path.name.startswith(".") and path != self._label
            ]
            if not self._label.exists():  # asked after the others, which come later where two processes begin at once
                if others:
                    raise ValueError(
                        f"{self.directory} is no conditioning cache and not empty: choose a directory of its own for it"
                    )
                return
            found = json.loads(self._label.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, KeyError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"the conditioning cache {self.directory} cannot be used: {error!r}") from error
        if found != self._checkpoint:
            raise ValueError(
                f"the conditioning cache {self.directory} was made by another checkpoint, precision, length or size: "
                "choose another directory for this one"
            )

    def _begin(self) -> None:
        """Make the directory, before the first row is written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._check()
        if not self._label.exists():
            _replace(self._label, json.dumps({"fingerprint": self._checkpoint}).encode())
            self._check()  # another process may have been as quick
        self._begun = True

    def _path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def read(self, key: str) -> Row | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(key)
        try:
            return load_file(path) if path.exists() else None
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"the file {path} of the conditioning cache is truncated or damaged ({error}): delete it, and it is "
                "made again"
            ) from error

    def write(self, key: str, row: Row) -> None:
        from safetensors.torch import save

        if not self._begun:
            self._begin()
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        _replace(path, save({name: tensor.contiguous() for name, tensor in row.items()}))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def fingerprint(model: DenoisingModel) -> str:
    """What tells the conditioning of one checkpoint from that of another: a digest of its encoders, dtype and length.

    Where prompts carry images, the VAE is one of the encoders, and the size of the latents counts too. Of every
    parameter its name, shape and up to 64 entries are read, so that billions of them take well under a second.
    """
    digest = hashlib.sha256(f"{type(model).__name__} {model.dtype} {model.longest}".encode())
    encoders = model.encoders()
    if model.images_per_prompt:
        digest.update(str(model.latent_shape).encode())
        encoders = model.frozen()
    for name, encoder in encoders.items():
        for key, tensor in encoder.state_dict().items():
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            entries = tensor.detach().flatten()
            entries = entries[:: max(1, len(entries) // 64)][:64]
            digest.update(entries.double().cpu().numpy().tobytes())
    return digest.hexdigest()
