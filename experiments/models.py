"""Models by name, with the normalization asked for, as the images at hand need them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import architectures
import knport
from experiments.run import Run
from experiments.without_kernel_norm import without_kernel_norm
from knport.errors import KNPortError, UnknownName
from knport.surgery import replace

# Further names of competitors: a norm of `knport.replace_norm` and its options.
VARIANTS = {"group_of_32": ("group", {"group_size": 32})}  # the first version's GroupNorm: 32 channels per group
NORMS = ("original", "kernel", *replace.NORMS, *VARIANTS)
KERNEL_NORMS = (knport.KernelNorm1d, knport.KernelNorm2d, knport.KernelNorm3d)
KN_CONVS = (knport.KNConv1d, knport.KNConv2d, knport.KNConv3d)
AUXILIARY = ("googlenet", "inception_v3")  # of torchvision: more than one output while training, unless told otherwise
DENSE_EXAMPLE = 128  # pixels; networks for segmentation are tried at no more
SMALL_IMAGE = 64  # pixels; up to here a network gets the stem for low resolution where it has one


def build(
    name: str,
    norm: str = "original",
    *,
    num_classes: int,
    in_chans: int = 3,
    image_size: int,
    dense: bool = False,
    dropout: float | None = None,
    dropout_form: str | None = None,
    activation: str | None = None,
    device: str = "cpu",
) -> nn.Module:
    """A freshly initialized model; seed torch first for given weights.

    Args:
        name: a name of `architectures`, ``timm/NAME`` or ``torchvision/NAME``.
        norm: ``original`` (as the model is), ``kernel`` (`knport.convert`), a norm of `knport.replace_norm`, or
            ``group_of_32`` (GroupNorm with 32 channels per group). ``none`` also takes kernel normalization away.
        num_classes: size of the last layer.
        in_chans: channels of the images.
        image_size: their height in pixels; at most 64 means the low-resolution stem: `architectures` builds it in,
            and a ResNet of timm or torchvision gets a 3 x 3 stride-1 first convolution and no max pool, as usual on
            CIFAR. Networks of timm that take images of one size (most transformers) are built for this one.
        dense: the model is to give scores at many places of an image of any size, for segmentation.
        dropout: p of every kernel normalization layer. The networks of `architectures` give their last KernelNorm
            the share of it that was published with them, converted ones that of `knport.KNConfig`; None leaves all as
            it is.
        dropout_form: of these layers: "moments", "shared" or "unit"; None leaves each its own.
        activation: "relu" or "mish" in the place of every ReLU and Mish module; None leaves them.
        device: where it is built; "meta" for its shapes alone.

    Raises: `UnknownName` for an unknown model or norm; `KNPortError` from the rewriting.
    """
    built_with = {} if dropout is None else _own_dropout(name, dropout)
    config = knport.KNConfig() if dropout is None else knport.KNConfig(dropout=dropout)
    with torch.device(device):
        model = _create(name, num_classes, in_chans, image_size, **built_with)
    size = min(image_size, DENSE_EXAMPLE) if dense else image_size
    example = torch.zeros(2, in_chans, size, size, device=device)
    model = _renorm(model, norm, example, config)
    if dropout_form is not None:
        for module in model.modules():
            if hasattr(module, "dropout_form"):
                module.dropout_form = dropout_form
    if activation is not None:
        set_activation(model, activation)
    _try(model, name, example, num_classes, dense)
    return model


def build_for(run: Run, network: Mapping[str, Any]) -> nn.Module:
    """The model of a run; seed torch first for given weights.

    Args:
        run: names the model, its norm, dropout and activation.
        network: what the task's data ask for: `Classification.network` or `Segmentation.network`.
    """
    options = {"dropout": run.dropout, "dropout_form": run.dropout_form, "activation": run.activation}
    return build(run.model, run.norm, **network, **options)


def synchronize_batchnorm(model: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """On several GPUs, BatchNorm modules that share their statistics; on one process, the model as it is.

    Raises `KNPortError` on several CPU processes, for which torch has none.
    """
    if processes == 1 or not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return model
    if device.type == "cpu":
        raise KNPortError("sync_batchnorm needs GPUs for several processes; give --no-sync-batchnorm, or one process")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def list_models() -> list[str]:
    """Every name that `build` takes."""
    torchvision_models = torchvision.models.list_models(torchvision.models)
    return [
        *architectures.list_models(),
        *(f"timm/{name}" for name in timm.list_models()),
        *(f"torchvision/{name}" for name in torchvision_models),
    ]


def set_activation(model: nn.Module, activation: str) -> None:
    """Put "relu" or "mish" in the place of every ReLU and Mish; new tensors are made, nothing is edited in place.

    Raises `KNPortError` if there is none, e.g. in a network that calls functions.
    """
    kind = {"relu": nn.ReLU, "mish": nn.Mish}[activation]
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.ReLU | nn.Mish)]
    for path in paths:
        model.set_submodule(path, kind())
    if not paths:
        raise KNPortError(f"{type(model).__name__} has no ReLU or Mish modules; leave --activation out")


def _own_dropout(name: str, dropout: float) -> dict[str, float]:
    """What to build `name` with, if it is a kernel normalized network of `architectures`; these all take `dropout`."""
    if name not in architectures.list_models():
        return {}
    with torch.device("meta"):  # draws no random numbers
        modules = architectures.create_model(name).modules()
    return {"dropout": dropout} if any(isinstance(m, (*KN_CONVS, knport.KNLinear)) for m in modules) else {}


def _create(name: str, num_classes: int, in_chans: int, image_size: int, **options) -> nn.Module:
    small = image_size <= SMALL_IMAGE
    library, _, rest = name.rpartition("/")
    if name in architectures.list_models():
        sizes = {"num_classes": num_classes, "in_chans": in_chans}
        return architectures.create_model(name, **sizes, low_resolution=small, **options)
    if library == "timm" and timm.is_model(rest):
        model = timm.create_model(rest, num_classes=num_classes, in_chans=in_chans, **_sizes(rest, image_size))
    elif library == "torchvision" and rest in torchvision.models.list_models(torchvision.models):
        options = {"aux_logits": False, "init_weights": True} if rest in AUXILIARY else {}
        model = torchvision.models.get_model(rest, weights=None, num_classes=num_classes, **options)
        _set_in_chans(model, in_chans)
    else:
        raise UnknownName("model", name, list_models())
    if small:
        _shrink_stem(model)
    return model


def _sizes(name: str, image_size: int) -> dict[str, int]:
    """What a timm network that is built for images of one size (most transformers) has to be told: theirs."""
    stated = timm.get_pretrained_cfg(name)
    return {"img_size": image_size} if stated.fixed_input_size and stated.input_size[-1] != image_size else {}


def _shrink_stem(model: nn.Module) -> None:
    """A ResNet's 7 x 7 stride-2 convolution and max pool, made for 224 pixels, become a 3 x 3 convolution."""
    conv = getattr(model, "conv1", None)
    if isinstance(conv, nn.Conv2d) and conv.kernel_size == (7, 7) and isinstance(model.maxpool, nn.MaxPool2d):
        model.conv1 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()


