"""What people see of a model that makes clips, and prompts with an image."""

import base64
import importlib.util
import io
import re

import numpy as np
import pytest
import torch
from clip_points import ClipPoints, bright, to_the_left
from PIL import Image

from agents import cli
from agents.training.pictures import read_frames
from denoise_env import DenoiseTorchRLEnv, DenoiseVectorEnv
from denoise_env.film import contact_sheet
from denoise_env.mdp import DenoisingMDP
from denoise_env.models.points import Points
from denoise_env.prompts import Prompt
from denoise_env.rewards.points import PointsReward

PIXELS = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)


@pytest.mark.parametrize(("frames", "lines", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3), (9, 3, 3)])
def test_a_contact_sheet_has_the_frames_in_order(frames, lines, columns):
    clips = torch.rand(2, frames, 4, 6, 3)
    sheet = contact_sheet(clips)
    assert sheet.shape == (2, 4 * lines, 6 * columns, 3)
    places = sheet.view(2, lines, 4, columns, 6, 3).transpose(2, 3).flatten(1, 2)
    assert torch.equal(places[:, :frames], clips)
    assert not places[:, frames:].any()


def test_an_environment_renders_clips_as_sheets():
    mdp = DenoisingMDP(ClipPoints("flow"), {"left": to_the_left}, ["ring"], 2)
    env = DenoiseVectorEnv(mdp, 3, render_mode="rgb_array")
    env.reset(seed=0)
    sheets = env.render()
    expected = contact_sheet(mdp.model.decode(env.state.latents).movedim(2, -1) * 255).byte().numpy()
    assert len(sheets) == 3
    assert all((sheet == found).all() for sheet, found in zip(sheets, expected, strict=True))
    assert sheets[0].shape == (8, 12, 3)


def test_rewards_of_images_are_refused_with_what_to_write_and_rewards_of_clips_too():
    with pytest.raises(ValueError, match=r"'b' takes images, and the model makes clips: write per_frame\(b\)"):
        DenoisingMDP(ClipPoints("flow"), {"b": bright}, ["ring"], 2)
    with pytest.raises(ValueError, match="'left' takes clips, and the model makes images"):
        DenoisingMDP(Points("flow"), {"left": to_the_left}, ["ring"], 2)


