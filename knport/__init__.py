"""knport: port PyTorch vision networks to kernel normalization.

model = knport.convert(model)   # any network
knport.KNConv2d(64, 128, 3)     # or layer by layer, in the place of norm and convolution

Names are imported when they are first used, so that `knport --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knport import errors, functional, layers, privacy, surgery
    from knport.errors import (
        AlreadyWrapped,
        KNPortError,
        NothingToConvert,
        UnknownName,
        UnmatchedPattern,
        UnsupportedModule,
    )
    from knport.folder import load, save
    from knport.layers import (
        KernelNorm1d,
        KernelNorm2d,
        KernelNorm3d,
        KNConv1d,
        KNConv2d,
        KNConv3d,
        KNLinear,
        LocalContextNorm,
        NormalizedConv2d,
        PositionalNorm,
    )
    from knport.model_check import check
    from knport.model_summary import summary
    from knport.surgery import KNConfig, convert, plan
    from knport.surgery.replace import plan_norm, replace_norm

# Every public name by the module it comes from; the imports above say the same to editors and type checkers.
_NAMES = {
    "knport": "errors functional kernels layers privacy surgery",
    "knport.errors": "AlreadyWrapped KNPortError NothingToConvert UnknownName UnmatchedPattern UnsupportedModule",
    "knport.folder": "load save",
    "knport.layers": "KNConv1d KNConv2d KNConv3d KNLinear KernelNorm1d KernelNorm2d KernelNorm3d "
    "LocalContextNorm NormalizedConv2d PositionalNorm",
    "knport.model_check": "check",
    "knport.model_summary": "summary",
    "knport.surgery": "KNConfig convert plan",
    "knport.surgery.replace": "plan_norm replace_norm",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AlreadyWrapped",
    "KNConfig",
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KNLinear",
    "KNPortError",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "LocalContextNorm",
    "NormalizedConv2d",
    "NothingToConvert",
    "PositionalNorm",
    "UnknownName",
    "UnmatchedPattern",
    "UnsupportedModule",
    "check",
    "convert",
    "errors",
    "functional",
    "layers",
    "load",
    "plan",
    "plan_norm",
    "privacy",
    "replace_norm",
    "save",
    "summary",
    "surgery",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'knport' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"knport.{name}") if home == "knport" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
