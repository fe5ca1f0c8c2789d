"""The head that LAION's aesthetic predictor and ImageReward share."""

from torch import Tensor, nn

OUTPUTS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Outputs of the linear layers, by their published numbers: the others are dropouts, and there are no activations."""


class LinearHead(nn.Module):
    """Linear layers from ``width`` numbers to a score. Tensors keep the published names."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        inputs = [width, *OUTPUTS.values()]
        self.layers = nn.ModuleDict({str(n): nn.Linear(inputs[i], OUTPUTS[n]) for i, n in enumerate(OUTPUTS)})

    def forward(self, features: Tensor) -> Tensor:
        """``[b, width]`` → ``[b]``."""
        for layer in self.layers.values():
            features = layer(features)
        return features[:, 0]
