"""HPSv3, a preference score of images (arXiv 2508.03789)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel
from denoise_env.rewards.qwen2vl import Head, RewardTokens, check_source, find_file, fit_size, load, rename, to_uint8

TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
TEMPLATE = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score \
to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the \
best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body \
structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., \
hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {text_prompt}



Please provide the overall ratings of this image: <|Reward|>

END
"""
"""The text the checkpoint was trained with (MizzenAI/HPSv3, hpsv3/dataset/data_collator_qwen.py; MIT)."""


def look(image: Tensor) -> Tensor:
    """What the network sees of an image ``[3, H, W]`` in [0, 1]: ``[1, 3, h, w]`` uint8, resized as Pillow does."""
    from PIL import Image

    height, width = fit_size(image.shape[1], image.shape[2], PIXELS, PIXELS)
    picture = Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())
    pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(image.device)


class HPSv3(RewardModel):
    """HPSv3: the human preference for an image given its prompt, the mean of its distribution.

    Written out in transformers, from the published code and configuration; the package ``hpsv3`` is not needed. Its
    weights have not been at hand here, so published scores have not been compared. A prompt with a special token of
    the tokenizer in it is NaN.

    Args:
        checkpoint: hub id, folder with ``HPSv3.safetensors`` in it, or that file.
        base: hub id or folder of Qwen2-VL-7B-Instruct; its configuration and tokenizer are read.
        device: where the network runs; default: where the images are.
        dtype: precision; published scores are of "bf16", the head is always float32.
        microbatch: images per call of the network.

    Raises:
        ValueError: an argument out of its range, or a file that is not there.
    """

    citation = "HPSv3 (arXiv 2508.03789)"

    def __init__(
        self,
        checkpoint: str = "MizzenAI/HPSv3",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        device: str | None = None,
        dtype: str = "bf16",
        microbatch: int = 8,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        check_source(checkpoint, "HPSv3.safetensors", "HPSv3's checkpoint")
        check_source(base, "config.json", "Qwen2-VL-7B-Instruct")
        self.checkpoint, self.base = checkpoint, base

    def load_network(self) -> RewardTokens:
        """As in `RewardModel`."""
        from safetensors.torch import load_file

        state = rename(load_file(find_file(self.checkpoint, "HPSv3.safetensors")))
        backbone, weights, tokenizer = load(self.base, state, self.dtype, [TOKEN])
        head = Head(
            nn.Linear(weights["0.weight"].shape[1], 1024),
            nn.ReLU(),
            nn.Dropout(0.05),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        head.load_state_dict(weights)
        return RewardTokens(backbone, head, tokenizer, [TOKEN], TEMPLATE, "image")

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        assert isinstance(self.network, RewardTokens)
        rows = [i for i, prompt in enumerate(prompts) if self.network.readable(prompt.text)]
        scores = torch.full((len(images),), torch.nan, device=images.device)
        if rows:
            scores[rows] = self.network([look(images[i]) for i in rows], [prompts[i].text for i in rows])[:, 0, 0]
        return scores
