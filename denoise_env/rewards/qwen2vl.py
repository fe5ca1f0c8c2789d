"""Rewards read off Qwen2-VL: what `videoalign` and `hpsv3` share.

The user's turn holds the picture and a template with reward tokens in it; a head maps the hidden states at these tokens
to scores. Both published models were trained and are run, with transformers 4.45, in a way of their own, kept here:

- every token, of text or picture, has its place in the sequence as its position on all three rotary axes: the model is
  called with embeddings and without token ids, and so cannot find Qwen2-VL's positions on the picture's grid;
- the cast of the model to bfloat16 rounds its rotary frequencies too, so they are rounded in every precision here.

Two roundings are not kept: the vision tower's angles and the head's scores are float32 here and were bfloat16 there
(a score of 3 then has steps of 1/64).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from denoise_env.rewards.preprocess import to_levels

PATCH, MERGE, FRAMES = 14, 2, 2
"""Pixels of a patch's side; patches of a token's side; frames of a token."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>",
    "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n",
)
"""Qwen2-VL's chat format before and after the picture's tokens."""


# --- Pixels ---


def fit_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The height and width, multiples of 28, that an image is resized to (``smart_resize`` of qwen-vl-utils).

    Raises:
        ValueError: one side is over 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"Qwen2-VL takes images up to 200 times as long as wide, not {height}x{width}")
    factor = PATCH * MERGE
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if not min_pixels <= math.prod(sides) <= max_pixels:
        shrink = math.prod(sides) > max_pixels
        to_multiple: Callable[[float], int] = math.floor if shrink else math.ceil
        scale = math.sqrt((max_pixels if shrink else min_pixels) / (height * width))
        sides = [max(factor, to_multiple(side * scale / factor) * factor) for side in (height, width)]
    return sides[0], sides[1]


