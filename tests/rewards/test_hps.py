"""HPS-v2.1 against the formula of hpsv2: its preprocessing by torchvision, its score from open_clip's own forward."""

import json
import sys

import pytest
import torch
import torchvision.transforms.functional as tv
from PIL import Image
from tiny_clip import OPEN_CLIP, PROMPTS, TEXTS, fixture_picture, pictures, save_open_clip, to_tensor

from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError, load_reward
from denoise_env.rewards.hps import HPS, HPSPreprocess
from denoise_env.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess


def hpsv2_preprocess(picture, size):
    pixels = tv.to_tensor(Image.fromarray(picture))
    scale = size / max(pixels.shape[1:])
    if scale != 1:
        height, width = (round(side * scale) for side in pixels.shape[1:])
        pixels = tv.resize(pixels, [height, width], tv.InterpolationMode.BICUBIC, antialias=True)
        right, below = size - width, size - height
        pixels = tv.pad(pixels, [right // 2, below // 2, right - right // 2, below - below // 2])
    return tv.normalize(pixels, CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hps")
    return directory, save_open_clip(directory)


@torch.no_grad()
def hpsv2_scores(model, images, texts, size=64):
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-H-14")(texts)
    pixels = torch.stack([hpsv2_preprocess(image, size) for image in images])
    features = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    return (features[0] @ features[1].T).diagonal()


@pytest.mark.parametrize(("size", "mean", "std"), [((300, 200), -0.446164, 1.165118), ((512, 512), 0.178709, 0.866217)])
def test_preprocessing_has_the_reference_values(size, mean, std):
    pixels = HPSPreprocess(Preprocess((224, 224)))(to_tensor(fixture_picture(*size)))[0]
    assert pixels.shape == (3, 224, 224)
    assert pixels.mean().item() == pytest.approx(mean, abs=1e-6)
    assert pixels.std().item() == pytest.approx(std, abs=1e-6)
    if size == (300, 200):
        assert pixels[0, 112, 112].item() == pytest.approx(-0.715233, abs=1e-6)
        assert pixels[2, 5, 200].item() == pytest.approx(-1.480220, abs=1e-6)


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (33, 31), (64, 64), (200, 70), (105, 192), (1024, 768)])
def test_preprocessing_is_hpsv2s(size):
    found = HPSPreprocess(Preprocess((224, 224)))(to_tensor(*pictures(2, *size)))
    expected = torch.stack([hpsv2_preprocess(picture, 224) for picture in pictures(2, *size)])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_a_picture_that_fits_already_is_padded():
    pixels = HPSPreprocess(Preprocess((64, 64)))(to_tensor(*pictures(1, 64, 33)))[0]
    inside = tv.normalize(to_tensor(*pictures(1, 64, 33))[0], CLIP_MEAN, CLIP_STD)
    torch.testing.assert_close(pixels[:, 15:48], inside)
    edge = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels[:, [0, 14, 48, 63]], edge[:, None, None].expand(3, 4, 64))


@pytest.mark.parametrize("size", [(90, 61), (48, 110), (64, 64)])
def test_scores_are_those_of_hpsv2s_formula(saved, size):
    directory, model = saved
    images = pictures(5, *size)
    expected = hpsv2_scores(model, images, TEXTS)
    assert expected.std() > 0.02
    reward = load_reward(f"hps(checkpoint={str(directory)!r})")
    scores = reward(to_tensor(*images), PROMPTS)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_tokens(saved):
    reward = HPS(str(saved[0]))
    tokens = reward.load_network().tokenizer([TEXTS[0], "word " * 100])
    assert tokens.shape == (2, 77)
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 1237, 25895, 49407] + [0] * 70
    assert tokens[1, -1] == 49407


