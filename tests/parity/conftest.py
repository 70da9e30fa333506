import pytest
import torch

from tests.support.tiny import one_thread  # noqa: F401  (cases that need threads ask for them)


@pytest.fixture
def device():
    return torch.device("cpu")
