"""What holds for every model family: its own pipeline's sampler, exact ratios, rows, faces, resuming, adapters."""

import dataclasses
import json
import shutil

import diffusers
import pytest
import torch
from cases import CASES, brightness, prompt_file, prompts_of
from safetensors.torch import load_file

from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import train
from denoise_env import DenoiseTorchRLEnv, DenoiseVectorEnv, check_denoising_env, check_vector_env
from denoise_env.kernels import ODE
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.models import find_family, load_model, model_options
from denoise_env.models.description import describe

STEPS = 4
VARIANTS = [(name, variant) for name, case in CASES.items() for variant in case.variants]
GUIDED = [(name, variant) for name, variant in VARIANTS if CASES[name].variants[variant].rows == 2]
FIRST = {name: next(iter(case.variants)) for name, case in CASES.items()}


def sized(case):
    """The options of a case's first variant, with its size."""
    height, width = case.size
    return {**next(iter(case.variants.values())).options, "height": height, "width": width}


def make_mdp(model, prompts):
    return DenoisingMDP(model, {"brightness": brightness}, prompts, STEPS)


def noise_of(model, rows=3, seed=0):
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def our_latents(model, prompts, latents):
    mdp = make_mdp(model, prompts)
    conditioning = mdp.conditioning.rows(mdp.conditioning.index(prompts))
    kernel = ODE(mdp.schedule, model.prediction_type)
    for k in range(STEPS):
        output = model.predict(latents, mdp.schedule.timesteps[k], conditioning)
        latents = kernel.transition(latents, output, k).mean
    return latents


def plain_pipeline(directory):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(directory, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_samples(pipeline, name, variant, latents, output_type):
    """The plain pipeline's latents in our form, or its images ``[B, 3, H, W]`` or clips ``[B, F, 3, H, W]``."""
    case, prompts, samples = CASES[name], prompts_of(name, variant), []
    found = case.variants[variant]
    size = 1 if case.alone else len(prompts)
    for start in range(0, len(prompts), size):
        own = prompts[start : start + size]
        negative = {} if found.negative is None else case.negative(pipeline, [found.negative] * size)
        output = pipeline(
            prompt=[prompt.text for prompt in own],  # Z-Image's writes into it
            latents=case.given(latents[start : start + size]),
            num_inference_steps=STEPS,
            height=case.size[0],
            width=case.size[1],
            output_type=output_type,
            **case.given_images(own),
            **{**negative, **found.call},
        )
        samples.append(output.images if hasattr(output, "images") else output.frames)
    together = torch.cat(samples)
    return together if output_type == "pt" else case.returned(together, *latents.shape[-2:])


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_our_sampler_is_the_pipelines_own(load, checkpoints, name, variant):
    model = load(name, variant)
    latents = noise_of(model)
    ours = our_latents(model, prompts_of(name, variant), latents)
    pipeline = plain_pipeline(checkpoints(name, variant))
    theirs = their_samples(pipeline, name, variant, latents, "latent")
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=CASES[name].tolerance)
    samples, decoded = their_samples(pipeline, name, variant, latents, "pt").float(), model.decode(ours)
    assert samples.numel() == decoded.numel()
    torch.testing.assert_close(decoded, samples.view_as(decoded), rtol=0, atol=2e-4)  # a video of one frame is an image


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_one_network_call_a_step(load, name, variant):
    model = load(name, variant)
    rows = CASES[name].variants[variant].rows
    assert model.rows_per_sample == rows
    calls = []
    model.network.register_forward_pre_hook(lambda module, args, kwargs: calls.append(0), with_kwargs=True)
    our_latents(model, prompts_of(name, variant), noise_of(model))
    assert len(calls) == STEPS


def roll(mdp, policy, agent, microbatch=None):
    generators = row_generators(range(2 * agent.group_size))
    prompts = mdp.drawn_prompts[:2]
    sizes = {"group_size": agent.group_size, "microbatch": microbatch}
    return collect(mdp, policy, generators, prompts, shared_noise=True, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "points", "points-flow"])
