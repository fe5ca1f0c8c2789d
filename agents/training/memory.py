"""How much memory a training run needs, computed from its configuration without weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from agents.algorithms import find_agent
from agents.base import Agent
from agents.dpo import DPO
from agents.final_samples import FinalSampleAgent
from agents.policy import DenoisingPolicy
from agents.training.config import TrainConfig
from denoise_env.conditioning import ENCODED_TOGETHER, GIB, ConditioningStore, Row
from denoise_env.mdp import DenoisingMDP
from denoise_env.models import outline
from denoise_env.models.base import example_prompt
from denoise_env.models.memory import DryRun
from denoise_env.prompts import Prompt

GPUS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
"""Memory of common GPUs, in GiB."""
RESERVE = 1.0
"""What CUDA's context and the workspaces of its libraries take of a GPU, in GiB: an assumption."""
FRAGMENTATION = 0.1
"""How much more than what lives PyTorch's allocator takes: an assumption."""


@dataclass(frozen=True)
class Memory:
    """The bytes of a training run: what lives all the time, and what each phase adds to it.

    Attributes:
        cuda: whether the device is a GPU, which has a memory of its own.
        images: episodes of a rollout.
        microbatch: episodes per network call.
        weights: the network, its adapters included.
        decoder: the VAE.
        encoders: the text encoders. On a GPU they are there while prompts are encoded, and on the host otherwise.
        optimizer: AdamW's two moments.
        copies: copies of the trained weights that the agent keeps (the reference, an average, weights of earlier
            iterations), and what else it trains, such as a critic.
        kept_conditioning: the budget of encoded prompts on the device.
        encoding: activations of the encoders, for as many prompts as are encoded together.
        rollout: latents of all steps and episodes, and what else the agent has the rollout record; of two rollouts
            where the agent collects one ahead.
        rollout_call: activations and conditioning of a network call without gradient, for a microbatch.
        decoding: activations and images of a microbatch that is decoded.
        swapped: the trained weights, set aside while others take their place; 0 where the agent has no others.
        gradients: the trained parameters' gradients.
        noises: the noise that finished samples are to be trained at, where the agent trains on those.
        update_call: activations and conditioning of a network call and its backward pass, for a microbatch.
        row: how much of that one more sample in the microbatch takes.
    """

    cuda: bool
    images: int
    microbatch: int
    weights: int
    decoder: int
    encoders: int
    optimizer: int
    copies: int
    kept_conditioning: int
    encoding: int
    rollout: int
    rollout_call: int
    decoding: int
    swapped: int
    gradients: int
    noises: int
    update_call: int
    row: int

    @property
    def standing(self) -> int:
        """What lives all the time, from the first optimizer step on."""
        kept = self.weights + self.decoder + self.optimizer + self.copies + self.kept_conditioning
        return kept if self.cuda else kept + self.encoders

    @property
    def phases(self) -> dict[str, int]:
        """The most bytes that live in each phase, by the phase's name."""
        standing, rollout = self.standing, self.rollout + self.swapped
        return {
            "encode prompts": standing + self.encoding + (self.encoders if self.cuda else 0),
            "rollout": standing + rollout + self.rollout_call,
            "decode": standing + rollout + self.decoding,
            "update": standing
            + self.rollout
            + self.noises
            + self.gradients
            + max(self.update_call, self.swapped + self.rollout_call if self.swapped else 0),
        }

    @property
    def peak(self) -> int:
        """The most bytes of any phase."""
        return max(self.phases.values())

    @property
    def gpu(self) -> int | None:
        """The memory of the smallest of `GPUS` that the run fits, in GiB, or ``None``."""
        needed = self.peak * (1 + FRAGMENTATION) / GIB + RESERVE
        return next((size for size in GPUS if needed <= size), None)

    def as_dict(self) -> dict[str, Any]:
        """All figures as a dict for JSON."""
        return {**dataclasses.asdict(self), "phases": self.phases, "peak": self.peak, "smallest_gpu_gib": self.gpu}


