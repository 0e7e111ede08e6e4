"""What the command line chooses of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which of a benchmark's cases.

    Args:
        device: "cpu" or "cuda"; the sizes depend on it.
        engine: "eager" or "compiled".
        layouts: "channels_last", "contiguous".
        quick: one tiny case of each kind, to see that everything runs.
        full: the papers' sizes in `table6` and `table8`, whatever the machine.
    """

    device: str = "cpu"
    engine: str = "eager"
    layouts: tuple[str, ...] = ("channels_last", "contiguous")
    quick: bool = False
    full: bool = False
