"""A run whose reward server is killed, replaced, started again and hung goes on, and learns from true scores alone."""

import contextlib
import csv
import itertools
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from servers import free_port, scripted

from agents.grpo import GRPOConfig
from agents.training import checkpoints
from agents.training.config import TrainConfig
from agents.training.experiment import build
from agents.training.loop import train
from denoise_env.prompts import Prompt
from denoise_env.rewards import load_reward
from denoise_env.rewards.connection import BACKOFF, SIGN_OF_LIFE
from denoise_env.rewards.remote import Remote

TIMEOUT = 6.0
UNSCORED = [0, 4, 8, 8, 0, 4, 8, 0]
"""Of the 8 images of each iteration, which are scored in two halves."""
GARBAGE = [b"\x80\x04K\x01.", {"rewards": [1, 2, "3", 4]}, {"rewards": [0.5]}, (200, {}, b'{"rewards": [1e300')]


@contextlib.contextmanager
def server(port):
    """``denoise-env serve-reward`` in a process of its own, once it has loaded what it scores with."""
    command = [sys.executable, "-m", "denoise_env", "serve-reward", "shapes", "--port", str(port)]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert " is served on " in process.stdout.readline()
            Remote(f"http://127.0.0.1:{port}", timeout=120)(torch.zeros(1, 3, 32, 32), [Prompt("a red circle on gray")])
            yield process
        finally:
            process.kill()


class Watched:
    """A reward before whose calls something happens. It keeps what it answered, the policy's weights and the times."""

    def __init__(self, reward, parameter, before):
        self.reward, self.parameter, self.before = reward, parameter, before
        self.answers, self.weights, self.seconds = [], [], []

    def __call__(self, images, prompts):
        call = len(self.answers)
        self.answers.append(None)
        self.weights.append(self.parameter.detach().clone())
        self.before.get(call, lambda: None)()
        started = time.monotonic()
        try:
            self.answers[-1] = self.reward(images, prompts)
        finally:
            self.seconds.append(time.monotonic() - started)
        return self.answers[-1]

    def elsewhere(self, device):
        return True


def outages(port, stack):
    """What happens before which call, two of which are an iteration."""
    running = stack.enter_context(contextlib.ExitStack())
    process = running.enter_context(server(port))

    def kill():
        process.send_signal(signal.SIGKILL)
        process.wait()
        running.close()

    def replace():
        running.enter_context(scripted(lambda request: GARBAGE[request.count % len(GARBAGE)], port))

    def restart():
        nonlocal process
        running.close()
        process = running.enter_context(server(port))

    def hang():
        process.send_signal(signal.SIGSTOP)

    def wake():
        process.send_signal(signal.SIGCONT)

    return {3: kill, 6: replace, 8: restart, 11: hang, 14: wake}


def trained(config, directory, make_watched):
    """The run's directory, and the reward that was watched."""
    experiment = build(config)
    parameter = max(experiment.agent.parameters, key=torch.Tensor.numel)
    watched = make_watched(parameter)
    experiment.mdp.rewards = dict.fromkeys(experiment.mdp.rewards, watched)
    experiment.eval_mdp.rewards = dict.fromkeys(experiment.eval_mdp.rewards, load_reward("shapes"))
    return train(experiment, directory, report=False), watched


def contiguous(images, prompts):
    """The served reward, of pictures in memory as they arrive there: another layout changes the last bit."""
    return load_reward("shapes")(images.contiguous(), prompts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run with the outages, its warnings, and one with the reward in this process that masks the same calls."""
    directory, port = tmp_path_factory.mktemp("outages"), free_port()
    reward = f'remote(url="http://127.0.0.1:{port}", timeout={TIMEOUT}, retries=1, format="float")'
    config = TrainConfig(
        rewards={reward: 1.0},
        agent_options=GRPOConfig(group_size=4, lr=1e-3),
        iterations=len(UNSCORED),
        prompts_per_iteration=2,
        microbatch=4,
        num_steps=2,
        eval_every=0,
        eval_images_per_prompt=1,
        checkpoint_every=len(UNSCORED),
        max_unscored=1.0,
    )
    with contextlib.ExitStack() as stack:
        before = outages(port, stack)
        seen = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        path, remote = trained(
            config, directory / "remote", lambda weight: Watched(load_reward(reward), weight, before)
        )
        said = [str(warning.message) for warning in seen if "the reward" in str(warning.message)]

        def fail():
            raise RuntimeError("masked")

        masked = {call: fail for call, answer in enumerate(remote.answers) if answer is None}
        here, local = trained(config, directory / "here", lambda weight: Watched(contiguous, weight, masked))
    return path, remote, said, here, local


def rows(path):
    """The run's figures as they are written, without those of time."""
    with (path / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_the_run_goes_on_and_counts_what_was_not_scored(runs):
    path, remote, *_ = runs
    assert [int(row["unscored"]) for row in rows(path)] == UNSCORED
    halves = [answer is None for answer in remote.answers]
    assert [4 * (halves[i] + halves[i + 1]) for i in range(0, len(halves), 2)] == UNSCORED
    assert [math.isnan(float(row["reward"])) for row in rows(path)] == [count == 8 for count in UNSCORED]


@pytest.mark.slow
def test_every_outage_is_told(runs):
    said = runs[2]
    assert len(said) == sum(UNSCORED) // 4
    assert all("failed on 4 rows: RemoteError: http://127.0.0.1:" in warning for warning in said)
    why = (
        "ConnectError",
        "still silent: ConnectError",
        "its answer cannot be used",
        f"no answer in {TIMEOUT:g} s (tried",
    )
    for reason in (*why, f"still silent: no answer in {SIGN_OF_LIFE:g} s"):
        assert any(reason in warning for warning in said), reason


@pytest.mark.slow
def test_an_outage_costs_the_retries_once(runs):
    seconds = runs[1].seconds
    whole = 2 * TIMEOUT + BACKOFF
    assert whole - BACKOFF / 2 <= seconds[11] < whole + 2
    assert all(SIGN_OF_LIFE <= seconds[call] < SIGN_OF_LIFE + 2 for call in (12, 13))


@pytest.mark.slow
def test_an_iteration_without_scores_changes_no_weights(runs):
    weights = runs[1].weights
    before = [weights[call] for call in range(0, len(weights), 2)]
    same = [torch.equal(one, other) for one, other in itertools.pairwise(before)]
    assert same == [count == 8 for count in UNSCORED[:-1]]


@pytest.mark.slow
def test_the_run_is_that_of_the_reward_in_this_process_masked_alike(runs):
    path, remote, _, here, local = runs
    for one, other in zip(remote.answers, local.answers, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert rows(path) == rows(here)
    states = [load_file(checkpoints.latest(run / "checkpoints") / "state.safetensors") for run in (path, here)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
