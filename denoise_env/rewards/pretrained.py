"""Where the weights of rewards come from: local files and directories, and the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def check_reference(reference: Any, what: str, parts: int) -> None:
    """Raise a ``ValueError`` for a reference that is neither local nor of the hub's form.

    Args:
        reference: a path that exists, or "owner/name" (a repository) or "owner/name/file" on the hub.
        what: what it is, for the error.
        parts: 2 for a repository (or a local directory), 3 for a file.
    """
    form = {2: "a directory, or owner/name on the Hugging Face hub", 3: "a file, or owner/name/file on the hub"}[parts]
    if not isinstance(reference, str) or not reference:
        raise ValueError(f"{what} must be {form}, not {reference!r}")
    if Path(reference).expanduser().exists():
        return
    pieces = reference.split("/")
    if len(pieces) < parts or (parts == 2 and len(pieces) > 2) or pieces[0] in ("", ".", "..", "~"):
        raise ValueError(f"there is no {what} {reference!r}; give {form}")


def local(reference: str) -> str:
    """A reference, with the home directory written out where it is a path."""
    path = Path(reference).expanduser()
    return str(path) if path.exists() else reference


def fetch(reference: str) -> Path:
    """The local file of a reference, downloaded where it is on the hub and not in its cache.

    Raises:
        ValueError: it cannot be downloaded.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    from huggingface_hub import hf_hub_download

    owner, name, file = reference.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:
        raise ValueError(f"cannot download {reference}: {sentence(error)}; or give the path of a local copy") from error


def sentence(error: BaseException, limit: int = 400) -> str:
    """An error's message in one line, cut where it is long."""
    message = " ".join(str(error).split()).rstrip(".")
    return message if len(message) <= limit else f"{message[:limit]} ..."


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file by name; of a training checkpoint, those in its "state_dict".

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"cannot read the weights {str(path)!r}: {sentence(error)}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{str(path)!r} holds no weights by name")
    return dict(content)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: Any) -> None:
    """Load tensors into a module.

    Raises:
        ValueError: the module needs other names or shapes; the message has the first of them.
    """
    own = module.state_dict()
    check_names(
        type(module).__name__,
        source,
        own.keys() - tensors.keys(),
        tensors.keys() - own.keys(),
        {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape},
    )
    module.load_state_dict(dict(tensors))


def check_names(network: str, source: Any, missing: Any = (), unknown: Any = (), reshaped: Any = ()) -> None:
    """Raise a ``ValueError`` if there is a name that a network needs and does not find, find of another shape, or does
    not know.
    """
    faults = [
        f"{fault} {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
        for fault, names in (("it lacks", missing), ("it also has", unknown), ("other shapes have", reshaped))
        if names
    ]
    if faults:
        raise ValueError(f"{str(source)!r} does not hold the weights of {network}: {'; '.join(faults)}")


def from_transformers(kind: Any, reference: str, **options: Any) -> Any:
    """``kind.from_pretrained``, complete.

    Raises:
        ValueError: it cannot be found or read, or lacks weights (which transformers would draw at random).
    """
    complete = {"output_loading_info": True} if issubclass(kind, nn.Module) else {}
    try:
        loaded = kind.from_pretrained(local(reference), **complete, **options)
    except Exception as error:
        raise ValueError(f"cannot load {kind.__name__} from {reference!r}: {sentence(error)}") from error
    if not complete:
        return loaded
    model, info = loaded
    check_names(kind.__name__, reference, info["missing_keys"])
    return model
