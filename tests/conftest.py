"""What all tests share: a fixed seed, so that a failure repeats, and one thread, faster than two on small tensors."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
