"""``denoise-env serve-reward``: computes a reward for the training runs of other processes and machines."""

import argparse
import os

from denoise_env.rewards import load_reward
from denoise_env.rewards.base import require
from denoise_env.rewards.connection import read_token
from denoise_env.rewards.server import RewardServer, serve


def run(options: argparse.Namespace) -> int:
    """Serve a reward until SIGINT or SIGTERM, which end the process."""
    for module in ("fastapi", "uvicorn"):
        require(module, "denoise-env[serve]", "serve-reward")
    if options.token_env is not None and not os.environ.get(options.token_env):
        raise ValueError(f"the environment variable {options.token_env}, which --token-env names, is not set")
    server = RewardServer(
        load_reward(options.reward),
        token=read_token(options.token_env),
        device=options.device,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
    )
    token = f', token_env="{options.token_env}"' if server.token else ""

    def announce(url: str) -> None:
        print(f"{options.reward} is served on {url}; Ctrl-C ends it", flush=True)
        print(f"""--rewards 'remote(url="{url}"{token})' 1.0""", flush=True)

    serve(server, options.host, options.port, announce)
    return 0
