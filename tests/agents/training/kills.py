"""Runs that are killed, interrupted and terminated at random moments, against one that nobody disturbed.

    python tests/agents/training/kills.py DIRECTORY --kills 50 --interrupts 10 --terminations 10

Every process is ``denoise-env train`` on Points. It gets its signal at a random moment between its start and its end,
most of them while it trains: in loading, evaluations, rollouts, updates, saves, the export or the report. Then the run
is resumed, after Ctrl-C and SIGTERM by the very command that was printed. Every run that ends must equal the
undisturbed one bit for bit.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import assert_same_run

PROCESSES = multiprocessing.get_context("forkserver")
STATUS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
CONTINUE = ("continue with: ", "start again with: ", "what follows is made by: ")


def assert_same_files(one, other):
    """What a run leaves is the same, to the bit, except for times, versions and pages that show them."""
    assert_same_run(one, other)
    for file in (one / "export").rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (other / "export" / file.relative_to(one / "export")).read_bytes()
    left = {path.name for path in other.iterdir()} - {path.name for path in one.iterdir()}
    assert all(name.startswith(".") for name in left), left  # the lock and unfinished files of killed processes


def program(arguments, log):
    """``denoise-env`` with these arguments, in a process of its own whose words go to a file."""
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    from agents import cli

    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    sys.exit(cli.main())


class Cold:
    """The same as a process from the shell, which begins by importing everything."""

    def __init__(self, arguments, log):
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agents.cli", *arguments],
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.pid, self.join = self._process.pid, self._process.wait

    @property
    def exitcode(self):
        return self._process.poll()


def start(arguments, log, cold=False):
    if cold:
        return Cold(arguments, log)
    process = PROCESSES.Process(target=program, args=(arguments, str(log)))
    process.start()
    return process


def heeds(pid):
    """Whether a process has begun to heed signals, or is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = status.partition("SigCgt:")[2].split()
    return not caught or bool(int(caught[0], 16) & 1 << (signal.SIGTERM - 1))


def rows(directory):
    """How many iterations a run's table has."""
    table = directory / "metrics.csv"
    return table.read_text().count("\n") - 1 if table.exists() else 0


def disturb(process, number, ready, delay):
    """Send a signal some time after something is so; whether it ended the process."""
    while not heeds(process.pid):
        time.sleep(0.002)
    while not ready() and process.exitcode is None:
        time.sleep(0.002)
    end = time.monotonic() + delay
    while time.monotonic() < end and process.exitcode is None:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        if process.exitcode is None:
            os.kill(process.pid, number)
    process.join()
    return process.exitcode == STATUS[number]


def campaign(root, *, kills, interrupts, terminations, iterations, cold=0, seed=0):
    """Disturb runs until so many signals of each kind have ended a process; returns what was done.

    Args:
        root: an empty directory.
        kills: how many SIGKILLs.
        interrupts: how many SIGINTs.
        terminations: how many SIGTERMs.
        iterations: of every run.
        cold: how many of the processes are started from scratch, which takes seconds each.
        seed: of the moments and of the signals' order.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, as would ours
    PROCESSES.set_forkserver_preload(["agents.commands.train"])
    rng = random.Random(seed)
    log = root / "log.txt"
    flags = ["--preset", "points", "--iterations", str(iterations), "--agent.group-size", "4", "--num-steps", "5"]
    flags += ["--prompts-per-iteration", "2", "--eval-images-per-prompt", "4", "--eval-every", "20"]
    flags += ["--checkpoint-every", "7", "--agent.ema-decay", "0.9", "--agent.kl-coef", "0.01", "--sample-every", "30"]
    whole, directory = root / "whole", root / "run"
    start(["list"], log).join()  # imports everything
    began = time.monotonic()
    process = start(["train", *flags, "--output-dir", str(whole)], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    duration = time.monotonic() - began
    signals = [signal.SIGKILL] * kills + [signal.SIGINT] * interrupts + [signal.SIGTERM] * terminations
    rng.shuffle(signals)
    given, reached, finished = {}, [], 0
    first = ["train", *flags, "--output-dir", str(directory)]
    arguments = first
    while signals:
        from_scratch = cold > 0
        process = start(arguments, log, from_scratch)
        number, target = signals[-1], rows(directory) + rng.randint(1, 10)
        ended = False
        if target > iterations and rng.random() < 0.7:
            process.join()  # undisturbed, since there is little left to disturb
        elif rng.random() < 0.85:
            reached_target = lambda target=target: rows(directory) >= min(target, iterations)  # noqa: E731
            ended = disturb(process, number, reached_target, rng.random() / 16)
        else:
            ended = disturb(process, number, lambda: True, rng.uniform(0, duration))
        if ended:
            signals.pop()
            cold -= 1
            name = signal.Signals(number).name
            given[name] = given.get(name, 0) + 1
            reached.append(rows(directory))
        said = log.read_text()
        assert "Traceback" not in said, said
        assert process.exitcode in (0, STATUS[number]), (process.exitcode, said)
        if process.exitcode == 0:
            assert_same_files(whole, directory)
            shutil.rmtree(directory)
            finished += 1
            arguments = first
            continue
        known = (directory / "config.json").exists()
        arguments = ["train", "--resume", str(directory)] if known else first
        if number != signal.SIGKILL:
            (way,) = (said.partition(words)[2].splitlines()[0] for words in CONTINUE if words in said)
            assert shlex.split(way)[1:] == arguments, said
    process = start(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert_same_files(whole, directory)
    return {"signals": given, "reached": reached, "finished": finished + 1, "seconds": round(time.monotonic() - began)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    for name, default in (("kills", 50), ("interrupts", 10), ("terminations", 10), ("iterations", 400), ("cold", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    root = options.pop("directory")
    root.mkdir(parents=True)
    print(json.dumps(campaign(root, **options)))
