"""Where windows lie, iteration by iteration."""

import math

import pytest

from agents.flow_dppo import FlowDPPO, FlowDPPOConfig
from agents.flow_grpo_fast import FlowGRPOFast, FlowGRPOFastConfig
from agents.mix_grpo import MixGRPO, MixGRPOConfig
from agents.policy import DenoisingPolicy

WHOLE = {"window_reach": "all", "window_end": "whole"}


def windows(mdp, iterations, seed=0, **config):
    agent = MixGRPO(DenoisingPolicy(mdp), MixGRPOConfig(**{"group_size": 4, **config}), seed=seed)
    found = [agent.window(i) for i in range(1, iterations + 1)]
    for i in (1, iterations):  # the kernel's stochastic steps are the window
        assert agent.kernel(i).stochastic.nonzero().flatten().tolist() == agent.window(i)
    return found


def positions(mdp, iterations, seed=0, **config):
    """The first steps of windows that stay whole."""
    found = windows(mdp, iterations, seed, **{**WHOLE, **config})
    size = config.get("window_size", 4)
    assert all(window == list(range(window[0], window[0] + size)) for window in found)
    return [window[0] for window in found]


def test_progressive_windows_slide_and_begin_again(points):
    """Nine trainable steps of ten (the last is deterministic): places 0 to 5 for a window of 4."""
    found = positions(points, 14, window_every=2)
    assert found == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0]
    assert positions(points, 8, window_every=1, window_stride=2) == [0, 2, 4, 0, 2, 4, 0, 2]
    assert positions(points, 5, window_every=1, window_size=9) == [0] * 5


def test_published_windows_slide_out_over_the_last_but_two(points):
    found = windows(points, 10, window_every=1)
    assert found[:5] == [[l, l + 1, l + 2, l + 3] for l in range(5)]  # noqa: E741
    assert found[5:] == [[5, 6, 7], [6, 7], [7], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_a_window_reaches_what_it_may(points):
    reaches = {"all": 9, "first_half": 5, "all_but_two": 8}
    for reach, steps in reaches.items():
        found = windows(points, 60, window_strategy="random", window_reach=reach, window_size=2)
        assert {window[0] for window in found} == set(range(steps - 1))
        assert all(window == [window[0], window[0] + 1] for window in found)


def test_frozen_windows_stay_at_the_noisy_end(points):
    assert positions(points, 60, window_strategy="frozen") == [0] * 60


def test_random_windows_reach_every_place_and_follow_the_seed(points):
    found = positions(points, 200, window_strategy="random")
    assert set(found) == set(range(6))
    assert all(15 <= found.count(place) <= 55 for place in range(6))
    assert found == positions(points, 200, window_strategy="random")
    assert found != positions(points, 200, window_strategy="random", seed=1)


def test_scattered_steps_need_not_be_neighbours(points):
    """Three of the first five: each of the ten sets, and alike often."""
    agent = FlowDPPO(DenoisingPolicy(points), FlowDPPOConfig())
    found = [tuple(agent.window(i)) for i in range(1, 1001)]
    sets = {(a, b, c) for a in range(5) for b in range(a + 1, 5) for c in range(b + 1, 5)}
    assert set(found) == sets
    assert all(60 <= found.count(steps) <= 150 for steps in sets)
    for i in (1, 2):
        assert agent.kernel(i).stochastic.nonzero().flatten().tolist() == agent.window(i)


def test_flow_grpo_fasts_window_lies_in_the_first_half(points):
    agent = FlowGRPOFast(DenoisingPolicy(points), FlowGRPOFastConfig())
    assert {tuple(agent.window(i)) for i in range(1, 100)} == {(0, 1), (1, 2), (2, 3), (3, 4)}


def test_decaying_windows_hurry_to_the_clean_end(points):
    """⌈τ exp(−k · max(l − start, 0))⌉ iterations at place l: 10, 10, 10, 7, 4, 3."""
    options = {"window_every": 10, "window_decay": 0.5, "window_decay_start": 2, "window_strategy": "decay"}
    stays = [10, 10, 10, *(math.ceil(10 * math.exp(-0.5 * later)) for later in (1, 2, 3))]
    assert stays == [10, 10, 10, 7, 4, 3]
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


def test_what_a_strategy_ignores_is_named(points):
    def idle(**config):
        agent = MixGRPO(DenoisingPolicy(points), MixGRPOConfig(window_stride=2, window_decay=0.2, **config))
        return {name for name in agent.idle_settings() if name.startswith("window")}

    assert idle() == {"window_decay"}
    assert idle(window_strategy="decay") == set()
    assert idle(window_strategy="random", window_end="whole") == {"window_decay", "window_stride", "window_end"}
