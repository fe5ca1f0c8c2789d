"""Two networks that share the denoising of one model, each for its part of the noise levels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from denoise_env.models.base import has_data


class Experts(nn.Module):
    """Two networks as one: rows at ``boundary`` or above go through the first, those below through the second.

    Rows of both in one batch are two smaller batches, which changes them by rounding, as any other batch size does.

    With gradient, the trained parameters of a network that gets no row have a gradient of 0 and not none, so that every
    backward pass has something to reach, and ``DistributedDataParallel`` finds all its parameters.

    Args:
        networks: the network of high noise and that of low noise, by the names that they have in this module.
        boundary: the timestep that parts them.
    """

    def __init__(self, networks: Mapping[str, nn.Module], boundary: float) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.boundary = boundary

    def forward(self, hidden_states: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        """The output ``[B, ...]``, of one call or of two calls with a part of the rows each.

        Args:
            hidden_states: ``[B, ...]``.
            timestep: ``[B]``. It is read on the host, which costs an accelerator one sync.
            arguments: what else the networks take; the tensors among them have one entry per row.
        """
        inputs = {"hidden_states": hidden_states, "timestep": timestep, **arguments}
        shares = self._shares(timestep)
        if len(shares) == 1:
            (network,) = shares
            return (self._reach(network(**inputs)[0], shares),)
        order = torch.tensor([row for rows in shares.values() for row in rows], device=hidden_states.device)
        inputs = {name: value[order] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        parts, first = [], 0
        for network, rows in shares.items():
            last = first + len(rows)
            own = {name: value[first:last] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            parts.append(network(**own)[0])
            first = last
        return (self._reach(torch.cat(parts)[order.argsort()], shares),)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the two networks in place; which of them is called is decided outside."""
        for network in self.children():
            network.compile(*arguments, **options)

    def _shares(self, timestep: Tensor) -> dict[nn.Module, list[int]]:
        """The places of each network's rows; all belong to one that is trained where there is no data to tell."""
        high, low = self.children()
        rows = range(len(timestep))
        if not has_data(timestep):
            return {high if any(p.requires_grad for p in high.parameters()) else low: list(rows)}
        is_high = (timestep >= self.boundary).tolist()
        shares = {high: [row for row in rows if is_high[row]], low: [row for row in rows if not is_high[row]]}
        return {network: places for network, places in shares.items() if places}

    def _reach(self, output: Tensor, called: Mapping[nn.Module, Any]) -> Tensor:
        """The output, plus 0 times each trained parameter of a network that was not called."""
        if not torch.is_grad_enabled():
            return output
        networks = [network for network in self.children() if network not in called]
        idle = [p for network in networks for p in network.parameters() if p.requires_grad]
        return output + 0 * torch.stack([p.flatten()[0] for p in idle]).sum() if idle else output
