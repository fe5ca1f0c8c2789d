"""The best that any agent can do on Points: the exact frontier of mean reward against KL.

    python -m benchmarks.optimum    # the four kernels at K = 10, into benchmarks/results/: minutes
    python -m benchmarks.optimum --model points --kernel ddim --num-steps 20 --out ddim.json

Agents at different KL from the base model cannot be compared on reward alone. For a ladder of β this computes the
policy that maximises E[r(x_K)] − β KL(π ‖ base) over all π(x_{k+1} | x_k, k, prompt), with x_0 ~ N(0, I) kept. The
KL is that of trajectories: summed over the stochastic steps and the latent dimensions. By backward recursion,

    V_K(x) = r(x),    V_k(x) = β log E[ exp(V_{k+1}(x')/β) ],  x' ~ base(· | x, k)

and the optimum is base(x' | x, k) exp(V_{k+1}(x')/β), normalised. Its marginal of x_K is not the base's tilted by
exp(r/β), unless x_K is independent of x_0. Agents here move the mean of a step and keep it Gaussian with its std;
the best of *those* policies follows from

    V_k(x) = max over m of E[ V_{k+1}(m + std ε) ] − β |m − mean(x)|² / (2 std²)

At a step that is deterministic or left alone, V_k(x) = E[V_{k+1}(x')]. E[r] follows from the same recursions, with
the optimum's weights or mean; the KL from E[V_0(x_0)] = E[r] − β KL. β is the slope of E[r] over KL.

Deterministic steps have no KL, so they count as the base's. A network that is shared by all steps changes them too,
at no cost: `measure` with ``steps`` has the base take them, which puts the policy under these bounds.

Numerics: float64 on a square grid. A Gaussian average is a product with a matrix of weights per axis (the
trapezoidal rule: error like exp(−2π² std²/spacing²)); it covers the whole grid, since at small β the optimum
reaches far into the base's tails, and exp(V/β) is scaled by its maximum. The steps' means lie off the grid: there,
values are interpolated by piecewise cubics (error O(spacing⁴)). They are smooth: logarithms of Gaussian averages.
The maximum over m is taken axis by axis on the grid and refined by a parabola.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from agents.policy import DenoisingPolicy
from denoise_env.mdp import DenoisingMDP
from denoise_env.progress import progress

Policies = Literal["any", "gaussian"]

CASES = (("points", "ddim"), ("points-flow", "dance_sde"), ("points-flow", "flow_sde"), ("points-flow", "cps"))
"""(model, kernel) of the committed results."""
BETAS = (math.inf, 2.0, 1.0, 0.5, 0.3, 0.2, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
"""From the base to where the reward is nearly its maximum."""
_LABELS: dict[Policies, str] = {"any": "any policy", "gaussian": "Gaussian policy"}
RESULTS = Path(__file__).parent / "results" / "optimum-points.json"


@dataclass(frozen=True)
class Frontier:
    """The largest mean reward at every KL, through the optima of E[r] − β KL.

    Attributes:
        betas: decreasing; the first is infinity, the base.
        rewards: the optima's E[r].
        kls: the optima's KL in nats, increasing from 0.
        highest: the largest reward on the grid.
    """

    betas: tuple[float, ...]
    rewards: tuple[float, ...]
    kls: tuple[float, ...]
    highest: float

    @classmethod
    def mean(cls, frontiers: Sequence["Frontier"]) -> "Frontier":
        """Of the means over prompts: at equal β, the best mean reward at a mean KL."""
        rewards, kls = (np.mean([getattr(f, name) for f in frontiers], 0).tolist() for name in ("rewards", "kls"))
        return cls(frontiers[0].betas, tuple(rewards), tuple(kls), float(np.mean([f.highest for f in frontiers])))

    def reward_at(self, kl: npt.ArrayLike) -> np.ndarray:
        """The largest mean reward at a KL ≥ 0, elementwise.

        Between the optima a cubic in √KL, in which the frontier is smooth, with the slopes that β gives. Beyond
        the last the lower of its tangent and ``highest``: an upper bound, since the frontier is concave.
        """
        kl, rewards, root = np.asarray(kl, float), np.array(self.rewards), np.sqrt(self.kls)
        slopes = np.concatenate([[0.0], 2 * root[1:] * self.betas[1:]])
        slopes[0] = 2 * (rewards[1] - rewards[0]) / root[1] - slopes[1]  # a parabola up to the first optimum
        i = np.clip(np.searchsorted(root, np.sqrt(kl)) - 1, 0, len(root) - 2)
        width = root[i + 1] - root[i]
        t = (np.sqrt(kl) - root[i]) / width
        cubic = (
            rewards[i] * (1 + 2 * t) * (1 - t) ** 2
            + rewards[i + 1] * t**2 * (3 - 2 * t)
            + width * t * (1 - t) * (slopes[i] * (1 - t) - slopes[i + 1] * t)
        )
        tangent = rewards[-1] + self.betas[-1] * (kl - self.kls[-1])
        return np.where(kl > self.kls[-1], np.minimum(tangent, self.highest), cubic)

    def distance(self, reward: npt.ArrayLike, kl: npt.ArrayLike) -> np.ndarray:
        """How far a policy's E[r] is below the frontier at its KL; ≥ 0 but for Monte Carlo error."""
        return self.reward_at(kl) - np.asarray(reward)


