"""What the commands do, a file each; `agents.cli` reads the command line and calls them."""

TRAINING = """Train an agent. Without flags: the five-minute demo on the tiny Stable Diffusion.

First the preset, then the file, then the flags:
  --preset NAME   where the defaults come from (denoise-env list); by default what goes with --model
  --agent NAME    the algorithm, with its published settings (denoise-env list); by default grpo
  --model NAME    a world, a directory, a hub id, or module:attribute (denoise-env list)
  --config FILE   TOML or JSON with any of the settings, and preset
  --resume DIR    continue the run in DIR from its newest checkpoint
  --trust         with --resume: import the code that the run names as module:attribute
  -v              show the traceback of an error
"""
