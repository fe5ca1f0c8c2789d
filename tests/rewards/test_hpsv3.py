"""HPSv3 on a tiny random Qwen2-VL, against transformers' processor and the published procedure."""

import hashlib

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_qwen2vl import model as tiny_model
from tiny_qwen2vl import old_name, save_base, tokenizer
from torch import nn
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from denoise_env.prompts import Prompt
from denoise_env.rewards import hpsv3, load_reward
from denoise_env.rewards.base import UnavailableError
from denoise_env.rewards.hpsv3 import TEMPLATE, TOKEN, HPSv3, look

TEXTS = ["a red ball, yes", "a much longer prompt: thethe " * 6]
PROMPTS = [Prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny checkpoint in the published layout, its base, and the model that it is from."""
    folder = tmp_path_factory.mktemp("hpsv3")
    names = tokenizer()
    names.add_tokens([TOKEN], special_tokens=True)
    model = tiny_model(rows=len(names))
    layers = [nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)]
    model.rm_head = nn.Sequential(*layers).eval()
    state = {old_name(name): weight.clone() for name, weight in model.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")
    return folder, save_base(folder / "base"), model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(hpsv3, "PIXELS", 6 * 28 * 28)


def build(published, **options):
    return HPSv3(str(published[0]), str(published[1]), **{"dtype": "fp32", **options})


def images(count=2, size=(50, 80)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def reference(model, pictures, texts):
    """(μ, σ) by the published procedure: PIL's resize, embeddings without ids, so positions 0..L-1."""
    names = tokenizer()
    names.add_tokens([TOKEN], special_tokens=True)
    names.padding_side = "right"
    process = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), names, Qwen2VLVideoProcessor(), chat_template=names.chat_template
    )
    seen = []
    for picture in pictures:
        height, width = smart_resize(*picture.shape[-2:], 28, hpsv3.PIXELS, hpsv3.PIXELS)
        pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        seen.append(Image.fromarray(pixels).resize((width, height)))  # Pillow's default for RGB is bicubic
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEMPLATE.format(text_prompt=text)}]}]
        for text in texts
    ]
    text = process.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = process(text=text, images=seen, padding=True, return_tensors="pt", do_resize=False)
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    with torch.no_grad():
        visual = model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
        embeds = model.model.language_model.embed_tokens(batch["input_ids"])
        at = (batch["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(at, visual.pooler_output)
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        return model.rm_head(hidden[batch["input_ids"] == names.convert_tokens_to_ids(TOKEN)])


def test_template_is_the_published_one():
    assert len(TEMPLATE) == 2590
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest().startswith("f6ee57479d4e9eee")
    assert TEMPLATE.count(TOKEN) == 1


def test_images_are_seen_at_the_published_size():
    assert look(torch.rand(3, 256, 256)).shape == (1, 3, 448, 448)
    assert look(torch.rand(3, 720, 1280)).shape == (1, 3, 336, 588)


def test_score_is_the_mean_of_the_published_procedure(published, small):
    expected = reference(published[2], images(), TEXTS)
    assert (expected[0] - expected[1]).abs().min() > 1e-3
    torch.testing.assert_close(build(published)(images(), PROMPTS), expected[:, 0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(build(published, microbatch=1)(images(), PROMPTS), expected[:, 0], atol=2e-5, rtol=1e-5)


def test_bf16_keeps_the_head_in_float32(published, small):
    reward = build(published, dtype="bf16")
    found = reward(images(), PROMPTS)
    torch.testing.assert_close(found, reference(published[2], images(), TEXTS)[:, 0], atol=0.1, rtol=0.1)
    assert {weight.dtype for weight in reward.network.backbone.parameters()} == {torch.bfloat16}
    for name, weight in published[2].rm_head.state_dict().items():
        assert torch.equal(reward.network.head.state_dict()[name], weight)


def test_a_prompt_with_the_reward_token_is_not_scored(published, small):
    scores = build(published)(images(), [Prompt("a <|Reward|> b"), PROMPTS[0]])
    assert scores.isnan().tolist() == [True, False]
    assert build(published)(images(), [Prompt("<|image_pad|>")] * 2).isnan().all()


def test_what_does_not_fit_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match=r"has no HPSv3\.safetensors in it"):
        HPSv3(str(tmp_path))
    with pytest.raises(ValueError, match=r"has no config\.json in it, so it is not Qwen2-VL-7B-Instruct"):
        HPSv3(base=str(tmp_path))
    with pytest.raises(ValueError, match="images"):
        build(published)(torch.rand(1, 2, 3, 56, 56), PROMPTS[:1])
    state = {"model.embed_tokens.weight": torch.zeros(1, 32)}
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UnavailableError, match="the weights are for 1 tokens"):
        HPSv3(str(tmp_path), str(published[1]))(images(), PROMPTS)


def test_name():
    assert isinstance(load_reward('hpsv3(dtype="bf16", microbatch=2)'), HPSv3)
