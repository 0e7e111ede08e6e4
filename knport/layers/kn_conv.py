"""KNConv: a convolution of kernel normalized units (Nasirigerdeh et al., TMLR 2024, Eq. 4-5)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from knport import functional
from knport.errors import KNPortError
from knport.functional.statistics import UnitStatistics
from knport.geometry import ntuple, padding_pairs
from knport.layers.dropout import StatisticsDropout, with_batch


class _KNConv(StatisticsDropout):
    ndim: int
    # Called with (layer, statistics) in every forward pass where it is set, on the instance: `knport.privacy`.
    statistics_hook: Callable[[nn.Module, UnitStatistics], None] | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        dropout: float = 0.05,
        eps: float = 1e-5,
        norm_window=None,
        eval_stats: str = "expected",
        dropout_form: str = "moments",
        device=None,
        dtype=None,
    ):
        kernel_size = ntuple(kernel_size, self.ndim, "kernel_size")
        stride, dilation = ntuple(stride, self.ndim, "stride"), ntuple(dilation, self.ndim, "dilation")
        pairs = padding_pairs(padding, kernel_size, stride, dilation)
        symmetric = all(before == after for before, after in pairs)
        # torch.nn.ConvNd knows no pairs; it is given what it can hold, so that tools that read `.padding` are right
        # where they can be.
        known = padding if isinstance(padding, str) else tuple(b for b, _ in pairs) if symmetric else 0
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            known,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        if not symmetric and not isinstance(padding, str):
            self.padding = pairs
        self.norm_window = None if norm_window is None else ntuple(norm_window, self.ndim, "norm_window")
        self._set_dropout(dropout, eps, eval_stats, dropout_form)

    def forward(self, x: Tensor) -> Tensor:
        unbatched = x.dim() != self.ndim + 2
        if unbatched:
            x = with_batch(x, self.ndim, self)
        if x.shape[1] != self.in_channels:
            raise KNPortError(
                f"{type(self).__name__}: input of shape {tuple(x.shape)} has {x.shape[1]} channels; "
                f"expected {self.in_channels}"
            )
        where, how = (self.stride, self.padding, self.dilation), self._dropout_now()
        how["norm_window"], how["padding_mode"] = self.norm_window, self.padding_mode
        statistics = None
        if self.statistics_hook is not None:
            statistics = functional.kn_conv_statistics(x, self.kernel_size, *where, **how)
            self.statistics_hook(self, statistics)
        y = functional.kn_conv(
            x, self.filters(), self.bias, *where, self.groups, eps=self.eps, statistics=statistics, **how
        )
        return y.squeeze(0) if unbatched else y

    def filters(self) -> Tensor:
        """What is convolved: the weight, or what a sub-class makes of it."""
        return self.weight

    def __call__(self, *args, **kwargs) -> Tensor:
        y = super().__call__(*args, **kwargs)
        # What a full backward hook returns must not be edited in place, as `x += shortcut` in ResNets would.
        return y if self.statistics_hook is None or not self._backward_hooks else y.clone()

    def extra_repr(self) -> str:
        window = "" if self.norm_window is None else f", norm_window={self.norm_window}"
        return f"{super().extra_repr()}, {self._dropout_repr()}{window}"


_DOC = """A {dims} convolution whose units are kernel normalized, in the place of normalization and convolution.

    .. math:: y = \\frac{{U * W - \\mu' \\sum W}}{{\\sqrt{{\\sigma'^2 + \\epsilon}}}} + b

    U is the C x {kernel} unit under the kernel, mu' and the biased sigma'^2 are its mean and variance after dropout
    (Nasirigerdeh et al., TMLR 2024, Eq. 5). A sub-class of `torch.nn.{conv}` with the same parameters; there are no
    buffers, and no image sees another.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode: as `torch.nn.{conv}`.
            With groups the statistics still span all channels.
        padding: as `torch.nn.{conv}`, or one (before, after) pair per spatial dimension; zeros enter the statistics.
        dropout: probability with which an entry is left out of the statistics in training.
        eps: added to the variance.
        norm_window: size of the block that the statistics are taken of, centred on the kernel; None for the kernel.
        eval_stats: "expected" (deterministic, the expected mean and variance under dropout, so that the scale is that
            of training), "plain" (the undropped unit's) or "sample" (dropout stays on, as the published layer does).
        dropout_form: "moments", "shared" (the published KNConv) or "unit" (Eq. 1); see `knport.functional`.

    Shape:
        Input (N, C_in, {size}) or (C_in, {size}); output as `torch.nn.{conv}`.

    Example:
        >>> knport.{name}(8, 16, 3, padding=1)(torch.randn(2, 8, {input})).shape
        torch.Size([2, 16, {input}])
    """


class KNConv1d(_KNConv, nn.Conv1d):
    __doc__ = _DOC.format(name="KNConv1d", conv="Conv1d", dims="1D", kernel="k", size="L", input="16")
    ndim = 1


class KNConv2d(_KNConv, nn.Conv2d):
    __doc__ = _DOC.format(name="KNConv2d", conv="Conv2d", dims="2D", kernel="k_h x k_w", size="H, W", input="16, 16")
    ndim = 2


class KNConv3d(_KNConv, nn.Conv3d):
    __doc__ = _DOC.format(
        name="KNConv3d", conv="Conv3d", dims="3D", kernel="k_d x k_h x k_w", size="D, H, W", input="4, 16, 16"
    )
    ndim = 3
