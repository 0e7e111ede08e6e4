"""One row of the sweep: what `knport.convert` did to a network, and whether its promises hold there.

Shapes and gradients need no numbers, so they are computed on the meta device; a network that cannot run there (values
decide what it does, as in detection) runs on the CPU.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import knport
from experiments.sweep_models import Network
from knport.surgery import Plan
from knport.surgery.copying import copy_onto

_NORM_NAME = re.compile(r"(Norm|Abn)(?![a-z])")
_FUNCTIONAL = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
BATCHES = (2, 3)


@dataclass(kw_only=True)
class SweepRow:
    """One line of `sweep.csv`. Lists are joined by "; ".

    Args:
        model, task: of the network.
        device: "meta", or "cpu" where values decide what the network does.
        reader: how the plan was read.
        norms_called: norms that forward hooks saw called in evaluation or training, functions included.
        norms_planned: norms that the plan has a verdict for.
        norms_missing: those called without a verdict.
        batchnorms, batchnorms_left: BatchNorm modules before and after.
        left_why: verdicts of the BatchNorms that are left.
        absorbed, kernelnorm, kept_norms, knconv, kept_convs, knlinear: verdicts.
        kept_why: the reasons of kept norms, and how many of each.
        shapes: "equal" in both modes, at the sizes and batch sizes of `sizes`; else what differs.
        sizes: pixels per side, batch sizes.
        no_gradient: parameters without a gradient that have one, or do not exist, in the original.
        seconds: of plan and apply.
        error: what was raised, empty if nothing.
    """

    model: str
    task: str
    device: str = ""
    reader: str = ""
    norms_called: int = 0
    norms_planned: int = 0
    norms_missing: str = ""
    batchnorms: int = 0
    batchnorms_left: int = 0
    left_why: str = ""
    absorbed: int = 0
    kernelnorm: int = 0
    kept_norms: int = 0
    knconv: int = 0
    kept_convs: int = 0
    knlinear: int = 0
    kept_why: str = ""
    shapes: str = ""
    sizes: str = ""
    no_gradient: str = ""
    seconds: float = 0.0
    error: str = ""


COLUMNS = tuple(field.name for field in fields(SweepRow))


def examine(network: Network) -> SweepRow:
    """The row of a network; an error is a row too."""
    row = SweepRow(model=network.name, task=network.task)
    for device in ("cpu",) if network.task == "detection" else ("meta", "cpu"):
        row.device, row.error = device, ""
        try:
            _examine(row, _built(network, device), network, device)
            return row
        except Exception as error:  # any network may fail in any way, and a sweep goes on
            row.error = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    return row


def _built(network: Network, device: str) -> nn.Module:
    try:
        with torch.device(device):
            return network.build()
    except Exception:  # torchvision's RegNet looks at values while it is initialized
        return copy_onto(network.build(), device)


def _examine(row: SweepRow, model: nn.Module, network: Network, device: str) -> None:
    made, new = _convert(row, model)
    side = (made.input_shape or (2, 3, 224, 224))[-1]
    if network.task == "detection":
        side = 96
    called = _called(copy_onto(model, device), network.task, side, made.input_shape, device)
    planned = {v.path for v in made.verdicts if v.kind == "norm"}
    planned |= {path.rpartition(".")[2] for path in planned if path.endswith("()")}
    row.norms_called, row.norms_planned = len(called), len(planned)
    row.norms_missing = "; ".join(sorted(called - planned))
    twins = copy_onto(model, device), copy_onto(new, device)
    row.shapes, row.sizes = _shapes(*twins, network.task, side, made.input_shape, device)
    row.no_gradient = _gradients(*twins, network.task, side, made.input_shape, device)


def _convert(row: SweepRow, model: nn.Module) -> tuple[Plan, nn.Module]:
    """Plan and apply, and what both say."""
    start = time.perf_counter()
    made = knport.plan(model)
    new = made.apply(model) if made.changes else model
    row.seconds, row.reader = round(time.perf_counter() - start, 2), made.reader
    norms, convs = made.count("norm"), made.count("conv")
    row.absorbed, row.kernelnorm, row.kept_norms = (norms[word] for word in ("absorbed", "KernelNorm", "kept"))
    row.knconv, row.kept_convs = convs["KNConv"], convs["kept"]
    row.knlinear = made.count("linear")["KNLinear"]
    left = {path for path, module in new.named_modules() if isinstance(module, _BatchNorm)}
    row.batchnorms, row.batchnorms_left = sum(isinstance(m, _BatchNorm) for m in model.modules()), len(left)
    row.left_why = _counted(v.reason for v in made.verdicts if v.path in left)
    row.kept_why = _counted(
        f"{v.layer.split()[0]}: {v.reason}" for v in made.verdicts if v.kind == "norm" and v.verdict == "kept"
    )
    return made, new


def _counted(reasons: Iterator[str]) -> str:
    """The reasons without the names of modules in them, most frequent first."""
    plain = Counter(re.sub(r"\b[\w]+(\.[\w]+)+", "M", reason) for reason in reasons)
    return "; ".join(f"{count} {reason}" for reason, count in plain.most_common(6))


# --- runs


def _inputs(task: str, batch: int, side: int, shape: tuple | None, device: str, training: bool) -> tuple:
    """What the network's forward takes."""
    if task == "detection":
        images = [torch.rand(3, side, side) for _ in range(batch)]
        return (images, [_target(side) for _ in images]) if training else (images,)
    sizes = (*shape[1:-2], side, side) if shape is not None and len(shape) > 3 else (3, side, side)
    x = torch.rand(batch, *sizes, device=device)
    return (x, x) if task == "optical_flow" else (x,)