def test_rows_and_microbatches_change_nothing(saved):
    images = to_tensor(*pictures(5))
    whole = HPS(str(saved[0]))(images, PROMPTS)
    torch.testing.assert_close(HPS(str(saved[0]), microbatch=2)(images, PROMPTS), whole, rtol=0, atol=1e-6)
    one = HPS(str(saved[0]))
    alone = torch.cat([one(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-6)


def test_a_text_of_a_microbatch_is_embedded_once(saved, monkeypatch):
    reward = HPS(str(saved[0]))
    reward.network = reward.load_network()
    seen, embed = [], reward.network.embed_texts
    monkeypatch.setattr(reward.network, "embed_texts", lambda texts, device: seen.append(texts) or embed(texts, device))
    texts = ["a", "b", "a", "b", "c"]
    images = to_tensor(*pictures(5))
    scores = reward(images, [Prompt(text) for text in texts])
    assert seen == [["a", "b", "c"]]
    torch.testing.assert_close(scores, hpsv2_scores(saved[1], pictures(5), texts), rtol=0, atol=1e-6)


def test_bf16_is_near(saved):
    images = to_tensor(*pictures(5))
    reward = HPS(str(saved[0]), dtype="bf16")
    scores = reward(images, PROMPTS)
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, HPS(str(saved[0]))(images, PROMPTS), rtol=0, atol=0.02)


# --- Files ---


def test_a_weights_file_of_an_architecture(saved, tmp_path):
    directory, model = saved
    (tmp_path / "tiny-hps.json").write_text(json.dumps(OPEN_CLIP))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    reward = HPS(str(tmp_path / "HPS_v2.1_compressed.pt"), architecture=str(tmp_path / "tiny-hps.json"))
    images = to_tensor(*pictures(5))
    assert torch.equal(reward(images, PROMPTS), HPS(str(directory))(images, PROMPTS))


def test_a_directory_with_a_tokenizer_of_its_own(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "red", "circle", "square"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    text = {**OPEN_CLIP["text_cfg"], "context_length": 8, "vocab_size": 6, "hf_tokenizer_name": "own"}
    model = save_open_clip(tmp_path, {**OPEN_CLIP, "text_cfg": text}, {"mean": [0.5] * 3, "std": [0.25] * 3})
    scores = HPS(str(tmp_path))(torch.full((2, 3, 64, 64), 0.2), [Prompt("a red circle"), Prompt("a square")])
    with torch.no_grad():
        tokens = torch.tensor([[2, 3, 4, 0, 0, 0, 0, 0], [2, 5, 0, 0, 0, 0, 0, 0]])
        picture = model.encode_image(torch.full((1, 3, 64, 64), (0.2 - 0.5) / 0.25), normalize=True)
        expected = model.encode_text(tokens, normalize=True) @ picture[0]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_weights_with_other_names_are_refused(tmp_path):
    model = save_open_clip(tmp_path)
    tensors = model.state_dict()
    tensors["visual.projection"] = tensors.pop("visual.proj")
    torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UnavailableError, match=r"cannot load .*visual\.proj.*visual\.projection") as caught:
        HPS(str(tmp_path))(torch.rand(1, 3, 64, 64), PROMPTS[:1])
    assert "\n" not in str(caught.value)


def test_a_directory_without_weights_is_refused(tmp_path):
    save_open_clip(tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UnavailableError, match="could not be loaded"):
        HPS(str(tmp_path))(torch.rand(1, 3, 64, 64), PROMPTS[:1])


def test_the_hub_is_asked_when_first_called(monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        raise OSError("no\n  network.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    reward = HPS()
    assert not asked
    with pytest.raises(UnavailableError, match=r"cannot download xswu/HPSv2/HPS_v2\.1_compressed\.pt: no network; or"):
        reward(torch.rand(1, 3, 64, 64), PROMPTS[:1])
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "/no/such.pt"}, "there is no checkpoint '/no/such.pt'; give a file, or owner/name/file"),
        ({"checkpoint": "xswu/HPSv2"}, "there is no checkpoint 'xswu/HPSv2'"),
        ({"checkpoint": 3}, "checkpoint must be a file"),
        ({"checkpoint": "."}, r"the directory '\.' has no open_clip_config\.json"),
        ({"architecture": "ViT-Z-14"}, "open_clip has no architecture 'ViT-Z-14'"),
        ({"architecture": "no/such.json"}, "there is no file 'no/such.json'"),
        ({"architecture": None}, "architecture must be a string"),
        ({"dtype": "float32"}, "dtype must be one of"),
    ],
)
def test_refused_arguments(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        HPS(**options)


def test_without_open_clip(monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "open_clip" else find(name))
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    with pytest.raises(ValueError, match=r"HPS needs the package 'open_clip': pip install 'denoise-env\[rewards\]'"):
        HPS()
