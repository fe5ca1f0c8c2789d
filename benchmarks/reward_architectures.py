"""The rewards that hold a network, at their published architecture and with random weights. No hub is needed.

Sizes are those of the published configurations. Weights are one random block over and over: what they are changes no
time, but that GenEval's detector finds nothing, so that no colour is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reward_tokenizers import bert_tokenizer, published_clip_tokenizer, qwen2_tokenizer
from denoise_env.rewards import hpsv3, videoalign
from denoise_env.rewards.aesthetic import Aesthetic
from denoise_env.rewards.base import RewardModel
from denoise_env.rewards.clip_score import ClipScore, PickScore
from denoise_env.rewards.encoders import OpenClipEncoder, TransformersEncoder
from denoise_env.rewards.geneval import GenEval, Networks
from denoise_env.rewards.geneval.networks import ClipColors, Mask2FormerDetector, load_mask2former
from denoise_env.rewards.geneval.rules import CLASSES
from denoise_env.rewards.heads import LinearHead
from denoise_env.rewards.hps import HPS, HPSPreprocess
from denoise_env.rewards.hpsv3 import HPSv3
from denoise_env.rewards.image_reward import ImageReward
from denoise_env.rewards.preprocess import Preprocess
from denoise_env.rewards.qwen2vl import Head, RewardTokens
from denoise_env.rewards.videoalign import VideoAlign, VideoAlignNetwork
from denoise_env.rewards.visionreward import Answerer, VisionReward

DEPTH: int | None = None
"""Layers that are left of every stack; ``None`` leaves all."""
LARGE = {"patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"}
HUGE = {"patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu"}


# --- The networks ---


def _stack(width: int, heads: int, layers: int, **more: Any) -> dict[str, Any]:
    """A transformer's sizes, as most configurations of transformers name them."""
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return {**sizes, "num_hidden_layers": DEPTH or layers, **more}


def _clip(text: dict[str, Any], vision: dict[str, Any], **shared: Any) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    model = CLIPModel(
        CLIPConfig(
            text_config={**text, **shared, **ids},
            vision_config={**vision, **shared},
            projection_dim=shared["projection_dim"],
        )
    )
    model.logit_scale = nn.Parameter(torch.tensor(4.6052))
    return model


def clip_large() -> nn.Module:
    """OpenAI's CLIP ViT-L/14, in transformers."""
    return _clip(_stack(768, 12, 12), _stack(1024, 16, 24), **LARGE)


def clip_huge() -> nn.Module:
    """LAION's CLIP ViT-H/14, in transformers: PickScore's."""
    return _clip(_stack(1024, 16, 24), _stack(1280, 16, 32), **HUGE)


def open_clip_model(name: str) -> nn.Module:
    """An architecture of open_clip's."""
    import open_clip

    config: Any = open_clip.get_model_config(name)
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["layers"] = DEPTH or config[tower]["layers"]
    return open_clip.CLIP(**config)


def blip() -> nn.Module:
    """ImageReward's BLIP: a ViT-L/16 and a BERT-base with cross-attention."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionConfig(image_size=224, patch_size=16, **_stack(1024, 16, 24))
    text = BlipTextConfig(
        vocab_size=30524, encoder_hidden_size=1024, max_position_embeddings=512, is_decoder=True, **_stack(768, 12, 12)
    )
    towers = {"vision": BlipVisionModel(vision), "text": BlipTextModel(text, add_pooling_layer=False)}
    return nn.ModuleDict(towers)


def _qwen_ids() -> dict[str, int]:
    find = qwen2_tokenizer().convert_tokens_to_ids
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    return {f"{name.removesuffix('_pad')}_token_id": find(f"<|{name}|>") for name in names}


def _qwen_text(width: int, inner: int, heads: int, keys: int, tokens: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = _stack(width, heads, 28, num_key_value_heads=keys, vocab_size=tokens)
    return {**sizes, "intermediate_size": inner, "rms_norm_eps": 1e-6, "rope_parameters": rope}


def _qwen2_vl(width: int, inner: int, heads: int, keys: int, tokens: int) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    vision = {"depth": DEPTH or 32, "embed_dim": 1280, "hidden_size": width}
    text = _qwen_text(width, inner, heads, keys, tokens)
    return Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_ids()))


def qwen2_vl_2b() -> nn.Module:
    """Qwen2-VL-2B with VideoAlign's three tokens, without ``lm_head``."""
    return _qwen2_vl(1536, 8960, 12, 2, 151660)


