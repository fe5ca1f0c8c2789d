"""The command line: ``denoise-env train | eval | sample | describe | list``."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (0 done, 1 the run failed, 2 bad input)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    sys.path.append(os.getcwd())  # where models, rewards and agents of one's own ("module:name") usually are
    plain, model_flags = typed, []
    if typed[:1] != ["train"] and any(argument.startswith("--model.") for argument in typed):
        from agents.commands.settings import split_model_flags

        plain, model_flags = split_model_flags(typed)
    options, rest = parser.parse_known_args(plain)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.model_flags = model_flags
    for name, value in (("HF_HUB_DISABLE_TELEMETRY", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        module, name = options.run.split(":")
        run = getattr(importlib.import_module(f"agents.commands.{module}"), name)  # what is heavy is imported here
        return run(rest if options.command == "train" else options)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except (ValueError, FileExistsError) as error:
        print(f"denoise-env: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, FloatingPointError, OSError) as error:
        print(f"denoise-env: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("denoise-env: stopped; continue with denoise-env train --resume DIRECTORY", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="denoise-env",
        description="Reinforcement learning in the denoising process of diffusion models.",
        epilog="Try: denoise-env train (the five-minute demo), denoise-env list, denoise-env train --help",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | eval | sample | describe | list")
    train = commands.add_parser("train", help="train an agent; --help lists every setting", add_help=False)
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
        command.epilog = _MODEL_OPTIONS
        if name == "sample":
            command.add_argument("--output", default="samples.png", help="the picture (default %(default)s)")
        else:
            command.add_argument("--rewards", nargs="+", metavar="NAME", help="default: the run's, or the model's own")
            command.add_argument("--json", metavar="FILE", help="write the table there too")
    command = commands.add_parser(
        "describe",
        help="latents, parameters and memory of a model, without loading weights",
        description="Latents, parameters and memory of a model, from its configuration files, without its weights.",
        epilog=_MODEL_OPTIONS,
    )
    command.set_defaults(run="describe:run")
    command.add_argument("model", metavar="MODEL", help="a world, a directory or a hub id (denoise-env list)")
    command.add_argument("--num-steps", type=int, default=10, metavar="K", help="denoising steps (default %(default)s)")
    command.add_argument("--json", metavar="FILE", help="write the figures there too, in bytes")
    commands.add_parser("list", help="models, rewards, kernels, agents, presets, environments").set_defaults(
        run="catalogue:run"
    )
    return parser


_MODEL_OPTIONS = (
    "The model's own settings go with it as they do in denoise-env train: --model.guidance-scale 3, --model.lora DIR."
)


if __name__ == "__main__":
    sys.exit(main())
