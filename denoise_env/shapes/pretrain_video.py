"""Make a tiny HunyuanVideo of moving shapes from nothing.

``python -m denoise_env.shapes.pretrain_video --out DIR``

Four stages, each with a seed of its own: the text encoders, which learn to tell what a caption says and then stay as
they are; the autoencoder, first on single frames of close-ups of a quarter of a clip's area, then on the close-ups,
then on whole clips; the flow; and guidance, to which the network is distilled as HunyuanVideo's own. The tokenizer
splits the pipeline's own prompt template into the 95 tokens that the pipeline crops, so the plain pipeline samples it
without further arguments.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from denoise_env.models.pipeline import save_pipeline
from denoise_env.progress import progress
from denoise_env.shapes.motion import ALL, FRAMES, HELD_OUT, TRAIN, Verifier, render
from denoise_env.shapes.motion.renderer import encode
from denoise_env.shapes.motion.verifier import total
from denoise_env.shapes.pretraining import (
    FlowConfig,
    Source,
    Texts,
    build_clip,
    encode_pictures,
    sample_batches,
    step,
    train_flow,
    train_vae,
)
from denoise_env.shapes.renderer import BASE_SIZE
from denoise_env.shapes.tokenizer import build_llama_tokenizer, build_tokenizer

TOKENS = 12
"""Tokens of a prompt that the network reads; the longest caption has 8 words, and an end token."""
CLIP_TOKENS = 77
"""Tokens of a prompt that CLIP reads, as the pipeline pads them."""
WIDTH = 64
"""Of the text encoders."""
LATENTS = 8
"""Channels of the latents."""
CLOSE = 16
"""Side of a close-up in pixels."""
CALL: dict[str, Any] = {
    "height": BASE_SIZE,
    "width": BASE_SIZE,
    "num_frames": FRAMES,
    "max_sequence_length": TOKENS,
}
"""What a pipeline is told in every call."""


def whole(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Clips of captions ``[n, 3, FRAMES, 32, 32]``."""
    return render(captions, generator).transpose(1, 2)


