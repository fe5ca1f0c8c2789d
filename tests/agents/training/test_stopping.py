"""Ctrl-C and SIGTERM: what is trained is saved, the command that goes on is printed, and nothing prints a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kills import assert_same_files, campaign, heeds
from safetensors.torch import load_file
from small_runs import run, small

from agents.training import checkpoints, loop
from agents.training.stopping import Stopped, Stopping

PROGRAM = """
import sys, time
from agents.training.stopping import Stopped, Stopping
with Stopping("the message") as stopping:
    if sys.argv[1] == "held":
        with stopping.held():
            print("ready", flush=True)
            try:
                while True:
                    time.sleep(0.01)
                    if sys.argv[2] == "checks":
                        stopping.check()
            except Stopped:
                print("stopped", flush=True)
                sys.exit(128 + stopping.signal)
    if sys.argv[1] == "behind":
        with stopping.held():
            print("ready", flush=True)
            while stopping.signal is None:
                time.sleep(0.01)
        print("never reached", flush=True)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def heeded():
    """Ctrl-C is heeded here, and by the programs started here, even where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def program(*arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_at_once_or_where_it_can_stop(number, status):
    for words, out, said in (
        (["at once"], "", "the message"),
        (["held", "checks"], "stopped\n", "stopping at the next place"),
        (["behind"], "", "the message"),
    ):
        process = program(*words)
        process.send_signal(number)
        output, error = process.communicate(timeout=20)
        assert (process.returncode, output) == (status, out)
        assert said in error
        assert "Traceback" not in error


def test_a_second_signal_stops_at_once():
    process = program("held", "never checks")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "stopping at the next place" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=20)[1]
    assert process.returncode == 130


def test_signals_that_were_ignored_stay_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ours = signal.getsignal(signal.SIGINT)
    try:
        with Stopping():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not ours
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see when signals are heeded")
@pytest.mark.parametrize("delay", [0.0, 0.7])
def test_there_is_no_traceback_while_the_program_is_being_imported(delay, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "agents.cli", "train", "--preset", "points", "--output-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not heeds(process.pid):
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    if not delay:
        again = "denoise-env train --preset points --output-dir run"
        assert error.strip() == f"denoise-env: stopped; start again with: {again}"
        assert not (tmp_path / "run").exists()


class After(Stopping):
    """A signal that comes after a number of places where the run can stop."""

    def __init__(self, places):
        super().__init__()
        self.places = places

    def check(self):
        self.places -= 1
        if self.places < 0:
            self.signal = signal.SIGINT
        super().check()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(loop, "write_report", lambda directory: None)


def test_a_run_that_is_stopped_anywhere_saves_what_the_whole_run_had_there(tmp_path, quick):
    config = small(iterations=4, eval_every=2, sample_every=2)
    all_of_them = small(iterations=4, eval_every=2, sample_every=2, checkpoint_every=1, keep_checkpoints=9)
    whole = run(all_of_them, tmp_path / "whole")
    at = []
    for places in range(0, 50, 5):
        directory = tmp_path / f"stopped-{places}"
        try:
            run(config, directory, stopping=(stopping := After(places)))
        except Stopped:
            found = checkpoints.latest(directory / "checkpoints")
            at.append(int(found.name) if found else 0)
            if found:
                assert f"stopped after iteration {at[-1]}, which is saved; continue with: " in stopping.message
                ours, theirs = (
                    load_file(d / "checkpoints" / found.name / "state.safetensors") for d in (directory, whole)
                )
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert f"denoise-env train --resume {directory}" in stopping.message
            run(config, directory, resume=True)
        assert_same_files(whole, directory)
    assert set(at) == {0, 1, 2, 3, 4}


def test_a_look_that_is_given_up_twice_is_made_in_the_end(tmp_path, quick):
    config = small(iterations=2, eval_every=1)
    whole = run(config, tmp_path / "whole")
    directory = tmp_path / "run"
    for places, resume in ((8, False), (2, True), (0, True)):  # 6 in the first iteration, then its evaluation
        with pytest.raises(Stopped):
            run(config, directory, resume=resume, stopping=After(places))
        meta = checkpoints.read_meta(directory / "checkpoints" / "000001")
        assert meta["pending_look"] == 0
    run(config, directory, resume=True)
    assert checkpoints.read_meta(directory / "checkpoints" / "000002")["pending_look"] is None
    assert_same_files(whole, directory)


def test_an_update_is_never_given_up(tmp_path, quick, monkeypatch):
    """What training has half changed is no checkpoint."""
    stopping, inside = Stopping(), []
    iterate = loop._iterate

    def signalled(experiment, iteration, *more):
        update = experiment.agent.update

        def first_signalled(*arguments):
            stopping.signal = signal.SIGTERM
            inside.append(iteration)
            return update(*arguments)

        experiment.agent.update = first_signalled
        return iterate(experiment, iteration, *more)

    monkeypatch.setattr(loop, "_iterate", signalled)
    with pytest.raises(Stopped):
        run(small(), tmp_path / "run", stopping=stopping)
    assert inside == [1]
    assert checkpoints.latest(tmp_path / "run" / "checkpoints").name == "000001"


def test_a_report_that_fails_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    def fails(directory):
        raise KeyError("reward")

    monkeypatch.setattr(loop, "write_report", fails)
    directory = run(small(iterations=1), tmp_path / "run")
    assert "the report could not be written (KeyError: 'reward'); the run is complete" in capsys.readouterr().err
    assert (directory / "export" / "model.safetensors").exists()


def test_weights_that_are_no_longer_finite_say_how_to_go_on_with_a_smaller_learning_rate(tmp_path, monkeypatch):
    def explodes(*_):
        raise FloatingPointError("the gradient is not finite")

    monkeypatch.setattr(loop, "_iterate", explodes)
    expected = r"not finite; continue from the last checkpoint with, for example: .* --resume \S+ --agent.lr 0.0001$"
    with pytest.raises(FloatingPointError, match=expected):
        run(small(), tmp_path / "run")


@pytest.mark.slow
def test_runs_that_are_killed_and_interrupted_at_random_moments_lose_nothing(tmp_path):
    """For long: ``python tests/agents/training/kills.py DIRECTORY --kills 50 --interrupts 10 --terminations 10``."""
    told = campaign(tmp_path, kills=4, interrupts=2, terminations=2, iterations=40)
    assert told["signals"] == {"SIGKILL": 4, "SIGINT": 2, "SIGTERM": 2}
    assert len(set(told["reached"])) >= 3  # they came at different places on the way
