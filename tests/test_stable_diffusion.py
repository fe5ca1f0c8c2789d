"""The Stable Diffusion family against diffusers' own pipeline on the same weights."""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from agents.grpo import GRPO, GRPOConfig
from agents.policy import DenoisingPolicy
from agents.rollout import begin, collect, denoise
from denoise_env.conditioning import ConditioningStore
from denoise_env.kernels import DDIM, ODE
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.models import load_model
from denoise_env.prompts import Prompt
from denoise_env.shapes import WEIGHTS
from denoise_env.shapes.grammar import HELD_OUT

PROMPTS = ["a red circle on gray", "a blue square on black", "a green cross on white"]


def plain_pipeline(path=WEIGHTS, lora=None):
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def plain_sample(pipeline, latents, guidance_scale=1.0, num_steps=6, eta=0.0, generator=None):
    return pipeline(
        PROMPTS,
        latents=latents,
        guidance_scale=guidance_scale,
        num_inference_steps=num_steps,
        eta=eta,
        generator=generator,
        output_type="pt",
    ).images


def our_sample(mdp, latents, kernel, generator=None):
    index = mdp.conditioning.index(PROMPTS)
    conditioning = mdp.conditioning.rows(index)
    with torch.no_grad():
        for k in range(mdp.num_steps):
            output = mdp.model.predict(latents, mdp.schedule.timesteps[k], conditioning)
            transition = kernel.transition(latents, output, k)
            noise = torch.randn(latents.shape, generator=generator) if transition.stochastic else torch.zeros(())
            latents = transition.sample(noise, torch.float32)
        return mdp.model.decode(latents)


@pytest.fixture
def latents():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_our_sampler_is_diffusers_sampler(make_shapes, latents, guidance_scale, eta):
    mdp = make_shapes(num_steps=6, guidance_scale=guidance_scale)
    kernel = (DDIM if eta else ODE)(mdp.schedule, mdp.model.prediction_type, eta)
    ours = our_sample(mdp, latents, kernel, torch.Generator().manual_seed(1))
    theirs = plain_sample(plain_pipeline(), latents, guidance_scale, 6, eta, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def v_prediction(tmp_path_factory):
    """The shipped checkpoint relabelled as a v-prediction model: Stable Diffusion 2's form."""
    path = tmp_path_factory.mktemp("v") / "weights"
    shutil.copytree(WEIGHTS, path)
    config = path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    return path


def test_v_prediction_is_read_from_the_scheduler(v_prediction, latents):
    model = load_model(str(v_prediction), guidance_scale=1.0)
    assert model.prediction_type == "v_prediction"
    mdp = DenoisingMDP(model, {"none": lambda images, prompts: images.sum((1, 2, 3))}, PROMPTS, 6)
    ours = our_sample(mdp, latents, ODE(mdp.schedule, model.prediction_type))
    torch.testing.assert_close(ours, plain_sample(plain_pipeline(v_prediction), latents), rtol=0, atol=2e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_training_exports_loads_in_plain_diffusers(make_shapes, latents, tmp_path, lora_rank):
    mdp = make_shapes(num_steps=6, lora_rank=lora_rank)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4, lr=1e-2 if lora_rank else 1e-3))
    before = our_sample(mdp, latents, ODE(mdp.schedule, "epsilon"))
    for iteration in range(2):
        agent.update(collect(mdp, policy, row_generators(range(12)), PROMPTS, group_size=4), iteration)
    after = our_sample(mdp, latents, ODE(mdp.schedule, "epsilon"))
    assert (after - before).abs().max() > 0.01
    mdp.model.export(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    if not lora_rank:  # the names of hub checkpoints, which old releases of transformers need
        names = load_file(tmp_path / "text_encoder" / "model.safetensors")
        assert all(name.startswith("text_model.") for name in names)
        assert names.keys() == load_file(WEIGHTS / "text_encoder" / "model.safetensors").keys()
    plain = plain_pipeline(lora=tmp_path) if lora_rank else plain_pipeline(tmp_path)
    torch.testing.assert_close(plain_sample(plain, latents), after, rtol=0, atol=2e-4)


def test_guidance_is_one_network_call_per_step(make_shapes):
    mdp = make_shapes(num_steps=3, guidance_scale=5.0)
    calls = []
    mdp.model.network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    latents, index = begin(mdp, row_generators(range(4)))
    denoise(mdp, DenoisingPolicy(mdp), latents, index)
    assert calls == [8, 8, 8]


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_reference_stays_what_it_was(make_shapes, latents, lora_rank):
    mdp = make_shapes(lora_rank=lora_rank)
    index = mdp.conditioning.index(PROMPTS)
    conditioning = mdp.conditioning.rows(index)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4, lr=1e-2, kl_coef=0.1))
    first = agent.update(collect(mdp, policy, row_generators(range(12)), PROMPTS, group_size=4), 0)
    assert first["kl_reference"] == 0

    def predict():
        with torch.no_grad():
            return mdp.model.predict(latents, mdp.schedule.timesteps[0], conditioning)

    base = load_model("shapes")
    with torch.no_grad():
        expected = base.predict(latents, mdp.schedule.timesteps[0], conditioning)
    agent.update(collect(mdp, policy, row_generators(range(12)), PROMPTS, group_size=4), 1)
    assert not torch.equal(predict(), expected)
    with mdp.model.reference():
        assert torch.equal(predict(), expected)