def qwen2_vl_7b() -> nn.Module:
    """Qwen2-VL-7B with HPSv3's token, without ``lm_head``."""
    return _qwen2_vl(3584, 18944, 28, 4, 151658)


def qwen2_5_vl_7b() -> nn.Module:
    """Qwen2.5-VL-7B, that answers VisionReward's questions."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": DEPTH or 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    text = _qwen_text(3584, 18944, 28, 4, 152064)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids()))


def mask2former() -> nn.Module:
    """GenEval's detector: a Mask2Former with a Swin-S backbone, for the instances of COCO."""
    from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    depths = [DEPTH or count for count in (2, 2, 18, 2)]
    swin = SwinConfig(embed_dim=96, depths=depths, num_heads=[3, 6, 12, 24], window_size=7, out_features=stages)
    names = dict(enumerate(CLASSES))
    config = Mask2FormerConfig(
        backbone_config=swin,
        id2label=names,
        encoder_layers=DEPTH or 6,
        decoder_layers=1 + (DEPTH or 9),
    )
    parts = {"model": Mask2FormerModel(config), "class_predictor": nn.Linear(config.hidden_dim, len(names) + 1)}
    return nn.ModuleDict(parts)


# --- Their weights ---


def drawn(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network of this precision with random weights; to draw each of a billion takes long."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            network = make()
    finally:
        torch.set_default_dtype(before)
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            for part in parameter.data.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
        elif parameter.ndim:
            parameter.data.fill_(float(name.endswith("weight")))
    return network


# --- The rewards ---


class _OpenClip(OpenClipEncoder):
    def __init__(self, name: str) -> None:
        import open_clip

        model: Any = drawn(lambda: open_clip_model(name))
        self.tokenizer = open_clip.get_tokenizer(name)
        super(OpenClipEncoder, self).__init__(model, Preprocess(tuple(model.visual.image_size)))


class _Transformers(TransformersEncoder):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.tokenizer = published_clip_tokenizer()
        self.options = {"padding": True, "max_length": 77, "truncation": True, "return_tensors": "pt"}
        super(TransformersEncoder, self).__init__(drawn(make), Preprocess((224, 224), crop="floor"))


class RandomHPS(HPS):
    """HPS-v2.1."""

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        network = _OpenClip(self.architecture)
        network.preprocess = HPSPreprocess(network.preprocess)
        return network


class RandomClipScore(ClipScore):
    """CLIPScore, of open_clip's architectures and of CLIP ViT-L/14."""

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        return _OpenClip(self.model) if self.open_clip else _Transformers(clip_large)


class RandomPickScore(PickScore):
    """PickScore."""

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        return _Transformers(clip_huge)


class RandomAesthetic(Aesthetic):
    """LAION's aesthetics."""

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        network: Any = drawn(clip_large)
        del network.text_model, network.text_projection
        self.preprocess, self.predictor = Preprocess((224, 224), crop="floor"), LinearHead(768)
        return network


class RandomImageReward(ImageReward):
    """ImageReward."""

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        self.tokenizer, self.head, self.preprocess = bert_tokenizer(), LinearHead(768), Preprocess((224, 224))
        return drawn(blip)


class RandomVideoAlign(VideoAlign):
    """VideoAlign, the sum of its three."""

    def load_network(self) -> VideoAlignNetwork:
        """As in `RewardModel`."""
        head = Head(nn.Linear(1536, 1, bias=False))
        return VideoAlignNetwork(drawn(qwen2_vl_2b, self.dtype), head, qwen2_tokenizer(videoalign.TOKENS))


class RandomHPSv3(HPSv3):
    """HPSv3."""

    def load_network(self) -> RewardTokens:
        """As in `RewardModel`."""
        layers = (nn.Linear(3584, 1024), nn.ReLU(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
        tokenizer = qwen2_tokenizer([hpsv3.TOKEN])
        network = drawn(qwen2_vl_7b, self.dtype)
        return RewardTokens(network, Head(*layers), tokenizer, [hpsv3.TOKEN], hpsv3.TEMPLATE, "image")


class RandomVisionReward(VisionReward):
    """VisionReward of images, with questions and weights of the published form."""

    def __init__(self, dtype: str = "bf16") -> None:
        with TemporaryDirectory() as directory:
            questions, weights = Path(directory) / "questions", Path(directory) / "weights"
            questions.write_text("Is the picture sharp and are its colours beautiful?\n" * 30)
            weights.write_text('{"coef": [' + ", ".join(["0.1"] * 28) + '], "intercept": [0.0]}')
            super().__init__(str(questions), str(weights), dtype=dtype)

    def load_network(self) -> nn.Module:
        """As in `RewardModel`."""
        from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

        tokenizer, pixels = qwen2_tokenizer(), Qwen2VLImageProcessor()
        processor = Qwen2_5_VLProcessor(
            pixels, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template
        )
        return Answerer(drawn(qwen2_5_vl_7b, self.dtype), processor)


class _Colors(ClipColors):
    def __init__(self) -> None:
        from transformers import CLIPImageProcessorPil

        nn.Module.__init__(self)
        self.clip, self.processor = drawn(clip_large), CLIPImageProcessorPil()
        self.tokenizer, self.texts = published_clip_tokenizer(), dict[str, Tensor]()


class RandomGenEval(GenEval):
    """GenEval."""

    def __init__(self, dtype: str = "fp32") -> None:
        super().__init__()

    def load_network(self) -> nn.Module:
        """As in `RewardModel`; the detector is read from a checkpoint as a published one is."""
        from safetensors.torch import save_file

        network: Any = mask2former()
        with TemporaryDirectory() as directory:
            network["model"].config.save_pretrained(directory)
            save_file(network.state_dict(), Path(directory) / "model.safetensors", {"format": "pt"})
            detector = Mask2FormerDetector(load_mask2former(directory), self.resolution)
        return Networks(detector, _Colors())


@dataclass(frozen=True)
class Published:
    """A reward with random weights.

    Attributes:
        make: the reward of a precision, "fp32" or "bf16".
        networks: the large networks that it loads, which can be made on the meta device too.
        dtype: the precision that scores were published with.
    """

    make: Callable[[str], RewardModel]
    networks: tuple[Callable[[], nn.Module], ...]
    dtype: str = "fp32"

    def parameters(self) -> int:
        """How many parameters the networks have, without making them."""
        with torch.device("meta"):
            return sum(p.numel() for make in self.networks for p in make().parameters())


_LARGE, _DFN = "openai/clip-vit-large-patch14", "ViT-H-14-378-quickgelu"

PUBLISHED: dict[str, Published] = {
    "aesthetic": Published(lambda dtype: RandomAesthetic(dtype=dtype), (clip_large,)),
    "clip_score": Published(lambda dtype: RandomClipScore(dtype=dtype), (lambda: open_clip_model(_DFN),)),
    f'clip_score("{_LARGE}")': Published(lambda dtype: RandomClipScore(_LARGE, dtype=dtype), (clip_large,)),
    "geneval": Published(RandomGenEval, (mask2former, clip_large)),
    "hps": Published(lambda dtype: RandomHPS(dtype=dtype), (lambda: open_clip_model("ViT-H-14"),)),
    "hpsv3": Published(lambda dtype: RandomHPSv3(dtype=dtype), (qwen2_vl_7b,), "bf16"),
    "image_reward": Published(lambda dtype: RandomImageReward(dtype=dtype), (blip,)),
    "pickscore": Published(lambda dtype: RandomPickScore(dtype=dtype), (clip_huge,)),
    "videoalign": Published(lambda dtype: RandomVideoAlign(dtype=dtype), (qwen2_vl_2b,), "bf16"),
    "visionreward": Published(RandomVisionReward, (qwen2_5_vl_7b,), "bf16"),
}
"""A reward's expression → it at its published architecture."""
