"""Times of several steps that are taken in turn, and what is read off them.

In every round each step runs once, in random order, so that a slow moment of the machine falls on all of them alike;
ratios and differences are formed within a round, and their median is what is reported.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

Times = dict[int, float]
"""Round -> seconds."""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    q25: float
    q75: float


def interleaved(
    steps: Mapping[str, Callable[[], None]],
    *,
    seconds: float,
    least: int,
    most: int = 60,
    every: Mapping[str, int] | None = None,
    wait: Callable[[], None] = lambda: None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Seconds of every step by round.

    Args:
        steps: already warmed up.
        seconds: rounds begin until so much time has passed.
        least, most: rounds at least and at most.
        every: a step that takes part in every third round only has 3 here.
        wait: until the device has done what it was given.
        seed: of the order within the rounds.
        clock: seconds.
    """
    order, times = random.Random(seed), {name: {} for name in steps}
    begin = clock()
    for number in range(most):
        if number >= least and clock() - begin >= seconds:
            break
        names = [name for name in steps if number % (every or {}).get(name, 1) == 0]
        order.shuffle(names)
        for name in names:
            wait()
            start = clock()
            steps[name]()
            wait()
            times[name][number] = clock() - start
    return times


def spread(values: list[float]) -> Spread:
    """Median and quartiles of at least one value."""
    if len(values) == 1:
        return Spread(*values * 3)
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q25, q75)


def ratios(mine: Times, base: Times) -> list[float]:
    """`mine` / `base`, of the rounds that both took part in."""
    return [mine[number] / base[number] for number in mine if number in base]


def differences(mine: Times, base: Times) -> list[float]:
    """`mine` - `base` in seconds, of the rounds that both took part in."""
    return [mine[number] - base[number] for number in mine if number in base]
