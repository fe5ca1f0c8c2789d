"""Random command lines, settings files, prompt files and run directories, most of them bad in one place.

A command must end with status 0, 1 or 2, in time, and say a sentence where it is not 0; with status 2 it has changed
nothing; a directory that it has begun is whole.
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from fuzz_chance import STRANGE, Chance, Hang, limit

from agents.cli import main
from agents.commands.settings import read_config
from agents.training import checkpoints

SECONDS = 60.0
TINY = [
    *("--preset", "points", "--iterations", "1", "--prompts-per-iteration", "1", "--agent.group-size", "2"),
    *("--eval-images-per-prompt", "1", "--num-steps", "2", "--output-dir", "run"),
]
GOOD = """
def reward(images, prompts):
    return -images[:, 0]

class Reward:
    def __call__(self, images, prompts):
        return images[:, 1]

class Broken:
    def __init__(self):
        raise KeyError("x")

thing = 3
"""
AGENTS = """
from agents.base import Agent
from agents.grpo import GRPO

class Half(Agent):
    name = "half"

class Bad(GRPO):
    config_type = int
"""
MODULES = {
    "good": GOOD,
    "agents_here": AGENTS,
    "syntax": "def reward(:\n",
    "raises": "raise KeyError('at import')\n",
    "leaves": "import sys\nsys.exit(3)\n",
    "needs": "import no_such_package\n",
    "strange": "# -*- coding: no-such-codec -*-\n",
    "failing": "def reward(images, prompts):\n    raise KeyError('while scoring')\n",
    "wrong": "def reward(images, prompts):\n    return 'nine'\n",
}
PROMPTS = {
    "good.txt": b"ring\nline\n",
    "-p.txt": b"ring\n",
    "other.txt": b"a prompt that the model does not know\n",
    "empty.txt": b"",
    "blank.txt": b"\n \n\n",
    "utf16.txt": "ring\nline\n".encode("utf-16"),
    "latin.txt": "ring\nf\u00fcnf\n".encode("latin-1"),
    "binary.csv": bytes(range(256)),
    "good.jsonl": b'{"prompt": "ring", "metadata": {"a": 1}}\n',
    "list.jsonl": b"[1, 2]\n",
    "null.jsonl": b'{"prompt": null}\n',
    "half.jsonl": b'{"prompt": "\\ud800"}\n',
    "deep.jsonl": b"[" * 100_000,
    "image.jsonl": b'{"prompt": "ring", "image": "missing.png"}\n',
    "broken.jsonl": b'{"prompt": "ring"\n',
    "big.jsonl": b'{"prompt": "ring", "n": ' + b"9" * 5000 + b"}\n",
    "good.csv": b"prompt,shade\nring,1\n",
    "quote.csv": b'prompt\n"ring\n',
    "short.csv": b"prompt,a\nring\n",
    "nul.csv": b"prompt\nri\x00ng\n",
    "none.dat": b"ring\n",
}
COUNTS = ["0", "1", "2", "3", "-1", "1.5", "1e3", "nan", "", "x", "9999999999", "9" * 5000, "None", "True"]
FLOATS = ["0", "1", "0.5", "-1", "nan", "inf", "1e400", "x", "", "None", "-inf"]
FLAGS: dict[str, list[str]] = {
    "--iterations": COUNTS,
    "--num-steps": [*COUNTS, "1000000"],
    "--prompts-per-iteration": COUNTS,
    "--microbatch": COUNTS,
    "--seed": [*COUNTS, "9" * 30, "1_0"],
    "--eval-seed": [*COUNTS, "9" * 30],
    "--eval-every": COUNTS,
    "--eval-points": COUNTS,
    "--eval-images-per-prompt": COUNTS,
    "--sample-every": COUNTS,
    "--checkpoint-every": COUNTS,
    "--keep-checkpoints": [*COUNTS, "9" * 30],
    "--network-budget": COUNTS,
    "--max-unscored": FLOATS,
    "--eta": FLOATS,
    "--kernel": ["ddim", "ode", "dance_sde", "flow_sde", "cps", "dim"],
    "--reduction": ["mean", "sum", "squared_error", "all"],
    "--device": ["cpu", "auto", "cuda", "cuda:9", "cpu:1", "meta", "tpu", "mps", "cpu:", "privateuseone"],
    "--conditioning-cache": ["cache", "good.txt", "/dev/null"],
    "--conditioning-host-gib": FLOATS,
    "--conditioning-device-gib": FLOATS,
    "--agent.lr": FLOATS,
    "--agent.group-size": COUNTS,
    "--agent.ema-decay": FLOATS,
    "--agent.max-grad-norm": FLOATS,
    "--agent.weight-decay": FLOATS,
    "--agent.updates-per-rollout": COUNTS,
    "--agent.epochs": COUNTS,
    "--agent.reward-aggregation": ["rewards", "advantages", "losses", "none"],
    "--model": ["points", "points-flow", "pionts", "export", "run", "good.txt", "good:thing", "syntax:x", "a@b:c"],
    "--model.seed": [*COUNTS, "9" * 30],
    "--model.width": ["512"],
    "--agent": [
        "grpo",
        "base",
        "rwr",
        "nft",
        "grop",
        "agents.base:Agent",
        "agents_here:Half",
        "agents_here:Bad",
        "good:thing",
    ],
    "--prompts": [*PROMPTS, "points", "missing.txt"],
    "--eval-prompts": [*PROMPTS, "points", "missing.txt"],
    "--eval-rewards": ["points", "good:reward", "failing:reward", "syntax:r", "good:thing", "pionts"],
    "--output-dir": ["run", "done", "good.txt", "good.txt/run", "new/run", "/dev/null", "/proc/run", "-run"],
    "--config": ["good.toml", "bad.toml", "missing.toml", "good.txt", "list.json", "-c.toml", "run"],
    "--preset": ["points", "ponts", "none"],
    "--resume": ["done", "run", "good.txt", "missing"],
}
SWITCHES = [
    "--wandb",
    "--tensorboard",
    "--no-wandb",
    "--eval-kl",
    "--no-compile",
    "--help",
    "--agent.shared-noise",
    "-v",
    "--",
]
REWARDS = [
    *(f"{name}:reward" for name in MODULES),
    "points",
    "good:Reward",
    "good:thing",
    "good:Broken",
    "pionts",
    "shapes",
]


class Failure(Exception):
    """One of the four things that must not happen."""


def scene(directory: Path, done: Path) -> None:
    """A working directory with modules, prompt files, settings files and a finished run with its exported model."""
    directory.mkdir()
    for name, text in MODULES.items():
        (directory / f"{name}.py").write_text(text)
    for name, data in PROMPTS.items():
        (directory / name).write_bytes(data)
    (directory / "good.toml").write_text('preset = "points"\niterations = 1\n[agent]\ngroup_size = 2\n')
    (directory / "-c.toml").write_text('preset = "points"\n')
    (directory / "bad.toml").write_text("iterations = \n")
    (directory / "list.json").write_text("[1]")
    (directory / "wandb").mkdir()
    (directory / "tensorboard").mkdir()
    shutil.copytree(done, directory / "done")
    shutil.copytree(done / "export", directory / "export")


def value(chance: Chance, flag: str) -> str:
    """A value for a flag, of its own kind or strange."""
    return chance.choice(FLAGS[flag] if chance.often(0.8) else STRANGE)


def pairs(chance: Chance, flags: list[str], most: int) -> list[str]:
    """Up to ``most`` flags with values, some glued with "=", some without their value."""
    found: list[str] = []
    for flag in chance.some(flags, most):
        text = value(chance, flag)
        found += [f"{flag}={text}"] if chance.often(0.4) else [flag, text] if chance.often(0.95) else [flag]
    return found


def settings_file(chance: Chance, path: Path) -> None:
    """A settings file with random contents."""
    odd: list[Any] = [None, True, -1, 0, 1, 2, 1.5, "", "x", "-x", [], {}, [1], {"a": 1}, [None], float("nan"), 10**400]
    values: dict[str, Any] = {
        "preset": "points",
        "iterations": 1,
        "agent": {"group_size": 2},
        "rewards": {"points": 1.0},
    }
    for _ in range(chance.randint(0, 3)):
        key = chance.choice(
            [*[flag[2:].replace("-", "_") for flag in FLAGS], "help", "tyro_write_completion", "", "a.b", "rewards"]
        )
        values[key] = chance.choice([*odd, value(chance, "--prompts")])
    text = json.dumps(chance.choice(odd) if chance.often(0.1) else values)
    if chance.often(0.1):
        text = text[: chance.randrange(len(text) + 1)]
    if chance.often(0.05):
        text = "[" * 100_000
    path.write_bytes(text.encode(chance.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16"])))


def tamper(chance: Chance, directory: Path) -> str:
    """Damage one file of a run's directory; says which and how."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    path = chance.choice(files)
    how = chance.choice(["delete", "empty", "cut", "noise", "directory", "link", "more", "values", "values", "values"])
    data = path.read_bytes()
    if how == "values" and not ((path.suffix == ".csv" and data.isascii() and data) or _is_json(data)):
        how = "cut"
    if how == "values" and path.suffix == ".json":
        path.write_text(json.dumps(_spoil(chance, json.loads(data))))
    elif how == "values":
        lines = data.decode().splitlines()
        cells = lines[chance.randrange(len(lines))].split(",")
        cells[chance.randrange(len(cells))] = chance.choice(["", "x", "nan", "1e400", "-1", '"', "\0"])
        lines[chance.randrange(len(lines))] = ",".join(cells[: chance.randint(0, len(cells))])
        path.write_text("\n".join(lines))
    elif how == "cut":
        path.write_bytes(data[: chance.randrange(len(data) + 1)])
    elif how == "noise":
        place = chance.randrange(len(data) or 1)
        path.write_bytes(data[:place] + chance.randbytes(8) + data[place + 8 :])
    elif how == "more":
        path.write_bytes(data + chance.randbytes(20))
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "directory":
            path.mkdir()
        elif how == "link":
            path.symlink_to("nowhere")
    return f"{how} {path.relative_to(directory.parent)}"


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _spoil(chance: Chance, values: Any) -> Any:
    """A JSON value with one thing in it changed."""
    odd = [None, True, -1, 0, 7, 1.5, "", "x", "-x", "..a:b", "syntax:x", [], {}, [1], {"a": 1}, 10**30, "9" * 30]
    if isinstance(values, dict) and values and chance.often(0.9):
        key = chance.choice(list(values))
        if chance.often(0.25):
            return {name: item for name, item in values.items() if name != key}
        return {**values, key: _spoil(chance, values[key])}
    if isinstance(values, list) and values and chance.often(0.5):
        return [_spoil(chance, values[0]), *values[1:]]
    return chance.choice(odd)


