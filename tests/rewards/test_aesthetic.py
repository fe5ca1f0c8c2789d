"""LAION's aesthetic predictor: its layers written out, on the image embedding of transformers' CLIPModel."""

import pytest
import torch
from PIL import Image
from tiny_clip import PROMPTS, pictures, save_clip, to_tensor

from denoise_env.rewards import UnavailableError, load_reward
from denoise_env.rewards.aesthetic import Aesthetic
from denoise_env.rewards.heads import LinearHead

PICTURES = pictures()
IMAGES = to_tensor(*PICTURES)
SHAPES = {0: (1024, 40), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("aesthetic")
    model = save_clip(directory)
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for number, (outputs, inputs) in SHAPES.items():
        tensors[f"layers.{number}.weight"] = torch.randn(outputs, inputs, generator=draw) * inputs**-0.5 * 1.5
        tensors[f"layers.{number}.bias"] = torch.randn(outputs, generator=draw) * 0.1
    torch.save(tensors, directory / "head.pth")
    return directory, model, tensors


def by_hand(embeddings, tensors):
    for number in SHAPES:
        embeddings = embeddings @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
    return embeddings.squeeze(1)


@torch.no_grad()
def expected_scores(model, tensors, images=PICTURES):
    from transformers import CLIPImageProcessorPil

    process = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    pixels = process([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    embeddings = model.get_image_features(pixel_values=pixels).pooler_output
    return by_hand(embeddings / embeddings.norm(dim=1, keepdim=True), tensors)


def build(saved, **options):
    return Aesthetic(str(saved[0] / "head.pth"), str(saved[0]), **options)


def test_scores(saved):
    expected = expected_scores(*saved[1:])
    assert expected.std() > 0.02
    directory = saved[0]
    reward = load_reward(f"aesthetic(checkpoint={str(directory / 'head.pth')!r}, encoder={str(directory)!r})")
    scores = reward(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(48, 110), (64, 64)])
def test_other_shapes(saved, size):
    images = pictures(5, *size)
    scores = build(saved)(to_tensor(*images), PROMPTS)
    torch.testing.assert_close(scores, expected_scores(*saved[1:], images), rtol=0, atol=3e-6)


def test_rows_and_microbatches_change_nothing(saved):
    whole, one = build(saved)(IMAGES, PROMPTS), build(saved)
    torch.testing.assert_close(build(saved, microbatch=2)(IMAGES, PROMPTS), whole, rtol=0, atol=3e-6)
    alone = torch.cat([one(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=3e-6)


def test_bf16_leaves_the_predictor_its_precision(saved):
    reward = build(saved, dtype="bf16")
    torch.testing.assert_close(reward(IMAGES, PROMPTS), build(saved)(IMAGES, PROMPTS), rtol=0, atol=0.1)
    assert torch.equal(reward.predictor.layers["0"].weight, saved[2]["layers.0.weight"])
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}


def test_the_published_layout_and_size():
    state = LinearHead().state_dict()
    assert list(state) == [f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    assert sum(tensor.numel() for tensor in state.values()) == 927_969


def test_other_weights_are_refused(saved, tmp_path):
    directory, _, tensors = saved
    wrong = {name.replace(".7.", ".8."): tensor for name, tensor in tensors.items()}
    wrong["layers.0.weight"] = torch.zeros(1024, 41)
    torch.save(wrong, tmp_path / "head.pth")
    named = (
        "does not hold the weights of LinearHead: it lacks layers.7.bias, layers.7.weight; it also has "
        "layers.8.bias, layers.8.weight; other shapes have layers.0.weight"
    )
    with pytest.raises(UnavailableError, match=named):
        Aesthetic(str(tmp_path / "head.pth"), str(directory))(IMAGES, PROMPTS)


def test_files_that_hold_no_weights(saved, tmp_path):
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (("text.pth", "cannot read the weights"), ("list.pth", "holds no weights by name")):
        with pytest.raises(UnavailableError, match=message) as caught:
            Aesthetic(str(tmp_path / name), str(saved[0]))(IMAGES, PROMPTS)
        assert "\n" not in str(caught.value)


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"there is no checkpoint '/no/such\.pth'"):
        Aesthetic("/no/such.pth")
    with pytest.raises(ValueError, match="there is no encoder '/no/such'"):
        Aesthetic(encoder="/no/such")
