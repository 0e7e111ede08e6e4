"""Measure a case: build its variants, warm them up, time them in turn, look at their memory, one row each."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks.memory import Memory, saved_mib, step_memory
from experiments.benchmarks.rows import Row
from experiments.benchmarks.timing import Times, differences, interleaved, ratios, spread
from experiments.run_folder import environment

WARM_UP = 2
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to measure.

    Args:
        device: "cpu" or "cuda".
        dtype: "float32", or what autocast is to compute in: "bfloat16" or "float16".
        seconds: for the rounds of a case; None for what the benchmark says.
        rounds: at least so many.
        memory: measure memory too.
    """

    device: str = "cpu"
    dtype: str = "float32"
    seconds: float | None = None
    rounds: int = 7
    memory: bool = True


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing to measure.

    Args:
        name: its column entry.
        build: makes the module, seeded.
        baseline: name of the variant that it is divided by; None for the case's.
        every: it takes part in every so-manieth round only.
        engine: "eager" or "compiled" (torch.compile, fullgraph).
        columns: more of its row.
    """

    name: str
    build: Callable[[], nn.Module]
    baseline: str | None = None
    every: int = 1
    engine: str = "eager"
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Variants on one input.

    Args:
        benchmark, name: of its rows.
        variants: at least one.
        baseline: name of a variant; times are divided by its time.
        shape: of the input, (N, C, H, W).
        mode: "training" or "inference".
        layout: of input and weights.
        classes: the output is class scores, trained by cross-entropy; None for a layer, whose output gets a random
            gradient and whose input gets one too.
        seconds: for the rounds.
        columns: more of the rows.
    """

    benchmark: str
    name: str
    variants: tuple[Variant, ...]
    baseline: str
    shape: tuple[int, int, int, int]
    mode: str = "training"
    layout: str = "channels_last"
    classes: int | None = None
    seconds: float = 5.0
    columns: dict[str, Any] = field(default_factory=dict)


class Step:
    """One step of a module on an input: forward, and for training backward; gradients do not stay."""

    def __init__(self, model: nn.Module, case: Case, setting: Setting):
        self.training = case.mode == "training"
        device, layout = torch.device(setting.device), LAYOUTS[case.layout]
        self.model = self.call = model.to(device, memory_format=layout).train(self.training)
        self.x = torch.randn(case.shape, device=device).to(memory_format=layout)
        self.labels = None
        if case.classes is not None:
            self.labels = torch.arange(len(self.x), device=device) % case.classes
        elif self.training:
            self.x.requires_grad_()
        self.autocast = None if setting.dtype == "float32" else (setting.device, getattr(torch, setting.dtype))
        self.grad = None

    def __call__(self) -> None:
        if not self.training:
            with torch.no_grad():
                self.forward()
            return
        out = self.forward()
        if self.grad is None and self.labels is None:
            self.grad = torch.randn_like(out)
        out.backward(self.grad)
        self.x.grad = None
        for parameter in self.model.parameters():
            parameter.grad = None

    def forward(self) -> Tensor:
        """The output; while training a network, the loss."""
        with torch.autocast(*self.autocast) if self.autocast else nullcontext():
            out = self.call(self.x)
        return out if self.labels is None or not self.training else F.cross_entropy(out.float(), self.labels)

    def alive(self) -> list[Tensor]:
        """The tensors that are there before and after a step."""
        own = [*self.model.parameters(), *self.model.buffers(), self.x, self.labels, self.grad]
        return [tensor for tensor in own if tensor is not None]


