"""Make the embedded world's reward models from nothing: a CLIP, and an HPS that it becomes by learning preferences.

``python -m denoise_env.shapes.pretrain_clip --out DIR`` writes ``DIR/clip`` and ``DIR/hps``, checkpoints of open_clip
(``local-dir:DIR/clip``). Both are proxies of the verifier, as CLIP and HPS are of what people like: how far they
agree with it is printed.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from denoise_env.progress import progress
from denoise_env.shapes.grammar import ALL, BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, TRAIN, Scene, caption, parse
from denoise_env.shapes.pretraining import step
from denoise_env.shapes.renderer import BASE_SIZE, render
from denoise_env.shapes.tokenizer import build_tokenizer
from denoise_env.shapes.verifier import Verifier


@dataclass
class Config:
    """Pretraining on rendered scenes; the defaults make the weights that ship with the package."""

    out: Path
    """Directory to write the two checkpoints to."""
    seed: int = 0
    """Seed of weights and pictures."""
    steps: int = 1200
    """Optimiser steps of the CLIP, a picture of each of the 60 captions in every step."""
    lr: float = 1e-3
    """Peak of the CLIP's one-cycle learning rate."""
    preference_steps: int = 600
    """Optimiser steps of the HPS, 60 pairs of pictures each."""
    preference_lr: float = 3e-4
    """Peak of the HPS's one-cycle learning rate."""
    doubt: float = 0.1
    """The gap between two pictures' scores at which who judges them prefers the better one with odds of e."""
    eval_times: int = 50
    """Pictures, and pairs of them, of each caption in what is printed at the end."""
    threads: int = 1
    """CPU threads; another number adds in another order, and gives slightly different weights."""


def architecture(vocabulary: int, length: int) -> dict[str, Any]:
    """open_clip's configuration of a ViT on 4 × 4 patches and a text tower of two layers."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": BASE_SIZE, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
        "text_cfg": {
            "context_length": length,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": ".",  # a checkpoint's directory holds its tokenizer
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    }


MEAN_STD = {"mean": [0.5] * 3, "std": [0.5] * 3}


def spoil(pictures: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """Pictures ``[n, 3, 32, 32]`` each with blur, noise and fading of its own strengths, up to ``most`` in [0, 1]."""
    blur, noise, fade = (most * torch.rand(3, len(pictures), generator=generator)).view(3, -1, 1, 1, 1)
    pictures = torch.lerp(pictures, F.avg_pool2d(pictures, 5, 1, 2, count_include_pad=False), blur)
    pictures = torch.lerp(pictures, pictures.mean((2, 3), keepdim=True), fade * 0.8)
    return (pictures + 0.3 * noise * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def near_miss(text: str, generator: torch.Generator) -> str:
    """A caption of another colour, shape or background."""
    scene = parse(text)
    words = {"colour": tuple(COLOURS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
    part = list(words)[int(torch.randint(3, (1,), generator=generator))]
    others = [word for word in words[part] if word != getattr(scene, part)]
    chosen = others[int(torch.randint(len(others), (1,), generator=generator))]
    return caption(Scene(**{**vars(scene), part: chosen}))


def pairs(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Two pictures for each caption, ``[n, 2, 3, 32, 32]`` in [0, 1]: right or nearly so, and more or less spoilt."""
    wrong = torch.rand(len(captions), 2, generator=generator) < 0.3
    told = [
        near_miss(text, generator) if miss else text
        for text, misses in zip(captions, wrong.tolist(), strict=True)
        for miss in misses
    ]
    return spoil(render(told, generator), generator, 1.0).view(-1, 2, 3, BASE_SIZE, BASE_SIZE)


class Towers:
    """A CLIP with its tokenizer: pictures in [0, 1] and captions to normalised embeddings."""

    def __init__(self, model: nn.Module, tokens: Callable[[Sequence[str]], Tensor]) -> None:
        self.model: Any = model
        self.tokens = tokens

    def images(self, pictures: Tensor) -> Tensor:
        """``[n, 64]``."""
        return self.model.encode_image(pictures * 2 - 1, normalize=True)

    def texts(self, captions: Sequence[str]) -> Tensor:
        """``[n, 64]``."""
        return self.model.encode_text(self.tokens(captions), normalize=True)


