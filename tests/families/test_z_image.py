"""What is Z-Image's own: how guidance is counted, its two switches, time, captions as a list."""

import pytest
import torch
from test_contract import noise_of

from denoise_env.conditioning import ConditioningStore

NAME = "z-image"
SHORT, LONG = "a red circle on gray", "a prompt with more words than the others have"


def rows_of(model, *prompts):
    store = ConditioningStore(model)
    return store.rows(store.index(prompts))


@torch.no_grad()
def test_the_option_counts_guidance_as_the_pipeline_and_the_model_as_other_families(load):
    guided, plain = load(NAME), load(NAME, guidance_scale=0.0)
    assert (guided.guidance_scale, guided.rows_per_sample) == (6.0, 2)
    assert (plain.guidance_scale, plain.rows_per_sample) == (1.0, 1)
    latents, t = noise_of(guided, 2), torch.tensor(0.5)
    rows = rows_of(guided, SHORT, LONG)
    output, conditional = guided.predict(latents, t, rows), plain.predict(latents, t, rows)
    torch.testing.assert_close(guided.predict(latents, t, rows, torch.tensor([6.0, 1.0]))[:1], output[:1])
    unconditional = guided.predict(latents, t, rows, torch.zeros(2))
    torch.testing.assert_close(output, conditional + 5 * (conditional - unconditional), rtol=0, atol=1e-4)
    for model in (guided, plain):
        one = model.predict(latents, t, rows, torch.ones(2))
        torch.testing.assert_close(one, conditional, rtol=0, atol=1e-5)


@torch.no_grad()
def test_truncation_leaves_late_rows_as_they_are(load):
    model = load(NAME, cfg_normalization=0.5, cfg_truncation=0.6)
    always, plain = load(NAME, cfg_normalization=0.5), load(NAME, guidance_scale=0.0)
    latents, rows = noise_of(model, 2), rows_of(model, SHORT, LONG)
    times = torch.tensor([0.6, 0.7])
    for scale in (None, torch.tensor([3.0, 2.0])):
        output = model.predict(latents, times, rows, scale)
        torch.testing.assert_close(output[:1], always.predict(latents, times, rows, scale)[:1])
        torch.testing.assert_close(output[1:], plain.predict(latents, times, rows)[1:], rtol=0, atol=1e-5)
    late = model.predict(latents, times[1], rows)
    torch.testing.assert_close(late, plain.predict(latents, times[1], rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_normalisation_limits_the_norm_of_a_sample(load):
    latents, t = noise_of(load(NAME), 2), torch.tensor(0.5)
    outputs = {}
    for limit in (0.0, 0.5, 100.0):
        model = load(NAME, cfg_normalization=limit)
        outputs[limit] = model.predict(latents, t, rows_of(model, SHORT, LONG))
    conditional = load(NAME, guidance_scale=0.0).predict(latents, t, rows_of(model, SHORT, LONG))
    norms = {limit: output.flatten(1).norm(dim=1) for limit, output in outputs.items()}
    torch.testing.assert_close(norms[0.5], 0.5 * conditional.flatten(1).norm(dim=1))
    torch.testing.assert_close(outputs[100.0], outputs[0.0])
    assert (norms[0.0] > norms[0.5]).all()


@pytest.mark.parametrize("schedule", ["pipeline", "linspace"])
def test_the_network_is_told_how_clean_the_latents_are(load, schedule):
    found = load(NAME, schedule=schedule).schedule(5)
    torch.testing.assert_close(found.timesteps, (1 - found.sigmas[:-1]).float())
    assert found.timesteps[0] == 0


@torch.no_grad()
def test_captions_come_without_padding_and_their_lengths_are_asked_for_once(load, monkeypatch):
    model, given, asked = load(NAME), [], []
    rows, latents = rows_of(model, SHORT, LONG), noise_of(model, 2)
    model.predict(latents[:1], torch.tensor(0.5), rows_of(model, SHORT))  # encodes the default negative text
    model.network.register_forward_pre_hook(lambda module, args: given.append([len(row) for row in args[2]]))
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(0) or own(tensor))
    for t in (0.1, 0.5, 0.9):
        model.predict(latents, torch.tensor(t), rows)
    words = [0, 0, 5, 9]
    assert given == [[count + 8 for count in words]] * 3  # 8 tokens of the chat template
    assert len(asked) == 1


def test_the_callers_list_stays_as_it_is(load):
    texts = [SHORT, LONG]
    load(NAME).embed(texts)
    assert texts == [SHORT, LONG]


@torch.no_grad()
def test_the_longest_prompt_has_a_place_in_the_network(load):
    model = load(NAME, max_sequence_length=992)
    rows = rows_of(model, "a red circle on gray " * 200)
    assert rows["prompt_embeds"].shape[1] == 992
    assert model.predict(noise_of(model, 1), torch.tensor(0.5), rows).isfinite().all()
    with pytest.raises(ValueError, match="max_sequence_length must be at most 992"):
        load(NAME, max_sequence_length=993)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"cfg_normalization": -1.0}, "cfg_normalization must be at least 0"),
        ({"cfg_truncation": float("nan")}, "cfg_truncation must be a finite number"),
        ({"shift": 0.0}, "shift must be positive"),
    ],
)
def test_bad_options_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(NAME, **options)
