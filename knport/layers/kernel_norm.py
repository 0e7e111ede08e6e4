"""KernelNorm: normalize every unit by its own statistics (Nasirigerdeh et al., TMLR 2024, Eq. 1-3)."""

from __future__ import annotations

from torch import Tensor, nn

from knport import functional
from knport.geometry import ntuple, padding_pairs
from knport.layers.dropout import StatisticsDropout, with_batch


class _KernelNorm(StatisticsDropout, nn.Module):
    ndim: int

    def __init__(
        self,
        kernel_size=1,
        stride=1,
        padding=0,
        *,
        dropout: float = 0.05,
        eps: float = 1e-5,
        eval_stats: str = "expected",
        dropout_form: str = "moments",
    ):
        super().__init__()
        self.kernel_size = ntuple(kernel_size, self.ndim, "kernel_size")
        self.stride = ntuple(stride, self.ndim, "stride")
        padding_pairs(padding, self.kernel_size, self.stride, (1,) * self.ndim)  # reject a bad one here, not in forward
        self.padding = padding
        self._set_dropout(dropout, eps, eval_stats, dropout_form)

    def forward(self, x: Tensor) -> Tensor:
        unbatched = x.dim() != self.ndim + 2
        if unbatched:
            x = with_batch(x, self.ndim, self)
        y = functional.kernel_norm(x, self.kernel_size, self.stride, self.padding, eps=self.eps, **self._dropout_now())
        return y.squeeze(0) if unbatched else y

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, {self._dropout_repr()}"


_DOC = """Kernel normalization over a {dims}.

    .. math:: y = \\frac{{u - \\mu'}}{{\\sqrt{{\\sigma'^2 + \\epsilon}}}}

    for every unit u, the C x {kernel} block under one kernel position; mu' and the biased sigma'^2 are those of the
    unit after dropout (Nasirigerdeh et al., TMLR 2024, Eq. 1-3). The units stand side by side in the output. There
    are no parameters and no buffers, and no image sees another.

    Args:
        kernel_size: of the unit. 1 normalizes every pixel over its channels.
        stride: distance between units; units overlap when it is smaller than the kernel.
        padding: zeros around the input, which enter the statistics; an int, one per spatial dimension, one
            (before, after) pair per spatial dimension, "same" or "valid".
        dropout: probability with which an entry is left out of the statistics in training.
        eps: added to the variance.
        eval_stats: "expected" (deterministic, the expected mean and variance under dropout, so that the scale is that
            of training), "plain" (the undropped unit's) or "sample" (dropout stays on, as the published layer does).
        dropout_form: "moments", "shared" or "unit" (the published KernelNorm); see `knport.functional`.

    Shape:
        Input (N, C, {size}) or (C, {size}); output the same with {size} replaced by units x kernel_size.

    Example:
        >>> knport.{name}(kernel_size={example})(torch.randn(2, 8, {input})).shape
        torch.Size([2, 8, {input}])
    """


class KernelNorm1d(_KernelNorm):
    __doc__ = _DOC.format(name="KernelNorm1d", dims="sequence", kernel="k", size="L", example="1", input="16")
    ndim = 1


class KernelNorm2d(_KernelNorm):
    __doc__ = _DOC.format(name="KernelNorm2d", dims="map", kernel="k_h x k_w", size="H, W", example="1", input="16, 16")
    ndim = 2


class KernelNorm3d(_KernelNorm):
    __doc__ = _DOC.format(
        name="KernelNorm3d", dims="volume", kernel="k_d x k_h x k_w", size="D, H, W", example="1", input="4, 16, 16"
    )
    ndim = 3
