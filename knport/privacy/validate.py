"""What stands between a model and private training: layers that mix samples, and dropout that would be drawn twice.

Opacus' own validator looks at trainable layers of exactly its classes. Sub-classes of BatchNorm (timm's fused ones)
pass it, and so does BatchNorm without gain and bias.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from knport.errors import UnsupportedModule
from knport.layers.dropout import StatisticsDropout
from knport.layers.kn_conv import _KNConv
from knport.layers.kn_linear import KNLinear

_INSTEAD = "put kernel normalization in its place with knport.convert(model), or knport.replace_norm(model, 'group')"


def validate(model: nn.Module) -> list[UnsupportedModule]:
    """Every reason why `model` cannot be trained with per-sample clipping, each with its module path and the fix.

    Nothing is run: code of a model's own that mixes images is not seen.

    Args:
        model: any network, in any mode; norms count that mix samples in training only, too.

    Returns:
        Errors for the caller to raise or print, in the order of the modules; none where all is well.

    Example:
        >>> [error.path for error in knport.privacy.validate(torchvision.models.resnet18())][:2]
        ['bn1', 'layer1.0.bn1']
    """
    problems = []
    for path, module in model.named_modules():
        for find in (_mixes_samples, _cannot_be_sampled, _draws_twice):
            problems += [UnsupportedModule(path, found, hint) for found, hint in find(module)]
    return problems


def _mixes_samples(module: nn.Module) -> Iterator[tuple[str, str]]:
    name = type(module).__name__
    if isinstance(module, _BatchNorm):
        yield f"{name} normalizes every image by the others of its batch", _INSTEAD
    elif _keeps_statistics(module) and not name.startswith("Frozen"):  # FrozenBatchNorm2d and kin: constants
        stays = isinstance(module, _InstanceNorm)
        yield (
            f"{name} keeps running statistics of the batches, which no noise protects",
            "build it with track_running_stats=False" if stays else _INSTEAD,
        )


def _keeps_statistics(module: nn.Module) -> bool:
    return any(getattr(module, name, None) is not None for name in ("running_mean", "running_var"))


def _cannot_be_sampled(module: nn.Module) -> Iterator[tuple[str, str]]:
    kind = next((kind for kind in (_KNConv, KNLinear) if isinstance(module, kind)), None)
    if kind is None:
        return
    name = type(module).__name__
    if parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
        yield f"the weight of {name} is computed, not a parameter", "make it permanent or remove the parametrization"
    elif type(module).forward is not kind.forward or "forward" in vars(module):
        yield (
            f"{name} has a forward of its own, for which the gradients of {kind.__name__.strip('_')} may be wrong",
            "use knport's own layer, or a module that holds one",
        )


def _draws_twice(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Opacus runs a module that it has no rule for a second time, with all that is inside."""
    own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    if not own or isinstance(module, (_KNConv, KNLinear)):
        return
    for path, inner in module.named_modules():
        if isinstance(inner, StatisticsDropout) and inner.dropout:
            yield (
                f"{type(module).__name__} holds parameters itself ({', '.join(own)}), so that Opacus runs it a second "
                f"time with all that is inside, where the dropout of {path} would be another",
                "set dropout=0 in the KN layers inside, or move these parameters into a module of their own",
            )
            return
