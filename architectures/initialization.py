"""Initial weights for kernel normalized layers."""

from __future__ import annotations

from torch import nn


def lecun_init(model: nn.Module, gain: float = 1.0) -> None:
    """LeCun normal weights, SD gain / sqrt(n) for filters that read n values, and zero biases; of every convolution.

    A normalized unit has mean 0 and variance 1 whatever came before it, an activation included, so that this gives
    outputs of variance 1 in every layer. (Kaiming's gain of sqrt(2) makes up for what a ReLU takes from a layer without
    normalization, and fan-out scales a stem of 3 channels down to a fifth of what follows.) A larger gain scales all
    layers alike, which the normalization behind them takes back; but steps of one size then turn the weights less.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
