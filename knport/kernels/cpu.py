"""The passes over full-size tensors on CPUs: every operator here is one that PyTorch vectorizes in both layouts.

`addcmul` with a map (N, 1, H, W) among its arguments is not, nor is `avg_pool2d` on a one-channel map, nor `var_mean`.
Rank-one terms are left to the matrix product, which adds all of them, bias included, in one pass.

Legend: N images, C channels, H x W the input's map, O x P the units, L = O P, R terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knport.geometry import Pairs

# Tensors of more bytes are gone through in parts. A temporary as large as a feature map is memory that the system maps
# and clears anew in every step, which takes longer than the arithmetic; parts of this size come from the heap.
PART = 2**21


def takes(*tensors: Tensor | None) -> bool:
    """Whether these are plain, non-empty float32 tensors on a CPU, outside of autocast, tracing and transforms.

    Elsewhere formulas serve better: a compiler fuses them, and transforms know no in-place products.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in (Tensor, torch.nn.Parameter) and t.numel()
        for t in tensors
        if t is not None
    )


def raw_moments(x: Tensor, order: int) -> Tensor:
    """E[x], E[x^2] and, for order 4, E[x^3] and E[x^4] over the channels of every pixel.

    Args:
        x: (N, C, H, W).
        order: 2 or 4.

    Returns:
        (N, order, H, W) in float32.
    """
    maps = x.new_empty(len(x), order, *x.shape[2:])
    torch.mean(x, 1, keepdim=True, out=maps[:, :1])
    if order == 2 and as_rows(x) is not None:  # in any other order vector_norm is slow
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        torch.mul(norm, norm, out=maps[:, 1:]).div_(x.shape[1])
        return maps
    for part, scratch, moments in _parts(x, maps[:, 1:]):
        square = torch.mul(part, part, out=scratch)
        torch.mean(square, 1, keepdim=True, out=moments[:, :1])
        if order == 4:
            torch.mean(square * part, 1, keepdim=True, out=moments[:, 1:2])
            torch.mean(square.mul_(square), 1, keepdim=True, out=moments[:, 2:])
    return maps


def careful_moments(x: Tensor, order: int) -> Tensor:
    """As `raw_moments`, in float64, the variance taken about the mean: E[u^2] - mu^2 then keeps what cancels."""
    maps = raw_moments(x, order).double()
    mean, square, *_ = maps.split(1, 1)
    for part, scratch, center, var in _parts(x, mean.float(), square):
        deviation = torch.sub(part, center, out=scratch)
        var.copy_(deviation.mul_(deviation).mean(1, keepdim=True))
    square.addcmul_(mean, mean)
    return maps


