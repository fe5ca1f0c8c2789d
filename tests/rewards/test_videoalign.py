"""VideoAlign on a tiny random Qwen2-VL, against PEFT, transformers' processor and the published procedure."""

import copy
import hashlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_qwen2vl import model as tiny_model
from tiny_qwen2vl import old_name, save_base, tokenizer
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward, videoalign
from denoise_env.rewards.base import UnavailableError
from denoise_env.rewards.qwen2vl import fit_size, merge_lora, rename, to_patches, to_uint8
from denoise_env.rewards.videoalign import TEMPLATE, TOKENS, VideoAlign, VideoAlignVQ, frame_indices, look

TEXTS = ["the red ball {text} rolls, yes", "a much longer prompt: thethe " * 6]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny checkpoint in the published layout, and the PEFT model that it is from."""
    folder = tmp_path_factory.mktemp("videoalign")
    names = tokenizer()
    names.add_tokens(list(TOKENS), special_tokens=True)
    model = tiny_model(rows=len(names))
    model.rm_head = nn.Linear(32, 1, bias=False)
    nn.init.normal_(model.rm_head.weight)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model" in n]
    peft = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules=linear)).eval()
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.05)
    (folder / "checkpoint-11352").mkdir()
    state = {old_name(name): weight for name, weight in peft.state_dict().items()}
    torch.save(state, folder / "checkpoint-11352" / "model.pth")
    return folder, save_base(folder / "base"), peft


@pytest.fixture
def small(monkeypatch):
    """Frames of 56 pixels keep the network fast."""
    monkeypatch.setattr(videoalign, "MIN_PIXELS", 56 * 56)
    monkeypatch.setattr(videoalign, "MAX_PIXELS", 2 * 56 * 56)


def build(published, part="", **options):
    options = {"dtype": "fp32", **options}
    cls = {"": VideoAlign, "vq": VideoAlignVQ, "mq": videoalign.VideoAlignMQ, "ta": videoalign.VideoAlignTA}[part]
    return cls(str(published[0]), str(published[1]), **options)


def clips(count=2, frames=9, size=(60, 100), seed=0):
    return torch.rand(count, frames, 3, *size, generator=torch.Generator().manual_seed(seed))


def processor():
    names = tokenizer()
    names.add_tokens(list(TOKENS), special_tokens=True)
    names.padding_side = "right"
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), names, Qwen2VLVideoProcessor(), chat_template=names.chat_template)


def reference(peft, images, texts, fps=8.0):
    """Raw scores by the published procedure: embeddings without ids, so positions 0..L-1, read at the three tokens."""
    model = peft.get_base_model()
    process = processor()
    seen = []
    for clip in images:
        frames = (clip * 255).round().to(torch.uint8)[frame_indices(len(clip), fps)]
        size = smart_resize(*clip.shape[-2:], 28, videoalign.MIN_PIXELS, videoalign.MAX_PIXELS)
        seen.append(resize(frames, list(size), InterpolationMode.BICUBIC, antialias=True))
    chats = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TEMPLATE.format(text_prompt=text)}]}]
        for text in texts
    ]
    text = process.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    options = {"do_resize": False, "do_sample_frames": False}
    batch = process(text=text, videos=seen, padding=True, return_tensors="pt", **options)
    weights = next(model.parameters()).dtype
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    with torch.no_grad():
        visual = model.model.visual(batch["pixel_values_videos"].to(weights), grid_thw=batch["video_grid_thw"])
        embeds = model.model.language_model.embed_tokens(batch["input_ids"])
        at = (batch["input_ids"] == model.config.video_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(at, visual.pooler_output)
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])[0]
        logits = model.rm_head(hidden)
    ids = process.tokenizer.convert_tokens_to_ids(list(TOKENS))
    return torch.stack([logits[batch["input_ids"] == i].flatten() for i in ids], 1), batch, seen


@pytest.fixture(scope="module")
def expected(published):
    """Of `clips` and `TEXTS`: raw scores ``[2, 3]``, the processor's batch, and the frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videoalign, "MIN_PIXELS", 56 * 56)
        patch.setattr(videoalign, "MAX_PIXELS", 2 * 56 * 56)
        return reference(published[2], clips(), TEXTS)


# --- Facts of the published code ---


