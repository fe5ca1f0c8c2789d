"""The registered environments, as test parameters."""

import importlib.util

import pytest

# To be removed when the Shapes model and its weights are in the package: then every id is plain.
_NO_SHAPES = pytest.mark.skipif(
    importlib.util.find_spec("denoise_env.models.stable_diffusion") is None,
    reason="the Shapes model is not in the package yet",
)
IDS = [
    "denoise_env/Points-v0",
    pytest.param("denoise_env/Shapes-v0", marks=_NO_SHAPES),
]
