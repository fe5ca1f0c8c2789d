"""Preprocessing in torch against Pillow, open_clip's transforms and transformers' image processors."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import fixture_picture, pictures, to_tensor

from denoise_env.rewards.preprocess import CLIP_MEAN, Preprocess, resize

SIZES = [(90, 61), (61, 90), (64, 64), (64, 40), (200, 70), (33, 31), (131, 129), (67, 64)]
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("source", [(300, 200), (512, 512), (37, 91), (64, 64)])
@pytest.mark.parametrize("target", [(224, 224), (336, 224), (64, 50), (378, 378)])
def test_resizing_is_pillows_to_the_bit(name, source, target):
    noise = np.random.default_rng(0).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    both = [fixture_picture(*source), noise]
    expected = [np.asarray(Image.fromarray(one).resize(target, PILLOW[name])) for one in both]
    found = resize(torch.from_numpy(np.stack(both)).permute(0, 3, 1, 2).float(), target[::-1], name)
    assert torch.equal(found.permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected)).float())


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("width_height", SIZES)
def test_it_is_open_clips_transform(mode, interpolation, width_height):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(size=64, resize_mode=mode, interpolation=interpolation, fill_color=90, std=(0.5, 0.4, 0.3))
    both = pictures(2, *width_height)
    expected = torch.stack([image_transform_v2(config, is_train=False)(Image.fromarray(one)) for one in both])
    found = Preprocess.of_open_clip(vars(config))(to_tensor(*both))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width_height", SIZES)
def test_it_is_transformers_processor(width_height):
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    edge = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    both = pictures(2, *width_height)
    for processor in (
        CLIPImageProcessorPil(**edge),
        CLIPImageProcessorPil(**edge, resample=2, image_mean=[0.5, 0.4, 0.3]),
        SiglipImageProcessorPil(size={"height": 64, "width": 48}),
    ):
        expected = processor([Image.fromarray(one) for one in both], return_tensors="pt").pixel_values
        found = Preprocess.of_transformers(processor)(to_tensor(*both))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("size", "mean", "std", "first", "other"),
    [((300, 200), 0.183888, 0.997763, -0.770373, 0.439489), ((512, 512), 0.177960, 0.865873, None, None)],
)
def test_reference_values(size, mean, std, first, other):
    pixels = Preprocess((224, 224))(to_tensor(fixture_picture(*size)))[0]
    assert pixels.mean().item() == pytest.approx(mean, abs=1e-6)
    assert pixels.std().item() == pytest.approx(std, abs=1e-6)
    if first is not None:
        assert pixels[0, 112, 112].item() == pytest.approx(first, abs=1e-6)
        assert pixels[2, 5, 200].item() == pytest.approx(other, abs=1e-6)


def test_pictures_are_rounded_to_8_bits_first():
    levels = torch.full((1, 3, 64, 64), 100.0)
    process = Preprocess((64, 64))
    assert torch.equal(process((levels + 0.4) / 255), process(levels / 255))
    assert not torch.equal(process((levels + 0.6) / 255), process(levels / 255))
    assert process(levels / 255)[0, 0, 0, 0].item() == pytest.approx((100 / 255 - CLIP_MEAN[0]) / 0.26862954)


@pytest.mark.parametrize(
    "options",
    [
        {"do_resize": False},
        {"resample": 1},
        {"size": {"shortest_edge": 80}},
        {"size": {"shortest_edge": 64, "longest_edge": 90}},
        {"rescale_factor": 1.0},
        {"do_normalize": False},
    ],
)
def test_a_processor_that_does_something_else_is_refused(options):
    from transformers import CLIPImageProcessorPil

    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    with pytest.raises(ValueError, match="CLIPImageProcessorPil does is not supported"):
        Preprocess.of_transformers(CLIPImageProcessorPil(**{**sizes, **options}))
