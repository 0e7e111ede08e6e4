"""What a module is to the surgery: a norm, a convolution, one of ours, or something to look through."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from knport.layers import KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d, KNLinear

KN_CONVS = {1: KNConv1d, 2: KNConv2d, 3: KNConv3d}
KN_NORMS = {1: KernelNorm1d, 2: KernelNorm2d, 3: KernelNorm3d}
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_NAME = re.compile(r"(Norm|Abn)(?![a-z])")  # LayerNorm2d, EvoNorm2dS0, InplaceAbn; not Normalize
_OF_ONE_POSITION = re.compile(r"^(Layer|RMS|Rms|Simple)Norm")
_NORM_AND_ACTIVATION = ("EvoNorm", "FilterResponseNorm")  # of timm
_KNOWN_LIBRARIES = ("torch.", "timm.", "torchvision.")


def kind(module: nn.Module) -> str:
    """One of "kn_conv", "kn_norm", "kn_linear", "conv", "norm", "linear", "other"."""
    if isinstance(module, KNLinear):
        return "kn_linear"
    if isinstance(module, tuple(KN_CONVS.values())):
        return "kn_conv"
    if isinstance(module, tuple(KN_NORMS.values())):
        return "kn_norm"
    if isinstance(module, _ConvNd) or _convolves_by_itself(module):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    return "norm" if _is_norm(module) else "other"


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return True
    if not _NORM_NAME.search(type(module).__name__):
        return False
    return all(kind(part) == "other" for child in module.children() for part in child.modules())  # no ConvNormAct


def _convolves_by_itself(module: nn.Module) -> bool:
    """A class of its own that holds a convolution's weight, such as timm's CondConv2d."""
    own = dict(module.named_parameters(recurse=False))
    return "Conv" in type(module).__name__ and "weight" in own and not list(module.children())


def is_leaf(module: nn.Module) -> bool:
    """Whether the readers see `module` as one node: norms, convolutions, linears, activations; containers never."""
    if kind(module) != "other":
        return True
    if not list(module.children()) and not list(module.parameters()):
        return True
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    hides_sites = any(kind(part) in ("norm", "conv", "kn_conv", "kn_norm") for part in module.modules())
    return type(module).__module__.startswith("torch.nn") and not hides_sites


def is_pixel_norm(norm: nn.Module) -> bool:
    """Whether it normalizes every position by itself over the channels, as LayerNorm of tokens does (RMSNorm too)."""
    named = isinstance(norm, nn.LayerNorm | nn.RMSNorm) or bool(_OF_ONE_POSITION.match(type(norm).__name__))
    return named and len(getattr(norm, "normalized_shape", (1,))) == 1


def takes_means(norm: nn.Module) -> bool:
    """Whether it takes each channel's own mean away, so that a constant added to a channel before changes nothing."""
    return isinstance(norm, _NormBase) or (isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels)


def channels_last(module: nn.Module) -> bool:
    """Whether a norm takes the last dimension for the channels."""
    return is_pixel_norm(module) and "2d" not in type(module).__name__


def norm_problem(module: nn.Module) -> str | None:
    """Why this norm cannot give way to kernel normalization, or None."""
    name = type(module).__name__
    if "forward" in vars(module):
        return "its forward is patched on the instance"
    if isinstance(module, nn.LayerNorm) and not is_pixel_norm(module):
        return f"{name} normalizes maps of the fixed size {tuple(module.normalized_shape)} as a whole"
    known = isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm) or is_pixel_norm(module)
    if not known and not name.startswith(("FrozenBatchNorm", *_NORM_AND_ACTIVATION)):
        return f"{name} is no kin of BatchNorm, GroupNorm, InstanceNorm, LayerNorm or RMSNorm"
    if not type(module).forward.__module__.startswith(_KNOWN_LIBRARIES):
        return f"{name} has its own forward, which kernel normalization would drop"
    return None


def linear_problem(module: nn.Linear) -> str | None:
    """Why this linear layer cannot become a KNLinear, or None."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first to convert it"
    if module._parameters.get("weight") is None:
        return "its weight is computed (weight_norm, spectral_norm or pruning); make it permanent first to convert it"
    if "forward" in vars(module) or type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has its own forward, which KNLinear would drop"
    return None


def conv_problem(module: nn.Module) -> str | None:
    """Why this convolution cannot become a KNConv, or None."""
    name = type(module).__name__
    base = next((base for base in _CONVS if isinstance(module, base)), None)
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolution; not offered yet"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first to convert it"
    if base is None:
        return f"{name} is a convolution of its own kind; not offered yet"
    if "forward" in vars(module):
        return "its forward is patched on the instance"
    if module._parameters.get("weight") is None:
        return "its weight is computed (weight_norm, spectral_norm or pruning); make it permanent first to convert it"
    if type(module).forward is not base.forward or type(module)._conv_forward is not base._conv_forward:
        return f"{name} has its own forward, which KNConv would drop"
    return None


def fused_parts(norm: nn.Module) -> list[nn.Module]:
    """The dropout and the activation inside a fused norm (timm's BatchNormAct2d and kin), in order of their calls."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")]
    parts = [part for part in parts if isinstance(part, nn.Module) and not isinstance(part, nn.Identity)]
    own = None if parts else _own_activation(norm)
    return parts if own is None else [own]


def _own_activation(norm: nn.Module) -> nn.Module | None:
    """The plain form of the activation that EvoNorm (x sigmoid(v x)) and FRN (max(x, tau)) compute within the norm."""
    name = type(norm).__name__
    if name.startswith("EvoNorm") and getattr(norm, "apply_act", getattr(norm, "v", None) is not None):
        return nn.SiLU()
    return nn.ReLU() if name.startswith("FilterResponseNorm") and getattr(norm, "tau", None) is not None else None


def activates_before_gain(norm: nn.Module) -> bool:
    """Whether the norm's gain and bias come after an activation within it."""
    return type(norm).__name__.startswith("EvoNorm") and _own_activation(norm) is not None


def activation_note(norm: nn.Module) -> str:
    """What a plan says of the activation inside a norm that goes."""
    own = _own_activation(norm)
    if own is not None and fused_parts(norm)[:1] != [getattr(norm, "act", None)]:
        return f"; {type(own).__name__} takes the place of the activation in it"
    return "; its activation stays" if fused_parts(norm) else ""


def describe(module: nn.Module) -> str:
    """A short description: ``Conv2d 64->128 3x3 s2``, ``BatchNormAct2d 64 + ReLU``."""
    name = type(module).__name__
    if isinstance(module, _ConvNd):
        size = "x".join(map(str, module.kernel_size))
        stride = "" if set(module.stride) == {1} else " s" + "x".join(map(str, dict.fromkeys(module.stride)))
        groups = "" if module.groups == 1 else f" groups {module.groups}"
        return f"{name} {module.in_channels}->{module.out_channels} {size}{stride}{groups}"
    if isinstance(module, nn.Linear):
        return f"{name} {module.in_features}->{module.out_features}"
    width = next((getattr(module, a) for a in ("num_features", "num_channels") if hasattr(module, a)), "")
    if not width and hasattr(module, "normalized_shape"):
        width = "x".join(map(str, module.normalized_shape))
    parts = "".join(f" + {type(part).__name__}" for part in fused_parts(module))
    return f"{name} {width}".rstrip() + parts
