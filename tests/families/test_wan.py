"""What only Wan has: two experts, a first frame that is given, UniPC's noise levels, cleaned texts."""

import dataclasses

import numpy as np
import pipelines
import pytest
import torch
from cases import brightness
from diffusers import WanImageToVideoPipeline
from safetensors import safe_open

from agents.grpo import GRPO, GRPOConfig
from agents.nft import NFT, NFTConfig
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.kernels import ODE
from denoise_env.mdp import DenoisingMDP, row_generators
from denoise_env.models import load_model
from denoise_env.models.pipeline import save_pipeline
from denoise_env.models.wan import Wan, WanImageToVideo, WanImageToVideoOptions, WanOptions
from denoise_env.prompts import Prompt
from denoise_env.schedules import Schedule

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
TEXT, IMAGE = Prompt("a red circle on gray"), Prompt("a red circle on gray", images=PICTURE)
SIZE = {"height": 64, "width": 64, "num_frames": 5}


def a14b(**options):
    return Wan(pipelines.wan(experts=2), WanOptions(**{**SIZE, "guidance_scale": 1.0, **options}))


def given_first(**options):
    """Wan 2.2 5B, image to video."""
    return WanImageToVideo(pipelines.wan_5b_image_to_video(), WanImageToVideoOptions(**{**SIZE, **options}))


def noise_of(model, rows, seed=0):
    return torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def make_mdp(model, prompt, num_steps=4):
    return DenoisingMDP(model, {"brightness": brightness}, [prompt], num_steps)


def rows_of(mdp, rows):
    return mdp.conditioning.rows(torch.zeros(rows, dtype=torch.long))


# --- Two experts ---


@torch.no_grad()
def test_rows_on_both_sides_of_the_boundary_are_two_calls_with_a_part_each():
    model = a14b()
    calls = []
    for network in (model.pipeline.transformer, model.pipeline.transformer_2):
        network.register_forward_pre_hook(
            lambda network, args, kwargs: calls.append((network, len(kwargs["hidden_states"]))), with_kwargs=True
        )
    latents, conditioning = noise_of(model, 4), rows_of(make_mdp(model, TEXT), 4)
    timesteps = torch.tensor([100.0, 875.0, 874.9, 999.0])
    together = model.predict(latents, timesteps, conditioning)
    assert calls == [(model.pipeline.transformer, 2), (model.pipeline.transformer_2, 2)]
    for i, high in enumerate((False, True, False, True)):
        calls.clear()
        alone = model.predict(latents[i : i + 1], timesteps[i], conditioning[i : i + 1])
        assert calls == [(model.pipeline.transformer if high else model.pipeline.transformer_2, 1)]
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("experts", "names"), [("high_noise", ["transformer"]), ("low_noise", ["transformer_2"])])
@pytest.mark.parametrize("rank", [0, 2])
def test_only_the_named_expert_is_trained_at_its_own_steps(experts, names, rank, tmp_path):
    model = a14b(experts=experts, lora_rank=rank)
    assert {name.split(".")[0] for name in model.trainable()} == set(names)
    mdp = make_mdp(model, TEXT, num_steps=6)
    policy = DenoisingPolicy(mdp)
    agent = GRPO(policy, GRPOConfig(group_size=4, timestep_fraction=1.0, lr=1e-2, drop_last=False))
    high = mdp.schedule.timesteps >= 875
    assert 0 < high.sum() < 6
    own = high if experts == "high_noise" else ~high
    assert agent.trainable_steps.tolist() == (own & policy.kernel.stochastic).nonzero().flatten().tolist()
    weights = {name: p.clone() for name, p in model.network.named_parameters()}
    agent.update(collect(mdp, policy, row_generators(range(4)), group_size=4), 1)
    changed = {name for name, p in model.network.named_parameters() if not torch.equal(p, weights[name])}
    assert changed
    assert changed <= model.trainable().keys()
    if rank:
        model.export(tmp_path)
        files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
        folder = "" if experts == "high_noise" else "transformer_2/"
        assert files == {f"{folder}pytorch_lora_weights.safetensors"}


