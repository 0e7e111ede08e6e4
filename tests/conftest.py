"""What all tests share: a fixed seed, so that a failure repeats, and one thread, faster than two on small tensors."""

import gc
import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


def pytest_collection_modifyitems(items):
    """Tests that fork come first: once anything has started threads of autograd, a forked process cannot train."""
    items.sort(key=lambda item: not _forks(item.module))


def _forks(module) -> bool:
    return any(getattr(value, "__module__", None) == "processes" for value in vars(module).values())


@pytest.fixture(scope="session", autouse=True)
def frozen():
    """accelerate collects garbage after every run; it need not look through all of torch and timm each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever the test before has set: a forked process that computes with more threads than one hangs for good."""
    torch.set_num_threads(1)
