"""One self-contained HTML page that tells what a run did."""

import html
import json
import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

from agents.training.charts import Line, chart
from agents.training.checkpoints import write_atomically
from agents.training.pictures import data_uri, film, milliseconds, read_frames, rows, save_frames
from agents.training.tables import read_table

MOST_LOOKS = 12
"""How many pictures of samples the page holds; a run may have drawn more."""
_BLUE, _ORANGE = "#1d4ed8", "#c2410c"
_MEANINGS = {
    "reward_std_in_group": ("std", "of the reward within a group, mean over groups"),
    "unscored": ("images", "that a reward failed on"),
    "loss": ("loss", "mean over the update's examples"),
    "grad_norm": ("norm", "of the gradient before it is clipped"),
    "clip_fraction": ("share", "of probability ratios outside the clip"),
    "ratio": ("ratio", "of probabilities, policy over rollout's policy, mean"),
    "ratio_deviation": ("|ratio − 1|", "the largest of the update"),
    "kl_old": ("nats a step", "KL to the rollout's policy"),
    "kl_reference": ("KL a step", "to the base model, as the loss counts it"),
}
"""Of columns of metrics.csv: the axis, and what it is. Others go by their own names."""
_SHOWN_ELSEWHERE = ("iteration", "network_calls", "seconds", "images_per_second", "reward")
_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2rem} h3{font-size:1rem;margin:.2rem 0}
h1,h3,figcaption,code,pre,.card{overflow-wrap:anywhere}
code,pre{font:14px ui-monospace,monospace;background:#f3f4f6;border-radius:4px}
code{padding:.1rem .3rem} pre{padding:.7rem;white-space:pre-wrap}
.cards{display:flex;gap:1rem;flex-wrap:wrap}.card{border:1px solid #dfe3e8;border-radius:8px;padding:.8rem 1.1rem}
.card b{display:block;font-size:1.5rem} small,figcaption{color:#5b6570;font-size:13px}
figure{margin:0;break-inside:avoid} img{max-width:100%;display:block}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.2rem}
.look div{display:flex;flex-wrap:wrap;gap:.4rem}.slide{display:flex;gap:.7rem;align-items:center;margin:.6rem 0}
.slide input{flex:1}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.2rem 1rem}
.charts h3{font-size:14px;margin:0}.charts svg{width:100%;height:auto}
.charts text{font:11px system-ui,sans-serif;fill:#5b6570}
@media(max-width:50rem){.pair{grid-template-columns:minmax(0,1fr)}}
.look .film{display:none}
@media print{.slide,.look .moves{display:none} .look .film{display:block}}
@media print{body{max-width:none;margin:0} .charts{grid-template-columns:repeat(2,1fr)}
*{print-color-adjust:exact}}
"""
_SCRIPT = """
const looks = [...document.querySelectorAll(".after .look")], slide = document.querySelector(".slide");
const show = () => looks.forEach((look, i) => look.hidden = i != slide.querySelector("input").value);
if (slide) { slide.hidden = false; slide.addEventListener("input", show); show(); }
"""


def headline(evals: list[dict[str, float]]) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """(reward name, first evaluation, last evaluation) for every reward that was evaluated."""
    if not evals:
        return []
    names = [name for name in evals[0] if f"{name}_low" in evals[0]]
    return [(name, evals[0], evals[-1]) for name in names]


def write_report(directory: Path) -> Path:
    """Write ``report.html`` and ``before_after.png``, of clips ``.webp``, from a run's own files.

    Args:
        directory: a run's directory.

    Returns:
        The page's path. It needs no other file and no network, and its words are shown as they are: nothing in a
        prompt, a name or a configuration is taken for markup.
    """
    metrics, evals = read_table(directory / "metrics.csv"), read_table(directory / "eval.csv")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    about = json.loads((directory / "versions.json").read_text(encoding="utf-8"))
    cards = "".join(_card(name, before, after) for name, before, after in headline(evals))
    seconds = sum(row["seconds"] for row in metrics)
    write_comparison(directory)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{_text(directory.name)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style>
<h1 dir="auto">{_text(directory.name)}</h1>
<p><bdi>{_text(config["agent"]["name"])}</bdi> on <b><bdi>{_text(config["model"]["name"])}</bdi></b>,
seed {_text(config["seed"])}: {len(metrics)} of {_text(config["iterations"])} iterations,
{_text(_images(config))} images each, {seconds:.0f} s of training.</p>
<p>The command: <code dir="auto">{_text(about["command"] or "(started from Python)")}</code></p>
<h2>Evaluation on fixed prompts and seeds</h2><div class="cards">{cards}</div>
<p><small>The mean before and after, and its 95 % bootstrap intervals. Over images: for other noise on these prompts.
Over prompts: for other prompts of their kind as well.</small></p>
<h2>Same prompts and seeds, before and after</h2>
{_looks(directory)}
<h2>Curves</h2>
<p><small>Training is the mean of each iteration's rollout, on its prompts and with its noise. Evaluation is on the
fixed prompts and seeds; its band is the 95 % interval over images.</small></p>
{_curves(metrics, evals)}
{_details("Configuration", config)}{_details("Versions", about)}
<script>{_SCRIPT}</script></html>
"""
    path = directory / "report.html"
    write_atomically(path, page.encode(errors="replace").decode())  # a file's name need not be valid text
    return path


def _text(words: object) -> str:
    """Words for a page, whatever is in them."""
    return html.escape(str(words))


def _details(title: str, values: dict[str, Any]) -> str:
    words = _text(json.dumps(values, indent=1, ensure_ascii=False))
    return f'<details><summary>{title}</summary><pre dir="auto">{words}</pre></details>'


def _images(config: dict[str, Any]) -> int:
    return config["prompts_per_iteration"] * config["agent"]["group_size"]


def interval(row: dict[str, float], name: str) -> str:
    """An evaluation's interval in brackets, dashes where there is none: over images for a reward's name, over prompts
    for "<name>_prompts"."""
    low, high = (row[f"{name}_{end}"] for end in ("low", "high"))
    return "[–, –]" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"


def _card(name: str, before: dict[str, float], after: dict[str, float]) -> str:
    kinds = {"images": name, "prompts": f"{name}_prompts"}
    if math.isnan(after[f"{name}_prompts_low"]):
        del kinds["prompts"]
    lines = [f"over {kind}: {interval(before, x)} → {interval(after, x)}" for kind, x in kinds.items()]
    return (
        f'<div class="card"><bdi>{_text(name)}</bdi><b>{before[name]:.3f} → {after[name]:.3f}</b>'
        f"<small>{'<br>'.join(lines)}<br>{after['images']:.0f} images each</small></div>"
    )


def _drawn(directory: Path) -> tuple[list[str], list[Path]]:
    """The prompts that a run draws, and its pictures of them in the order of their iterations."""
    samples = directory / "samples"
    lines = (samples / "prompts.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    drawn = (path for path in samples.iterdir() if path.suffix in (".png", ".webp") and path.stem.isdecimal())
    pictures = sorted(drawn, key=lambda path: int(path.stem))
    return [line or "(the empty prompt)" for line in lines], pictures


def _looks(directory: Path) -> str:
    """The first picture beside one of all, which a slider chooses."""
    prompts, pictures = _drawn(directory)
    last = len(pictures) - 1
    places = sorted({round(i * last / (MOST_LOOKS - 1)) for i in range(MOST_LOOKS)}) if last >= MOST_LOOKS else None
    shown = [pictures[i] for i in places] if places else pictures
    looks = [_look(prompts, picture) for picture in shown]
    slider = (
        f'<label class="slide" hidden>iteration {int(shown[0].stem)} <input type="range" min="0" '
        f'max="{len(looks) - 1}" value="{len(looks) - 1}" aria-label="which picture of samples"> '
        f"{int(shown[-1].stem)}</label>"
    )
    left_out = f"<p><small>{len(shown)} of {len(pictures)} pictures; all are in samples/.</small></p>" if places else ""
    pair = f'<div class="pair"><div>{looks[0]}</div><div class="after">{"".join(looks)}</div></div>'
    return slider * (len(looks) > 2) + (pair if len(looks) > 1 else looks[0]) + left_out


def _look(prompts: list[str], picture: Path) -> str:
    figures = [
        f'<figure><figcaption dir="auto">{_text(prompt)}</figcaption>{_image(prompt, picture, row)}</figure>'
        for prompt, row in zip(prompts, rows(picture, len(prompts)), strict=True)
    ]
    return f'<div class="look"><h3>iteration {int(picture.stem)}</h3><div>{"".join(figures)}</div></div>'


def _image(prompt: str, picture: Path, frames: list[Any]) -> str:
    """A row of samples; of clips also its film, for a page that is printed."""
    named = f'alt="samples of {_text(prompt)} at iteration {int(picture.stem)}"'
    image = f'<img {named} src="{data_uri(frames)}">'
    if len(frames) == 1:
        return image
    return f'<div class="moves">{image}</div><div class="film"><img {named} src="{data_uri([film(frames)])}"></div>'


def write_comparison(directory: Path) -> Path:
    """Write ``before_after.png``: a run's first and last picture of samples, from the same seeds, with their prompts.

    Of clips it is ``before_after.webp``, which moves.

    Args:
        directory: a run's directory.

    Returns:
        The picture's path.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    prompts, pictures = _drawn(directory)
    before_after = [read_frames(pictures[i]) for i in (0, -1)]
    width, height = before_after[0][0].size
    side = min(5.0, 8 * width / height)  # of one picture, inches
    figure = Figure((2 * side + 2, side * height / width + 0.4), dpi=110, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots(1, 2)
    for axis, i, when in zip(axes, (0, -1), ("before", "after"), strict=True):
        axis.set_title(f"{when} (iteration {int(pictures[i].stem)})", fontsize=2 * side + 2)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    labels = ["\n".join(textwrap.wrap(prompt, 28)[:3]) for prompt in prompts]
    places = [(i + 0.5) * height / len(prompts) for i in range(len(prompts))]
    axes[0].set_yticks(places, labels, parse_math=False)
    axes[0].tick_params(length=0)
    shown = [axis.imshow(frames[0]) for axis, frames in zip(axes, before_after, strict=True)]
    frames = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font has no emoji: an empty box
        for pair in zip(*before_after, strict=True):
            for image, frame in zip(shown, pair, strict=True):
                image.set_data(frame)
            canvas.draw()
            frames.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
    path = directory / f"before_after.{'png' if len(frames) == 1 else 'webp'}"
    save_frames(frames, path, milliseconds(before_after[0][0]), lossless=False)
    return path


def _curves(metrics: list[dict[str, float]], evals: list[dict[str, float]]) -> str:
    def column(table: list[dict[str, float]], name: str) -> list[float]:
        return [row[name] for row in table]

    def line(table: list[dict[str, float]], name: str, kind: str, color: str) -> Line:
        ends = [f"{name}_{end}" for end in ("low", "high")]
        known = ends[0] in table[0] and not any(math.isnan(value) for value in column(table, ends[0]))
        band = [column(table, end) for end in ends] if known else []
        return Line(kind, color, column(table, "iteration"), column(table, name), *band)

    trained = [name for name in (metrics[0] if metrics else ()) if name.startswith("reward/")]
    panels = []
    if len(trained) > 1:
        weighed = [line(metrics, "reward", "training", _BLUE)]
        panels.append(_panel("all rewards", "reward", "weighted sum, mean over images", weighed))
    evaluated = [name for name, _, _ in headline(evals)]
    for name in dict.fromkeys([*(n.removeprefix("reward/") for n in trained), *evaluated]):
        own = [line(metrics, f"reward/{name}", "training", _BLUE)] if f"reward/{name}" in trained else []
        own += [line(evals, name, "evaluation", _ORANGE)] if name in evaluated else []
        panels.append(_panel(name, "reward", "mean over images", own))
    for name, axis, meaning in (
        ("diversity", "std", "of the final latents among a prompt's images"),
        ("kl", "nats a trajectory", "KL to the base model"),
    ):
        if evals and name in evals[0]:
            panels.append(_panel(f"evaluation: {name}", axis, meaning, [line(evals, name, "evaluation", _ORANGE)]))
    constant = []
    for name in metrics[0] if metrics else ():
        values = [value for value in column(metrics, name) if math.isfinite(value)]
        if name in (*_SHOWN_ELSEWHERE, *trained) or not values:
            continue
        if len(values) > 1 and min(values) == max(values):
            constant.append(f"{_text(name)} {values[0]:g}")
        else:
            axis, meaning = _MEANINGS.get(name, ("value", "mean over the update"))
            panels.append(_panel(f"training: {name}", axis, meaning, [line(metrics, name, "training", _BLUE)]))
    note = f"<p><small>The same in every iteration: <bdi>{', '.join(constant)}</bdi>.</small></p>" if constant else ""
    return f'<div class="charts">{"".join(panels)}</div>{note}'


def _panel(title: str, axis: str, meaning: str, lines: list[Line]) -> str:
    drawn = chart(lines, "iteration", axis)
    return f'<figure><h3 dir="auto">{_text(title)}</h3><small>{meaning}</small>{drawn}</figure>' if drawn else ""
