"""Make a tiny VideoAlign of moving shapes from nothing.

``python -m denoise_env.shapes.pretrain_videoalign --out DIR`` writes ``DIR/checkpoint-11352/model.pth`` in the layout
of VideoAlign's checkpoint, without adapters, and ``DIR/base``, the configuration and tokenizer of a tiny Qwen2-VL. It
is a proxy of the verifier, as VideoAlign is of what people like: how far the two agree is printed.

Four stages: the vision tower learns to tell what moves and where to, first on close-ups of two frames, then on whole
frames; the language model, which is shown what the tower made of some clips, learns to score it; then both learn
together. VideoAlign's template is long, so the tokenizer has each of its lines as one token, and every word of a
caption. What comes before the caption is computed once for all captions of a clip.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLModel

from denoise_env.progress import progress
from denoise_env.prompts import Prompt
from denoise_env.rewards.qwen2vl import CHAT, Head, fit_size, load, rename, to_patches, to_uint8
from denoise_env.rewards.videoalign import (
    MAX_PIXELS,
    MIN_PIXELS,
    RAW_MEAN,
    RAW_STD,
    TEMPLATE,
    TOKENS,
    VideoAlignMQ,
    VideoAlignNetwork,
    VideoAlignTA,
    VideoAlignVQ,
    frame_indices,
    look,
)
from denoise_env.shapes.motion.agreement import Scores, agreement
from denoise_env.shapes.motion.grammar import ALL, HELD_OUT, TRAIN
from denoise_env.shapes.motion.renderer import FRAMES, encode
from denoise_env.shapes.motion.spoilt import WORDS, choose, draw_spoilt, near_miss
from denoise_env.shapes.motion.verifier import Reading, Verifier, total
from denoise_env.shapes.pretraining import step
from denoise_env.shapes.renderer import BASE_SIZE

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""Qwen2-VL's special tokens, in its order."""
PIECES = r"(?<![^\n])(?!Textual prompt - )[^\n]+\n+|\n+| ?[^\s\p{L}\p{N}]+| ?[\p{L}\p{N}]+|\s+"
"""What the tokenizer may make one token: a whole line but the prompt's, or there a word with the blank before it."""
WIDTH = 64
"""Of the vision tower and of the language model."""
FPS = 8.0
SEEN = frame_indices(FRAMES, FPS)
"""The frames of a clip that are looked at; each two are one slice to the vision tower."""
CLASSES = [len(words) for words in WORDS.values()]
LOOKS_OR_MOTION = [0, 0, 0, 1, 1]
"""Which of a clip's two `Pool.sure` a part is for."""
VISION_WEIGHTS = [0.5, 1.5, 0.5, 1.0, 1.0]
"""Of colour, shape, background, way and velocity in what the vision tower learns."""
CLOSE = 16
"""Side of a close-up in pixels."""


@dataclass
class Config:
    """Pretraining on rendered clips; the defaults are those of the weights that ship with the package."""

    out: Path
    """Directory to write the checkpoint to."""
    seed: int = 0
    """Seed of weights and clips."""
    clips: int = 2500
    """Rendered clips that are learnt from, more than half of them spoilt."""
    close_steps: int = 1500
    """Optimiser steps of the vision tower on 16 close-ups of two frames each, and ..."""
    whole_steps: int = 160
    """... on 16 times two whole frames each."""
    vision_lr: float = 3e-3
    """Peak of the one-cycle learning rate of the first; that of the second is half of it."""
    shown: int = 1500
    """Clips that the language model is shown as the vision tower saw them."""
    text_steps: int = 350
    """Optimiser steps of the language model, 16 such clips with four captions each."""
    text_lr: float = 2e-3
    """Peak of their one-cycle learning rate."""
    joint_steps: int = 120
    """Optimiser steps of both, 16 clips with four captions each."""
    joint_lr: float = 1e-3
    """Peak of their one-cycle learning rate."""
    doubt: float = 0.05
    """The gap between two scores of the verifier at which who judges them prefers the better with odds of e."""
    eval_clips: int = 240
    """Clips, as many spoilt as clean, in each line of what is printed at the end; 0 for none."""
    threads: int = 1
    """CPU threads; another number adds in another order, and gives slightly different weights."""


