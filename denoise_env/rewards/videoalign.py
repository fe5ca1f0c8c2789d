"""VideoAlign's rewards of clips: visual quality, motion quality and text alignment (arXiv 2501.13918)."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from denoise_env.arguments import boolean, number
from denoise_env.prompts import Prompt
from denoise_env.rewards.base import RewardModel
from denoise_env.rewards.qwen2vl import (
    Head,
    RewardTokens,
    check_source,
    find_file,
    fit_size,
    load,
    merge_lora,
    rename,
    to_uint8,
)

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
RAW_MEAN = (3.6757, 1.1646, 2.8105)
RAW_STD = (2.2476, 1.3811, 2.5121)
"""Of the raw scores VQ, MQ and TA (inference_config of the published model_config.json)."""
LORA_ALPHA = 128
SAMPLED_FPS, MIN_FRAMES, MAX_FRAMES = 2, 4, 768
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 256 * 28 * 28
KEPT = 4096
TEMPLATE = """
You are tasked with evaluating a generated video based on three distinct criteria: Visual Quality, Motion Quality, and \
Text Alignment. Please provide a rating from 0 to 10 for each of the three categories, with 0 being the worst and 10 \
being the best. Each evaluation should be independent of the others.

**Visual Quality:** \x20
Evaluate the overall visual quality of the video, with a focus on static factors. The following sub-dimensions should \
be considered:
- **Reasonableness:** The video should not contain any significant biological or logical errors, such as abnormal body \
structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the video. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., \
hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the video, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The video should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

Please provide the ratings of Visual Quality: <|VQ_reward|>
END

**Motion Quality:** \x20
Assess the dynamic aspects of the video, with a focus on dynamic factors. Consider the following sub-dimensions:
- **Stability:** Evaluate the continuity and stability between frames. There should be no sudden, unnatural jumps, and \
the video should maintain stable attributes (e.g., no fluctuating colors, textures, or missing body parts).
- **Naturalness:** The movement should align with physical laws and be realistic. For example, clothing should flow \
naturally with motion, and facial expressions should change appropriately (e.g., blinking, mouth movements).
- **Aesthetic Quality:** The movement should be smooth and fluid. The transitions between different motions or camera \
angles should be seamless, and the overall dynamic feel should be visually pleasing.
- **Fusion:** Ensure that elements in motion (e.g., edges of the subject, hair, clothing) blend naturally with the \
background, without obvious artifacts or the feeling of cut-and-paste effects.
- **Clarity of Motion:** The video should be clear and smooth in motion. Pay attention to any areas where the video \
might have blurry or unsteady sections that hinder visual continuity.
- **Amplitude:** If the video is largely static or has little movement, assign a low score for motion quality.

Please provide the ratings of Motion Quality: <|MQ_reward|>
END

