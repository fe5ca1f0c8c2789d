import pytest
import torch

from denoise_env.shapes.grammar import BACKGROUNDS, COLOURS
from denoise_env.shapes.motion import ALL, FRAMES, first_frames, kept, render
from denoise_env.shapes.motion.grammar import MOTIONS, SPEEDS
from denoise_env.shapes.motion.renderer import BOUNCES, GROWN, RADII, draw, encode, paths
from denoise_env.shapes.renderer import coverage

WAYS = list(MOTIONS)
SOME = ALL[::13]


def drawn(captions, seed=0):
    """The paths of captions, and their motions and speeds."""
    motion, speed = encode(captions)[:, 3:].unbind(-1)
    return paths(motion, speed, torch.Generator().manual_seed(seed)), motion, speed


@pytest.mark.parametrize("size", [32, 48, 64])
def test_clips_have_their_form_and_lie_inside(size, generator):
    clips = render(SOME, generator, size)
    assert clips.shape == (len(SOME), FRAMES, 3, size, size)
    assert clips.dtype == torch.float32
    assert clips.min() >= 0
    assert clips.max() <= 1
    corner = clips[..., :1, :1]
    for edge in (clips[..., :1, :], clips[..., -1:, :], clips[..., :1], clips[..., -1:]):
        # An object cut off at the edge would differ by 0.4; smoothing spills a little over an acute corner.
        assert (edge - corner).abs().max() < 0.3
    assert ((clips - corner).abs().amax((2, 3, 4)) > 0.3).all()


def test_a_generator_decides_the_clip():
    first, same = (render(SOME, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, same)
    assert not torch.equal(first, render(SOME, torch.Generator().manual_seed(2)))


def test_objects_stay_inside_and_are_of_their_sizes():
    path, motion, _ = drawn(ALL)
    radius = path[..., 2:] / 2
    assert (path[..., :2] - radius).min() > 1 - 1e-4
    assert (path[..., :2] + radius).max() < 31 + 1e-4
    grows = torch.tensor([word in ("growing", "shrinking") for word in WAYS])[motion]
    for which, (low, high) in ((grows, GROWN), (~grows, RADII)):
        assert low - 1e-4 <= radius[which].min() < low + 0.5
        assert high - 0.5 < radius[which].max() <= high + 1e-4


def test_motions_keep_their_way_and_speed():
    path, motion, speed = drawn(ALL)
    way = torch.tensor(list(MOTIONS.values())).float()[motion]
    rate = torch.tensor(list(SPEEDS.values()))[speed]
    steps = path.diff(dim=1)
    straight = ~torch.tensor(BOUNCES)[motion]
    wanted = (rate[:, None] * way)[:, None].expand_as(steps)
    torch.testing.assert_close(steps[straight], wanted[straight], rtol=0, atol=1e-4)
    along = (steps * way[:, None]).sum(-1)[~straight]
    torch.testing.assert_close(along[:, :3], rate[~straight, None].expand(-1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(along[:, 5:], -rate[~straight, None].expand(-1, 3), rtol=0, atol=1e-4)
    off = steps - (steps * way[:, None]).sum(-1, keepdim=True) * way[:, None]
    assert off.abs().max() < 1e-4


@pytest.mark.parametrize("word", ["left", "right", "up", "down"])
def test_bounces_touch_their_edge(word):
    path, *_ = drawn([text for text in ALL if f"bouncing {word}" in text])
    radius = path[..., 2] / 2
    x, y = path[..., 0], path[..., 1]
    room = {"left": x - radius, "right": 32 - x - radius, "up": y - radius, "down": 32 - y - radius}[word]
    assert (room.amin(1) - 1).abs().max() < 1e-4


def test_frames_are_pictures_of_their_objects():
    path, *_ = drawn(SOME)
    colour, shape, background = encode(SOME)[:, :3].unbind(-1)
    clips = draw(path, colour, shape, background)
    alpha = coverage(shape, path[:, 5, :2], path[:, 5, 2] / 2)[:, None]
    paint, empty = (torch.tensor(list(words.values())) for words in (COLOURS, BACKGROUNDS))
    expected = alpha * paint[colour, :, None, None] + (1 - alpha) * empty[background, :, None, None]
    assert torch.equal(clips[:, 5], expected)


def test_too_small_a_clip_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        render(SOME, size=8)


def test_first_frames_are_the_clips():
    prompts = first_frames(SOME, torch.Generator().manual_seed(4))
    clips = render(SOME, torch.Generator().manual_seed(4))
    assert [prompt.text for prompt in prompts] == list(SOME)
    frames = torch.stack([torch.from_numpy(prompt.image.pixels()).movedim(-1, 0) / 255 for prompt in prompts])
    torch.testing.assert_close(frames, clips[:, 0], rtol=0, atol=1 / 255)
    assert kept(clips, frames).min() > 0.99
    assert kept(render(SOME, torch.Generator().manual_seed(5)), frames).mean() < 0.3
    assert kept(clips.roll(1, 0), frames).max() < 0.7
    assert torch.equal(kept(clips[:, :1], clips[:, 0]), torch.ones(len(SOME)))
