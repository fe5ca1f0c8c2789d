"""How an iteration's episodes are divided among processes, and how the processes exchange tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """One of ``size`` processes that train together; by default there is one.

    An update has one or several parts, one optimizer step each. Of the episodes of each part every rank takes an equal
    run of neighbours, rank 0 the first. So a part holds the same episodes whatever the number of ranks.

    Attributes:
        rank: this process's number, from 0; 0 writes the files.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def present(cls) -> "Ranks":
        """This process in ``torch.distributed``'s default process group; without a group, the only process."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    def mine(self, rows: Sequence[Item], parts: int = 1) -> list[Item]:
        """This rank's share of all ``rows``, whose number must be divisible by parts times ranks."""
        return [rows[i] for i in self._place(len(rows), parts)[self.rank].tolist()]

    def gather(self, rows: Tensor, parts: int = 1) -> Tensor:
        """The ``rows [B, ...]`` of all ranks, in the order that they had before `mine` divided them."""
        if self.size == 1:
            return rows
        place = self._place(len(rows) * self.size, parts).flatten().to(rows.device)
        return torch.empty_like(found := self.each(rows).flatten(0, 1)).index_copy_(0, place, found)

    def _place(self, total: int, parts: int) -> Tensor:
        """The place of each rank's rows among all rows, ``[size, rows of a rank]``."""
        return torch.arange(total).view(parts, self.size, -1).transpose(0, 1).flatten(1)

    def each(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked ``[size, ...]``; all must have the same shape."""
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
