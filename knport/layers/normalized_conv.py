"""NormalizedConv2d: standardized columns of im2col, convolved, with gain and bias (Kim et al., NCNN, 2020).

The prior art of KNConv: its units are normalized in the same way, without dropout, and an affine follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knport.layers.kn_conv import _KNConv


class NormalizedConv2d(_KNConv, nn.Conv2d):
    """A 2D convolution of standardized units, each output channel with a gain and a bias.

    .. math:: y = \\gamma \\frac{U * W - \\mu \\sum W}{\\sqrt{\\sigma^2 + \\epsilon}} + \\beta

    U is the C x k_h x k_w unit under the kernel, a column of im2col, mu and the biased sigma^2 are its mean and
    variance (section 2.1; Eq. 2 there adds eps to sigma, the code of section 2.4 to sigma^2, as here). A sub-class of
    `torch.nn.Conv2d`; there are no buffers, and no image sees another.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode: as `torch.nn.Conv2d`;
            `bias` is beta. With groups the statistics still span all channels.
        padding: as `knport.KNConv2d`; zeros enter the statistics.
        gain: whether there is a gamma.
        weight_standardization: standardize the filters too (Qiao et al., 2019), the paper's "WS + NC": each has mean 0
            and norm 1, which keeps the scale of the output at that of a standardized unit.
        eps: added to the variances.

    Shape:
        Input (N, C_in, H, W) or (C_in, H, W); output as `torch.nn.Conv2d`.

    Example:
        >>> knport.NormalizedConv2d(8, 16, 3, padding=1)(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 16, 16, 16])
    """

    ndim = 2

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
        gain: bool = True,
        weight_standardization: bool = False,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        where = (stride, padding, dilation, groups, bias, padding_mode)
        made = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, *where, dropout=0.0, eps=eps, **made)
        self.weight_standardization = weight_standardization
        self.register_parameter("gain", nn.Parameter(torch.ones(out_channels, **made)) if gain else None)

    def reset_parameters(self) -> None:
        """The weights as `torch.nn.Conv2d`, gain 1, bias 0."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self._parameters.get("gain") is not None:  # torch calls this once before there is one
            nn.init.ones_(self.gain)

    def filters(self) -> Tensor:
        return self.make_filters(self.weight, self.gain)

    def make_filters(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        """What is convolved: (C_out, C_in / groups, k_h, k_w), standardized where asked for, times the gain."""
        if self.weight_standardization:
            weight = standardize(weight, self.eps)
        return weight if gain is None else weight * gain[:, None, None, None]

    def extra_repr(self) -> str:
        text = super().extra_repr().replace("dropout=0.0, ", "")
        text += "" if self.gain is not None else ", gain=False"
        return f"{text}, weight_standardization=True" if self.weight_standardization else text


def standardize(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Filters of mean 0 and, but for `eps`, norm 1: (W - mean) / sqrt(n (var + eps)), n the entries of a filter."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    within = tuple(range(1, weight.dim()))
    var, mean = torch.var_mean(wide, within, correction=0, keepdim=True)
    return ((wide - mean) * torch.rsqrt(weight[0].numel() * (var + eps))).to(weight.dtype)
