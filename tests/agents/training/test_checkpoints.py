"""A checkpoint is data: whatever somebody has done to it, it is refused with one sentence, or it is what was saved."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import run, small

from agents import cli
from agents.ppo import PPO
from agents.training import checkpoints
from agents.training.checkpoints import CheckpointError
from agents.training.experiment import build, restore

CONFIG = small(
    agent="ppo", agent_options=PPO.config_type(group_size=4, ema_decay=0.9), iterations=2, checkpoint_every=2
)
WEIGHT, CRITIC = "residual.0.weight", "critic.input.weight"
MOMENT, SQUARE, STEP = (f"optimizer.{WEIGHT}.{key}" for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(CONFIG, tmp_path_factory.mktemp("runs") / "run", report=False)


@pytest.fixture(scope="module")
def experiment():
    return build(CONFIG)


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def tensors(change):
    def tamper(path):
        found = load_file(path / "state.safetensors")
        change(found)
        save_file({name: t.contiguous() for name, t in found.items()}, path / "state.safetensors")

    return tamper


def counted(change):
    """A change of the tensors that puts their new number into meta.json too."""

    def tamper(path):
        tensors(change)(path)
        meta(lambda found: found.update(tensors=len(load_file(path / "state.safetensors"))))(path)

    return tamper


def put(name, value):
    return tensors(lambda found: found.update({name: value(found[name])}))


def meta(change):
    def tamper(path):
        found = json.loads((path / "meta.json").read_text())
        change(found)
        (path / "meta.json").write_text(json.dumps(found))

    return tamper


def setting(name, value):
    return meta(lambda found: found.update({name: value}))


def without(name):
    return meta(lambda found: found.pop(name))


def raw(name, content):
    def tamper(path):
        (path / name).write_bytes(content if isinstance(content, bytes) else content((path / name).read_bytes()))

    return tamper


def pickled(name, save):
    def tamper(path):
        with (path / name).open("wb") as file:
            save(Evil(path.parent / "marker"), file)

    return tamper


def directory_instead(name):
    def tamper(path):
        (path / name).unlink()
        (path / name).mkdir()

    return tamper


def header(change):
    """A change of the JSON that a safetensors file begins with."""

    def tamper(path):
        content = (path / "state.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode()).encode()
        whole = len(text).to_bytes(8, "little") + text + content[8 + length :]
        (path / "state.safetensors").write_bytes(whole)

    return tamper


def first(entry):
    """A change of a safetensors header's entry of the first weight."""

    def change(text):
        found = json.loads(text)
        found[f"weights.{WEIGHT}"].update(entry)
        return json.dumps(found)

    return header(change)


def renamed(old, new):
    return tensors(lambda found: found.update({new: found.pop(old)}))


def drop(*words):
    def change(found):
        for name in [name for name in found if name.startswith(words)]:
            del found[name]

    return change


