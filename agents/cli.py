"""The command line: ``denoise-env train | eval | sample | describe | serve-reward | list``."""

import argparse
import contextlib
import importlib
import logging
import os
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence

from agents.commands import TRAINING
from agents.training.stopping import Stopping


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what is typed behind ``denoise-env``; default: the process's own arguments.

    Returns:
        The exit status: 0 done, 1 the run failed, 2 bad input, 3 a bug, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    stopping = Stopping(f"stopped; start again with: {shlex.join(['denoise-env', *words])}")
    if arguments is not None:
        with stopping:
            return _main(words, stopping)
    stopping.__enter__()  # up to the program's end: there is no moment behind it at which Ctrl-C shows a traceback
    with contextlib.suppress(FileNotFoundError):
        if sys.path[:1] in ([""], [os.getcwd()]):  # from python -m: a file there would pass for a library
            del sys.path[0]
    return _main(words, stopping)


def _main(arguments: Sequence[str], stopping: Stopping) -> int:
    verbose = "-v" in arguments
    typed = [argument for argument in arguments if argument != "-v"]
    _set_up(verbose)
    try:
        status = _run(typed, stopping)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt as error:
        return _tell(stopping.message, 128 + (stopping.signal or signal.SIGINT), error, False)
    except (ValueError, FileExistsError) as error:
        return _tell(str(error), 2, error, verbose)
    except MemoryError as error:
        return _tell(f"out of memory: {error}", 1, error, verbose)
    except (RuntimeError, FloatingPointError, OSError) as error:
        return _tell(str(error), 1, error, verbose)
    except Exception as error:  # nothing that is foreseen ends here
        where = "above" if verbose else f"in {_write_traceback(error)}, and -v shows it"
        what = f"a bug, here or in code of your own: {type(error).__name__}: {error}"
        return _tell(f"{what}; the traceback is {where}", 3, error, verbose)


def _tell(sentence: str, status: int, error: BaseException, verbose: bool) -> int:
    """Print what went wrong, and with ``-v`` where; returns the status."""
    if verbose:
        traceback.print_exception(error)
    print(f"denoise-env: {sentence}", file=sys.stderr)
    return status


def _write_traceback(error: BaseException) -> str:
    """Write an error's traceback into a new file, and return the file's path."""
    handle, path = tempfile.mkstemp(".txt", "denoise-env-")
    with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
        traceback.print_exception(error, file=file)
    return path