def solve(
    policy: DenoisingPolicy,
    betas: Sequence[float] = BETAS,
    *,
    policies: Policies = "any",
    steps: Sequence[int] | None = None,
    spacing: float | None = None,
    extent: float = 5.0,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Frontier]:
    """The frontier of every prompt of the policy's MDP.

    With the default grid, K = 10 and the kernels in `CASES`, refining it changes E[r] by less than 1e-4 and the KL
    by less than 1e-3 ("any"), or 1e-3 and 1e-2 ("gaussian").

    Args:
        policy: the base, with 2-D latents: its network and its kernel.
        betas: decreasing, the first infinite.
        policies: what to optimise over: "any" π(x_{k+1} | x_k, k, prompt), or the base's "gaussian" with another mean.
        steps: those that may differ from the base, as an agent's ``trainable_steps``; default all stochastic ones.
        spacing: of the grid; default 0.05, and for "any" 0.03 or three quarters of the smallest std if that is less.
        extent: the grid covers [−extent, extent]².
        done: called after every prompt.

    Raises:
        ValueError: no stochastic step, latents that are not 2-D, betas in another order or so small that exp(r/β)
            leaves float64, or unknown policies.
    """
    if policies not in _LABELS:
        raise ValueError(f"policies must be one of {list(_LABELS)}, not {policies!r}")
    if policy.mdp.model.latent_shape != (2,):
        raise ValueError(f"the grid is 2-D, the latents have shape {policy.mdp.model.latent_shape}")
    if not policy.kernel.stochastic.any():
        raise ValueError(f"no policy differs from the base: {policy.kernel!r} has no stochastic step")
    if len(betas) < 2 or betas[0] != math.inf or betas[-1] <= 0 or any(a <= b for a, b in itertools.pairwise(betas)):
        raise ValueError(f"betas must decrease from infinity and be positive, not {list(betas)}")
    if spacing is None:
        spacing = min(0.03, 0.75 * policy.kernel.stds[policy.kernel.stochastic].min().item())
        spacing = 0.05 if policies == "gaussian" else spacing
    half = math.ceil(extent / spacing)
    side = spacing * torch.arange(-half, half + 1, dtype=torch.float64)
    start = torch.softmax(-(side**2) / 2, 0)
    frontiers = {}
    for prompt in [p.text for p in policy.mdp.drawn_prompts]:
        values, rewards, highest = backward(policy, prompt, betas, side, policies, steps)
        objective, reward = (torch.einsum("i,bij,j->b", start, v, start) for v in (values, rewards))
        kls = (reward - objective) / torch.tensor(betas, dtype=torch.float64)
        frontiers[prompt] = Frontier(tuple(betas), tuple(reward.tolist()), tuple(kls.tolist()), highest)
        done()
    return frontiers


