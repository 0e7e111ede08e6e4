"""A converted network on the meta device whose widths can be tried out: follow it, resize it, run it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from knport.errors import KNPortError
from knport.surgery.channel_groups import OUTPUT, Flow, FollowError, Step, follow
from knport.surgery.copying import copy_onto
from knport.surgery.read import candidate_inputs
from knport.surgery.resizing import NewShape, resize_to
from knport.surgery.stand_ins import stand_in
from knport.surgery.swap import swap
from knport.surgery.width_form import Terms
from knport.surgery.width_statements import container_attributes, feature_axes, head_attributes, head_sizes
from knport.surgery.widths import Widths

if TYPE_CHECKING:
    from knport.surgery.plan import Plan

Sizes = dict[int, int]  # width -> channels
Rows = tuple[list[NewShape], list[tuple[str, str, int]], list[tuple[int, int]]]  # what `resize_to` takes
# Functions whose arguments often hold a width as a literal number: one that does stands for all in that class.
_LITERAL = frozenset({"view", "reshape", "unflatten", "split", "chunk", "getitem", "conv1d", "conv2d", "conv3d"})
_PROBES = 200


class WidthNetwork:
    """What `plan` makes of `model`, followed once.

    Args:
        model: the original; only read.
        plan: its conversion, without a resizing.
        example_inputs: as for `knport.plan`.

    Raises:
        KNPortError: its forward could not be followed.
    """

    def __init__(self, model: nn.Module, plan: Plan, example_inputs: Any):
        self.flow, self.device, self.args, self.kwargs, self.twin = _follow_some(model, plan, example_inputs)
        self.widths, self.problem = self.flow.widths, ""
        self.steps = {False: self.flow.steps}  # per training flag
        self.products = list(self.flow.products)
        self._follow_training()
        self.terms: Terms = parameter_terms(self.twin, self.flow)
        self.flow.attributes.update(container_attributes(self.flow, self.twin))
        self.features, self.notes = feature_axes(self.flow, self.twin)
        self.names = {id(t): name for name, t in (*self.twin.named_parameters(), *self.twin.named_buffers())}
        self._mark_classifiers()
        _at_most_two(self.widths, (*self.terms, *self.products))

    @property
    def batch(self) -> int:
        """Images of the input that it is run on."""
        first = next(t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor))
        return first.shape[0]

    def _follow_training(self) -> None:
        """Training may call more (auxiliary heads): what it calls has widths too. A model that cannot is left."""
        try:
            again = follow(self.twin.train(), self.args, self.kwargs, first=self.flow)
            self.steps[True] = again.steps
        except FollowError:
            pass
        finally:
            self.twin.eval()

    def _mark_classifiers(self) -> None:
        for path, after in self.flow.layers.items():
            reads = self.flow.attributes.get((path, "in_features"), self.flow.attributes.get((path, "in_channels")))
            of_output = any(self.widths.frozen.get(w) == OUTPUT for w in self.widths.resolve(after))
            if reads is not None and of_output and self.widths.is_fixed(after):
                self.widths.mark(reads, "classifier")

    def settle(self) -> None:
        """Run the network with every width changed, and fix what its code turns out to hold as a number."""
        for training in self.steps:
            for _ in range(_PROBES):
                sizes = {w: self.widths.size[w] + 1 + i % 3 for i, w in enumerate(self.free())}
                step = self.failing_step(sizes, training)
                if step is None:
                    break
                self.fix(step)

    def free(self) -> list[int]:
        """The widths of parameters that nothing fixes, in the order of the parameters."""
        found = {w: None for _, axes in self.terms for axis in axes for w in self.widths.resolve(axis)}
        return [w for w in found if w not in self.widths.frozen]

    def fix(self, step: Step) -> None:
        """Fix the widths at the step that `failing_step` found, and at its likes; an error if they were fixed already.

        A step that made another shape than its axes say fixes what it made, one that failed also what it read.
        """
        loose, key = len(self.free()), (step.name, step.kind)
        kin = [s for steps in self.steps.values() for s in steps if (s.name, s.kind) == key]
        for one in kin if step.name in _LITERAL else [step]:
            self._fix_one(one, reads=bool(self.problem))
        if len(self.free()) == loose:
            self._fix_one(step, reads=True)
        if len(self.free()) == loose:  # its numbers come from elsewhere in the module: all that this reads and makes
            near = (*self.flow.inputs.get(step.owner, ()), *self.flow.outputs.get(step.owner, ()))
            for axis in (axis for _, axes in near for axis in axes):
                self.widths.freeze(axis, f"{step.name} in {step.kind} ties it to another")
        if len(self.free()) == loose:
            where = f"{step.name} in {step.owner or 'the model'}"
            raise KNPortError(
                f"{type(self.twin).__name__} cannot be resized: {where} fails at other widths "
                f"({self.problem or 'it makes another shape'}); convert it without match_params and match_macs"
            )

    def _fix_one(self, step: Step, *, reads: bool) -> None:
        for axis in (*(axis for axes in step.axes for axis in axes), *(step.inputs if reads else ())):
            self.widths.freeze(axis, f"{step.name} in {step.kind} holds it as a number")

    def failing_step(self, sizes: Sizes, *training: bool) -> Step | None:
        """The first step that, at these sizes, fails or makes another shape than its axes say; else None."""
        with self._at(sizes):
            return next(filter(None, (self._compare(sizes, flag) for flag in training or self.steps)), None)

    @contextmanager
    def _at(self, sizes: Sizes) -> Iterator[None]:
        resize_to(self.twin, *self.rows(sizes, everything=True))
        try:
            yield
        finally:
            resize_to(self.twin, *self.rows({}, everything=True))

    def _compare(self, sizes: Sizes, training: bool) -> Step | None:
        known, broke, self.problem = self.steps[training], "", ""
        try:
            seen = follow(self.twin.train(training), self.args, self.kwargs, watch_only=True).steps
        except FollowError as error:
            seen, broke = error.flow.steps, str(error)
        finally:
            self.twin.eval()
        for step, now in zip(known, seen, strict=False):
            told = tuple(tuple(self.widths.total(axis, sizes) for axis in axes) for axes in step.axes)
            if step.name != now.name or told != now.shapes:
                return step
        if not broke and len(seen) == len(known):
            return None
        self.problem = broke or "it takes another course"
        return known[min(len(seen), len(known) - 1)]

    def rows(self, sizes: Sizes, *, everything: bool = False) -> Rows:
        """(new shapes, attributes, channels of `feature_info`) at the given sizes: what changes, or everything."""
        total, shapes = self.widths.total, []
        for key, (tensor, axes) in self.flow.tensors.items():
            shape = tuple(total(axis, sizes) for axis in axes)
            if everything or shape != tuple(tensor.shape):
                shapes.append(NewShape(name=self.names[key], shape=shape, kernel=key in self.flow.kernels))
        attributes = [
            (path, name, total(axis, sizes))
            for (path, name), axis in self.flow.attributes.items()
            if everything or total(axis, sizes) != total(axis)
        ]
        features = [
            (i, total(axis, sizes)) for i, axis in self.features if everything or total(axis, sizes) != total(axis)
        ]
        return shapes, attributes, features

    def head_attributes(self, sizes: Sizes) -> tuple[list[tuple[str, str, int]], list[str]]:
        """timm's `num_features` and `head_hidden_size` at the given sizes, as (path, attribute, value), and notes."""
        try:
            before = head_sizes(self.twin, self.args)
            with self._at(sizes):
                return head_attributes(self.twin, before, head_sizes(self.twin, self.args)), []
        except Exception as error:  # a model's own methods may ask for anything
            return [], [f"num_features could not be brought up to date ({type(error).__name__}: {error})"]


