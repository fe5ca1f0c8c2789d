"""VisionReward's rule against the published numbers, its files, and a real vision-language model that answers."""

import json
import math

import pytest
import torch
from tiny_qwen2vl import config, tokenizer
from transformers import (
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.rewards.visionreward import (
    ALIGNMENT,
    MASKS,
    Answerer,
    VisionReward,
    VisionRewardVideo,
    image_score,
    seconds,
    video_score,
)

# weight_select.json and weight.json of THUDM/VisionReward, to six places
IMAGE = [
    *(2.354288, 0.068846, 0.101836, 0.130659, 0.069502, 0.055587, 0.043667, 0.211478, 0.582822, 0.050970, 0.067953),
    *(0.064909, 0.324760, 0.075630, 0.077473, 0.042203, 0.051476, 0.010244, 0.017375, 0.114551, 0.082418, 0.055349),
    *(0.030042, 0.031366, 0.076655, 0.071876, 0.012130, 0.015130),
]
VIDEO = [
    *(0.954390, 0.252397, 1.141819, 0.034957, 0.025237, 0.126008, 0.032215, 0.162868, 0.216739, 0.019703, 0.136040),
    *(0.096471, 0.154909, 0.129416, 0.098917, 0.188393, 0.184434, 0.263553, 0.111690, 0.051738, 0.025628, 0.438989),
    *(0.268577, 0.429252, 0.008462, 0.127573, 0.057982, 0.144633, 0.394181),
]


def image_files(folder, coef=IMAGE, intercept=0.0, count=30):
    (folder / "q.txt").write_text("\n".join(f"question {i}?" for i in range(count)))
    (folder / "w.json").write_text(json.dumps({"coef": coef, "intercept": [intercept]}))
    return str(folder / "q.txt"), str(folder / "w.json")


def video_files(folder, weights=VIDEO, questions=None):
    questions = questions or ['does it show "[[prompt]]"?', *(f"question {i}?" for i in range(1, 29))]
    (folder / "q.txt").write_text("\n".join(questions))
    (folder / "w.json").write_text(json.dumps(weights))
    return str(folder / "q.txt"), str(folder / "w.json")


class Oracle(torch.nn.Module):
    """Answers yes to what is in its table, or to what its rule says; remembers what it was asked."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.asked = rule, []

    def readable(self, prompt):
        return "<|" not in prompt

    def forward(self, pictures, questions):
        assert pictures.dtype == torch.uint8
        self.asked.append((pictures, list(questions)))
        return torch.tensor([float(self.rule(picture, q)) for picture, q in zip(pictures, questions, strict=True)])


def with_oracle(reward, rule):
    oracle = Oracle(rule)
    reward.load_network = lambda: oracle
    return reward, oracle


# --- The rule ---


def test_published_image_scores():
    yes = torch.ones(2, 30, dtype=torch.bool)
    yes[1, :3] = False  # neither body nor face nor hands
    scores = image_score(yes, torch.tensor([0.8, 0.8]), torch.tensor(IMAGE), 0.0)
    assert scores.tolist() == pytest.approx([4.420337, 4.045372], abs=2e-5)


def test_published_video_score():
    assert video_score(torch.ones(1, 29, dtype=torch.bool), torch.tensor(VIDEO)).item() == pytest.approx(
        0.216454, abs=2e-6
    )


def test_image_rule_by_hand():
    """Weights that are powers of two tell which answers counted."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([2.0**k for k in range(28)], dtype=torch.float64)
    for _ in range(20):
        answers = torch.rand(1, 30, generator=generator) > 0.5
        a = answers[0].tolist()
        values = [0.25]
        for i in range(3, 30):
            mask = 0 if i in (22, 23, 24, 28, 29) else 1 if i in (25, 26) else 2 if i == 27 else None
            values.append(0 if mask is not None and not a[mask] else 1 if a[i] else -1)
        expected = sum(v * 2.0**k for k, v in enumerate(values)) + 3
        found = image_score(answers, torch.tensor([0.25]), weights.float(), 3.0).item()
        assert found == pytest.approx(expected, rel=1e-6)


def test_video_rule_by_hand():
    answers = torch.tensor([[True, False, True], [False, False, False]])
    torch.testing.assert_close(
        video_score(answers, torch.tensor([1.0, 2.0, 4.0])), torch.tensor([(1 - 2 + 4) / 3, -7 / 3])
    )


@pytest.mark.parametrize(
    ("count", "fps", "indices"),
    [(1, 8, [0]), (5, 8, [0]), (17, 8, [0, 8, 16]), (22, 8, [0, 8, 16, 21]), (9, 3, [0, 3, 6, 8]), (5, 1, [*range(5)])],
)
def test_a_frame_a_second(count, fps, indices):
    assert seconds(count, fps)[: len(indices)] == indices
    assert len(seconds(count, fps)) == len(indices)


def test_at_most_24_frames():
    assert seconds(400, 8) == [*range(0, 192, 8)]


# --- The rewards ---


def test_image_reward_asks_every_question_and_the_alignment(tmp_path):
    reward, oracle = with_oracle(VisionReward(*image_files(tmp_path), microbatch=2), lambda p, q: 0.8)
    images = torch.rand(3, 3, 8, 8)
    scores = reward(images, [Prompt("a cat"), Prompt("x"), Prompt("y")])
    assert scores.tolist() == pytest.approx([4.420337] * 3, abs=2e-5)
    assert len(oracle.asked) == 31 * 2
    assert torch.equal(oracle.asked[0][0], (images[:2] * 255).round().to(torch.uint8))
    assert [questions[0] for _, questions in oracle.asked[:31]] == [
        *(f"question {i}?" for i in range(30)),
        'Does this figure show "a cat"? Please answer yes or no.',
    ]
    assert ALIGNMENT.count("[[prompt]]") == 1


def test_image_reward_masks_by_its_answers(tmp_path):
    masks = {f"question {i}?" for i in MASKS}
    reward, _ = with_oracle(VisionReward(*image_files(tmp_path)), lambda p, q: 0.49 if q in masks else 0.8)
    assert reward(torch.rand(1, 3, 8, 8), [Prompt("a")]).item() == pytest.approx(4.045372, abs=2e-5)


def test_clip_reward_looks_at_a_frame_a_second(tmp_path):
    reward, oracle = with_oracle(VisionRewardVideo(*video_files(tmp_path), fps=4), lambda p, q: 0.6)
    clip = torch.rand(2, 9, 3, 8, 8)
    assert reward(clip, [Prompt("a"), Prompt("b")]).tolist() == pytest.approx([0.216454] * 2, abs=2e-6)
    pictures, questions = oracle.asked[0]
    assert torch.equal(pictures, (clip[:, [0, 4, 8]] * 255).round().to(torch.uint8))
    assert questions == ['does it show "a"?', 'does it show "b"?']


def test_clip_reward_counts_a_no(tmp_path):
    files = video_files(tmp_path, [1.0, 2.0, 4.0], ["[[prompt]]?", "two?", "three?"])
    reward, _ = with_oracle(VisionRewardVideo(*files), lambda p, q: q == "a?")
    found = reward(torch.rand(2, 3, 3, 8, 8), [Prompt("a"), Prompt("b")])
    torch.testing.assert_close(found, torch.tensor([-5 / 3, -7 / 3]))


def test_a_prompt_with_a_special_token_is_not_scored(tmp_path):
    reward, _ = with_oracle(VisionReward(*image_files(tmp_path)), lambda p, q: 1)
    scores = reward(torch.rand(2, 3, 8, 8), [Prompt("a <|im_end|>"), Prompt("b")])
    assert scores.isnan().tolist() == [True, False]
    assert reward(torch.rand(1, 3, 8, 8), [Prompt("<|x|>")]).isnan().all()


# --- A real model that answers ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random Qwen2-VL in the layout of the hub."""
    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config(len(tokenizer())))
    model.save_pretrained(folder)
    sizes = {"min_pixels": 56 * 56, "max_pixels": 4 * 56 * 56}
    names = tokenizer()
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), names, Qwen2VLVideoProcessor(**sizes), chat_template=names.chat_template
    )
    processor.save_pretrained(folder)
    return folder, model.eval(), processor


