"""GRPO on one reward after another, and on several at once: does each lift its own, and what does the verifier say?

    python -m benchmarks.rewards run --jobs 2      # resumes where it stopped
    python -m benchmarks.rewards report            # the tables and the figures from the data file alone

The runs train the tiny Stable Diffusion and the tiny HunyuanVideo on proxies and measure, on held-out captions, these
and the verifier, which is exact. The gap between a proxy that rises and a verifier that does not is reward hacking.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.training.checkpoints import write_atomically
from agents.training.tables import read_table
from benchmarks.runs import REPOSITORY, Run, execute

RESULTS, BUILD = REPOSITORY / "benchmarks" / "results", REPOSITORY / "build" / "benchmarks"
CLIP, HPS, GOLD = "shapes-clip", "shapes-hps", "shapes"
VQ, MQ, TA, MOTION = "shapes-videoalign-vq", "shapes-videoalign-mq", "shapes-videoalign-ta", "motion"
BOTH, QUALITY = {CLIP: 1.0, HPS: 1.0}, {VQ: 1.0, MQ: 1.0}
_FIXED = {"device": "cpu", "sample_every": 0, "eval_kl": True}


@dataclass(frozen=True)
class Study:
    """Runs that are compared.

    Attributes:
        preset: what they start from.
        fixed: settings of all of them on top of it.
        settings: what is compared: a name, no other study's → settings on top of these.
        measured: every run's rewards → what a column of the table is called.
        drawn: those of the figure → by how much they are stretched.
        picture: the figure's file.
    """

    preset: str
    fixed: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    measured: dict[str, str]
    drawn: dict[str, int]
    picture: str


STUDIES = (
    Study(
        "shapes",
        _FIXED | {"rows": 64, "microbatch": 64, "iterations": 80, "eval_every": 20, "eval_images_per_prompt": 16},
        {
            "alignment: CLIP": {"rewards": {CLIP: 1.0}},
            "preference: HPS": {"rewards": {HPS: 1.0}},
            "binary: CLIP above 0.85": {"rewards": {"threshold(shapes-clip, 0.85)": 1.0}},
            "win rate by HPS": {"rewards": {"win_rate(shapes-hps)": 1.0}},
            "CLIP and HPS, rewards added": {"rewards": BOTH, "agent.reward_aggregation": "rewards"},
            "CLIP and HPS, advantages added": {"rewards": BOTH, "agent.reward_aggregation": "advantages"},
            "CLIP and HPS, losses added": {"rewards": BOTH, "agent.reward_aggregation": "losses"},
            # an iteration that trains half of its samples makes two thirds of the network calls, so there are more
            "CLIP, 4 best and 4 worst of 16": {"rewards": {CLIP: 1.0}, "agent.best_and_worst": 8, "iterations": 120},
            "HPS, held by a KL": {"rewards": {HPS: 1.0}, "agent.kl_coef": 0.1},
            "the verifier itself": {"rewards": {GOLD: 1.0}},
        },
        {CLIP: "CLIP", HPS: "HPS", GOLD: "verifier", "shapes-correct": "all parts right"},
        {CLIP: 1, HPS: 10, GOLD: 1},
        "rewards.svg",
    ),
    Study(
        "shapes-video",
        _FIXED | {"iterations": 60, "eval_every": 20, "eval_images_per_prompt": 2},
        {
            "video aesthetics: VQ": {"rewards": {VQ: 1.0}},
            "motion quality: MQ": {"rewards": {MQ: 1.0}},
            "VQ and MQ, advantages added": {"rewards": QUALITY, "agent.reward_aggregation": "advantages"},
        },
        {
            VQ: "VQ",
            MQ: "MQ",
            TA: "TA",
            MOTION: "verifier",
            "motion-appearance": "looks",
            "motion-direction": "direction",
            "motion-consistency": "consistency",
        },
        {VQ: 1, MQ: 1, MOTION: 1},
        "rewards-clips.svg",
    ),
)


def runs(seeds: int) -> dict[tuple[str, int], Run]:
    """Every run, by its setting and seed; a seed has evaluation noise of its own."""
    found = {}
    for study in STUDIES:
        for name, setting in study.settings.items():
            for seed in range(seeds):
                further = tuple(reward for reward in study.measured if reward not in setting["rewards"])
                own = {"eval_rewards": further, "seed": seed, "eval_seed": 1234 + seed}
                found[name, seed] = Run(study.preset, "grpo", {**study.fixed, **setting, **own})
    return found


def collect(planned: dict[tuple[str, int], Run], build: Path) -> list[dict[str, Any]]:
    """What the finished runs measured: their settings, and a curve of every figure."""
    records = []
    for (name, seed), run in planned.items():
        finished = build / run.key / "finished.json"
        if not finished.exists():
            continue
        rows = read_table(build / run.key / "run" / "eval.csv")
        curve = {column: [None if math.isnan(row[column]) else row[column] for row in rows] for column in rows[0]}
        told = {"code": json.loads(finished.read_text(encoding="utf-8"))["code"], "overrides": run.overrides}
        records.append({"setting": name, "seed": seed, **told, "curve": curve})
    return records


def own(record: dict[str, Any]) -> str:
    """The reward that a run trained on, the first where there are several."""
    return next(iter(record["overrides"]["rewards"]))


def of_study(records: list[dict[str, Any]], study: Study) -> dict[str, list[dict[str, Any]]]:
    """The curves of a study's finished runs, by setting, in its order."""
    found = {name: [record["curve"] for record in records if record["setting"] == name] for name in study.settings}
    return {name: curves for name, curves in found.items() if curves}


