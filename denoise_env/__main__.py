"""The command ``denoise-env``, also ``python -m denoise_env``.

It lies here, outside of the package that it starts, so that it can say when another package hides that one.
"""

import importlib
import sys

from denoise_env.shadowing import OURS, shadowed


def main() -> int:
    """Run the command line of ``agents``; returns the exit status, 2 where another package has that name."""
    if hidden := shadowed():
        print(f"denoise-env: {hidden}", file=sys.stderr)
        return 2
    return importlib.import_module(f"{OURS.name}.cli").main()


if __name__ == "__main__":
    sys.exit(main())