def _set_up(verbose: bool) -> None:
    """What holds for every command: streams that take every character, and quiet libraries."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if verbose:
        logging.basicConfig(format="%(message)s")
        for package in ("denoise_env", "agents"):
            logging.getLogger(package).setLevel(logging.INFO)


def _run(typed: Sequence[str], stopping: Stopping) -> int:
    parser = _parser()
    if empty := next((flag for flag in typed if flag.startswith("--") and flag.endswith("=--")), None):
        parser.error(f"{empty} has no value")  # argparse would make a list of it
    with contextlib.suppress(FileNotFoundError):  # the directory may be gone
        sys.path.append(os.getcwd())  # where models, rewards and agents of one's own ("module:name") usually are
    if list(typed) in (["train", "-h"], ["train", "--help"]):
        print(f"{TRAINING}\n{_EVERY_SETTING}")
        return 0
    plain: Sequence[str] = typed
    model_flags: list[str] = []
    if plain[:1] != ["train"] and any(argument.startswith("--model.") for argument in typed):
        from agents.commands.settings import split_model_flags

        plain, model_flags = split_model_flags(typed)
    options, rest = parser.parse_known_args(plain)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.model_flags, options.typed = model_flags, typed
    module, name = options.run.split(":")
    run = getattr(importlib.import_module(f"agents.commands.{module}"), name)  # what is heavy is imported here
    return run(rest, stopping) if options.command == "train" else run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="denoise-env",
        description="Reinforcement learning in the denoising process of diffusion models.",
        epilog="Try: denoise-env train (the five-minute demo), denoise-env list, denoise-env train --help",
    )
    parser.add_argument("-v", action="store_true", help="show the traceback of an error; anywhere on the line")
    names = "train | eval | sample | describe | serve-reward | list"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    train = commands.add_parser("train", help="train an agent", add_help=False)
    train.set_defaults(run="train:run")
    for name, run, text in (
        ("eval", "look:run_eval", "measure rewards on fixed prompts and seeds"),
        ("sample", "look:run_sample", "draw a grid of samples"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.set_defaults(run=run)
        command.add_argument(
            "targets",
            nargs="+" if name == "eval" else 1,
            metavar="TARGET",
            help="a run's directory, or a model (see denoise-env list)",
        )
        command.add_argument(
            "--prompts",
            metavar="FILE",
            help="a .txt, .jsonl or .csv file, or a named set (denoise-env list)",
        )
        command.add_argument("--images-per-prompt", type=int, default=8 if name == "sample" else 64, metavar="N")
        command.add_argument("--seed", type=int, default=1234, help="of the noise (default %(default)s)")
        command.add_argument("--num-steps", type=int, metavar="K", help="denoising steps (default: the run's, or 10)")
        command.add_argument("--conditioning-cache", metavar="DIR", help="keep encoded prompts there")
        command.add_argument("--trust", action="store_true", help="import the code that a run's directory names")
        command.epilog = _MODEL_OPTIONS
        if name == "sample":
            command.add_argument("--output", default="samples.png", help="the picture (default %(default)s)")
        else:
            command.add_argument("--rewards", nargs="+", metavar="NAME", help="default: the run's, or the model's own")
            command.add_argument("--json", metavar="FILE", help="write the table there too")
    command = commands.add_parser(
        "describe",
        help="latents, parameters and memory of a model and of a run on it, without loading weights",
        description="Latents, parameters and memory of a model and of a training run on it, from the model's "
        "configuration files, without its weights.",
        epilog=_MODEL_OPTIONS,
    )
    command.set_defaults(run="describe:run")
    command.add_argument("model", metavar="MODEL", help="a world, a directory or a hub id (denoise-env list)")
    command.add_argument("--preset", metavar="NAME", help="the run's settings (default: grpo and the model's own)")
    command.add_argument("--microbatch", type=int, metavar="N", help="images in a network call (default: preset's, 1)")
    command.add_argument("--images", type=int, metavar="N", help="images of a rollout (default: preset's, or 128)")
    command.add_argument("--num-steps", type=int, metavar="K", help="denoising steps (default: the preset's, or 10)")
    command.add_argument("--json", metavar="FILE", help="write the figures there too, in bytes")
    command = commands.add_parser(
        "serve-reward",
        help="compute a reward for the training runs of other processes and machines",
        description="Compute a reward over HTTP, until Ctrl-C or SIGTERM, for training runs with the reward "
        """remote(url="http://HOST:PORT"): other processes, machines or programs that speak Flow-Factory's form.""",
    )
    command.set_defaults(run="serve:run")
    command.add_argument("reward", metavar="REWARD", help="as in denoise-env train --rewards (denoise-env list)")
    command.add_argument("--host", default="127.0.0.1", help="any but a loopback address wants a token (%(default)s)")
    command.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one, which is printed")
    command.add_argument("--token-env", metavar="NAME", help="the environment variable that holds the clients' token")
    command.add_argument("--max-batch", type=int, default=64, metavar="N", help="samples scored together (%(default)s)")
    command.add_argument("--max-queue", type=int, default=1024, metavar="N", help="samples that may wait (%(default)s)")
    command.add_argument("--device", default="cpu", help="where the reward is given its samples (%(default)s)")
    commands.add_parser("list", help="models, rewards, kernels, agents, presets, environments").set_defaults(
        run="catalogue:run"
    )
    return parser


_EVERY_SETTING = (
    "Every setting is a flag: denoise-env train --agent NAME --help lists them all, with what they mean and their\n"
    "defaults; --preset NAME or --model NAME before --help shows theirs."
)
_MODEL_OPTIONS = (
    "The model's own settings go with it as they do in denoise-env train: --model.guidance-scale 3, --model.lora DIR."
)


if __name__ == "__main__":
    sys.exit(main())
