"""Where windows lie, iteration by iteration."""

import math

import pytest

from agents.mix_grpo import MixGRPO, MixGRPOConfig
from agents.policy import DenoisingPolicy


def positions(mdp, iterations, seed=0, **config):
    agent = MixGRPO(DenoisingPolicy(mdp), MixGRPOConfig(**{"group_size": 4, **config}), seed=seed)
    windows = [agent.window(i) for i in range(1, iterations + 1)]
    assert {stop - start for start, stop in windows} == {agent.config.window_size}
    for i in (1, iterations):  # the kernel's stochastic steps are the window
        start, stop = agent.window(i)
        assert agent.kernel(i).stochastic.nonzero().flatten().tolist() == list(range(start, stop))
    return [start for start, _ in windows]


def test_progressive_windows_slide_and_begin_again(points):
    """Nine trainable steps of ten (the last is deterministic): places 0 to 5 for a window of 4."""
    found = positions(points, 14, window_every=2)
    assert found == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0]
    assert positions(points, 8, window_every=1, window_stride=2) == [0, 2, 4, 0, 2, 4, 0, 2]
    assert positions(points, 5, window_every=1, window_size=9) == [0] * 5


def test_frozen_windows_stay_at_the_noisy_end(points):
    assert positions(points, 60, window_strategy="frozen") == [0] * 60


def test_random_windows_reach_every_place_and_follow_the_seed(points):
    found = positions(points, 200, window_strategy="random")
    assert set(found) == set(range(6))
    assert all(15 <= found.count(place) <= 55 for place in range(6))
    assert found == positions(points, 200, window_strategy="random")
    assert found != positions(points, 200, window_strategy="random", seed=1)


def test_decaying_windows_hurry_to_the_clean_end(points):
    """τ exp(−k · max(l − start, 0)) iterations at place l: 10, 10, 10, 6, 4, 2."""
    options = {"window_every": 10, "window_decay": 0.5, "window_decay_start": 2, "window_strategy": "decay"}
    stays = [10, 10, 10, *(round(10 * math.exp(-0.5 * later)) for later in (1, 2, 3))]
    assert stays == [10, 10, 10, 6, 4, 2]
    lap = [place for place, stay in enumerate(stays) for _ in range(stay)]
    assert positions(points, 2 * len(lap), **options) == lap * 2
    assert positions(points, 3, **{**options, "window_every": 1, "window_decay": 9.0}) == [0, 1, 2]  # once at least


@pytest.mark.parametrize("size", [1, 4, 9])
def test_drop_last_keeps_windows_off_the_last_step(make_shapes, size):
    mdp = make_shapes(num_steps=10)  # its last DDIM step is stochastic
    last = max(positions(mdp, 100, window_every=1, window_size=size))
    assert last + size == 9
    last = max(positions(mdp, 100, window_every=1, window_size=size, drop_last=False))
    assert last + size == 10
