"""What all tests share: a fixed seed, so that a failure repeats, and one thread, faster than two on small tensors."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
