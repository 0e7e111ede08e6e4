"""knport.check: the promises of a kernel normalized network, tested on a model that is at hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from knport import text
from knport.check_promises import PROMISES, Promise, Subject
from knport.check_runs import ForwardFailed, run
from knport.errors import KNPortError
from knport.inputs import call_of, distinct, images_in, moved, tensors
from knport.surgery.copying import copy_onto
from knport.surgery.guard import refuse_wrapped

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative to the largest value
_STYLES = {"holds": "green", "BROKEN": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Report:
    """The promises of one model; true when all hold. ``print(report)`` shows a table.

    Args:
        model: class name.
        promises: in the order they were tested.
    """

    model: str
    promises: tuple[Promise, ...]

    def __bool__(self) -> bool:
        return all(promise.holds for promise in self.promises)

    @property
    def broken(self) -> tuple[Promise, ...]:
        """The promises that do not hold."""
        return tuple(promise for promise in self.promises if not promise.holds)

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries, fit for JSON."""
        return {"model": self.model, "holds": bool(self), "promises": [asdict(promise) for promise in self.promises]}

    def __str__(self) -> str:
        return f"{self._title()}\n\n{text.aligned(('promise', '', 'found'), self._rows())}"

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._title()), text.coloured(("promise", "", "found"), self._rows(), styles=_STYLES))

    def _title(self) -> str:
        outcome = "every promise holds" if self else f"{len(self.broken)} of {len(self.promises)} promises are broken"
        return f"{self.model}: {outcome}"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(p.name, "holds" if p.holds else "BROKEN", p.detail) for p in self.promises]


def check(model: nn.Module, example_inputs: Any = None) -> Report:
    """Test on this model what kernel normalization promises.

    No BatchNorm is left; no image's output depends on another, in evaluation and in training with dropout 0; the batch
    size changes no shape; every parameter gets a finite gradient; evaluation is deterministic; no activation edits in
    place what another layer still reads; copies, pickles and saved weights give the same output. Runs in float64 where
    the model can, on a copy, with images of noise in the place of equal ones.

    Args:
        model: any network, converted or not.
        example_inputs: what its forward takes: a tensor, a tuple of arguments or a dict of keyword arguments. Default:
            two images of noise of the size that the model states, else 224 x 224.

    Returns:
        A report, true when every promise holds; a broken one names the module to blame where it can be found.

    Raises:
        KNPortError: the model cannot be run on these inputs, or lies on the meta device.
        AlreadyWrapped: it is wrapped, compiled or prepared.

    Example:
        >>> report = knport.check(knport.convert(model), torch.randn(2, 3, 64, 64))
        >>> assert report, report
    """
    refuse_wrapped(model)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise KNPortError(f"{type(model).__name__} lies on the meta device; a check needs numbers")
    subject = _subject(model, example_inputs)
    promises = [promise(subject) for promise in PROMISES]
    return Report(model=type(model).__name__, promises=tuple(promises))


def _subject(model: nn.Module, example_inputs: Any) -> Subject:
    """In float64 where the model runs in it, else as it is."""
    device = next((str(t.device) for t in (*model.parameters(), *model.buffers())), "cpu")
    call = distinct(call_of(model, example_inputs))
    problem = None
    for dtype in (torch.float64, None):
        copy = copy_onto(model, device)
        copy, inputs = (copy.double() if dtype else copy), moved(call, device=device, dtype=dtype)
        try:
            out = run(copy, inputs, training=False).out
        except ForwardFailed as error:
            problem = error
            continue
        found = next((t.dtype for t in tensors(out) if t.is_floating_point()), torch.float32)
        return Subject(model=copy, call=inputs, count=images_in(inputs), tolerance=_TOLERANCE.get(found, 2e-2))
    raise KNPortError(
        f"could not run {type(model).__name__} to check it ({problem}); pass example_inputs=, what its forward takes"
    ) from problem
