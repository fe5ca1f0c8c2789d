"""One self-contained HTML page that tells what a run did."""

import base64
import html
import io
import json
import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

from agents.training.checkpoints import write_atomically
from agents.training.tables import read_table

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2rem}
code,pre{font:14px ui-monospace,monospace;background:#f3f4f6;border-radius:4px}
code{padding:.1rem .3rem} pre{padding:.7rem;overflow-x:auto;white-space:pre-wrap}
.cards{display:flex;gap:1rem;flex-wrap:wrap}.card{border:1px solid #dfe3e8;border-radius:8px;padding:.8rem 1.1rem}
.card b{display:block;font-size:1.5rem}.card small{color:#5b6570}
img,svg{max-width:100%;height:auto}
table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:left;font-size:14px}
details{margin-top:1rem}
"""


def headline(evals: list[dict[str, float]]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """(reward name, first evaluation, last evaluation) for every reward that was evaluated."""
    if not evals:
        return []
    names = [name for name in evals[0] if f"{name}_low" in evals[0]]
    return [(name, evals[0], evals[-1]) for name in names]


def write_report(directory: Path) -> Path:
    """Write ``report.html`` and ``before_after.png`` from a run's own files.

    Args:
        directory: a run's directory.

    Returns:
        The page's path.
    """
    metrics, evals = read_table(directory / "metrics.csv"), read_table(directory / "eval.csv")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    about = json.loads((directory / "versions.json").read_text(encoding="utf-8"))
    cards = "".join(_card(name, before, after) for name, before, after in headline(evals))
    seconds = sum(row["seconds"] for row in metrics)
    picture = base64.b64encode(write_comparison(directory).read_bytes()).decode()
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{html.escape(directory.name)}</title>
<style>{_STYLE}</style>
<h1>{html.escape(directory.name)}</h1>
<p>{html.escape(config["agent"]["name"])} on <b>{html.escape(config["model"]["name"])}</b>, seed {config["seed"]}:
{len(metrics)} of {config["iterations"]} iterations, {_images(config)} images each, {seconds:.0f} s of training.</p>
<p>The command: <code>{html.escape(about["command"] or "(started from Python)")}</code></p>
<h2>Evaluation on fixed prompts and seeds</h2><div class="cards">{cards}</div>
<p><small>The mean before and after, and its 95 % bootstrap intervals. Over images: for other noise on these prompts.
Over prompts: for other prompts of their kind as well.</small></p>
<h2>Same prompts and seeds, before and after</h2>
<img alt="samples before and after" src="data:image/png;base64,{picture}">
<h2>Curves</h2>{_curves(metrics, evals)}
<details><summary>Configuration</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details>
<details><summary>Versions</summary><pre>{html.escape(json.dumps(about, indent=1))}</pre></details>
</html>
"""
    path = directory / "report.html"
    write_atomically(path, page)
    return path


def _images(config: dict[str, Any]) -> int:
    return config["prompts_per_iteration"] * config["agent"]["group_size"]


def interval(row: dict[str, float], name: str) -> str:
    """An evaluation's interval in brackets: over images for a reward's name, over prompts for "<name>_prompts"."""
    return f"[{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"


def _card(name: str, before: dict[str, float], after: dict[str, float]) -> str:
    kinds = {"images": name, "prompts": f"{name}_prompts"}
    if math.isnan(after[f"{name}_prompts_low"]):
        del kinds["prompts"]
    lines = [f"over {kind}: {interval(before, x)} → {interval(after, x)}" for kind, x in kinds.items()]
    return (
        f'<div class="card"><bdi>{html.escape(name)}</bdi><b>{before[name]:.3f} → {after[name]:.3f}</b>'
        f"<small>{'<br>'.join(lines)}<br>{after['images']:.0f} images each</small></div>"
    )


def write_comparison(directory: Path) -> Path:
    """Write ``before_after.png``: a run's first and last grid of samples, from the same seeds, with their prompts.

    Args:
        directory: a run's directory.

    Returns:
        The picture's path.
    """
    from PIL import Image

    plt = _pyplot()
    prompts = (directory / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    grids = sorted((directory / "samples").glob("*.png"))
    width, height = Image.open(grids[0]).size
    figure, axes = plt.subplots(1, 2, figsize=(12, 5 * height / width + 0.4), layout="constrained")
    for axis, path, when in zip(axes, (grids[0], grids[-1]), ("before", "after"), strict=True):
        axis.imshow(Image.open(path))
        axis.set_title(f"{when} (iteration {int(path.stem)})")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    labels = ["\n".join(textwrap.wrap(prompt, 28)[:3]) for prompt in prompts]
    axes[0].set_yticks([(i + 0.5) * height / len(prompts) for i in range(len(prompts))], labels, parse_math=False)
    axes[0].tick_params(length=0)
    path = directory / "before_after.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font has no emoji: an empty box
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _curves(metrics: list[dict[str, float]], evals: list[dict[str, float]]) -> str:
    plt = _pyplot()
    panels = [
        name
        for name in ("grad_norm", "clip_fraction", "kl_reference", "ratio_deviation")
        if metrics and name in metrics[0]
    ]
    evaluated = [name for name, _, _ in headline(evals)]
    names = ["reward", *evaluated, *panels]
    rows = -(-len(names) // 3)
    figure, axes = plt.subplots(rows, 3, figsize=(10, 2.6 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        if name in evaluated:
            at = [row["iteration"] for row in evals]
            axis.plot(at, [row[name] for row in evals], "o-", color="#c2410c")
            low, high = ([row[f"{name}_{end}"] for row in evals] for end in ("low", "high"))
            axis.fill_between(at, low, high, color="#c2410c", alpha=0.2, linewidth=0)
            axis.set_title(f"evaluation: {name} (95 % over images)", fontsize=10, parse_math=False)
        else:
            axis.plot([row["iteration"] for row in metrics], [row[name] for row in metrics], color="#1d4ed8", lw=1)
            axis.set_title(f"training: {name}", fontsize=10, parse_math=False)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg")
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
