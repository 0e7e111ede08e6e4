"""Load the checkpoints that the authors of kernel normalization released (norm-torch) into our KNResNets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from architectures.knresnet import KNResNet
from knport import KNPortError


def load_published(model: KNResNet, checkpoint: str | Path | Mapping) -> KNResNet:
    """Load a checkpoint of the authors' release (norm-torch) into `model`, in place, and return the model.

    Args:
        model: the KNResNet of the same depth, classes and resolution.
        checkpoint: the ``.pth`` file, or its state dict; both may be nested under "model" or "state_dict".

    Raises:
        KNPortError: the checkpoint is of another network; the message lists what does not fit.
    """
    where = checkpoint if isinstance(checkpoint, str | Path) else "the checkpoint"
    if isinstance(checkpoint, str | Path):
        if not Path(checkpoint).is_file():
            raise KNPortError(f"{checkpoint}: no such file; expected a checkpoint of the authors' norm-torch release")
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for nest in ("model", "state_dict"):
        checkpoint = checkpoint.get(nest, checkpoint)
    ours = _published_names(model)
    state = {ours(key): value for key, value in checkpoint.items()}
    expected = model.state_dict()
    wrong = [
        f"{key}: {tuple(state[key].shape) if key in state else 'missing'}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key not in state or state[key].shape != value.shape
    ] + [f"{key}: not in this network" for key in state.keys() - expected.keys()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise KNPortError(
            f"{where} does not fit this network: {'; '.join(wrong[:5])}{more}. Check depth, num_classes and "
            "low_resolution."
        )
    model.load_state_dict(state)
    return model


def _published_names(model: KNResNet):
    """A function from the authors' state-dict keys to ours."""
    names = {"block0": "stem", "conv_block_f": "final"}
    blocks = [f"sets.{i}.{j}" for i, blocks in enumerate(model.sets) for j in range(len(blocks))]
    names |= {f"res_block{k}": block for k, block in enumerate(blocks, start=1)}
    names |= {f"trans_block{k}": f"transitions.{k - 1}" for k in range(1, len(model.transitions) + 1)}

    def ours(key: str) -> str:
        key = re.sub(r"^module\.", "", key).replace(".conv1x1.", ".")
        root, _, rest = key.partition(".")
        return f"{names.get(root, root)}.{rest}"

    return ours
