"""Carry a plan out: build every new module first, then put each in the place of the old one under all its names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from knport.layers import KNLinear
from knport.surgery.config import KNConfig
from knport.surgery.copying import copy_model
from knport.surgery.enlarge import embed, enlarged_padding
from knport.surgery.fold import folded, neutral, scaled, spread_bias
from knport.surgery.kinds import KN_CONVS, KN_NORMS, fused_parts, takes_means

if TYPE_CHECKING:
    from knport.surgery.plan import FinalNorm, Plan, Verdict

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def swap(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """`model`, or by default a deep copy of it, with the modules of `plan` replaced."""
    model = model if inplace else copy_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {
        id(modules[v.path]): _replacement(modules[v.path], v, plan.config, modules) for v in plan.verdicts if v.changes
    }
    for place in plan.final_norms:
        old = modules[place.path]
        new[id(old)] = _in_mode(nn.Sequential(_kernel_norm(place, plan.config, old), old), old)
    switched = [modules[path] for path in plan.inplace_off]
    # Nothing has been changed up to here; what follows cannot fail.
    for module in switched:
        module.inplace = False
    exchange(model, new)
    return model


def exchange(model: nn.Module, new: dict[int, nn.Module]) -> None:
    """Put each new module in the place of the old one, by its id, under all its names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # not named_children: it hides the second name of a shared module
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def _replacement(old: nn.Module, verdict: Verdict, config: KNConfig, modules: dict[str, nn.Module]) -> nn.Module:
    """The module in the place of `old`; `modules` holds the norms whose gain and bias it takes along."""
    if verdict.kind != "norm":
        build = _kn_conv if verdict.kind == "conv" else _kn_linear
        new = build(old, verdict, config, *_parameters(old, modules.get(verdict.fold)))
        if verdict.affine is not None:
            _take_affine(new, modules[verdict.affine])
        if verdict.reads_images and (new.bias.is_meta or not new.bias.any()):
            new.bias = nn.Parameter(spread_bias(new.weight), requires_grad=new.bias.requires_grad)
        return adopt(new, old)
    parts = fused_parts(old)
    if verdict.verdict == "KernelNorm":
        parts = [_kernel_norm(verdict, config, old), *parts]
    hooked = any(getattr(old, hooks) for hooks in HOOKS[:-1])
    if len(parts) == 1 and not hooked:
        return parts[0]
    return adopt(nn.Sequential(*parts) if parts else nn.Identity(), old)


def _kernel_norm(site: Verdict | FinalNorm, config: KNConfig, old: nn.Module) -> nn.Module:
    options = {**config.layer_options(), "dropout": site.dropout}
    if site.ndim == 0:  # one vector per image: its unit is itself
        features = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
        return _in_mode(nn.LayerNorm(features, eps=config.eps, elementwise_affine=False), old)
    return _in_mode(KN_NORMS[site.ndim](1, **options), old)


def _parameters(old: nn.Module, norm: nn.Module | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the new layer: the old ones, with the norm's gain and bias in them, or zeros for no bias."""
    weight, bias, learns = old.weight, old.bias, old.weight.requires_grad
    if norm is not None:
        tensors = [None if t is None else t.detach() for t in (weight, bias)]
        return tuple(nn.Parameter(t, requires_grad=learns) for t in folded(*tensors, norm))
    if bias is None:
        bias = nn.Parameter(weight.detach().new_zeros(len(weight)), requires_grad=learns)
    return weight, bias


def _take_affine(new: nn.Module, norm: nn.Module) -> None:
    """Put the gain and bias of the norm behind into a new layer's weights, and take its bias away if the norm did."""
    weight, bias = scaled(new.weight.detach(), new.bias.detach(), norm)
    if not neutral(norm):  # else the weight itself stays, for an optimizer that knows it
        new.weight = nn.Parameter(weight, requires_grad=new.weight.requires_grad)
    if not neutral(norm) or takes_means(norm):
        new.bias = nn.Parameter(bias, requires_grad=new.bias.requires_grad)


def _options(verdict: Verdict, config: KNConfig) -> dict:
    own = {"dropout": verdict.dropout} | ({} if verdict.eps is None else {"eps": verdict.eps})
    return {**config.layer_options(), **own}


def _kn_linear(old: nn.Linear, verdict: Verdict, config: KNConfig, weight: nn.Parameter, bias: nn.Parameter):
    """The KNLinear in the place of a linear layer."""
    new = KNLinear(
        old.in_features,
        old.out_features,
        norm_window=verdict.norm_window,
        prefix_tokens=verdict.prefix_tokens,
        grid_size=verdict.grid_size,
        device="meta",
        dtype=weight.dtype,
        **_options(verdict, config),
    )
    new.weight, new.bias = weight, bias
    return new


def _kn_conv(old: nn.Module, verdict: Verdict, config: KNConfig, weight: nn.Parameter, bias: nn.Parameter):
    """The KNConv in the place of a convolution."""
    size = verdict.enlarge
    new = KN_CONVS[verdict.ndim](
        old.in_channels,
        old.out_channels,
        size or old.kernel_size,
        old.stride,
        enlarged_padding(old, size, verdict.side) if size else old.padding,
        1 if size else old.dilation,
        old.groups,
        padding_mode=old.padding_mode,
        norm_window=verdict.norm_window,
        device="meta",
        dtype=weight.dtype,
        **_options(verdict, config),
    )
    if size:
        large = embed(weight.detach(), size, verdict.side)
        weight = nn.Parameter(large, requires_grad=weight.requires_grad)
    new.weight, new.bias = weight, bias
    if size and config.init == "fresh":
        kept = bias.detach().clone()
        new.reset_parameters()  # draws a bias too
        bias.data.copy_(kept)
    return new


def adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Give `new` the hooks and the train flag of `old`; the dictionaries themselves, so that handles keep working."""
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    return _in_mode(new, old)


def _in_mode(new: nn.Module, old: nn.Module) -> nn.Module:
    new.training = old.training  # not .train(): the parts that were there before keep their own flags
    return new
