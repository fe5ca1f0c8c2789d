"""Actions and observations for generic agents: the mathematics, on tensors.

The environment's own action is the next latents, which an agent that has never seen the model cannot guess. A
convention turns something an agent can choose into the next latents, with the pretrained model doing the rest:

| | action | next latents |
|---|---|---|
| `Noise` | z, shaped like the latents | mean + std · z |
| `Control` | a few numbers | mean of the guided model + std · (noise_scale · ε + drift), ε drawn for the agent |

mean and std are those of the base sampler, a Gaussian kernel over a *frozen copy* of the model's network. So these
conventions are the exception to the rule that the environment never calls the network. `Flat` is the matching
observation. `wrappers` brings all three to Gymnasium, `torchrl_transforms` to TorchRL.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from denoise_env.arguments import integer, number
from denoise_env.faces import RowStreams
from denoise_env.kernels import Transition
from denoise_env.mdp import DenoisingMDP, State
from denoise_env.naming import suggest


class ActionConvention(ABC):
    """What an agent's action does to the base sampler.

    Args:
        mdp: the environment. The base sampler has its model's weights as they are now, or as they were when
            `DenoisingModel.keep_reference` was first called.
        kernel: the base sampler's kernel, as in `DenoisingMDP.kernel`.
        eta: the kernel's noise level; default: the kernel's own.
        last_step: "sde" or "ode", as in `denoise_env.kernels.Kernel`; default: the kernel's own.

    Attributes:
        shape: the shape of one row's action, whose numbers lie in [−bound, bound] and are clipped to that.
        draws_noise: whether `next_latents` needs ``noise``.

    Raises:
        ValueError: an unknown kernel, or one that does not fit the model's path.
    """

    shape: tuple[int, ...]
    bound: float
    draws_noise: bool

    def __init__(
        self,
        mdp: DenoisingMDP,
        kernel: str | None = None,
        eta: float | None = None,
        last_step: Literal["sde", "ode"] | None = None,
    ) -> None:
        self.mdp = mdp
        self.kernel = mdp.kernel(kernel, eta, last_step)
        self._timesteps = mdp.schedule.timesteps.to(mdp.model.device)

    def read_action(self, action: Any, rows: int) -> Tensor:
        """An agent's actions ``[rows, *shape]``, an array or a tensor of numbers, as float32 on the model's device.

        Raises:
            ValueError: another type, dtype or shape, or where the environment checks it, a number that is not finite.
        """
        shape, dtype = (rows, *self.shape), str(getattr(action, "dtype", type(action).__name__)).removeprefix("torch.")
        if getattr(action, "shape", None) != shape:
            raise ValueError(f"the action's shape must be {shape}, not {getattr(action, 'shape', None)}")
        if dtype.rstrip("0123456789") not in ("float", "bfloat", "int", "uint"):
            raise ValueError(f"the action must be numbers, not {dtype}")
        tensor = torch.as_tensor(action, dtype=torch.float32, device=self.mdp.model.device)
        if self.mdp.check_finite and not tensor.isfinite().all():
            raise ValueError("the action must be finite; it has NaN or infinity in it")
        return tensor

    @torch.no_grad()
    def transition(self, state: State, guidance_scale: Tensor | None = None) -> Transition:
        """The base sampler's Gaussian; of its last step for rows that are at their end.

        Args:
            state: B states.
            guidance_scale: ``[B]``; default: the model's.
        """
        model, step = self.mdp.model, state.step.clamp(max=self.mdp.num_steps - 1)
        conditioning = self.mdp.conditioning.rows(state.prompt_index)
        with model.reference():
            output = model.predict(state.latents, self._timesteps[step], conditioning, guidance_scale)
        return self.kernel.transition(state.latents, output, step)

    @abstractmethod
    def next_latents(self, state: State, action: Tensor, noise: Tensor | None = None) -> Tensor:
        """The environment's own action ``[B, *latent]``.

        Args:
            state: B states.
            action: ``[B, *shape]``, the agent's actions.
            noise: ``[B, *latent]`` standard normal draws, where ``draws_noise`` is true.
        """

    def _need_noise(self, what: str) -> None:
        if not self.kernel.stochastic.any():
            raise ValueError(
                f"no step of {self.kernel} has noise for {what}: use a stochastic kernel (eta > 0) and at least 2 steps"
            )


class Noise(ActionConvention):
    """The action is the noise: actions drawn from N(0, I) are exactly the base sampler, and 0 is its mean.

    Deterministic steps (std 0) ignore the action.

    Args:
        mdp: the environment, as in `ActionConvention`.
        bound: actions are clipped to ±bound. The default is so large that normal draws are not clipped. For an agent
            whose first actions are uniform in the box (SAC), about 2 is closer to the sampler.
        options: the base sampler's ``kernel``, ``eta`` and ``last_step``, as in `ActionConvention`.

    >>> mdp = DenoisingMDP.make("points")
    >>> convention = Noise(mdp, eta=0.5)
    >>> convention.shape, convention.bound
    ((2,), 10.0)
    """

    draws_noise = False

    def __init__(self, mdp: DenoisingMDP, bound: float = 10.0, **options: Any) -> None:
        super().__init__(mdp, **options)
        if number(bound, "bound") <= 0:
            raise ValueError(f"bound must be a positive, finite number, not {bound}")
        self._need_noise("the action to be")
        self.bound = float(bound)
        self.shape = mdp.model.latent_shape
        mdp.model.keep_reference()  # at the end: a refused convention keeps nothing

    def next_latents(self, state: State, action: Tensor, noise: Tensor | None = None) -> Tensor:
        """As in `ActionConvention.next_latents`."""
        return self.transition(state).sample(action.clamp(-self.bound, self.bound), self.mdp.model.dtype)


class Control(ActionConvention):
    """The action is a few numbers per step, 0 for the base sampler, and the noise is drawn for the agent.

    Each control has a range. −1, 0 and 1 are its low end, its neutral value and its high end, and it is linear between.

    | control | numbers | what it does | low, neutral, high |
    |---|---|---|---|
    | guidance_scale | 1 | w of classifier-free guidance, twice the compute of none | 0, the model's, 2w + 2 |
    | noise_scale | 1 | multiplies the noise, and so the kernel's std | 0, 1, 1.5 |
    | drift | channels | shifts a latent channel's mean, in units of that mean's own noise | −3, 0, 3 |

    With all controls neutral the result is the base sampler's: up to rounding where `guidance_scale` is among them, to
    the bit where it is not.

    Args:
        mdp: the environment, as in `ActionConvention`.
        controls: name → (low, high), with the neutral value between; default: all that the model has, with the table's
            ranges.
        options: the base sampler's ``kernel``, ``eta`` and ``last_step``, as in `ActionConvention`.

    Attributes:
        names: one name per number of the action.

    Raises:
        ValueError: an unknown control, or one without effect here, or a range that its neutral value is not inside.

    >>> control = Control(DenoisingMDP.make("points"))
    >>> control.names
    ['noise_scale', 'drift_0', 'drift_1']
    >>> control.action(noise_scale=0.5, drift_1=3.0)
    tensor([-0.5000,  0.0000,  1.0000])
    """

    draws_noise = True
    bound = 1.0

    def __init__(
        self, mdp: DenoisingMDP, controls: Mapping[str, tuple[float, float]] | None = None, **options: Any
    ) -> None:
        super().__init__(mdp, **options)
        scale, channels = mdp.model.guidance_scale, mdp.model.latent_shape[0]
        known = {"noise_scale": (0.0, 1.0, 1.5), "drift": (-3.0, 0.0, 3.0)}
        if scale is not None:
            known = {"guidance_scale": (0.0, scale, 2 * scale + 2), **known}
        if controls is None:
            controls = {name: (low, high) for name, (low, _, high) in known.items()}
        if not isinstance(controls, Mapping) or not controls:
            raise ValueError(f"controls must name at least one of {list(known)}, each with its (low, high)")
        self.names: list[str] = []
        rows = []
        for name, ends in controls.items():
            if name not in known:
                raise ValueError(f"{type(mdp.model).__name__} has no control {name!r}; {suggest(str(name), known)}")
            if not isinstance(ends, Sequence) or len(ends) != 2:
                raise ValueError(f"the range of {name} must be (low, high), not {ends!r}")
            low, high = (number(end, f"an end of the range of {name}") for end in ends)
            if name != "guidance_scale":
                self._need_noise(name)
            neutral = known[name][1]
            if not low <= neutral <= high:
                raise ValueError(f"the range of {name} must have its neutral value {neutral:g} inside, not {low, high}")
            self.names += [f"drift_{i}" for i in range(channels)] if name == "drift" else [name]
            rows += [(low, neutral, high)] * (channels if name == "drift" else 1)
        self.shape = (len(rows),)
        self._range = torch.tensor(rows, device=mdp.model.device).T
        mdp.model.keep_reference()

    def values(self, action: Tensor) -> Tensor:
        """What actions ``[..., D]`` stand for, in the controls' own units."""
        low, neutral, high = self._range
        action = action.clamp(-1, 1)
        return neutral + action.clamp(min=0) * (high - neutral) + action.clamp(max=0) * (neutral - low)

    def action(self, **values: float) -> Tensor:
        """The action ``[D]`` of controls in their own units; those that are not named are neutral.

        Raises:
            ValueError: an unknown name, or a value outside its range.
        """
        action = torch.zeros(self.shape, device=self._range.device)
        for name, value in values.items():
            if name not in self.names:
                raise ValueError(f"unknown control {name!r}; {suggest(name, self.names)}")
            i = self.names.index(name)
            low, neutral, high = self._range[:, i].tolist()
            value = number(value, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], not {value}")
            side = high - neutral if value > neutral else neutral - low
            action[i] = (value - neutral) / side if side else 0.0
        return action

    def next_latents(self, state: State, action: Tensor, noise: Tensor | None = None) -> Tensor:
        """As in `ActionConvention.next_latents`."""
        assert noise is not None, "Control needs noise"
        values = dict(zip(self.names, self.values(action).unbind(-1), strict=True))
        transition = self.transition(state, values.get("guidance_scale"))

        ones = [1] * (noise.ndim - 2)
        if "noise_scale" in values:
            noise = noise * values["noise_scale"].reshape(-1, 1, *ones)
        if "drift_0" in values:
            drift = torch.stack([v for name, v in values.items() if name.startswith("drift")], -1)
            # the mean of n draws has std 1/√n
            noise = noise + drift.reshape(*drift.shape, *ones) / noise[0, 0].numel() ** 0.5
        return transition.sample(noise, self.mdp.model.dtype)