FLAGS = (
    *("--model", "clip_points:FAMILY", "--rewards", "clip_points:to_the_left", "1", "--prompts", "points"),
    *("--iterations", "2", "--num-steps", "3", "--agent.group-size", "4", "--prompts-per-iteration", "2"),
    *("--eval-images-per-prompt", "2", "--sample-every", "1"),
    *(["--tensorboard"] if importlib.util.find_spec("tensorboard") else []),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips") / "run"
    assert cli.main(["train", *FLAGS, "--output-dir", str(directory)]) == 0
    return directory


def test_a_runs_pictures_move(trained):
    pictures = sorted((trained / "samples").glob("0*"))
    assert [path.name for path in pictures] == ["000000.webp", "000001.webp", "000002.webp"]
    frames = read_frames(pictures[0])
    assert len(frames) == 3
    assert frames[0].info["duration"] == 250
    first, second = (np.asarray(frame)[:, :, 0] == 255 for frame in frames[:2])
    assert (first != second).any()


def test_its_page_moves_and_prints_films(trained):
    page = (trained / "report.html").read_text()
    moving = re.findall(r'class="moves"><img [^>]*src="data:image/webp;base64,([^"]*)"', page)
    films = re.findall(r'class="film"><img [^>]*src="data:image/png;base64,([^"]*)"', page)
    assert len(moving) == len(films) == 4 * 6  # the first picture, and all three; six prompts each
    sheet, still = (Image.open(io.BytesIO(base64.b64decode(found[0]))) for found in (moving, films))
    assert sheet.n_frames == 3
    assert still.size == (sheet.width, 3 * (sheet.height + 1) - 1)


def test_its_comparison_moves(trained):
    frames = read_frames(trained / "before_after.webp")
    assert len(frames) == 3
    assert frames[0].info["duration"] == 250
    for side in (slice(0, 240), slice(-240, None)):
        first, second = (np.asarray(frame)[:, side] for frame in frames[:2])
        assert (first != second).any()


def test_tensorboard_gets_a_gif(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    shown = [Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images("samples")]
    assert [(picture.format, picture.n_frames) for picture in shown] == [("GIF", 3)] * 3


@pytest.mark.parametrize(("name", "count"), [("s.png", 3), ("s.gif", 3), ("s.webp", 3)])
def test_samples_move(trained, tmp_path, name, count):
    path = tmp_path / name
    assert cli.main(["sample", str(trained), "--trust", "--images-per-prompt", "2", "--output", str(path)]) == 0
    assert len(read_frames(path)) == count


def test_samples_in_a_file_that_cannot_move_are_refused(trained, tmp_path, capsys):
    path = tmp_path / "s.jpg"
    assert cli.main(["sample", str(trained), "--trust", "--output", str(path)]) == 2
    assert "cannot hold clips: a file that moves ends in one of" in capsys.readouterr().err
    assert not path.exists()


# --- Prompts with an image ---


class Begins(Points):
    """Points that takes an image with a prompt, and is shown it as brightness."""

    images_per_prompt = 1


def begin():
    mdp = DenoisingMDP(Begins("flow"), {"points": PointsReward()}, [Prompt("ring", images=[PIXELS])], 2)
    return DenoiseVectorEnv(mdp, 4), mdp


def test_a_reset_takes_images_as_arrays_pictures_and_paths(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "first.png")
    env, mdp = begin()
    images = [PIXELS, Image.fromarray(PIXELS[::-1].copy()), tmp_path / "first.png", str(tmp_path / "first.png")]
    env.reset(seed=0, options={"prompts": ["ring", "ring", "line", "ring"], "images": images})
    prompts = [mdp.prompts[i] for i in env.state.prompt_index]
    assert [prompt.text for prompt in prompts] == ["ring", "ring", "line", "ring"]
    assert [bool((prompt.image.pixels() == PIXELS).all()) for prompt in prompts] == [True, False, True, True]
    assert prompts[0] == prompts[3] == Prompt("ring", images=[PIXELS])
    env.reset(options={"prompts": ["ring", "line"], "images": images[:2], "group_size": 2})
    assert env.state.prompt_index[0] == env.state.prompt_index[1] != env.state.prompt_index[2]


def test_a_torchrl_reset_takes_images():
    _, mdp = begin()
    env = DenoiseTorchRLEnv(mdp, 2)
    found = env.reset(prompts=["ring", "line"], images=[PIXELS, PIXELS])
    assert [mdp.prompts[i].text for i in found["prompt_index"]] == ["ring", "line"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": [PIXELS] * 4}, "with images, prompts must be a list with one for each group, not NoneType"),
        ({"prompts": ["ring"] * 4, "images": PIXELS}, "images must be a list with one for each group, not ndarray"),
        ({"prompts": ["ring"] * 4, "images": [PIXELS]}, "images must be as many as prompts: 1 were given for 4"),
        ({"prompts": ["ring"] * 4, "images": ["no.png"] * 4}, r"no\.png"),
        ({"prompts": ["ring"] * 4, "images": [PIXELS[..., :2]] * 4}, "image"),
        ({"prompts": [Prompt("ring", images=[PIXELS])] * 4, "images": [PIXELS] * 4}, "'ring' has an image of its own"),
        ({"prompts": ["ring"] * 4}, r"takes 1 image\(s\) with a prompt; 'ring' has none"),
    ],
)
def test_images_that_do_not_go_with_the_prompts(options, message):
    env, _ = begin()
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)


def test_a_model_that_takes_no_image_says_so():
    env = DenoiseVectorEnv("points", 1)
    with pytest.raises(ValueError, match=r"takes no image\(s\) with a prompt; 'ring' has 1"):
        env.reset(options={"prompts": ["ring"], "images": [PIXELS]})