OTHER = r"holds another architecture: .* is .* in it and .* in the model"
DAMAGED = "truncated, damaged or not this run's"
NOT_FINITE = "has entries that are not finite numbers"
TAMPERED = {
    # tensors of the policy, its average and the critic
    "a weight is missing": (counted(drop(f"weights.{WEIGHT}")), OTHER),
    "a weight is missing and not counted": (tensors(drop(f"weights.{WEIGHT}")), "tensors, and meta.json says"),
    "a weight has another name": (renamed(f"weights.{WEIGHT}", "weights.other"), OTHER),
    "a weight has no kind": (renamed(f"weights.{WEIGHT}", WEIGHT), OTHER),
    "a tensor without a name": (renamed(f"weights.{WEIGHT}", "x"), OTHER),
    "a tensor too many": (counted(lambda found: found.update(x=torch.zeros(2))), OTHER),
    "a weight too many": (counted(lambda found: found.update({"weights.x": torch.zeros(2)})), OTHER),
    "a transposed weight": (put(f"weights.{WEIGHT}", torch.t), OTHER),
    "a flat weight": (put(f"weights.{WEIGHT}", torch.flatten), OTHER),
    "a scalar weight": (put(f"weights.{WEIGHT}", torch.sum), OTHER),
    "an empty weight": (put(f"weights.{WEIGHT}", lambda t: t[:0]), OTHER),
    "a larger weight": (put(f"weights.{WEIGHT}", lambda t: torch.cat([t, t])), OTHER),
    "a float64 weight": (put(f"weights.{WEIGHT}", torch.Tensor.double), OTHER),
    "a bfloat16 weight": (put(f"weights.{WEIGHT}", torch.Tensor.bfloat16), OTHER),
    "an integer weight": (put(f"weights.{WEIGHT}", torch.Tensor.long), OTHER),
    "a boolean weight": (put(f"weights.{WEIGHT}", torch.Tensor.bool), OTHER),
    "a complex weight": (put(f"weights.{WEIGHT}", lambda t: t.to(torch.complex64)), OTHER),
    "a weight that is NaN": (put(f"weights.{WEIGHT}", lambda t: t * torch.nan), NOT_FINITE),
    "a weight that is infinite": (put(f"weights.{WEIGHT}", lambda t: t + torch.inf), NOT_FINITE),
    "an average is missing": (counted(drop(f"average.{WEIGHT}")), OTHER),
    "all averages are missing": (counted(drop("average.")), "disagree on whether weights are averaged"),
    "an average of another shape": (put(f"average.{WEIGHT}", torch.t), OTHER),
    "an average of another dtype": (put(f"average.{WEIGHT}", torch.Tensor.half), OTHER),
    "an average that is NaN": (put(f"average.{WEIGHT}", lambda t: t * torch.nan), NOT_FINITE),
    "a critic's weight is missing": (counted(drop(f"modules.{CRITIC}")), OTHER),
    "the critic is missing": (counted(drop("modules.")), OTHER),
    "a critic's weight of another shape": (put(f"modules.{CRITIC}", torch.t), OTHER),
    "a critic's weight of another dtype": (put(f"modules.{CRITIC}", torch.Tensor.double), OTHER),
    # the optimizer
    "a scalar moment": (put(MOMENT, torch.sum), OTHER),
    "a flat moment": (put(MOMENT, torch.flatten), OTHER),
    "a transposed moment": (put(MOMENT, torch.t), OTHER),
    "an empty moment": (put(MOMENT, lambda t: t[:0]), OTHER),
    "a smaller moment": (put(MOMENT, lambda t: t[:1]), OTHER),
    "a float64 moment": (put(MOMENT, torch.Tensor.double), OTHER),
    "an integer moment": (put(MOMENT, torch.Tensor.long), OTHER),
    "a moment that is NaN": (put(MOMENT, lambda t: t * torch.nan), NOT_FINITE),
    "a moment is missing": (counted(lambda found: found.pop(MOMENT)), OTHER),
    "the squares are missing": (counted(drop(SQUARE)), OTHER),
    "negative squares": (put(SQUARE, lambda t: -t.abs() - 1), "exp_avg_sq is negative"),
    "scalar squares": (put(SQUARE, torch.sum), OTHER),
    "the step is missing": (counted(drop(STEP)), OTHER),
    "a step of one entry": (put(STEP, lambda t: t.reshape(1)), OTHER),
    "a step of a weight's shape": (put(STEP, lambda t: t.expand(2, 3).clone()), OTHER),
    "an empty step": (put(STEP, lambda t: torch.zeros(0)), OTHER),
    "an integer step": (put(STEP, torch.Tensor.long), OTHER),
    "a float64 step": (put(STEP, torch.Tensor.double), OTHER),
    "a step that is NaN": (put(STEP, lambda t: t * torch.nan), NOT_FINITE),
    "a negative step": (put(STEP, lambda t: -t), "step is negative"),
    "a parameter without its optimizer's state": (counted(drop(f"optimizer.{WEIGHT}.")), OTHER),
    "a critic without its optimizer's state": (counted(drop(f"optimizer.modules.{CRITIC}.")), OTHER),
    "no optimizer's state": (counted(drop("optimizer.")), OTHER),
    "an optimizer's state that is not counted": (tensors(drop("optimizer.")), "tensors, and meta.json says"),
    "an optimizer's state of nothing": (counted(lambda f: f.update({"optimizer.x.step": torch.ones(())})), OTHER),
    "another optimizer's state": (counted(lambda f: f.update({f"optimizer.{WEIGHT}.max": torch.ones(())})), OTHER),
    "an optimizer's state without a key": (counted(lambda f: f.update({"optimizer.": torch.ones(())})), OTHER),
    # meta.json
    "no meta.json": (lambda path: (path / "meta.json").unlink(), "it has no meta.json"),
    "a folder meta.json": (directory_instead("meta.json"), "it has no meta.json"),
    "an empty meta.json": (raw("meta.json", b""), DAMAGED),
    "a meta.json cut off": (raw("meta.json", lambda content: content[:-9]), DAMAGED),
    "a meta.json that is no JSON": (raw("meta.json", b"version = 3"), DAMAGED),
    "a meta.json that is no UTF-8": (raw("meta.json", b'{"version": "\xff"}'), DAMAGED),
    "a meta.json that is nested without end": (raw("meta.json", b"[" * 100_000), DAMAGED),
    "a meta.json with an endless number": (raw("meta.json", b'{"version": ' + b"9" * 5000 + b"}"), DAMAGED),
    "a pickled meta.json": (pickled("meta.json", pickle.dump), DAMAGED),
    "a list": (raw("meta.json", b"[]"), r"holds no object but \[\]"),
    "null": (raw("meta.json", b"null"), "holds no object but null"),
    "a string": (raw("meta.json", b'"version"'), "holds no object but"),
    "no version": (without("version"), "names no version"),
    "version null": (setting("version", None), "has version null, this release reads"),
    "version as a string": (setting("version", str(checkpoints.VERSION)), 'has version "'),
    "version as a truth": (setting("version", True), "has version true"),
    "a later version": (setting("version", 99), "has version 99, .* resume it with the release that wrote it"),
    "no iteration": (without("iteration"), "iteration in meta.json must be a whole number from 1 on, not null"),
    "iteration null": (setting("iteration", None), "iteration in meta.json must"),
    "iteration as a string": (setting("iteration", "2"), 'must be a whole number from 1 on, not "2"'),
    "iteration as a fraction": (setting("iteration", 2.0), "from 1 on, not 2.0"),
    "iteration as a list": (setting("iteration", [2]), r"from 1 on, not \[2\]"),
    "iteration 0": (setting("iteration", 0), "from 1 on, not 0"),
    "a negative iteration": (setting("iteration", -2), "from 1 on, not -2"),
    "another iteration": (setting("iteration", 4), "says that it is of iteration 4"),
    "an immense iteration": (setting("iteration", 10**400), "iteration in meta.json must"),
    "another directory": (lambda path: path.rename(path.with_name("000004")), "says that it is of iteration 2"),
    "no network calls": (without("network_calls"), "network_calls in meta.json must be a whole number from 0 on"),
    "network calls null": (setting("network_calls", None), "network_calls in meta.json must"),
    "network calls as a string": (setting("network_calls", "many"), "network_calls in meta.json must"),
    "negative network calls": (setting("network_calls", -1), "network_calls in meta.json must"),
    "network calls NaN": (setting("network_calls", float("nan")), "network_calls in meta.json must"),
    "no number of tensors": (without("tensors"), "tensors in meta.json must"),
    "another number of tensors": (setting("tensors", 3), r"holds \d+ tensors, and meta.json says 3"),
    "a pending look that is text": (setting("pending_look", "now"), "pending_look in meta.json must"),
    "a pending look to come": (setting("pending_look", 10**12), "pending_look in meta.json must"),
    "no model": (without("model"), "model in meta.json must be an object, not null"),
    "the model as a string": (setting("model", "points"), "model in meta.json must be an object"),
    "another model": (setting("model", {}), "another architecture than the configured model"),
    "no config": (without("config"), "config in meta.json must be an object"),
    "the config as a list": (setting("config", [1]), "config in meta.json must be an object"),
    # state.safetensors
    "no state": (lambda path: (path / "state.safetensors").unlink(), "it has no state.safetensors"),
    "a folder state.safetensors": (directory_instead("state.safetensors"), "it has no state.safetensors"),
    "an empty state": (raw("state.safetensors", b""), DAMAGED),
    "a state of nothing": (counted(lambda found: found.clear()), "disagree on whether weights are averaged"),
    "a state cut off": (raw("state.safetensors", lambda content: content[:-9]), DAMAGED),
    "a state with more behind it": (raw("state.safetensors", lambda content: content + b"more"), DAMAGED),
    "a state that is text": (raw("state.safetensors", b"weights" * 99), DAMAGED),
    "a state with an immense header": (raw("state.safetensors", lambda c: b"\xff" * 8 + c[8:]), DAMAGED),
    "a header that is no JSON": (header(lambda text: text.replace(":", ";")), DAMAGED),
    "entries beyond the end": (first({"data_offsets": [0, 10**9]}), DAMAGED),
    "entries that end before they begin": (first({"data_offsets": [8, 0]}), DAMAGED),
    "entries that are shared": (first({"data_offsets": [0, 4]}), DAMAGED),
    "an unknown dtype": (first({"dtype": "F99"}), DAMAGED),
    "a dtype of another size": (first({"dtype": "F64"}), DAMAGED),
    "an immense shape": (first({"shape": [2**62, 2**62]}), DAMAGED),
    "a negative shape": (first({"shape": [-1, 13]}), DAMAGED),
    "a pickle": (pickled("state.safetensors", pickle.dump), DAMAGED),
    "a torch file": (pickled("state.safetensors", torch.save), DAMAGED),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_checkpoint_is_refused_with_one_sentence(finished, experiment, tmp_path, what):
    tamper, message = TAMPERED[what]
    path = tmp_path / "000002"
    shutil.copytree(finished / "checkpoints" / "000002", path)
    tamper(path)
    (path,) = (found for found in tmp_path.iterdir() if found.is_dir())
    before = experiment.agent.state()
    before = {name: t.clone() for name, t in before.items()}
    with pytest.raises(CheckpointError, match=message) as refused:
        restore(experiment, path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)
    assert not (tmp_path / "marker").exists()
    after = experiment.agent.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_saved_is_read(finished):
    fresh = build(CONFIG)
    assert restore(fresh, finished / "checkpoints" / "000002")["iteration"] == 2
    saved = load_file(finished / "checkpoints" / "000002" / "state.safetensors")
    state = fresh.agent.state()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)


