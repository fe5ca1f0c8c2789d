"""What a reward of moving shapes can learn from: clips that are spoilt in known ways, and captions that are wrong."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS, SHAPES
from denoise_env.shapes.motion.grammar import MOTIONS, SPEEDS, Motion, caption, parse
from denoise_env.shapes.motion.renderer import FRAMES, draw, encode, paths, render

WORDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "background": tuple(BACKGROUNDS),
    "motion": tuple(MOTIONS),
    "speed": tuple(SPEEDS),
}
"""Parts of a caption → their words, in the order of `encode`."""
SHARES = {"colour": 0.15, "shape": 0.2, "background": 0.1, "motion": 0.35, "speed": 0.2}
"""How often the wrong caption of a pair is wrong in each part."""


@dataclass(frozen=True)
class Drawn:
    """n clips and what was done to them.

    Attributes:
        clips: ``[n, FRAMES, 3, 32, 32]`` in [0, 1].
        path: ``[n, FRAMES, 3]`` of the object, as `paths` has it, in the frames as they are shown.
        looks: ``[n]`` how far the frames are spoilt, in [0, 1], and ...
        motion: ``[n]`` how far the motion is.
    """

    clips: Tensor
    path: Tensor
    looks: Tensor
    motion: Tensor


def draw_spoilt(captions: Sequence[str], others: Sequence[str], generator: torch.Generator) -> Drawn:
    """Draw clips of n captions, most of them spoilt.

    In half of them the frames are shuffled, stop, shake, or change colour. In three of five, each with a strength of
    its own, the frames are blurred, coarse as from a small autoencoder, noisy, faded, smeared over time, or show as a
    ghost what one of the n other captions says.
    """
    n = len(captions)
    colour, shape, background, motion, speed = encode(captions).unbind(-1)
    kind = torch.randint(8, (n,), generator=generator)[:, None]
    strength = torch.rand(n, 1, generator=generator)
    time = torch.arange(FRAMES).expand(n, -1)
    shuffled = torch.rand(n, FRAMES, generator=generator).argsort(-1)
    order = torch.where(kind == 0, shuffled, time)
    order = torch.where(kind == 1, order.minimum((FRAMES * (1 - strength)).long()), order)
    path = paths(motion, speed, generator).gather(1, order[..., None].expand(-1, -1, 3))
    shake = torch.randn(n, FRAMES, 3, generator=generator) * torch.tensor([1.0, 1.0, 0.0])
    path = path + 2.5 * strength[..., None] * shake * (kind == 2)[..., None]
    clips = draw(path, colour, shape, background)
    changed = (kind == 3) & (torch.rand(n, FRAMES, generator=generator) < 0.2 + 0.3 * strength)
    clips = torch.where(changed[..., None, None, None], clips.roll(1, 2), clips)  # red, green, blue in turn
    damage = torch.where(kind == 0, 1.0, strength) * (kind < 4)

    strengths = torch.rand(n, 6, generator=generator) * (torch.rand(n, 6, generator=generator) < 0.2)
    strengths = strengths * (torch.rand(n, 1, generator=generator) < 0.6)
    blur, coarse, noise, fade, smear, ghost = strengths.T[..., None, None, None, None]
    clips = torch.lerp(clips, render(others, generator), 0.7 * ghost)
    around = torch.cat([clips[:, :1], clips, clips[:, -1:]], 1).unfold(1, 3, 1).mean(-1)
    clips = torch.lerp(clips, around, smear)
    frames = clips.flatten(0, 1)
    pooled = F.avg_pool2d(frames, 5, 1, 2, count_include_pad=False).view_as(clips)
    small = F.interpolate(F.avg_pool2d(frames, 4), scale_factor=4, mode="bilinear").view_as(clips)
    clips = torch.lerp(torch.lerp(clips, pooled, blur), small, coarse)
    clips = torch.lerp(clips, clips.mean((1, 3, 4), keepdim=True), 0.8 * fade)
    clips = clips + 0.3 * noise * torch.randn(clips.shape, generator=generator)
    return Drawn(clips.clamp(0, 1), path, strengths.sum(1).clamp(max=1), damage[:, 0])


def near_miss(
    text: str, generator: torch.Generator, part: str | None = None, allowed: Container[str] | None = None
) -> str:
    """A caption that differs in one part only.

    Args:
        text: the right caption.
        generator: the source of randomness.
        part: which part; by default one drawn by `SHARES`.
        allowed: which captions may come out, if it is not all; where none differs in the part, another is drawn.
    """
    scene = parse(text)
    while True:
        chosen = part or [*SHARES][int(torch.tensor([*SHARES.values()]).multinomial(1, generator=generator))]
        words = [word for word in WORDS[chosen] if word != getattr(scene, chosen)]
        texts = [caption(Motion(**{**vars(scene), chosen: word})) for word in words]
        texts = [text for text in texts if allowed is None or text in allowed]
        if texts:
            return texts[int(torch.randint(len(texts), (1,), generator=generator))]


def choose(captions: Sequence[str], n: int, generator: torch.Generator) -> list[str]:
    """n random captions."""
    return [captions[i] for i in torch.randint(len(captions), (n,), generator=generator).tolist()]
