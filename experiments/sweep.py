"""`python -m experiments sweep`: convert every network of torchvision and the smallest of each timm file, and check it.

Each network has a process of its own, so that a crash, a hang or a lack of memory is a row and not the end. Rows that
are there are not made again: the same command goes on where a sweep stopped.
"""

from __future__ import annotations

import csv
import fnmatch
import multiprocessing
import resource
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import tyro

from experiments.sweep_models import Network, networks, survey
from experiments.sweep_row import COLUMNS, SweepRow, examine
from experiments.sweep_summary import read_rows, summary
from knport.errors import UnmatchedPattern

OUT = Path(__file__).parent / "results" / "sweep" / "sweep.csv"


def sweep(
    *,
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB ...")] = ("*",),
    out: Path = OUT,
    timeout: float = 300.0,
    memory: float = 12.0,
    again: bool = False,
    new_survey: bool = False,
) -> None:
    """Convert every network, check the promises, write one row each.

    Args:
        models: globs on names, e.g. "timm/*" "torchvision/res*".
        out: the CSV file; rows are appended.
        timeout: seconds for one network.
        memory: GiB of address space for one network.
        again: make rows anew that are there.
        new_survey: first find the smallest model of every timm file anew.
    """
    if new_survey:
        survey()
    chosen = [n for n in networks() if any(fnmatch.fnmatchcase(n.name, glob) for glob in models)]
    if not chosen:
        raise UnmatchedPattern(f"--models {' '.join(models)} matches no network; names look like {networks()[0].name}")
    _prepare(out, {n.name for n in chosen} if again else set())
    done = {row["model"] for row in read_rows(out)}
    torch.set_num_threads(1)  # also of the children; forking is safe while no other thread runs
    for network in chosen:
        if network.name not in done:
            row = _in_process(network, timeout, memory)
            _append(out, row)
            print(f"{row.model}: {row.error or row.shapes}, {row.seconds:.1f} s", flush=True)
    print(summary(read_rows(out)))


def _prepare(out: Path, remove: set[str]) -> None:
    """The file with its header and without the rows of the models to remove."""
    rows = [row for row in read_rows(out) if row["model"] not in remove] if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def _append(out: Path, row: SweepRow) -> None:
    with out.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(asdict(row))


def _in_process(network: Network, timeout: float, memory: float) -> SweepRow:
    context = multiprocessing.get_context("fork")  # the libraries are imported once, in the parent
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(network, theirs, memory))
    start = time.perf_counter()
    process.start()
    theirs.close()
    row = SweepRow(model=network.name, task=network.task)
    try:
        if ours.poll(timeout):
            row = ours.recv()
        else:
            row.error = f"no result after {timeout:g} s"
    except EOFError:
        process.join()
        row.error = f"the process died with exit code {process.exitcode} after {time.perf_counter() - start:.0f} s"
    finally:
        process.kill()
        process.join()
    return row


def _child(network: Network, pipe: Connection, memory: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30),) * 2)
    torch.manual_seed(0)
    pipe.send(examine(network))