def plan(config: TrainConfig, cuda: bool = True, known: dict[str, list[int]] | None = None) -> Memory:
    """The memory of a run on one device, without weights.

    Rewards are not counted, nor what kernels and libraries take for themselves while they run. Prompts have the longest
    length, and a rollout the images of one process.

    Args:
        config: the run's configuration.
        cuda: whether the device is a GPU; on a CPU, device and host are one.
        known: what dry runs of the same model with the same options have found, which is not computed again; what is
            found joins it.

    Raises:
        ValueError: a configuration that does not fit together, or a model that has no outline.
    """
    model = outline(config.model, config.model_options)
    if model.device.type != "meta":
        raise ValueError(f"the model {config.model!r} has no outline without weights, from which memory is computed")
    dry = DryRun(model, cuda)
    agent = _agent(config, dry)
    size = agent.rows_per_example
    images = config.prompts_per_iteration * agent.group_size
    rows = max(1, min(config.microbatch or images, images) // size) * size
    trained = _bytes(agent.trained)
    learned = {id(p): p for group in agent.optimizer.param_groups for p in group["params"]}
    others = [t for kept in (*agent.kept.values(), model.kept) for t in kept.values()]
    latents = prod(model.latent_shape)
    means = config.num_steps * latents * 4 if agent.needs_means else 0
    decoded = min(config.microbatch or images, images)
    key = f"{config.model} {config.model_options} {cuda} {rows} {size} {decoded}"
    if (known := {} if known is None else known).get(key) is None:
        update, least = dry.predict(rows, grad=True), dry.predict(size, grad=True)
        row = (update - least) // (rows - size) if rows > size else least // size
        known[key] = [update, row, dry.predict(rows), dry.decode(decoded), dry.encode(ENCODED_TOGETHER)]
    update, row, call, decoding, encoding = known[key]
    encoders = sum(_bytes(_tensors(module)) for module in model.encoders().values())
    frozen = sum(_bytes(_tensors(module)) for module in model.frozen().values())
    return Memory(
        cuda=cuda,
        images=images,
        microbatch=rows,
        weights=_bytes(_tensors(model.network)),
        decoder=frozen - encoders,
        encoders=encoders,
        optimizer=2 * sum(p.nbytes for p in learned.values()),
        copies=sum(t.nbytes for t in others) + _bytes(_tensors(agent.modules)),
        kept_conditioning=int(config.conditioning_device_gib * GIB) if cuda else 0,
        encoding=encoding,
        rollout=(1 + agent.collects_ahead) * images * ((config.num_steps + 1) * latents * model.dtype.itemsize + means),
        rollout_call=call,
        decoding=decoding,
        swapped=trained if others else 0,
        gradients=sum(p.nbytes for p in learned.values()),
        noises=_noises(agent, images) * latents * 4,
        update_call=update,
        row=row,
    )


class _Store(ConditioningStore):
    """A store whose encodings are a dry run's."""

    row: Row

    def _encode(self, prompts: Mapping[str, Prompt]) -> Iterator[tuple[str, Row]]:
        return ((key, self.row) for key in prompts)


def _agent(config: TrainConfig, dry: DryRun) -> Agent:
    """The run's agent, with its copies of the weights and its own networks, on fake tensors."""
    store = _Store(dry.model)
    store.row = dry.row
    prompts = [example_prompt(dry.model, text) for text in ("a prompt", "another")]  # who compares captions needs two
    mdp = DenoisingMDP(dry.model, {"any": _any}, prompts, config.num_steps, conditioning=store)
    policy = DenoisingPolicy(mdp, config.kernel, config.eta, config.last_step, reduction=config.reduction)
    return find_agent(config.agent)(policy, config.agent_options, config.seed)


def _any(images: Tensor, prompts: Any) -> Tensor:
    raise NotImplementedError


def _noises(agent: Agent, images: int) -> int:
    """How many noises an update draws before it begins."""
    if not isinstance(agent, FinalSampleAgent):
        return 0
    if isinstance(agent, DPO):
        images = images // agent.group_size * (1 if agent.config.pairing == "best_worst" else agent.group_size // 2)
    return images * agent.config.draws_per_sample * agent.config.epochs


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