def to_uint8(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8."""
    return to_levels(images).to(torch.uint8)


def to_patches(frames: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixels as the vision tower reads them.

    Args:
        frames: ``[F, 3, H, W]`` uint8, H and W multiples of 28; an odd F repeats the last frame.

    Returns:
        ``[T*h*w, 1176]`` float32, and the grid (T, h, w) of patches: F/2, H/14, W/14. The four patches of a token are
        neighbours.
    """
    if len(frames) % FRAMES:
        frames = torch.cat([frames, frames[-1:]])
    mean, std = (frames.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    time, height, width = len(frames) // FRAMES, frames.shape[2] // PATCH, frames.shape[3] // PATCH
    pixels = (frames.float() / 255 - mean) / std
    blocks = pixels.view(time, FRAMES, 3, height // MERGE, MERGE, PATCH, width // MERGE, MERGE, PATCH)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(0, 4).flatten(1), (time, height, width)


# --- The network ---


class Head(nn.Sequential):
    """Layers that stay float32 when the network around them is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Head":
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


class RewardTokens(nn.Module):
    """A Qwen2-VL that is read at reward tokens.

    Args:
        backbone: a ``Qwen2VLModel``.
        head: maps hidden states ``[..., hidden]`` to scores.
        tokenizer: the base model's, with the reward tokens added.
        tokens: the reward tokens, in the template's order.
        template: the user's text; ``{text_prompt}`` stands for the prompt.
        kind: "image" or "video".
    """

    backbone: Any
    head: Head

    def __init__(
        self, backbone: nn.Module, head: Head, tokenizer: Any, tokens: Sequence[str], template: str, kind: str
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.tokenizer = backbone, head.float(), tokenizer
        self.template, self.kind = template, kind
        self.reward_ids = tokenizer.convert_tokens_to_ids([*tokens])

    def readable(self, prompt: str) -> bool:
        """Whether a prompt has none of the tokenizer's special tokens in it, which would be read as the template's."""
        return not any(token in prompt for token in self.tokenizer.get_added_vocab())

    def token_ids(self, prompt: str, picture_tokens: int) -> Tensor:
        """The whole conversation ``[L]``, the picture's place taken by so many tokens."""
        text = self.template.replace("{text_prompt}", prompt)
        before, after = (self._encode(part.replace("{text}", text)) for part in CHAT)
        picture = self.tokenizer.convert_tokens_to_ids(f"<|{self.kind}_pad|>")
        return torch.tensor([*before, *[picture] * picture_tokens, *after])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def forward(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Score b pictures, each ``[F, 3, H, W]`` uint8, against `readable` prompts: ``[b, tokens, outputs]``."""
        patches, grids = zip(*(to_patches(picture) for picture in pictures), strict=True)
        rows = [self.token_ids(prompt, len(patch) // MERGE**2) for prompt, patch in zip(prompts, patches, strict=True)]
        device = pictures[0].device
        input_ids, positions = self.batch(rows, device)
        vision = {
            "pixel_values" if self.kind == "image" else "pixel_values_videos": torch.cat(patches),
            f"{self.kind}_grid_thw": torch.tensor(grids, device=device),
        }
        output = self.backbone(input_ids=input_ids, position_ids=positions, use_cache=False, **vision)
        return self.read(input_ids, output.last_hidden_state)

    def batch(self, rows: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
        """b conversations of `token_ids` as a padded batch ``[b, L]``, and their positions ``[3, b, L]``."""
        input_ids = pad_sequence([*rows], batch_first=True, padding_value=self.tokenizer.pad_token_id).to(device)
        # attention is causal and padding is on the right: no token that is read attends to it
        return input_ids, torch.arange(input_ids.shape[1], device=device).expand(3, *input_ids.shape)

    def read(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states ``[b, L, hidden]`` at the reward tokens: ``[b, tokens, outputs]``."""
        at = torch.isin(input_ids, input_ids.new_tensor(self.reward_ids))
        return self.head(hidden[at].view(len(input_ids), len(self.reward_ids), -1).float())


# --- Checkpoints ---


def check_source(source: str, file: str, what: str) -> None:
    """Raise a ``ValueError`` for a checkpoint that is no file, no folder with ``file`` in it and no hub id."""
    path = Path(source).expanduser()
    if path.is_dir() and not (path / file).is_file():
        raise ValueError(f"the folder {source!r} has no {file} in it, so it is not {what}")
    if not path.exists() and (path.suffix in (".pth", ".safetensors") or not re.fullmatch(r"[\w.-]+/[\w.-]+", source)):
        raise ValueError(f"there is no {source!r}: give the folder of {what}, or its hub id (owner/name)")


def find_file(source: str, file: str) -> Path:
    """A file of a checkpoint: the source itself, in its folder, or downloaded from the hub."""
    path = Path(source).expanduser()
    if path.exists():
        return path / file if path.is_dir() else path
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, file))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under the names of transformers 5's ``Qwen2VLModel``, without ``lm_head``.

    Takes the names of transformers 4 and 5, with PEFT's prefix or without it.
    """
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^(model\.)?visual\.", "visual.", name.removeprefix("base_model.model."))
        renamed[re.sub(r"^model\.(language_model\.)?", "language_model.", name)] = tensor
    return {name: tensor for name, tensor in renamed.items() if not name.startswith("lm_head.")}


def merge_lora(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The tensors of a PEFT model without its adapters: W + alpha/rank · BA, in float32."""
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if ".lora_A.default." in name:
            up, weight = state[name.replace(".lora_A.", ".lora_B.")], name.replace(".lora_A.default.", ".")
            merged[weight] = merged[weight].float() + alpha / len(down) * (up.float() @ down.float())
    return merged


def load(
    base: str, state: Mapping[str, Tensor], dtype: torch.dtype, tokens: Sequence[str]
) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """The backbone with its weights, the weights of the ``rm_head``, and the tokenizer with the reward tokens.

    Args:
        base: hub id or folder of the Qwen2-VL that was trained; only its configuration and tokenizer are read.
        state: all weights, as `rename` gives them.
        dtype: precision of the backbone.
        tokens: the reward tokens.

    Raises:
        ValueError: weights that are missing, left over or of another shape, or a tokenizer of another size.
    """
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*tokens], special_tokens=True)
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    if config.text_config.vocab_size != len(tokenizer):
        raise ValueError(f"the weights are for {config.text_config.vocab_size} tokens, and {base!r} with {len(tokens)} "
                         f"reward tokens has {len(tokenizer)}")  # fmt: skip
    head = {name.removeprefix("rm_head."): tensor for name, tensor in state.items() if name.startswith("rm_head.")}
    body = {name: tensor for name, tensor in state.items() if not name.startswith("rm_head.")}
    backbone, info = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=body, dtype=dtype, output_loading_info=True
    )
    wrong = {name: sorted(map(str, keys))[:3] for name, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"the weights do not fit {base!r}: {wrong}")
    for rotary in (backbone.language_model.rotary_emb, backbone.visual.rotary_pos_emb):
        rotary.inv_freq.copy_(rotary.inv_freq.bfloat16())
    return backbone, head, tokenizer
