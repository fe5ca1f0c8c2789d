"""What the families share whose prompts are sequences of token features, each as long as its text."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from denoise_env.models.base import row_lengths
from denoise_env.models.guidance import GuidedModel


class MaskedTextModel(GuidedModel):
    """A guided model whose conditioning is ``prompt_embeds [B, L, E]`` with its mask ``[B, L]``.

    A family says what the texts' features are (`features`), and sets ``longest`` and ``text_width``.

    Attributes:
        text_width: E, how many features a token has.
    """

    entries = ("prompt_embeds", "prompt_embeds_mask")
    masks = {  # noqa: RUF012
        "prompt_embeds": "prompt_embeds_mask",
        "negative_prompt_embeds": "negative_prompt_embeds_mask",
    }
    longest: int
    text_width: int

    @abstractmethod
    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """The token features ``[L, E]`` of each text; a text with too many tokens is cut."""

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds [P, L, E]`` and its mask. On the meta device, where nothing is read, L is the longest."""
        if self.device.type == "meta":
            found = [torch.empty(self.longest, self.text_width, device="meta")] * len(texts)
        else:
            found = self.features(texts)
        return dict(self.collate([{"prompt_embeds": row.to(self.dtype)} for row in found]).items())

    def pool(self, conditioning: TensorDict) -> Tensor:
        """The mean of the text encoder's token features ``[B, E]``, without padding, which is zero."""
        return conditioning["prompt_embeds"].float().sum(1) / conditioning["prompt_embeds_mask"].sum(1)[:, None]

    @cached_property
    def _kept_lengths(self) -> WeakTensorKeyDictionary:
        return WeakTensorKeyDictionary()

    def lengths(self, mask: Tensor) -> list[int]:
        """How many tokens each row of ``mask [B, L]`` has. The device is asked once for all calls with this tensor."""
        if mask not in self._kept_lengths:
            self._kept_lengths[mask] = row_lengths(mask)
        return self._kept_lengths[mask]
