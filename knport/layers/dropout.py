"""The dropout of kernel normalization: when it acts, in which form, and what evaluation uses in its place."""

from __future__ import annotations

from torch import Tensor

from knport.errors import KNPortError, UnknownName

EVAL_STATS = ("expected", "plain", "sample")
TRAIN_FORMS = ("moments", "shared", "unit")


class StatisticsDropout:
    """Mix-in: the attributes `dropout`, `eps`, `eval_stats`, `dropout_form` that every layer here shares."""

    def _set_dropout(self, dropout: float, eps: float, eval_stats: str, dropout_form: str) -> None:
        if not 0 <= dropout < 1:
            raise KNPortError(f"dropout={dropout!r}; expected a probability in [0, 1): at 1 no statistics are left")
        if eps <= 0:
            raise KNPortError(f"eps={eps!r}; expected a positive number: a constant unit has variance 0")
        if eval_stats not in EVAL_STATS:
            raise UnknownName("eval_stats", eval_stats, EVAL_STATS)
        if dropout_form not in TRAIN_FORMS:
            raise UnknownName("dropout_form", dropout_form, TRAIN_FORMS)
        self.dropout, self.eps = dropout, eps
        self.eval_stats, self.dropout_form = eval_stats, dropout_form

    def _dropout_now(self) -> dict[str, float | str]:
        """The functional's `dropout` and `dropout_form` in the present mode."""
        if self.training or self.eval_stats == "sample":
            return {"dropout": self.dropout, "dropout_form": self.dropout_form}
        if self.eval_stats == "expected":
            return {"dropout": self.dropout, "dropout_form": "expected"}
        return {"dropout": 0.0}

    def _dropout_repr(self) -> str:
        text = f"dropout={self.dropout}, eps={self.eps}"
        if self.dropout_form != "moments":
            text += f", dropout_form={self.dropout_form!r}"
        return text if self.eval_stats == "expected" else f"{text}, eval_stats={self.eval_stats!r}"


def with_batch(x: Tensor, ndim: int, layer: object) -> Tensor:
    """`x`, which has no batch dimension, with one; an error for any other number of dimensions."""
    if x.dim() == ndim + 1:
        return x.unsqueeze(0)
    size = ("L", "H, W", "D, H, W")[ndim - 1]
    raise KNPortError(
        f"{type(layer).__name__}: input of shape {tuple(x.shape)}; expected (N, C, {size}) or unbatched (C, {size})"
    )
