"""From the moments of the pixels to the statistics of the units, dropout drawn, and back: all on one-channel maps.

Rows of statistics: for `PLAIN` and `EXPECTED` the mean and the variance; for `MOMENTS` (mu', var') as drawn, the mean
and variance that they were drawn about, and the draw: shift and scale, constants to the backward pass. The formulas are
those of `knport.functional.statistics`, `knport.kernels.eager.draw` and `drawn_statistics`; the random numbers are
Philox's, two for each unit, a function of (seed, unit).

Legend: see `knport.kernels.triton_support`; K places in the kernel, n = C K entries of a unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from knport.kernels.triton_support import Box3, direct

PLAIN, EXPECTED, MOMENTS = 0, 1, 2
_ROWS = {PLAIN: 2, EXPECTED: 2, MOMENTS: 6}
_BLOCK = 128


def own_row(form: int) -> int:
    """The row that holds the mean of all the unit's entries; the variance is the next one."""
    return 2 if form == MOMENTS else 0


@triton.jit
def _draw(seed_ptr, u, mean, var, third, fourth, kind: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """`knport.kernels.eager.draw`: shift and scale."""
    noise, other, _, _ = tl.randn4x(tl.load(seed_ptr), u)
    shift = noise.to(kind) * tl.sqrt(tl.full([], P / ((1 - P) * N), kind))
    other = other.to(kind) * tl.sqrt(tl.full([], P / ((1 - P) * N), kind))
    second = var + mean * mean
    per_second = tl.where(second > 0, 1 / tl.where(second > 0, second, 1.0), 0.0)
    slope = third * per_second
    rest = tl.sqrt(tl.maximum(fourth - slope * third, 0.0)) * other * per_second
    return shift, (1 + slope * tl.sqrt(per_second) * shift + rest) / (1 - P)


@triton.jit
def _moved(second, shift):
    """mu' - mu, and its derivative by m_2."""
    root = tl.sqrt(second)
    return root * shift, tl.where(second > 0, 0.5 * shift / tl.where(second > 0, root, 1.0), 0.0)


@triton.jit
def _normals_kernel(seed_ptr, out_ptr, total, BLOCK: tl.constexpr):
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    noise, other, _, _ = tl.randn4x(tl.load(seed_ptr), u)
    tl.store(out_ptr + u, noise.to(out_ptr.dtype.element_ty), mask=u < total)
    tl.store(out_ptr + total + u, other.to(out_ptr.dtype.element_ty), mask=u < total)


@triton.jit
def _units_kernel(
    maps_ptr, higher_ptr, seed_ptr, rows_ptr, total, depth, height, width, units_z, units_y, units_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    FORM: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = rows_ptr.dtype.element_ty
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = u < total
    z0 = (u // (units_x * units_y)) % units_z * SZ - PZ
    y0 = (u // units_x) % units_y * SY - PY
    x0 = u % units_x * SX - PX
    pixels = depth * height * width
    image = (u // (units_x * units_y * units_z)).to(tl.int64) * 2 * pixels
    mean = tl.zeros([BLOCK], kind)
    within = tl.zeros([BLOCK], kind)
    between = tl.zeros([BLOCK], kind)
    third = tl.zeros([BLOCK], kind)
    fourth = tl.zeros([BLOCK], kind)
    for place in range(KZ * KY * KX):
        z = z0 + place // (KY * KX) * DZ
        y = y0 + place // KX % KY * DY
        x = x0 + place % KX * DX
        mask = inside & (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = image + (z * height + y) * width + x
        # Welford: the spread of equal pixels is exactly 0, and a large mean does not cancel.
        value = tl.load(maps_ptr + at, mask=mask, other=0.0)
        step = value - mean
        mean += step / (place + 1)
        between += step * (value - mean)
        within += tl.load(maps_ptr + at + pixels, mask=mask, other=0.0)
        if FORM == 2:
            third += tl.load(higher_ptr + at, mask=mask, other=0.0)
            fourth += tl.load(higher_ptr + at + pixels, mask=mask, other=0.0)
    var = (within + between) / (KZ * KY * KX)
    if FORM == 2:
        third = third / (KZ * KY * KX)
        fourth = fourth / (KZ * KY * KX)
        shift, scale = _draw(seed_ptr, u, mean, var, third, fourth, kind, P, N)
        tl.store(rows_ptr + 2 * total + u, mean, mask=inside)
        tl.store(rows_ptr + 3 * total + u, var, mask=inside)
        tl.store(rows_ptr + 4 * total + u, shift, mask=inside)
        tl.store(rows_ptr + 5 * total + u, scale, mask=inside)
        moved, _ = _moved(var + mean * mean, shift)
        # m_2' - mu'^2, sorted so that nothing large cancels
        drawn = scale * var + (scale - 1) * mean * mean - (2 * mean + moved) * moved
        mean += moved
        var = tl.maximum(drawn, moved * moved)
    if FORM == 1:
        var = (var * (1 - P / N) + mean * mean * (P * (1 - 1 / N))) / (1 - P)
    tl.store(rows_ptr + u, mean, mask=inside)
    tl.store(rows_ptr + total + u, var, mask=inside)


@triton.jit
def _units_backward_kernel(
    rows_ptr, grad_mean_ptr, grad_var_ptr, grad_own_ptr, out_ptr, total,
    FORM: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_OWN: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of (mu', var', mu) -> those of a unit's own mean and variance."""
    u = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = u < total
    grad_mean = tl.load(grad_mean_ptr + u, mask=inside & HAS_MEAN, other=0.0)
    grad_var = tl.load(grad_var_ptr + u, mask=inside, other=0.0)
    if FORM == 1:
        mean = tl.load(rows_ptr + u, mask=inside, other=0.0)
        grad_mean += grad_var * mean * (2 * P * (1 - 1 / N) / (1 - P))
        grad_var = grad_var * ((1 - P / N) / (1 - P))
    if FORM == 2:
        mean = tl.load(rows_ptr + 2 * total + u, mask=inside, other=0.0)
        var = tl.load(rows_ptr + 3 * total + u, mask=inside, other=0.0)
        shift = tl.load(rows_ptr + 4 * total + u, mask=inside, other=0.0)
        scale = tl.load(rows_ptr + 5 * total + u, mask=inside, other=0.0)
        moved, ratio = _moved(var + mean * mean, shift)
        bounded = scale * var + (scale - 1) * mean * mean - (2 * mean + moved) * moved <= moved * moved
        free = tl.where(bounded, 0.0, grad_var)
        grad_second = (grad_mean + 2 * (grad_var - free) * moved - 2 * free * (mean + moved)) * ratio
        grad_mean += 2 * free * ((scale - 1) * mean - moved) + 2 * mean * grad_second
        grad_var = scale * free + grad_second
    grad_mean += tl.load(grad_own_ptr + u, mask=inside & HAS_OWN, other=0.0)
    tl.store(out_ptr + u, grad_mean, mask=inside)
    tl.store(out_ptr + total + u, grad_var, mask=inside)


@triton.jit
def _gather_kernel(
    maps_ptr, rows_ptr, grad_ptr, out_ptr, total, units, depth, height, width, units_z, units_y, units_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, DZ: tl.constexpr, DY: tl.constexpr, DX: tl.constexpr,
    OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of all units that a pixel is in, summed: the transposed box filter, without a race."""
    kind: tl.constexpr = rows_ptr.dtype.element_ty
    q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = q < total
    pixels = depth * height * width
    p = q % pixels
    n = (q // pixels).to(tl.int64)
    own = tl.load(maps_ptr + n * (2 * pixels) + p, mask=inside, other=0.0)
    first = tl.zeros([BLOCK], kind)
    second = tl.zeros([BLOCK], kind)
    for place in range(KZ * KY * KX):
        z = p // (width * height) + PZ - place // (KY * KX) * DZ
        y = p // width % height + PY - place // KX % KY * DY
        x = p % width + PX - place % KX * DX
        mask = inside & (z >= 0) & (y >= 0) & (x >= 0)
        mask = mask & (z % SZ == 0) & (y % SY == 0) & (x % SX == 0)
        mask = mask & (z // SZ < units_z) & (y // SY < units_y) & (x // SX < units_x)
        u = ((n * units_z + z // SZ) * units_y + y // SY) * units_x + x // SX
        grad_var = tl.load(grad_ptr + units + u, mask=mask, other=0.0)
        mean = tl.load(rows_ptr + OWN * units + u, mask=mask, other=0.0)
        first += tl.load(grad_ptr + u, mask=mask, other=0.0) + 2 * grad_var * (own - mean)
        second += grad_var
    out = out_ptr + n * (2 * pixels) + p
    tl.store(out, first / (KZ * KY * KX), mask=inside)
    tl.store(out + pixels, second / (KZ * KY * KX), mask=inside)


def normals(seed: Tensor, like: Tensor) -> Tensor:
    """The standard normal numbers that `MOMENTS` draws with for units of the shape and dtype of `like`: (2, *shape)."""
    out = torch.empty((2, *like.shape), device=like.device, dtype=like.dtype)
    _normals_kernel[(triton.cdiv(like.numel(), _BLOCK),)](seed, out, like.numel(), BLOCK=_BLOCK)
    return out


def unit_statistics(
    maps: Tensor,
    higher: Tensor,
    seed: Tensor,
    box: Box3,
    form: int,
    dropout: float,
    n: int,
    out: tuple[int, ...],
    wrap_triton=direct,
) -> Tensor:
    """The statistics of all units, (rows, N, 1, O, P); see the module's legend for the rows.

    Args:
        maps, higher: (N, 2, H, W), contiguous, of `knport.kernels.triton_moments`.
        seed: (1,) int64; this and `higher` are read for `MOMENTS` only.
        box: where the units lie.
        form: `PLAIN`, `EXPECTED` or `MOMENTS`.
        dropout: probability p.
        n: entries of a unit.
        out: the units' spatial size, (O, P).
    """
    rows = torch.empty((_ROWS[form], maps.shape[0], 1, *out), device=maps.device, dtype=maps.dtype)
    total = rows.numel() // rows.shape[0]
    wrap_triton(_units_kernel)[(triton.cdiv(total, _BLOCK),)](
        maps, higher, seed, rows, total,
        *box.size, *box.units, *box.kernel_size, *box.stride, *box.padding, *box.dilation,
        FORM=form, P=dropout, N=n, BLOCK=_BLOCK,
    )  # fmt: skip
    return rows


def unit_statistics_backward(
    maps: Tensor,
    rows: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor,
    grad_own: Tensor | None,
    box: Box3,
    form: int,
    dropout: float,
    n: int,
    wrap_triton=direct,
) -> Tensor:
    """The gradient of `unit_statistics` for `maps`, from those of mu', var' and (for `MOMENTS`) mu.

    None is a gradient of zeros.
    """
    total = rows.numel() // rows.shape[0]
    grads = torch.empty((2, total), device=rows.device, dtype=rows.dtype)
    drawn, own = (rows if grad is None else grad for grad in (grad_mean, grad_own))
    wrap_triton(_units_backward_kernel)[(triton.cdiv(total, _BLOCK),)](
        rows, drawn, grad_var, own, grads, total,
        FORM=form, HAS_MEAN=grad_mean is not None, HAS_OWN=grad_own is not None, P=dropout, N=n, BLOCK=_BLOCK,
    )  # fmt: skip
    out = torch.empty_like(maps)
    pixels = maps.numel() // 2
    wrap_triton(_gather_kernel)[(triton.cdiv(pixels, _BLOCK),)](
        maps, rows, grads, out, pixels, total, *box.size, *box.units, *box.kernel_size, *box.stride, *box.padding,
        *box.dilation, OWN=own_row(form), BLOCK=_BLOCK,
    )  # fmt: skip
    return out
