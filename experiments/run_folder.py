"""The folder of a run: `run.json`, `log.csv`, `losses.csv`, and the checkpoints `last`, `previous` and `best`.

The folder is idempotent: what finished is not run again, what was interrupted goes on, and what was made by another
configuration is refused.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows: two trainings in one folder are then not noticed
    fcntl = None

from experiments import checkpoint
from experiments.run import Run, differences
from experiments.tasks import task_of
from knport.errors import KNPortError

LOG_START = ("step", "epoch", "lr", "train_loss", "test_loss")  # then what the task measures
LOG_END = ("images_per_second", "peak_mib", "seconds")


class RunFolder:
    """Reads and writes one run's folder; only the main process may call what writes."""

    def __init__(self, run: Run):
        self.run, self.path = run, Path(run.run_dir)
        self.last, self.previous, self.best = (self.path / name for name in ("last", "previous", "best"))
        self.log, self.losses = self.path / "log.csv", self.path / "losses.csv"
        self.key = self.path / "privacy.key"
        spent = ("epsilon",) if run.private else ()
        self.columns = (*LOG_START, *task_of(run).metrics, *LOG_END, *spent)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; it lets go however it dies. Raises `KNPortError` if another holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise KNPortError(
                    f"{self.path}: another process is training here, perhaps one that outlived the launcher that"
                    " started it; wait for it or end it, or give another --run-dir"
                ) from error
            yield

    def stored(self) -> dict[str, Any] | None:
        """What `run.json` holds, None if there is none. Raises `KNPortError` if another configuration made it."""
        path = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise KNPortError(f"{self.path} is a file; give --run-dir a folder")
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            different = differences(stored["run"], self.run)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise KNPortError(f"{path} is damaged ({error}); delete {self.path} or give another --run-dir") from error
        if different:
            listed = ", ".join(f"{name} is {then!r} there and {now!r} now" for name, (then, now) in different.items())
            raise KNPortError(
                f"{self.path} was made by another configuration: {listed}. Give another --run-dir, the same"
                " configuration to resume it, or delete the folder to start again"
            )
        return stored

    def checkpoint(self) -> tuple[Path | None, checkpoint.Tensors, dict[str, Any], list[str]]:
        """The newest readable checkpoint, as `checkpoint.newest` gives it."""
        return checkpoint.newest([self.last, self.previous])

    def write_run(self, content: dict[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps({"run": self.run.flat(), **content}, indent=1) + "\n")

    def rewind(self, step: int, evaluated: int) -> None:
        """Drop the rows of `log.csv` and `losses.csv` that are later than the checkpoint resumed from."""
        for path, columns, until in ((self.log, self.columns, evaluated), (self.losses, ("step", "loss"), step)):
            rows = [row for row in read_rows(path) if int(row["step"]) <= until]
            lines = [columns, *([row[name] for name in columns] for row in rows)]
            write_text(path, "".join(",".join(line) + "\n" for line in lines))

    def append_log(self, row: dict[str, Any]) -> None:
        with self.log.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def append_losses(self, rows: list[tuple[int, float]]) -> None:
        if rows:
            with self.losses.open("a") as file:
                file.writelines(f"{step},{loss:.7g}\n" for step, loss in rows)

    def last_row(self) -> dict[str, float]:
        """The newest row of `log.csv`, as numbers."""
        return {name: float(value) for name, value in read_rows(self.log)[-1].items()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Complete rows of a CSV file, none if it does not exist; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def write_text(path: Path, text: str) -> None:
    """Replace a small file whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    packages = {
        package: _version(package) for package in ("torch", "timm", "torchvision", "accelerate", "opacus", "knport")
    }
    return {
        "python": platform.python_version(),
        **packages,
        "device": f"{device.type}: {name}",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def processor() -> str:
    """The CPU's model and the vector instructions that PyTorch uses, e.g. "AMD EPYC, AVX2": both make it what it is."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # no Linux
        model = None
    name = model[1].strip() if model else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None outside a checkout or without git."""
    git = ["git", "-C", os.fspath(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
