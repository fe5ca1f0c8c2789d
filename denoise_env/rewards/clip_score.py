"""How well a picture fits its prompt, by a CLIP or SigLIP model; PickScore, such a model trained on preferences."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel, require
from denoise_env.rewards.encoders import (
    CONFIG,
    OPEN_CLIP,
    OpenClipEncoder,
    TransformersEncoder,
    check_architecture,
    check_directory,
)
from denoise_env.rewards.pretrained import check_reference

DEFAULT_WEIGHTS = "dfn5b"


class ClipScore(RewardModel):
    """How well a picture fits its prompt, by any CLIP or SigLIP model: higher fits better.

    The cosine of the picture's and the prompt's embeddings; of a model trained with a sigmoid (SigLIP) the probability
    of a match. The default is DanceGRPO's model. Published variants are multiples: flow_grpo's is
    ``scale(clip_score("openai/clip-vit-large-patch14"), 3.3333333)`` but for its bilinear resize.

    Pictures are preprocessed by the model's own rules: the resized 8-bit picture is equal to Pillow's, and so to what
    open_clip's transform and transformers' `CLIPImageProcessorPil` give. transformers' torchvision image processors
    differ from those by a level or two here and there.

    Args:
        model: open_clip's name of an architecture, or a JSON file that describes one; a directory with a model of
            open_clip (`open_clip_config.json`) or transformers; "owner/name" of a transformers model on the Hugging
            Face hub, or "hf-hub:owner/name" of one of open_clip.
        pretrained: an architecture's weights: open_clip's name for them, or their file. The others bring theirs.
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """

    range = (-1.0, 1.0)
    citation = "Radford et al. 2021, CLIP, arXiv 2103.00020; Hessel et al. 2021, CLIPScore, arXiv 2104.08718"

    def __init__(
        self,
        model: str = "ViT-H-14-378-quickgelu",
        pretrained: str = DEFAULT_WEIGHTS,
        device: str | None = None,
        dtype: str = "fp32",
        microbatch: int = 32,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        if not isinstance(model, str) or not isinstance(pretrained, str):
            raise ValueError(f"model and pretrained must be strings, not {model!r} and {pretrained!r}")
        path = Path(model).expanduser()
        self.model, self.pretrained = model, None
        self.open_clip = model.startswith("hf-hub:") or (path / CONFIG).is_file()
        if (path / CONFIG).is_file():
            self.model = f"local-dir:{path}"
        elif path.is_dir() and not (path / "config.json").is_file():
            check_directory(model)
        elif not self.open_clip and not path.is_dir() and ("/" not in model or model.endswith(".json")):
            self.open_clip, self.pretrained = True, pretrained
        elif not self.open_clip:
            check_reference(model, "model", 2)
        if self.pretrained is None and pretrained != DEFAULT_WEIGHTS:
            raise ValueError(f"{model!r} brings its own weights: leave pretrained={pretrained!r} out")
        if self.open_clip:
            for module, install in OPEN_CLIP.items():
                require(module, install, f"clip_score with {model!r}")
        if self.pretrained is not None:
            check_architecture(model)

    def load_network(self) -> nn.Module:
        """The two towers."""
        if self.open_clip:
            return OpenClipEncoder(self.model, self.pretrained)
        return TransformersEncoder(self.model)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        return network.match(images, [prompt.text for prompt in prompts])


class PickScore(RewardModel):
    """PickScore, what people would pick: higher pleases more and fits the prompt better.

    The cosine of the picture's and the prompt's embeddings times exp(logit_scale), about 18 to 26. flow_grpo and
    Flow-Factory divide it by 26, MixGRPO takes (score - 18) / 8: ``scale(pickscore, 0.125, -2.25)``.

    Args:
        checkpoint: a directory with a CLIP model of transformers, or "owner/name" on the Hugging Face hub.
        processor: the same of its tokenizer and image processor.
        device: as in `RewardModel`.
        dtype: as in `RewardModel`.
        microbatch: as in `RewardModel`.
    """

    citation = "Kirstain et al. 2023, Pick-a-Pic, arXiv 2305.01569"

    def __init__(
        self,
        checkpoint: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        dtype: str = "fp32",
        microbatch: int = 32,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        check_reference(checkpoint, "checkpoint", 2)
        check_reference(processor, "processor", 2)
        self.checkpoint, self.processor = checkpoint, processor

    def load_network(self) -> nn.Module:
        """The two towers."""
        return TransformersEncoder(self.checkpoint, self.processor)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        network: Any = self.network
        return network.cosine(images, [prompt.text for prompt in prompts]) * network.scale
