"""What is Qwen-Image's own: guidance that keeps norms, masked text, the schedule's end, its VAE's statistics."""

import warnings

import pytest
import torch
from test_contract import noise_of

from denoise_env.conditioning import ConditioningStore
from denoise_env.models.description import describe
from denoise_env.models.flow_match import pack
from denoise_env.prompts import Prompt

NAME = "qwen-image"
SHORT, LONG = "a red circle on gray", "a prompt with more words than the others have"


def rows_of(model, *prompts):
    store = ConditioningStore(model)
    return store.rows(store.index(prompts))


@torch.no_grad()
def test_guidance_keeps_the_norm_of_every_token(load):
    model, t = load(NAME), torch.tensor(0.5)
    latents, rows = noise_of(model, 2), rows_of(model, SHORT, LONG)
    guided, plain, outer = (model.predict(latents, t, rows, torch.full((2,), scale)) for scale in (4.0, 1.0, 9.0))
    for output in (guided, outer):
        torch.testing.assert_close(pack(output).norm(dim=-1), pack(plain).norm(dim=-1))
    assert (pack(guided) - pack(plain)).norm(dim=-1).min() > 1e-3
    torch.testing.assert_close(model.predict(latents, t, rows), guided)
    alone = load(NAME, "plain, cut", max_sequence_length=512)
    torch.testing.assert_close(alone.predict(latents, t, rows), plain, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_negative_text_is_a_space_by_default(load):
    model, t = load(NAME), torch.tensor(0.5)
    latents = noise_of(model, 1)
    default, space, empty = (
        model.predict(latents, t, rows_of(model, Prompt(SHORT, negative=text))) for text in (None, " ", "")
    )
    torch.testing.assert_close(default, space, rtol=0, atol=0)
    assert (default - empty).abs().max() > 1e-4


@torch.no_grad()
def test_where_nothing_is_padded_the_network_gets_no_mask(load):
    model, given = load(NAME, "plain, cut", max_sequence_length=512), []
    hook = lambda module, args, kwargs: given.append(kwargs["encoder_hidden_states_mask"])  # noqa: E731
    model.network.register_forward_pre_hook(hook, with_kwargs=True)
    latents = noise_of(model, 2)
    for prompts in ((SHORT, SHORT), (SHORT, "a blue circle on gray"), (SHORT, LONG)):
        model.predict(latents, torch.tensor(0.5), rows_of(model, *prompts))
    assert given[:2] == [None, None]
    assert given[2].sum(1).tolist() == [5 + 5, 9 + 5]  # words, and the end of the template


@torch.no_grad()
@pytest.mark.parametrize("variant", ["guided", "plain, cut"])
def test_the_device_is_asked_for_lengths_once(load, monkeypatch, variant):
    model = load(NAME, variant)
    rows, latents, asked = rows_of(model, SHORT, LONG), noise_of(model, 2), []
    model.predict(latents[:1], torch.tensor(0.5), rows_of(model, SHORT))  # encodes the default negative text
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(0) or own(tensor))
    for t in (0.9, 0.5, 0.1):
        model.predict(latents, torch.tensor(t), rows)
    assert len(asked) == 1


@torch.no_grad()
@pytest.mark.parametrize("half", ["", "negative_"])
def test_changed_conditioning_is_seen(load, half):
    """The halves are joined once, but not for another text."""
    model, t = load(NAME), torch.tensor(0.5)
    latents, rows = noise_of(model, 1), rows_of(model, Prompt(SHORT, negative="blue"))
    before = model.predict(latents, t, rows)
    other = rows_of(model, Prompt(LONG, negative="blurry"))
    for name in ("prompt_embeds", "prompt_embeds_mask"):
        rows[f"{half}{name}"] = other[f"{half}{name}"]
    fresh = model.predict(latents, t, rows.clone())
    torch.testing.assert_close(model.predict(latents, t, rows), fresh, rtol=0, atol=0)
    assert (fresh - before).abs().max() > 1e-5


def test_the_schedule_ends_at_the_checkpoints_last_level(load):
    model = load(NAME)
    schedule = model.schedule(5)
    assert schedule.sigmas[-2].item() == pytest.approx(0.02, abs=1e-6)
    assert torch.equal(schedule.timesteps, schedule.sigmas[:-1].float())
    with pytest.raises(ValueError, match=r"num_steps must be at least 2, not 1: .* starts at 0.02"):
        model.schedule(1)
    assert load(NAME, schedule="linspace").schedule(1).sigmas.tolist() == [1, 0]


def test_pooling_leaves_padding_out(load):
    model = load(NAME)
    together = model.pool(rows_of(model, SHORT, LONG))
    alone = rows_of(model, SHORT)["prompt_embeds"]
    torch.testing.assert_close(together[:1], alone.mean(1))


def test_sizes_and_the_longest_prompt(load, checkpoints):
    model = load(NAME, height=None, width=None)
    assert model.latent_shape == (4, 128, 128)
    options = model.options
    assert describe(str(checkpoints(NAME, "guided")), options).conditioning == {
        "prompt_embeds": (512, 32),
        "prompt_embeds_mask": (512,),
    }


def test_only_a_prompt_that_is_cut_is_named(load):
    fitting = load(NAME, max_sequence_length=9 + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fitting.check_prompts([Prompt(LONG)])
    with pytest.warns(UserWarning, match=rf"reads 13 tokens; of longer prompts the end is cut off: '{LONG}' \(14\)$"):
        load(NAME, max_sequence_length=13).check_prompts([Prompt(SHORT), Prompt(LONG)])


def test_adapters_reach_the_text_stream(load):
    names = load(NAME, lora_rank=2).trainable()
    modules = {name.split(".attn.")[1].split(".lora_")[0] for name in names}
    assert modules == {
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale must be at least 1"),
        ({"max_sequence_length": 1025}, "max_sequence_length must be at most 1024"),
        ({"shift": 0.0}, "shift must be positive"),
    ],
)
def test_bad_options_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(NAME, **options)
