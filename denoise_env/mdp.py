"""The denoising Markov decision process, on tensors.

| | |
|---|---|
| state | latents x_k, the step k, the prompt |
| action | the next latents x_{k+1} |
| transition | deterministic: the action becomes the latents, k becomes k + 1 |
| reward | 0 until the last step, then r(decode(x_K), prompt) |
| horizon | K denoising steps |

The network that proposes actions belongs to the policy; nothing here calls it.
"""

import logging
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from denoise_env.arguments import boolean, integer, number
from denoise_env.conditioning import GIB, ConditioningStore
from denoise_env.kernels import KERNELS, Kernel
from denoise_env.models import DenoisingModel, ModelOptions, find_family, load_model
from denoise_env.naming import suggest
from denoise_env.prompt_files import load_prompts
from denoise_env.prompts import Prompt, check_prompts
from denoise_env.rewards import Reward, UnavailableError, check_reward, check_takes, computes_elsewhere, load_reward
from denoise_env.schedules import check_num_steps
from denoise_env.worlds import DEFAULT, PROMPT_SETS, WORLDS


@dataclass(frozen=True)
class State:
    """A batch of states.

    Attributes:
        latents: ``[B, *latent]``.
        step: ``[B]`` int64 in [0, K]; K is the end.
        prompt_index: ``[B]`` int64 into the MDP's ``prompts``.
    """

    latents: Tensor
    step: Tensor
    prompt_index: Tensor

    def advance(self, latents: Tensor) -> "State":
        """The transition, unchecked: ``latents`` become the latents, the step counts up."""
        return State(latents, self.step + 1, self.prompt_index)

    def replace_rows(self, rows: Tensor, other: "State") -> "State":
        """This batch with ``rows [R]`` taken from ``other``, a batch of R."""
        return State(
            self.latents.index_copy(0, rows, other.latents),
            self.step.index_copy(0, rows, other.step),
            self.prompt_index.index_copy(0, rows, other.prompt_index),
        )


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch.

    Attributes:
        values: reward name → ``[B]`` float32, NaN where it could not be computed or is infinite.
        total: ``[B]`` float32, the weighted sum of the rewards that have a weight; NaN where one of those is. A reward
            of weight 0 is only measured.
        valid: ``[B]`` bool, rows whose total is a finite number: every reward that has a weight could be computed.
        errors: reward name → what it raised last, for those that raised or returned nonsense.
        tracebacks: reward name → the whole traceback of that.
    """

    values: dict[str, Tensor]
    total: Tensor
    valid: Tensor
    errors: dict[str, str]
    tracebacks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: "Sequence[Scores]") -> "Scores":
        """The scores of consecutive parts of a batch, as one."""
        return cls(
            {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
            torch.cat([part.total for part in parts]),
            torch.cat([part.valid for part in parts]),
            {name: error for part in parts for name, error in part.errors.items()},
            {name: text for part in parts for name, text in part.tracebacks.items()},
        )


class DenoisingMDP:
    """K denoising steps of a model, scored at the end.

    It has no state except the prompts that it knows: randomness comes in through generators, states through arguments.

    Args:
        model: the model that gives latent shape, noise schedule, prompt encoding and decoding.
        rewards: the rewards by name.
        prompts: the prompts that a reset draws from. Others become known when a reset names them, and are never
            drawn.
        num_steps: the number K of denoising steps.
        reward_weights: each reward's weight in the scalar reward, by name; default: 1 each.
        microbatch: rows decoded and scored at a time; ``None`` takes the batch whole.
        check_finite: whether to refuse actions with NaN or infinity. On an accelerator that costs one sync per step.
        conditioning: a store shared with other MDPs of the same model; default: a new one.

    Attributes:
        conditioning: the prompts that ``prompt_index`` points into, and what they are encoded to.
        drawn: the indices of the prompts that a reset draws from.

    Raises:
        ValueError: no rewards, one that is not callable with (images, prompts), weights that are no finite
            numbers or of other names, or what the parts refuse.
    """

    def __init__(
        self,
        model: DenoisingModel,
        rewards: Mapping[str, Reward],
        prompts: Sequence[str | Prompt],
        num_steps: int = 10,
        *,
        reward_weights: Mapping[str, float] | None = None,
        microbatch: int | None = None,
        check_finite: bool = True,
        conditioning: ConditioningStore | None = None,
    ) -> None:
        if not isinstance(rewards, Mapping) or not rewards:
            raise ValueError("an environment needs at least one reward, by name: {name: reward}")
        for name, reward in rewards.items():
            check_reward(name, reward)
            check_takes(name, reward, model.makes)
        self.reward_weights = check_weights(reward_weights or dict.fromkeys(rewards, 1.0))
        if set(self.reward_weights) != set(rewards):
            raise ValueError(f"reward_weights name {sorted(self.reward_weights)}, the rewards are {sorted(rewards)}")
        check_num_steps(num_steps)
        self.model = model
        self.rewards = dict(rewards)
        self.num_steps = int(num_steps)
        self.schedule = model.schedule(self.num_steps)
        self.microbatch = None if microbatch is None else integer(microbatch, "microbatch", at_least=1)
        self.check_finite = boolean(check_finite, "check_finite")
        self.conditioning = conditioning or ConditioningStore(model)
        self.drawn = torch.tensor(list(dict.fromkeys(self.conditioning.index(prompts).tolist())))

    @classmethod
    def make(
        cls,
        model: str = DEFAULT,
        rewards: Mapping[str, float] | str | None = None,
        prompts: Sequence[str | Prompt] | str | None = None,
        num_steps: int = 10,
        microbatch: int | None = None,
        check_finite: bool = True,
        *,
        device: str | torch.device = "cpu",
        options: ModelOptions | None = None,
        conditioning_cache: str | None = None,
        conditioning_host_gib: float = 8.0,
        conditioning_device_gib: float = 0.5,
        **model_options: Any,
    ) -> "DenoisingMDP":
        """Build from names and numbers.

        Args:
            model: a name or a checkpoint, see `denoise_env.models.find_family`.
            rewards: a reward's name, or name → weight; by default the world's own.
            prompts: a list, or what `load_prompts` takes, or "" for the one prompt of an unconditional model; by
                default the world's training prompts, or the model's vocabulary.
            num_steps: the number K of denoising steps.
            microbatch: rows decoded and scored at a time; default: all.
            check_finite: whether to refuse actions with NaN or infinity.
            device: where the model lives.
            options: the options of the model's family; default: the model's own.
            conditioning_cache: a directory that keeps encoded prompts between runs.
            conditioning_host_gib: budget of encoded prompts in the host's memory, in GiB.
            conditioning_device_gib: budget of encoded prompts kept on the device, in GiB.
            model_options: options of the model's family by name, instead of ``options``.

        Raises:
            ValueError: what is missing or unknown.
        """
        if not isinstance(model, str):
            raise ValueError(f"a model is named by a string, not {model!r}: build a DenoisingMDP around a live one")
        world = WORLDS.get(model)
        if rewards is None:
            if world is None:
                find_family(model)
                raise ValueError(f"{model!r} has no rewards of its own: name them")
            rewards = {**dict.fromkeys(world.rewards, 1.0), **world.weights}
        if prompts is None and world:
            prompts = next(iter(world.prompts))
        if isinstance(prompts, str):
            prompts = load_prompts(prompts, PROMPT_SETS) if prompts else [""]
        weights = check_weights({rewards: 1.0} if isinstance(rewards, str) else rewards)
        found = {name: load_reward(name) for name in weights}
        check = partial(_check_parts, rewards=found, prompts=prompts)
        loaded = load_model(model, options, device=device, check=check, **model_options)
        if prompts is None:
            if loaded.vocabulary is None:
                raise ValueError(f"{model!r} has no prompts of its own: name them")
            prompts = loaded.vocabulary
        store = ConditioningStore(
            loaded,
            host_bytes=number(conditioning_host_gib, "conditioning_host_gib", at_least=0) * GIB,
            device_bytes=number(conditioning_device_gib, "conditioning_device_gib", at_least=0) * GIB,
            directory=conditioning_cache,
        )
        return cls(
            loaded,
            found,
            prompts,
            num_steps,
            reward_weights=weights,
            microbatch=microbatch,
            check_finite=check_finite,
            conditioning=store,
        )

    @property
    def compares_groups(self) -> list[str]:
        """The rewards that score a sample against the others of its group, by name."""
        return [name for name, reward in self.rewards.items() if getattr(reward, "compares_group", False)]

    @property
    def scores_elsewhere(self) -> bool:
        """Whether a reward computes on another machine, or another device than the model's."""
        return any(computes_elsewhere(reward, self.model.device) for reward in self.rewards.values())

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that ``prompt_index`` points into."""
        return self.conditioning.prompts

    @property
    def drawn_prompts(self) -> list[Prompt]:
        """The prompts that a reset draws from: those of the constructor."""
        return [self.prompts[i] for i in self.drawn.tolist()]

    def kernel(
        self, name: str | None = None, eta: float | None = None, last_step: Literal["sde", "ode"] | None = None
    ) -> Kernel:
        """A transition kernel on this MDP's schedule.

        Args:
            name: in `denoise_env.kernels.KERNELS`; default: "ddim" on a diffusion, "dance_sde" on a flow.
            eta: the kernel's noise level; default: the kernel's own.
            last_step: "sde" or "ode", as in `denoise_env.kernels.Kernel`; default: the kernel's own.

        Raises:
            ValueError: an unknown kernel, or one that does not fit the model's path.
        """
        if name is None:
            name = "ddim" if self.schedule.path == "diffusion" else "dance_sde"
        if name not in KERNELS:
            raise ValueError(f"unknown kernel {name!r}; {suggest(str(name), KERNELS)}")
        return KERNELS[name](self.schedule, self.model.prediction_type, eta, last_step, self.model.free)

    def reset(
        self,
        generators: Sequence[torch.Generator],
        prompts: Sequence[str | Prompt] | None = None,
        *,
        group_size: int = 1,
        shared_noise: bool = False,
    ) -> State:
        """Begin B = ``len(generators)`` episodes.

        Row i draws from ``generators[i]`` (on the CPU) alone, so it does not depend on the batch it is in.
        Groups are ``group_size`` neighbouring rows with one prompt; with ``shared_noise`` they start from
        the first row's noise. A row draws its noise before its prompt: naming the prompt leaves the noise as
        it was.

        Args:
            generators: one per row.
            prompts: one per group; by default each group's first row draws one.
            group_size: G, the number of neighbouring rows with one prompt; a divisor of B.
            shared_noise: whether a group starts from the same latents.

        Raises:
            ValueError: numbers that do not divide, or bad prompts.
        """
        rows = len(generators)
        found = self.check_reset(rows, prompts, group_size)
        shared_noise = boolean(shared_noise, "shared_noise")
        index = None if found is None else self.conditioning.index(found)
        noise = torch.empty(rows, *self.model.latent_shape)
        for row, generator in zip(noise.unbind(), generators, strict=True):
            row.normal_(generator=generator)
        if index is None:
            index = torch.empty(rows // group_size, dtype=torch.long)
            for row, generator in zip(index.unbind(), generators[::group_size], strict=True):
                row.random_(0, len(self.drawn), generator=generator)
            index = self.drawn[index]
        if shared_noise:
            noise = noise[::group_size].repeat_interleave(group_size, 0)
        device = self.model.device
        return State(
            noise.to(device, self.model.dtype),
            torch.zeros(rows, dtype=torch.long, device=device),
            index.repeat_interleave(group_size).to(device),
        )

    def check_reset(
        self, rows: int, prompts: Sequence[str | Prompt] | None, group_size: int = 1
    ) -> list[Prompt] | None:
        """The prompts that a reset of ``rows`` rows was given.

        Raises:
            ValueError: numbers that do not divide, or prompts that the model does not take.
        """
        if rows < 1 or integer(group_size, "group_size") < 1 or rows % group_size:
            raise ValueError(f"{rows} rows cannot be divided into groups of {group_size}")
        if prompts is None:
            return None
        found = self.conditioning.check(prompts)
        if len(found) * group_size != rows:
            made = f"{len(found)} prompts in groups of {group_size} make {len(found) * group_size} rows"
            raise ValueError(f"{made}, not {rows}")
        return found

    def step(self, state: State, action: Tensor) -> State:
        """The action becomes the latents, the step counts up.

        Raises:
            ValueError: an action of another shape, dtype or device, or one that is not finite; a state at the end.
        """
        self.check_action(action, len(state.step))
        if (state.step >= self.num_steps).any():
            raise ValueError(f"the episode is over after {self.num_steps} steps: reset first")
        return state.advance(action)

    def check_action(self, action: Tensor, rows: int) -> None:
        """Raise a ``ValueError`` for an action that is not ``rows`` finite latents of the model's."""
        if not isinstance(action, Tensor):
            raise ValueError(f"an action is a tensor of latents, not {type(action).__name__}")
        shape = (rows, *self.model.latent_shape)
        if action.shape != shape:
            raise ValueError(f"the action's shape must be {shape}, not {tuple(action.shape)}")
        if action.dtype != self.model.dtype:
            raise ValueError(f"the action's dtype must be {self.model.dtype}, not {action.dtype}")
        if action.device != self.model.device:
            raise ValueError(f"the action must be on {self.model.device}, not on {action.device}")
        if self.check_finite and not action.isfinite().all():
            raise ValueError("the action must be finite; it has NaN or infinity in it")

    @torch.no_grad()
    def render(self, latents: Tensor) -> Tensor:
        """What `DenoisingModel.render` shows of ``latents [B, *latent]``, in microbatches."""
        with self.model.decoding:
            return torch.cat([self.model.render(part) for part in latents.split(self.microbatch or len(latents))])

    @torch.no_grad()
    def score(self, latents: Tensor, prompt_index: Tensor, group_size: int = 1) -> Scores:
        """Decode and score finished latents ``[B, *latent]``.

        Each ``group_size`` neighbours are samples of one prompt; a reward that compares groups is called with whole
        ones, where need be more rows at a time than the microbatch.

        A reward that raises, or whose result has the wrong shape, leaves NaN on the rows it was called with
        and a warning; it never stops the episode. Running out of memory says nothing about the rows and is raised.

        Rewards are called with pictures and lists of their own: what one does to them reaches nobody else.
        """
        size = self.microbatch or len(latents)
        if self.compares_groups:
            size = -(-size // group_size) * group_size
        indices = prompt_index.tolist()
        values = {name: torch.full((len(latents),), torch.nan, device=latents.device) for name in self.rewards}
        errors, tracebacks = {}, {}
        for start in range(0, len(latents), size):
            rows = slice(start, start + size)
            with self.model.decoding:
                images = self.model.decode(latents[rows])
            prompts = [self.prompts[i] for i in indices[rows]]
            readers = len(self.rewards) + _same_memory(images, latents)
            for reader, (name, reward) in enumerate(self.rewards.items(), 1):
                group = {"group_size": group_size} if getattr(reward, "compares_group", False) else {}
                try:
                    # the last reader may have the pictures themselves; a copy lives no longer than the call
                    given = images.clone() if reader < readers else images
                    result = torch.as_tensor(reward(given, list(prompts), **group))
                    if result.shape != (len(prompts),):
                        raise ValueError(f"it returned shape {tuple(result.shape)} for {len(prompts)} images")
                    result = result.to(values[name])
                    values[name][rows] = result.where(result.isfinite(), torch.nan)
                except (MemoryError, torch.OutOfMemoryError, UnavailableError):
                    raise
                except Exception as error:
                    errors[name], tracebacks[name] = f"{type(error).__name__}: {error}", traceback.format_exc()
                    warnings.warn(f"the reward {name!r} failed on {len(prompts)} rows: {errors[name]}", stacklevel=2)
                    logging.getLogger(__name__).info("the reward %r failed", name, exc_info=True)
        total = torch.zeros(len(latents), device=latents.device)
        for name, value in values.items():
            if weight := self.reward_weights[name]:  # 0 · NaN would be NaN
                total += weight * value
        return Scores(values, total, total.isfinite(), errors, tracebacks)


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights by a reward's name, as finite floats.

    Raises:
        ValueError: another type, or a weight that is no finite number.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"rewards must be a name, or name → weight, not {weights!r}")
    return {name: number(weight, f"the weight of the reward {name!r}") for name, weight in weights.items()}


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def row_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per row, seeded."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _check_parts(model: DenoisingModel, rewards: Mapping[str, Reward], prompts: Sequence[str | Prompt] | None) -> None:
    """Raise a ``ValueError`` for rewards and prompts that a model does not go with."""
    for name, reward in rewards.items():
        check_takes(name, reward, model.makes)
    for prompt in [] if prompts is None else check_prompts(prompts, allow_empty="" in (model.vocabulary or ())):
        model.check_prompt(prompt)
