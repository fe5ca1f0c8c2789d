import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.algorithms import AGENTS
from agents.training.experiment import build
from benchmarks.runs import Run, execute, work
from benchmarks.suite import main, run_suite
from benchmarks.suites import SEARCH_EVAL_SEED, SEARCH_SEED, SUITES, UNTUNED, beyond, grid, make_run, of_ones_own

REPOSITORY = Path(__file__).parents[2]
PAIRS = [(name, where) for name, suite in SUITES.items() for where in suite.environments]
TINY = {"model": "points", "network_budget": 3000, "eval_points": 2, "eval_images_per_prompt": 4, "eval_kl": True}


def tiny(seed=0, **overrides):
    return Run("points", "grpo", {**TINY, "device": "cpu", "seed": seed, **overrides})


@pytest.mark.parametrize(("name", "where"), PAIRS)
def test_every_agent_has_as_many_trials_under_the_same_budget(name, where):
    suite = SUITES[name]
    for agent in suite.agents or AGENTS:
        settings = grid(suite, where, agent)
        assert len(settings) == (0 if agent in UNTUNED else suite.trials)
        assert len({str(setting) for setting in settings}) == len(settings)
        rates = {setting["agent.lr"] for setting in settings}
        assert not settings or (min(rates), max(rates)) == (suite.lr[0], suite.lr[-1])
        for setting in settings:
            trial = make_run(suite, where, agent, SEARCH_SEED, setting, search=True).config()
            run = make_run(suite, where, agent, 0, setting).config()
            assert trial.network_budget == (suite.trial_budget or suite.budget)
            assert run.network_budget == suite.budget
            assert trial.eval_seed == SEARCH_EVAL_SEED != run.eval_seed
            assert trial.agent == run.agent
        assert suite.seeds <= SEARCH_SEED


def test_a_seeds_evaluation_noise_is_its_own_and_the_same_for_all_agents():
    seeds = {a: [make_run(SUITES["points"], "points", a, s, {}).config().eval_seed for s in (0, 1)] for a in AGENTS}
    assert len({tuple(found) for found in seeds.values()}) == 1
    assert len(set(seeds["base"])) == 2
    assert SEARCH_EVAL_SEED not in range(min(seeds["base"]), min(seeds["base"]) + 100)


def test_clips_are_searched_where_they_can_bind():
    suite = SUITES["points"]
    updates = [setting.get("agent.updates_per_rollout") for setting in grid(suite, "points", "grpo")]
    assert updates == [1, 2] * 3
    assert {setting["agent.clip_range"] for setting in grid(suite, "points", "grpo")} == {1e-4, 1e-2}
    for agent in ("ddpo-sf", "nft"):  # one update by definition, and no clip
        assert [list(setting) for setting in grid(suite, "points", agent)] == [["agent.lr"]] * 6


@pytest.mark.parametrize("name", ["points", "points-flow"])
def test_every_searched_setting_fits_its_agent(name):
    suite = SUITES[name]
    for agent in AGENTS:
        for setting in grid(suite, name, agent) or [{}]:
            build(make_run(suite, name, agent, 0, setting).config())


def test_prompt_sets_grow_with_the_seed_and_are_the_same_for_all_agents():
    suite = SUITES["prompt-growth"]
    places = list(suite.environments)
    sets = {
        (i, seed): make_run(suite, place, "grpo", seed, {}).prompts for i, place in enumerate(places) for seed in (0, 1)
    }
    assert [len(sets[i, 0]) for i in range(3)] == [1, 10, 60]
    assert set(sets[0, 0]) < set(sets[1, 0]) < set(sets[2, 0])
    assert sets[1, 0] != sets[1, 1]
    assert make_run(suite, places[1], "ddpo-sf", 1, {}).prompts == sets[1, 1]


def test_a_runs_key_is_its_whole_configuration():
    keys = [tiny(), tiny(seed=1), tiny(**{"agent.lr": 1.0}), dataclasses.replace(tiny(), agent="rloo")]
    keys += [dataclasses.replace(tiny(), prompts=("ring",)), dataclasses.replace(tiny(), held_out="points")]
    assert len({run.key for run in keys}) == len(keys)
    assert tiny().key == tiny(**{"agent.clip_range": 1e-4}).key  # what it is anyway
    with pytest.raises(AttributeError, match="learning_rate"):
        _ = tiny(**{"agent.learning_rate": 1.0}).key


def test_trials_must_divide_among_the_clips():
    suite = dataclasses.replace(SUITES["points"], trials=5)
    with pytest.raises(ValueError, match="multiple of 2, not 5"):
        grid(suite, "points", "grpo")


