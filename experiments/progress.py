"""What a run says while it works: a progress bar on a terminal, one plain line per evaluation elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SCORES = {"top1": "top-1", "miou": "mIoU"}


class Report:
    """Speaks for one run; silent on every process but the main one, and when `quiet`.

    Args:
        name: of the run, before each line.
        speak: False for silence.
    """

    def __init__(self, name: str, speak: bool = True):
        self.name, self.speak = name, speak
        self.console = Console(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None

    def start(self, step: int, total: int) -> None:
        if self.speak and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task(self.name, total=total, completed=step)
            self.bar.start()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def note(self, text: str) -> None:
        if self.speak:
            self.console.print(f"{self.name}: {text}", markup=False)

    def evaluation(self, row: dict[str, float]) -> None:
        spent = f", epsilon {row['epsilon']:.4g}" if "epsilon" in row else ""
        scores = ", ".join(f"{text} {row[name]:.2f} %" for name, text in SCORES.items() if name in row)
        self.note(
            f"step {row['step']}, epoch {row['epoch']:.4g}: {scores},"
            f" test loss {row['test_loss']:.4f}, train loss {row['train_loss']:.4f},"
            f" {row['images_per_second']:.0f} images/s{spent}"
        )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
