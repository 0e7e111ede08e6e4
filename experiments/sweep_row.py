"""One row of the sweep: what `knport.convert` did to a network, and whether its promises hold there.

A network that takes small images runs on them, with weights of zero: shapes and gradients need no numbers. One that is
large or built for one size runs on the meta device, and where values decide what it does (detection), on the CPU.
"""

from __future__ import annotations

import copy
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import knport
from experiments.sweep_models import Network
from knport.errors import KNPortError
from knport.surgery import Plan
from knport.surgery.copying import copy_onto

_NORM_NAME = re.compile(r"(Norm|Abn)(?![a-z])")
_FUNCTIONAL = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_DRAWS = ("normal_", "uniform_", "trunc_normal_", "erfinv_", "exponential_")
OF_WEIGHTS = " (its weights)"  # behind the name of a convolution that normalizes its own, as timm's StdConv2d does
BATCHES = (2, 3)
SMALL_SIDE, SMALL_NETWORK = 64, 60_000_000  # pixels, parameters
# Device and pixels per side, tried in order; None for the size that was planned with.
_PLACES = (("cpu", SMALL_SIDE), ("meta", None), ("cpu", None))
_DETECTION_PLACES = (("cpu", 96),)


@dataclass(kw_only=True)
class SweepRow:
    """One line of `sweep.csv`. Lists are joined by "; ".

    Args:
        model, task: of the network.
        device: "cpu" or "meta": where it ran for the shapes.
        reader: how the plan was read.
        norms_called: norms that forward hooks saw called in evaluation or training, functions included; a convolution
            that normalizes its own weights is one, whose verdict is that of the convolution.
        norms_planned: norms that the plan has a verdict for.
        norms_missing: those called without a verdict.
        batchnorms, batchnorms_left: BatchNorm modules before and after.
        left_why: verdicts of the BatchNorms that are left.
        absorbed, kernelnorm, kept_norms, knconv, kept_convs, knlinear: verdicts.
        kept_why: the reasons of kept norms, and how many of each.
        shapes: "equal" in both modes, at both of `sizes`; else what differs.
        sizes: images x pixels per side, twice; a network that takes one size only has that twice.
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


COLUMNS = tuple(column.name for column in fields(SweepRow))


def examine(network: Network) -> SweepRow:
    """The row of a network; an error is a row too."""
    row = SweepRow(model=network.name, task=network.task)
    for device, side in _DETECTION_PLACES if network.task == "detection" else _PLACES:
        row.device, row.error = device, ""
        try:
            _examine(row, _built(network, device), network, side)
            return row
        except Exception as error:  # any network may fail in any way, and a sweep goes on
            row.error = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    return row


def _built(network: Network, device: str) -> nn.Module:
    if network.task == "detection":  # which raises when nothing finite comes out
        return network.build()
    try:
        with torch.device(device), _NoDraws():
            return network.build()
    except Exception:  # torchvision's RegNet looks at values while it is initialized
        return copy_onto(network.build(), device)


class _NoDraws(TorchFunctionMode):
    """Weights are zeros in the place of random numbers, which takes most of the time of building a network."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _DRAWS:
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        return function(*args, **(kwargs or {}))


def _examine(row: SweepRow, model: nn.Module, network: Network, side: int | None) -> None:
    if side == SMALL_SIDE and sum(p.numel() for p in model.parameters()) > SMALL_NETWORK:
        raise KNPortError(f"more than {SMALL_NETWORK} parameters")
    made, new = _convert(row, model)
    twins = _Twins(model, new if made.changes else copy.deepcopy(model), network.task, made.input_shape, row.device)
    if side == SMALL_SIDE and not twins.accepts(side):
        raise KNPortError(f"does not take images of {side} pixels")
    side = side or (made.input_shape or (2, 3, 224, 224))[-1]
    called = twins.called
    row.shapes, row.sizes = _shapes(twins, side)
    row.no_gradient = twins.no_gradient()
    planned = {v.path for v in made.verdicts if v.kind == "norm"}
    planned |= {path.rpartition(".")[2] for path in planned if path.endswith("()")}
    own = [v for v in made.verdicts if v.kind == "conv" and v.path + OF_WEIGHTS in called]
    planned |= {v.path + OF_WEIGHTS for v in own}
    why = _counted(f"{v.layer.split()[0]} normalizes its own weights: {v.reason}" for v in own)
    row.kept_why = "; ".join(filter(None, (row.kept_why, why)))
    row.norms_called, row.norms_planned = len(called), len(planned)
    row.norms_missing = "; ".join(sorted(called - planned))


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