# --- The model ---


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs, learnt from VideoAlign's template about every caption, with Qwen2-VL's tokens."""
    bpe = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    marks = re.compile("|".join(re.escape(token) for token in (*SPECIAL, *TOKENS)))
    asked = [TEMPLATE.replace("{text_prompt}", text) for text in ALL]
    corpus = [CHAT[0], *(CHAT[1].replace("{text}", text) for text in asked)]
    bpe.train_from_iterator((part for text in corpus for part in marks.split(text)), trainer)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    return tokenizer


def architecture(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    """A Qwen2-VL of two vision layers and three of text; its rotary angles are for pictures and texts as small."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids([*SPECIAL]), strict=True))
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + len(TOKENS),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]},
            "initializer_range": 0.1,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": 2,
            "embed_dim": WIDTH,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "mlp_ratio": 2,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
            "initializer_range": 0.12,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def build_network(base: Path) -> VideoAlignNetwork:
    """Write the base model's configuration and tokenizer, and load the reward's network from there, random weights.

    Its head gives at each reward token, behind the score, the logits of what the clip shows (`CLASSES`) and of what
    is wrong in the caption; only the score's row is saved.
    """
    tokenizer = build_tokenizer()
    config = architecture(tokenizer)
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    backbone, _, tokenizer = load(str(base), rename(_named(Qwen2VLModel(config))), torch.float32, TOKENS)
    head = Head(nn.Linear(WIDTH, 1 + sum(CLASSES) + len(WORDS), bias=False))
    network = VideoAlignNetwork(backbone, head, tokenizer)
    with torch.no_grad():
        network.backbone.visual.patch_embed.proj.weight.mul_(0.5)  # it adds up over a thousand pixels, much alike
    network.train()
    return network


def _named(backbone: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}


def save(network: VideoAlignNetwork, directory: Path) -> None:
    """Write the weights to ``checkpoint-11352/model.pth``."""
    state = _named(network.backbone) | {"rm_head.weight": network.head.state_dict()["0.weight"][:1]}
    file = directory / "checkpoint-11352" / "model.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: tensor.detach().clone() for name, tensor in state.items()}, file)


# --- Clips ---


