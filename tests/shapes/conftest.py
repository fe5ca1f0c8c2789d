import pytest
import torch

from denoise_env.shapes import Verifier


@pytest.fixture(scope="session")
def verifier():
    return Verifier()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
