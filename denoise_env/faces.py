"""What the Gymnasium and the TorchRL environments share: their MDP, reset options, the rows' random streams."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from denoise_env.arguments import MAX_SEED, boolean, integer
from denoise_env.mdp import DenoisingMDP, State, row_generators
from denoise_env.naming import suggest
from denoise_env.prompts import Prompt

RESET_OPTIONS = ("prompts", "images", "group_size", "shared_noise", "reset_mask")


def resolve_mdp(
    model: str | DenoisingMDP, num_steps: int | None, max_episode_steps: int | None, **options: Any
) -> DenoisingMDP:
    """The MDP of names and numbers, or the live one; options that are ``None`` were not given.

    Raises:
        ValueError: ``num_steps`` and ``max_episode_steps`` differ, options beside a live MDP, or what
            `DenoisingMDP.make` refuses.
    """
    if None not in (num_steps, max_episode_steps) and num_steps != max_episode_steps:
        raise ValueError(
            f"num_steps={num_steps} and max_episode_steps={max_episode_steps} both mean the number of "
            "denoising steps: give one"
        )
    options["num_steps"] = max_episode_steps if num_steps is None else num_steps
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(model, DenoisingMDP):
        model = DenoisingMDP.make(model, **given)
    elif given:
        raise ValueError(f"{next(iter(given))!r} belongs to the DenoisingMDP: set it where that is built")
    if model.compares_groups:
        raise ValueError(
            f"the reward {model.compares_groups[0]!r} compares the samples of a group, and an environment's rows end "
            "each on their own: collect with agents.rollout.collect"
        )
    return model


@dataclass(frozen=True)
class ResetRequest:
    """What one reset asks for.

    Attributes:
        mask: ``[num_envs]`` bool, the rows that begin anew.
        prompts: one per group of these rows, or ``None`` to draw them.
        group_size: how many neighbouring rows share a prompt, G.
        shared_noise: whether the rows of a group share their initial latents too.
    """

    mask: NDArray[np.bool_]
    prompts: Sequence[str | Prompt] | None
    group_size: int
    shared_noise: bool

    @classmethod
    def parse(
        cls, options: Mapping[str, Any] | None, num_envs: int, group_size: int = 1, shared_noise: bool = False
    ) -> "ResetRequest":
        """Read reset options, never changing them; ``group_size`` and ``shared_noise`` are the defaults.

        Raises:
            ValueError: an option that does not exist or of another type, a bad mask, or groups that do not divide
                the rows or that the mask splits.
        """
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ValueError(f"reset options must be a dictionary by name, not {options!r}")
        for name in options:
            if name not in RESET_OPTIONS:
                raise ValueError(f"unknown reset option {name!r}; {suggest(str(name), RESET_OPTIONS)}")
        size = integer(options.get("group_size", group_size), "group_size")
        if size < 1 or num_envs % size:
            raise ValueError(f"group_size must divide num_envs: {num_envs} rows do not make groups of {size}")
        mask = np.ones(num_envs, bool)
        if options.get("reset_mask") is not None:
            mask = _read_mask(options["reset_mask"], num_envs)
            groups = mask.reshape(-1, size)
            split = groups.any(1) & ~groups.all(1)
            if split.any():
                first = int(split.argmax()) * size
                raise ValueError(
                    f"a group is reset whole: reset_mask splits the group of rows {first} to {first + size - 1}"
                )
        prompts = options.get("prompts")
        if options.get("images") is not None:
            prompts = _with_images(prompts, options["images"])
        return cls(mask, prompts, size, boolean(options.get("shared_noise", shared_noise), "shared_noise"))


def _with_images(prompts: Any, images: Any) -> list[Prompt]:
    """Prompts, each with its image; a ``ValueError`` where they do not go together."""
    for name, values in (("prompts", prompts), ("images", images)):
        if not isinstance(values, list | tuple):
            raise ValueError(f"with images, {name} must be a list with one for each group, not {type(values).__name__}")
    if len(prompts) != len(images):
        raise ValueError(f"images must be as many as prompts: {len(images)} were given for {len(prompts)}")
    found = []
    for prompt, image in zip(map(Prompt.of, prompts), images, strict=True):
        if prompt.images:
            raise ValueError(f"{prompt.text!r} has an image of its own: leave images out")
        found.append(Prompt(prompt.text, prompt.negative, [image], prompt.metadata))
    return found


def _read_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    array = np.array(mask.cpu().numpy() if isinstance(mask, Tensor) else mask)
    if array.dtype != np.bool_ or array.shape != (num_envs,):
        raise ValueError(f"reset_mask must be {num_envs} bools, not {array.dtype} of shape {array.shape}")
    if not array.any():
        raise ValueError("reset_mask must have at least one True")
    return array


class RowStreams:
    """One random stream per row: row i depends on its seed and its own past alone.

    Args:
        num_envs: the number of rows, at least 1.
    """

    def __init__(self, num_envs: int) -> None:
        self.num_envs = integer(num_envs, "num_envs", at_least=1)
        self._generators: list[torch.Generator] | None = None
        self._ahead: dict[int, torch.Generator] = {}

    def seed(self, seed: int | None) -> None:
        """Row i gets ``seed + i``; ``None`` forgets the streams, and the next ``begin`` draws new ones.

        Raises:
            ValueError: no seed; the streams are as before.
        """
        first = None if seed is None else integer(seed, "seed", 0, MAX_SEED - (self.num_envs - 1))
        self._generators = None if first is None else row_generators(range(first, first + self.num_envs))
        self._ahead = {}

    @contextmanager
    def begin(
        self,
        mdp: DenoisingMDP,
        request: ResetRequest,
        seed: int | Sequence[int | None] | None,
        draw_seed: Callable[[], tuple[int, Callable[[], object]]],
    ) -> Iterator[State]:
        """A context with the first states of the masked rows; unless its block succeeds, nothing has been drawn.

        Args:
            mdp: the environment in which they begin.
            request: the rows, their prompts and groups.
            seed: row i gets ``seed + i``, or the i-th of a sequence; a row without one continues its stream.
            draw_seed: draws a seed for rows that have neither seed nor stream; returns it and what undoes the draw.

        Raises:
            ValueError: a bad seed, or what `DenoisingMDP.reset` refuses.
        """
        seeds = _row_seeds(seed, self.num_envs)
        streams, undo = self._generators, None
        try:
            if streams is None:
                first, undo = draw_seed() if None in seeds else (0, None)
                streams = row_generators([first + i if s is None else s for i, s in enumerate(seeds)])
                seeds = [None] * self.num_envs
            streams = list(streams)
            for i in np.flatnonzero(request.mask).tolist():
                s = seeds[i]
                streams[i] = streams[i].clone_state() if s is None else torch.Generator().manual_seed(s)
            rows = [streams[i] for i in np.flatnonzero(request.mask)]
            yield mdp.reset(rows, request.prompts, group_size=request.group_size, shared_noise=request.shared_noise)
        except BaseException:
            if undo is not None:
                undo()
            raise
        self._generators = streams
        for i in np.flatnonzero(request.mask).tolist():
            self._ahead.pop(i, None)

    def normal(self, rows: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal draws ``[len(rows), *shape]``, each row's from its own stream.

        The streams themselves go on when a step is `stepped`; until then the same call draws the same numbers.
        """
        assert self._generators is not None
        self._ahead |= {i: self._generators[i].clone_state() for i in rows}
        return torch.stack([torch.randn(*shape, generator=self._ahead[i]) for i in rows])

    @contextmanager
    def stepped(self, rows: NDArray[np.bool_] | None = None) -> Iterator[None]:
        """A context that ends a step of ``rows [num_envs]`` (default: all), for which `normal` may have drawn.

        The streams have gone on inside; if the block raises, they are as they were.
        """
        before, ahead = self._generators, self._ahead
        if before is not None and ahead:
            self._generators = [
                ahead[i] if i in ahead and (rows is None or rows[i]) else stream for i, stream in enumerate(before)
            ]
        try:
            yield
        except BaseException:
            self._generators = before
            raise
        self._ahead = {}


def _row_seeds(seed: int | Sequence[int | None] | None, rows: int) -> list[int | None]:
    """One seed per row, ``None`` where a row has none."""
    if seed is None:
        return [None] * rows
    if isinstance(seed, Sequence) or (isinstance(seed, np.ndarray) and seed.ndim == 1):
        if isinstance(seed, str | bytes) or len(seed) != rows:
            raise ValueError(f"seed must be an integer or a list of one per row, {rows}, not {seed!r}")
        return [None if s is None else integer(s, "a row's seed", 0, MAX_SEED) for s in seed]
    first = integer(seed, "seed", 0, MAX_SEED - (rows - 1))
    return [first + i for i in range(rows)]
