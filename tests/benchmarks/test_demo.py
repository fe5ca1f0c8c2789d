import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo import main, over_seeds, table


def finished(directory, seed, end):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"seed": seed}))
    (directory / "metrics.csv").write_text("iteration,seconds\n1,20\n2,30\n")
    rows = [f"0,0.6,0.59,0.61,0.5,0.4,0.6,0.1,768\n2,0.7,0.69,0.71,{end},{end - 0.01},{end + 0.01},0.08,768\n"]
    head = "iteration,a,a_low,a_high,b,b_low,b_high,diversity,images\n"
    (directory / "eval.csv").write_text(head + "".join(rows))
    return directory


def test_a_row_a_seed_and_an_interval_over_seeds(tmp_path):
    ends = (0.90, 0.91, 0.89, 0.86, 0.90)
    runs = [finished(tmp_path / str(seed), seed, end) for seed, end in enumerate(ends)]
    text = table(runs)
    lines = text.splitlines()
    assert lines[2] == "| 0 | 0.500 [0.400, 0.600] | 0.900 [0.890, 0.910] | 0.100 | 0.080 | 50 |"
    mean, error = np.mean(ends), 2.776 * np.std(ends, ddof=1) / np.sqrt(5)
    assert f"{mean:.3f} [{mean - error:.3f}, {mean + error:.3f}]" in lines[7]
    assert "over training seeds" in text
    assert "| 0 | 0.600 [0.590, 0.610] | 0.700 [0.690, 0.710] |" in table(runs, ["a"])
    both = table(runs, ["a", "b"]).splitlines()
    assert both[0] == "| seed | a: before | after | b: before | after | diversity: before | after | training, s |"
    assert {line.count("|") for line in both[:8]} == {9}
    with pytest.raises(ValueError, match="the runs evaluate no reward 'c', but a, b"):
        table(runs, ["c"])


def test_the_interval_over_seeds_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    of_mean = of_next = 0
    for _ in range(1000):
        values, further = rng.normal(size=5), rng.normal()
        mean, half, half_next = over_seeds(values)
        of_mean += abs(mean) <= half
        of_next += abs(further - mean) <= half_next
    assert 930 <= of_mean <= 970
    assert 930 <= of_next <= 970


def test_the_runs_are_the_command_lines_own_and_are_not_repeated(tmp_path, monkeypatch, capsys):
    typed = []

    def train(arguments):
        typed.append(arguments)
        directory = Path(arguments[arguments.index("--output-dir") + 1])
        directory.parent.mkdir(parents=True, exist_ok=True)
        finished(directory, int(arguments[2]), 0.9)
        (directory / "report.html").touch()
        return 0

    monkeypatch.setattr("benchmarks.demo.denoise_env", train)
    command = ["--seeds", "2", "--build", str(tmp_path), "--", "--preset", "points"]
    assert main(command) == 0
    assert [arguments[:3] for arguments in typed] == [["train", "--seed", "0"], ["train", "--seed", "1"]]
    assert all(arguments[-2:] == ["--preset", "points"] for arguments in typed)
    assert main(command) == 0
    assert len(typed) == 2
    monkeypatch.setattr("benchmarks.demo.denoise_env", lambda arguments: 1)
    assert main([*command, "--iterations", "3"]) == 1
    assert "exit status 1" in capsys.readouterr().err


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="2 to 10"):
        over_seeds([0.9])