def _follow_some(
    model: nn.Module, plan: Plan, example_inputs: Any
) -> tuple[Flow, str, tuple, dict[str, Any], nn.Module]:
    """Follow the converted network on the first inputs and device that it runs on: also those, and the network."""
    problem: Exception | None = None
    for args, kwargs in candidate_inputs(model, example_inputs):
        for device in ("meta",) if any(p.is_meta for p in model.parameters()) else ("meta", "cpu"):
            twin = stand_in(swap(copy_onto(model, device).eval(), plan, inplace=True))
            given = on_device((args, kwargs), device)
            try:
                return follow(twin, *given), device, *given, twin
            except FollowError as error:
                problem = problem or error
    raise KNPortError(
        f"the channels of {type(model).__name__} could not be followed through its forward ({problem}); "
        "convert it without match_params and match_macs"
    ) from problem


def on_device(inputs: Any, device: str) -> Any:
    """The inputs on the device that the network is followed on."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(device), inputs)


def parameter_terms(model: nn.Module, flow: Flow) -> Terms:
    """One term per parameter: its shape in axes, or its number of elements where no run touches it."""
    return [
        (1, tuple(flow.tensors[id(p)][1])) if id(p) in flow.tensors else (p.numel(), ()) for p in model.parameters()
    ]


def _at_most_two(widths: Widths, terms: Terms) -> None:
    for _, axes in terms:
        loose = [axis for axis in axes if not widths.is_fixed(axis)]
        for axis in loose[2:]:
            widths.freeze(axis, "one of three widths of a tensor")