@torch.no_grad()
def backward(
    policy: DenoisingPolicy,
    prompt: str,
    betas: Sequence[float],
    side: Tensor,
    policies: Policies = "any",
    steps: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """V_0(x_0) and the optimum's E[r | x_0], ``[B, N, N]`` each for B betas, and the largest reward.

    Args:
        policy: as in `solve`, and so ``betas``, ``policies`` and ``steps``.
        prompt: one of the MDP's.
        betas: see there.
        side: ``[N]`` float64, the grid's coordinates along each axis.
        policies: see there.
        steps: see there.

    Raises:
        ValueError: exp(r/β) leaves float64.
    """
    mdp, kernel, n = policy.mdp, policy.kernel, len(side)
    points = torch.cartesian_prod(side, side)
    index = mdp.conditioning.index([prompt]).expand(len(points))
    latents, conditioning = points.float(), mdp.conditioning.rows(index)
    scores = mdp.score(latents, index).total.double()
    highest = scores.max().item()
    if highest - scores.min().item() > 600 * min(betas):
        raise ValueError(f"exp(r/β) leaves float64 for β = {min(betas)}: the least is the rewards' range over 600")
    values = rewards = scores.view(1, n, n).repeat(len(betas), 1, 1)
    beta = torch.tensor(betas, dtype=torch.float64)[:, None, None]
    for k in reversed(range(mdp.num_steps)):
        if kernel.stochastic[k]:
            std = kernel.stds[k]
            gaussian = torch.softmax(-(((side[:, None] - side) / std) ** 2) / 2, 1)
            free = steps is None or k in steps
            if free and policies == "any":
                top = values.amax((1, 2), keepdim=True)
                tilt = ((values - top) / beta).exp()
                mass = gaussian @ tilt @ gaussian.T
                rewards = gaussian @ (tilt * rewards) @ gaussian.T / mass
                values = torch.where(beta.isinf(), rewards, top + beta * mass.log())
            else:
                values, rewards = (gaussian @ v @ gaussian.T for v in (values, rewards))
                if free:
                    weight = beta[..., 0].clamp(max=1e9) / (2 * std**2)
                    for _axis in range(2):
                        moved = move_mean(values, rewards, weight, side)
                        values, rewards = (v.transpose(1, 2).contiguous() for v in moved)
        mean = policy.transition(latents, k, conditioning).mean.double()
        table = torch.cat([values, rewards]).flatten(1).T.contiguous()
        values, rewards = interpolate(table, mean, side).T.reshape(2, len(betas), n, n)
    return values, rewards, highest


def move_mean(values: Tensor, rewards: Tensor, weight: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """max over m of values(m) − weight (m − y)² along dim 1, and the rewards at that m.

    Args:
        values: ``[B, N, N]``, and so ``rewards``.
        rewards: to follow along.
        weight: ``[B, 1]``.
        side: ``[N]``, the coordinates of m and of y.
    """
    coarse = values.float()
    penalty = (weight[..., None] * (side - side[:, None]) ** 2).float()
    best = torch.stack([(coarse - penalty[:, i, :, None]).max(1).indices for i in range(len(side))], 1)
    near = [best.clamp(1, len(side) - 2) + j for j in (-1, 0, 1)]
    scores = [values.gather(1, i) - weight[..., None] * (side[i] - side[:, None]) ** 2 for i in near]
    bend = (scores[0] - 2 * scores[1] + scores[2]).clamp(max=-1e-300)
    t = ((scores[0] - scores[2]) / (2 * bend)).clamp(-1, 1)
    parabola = (t * (t - 1) / 2, 1 - t * t, t * (t + 1) / 2)
    found = [rewards.gather(1, i) for i in near]
    value, reward = (sum(p * f for p, f in zip(parabola, fs, strict=True)) for fs in (scores, found))
    return torch.as_tensor(value), torch.as_tensor(reward)


def interpolate(table: Tensor, points: Tensor, side: Tensor) -> Tensor:
    """Values ``[M, C]`` at ``points [M, 2]`` from those on the grid ``[N², C]``, by 4×4 cubic Lagrange.

    A point outside the grid takes the value at its edge.
    """
    place = ((points - side[0]) / (side[1] - side[0])).clamp(0, len(side) - 1)
    first = (place.floor() - 1).clamp(0, len(side) - 4)
    t = place - first
    factors = [[(t - j) / (i - j) for j in range(4) if j != i] for i in range(4)]
    x, y = torch.stack([a * b * c for a, b, c in factors], -1).unbind(1)
    i, j = (first.long()[..., None] + torch.arange(4)).unbind(1)
    cells, weights = i[:, :, None] * len(side) + j[:, None], x[:, :, None] * y[:, None]
    return embedding_bag(cells.flatten(1), table, per_sample_weights=weights.flatten(1), mode="sum")


@torch.no_grad()
def measure(
    policy: DenoisingPolicy, reference: DenoisingPolicy, n: int, seed: int, steps: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Rewards and trajectory KLs of n episodes a prompt, ``[P, n]`` float64 each.

    An episode's KL is Σ_k |μ − μ_ref|²/(2 std²) over the stochastic steps, at the states that the policy visits.

    Args:
        policy: acts; its MDP's P prompts are measured.
        reference: the base, with the same kernel.
        n: episodes a prompt.
        seed: of their noise.
        steps: where the policy acts, the reference acts at the others; default everywhere. The frontiers bound a
            policy that acts at (some of) the steps that they are for: at none that is deterministic.
    """
    mdp = policy.mdp
    index = mdp.drawn.repeat_interleave(n)
    conditioning = mdp.conditioning.rows(index)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(index), *mdp.model.latent_shape, generator=generator)
    kls = torch.zeros(len(index), dtype=torch.float64)
    for k in range(mdp.num_steps):
        transition = base = reference.transition(latents, k, conditioning)
        if steps is None or k in steps:
            transition = policy.transition(latents, k, conditioning)
        if policy.kernel.stochastic[k]:
            kls += transition.kl(base, "sum")
        latents = transition.sample(torch.randn(latents.shape, generator=generator))
    return mdp.score(latents, index).total.double().view(-1, n), kls.view(-1, n)


def load(model: str, kernel: str, policies: Policies = "any", path: Path = RESULTS) -> dict[str, Frontier]:
    """The frontiers that a run wrote, by prompt, and that of their means as "mean".

    Raises:
        ValueError: the file has none for this model, kernel and policies.
    """
    found = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        if (record["model"], record["kernel"], record["policies"]) == (model, kernel, policies):
            betas = (math.inf, *record["betas"][1:])
            found[record["prompt"]] = Frontier(betas, tuple(record["rewards"]), tuple(record["kls"]), record["highest"])
    if not found:
        raise ValueError(f"{path.name} has no frontier of {policies!r} policies for {model} with {kernel}")
    return found


def save(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write JSON, one frontier a line; infinity becomes null, numbers keep six digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return value if not isinstance(value, float) else None if math.isinf(value) else float(f"{value:.6g}")

    lines = [json.dumps({name: plain(value) for name, value in record.items()}) for record in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def table(found: dict[Policies, dict[str, Frontier]]) -> str:
    """Markdown: a row per β with the means over prompts."""
    means = [found[policies]["mean"] for policies in _LABELS]
    lines = [f"| β | {' | '.join(f'E[r], {label} | KL' for label in _LABELS.values())} |", "|--:|--:|--:|--:|--:|"]
    for i, beta in enumerate(means[0].betas):
        cells = " | ".join(f"{f.rewards[i]:.4f} | {f.kls[i]:.4f}" for f in means)
        lines.append(f"| {'∞' if math.isinf(beta) else f'{beta:g}'} | {cells} |")
    return "\n".join(lines)


def plot(panels: dict[str, dict[Policies, dict[str, Frontier]]], path: Path) -> None:
    """One panel a case: the means' frontiers, and thin ones of the prompts."""
    import matplotlib.pyplot as plt

    columns, rows = min(2, len(panels)), -(-len(panels) // 2)
    size = (4.5 * columns, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=False):
        for policies, style in zip(_LABELS, ("-", "--"), strict=True):
            for prompt, frontier in found[policies].items():
                kl = np.linspace(0, frontier.kls[-1] ** 0.5, 300) ** 2
                main = prompt == "mean"
                color, width, label = ("C0", 2.0, _LABELS[policies]) if main else ("0.7", 0.6, None)
                axis.plot(kl, frontier.reward_at(kl), style, color=color, lw=width, label=label, zorder=2 + main)
        axis.set(title=title, xlabel="KL to the base (nats)")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean reward")
    axes[0, 0].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, kernels = (sorted({case[i] for case in CASES}) for i in (0, 1))
    parser.add_argument("--model", choices=models, help="default: both")
    parser.add_argument("--kernel", choices=kernels, help="default: all that the model takes")
    parser.add_argument("--num-steps", type=int, default=10, help="K (default %(default)s)")
    parser.add_argument("--eta", type=float, help="the kernel's noise level (default: the kernel's own)")
    parser.add_argument("--spacing", type=float, help="of the grid (default: fine enough, see solve)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="a .json file, and a .png beside it (default: the committed results)"
    )
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.model in (None, case[0]) and options.kernel in (None, case[1])]
    if not cases:
        parser.error(f"--model {options.model} does not take --kernel {options.kernel}; the pairs are {CASES}")
    built = [DenoisingPolicy(DenoisingMDP.make(m, num_steps=options.num_steps), k, options.eta) for m, k in cases]
    records, panels = [], {}
    total = sum(2 * len(policy.mdp.drawn) for policy in built)
    with progress(total=total, desc="frontiers", leave=False) as bar:
        for (model, kernel), policy in zip(cases, built, strict=True):
            about = {"model": model, "kernel": kernel, "eta": policy.kernel.eta, "num_steps": options.num_steps}
            found: dict[Policies, dict[str, Frontier]] = {}
            for policies in _LABELS:
                solved = solve(policy, policies=policies, spacing=options.spacing, done=bar.update)
                found[policies] = {"mean": Frontier.mean(list(solved.values())), **solved}
                for prompt, frontier in found[policies].items():
                    records.append({**about, "policies": policies, "prompt": prompt, **asdict(frontier)})
            title = f"{model}, {kernel}, η = {policy.kernel.eta:g}, K = {options.num_steps}"
            panels[title] = found
    for title, found in panels.items():
        print(f"{title}; means over {len(policy.mdp.drawn)} prompts\n\n{table(found)}\n")
    save(records, options.out)
    plot(panels, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