def test_bf16_stores_latents_in_bf16_and_trains_float32(make_shapes):
    for lora_rank in (0, 2):
        mdp = make_shapes(dtype="bf16", lora_rank=lora_rank)
        rollout = collect(mdp, DenoisingPolicy(mdp), row_generators(range(2)), PROMPTS[:2])
        assert rollout.steps["latents"].dtype == torch.bfloat16
        assert rollout.steps["action_log_prob"].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in mdp.model.trainable().values())


def test_lora_trains_only_its_adapters(make_shapes):
    model = make_shapes(lora_rank=2).model
    assert all("lora" in name for name in model.trainable())
    assert sum(p.numel() for p in model.trainable().values()) < 0.1 * sum(p.numel() for p in model.network.parameters())


def test_a_prompt_that_is_too_long_is_named_and_cut(make_shapes):
    model = make_shapes().model
    long = "a red circle on gray " * 10
    with pytest.warns(UserWarning, match=r"reads 16 tokens.*cut off: 'a red circle on gray a red.*\(52\)"):
        model.check_prompts([Prompt("a red circle"), Prompt(long)])
    assert model.encode([Prompt(long)])["prompt_embeds"].shape == (1, 16, model.network.config.cross_attention_dim)


def test_prompts_that_are_too_long_are_named_before_any_is_encoded(make_shapes):
    """The first ten of them, once, negative texts too."""
    store = ConditioningStore(make_shapes().model)
    words = ["a", "red", "blue", "green", "on", "gray", "circle", "square", "cross"] * 2
    prompts = [Prompt("red", negative=f"{'a red circle on gray ' * 4}{word} {i}") for i, word in enumerate(words)]
    with pytest.warns(UserWarning, match=r"cut off: (.*\(2\d\)){10} and 8 more$") as caught:
        store.index(prompts)
    assert len(caught) == 1
    assert store.encoded == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.index(prompts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp64"}, "dtype must be one of"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"height": 30}, "height must be a multiple of 4 .* 28 and 32 are the nearest"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"num_steps": 1001}, "at most 999"),
    ],
)
def test_bad_options_are_refused(make_shapes, options, message):
    with pytest.raises(ValueError, match=message):
        make_shapes(**options)


def test_height_and_width_are_pixels(make_shapes):
    mdp = make_shapes(height=48, width=32)
    assert mdp.model.latent_shape == (4, 12, 8)
    rollout = collect(mdp, DenoisingPolicy(mdp), row_generators(range(2)), PROMPTS[:2])
    assert mdp.model.decode(rollout.final_latents).shape == (2, 3, 48, 32)


