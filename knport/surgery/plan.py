"""Plan: one verdict with a reason for every norm and convolution of a model, and the way to carry it out."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from knport.errors import KNPortError
from knport.surgery import table
from knport.surgery.config import KNConfig
from knport.surgery.guard import refuse_wrapped
from knport.surgery.record import remember
from knport.surgery.resizing import Resizing, resize
from knport.surgery.swap import swap

ABSORBED, KERNEL_NORM, KN_CONV, KN_LINEAR = "absorbed", "KernelNorm", "KNConv", "KNLinear"
KEPT, ALREADY = "kept", "already"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What happens to one norm, convolution or linear layer, and why.

    Args:
        path: its (first) dotted name.
        kind: "norm", "conv" or "linear".
        layer: a short description, e.g. ``Conv2d 64->64 1x1``.
        verdict: "absorbed" (a norm whose work neighbouring convolutions take over), "KernelNorm" (a norm that becomes
            one), "KNConv", "KNLinear", "kept", or "already" (a layer of knport).
        reason: in plain words.
        aliases: other names of the same module.
        dropout: of the new layer; None when there is none.
        ndim: spatial dimensions of the new layer; 0 for features (N, C).
        enlarge: kernel size per side that a 1x1 convolution gets; None when it keeps its own.
        side: on which side an even enlarged kernel pads, 0 (top, left) or 1 (bottom, right).
        norm_window: of the KNConv or KNLinear.
        prefix_tokens: of the KNLinear.
        grid_size: of the KNLinear.
        fold: path of the norm in front whose gain and bias go into the weights.
        affine: path of the norm behind, likewise.
        eps: of the new layer, where that is the norm's own; None for the configuration's.
        reads_images: whether it is a KNConv at the input; its bias does not begin at 0 (`fold.spread_bias`).
    """

    path: str
    kind: str
    layer: str
    verdict: str
    reason: str
    aliases: tuple[str, ...] = ()
    dropout: float | None = None
    ndim: int | None = None
    enlarge: int | None = None
    side: int = 0
    norm_window: int | tuple[int, ...] | None = None
    prefix_tokens: int = 0
    grid_size: tuple[int, int] | None = None
    fold: str | None = None
    affine: str | None = None
    eps: float | None = None
    reads_images: bool = False

    @property
    def changes(self) -> bool:
        """Whether the module is replaced."""
        return self.verdict not in (KEPT, ALREADY)


@dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """A KernelNorm added in front of the module at `path`, an activation or the pooling before the head."""

    path: str
    before: str
    dropout: float
    ndim: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `knport.convert` would do to a model; ``print(plan)`` to read it, `apply` to do it.

    Args:
        model: class name of the model.
        config: the `KNConfig` of the new layers.
        verdicts: one per norm and convolution, and per linear layer that changes or is never called, in the order of
            the model's modules.
        final_norms: the KernelNorms that are added before the head.
        inplace_off: activations that may no longer work in place: the norm that made their input is gone, and others
            read what it read.
        notes: what else a reader should know.
        parameters: how many the model has, before and after.
        reader: how the model was read.
        input_shape: of the input that it was read with.
        structure: (path, description) of every module, to recognise the model again.
        include: the filters that chose the norms, as text; None when there were none.
        exclude: likewise, of what was left alone.
        resizing: the widths that change so that the network counts what was asked for; None when nothing was asked.
    """

    model: str
    config: KNConfig
    verdicts: tuple[Verdict, ...] = field(repr=False)
    final_norms: tuple[FinalNorm, ...]
    inplace_off: tuple[str, ...] = field(repr=False)
    notes: tuple[str, ...]
    parameters: tuple[int, int]
    reader: str
    input_shape: tuple[int, ...] | None
    structure: tuple[tuple[str, str], ...] = field(repr=False)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    resizing: Resizing | None = None

    @property
    def changes(self) -> bool:
        """Whether anything would be replaced or resized."""
        resized = self.resizing is not None and bool(self.resizing.changes)
        return resized or any(verdict.changes for verdict in self.verdicts)

    def count(self, kind: str) -> Counter[str]:
        """How many norms ("norm"), convolutions ("conv") or linear layers ("linear") have which verdict."""
        return Counter(verdict.verdict for verdict in self.verdicts if verdict.kind == kind)

    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Carry the plan out on `model`, or on another instance with the same modules.

        Args:
            model: of the structure that the plan was made for.
            inplace: change `model` itself instead of a deep copy. On an error nothing has changed.

        Raises:
            AlreadyWrapped: `model` is wrapped (DDP, compiled, ...).
            KNPortError: `model` has other modules than the one the plan was made for.
        """
        refuse_wrapped(model)
        check_structure(self.model, self.structure, model)
        model = swap(model, self, inplace=inplace)
        return remember(model if self.resizing is None else resize(model, self.resizing), self)

    def to_json(self) -> str:
        """The plan as a versioned JSON object, without the structure that it is checked against."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "structure"}
        return json.dumps({"version": 1, **fields}, default=dataclasses.asdict, indent=1)

    def __str__(self) -> str:
        return table.plain(self)

    def __rich__(self):
        return table.rich(self)


def structure_of(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """(path, class and its settings) of every module under every name."""
    modules = model.named_modules(remove_duplicate=False)
    return tuple((path, f"{type(module).__name__}({module.extra_repr()})") for path, module in modules)


def check_structure(name: str, structure: tuple[tuple[str, str], ...], model: nn.Module) -> None:
    """Raise `KNPortError` unless `model` has the modules of the `structure` that a plan for a `name` was made for."""
    known, found = dict(structure), dict(structure_of(model))
    for path in {**known, **found}:
        if known.get(path) != found.get(path):
            raise KNPortError(
                f"this plan was made for another {name}: at {path or '(the model itself)'} it expects "
                f"{known.get(path, 'nothing')}, found {found.get(path, 'nothing')}; make a new one with knport.plan"
            )