def _set_in_chans(model: nn.Module, in_chans: int) -> None:
    """torchvision's networks take 3 channels: replace the first convolution where the images have others."""
    path, conv = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    if conv.in_channels == in_chans:
        return
    bias = conv.bias is not None
    new = nn.Conv2d(in_chans, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=bias)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(path, new)


def _renorm(model: nn.Module, norm: str, example: torch.Tensor, config: knport.KNConfig) -> nn.Module:
    if norm == "original":
        return model
    if norm == "kernel":
        return knport.convert(model, config, example_inputs=example)
    if norm == "none" and any(isinstance(module, (*KERNEL_NORMS, *KN_CONVS)) for module in model.modules()):
        return without_kernel_norm(model)
    norm, options = VARIANTS.get(norm, (norm, {}))
    try:
        return knport.replace_norm(model, norm, example_inputs=example, **options)
    except UnknownName as error:
        raise UnknownName("norm", norm, NORMS) from error


@torch.no_grad()
def _try(model: nn.Module, name: str, example: torch.Tensor, num_classes: int, dense: bool) -> None:
    """Two blank images through the model: an unfit size shows here, not in the middle of a run."""
    image = tuple(example.shape[1:])
    model.eval()
    try:
        logits = model(example)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise KNPortError(f"{name} cannot take images {image}: {error}; choose a model for this size") from error
    finally:
        model.train()
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    expected = (len(example), num_classes)
    if dense and (found[:2] != expected or len(found) != 4):
        raise KNPortError(
            f"{name} gives {found} for 2 images; expected a map of class scores {(*expected, 'h', 'w')}: choose a"
            " network for segmentation, such as fcn_knresnet18 or fcn_resnet18"
        )
    if not dense and found != expected:
        raise KNPortError(f"{name} gives {found} for 2 images; expected class scores {expected}")
