"""The passes over full-size tensors on CPUs: every operator here is one that PyTorch vectorizes in both layouts.

`avg_pool2d` on a one-channel map is not, nor `var_mean`, nor `addcmul` with a map (N, 1, H, W) among its factors, but
for tensors flattened as by `_Rows`: there it multiplies by a map and adds a vector in one pass.

Legend: N images, C channels, H x W the input's map, O x P the units, L = O P, R terms.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from knport.geometry import Pairs

# Tensors of more bytes than WHOLE are gone through in parts of PART bytes. A larger temporary is memory that the system
# maps and clears anew in every step, which takes longer than the arithmetic; parts cost their calls.
WHOLE, PART = 2**24, 2**22
# So few channels are added one after the other, and lie apart for that.
FEW_CHANNELS = 8
_PLAIN = (Tensor, torch.nn.Parameter)

without_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operators do not pass through autograd, as in PyTorch's own custom operators; with gradients off
they would pass through it for nothing."""


def takes(*tensors: Tensor | None) -> bool:
    """Whether these are plain, non-empty float32 tensors on a CPU, outside of autocast, tracing and transforms.

    Elsewhere formulas serve better: a compiler fuses them, and transforms know no in-place products.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu"):
        return False
    for t in tensors:
        if t is not None and not (t.dtype is torch.float32 and t.is_cpu and type(t) in _PLAIN and t.numel()):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def number(value: float, dtype: torch.dtype) -> Tensor:
    """A tensor of one number. A Python number is made into one at every call, which takes as long as a small map."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.tensor(value, dtype=dtype)


def channel_sums(x: Tensor, order: int) -> Tensor:
    """The sums of x, x^2 and, for order 4, x^3 and x^4 over the channels of every pixel.

    Args:
        x: (N, C, H, W).
        order: 2 or 4.

    Returns:
        (order, N, 1, H, W) in float32.
    """
    n, channels, *size = x.shape
    if channels > FEW_CHANNELS and is_rows(x):
        return _row_sums(as_rows(x), order).view(order, n, 1, *size)
    sums = x.new_empty(order, n, 1, *size)
    if channels <= FEW_CHANNELS:
        _add_planes(x.contiguous().split(1, 1), *sums)
        return sums
    first, second, *higher = sums.unbind()
    torch.sum(x, 1, keepdim=True, out=first)
    for part, scratch, *powers in parts(x, second, *higher):
        square = torch.mul(part, part, out=scratch)
        torch.sum(square, 1, keepdim=True, out=powers[0])
        if higher:
            torch.sum(square * square, 1, keepdim=True, out=powers[2])
            torch.sum(square.mul_(part), 1, keepdim=True, out=powers[1])
    return sums


def _add_planes(planes: Sequence[Tensor], first: Tensor, second: Tensor, *higher: Tensor) -> None:
    """`channel_sums` channel by channel: what lies between is no larger than a map."""
    plane, *others = planes
    first.copy_(plane)
    torch.mul(plane, plane, out=second)
    if higher:
        third, fourth = higher
        torch.mul(second, plane, out=third)
        torch.mul(second, second, out=fourth)
        square = torch.empty_like(second)
    for plane in others:
        first.add_(plane)
        if not higher:
            second.addcmul_(plane, plane)
            continue
        second.add_(torch.mul(plane, plane, out=square))
        third.addcmul_(square, plane)
        fourth.addcmul_(square, square)


def _row_sums(x: Tensor, order: int) -> Tensor:
    """As `channel_sums`, of rows of channels: (L, C) -> (order, L)."""
    if order == 2:
        second, first = _dots(x, x)
        return torch.stack([first, second])
    sums = []
    for part, scratch in parts(x):
        square = torch.mul(part, part, out=scratch)
        (third, first), (fourth, second) = _dots(part, square), _dots(square, square)
        sums.append(torch.stack([first, second, third, fourth]))
    return sums[0] if len(sums) == 1 else torch.cat(sums, 1)


_NO_MEAN, _UNIT_RSTD = torch.zeros(1, 1), torch.ones(1, 1)


