"""Layers of the same geometry: a convolution alone, with each norm behind it, and kernel normalized in each form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from experiments.benchmarks.measure import Variant
from knport import KNConv2d
from knport.errors import KNPortError
from knport.functional import naive
from knport.functional.efficient import _units
from knport.kernels import cpu_conv

CONV, BATCH, GROUP, LAYER = "Conv2d", "Conv2d+BatchNorm2d", "Conv2d+GroupNorm(32)", "Conv2d+LayerNorm"
PLAIN, MOMENTS, SHARED, UNIT = "KNConv2d p=0", "KNConv2d moments", "KNConv2d shared", "KNConv2d unit"
PUBLISHED, PUBLISHED_PLAIN = "unfold shared", "unfold p=0"
# A KNConv2d by two ways of doing with less, in an otherwise eager network: see `layers.reach_cases`.
STRAIGHT_PLAIN, STRAIGHT = "its operators alone p=0", "its operators alone moments"
ALONE_PLAIN, ALONE = "compiled by itself p=0", "compiled by itself moments"
DROPOUT = 0.05


class UnfoldKNConv(nn.Conv2d):
    """KNConv as its definition says and as it was published: unfold all units, drop, normalize, multiply.

    As in the published layer, dropout stays on in evaluation.
    """

    def __init__(self, *args, dropout: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        where = (self.stride, self.padding, self.dilation, self.groups)
        return naive.kn_conv(x, self.weight, self.bias, *where, dropout=self.dropout, dropout_form="shared")


class StraightKNConv2d(KNConv2d):
    """The operators that a KNConv2d runs on CPUs and nothing before them: no hooks, no look at the arguments, no choice
    of kernels. For one size of input, kernels of one group, and as in `KNConv2d` dropout "moments"."""

    def __init__(self, *args, size: tuple[int, int], **kwargs):
        super().__init__(*args, **kwargs)
        where = (size, self.kernel_size, self.stride, self.padding, self.dilation, self.norm_window)
        self.how = {form: _units(*where, self.eps, self.dropout, form, "zeros") for form in ("moments", "expected")}

    def forward(self, x: Tensor) -> Tensor:
        how = self.how["moments" if self.training else "expected"]
        return cpu_conv.kn_conv(x, self.weight, self.bias, how, _no_formula)

    __call__ = forward


def _no_formula(*args, **kwargs):
    raise KNPortError("StraightKNConv2d has no second derivative; use KNConv2d")


class PrimitiveBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of plain operators, no kernel of its own: the other baseline of the TMLR paper's Table 6."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean = x.mean((0, 2, 3))
            var = (x - mean[:, None, None]).square().mean((0, 2, 3))
            with torch.no_grad():
                self.num_batches_tracked += 1
                unbiased = var * (len(mean) * x[:, 0].numel() / max(1, len(mean) * x[:, 0].numel() - len(mean)))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


Geometry = dict[str, Any]
"""Keyword arguments of `torch.nn.Conv2d`, bias not among them."""


def conv_with(norm: Callable[[int], nn.Module], geometry: Geometry) -> nn.Module:
    """A convolution without bias, and a norm of its output channels."""
    return nn.Sequential(nn.Conv2d(**geometry, bias=False), norm(geometry["out_channels"]))


def competitor(name: str, geometry: Geometry, *, engine: str = "eager", baseline: str | None = None) -> Variant:
    """The variant of a name above; slow ones take part in some rounds only."""
    p = 0.0 if name in (PLAIN, PUBLISHED_PLAIN) else DROPOUT
    form = {MOMENTS: "moments", SHARED: "shared", UNIT: "unit", PUBLISHED: "shared"}.get(name, "")
    builders: dict[str, Callable[[], nn.Module]] = {
        CONV: lambda: nn.Conv2d(**geometry, bias=False),
        BATCH: lambda: conv_with(nn.BatchNorm2d, geometry),
        GROUP: lambda: conv_with(lambda channels: nn.GroupNorm(32, channels), geometry),
        LAYER: lambda: conv_with(LayerNorm2d, geometry),
        **dict.fromkeys((PUBLISHED, PUBLISHED_PLAIN), lambda: UnfoldKNConv(**geometry, dropout=p)),
        **dict.fromkeys(
            (PLAIN, MOMENTS, SHARED, UNIT), lambda: KNConv2d(**geometry, dropout=p, dropout_form=form or "moments")
        ),
    }
    kernel_normalized = name.startswith(("KNConv2d", "unfold"))
    return Variant(
        name=name,
        build=builders[name],
        baseline=baseline or {PUBLISHED: MOMENTS, PUBLISHED_PLAIN: PLAIN}.get(name),
        every=3 if name in (PUBLISHED, PUBLISHED_PLAIN, UNIT) else 1,
        engine=engine,
        columns={"dropout": p, "form": form} if kernel_normalized else {},
    )
