"""Per-sample gradients of KNConv and KNLinear and their norms, from the statistics of the forward pass.

With y = (U * W - mu' sum(W)) rstd + b (Nasirigerdeh et al., TMLR 2024, Eq. 5) and g = dL/dy rstd, image n has

    dL_n/dW = sum over positions of g (U - mu'),    dL_n/db = sum over positions of dL/dy

where U is the unit under the kernel, or the token. A constant unit has rstd 0 and gives the weights nothing, as in the
backward pass itself.

Legend: N images, C channels, O x P the output's map, L positions (O P) or tokens, G groups, M = C k_h k_w / G entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from knport.errors import KNPortError
from knport.functional.statistics import full_precision
from knport.geometry import pad, padding_pairs
from knport.privacy.record import take

# Up to so many positions a product of unfolded units is used: on CPUs it is faster there by far, level near 4 x 4; on
# larger maps the convolution is faster and unfolds nothing.
FEW_POSITIONS = 16
_WEIGHT_GRADIENT = {1: nn.grad.conv1d_weight, 2: nn.grad.conv2d_weight, 3: nn.grad.conv3d_weight}


def grad_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The rule for `opacus.grad_sample.register_grad_sampler`.

    Args:
        layer: a prepared KNConv.
        activations: its input, (N, C, H, W), in a list.
        backprops: (N, C_out, O, P), the gradient of every image's own loss.

    Returns:
        For each trainable parameter (N, *its shape).

    Raises:
        KNPortError: nothing recorded, or input without a batch dimension.
    """
    units, mean, g = _scaled(layer, activations[0], backprops)
    samples = {}
    if layer.weight.requires_grad:
        samples[layer.weight] = _weight_gradients(layer, units, mean, g).to(layer.weight.dtype)
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = _bias_gradients(backprops).to(layer.bias.dtype)
    return samples


def norm_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """The rule for `opacus.grad_sample.register_norm_sampler` (ghost clipping): for each trainable parameter (N,).

    The weights' norm comes from inner products of positions where these are fewer than the weights (mixed ghost
    clipping, Bu et al., 2022), and from the gradient itself elsewhere. Arguments as `grad_samples`.
    """
    units, mean, g = _scaled(layer, activations[0], backprops)
    norms = {}
    if layer.weight.requires_grad:
        positions = math.prod(g.shape[2:])
        few = 2 * layer.groups * positions**2 < layer.weight.numel()
        norms[layer.weight] = (_ghost_norms if few else _plain_norms)(layer, units, mean, g)
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = _bias_gradients(backprops).norm(dim=1)
    return norms


def linear_grad_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """`grad_samples` for KNLinear: its input (N, ..., C), and backprops (N, ..., C_out)."""
    tokens, backprops, g = _scaled_tokens(layer, activations[0], backprops)
    samples = {}
    if layer.weight.requires_grad:
        samples[layer.weight] = _linear_gradients(tokens, g).to(layer.weight.dtype)
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = backprops.sum(1).to(layer.bias.dtype)
    return samples


def linear_norm_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """`norm_samples` for KNLinear. Arguments as `linear_grad_samples`."""
    tokens, backprops, g = _scaled_tokens(layer, activations[0], backprops)
    norms = {}
    if layer.weight.requires_grad:
        few = 2 * tokens.shape[1] ** 2 < layer.weight.numel()
        norms[layer.weight] = (_norms_of_sums if few else _linear_plain_norms)(tokens, g)
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = backprops.sum(1).norm(dim=1)
    return norms