def _dots(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """sum_c y_lc z_lc and sum_c y_lc in one pass: (L, C) -> (L,) each.

    It is the pass in which GroupNorm's backward takes the gradients of gain and bias, given a mean of 0 and an SD of 1,
    with rows in place of its channels and channels in place of its pixels.
    """
    _, dots, sums = torch.ops.aten.native_group_norm_backward.default(
        y, z, _NO_MEAN, _UNIT_RSTD, None, 1, *y.shape, 1, (False, True, True)
    )
    return dots, sums


def careful_means(x: Tensor, order: int) -> Tensor:
    """As `channel_sums`, but means, in float64, and the variance taken about the mean: E[u^2] - mu^2 then keeps what
    cancels."""
    means = channel_sums(x, order).double().div_(x.shape[1])
    mean, square, *_ = means
    for part, scratch, center, var in parts(x, mean.float(), square):
        deviation = torch.sub(part, center, out=scratch)
        var.copy_(deviation.mul_(deviation).mean(1, keepdim=True))
    square.addcmul_(mean, mean)
    return means


def parts(x: Tensor, *others: Tensor | None):
    """Runs of images of `x`, scratch memory for each where there are several, and the same images of the others
    (None of None)."""
    size = x.numel() * x.element_size()
    if size <= WHOLE:
        yield x, None, *others  # a temporary of its own takes one call less
        return
    images = max(1, PART * x.shape[0] // size)
    scratch = torch.empty_like(x[:images])
    each = x.split(images)
    of_others = ([None] * len(each) if other is None else other.split(images) for other in others)
    for part, *rest in zip(each, *of_others, strict=True):
        yield part, scratch[: part.shape[0]], *rest


def subtract_outer(convolved: Tensor, offset: Tensor, vector: Tensor, *, inplace: bool = False) -> Tensor:
    """convolved - offset vector.

    Args:
        convolved: (N, C, O, P).
        offset, vector: (N, 1, O, P) and (C,).
        inplace: overwrite `convolved` where it is dense.
    """
    at = _flat(convolved)
    if not (at is _Rows or convolved.is_contiguous()):
        convolved = convolved.contiguous()
    elif not inplace:
        convolved = convolved.clone()
    at.all(convolved).addcmul_(at.map(offset), at.vector(vector), value=-1)
    return convolved


def scale_and_shift(shifted: Tensor, rstd: Tensor, bias: Tensor | None, *, inplace: bool = False) -> Tensor:
    """shifted rstd + bias.

    Args:
        shifted: (N, C, O, P).
        rstd: (N, 1, O, P).
        bias: (C,) or None.
        inplace: overwrite `shifted`.
    """
    if bias is None:
        return torch.mul(shifted, rstd, out=shifted if inplace else None)
    at = _flat(shifted)
    if not (at is _Rows or shifted.is_contiguous()):
        shifted = shifted.contiguous()
    result = shifted if inplace else torch.empty_like(shifted)  # no view, which could not be edited in place
    torch.addcmul(at.vector(bias), at.all(shifted), at.map(rstd), out=at.all(result))
    return result


def scale_and_shift_backward(
    grad: Tensor,
    shifted: Tensor | None,
    rstd: Tensor,
    offset: Tensor | None,
    vector: Tensor | None,
    has_bias: bool,
    *,
    inplace: bool = False,
    out: Tensor | None = None,
):
    """The gradients of `scale_and_shift` after `subtract_outer`.

    Args:
        grad: of the result, (N, C, O, P).
        shifted, rstd: as they were; None for shifted if the gradients of the maps are not wanted.
        offset, vector: what was subtracted before, or None.
        has_bias: whether there was one.
        inplace: overwrite `shifted` with its gradient. Its memory has just been read, and is faster than new memory
            here and in the convolution that follows.
        out: dense memory for that gradient where `shifted` is None; None for new memory.

    Returns:
        those of shifted (N, C, O, P), of rstd (N, 1, O, P), of offset (N, 1, O, P), of -vector (C,), of bias (C,); None
        where there is no such argument, or it is not wanted.
    """
    if shifted is None:
        scaled, grad_rstd = torch.mul(grad, rstd, out=out), None
        grad = _in_order_of(scaled, grad)
    else:
        grad = _in_order_of(shifted, grad)
        scaled = shifted if inplace else torch.empty_like(grad)
        # the products lie in the memory of the result, which is overwritten after
        grad_rstd = torch.mul(grad, shifted, out=scaled).sum(1, keepdim=True)
        torch.mul(grad, rstd, out=scaled)
    if offset is None:
        return scaled, grad_rstd, None, None, grad.sum((0, *range(2, grad.dim()))) if has_bias else None
    at = _flat(scaled)
    flat = at.all(scaled)
    grad_offset = None if shifted is None else at.over_channels(flat, -vector).view(rstd.shape)
    if not has_bias:
        return scaled, grad_rstd, grad_offset, at.over_units(flat, offset)[0], None
    # the gradients of bias and vector are sums over units with other factors: one pass
    factors = offset.new_ones(offset.shape[0], 2, *offset.shape[2:])
    torch.mul(offset, rstd, out=factors[:, :1])
    return scaled, grad_rstd, grad_offset, *at.over_units(at.all(grad), factors).unbind()


def _in_order_of(y: Tensor, grad: Tensor) -> Tensor:
    """grad, or a copy in the order of y: two orders at once are slow (what is expanded, or not channels-last)."""
    return grad if grad.stride() == y.stride() else torch.empty_like(y).copy_(grad)


class _Rows:
    """How to see (N, C, O, P) in channels-last order: for every image as rows of channels, (N, L, C). With fewer
    dimensions a map or a vector among the factors costs no more than a number."""

    @staticmethod
    def all(y: Tensor) -> Tensor:
        n, channels, *_ = y.shape
        size = y.numel() // n
        return y.as_strided((n, size // channels, channels), (size, channels, 1))

    @staticmethod
    def map(y: Tensor) -> Tensor:
        """(N, 1, O, P), to multiply by."""
        return y.reshape(y.shape[0], -1, 1)

    @staticmethod
    def vector(y: Tensor) -> Tensor:
        """(C,), to multiply by."""
        return y

    @staticmethod
    def over_channels(flat: Tensor, vector: Tensor) -> Tensor:
        """sum_c y_c vector_c: vector (C,) -> (N, L, 1); by images, on all cores."""
        n, _, channels = flat.shape
        return torch.bmm(flat, vector.as_strided((n, channels, 1), (0, 1, channels)))  # else bmm copies, or is slow

    @staticmethod
    def over_units(flat: Tensor, maps: Tensor) -> Tensor:
        """sum over units of maps_r y_c: maps (N, R, O, P) -> (R, C); by images, on all cores."""
        return torch.bmm(maps.flatten(2), flat).sum(0)


class _Columns:
    """As `_Rows`, for any other order: as (N, C, L)."""

    @staticmethod
    def all(y: Tensor) -> Tensor:
        return y.flatten(2)

    @staticmethod
    def map(y: Tensor) -> Tensor:
        return y.flatten(2)

    @staticmethod
    def vector(y: Tensor) -> Tensor:
        return y[:, None]

    @staticmethod
    def over_channels(flat: Tensor, vector: Tensor) -> Tensor:
        return torch.matmul(vector, flat)

    @staticmethod
    def over_units(flat: Tensor, maps: Tensor) -> Tensor:
        return torch.bmm(maps.flatten(2), flat.transpose(1, 2)).sum(0)


def _flat(y: Tensor) -> type[_Rows] | type[_Columns]:
    return _Rows if is_rows(y) else _Columns


def zero_padded(x: Tensor, pairs: Pairs) -> Tensor:
    """As `geometry.pad`, in the order of `x`; `F.pad` would clear the inner part too before it copies."""
    size = [length + before + after for length, (before, after) in zip(x.shape[2:], pairs, strict=True)]
    last = x.dim() in (4, 5) and is_rows(x)
    order = {4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()] if last else torch.contiguous_format
    padded = torch.empty((*x.shape[:2], *size), dtype=x.dtype, memory_format=order)
    inner = padded
    for dim, (length, (before, after)) in enumerate(zip(x.shape[2:], pairs, strict=True), 2):
        inner.narrow(dim, 0, before).zero_()
        inner.narrow(dim, before + length, after).zero_()
        inner = inner.narrow(dim, before, length)
    inner.copy_(x)
    return padded


def add_input_gradient(grad: Tensor, x: Tensor, constant: Tensor, slope: Tensor, times: float) -> Tensor:
    """grad + constant + times slope x, in the memory of grad where that is dense.

    grad and x are (N, C, H, W), constant and slope (N, 1, H, W).
    """
    if grad.stride() != x.stride():
        return (x * slope).mul_(times).add_(constant).add_(grad)
    at = _flat(x)
    if not (at is _Rows or x.is_contiguous()):
        return grad.add_((x * slope).mul_(times)).add_(constant)
    flat = at.all(grad)
    flat.addcmul_(at.all(x), at.map(slope), value=times)
    flat.add_(at.map(constant))
    return grad


def is_rows(y: Tensor) -> bool:
    """Whether (N, C, O, P) is in channels-last order: pixel after pixel a row of channels."""
    if y.dim() == 4:  # in one call
        return y.is_contiguous(memory_format=torch.channels_last)
    return y.movedim(1, -1).is_contiguous()


def as_rows(y: Tensor) -> Tensor:
    """(N, C, O, P) in channels-last order as a matrix (N O P, C) over the same memory."""
    channels = y.shape[1]
    return y.as_strided((y.numel() // channels, channels), (channels, 1))