def test_a_search_goes_on_beyond_its_end():
    def tried(*rates):
        return [{"agent.lr": lr, "agent.clip_range": clip} for lr in rates for clip in (0.1, 0.2)]

    def best_at(settings, lr, clip):
        return [float(setting == {"agent.lr": lr, "agent.clip_range": clip}) for setting in settings]

    settings = tried(0.01, 0.04)
    assert beyond(settings, best_at(settings, 0.04, 0.2)) == {"agent.lr": 0.08, "agent.clip_range": 0.2}
    assert beyond(settings, best_at(settings, 0.01, 0.1)) == {"agent.lr": 0.005, "agent.clip_range": 0.1}
    settings = tried(0.01, 0.02, 0.04)
    assert beyond(settings, best_at(settings, 0.02, 0.1)) is None
    assert beyond(settings[:2], best_at(settings[:2], 0.01, 0.1)) is None  # a single rate has no direction


def rising(runs, root, jobs, description):
    """In the place of `execute`: the reward of a run is its learning rate, but for NFT's, which is best at 0.013."""
    for run in runs:
        (root / run.key / "run").mkdir(parents=True, exist_ok=True)
        lr = run.config().agent_options.lr
        reward = -abs(lr - 0.013) if run.agent == "nft" else lr
        (root / run.key / "finished.json").write_text('{"held_out": {}, "code": "v0 00"}')
        head = "iteration,network_calls,points,points_low,points_high,diversity,kl,images,unscored"
        (root / run.key / "run" / "eval.csv").write_text(f"{head}\n0,0,0,0,0,1,0,4,0\n1,9,{reward},0,1,1,0,4,0\n")
        (root / run.key / "run" / "metrics.csv").write_text("iteration,seconds\n1,2.5\n")
    return {}


def test_a_winner_at_the_end_gets_two_further_trials_and_old_code_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.suite.execute", rising)
    suite = dataclasses.replace(SUITES["points"], agents=("grpo", "nft"), seeds=2)
    data = run_suite("points", suite, 1, tmp_path, {})
    rates = sorted(trial["setting"]["lr"] for trial in data["search"] if trial["agent"] == "grpo")
    assert rates == [0.0025, 0.0025, 0.01, 0.01, 0.04, 0.04, 0.08, 0.16]
    assert sum(trial["agent"] == "nft" for trial in data["search"]) == 6
    assert {(run["agent"], run["setting"]["lr"]) for run in data["runs"]} == {("grpo", 0.16), ("nft", 0.013)}
    assert "4 of 4 runs were made with other code" in capsys.readouterr().out


def test_a_part_of_a_suite_joins_the_file_and_never_thins_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.suite.execute", rising)
    command = ["run", "points", "--trials", "0", "--build", str(tmp_path / "build"), "--results", str(tmp_path)]
    path = tmp_path / "points.json"
    assert main([*command, "--agents", "grpo", "rloo", "--seeds", "3"]) == 0
    before = path.read_bytes()
    for other in (["--seeds", "2"], ["--budget", "5000", "--seeds", "3"], ["--seeds", "4"]):  # before anything runs
        assert main([*command, "--agents", "grpo", *other]) == 2
        assert "--results DIR" in capsys.readouterr().err
        assert path.read_bytes() == before
    assert main([*command, "--agents", "nft", "--seeds", "3"]) == 0
    data = json.loads(path.read_text())
    assert [run["agent"] for run in data["runs"]] == ["grpo"] * 3 + ["rloo"] * 3 + ["nft"] * 3
    assert [command.split("--agents ")[1].split(" --")[0] for command in data["commands"]] == ["grpo rloo", "nft"]
    monkeypatch.setattr("benchmarks.suite.execute", lambda runs, *_: {runs[0].key: "it broke"} if runs else {})
    assert main([*command, "--agents", "nft", "--seeds", "3"]) == 1
    assert "keeps the earlier runs of nft" in capsys.readouterr().out
    assert json.loads(path.read_text())["runs"] == data["runs"]


