"""Random calls and command lines: no traceback, no change after a refusal, no hang, nothing half-written."""

import fuzz_commands
import fuzz_environments
import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_environments(request):
    option = request.config.getoption
    made, failures = fuzz_environments.fuzz(option("fuzz_seed"), option("fuzz_calls"))
    print(f"{made} calls")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:20])


def test_command_lines(request, tmp_path):
    option = request.config.getoption
    statuses, failures = fuzz_commands.fuzz(option("fuzz_seed"), option("fuzz_commands"), tmp_path / "home")
    print(f"statuses {statuses}")
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:20])
