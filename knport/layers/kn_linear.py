"""KNLinear: a linear layer on kernel normalized tokens (Nasirigerdeh et al., TMLR 2024, Eq. 5, for a 1 x 1 kernel)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from knport import functional
from knport.errors import KNPortError
from knport.functional.statistics import UnitStatistics
from knport.geometry import ntuple
from knport.layers.dropout import StatisticsDropout


class KNLinear(StatisticsDropout, nn.Linear):
    """A linear layer on kernel normalized tokens, in the place of LayerNorm and the linear layer behind it.

    .. math:: y = \\frac{x W^T - \\mu' \\sum W}{\\sqrt{\\sigma'^2 + \\epsilon}} + b

    mu' and the biased sigma'^2 are the mean and the variance, after dropout, of the unit around each token: its
    neighbours in a window of k x k tokens, with all their features. With a window of one token that is LayerNorm
    without gain and bias, and then the linear layer. A sub-class of `torch.nn.Linear` with the same parameters; there
    are no buffers, and no image sees another.

    Args:
        in_features, out_features, bias: as `torch.nn.Linear`.
        norm_window: k, or (k_h, k_w). Zeros around the grid belong to the units of the border.
        prefix_tokens: tokens before the grid in a sequence (class and register tokens), each a unit of its own.
        dropout: probability with which an entry is left out of the statistics in training.
        eps: added to the variance.
        eval_stats: "expected" (deterministic, the expected mean and variance under dropout, so that the scale is that
            of training), "plain" (the undropped unit's) or "sample" (dropout stays on).
        dropout_form: "moments", "shared" or "unit"; see `knport.functional`.
        grid_size: (H, W) of the tokens of a sequence; None for a square. Also an attribute, and a keyword of each
            call where it changes with the image.

    Shape:
        Input (..., C_in) for a window of one token; for a larger one (N, H, W, C_in), (N, prefix + H W, C_in) or one
        image's (prefix + H W, C_in). Output the same with C_out.

    Example:
        >>> knport.KNLinear(192, 576, norm_window=3, prefix_tokens=1)(torch.randn(2, 197, 192)).shape
        torch.Size([2, 197, 576])
    """

    # Called with (layer, statistics) in every forward pass where it is set, on the instance: `knport.privacy`.
    statistics_hook: Callable[[nn.Module, UnitStatistics], None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        norm_window: int | Sequence[int] = 1,
        prefix_tokens: int = 0,
        dropout: float = 0.05,
        eps: float = 1e-5,
        eval_stats: str = "expected",
        dropout_form: str = "moments",
        grid_size: Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.norm_window = ntuple(norm_window, 2, "norm_window")
        if not isinstance(prefix_tokens, int) or prefix_tokens < 0:
            raise KNPortError(f"prefix_tokens={prefix_tokens!r}; expected an int, 0 or more")
        self.prefix_tokens = prefix_tokens
        self.grid_size = None if grid_size is None else ntuple(grid_size, 2, "grid_size")
        self._set_dropout(dropout, eps, eval_stats, dropout_form)

    def forward(self, x: Tensor, *, grid_size: Sequence[int] | None = None) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise KNPortError(
                f"{type(self).__name__}: input of shape {tuple(x.shape)}; expected {self.in_features} features in the "
                "last dimension"
            )
        where = {
            "norm_window": self.norm_window,
            "prefix_tokens": self.prefix_tokens,
            "grid_size": self.grid_size if grid_size is None else grid_size,
        }
        how, statistics = where | self._dropout_now(), None
        if self.statistics_hook is not None:
            statistics = functional.kn_linear_statistics(x, **how)
            self.statistics_hook(self, statistics)
        return functional.kn_linear(x, self.weight, self.bias, eps=self.eps, statistics=statistics, **how)

    def __call__(self, *args, **kwargs) -> Tensor:
        y = super().__call__(*args, **kwargs)
        # What a full backward hook returns must not be edited in place, as `x += branch(x)` would.
        return y if self.statistics_hook is None or not self._backward_hooks else y.clone()

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, norm_window={self.norm_window}, {self._dropout_repr()}"
        if self.prefix_tokens:
            text += f", prefix_tokens={self.prefix_tokens}"
        return text if self.grid_size is None else f"{text}, grid_size={self.grid_size}"
