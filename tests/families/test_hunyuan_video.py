"""What is HunyuanVideo's own: clips and images, LLaMA's template, the scale that the network is told."""

import pytest
import torch
from cases import CASES, brightness
from test_contract import noise_of, plain_pipeline

from denoise_env.conditioning import ConditioningStore
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import load_model, model_options
from denoise_env.models.description import describe
from denoise_env.models.pipeline import save_pipeline
from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward

NAME = "hunyuan-video"
SHORT, LONG = "a red circle on gray", "a prompt with more words than the others have"


def rows_of(model, *prompts):
    store = ConditioningStore(model)
    return store.rows(store.index(prompts))


def told(model):
    """The guidance that the network is given, a list that grows with every call."""
    given = []
    hook = lambda module, args, kwargs: given.append(kwargs["guidance"].tolist())  # noqa: E731
    model.network.register_forward_pre_hook(hook, with_kwargs=True)
    return given


@pytest.mark.parametrize("frames", [3, 4, 6, 10])
def test_a_wrong_number_of_frames_names_the_nearest(checkpoints, frames):
    below = (frames - 1) // 4 * 4 + 1
    with pytest.raises(
        ValueError, match=f"1 more than a multiple of 4 .*, not {frames}: {below} and {below + 4} are the nearest"
    ):
        describe(str(checkpoints(NAME, "clips")), model_options(str(checkpoints(NAME, "clips")), num_frames=frames))


def test_one_frame_makes_images(load):
    for frames, makes, shape in ((1, "images", (3, 64, 48)), (5, "clips", (5, 3, 64, 48))):
        model = load(NAME, num_frames=frames)
        assert (model.makes, model.latent_shape) == (makes, (4, (frames + 3) // 4, 8, 6))
        assert model.decode(noise_of(model, 2)).shape == (2, *shape)


def test_the_default_is_the_pipelines_clip(checkpoints):
    checkpoint = str(checkpoints(NAME, "clips"))
    assert describe(checkpoint, model_options(checkpoint)).latents == (4, 33, 90, 160)


def test_the_templates_start_is_left_out(load, checkpoints):
    """Of LLaMA's third last hidden states, those of the text and its end mark remain."""
    model, pipeline = load(NAME), plain_pipeline(checkpoints(NAME, "clips"))
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    start = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")[0]
    tokens = pipeline.tokenizer([start, DEFAULT_PROMPT_TEMPLATE["template"].format(SHORT)]).input_ids
    assert len(tokens[0]) == DEFAULT_PROMPT_TEMPLATE["crop_start"] == 95
    assert tokens[1][:95] == tokens[0]
    with torch.no_grad():
        states = pipeline.text_encoder(torch.tensor(tokens[1:]), output_hidden_states=True).hidden_states
    own = rows_of(model, SHORT, LONG)
    length = len(tokens[1]) - 95
    assert own["prompt_embeds_mask"].sum(1).tolist() == [length, model.count_tokens([LONG])[0][0]]
    torch.testing.assert_close(own["prompt_embeds"][0, :length], states[-3][0, 95:], rtol=0, atol=1e-5)


def test_a_cut_prompt_keeps_its_first_tokens(load):
    whole, cut = (rows_of(load(NAME, max_sequence_length=length), LONG)["prompt_embeds"] for length in (64, 3))
    torch.testing.assert_close(cut, whole[:, :3], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_scale_is_told_times_a_thousand(load):
    model = load(NAME)
    given, rows, latents = told(model), rows_of(model, SHORT, LONG), noise_of(model, 2)
    timestep = model.schedule(4).timesteps[1]
    outputs = [model.predict(latents, timestep, rows, scale) for scale in (None, torch.tensor([6.0, 1.0]))]
    assert given == [[6000, 6000], [6000, 1000]]
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=0, atol=1e-5)
    assert (outputs[0][1] - outputs[1][1]).abs().max() > 1e-3


@torch.no_grad()
def test_both_halves_of_true_guidance_are_told_the_same(load):
    model = load(NAME, "clips, true guidance")
    given, rows = told(model), rows_of(model, Prompt(SHORT, negative="blurry"))
    model.predict(noise_of(model, 1), model.schedule(4).timesteps[0], rows)
    model.predict(noise_of(model, 1), model.schedule(4).timesteps[0], rows, torch.tensor([7.0]))
    assert given == [[1000, 1000], [7000, 7000]]


def test_a_negative_text_without_classifier_free_guidance_is_refused(load):
    prompt = Prompt(SHORT, negative="blurry")
    with pytest.raises(ValueError, match=r"guidance is embedded in the network.* 'blurry' out, or set true_cfg_scale"):
        load(NAME).check_prompt(prompt)
    load(NAME, "clips, true guidance").check_prompt(prompt)


def test_an_image_is_refused_with_a_sentence(load):
    prompt = Prompt(SHORT, images=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"takes no image\(s\) with a prompt; 'a red circle on gray' has 1: drop it"):
        DenoisingMDP(load(NAME), {"brightness": brightness}, [prompt], 4)


@pytest.mark.parametrize(
    ("frames", "reward", "message"),
    [
        (5, "jpeg_compressibility", r"takes images, and the model makes clips: write per_frame\(jpeg_compress"),
        (1, "videoalign", "takes clips, and the model makes images"),
    ],
)
def test_a_reward_of_the_other_kind_is_refused_before_any_work(load, frames, reward, message):
    model = load(NAME, num_frames=frames)
    model.network.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        DenoisingMDP(model, {reward: load_reward(reward)}, [SHORT], 4)


@torch.no_grad()
def test_slices_and_tiles_decode_the_same(load):
    latents = noise_of(load(NAME), 2)
    whole, sliced = (load(NAME, vae_slicing=sliced).decode(latents) for sliced in (False, True))
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-5)
    tiled = load(NAME, vae_tiling=True, height=272, width=16)
    assert tiled.pipeline.vae.use_tiling
    latents = noise_of(tiled, 1)
    clips = tiled.decode(latents)
    tiled.pipeline.vae.disable_tiling()
    assert clips.shape == (1, 9, 3, 272, 16)
    assert 0 < (clips - tiled.decode(latents)).abs().max() < 0.5


def test_the_grids(load):
    grids = {name: load(NAME, schedule=name).schedule(4).sigmas.tolist() for name in ("pipeline", "linspace")}
    for name, shift in (("pipeline", 7), ("linspace", 3)):
        wanted = [shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25, 0)]
        assert grids[name] == pytest.approx(wanted, abs=1e-6)
    schedule = load(NAME, schedule="linspace", shift=5.0).schedule(16)
    assert schedule.sigmas[1].item() == pytest.approx(5 * 0.9375 / (1 + 4 * 0.9375))
    torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigmas[:-1].float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"in_channels": 8}, "takes 4 channels, and this one 8: it is made for another pipeline"),
        ({"guidance_embeds": False}, "was not distilled to be guided"),
    ],
)
def test_another_network_is_refused(tmp_path, settings, message):
    save_pipeline(CASES[NAME].build(**settings), tmp_path / "tiny")
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "tiny"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale must be at least 1"),
        ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
        ({"max_sequence_length": 930}, "max_sequence_length must be at most 929"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"width": 40}, "width must be a multiple of 16 for HunyuanVideo, not 40: 32 and 48 are the nearest"),
        ({"schedule": "karras"}, "schedule must be one of"),
    ],
)
def test_bad_options_are_refused(load, options, message):
    with pytest.raises(ValueError, match=message):
        load(NAME, **options)
