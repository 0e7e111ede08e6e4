"""After conversion no image sees another: in numbers, on timm's test models and on small networks of torchvision."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from knport import KNConfig, NothingToConvert, convert

WITHOUT_NORMS = ("test_nfnet",)
BUILT_FOR_ONE_SIZE = ("vit", "coat", "maxx", "mixer", "pvt")
TORCHVISION = {
    "densenet121": lambda: torchvision.models.DenseNet(block_config=(2, 2, 2, 1)),
    "efficientnet_b0": torchvision.models.efficientnet_b0,
    "lraspp_mobilenet_v3_large": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None
    ),
    "mnasnet0_5": torchvision.models.mnasnet0_5,
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(width_mult=0.5),
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "regnet_x_400mf": torchvision.models.regnet_x_400mf,
    "resnet18": torchvision.models.resnet18,
    "shufflenet_v2_x0_5": torchvision.models.shufflenet_v2_x0_5,
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]),
}


def without_other_randomness(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for drop in ("p", "drop_prob", "drop_rate"):
            if isinstance(getattr(module, drop, None), float):
                setattr(module, drop, 0.0)
    return model


def images_are_independent(model: nn.Module, x: torch.Tensor) -> None:
    new = without_other_randomness(convert(model, KNConfig(dropout=0.0)))
    assert not any(isinstance(m, _BatchNorm) for m in new.modules())
    for training in (False, True):
        with torch.no_grad():
            together, alone = new.train(training)(x), [new(one[None]) for one in x]
        for i, one in enumerate(alone):
            for whole, single in zip(tensors(together), tensors(one), strict=True):
                torch.testing.assert_close(single[0], whole[i], rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def tensors(out) -> list[torch.Tensor]:
    return list(out.values()) if isinstance(out, dict) else [out]


def shaken(model: nn.Module) -> nn.Module:
    """No zero in the last layer or in a layer scale: outputs then depend on the images."""
    for parameter in model.parameters():
        if not parameter.any() or parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_timm_test_models(name):
    torch.manual_seed(0)
    model = shaken(timm.create_model(name, num_classes=10))
    if name in WITHOUT_NORMS:
        with pytest.raises(NothingToConvert, match="no normalization"):
            convert(model)
        return
    side = 160 if any(word in name for word in BUILT_FOR_ONE_SIZE) else 64
    images_are_independent(model, torch.randn(2, 3, side, side))


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name):
    torch.manual_seed(0)
    images_are_independent(shaken(TORCHVISION[name]()), torch.randn(2, 3, 64, 64))
