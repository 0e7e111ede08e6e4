"""`python -m experiments.benchmarks run`: measure the cases of the named benchmarks, one after the other."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from experiments.benchmarks import growth, layers, networks, published
from experiments.benchmarks.measure import LAYOUTS, Case, Setting, run_case
from experiments.benchmarks.options import Options
from experiments.benchmarks.rows import OUT, Row, append
from knport.errors import KNPortError, UnknownName, UnmatchedPattern

BENCHMARKS: dict[str, Callable[[Options], Iterator[Case]]] = {
    "layers": layers.cases,
    "reach": layers.reach_cases,
    "stem": layers.stem_cases,
    "growth": growth.cases,
    "networks": networks.cases,
    "compile": networks.compile_cases,
    "table6": published.table6,
    "table8": published.table8,
    "forms": layers.form_cases,
}
EAGER_ONLY, COMPILED_ONLY = ("forms", "reach"), ("compile",)
LARGEST_ON_HEAP = 2**25  # bytes; glibc's greatest dynamic threshold
QUICK_OUT = Path("runs") / "benchmarks" / "quick.csv"


def run(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    threads: int = 2,
    out: Path | None = None,
    quick: bool = False,
    device: Literal["cpu", "cuda"] = "cpu",
    engine: Literal["eager", "compiled"] = "eager",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layouts: Annotated[tuple[Literal["channels_last", "contiguous"], ...], tyro.conf.arg(metavar="LAYOUT ...")] = tuple(
        LAYOUTS
    ),
    cases: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB ...")] = ("*",),
    seconds: float | None = None,
    full: bool = False,
) -> None:
    """Measure, and append one row per variant to the CSV.

    Args:
        names: layers, reach, stem, growth, networks, compile, table6, table8, forms; none means all, but compile with
            the eager engine, forms and reach with the compiled one.
        threads: of PyTorch on the CPU.
        out: the CSV; rows are appended. None for the committed one, or for runs/benchmarks/quick.csv with --quick.
        quick: one tiny case of each kind, a few rounds: to see that everything runs, not to quote.
        device: cpu or cuda.
        engine: eager or compiled; whatever this says, compile and reach measure both and forms eager.
        dtype: bfloat16 and float16 run under autocast.
        layouts: of the layers benchmark; the others are channels_last.
        cases: globs on the cases' names, as the CSV has them, e.g. "knresnet18 batch 32".
        seconds: of every case's rounds, in place of what the benchmark says.
        full: the papers' sizes in table6 and table8 on a CPU too.
    """
    chosen = _chosen(names, engine)
    if threads < 1:
        raise KNPortError(f"--threads {threads}; expected at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise KNPortError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    torch.set_num_threads(threads)
    settle_heap()
    options = Options(device=device, engine=engine, layouts=layouts, quick=quick, full=full)
    short = 0.2 if quick else None
    setting = Setting(
        device=device, dtype=dtype, seconds=short if seconds is None else seconds, rounds=3 if quick else 7
    )
    out = out or (QUICK_OUT if quick else OUT)
    begin = time.perf_counter()
    found = [case for name in chosen for case in BENCHMARKS[name](options) if _matches(case, cases)]
    if not found:
        raise UnmatchedPattern(f"--cases {' '.join(cases)} matches no case of {' '.join(chosen)}")
    for case in found:
        rows = run_case(case, setting)
        append(out, rows)
        print(_progress(case, rows, time.perf_counter() - begin), flush=True)


def settle_heap() -> None:
    """Free one large tensor, as any training soon does.

    glibc maps large blocks anew, page by page, until one of that size has been freed; a layer's time would depend on
    what was measured before it.
    """
    torch.empty(LARGEST_ON_HEAP - 2**16, dtype=torch.uint8).fill_(0)


def _chosen(names: tuple[str, ...], engine: str) -> tuple[str, ...]:
    for name in names:
        if name not in BENCHMARKS:
            raise UnknownName("benchmark", name, BENCHMARKS)
    left_out = EAGER_ONLY if engine == "compiled" else COMPILED_ONLY
    return names or tuple(name for name in BENCHMARKS if name not in left_out)


def _matches(case: Case, globs: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(case.name, glob) for glob in globs)


def _progress(case: Case, rows: list[Row], seconds: float) -> str:
    """A line for the case and one for each variant."""
    lines = [f"[{seconds:4.0f} s] {case.benchmark}: {case.name}, {case.mode}, {case.layout}"]
    for row in rows:
        time_text = "-" if row.median_ms is None else f"{row.median_ms:.2f} ms"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f} ({row.ratio_q25:.3f}-{row.ratio_q75:.3f}) {row.baseline}"
        lines.append(f"  {row.variant:32} {time_text:>12}  {ratio}{'  ' if ratio else ''}{row.note}".rstrip())
    return "\n".join(lines)
