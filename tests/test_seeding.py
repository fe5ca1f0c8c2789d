from denoise_env.seeding import epoch_order, row_seeds


def test_every_prompt_comes_once_an_epoch_whatever_the_reading():
    items = [f"prompt {i}" for i in range(10)]
    whole = epoch_order(items, 0, 0, 30)
    assert sorted(whole[:10]) == sorted(whole[10:20]) == items
    assert whole[:10] != whole[10:20]
    pieces = [prompt for start in range(0, 30, 4) for prompt in epoch_order(items, 0, start, 4)]
    assert pieces[:30] == whole
    assert epoch_order(items, 1, 0, 10) != whole[:10]


def test_seeds_differ_by_purpose_iteration_and_row():
    draws = [tuple(row_seeds(s, p, i, 3)) for s in (0, 1) for p in ("rollout", "evaluation") for i in (0, 1)]
    assert len({seed for draw in draws for seed in draw}) == 24
    assert row_seeds(0, "rollout", 0, 2) == row_seeds(0, "rollout", 0, 5)[:2]