def _target(side: int) -> dict[str, Tensor]:
    """One object in the middle of a training image, with all that any detector asks for."""
    low, high = side / 4, 3 * side / 4
    return {
        "boxes": torch.tensor([[low, low, high, high]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, side, side, dtype=torch.uint8),
        "keypoints": torch.tensor([[[side / 2, side / 2, 1.0]] * 17]),
    }


def _called(model: nn.Module, task: str, side: int, shape: tuple | None, device: str) -> set[str]:
    """Paths of the norms that are called in evaluation or training, and of functions that normalize outside them."""
    called: set[str] = set()
    inside: list[str] = []
    for path, module in model.named_modules():
        if _is_norm(module):
            module.register_forward_pre_hook(lambda *_, path=path: inside.append(path))
            module.register_forward_hook(lambda *_: called.add(inside.pop()))
    counter = _Functional(inside)
    with torch.no_grad(), counter:
        for training in (False, True):
            model.train(training)(*_inputs(task, 2, side, shape, device, training))
    return called | counter.seen


def _is_norm(module: nn.Module) -> bool:
    """By torch's classes, or by name and by having no parameters but vectors; not by knport's own rule."""
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return True
    own = bool(_NORM_NAME.search(type(module).__name__))
    vectors = all(p.squeeze().dim() <= 1 for p in module.parameters())
    return own and vectors and not any(_is_norm(child) for child in module.children())


class _Functional(TorchFunctionMode):
    """Notes the functions that normalize while no norm module is being executed."""

    def __init__(self, inside: list[str]):
        super().__init__()
        self.inside, self.seen = inside, set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in _FUNCTIONAL and not self.inside:
            self.seen.add(f"{name}()")
        return function(*args, **(kwargs or {}))


def _shapes(old: nn.Module, new: nn.Module, task: str, side: int, shape: tuple | None, device: str) -> tuple[str, str]:
    """Whether the outputs have the same shapes, and where that was asked."""
    asked, different = [], []
    for size in (side, side + 32):
        try:
            with torch.no_grad():
                old.eval()(*_inputs(task, 2, size, shape, device, False))
        except Exception:  # many networks are built for one size
            continue
        asked.append(str(size))
        for batch in BATCHES:
            for training in (False, True):
                with torch.no_grad():
                    args = _inputs(task, batch, size, shape, device, training)
                    results = [_signature(model.train(training)(*args), task) for model in (old, new)]
                if results[0] != results[1]:
                    different.append(f"{size} pixels, {batch} images, training={training}: {results}"[:200])
    return "; ".join(different) or "equal", f"{' '.join(asked)} at {' '.join(map(str, BATCHES))}"


def _signature(out: Any, task: str) -> list[tuple[str, tuple]]:
    """Names and shapes of all tensors; how many boxes a detector finds is a matter of its weights."""
    leaves = pytree.tree_flatten_with_path(out)[0]
    first = 1 if task == "detection" else 0
    return [(pytree.keystr(path), tuple(leaf.shape)[first:]) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _gradients(old: nn.Module, new: nn.Module, task: str, side: int, shape: tuple | None, device: str) -> str:
    """Parameters of `new` without a gradient that `old` has one for, or does not have."""
    args, without = _inputs(task, 2, side, shape, device, True), []
    for model in (old, new):
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        leaves = [leaf for leaf in pytree.tree_leaves(model.train()(*args)) if isinstance(leaf, Tensor)]
        sum(leaf.float().sum() for leaf in leaves if leaf.requires_grad).backward()
        without.append({name for name, p in model.named_parameters() if p.grad is None})
    return "; ".join(sorted(without[1] - without[0]))
