"""What is Stable Diffusion XL's own; the rest is in `test_contract`."""

import warnings

import diffusers
import pipelines
import pytest
import torch
from cases import CASES, TEXTS
from safetensors import safe_open
from test_contract import STEPS, noise_of, our_latents

from denoise_env.models.pipeline import save_pipeline
from denoise_env.models.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLOptions
from denoise_env.prompts import Prompt

HEIGHT, WIDTH = CASES["stable-diffusion-xl"].size


def made(pipeline=None, **options):
    size = {"height": HEIGHT, "width": WIDTH}
    return StableDiffusionXL(
        pipeline or pipelines.stable_diffusion_xl(), StableDiffusionXLOptions(**{**size, **options})
    )


def plain_samples(pipeline, latents, **call):
    settings = {"num_inference_steps": STEPS, "height": HEIGHT, "width": WIDTH, "output_type": "latent"}
    return pipeline(TEXTS, latents=latents, **{**settings, **call}).images


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "set_alpha_to_one": True},
        {"prediction": "v_prediction"},
        {"zeros": False},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"use_karras_sigmas": True},
    ],
)
def test_the_checkpoints_configuration_is_followed(settings):
    pipeline = pipelines.stable_diffusion_xl(**settings)
    pipeline.set_progress_bar_config(disable=True)
    model = made(pipeline)
    latents = noise_of(model)
    ours = our_latents(model, [Prompt(text) for text in TEXTS], latents)
    own = pipeline.scheduler
    own.set_timesteps(STEPS)
    if hasattr(own, "sigmas"):  # with other than leading steps Euler starts from a little less than standard noise
        latents = latents * (own.sigmas[0] ** 2 + 1) ** 0.5 / own.init_noise_sigma
    torch.testing.assert_close(ours, plain_samples(pipeline, latents), rtol=0, atol=1e-4)


def test_an_empty_negative_text_is_encoded_where_none_is_zeros():
    model = made()
    latents = noise_of(model)
    plain = {text: plain_samples(model.pipeline, latents, negative_prompt=text) for text in (None, "")}
    for text, theirs in plain.items():
        ours = our_latents(model, [Prompt(prompt, negative=text) for prompt in TEXTS], latents)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (plain[None] - plain[""]).abs().max() > 1e-2


def test_only_ddim_reads_the_final_alpha():
    last = {sampler: made(pipelines.stable_diffusion_xl(sampler)).schedule(STEPS) for sampler in ("euler", "ddim")}
    assert last["euler"].sigmas[-1] == 0
    assert last["ddim"].sigmas[-1] == pytest.approx(0.00085**0.5, rel=1e-4)
    torch.testing.assert_close(last["euler"].alphas[:-1], last["ddim"].alphas[:-1], rtol=0, atol=1e-7)
    assert last["euler"].timesteps.tolist() == last["ddim"].timesteps.tolist() == [751, 501, 251, 1]


def test_both_encoders_are_saved_as_older_releases_read_them(tmp_path):
    save_pipeline(pipelines.stable_diffusion_xl(), tmp_path)
    for name in ("text_encoder", "text_encoder_2"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert all(key.startswith(("text_model.", "text_projection.")) for key in file.keys())  # noqa: SIM118


def test_a_long_prompt_is_named_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made().check_prompts([Prompt("a red circle on gray " * 10), Prompt("blue")])
    (found,) = [str(warning.message) for warning in caught if "cut off" in str(warning.message)]
    assert "reads 24 tokens" in found


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 1, not 0.5"):
        made(guidance_scale=0.5)
    pipeline = pipelines.stable_diffusion_xl()
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="which this checkpoint's EDMEulerScheduler has not"):
        made(pipeline)
    for steps in (0, 1000):
        with pytest.raises(ValueError, match="num_steps must be"):
            made().schedule(steps)