def test_an_expert_that_is_not_called_has_a_gradient_of_zero():
    model = a14b()
    output = model.predict(noise_of(model, 2), torch.tensor(999.0), rows_of(make_mdp(model, TEXT), 2))
    output.square().sum().backward()
    called, idle = (network.parameters() for network in (model.pipeline.transformer, model.pipeline.transformer_2))
    assert all(p.grad is not None and not p.grad.any() for p in idle)
    assert all(p.grad.any() for p in called if p.grad is not None)


def test_an_agent_of_noised_samples_trains_one_expert():
    """Its draws may all lie where the other expert is called: then nothing is learnt, and nothing breaks."""
    model = a14b(experts="low_noise")
    mdp = make_mdp(model, TEXT)
    agent = NFT(DenoisingPolicy(mdp), NFTConfig(group_size=2, draws_per_sample=1, step_range=(0.0, 0.2)))
    rollout = collect(mdp, agent.policy, row_generators(range(2)), **agent.rollout_options(1))
    assert agent.update(rollout, 1)["grad_norm"] == 0


def test_two_trained_experts_are_not_sharded():
    def shard(network):
        for parameter in network.parameters():
            parameter.full_tensor = None  # as a DTensor has it
        return network

    a14b(experts="high_noise").wrap(shard)
    with pytest.raises(ValueError, match="do not shard them, or train one"):
        a14b().wrap(shard)


@torch.no_grad()
def test_exported_adapters_of_both_experts_are_loaded_again(tmp_path):
    model = a14b(lora_rank=2, lora_alpha=8.0)
    for name, parameter in model.trainable().items():
        parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.export(tmp_path)
    again = a14b(lora=str(tmp_path))
    latents, timesteps = noise_of(model, 2), torch.tensor([999.0, 100.0])
    outputs = [each.predict(latents, timesteps, rows_of(make_mdp(each, TEXT), 2)) for each in (model, again, a14b())]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-5)
    assert ((outputs[0] - outputs[2]).flatten(1).abs().amax(1) > 1e-2).all()
    with pytest.raises(ValueError, match="is one file, and transformer and transformer_2 are trained: give the direc"):
        a14b(lora=str(tmp_path / "pytorch_lora_weights.safetensors"))


@torch.no_grad()
def test_the_second_guidance_scale_is_that_of_low_noise():
    plain, other = a14b(guidance_scale=4.0), a14b(guidance_scale=4.0, guidance_scale_2=2.0)
    latents, timesteps = noise_of(plain, 2), torch.tensor([999.0, 100.0])
    conditioning = rows_of(make_mdp(plain, TEXT), 2)
    torch.testing.assert_close(
        other.predict(latents, timesteps, conditioning),
        plain.predict(latents, timesteps, conditioning, torch.tensor([4.0, 2.0])),
    )


# --- A first frame that is given ---


@torch.no_grad()
def test_the_given_frame_has_no_part_in_log_probs():
    model = given_first()
    mdp = make_mdp(model, IMAGE)
    policy, conditioning = DenoisingPolicy(mdp, "dance_sde"), rows_of(mdp, 2)
    latents, action = noise_of(model, 2), noise_of(model, 2, seed=1)
    transition = policy.transition(latents, 1, conditioning)
    others = [torch.cat([noise_of(model, 2, seed=2)[:, :, :1], x[:, :, 1:]], 2) for x in (latents, action)]
    again = policy.transition(others[0], 1, conditioning)
    free = transition.mean[:, :, 1:]
    assert torch.equal(again.mean[:, :, 1:], free)
    assert transition.dimensions == free[0].numel()
    for reduction in ("mean", "sum"):
        assert torch.equal(transition.log_prob(action, reduction), again.log_prob(others[1], reduction))
        alone = dataclasses.replace(transition, mean=free, free=None)
        torch.testing.assert_close(
            transition.log_prob(action, reduction), alone.log_prob(action[:, :, 1:], reduction), rtol=1e-5, atol=0
        )
        assert transition.kl(again, reduction).tolist() == [0, 0]