def test_an_unchanged_policy_has_ratio_one(load, name):
    variants = CASES[name].variants if name in CASES else {None: None}
    # Every two of precision, adapters and microbatches meet.
    settings = (("fp32", 0, None), ("fp32", 2, 2), ("bf16", 0, 2), ("bf16", 2, None))
    for way in [(variant, *rest) for variant in variants for rest in settings] if name in CASES else [()]:
        if way:
            variant, dtype, rank, microbatch = way
            mdp = make_mdp(load(name, variant, dtype=dtype, lora_rank=rank), prompts_of(name))
        else:
            mdp, microbatch = DenoisingMDP.make(name, num_steps=STEPS), None
        policy = DenoisingPolicy(mdp)
        agent = GRPO(policy, GRPOConfig(group_size=2, timestep_fraction=1.0), microbatch=microbatch)
        figures = agent.update(roll(mdp, policy, agent, microbatch), 0)
        assert figures["ratio_deviation"] == 0, way
        assert figures["grad_norm"] > 0, way


@pytest.mark.parametrize(("name", "variant"), [*FIRST.items(), *GUIDED])
@torch.no_grad()
def test_rows_are_independent(load, name, variant):
    """A row in a batch, at a timestep of its own and beside a longer prompt, is the row alone."""
    model = load(name, variant)
    mdp, latents = make_mdp(model, prompts_of(name)), noise_of(model)
    index = mdp.conditioning.index(prompts_of(name))
    timesteps = mdp.schedule.timesteps[:3]
    together = model.predict(latents, timesteps, mdp.conditioning.rows(index))
    for i in range(3):
        alone = model.predict(latents[i : i + 1], timesteps[i], mdp.conditioning.rows(index[i : i + 1]))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "variant"), GUIDED)
@torch.no_grad()
def test_a_negative_text_is_used_and_its_default_too(load, name, variant):
    model = load(name, variant)
    latents, t = noise_of(model, 2), model.schedule(STEPS).timesteps[1]
    plain = prompts_of(name)[0]
    negative = dataclasses.replace(plain, negative="blurry")
    mdp = make_mdp(model, [plain, negative])
    outputs = {}
    for prompts in ([plain, plain], [negative, negative], [plain, negative]):
        rows = mdp.conditioning.rows(mdp.conditioning.index(prompts))
        outputs[tuple(p.negative for p in prompts)] = model.predict(latents, t, rows)
    mixed = outputs[None, "blurry"]
    torch.testing.assert_close(mixed[:1], outputs[None, None][:1], rtol=0, atol=2e-5)
    torch.testing.assert_close(mixed[1:], outputs["blurry", "blurry"][1:], rtol=0, atol=2e-5)
    assert (outputs["blurry", "blurry"] - outputs[None, None]).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*CASES, "points", "points-flow"])