def command(chance: Chance, here: Path) -> tuple[list[str], list[str]]:
    """A command line, and notes on what was done to the files before it."""
    notes: list[str] = []
    kind = chance.choices(
        ["train", "resume", "eval", "sample", "describe", "words", "tampered"], [6, 2, 3, 2, 2, 1, 4]
    )[0]
    targets = [
        "points",
        "points-flow",
        "done",
        "export",
        "run",
        "pionts",
        "good.txt",
        "",
        "good:thing",
        "syntax:x",
        "a/b",
    ]
    look = ["--prompts", "--num-steps", "--seed", "--conditioning-cache", "--model.seed"]
    if kind == "words":
        line = chance.some(["train", "eval", "list", "-v", "describe", "points", *STRANGE], 3)
        return line + ["--preset=none"] * ("train" in line), notes  # which alone would be the whole demo
    if kind == "train":
        line = ["train", *TINY, *pairs(chance, [flag for flag in FLAGS if flag != "--resume"], 3)]
        if chance.often(0.3):
            line += ["--rewards", chance.choice(REWARDS), chance.choice(["1.0", "-1.0", *FLOATS])]
        if chance.often(0.2):
            line += ["--eval-rewards", *chance.some(REWARDS, 2)]
        if chance.often(0.2):
            line.append(chance.choice(SWITCHES))
        if chance.often(0.25):
            settings_file(chance, here / "own.json")
            notes.append(f"own.json: {(here / 'own.json').read_bytes()[:300]!r}")
            line += ["--config", "own.json"]
        if chance.often(0.1):
            line.pop(chance.randrange(1, len(line)))
        return line, notes
    if kind == "tampered":
        notes += [tamper(chance, here / "done") for _ in range(chance.choice([1, 1, 2]))]
    if kind == "resume" or (kind == "tampered" and chance.often(0.5)):
        line = ["train", "--resume", "done", "--iterations", chance.choice(["1", "2"])]
        return [*line, *(pairs(chance, list(FLAGS), 2) if kind == "resume" else [])], notes
    target = chance.choice(["done", "done", "done/export"] if kind == "tampered" else targets)
    if kind == "describe":
        return ["describe", target, *pairs(chance, ["--num-steps", "--model.seed", "--model.width"], 2)], notes
    name = "sample" if kind == "sample" else "eval"
    line = [name, target, *pairs(chance, look, 1), "--images-per-prompt", chance.choice(["1", "2", *COUNTS])]
    if chance.often(0.5):
        line += ["--prompts=points"]
    if name == "sample":
        line += [
            "--output",
            chance.choice(["grid.png", "new/grid.png", "grid", "done", "grid.xyz", "good.txt/grid.png", ""]),
        ]
    elif chance.often(0.5):
        line += [
            "--json",
            chance.choice(["table.json", "new/table.json", "done", "good.txt/table.json", "", "/dev/full"]),
        ]
    if name == "eval" and chance.often(0.5):
        line += ["--rewards", *([] if chance.often(0.05) else chance.some(REWARDS, 2) or ["points"])]
    return line, notes


