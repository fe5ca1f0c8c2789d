"""Copies of a network's weights, and how they take the weights' place for a while.

Everything is copied in and copied back; nothing but the values changes, so optimizers, wrappers and graphs keep what
they hold. The weights may be sharded (DTensors, as PyTorch's ``fully_shard`` leaves them): a copy of a sharded weight
is sharded alike, each process holds and moves its own part, and all processes must make the same calls.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies by name, sharded as the weights are."""
    return {name: weight.detach().clone() for name, weight in weights.items()}


def reshard(network: nn.Module) -> None:
    """Release the gathered whole weights that ``fully_shard`` keeps after a forward pass.

    While they are there, the network computes with them, ignores what is copied into the shards, and shows them as its
    parameters. A network that is not sharded is left as it is.
    """
    for module in network.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


@torch.no_grad()
def fill(network: nn.Module, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy ``values`` into ``weights``, parameters of ``network`` of the same names and sharding.

    Do not call it between a forward pass with gradient and its backward pass: that would differentiate at other
    weights, and autograd refuses it.
    """
    reshard(network)
    if not weights:
        return
    torch._foreach_copy_(parts(weights.values()), parts(values[name] for name in weights))


@contextlib.contextmanager
def swapped(network: nn.Module, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which ``weights`` have other ``values``, as in `fill`; afterwards they are as before, to the bit."""
    own = copies(weights)
    try:
        fill(network, weights, values)
        yield
    finally:
        fill(network, weights, own)


@torch.no_grad()
def follow(average: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """``average ← decay · average + (1 − decay) · weights``, in place."""
    torch._foreach_lerp_(parts(average.values()), parts(weights[name] for name in average), 1 - decay)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one process's view of a sharded one (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's part of each tensor, sharing its memory; the tensor itself where it is not sharded."""
    listed: list[Any] = list(tensors)
    return [t.to_local() if is_sharded(t) else t for t in listed]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered from all processes, detached; a tensor that is not sharded as it is."""
    found: Any = tensor.detach()
    return found.full_tensor() if is_sharded(found) else found


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as ``like`` is; unchanged where ``like`` is not sharded."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    return distribute_tensor(tensor.to(like.device), target.device_mesh, target.placements, src_data_rank=None)