def test_template_is_the_published_one():
    assert len(TEMPLATE) == 3997
    assert hashlib.sha256(TEMPLATE.encode()).hexdigest().startswith("fdb6309bac618dd0")
    assert [TEMPLATE.count(token) for token in TOKENS] == [1, 1, 1]
    assert TEMPLATE.index(TOKENS[0]) < TEMPLATE.index(TOKENS[1]) < TEMPLATE.index("{text_prompt}")


@pytest.mark.parametrize(
    ("count", "fps", "indices"),
    [
        (53, 8, [*range(0, 53, 4)]),
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (33, 24, [0, 11, 21, 32]),
        (2, 8, [0, 1]),
        (3, 8, [0, 2]),
        (5, 8, [0, 1, 3, 4]),
    ],
)
def test_frames(count, fps, indices):
    assert frame_indices(count, fps) == indices


def test_frames_are_at_most_768():
    assert len(frame_indices(2000, 2)) == 768


@pytest.mark.parametrize(
    ("size", "fitted", "hpsv3"),
    [
        ((480, 480), (448, 448), (448, 448)),
        ((480, 832), (336, 588), (336, 588)),
        ((720, 1280), (336, 588), (336, 588)),
        ((256, 256), (336, 336), (448, 448)),
    ],
)
def test_sizes(size, fitted, hpsv3):
    assert fit_size(*size, 100352, 200704) == fitted
    assert fit_size(*size, 200704, 200704) == hpsv3


def test_sizes_are_those_of_transformers():
    for height in range(20, 1400, 37):
        for width in range(20, 1400, 41):
            assert fit_size(height, width, 100352, 200704) == smart_resize(height, width, 28, 100352, 200704)


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match="200 times as long as wide, not 10x2001"):
        fit_size(10, 2001, 100352, 200704)


def test_normalised_scores(published, small, monkeypatch):
    raw = torch.tensor([[5.0, 0.5, -1.0]])
    monkeypatch.setattr(videoalign.VideoAlignNetwork, "scores", lambda self, clips, prompts: raw)
    expected = {"vq": 0.589206, "mq": -0.481211, "ta": -1.516858, "": -1.408863}
    for part, score in expected.items():
        assert build(published, part)(clips(1), [Prompt("a")]).item() == pytest.approx(score, abs=2e-6)
        plain = build(published, part, normalised=False)(clips(1), [Prompt("a")]).item()
        assert plain == pytest.approx({"vq": 5, "mq": 0.5, "ta": -1, "": 4.5}[part])


# --- Pixels and tokens ---


