import pytest
import torch

from denoise_env.shapes.motion import ALL, HELD_OUT, TRAIN, Verifier, parse
from denoise_env.shapes.motion.agreement import rank_correlation, ranked
from denoise_env.shapes.motion.spoilt import WORDS, choose, draw_spoilt, near_miss


def test_a_near_miss_differs_in_one_part_and_is_allowed(generator):
    for part in WORDS:
        for text in HELD_OUT[:20]:
            other = parse(near_miss(text, generator, part))
            assert [name for name in WORDS if getattr(other, name) != getattr(parse(text), name)] == [part]
    allowed = {*TRAIN}
    misses = [near_miss(text, generator, allowed=allowed) for text in TRAIN[:200]]
    assert {*misses} <= allowed
    assert len({*misses} - {*TRAIN[:200]}) > 50


def test_spoiling_lowers_what_the_verifier_sees(generator):
    texts = choose(ALL, 300, generator)
    drawn = draw_spoilt(texts, choose(ALL, 300, generator), generator)
    assert drawn.clips.min() >= 0
    assert drawn.clips.max() <= 1
    parts = Verifier().parts(drawn.clips, texts)
    clean, moves = drawn.looks == 0, drawn.motion == 0
    assert 0.35 < clean.float().mean() < 0.75
    assert 0.35 < moves.float().mean() < 0.65
    assert parts["appearance"][clean & moves].mean() > 0.99
    assert parts["appearance"][drawn.looks > 0.5].mean() < 0.6
    assert parts["consistency"][clean & (drawn.motion == 1)].mean() < 0.3


def test_rank_correlation_and_the_share_of_pairs_ranked():
    gold = torch.tensor([0.0, 0.05, 0.5, 1.0])
    assert rank_correlation(gold**3, gold) == pytest.approx(1)
    assert rank_correlation(-gold, gold) == pytest.approx(-1)
    assert ranked(gold, gold) == 1
    assert ranked(torch.tensor([0.1, 0.0, 2.0, 1.0]), gold) == pytest.approx(4 / 5)
