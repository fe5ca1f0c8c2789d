"""Training runs in processes of their own, cached by what they are.

A run lives in ``<root>/<hash of its whole configuration>`` and is done when that holds ``finished.json``. One that
was killed continues from its newest checkpoint. The hash does not see the code, but ``finished.json`` says which code
the run was finished with (`code`): delete the root to repeat runs of other code.
"""

import dataclasses
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agents.training.checkpoints import write_atomically
from agents.training.config import TrainConfig, as_dict
from agents.training.evaluation import evaluate
from agents.training.experiment import build, load_run
from agents.training.loop import train
from agents.training.presets import make_config
from agents.training.tables import read_table
from denoise_env.progress import progress

_PROCESSES = multiprocessing.get_context("forkserver")  # imports once, forks for every run
_PROCESSES.set_forkserver_preload(["__main__", __name__])
_DROPPED = ("images", "unscored")
_LAYOUT = 2  # of what a run's directory holds
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """What to train.

    Attributes:
        preset: as in ``denoise-env list``.
        agent: likewise.
        overrides: setting → value on top of the preset, with a dot for the agent's own ("agent.lr"); "rows" is the
            number of episodes per iteration, and "model" comes with its own options.
        prompts: trained and evaluated on, instead of the configuration's.
        held_out: prompts (a named set or file) to evaluate after training too.
    """

    preset: str
    agent: str
    overrides: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    held_out: str | None = None

    def config(self) -> TrainConfig:
        """The whole configuration, without the prompts' path.

        Raises:
            AttributeError: there is no such setting.
        """
        config = make_config(self.preset, self.agent, self.overrides.get("rows"), self.overrides.get("model"))
        for name, value in self.overrides.items():
            if name in ("rows", "model"):
                continue
            path, _, attribute = name.rpartition(".")
            owner = getattr(config, f"{path}_options") if path else config
            getattr(owner, attribute)  # refuses an unknown setting
            setattr(owner, attribute, value)
        return config

    @property
    def key(self) -> str:
        """The hash that names its directory."""
        whole = [_LAYOUT, as_dict(self.config()), self.prompts, self.held_out]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def execute(runs: Sequence[Run], root: Path, jobs: int, description: str) -> dict[str, str]:
    """Do what is not done yet, ``jobs`` at a time.

    Returns:
        Key → the last line of its error, for the runs that failed.
    """
    found = {run.key: run for run in runs}
    todo = {key: run for key, run in found.items() if not (root / key / "finished.json").exists()}
    errors: dict[str, str] = {}
    pool = ThreadPoolExecutor(jobs)
    try:
        done = len(found) - len(todo)
        with progress(total=len(found), initial=done, desc=description, unit="run") as bar:
            futures = {pool.submit(_spawn, run, root / key): key for key, run in todo.items()}
            for future in as_completed(futures):
                if error := future.result():
                    key = futures[future]
                    errors[key] = error
                    bar.write(f"{description}: {todo[key].agent} failed ({root / key}): {error}", file=sys.stderr)
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return errors


def _spawn(run: Run, directory: Path) -> str | None:
    """Do one run in a process of its own; returns the last line of its error, if it failed."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "run.json", json.dumps(dataclasses.asdict(run), indent=1))
    (directory / "error.txt").unlink(missing_ok=True)
    process = _PROCESSES.Process(target=_logged, args=(directory.resolve(),))
    process.start()
    process.join()
    if not process.exitcode:
        return None
    if (directory / "error.txt").exists():
        return (directory / "error.txt").read_text(encoding="utf-8").splitlines()[-1]
    return f"ended without a word, exit status {process.exitcode}"


def _logged(directory: Path) -> None:
    with (directory / "log.txt").open("w", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        work(directory)
    except Exception as error:
        write_atomically(directory / "error.txt", f"{type(error).__name__}: {error}")
        raise


def work(directory: Path) -> None:
    """Train what ``directory/run.json`` says; a second worker on the same directory waits, then finds it done."""
    torch.set_num_threads(1)
    with (directory / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / "finished.json").exists():
            return
        run = Run(**json.loads((directory / "run.json").read_text(encoding="utf-8")))
        config = run.config()
        if run.prompts:
            path = directory / "prompts.txt"
            write_atomically(path, "\n".join(run.prompts))
            config.prompts = config.eval_prompts = str(path)
        trained = directory / "run"
        train(build(config), trained, resume=(trained / "config.json").exists(), report=False)
        held_out = _held_out(trained, dataclasses.replace(config, eval_prompts=run.held_out)) if run.held_out else {}
        write_atomically(directory / "finished.json", json.dumps({"held_out": held_out, "code": code()}))


def _held_out(directory: Path, config: TrainConfig) -> dict[str, float | None]:
    """What an evaluation of a trained run on the configuration's prompts finds."""
    found = load_run(directory, config)
    count, seed = config.eval_images_per_prompt, config.eval_seed
    with found.agent.evaluation_weights():
        result = evaluate(found.eval_mdp, found.eval_policy, found.eval_prompts, count, seed, config.microbatch)
    return {name: _short(value) for name, value in result.figures().items()}


@functools.cache
def code() -> str:
    """The repository's revision, "-dirty" where its sources have changed since, and a digest of these sources."""
    folders = ("denoise_env", "agents")
    files = sorted(file for folder in folders for file in (REPOSITORY / folder).rglob("*.py"))
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8]
    try:
        found = _git("describe", "--always").stdout.strip()
        dirty = bool(_git("status", "--porcelain", "--", *(f":(glob){folder}/**/*.py" for folder in folders)).stdout)
    except OSError:
        found = ""
    return f"{found}{'-dirty' * dirty} {digest}" if found else f"unknown {digest}"


def _git(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True)


def made_by(directory: Path) -> str:
    """The `code` that a finished run was finished with."""
    return str(json.loads((directory / "finished.json").read_text(encoding="utf-8"))["code"])


def curve(directory: Path) -> dict[str, list[float | None]]:
    """A finished run's evaluations, column by column, with the seconds trained until each; NaN is ``None``."""
    evals, seconds = read_table(directory / "run" / "eval.csv"), {0.0: 0.0}
    for row in read_table(directory / "run" / "metrics.csv"):
        seconds[row["iteration"]] = seconds[row["iteration"] - 1] + row["seconds"]
    for row in evals:
        row["seconds"] = seconds[row["iteration"]]
    names = [name for name in evals[0] if name not in _DROPPED and not name.endswith(("_low", "_high"))]
    return {name: [_short(row[name]) for row in evals] for name in names}


def held_out(directory: Path) -> dict[str, float]:
    """Reward name → its mean on the held-out prompts, where the run asked for them."""
    found = json.loads((directory / "finished.json").read_text(encoding="utf-8"))["held_out"]
    return {name: found[name] for name in found if f"{name}_low" in found}


def _short(value: float) -> float | None:
    """Five significant digits, as an integer where it is one; ``None`` for NaN."""
    if value != value:
        return None
    return int(value) if value == int(value) else float(f"{value:.5g}")
