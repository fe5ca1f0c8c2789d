import json

import pytest

from agents import cli
from agents.commands import settings
from agents.training.config import TrainConfig, as_dict
from agents.training.presets import PRESETS, make_config

FAST = ["--preset", "points", "--iterations", "2", "--agent.group-size", "4", "--eval-images-per-prompt", "2"]


def test_train_eval_sample_and_resume(tmp_path, capsys):
    directory = tmp_path / "run"
    assert cli.main(["train", *FAST, "--output-dir", str(directory)]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("evaluation prompts, mean reward 'points' (12 images each, 95 % intervals over images): ")
    assert " before, " in last
    assert cli.main(["train", "--resume", str(directory), "--iterations", "3"]) == 0
    assert len((directory / "metrics.csv").read_text().splitlines()) == 4
    assert json.loads((directory / "config.json").read_text())["iterations"] == 3
    table = tmp_path / "table.json"
    assert cli.main(["eval", "points", str(directory), "--images-per-prompt", "4", "--json", str(table)]) == 0
    assert set(json.loads(table.read_text())) == {"points", str(directory)}
    assert cli.main(["sample", str(directory), "--output", str(tmp_path / "grid.png")]) == 0
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    named = ["--rewards", "points", "--prompts", "points", "--images-per-prompt", "4"]
    exported = tmp_path / "exported.json"
    assert cli.main(["eval", str(directory / "export"), *named, "--json", str(exported)]) == 0
    figures = json.loads(table.read_text())[str(directory)]
    assert json.loads(exported.read_text())[str(directory / "export")] == figures
    capsys.readouterr()
    assert cli.main(["eval", str(directory / "export")]) == 2
    assert "has no rewards of its own: name them" in capsys.readouterr().err
    assert cli.main(["eval", "points", "--prompts", "nowhere.txt"]) == 2
    assert "no prompt file 'nowhere.txt'" in capsys.readouterr().err


def test_a_trained_critic_is_evaluated_at_another_number_of_steps(tmp_path, capsys):
    """The critic has a value for every step of its training."""
    directory = tmp_path / "run"
    assert cli.main(["train", *FAST, "--agent", "ppo", "--output-dir", str(directory)]) == 0
    assert cli.main(["eval", str(directory), "--num-steps", "20", "--images-per-prompt", "2"]) == 0
    assert "over 12 images" in capsys.readouterr().out


def test_list_names_everything(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("shapes-correct", "points-flow", "dance_sde", "grpo", "dancegrpo", "denoise_env/Points-v0"):
        assert name in printed


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_its_file(tmp_path, preset):
    import dataclasses

    config = dataclasses.replace(
        make_config(preset, model="shapes"), rewards={"shapes": 0.7, "shapes-correct": 1.4}, wandb=True
    )
    (tmp_path / "config.json").write_text(json.dumps(as_dict(config)))
    assert settings.run_config(tmp_path) == config


def test_a_toml_file_and_flags_override_the_preset(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('model = "points"\niterations = 7\n[agent]\nlr = 0.5\nshared_noise = "none"\n')
    config = settings.parse_config([*settings.read_config(str(file)), "--agent.lr", "0.25"], TrainConfig())
    assert (config.model, config.iterations, config.agent_options.lr, config.agent_options.shared_noise) == (
        "points",
        7,
        0.25,
        "none",
    )


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path, capsys):
    file = tmp_path / "settings.toml"
    file.write_text("iteratoins = 7\n")
    assert cli.main(["train", "--config", str(file)]) == 2
    assert "no setting 'iteratoins'; did you mean 'iterations'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--iteratoins", "7"])
    printed = capsys.readouterr()
    assert "iteratoins" in printed.out + printed.err
    assert "--iterations" in printed.out + printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "shaeps"], "did you mean 'shapes'"),
        (["train", "--agent", "pop"], "did you mean 'ppo'"),
        (["train", *FAST, "--model", "shaeps"], "did you mean 'shapes'"),
        (["train", *FAST, "--rewards", "point", "1"], "did you mean 'points'"),
        (["train", *FAST, "--agent.group-size", "1"], "group_size must be at least 2"),
        (["train", "--config", "nowhere.toml"], "cannot read the configuration"),
        (["train", "--resume", "nowhere"], "no run in nowhere"),
        (["eval", "nowhere/at/all"], "unknown model"),
        (["eval", "points", "--num-steps", "0"], "num_steps must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_refuses_another_kl(tmp_path, capsys):
    directory = tmp_path / "run"
    assert cli.main(["train", *FAST, "--output-dir", str(directory)]) == 0
    assert cli.main(["train", "--resume", str(directory), "--agent.kl-coef", "1"]) == 2
    assert "changes agent.kl_coef (now 1.0, was 0.0)" in capsys.readouterr().err


def test_help_teaches(capsys):
    assert cli.main(["train", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--preset NAME" in printed
    assert "denoise-env train --agent NAME --help" in printed
    with pytest.raises(SystemExit):
        cli.main(["train", "--agent", "grpo", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--preset NAME" in printed
    assert "Neighbouring samples of one prompt, G." in printed
    assert "dancegrpo: DanceGRPO on Stable Diffusion 1.4" in printed


def test_the_preset_goes_with_the_model(tmp_path):
    directory = tmp_path / "run"
    assert cli.main(["train", "--model", "points-flow", *FAST[2:], "--output-dir", str(directory)]) == 0
    config = json.loads((directory / "config.json").read_text())
    assert config["model"]["name"] == "points-flow"
    assert config["eval_rewards"] == []


def test_a_reward_of_ones_own_is_found_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    (tmp_path / "own_rewards.py").write_text("def left(images, prompts):\n    return -images[:, 0]\n")
    assert cli.main(["train", *FAST, "--rewards", "own_rewards:left", "1.0", "--output-dir", "run"]) == 0
    assert "reward/own_rewards:left" in (tmp_path / "run" / "metrics.csv").read_text()


def test_tensorboard_gets_figures_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = tmp_path / "run"
    assert cli.main(["train", *FAST, "--tensorboard", "--output-dir", str(directory)]) == 0
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert len(events.Scalars("reward")) == 2
    assert len(events.Scalars("eval/points")) == 2
    assert len(events.Images("samples")) == 2


def test_a_logger_that_is_not_installed_is_named_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert cli.main(["train", *FAST, "--wandb", "--output-dir", str(tmp_path / "run")]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
