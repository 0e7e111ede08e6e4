"""NormPlan: what `knport.replace_norm` does to every norm of a model, and the way to carry it out."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from knport import text
from knport.surgery.guard import refuse_wrapped
from knport.surgery.norm_kinds import NormOptions
from knport.surgery.norm_swap import swap_norms
from knport.surgery.plan import check_structure
from knport.surgery.record import remember
from knport.surgery.table import HEADINGS

REPLACED, STANDARDIZED, KEPT, ALREADY = "replaced", "standardized", "kept", "already"
LEGEND = {
    REPLACED: "another norm takes the place of this one",
    STANDARDIZED: "the same convolution; every filter is brought to mean 0 and variance 1 before it is used",
    KEPT: "stays as it is",
    ALREADY: "is what was asked for",
}
COLOURS = {REPLACED: "green", STANDARDIZED: "green", KEPT: "yellow", ALREADY: "dim"}


@dataclass(frozen=True, kw_only=True)
class NormVerdict:
    """What happens to one norm (or, with weight standardization, convolution), and why.

    Args:
        path: its (first) dotted name.
        kind: "norm" or "conv".
        layer: a short description, e.g. ``BatchNorm2d 64``.
        verdict: "replaced", "standardized" (a convolution), "kept" or "already".
        reason: in plain words.
        aliases: other names of the same module.
        ndim: spatial dimensions of what the norm reads; None when it is not replaced.
        channels_last: whether the channels are the last dimension of that.
        activation: whether the new norm has an activation of its own.
        replaces_activation: path of the activation module that it takes the place of, "" for the fused one of the
            norm itself, None for neither.
    """

    path: str
    kind: str
    layer: str
    verdict: str
    reason: str
    aliases: tuple[str, ...] = ()
    ndim: int | None = None
    channels_last: bool = False
    activation: bool = False
    replaces_activation: str | None = None

    @property
    def changes(self) -> bool:
        """Whether the module is replaced."""
        return self.verdict in (REPLACED, STANDARDIZED)


@dataclass(frozen=True, kw_only=True)
class NormPlan:
    """What `knport.replace_norm` would do to a model; ``print(plan)`` to read it, `apply` to do it.

    Args:
        model: class name of the model.
        norm: the norm asked for.
        options: of the new norms.
        verdicts: one per norm and, with weight standardization, per convolution, in the order of the model's modules.
        inplace_off: activations that may no longer work in place: the norm that made their input is gone, and others
            read what it read.
        reader: how the model was read.
        input_shape: of the input that it was read with.
        structure: (path, description) of every module, to recognise the model again.
        include: the filters that chose the norms, as text; None when there were none.
        exclude: likewise, of what was left alone.
    """

    model: str
    norm: str
    options: NormOptions
    verdicts: tuple[NormVerdict, ...] = field(repr=False)
    inplace_off: tuple[str, ...] = field(repr=False)
    reader: str
    input_shape: tuple[int, ...] | None
    structure: tuple[tuple[str, str], ...] = field(repr=False)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None

    @property
    def changes(self) -> bool:
        """Whether anything would be replaced."""
        return any(verdict.changes for verdict in self.verdicts)

    def count(self, kind: str) -> Counter[str]:
        """How many norms ("norm") or convolutions ("conv") have which verdict."""
        return Counter(verdict.verdict for verdict in self.verdicts if verdict.kind == kind)

    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Carry the plan out on `model`, or on another instance with the same modules; as `Plan.apply`."""
        refuse_wrapped(model)
        check_structure(self.model, self.structure, model)
        return remember(swap_norms(model, self, inplace=inplace), self)

    def to_json(self) -> str:
        """The plan as a versioned JSON object, without the structure that it is checked against."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "structure"}
        return json.dumps({"version": 1, **fields}, default=dataclasses.asdict, indent=1)

    def __str__(self) -> str:
        return "\n".join([*self._summary(), "", text.aligned(HEADINGS, self._rows())])

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        return Group(Text("\n".join(self._summary())), text.coloured(HEADINGS, self._rows(), styles=COLOURS))

    def _summary(self) -> list[str]:
        """The sentences above the table."""
        given = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.options).items() if v is not None)
        lines = [
            f"Plan for {self.model}: nothing has been changed yet; plan.apply(model) does what follows to a copy.",
            f"New norm: {self.norm}" + (f" ({given})" if given else ""),
            "",
        ]
        for title, kind in (("norms", "norm"), ("convolutions", "conv")):
            if found := self.count(kind):
                parts = ", ".join(f"{found[verdict]} {verdict}" for verdict in LEGEND if found[verdict])
                lines.append(f"  {title:<13} {sum(found.values())}: {parts}")
        if self.inplace_off:
            lines.append(f"  in place      switched off in {len(self.inplace_off)} activations whose norm goes")
        used = {verdict.verdict for verdict in self.verdicts}
        return [*lines, "", *(f"  {word:<13} {meaning}" for word, meaning in LEGEND.items() if word in used)]

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (v.path + (f" (= {', '.join(v.aliases)})" if v.aliases else ""), v.layer, v.verdict, v.reason)
            for v in self.verdicts
        ]