@pytest.mark.parametrize(("kernel", "last_step"), [("dance_sde", "sde"), ("flow_sde", "sde"), ("cps", None)])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_sample_begins_with_the_given_frame(kernel, last_step, solver):
    pipeline = pipelines.wan_5b_image_to_video(solver=solver)
    model = WanImageToVideo(pipeline, WanImageToVideoOptions(**SIZE))
    mdp = make_mdp(model, IMAGE)
    policy = DenoisingPolicy(mdp, kernel, last_step=last_step)
    final = collect(mdp, policy, row_generators(range(2))).final_latents
    given = rows_of(mdp, 2)["image_latents"]
    torch.testing.assert_close(final[:, :, :1], given, rtol=0, atol=1e-5)
    assert (final[:, :, 1:] - given).abs().max() > 0.1


def test_the_first_frame_is_the_picture_stretched():
    from PIL import Image

    model = given_first()
    picture = Image.fromarray(PICTURE).resize((64, 64), Image.Resampling.LANCZOS)
    stretched = Prompt(IMAGE.text, images=np.asarray(picture))
    assert torch.equal(*(model.encode([prompt])["image_latents"] for prompt in (IMAGE, stretched)))


def test_clip_and_the_vae_see_the_image_of_each_prompt():
    model = WanImageToVideo(pipelines.wan_image_to_video(), WanImageToVideoOptions(**SIZE))
    other = Prompt(IMAGE.text, images=255 - PICTURE)
    both = model.encode([IMAGE, other])
    assert both["image_latents"].shape == (2, 4, 2, 8, 8)
    assert both["image_embeds"].shape == (2, 5, 32)
    for i, prompt in enumerate((IMAGE, other)):
        for name, entry in model.encode([prompt]).items():
            torch.testing.assert_close(both[name][i : i + 1], entry, rtol=0, atol=1e-5)
    assert (both["image_latents"][0] - both["image_latents"][1]).abs().max() > 1e-2


def test_the_vision_encoder_is_saved_by_its_hub_names(tmp_path):
    save_pipeline(pipelines.wan_image_to_video(), tmp_path)
    with safe_open(tmp_path / "image_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("vision_model.") for name in file.keys())  # noqa: SIM118
    again = WanImageToVideoPipeline.from_pretrained(tmp_path, local_files_only=True)
    own = pipelines.wan_image_to_video().image_encoder.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.image_encoder.state_dict().items())


# --- Noise levels and texts ---


@pytest.mark.parametrize("num_steps", [1, 4, 20, 50])
@pytest.mark.parametrize("shift", [None, 5.0])
@torch.no_grad()
def test_unipcs_levels_and_whole_timesteps_are_its_own(num_steps, shift):
    pipeline = pipelines.wan(solver="unipc")
    model = Wan(pipeline, WanOptions(**SIZE, guidance_scale=1.0, shift=shift))
    schedule, told = model.schedule(num_steps), []
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift or 3.0)
    own.set_timesteps(num_steps)
    assert torch.equal(schedule.sigmas, own.sigmas.double())
    model.network.register_forward_pre_hook(
        lambda network, args, kwargs: told.append(kwargs["timestep"]), with_kwargs=True
    )
    conditioning = rows_of(make_mdp(model, TEXT), num_steps)
    model.predict(noise_of(model, num_steps), schedule.timesteps, conditioning)
    assert told[0].tolist() == own.timesteps.tolist()


