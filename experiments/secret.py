"""The key of a private run: which images are drawn, their dropout and the noise follow from it and the step alone.

Whoever holds the key can compute the noise and take it away again, so it is no part of the configuration: it is drawn
from the operating system, lies in the run folder for as long as the run may have to go on, and is removed at its end.
A run that was killed repeats its last steps with the same draws, to the same bits, and so spends no privacy twice.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import torch

from experiments.randomness import fold
from knport.errors import KNPortError

KEY_BYTES = 32
HEADER, WORDS = 24, 624  # of the state of torch's CPU generator: bytes before its Mersenne Twister; words of 64 bits


class Secret:
    """Generators as functions of a key and of what they are for.

    `torch.Generator.manual_seed` uses 32 bits of a seed on the CPU: few enough to try them all, and in a run of many
    steps two would draw the same noise. Here the whole state of the generator, 19,968 bits, is SHAKE-256 of the key.
    CUDA's generator takes 64 bits, and gets 63 that are a hash of the key.
    """

    def __init__(self, key: bytes):
        self.key = key

    @classmethod
    def from_seed(cls, seed: int) -> Secret:
        """A key that anybody can compute: for tests, never for data that need protection."""
        return cls(hashlib.sha256(f"privacy seed {seed}".encode()).digest())

    def generator(self, device: torch.device, *purpose: int | str) -> torch.Generator:
        """A generator on `device`, e.g. ``generator(device, "noise", step)``."""
        random = torch.Generator(device)
        self._seed(random, purpose)
        return random

    def seed_device(self, device: torch.device, *purpose: int | str) -> None:
        """Seed what dropout draws from on `device`."""
        self._seed(torch.default_generator, purpose)
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._seed(torch.cuda.default_generators[index], purpose)
        elif device.type != "cpu":
            torch.manual_seed(fold(int.from_bytes(self.key), *purpose))

    def _seed(self, random: torch.Generator, purpose: tuple[int | str, ...]) -> None:
        if random.device.type != "cpu":
            random.manual_seed(fold(int.from_bytes(self.key), *purpose))
            return
        text = "/".join(map(str, purpose)).encode()
        bits = hashlib.shake_256(self.key + text).digest(4 * WORDS)
        state = random.manual_seed(0).get_state()  # ready to make its next numbers from the words
        words = torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(WORDS, 4)
        state[HEADER : HEADER + 8 * WORDS].view(WORDS, 8)[:, :4] = words  # a word is 32 bits, stored in 64
        random.set_state(state)


def make_key(path: Path) -> None:
    """Draw a key from the operating system and store it where nobody but its owner may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_key(path: Path) -> Secret:
    """Raises `KNPortError` if the key is not there or not whole: a run may not go on with another."""
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as error:
        key, reason = b"", f" ({error})"
    else:
        reason = f" ({len(key)} bytes)"
    if len(key) != KEY_BYTES:
        raise KNPortError(
            f"{path}: no key of {KEY_BYTES} bytes{reason}. Without it the steps since the last checkpoint would be"
            " drawn again with other noise, and their privacy spent twice: put the file back, or start again in"
            " another --run-dir"
        )
    return Secret(key)
