"""Per-sample gradients of NormalizedConv2d: those of its filters, pulled back to weight and gain sample by sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knport.privacy import samplers


def normalized_grad_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict:
    """The rule for `opacus.grad_sample.register_grad_sampler`. Arguments as `samplers.grad_samples`."""
    units, mean, g = samplers._scaled(layer, activations[0], backprops)
    of_filters = samplers._weight_gradients(layer, units, mean, g)
    parameters = (layer.weight,) if layer.gain is None else (layer.weight, layer.gain)
    samples = dict(zip(parameters, _pulled_back(layer, parameters, of_filters), strict=True))
    if layer.bias is not None:
        samples[layer.bias] = samplers._bias_gradients(backprops).to(layer.bias.dtype)
    return {parameter: sample for parameter, sample in samples.items() if parameter.requires_grad}


def normalized_norm_samples(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict:
    """The rule for `opacus.grad_sample.register_norm_sampler`: for each trainable parameter (N,)."""
    samples = normalized_grad_samples(layer, activations, backprops)
    return {parameter: sample.flatten(1).norm(dim=1) for parameter, sample in samples.items()}


def _pulled_back(layer: nn.Module, parameters: tuple, of_filters: Tensor) -> tuple[Tensor, ...]:
    """(N, C_out, C / G, k_h, k_w), gradients of the filters, to those of each parameter, (N, *its shape)."""
    if not len(of_filters):  # Poisson sampling may draw nobody, and vmap takes no empty dimension
        return tuple(p.new_zeros(0, *p.shape) for p in parameters)
    detached = [p.detach() for p in parameters]

    def filters(weight: Tensor, gain: Tensor | None = None) -> Tensor:
        return layer.make_filters(weight, gain)

    _, pull = torch.func.vjp(filters, *detached)
    return torch.func.vmap(pull)(of_filters.to(layer.weight.dtype))
