"""Every agent's gradients are those of its published objective.

The objectives are written out here in float64, from the papers' formulas and without the agents' code; central
differences along a random direction give their slope, at the weights of each optimizer step that the agent makes.
"""

import dataclasses
import functools
import math

import pytest
import torch

from agents.algorithms import AGENTS
from agents.policy import DenoisingPolicy
from agents.rollout import collect
from denoise_env.mdp import DenoisingMDP, row_generators

GROUP, PROMPTS, STEPS = 4, ("ring", "line"), 5
ROWS = GROUP * len(PROMPTS)


class Bench:
    """An agent in float64, its rollout, and every optimizer step's weights and gradients.

    The base weights are perturbed before the rollout (by ``away``) and again after it (by ``off``), so that
    reference, old and present policy all differ.
    """

    def __init__(self, name, model="points", kernel=None, *, off=0.0, away=0.1, last=None, rewards=None, **config):
        rewards = rewards or {"points": 1.0}
        mdp = DenoisingMDP.make(model, rewards, num_steps=STEPS)
        mdp.model.network.double()
        mdp.model.dtype = torch.float64
        reduction = config.pop("reduction", "mean")
        self.mdp, self.flow = mdp, model == "points-flow"
        self.policy = DenoisingPolicy(mdp, kernel, last_step=last, reduction=reduction)
        config = {"group_size": GROUP, "timestep_fraction": 1.0, "max_grad_norm": 1e9, "lr": 1e-3, **config}
        kind = AGENTS[name].config_type
        known = {field.name for field in dataclasses.fields(kind)}
        self.config = kind(**{key: value for key, value in config.items() if key in known})
        self.agent = AGENTS[name](self.policy, self.config, seed=3)
        self.agent.modules.double()
        self.critic = list(self.agent.modules.parameters())
        self.base = self.weights()
        torch.manual_seed(0)
        self.perturb(away)
        for p in self.critic:
            p.data.add_(0.1 * torch.randn_like(p))
        self.old_critic = [p.detach().clone() for p in self.critic]
        self.old = self.weights()
        self.kernel = "ddim" if not self.flow else (kernel or "dance_sde")
        generators = row_generators(range(50, 50 + ROWS))
        options = self.agent.rollout_options(1)
        with self.agent.rollout_weights():
            self.sampling = self.weights()
            self.rollout = collect(mdp, self.policy, generators, PROMPTS, **options)
        self.reward = {name: values.double() for name, values in self.rollout.scores.values.items()}
        self.total = sum(rewards[name] * values for name, values in self.reward.items())
        self.x = torch.cat([self.rollout.steps["latents"], self.rollout.final_latents[:, None]], 1)
        self.trained = list(
            range(STEPS if last == "sde" and not getattr(self.config, "drop_last", True) else STEPS - 1)
        )
        self.perturb(off)
        self.epoch = 0

    # --- Weights ---

    def weights(self):
        return [p.detach().clone() for p in self.agent.parameters]

    def perturb(self, scale):
        for p in self.agent.parameters:
            p.data.add_(scale * torch.randn_like(p))

    def load(self, weights):
        for p, w in zip(self.agent.parameters, weights, strict=True):
            p.data.copy_(w)

    def at(self, weights, function):
        now = self.weights()
        self.load(weights)
        with torch.no_grad():
            result = function()
        self.load(now)
        return result

    # --- The model, and its Gaussians from the papers' formulas ---

    def predict(self, x, k, rows=slice(None), prompts=None):
        k = torch.as_tensor(k)
        timestep = self.mdp.schedule.timesteps[k]
        index = self.rollout.prompt_index[rows] if prompts is None else prompts
        return self.mdp.model.predict(x, timestep, self.mdp.conditioning.rows(index))

    def std(self, k):
        sigmas, alphas = self.mdp.schedule.sigmas, self.mdp.schedule.alphas
        s, after = float(sigmas[k]), float(sigmas[k + 1])
        drop = s - after
        if self.kernel == "ddim":
            a, b = float(alphas[k]) ** 2, float(alphas[k + 1]) ** 2
            return math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        return self.noise_level(k) * math.sqrt(drop)

    def noise_level(self, k):
        """s of the SDE: k = s√Δ."""
        sigmas = self.mdp.schedule.sigmas
        s = float(sigmas[k])
        if self.kernel == "dance_sde":
            return 0.3
        return 0.7 * math.sqrt(s / (1 - (s if s < 1 else float(sigmas[k + 1]))))

    def mean(self, k, x=None):
        """μ_θ of step k at the recorded states, ``[B, 2]``."""
        x = self.x[:, k] if x is None else x
        out = self.predict(x, k)
        sigmas, alphas = self.mdp.schedule.sigmas, self.mdp.schedule.alphas
        s, drop = float(sigmas[k]), float(sigmas[k] - sigmas[k + 1])
        if self.kernel == "ddim":
            a, b = float(alphas[k]) ** 2, float(alphas[k + 1]) ** 2
            x0 = (x - math.sqrt(1 - a) * out) / math.sqrt(a)
            return math.sqrt(b) * x0 + math.sqrt(1 - b - self.std(k) ** 2) * out
        noise = self.noise_level(k) ** 2
        return x * (1 - noise * drop / (2 * s)) - drop * out * (1 + noise * (1 - s) / (2 * s))

    def log_prob(self, k, reduce="mean"):
        z = (self.x[:, k + 1] - self.mean(k)) / self.std(k)
        terms = -(z**2) / 2 - math.log(self.std(k)) - math.log(2 * math.pi) / 2
        return terms.mean(1) if reduce == "mean" else terms.sum(1)

    def old_log_prob(self, k, reduce="mean"):
        return self.at(self.old, lambda: self.log_prob(k, reduce))

    def size(self, k):
        """The step's size: Δ on a flow, |∂μ/∂output| on a diffusion."""
        sigmas, alphas = self.mdp.schedule.sigmas, self.mdp.schedule.alphas
        if self.flow:
            return float(sigmas[k] - sigmas[k + 1])
        a, b = float(alphas[k]) ** 2, float(alphas[k + 1]) ** 2
        return abs(math.sqrt(1 - b - self.std(k) ** 2) - math.sqrt(b * (1 - a) / a))

    def kl(self, k, other):
        """mean (μ_θ − μ_other)² / (2 k²), ``[B]``."""
        gap = self.mean(k) - self.at(other, lambda: self.mean(k))
        return (gap**2).mean(1) / (2 * self.std(k) ** 2)

    # --- Running the agent, and comparing ---

    def update(self, iteration=1):
        """Every optimizer step's weights and gradients, the policy's and the critic's."""
        found = []

        def record(optimizer, args, kwargs):
            gradients = [p.grad.clone() for p in self.agent.parameters]
            critic = [(p.detach().clone(), p.grad.clone()) for p in self.critic]
            found.append((self.weights(), gradients, critic))

        handle = self.agent.optimizer.register_step_pre_hook(record)
        self.figures = self.agent.update(self.rollout, iteration)
        handle.remove()
        return found

    def check(self, objective, iteration=1, rel=1e-4):
        """``objective(rows)`` is the published loss over some of the episodes, at the present weights."""
        steps = self.update(iteration)
        parts = self.config.updates_per_rollout
        assert len(steps) == parts * self.config.epochs
        for i, (weights, gradients, _) in enumerate(steps):
            size, self.epoch = ROWS // parts, i // parts
            rows = torch.arange(ROWS)[(i % parts) * size : (i % parts + 1) * size]
            torch.manual_seed(7 + i)
            for _ in range(2):
                direction = [torch.randn_like(w) for w in weights]
                slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
                h = 1e-6
                ends = []
                for sign in (1, -1):
                    moved = [w + sign * h * d for w, d in zip(weights, direction, strict=True)]
                    ends.append(float(self.at(moved, lambda rows=rows: objective(rows))))
                assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=rel, abs=1e-6)
                assert abs(slope) > 1e-4
        return steps


