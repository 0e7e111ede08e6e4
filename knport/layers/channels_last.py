"""A norm of (N, C, ...) maps where the channels come last: tokens (N, L, C) and (N, H, W, C) maps."""

from __future__ import annotations

from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """Apply `norm`, which takes (N, C, ...), to tensors whose channels are the last dimension.

    Args:
        norm: e.g. a `torch.nn.GroupNorm`.

    Shape:
        Input and output (N, ..., C).

    Example:
        >>> ChannelsLast(nn.BatchNorm1d(192))(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 192])
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(-1, 1)).movedim(1, -1)