@pytest.mark.parametrize("size", [(60, 100), (480, 832), (128, 96)])
def test_frames_are_resized_as_published(size):
    clip = clips(1, 4, size)[0]
    frames = (clip * 255).round().to(torch.uint8)
    fitted = list(smart_resize(*size, 28, 100352, 200704))
    assert torch.equal(look(clip, 8.0), resize(frames, fitted, InterpolationMode.BICUBIC, antialias=True))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_patches_are_those_of_transformers(frames):
    video = to_uint8(clips(1, frames, (56, 84))[0])
    patches, grid = to_patches(video)
    batch = Qwen2VLVideoProcessor()(videos=[video], do_resize=False, do_sample_frames=False, return_tensors="pt")
    assert batch["video_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(patches, batch["pixel_values_videos"], atol=2e-6, rtol=0)


def test_token_ids_are_those_of_transformers(published, small, expected):
    reward = build(published)
    reward(clips(1), [Prompt("a")])
    _, batch, seen = expected
    for row, (text, frames) in enumerate(zip(TEXTS, seen, strict=True)):
        ids = reward.network.token_ids(text, frames.shape[0] // 2 * frames.shape[2] // 28 * frames.shape[3] // 28)
        assert ids.tolist() == batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()


# --- Scores ---


def test_scores_are_those_of_the_published_procedure(published, small, expected):
    expected, _, _ = expected
    assert expected.std(0).min() > 0.01
    prompts = [Prompt(text) for text in TEXTS]
    for i, part in enumerate(["vq", "mq", "ta"]):
        found = build(published, part, normalised=False)(clips(), prompts)
        torch.testing.assert_close(found, expected[:, i], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        build(published, normalised=False)(clips(), prompts), expected.sum(1), atol=5e-5, rtol=1e-5
    )


def test_positions_on_the_grid_would_score_otherwise(published, small, expected):
    """The trap that the positions 0..L-1 are for."""
    expected, batch, _ = expected
    model = published[2].get_base_model()
    with torch.no_grad():
        hidden = model.model(**batch)[0]
    ids = processor().tokenizer.convert_tokens_to_ids(list(TOKENS))
    grid = torch.stack([model.rm_head(hidden)[batch["input_ids"] == i].flatten() for i in ids], 1)
    assert (grid - expected).abs().max() > 0.01


def test_bf16(published, small, expected):
    expected, _, _ = expected
    reward = build(published, normalised=False, dtype="bf16")
    found = reward(clips(), [Prompt(text) for text in TEXTS])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.sum(1), atol=0.25, rtol=0.05)
    network = reward.network
    assert {p.dtype for p in network.backbone.parameters()} == {torch.bfloat16}
    assert network.head[0].weight.dtype == torch.float32
    assert torch.equal(network.head[0].weight, published[2].get_base_model().rm_head.weight)


def test_rotary_frequencies_are_rounded_in_every_precision(published, small):
    exact = 1 / (1e6 ** (torch.arange(0, 8, 2) / 8))
    for dtype in ("fp32", "bf16"):
        reward = build(published, dtype=dtype)
        reward(clips(1), [Prompt("a")])
        assert torch.equal(reward.network.backbone.language_model.rotary_emb.inv_freq.float(), exact.bfloat16().float())


def test_a_row_does_not_depend_on_its_batch(published, small):
    """The longer prompt pads the shorter one's row."""
    prompts = [Prompt(text) for text in TEXTS]
    reward = build(published, "ta")
    together = reward(clips(), prompts)
    for i in range(2):
        reward.network.known.clear()
        alone = reward(clips()[i : i + 1], prompts[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-5, rtol=1e-5)
    reward.network.known.clear()
    reward.microbatch = 1
    torch.testing.assert_close(reward(clips(), prompts), together, atol=2e-5, rtol=1e-5)


def test_only_text_alignment_reads_the_prompt(published, small):
    same = clips(1).expand(2, -1, -1, -1, -1)
    prompts = [Prompt("a"), Prompt("the yes no")]
    for part in ("vq", "mq"):
        one, other = build(published, part)(same, prompts)
        assert one.item() == pytest.approx(other.item(), abs=1e-5)
    one, other = build(published, "ta")(same, prompts)
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize("text", ["a <|TA_reward|>", "<|video_pad|>", "b <|im_end|> c"])
def test_a_prompt_with_a_special_token_is_not_scored(published, small, text):
    scores = build(published)(clips(), [Prompt(text), Prompt("a < |TA_reward| >")])
    assert scores.isnan().tolist() == [True, False]


def test_fps_chooses_the_frames(published, small):
    prompts = [Prompt("a")] * 2
    slow = build(published, "vq", fps=2)(clips(), prompts)
    assert (slow - build(published, "vq")(clips(), prompts)).abs().max() > 1e-4


# --- One network for all ---


def test_the_three_load_and_run_one_network(published, small, monkeypatch):
    calls = []
    forward = videoalign.VideoAlignNetwork.forward
    monkeypatch.setattr(
        videoalign.VideoAlignNetwork, "forward", lambda self, *args: calls.append(len(args[0])) or forward(self, *args)
    )
    rewards = [build(published, part, microbatch=2) for part in ("vq", "mq", "ta", "")]
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    images = clips(3, seed=5)
    before = [reward(images.clone(), prompts) for reward in rewards]
    assert len({id(reward.network) for reward in rewards}) == 1
    assert calls == [2, 1]
    changed = images.clone()
    changed[1] = 1 - changed[1]
    after = rewards[0](changed, prompts)
    assert calls == [2, 1, 1]
    assert (after == before[0]).tolist() == [True, False, True]
    torch.testing.assert_close(before[0] + before[1] + before[2], before[3])


def test_other_precisions_and_devices_have_networks_of_their_own(published, small):
    rewards = [build(published), build(published, dtype="bf16"), build(published, device="cpu")]
    for reward in rewards:
        reward(clips(1), [Prompt("a")])
    assert len({id(reward.network) for reward in rewards}) == 3


def test_the_network_is_freed_with_the_last_reward(published, small):
    one, other = build(published, "vq"), build(published, "mq")
    for reward in (one, other):
        reward(clips(1), [Prompt("a")])
    key = (one.checkpoint, one.base, None, torch.float32)
    one.free()
    assert videoalign._NETWORKS[key] is other.network
    other.free()
    assert key not in videoalign._NETWORKS
    assert one(clips(1), [Prompt("a")]).isfinite().all()


def test_what_is_kept_is_bounded(published, small, monkeypatch):
    monkeypatch.setattr(videoalign, "KEPT", 2)
    reward = build(published)
    reward(clips(3), [Prompt("a")] * 3)
    assert len(reward.network.known) == 2


# --- Checkpoints ---


def test_merge_is_pefts_own(published):
    state = torch.load(published[0] / "checkpoint-11352" / "model.pth", weights_only=True)
    merged = merge_lora(rename(state), 128)
    expected = copy.deepcopy(published[2]).merge_and_unload().model.state_dict()
    assert merged.keys() - {"rm_head.weight"} == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-6)
    changed = [name for name, weight in state.items() if ".base_layer.weight" in name]
    assert len(changed) == 14
    for name in changed:
        (new,) = rename({name.replace(".base_layer", ""): state[name]})
        assert (merged[new] - state[name]).abs().max() > 0.01


def test_names_of_transformers_4_and_5_are_understood():
    names = [
        "base_model.model.visual.patch_embed.proj.weight",
        "base_model.model.model.visual.patch_embed.proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "base_model.model.rm_head.weight",
        "lm_head.weight",
    ]
    renamed = [list(rename({name: torch.zeros(1)})) for name in names]
    assert renamed == [
        ["visual.patch_embed.proj.weight"],
        ["visual.patch_embed.proj.weight"],
        ["language_model.layers.0.mlp.up_proj.base_layer.weight"],
        ["language_model.layers.0.mlp.up_proj.weight"],
        ["language_model.embed_tokens.weight"],
        ["rm_head.weight"],
        [],
    ]


@pytest.mark.parametrize("change", ["missing", "left over", "vocabulary"])
def test_weights_that_do_not_fit_are_refused(published, tmp_path, small, change):
    state = torch.load(published[0] / "checkpoint-11352" / "model.pth", weights_only=True)
    if change == "missing":
        state.pop("base_model.model.model.norm.weight")
    elif change == "left over":
        state["base_model.model.model.layers.0.extra"] = torch.zeros(1)
    else:
        state["base_model.model.model.embed_tokens.weight"] = torch.zeros(7, 32)
    torch.save(state, tmp_path / "model.pth")
    reward = VideoAlign(str(tmp_path / "model.pth"), str(published[1]))
    with pytest.raises(UnavailableError, match="reward tokens has" if change == "vocabulary" else "do not fit"):
        reward(clips(1), [Prompt("a")])


def test_what_cannot_be_scored_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match="clips"):
        build(published)(torch.rand(1, 3, 56, 56), [Prompt("a")])
    with pytest.raises(ValueError, match="at least 2 frames, not 1"):
        build(published)(clips(1, 1), [Prompt("a")])
    with pytest.raises(ValueError, match=r"has no checkpoint-11352/model\.pth in it"):
        VideoAlign(str(tmp_path))
    for missing in (tmp_path / "model.pth", "no/such/folder", "model.pth"):
        with pytest.raises(ValueError, match="give the folder of VideoAlign's checkpoint, or its hub id"):
            VideoAlign(str(missing))
    with pytest.raises(ValueError, match="fps must be"):
        VideoAlign(fps=0)
    with pytest.raises(ValueError, match="normalised must be True or False"):
        VideoAlign(normalised="no")


def test_names(published):
    for name, cls in {"videoalign": "", "videoalign_vq": "VQ", "videoalign_mq": "MQ", "videoalign_ta": "TA"}.items():
        reward = load_reward(f'{name}(checkpoint="{published[0]}", base="{published[1]}", fps=16, dtype="fp32")')
        assert type(reward).__name__ == f"VideoAlign{cls}"
        assert reward.takes == "clips"
        assert reward.fps == 16
        assert type(load_reward(name)) is type(reward)  # the hub's, which is not loaded here