@pytest.mark.parametrize("what", ["a scalar moment", "iteration null", "a state cut off", "a pickle"])
def test_the_command_line_says_it_in_one_sentence(finished, tmp_path, capsys, what):
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    TAMPERED[what][0](copied / "checkpoints" / "000002")
    for command in (["train", "--resume", str(copied)], ["eval", str(copied)], ["sample", str(copied)]):
        assert cli.main(command) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"denoise-env: the checkpoint {copied / 'checkpoints' / '000002'} ")
        assert "\n" not in error


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(finished, copied)
    other = {**json.loads((copied / "config.json").read_text()), "seed": 7}
    setting("config", other)(copied / "checkpoints" / "000002")
    with pytest.raises(ValueError, match=r"changes seed \(now 0, was 7\)"):
        run(CONFIG, copied, resume=True)


def test_a_resumed_run_may_have_another_learning_rate_and_says_so(tmp_path, capsys):
    config = small(iterations=2)
    directory = run(config, tmp_path / "run", report=False)
    config.agent_options.lr, config.iterations = 1e-9, 3
    before = load_file(directory / "checkpoints" / "000002" / "state.safetensors")
    run(config, directory, resume=True, report=False)
    assert "the learning rate is 1e-09 from here on; it was 0.001" in capsys.readouterr().err
    after = load_file(directory / "checkpoints" / "000003" / "state.safetensors")
    moved = max(float((before[name] - after[name]).abs().max()) for name in before if name.startswith("weights."))
    assert 0 < moved < 1e-8
    assert json.loads((directory / "config.json").read_text())["agent"]["lr"] == 1e-9