def train_clip(towers: Towers, config: Config, generator: torch.Generator) -> float:
    """Fit both towers by CLIP's contrastive loss (Radford et al. 2021); returns the mean loss of the last steps."""
    parameters = [*towers.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    losses: list[float] = []
    own = torch.arange(len(TRAIN))
    for _ in (bar := progress(range(config.steps), desc="clip")):
        pictures = spoil(render(TRAIN, generator), generator, 0.5)
        logits = towers.model.logit_scale.exp() * towers.images(pictures) @ towers.texts(TRAIN).T
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        step(loss, optimizer, schedule, parameters)
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    return sum(losses) / len(losses)


def train_preferences(towers: Towers, config: Config, generator: torch.Generator) -> float:
    """Fit both towers to preferences between two pictures of a caption (Wu et al. 2023, HPS v2, eq. 2).

    Who judges prefers picture a with the probability σ((s_a − s_b) / doubt) of the verifier's scores s; the model with
    the probability of a softmax over the scaled cosines.

    Returns:
        The mean loss of the last steps.
    """
    parameters = [*towers.model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.preference_lr, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, config.preference_lr, total_steps=config.preference_steps, pct_start=0.1)
    verifier = Verifier()
    losses: list[float] = []
    for _ in (bar := progress(range(config.preference_steps), desc="hps")):
        drawn = pairs(TRAIN, generator)
        with torch.no_grad():
            told = [text for text in TRAIN for _ in range(2)]
            gold = verifier.score(drawn.flatten(0, 1), told).view(-1, 2)
            preferred = torch.bernoulli(((gold[:, 0] - gold[:, 1]) / config.doubt).sigmoid(), generator=generator)
        loss = F.binary_cross_entropy_with_logits(margin(towers, drawn, TRAIN), preferred)
        step(loss, optimizer, schedule, parameters)
        losses = [*losses[-99:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    return sum(losses) / len(losses)


def margin(towers: Towers, drawn: Tensor, captions: Sequence[str]) -> Tensor:
    """By how much the first of two pictures ``[n, 2, 3, 32, 32]`` is nearer its caption, in logits ``[n]``."""
    images = towers.images(drawn.flatten(0, 1)).view(len(drawn), 2, -1)
    cosine = (images * towers.texts(captions)[:, None]).sum(-1)
    return towers.model.logit_scale.exp() * (cosine[:, 0] - cosine[:, 1])


@torch.no_grad()
def agreement(towers: Towers, captions: Sequence[str], generator: torch.Generator, times: int = 50) -> dict[str, float]:
    """How far a CLIP agrees with the renderer and the verifier on some captions.

    Returns:
        "zero-shot": the share of clean pictures, ``times`` of each caption, that are nearest to their own caption among
        all 72; "pairs": of as many pairs, those whose scores differ by more than 0.1, the share in which the CLIP
        prefers the picture that the verifier does.
    """
    verifier, right, hits = Verifier(), [], []
    texts = towers.texts(ALL)
    for _ in range(times):
        nearest = (towers.images(render(captions, generator)) @ texts.T).argmax(1)
        right += [ALL[place] == text for place, text in zip(nearest.tolist(), captions, strict=True)]
        drawn = pairs(captions, generator)
        doubled = [text for text in captions for _ in range(2)]
        gold = verifier.score(drawn.flatten(0, 1), doubled).view(-1, 2).diff(dim=1)[:, 0]
        hits.append(((margin(towers, drawn, captions) < 0) == (gold > 0))[gold.abs() > 0.1])
    return {"zero-shot": sum(right) / len(right), "pairs": torch.cat(hits).float().mean().item()}


def save(towers: Towers, config: dict[str, Any], tokenizer: Any, directory: Path) -> None:
    """Write a checkpoint in open_clip's layout, its weights in half precision."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: t.half().contiguous() for name, t in towers.model.state_dict().items()}
    save_file(weights, directory / "open_clip_model.safetensors")
    whole = {"model_cfg": config, "preprocess_cfg": {**MEAN_STD, "interpolation": "bicubic", "resize_mode": "shortest"}}
    (directory / "open_clip_config.json").write_text(json.dumps(whole, indent=1))
    tokenizer.save_pretrained(directory)


def pretrain(config: Config) -> None:
    """Build, train and save both models, and print what was measured."""
    from open_clip import CLIP

    started = time.perf_counter()
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    tokenizer = build_tokenizer(ALL)
    shape = architecture(len(tokenizer), tokenizer.model_max_length)
    model = CLIP(shape["embed_dim"], shape["vision_cfg"], shape["text_cfg"])

    def tokens(captions: Sequence[str]) -> Tensor:
        return tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids

    towers = Towers(model, tokens)
    for name, fit in (("clip", train_clip), ("hps", train_preferences)):
        loss = fit(towers, config, generator)
        save(towers, shape, tokenizer, config.out / name)
        size = sum(file.stat().st_size for file in (config.out / name).iterdir())
        print(f"{name}: loss {loss:.4f}, {size / 1e6:.2f} MB, {time.perf_counter() - started:.0f} s since the start")
        for split, captions in (("train", TRAIN), ("held out", HELD_OUT)):
            found = agreement(towers, captions, torch.Generator().manual_seed(config.seed + 1), config.eval_times)
            print(f"  {split}: " + ", ".join(f"{what} {share:.3f}" for what, share in found.items()))


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    config = tyro.cli(Config, args=args, description=Config.__doc__)
    torch.set_num_threads(config.threads)
    pretrain(config)


if __name__ == "__main__":
    main()
