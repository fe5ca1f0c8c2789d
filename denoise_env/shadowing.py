"""Whether ``agents``, which is installed beside this package, is what Python finds under that name."""

import importlib.util
from pathlib import Path

OURS = Path(__file__).resolve().parents[1] / "agents"


def shadowed() -> str | None:
    """A sentence that says which other ``agents`` hides ours and what to do, or ``None``."""
    spec = importlib.util.find_spec("agents")
    places = [Path(place).resolve() for place in (spec and spec.submodule_search_locations) or ()]
    if not OURS.is_dir() or OURS in places:
        return None
    found = places[0] if places else spec and spec.origin
    return (
        f"`import agents` finds {found}, which hides denoise_env's own package {OURS}: rename or uninstall that one, "
        f"or put {OURS.parent} first on PYTHONPATH"
    )