def _scaled_tokens(layer, x: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x - mu', (N, L, C), and dL/dy and g = dL/dy rstd, (N, L, C_out), in float32 or better."""
    mean, rstd = (maps.flatten(1).unsqueeze(2) for maps in take(layer))  # (N, 1, A, B) -> (N, L, 1)
    tokens = x.unsqueeze(1) if x.dim() < 3 else x.flatten(1, -2)
    if (max(layer.norm_window) > 1 and x.dim() < 3) or mean.shape[:2] != tokens.shape[:2]:
        raise _no_batch(layer, backprops, mean)
    backprops = backprops.reshape(*tokens.shape[:2], layer.out_features).to(mean.dtype)
    return tokens.to(mean.dtype) - mean, backprops, backprops * rstd


def _linear_gradients(tokens: Tensor, g: Tensor) -> Tensor:
    with full_precision(tokens):
        return g.transpose(1, 2) @ tokens  # (N, C_out, C)


def _linear_plain_norms(tokens: Tensor, g: Tensor) -> Tensor:
    return _linear_gradients(tokens, g).flatten(1).norm(dim=1)


def _scaled(layer, x: Tensor, backprops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The padded input, mu' and g = dL/dy rstd, in float32 or better; input and mu' less the mean of each image."""
    mean, rstd = take(layer)
    if mean.shape[2:] != backprops.shape[2:] or len(mean) != len(x):
        raise _no_batch(layer, backprops, mean)
    pairs = padding_pairs(layer.padding, layer.kernel_size, layer.stride, layer.dilation)
    units = pad(x.to(mean.dtype), pairs, layer.padding_mode)
    # U - mu' is the difference of two sums below; this keeps both small where the input's mean is large
    shift = units.mean(dim=tuple(range(1, units.dim())), keepdim=True)
    return units - shift, mean - shift, backprops * rstd


def _no_batch(layer, backprops: Tensor, mean: Tensor) -> KNPortError:
    return KNPortError(
        f"{type(layer).__name__}: gradients of shape {tuple(backprops.shape)} for statistics of shape "
        f"{tuple(mean.shape)}; per-sample gradients need input with a batch dimension, first"
    )


def _weight_gradients(layer, units: Tensor, mean: Tensor, g: Tensor) -> Tensor:
    """(N, C_out, C / G, k_h, k_w)."""
    n, c_in, c_out = len(units), layer.in_channels, layer.out_channels
    shape = layer.weight.shape
    if not n:  # Poisson sampling may draw nobody
        return units.new_zeros(0, *shape)
    if math.prod(g.shape[2:]) <= FEW_POSITIONS:
        units, g = _unfolded(layer, units, mean, g)
        with full_precision(units):
            return (g.transpose(2, 3) @ units).reshape(n, *shape)  # (N, G, C_out / G, M)
    # Images side by side as groups of one convolution: its weight gradient is that of each image, and nothing unfolds.
    side_by_side = units.reshape(1, n * c_in, *units.shape[2:]), g.reshape(1, n * c_out, *g.shape[2:])
    with full_precision(units):
        together = _WEIGHT_GRADIENT[layer.ndim](
            side_by_side[0],
            (n * c_out, *shape[1:]),
            side_by_side[1],
            layer.stride,
            0,
            layer.dilation,
            n * layer.groups,
        )
    of_mean = (g * mean).flatten(2).sum(2)  # (N, C_out)
    return together.view(n, *shape) - of_mean[(..., *(None,) * (len(shape) - 1))]


def _bias_gradients(backprops: Tensor) -> Tensor:
    wide = backprops.to(torch.promote_types(backprops.dtype, torch.float32))
    return wide.flatten(2).sum(2)  # (N, C_out)


def _plain_norms(layer, units: Tensor, mean: Tensor, g: Tensor) -> Tensor:
    return _weight_gradients(layer, units, mean, g).flatten(1).norm(dim=1)


def _ghost_norms(layer, units: Tensor, mean: Tensor, g: Tensor) -> Tensor:
    """|sum_l g_l u_l^T|^2 = sum over l and m of (g_l . g_m) (u_l . u_m), group by group."""
    return _norms_of_sums(*_unfolded(layer, units, mean, g))


def _unfolded(layer, units: Tensor, mean: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """U - mu' of every position, (N, G, L, M), and g, (N, G, L, C_out / G)."""
    for dim in range(layer.ndim):
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        units = units.unfold(2 + dim, reach, layer.stride[dim])[..., :: layer.dilation[dim]]
    units = units - mean[(..., *(None,) * layer.ndim)]
    # (N, C, O, P, k_h, k_w) -> (N, G, C / G, L, k_h k_w) -> (N, G, L, M)
    units = units.flatten(2 + layer.ndim).flatten(2, 1 + layer.ndim).unflatten(1, (layer.groups, -1))
    units = units.transpose(2, 3).flatten(3)
    g = g.flatten(2).unflatten(1, (layer.groups, -1)).transpose(2, 3)  # (N, C_out, O, P) -> (N, G, L, C_out / G)
    return units, g


def _norms_of_sums(units: Tensor, g: Tensor) -> Tensor:
    """|sum_l g_l u_l^T| for (N, .., L, M) and (N, .., L, C_out), from inner products of positions: (N,)."""
    with full_precision(units):
        products = (units @ units.transpose(-1, -2)) * (g @ g.transpose(-1, -2))
    return products.flatten(1).sum(1).clamp_min(0).sqrt()