# --- Advantages, written out ---


def normalised(rewards, std="group", epsilon=1e-8, divisor=GROUP - 1):
    """(r − group mean) / (std + ε), ``[B]``; std: of the group, pooled over all groups, or of all rewards."""
    groups = rewards.view(-1, GROUP)
    gap = groups - groups.mean(1, keepdim=True)
    own = (gap**2).sum(1, keepdim=True) / divisor
    variance = own if std == "group" else (gap**2).sum() / (len(groups) * (GROUP - 1))
    if std == "rewards":  # as numpy's std
        variance = ((rewards - rewards.mean()) ** 2).mean()
    return (gap / (variance.sqrt() + epsilon)).flatten()


def clipped(advantage, ratio, clip):
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def policy_loss(bench, per_step, rows, steps=None):
    """Mean over ``rows`` and trained steps of ``per_step(k) [B]``."""
    steps = bench.trained if steps is None else steps
    return torch.stack([per_step(k)[rows] for k in steps]).mean()


def grpo_loss(bench, advantage, rows, steps=None, weights=None, extra=None, reduce="mean"):
    clip = bench.config.clip_range

    def per_step(k):
        ratio = (bench.log_prob(k, reduce) - bench.old_log_prob(k, reduce)).exp()
        loss = clipped(advantage, ratio, clip) * (1 if weights is None else weights[k])
        return loss if extra is None else loss + extra(k)

    return policy_loss(bench, per_step, rows, steps)


def some_are_clipped(bench):
    assert 0 < bench.figures["clip_fraction"] < 1


# --- GRPO and its family ---

