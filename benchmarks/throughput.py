"""Rollout and update against the bare network: the same calls at the same shapes in the same run.

    python -m benchmarks.throughput [--model NAME] [--batch 128] [--num-steps 10] [--json FILE]
    python -m benchmarks.throughput --modes [--json FILE]
    python -m benchmarks.throughput --rewards [NAME ...] [--json FILE]

The bare rollout is K network calls in a loop on fixed inputs; the bare update is the same number of forward
and backward passes with an optimizer step. A speed of 0.95 means that ours takes 1/0.95 of the bare time. Bare
and ours alternate, and each ratio is the median over the repeats.

``--modes`` compares eager, compiled, bf16 and compiled bf16 instead: one forward pass, and one forward and backward
pass, of the shipped network and of one about 30 times larger with random weights, all modes in turn in one run. Beside
the times stands how far compiling takes the first ratio from 1: rollout and update are compiled apart.

``--rewards`` measures what scoring costs (`benchmarks.reward_throughput`); its FILE has a table in Markdown beside it.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect, denoise
from benchmarks.timing import alternate, ratio, synchronize
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.worlds import DEFAULT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT, help="any model of denoise-env list (default %(default)s)")
    parser.add_argument("--random", choices=RANDOM, help="a real architecture with random weights instead")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--microbatch", type=int, default=None, help="rows per network call (default: the batch)")
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--modes", action="store_true", help="eager, compiled, bf16 and both, at two sizes")
    about = "samples/s and memory of every reward, and servers; or of those named, which join the others in FILE"
    parser.add_argument("--rewards", nargs="*", metavar="NAME", help=about)
    parser.add_argument("--samples", type=int, default=2, help="of large rewards (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.rewards is not None:
        from benchmarks.reward_throughput import run

        try:
            return run(options)
        except ValueError as error:
            parser.error(str(error))
    figures = modes_figures(options) if options.modes else denoiser_figures(options) | points_figures(options.repeats)
    print(f"{platform.machine()}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"\n| {'figure':<58} | {'value':>14} |\n|{'-' * 60}|{'-' * 15}:|")
    for name, value in figures.items():
        print(f"| {name:<58} | {value:>14,.4g} |")
    if options.json:
        options.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **figures}, indent=1),
            encoding="utf-8",
        )


def denoiser_figures(options: argparse.Namespace) -> dict[str, float]:
    mdp = make_mdp(options)
    model, rows, size = mdp.model, options.batch, options.microbatch or options.batch
    policy = DenoisingPolicy(mdp)
    config = GRPOConfig(group_size=min(16, rows))
    agent = GRPO(policy, config, microbatch=size)
    rollout = collect(mdp, policy, row_generators(range(rows)), group_size=agent.group_size, microbatch=size)
    noise = torch.randn(rows, options.num_steps + 1, *model.latent_shape).to(model.device, model.dtype)
    prompt_index = rollout.prompt_index
    chunks = [slice(i, i + size) for i in range(0, rows, size)]
    inputs = [(noise[c, 0].contiguous(), mdp.conditioning.rows(prompt_index[c])) for c in chunks]
    timesteps = mdp.schedule.timesteps.to(model.device)
    steps = agent.select_steps([0]).shape[1]

    @torch.no_grad()
    def bare_rollout() -> None:
        for latents, conditioning in inputs:
            for k in range(options.num_steps):
                model.predict(latents, timesteps[k], conditioning)

    def our_rollout() -> None:
        denoise(mdp, policy, noise.clone(), prompt_index, size)

    def bare_update() -> None:
        for latents, conditioning in inputs:
            for j in range(steps):
                model.predict(latents, timesteps[j].expand(len(latents)), conditioning).float().mean().backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters, 1.0)
        agent.optimizer.step()
        agent.optimizer.zero_grad()

    def our_update() -> None:
        agent.update(rollout, 0)

    bare, ours = compare(bare_rollout, our_rollout, options.repeats, model.device)
    bare_up, ours_up = compare(bare_update, our_update, options.repeats, model.device)
    score = compare(
        lambda: None, lambda: mdp.score(rollout.final_latents, prompt_index), options.repeats, model.device
    )[1]
    stored = sum(t.untyped_storage().nbytes() for t in unique_storages(rollout))
    ideal = rows * (options.num_steps + 1) * noise[0, 0].numel() * noise.element_size()
    return {
        "parameters of the network": sum(p.numel() for p in model.network.parameters()),
        "rollout, images/s (decoding and scoring apart)": rows / statistics.median(ours),
        "rollout, speed relative to the bare network": ratio(bare, ours),
        "decoding and scoring, images/s": rows / statistics.median(score),
        "update, (image, step) pairs/s": rows * steps / statistics.median(ours_up),
        "update, speed relative to the bare network": ratio(bare_up, ours_up),
        "rollout bytes / latents [B, K+1]": stored / ideal,
        "conditioning kept, bytes / one row per prompt asked for": kept_share(mdp),
        "peak memory, MiB": peak_memory(model.device) / 2**20,
    }


def kept_share(mdp: DenoisingMDP) -> float:
    one = mdp.conditioning.rows(mdp.drawn[:1])
    return mdp.conditioning.host_bytes / (mdp.conditioning.encoded * sum(t.nbytes for t in one.values()))


def modes_figures(options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    for size, batch in (("shipped", options.batch), ("30 times larger", max(1, options.batch // 8))):
        torch.compiler.reset()  # a function is compiled a limited number of times, for all models together
        modes: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
        for dtype in ("fp32", "bf16"):
            for compiled in (False, True):
                options.dtype = dtype
                mdp = make_mdp(options, LARGER if size != "shipped" else None)
                name = f"{dtype} compiled" if compiled else dtype
                if compiled:
                    started = time.perf_counter()
                    mdp.model.compile()
                modes[name] = passes(mdp, batch)
                if compiled:
                    for function in modes[name]:
                        function()
                    figures[f"{size}, {name}: seconds to compile"] = time.perf_counter() - started
                    figures[f"{size}, {name}: |first ratio - 1|"] = ratio_deviation(mdp, batch)
        figures[f"{size}: parameters"] = sum(p.numel() for p in mdp.model.network.parameters())
        for part, what in enumerate(("forward", "forward and backward")):
            times: dict[str, list[float]] = {name: [] for name in modes}
            for repeat in range(options.repeats + 1):
                for name, functions in modes.items():
                    synchronize(mdp.model.device)
                    started = time.perf_counter()
                    functions[part]()
                    synchronize(mdp.model.device)
                    if repeat:
                        times[name].append(time.perf_counter() - started)
            for name, seconds in times.items():
                figures[f"{size}, {name}: {what}, ms ({batch} rows)"] = 1000 * statistics.median(seconds)
    return figures


def passes(mdp: DenoisingMDP, batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """One forward pass without gradient; one forward and backward pass."""
    model = mdp.model
    latents = torch.randn(batch, *model.latent_shape).to(model.device, model.dtype)
    conditioning = mdp.conditioning.rows(mdp.drawn[torch.arange(batch) % len(mdp.drawn)])
    timestep = mdp.schedule.timesteps[0].to(model.device)

    @torch.no_grad()
    def forward() -> None:
        model.predict(latents, timestep, conditioning)

    def both() -> None:
        model.predict(latents, timestep, conditioning).float().mean().backward()
        model.network.zero_grad(set_to_none=True)

    return forward, both


def ratio_deviation(mdp: DenoisingMDP, batch: int) -> float:
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=batch, lr=0.0), microbatch=batch)
    rollout = collect(mdp, policy, row_generators(range(batch)), group_size=batch, microbatch=batch)
    return agent.update(rollout, 0)["ratio_deviation"]


def points_figures(repeats: int) -> dict[str, float]:
    from denoise_env.gymnasium_env import DenoiseVectorEnv

    rows, steps = 256, 10
    env = DenoiseVectorEnv(model="points", num_envs=rows, num_steps=steps, output="torch")
    action = torch.randn(rows, 2)
    policy = DenoisingPolicy(env.mdp)
    noise = torch.randn(rows, steps + 1, 2)
    prompt_index = torch.zeros(rows, dtype=torch.long)

    def episodes() -> None:
        for _ in range(10):
            env.reset()
            for _ in range(steps):
                env.step(action)

    def with_policy() -> None:
        with torch.no_grad():
            for _ in range(10):
                observation, _ = env.reset()
                for k in range(steps):
                    rows_ = env.mdp.conditioning.rows(observation["prompt_index"])
                    transition = policy.transition(observation["latents"], k, rows_)
                    observation, *_ = env.step(transition.sample(noise[:, k]))

    alone, acting = compare(episodes, with_policy, repeats, torch.device("cpu"))
    rolled = compare(
        lambda: None,
        lambda: denoise(env.mdp, policy, noise.clone(), prompt_index),
        repeats,
        torch.device("cpu"),
    )[1]
    return {
        "Points, 256 rows: environment alone, row-steps/s": 10 * rows * steps / statistics.median(alone),
        "Points, 256 rows: environment and policy, row-steps/s": 10 * rows * steps / statistics.median(acting),
        "Points, 256 rows: rollout, row-steps/s": rows * steps / statistics.median(rolled),
    }


def compare(
    one: Callable[[], object], other: Callable[[], object], repeats: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each after a warm-up, alternating which goes first."""
    times = alternate({"one": one, "other": other}, repeats, device)
    return times["one"], times["other"]


def peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def unique_storages(rollout: Any) -> list[torch.Tensor]:
    tensors = [*rollout.steps.values(), rollout.final_latents]
    tensors += [*rollout.scores.values.values(), rollout.scores.total, rollout.scores.valid]
    return list({t.untyped_storage().data_ptr(): t for t in tensors}.values())


RANDOM = {
    "sd1": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
}
"""Real sizes, random weights: Stable Diffusion 1.x."""
LARGER = 5.5
"""How much wider a network of the shipped kind is that has about 30 times its parameters."""


def make_mdp(options: argparse.Namespace, wider: float | None = None) -> DenoisingMDP:
    model_options = {
        "guidance_scale": options.guidance_scale,
        "dtype": options.dtype,
        "lora_rank": options.lora_rank,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    if wider:
        return DenoisingMDP(
            widened(wider, options.device, **model_options), {"bright": brightness}, ["a red circle on gray"]
        )
    if not options.random:
        return DenoisingMDP.make(
            options.model,
            num_steps=options.num_steps,
            microbatch=options.microbatch,
            device=options.device,
            **(model_options if options.model == DEFAULT else {}),
        )
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from denoise_env.models.stable_diffusion import StableDiffusion, StableDiffusionOptions
    from denoise_env.shapes import WEIGHTS

    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, **RANDOM[options.random]),
        scheduler=DDIMScheduler.from_pretrained(WEIGHTS / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    model = StableDiffusion(pipeline, StableDiffusionOptions(**model_options), options.device)
    return DenoisingMDP(
        model,
        {"bright": brightness},
        ["a photo of a cat", "a red cube"],
        options.num_steps,
        microbatch=options.microbatch,
    )


def brightness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images.mean((1, 2, 3))


def widened(factor: float, device: str, **options: Any) -> Any:
    """The shipped Stable Diffusion with a wider UNet of random weights."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from denoise_env.models.stable_diffusion import StableDiffusion, StableDiffusionOptions
    from denoise_env.shapes import WEIGHTS

    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS, **StableDiffusion.pipeline_arguments)
    config = dict(pipeline.unet.config)
    config["block_out_channels"] = [int(factor * channels) // 32 * 32 for channels in config["block_out_channels"]]
    pipeline.unet = UNet2DConditionModel.from_config(config)
    return StableDiffusion(pipeline, StableDiffusionOptions(**options), device)


if __name__ == "__main__":
    main()
