"""Classifier-free guidance (Ho & Salimans 2022), which most diffusers families share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from denoise_env.arguments import number
from denoise_env.models.pipeline import PipelineModel
from denoise_env.prompts import Prompt

NEGATIVE = "negative_"
"""How an entry of the conditioning is called that was made of the negative text."""


class GuidedModel(PipelineModel):
    """A pipeline whose output is guided, un + w (cond − un), by the network's answers without and with the prompt.

    A family says how texts become conditioning (`embed`) and how the network is called (`call`). Both halves go through
    the network in one call. A prompt without a negative text of its own has the family's (`unconditional`).

    Attributes:
        entries: the entries of the conditioning that `call` gets; each has a "negative_" twin where prompts have a
            negative text.
        shared_entries: further ones that it gets, alike in both halves, such as an image's.
    """

    default_negative: ClassVar[str] = ""
    entries: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    shared_entries: ClassVar[tuple[str, ...]] = ()

    def guide_by(self, scale: float) -> None:
        """Set the scale w of classifier-free guidance, 1 for none; a ``ValueError`` below."""
        self.guidance_scale = number(scale, "guidance_scale", at_least=1)
        self.rows_per_sample = 1 if scale == 1 else 2

    @cached_property
    def unconditional_row(self) -> dict[str, Tensor]:
        """A row of `split`: the conditioning that stands for no prompt, encoded when it is first asked for."""
        with self.encoding():
            return self.split(TensorDict(self.unconditional(), batch_size=1))[0]

    @abstractmethod
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditioning's entries ``[P, ...]`` of P texts; a text with too many tokens is cut, with a warning."""

    @abstractmethod
    def call(self, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The network's output for the rows ``[B, *latent_shape]`` at ``timestep [B]``, without guidance."""

    def unconditional(self) -> dict[str, Tensor]:
        """The conditioning ``[1, ...]`` that stands for no prompt."""
        return self.embed([self.default_negative])

    def combine(self, unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
        """The guided output of the two halves; ``scale`` broadcasts over a row."""
        return unconditional + scale * (conditional - unconditional)

    def encode(self, prompts: Sequence[Prompt]) -> TensorDict:
        """The entries of `embed`, and the same with "negative_" before their names of prompts with a negative text."""
        found = self.embed([prompt.text for prompt in prompts])
        if prompts[0].negative is not None:
            negative = self.embed([prompt.negative or "" for prompt in prompts])
            found |= {f"{NEGATIVE}{name}": tensor for name, tensor in negative.items()}
        return TensorDict(found, batch_size=len(prompts))

    def collate(self, rows: Sequence[Mapping[str, Tensor]]) -> TensorDict:
        """As in `DenoisingModel.collate`; where some prompts have a negative text, the others get the family's."""
        if any(name.startswith(NEGATIVE) for row in rows for name in row):
            default = {f"{NEGATIVE}{name}": tensor for name, tensor in self.unconditional_row.items()}
            rows = [{**default, **row} for row in rows]
        return super().collate(rows)

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: TensorDict, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """As in `DenoisingModel.predict`; guidance batches its two halves into one call."""
        scale: float | Tensor | None = self.guidance_scale if self.rows_per_sample == 2 else None
        if guidance_scale is not None:
            scale = guidance_scale.view(-1, *[1] * (latents.ndim - 1))
        return self.guide(latents, timestep, conditioning, scale)

    def guide(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: TensorDict,
        scale: float | Tensor | None,
        told: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The output at ``scale``, or without guidance where it is ``None``; both halves are ``told [B]`` the same."""
        told = {**{name: conditioning[name] for name in self.shared_entries}, **(told or {})}
        timestep = timestep.to(latents.device).expand(len(latents))
        if scale is None:
            positive = {name: conditioning[name] for name in self.entries}
            with self.autocast():
                return self.call(latents, timestep, {**positive, **told})
        both = {**self._halves(conditioning), **{name: torch.cat([tensor, tensor]) for name, tensor in told.items()}}
        with self.autocast():
            output = self.call(torch.cat([latents, latents]), torch.cat([timestep, timestep]), both)
        unconditional, conditional = output.float().chunk(2)
        return self.combine(unconditional, conditional, scale)

    @cached_property
    def _kept_halves(self) -> WeakTensorKeyDictionary:
        return WeakTensorKeyDictionary()

    def _halves(self, conditioning: TensorDict) -> dict[str, Tensor]:
        """The entries of both halves, joined once for all the steps that are taken with the same conditioning."""
        first, *others = (
            conditioning[name]
            for name in conditioning.keys()  # noqa: SIM118
            if name.removeprefix(NEGATIVE) in self.entries
        )
        kept = self._kept_halves.get(first)
        if kept is None or [id(other) for other in kept[0]] != [id(other) for other in others]:
            negative = self._negative(conditioning, len(first))
            joined = {name: _joined(negative[name], conditioning[name]) for name in self.entries}
            self._kept_halves[first] = kept = others, joined
        return kept[1]

    def _negative(self, conditioning: TensorDict, rows: int) -> dict[str, Tensor]:
        if f"{NEGATIVE}{self.entries[0]}" in conditioning.keys():  # noqa: SIM118
            return {name: conditioning[f"{NEGATIVE}{name}"] for name in self.entries}
        one = super().collate([self.unconditional_row])
        return {name: one[name].expand(rows, *one[name].shape[1:]) for name in self.entries}


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """The rows of both, sequences padded with zeros to the longer."""
    if first.ndim > 1 and (short := second.shape[1] - first.shape[1]):
        padding = [0, 0] * (first.ndim - 2)
        first, second = F.pad(first, [*padding, 0, max(short, 0)]), F.pad(second, [*padding, 0, max(-short, 0)])
    return torch.cat([first, second])
