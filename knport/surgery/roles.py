"""What a step of the data flow does, in the few words that the matcher needs."""

from __future__ import annotations

from torch import nn

from knport.surgery.kinds import kind

# Steps between a norm and a convolution that hand a normalized map on as a map.
TRANSPARENT = frozenset({"act", "pool", "dropout", "identity", "cat", "pad", "resize"})
# Steps that hand every value on, in another order or shape.
SHUFFLES = frozenset({"identity", "dropout", "reshape", "move", "pad"})
# Steps between a layer and a norm behind it under which the norm's work can still be done by that layer.
BEFORE_NORM = frozenset({"identity", "act", "pool", "dropout"})
# Steps whose output may be the same memory as their input.
VIEWS = frozenset({"identity", "reshape", "dropout"})

_FUNCTIONS = {
    "act": "relu relu6 gelu silu hardswish hardtanh hardsigmoid leaky_relu elu celu selu mish sigmoid tanh softplus "
    "prelu rrelu swish hard_swish hard_sigmoid hard_mish logsigmoid softsign softmax clamp",
    "pool": "mean amax avg max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool2d",
    "dropout": "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout drop_path stochastic_depth",
    "identity": "contiguous clone to float half type type_as detach",
    "cat": "cat concat concatenate",
    "pad": "pad",
    "resize": "interpolate upsample",
    "add": "add iadd radd sub isub",
    "mul": "mul imul rmul",
    "reshape": "flatten view reshape permute transpose squeeze unsqueeze chunk split unbind getitem expand unflatten "
    "view_as reshape_as expand_as swapaxes swapdims movedim moveaxis narrow select t split_with_sizes tensor_split "
    "ravel get",
    "move": "roll flip index_select stack repeat rot90 pixel_shuffle pixel_unshuffle channel_shuffle unfold",
    "functional linear": "linear scaled_dot_product_attention multi_head_attention_forward",
    "functional norm": "batch_norm layer_norm group_norm instance_norm rms_norm",
    "functional conv": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
}
_ROLE_OF_FUNCTION = {name: role for role, names in _FUNCTIONS.items() for name in names.split()}
_CLASS_WORDS = {  # a part of the class name -> role; the first that fits
    "Identity": "identity",
    "Drop": "dropout",
    "StochasticDepth": "dropout",
    "Pool": "pool",
    "latten": "reshape",
    "Pad": "pad",
    "Upsample": "resize",
}
_ACTIVATION_NAMES = {"Swish", "HardSwish", "Mish", "Serf", "QuickGELU", "SiLU", "ReLU", "GELU", "FReLU"}


def plain_name(name: str) -> str:
    """``add`` for ``__iadd__``'s kin: the function's name without the marks of methods and in-place forms."""
    return name.strip("_")


def function_role(name: str) -> str:
    """The role of a function or tensor method by its name."""
    return _ROLE_OF_FUNCTION.get(plain_name(name), "other")


def reads_first_only(name: str) -> bool:
    """Whether a function takes nothing but the shape or the type of every tensor after its first."""
    return plain_name(name).endswith("_as") or plain_name(name).endswith("_like")


def module_role(module: nn.Module) -> str:
    """The role of a leaf module: its kind if that is a site of surgery or a linear layer, else what it does."""
    if (own := kind(module)) != "other":
        return own
    if _is_activation(module):
        return "act"
    name = type(module).__name__
    return next((role for word, role in _CLASS_WORDS.items() if word in name), "other")


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    if home == "torch.nn.modules.activation":
        return not isinstance(module, nn.MultiheadAttention)
    return home.startswith("timm.layers.activations") or type(module).__name__ in _ACTIVATION_NAMES