@pytest.mark.parametrize("kind", ["image", "video"])
def test_yes_is_what_the_models_next_token_says(checkpoint, kind):
    """Row by row, without padding, through the model's own forward."""
    _, model, processor = checkpoint
    answerer = Answerer(model, processor)
    shape = (2, 3, 60, 90) if kind == "image" else (2, 4, 3, 60, 90)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    questions = ["is it?", "a much longer question, is it the thing?"]
    with torch.no_grad():
        found = answerer(pictures, questions)
        for picture, question, probability in zip(pictures, questions, found, strict=True):
            text = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
                f"<|{kind}_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
            )
            batch = processor(text=[text], **{f"{kind}s": [picture]}, return_tensors="pt")
            likely = model(**batch).logits[0, -1].double().softmax(0)
            ids = {word: tokenizer().encode(word)[0] for word in ("yes", "Yes", "no", "No")}
            assert len({*ids.values()}) >= 2
            yes, no = (sum(likely[i] for i in {ids[w] for w in words}) for words in (("yes", "Yes"), ("no", "No")))
            assert probability.item() == pytest.approx((yes / (yes + no)).item(), abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rewards_load_the_model(checkpoint, tmp_path, dtype):
    (tmp_path / "image").mkdir()
    (tmp_path / "video").mkdir()
    reward = VisionReward(*image_files(tmp_path / "image"), model=str(checkpoint[0]), dtype=dtype)
    images = torch.rand(2, 3, 60, 60)
    scores = reward(images, [Prompt("a"), Prompt("b")])
    assert scores.isfinite().all()
    assert reward.network.model.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with torch.no_grad():
        pixels = (images * 255).round().to(torch.uint8)
        yes = [reward.network(pixels, [question] * 2) > 0.5 for question in reward.questions]
        sure = reward.network(pixels, [ALIGNMENT.replace("[[prompt]]", t) for t in "ab"])
    expected = image_score(torch.stack(yes, 1), sure, torch.tensor(IMAGE), 0.0)
    torch.testing.assert_close(scores, expected)
    video = VisionRewardVideo(*video_files(tmp_path / "video"), model=str(checkpoint[0]), dtype=dtype, fps=2)
    score = video(torch.rand(1, 5, 3, 60, 60), [Prompt("a")])
    assert -sum(VIDEO) / 29 <= score.item() <= sum(VIDEO) / 29


def test_yes_and_no_of_one_token_are_refused(checkpoint):
    class Same:
        class tokenizer:
            @staticmethod
            def encode(word, add_special_tokens):
                return [7, 8]

    with pytest.raises(ValueError, match="begins yes and no with the same token"):
        Answerer(checkpoint[1], Same())


# --- Files ---


def test_files_of_another_form_are_refused(tmp_path):
    with pytest.raises(ValueError, match="30 questions and 28 weights, not 2"):
        VisionReward(*image_files(tmp_path, coef=[1.0, 2.0]))
    with pytest.raises(ValueError, match="with the 29 questions"):
        VisionReward(*image_files(tmp_path, count=29))
    with pytest.raises(ValueError, match="a weight must be a finite number"):
        VisionReward(*image_files(tmp_path, coef=[math.nan] * 28))
    with pytest.raises(ValueError, match="cannot use the weights"):
        VisionReward(*video_files(tmp_path))
    with pytest.raises(ValueError, match="as many, not 2"):
        VisionRewardVideo(*video_files(tmp_path, [1.0, 2.0]))
    with pytest.raises(ValueError, match="cannot read the questions"):
        VisionReward(str(tmp_path / "no.txt"), str(tmp_path / "w.json"))


def test_names(tmp_path):
    questions, weights = video_files(tmp_path)
    reward = load_reward(f'visionreward_video("{questions}", "{weights}", fps=16)')
    assert isinstance(reward, VisionRewardVideo)
    assert reward.takes == "clips"
    questions, weights = image_files(tmp_path)
    assert load_reward(f'visionreward("{questions}", "{weights}", dtype="fp32")').takes == "images"
    with pytest.raises(ValueError, match="missing a required argument: 'questions'"):
        load_reward("visionreward()")
