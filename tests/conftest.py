"""What all tests share: a fixed seed, so that a failure repeats."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