def run_case(case: Case, setting: Setting) -> list[Row]:
    """One row per variant; one that cannot make a step has a note in the place of times."""
    if any(variant.engine == "compiled" for variant in case.variants):
        torch.compiler.reset()
    common = _common(case, setting)
    steps, breaks, notes = {}, {}, {}
    for variant in case.variants:
        torch.manual_seed(0)
        try:
            step = Step(variant.build(), case, setting)
            breaks[variant.name] = _warm_up(step, variant.engine)
            steps[variant.name] = step
        except RuntimeError as error:  # out of memory, or no kernel for this dtype or device: a row all the same
            notes[variant.name] = _first_line(error)
    times = interleaved(
        steps,
        seconds=case.seconds if setting.seconds is None else setting.seconds,
        least=setting.rounds,
        every={variant.name: variant.every for variant in case.variants},
        wait=torch.cuda.synchronize if setting.device == "cuda" else lambda: None,
    )
    rows = []
    for variant in case.variants:
        found = _results(variant, case, times)
        if variant.name in steps:
            found |= {"graph_breaks": breaks[variant.name], **_memory(steps.pop(variant.name), variant, setting)}
        note = "; ".join(filter(None, (case.columns.get("note"), notes.get(variant.name))))
        own = {"variant": variant.name, "engine": variant.engine, **variant.columns, "note": note}
        rows.append(Row(**(common | own | found)))
    gc.collect()
    return rows


def _warm_up(step: Step, engine: str) -> int | None:
    """Run a few steps; for compiled ones the number of graph breaks."""
    breaks = None
    if engine == "compiled":
        breaks = _compile(step)
    for _ in range(WARM_UP):
        step()
    return breaks


def _compile(step: Step) -> int:
    """Compile in one graph where that is possible, else in as many as it takes; returns the graph breaks."""
    with torch._dynamo.config.patch(recompile_limit=64):  # variants share the code of nn.Sequential
        try:
            step.call = torch.compile(step.model, fullgraph=True, dynamic=False)
            step()
            return 0
        except torch._dynamo.exc.Unsupported:
            torch._dynamo.utils.counters["graph_break"].clear()
            step.call = torch.compile(step.model, dynamic=False)
            step()
            return max(1, sum(torch._dynamo.utils.counters["graph_break"].values()))


def _results(variant: Variant, case: Case, times: dict[str, Times]) -> dict[str, Any]:
    mine, baseline = times.get(variant.name), variant.baseline or case.baseline
    if not mine:
        return {}
    time = spread([1000 * t for t in mine.values()])
    found = {"median_ms": time.median, "q25_ms": time.q25, "q75_ms": time.q75, "repeats": len(mine)}
    base = times.get(baseline)
    if not base:
        return found
    ratio, extra = spread(ratios(mine, base)), spread([1000 * t for t in differences(mine, base)])
    found |= {"baseline": baseline, "ratio": ratio.median, "ratio_q25": ratio.q25, "ratio_q75": ratio.q75}
    return found | {"extra_ms": extra.median, "extra_q25_ms": extra.q25, "extra_q75_ms": extra.q75}


def _memory(step: Step, variant: Variant, setting: Setting) -> dict[str, float | None]:
    """Compiled code hands out memory that no dispatch mode sees; the allocator of CUDA counts it."""
    if not setting.memory:
        return {}
    memory = Memory()
    if variant.engine == "eager" or setting.device == "cuda":
        memory = step_memory(step, step.alive(), torch.device(setting.device))
    saved = None
    if step.training and variant.engine == "eager":
        saved = saved_mib(step.forward, [*step.model.parameters(), *step.model.buffers()])
    return {"peak_memory_mib": memory.peak, "largest_tensor_mib": memory.largest, "saved_mib": saved}


def _common(case: Case, setting: Setting) -> dict[str, Any]:
    """What the rows of a case have in common."""
    about = environment(torch.device(setting.device), 1)
    n, channels, height, width = case.shape
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: about[name] or "" for name in ("commit", "device", "torch", "threads")},
        "benchmark": case.benchmark,
        "case": case.name,
        "mode": case.mode,
        "layout": case.layout,
        "dtype": setting.dtype,
        **{"N": n, "C_in": channels, "H": height, "W": width},
        **case.columns,
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
