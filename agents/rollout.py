"""Collects a batch of episodes into one TensorDict."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from tensordict import TensorDict

from agents.policy import DenoisingPolicy
from denoise_env.conditioning import ConditioningStore
from denoise_env.kernels import Kernel, Transition
from denoise_env.mdp import DenoisingMDP, Scores
from denoise_env.prompts import Prompt
from denoise_env.solvers import DPMSolver

Visitor = Callable[[slice, int, torch.Tensor, Transition], None]


@dataclass(frozen=True)
class Rollout:
    """B finished episodes of K steps.

    Attributes:
        steps: TensorDict ``[B, K]`` with ``latents`` and ``action`` (two views of one ``[B, K+1, *latent]``
            tensor), ``action_log_prob`` (NaN at deterministic steps), and ``step``; with ``keep_means`` also the
            Gaussians' ``mean``. Where a solver made the end, only the steps before it.
        prompt_index: each episode's place ``[B]`` in the MDP's prompts.
        store: holds the prompts' conditioning.
        final_latents: ``[B, *latent]``, a view.
        scored: gives the rewards of the episodes, once they are computed.
        group_size: G; each run of G neighbouring episodes is a group, with one prompt.
        kernel: the kernel that made the steps.
        seeds: each episode's own seed, that of the generator it was drawn with; what training draws for the episode
            follows from it too.
    """

    steps: TensorDict
    prompt_index: torch.Tensor
    store: ConditioningStore
    final_latents: torch.Tensor
    scored: Callable[[], Scores]
    group_size: int
    kernel: Kernel
    seeds: Sequence[int]

    @cached_property
    def scores(self) -> Scores:
        """The rewards of the episodes; waits for them where `collect` did not."""
        return self.scored()

    def conditioning(self, episodes: torch.Tensor | slice) -> TensorDict:
        """The conditioning ``[n]`` of some episodes."""
        return self.store.rows(self.prompt_index[episodes])

    def pooled(self) -> torch.Tensor:
        """Every episode's pooled conditioning ``[B, E]``, a few prompts at a time."""
        used, place = self.prompt_index.unique(return_inverse=True)
        return torch.cat([self.store.model.pool(self.store.rows(part)) for part in used.split(16)])[place]

    def __len__(self) -> int:
        return len(self.steps)


