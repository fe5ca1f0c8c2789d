"""clip_score and pickscore against the models' own forwards, with their own preprocessing and tokenizers."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import (
    OPEN_CLIP,
    PROMPTS,
    TEXTS,
    clip_tokenizer,
    pictures,
    save_clip,
    save_open_clip,
    save_siglip,
    to_tensor,
)

from denoise_env.prompts import Prompt
from denoise_env.rewards import UnavailableError, load_reward
from denoise_env.rewards.clip_score import ClipScore, PickScore

PICTURES = pictures()
IMAGES = to_tensor(*PICTURES)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    return directory, save_clip(directory)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("siglip")
    return directory, save_siglip(directory)


@torch.no_grad()
def clip_logits(model, images=PICTURES, texts=TEXTS):
    """transformers' own: image processor and tokenizer, then CLIPModel's forward."""
    from transformers import CLIPImageProcessorPil, CLIPProcessor

    sizes = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    processor = CLIPProcessor(CLIPImageProcessorPil(**sizes), clip_tokenizer())
    inputs = processor(
        images=[Image.fromarray(image) for image in images],
        text=texts,
        padding=True,
        truncation=True,
        max_length=77,
        return_tensors="pt",
    )
    return model(**inputs).logits_per_image.diagonal()


def close(found, expected, atol=1e-6):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_transformers_clip(clip):
    directory, model = clip
    expected = clip_logits(model) / model.logit_scale.exp().detach()
    assert expected.std() > 0.05
    close(load_reward(f"clip_score({str(directory)!r})")(IMAGES, PROMPTS), expected)


def test_long_texts_are_cut(clip):
    directory, model = clip
    texts = ["one word and another " * 40] * 5
    expected = clip_logits(model, texts=texts) / model.logit_scale.exp().detach()
    close(ClipScore(str(directory))(IMAGES, [Prompt(text) for text in texts]), expected)


@torch.no_grad()
def test_siglip_is_the_sigmoid_of_its_logit(siglip):
    from transformers import AutoTokenizer, SiglipImageProcessorPil

    directory, model = siglip
    tokens = AutoTokenizer.from_pretrained(directory)(
        TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    process = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    pixels = process([Image.fromarray(image) for image in PICTURES], return_tensors="pt").pixel_values
    expected = model(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_image.diagonal().sigmoid()
    assert expected.std() > 0.05
    close(load_reward(f"clip_score({str(directory)!r})")(IMAGES, PROMPTS), expected)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("mode", ["squash", "shortest"])
@torch.no_grad()
def test_open_clip(quick_gelu, mode, tmp_path):
    import open_clip

    preprocess = {"resize_mode": mode, "mean": [0.4, 0.5, 0.6]}
    save_open_clip(tmp_path, {**OPEN_CLIP, "quick_gelu": quick_gelu}, preprocess)
    model, _, process = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pixels = torch.stack([process(Image.fromarray(image)) for image in PICTURES])
    tokens = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    expected = (model.encode_image(pixels, normalize=True) * model.encode_text(tokens, normalize=True)).sum(1)
    close(ClipScore(str(tmp_path))(IMAGES, PROMPTS), expected)


@torch.no_grad()
def test_open_clips_siglip_is_a_sigmoid_too(tmp_path):
    import open_clip

    save_open_clip(tmp_path, {**OPEN_CLIP, "init_logit_bias": -1.0, "init_logit_scale": 2.0})
    model, _, process = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pixels = torch.stack([process(Image.fromarray(image)) for image in PICTURES])
    expected = model.get_logits(pixels, open_clip.get_tokenizer("ViT-B-32")(TEXTS))[0].diagonal().sigmoid()
    assert expected.std() > 0.02
    close(ClipScore(str(tmp_path))(IMAGES, PROMPTS), expected)


def test_an_architecture_and_its_weights_file(tmp_path):
    model = save_open_clip(tmp_path)
    (tmp_path / "tiny-clip-score.json").write_text(json.dumps(OPEN_CLIP))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    reward = ClipScore(str(tmp_path / "tiny-clip-score.json"), str(tmp_path / "weights.pt"))
    assert torch.equal(reward(IMAGES, PROMPTS), ClipScore(str(tmp_path))(IMAGES, PROMPTS))


def test_pickscore(clip, tmp_path):
    """The model and what prepares its input come from two places."""
    directory, model = clip
    model.save_pretrained(tmp_path)
    expected = clip_logits(model)
    assert expected.std() > 0.5
    reward = load_reward(f"pickscore(checkpoint={str(tmp_path)!r}, processor={str(directory)!r})")
    close(reward(IMAGES, PROMPTS), expected, 2e-5)


@pytest.mark.parametrize("size", [(48, 110), (64, 64), (130, 65)])
def test_other_shapes(clip, size):
    directory, model = clip
    images = pictures(5, *size)
    close(PickScore(str(directory), str(directory))(to_tensor(*images), PROMPTS), clip_logits(model, images), 2e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_rows_and_microbatches_change_nothing(kind, request):
    directory = str(request.getfixturevalue(kind)[0])
    whole = ClipScore(directory)(IMAGES, PROMPTS)
    close(ClipScore(directory, microbatch=2)(IMAGES, PROMPTS), whole)
    one = ClipScore(directory)
    close(torch.cat([one(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)]), whole)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_bf16_is_near_and_keeps_the_logits_scale(kind, request):
    directory = str(request.getfixturevalue(kind)[0])
    reward = ClipScore(directory, dtype="bf16")
    close(reward(IMAGES, PROMPTS), ClipScore(directory)(IMAGES, PROMPTS), 0.02)
    assert {p.dtype for p in reward.network.parameters()} == {torch.bfloat16}
    scale = {"clip": 2.6592, "siglip": 1.7}[kind]
    assert reward.network.scale == pytest.approx(torch.tensor(scale).exp().item(), rel=1e-6)
    assert reward.network.bias == {"clip": None, "siglip": pytest.approx(-1.3)}[kind]


# --- Files ---


def test_missing_weights_are_not_drawn_at_random(clip, tmp_path):
    clip[1].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual_projection.weight"], tensors["logit_scale"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnavailableError, match=r"weights of CLIPModel: it lacks logit_scale, visual_projection"):
        PickScore(str(tmp_path), str(clip[0]))(IMAGES, PROMPTS)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnavailableError, match="must be a CLIP or SigLIP model, not bert"):
        ClipScore(str(tmp_path))(IMAGES, PROMPTS)


def test_a_processor_that_is_not_there(clip, tmp_path):
    clip[1].save_pretrained(tmp_path)
    with pytest.raises(UnavailableError, match=f"cannot load AutoImageProcessor from '{tmp_path}'") as caught:
        ClipScore(str(tmp_path))(IMAGES, PROMPTS)
    assert "\n" not in str(caught.value)


def test_weights_that_open_clip_does_not_know():
    with pytest.raises(UnavailableError, match=r"cannot load 'ViT-B-32' with the weights 'none' with open_clip"):
        ClipScore("ViT-B-32", "none")(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipScore("/no/such"), "there is no model '/no/such'; give a directory, or owner/name"),
        (lambda: ClipScore("."), r"the directory '\.' has no open_clip_config\.json"),
        (lambda: ClipScore("ViT-Z-14"), "open_clip has no architecture 'ViT-Z-14'"),
        (lambda: ClipScore("openai/clip-vit-large-patch14", "dfn2b"), "brings its own weights"),
        (lambda: ClipScore(4), "must be strings"),
        (lambda: PickScore("a/b/c"), "there is no checkpoint 'a/b/c'"),
        (lambda: PickScore(processor="../no"), r"there is no processor '\.\./no'"),
    ],
)
def test_refused_arguments(build, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build()


def test_only_open_clips_models_need_open_clip(clip, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "open_clip" else find(name))
    with pytest.raises(ValueError, match=r"needs the package 'open_clip': pip install 'denoise-env\[rewards\]'"):
        ClipScore()
    ClipScore(str(clip[0]))
    ClipScore("openai/clip-vit-large-patch14")
