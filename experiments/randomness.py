"""Randomness without history: every draw is a function of (seed, epoch, index) or (seed, step, rank).

Nothing here remembers what was drawn before, so a run that was killed goes on to the same bits by knowing
its step alone: there is no sampler, no generator state and no scheduler to restore.
"""

from __future__ import annotations

import hashlib

import torch


def fold(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from a seed and what the draw is for, e.g. ``fold(seed, "order", epoch)``.

    Different keys give unrelated values; about 2 microseconds.
    """
    text = "/".join(map(str, (seed, *keys)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator seeded by `fold`: draws made with it are the same whatever the device of the training."""
    return torch.Generator().manual_seed(fold(seed, *keys))


def seed_device(device: torch.device, value: int) -> None:
    """Seed what dropout draws from on `device`, in place of `torch.manual_seed`, which is 50 times slower."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(value)
    elif device.type != "cpu":
        torch.manual_seed(value)
