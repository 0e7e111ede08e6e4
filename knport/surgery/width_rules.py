"""What each torch function does to the axes of the tensors it is given; a function that is not here fixes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knport.surgery.width_basics import Rule, argument, elementwise, fixed_like, spatial, tensors
from knport.surgery.width_products import PRODUCTS
from knport.surgery.width_rearrangements import REARRANGEMENTS
from knport.surgery.widths import Axis

if TYPE_CHECKING:
    from knport.surgery.channel_groups import Flow

SUMS = frozenset({"add", "iadd", "radd", "sub", "isub", "rsub"})
_ELEMENTWISE = (
    "add iadd radd sub isub rsub subtract mul imul rmul multiply div truediv itruediv rtruediv true_divide divide "
    "floordiv floor_divide remainder mod pow ipow rpow neg abs absolute sqrt rsqrt square exp expm1 log log1p log2 "
    "reciprocal sign round floor ceil sin cos tan erf sigmoid tanh relu relu6 gelu silu hardswish hardtanh hardsigmoid "
    "leaky_relu elu celu selu mish softplus swish hard_swish hard_sigmoid hard_mish logsigmoid log_sigmoid softsign "
    "softmax log_softmax clamp clip clamp_min clamp_max threshold addcmul addcdiv lerp where masked_fill maximum "
    "minimum eq ne lt le gt ge logical_and logical_or logical_not isnan nan_to_num dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_dropout drop_path stochastic_depth bernoulli contiguous clone to float half "
    "bfloat16 double type type_as detach requires_grad roll flip cumsum normalize zeros_like ones_like rand_like "
    "randn_like empty_like full_like data fill zero copy hypot rrelu"
)
_REDUCTIONS = "mean sum amax amin max min var std var_mean std_mean prod logsumexp argmax argmin norm any all"
_POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
    "upsample"
)


def _reduce(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    if len(tensors(args)) > 1:
        return elementwise(flow, args, kwargs, out)
    axes, x = flow.axes(args[0]), args[0]
    place = 2 if flow.name in ("norm",) else 1
    dims = argument(args, kwargs, place, "dim", "axis")
    gone = {d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims or range(x.dim()))}
    results = []
    for tensor in tensors(out):
        kept = tensor.dim() == x.dim()
        one = [flow.widths.fixed(1) if i in gone else axis for i, axis in enumerate(axes)]
        results.append(one if kept else [axis for i, axis in enumerate(axes) if i not in gone])
    return results


def _pool(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    x = argument(args, kwargs, 0, "input")
    return [spatial(flow, flow.axes(x), x.shape, tensor.shape) for tensor in tensors(out)]


def _created(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    """New tensors beside another, the masks of DropPath for instance: of its shape, or of a shape of their own."""
    x = args[0]
    return [list(flow.axes(x))] if x.shape == out.shape else fixed_like(flow, out)


_FAMILIES: dict[str, Rule] = {
    "new_empty new_zeros new_ones new_full": _created,
    _ELEMENTWISE: elementwise,
    _REDUCTIONS: _reduce,
    _POOLS: _pool,
    **REARRANGEMENTS,
    **PRODUCTS,
}
_RULES: dict[str, Rule] = {name: rule for names, rule in _FAMILIES.items() for name in names.split()}


def rule_of(name: str) -> Rule | None:
    """The rule of a function by its name without the marks of methods and in-place forms."""
    return _RULES.get(name)