def run(line: list[str], here: Path, tampered: bool = False) -> int:
    """Run a command in a directory.

    Returns:
        Its exit status.

    Raises:
        Failure: a traceback, a status other than 0, 1 and 2, an error without words, a hang, a refusal that has changed
            a file, or a directory that is not whole.
    """
    before = _files(here)
    out, err = io.StringIO(), io.StringIO()
    path, modules, cwd = list(sys.path), set(sys.modules), os.getcwd()
    os.chdir(here)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            limit(SECONDS),
        ):
            warnings.simplefilter("ignore")
            status = main(line)
    except SystemExit as leave:  # argparse and tyro
        status = leave.code if isinstance(leave.code, int) else 1
    except (Exception, Hang) as error:
        raise Failure(f"{type(error).__name__}: {error}") from error
    finally:
        os.chdir(cwd)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name.partition(".")[0] in {*MODULES, "wandb", "tensorboard"}:
                del sys.modules[name]
    told = err.getvalue() + out.getvalue()
    if status not in (0, 1, 2) or ("Traceback" in told and "-v" not in line):
        raise Failure(f"status {status}: {told[-1500:]}{_traceback(told)}")
    if status and not told.strip():
        raise Failure(f"status {status} and not a word")
    if status == 2 and _files(here) != before:
        changed = {name for name in {*before, *_files(here)} if before.get(name) != _files(here).get(name)}
        raise Failure(f"a refused command has changed {sorted(changed)[:5]}: {told[-300:]}")
    if not tampered:
        for directory in here.glob("*run*"):
            _check_whole(directory, status)
    return status