def close_up(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """Parts of such clips, ``[n, 3, FRAMES, 16, 16]``, about a random pixel that the object passes."""
    clips = whole(captions, generator)
    passed = (clips - clips[..., :1, :1]).abs().amax((1, 2)).flatten(1)
    centre = passed.multinomial(1, generator=generator)[:, 0]
    centre = torch.stack([centre // BASE_SIZE, centre % BASE_SIZE])
    row, column = (centre - CLOSE // 2).clamp(0, BASE_SIZE - CLOSE)
    parts = clips.unfold(3, CLOSE, 1).unfold(4, CLOSE, 1)
    return parts[torch.arange(len(clips)), :, :, row, column]


def still(captions: Sequence[str], generator: torch.Generator) -> Tensor:
    """A random frame of each of such parts, ``[n, 3, 1, 16, 16]``."""
    parts = close_up(captions, generator)
    frame = torch.randint(FRAMES, (len(parts),), generator=generator)
    return parts[torch.arange(len(parts)), :, frame][:, :, None]


SOURCE, CLOSE_UPS, STILLS = Source(TRAIN, whole), Source(TRAIN, close_up), Source(TRAIN, still)


@dataclass
class Config(FlowConfig):
    """Pretraining on rendered clips."""

    steps: int = 6000
    """Optimiser steps of the flow."""
    lr: float = 4e-3
    """Peak of the one-cycle learning rate."""
    distill_steps: int = 200
    """Optimiser steps in which the network learns to be guided."""
    batch_size: int = 32
    """Latents per step."""
    text_steps: int = 500
    """Optimiser steps of the text encoders, 32 captions each."""
    vae_steps_stills: int = 1000
    """Optimiser steps of the autoencoder, 32 frames of close-ups each, ..."""
    vae_steps: int = 5000
    """... 8 close-ups each, and ..."""
    vae_steps_whole: int = 600
    """... 8 whole clips each."""
    clips: int = 10000
    """Rendered clips the flow is trained on."""
    eval_clips: int = 120
    """Samples per set of captions that the verifier reads at the end; 0 for none."""
    fused: bool = True
    """AdamW in one kernel, which is faster and rounds otherwise."""
    threads: int = 2
    """CPU threads; another number adds in another order, and gives slightly different weights."""
    resume: bool = False
    """Go on from the checkpoints that an earlier run with the same settings left in `out` when it was stopped."""


def build_pipeline() -> HunyuanVideoPipeline:
    """A HunyuanVideo with 8 × 3 × 8 × 8 latents of clips of 9 frames, 32 × 32, random weights."""
    return HunyuanVideoPipeline(**build_parts(LATENTS, guidance_embeds=True))


def build_parts(channels: int, guidance_embeds: bool) -> dict[str, Any]:
    """The components of a pipeline whose network takes so many channels, and is told a guidance scale or not."""
    clip = build_tokenizer(ALL, CLIP_TOKENS)
    llama = build_llama_tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(text) for text in ALL)
    return {
        "vae": build_vae(),
        "text_encoder": build_llama(llama),
        "tokenizer": llama,
        "text_encoder_2": build_clip(clip),
        "tokenizer_2": clip,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=channels,
            out_channels=LATENTS,
            guidance_embeds=guidance_embeds,
            num_layers=1,
            num_single_layers=4,
            num_refiner_layers=1,
            attention_head_dim=32,
            num_attention_heads=3,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(8, 12, 12),
        ),
    }


def build_vae() -> AutoencoderKLHunyuanVideo:
    """An autoencoder from clips of 9 frames, 32 × 32, to 8 × 3 × 8 × 8 latents."""
    vae = AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=2,  # of one channel each, groups would hide the colours from the last layers
        spatial_compression_ratio=4,
        mid_block_add_attention=False,
    )
    # The second half of the moments is a log-variance: at 0 its noise would drown the young latents.
    nn.init.constant_(vae.quant_conv.bias[LATENTS:], -6.0)
    return vae


def build_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """A Llama of three layers, the last two of which the pipeline does not read."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def read_captions(pipe: HunyuanVideoPipeline, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """What the network reads of n captions: Llama's features of every token ``[n, 12, 64]``, CLIP's pooled ones
    ``[n, 64]``, and a mask ``[n, 12]`` of the tokens that there are."""
    tokens, pooled, mask = pipe.encode_prompt(list(captions), max_sequence_length=TOKENS)
    return tokens, pooled, mask


def train_texts(pipe: HunyuanVideoPipeline, steps: int, generator: torch.Generator) -> float:
    """Fit the text encoders: CLIP's pooled features and Llama's of the last token each tell the whole scene.

    Returns the share of captions of which both tell everything, in the last steps.
    """
    scenes = encode(TRAIN)
    classes = (scenes.amax(0) + 1).tolist()
    readers = nn.ModuleList([nn.Linear(WIDTH, sum(classes)) for _ in range(2)])
    parameters = [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    schedule, right = OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1), [0.0]
    for _ in (bar := progress(range(steps), desc="texts")):
        rows = torch.randint(len(scenes), (32,), generator=generator)
        tokens, pooled, mask = read_captions(pipe, [TRAIN[i] for i in rows.tolist()])
        last = tokens[torch.arange(len(rows)), mask.sum(-1) - 1]
        loss, hits = torch.zeros(()), []
        for reader, features in zip(readers, (last, pooled), strict=True):
            answers = reader(features).split(classes, -1)
            for answer, value in zip(answers, scenes[rows].unbind(-1), strict=True):
                loss = loss + F.cross_entropy(answer, value)
                hits.append(answer.argmax(-1) == value)
        step(loss, optimizer, schedule, parameters)
        right = [*right[-19:], torch.stack(hits).all(0).float().mean().item()]
        bar.set_postfix_str(f"right {sum(right) / len(right):.4f}", refresh=False)
    return sum(right) / len(right)


class Flow:
    """The denoiser as a function to train.

    Args:
        transformer: the pipeline's network.
    """

    def __init__(self, transformer: HunyuanVideoTransformer3DModel) -> None:
        self.transformer = transformer

    def __call__(self, noisy: Tensor, sigma: Tensor, texts: Texts, guidance: Tensor) -> Tensor:
        """The velocity of latents ``[n, 8, 3, 8, 8]`` at σ ``[n]``, told the guidance ``[n]``.

        The texts may have the latents of first frames ``[n, 8, 1, 8, 8]`` behind them.
        """
        tokens, pooled, mask, *first = texts
        if first:
            noisy = torch.cat([noisy, F.pad(first[0], (0, 0, 0, 0, 0, noisy.shape[2] - 1))], 1)
        return self.transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=tokens,
            encoder_attention_mask=mask,
            pooled_projections=pooled,
            guidance=1000 * guidance,
        ).sample


def sample(
    pipe: HunyuanVideoPipeline,
    prompts: Sequence[str],
    generator: torch.Generator,
    guidance: float = 1.0,
    num_steps: int = 10,
    batch_size: int = 60,
) -> Tensor:
    """Sample with the plain pipeline: ``[B, FRAMES, 3, 32, 32]`` in [0, 1]."""
    told: dict[str, Any] = {"num_inference_steps": num_steps, "guidance_scale": guidance}
    return sample_batches(pipe, prompts, batch_size, generator=generator, **CALL, **told)


@torch.no_grad()
def share_right(clips: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Of samples, the mean parts, the mean score, and the share with all right."""
    verifier = Verifier()
    parts = verifier.parts(clips, prompts)
    measured = parts | {"score": total(parts), "all": verifier.correct(clips, prompts)["all"].float()}
    return {name: values.mean().item() for name, values in measured.items()}


def spread(captions: Sequence[str], n: int) -> list[str]:
    """n captions, evenly of all."""
    return [captions[i * len(captions) // n % len(captions)] for i in range(n)]


class Run:
    """The stages of a pipeline's training.

    Args:
        pipe: the pipeline, as it was built after ``torch.manual_seed(config.seed)``.
        config: its settings; without ``resume`` an earlier run's checkpoints are deleted.
    """

    def __init__(self, pipe: Any, config: Config) -> None:
        self.pipe, self.config = pipe, config
        self.started, self.generator = time.perf_counter(), torch.Generator()
        config.out.mkdir(parents=True, exist_ok=True)
        self.kept = [config.out / f"{stage}.pt" for stage in ("stills", "close_ups", "whole", "flow")]
        if not config.resume:
            self._remove()

    def prepare(self) -> None:
        """Fit the text encoders and the autoencoder, and freeze them."""
        pipe, config = self.pipe, self.config
        right = train_texts(pipe, config.text_steps, self.generator.manual_seed(config.seed))
        print(f"captions read {right:.4f}", flush=True)
        fit = partial(train_vae, pipe.vae, generator=self.generator, edges=1.0, chroma=4.0, fused=config.fused)
        self.generator.manual_seed(config.seed + 1)
        fit(STILLS, config.vae_steps_stills, lr=4e-3, batch_size=32, path=self.kept[0])
        fit(CLOSE_UPS, config.vae_steps, lr=2e-3, batch_size=8, path=self.kept[1])
        error = fit(SOURCE, config.vae_steps_whole, lr=1e-3, batch_size=8, path=self.kept[2])
        print(f"autoencoder error {error:.5f}", flush=True)
        for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
            part.requires_grad_(False)
        self.generator.manual_seed(config.seed + 2)

    def train(self, latents: Tensor, places: Tensor, given: Texts = ()) -> Any:
        """Fit the flow, save the pipeline, say what it took, and load what was saved; arguments as of `train_flow`."""
        pipe, config = self.pipe, self.config
        texts = read_captions(pipe, [*TRAIN, ""])
        loss = train_flow(Flow, pipe.transformer, latents, places, texts, config, self.generator, self.kept[3], given)
        for part in (pipe.transformer, pipe.vae):
            part.half()  # what ships is half as large; diffusers reads it as float32
        save_pipeline(pipe, config.out)
        self._remove()
        size = sum(file.stat().st_size for file in config.out.rglob("*") if file.is_file())
        spent = time.perf_counter() - self.started
        print(f"flow loss {loss:.4f}, {size / 1e6:.2f} MB, trained in {spent:.0f} s", flush=True)
        return type(pipe).from_pretrained(config.out, local_files_only=True)

    def _remove(self) -> None:
        for file in self.kept:
            file.unlink(missing_ok=True)


def pretrain(config: Config) -> HunyuanVideoPipeline:
    """Build, train and save a pipeline, and print what was measured."""
    torch.manual_seed(config.seed)
    run = Run(pipe := build_pipeline(), config)
    run.prepare()
    pipe = run.train(*encode_pictures(pipe.vae, SOURCE, config.clips, run.generator))
    for name, captions in (("train", TRAIN), ("held out", HELD_OUT)) if config.eval_clips else ():
        prompts = spread(captions, config.eval_clips)
        for guidance in (1.0, 2.0, 3.5):
            report(
                share_right(sample(pipe, prompts, run.generator, guidance), prompts), f"{name}, guidance {guidance:g}"
            )
    return pipe


def report(shares: Mapping[str, float], of: str) -> None:
    """Print what was measured of samples."""
    print(f"{of}: " + ", ".join(f"{key} {share:.3f}" for key, share in shares.items()), flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `pretrain`."""
    config = tyro.cli(Config, args=args, description=Config.__doc__)
    torch.set_num_threads(config.threads)
    pretrain(config)


if __name__ == "__main__":
    main()
