import pytest
import torch

from denoise_env.mdp import DenoisingMDP


def pytest_addoption(parser):
    group = parser.getgroup("fuzz", "random calls and command lines (tests/fuzz)")
    group.addoption("--fuzz-calls", type=int, default=2000, metavar="N", help="calls of environments")
    group.addoption("--fuzz-commands", type=int, default=120, metavar="N", help="command lines")
    group.addoption("--fuzz-seed", type=int, default=0, metavar="S", help="seed of both")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture
def make_shapes():
    """Builds the Shapes MDP; every call loads fresh weights."""

    def make(**options):
        return DenoisingMDP.make("shapes", **{"num_steps": 4, **options})

    return make


@pytest.fixture
def points():
    return DenoisingMDP.make("points", num_steps=10)
