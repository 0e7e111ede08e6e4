"""How much privacy a run may spend, how much noise that takes, and what it has spent.

(epsilon, delta) of the Poisson-subsampled Gaussian mechanism, neighbours that differ by one image added or removed
(Abadi et al., 2016), by an accountant of Opacus: ``rdp`` (Renyi; an upper bound), ``prv`` (Gopi et al., 2021; tighter)
or ``gdp`` (Dong et al., 2019; a limit for many steps that lies below the truth: optimistic).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from experiments.run import Run
from knport.errors import KNPortError

# Opacus' own Renyi orders, and larger ones: the best order of a few noisy steps is beyond its 63
ORDERS = [1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 72, 80, 96, 128, 192, 256, 512, 1024]
OPTIMISTIC = "gdp is optimistic: a limit for many steps, below the epsilon that holds; use rdp or prv for a guarantee"


class Budget:
    """The account of one run.

    Args:
        run: with `epsilon`, `noise_multiplier` or both.
        images: training images, N.
        steps: planned; noise is chosen so that exactly these stay within `run.epsilon`.

    Raises:
        KNPortError: the target does not allow a single step, or Opacus is not installed.
    """

    def __init__(self, run: Run, images: int, steps: int):
        privacy = self.privacy = run.privacy
        self.images, self.planned = images, steps
        self.sample_rate = run.batch_size / images
        self.delta = default_delta(images) if privacy.delta is None else privacy.delta
        self.accountant = _accountant(privacy.accountant)
        self.noise_multiplier = privacy.noise_multiplier
        if self.noise_multiplier is None:
            self.noise_multiplier = noise_for(privacy.accountant, privacy.epsilon, self.sample_rate, steps, self.delta)

    @property
    def spent_steps(self) -> int:
        """Steps on the account."""
        return sum(steps for _, _, steps in self.accountant.history)

    def epsilon(self, steps: int | None = None) -> float:
        """Spent so far, or after `steps` steps in all."""
        steps = self.spent_steps if steps is None else steps
        return epsilon_after(self.privacy.accountant, self.noise_multiplier, self.sample_rate, steps, self.delta)

    def affordable(self) -> int:
        """The most steps, up to the planned ones, that do not overrun the target.

        Raises:
            KNPortError: not even one.
        """
        if self.privacy.epsilon is None or self.epsilon(self.planned) <= self.privacy.epsilon:
            return self.planned
        low, high = 0, self.planned  # low is affordable, high is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle) <= self.privacy.epsilon else (low, middle)
        if not low:
            raise KNPortError(
                f"noise multiplier {self.noise_multiplier:g} does not allow one step within epsilon"
                f" {self.privacy.epsilon:g} at delta {self.delta:g}: one step spends {self.epsilon(1):.3g}; give more"
                " --noise-multiplier, or leave it out to have it chosen"
            )
        return low

    def spend(self, optimizer: Any) -> None:
        """Enter one step: the `step_hook` of Opacus' optimizers, called before the weights change."""
        if self.spent_steps >= self.planned:
            raise KNPortError(f"the privacy budget of {self.planned} steps is spent")
        self.accountant.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=self.sample_rate)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return dict(self.accountant.state_dict())

    def load(self, state: dict[str, Any], step: int) -> None:
        """Go on with the account of a checkpoint at step `step`.

        Raises:
            KNPortError: the account is not that of these steps.
        """
        history = [tuple(entry) for entry in state["history"]]
        self.accountant.load_state_dict({**state, "history": history})
        entries = {(noise, rate) for noise, rate, _ in history}
        if self.spent_steps != step or len(entries) > 1 or any(rate != self.sample_rate for _, rate in entries):
            raise KNPortError(
                f"the checkpoint is of step {step} at sample rate {self.sample_rate:g}, and its account has {history}:"
                " it is damaged; start again in another --run-dir"
            )
        for noise, _ in entries:
            self.noise_multiplier = noise  # not solved again: another version of Opacus may round it otherwise

    def record(self) -> dict[str, Any]:
        """All that it takes to compute epsilon again, for `run.json`."""
        from opacus import __version__

        return {
            "target_epsilon": self.privacy.epsilon,
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "clip": self.privacy.clip,
            "sample_rate": self.sample_rate,
            "images": self.images,
            "steps": self.spent_steps,
            "planned_steps": self.planned,
            **_options(self.privacy.accountant),
            "accountant": self.privacy.accountant + (" (optimistic)" if self.privacy.accountant == "gdp" else ""),
            "opacus": __version__,
            "mechanism": "Poisson-subsampled Gaussian; neighbours differ by one image added or removed",
        }

    def notes(self) -> Sequence[str]:
        """What a user should hear before the training."""
        target = "no target" if self.privacy.epsilon is None else f"target epsilon {self.privacy.epsilon:g}"
        notes = [
            f"private: {target} at delta {self.delta:g}, noise multiplier {self.noise_multiplier:.4g}, clip"
            f" {self.privacy.clip:g}, {self.planned} steps that draw each image with probability {self.sample_rate:.4g}"
        ]
        if self.privacy.accountant == "gdp":
            notes.append(OPTIMISTIC)
        if self.delta * self.images > 1:
            notes.append(
                f"delta {self.delta:g} is above 1 / {self.images:,} images: publishing an image at random would meet it"
            )
        return notes


@lru_cache(maxsize=4096)
def epsilon_after(accountant: str, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """What `steps` equal steps spend, by that accountant of Opacus."""
    if not steps:
        return 0.0
    if not noise_multiplier:
        return math.inf
    account = _accountant(accountant)
    account.history = [(noise_multiplier, sample_rate, steps)]
    with _quiet():
        return float(account.get_epsilon(delta=delta, **_options(accountant)))


@lru_cache
def noise_for(accountant: str, epsilon: float, sample_rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier, to about half a percent of epsilon, with which `steps` steps spend at most epsilon.

    Raises:
        KNPortError: there is none.
    """
    _accountant(accountant)
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with _quiet():
            return get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=accountant,
                epsilon_tolerance=min(0.01, epsilon / 200),
                **_options(accountant),
            )
    except ValueError as error:
        raise KNPortError(
            f"no noise keeps {steps} steps within epsilon {epsilon:g} at delta {delta:g}: {error}; give a larger"
            " --epsilon, fewer --epochs or a smaller --batch-size"
        ) from error


def _options(accountant: str) -> dict[str, Any]:
    return {"alphas": ORDERS} if accountant == "rdp" else {}


def _accountant(name: str):
    try:
        from opacus.accountants import create_accountant
    except ModuleNotFoundError as error:
        raise KNPortError("--epsilon needs Opacus: pip install 'knport[privacy]'") from error
    return create_accountant(name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Opacus' advice to try larger orders, which it gives on the way to a noise that does not need them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the largest alpha", UserWarning)
        yield


def default_delta(images: int) -> float:
    """The largest power of ten below 1 / N: 1e-5 for 50,000 images."""
    return 10.0 ** -(math.floor(math.log10(images)) + 1)
