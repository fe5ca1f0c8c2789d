"""How much memory a model needs, computed from its configuration files alone."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from denoise_env.models import ModelOptions, find_family, outline
from denoise_env.models.base import example_prompt


@dataclass(frozen=True)
class Description:
    """Shapes, counts and bytes of a model.

    Attributes:
        family: the family's name.
        latents: shape of one sample's latents.
        rows_per_sample: how many rows go through the network per sample and step.
        parameters: number of the network's parameters, adapters included.
        trainable: how many of these parameters are trained.
        conditioning: shape of each entry of one prompt's conditioning, by name; of masked entries the longest.
        latent_bytes: bytes of one sample's latents at one step.
        conditioning_bytes: bytes of one prompt's conditioning.
        weight_bytes: bytes of the network's weights.
        frozen_bytes: bytes of encoders and decoder.
        gradient_bytes: bytes of the trained parameters' gradients.
        optimizer_bytes: bytes of AdamW's two moments.
    """

    family: str
    latents: tuple[int, ...]
    rows_per_sample: int
    parameters: int
    trainable: int
    conditioning: dict[str, tuple[int, ...]]
    latent_bytes: int
    conditioning_bytes: int
    weight_bytes: int
    frozen_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The description as a dict for JSON."""
        return asdict(self)


def describe(model: str, options: ModelOptions | None = None) -> Description:
    """Describe a model without loading weights.

    Args:
        model: as in `denoise_env.models.find_family`.
        options: the options of the model's family; default: the model's own.

    Raises:
        ValueError: no such model, or a configuration that cannot be read.
    """
    found = outline(model, options)
    parameters = list(found.network.parameters())
    trainable = list(found.trainable().values())
    conditioning = found.encode([example_prompt(found)])
    frozen = found.frozen()
    return Description(
        family=find_family(model)[0].name,
        latents=tuple(found.latent_shape),
        rows_per_sample=found.rows_per_sample,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trainable),
        conditioning={name: tuple(tensor.shape[1:]) for name, tensor in conditioning.items()},
        latent_bytes=prod(found.latent_shape) * found.dtype.itemsize,
        conditioning_bytes=sum(tensor.nbytes for tensor in conditioning.values()),
        weight_bytes=sum(p.nbytes for p in parameters),
        frozen_bytes=sum(p.nbytes for module in frozen.values() for p in module.parameters()),
        gradient_bytes=sum(p.nbytes for p in trainable),
        optimizer_bytes=2 * sum(p.nbytes for p in trainable),
    )
