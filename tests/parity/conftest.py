import pytest
import torch


@pytest.fixture
def device():
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: cases that need threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