OWN = """
from agents.grpo import GRPO, GRPOConfig
from denoise_env.models import Family
from denoise_env.models.points import Points, PointsOptions

class Agent(GRPO):
    name = "mine"

def reward(images, prompts):
    return (-images.square().sum(1)).exp()

FAMILY = Family(description="points", options=PointsOptions, load=Points.load)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_suite_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_suite_parts"


def test_your_own_model_reward_and_agent_go_through_a_suite(own, tmp_path, monkeypatch):
    def here(runs, root, jobs, description):
        for run in runs:
            (root / run.key).mkdir(parents=True)
            (root / run.key / "run.json").write_text(json.dumps(dataclasses.asdict(run)))
            work(root / run.key)
        return {}

    monkeypatch.setattr("benchmarks.suite.execute", here)
    command = ["run", "points", "--model", f"{own}:FAMILY", "--reward", f"{own}:reward", "--agents", f"{own}:Agent"]
    where = ["--build", str(tmp_path / "build"), "--results", str(tmp_path / "results")]
    assert main([*command, "--seeds", "1", "--trials", "0", "--budget", "3000", *where]) == 0
    (path,) = (tmp_path / "results").iterdir()
    data = json.loads(path.read_text())
    assert path.name == f"points-{own}-FAMILY.json"
    assert list(data["environments"]) == [f"{own}:FAMILY"]
    assert not data["pooled"]
    (run,) = data["runs"]
    assert (run["agent"], run["error"]) == (f"{own}:Agent", None)
    assert 0 < run["curve"]["reward"][0] < 1


def test_your_own_agent_is_searched_as_the_one_it_comes_from(own):
    suite = SUITES["points"]
    assert grid(suite, "points", f"{own}:Agent") == grid(suite, "points", "grpo")


def test_a_suite_of_several_environments_takes_no_model():
    with pytest.raises(ValueError, match="several environments"):
        of_ones_own(SUITES["prompt-growth"], "points", None, None)


def test_an_unknown_agent_is_refused_with_the_nearest_name(capsys):
    assert main(["run", "points", "--agents", "gpro"]) == 2
    assert "grpo" in capsys.readouterr().err


def test_a_report_of_nothing_says_what_to_run(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "benchmarks.suite run" in capsys.readouterr().err


def test_prompts_are_trained_and_evaluated_on_and_held_out_ones_measured_after(tmp_path):
    run = dataclasses.replace(tiny(), prompts=("ring", "line"), held_out="points")
    (tmp_path / "run.json").write_text(json.dumps(dataclasses.asdict(run)))
    work(tmp_path)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert Path(config["prompts"]).read_text().split() == ["ring", "line"]
    assert config["eval_prompts"] == config["prompts"]
    with (tmp_path / "run" / "eval.csv").open() as file:
        assert {row["images"] for row in csv.DictReader(file)} == {"8"}  # 2 prompts · 4
    assert json.loads((tmp_path / "finished.json").read_text())["held_out"]["images"] == 24  # 6 prompts · 4


@pytest.mark.slow
def test_a_failing_run_is_reported_and_stops_no_other(tmp_path):
    runs = [tiny(), tiny(**{"agent.clip_range": -1.0}), tiny(**{"agent.lr": 1e30}), tiny(seed=1)]
    errors = execute(runs, tmp_path, jobs=2, description="test")
    assert set(errors) == {runs[1].key, runs[2].key}
    assert errors[runs[1].key].startswith("ValueError: clip_range")
    assert errors[runs[2].key].startswith("FloatingPointError: ")
    assert [(tmp_path / run.key / "finished.json").exists() for run in runs] == [True, False, False, True]


@pytest.mark.slow
def test_a_killed_suite_repeats_no_finished_run_and_resumes_the_others(tmp_path):
    command = [sys.executable, "-m", "benchmarks.suite", "run", "points", "--agents", "grpo", "--seeds", "3"]
    command += ["--trials", "0", "--budget", "12000", "--build", str(tmp_path / "build"), "--results", str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    finished = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / "build").glob("*/finished.json")}  # noqa: E731
    started = lambda: list((tmp_path / "build").glob("*/run/metrics.csv"))  # noqa: E731
    deadline = time.monotonic() + 120
    while len(started()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the runs too
    process.wait()
    before = finished()
    assert 1 <= len(before) < 3
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0
    after = finished()
    assert len(after) == 3
    assert before.items() <= after.items()
    data = json.loads((tmp_path / "points.json").read_text())
    assert [run["seed"] for run in data["runs"]] == [0, 1, 2]
    assert all(run["curve"]["network_calls"][-1] >= 12000 for run in data["runs"])


@pytest.mark.slow
def test_from_the_command_to_the_leaderboard(tmp_path, capsys):
    options = ["--build", str(tmp_path / "build"), "--results", str(tmp_path)]
    command = ["run", "points", "--agents", "grpo", "nft", "base", "best-of-n", "--seeds", "2", "--trials", "2"]
    assert main([*command, "--budget", "6000", "--jobs", "2", *options]) == 0
    data = json.loads((tmp_path / "points.json").read_text())
    for agent in ("grpo", "nft"):
        assert 2 <= sum(trial["agent"] == agent for trial in data["search"]) <= 4  # two of the grid, up to two wider
    assert {trial["seed"] for trial in data["search"]} == {SEARCH_SEED}
    for agent in ("grpo", "nft"):
        best = max((t for t in data["search"] if t["agent"] == agent), key=lambda trial: trial["reward"])
        assert all(run["setting"] == best["setting"] for run in data["runs"] if run["agent"] == agent)
    curve = data["runs"][0]["curve"]
    assert curve["network_calls"][0] == curve["seconds"][0] == curve["kl"][0] == 0
    assert sorted(curve["seconds"]) == curve["seconds"]
    assert {run["code"] for run in data["runs"]} == {data["versions"]["code"]}
    ends = {a: {run["curve"]["reward"][-1] for run in data["runs"] if run["agent"] == a} for a in ("base", "best-of-n")}
    assert {agent: len(found) for agent, found in ends.items()} == {"base": 2, "best-of-n": 2}  # noise of their own
    assert main(["report", "--results", str(tmp_path)]) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"leaderboard.md", "index.html", "points-curves.svg", "points-kl.svg"} < set(files)
    assert main(["report", "--results", str(tmp_path)]) == 0
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    text = files["leaderboard.md"].decode()
    assert "| agent | reward | Δ base |" in text
    assert text.count("\n| ") == 5
