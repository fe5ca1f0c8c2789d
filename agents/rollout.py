"""Collects a batch of episodes into one TensorDict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict

from agents.policy import DenoisingPolicy
from denoise_env.conditioning import ConditioningStore
from denoise_env.kernels import Kernel, Transition
from denoise_env.mdp import DenoisingMDP, Scores
from denoise_env.prompts import Prompt

Visitor = Callable[[slice, int, torch.Tensor, Transition], None]


@dataclass(frozen=True)
class Rollout:
    """B finished episodes of K steps.

    Attributes:
        steps: TensorDict ``[B, K]`` with ``latents`` and ``action`` (two views of one ``[B, K+1, *latent]``
            tensor), ``action_log_prob`` (NaN at deterministic steps), and ``step`` and ``prompt_index``
            (expanded views); with ``keep_means`` also the Gaussians' ``mean``.
        store: holds the prompts' conditioning.
        final_latents: ``[B, *latent]``, a view.
        scores: the rewards of the episodes.
        group_size: G; each run of G neighbouring episodes is a group, with one prompt.
        kernel: the kernel that made the steps.
        seeds: each episode's own seed, that of the generator it was drawn with; what training draws for the episode
            follows from it too.
    """

    steps: TensorDict
    store: ConditioningStore
    final_latents: torch.Tensor
    scores: Scores
    group_size: int
    kernel: Kernel
    seeds: Sequence[int]

    @property
    def prompt_index(self) -> torch.Tensor:
        """Each episode's place ``[B]`` in the MDP's prompts."""
        return self.steps["prompt_index"][:, 0]

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
) -> torch.Tensor:
    """Run every episode to its end, in place.

    Args:
        mdp: the environment, for K, the model and the prompts.
        policy: the policy that acts.
        latents: ``[B, K+1, *latent]``; on entry x_0 and then the K standard normal draws, on return the states.
        prompt_index: ``[B]``, each episode's place in the MDP's prompts.
        microbatch: episodes per network call; default: all.
        kernel: the kernel to use instead of the policy's.
        share: how many neighbouring episodes have prompt and x_0 in common. Their first `shared_steps` network calls
            are made once for all of them; the results differ only as the batch size changes the network's rounding.
        visit: called at every step with a slice of the episodes, k, their latents and their `Transition`.

    Returns:
        Log-probs ``[B, K]`` float32, NaN at deterministic steps.
    """
    kernel = kernel or policy.kernel
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
                mean = transition.mean.repeat_interleave(share, 0)
                transition = Transition(mean, transition.std, transition.stochastic)
            if visit:
                visit(chunk, k, x, transition)
            x = transition.sample(latents[chunk, k + 1])
            latents[chunk, k + 1] = x
            if stochastic[k]:
                log_prob[chunk, k] = policy.log_prob(transition, x)

    with torch.no_grad():
        branch = shared_steps(kernel) if share > 1 else 0
        for start in range(0, rows if branch else 0, size * share):
            run(slice(start, start + size * share), 0, branch, share)
        for start in range(0, rows, size):
            run(slice(start, start + size), branch, mdp.num_steps, 1)
    return log_prob


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
        keep_means: whether to keep the Gaussians' means, which take as much memory as the latents.

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

    def keep(chunk: slice, k: int, x: torch.Tensor, transition: Transition) -> None:
        if not means:
            means["mean"] = transition.mean.new_empty(rows, steps, *mdp.model.latent_shape)
        means["mean"][chunk, k] = transition.mean

    log_prob = denoise(
        mdp,
        policy,
        latents,
        prompt_index,
        microbatch,
        kernel=kernel,
        share=group_size if share_prefix and (shared_noise or initial is not None) else 1,
        visit=keep if keep_means else None,
    )
    final = latents[:, -1]
    if not final.isfinite().all():
        raise FloatingPointError(
            "the policy's latents are no longer finite: lower the learning rate, clip the gradient (max_grad_norm), "
            "or use dtype fp32"
        )
    td = TensorDict(
        {
            "latents": latents[:, :-1],
            "action": latents[:, 1:],
            "action_log_prob": log_prob,
            "step": torch.arange(steps, device=latents.device).expand(rows, steps),
            "prompt_index": prompt_index[:, None].expand(rows, steps),
            **means,
        },
        batch_size=(rows, steps),
    )
    scores = mdp.score(final, prompt_index)
    seeds = [generator.initial_seed() for generator in generators]
    return Rollout(td, mdp.conditioning, final, scores, group_size, kernel or policy.kernel, seeds)
