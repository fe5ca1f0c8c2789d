"""FLUX.2: what is its own beside the contract of all families."""

import re
import warnings

import diffusers
import pytest
import torch

from denoise_env.models import load_model
from denoise_env.models.flux2 import Flux2
from denoise_env.prompts import Prompt

BOTH = [("flux-2", "klein"), ("flux-2-dev", "dev")]


@pytest.mark.parametrize(("name", "variant"), BOTH)
def test_the_checkpoint_says_which_pipeline_it_is(load, name, variant):
    kinds = {"flux-2": diffusers.Flux2KleinPipeline, "flux-2-dev": diffusers.Flux2Pipeline}
    assert type(load(name, variant).pipeline) is kinds[name]


def test_a_checkpoint_of_another_pipeline_is_refused(checkpoints):
    directory = str(checkpoints("flux", "dev"))
    with pytest.raises(ValueError, match="holds a FluxPipeline, which is of the family flux, not flux-2"):
        load_model(f"denoise_env.models.flux2:FAMILY@{directory}")


@pytest.mark.parametrize(("distilled", "rows", "scale"), [(False, 2, 4.0), (True, 1, None)])
def test_an_outline_keeps_what_the_checkpoint_says_of_its_pipeline(checkpoints, load, distilled, rows, scale):
    """Whether a klein is distilled is no part of it, but a setting."""
    variant = "klein, distilled" if distilled else "klein"
    outline = Flux2.outline(str(checkpoints("flux-2", variant)), load("flux-2", variant).options)
    assert (outline.rows_per_sample, outline.guidance_scale) == (rows, scale)


@pytest.mark.parametrize(
    ("name", "variant", "message"),
    [
        ("flux-2", "klein, distilled", "Flux2 has no guidance, so a negative text has no meaning"),
        ("flux-2-dev", "dev", "FLUX.2-dev's guidance is embedded in the network, where a negative text has no place"),
    ],
)
def test_a_negative_text_without_classifier_free_guidance_is_refused(load, name, variant, message):
    with pytest.raises(ValueError, match=f"{message}.* 'blurry' out"):
        load(name, variant).check_prompt(Prompt("a red circle", negative="blurry"))


def test_guidance_of_a_distilled_klein_has_no_effect_and_that_is_said(load):
    with pytest.warns(UserWarning, match="without guidance: guidance_scale=2.5 has no effect"):
        assert load("flux-2", "klein, distilled", guidance_scale=2.5).guidance_scale is None
    model = load("flux-2", "klein, distilled")
    latents, conditioning = torch.zeros(1, *model.latent_shape), model.encode([Prompt("blue")])
    with pytest.raises(ValueError, match="leave guidance_scale out"):
        model.predict(latents, torch.tensor(0.5), conditioning, torch.tensor([2.0]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flux-2", {"guidance_scale": 0.5}, "guidance_scale must be at least 1, not 0.5"),
        ("flux-2-dev", {"guidance_scale": -1.0}, "guidance_scale must be at least 0, not -1"),
        ("flux-2", {"max_sequence_length": 513}, "max_sequence_length must be .*513"),
        ("flux-2", {"max_sequence_length": 0}, "max_sequence_length must be .*0"),
        ("flux-2", {"schedule": "cosine"}, r"schedule must be one of \['pipeline', 'linspace'\], not 'cosine'"),
        ("flux-2", {"shift": 0.0}, "shift must be positive, not 0"),
    ],
)
def test_options_out_of_range_are_refused(load, name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


@pytest.mark.parametrize(("name", "variant"), BOTH)
@torch.no_grad()
def test_another_guidance_scale_a_row_is_what_the_model_set_to_it_gives(load, name, variant):
    """FLUX.2-dev is told it, where 1 is a scale like any other; klein is guided by it."""
    model = load(name, variant)
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    conditioning, t = model.encode([Prompt("blue"), Prompt("a red circle")]), torch.tensor(0.5)
    mixed = model.predict(latents, t, conditioning, torch.tensor([4.0, 1.0]))
    for i, scale in enumerate((4.0, 1.0)):
        alone = load(name, variant, guidance_scale=scale).predict(latents, t, conditioning)
        torch.testing.assert_close(mixed[i], alone[i], rtol=0, atol=1e-5)
    assert (mixed[1] - model.predict(latents, t, conditioning)[1]).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "variant"), BOTH)
def test_prompts_are_cut_where_the_pipeline_cuts_them(load, name, variant):
    """Exactly as many tokens as a prompt has with its chat are no reason to warn, one fewer are."""
    text = "a prompt with more words than the others have"
    model, masks = load(name, variant, max_sequence_length=80), []
    model.pipeline.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.embed([text])
    length = int(masks[0].sum())
    with pytest.warns(UserWarning, match=rf"reads {length - 1} tokens; .* cut off: '{text}' \({length}\)$"):
        load(name, variant, max_sequence_length=length - 1).check_prompts([Prompt(text)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load(name, variant, max_sequence_length=length).check_prompts([Prompt(text)])


@pytest.mark.parametrize(("name", "variant"), BOTH)
def test_adapters_reach_attention_in_both_kinds_of_blocks(load, name, variant):
    model = load(name, variant, lora_rank=2)
    found = {re.sub(r"\.\d+\.attn|\.lora.*|\.weight", "", key) for key in model.trainable()}
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    assert found == {
        *(f"transformer_blocks.{key}" for key in ("to_q", "to_k", "to_v", "to_out.0", *text)),
        *(f"single_transformer_blocks.{key}" for key in ("to_qkv_mlp_proj", "to_out")),
    }


@pytest.mark.parametrize(("name", "variant"), BOTH)
def test_exported_adapters_are_loaded_again(load, tmp_path, name, variant):
    model = load(name, variant, lora_rank=2, lora_alpha=8.0)
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.export(tmp_path)
    again = load(name, variant, lora=str(tmp_path))
    assert again.architecture() == model.architecture()
    assert all(torch.equal(again.trainable()[key], value) for key, value in model.trainable().items())


def test_the_shift_follows_the_size_and_the_number_of_steps(load):
    """At 1024², which is 4096 tokens, fewer steps are shifted further; a smaller image less far."""
    model = load("flux-2", height=1024, width=1024)
    for steps, shift in ((4, 9.89), (10, 9.55), (28, 8.60), (50, 7.56)):
        second = model.schedule(steps).sigmas[1].item()
        u = 1 - 1 / steps
        assert second == pytest.approx(shift * u / (1 + (shift - 1) * u), abs=2e-4)
    assert load("flux-2").schedule(4).sigmas[1] < model.schedule(4).sigmas[1]
