import json

import open_clip
import pytest
import torch

from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.shapes import ALL, CLIP_WEIGHTS, HELD_OUT, HPS_WEIGHTS, TRAIN, Verifier, parse, render
from denoise_env.shapes.pretrain_clip import Towers, agreement, main, near_miss, pairs, spoil


def shipped(directory):
    """The towers, by open_clip alone."""
    model = open_clip.create_model(f"local-dir:{directory}").eval()
    return Towers(model, open_clip.get_tokenizer(f"local-dir:{directory}"))


@pytest.mark.parametrize("directory", [CLIP_WEIGHTS, HPS_WEIGHTS])
def test_what_ships_is_small(directory):
    assert sum(file.stat().st_size for file in directory.iterdir()) < 6e6


def test_the_shipped_clip_agrees_with_the_renderer(generator):
    towers = shipped(CLIP_WEIGHTS)
    assert agreement(towers, TRAIN[::3], generator, 4)["zero-shot"] > 0.95
    assert agreement(towers, HELD_OUT, generator, 8)["zero-shot"] > 0.6  # of 72; it never saw these captions


@pytest.mark.parametrize("captions", [TRAIN[::6], HELD_OUT], ids=["train", "held out"])
def test_the_shipped_hps_prefers_what_the_verifier_does(captions):
    """0.92 of many pairs, where the CLIP that it began as has 0.84 and 0.78; here of about a hundred."""
    shares = []
    for directory in (CLIP_WEIGHTS, HPS_WEIGHTS):
        shares.append(agreement(shipped(directory), captions, torch.Generator().manual_seed(3), 16)["pairs"])
    assert shares[1] > max(0.8, shares[0])


@pytest.mark.parametrize(("name", "directory"), [("shapes-clip", CLIP_WEIGHTS), ("shapes-hps", HPS_WEIGHTS)])
def test_the_rewards_are_open_clips_cosines(name, directory, generator):
    pictures = (render(HELD_OUT, generator) * 255).round() / 255
    towers = shipped(directory)
    with torch.no_grad():
        expected = (towers.images(pictures) * towers.texts(HELD_OUT)).sum(1)
    found = load_reward(name)(pictures, [Prompt(text) for text in HELD_OUT])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_spoiling_lowers_the_verifiers_score(generator):
    pictures, verifier = render(TRAIN, generator), Verifier()
    assert torch.equal(spoil(pictures, generator, 0.0), pictures)
    scores = [verifier.score(spoil(pictures, generator, most), TRAIN).mean() for most in (0.0, 0.5, 1.0)]
    assert scores[0] > scores[1] + 0.1 > scores[2] + 0.2


def test_a_near_miss_differs_in_one_word(generator):
    seen = set()
    for text in ALL * 3:
        other = near_miss(text, generator)
        words = [a != b for a, b in zip(vars(parse(text)).values(), vars(parse(other)).values(), strict=True)]
        assert sum(words) == 1
        seen.add(words.index(True))
    assert seen == {0, 1, 2}


def test_pairs_are_often_unequal(generator):
    drawn = pairs(TRAIN, generator)
    assert drawn.shape == (60, 2, 3, 32, 32)
    score = Verifier().score(drawn.flatten(0, 1), [text for text in TRAIN for _ in range(2)]).view(-1, 2)
    assert ((score[:, 0] - score[:, 1]).abs() > 0.1).float().mean() > 0.3


def test_a_tiny_run_writes_what_open_clip_and_the_rewards_load(tmp_path, capsys):
    main(["--out", str(tmp_path), "--steps", "2", "--preference-steps", "2", "--eval-times", "1"])
    assert "zero-shot" in capsys.readouterr().out
    for name, kind in (("clip", "clip_score"), ("hps", "hps")):
        assert json.loads((tmp_path / name / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 64
        reward = load_reward(f"{kind}({str(tmp_path / name)!r})")
        assert reward(torch.rand(2, 3, 32, 32), [Prompt("a red circle on gray")] * 2).isfinite().all()
