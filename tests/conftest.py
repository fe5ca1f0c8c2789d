import importlib.util

import pytest
import torch

from denoise_env.mdp import DenoisingMDP

EXTRAS = {
    "rewards": ("open_clip", "torchvision"),
    "sb3": ("stable_baselines3",),
    "serve": ("fastapi", "httpx2", "uvicorn"),
    "tensorboard": ("tensorboard",),
    "video": ("moviepy",),
}
ABSENT = {
    extra: lacking
    for extra, modules in EXTRAS.items()
    if (lacking := [module for module in modules if importlib.util.find_spec(module) is None])
}


def reason(words):
    """Why a test is skipped whose failure says these words: an extra that is not installed; or ``None``."""
    for extra, modules in ABSENT.items():
        said = [text for module in modules for text in (f"No module named '{module}", f"requires the {module.title()}")]
        if any(text in words for text in (f"[{extra}]", *said)):
            return f"the extra {extra!r} is not installed"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.failed and (why := reason(str(report.longrepr))):
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, f"Skipped: {why}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and (why := reason(str(report.longrepr))):
        report.outcome, report.longrepr = "skipped", (str(item.path), 1, f"Skipped: {why}")
    return report


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