def _traceback(told: str) -> str:
    """The end of the traceback that a message says is in a file."""
    found = re.search(r"the traceback is in (.+), and -v", told)
    if found is None:
        return ""
    text = Path(found[1]).read_text(encoding="utf-8")
    Path(found[1]).unlink()
    return text[-800:]


def _files(here: Path) -> dict[str, bytes | str]:
    """The contents of every file below a directory, but for caches."""
    return {
        str(path.relative_to(here)): path.read_bytes() if path.is_file() else "directory"
        for path in here.rglob("*")
        if "__pycache__" not in path.parts and not path.is_symlink()
    }


def _check_whole(directory: Path, status: int) -> None:
    """Raise a `Failure` for a run's directory that is neither whole nor resumable."""
    if not directory.is_dir():
        return
    left = [path for path in directory.rglob("*") if path.name.endswith(".tmp")]
    if left:
        raise Failure(f"{left[0]} is left over")
    if not any(directory.iterdir()):
        raise Failure(f"{directory.name} is empty")
    try:
        read_config(str(directory / "config.json"))
        json.loads((directory / "versions.json").read_text(encoding="utf-8"))
        newest = checkpoints.latest(directory / "checkpoints")
        if newest is not None:
            checkpoints.load(newest)
    except Exception as error:
        raise Failure(f"{directory.name} is half-written: {error}") from error
    if not status and not (directory / "report.html").is_file():
        raise Failure(f"{directory.name} has no report")


def fuzz(seed: int, commands: int, home: Path) -> tuple[dict[int, int], list[str]]:
    """Run so many random commands; returns how often each status came, and what went wrong with which command."""
    done = home / "done"
    (home / "first").mkdir(parents=True)
    if run([*("train",), *TINY[:-1], str(done)], home / "first"):
        raise Failure("the run that the others are made from has failed")
    statuses, failures = {0: 0, 1: 0, 2: 0}, []
    for example in range(commands):
        chance, here = Chance(f"{seed}/{example}"), home / "scene"
        scene(here, done)
        line, notes = command(chance, here)
        try:
            statuses[run(line, here, tampered=(bool(notes) and line[0] != "train") or "done" in line)] += 1
        except Failure as failure:
            failures.append(
                "\n    ".join([f"seed {seed}, example {example}: {failure}", " ".join(map(repr, line)), *notes])
            )
        shutil.rmtree(here)
    return statuses, failures
