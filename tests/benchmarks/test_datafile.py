import json

import pytest
from results import record, write

from benchmarks import datafile


def test_merged_runs_stand_in_the_old_order_and_searches_go_with_them(tmp_path):
    path = tmp_path / "points.json"
    old = [record("points", agent, seed, [0.1, 0.2]) for agent in ("grpo", "ppo") for seed in range(2)]
    write(path, old, search=[record("points", "grpo", 1000, [0.1]), record("points", "ppo", 1000, [0.1])])
    data = datafile.read(path)
    new = {**data, "commands": ["new"], "search": [], "runs": [record("points", "grpo", s, [0.1, 0.9]) for s in (0, 1)]}
    merged = datafile.merge(data, new)
    assert [(run["agent"], run["curve"]["reward"][-1]) for run in merged["runs"]] == [
        *[("grpo", 0.9)] * 2,
        *[("ppo", 0.2)] * 2,
    ]
    assert [trial["agent"] for trial in merged["search"]] == ["ppo"]
    assert merged["commands"] == [*data["commands"], "new"]
    whole = datafile.merge(new, {**new, "commands": ["again"]})
    assert whole["commands"] == ["again"]  # nothing of the old is left


def test_an_agents_runs_are_not_replaced_by_fewer(tmp_path):
    path = tmp_path / "points.json"
    write(path, [record("points", "grpo", seed, [0.1, 0.2]) for seed in range(2)])
    data = datafile.read(path)
    broken = [record("points", "grpo", 0, [0.1, 0.9]), record("points", "grpo", 1, None, error="it broke")]
    assert datafile.merge(data, {**data, "runs": broken})["runs"] == data["runs"]
    assert datafile.fewer(data, {**data, "runs": broken}) == {("points", "grpo")}


@pytest.mark.parametrize(("name", "value"), [("budget", 3000), ("seeds", 3), ("trials", 6), ("reward", "other")])
def test_other_settings_are_refused_by_name(tmp_path, name, value):
    path = tmp_path / "points.json"
    write(path, [record("points", "grpo", 0, [0.1, 0.2])])
    data = datafile.read(path)
    datafile.check(path, data)
    with pytest.raises(ValueError, match=rf"other settings \({name}"):
        datafile.check(path, {**data, name: value})


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"suite": "points"})])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "points.json").write_text(text)
    with pytest.raises(ValueError, match=r"no data file of benchmarks\.suite"):
        datafile.read(tmp_path / "points.json")
