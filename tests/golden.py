"""The authors' published layers and networks as vectors (float64, dropout 0); see tests/golden/."""

import json
import math
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "norm_torch.json").read_text())
_ARRAYS = np.load(FOLDER / "norm_torch.npz")


def array(kind: str, case: dict, name: str) -> torch.Tensor:
    return torch.from_numpy(_ARRAYS[f"{kind}/{case['name']}/{name}"])


def padding(case: dict):
    """(left, right, top, bottom) -> ((top, bottom), (left, right))."""
    left, right, top, bottom = case["padding_left_right_top_bottom"]
    return ((top, bottom), (left, right))


def published_state(case: dict) -> dict[str, torch.Tensor]:
    """A checkpoint under the authors' keys, every value from the formula that made the vectors."""
    state = {}
    for j, (key, shape) in enumerate(case["keys"]):
        count = math.prod(shape)
        fan_in = count // shape[0] if len(shape) >= 2 else 16
        flat = torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + 0.11 * j) / math.sqrt(fan_in)
        state[key] = flat.reshape(shape)
    return state


def published_input(case: dict) -> torch.Tensor:
    flat = torch.sin(0.731 * torch.arange(math.prod(case["input_shape"]), dtype=torch.float64))
    return flat.reshape(case["input_shape"])
