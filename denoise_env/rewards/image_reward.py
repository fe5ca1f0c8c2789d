"""ImageReward on transformers' BLIP."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel
from denoise_env.rewards.heads import LinearHead
from denoise_env.rewards.preprocess import Preprocess
from denoise_env.rewards.pretrained import (
    check_names,
    check_reference,
    fetch,
    from_transformers,
    load_tensors,
    read_tensors,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the network's output over the training set: scores are normalised by them."""
HEAD_WIDTH = 64
MAX_TOKENS = 35
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
_SIZES = (
    VISION + "patch_embed.proj.weight",
    VISION + "pos_embed",
    VISION + "blocks.0.mlp.fc1.weight",
    TEXT + "embeddings.word_embeddings.weight",
    TEXT + "embeddings.position_embeddings.weight",
    TEXT + "encoder.layer.0.intermediate.dense.weight",
)
_NAMES = (
    (r"^mlp\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.", "vision."),
    (r"^vision\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."),
    (r"^(vision)\.blocks\.(\d+)\.", r"\1.encoder.layers.\2."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^(vision\..*)\.norm([12])\.", r"\1.layer_norm\2."),
)
"""Published names → those of the modules here, in this order."""


class ImageReward(RewardModel):
    """ImageReward: higher fits the prompt and pleases better; 0 is about the mean.

    BLIP's text tower reads the prompt (35 tokens at most) with the picture in its cross-attention; linear layers on its
    first token give the score, normalised by mean and standard deviation over the training set. They keep float32
    whatever the dtype.

    Args:
        checkpoint: the published file `ImageReward.pt`, or "owner/name/file" on the Hugging Face hub. Sizes are read
            from its tensors; an attention head has 64 channels.
        tokenizer: a directory with BERT's tokenizer, or "owner/name" on the hub.
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """

    citation = "Xu et al. 2023, ImageReward, arXiv 2304.05977"

    def __init__(
        self,
        checkpoint: str = "THUDM/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | None = None,
        dtype: str = "fp32",
        microbatch: int = 32,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        check_reference(checkpoint, "checkpoint", 3)
        check_reference(tokenizer, "tokenizer", 2)
        self.checkpoint, self.tokenizer_source = checkpoint, tokenizer

    def load_network(self) -> nn.Module:
        """The two towers; the head, which is to keep its precision, apart from them."""
        from transformers import AutoTokenizer

        self.tokenizer = from_transformers(AutoTokenizer, self.tokenizer_source)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
        network, self.head = build(read_tensors(fetch(self.checkpoint)), self.checkpoint)
        config: Any = network["vision"].config
        self.preprocess = Preprocess((config.image_size, config.image_size))
        return network

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        tokens = self.tokenizer(
            [prompt.text for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(images.device)
        pictures = network["vision"](pixel_values=self.preprocess(images).to(self.dtype)).last_hidden_state
        features = network["text"](
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=pictures,
            encoder_attention_mask=torch.ones(pictures.shape[:2], dtype=torch.long, device=images.device),
        ).last_hidden_state[:, 0]
        return normalized(self.head.to(images.device)(features.float()))


def normalized(raw: Tensor) -> Tensor:
    """The score of the network's output."""
    return (raw - MEAN) / STD


def build(tensors: Mapping[str, Tensor], source: Any) -> tuple[nn.ModuleDict, LinearHead]:
    """The towers ("vision" and "text") and the head of tensors with the published names.

    Tensors with other names are ignored, as they are by the published code.

    Raises:
        ValueError: tensors are missing or do not fit.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    sizes = {name: tensors[name].shape for name in _SIZES if name in tensors}
    check_names("ImageReward", source, [name for name in _SIZES if name not in sizes])
    patch, positions, inner, words, text_positions, text_inner = (sizes[name] for name in _SIZES)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=patch[0],
            intermediate_size=inner[0],
            num_hidden_layers=_count(tensors, VISION + "blocks."),
            num_attention_heads=patch[0] // HEAD_WIDTH,
            image_size=patch[-1] * math.isqrt(positions[1] - 1),
            patch_size=patch[-1],
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=words[0],
            hidden_size=words[1],
            encoder_hidden_size=patch[0],
            intermediate_size=text_inner[0],
            num_hidden_layers=_count(tensors, TEXT + "encoder.layer."),
            num_attention_heads=words[1] // HEAD_WIDTH,
            max_position_embeddings=text_positions[0],
            layer_norm_eps=1e-12,
            is_decoder=True,  # which gives it cross-attention; it is called without a causal mask
        ),
        add_pooling_layer=False,
    )
    head = LinearHead(words[1])
    whole = nn.ModuleDict({"vision": vision, "text": text, "head": head})
    names = whole.state_dict().keys()
    renamed = {_renamed(name): tensor for name, tensor in tensors.items()}
    load_tensors(whole, {name: tensor for name, tensor in renamed.items() if name in names}, source)
    return nn.ModuleDict({"vision": vision, "text": text}), head.eval().requires_grad_(False)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _renamed(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
