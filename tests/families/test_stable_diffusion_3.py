"""What is Stable Diffusion 3's own; the rest is in `test_contract`."""

import json
import warnings

import diffusers
import pipelines
import pytest
import torch
from cases import CASES, TEXTS
from test_contract import STEPS, noise_of, our_latents

from denoise_env.models import load_model, model_options
from denoise_env.models.description import describe
from denoise_env.models.pipeline import save_pipeline
from denoise_env.models.stable_diffusion_3 import StableDiffusion3, StableDiffusion3Options
from denoise_env.prompts import Prompt

HEIGHT, WIDTH = CASES["stable-diffusion-3"].size
LONG = "a red circle on gray " * 10  # beyond the 24 tokens that the tiny CLIPs read


def made(pipeline=None, **options):
    size = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 16}
    return StableDiffusion3(pipeline or pipelines.stable_diffusion_3(), StableDiffusion3Options(**{**size, **options}))


def cuts(model, text):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.check_prompts([Prompt(text)])
    return [str(warning.message) for warning in caught if "cut off" in str(warning.message)]


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory):
    directory = tmp_path_factory.mktemp("without") / "t5"
    save_pipeline(pipelines.stable_diffusion_3(t5=False), directory)
    assert json.loads((directory / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    return directory


def test_t5_may_be_absent(without_t5, tmp_path):
    """The plain pipeline needs to be told so, and then samples the same."""
    options = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 16}
    model = load_model(str(without_t5), **options)
    assert list(model.encoders()) == ["text_encoder", "text_encoder_2"]
    latents = noise_of(model)
    ours = our_latents(model, [Prompt(text) for text in TEXTS], latents)
    model.export(tmp_path / "exported")
    for directory in (without_t5, tmp_path / "exported"):
        plain = diffusers.StableDiffusion3Pipeline.from_pretrained(directory, text_encoder_3=None, tokenizer_3=None)
        size = {"height": HEIGHT, "width": WIDTH}
        theirs = plain(
            TEXTS, latents=latents, num_inference_steps=STEPS, max_sequence_length=16, output_type="latent", **size
        ).images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    found = describe(str(without_t5), model_options(str(without_t5), **options))
    assert found.conditioning["prompt_embeds"] == (24 + 16, 96)


def test_both_clips_must_be_there(without_t5, tmp_path):
    index = json.loads((without_t5 / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": [None, None]}))
    with pytest.raises(ValueError, match="it has no text_encoder_2, which reads the prompts"):
        load_model(str(tmp_path))


def test_a_prompt_is_cut_where_the_last_encoder_stops():
    assert cuts(made(max_sequence_length=256), LONG) == []
    (found,) = cuts(made(), LONG)
    assert "reads 16 tokens" in found
    (found,) = cuts(made(pipelines.stable_diffusion_3(t5=False)), LONG)
    assert "reads 24 tokens" in found


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shift", [None, 5.0])
def test_the_schedule_is_the_pipelines(dynamic, shift):
    model = made(pipelines.stable_diffusion_3(dynamic=dynamic), shift=shift)
    plain = pipelines.stable_diffusion_3(dynamic=dynamic)
    if shift is not None:
        plain.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in (1, 2, 10, 40):
        plain(["blue"], num_inference_steps=steps, height=HEIGHT, width=WIDTH, output_type="latent")
        schedule = model.schedule(steps)
        torch.testing.assert_close(schedule.sigmas.float(), plain.scheduler.sigmas, rtol=0, atol=1e-7)
        torch.testing.assert_close(schedule.timesteps, plain.scheduler.timesteps, rtol=0, atol=1e-4)


def test_adapters_are_where_flow_grpo_has_them():
    adapted = {name.rpartition(".lora_A")[0] for name in made(lora_rank=2).trainable() if ".lora_A" in name}
    image = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    text = {f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
    first = {f"transformer_blocks.0.{name}" for name in {*image, *text, "attn.to_add_out"}}
    assert adapted == first | {f"transformer_blocks.1.{name}" for name in image | text}  # the last has no text output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_scale": 0.5}, r"guidance_scale must be at least 1, not 0.5"),
        ({"max_sequence_length": 513}, "max_sequence_length must be"),
        ({"max_sequence_length": 0}, "max_sequence_length must be"),
        ({"schedule": "karras"}, "schedule must be one of"),
        ({"width": 144}, "height and width must be at most 128, where this network's positions end, not 64 and 144"),
    ],
)
def test_what_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        made(**options)
