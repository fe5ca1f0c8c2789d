"""What "Bring your agent" shows runs as it stands there, in order."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "bring-your-agent.md").read_text()


def test_the_page_runs(capsys):
    found: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(block, found)
    numbers = [float(x) for x in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    base, cem_first, cem_last, still, _, sb3, torchrl_first, torchrl_last = numbers
    assert base < 0.5
    assert cem_last > cem_first + 0.2
    assert cem_last > still + 0.2
    assert sb3 > base + 0.3
    assert torchrl_last > torchrl_first + 0.2


def test_the_names_and_files_it_mentions_exist():
    for path in re.findall(r"`((?:examples|benchmarks|agents)/[\w/.-]+)`", PAGE):
        assert (ROOT / path).exists(), path