def table(records: list[dict[str, Any]]) -> str:
    """In Markdown, a table a study, a line a setting: its reward, the proxies and the verifier, before and after.

    Means over training seeds. The brackets are 95 % intervals of the gain over evaluation noise, for these runs: those
    of both evaluations, taken as independent, although they are of the same prompts and seeds and so narrower.
    """
    tables = []
    for study in STUDIES:
        head = ("trained on", "gain of its own reward", *study.measured.values(), "diversity")
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, same in of_study(records, study).items():
            trained = next(iter(study.settings[name]["rewards"]))  # the first, where there are several
            if trained.startswith("win_rate"):  # half of a group always wins
                trained = HPS
            cells = [_gain(same, trained), *(_change(same, column) for column in study.measured)]
            lines.append(f"| {name} | {' | '.join(cells)} | {_change(same, 'diversity')} |")
        if len(lines) > 2:
            tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def gain(curves: list[dict[str, list[float]]], column: str) -> tuple[float, float]:
    """The last evaluation of a column minus the first, mean over seeds; and half of its 95 % interval."""
    gains = [curve[column][-1] - curve[column][0] for curve in curves]
    halves = [(curve[f"{column}_high"][i] - curve[f"{column}_low"][i]) / 2 for curve in curves for i in (0, -1)]
    return float(np.mean(gains)), math.hypot(*halves) / len(curves)


def _gain(curves: list[dict[str, list[float]]], column: str) -> str:
    mean, half = gain(curves, column)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]".replace("-", "−")


def _change(curves: list[dict[str, list[float]]], column: str) -> str:
    before, after = (np.mean([curve[column][i] for curve in curves]) for i in (0, -1))
    return f"{before:.3f} → {after:.3f}"


def figure(records: list[dict[str, Any]], study: Study, path: Path) -> None:
    """Proxies and verifier over training, a panel a setting; thin lines are seeds."""
    import matplotlib.pyplot as plt

    settings = of_study(records, study)
    if not settings:
        return
    columns = min(5, len(settings))
    lines = -(-len(settings) // columns)
    size = (3.0 * columns, 2.6 * lines)
    drawing, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True)
    colours = ("tab:blue", "tab:orange", "black")
    for axis, (name, same) in zip(axes.flat, settings.items(), strict=False):
        for (reward, factor), colour in zip(study.drawn.items(), colours, strict=True):
            gains = [factor * np.subtract(curve[reward], curve[reward][0]) for curve in same]
            for change, curve in zip(gains, same, strict=True):
                axis.plot(curve["iteration"], change, color=colour, alpha=0.3, linewidth=0.8)
            label = f"{factor} × {reward}" if factor > 1 else reward
            axis.plot(same[0]["iteration"], np.mean(gains, axis=0), color=colour, label=label)
        axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in axes.flat[len(settings) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=6)
    drawing.supxlabel("iteration", fontsize=8)
    drawing.supylabel("gain over the base model, held-out captions", fontsize=8)
    drawing.tight_layout()
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rewards", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each (default: 1)")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds (default: 2)")
    parser.add_argument("--build", type=Path, default=BUILD, help="where the runs are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where table and figure go")
    options = parser.parse_args(arguments)
    path = options.results / "rewards.json"
    if options.command == "run":
        planned = runs(options.seeds)
        errors = execute(list(planned.values()), options.build, options.jobs, "rewards")
        data = {"command": f"python -m benchmarks.rewards run --seeds {options.seeds}"}
        write_atomically(path, json.dumps({**data, "runs": collect(planned, options.build)}, indent=1) + "\n")
        if errors:
            return 1
    records = json.loads(path.read_text(encoding="utf-8"))["runs"]
    write_atomically(options.results / "rewards.md", table(records))
    for study in STUDIES:
        figure(records, study, options.results / study.picture)
    print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