WORLDS = [("points", None), ("points-flow", "dance_sde"), ("points-flow", "flow_sde")]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("off", [0.0, 0.1])
def test_the_gaussians_written_out_here_are_the_rollouts(world, off):
    """What every test below rests on: these formulas gave the recorded log-probs."""
    bench = Bench("grpo", *world, off=off)
    for k in bench.trained:
        recorded = bench.rollout.steps["action_log_prob"][:, k].double()
        torch.testing.assert_close(bench.old_log_prob(k), recorded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("options", [{}, {"updates_per_rollout": 2, "lr": 0.02}, {"epochs": 2, "lr": 0.02}])
def test_grpo(world, options):
    bench = Bench("grpo", *world, off=0.02, clip_range=0.03, **options)
    advantage = normalised(bench.total)
    bench.check(lambda rows: grpo_loss(bench, advantage, rows))
    some_are_clipped(bench)


def test_grpo_with_kl_and_a_summed_log_prob():
    bench = Bench("grpo", off=0.05, clip_range=0.1, kl_coef=0.3, reduction="sum")
    advantage = normalised(bench.total)

    def kl(k):  # summed over the two dimensions
        return 0.3 * 2 * bench.kl(k, bench.base)

    bench.check(lambda rows: grpo_loss(bench, advantage, rows, extra=kl, reduce="sum"))
    some_are_clipped(bench)


def test_grpo_weighs_the_policy_loss_and_not_the_kl():
    bench = Bench("grpo", off=0.05, clip_range=0.1, kl_coef=0.3, step_weighting="std")
    stds = [bench.std(k) for k in bench.trained]
    weights = [std / (sum(stds) / len(stds)) for std in stds]
    advantage = normalised(bench.total)
    bench.check(
        lambda rows: grpo_loss(bench, advantage, rows, weights=weights, extra=lambda k: 0.3 * bench.kl(k, bench.base))
    )


def leftness(images, prompts):
    return -images[:, 0].float()


def upness(images, prompts):
    return images[:, 1].float() ** 2


TWO = {f"{__name__}:leftness": 0.7, f"{__name__}:upness": 1.4}


AGGREGATIONS = ["advantages", "losses", "rewards"]


def of_two_rewards(bench, how, advantage, loss, clip):
    """The objective: ``advantage`` of rewards, ``loss`` of advantages and rows, advantages cut at ± ``clip``."""
    assert (math.prod(normalised(values) for values in bench.reward.values()) < 0).any()
    if how == "losses":
        own = {name: advantage(values).clamp(-clip, clip) for name, values in bench.reward.items()}
        return lambda rows: sum(TWO[name] * loss(a, rows) for name, a in own.items())
    if how == "advantages":
        whole = sum(TWO[name] * advantage(values) for name, values in bench.reward.items())
    else:
        whole = advantage(sum(TWO[name] * values for name, values in bench.reward.items()))
    return lambda rows: loss(whole.clamp(-clip, clip), rows)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_grpo_of_two_rewards(how):
    bench = Bench("grpo", off=0.1, clip_range=0.05, advantage_clip=1.1, reward_aggregation=how, rewards=TWO)
    bench.check(of_two_rewards(bench, how, normalised, lambda a, rows: grpo_loss(bench, a, rows), 1.1))
    some_are_clipped(bench)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("name", ["ddpo-sf", "ddpo-is"])
def test_ddpo_of_two_rewards(name, how):
    options = {"tracker_min_count": 4, "clip_range": 0.03, "advantage_clip": 1.1, "reward_aggregation": how}
    bench = Bench(name, off=0.05, rewards=TWO, **options)
    prompts = bench.rollout.prompt_index

    def advantage(rewards):
        known = {p: rewards[prompts == p] for p in prompts.tolist()}
        return tracked(rewards, prompts.tolist(), known, 4)

    def loss(a, rows):
        if name == "ddpo-is":
            return grpo_loss(bench, a, rows)
        return policy_loss(bench, lambda k: -a * bench.log_prob(k), rows)

    bench.check(of_two_rewards(bench, how, advantage, loss, 1.1))
    kept = [bench.total] if how == "rewards" else list(bench.reward.values())
    trackers = list(bench.agent.modules.values())
    assert len(trackers) == len(kept)
    for tracker, values in zip(trackers, kept, strict=True):
        for prompt in set(prompts.tolist()):
            torch.testing.assert_close(tracker.values[prompt, :GROUP], values[prompts == prompt])


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_rloo_of_two_rewards(how):
    """Its loss is linear in the rewards: the three are one."""
    bench = Bench("rloo", off=0.02, rewards=TWO, reward_aggregation=how)
    groups = bench.total.view(-1, GROUP)
    advantage = ((groups - groups.mean(1, keepdim=True)) * GROUP / (GROUP - 1)).flatten()
    bench.check(lambda rows: policy_loss(bench, lambda k: -advantage * bench.log_prob(k), rows))


@pytest.mark.parametrize(("scaling", "beta"), [("code", 40.0), ("mean", 4.0), ("paper", 4.0)])
def test_flow_grpo(scaling, beta):
    options = {"kl_scaling": scaling, "kl_coef": beta, "clip_range": 0.03}
    bench = Bench("flow-grpo", "points-flow", "flow_sde", off=0.03, **options)
    advantage = normalised(bench.total, "rewards", 1e-4)

    def kl(k):
        """As published: the paper's in terms of v and s, the code's in terms of the means."""
        s, sigma = bench.noise_level(k), float(bench.mdp.schedule.sigmas[k])
        drop = float(bench.mdp.schedule.sigmas[k] - bench.mdp.schedule.sigmas[k + 1])
        x = bench.x[:, k]
        gap = bench.predict(x, k) - bench.at(bench.base, lambda: bench.predict(x, k))
        if scaling == "paper":
            return beta * drop / 2 * (s * (1 - sigma) / (2 * sigma) + 1 / s) ** 2 * (gap**2).sum(1)
        means = bench.mean(k) - bench.at(bench.base, lambda: bench.mean(k))
        return beta * (means**2).mean(1) / (2 * s**2 * (drop if scaling == "mean" else 1))

    bench.check(lambda rows: grpo_loss(bench, advantage, rows, extra=kl))
    some_are_clipped(bench)


@pytest.mark.parametrize("name", ["flow-grpo-fast", "mix-grpo", "tempflow"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("iteration", [1, 2, 5])
def test_windowed_agents(name, world, iteration):
    """SDE and loss inside the window, the ODE outside."""
    size = 1 if name == "tempflow" else 2
    options = {"window_size": size, "window_every": 1, "share_prefix": False, "kl_coef": 0.2, "clip_range": 0.02}
    bench = Bench(name, *world, off=0.03, window_reach="all", **options)
    generators = row_generators(range(50, 50 + ROWS))
    now = bench.weights()
    bench.load(bench.old)
    options = bench.agent.rollout_options(iteration)
    bench.rollout = collect(bench.mdp, bench.policy, generators, PROMPTS, **options)
    bench.load(now)
    bench.x = torch.cat([bench.rollout.steps["latents"], bench.rollout.final_latents[:, None]], 1)
    steps = bench.agent.window(iteration)
    assert len(steps) == size
    recorded = bench.rollout.steps["action_log_prob"]
    assert recorded.isfinite().nonzero()[:, 1].unique().tolist() == steps
    sigmas, alphas = bench.mdp.schedule.sigmas, bench.mdp.schedule.alphas
    for k in set(range(STEPS)) - set(steps):
        x = bench.x[:, k]
        out = bench.at(bench.old, lambda x=x, k=k: bench.predict(x, k))
        if bench.flow:
            ode = x - (sigmas[k] - sigmas[k + 1]) * out
        else:
            ode = alphas[k + 1] * (x - sigmas[k] * out) / alphas[k] + sigmas[k + 1] * out
        torch.testing.assert_close(bench.x[:, k + 1], ode)
    scores = bench.rollout.scores.total.double()
    published = name == "flow-grpo-fast"
    std = {"flow-grpo-fast": ("rewards", 1e-4), "mix-grpo": ("group", 1e-8), "tempflow": ("group", 1e-4, GROUP)}
    advantage = normalised(scores, *std[name])
    stds = [bench.std(k) for k in range(STEPS - 1)]
    weights = [std / (sum(stds) / len(stds)) for std in stds] if name == "tempflow" else None

    def kl(k):  # Flow-GRPO's code divides by s² alone, the others by std² = s²Δ
        return 0.2 * (bench.size(k) if published else 1) * bench.kl(k, bench.base)

    bench.check(lambda rows: grpo_loss(bench, advantage, rows, steps, weights, kl), iteration)


@pytest.mark.parametrize("world", WORLDS)
def test_tempflow_with_several_branches(world):
    """Two siblings at each of two steps of a trajectory: each is trained at its own step, against its sibling."""
    options = {"window_size": 2, "window_strategy": "scattered", "branches": 2, "kl_coef": 0.2, "clip_range": 0.02}
    bench = Bench("tempflow", *world, off=0.03, updates_per_rollout=2, lr=0.01, **options)
    steps = bench.agent.window(1)
    pairs = bench.total.view(-1, 2)
    deviation = pairs - pairs.mean(1, keepdim=True)
    advantage = (deviation / ((deviation**2).mean(1, keepdim=True).sqrt() + 1e-4)).flatten()
    own = torch.tensor([steps[i // 2 % 2] for i in range(ROWS)])
    stds = [bench.std(k) for k in range(STEPS - 1)]

    def objective(rows):
        loss = torch.zeros(ROWS).double()
        for k in steps:
            ratio = (bench.log_prob(k) - bench.old_log_prob(k)).exp()
            weighed = clipped(advantage, ratio, 0.02) * stds[k] / (sum(stds) / len(stds))
            loss = torch.where(own == k, weighed + 0.2 * bench.kl(k, bench.base), loss)
        return loss[rows].mean()

    bench.check(objective)
    some_are_clipped(bench)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("form", ["log-probs", "means"])
def test_grpo_guard(world, balance, form):
    bench = Bench("grpo-guard", *world, off=0.02, clip_range=3e-3, balance=balance, updates_per_rollout=2, lr=0.01)
    advantage = normalised(bench.total, epsilon=1e-4, divisor=GROUP)

    def per_step(k):
        std, mean = bench.std(k), bench.mean(k)
        old = bench.at(bench.old, lambda: bench.mean(k))
        if form == "means":
            e = (bench.x[:, k + 1] - old) / std
            ratio = (e * (mean - old)).mean(1).exp()
        else:
            bias = ((mean - old) ** 2).mean(1) / (2 * std**2)
            ratio = (std * (bench.log_prob(k) - bench.old_log_prob(k) + bias)).exp()
        loss = clipped(advantage, ratio, 3e-3)
        return loss / bench.size(k) if balance else loss

    bench.check(lambda rows: policy_loss(bench, per_step, rows))
    some_are_clipped(bench)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_flow_dppo(world, reduce):
    options = {"clip_range": 2e-3, "updates_per_rollout": 2, "lr": 0.01, "reduction": reduce}
    options |= {"window_strategy": "frozen", "window_reach": "all", "window_size": STEPS - 1}
    bench = Bench("flow-dppo", *world, off=0.02, advantage_std="group", **options)
    advantage = normalised(bench.total)
    seen = set()

    def per_step(k):
        ratio = (bench.log_prob(k, reduce) - bench.old_log_prob(k, reduce)).exp()
        kl = bench.kl(k, bench.old) * (1 if reduce == "mean" else 2)
        outward = ((advantage > 0) & (ratio > 1)) | ((advantage < 0) & (ratio < 1))
        seen.update(zip((kl >= 2e-3).tolist(), outward.tolist(), strict=True))
        return torch.where((kl >= 2e-3) & outward, 0.0, -advantage * ratio)

    bench.check(lambda rows: policy_loss(bench, per_step, rows))
    assert len(seen) == 4  # near and far, inward and outward
    some_are_clipped(bench)


# --- DDPO, DPOK, PPO, RLOO ---


def tracked(rewards, prompts, known, minimum):
    """DDPO's tracker, a list per prompt: (r − mean) / (population std + 1e-6)."""
    result = torch.zeros_like(rewards)
    for i, prompt in enumerate(prompts):
        values = known[prompt] if len(known[prompt]) >= minimum else rewards
        result[i] = (rewards[i] - values.mean()) / (values.std(correction=0) + 1e-6)
    return result


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("minimum", [4, 16])
@pytest.mark.parametrize("name", ["ddpo-sf", "ddpo-is"])
def test_ddpo(world, minimum, name):
    options = {"tracker_min_count": minimum, "clip_range": 0.03, "advantage_clip": 1.2}
    if name == "ddpo-is":
        options |= {"updates_per_rollout": 2, "lr": 0.01}
    bench = Bench(name, *world, off=0.02, last="sde", **options)
    assert len(bench.trained) == STEPS if bench.std(STEPS - 1) > 0 else True
    if bench.std(STEPS - 1) == 0:
        bench.trained = bench.trained[:-1]
    prompts = bench.rollout.prompt_index.tolist()
    known = {p: bench.total[bench.rollout.prompt_index == p] for p in prompts}
    advantage = tracked(bench.total, prompts, known, minimum).clamp(-1.2, 1.2)
    if name == "ddpo-is":
        bench.check(lambda rows: grpo_loss(bench, advantage, rows))
        some_are_clipped(bench)
    else:
        bench.check(lambda rows: policy_loss(bench, lambda k: -advantage * bench.log_prob(k), rows))


def test_ddpo_normalised_by_the_batch():
    bench = Bench("ddpo-is", off=0.02, clip_range=0.03, normalisation="batch")
    advantage = (bench.total - bench.total.mean()) / (bench.total.std() + 1e-8)
    bench.check(lambda rows: grpo_loss(bench, advantage, rows))


def test_rloo():
    for world in WORLDS:
        bench = Bench("rloo", *world, off=0.02, kl_coef=0.2)
        groups = bench.total.view(-1, GROUP)
        others = torch.stack([groups[:, [j for j in range(GROUP) if j != i]].mean(1) for i in range(GROUP)], 1)
        advantage = (groups - others).flatten()
        bench.check(
            lambda rows, bench=bench, advantage=advantage: policy_loss(
                bench, lambda k: -advantage * bench.log_prob(k) + 0.2 * bench.kl(k, bench.base), rows
            )
        )


def values_of(bench, parameters, k):
    """V(x_k, k, c) with other critic weights."""
    now = [p.detach().clone() for p in bench.critic]
    for p, w in zip(bench.critic, parameters, strict=True):
        p.data.copy_(w)
    pooled = torch.nn.functional.one_hot(bench.rollout.prompt_index, 6).double()
    with torch.no_grad():
        result = bench.agent.critic(bench.x[:, k], torch.full((ROWS,), k), pooled)
    for p, w in zip(bench.critic, now, strict=True):
        p.data.copy_(w)
    return result


def advantages_by_hand(bench, gamma, lam, costs):
    """GAE as a double sum, and the critic's targets, ``[B, K]``."""
    values = [values_of(bench, bench.old_critic, k) for k in range(STEPS)] + [torch.zeros(ROWS).double()]
    rewards = [-costs[k] for k in range(STEPS)]
    rewards[-1] = rewards[-1] + bench.total
    deltas = [rewards[k] + gamma * values[k + 1] - values[k] for k in range(STEPS)]
    sums = [sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, STEPS)) for k in range(STEPS)]
    advantage = torch.stack(sums, 1)
    return advantage, advantage + torch.stack(values[:-1], 1)


def check_critic(bench, steps, targets, coefficient):
    """The critic's gradient is that of c · mean (V − target)²."""
    for i, (_, _, critic) in enumerate(steps):
        size = ROWS // bench.config.updates_per_rollout
        rows = slice(i * size, (i + 1) * size)
        weights, gradients = zip(*critic, strict=True)
        torch.manual_seed(1)
        direction = [torch.randn_like(w) for w in weights]
        ends = []
        for sign in (1, -1):
            moved = [w + sign * 1e-6 * d for w, d in zip(weights, direction, strict=True)]
            errors = [(values_of(bench, moved, k) - targets[:, k])[rows] ** 2 for k in range(STEPS)]
            ends.append(coefficient * float(torch.stack(errors).mean()))
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)
        assert abs(slope) > 1e-3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kl_reward", "gamma", "lam"), [(0.0, 0.9, 0.8), (0.5, 1.0, 0.95), (0.0, 1.0, 1.0)])
def test_ppo(world, kl_reward, gamma, lam):
    options = {"gamma": gamma, "gae_lambda": lam, "kl_reward": kl_reward, "value_coef": 0.5}
    bench = Bench("ppo", *world, off=0.02, clip_range=0.03, updates_per_rollout=2, lr=0.01, critic_lr=0.01, **options)
    costs = [torch.zeros(ROWS).double() for _ in range(STEPS)]
    for k in range(STEPS - 1 if kl_reward else 0):  # the last step is deterministic
        costs[k] = kl_reward * (bench.old_log_prob(k) - bench.at(bench.base, lambda k=k: bench.log_prob(k)))
    advantage, targets = advantages_by_hand(bench, gamma, lam, costs)
    if lam == gamma == 1:
        first = bench.total - values_of(bench, bench.old_critic, 0)
        torch.testing.assert_close(advantage[:, 0], first)
    white = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).clamp(-5, 5)

    def per_step(k):
        ratio = (bench.log_prob(k) - bench.old_log_prob(k)).exp()
        return clipped(white[:, k], ratio, 0.03)

    steps = bench.check(lambda rows: policy_loss(bench, per_step, rows))
    some_are_clipped(bench)
    check_critic(bench, steps, targets, 0.5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scaling", ["code", "paper"])
def test_dpok(world, scaling):
    options = {"reward_weight": 3.0, "kl_coef": 0.4, "kl_scaling": scaling, "critic_lr": 0.01, "clip_range": 0.03}
    bench = Bench("dpok", *world, off=0.02, updates_per_rollout=2, lr=0.01, **options)
    zero = [torch.zeros(ROWS).double()] * STEPS
    advantage, _targets = advantages_by_hand(bench, 1.0, 1.0, zero)
    for k in range(STEPS):
        torch.testing.assert_close(advantage[:, k], bench.total - values_of(bench, bench.old_critic, k))

    def per_step(k):
        gap = bench.predict(bench.x[:, k], k) - bench.at(bench.base, lambda: bench.predict(bench.x[:, k], k))
        pull = (gap**2).mean(1) if scaling == "code" else bench.kl(k, bench.base)
        ratio = (bench.log_prob(k) - bench.old_log_prob(k)).exp()
        return -3.0 * advantage[:, k] * ratio.clamp(1 - 0.03, 1 + 0.03) + 0.4 * pull

    steps = bench.check(lambda rows: policy_loss(bench, per_step, rows))
    some_are_clipped(bench)
    check_critic(bench, steps, bench.total[:, None].expand(-1, STEPS), 1.0)


# --- Final samples ---


def noised(bench, x0, step, noise):
    """x_t and the right output: ε on a diffusion, ε − x0 on a flow."""
    schedule = bench.mdp.schedule
    alpha, sigma = schedule.alphas[step][:, None], schedule.sigmas[step][:, None]
    return alpha * x0 + sigma * noise, noise - x0 if bench.flow else noise


def pred_x0(bench, x, out, step):
    alpha, sigma = bench.mdp.schedule.alphas[step][:, None], bench.mdp.schedule.sigmas[step][:, None]
    return x - sigma * out if bench.flow else (x - sigma * out) / alpha


def matching_loss(bench, per_draw, iteration=1):
    """Mean of ``per_draw(x0, noisy, target, step, rows)`` over rows and their draws of (step, noise)."""
    draws, times = bench.agent.draws(bench.rollout.seeds, iteration), bench.config.draws_per_sample
    x0 = bench.rollout.final_latents

    def objective(rows):
        losses = []
        for j in range(bench.epoch * times, (bench.epoch + 1) * times):
            step, noise = draws["step"][rows, j], draws["noise"][rows, j].double()
            noisy, target = noised(bench, x0[rows], step, noise)
            losses.append(per_draw(x0[rows], noisy, target, step, rows, j))
        return torch.stack(losses).mean()

    return objective


FINAL = [("points", None), ("points-flow", None)]


@pytest.mark.parametrize("world", FINAL)
@pytest.mark.parametrize("normalise", [True, False])
def test_rwr(world, normalise):
    options = {"temperature": 0.3, "normalise": normalise, "reference_coef": 0.2, "updates_per_rollout": 2}
    bench = Bench("rwr", *world, off=0.1, **options)
    weight = (bench.total / 0.3).exp()
    weight = weight / weight.mean() if normalise else weight

    def per_draw(x0, noisy, target, step, rows, j):
        out = bench.predict(noisy, step, rows)
        base = bench.at(bench.base, lambda: bench.predict(noisy, step, rows))
        return weight[rows] * ((out - target) ** 2).mean(1) + 0.2 * ((out - base) ** 2).mean(1)

    bench.check(matching_loss(bench, per_draw))


@pytest.mark.parametrize("world", FINAL)
@pytest.mark.parametrize(("b", "adaptive", "clip"), [(1.0, True, 5.0), (0.3, True, 1.0), (0.6, False, 2.0)])
def test_nft(world, b, adaptive, clip):
    options = {"strength": b, "adaptive": adaptive, "advantage_clip": clip, "reference_coef": 0.05}
    bench = Bench("nft", *world, off=0.1, updates_per_rollout=2, lr=0.01, **options)
    for old, p in zip(bench.agent.old.values(), bench.weights(), strict=True):
        old.copy_(p + 0.05 * torch.randn_like(p))  # base, sampling and present weights all differ
    sampling = [old.clone() for old in bench.agent.old.values()]
    q = (normalised(bench.total, "rewards", 1e-4).clamp(-clip, clip) / clip + 1) / 2
    assert q.min() >= 0
    assert q.max() <= 1

    # w± carries no gradient: it is taken at the weights of the optimizer step
    def objective_at(weights):
        def per_draw(x0, noisy, target, step, rows, j):
            def sides(out):
                old = bench.at(sampling, lambda: bench.predict(noisy, step, rows))
                both = b * out + (1 - b) * old, (1 + b) * old - b * out
                return [pred_x0(bench, noisy, v, step) - x0 for v in both]

            out = bench.predict(noisy, step, rows)
            now = bench.at(weights, lambda: bench.predict(noisy, step, rows))
            floors = [gap.abs().mean(1).clamp(min=1e-5) if adaptive else 1.0 for gap in sides(now)]
            plus, minus = [(gap**2).mean(1) / floor for gap, floor in zip(sides(out), floors, strict=True)]
            base = bench.at(bench.base, lambda: bench.predict(noisy, step, rows))
            loss = clip * (q[rows] * plus + (1 - q[rows]) * minus) / b
            return loss + 0.05 * ((out - base) ** 2).mean(1)

        return matching_loss(bench, per_draw)

    steps = bench.update()
    for i, (weights, gradients, _) in enumerate(steps):
        rows = torch.arange(ROWS)[i * ROWS // 2 : (i + 1) * ROWS // 2]
        compare(bench, weights, gradients, lambda rows=rows, weights=weights: objective_at(weights)(rows))


def compare(bench, weights, gradients, objective, rel=1e-4):
    """The gradient along a random direction is the objective's slope."""
    torch.manual_seed(5)
    direction = [torch.randn_like(w) for w in weights]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    ends = [
        float(bench.at([w + h * d for w, d in zip(weights, direction, strict=True)], objective)) for h in (1e-6, -1e-6)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=rel, abs=1e-6)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("world", FINAL)
@pytest.mark.parametrize(
    ("std", "form", "likelihood", "slow"),
    [("batch", "unbiased", "uniform", 0.0), ("group", "unbiased", "ghuber", 0.7), ("group", "population", "ghuber", 0)],
)
def test_awm(world, std, form, likelihood, slow):
    options = {"advantage_std": std, "std_form": form, "clip_range": 0.02, "reference_coef": 0.3, "advantage_clip": 1.2}
    options |= {"likelihood": likelihood, "slow_coef": slow, "unit_advantages": slow > 0}
    bench = Bench("awm", *world, off=0.1, updates_per_rollout=2, epochs=2, lr=0.02, **options)
    assert bool(bench.agent.old) == (slow > 0)
    for old in bench.agent.old.values():
        old.add_(0.05 * torch.randn_like(old))
    start, followed = bench.weights(), [old.clone() for old in bench.agent.old.values()]
    advantage = normalised(bench.total, std, 1e-4, GROUP - 1 if form == "unbiased" else GROUP).clamp(-1.2, 1.2)
    advantage = advantage / 1.2 if slow else advantage

    def log_likelihood(error, step):
        if likelihood == "uniform":
            return -error
        return -bench.mdp.schedule.sigmas[step] * 4 * ((error + 1e-10) ** 0.25 - 1e-10**0.25)

    def per_draw(x0, noisy, target, step, rows, j):
        out = bench.predict(noisy, step, rows)
        old, base = (bench.at(w, lambda: bench.predict(noisy, step, rows)) for w in (start, bench.base))
        now, before = (log_likelihood(((o - target) ** 2).mean(1), step) for o in (out, old))
        ratio = (now - before).exp()
        loss = clipped(advantage[rows], ratio, 0.02) + 0.3 * ((out - base) ** 2).mean(1)
        if slow:
            loss = loss + slow * ((out - bench.at(followed, lambda: bench.predict(noisy, step, rows))) ** 2).mean(1)
        return loss

    bench.check(matching_loss(bench, per_draw), rel=1e-3)
    some_are_clipped(bench)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_awm_of_two_rewards(how):
    options = {"clip_range": 0.02, "reference_coef": 0.2, "advantage_clip": 1.1, "reward_aggregation": how}
    options |= {"likelihood": "uniform", "slow_coef": 0.3, "unit_advantages": False}
    bench = Bench("awm", off=0.1, updates_per_rollout=2, lr=0.02, rewards=TWO, **options)
    start = bench.weights()

    def loss(a, rows):
        def per_draw(x0, noisy, target, step, rows, j):
            out, old = bench.predict(noisy, step, rows), bench.at(start, lambda: bench.predict(noisy, step, rows))
            ratio = (((old - target) ** 2).mean(1) - ((out - target) ** 2).mean(1)).exp()
            return clipped(a[rows], ratio, 0.02)

        return matching_loss(bench, per_draw)(rows)

    def pull(x0, noisy, target, step, rows, j):  # to the reference and to the slow weights, which still agree: once
        gap = bench.predict(noisy, step, rows) - bench.at(bench.base, lambda: bench.predict(noisy, step, rows))
        return 0.5 * (gap**2).mean(1)

    rewarded = of_two_rewards(bench, how, lambda r: normalised(r, "rewards", 1e-4), loss, 1.1)
    bench.check(lambda rows: rewarded(rows) + matching_loss(bench, pull)(rows), rel=1e-3)


def far_apart(bench):
    """Weights that the old ones now are, other than the base, the sampling and the present ones."""
    for old, p in zip(bench.agent.old.values(), bench.weights(), strict=True):
        old.copy_(p + 0.05 * torch.randn_like(p))
    return [old.clone() for old in bench.agent.old.values()]


def check_parts(bench, objective_at):
    """Every optimizer step's gradient is that of ``objective_at(its weights)(rows)``."""
    for i, (weights, gradients, _) in enumerate(bench.update()):
        rows = torch.arange(ROWS)[i * ROWS // 2 : (i + 1) * ROWS // 2]
        compare(bench, weights, gradients, lambda rows=rows, weights=weights: objective_at(weights)(rows))


@pytest.mark.parametrize("world", FINAL)
@pytest.mark.parametrize("clip", [1e9, 5e-3])
def test_dgpo(world, clip):
    """Without a clip it is −log σ(−S)/β of every group, differentiated as it stands."""
    options = {"beta": 30.0, "reference_coef": 0.2, "clip_range": clip, "updates_per_rollout": 2, "lr": 0.01}
    bench = Bench("dgpo", *world, off=0.1, **options)
    old = far_apart(bench)
    advantage = normalised(bench.total, "group", 1e-4, GROUP)
    frozen = []

    def objective_at(weights):
        def per_draw(x0, noisy, target, step, rows, j):
            def error():
                return ((bench.predict(noisy, step, rows) - target) ** 2).mean(1)

            def preference(d):
                gain = advantage[rows] * (d - bench.at(bench.base, error))
                return 30.0 * gain.view(-1, GROUP).mean(1)

            pull = bench.predict(noisy, step, rows) - bench.at(bench.base, lambda: bench.predict(noisy, step, rows))
            pull = 0.2 * (pull**2).mean(1).view(-1, GROUP).mean(1)
            if clip > 1e6:
                return torch.nn.functional.softplus(preference(error())) / 30.0 + pull
            now = bench.at(weights, error)
            ratio = (bench.at(old, error) - now).exp()
            a = advantage[rows]
            far = ((a > 0) & (ratio > 1 + clip)) | ((a < 0) & (ratio < 1 - clip))
            frozen.append(far.double().mean())
            share = torch.sigmoid(preference(now)).repeat_interleave(GROUP)
            return (share * a * torch.where(far, now, error())).view(-1, GROUP).mean(1) + pull

        return matching_loss(bench, per_draw)

    check_parts(bench, objective_at)
    if frozen:
        assert 0 < sum(frozen) / len(frozen) < 1
        some_are_clipped(bench)


def test_dgpos_first_loss_is_half_the_weighted_error():
    """At the start S is 0 and σ(S) a half."""
    bench = Bench("dgpo", away=0.0, reference_coef=0.3)
    advantage = normalised(bench.total, "group", 1e-4, GROUP)

    def per_draw(x0, noisy, target, step, rows, j):
        return 0.5 * advantage[rows] * ((bench.predict(noisy, step, rows) - target) ** 2).mean(1)

    expected = bench.at(bench.base, lambda: matching_loss(bench, per_draw)(torch.arange(ROWS)))
    bench.update()
    assert bench.figures["loss"] == pytest.approx(float(expected), rel=1e-4, abs=1e-7)
    assert bench.figures["ratio_deviation"] == 0


@pytest.mark.parametrize("world", FINAL)
@pytest.mark.parametrize("centring", ["update", "group"])
def test_crd(world, centring):
    options = {"beta": 0.7, "reference_coef": 0.2, "reference_floor": 0.05, "centring": centring}
    bench = Bench("crd", *world, off=0.1, advantage_clip=1.1, updates_per_rollout=2, lr=0.01, **options)
    old = far_apart(bench)
    a = normalised(bench.total, "rewards", 1e-4).clamp(-1.1, 1.1) / 2.2 + 0.5

    def centred(values):
        groups = values.view(-1, GROUP) if centring == "group" else values[None]
        return (groups - groups.mean(1, keepdim=True)).flatten()

    def objective_at(weights):
        def per_draw(x0, noisy, target, step, rows, j):
            def gap():
                return bench.predict(noisy, step, rows) - target

            def relative(error, at):
                return (error**2).mean(1) / bench.at(at, gap).abs().mean(1).clamp(min=1e-5)

            before = relative(bench.at(old, gap), old)
            implied, fixed = before - relative(gap(), weights), before - relative(bench.at(weights, gap), weights)
            miss = 0.7 * (implied - (fixed - centred(fixed))) - centred(a[rows])
            base = bench.at(bench.base, lambda: bench.predict(noisy, step, rows))
            m = 0.05 / 0.2
            pull = 0.2 * (m + a[rows] * (1 - m)) * ((bench.predict(noisy, step, rows) - base) ** 2).mean(1)
            return 1.1 / 0.7 * miss**2 + pull

        return matching_loss(bench, per_draw)

    check_parts(bench, objective_at)


def test_crds_first_implied_reward_is_zero():
    bench = Bench("crd", away=0.0)
    a = normalised(bench.total, "rewards", 1e-4).clamp(-5, 5) / 10 + 0.5
    bench.update()
    assert bench.figures["implied_reward"] == 0
    assert bench.figures["loss"] == pytest.approx(5 * float(((a - a.mean()) ** 2).mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["dgpo", "crd"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_comparisons_do_not_depend_on_the_microbatch(name, size):
    """Also where it divides groups."""
    found = []
    for microbatch in (None, size):
        bench = Bench(name, off=0.1, updates_per_rollout=2, lr=0.01, draws_per_sample=2)
        bench.agent.microbatch = microbatch
        found.append([torch.cat([g.flatten() for g in gradients]) for _, gradients, _ in bench.update()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_samples_without_a_score_take_no_part_in_comparisons():
    """Whatever they are: the gradient is that without them."""
    found = []
    for shift in (0.0, 3.0):
        bench = Bench("crd", off=0.1, reference_coef=0.0, draws_per_sample=2)
        scores = bench.rollout.scores
        scores.total[3] = torch.nan
        scores.valid[3] = False
        bench.rollout.final_latents[3] += shift
        found.append([torch.cat([g.flatten() for g in gradients]) for _, gradients, _ in bench.update()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["advantages", "rewards"])
@pytest.mark.parametrize(("name", "target"), [("nft", "q"), ("crd", "a")])
def test_the_place_of_two_rewards(name, target, how):
    bench = Bench(name, advantage_clip=1.1, rewards=TWO, reward_aggregation=how)
    seen = []
    advantage = functools.partial(normalised, std="rewards", epsilon=1e-4)
    of_two_rewards(bench, how, advantage, lambda a, rows: seen.append(a), 1.1)(None)
    torch.testing.assert_close(bench.agent.targets(bench.rollout)[target].double(), seen[0] / 2.2 + 0.5)


@pytest.mark.parametrize("world", FINAL)
@pytest.mark.parametrize("pairing", ["ranked", "best_worst"])
@pytest.mark.parametrize("name", ["dpo", "dcpo"])
def test_dpo(world, pairing, name):
    options = {"draws_per_sample": 5, "reference_every": 40 * (pairing == "ranked")}
    options |= {"pairing": pairing, "reference_coef": 0.3 if pairing == "ranked" else 0.0}
    bench = Bench(name, *world, off=0.05, beta=7.0, updates_per_rollout=2, lr=0.01, **options)
    ranking = bench.total.view(-1, GROUP).argsort(1, descending=True)
    pairs = [
        (g * GROUP + int(ranking[g, i]), g * GROUP + int(ranking[g, GROUP - 1 - i]))
        for g in range(len(PROMPTS))
        for i in range(1 if pairing == "best_worst" else GROUP // 2)
    ]
    draws = bench.agent.draws([bench.rollout.seeds[winner] for winner, _ in pairs], 1)
    examples = bench.agent.examples(bench.rollout, 1)
    captions = examples["caption"][:, 0] if name == "dcpo" else None
    x0, prompts = bench.rollout.final_latents, bench.rollout.prompt_index

    def objective(which):
        losses = []
        for i in which:
            winner, loser = pairs[i]
            for j in range(draws.shape[1]):
                step, noise = draws["step"][i : i + 1, j], draws["noise"][i : i + 1, j].double()
                sides, distances = [], []
                for row in (winner, loser):
                    prompt = prompts[row : row + 1]
                    if row == loser and captions is not None:
                        prompt = captions[i : i + 1]
                    noisy, target = noised(bench, x0[row : row + 1], step, noise)

                    def error(noisy=noisy, target=target, prompt=prompt, step=step):
                        return ((target - bench.predict(noisy, step, prompts=prompt)) ** 2).mean()

                    def output(noisy=noisy, prompt=prompt, step=step):
                        return bench.predict(noisy, step, prompts=prompt)

                    sides.append(error() - bench.at(bench.base, error))
                    distances.append(((output() - bench.at(bench.base, output)) ** 2).mean())
                losses.append(-torch.log(torch.sigmoid(-7.0 / 2 * (sides[0] - sides[1]))))
                losses[-1] = losses[-1] + options["reference_coef"] * sum(distances) / 2
        return torch.stack(losses).mean()

    half = len(pairs) // 2
    for i, (weights, gradients, _) in enumerate(bench.update()):
        which = range(i * half, (i + 1) * half)
        compare(bench, weights, gradients, lambda which=which: objective(which))
