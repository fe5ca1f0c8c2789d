"""How an iteration's episodes are divided among processes, and what they tell each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One of ``size`` processes that train together; by default the only one.

    An iteration's rows are divided by the parts of its update: of each part a rank takes an equal run of neighbours,
    the first rank the first. So a part holds the same episodes whatever the number of ranks.

    Attributes:
        rank: this process's number, from 0; 0 writes the files.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> "Ranks":
        """Those of ``torch.distributed``'s default process group, or the only one where there is no group."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def mine(self, rows: Sequence[Item], parts: int = 1) -> list[Item]:
        """This rank's of all ``rows``, which must be divisible by parts times ranks."""
        return [rows[i] for i in self._place(len(rows), parts)[self.rank].tolist()]

    def gather(self, rows: Tensor, parts: int = 1) -> Tensor:
        """All ranks' ``rows [B, ...]`` in the order in which ``mine`` found them."""
        if self.size == 1:
            return rows
        place = self._place(len(rows) * self.size, parts).flatten().to(rows.device)
        return torch.empty_like(found := self.each(rows).flatten(0, 1)).index_copy_(0, place, found)

    def _place(self, total: int, parts: int) -> Tensor:
        """``[size, rows of a rank]``: where each rank's rows are among all."""
        return torch.arange(total).view(parts, self.size, -1).transpose(0, 1).flatten(1)

    def each(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, of one shape, stacked by rank."""
        if self.size == 1:
            return tensor[None]
        tensor = tensor.contiguous()
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return torch.stack(found)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.size