def test_faces_and_checkers(load, name):
    mdp = make_mdp(load(name), prompts_of(name)) if name in CASES else DenoisingMDP.make(name, num_steps=STEPS)
    check_denoising_env(DenoiseVectorEnv.from_mdp(mdp, 3))
    assert check_vector_env(DenoiseVectorEnv.from_mdp(mdp, 2, autoreset_mode="same_step")) == []
    gym = DenoiseVectorEnv.from_mdp(mdp, 2, output="torch")
    rl = DenoiseTorchRLEnv.from_mdp(mdp, 2)
    observation, _ = gym.reset(seed=3)
    rl.set_seed(3)
    td = rl.reset()
    for _ in range(STEPS):
        assert torch.equal(td["latents"], observation["latents"])
        action = observation["latents"] * 0.5
        observation, rewards, *_ = gym.step(action)
        after = rl.step(td.set("action", action))
        td = rl.step_mdp(after)
    assert torch.equal(after["next", "reward"].flatten(), rewards)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_resumes_exactly(checkpoints, tmp_path, name):
    """Two iterations are one and another after resuming, to the bit."""
    case, checkpoint = CASES[name], str(checkpoints(name, FIRST[name]))
    config = TrainConfig(
        model=checkpoint,
        model_options=model_options(checkpoint, **sized(case), lora_rank=2),
        agent_options=GRPOConfig(group_size=2, lr=1e-3, ema_decay=0.5),
        prompts=prompt_file(tmp_path, prompts_of(name)),
        rewards={"cases:brightness": 1.0},
        iterations=2,
        prompts_per_iteration=2,
        microbatch=2,
        num_steps=2,
        checkpoint_every=1,
        eval_every=1,
        eval_images_per_prompt=1,
    )
    train(build(config), tmp_path / "whole", report=False)
    train(build(dataclasses.replace(config, iterations=1)), tmp_path / "parts", report=False)
    train(build(config), tmp_path / "parts", resume=True, report=False)
    whole, parts = (load_file(tmp_path / run / "checkpoints/000002/state.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    first = load_file(tmp_path / "whole/checkpoints/000001/state.safetensors")
    assert not all(torch.equal(whole[key], first[key]) for key in whole)


@pytest.mark.parametrize("name", CASES)
def test_trained_adapters_give_our_samples_in_the_plain_pipeline(load, checkpoints, tmp_path, name):
    variant = FIRST[name]
    model = load(name, variant, lora_rank=2, lora_alpha=8.0)
    mdp = make_mdp(model, prompts_of(name))
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4, lr=1e-2))
    for iteration in range(2):
        agent.update(roll(mdp, policy, agent), iteration)
    latents = noise_of(model)
    ours = our_latents(model, prompts_of(name, variant), latents)
    assert (ours - our_latents(load(name, variant), prompts_of(name, variant), latents)).abs().max() > 1e-2
    model.export(tmp_path)
    plain = plain_pipeline(checkpoints(name, variant))
    CASES[name].load_adapters(plain, tmp_path)
    theirs = their_samples(plain, name, variant, latents, "latent")
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=2 * CASES[name].tolerance)


@pytest.mark.parametrize("name", CASES)
def test_gradient_checkpointing_gives_the_same_gradient(load, name):
    norms = []
    for checkpointing in (False, True):
        mdp = make_mdp(load(name, gradient_checkpointing=checkpointing), prompts_of(name))
        policy = DenoisingPolicy(mdp)
        agent = GRPO(policy, GRPOConfig(group_size=4))
        norms.append(agent.update(roll(mdp, policy, agent), 0)["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_description_is_the_loaded_model(load, checkpoints, name):
    model, checkpoint = load(name, lora_rank=2), str(checkpoints(name, FIRST[name]))
    found = describe(checkpoint, model_options(checkpoint, **sized(CASES[name]), lora_rank=2))
    assert found.family == (CASES[name].family or name) == find_family(checkpoint)[0].name
    assert found.latents == tuple(model.latent_shape)
    assert found.parameters == sum(p.numel() for p in model.network.parameters())
    assert found.trainable == sum(p.numel() for p in model.trainable().values())
    rows = model.split(model.encode(prompts_of(name)[1:2]))[0]
    assert {name: shape[1:] for name, shape in found.conditioning.items() if name in rows} == {
        name: tuple(tensor.shape[1:]) for name, tensor in rows.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_a_size_that_does_not_divide_names_the_nearest(load, name):
    step = CASES[name].step
    with pytest.raises(
        ValueError, match=f"height must be a multiple of {step} .*{step} and {2 * step} are the nearest"
    ):
        load(name, height=step + 1)


@pytest.mark.parametrize("name", CASES)
def test_a_missing_text_encoder_is_named(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints(name, FIRST[name]), tmp_path / "copy")
    index = tmp_path / "copy" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "text_encoder": [None, None]}))
    with pytest.raises(ValueError, match="it has no text_encoder, which reads the prompts"):
        load_model(str(tmp_path / "copy"))


@pytest.mark.parametrize("name", CASES)
def test_a_long_prompt_is_named_and_cut(load, name):
    long = dataclasses.replace(prompts_of(name)[0], text="a red circle on gray " * 200)
    model = load(name)
    with pytest.warns(UserWarning, match="cut off: 'a red circle on gray a red"):
        model.check_prompts([long])
    assert model.encode([long]).batch_size == (1,)
