"""How much memory a model takes while it works, found by running it on tensors that have a shape and no data."""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from denoise_env.models.base import DenoisingModel, example_prompt


class LiveBytes(TorchDispatchMode):
    """Within this context, counts the bytes of the tensors that are made in it and still live.

    It sees what operations return, not what a kernel takes for itself while it runs.

    Attributes:
        peak: the most bytes that lived at once so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` and count what it returns, unless that is a view of what was there before."""
        self._know((args, kwargs), counted=False)
        found = func(*args, **(kwargs or {}))
        self._know(found, counted=True)
        return found

    def _know(self, tensors: Any, counted: bool) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._storages:
                key, size = storage._cdata, storage.nbytes() if counted else 0
                self._storages[key] = weakref.ref(storage, partial(self._forget, key, size))
                self._live += size
                self.peak = max(self.peak, self._live)

    def _forget(self, key: int, size: int, storage: Any) -> None:
        del self._storages[key]
        self._live -= size


class CudaAutocast(TorchFunctionMode):
    """Within this context, autocast on the CPU computes in float32 what it computes so on CUDA.

    The operations are those of PyTorch's ``AT_FORALL_FP32`` and ``AT_FORALL_FP32_SET_OPT_DTYPE`` that networks use.
    """

    NAMES = (
        *("layer_norm", "group_norm", "rms_norm", "norm", "softmax", "log_softmax", "softplus", "pow", "__pow__"),
        *("exp", "log", "rsqrt", "reciprocal", "sum", "prod", "cumsum", "interpolate"),
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, of these operations on float32."""
        if func.__name__ in self.NAMES and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
        return func(*args, **(kwargs or {}))


class DryRun:
    """A model without weights, run as if it had some.

    Args:
        model: on the meta device, as `denoise_env.models.outline` makes it; its tensors become fake ones on the CPU.
        cuda: whether autocast computes in float32 what it does on CUDA, or what it does on the CPU.

    Attributes:
        model: the model.
        row: the conditioning of a prompt of the longest length, as `DenoisingModel.split` has it.
    """

    def __init__(self, model: DenoisingModel, cuda: bool = True) -> None:
        self.model, self._cuda = model, cuda
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._converted: dict[int, tuple[Tensor, Tensor]] = {}
        row = model.split(model.encode([example_prompt(model)]))[0]
        kept = getattr(model, "unconditional_row", {})
        modules = [module for root in (model.network, *model.frozen().values()) for module in root.modules()]
        holders: list[Any] = [
            vars(model),
            kept,
            row,
            *(d for m in modules for d in (vars(m), m._parameters, m._buffers)),
        ]
        with self._fake:
            for holder in holders:
                for name, value in holder.items():
                    if isinstance(value, Tensor):
                        holder[name] = self._convert(value)
        self.row = row

    def predict(self, rows: int, grad: bool = False) -> int:
        """The most bytes of a network call for ``rows`` samples beside its weights, with their conditioning.

        Args:
            rows: how many samples; with guidance the network gets twice as many rows.
            grad: with gradient and the backward pass. The trained weights have gradients already, which do not count.
        """
        model = self.model
        timesteps = model.schedule(2).timesteps
        for parameter in model.trainable().values():
            parameter.grad = torch.empty_like(parameter) if grad else None

        def run() -> None:
            latents = torch.empty(rows, *model.latent_shape, dtype=model.dtype)
            conditioning = model.collate([{name: value.clone() for name, value in self.row.items()}] * rows)
            with torch.set_grad_enabled(grad):
                output = model.predict(latents, torch.empty(rows, dtype=timesteps.dtype), conditioning)
                if grad:
                    loss = output.float().square().mean()
                    # As loss.backward(), which would turn `CudaAutocast` off while checkpointing computes again.
                    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)

        found = self._peak(run)
        model.network.zero_grad()
        return found

    def decode(self, rows: int) -> int:
        """The most bytes while ``rows`` samples are decoded, the images included."""
        shape = (rows, *self.model.latent_shape)
        return self._peak(lambda: self.model.decode(torch.empty(shape, dtype=self.model.dtype)))

    def encode(self, prompts: int) -> int:
        """The most bytes while the encoders read ``prompts`` prompts of the longest length beside their weights."""
        words = (self.model.longest or 1) if self.model.masks else 1  # elsewhere the tokenizer pads
        live = LiveBytes()
        ran: list[int] = []
        encoders = [(encoder, "forward") for encoder in self.model.encoders().values()]
        if self.model.images_per_prompt:
            encoders.append((self.model.frozen()["vae"], "encode"))
        with contextlib.ExitStack() as stack:
            for encoder, method in encoders:
                stack.enter_context(self._faked(encoder, method, live, ran))
            stack.enter_context(warnings.catch_warnings(action="ignore"))  # of a prompt that is cut
            with contextlib.suppress(DynamicOutputShapeException):  # raised where padding is cut off, after the encoder
                self.model.encode([example_prompt(self.model, "a " * words)] * prompts)
        if len(set(ran)) < len(encoders):
            raise RuntimeError(f"of {len(encoders)} encoders only {len(set(ran))} have run")
        return live.peak

    @contextlib.contextmanager
    def _faked(self, encoder: nn.Module, method: str, live: LiveBytes, ran: list[int]) -> Iterator[None]:
        """A context in which an encoder alone computes on fake tensors, and the tokenizer before it on real ones."""
        own: Any = getattr(encoder, method)
        if hasattr(encoder, "set_attn_implementation"):
            encoder.set_attn_implementation("sdpa")  # type: ignore[operator]  # as loaded; an outline has "eager"

        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(Tensor, self._fake.from_tensor, (args, kwargs))
            with self._fake, live, torch.no_grad():
                found = own(*args, **kwargs)
            ran.append(id(encoder))
            return found

        setattr(encoder, method, run)
        try:
            yield
        finally:
            setattr(encoder, method, own)

    def _peak(self, run: Callable[[], object]) -> int:
        with contextlib.ExitStack() as stack:
            if self._cuda:
                stack.enter_context(CudaAutocast())
            stack.enter_context(self._fake)
            live = stack.enter_context(LiveBytes())
            stack.enter_context(torch.no_grad())
            run()
        return live.peak

    def _convert(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor on the meta device: one for each, so that shared weights stay shared."""
        if id(tensor) not in self._converted:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            self._converted[id(tensor)] = tensor, fake
        return self._converted[id(tensor)][1]