class Pool:
    """Spoilt clips of `TRAIN` captions, read by the verifier.

    Args:
        n: how many.
        generator: the source of randomness.

    Attributes:
        pixels: ``[n, FRAMES, 3, 32, 32]`` uint8.
        captions: what they were drawn of.
        scenes: ``[n, 5]`` the same, as `encode` has it.
        path: ``[n, FRAMES, 3]`` as in `Drawn`.
        sure: ``[n, 2]`` how far they show the scene's looks, and its motion, as drawn.
        labels: ``[n, 2]`` quality of looks and of motion, each half the verifier's and half how little was spoilt.
        middle: ``[3]`` means of the labels and of `fit`, half of the captions being wrong, and ...
        spread: ``[3]`` their standard deviations.
    """

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.verifier = Verifier()
        self.captions = choose(TRAIN, n, generator)
        self.scenes = encode(self.captions)
        pixels, path, damage, readings = [], [], [], []
        for start in progress(range(0, n, 100), desc="clips"):
            texts = self.captions[start : start + 100]
            drawn = draw_spoilt(texts, choose(TRAIN, len(texts), generator), generator)
            pixels.append(to_uint8(drawn.clips))
            path.append(drawn.path)
            damage.append(torch.stack([drawn.looks, drawn.motion], 1))
            readings.append(vars(self.verifier(drawn.clips)))
        self.pixels, self.path, left = torch.cat(pixels), torch.cat(path), 1 - torch.cat(damage)
        self.sure = torch.stack([left[:, 0], left[:, 0] * (left[:, 1] == 1)], 1)
        self.readings = {name: torch.cat([reading[name] for reading in readings]) for name in readings[0]}
        gold = self.verifier.compare(Reading(**self.readings), self.captions)
        self.labels = (torch.stack([gold["appearance"], gold["consistency"]], 1) + left) / 2
        allowed = {*TRAIN}
        wrong = [near_miss(text, generator, allowed=allowed) for text in self.captions[::2]]
        told = [*self.captions]
        told[::2] = wrong
        whole = torch.cat([self.labels, self.fit(torch.arange(n), told)[:, None]], 1)
        self.middle, self.spread = whole.mean(0), whole.std(0)

    def fit(self, rows: Tensor, captions: Sequence[str]) -> Tensor:
        """The verifier's scores of some clips against captions: ``[b]``."""
        reading = Reading(**{name: value[rows] for name, value in self.readings.items()})
        return total(self.verifier.compare(reading, captions))

    def look(self, rows: Tensor) -> list[Tensor]:
        """What the network sees of some clips."""
        return [look(clip / 255, FPS) for clip in self.pixels[rows]]

    def look_close(self, rows: Tensor, side: int, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """What the network would see of two frames of some clips, three frames apart, about the object.

        Args:
            rows: ``[b]`` places in the pool.
            side: side of what is seen, in pixels of the 32.
            generator: the source of randomness.

        Returns:
            The close-ups, and by how much x, y and width change from one frame of the clip to the next, ``[b, 3]``.
        """
        apart = SEEN[1] - SEEN[0]
        start = torch.randint(FRAMES - apart, (len(rows),), generator=generator)
        both = torch.stack([start, start + apart], 1)
        ends = self.path[rows[:, None], both]
        about = ends.mean(1)[:, :2] + 4 * torch.rand(len(rows), 2, generator=generator) - 2
        corners = (about - side / 2).round().long().clamp(0, BASE_SIZE - side).tolist()
        frames = self.pixels[rows[:, None], both]
        parts = [pair[..., y : y + side, x : x + side] for pair, (x, y) in zip(frames, corners, strict=True)]
        seen = fit_size(BASE_SIZE, BASE_SIZE, MIN_PIXELS, MAX_PIXELS)[0] * side // BASE_SIZE
        large = F.interpolate(torch.cat(parts).float(), (seen, seen), mode="bicubic", antialias=True)
        return [*large.clamp(0, 255).round().unflatten(0, (-1, 2))], ends.diff(dim=1)[:, 0] / apart


# --- Stages ---


def see(network: VideoAlignNetwork, pictures: Sequence[Tensor]) -> Tensor:
    """The vision tower's tokens of b clips of one size: ``[b, tokens, WIDTH]``."""
    patches, grids = zip(*(to_patches(picture) for picture in pictures), strict=True)
    tokens = network.backbone.visual(torch.cat(patches), grid_thw=torch.tensor(grids)).pooler_output
    return tokens.view(len(pictures), -1, WIDTH)


def read(network: VideoAlignNetwork, seen: Tensor, prompts: Sequence[str]) -> Tensor:
    """What the network gives for b clips as `see` saw them, each with k of the b · k prompts: ``[b · k, 3, outputs]``.

    The same as its forward pass, but what comes before the prompt is computed once for a clip.
    """
    each, language = len(prompts) // len(seen), network.backbone.language_model
    input_ids, positions = network.batch([network.token_ids(prompt, seen.shape[1]) for prompt in prompts], seen.device)
    common = int((input_ids == input_ids[0]).all(0)[:-1].long().cumprod(0).sum())
    embeddings = language.embed_tokens(input_ids)
    before = embeddings[::each, :common]
    shown = input_ids[::each, :common] == network.backbone.config.video_token_id
    before = before.masked_scatter(shown[..., None], seen)
    first = language(inputs_embeds=before, position_ids=positions[:, ::each, :common], use_cache=True)
    first.past_key_values.batch_repeat_interleave(each)
    then = language(
        inputs_embeds=embeddings[:, common:],
        position_ids=positions[..., common:],
        past_key_values=first.past_key_values,
    )
    hidden = torch.cat([first.last_hidden_state.repeat_interleave(each, 0), then.last_hidden_state], 1)
    return network.read(input_ids, hidden)


def train_vision(
    network: VideoAlignNetwork,
    reader: nn.Module,
    pool: Pool,
    side: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> float:
    """Fit the vision tower: the mean of its tokens of two frames tells looks, where to the object moves, how spoilt.

    Args:
        network: whose tower it is.
        reader: reads colour, shape and background, seven ways to go, the velocity and the quality off the mean.
        pool: the clips.
        side: side of what is seen of the frames, in pixels of the 32.
        steps: optimiser steps.
        lr: peak of the one-cycle learning rate.
        generator: the source of randomness.

    Returns:
        The mean loss of the last steps.
    """
    parameters = [*network.backbone.visual.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for _ in (bar := progress(range(steps), desc="vision")):
        rows = torch.randint(len(pool.pixels), (16,), generator=generator)
        pictures, velocity = pool.look_close(rows, side, generator)
        speed, axis = velocity.abs().max(1)
        way = torch.where(speed < 0.3, 6, 2 * axis + (velocity.gather(1, axis[:, None])[:, 0] > 0))
        told = reader(see(network, pictures).mean(1)).split([*CLASSES[:3], 7, 3, 1], -1)
        wanted = [*pool.scenes[rows, :3].unbind(-1), way]
        losses_each = [F.cross_entropy(*pair, reduction="none") for pair in zip(told[:4], wanted, strict=True)]
        losses_each.append(F.smooth_l1_loss(told[4], velocity.clamp(-3, 3), reduction="none").mean(1))
        loss = (torch.stack(losses_each, 1) @ torch.tensor(VISION_WEIGHTS) * pool.sure[rows, 0]).mean()
        loss = loss + F.mse_loss(told[5][:, 0], pool.labels[rows, 0])
        step(loss, optimizer, schedule, parameters)
        losses = [*losses[-49:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    return sum(losses) / len(losses)


def train_scores(
    network: VideoAlignNetwork,
    pool: Pool,
    show: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    clips: int,
    steps: int,
    lr: float,
    doubt: float,
    generator: torch.Generator,
) -> float:
    """Fit the scores to the pool's labels, and to preferences between two clips and between two captions of a clip.

    Of a clip's four captions one is right, two are wrong in one part, and the last is another altogether.

    Args:
        network: whose scores they are.
        pool: the clips.
        show: places in the pool ``[b]`` → what the vision tower makes of them, as `see` has it.
        parameters: what is trained.
        clips: how many of the pool's are used.
        steps: optimiser steps.
        lr: peak of the one-cycle learning rate.
        doubt: as in `Config`.
        generator: the source of randomness.

    Returns:
        The mean loss of the last steps.
    """
    allowed = {*TRAIN}
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for _ in (bar := progress(range(steps), desc="scores")):
        rows = torch.randint(clips, (16,), generator=generator)
        texts: list[str] = []
        for right in [pool.captions[i] for i in rows.tolist()]:
            misses = [near_miss(right, generator, allowed=allowed) for _ in range(2)]
            texts += [right, *misses, *choose(TRAIN, 1, generator)]
        places = rows.repeat_interleave(4)
        gold = torch.cat([pool.labels[places], pool.fit(places, texts)[:, None]], 1)
        found, told, wrong = read(network, show(rows), texts).split([1, sum(CLASSES), len(WORDS)], -1)
        scores = (found[..., 0] - torch.tensor(RAW_MEAN)) / torch.tensor(RAW_STD)
        loss = F.smooth_l1_loss(scores, (gold - pool.middle) / pool.spread)
        loss = loss + prefer(
            scores[::4, :2], scores[::4, :2].roll(1, 0), gold[::4, :2], gold[::4, :2].roll(1, 0), doubt
        )
        ta, fit = scores[:, 2].view(-1, 4), gold[:, 2].view(-1, 4)
        loss = loss + prefer(ta[:, :1], ta[:, 1:], fit[:, :1], fit[:, 1:], doubt)
        loss = loss + classify(told[::4, 1], pool.scenes[rows], pool.sure[rows])
        differ = (encode(texts) != pool.scenes[places]).float()
        doubted = F.binary_cross_entropy_with_logits(wrong[:, 2], differ, reduction="none")
        loss = loss + 2 * (doubted * pool.sure[places][:, LOOKS_OR_MOTION]).mean()
        step(loss, optimizer, schedule, parameters)
        losses = [*losses[-49:], loss.item()]
        bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}", refresh=False)
    return sum(losses) / len(losses)


def prefer(one: Tensor, other: Tensor, gold: Tensor, other_gold: Tensor, doubt: float) -> Tensor:
    """Bradley and Terry's loss of scores, where the one is preferred with the probability σ(gap of gold / doubt)."""
    margin, gap = 3 * (one - other), gold - other_gold
    return F.binary_cross_entropy_with_logits(margin, (gap / doubt).sigmoid())


def classify(logits: Tensor, scenes: Tensor, sure: Tensor) -> Tensor:
    """Cross-entropy of the five words of what was drawn, by how surely it shows."""
    pairs = zip(logits.split(CLASSES, -1), scenes.unbind(-1), strict=True)
    losses = [F.cross_entropy(part, words, reduction="none") for part, words in pairs]
    return (torch.stack(losses, 1) * sure[:, LOOKS_OR_MOTION]).mean()


def rewards_of(directory: Path) -> Scores:
    """The three rewards with a checkpoint's weights, in fp32."""
    rewards = [
        kind(str(directory), str(directory / "base"), dtype="fp32")
        for kind in (VideoAlignVQ, VideoAlignMQ, VideoAlignTA)
    ]
    return lambda clips, texts: torch.stack([reward(clips, [Prompt(text) for text in texts]) for reward in rewards], 1)


def pretrain(config: Config) -> None:
    """Build, train and save the network, and print what was measured."""
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    network = build_network(config.out / "base")
    visual, language = network.backbone.visual, network.backbone.language_model

    def report(what: str) -> None:
        print(f"{what}, {time.perf_counter() - started:.0f} s since the start", flush=True)

    pool = Pool(config.clips, generator)
    report(f"{config.clips} clips")
    reader = nn.Linear(WIDTH, sum(CLASSES[:3]) + 7 + 3 + 1)
    for side, steps, lr in ((CLOSE, config.close_steps, 1.0), (BASE_SIZE, config.whole_steps, 1 / 2)):
        loss = train_vision(network, reader, pool, side, steps, lr * config.vision_lr, generator)
        report(f"vision of {side} pixels: loss {loss:.4f}")
    with torch.no_grad():
        rows = progress(torch.arange(config.shown).split(16), desc="shown")
        seen = torch.cat([see(network, pool.look(part)) for part in rows])
    report(f"{config.shown} clips shown")
    text = [*language.parameters(), *network.head.parameters()]
    both = [*visual.parameters(), *text]
    for name, show, parameters, clips, steps, lr in (
        ("text", lambda rows: seen[rows], text, config.shown, config.text_steps, config.text_lr),
        ("both", lambda rows: see(network, pool.look(rows)), both, config.clips, config.joint_steps, config.joint_lr),
    ):
        loss = train_scores(network, pool, show, parameters, clips, steps, lr, config.doubt, generator)
        report(f"{name}: loss {loss:.4f}")
    save(network, config.out)
    size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
    report(f"{size / 1e6:.2f} MB")
    scores = rewards_of(config.out)
    if config.eval_clips:
        for split, captions in (("train", TRAIN), ("held out", HELD_OUT)):
            generator.manual_seed(config.seed + 1)
            found = agreement(scores, captions, generator, config.eval_clips)
            report(f"  {split}: " + ", ".join(f"{what} {share:.3f}" for what, share in found.items()))


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    config = tyro.cli(Config, args=args, description=Config.__doc__)
    torch.set_num_threads(config.threads)
    pretrain(config)


if __name__ == "__main__":
    main()