class RowNoise:
    """The base sampler's own noise: K draws from a row's stream at its first step, kept for the episode.

    Args:
        mdp: the environment, for K and the latents' shape.
        streams: the environment's random streams.
    """

    def __init__(self, mdp: DenoisingMDP, streams: RowStreams) -> None:
        self._mdp, self._streams = mdp, streams
        self._draws: Tensor | None = None

    def __call__(self, step: Tensor) -> Tensor:
        """The noise ``[B, *latent]`` of rows that are at ``step [B]``."""
        model, rows = self._mdp.model, torch.arange(len(step))
        began = rows if self._draws is None else (step == 0).nonzero()[:, 0].cpu()
        if len(began):
            draws = self._streams.normal(began.tolist(), (self._mdp.num_steps, *model.latent_shape))
            draws = draws.to(model.device, model.dtype)
            self._draws = draws if self._draws is None else self._draws.index_copy(0, began.to(model.device), draws)
        assert self._draws is not None
        return self._draws[rows.to(model.device), step.clamp(max=self._mdp.num_steps - 1)]


class Flat:
    """One vector per row for agents with a multilayer perceptron: latents, progress k / K, pooled conditioning.

    Args:
        mdp: the environment whose states are read.
        parts: which of "latents", "step" and "prompt", in this order.
        max_dimensions: the largest length that is accepted.

    Attributes:
        size: the vector's length F.

    Raises:
        ValueError: an unknown part, or a vector that is too long.

    >>> Flat(DenoisingMDP.make("points")).size
    9
    """

    def __init__(
        self,
        mdp: DenoisingMDP,
        parts: Sequence[Literal["latents", "step", "prompt"]] = ("latents", "step", "prompt"),
        max_dimensions: int = 2048,
    ) -> None:
        self.mdp, self.parts = mdp, tuple(parts)
        pooled = self._pool(mdp.drawn[:1])
        sizes = {"latents": torch.Size(mdp.model.latent_shape).numel(), "step": 1, "prompt": pooled.shape[1]}
        for part in self.parts:
            if part not in sizes:
                raise ValueError(f"an observation has no part {part!r}; {suggest(part, sizes)}")
        if not self.parts:
            raise ValueError(f"parts must name at least one of {list(sizes)}")
        self.size = sum(sizes[part] for part in self.parts)
        if self.size > integer(max_dimensions, "max_dimensions", at_least=1):
            raise ValueError(
                f"a flat observation would have {self.size} numbers, {sizes['latents']} of them latents, more than "
                f'max_dimensions={max_dimensions}: leave the latents out with parts=("step", "prompt"), or read the '
                f"dictionary observation with a network of your own, or allow it with max_dimensions={self.size}"
            )

    def __call__(self, state: State) -> Tensor:
        """The vectors ``[B, size]`` float32 of B states."""
        values = {
            "latents": lambda: state.latents.flatten(1).float(),
            "step": lambda: state.step[:, None] / self.mdp.num_steps,
            "prompt": lambda: self._pool(state.prompt_index),
        }
        return torch.cat([values[part]() for part in self.parts], 1)

    def _pool(self, index: Tensor) -> Tensor:
        return self.mdp.model.pool(self.mdp.conditioning.rows(index))
