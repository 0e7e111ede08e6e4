"""KNConfig: how `knport.convert` rewrites a model."""

from __future__ import annotations

from dataclasses import dataclass

from knport.errors import KNPortError, UnknownName
from knport.layers.dropout import EVAL_STATS, TRAIN_FORMS

ENLARGE = ("2x2", "3x3", "window", "none")
INIT = ("embed", "fresh")


@dataclass(frozen=True, kw_only=True)
class KNConfig:
    """What the new layers are given and how 1x1 convolutions are treated.

    Args:
        dropout: probability with which an entry is left out of a unit's statistics in training. The last KernelNorm
            before the head gets ``min(5 * dropout, 0.25)``, the published proportion; convolutions whose units have
            fewer than 64 values (3x3 of an image) get none: on flat ones, as backgrounds are, masks of so few values
            shift the mean of what training sees, and evaluation without masks would see something else.
        eps: added to the variance. A layer that takes along the gain and bias of a LayerNorm keeps the eps of that.
        enlarge: what becomes of 1x1 convolutions, whose unit would be one pixel: "2x2" and "3x3" enlarge the kernel
            (the map keeps its size by zero padding, on alternating sides for 2x2), "window" keeps the kernel and
            takes the statistics from the surrounding `norm_window` (3x3 if that is None), "none" leaves them 1x1.
            Linear layers on tokens have no kernel to enlarge: all but "none" take the statistics from that window,
            where the tokens lie on a known grid. "none" keeps every LayerNorm whose work no layer can do exactly.
        init: "embed" puts the weights of an enlarged 1x1 convolution where the convolution's own output stays the
            same, "fresh" draws the enlarged kernels anew. Kernels that keep their size always keep their weights.
        norm_window: pixels (tokens) per side of the block that every KNConv and KNLinear takes its statistics of; None
            for the kernel.
        final_norm: make the norm before the head a KernelNorm, and add one where the network has none there.
        eval_stats: "expected", "plain" or "sample"; see `knport.KNConv2d`.
        dropout_form: "moments", "shared" or "unit"; see `knport.KNConv2d`.

    Raises:
        KNPortError: a value outside its range; `UnknownName` for an unknown word.
    """

    dropout: float = 0.05
    eps: float = 1e-5
    enlarge: str = "2x2"
    init: str = "embed"
    norm_window: int | tuple[int, ...] | None = None
    final_norm: bool = True
    eval_stats: str = "expected"
    dropout_form: str = "moments"

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise KNPortError(f"KNConfig.dropout={self.dropout!r}; expected a probability in [0, 1)")
        if not self.eps > 0:
            raise KNPortError(f"KNConfig.eps={self.eps!r}; expected a positive number")
        for field, known in (
            ("enlarge", ENLARGE),
            ("init", INIT),
            ("eval_stats", EVAL_STATS),
            ("dropout_form", TRAIN_FORMS),
        ):
            if getattr(self, field) not in known:
                raise UnknownName(f"KNConfig.{field}", getattr(self, field), known)
        window = self.norm_window
        sizes = window if isinstance(window, tuple) else (1 if window is None else window,)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise KNPortError(f"KNConfig.norm_window={window!r}; expected None, a positive int or a tuple of them")

    @property
    def final_dropout(self) -> float:
        """Dropout of the last KernelNorm."""
        return min(5 * self.dropout, 0.25)

    def layer_options(self) -> dict[str, float | str]:
        """The keyword arguments that KNConv and KernelNorm share."""
        return {
            "dropout": self.dropout,
            "eps": self.eps,
            "eval_stats": self.eval_stats,
            "dropout_form": self.dropout_form,
        }
