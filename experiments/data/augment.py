"""Random crop after zero padding, and horizontal flip, for a whole batch as one gather.

Letters: B images, C channels, H x W pixels, p pixels of padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.randomness import generator


def draw(kind: str, seed: int, epoch: int, count: int, padding: int) -> Tensor | None:
    """What epoch `epoch` does to each of `count` images, drawn for all at once and indexed by image.

    Returns: int64 (count, 3): rows and columns shifted, 0..2p each, and 1 for a flip; None if `kind` is ``none``.
    """
    if kind == "none":
        return None
    random = generator(seed, "augment", epoch)
    shifts = torch.randint(0, 2 * padding + 1, (count, 2), generator=random)
    flips = torch.randint(0, 2 if kind == "crop-flip" else 1, (count, 1), generator=random)
    return torch.cat([shifts, flips], dim=1)


def crop_flip(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    """Shift each image inside its zero padding, then mirror it if its draw says so.

    Args:
        images: any dtype, (B, C, H, W).
        draws: int64 (B, 3), as `draw` gives them, rows of these images.
        padding: p.

    Returns: (B, C, H, W).
    """
    b, c, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)  # (B, C, H+2p, W+2p)
    down, right, flip = draws.unsqueeze(-1).unbind(1)  # (B, 1) each
    rows = torch.arange(h, device=images.device) + down  # (B, H)
    columns = torch.arange(w, device=images.device)
    columns = torch.where(flip.bool(), columns.flip(0), columns) + right  # (B, W)
    pixels = rows.unsqueeze(2) * (w + 2 * padding) + columns.unsqueeze(1)  # (B, H, W), into the flattened padded image
    pixels = pixels.view(b, 1, h * w).expand(b, c, h * w)
    return padded.flatten(2).gather(2, pixels).view(b, c, h, w)
