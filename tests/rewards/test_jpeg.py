import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward


def pattern(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([7 * x + 3 * y, 2 * x + 11 * y, x * y], -1).astype(np.uint8)


def images(*arrays):
    return torch.stack([torch.from_numpy(array).movedim(-1, 0) / 255 for array in arrays])


def score(expression, pictures):
    return load_reward(expression)(pictures, [Prompt("a")] * len(pictures))


@pytest.mark.parametrize(
    ("array", "quality", "size"),
    [
        (pattern(64, 48), 95, 3170),
        (pattern(64, 48), 75, 1761),
        (pattern(256, 256), 95, 57680),
        (pattern(256, 256), 75, 26372),
        (np.full((64, 64, 3), 128, np.uint8), 95, 689),
        (np.zeros((512, 512, 3), np.uint8), 95, 4723),
    ],
)
def test_known_sizes(array, quality, size):
    for sign, name in ((1, "jpeg_incompressibility"), (-1, "jpeg_compressibility")):
        assert score(f"{name}(quality={quality})", images(array)).tolist() == [pytest.approx(sign * size / 1000)]


def test_the_default_is_quality_95():
    assert score("jpeg_incompressibility", images(pattern(64, 48))).tolist() == [pytest.approx(3.17)]


def test_rows_keep_their_order_and_values_are_rounded():
    arrays = [np.random.default_rng(i).integers(0, 256, (16, 24, 3), np.uint8) // (i + 1) for i in range(5)]
    sizes = []
    for array in arrays:
        Image.fromarray(array).save(file := io.BytesIO(), "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    assert len(set(sizes)) == 5
    near = (images(*arrays) + 0.4 / 255).clamp(max=1)
    below = (images(*arrays) - 0.4 / 255).clamp(min=0)
    for pictures in (images(*arrays), near, below):
        found = score("jpeg_incompressibility", pictures)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(sizes)


def test_what_it_says_of_itself():
    small, large = load_reward("jpeg_compressibility"), load_reward("jpeg_incompressibility")
    assert (small.range, large.range) == ((-math.inf, 0), (0, math.inf))
    assert small.takes == large.takes == "images"
    assert [large.elsewhere(torch.device(name)) for name in ("cpu", "cuda")] == [False, True]


@pytest.mark.parametrize("quality", [0, 101, 95.0, "95"])
def test_a_bad_quality_is_refused(quality):
    with pytest.raises(ValueError, match="quality must be"):
        load_reward(f"jpeg_compressibility({quality!r})")


def test_clips_are_refused():
    with pytest.raises(ValueError, match=r"must be floating images \[B, 3, H, W\]"):
        load_reward("jpeg_compressibility")(torch.rand(1, 2, 3, 8, 8), [Prompt("a")])