def begin(
    mdp: DenoisingMDP,
    generators: Sequence[torch.Generator],
    prompts: Sequence[str | Prompt] | None = None,
    *,
    group_size: int = 1,
    shared_noise: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reset, and draw the noise of every step into the tensor that will hold the rollout's latents.

    Args:
        mdp: the environment.
        generators: one CPU generator per episode; episode i's draws come from ``generators[i]`` alone.
        prompts: one per group; default: drawn by the reset.
        group_size: G, the number of neighbouring episodes with one prompt.
        shared_noise: whether a group starts from the same latents.

    Returns:
        What `denoise` takes: ``[B, K+1, *latent]`` with x_0 and K standard normal draws, and the prompt
        indices ``[B]``.

    Raises:
        ValueError: numbers that do not divide, or bad prompts.
    """
    state = mdp.reset(generators, prompts, group_size=group_size, shared_noise=shared_noise)
    mdp.conditioning.prepare(state.prompt_index)
    latents = state.latents.new_empty(len(generators), mdp.num_steps + 1, *mdp.model.latent_shape)
    latents[:, 0] = state.latents
    noise = torch.empty(mdp.num_steps, *mdp.model.latent_shape)
    for i, generator in enumerate(generators):
        latents[i, 1:] = noise.normal_(generator=generator)
    return latents, state.prompt_index


def shared_steps(kernel: Kernel) -> int:
    """How many network calls a group from one initial noise has in common: those up to its first stochastic step."""
    found = kernel.stochastic.nonzero()
    return int(found[0]) + 1 if len(found) else len(kernel.stochastic)


def denoise(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    latents: torch.Tensor,
    prompt_index: torch.Tensor,
    microbatch: int | None = None,
    *,
    kernel: Kernel | None = None,
    share: int = 1,
    visit: Visitor | None = None,
    first: int = 0,
    last: int | None = None,
    finished: Callable[[slice], object] = lambda chunk: None,
) -> torch.Tensor:
    """Run every episode to its end, in place.

    Args:
        mdp: the environment, for K, the model and the prompts.
        policy: the policy that acts.
        latents: ``[B, K+1, *latent]``; on entry x_0 and then the K standard normal draws, on return the states. What
            lies before ``first`` or after ``last`` stays as it is.
        prompt_index: ``[B]``, each episode's place in the MDP's prompts.
        microbatch: episodes per network call; default: all.
        kernel: the kernel to use instead of the policy's.
        share: how many neighbouring episodes have prompt and x_0 in common. Their first `shared_steps` network calls
            are made once for all of them; the results differ only as the batch size changes the network's rounding.
        visit: called at every step with a slice of the episodes, k, their latents and their `Transition`.
        first: the step to begin with, from the latents that are there.
        last: the step to end before; default: K.
        finished: called with each slice of episodes that is at its end.

    Returns:
        Log-probs ``[B, K]`` float32, NaN at deterministic steps and at those not made.
    """
    kernel = kernel or policy.kernel
    last = mdp.num_steps if last is None else last
    rows = len(latents)
    size = microbatch or rows
    stochastic = kernel.stochastic.tolist()
    log_prob = torch.full((rows, mdp.num_steps), torch.nan, device=latents.device)

    def run(chunk: slice, first: int, last: int, share: int) -> None:
        x = latents[chunk, first]
        conditioning = mdp.conditioning.rows(prompt_index[chunk][::share])
        for k in range(first, last):
            transition = policy.transition(x[::share], k, conditioning, kernel)
            if share > 1:
                transition = replace(transition, mean=transition.mean.repeat_interleave(share, 0))
            if visit:
                visit(chunk, k, x, transition)
            x = transition.sample(latents[chunk, k + 1])
            latents[chunk, k + 1] = x
            if stochastic[k]:
                log_prob[chunk, k] = policy.log_prob(transition, x)

    with torch.no_grad():
        branch = min(max(shared_steps(kernel), first), last) if share > 1 else first
        for start in range(0, rows if branch > first else 0, size * share):
            run(slice(start, start + size * share), first, branch, share)
        for start in range(0, rows, size):
            chunk = slice(start, start + size)
            if last > branch:
                run(chunk, branch, last, 1)
            finished(chunk)
    return log_prob


def denoise_branches(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    latents: torch.Tensor,
    prompt_index: torch.Tensor,
    microbatch: int | None = None,
    *,
    kernel: Kernel,
    siblings: int,
    share: bool,
) -> torch.Tensor:
    """As `denoise`, where the episodes are branches of ODE trajectories.

    The episodes of one trajectory are neighbours and begin with the first one's x_0. From each of the S stochastic
    steps of ``kernel``, in order, ``siblings`` of them branch: they are stochastic at this step alone.

    Args:
        mdp: the environment, for K, the model and the prompts.
        policy: the policy that acts.
        latents: ``[B, K+1, *latent]`` as in `denoise`; B is a multiple of S · ``siblings``.
        prompt_index: ``[B]``, each episode's place in the MDP's prompts.
        microbatch: episodes per network call; default: all that branch from one step.
        kernel: stochastic at the steps to branch from.
        siblings: how many episodes branch from each step of a trajectory.
        share: whether to compute what episodes have in common, the trajectory and the branching, once for all of them.

    Returns:
        Log-probs ``[B, K]`` float32, NaN but for each episode's own step.
    """
    steps = kernel.stochastic.nonzero().flatten().tolist()
    tree = latents.view(-1, len(steps), siblings, *latents.shape[1:])
    tree[:, :, :, 0] = tree[:, :1, :1, 0].clone()
    index = prompt_index.view(tree.shape[:3])
    log_prob = torch.empty(*tree.shape[:3], mdp.num_steps, device=latents.device)
    if share:
        trunk = tree[:, 0, 0].clone()
        denoise(mdp, policy, trunk, index[:, 0, 0], microbatch, kernel=kernel.only([]), last=steps[-1])
    for i, k in enumerate(steps):
        own = tree[:, i].flatten(0, 1)
        if share:
            own[:, 1 : k + 1] = trunk[:, 1 : k + 1].repeat_interleave(siblings, 0)
        options = {"first": k, "share": siblings} if share else {}
        rows = index[:, i].flatten()
        found = denoise(mdp, policy, own, rows, microbatch, kernel=kernel.only([k]), **options)
        tree[:, i], log_prob[:, i] = own.view_as(tree[:, i]), found.view_as(log_prob[:, i])
    return log_prob.flatten(0, 2)


@torch.no_grad()
def solve(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    latents: torch.Tensor,
    prompt_index: torch.Tensor,
    microbatch: int | None,
    steps: Sequence[int],
) -> torch.Tensor:
    """The final latents ``[B, *latent]`` that `DPMSolver` reaches with one network call at each of ``steps``.

    Args:
        mdp: the environment, for the schedule and the prompts.
        policy: the policy that denoises.
        latents: ``[B, *latent]``, those before the first of the steps.
        prompt_index: ``[B]``, each episode's place in the MDP's prompts.
        microbatch: episodes per network call; default: all.
        steps: the steps at whose noise levels the network is called.
    """
    solver, final = DPMSolver(mdp.schedule, steps), torch.empty_like(latents)
    for start in range(0, len(latents), microbatch or len(latents)):
        chunk = slice(start, start + (microbatch or len(latents)))
        x, before, conditioning = latents[chunk], None, mdp.conditioning.rows(prompt_index[chunk])
        for place, k in enumerate(steps):
            pred_x0 = policy.kernel.pred_x0(x, policy.predict(x, k, conditioning), k)
            x, before = solver.step(place, x, pred_x0, before).to(latents.dtype), pred_x0
        final[chunk] = x
    return final


class _Scoring:
    """Scores episodes in a thread while others are denoised, where that saves time.

    That is where a reward says that it computes ``elsewhere`` (on another machine, or another device than the model's);
    microbatch by microbatch where the rollout has several and no group is cut.
    """

    def __init__(
        self,
        mdp: DenoisingMDP,
        final: torch.Tensor,
        prompt_index: torch.Tensor,
        group_size: int,
        size: int | None,
        wait: bool,
    ) -> None:
        whole = not mdp.compares_groups or (size or 0) % group_size == 0
        self.parted = bool(mdp.scores_elsewhere and whole and size and size < len(final))
        self.pool = ThreadPoolExecutor(1) if self.parted or (mdp.scores_elsewhere and not wait) else None
        self.parts: list[Future[Scores]] = []
        self.score = lambda rows, final=final: mdp.score(final[rows], prompt_index[rows], group_size)

    def add(self, rows: slice) -> None:
        """Begin to score finished episodes."""
        if self.pool and self.parted:
            self.parts.append(self.pool.submit(self.score, rows))

    def finish(self, final: torch.Tensor) -> Callable[[], Scores]:
        """A function that gives the scores of all episodes; those that were not added are the rows of ``final``."""
        if not self.pool:
            return lambda: self.score(slice(None), final)
        pool, parts = self.pool, self.parts or [self.pool.submit(self.score, slice(None), final)]
        pool.shutdown(wait=False)
        return lambda: Scores.join([part.result() for part in parts])


def collect(
    mdp: DenoisingMDP,
    policy: DenoisingPolicy,
    generators: Sequence[torch.Generator],
    prompts: Sequence[str | Prompt] | None = None,
    *,
    group_size: int = 1,
    shared_noise: bool = False,
    initial: torch.Tensor | None = None,
    microbatch: int | None = None,
    kernel: Kernel | None = None,
    share_prefix: bool = False,
    keep_means: bool = False,
    siblings: int = 0,
    solver_steps: Sequence[int] = (),
    wait: bool = True,
) -> Rollout:
    """Roll the policy out from a reset and score the results.

    Episode i's noise, that of the first latents and of every step, comes from ``generators[i]`` alone: it depends
    neither on the batch nor on the microbatch that the episode is in.

    Args:
        mdp: the environment.
        policy: the policy that acts.
        generators: one CPU generator per episode.
        prompts: one per group; default: drawn by the reset.
        group_size: G, the number of neighbouring episodes with one prompt.
        shared_noise: whether a group starts from the same latents.
        initial: ``[*latent]``, the latents that all episodes start from; default: drawn by the reset.
        microbatch: episodes per network call; default: all.
        kernel: the kernel to use instead of the policy's.
        share_prefix: whether to make the network calls that a group with the same initial latents has in common once.
        keep_means: whether to keep the Gaussians' means, which take as much memory as the latents; not with siblings.
        siblings: how many episodes branch from each stochastic step of a trajectory, as in `denoise_branches`, with
            ``share_prefix`` for its share; 0 makes no branches.
        solver_steps: from the first of these steps on, `solve` makes the episodes' end in place of the kernel.
        wait: whether to return with the scores. Otherwise they are computed in a thread where a reward computes
            elsewhere, and when they are asked for where none does.

    Raises:
        ValueError: numbers that do not divide, or bad prompts.
        FloatingPointError: the policy's latents are not finite.
    """
    rows, steps = len(generators), mdp.num_steps
    if microbatch and rows % microbatch:
        raise ValueError(f"{rows} rows cannot be divided into microbatches of {microbatch}")
    latents, prompt_index = begin(mdp, generators, prompts, group_size=group_size, shared_noise=shared_noise)
    if initial is not None:
        latents[:, 0] = initial
    means: dict[str, torch.Tensor] = {}
    plain = not siblings and not solver_steps
    scoring = _Scoring(mdp, latents[:, -1], prompt_index, group_size, microbatch if plain else None, wait)

    def keep(chunk: slice, k: int, x: torch.Tensor, transition: Transition) -> None:
        if not means:
            means["mean"] = transition.mean.new_empty(rows, steps, *mdp.model.latent_shape)
        means["mean"][chunk, k] = transition.mean

    if siblings:
        kernel = kernel or policy.kernel
        log_prob = denoise_branches(
            mdp, policy, latents, prompt_index, microbatch, kernel=kernel, siblings=siblings, share=share_prefix
        )
    else:
        steps = solver_steps[0] if solver_steps else steps
        log_prob = denoise(
            mdp,
            policy,
            latents,
            prompt_index,
            microbatch,
            kernel=kernel,
            share=group_size if share_prefix and (shared_noise or initial is not None) else 1,
            visit=keep if keep_means else None,
            last=steps,
            finished=scoring.add,
        )
    final = latents[:, steps]
    if solver_steps:
        final = solve(mdp, policy, final, prompt_index, microbatch, solver_steps)
    if not final.isfinite().all():
        raise FloatingPointError(
            "the policy's latents are no longer finite: lower the learning rate, clip the gradient (max_grad_norm), "
            "or use dtype fp32"
        )
    td = TensorDict(
        {
            "latents": latents[:, :steps],
            "action": latents[:, 1 : steps + 1],
            "action_log_prob": log_prob[:, :steps],
            "step": torch.arange(steps, device=latents.device).expand(rows, steps),
            **means,
        },
        batch_size=(rows, steps),
    )
    seeds = [generator.initial_seed() for generator in generators]
    scored = scoring.finish(final)
    rollout = Rollout(td, prompt_index, mdp.conditioning, final, scored, group_size, kernel or policy.kernel, seeds)
    if wait:
        rollout.scores  # noqa: B018
    return rollout
