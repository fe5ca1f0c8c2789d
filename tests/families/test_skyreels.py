"""What is SkyReels' own: the first frame, from a prompt's image to the network's input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import brightness, prompts_of
from PIL import Image
from test_contract import noise_of
from test_hunyuan_video import rows_of, told

from denoise_env.conditioning import fingerprint
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import model_options, outline
from denoise_env.models.description import describe
from denoise_env.models.memory import DryRun
from denoise_env.models.skyreels import posterior_seed
from denoise_env.prompts import Prompt

NAME = "skyreels"
HEIGHT, WIDTH = 64, 48


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((), "takes 1 image.* 'blue' has none: give it in Prompt's images, or in a prompt file's column image"),
        ([picture(8, 8), picture(8, 8, 1)], "takes 1 image.* 'blue' has 2"),
    ],
)
def test_no_image_and_two_are_refused_before_any_work(load, images, message):
    model = load(NAME)
    model.pipeline.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("a prompt was encoded"))
    with pytest.raises(ValueError, match=message):
        DenoisingMDP(model, {"brightness": brightness}, [Prompt("blue", images=images)], 4)


def test_only_the_first_frames_latents_are_kept(load):
    model = load(NAME, num_frames=17)
    assert model.latent_shape == (4, 5, 8, 6)
    assert rows_of(model, *prompts_of(NAME))["first_frame"].shape == (3, 4, 1, 8, 6)


@torch.no_grad()
def test_the_network_gets_the_first_frame_and_zeros_as_further_channels(load):
    model, given = load(NAME), []
    hook = lambda module, args, kwargs: given.append(kwargs["hidden_states"])  # noqa: E731
    model.network.register_forward_pre_hook(hook, with_kwargs=True)
    latents, rows = noise_of(model), rows_of(model, *prompts_of(NAME))
    model.predict(latents, model.schedule(4).timesteps[0], rows)
    noise, frames = given[0].chunk(2, 1)
    for half in (slice(3), slice(3, 6)):
        assert torch.equal(noise[half], latents)
        assert torch.equal(frames[half, :, :1], rows["first_frame"])
        assert not frames[half, :, 1:].any()


@torch.no_grad()
def test_the_posteriors_sample_follows_from_the_image(load):
    model = load(NAME)
    prompt = prompts_of(NAME)[0]
    same, again = (rows_of(model, own)["first_frame"] for own in (replace(prompt, text="blue"), prompt))
    assert torch.equal(same, again)
    assert torch.equal(rows_of(load(NAME), prompt)["first_frame"], again)
    posterior = model.pipeline.vae.encode(model.image_pixels(prompt.images[0])[:, :, None]).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(posterior_seed(prompt.images[0])))
    sample = (posterior.mean + posterior.std * noise) * model.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(again, sample)
    assert (posterior.std * noise).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(30, 90), (HEIGHT, WIDTH)])
def test_an_image_of_another_size_is_stretched(load, size):
    model, pixels = load(NAME), picture(*size)
    wanted = np.array(Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    found = model.image_pixels(Prompt("blue", images=pixels).images[0])
    assert torch.equal(found, torch.from_numpy(wanted).movedim(-1, 0)[None] / 255 * 2 - 1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_an_image_that_is_not_rgb_becomes_so(load, mode):
    image = Image.fromarray(picture(HEIGHT, WIDTH)).convert(mode)
    rows = rows_of(load(NAME), Prompt("blue", images=image), Prompt("blue", images=np.array(image.convert("RGB"))))
    assert torch.equal(rows["first_frame"][0], rows["first_frame"][1])


def test_an_image_that_is_none_is_refused():
    for image in (picture(8, 8)[:, :, 0], picture(8, 8).astype(float), torch.full((3, 8, 8), 2.0)):
        with pytest.raises(ValueError, match=r"an image's (array|float tensor) must"):
            Prompt("blue", images=image)


@torch.no_grad()
def test_guidance_leads_away_from_the_negative_text_and_not_from_the_image(load):
    model, plain = load(NAME), load(NAME, true_cfg_scale=1.0)
    t, latents = model.schedule(4).timesteps[1], noise_of(model, 1)
    prompt = prompts_of(NAME)[0]
    rows, empty = rows_of(model, prompt), rows_of(model, replace(prompt, text="x", negative=""))
    with_text = plain.predict(latents, t, rows)
    empty = {name.removeprefix("negative_"): value for name, value in empty.items() if name.startswith("negative_")}
    for name, value in empty.items():
        rows[name] = value
    without = plain.predict(latents, t, rows)
    guided = model.predict(latents, t, rows_of(model, prompt))
    torch.testing.assert_close(guided, without + 6 * (with_text - without), rtol=0, atol=1e-4)
    scaled = model.predict(latents, t, rows_of(model, prompt), torch.tensor([2.0]))
    torch.testing.assert_close(scaled, without + 2 * (with_text - without), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_network_is_told_one(load):
    for options, wanted in (({}, 1000), ({"guidance_scale": 2.5}, 2500)):
        model = load(NAME, **options)
        given = told(model)
        model.predict(noise_of(model, 1), model.schedule(4).timesteps[0], rows_of(model, prompts_of(NAME)[0]))
        assert given == [[wanted, wanted]]


def test_a_conditioning_cache_is_one_sizes_and_one_vaes(load):
    model = load(NAME)
    assert fingerprint(model) == fingerprint(load(NAME)) != fingerprint(load(NAME, width=64))
    next(model.pipeline.vae.encoder.parameters()).data += 1
    assert fingerprint(model) != fingerprint(load(NAME))


def test_the_vae_counts_among_the_encoders(checkpoints):
    checkpoint = str(checkpoints(NAME, "guided"))
    peaks = []
    for side in (64, 512):
        options = model_options(checkpoint, num_frames=1, height=side, width=side)
        peaks.append(DryRun(outline(checkpoint, options)).encode(1))
    assert peaks[1] > 32 * peaks[0]


def test_the_default_is_the_pipelines_clip(checkpoints):
    checkpoint = str(checkpoints(NAME, "guided"))
    found = describe(checkpoint, model_options(checkpoint))
    assert found.latents == (4, 25, 68, 120)
    assert found.conditioning["first_frame"] == (4, 1, 68, 120)
    assert found.rows_per_sample == 2