**Text Alignment:** \x20
Assess how well the video matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the video (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Motion Relevance:** Evaluate if the dynamic actions (e.g., gestures, posture, facial expressions like talking or \
blinking) align with the described prompt. The motion should match the prompt in terms of type, scale, and direction.
- **Environment Relevance:** Assess whether the background and scene fit the prompt. This includes checking if \
real-world locations or scenes are accurately represented, though some stylistic adaptation is acceptable. \x20
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the video \
adheres to this style.
- **Camera Movement Relevance:** Check if the camera movements (e.g., following the subject, focus shifts) are \
consistent with the expected behavior from the prompt.

Textual prompt - {text_prompt}
Please provide the ratings of Text Alignment: <|TA_reward|>
END
"""
"""The text the checkpoint was trained with (KwaiVGI/VideoAlign, prompt_template.py, "detailed_special"; MIT)."""


def frame_indices(count: int, fps: float) -> list[int]:
    """Which frames of a clip are looked at: an even number, about two a second, evenly spread from first to last.

    Raises:
        ValueError: fewer than two frames.
    """
    if count < 2:
        raise ValueError(f"VideoAlign scores clips of at least 2 frames, not {count}")
    most = min(MAX_FRAMES, count) // 2 * 2
    number = round(min(max(count / fps * SAMPLED_FPS, MIN_FRAMES), most) / 2) * 2
    return torch.linspace(0, count - 1, number).round().long().tolist()


def look(clip: Tensor, fps: float) -> Tensor:
    """What the network sees of a clip ``[F, 3, H, W]`` in [0, 1]: ``[n, 3, h, w]`` uint8."""
    frames = to_uint8(clip[frame_indices(len(clip), fps)]).float()
    size = fit_size(clip.shape[-2], clip.shape[-1], MIN_PIXELS, MAX_PIXELS)
    resized = interpolate(frames, size, mode="bicubic", align_corners=False, antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8)


class VideoAlignNetwork(RewardTokens):
    """The network, with the raw scores ``known`` of the clips it has seen last."""

    def __init__(self, backbone: nn.Module, head: Head, tokenizer: object) -> None:
        super().__init__(backbone, head, tokenizer, TOKENS, TEMPLATE, "video")
        self.known: dict[bytes, list[float]] = {}

    def scores(self, clips: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Raw scores VQ, MQ, TA ``[b, 3]``, on the CPU; NaN where the prompt is not `readable`."""
        keys = [_digest(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self.known and self.readable(prompts[i])]
        if new:
            rows = self([clips[i] for i in new], [prompts[i] for i in new]).squeeze(-1).tolist()
            self.known.update(zip((keys[i] for i in new), rows, strict=True))
        scores = torch.tensor([self.known.get(key, [torch.nan] * 3) for key in keys])
        for key in list(self.known)[:-KEPT]:
            del self.known[key]
        return scores


def _digest(clip: Tensor, prompt: str) -> bytes:
    digest = blake2b(f"{[*clip.shape]}{prompt}".encode(), digest_size=16)
    digest.update(clip.contiguous().cpu().numpy().data)
    return digest.digest()


_NETWORKS: WeakValueDictionary[tuple[object, ...], VideoAlignNetwork] = WeakValueDictionary()


class VideoAlign(RewardModel):
    """VideoAlign: visual and motion quality and text alignment of a clip, added up.

    Each of the three is about N(0, 1) on the authors' data, and so unbounded. Rewards that name the same checkpoint,
    device and precision share one network, and a clip that one of them has scored costs the others nothing. Unlike
    DanceGRPO's, no video file is written in between. A prompt with a special token of the tokenizer in it is NaN.

    Args:
        checkpoint: hub id, folder with ``checkpoint-11352/model.pth`` in it, or that file.
        base: hub id or folder of Qwen2-VL-2B-Instruct; its configuration and tokenizer are read.
        fps: frames per second of the clips, two of which the network looks at.
        normalised: whether the scores are normalised by the published mean and standard deviation.
        device: where the network runs; default: where the clips are.
        dtype: precision; published scores are of "bf16".
        microbatch: clips per call of the network.

    Raises:
        ValueError: an argument out of its range, or a file that is not there. When called: a clip of one frame.
    """

    takes = "clips"
    citation = "VideoAlign (arXiv 2501.13918)"
    part: ClassVar[int | None] = None

    def __init__(
        self,
        checkpoint: str = "KlingTeam/VideoReward",
        base: str = "Qwen/Qwen2-VL-2B-Instruct",
        fps: float = 8.0,
        normalised: bool = True,
        device: str | None = None,
        dtype: str = "bf16",
        microbatch: int = 4,
    ) -> None:
        super().__init__(device, dtype, microbatch)
        check_source(checkpoint, "checkpoint-11352/model.pth", "VideoAlign's checkpoint")
        check_source(base, "config.json", "Qwen2-VL-2B-Instruct")
        self.checkpoint, self.base = checkpoint, base
        self.fps = number(fps, "fps", at_least=1e-3)
        self.normalised = boolean(normalised, "normalised")

    def load_network(self) -> VideoAlignNetwork:
        """As in `RewardModel`; the network of another reward with the same checkpoint, device and precision."""
        key = (self.checkpoint, self.base, self.device, self.dtype)
        network = _NETWORKS.get(key)
        if network is None:
            path = find_file(self.checkpoint, "checkpoint-11352/model.pth")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = merge_lora(rename(state), LORA_ALPHA)
            backbone, weights, tokenizer = load(self.base, state, self.dtype, TOKENS)
            head = Head(nn.Linear(weights["weight"].shape[1], 1, bias=False))
            head[0].load_state_dict(weights)
            network = _NETWORKS[key] = VideoAlignNetwork(backbone, head, tokenizer)
        return network

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """As in `RewardModel`."""
        assert isinstance(self.network, VideoAlignNetwork)
        scores = self.network.scores([look(clip, self.fps) for clip in images], [prompt.text for prompt in prompts])
        if self.normalised:
            scores = (scores - torch.tensor(RAW_MEAN)) / torch.tensor(RAW_STD)
        return scores.sum(1) if self.part is None else scores[:, self.part]


class VideoAlignVQ(VideoAlign):
    """VideoAlign's visual quality of a clip: how good its frames look, whatever the prompt."""

    part = 0


class VideoAlignMQ(VideoAlign):
    """VideoAlign's motion quality of a clip: how stable, natural and lively its motion is."""

    part = 1


class VideoAlignTA(VideoAlign):
    """VideoAlign's text alignment of a clip: how well it shows what the prompt says."""

    part = 2