@dataclass
class _Twins:
    """A network and its conversion, to be run on the same inputs."""

    old: nn.Module
    new: nn.Module
    task: str
    shape: tuple[int, ...] | None
    device: str
    called: set[str] = field(default_factory=set)
    inside: list[str] = field(default_factory=list)

    def __post_init__(self):
        """Collect the paths of the norms of `old` that are called; functions that normalize are added as it runs."""
        for path, module in self.old.named_modules():
            if _is_norm(module):
                module.register_forward_pre_hook(lambda *_, path=path: self.inside.append(path))
                module.register_forward_hook(lambda *_: self.called.add(self.inside.pop()))
            elif isinstance(module, _ConvNd):
                module.register_forward_pre_hook(lambda *_, path=path: self.inside.append(path + OF_WEIGHTS))
                module.register_forward_hook(lambda *_: self.inside.pop() and None)

    def accepts(self, size: int) -> bool:
        """Whether the original takes this size."""
        try:
            with torch.no_grad():
                self.old.eval()(*self._inputs(2, size, training=False))
        except Exception:  # many networks are built for one size, and say so in many ways
            self.inside.clear()
            return False
        return True

    def compare(self, batch: int, size: int, training: bool, gradients: bool) -> str:
        """What differs between the outputs; with `gradients`, these are taken too."""
        args, signatures = self._inputs(batch, size, training), []
        for model in (self.old, self.new):
            watch = _Functional(self.inside, self.called) if model is self.old else nullcontext()
            with torch.set_grad_enabled(gradients), watch:
                out = model.train(training)(*args)
            signatures.append(_signature(out, self.task))
            if gradients:
                leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad]
                sum(leaf.float().sum() for leaf in leaves).backward()
        if signatures[0] == signatures[1]:
            return ""
        return f"{size} pixels, {batch} images, training={training}: {signatures}"[:200]

    def no_gradient(self) -> str:
        """Parameters of the conversion without a gradient that the original has one for, or does not have."""
        old, new = ({n for n, p in m.named_parameters() if p.grad is None} for m in (self.old, self.new))
        return "; ".join(sorted(new - old))

    def _inputs(self, batch: int, side: int, training: bool) -> tuple:
        if self.task == "detection":
            images = [torch.rand(3, side, side) for _ in range(batch)]
            return (images, [_target(side) for _ in images]) if training else (images,)
        sizes = (*self.shape[1:-2], side, side) if self.shape and len(self.shape) > 3 else (3, side, side)
        x = torch.rand(batch, *sizes, device=self.device)
        return (x, x) if self.task == "optical_flow" else (x,)


def _shapes(twins: _Twins, side: int) -> tuple[str, str]:
    """Whether the outputs have the same shapes in both modes at two sizes and batch sizes, and at which."""
    second = side + 32 if twins.accepts(side + 32) else side
    different = []
    for batch, size in zip(BATCHES, (side, second), strict=True):
        for training in (False, True):
            different.append(twins.compare(batch, size, training, gradients=training and batch == BATCHES[0]))
    asked = f"{BATCHES[0]} x {side}, {BATCHES[1]} x {second}"
    return "; ".join(filter(None, different)) or "equal", asked


def _target(side: int) -> dict[str, Tensor]:
    """One object in the middle of a training image, with all that any detector asks for."""
    low, high = side / 4, 3 * side / 4
    return {
        "boxes": torch.tensor([[low, low, high, high]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, side, side, dtype=torch.uint8),
        "keypoints": torch.tensor([[[side / 2, side / 2, 1.0]] * 17]),
    }


def _signature(out: Any, task: str) -> list[tuple[str, tuple]]:
    """Names and shapes of all tensors; how many boxes a detector finds is a matter of its weights."""
    leaves = pytree.tree_flatten_with_path(out)[0]
    first = 1 if task == "detection" else 0
    return [(pytree.keystr(path), tuple(leaf.shape)[first:]) for path, leaf in leaves if isinstance(leaf, Tensor)]


# --- norms


def _is_norm(module: nn.Module) -> bool:
    """By torch's classes, or by name and by having no parameters but vectors; not by knport's own rule."""
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
        return True
    own = bool(_NORM_NAME.search(type(module).__name__))
    vectors = all(p.squeeze().dim() <= 1 for p in module.parameters())
    return own and vectors and not any(_is_norm(child) for child in module.children())


class _Functional(TorchFunctionMode):
    """Notes the functions that normalize while no norm module is being executed; in a convolution, that one."""

    def __init__(self, inside: list[str], seen: set[str]):
        super().__init__()
        self.inside, self.seen = inside, seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in _FUNCTIONAL and (not self.inside or self.inside[-1].endswith(OF_WEIGHTS)):
            self.seen.add(self.inside[-1] if self.inside else f"{name}()")
        return function(*args, **(kwargs or {}))
