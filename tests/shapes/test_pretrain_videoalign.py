import pytest
import torch

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.rewards.videoalign import look
from denoise_env.shapes import VIDEOALIGN_WEIGHTS
from denoise_env.shapes import pretrain_videoalign as videoalign
from denoise_env.shapes.motion import HELD_OUT, TRAIN, render, spoilt, verifier
from denoise_env.shapes.motion.agreement import agreement
from denoise_env.shapes.motion.spoilt import near_miss
from denoise_env.shapes.pretrain_videoalign import SPECIAL, Pool, build_network, main, read, rewards_of, see

LEAST = {"VQ": 0.7, "MQ": 0.6, "TA": 0.6}
AGREEMENT = {"VQ": 0.5, "MQ": 0.3, "TA": 0.5, "VQ pairs": 0.8, "MQ pairs": 0.62, "TA pairs": 0.68}
AGREEMENT |= {"colour": 0.7, "background": 0.9, "motion": 0.5}
"""Less than what was measured, which `docs/rewards.md` has."""
NAMES = ("shapes-videoalign-vq", "shapes-videoalign-mq", "shapes-videoalign-ta")


def test_what_ships_is_small():
    assert sum(file.stat().st_size for file in VIDEOALIGN_WEIGHTS.rglob("*") if file.is_file()) < 6e6


def test_the_three_rewards_are_the_shipped_weights_and_share_a_network(generator):
    clips, texts = render(HELD_OUT[:2], generator), HELD_OUT[:2]
    rewards = [load_reward(name) for name in NAMES]
    found = torch.stack([reward(clips, [Prompt(text) for text in texts]) for reward in rewards], 1)
    assert len({id(reward.network) for reward in rewards}) == 1
    torch.testing.assert_close(found, rewards_of(VIDEOALIGN_WEIGHTS)(clips, texts), rtol=0, atol=1e-5)


def test_the_shipped_rewards_prefer_what_is_well_drawn_steady_and_right(generator):
    """On captions that were never learnt from; 0.5 is chance."""
    texts = HELD_OUT[:24]
    scores = rewards_of(VIDEOALIGN_WEIGHTS)
    clean = render(texts, generator)
    good = scores(clean, texts)
    blurred = clean.mean((1, 3, 4), keepdim=True).lerp(clean, 0.4)
    shuffled = clean[:, [4, 0, 7, 8, 1, 3, 5, 6, 2]]
    recoloured = [near_miss(text, generator, "colour") for text in texts]
    for name, column, others in (
        ("VQ", 0, scores(blurred, texts)),
        ("MQ", 1, scores(shuffled, texts)),
        ("TA", 2, scores(clean, recoloured)),
    ):
        assert (good[:, column] > others[:, column]).float().mean() > LEAST[name], name


@pytest.mark.slow
def test_the_shipped_rewards_agree_with_the_verifier_on_held_out_captions(generator):
    found = agreement(rewards_of(VIDEOALIGN_WEIGHTS), HELD_OUT, generator, 120)
    for name, least in AGREEMENT.items():
        assert found[name] > least, (name, found)


@pytest.mark.slow
def test_a_tiny_run_writes_what_the_reward_loads(tmp_path, capsys):
    steps = ["--close-steps", "1", "--whole-steps", "1", "--text-steps", "1", "--joint-steps", "1"]
    main(["--out", str(tmp_path), "--clips", "20", "--shown", "16", "--eval-clips", "4", *steps])
    assert "held out: VQ" in capsys.readouterr().out
    reward = load_reward(f'videoalign({str(tmp_path)!r}, base={str(tmp_path / "base")!r}, dtype="fp32")')
    assert reward(torch.rand(2, 9, 3, 32, 32), [Prompt(TRAIN[0])] * 2).isfinite().all()


def test_the_tokenizer_reads_a_caption_word_by_word_and_any_other_text(tmp_path):
    tokenizer = videoalign.build_tokenizer()
    for text in (TRAIN[0], HELD_OUT[1], "Ünïcode — 漢字\n\n- what?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    about = f"\nTextual prompt - {HELD_OUT[0]}\n"
    assert len(tokenizer(about)["input_ids"]) == len(about.split()) + 2
    assert [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.convert_tokens_to_ids([*SPECIAL])] == [*SPECIAL]


def test_what_is_learnt_from_is_what_the_network_gives(tmp_path, generator):
    network = build_network(tmp_path).eval()
    pictures = [look(clip, 8.0) for clip in render(TRAIN[:2], generator)]
    texts = [TRAIN[0], "a red circle growing on gray", TRAIN[1], "a blue cross moving left fast on white"]
    with torch.no_grad():
        expected = network([pictures[0], pictures[0], pictures[1], pictures[1]], texts)
        found = read(network, see(network, pictures), texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_captions_that_are_held_out_are_never_drawn(generator, monkeypatch):
    drawn = []
    for module, name in ((spoilt, "render"), (spoilt, "encode"), (verifier, "encode"), (videoalign, "encode")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda texts, *rest, original=original: drawn.extend(texts) or original(texts, *rest)
        )
    Pool(100, generator)
    assert len(drawn) >= 300
    assert not {*drawn} & {*HELD_OUT}
    assert {*drawn} <= {*TRAIN}
