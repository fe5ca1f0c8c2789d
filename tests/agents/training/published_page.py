"""docs/published-settings.md, made of the presets and of published_settings.toml.

Write it with ``python tests/agents/training/published_page.py`` after a change to either.
"""

import dataclasses
import tomllib
from pathlib import Path

from agents.algorithms import find_agent
from agents.training.config import TrainConfig
from agents.training.presets import PRESETS, make_config
from agents.training.presets.published import PUBLISHED
from denoise_env.models import families
from denoise_env.models.pipeline import PipelineOptions

FAMILIES = {family.name: family.options for family in families()}
HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "published-settings.md"
DATA = tomllib.loads((HERE / "published_settings.toml").read_text(encoding="utf-8"))
COMMON, OURS, WITHOUT = (DATA.pop(name) for name in ("common", "ours", "without"))

INTRO = """# Published settings

Every algorithm has a preset with its published settings, for the model family that they were published for:

```
denoise-env train --preset flow-grpo --prompts prompts.txt --rewards my_rewards:score 1.0
denoise-env train --preset flow-grpo --model points-flow     # the same settings on another model
denoise-env train --agent flow-grpo                          # the algorithm, at the demo's sizes
```

`--preset` sets everything that was published: kernel and noise level, steps in training and in evaluation, group,
prompts and updates a rollout, optimizer, normalisation, windows, averaging, adapters, guidance, size and precision.
Flags change it as they change any configuration.

`--model` keeps what the other model's family has of these settings. It does not keep the size of images and clips,
which is the checkpoint's own unless `--model.height`, `--model.width` and `--model.num-frames` say otherwise, nor the
microbatch; `shapes`, which is small, keeps its precision too. Where the kernel belongs to the other kind of path
(`flow_sde` on a diffusion), the run has the default kernel of the model's path.

`--agent` alone puts an algorithm into a preset that was made for another one, usually the demo's. Learning rate, step
weighting and averaging stay the preset's, and everything else is the algorithm's own default. The last but one section
lists where these defaults differ from the algorithm's preset.

This page is written from the presets and from `tests/agents/training/published_settings.toml`, which names the source
of every value; a test compares all three.
"""


def effective(name):
    """Setting → value of a preset's run on its own model, by the names of a run's configuration."""
    preset = PRESETS[name]
    agent = find_agent(preset.agent).config_type(**preset.agent_options)
    run = {f.name: f.default for f in dataclasses.fields(TrainConfig)} | preset.settings
    model = vars(FAMILIES.get(preset.family, PipelineOptions)()) | preset.model_options
    return (
        {**run, "model": preset.model, "agent": preset.agent}
        | {f"model.{key}": value for key, value in model.items()}
        | {f"agent.{key}": value for key, value in vars(agent).items()}
    )


def published(name):
    """Setting → published value of a preset."""
    known = set(effective(name)) - set(DATA[name]["unstated"])
    common = {key: value for key, value in COMMON.items() if key in known}
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in {**common, **DATA[name]["values"]}.items()
    }


def told(value):
    """A value as a flag has it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "–"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def differences():
    """A section for every preset: what it is, and where it differs from what was published."""
    for name, record in DATA.items():
        ours, theirs = effective(name), published(name)
        rows = [[f"`{key}`", told(theirs[key]), told(ours[key]), why] for key, why in record["why"].items()]
        rows += [["–", rest["published"], rest["ours"], rest["why"]] for rest in record.get("rest", [])]
        body = table(["setting", "published", "here", "why"], rows) if rows else "Nothing differs.\n"
        chosen = ", ".join(f"`{key}` {told(ours[key])}" for key in record["unstated"])
        more = f"\nNot stated there, and chosen here: {chosen}.\n" if chosen else ""
        yield f"### {name}\n\n{record['of']}. Source: {record['source']}.\n\n{body}{more}"


def defaults():
    """Agent, setting, preset and default, where an agent's own default is not its preset's value."""
    for name, preset in PUBLISHED.items():
        if name not in (preset.agent, "dancegrpo"):
            continue
        kind = find_agent(preset.agent).config_type
        for key, value in vars(kind(**preset.agent_options)).items():
            if value != (default := getattr(kind(), key)):
                yield [f"`{preset.agent}`", f"`{key}`", told(value), told(default)]


def demo(published, *names):
    """A table: setting, DanceGRPO's published preset, and the demo's that run it."""
    values = {name: effective(name) for name in (published, *names)}
    for name in names:
        values[name].update({f"model.{key}": value for key, value in vars(make_config(name).model_options).items()})
    rows = []
    for key in values[published]:
        network = key.startswith("model.")  # Points has no such settings
        row = ["–" if network and name == "points" else told(own.get(key)) for name, own in values.items()]
        if len({value for name, value in zip(values, row, strict=True) if not network or name != "points"}) > 1:
            rows.append([f"`{key}`", *row])
    return table(["setting", *(f"`{name}`" for name in values)], rows)


def page():
    """The page's text."""
    presets = [[f"`{name}`", DATA[name]["of"], f"`{PUBLISHED[name].model}`"] for name in DATA]
    without = [[f"`{name}`", why] for name, why in WITHOUT.items()]
    return "\n".join(
        [
            INTRO,
            "## Presets\n",
            table(["`--preset`", "published in", "for"], presets),
            "Agents without one:\n",
            table(["`--agent`", "why"], without),
            "## Where a preset differs from what was published\n",
            "Settings that bound the memory or say how closely an evaluation measures are this project's everywhere: "
            + ", ".join(f"`{key}`" for key in OURS)
            + ".\n",
            *differences(),
            "## Where an agent's default differs from its preset\n",
            "With `--agent` alone. Rows about learning rate, step weighting and averaging hold for presets that say "
            "nothing about them; the demo's say their own.\n",
            table(["`--agent`", "setting", "preset", "default"], defaults()),
            "## What the demo's presets change\n",
            "`shapes`, `points`, `shapes-flux`, `shapes-video` and `shapes-i2v` are no published settings. They run "
            "DanceGRPO's algorithm at sizes for a laptop:\n",
            demo("dancegrpo", "shapes", "points"),
            demo("dancegrpo-flux", "shapes-flux"),
            demo("dancegrpo-hunyuan", "shapes-video"),
            demo("dancegrpo-skyreels", "shapes-i2v"),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