@pytest.mark.parametrize(("option", "calls", "tolerance"), [("vae_slicing", 3, 1e-5), ("vae_tiling", 9, 1.0)])
def test_the_vae_decodes_in_slices_or_tiles(make_shapes, latents, option, calls, tolerance):
    latents = torch.nn.functional.interpolate(latents, scale_factor=2)
    whole = make_shapes(height=64, width=64).model.decode(latents)
    model = make_shapes(height=64, width=64, **{option: True}).model
    decoder, seen = model.pipeline.vae.decoder, []
    decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    saved = model.decode(latents)
    assert len(seen) == calls
    torch.testing.assert_close(saved, whole, rtol=0, atol=tolerance)


def test_the_attention_backend_is_set_or_refused(make_shapes, latents):
    plain = make_shapes()
    for backend in ("native", "_native_math"):
        chosen = make_shapes(attention_backend=backend)
        torch.testing.assert_close(*(our_sample(m, latents, ODE(m.schedule, "epsilon")) for m in (plain, chosen)))
    with pytest.raises(ValueError, match="attention_backend='fast' cannot be used"):
        make_shapes(attention_backend="fast")


def test_a_checkpoint_that_is_not_there_or_damaged_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown model"):
        DenoisingMDP.make(str(tmp_path / "nowhere" / "at" / "all"), "shapes", PROMPTS)
    shutil.copytree(WEIGHTS, tmp_path / "cut")
    weights = next((tmp_path / "cut" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load a Stable Diffusion checkpoint"):
        load_model(str(tmp_path / "cut"))


def test_the_stable_diffusion_1_unet_has_its_latents_and_conditioning():
    """The real architecture's shapes, on the meta device: no weights are made."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768
        )
        output = unet(torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 768)).sample
    assert output.shape == (2, 4, 64, 64)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


@pytest.mark.slow
def test_plain_diffusers_gives_images_the_verifier_scores_as_ours(make_shapes):
    """192 images each from the shipped weights, own noise: the mean scores differ by less than 4 standard errors."""
    mdp = make_shapes(num_steps=10)
    policy, prompts = DenoisingPolicy(mdp), list(HELD_OUT) * 16
    latents, index = begin(mdp, row_generators(range(192)), prompts)
    denoise(mdp, policy, latents, index, 64)
    ours = mdp.score(latents[:, -1], index).total
    pipeline, generator, theirs = plain_pipeline(), torch.Generator().manual_seed(7), []
    for _ in range(4):
        images = pipeline(
            list(HELD_OUT) * 4,
            guidance_scale=1.0,
            num_inference_steps=10,
            eta=1.0,
            generator=generator,
            output_type="pt",
        ).images
        theirs.append(mdp.rewards["shapes"](images, [Prompt(p) for p in HELD_OUT] * 4))
    theirs = torch.cat(theirs)
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    assert ours.mean() > 0.3


def test_pooled_conditioning_tells_prompts_apart(make_shapes):
    mdp = make_shapes()
    conditioning = mdp.conditioning.rows(mdp.drawn)
    pooled = mdp.model.pool(conditioning)
    assert pooled.shape == (len(conditioning), conditioning["prompt_embeds"].shape[-1])
    assert torch.pdist(pooled).min() > 0


def test_exported_adapters_keep_their_alpha_and_come_back(make_shapes, latents, tmp_path):
    mdp = make_shapes(num_steps=6, lora_rank=2, lora_alpha=8.0)
    with torch.no_grad():
        for name, parameter in mdp.model.trainable().items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    after = our_sample(mdp, latents, ODE(mdp.schedule, "epsilon"))
    assert (after - our_sample(make_shapes(num_steps=6), latents, ODE(mdp.schedule, "epsilon"))).abs().max() > 0.01
    mdp.model.export(tmp_path)
    torch.testing.assert_close(plain_sample(plain_pipeline(lora=tmp_path), latents), after, rtol=0, atol=2e-4)
    again = make_shapes(num_steps=6, lora=str(tmp_path))
    assert again.model.architecture() == mdp.model.architecture()
    assert torch.equal(our_sample(again, latents, ODE(mdp.schedule, "epsilon")), after)
    with pytest.raises(ValueError, match="has rank 2 and alpha 8: leave lora_rank and lora_alpha out"):
        make_shapes(lora=str(tmp_path), lora_rank=4)
    with pytest.raises(ValueError, match="cannot load Stable Diffusion LoRA weights"):
        make_shapes(lora=str(tmp_path / "nowhere"))