@torch.no_grad()
def test_eulers_steps_on_unipcs_levels_end_elsewhere():
    pipeline, latents = pipelines.wan(solver="unipc"), torch.randn(1, 4, 2, 8, 8, generator=row_generators([0])[0])
    pipeline.set_progress_bar_config(disable=True)
    model = Wan(pipeline, WanOptions(**SIZE))
    mdp = make_mdp(model, TEXT)
    kernel, ours = ODE(mdp.schedule, "flow_prediction"), latents
    for k, timestep in enumerate(mdp.schedule.timesteps):
        ours = kernel.transition(ours, model.predict(ours, timestep, rows_of(mdp, 1)), k).mean
    settings = {"num_inference_steps": 4, "height": 64, "width": 64, "num_frames": 5, "output_type": "latent"}
    theirs = pipeline(prompt=[TEXT.text], latents=latents, **settings).frames
    assert 0.02 < (ours - theirs).abs().max() < 0.3


def test_linspace_is_dancegrpos_grid():
    model = Wan(pipelines.wan(solver="unipc"), WanOptions(**SIZE, schedule="linspace"))
    expected = Schedule.flow(8, 3.0, timestep_scale=1000)
    assert torch.equal(model.schedule(8).sigmas, expected.sigmas)
    assert torch.equal(model.schedule(8).timesteps, expected.timesteps)


def test_texts_are_cleaned_and_padded_with_zeros():
    model = a14b()
    clean, dirty = Prompt("a red circle & blue"), Prompt("  a red\n circle &amp;amp;   blue ")
    (length,), longest = model.count_tokens([dirty.text])
    entries = model.encode([clean])
    embeds = entries["prompt_embeds"]
    assert torch.equal(embeds, model.encode([dirty])["prompt_embeds"])
    assert embeds.shape[1] == longest == 512
    assert embeds[0, :length].any(-1).all()
    assert not embeds[0, length:].any()
    torch.testing.assert_close(model.pool(entries), embeds[:, :length].mean(1))


# --- What is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: a14b(num_frames=10), "num_frames must be 1 more than a multiple of 4 for Wan, not 10: 9 and 13 are"),
        (lambda: a14b(width=40), "width must be a multiple of 16 for Wan, not 40: 32 and 48 are the nearest"),
        (lambda: given_first(height=16), "height must be a multiple of 32 for Wan, not 16: 32 is the nearest"),
        (lambda: given_first(num_frames=1), "num_frames must be at least 5 for Wan 2.2 5B: its first frame is given"),
        (lambda: a14b(experts="first"), r"experts must be one of \['both', 'high_noise', 'low_noise'\], not 'first'"),
        (lambda: a14b(guidance_scale_2=3.0), "with guidance_scale=1 nothing is guided, as in the pipeline: leave"),
        (lambda: given_first(experts="low_noise"), "this Wan has one network: leave experts out"),
        (lambda: given_first(guidance_scale_2=3.0), "this Wan has one network: leave guidance_scale_2 out"),
        (lambda: a14b().check_prompt(IMAGE), "Wan takes no image.* with a prompt; 'a red circle on gray' has 1"),
        (lambda: given_first().check_prompt(TEXT), "takes 1 image.* with a prompt; 'a red circle on gray' has none"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_encoder": None}, "attends to CLIP's features of the image, and the checkpoint has no image_encoder"),
        ({"transformer": None}, "this Wan checkpoint has no transformer, which denoises"),
    ],
)
def test_a_part_that_is_missing_is_named(change, message):
    pipeline = pipelines.wan_image_to_video()
    pipeline.register_modules(**change)
    with pytest.raises(ValueError, match=message):
        WanImageToVideo(pipeline, WanImageToVideoOptions(**SIZE))


def test_without_ftfy_image_to_video_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    save_pipeline(pipelines.wan_5b_image_to_video(), tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    monkeypatch.setattr("denoise_env.models.wan.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="cleans its prompts with the package 'ftfy': pip install ftfy"):
        load_model(str(tmp_path))