def _parts(x: Tensor, *others: Tensor):
    """Runs of images of `x`, scratch memory for each, and the same images of the others."""
    images = max(1, PART * len(x) // max(1, x.numel() * x.element_size()))
    scratch = torch.empty_like(x[:images])
    for part, *rest in zip(x.split(images), *(other.split(images) for other in others), strict=True):
        yield part, scratch[: len(part)], *rest


def scale_and_shift(
    convolved: Tensor,
    rstd: Tensor,
    offset: Tensor | None,
    vectors: Tensor | None,
    bias: Tensor | None,
    *,
    inplace: bool = False,
) -> Tensor:
    """convolved rstd - rstd sum_r offset_r vectors_r + bias.

    Args:
        convolved: (N, C, O, P).
        rstd: (N, 1, O, P).
        offset, vectors: (N, R, O, P) and (R, C), or None.
        bias: (C,) or None.
        inplace: overwrite `convolved`.
    """
    y = convolved.mul_(rstd) if inplace else convolved * rstd
    if offset is None:
        return y if bias is None else y.add_(_per_channel(bias, y))
    maps = offset * -rstd
    if bias is not None:
        maps, vectors = torch.cat([maps, torch.ones_like(rstd)], 1), torch.cat([vectors, bias[None]])
    return add_products(y, maps, vectors)


def add_products(y: Tensor, maps: Tensor, vectors: Tensor) -> Tensor:
    """y += sum_r maps_r vectors_r in place: y (N, C, O, P), maps (N, R, O, P), vectors (R, C)."""
    if (rows := as_rows(y)) is not None:
        rows.addmm_(maps.movedim(1, -1).flatten(0, -2), vectors)
    elif y.is_contiguous():
        y.flatten(2).baddbmm_(vectors.t().expand(len(y), -1, -1), maps.flatten(2))
    else:
        for r in range(len(vectors)):
            y.add_(maps[:, r : r + 1] * _per_channel(vectors[r], y))
    return y


def scale_and_shift_backward(
    grad: Tensor, convolved: Tensor, rstd: Tensor, offset: Tensor | None, vectors: Tensor | None, has_bias: bool
):
    """The gradients of `scale_and_shift`.

    Returns:
        those of convolved (N, C, O, P), of rstd (N, 1, O, P), of offset (N, R, O, P), of vectors (R, C), of bias (C,);
        None where there is no such argument.
    """
    if grad.stride() != convolved.stride():  # two orders at once are slow: expanded, or not channels-last
        grad = torch.empty_like(convolved).copy_(grad)
    grad_rstd, scaled = torch.empty_like(rstd), torch.empty_like(grad)
    # the products lie in the memory of the result, which is overwritten after
    torch.sum(torch.mul(grad, convolved, out=scaled), 1, keepdim=True, out=grad_rstd)
    torch.mul(grad, rstd, out=scaled)
    if offset is None:
        return scaled, grad_rstd, None, None, _sum_over_units(grad) if has_bias else None
    along = over_channels(grad, vectors)
    grad_rstd -= (offset * along).sum(1, keepdim=True)
    maps = offset * -rstd
    sums = over_units(grad, torch.cat([maps, torch.ones_like(rstd)], 1) if has_bias else maps)
    rank = len(vectors)
    return scaled, grad_rstd, along.mul_(-rstd), sums[:rank], sums[rank] if has_bias else None


def over_channels(y: Tensor, vectors: Tensor) -> Tensor:
    """sum_c y_c vectors_rc: y (N, C, O, P), vectors (R, C) -> (N, R, O, P)."""
    if (rows := as_rows(y)) is not None:
        maps = (rows @ vectors.t()).view(len(y), *y.shape[2:], -1)
        return maps.movedim(-1, 1)
    return torch.matmul(vectors, y.flatten(2)).view(len(y), -1, *y.shape[2:])


def over_units(y: Tensor, maps: Tensor) -> Tensor:
    """sum over units of maps_r y_c: y (N, C, O, P), maps (N, R, O, P) -> (R, C)."""
    if (rows := as_rows(y)) is not None:
        return maps.movedim(1, -1).flatten(0, -2).t() @ rows
    return torch.matmul(maps.flatten(2), y.flatten(2).transpose(1, 2)).sum(0)


def zero_padded(x: Tensor, pairs: Pairs) -> Tensor:
    """As `geometry.pad`, in the order of `x`; `F.pad` would clear the inner part too before it copies."""
    size = [length + before + after for length, (before, after) in zip(x.shape[2:], pairs, strict=True)]
    last = as_rows(x) is not None and x.dim() in (4, 5)
    order = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()] if last else torch.contiguous_format
    padded = torch.empty((*x.shape[:2], *size), dtype=x.dtype, memory_format=order)
    inner = padded
    for dim, (length, (before, after)) in enumerate(zip(x.shape[2:], pairs, strict=True), 2):
        inner.narrow(dim, 0, before).zero_()
        inner.narrow(dim, before + length, after).zero_()
        inner = inner.narrow(dim, before, length)
    inner.copy_(x)
    return padded


def add_input_gradient(grad: Tensor, x: Tensor, constant: Tensor, slope: Tensor) -> Tensor:
    """grad + constant + slope x, in the memory of grad where that is dense.

    grad and x are (N, C, H, W), constant and slope (N, 1, H, W).
    """
    if grad.stride() != x.stride():
        return (x * slope).add_(constant).add_(grad)
    for part, scratch, *maps, total in _parts(x, constant, slope, grad):
        total.add_(torch.mul(part, maps[1], out=scratch)).add_(maps[0])
    return grad


def as_rows(y: Tensor) -> Tensor | None:
    """(N, C, O, P) in channels-last order as a matrix (N O P, C) over the same memory; None for any other order."""
    rows = y.movedim(1, -1)
    return rows.view(-1, y.shape[1]) if rows.is_contiguous() else None


def _sum_over_units(y: Tensor) -> Tensor:
    return y.sum((0, *range(2, y.dim())))


def _per_channel(vector: Tensor, y: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * (y.dim() - 2))  # (C,) -> (C, 1, 1)
