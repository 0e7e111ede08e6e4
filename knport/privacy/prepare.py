"""Make a kernel normalized network ready for `opacus.PrivacyEngine.make_private`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from knport.errors import AlreadyWrapped, KNPortError
from knport.layers.kn_conv import KNConv1d, KNConv2d, KNConv3d, _KNConv
from knport.layers.kn_linear import KNLinear
from knport.layers.normalized_conv import NormalizedConv2d
from knport.privacy.copies import let_be_edited
from knport.privacy.normalized import normalized_grad_samples, normalized_norm_samples
from knport.privacy.record import record
from knport.privacy.samplers import grad_samples, linear_grad_samples, linear_norm_samples, norm_samples
from knport.privacy.validate import validate


def prepare(model: nn.Module) -> nn.Module:
    """Let Opacus train `model`: its KN layers keep the statistics that per-sample gradients are made of.

    They keep them only while Opacus holds the model, so that a prepared model is otherwise what it was. Activations in
    place are made to return new tensors, and KN layers and norms return copies: nothing may edit what a hook of Opacus
    watches.

    Works with ``grad_sample_mode="hooks"`` (the default) and ``"ghost"``; with ``"functorch"`` at dropout 0 only, else
    the forward pass raises.

    Args:
        model: a network without layers that mix samples; changed in place.

    Returns:
        `model`.

    Raises:
        KNPortError: `validate` found something; the message lists all of it.
        AlreadyWrapped: Opacus holds the model already.
        ImportError: Opacus is not installed.

    Example:
        >>> model = knport.privacy.prepare(knport.convert(torchvision.models.resnet18()))
        >>> model, optimizer, loader = opacus.PrivacyEngine().make_private(module=model, ...)
    """
    if any(hasattr(p, "grad_sample") for p in model.parameters()):
        raise AlreadyWrapped(f"{type(model).__name__} is held by Opacus already; prepare the model before make_private")
    problems = validate(model)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise KNPortError(f"{len(problems)} modules stand against private training:\n{listed}")
    layers = [module for module in model.modules() if isinstance(module, (_KNConv, KNLinear))]
    register(*{type(layer) for layer in layers})
    for layer in layers:
        layer.statistics_hook = record
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    grad_sample, validators = _opacus("grad_sample"), _opacus("validators")
    fast = grad_sample.GradSampleModuleFastGradientClipping
    rules = grad_sample.GradSampleModule.GRAD_SAMPLERS, fast.NORM_SAMPLERS, validators.ModuleValidator.VALIDATORS
    let_be_edited(model, *rules)
    return model


def register(*classes: type[nn.Module]) -> None:
    """Tell Opacus of the layers of knport and the given sub-classes of them, and its validator of all kin of BatchNorm.

    Opacus looks up layers by their exact class. `prepare` calls this; what Opacus knows already stays.
    """
    grad_sample, validators = _opacus("grad_sample"), _opacus("validators")
    samplers, known = grad_sample.GradSampleModule.GRAD_SAMPLERS, validators.ModuleValidator.VALIDATORS
    for kind in (KNConv1d, KNConv2d, KNConv3d, KNLinear, NormalizedConv2d, *classes):
        if kind not in samplers:
            gradients, norms = _rules(kind)
            grad_sample.register_grad_sampler(kind)(gradients)
            grad_sample.register_norm_sampler(kind)(norms)
        known.setdefault(kind, _prepared)
    for kind in _subclasses(_BatchNorm):
        known.setdefault(kind, _never)


def _rules(kind: type[nn.Module]) -> tuple[Callable, Callable]:
    if issubclass(kind, KNLinear):
        return linear_grad_samples, linear_norm_samples
    if issubclass(kind, NormalizedConv2d):
        return normalized_grad_samples, normalized_norm_samples
    return grad_samples, norm_samples


def _opacus(module: str):
    try:
        return importlib.import_module(f"opacus.{module}")
    except ModuleNotFoundError as error:
        raise ImportError("knport.privacy needs Opacus: pip install 'knport[privacy]'") from error


def _prepared(layer: nn.Module) -> list[ValueError]:
    if layer.statistics_hook is record:
        return []
    error = _opacus("validators.errors").IllegalModuleConfigurationError
    return [error(f"{type(layer).__name__} is not prepared: call knport.privacy.prepare(model) before make_private")]


def _never(norm: nn.Module) -> list[ValueError]:
    error = _opacus("validators.errors").ShouldReplaceModuleError
    return [
        error(
            f"{type(norm).__name__} normalizes every image by the others of its batch; knport.convert(model) puts "
            "kernel normalization in its place, knport.privacy.validate(model) says where it stands"
        )
    ]


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_subclasses, kind.__subclasses__()))
