"""Initial weights for kernel normalized layers."""

from __future__ import annotations

from torch import nn


def lecun_init(model: nn.Module, gain: float = 1.0) -> None:
    """LeCun normal weights, SD gain / sqrt(n) for filters that read n values, of every convolution; biases as torch's.

    A normalized unit has mean 0 and variance 1 whatever came before it, an activation included, so that this gives
    outputs of variance 1 in every layer. (Kaiming's gain of sqrt(2) makes up for what a ReLU takes from a layer without
    normalization, and fan-out scales a stem of 3 channels down to a fifth of what follows.) A larger gain scales all
    layers alike, which the normalization behind them takes back; but steps of one size then turn the weights less.

    The biases are uniform within 1 / sqrt(n), not zero: a normalized flat patch of an image is 0, and a stem puts out
    its bias there. After the first steps from zero that is next to nothing in every channel, and the gradient of the
    next layer's unit is divided by up to sqrt(eps): one flat image outweighs the rest of a batch (docs/architectures.md
    has the figures). Linear layers begin with zero biases.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        nn.init.normal_(conv.weight, std=gain * conv.weight[0].numel() ** -0.5)
    for conv in convolutions:
        if conv.bias is not None:
            bound = conv.weight[0].numel() ** -0.5
            nn.init.uniform_(conv.bias, -bound, bound)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
