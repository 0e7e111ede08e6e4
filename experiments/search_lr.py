"""The papers' search for a learning rate: start high, halve, and stop when it gets no better.

Every trial is a run folder, so the same command goes on where the search stopped. With several machines, give each
its own model, norm or batch size. `--method optuna` asks Optuna's TPE sampler for the next rate instead; it is seeded
and told the trials in order, so it asks the same again, and there is no study to store.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.grid import parse_fields
from experiments.meter import NonFiniteLoss
from experiments.run import Run, resolve
from experiments.run_folder import RunFolder, write_text
from experiments.tasks import task_of
from experiments.train import train
from knport.errors import KNPortError

Rates = Generator[float, float, None]
"""Yields a learning rate and is sent its score, -1 for a training that diverged."""
DIVERGED = -1.0


def search_lr(
    recipe: tyro.conf.Positional[str],
    *,
    model: str = Run.model,
    norm: str = Run.norm,
    batch_size: int | None = None,
    method: Literal["halving", "optuna"] = "halving",
    start: float = 0.2,
    patience: int = 1,
    trials: int = 16,
    low: float = 1e-4,
    high: float = 1.0,
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    steps: int | None = None,
    override: Sequence[str] = (),
    data_dir: str = "data",
    out: str = "",
    quiet: bool = False,
) -> float:
    """Train at one learning rate after the other, and say which was best after the last step.

    Scores are those of the recipe's test images, as the papers report them; a choice made on them is no longer a test.

    Args:
        recipe: what to train (see list).
        model: a name of `architectures`, timm/NAME or torchvision/NAME.
        norm: original, kernel, or a competitor of `knport.replace_norm`.
        batch_size: images per step. None: the recipe's.
        method: halving (the papers'), or optuna (TPE on log lr between low and high).
        start: first learning rate of halving; the papers' is 0.2.
        patience: halvings that may be no better than the best before halving ends.
        trials: learning rates at most.
        low: least learning rate of optuna.
        high: greatest.
        seeds: of the runs per learning rate; their mean decides.
        epochs: passes over the training images. None: the recipe's.
        steps: optimizer steps in place of epochs.
        override: further fields of a run, as FIELD=VALUE, e.g. train_images=5000 augment=none.
        data_dir: folder of the data set, or its parent.
        out: folder of the run folders and search.csv [runs/search-lr/RECIPE/MODEL-NORM-bBATCH].
        quiet: say one line per learning rate, not one per evaluation.

    Returns:
        The best learning rate.

    Raises:
        KNPortError: bad values, every trial diverged, or Optuna is not installed.
    """
    _check(start=start, patience=patience, trials=trials, low=low, high=high, seeds=len(seeds))
    if low >= high:
        raise KNPortError(f"low is {low:g} and high is {high:g}; expected low < high")
    settings = {"data_dir": data_dir, "epochs": epochs, "steps": steps, "batch_size": batch_size}
    settings = {name: value for name, value in settings.items() if value is not None} | parse_fields(override)
    first = resolve(recipe, model=model, norm=norm, **settings)
    name = f"{model.replace('/', '-')}-{norm}-b{first.batch_size}"
    folder = Path(out or f"runs/search-lr/{recipe}/{name}")

    def runs(lr: float) -> list[Run]:
        fixed = settings | {"lr": lr, "model": model, "norm": norm}
        return [resolve(recipe, **fixed, seed=seed, run_dir=str(folder / f"lr{lr:g}-s{seed}")) for seed in seeds]

    rates = halving(start, patience, trials) if method == "halving" else tpe(low, high, trials)
    scores = search(rates, runs, folder, quiet)
    best = max(scores, key=scores.__getitem__)
    if scores[best] == DIVERGED:
        raise KNPortError(f"every learning rate from {max(scores):g} to {min(scores):g} diverged; start lower")
    _say(f"best of {len(scores)}: {_conclusion(best, scores, first, settings)}")
    return best


def halving(start: float, patience: int = 1, trials: int = 16) -> Rates:
    """`start`, half of it, ... until `patience` in a row were no better than the best, once one has not diverged."""
    best, worse, rate = DIVERGED, 0, start
    for _ in range(trials):
        score = yield rate
        better = score > best
        best, worse = max(best, score), 0 if better or best == DIVERGED else worse + 1
        if worse >= patience:
            return
        rate /= 2


def tpe(low: float, high: float, trials: int) -> Rates:
    """What Optuna's tree-structured Parzen estimator asks for, to three digits. Raises `KNPortError` without Optuna."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise KNPortError("--method optuna needs Optuna: pip install optuna; --method halving does not") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(trials):
        trial = study.ask()
        score = yield float(f"{trial.suggest_float('lr', low, high, log=True):.3g}")
        study.tell(trial, score)


def search(rates: Rates, runs: Any, folder: Path, quiet: bool = False) -> dict[float, float]:
    """Score every rate that `rates` asks for: learning rate -> mean score in percent over `runs(rate)`."""
    scores: dict[float, float] = {}
    lines = ["lr,score,sd,runs"]
    rate = next(rates)
    while True:
        found = [_score(run, quiet) for run in runs(rate)] if rate not in scores else []
        if found:
            scores[rate] = DIVERGED if DIVERGED in found else statistics.fmean(found)
            spread = statistics.stdev(found) if len(found) > 1 and scores[rate] != DIVERGED else ""
            lines.append(f"{rate},{'diverged' if scores[rate] == DIVERGED else scores[rate]},{spread},{len(found)}")
            _say(f"lr {rate:g}: {'diverged' if scores[rate] == DIVERGED else f'{scores[rate]:.2f} %'}")
            if _is_main():
                write_text(folder / "search.csv", "\n".join(lines) + "\n")
        try:
            rate = rates.send(scores[rate])
        except StopIteration:
            return scores


def _score(run: Run, quiet: bool) -> float:
    """Of the last step, in percent; `DIVERGED` if the loss was not finite, now or when this was tried before."""
    stored = RunFolder(run).stored() or {}
    if stored.get("status") == "failed":
        return DIVERGED
    try:
        return train(run, quiet=quiet)[task_of(run).score]
    except NonFiniteLoss:
        return DIVERGED


def _conclusion(best: float, scores: dict[float, float], run: Run, settings: dict[str, Any]) -> str:
    edge = ""
    if len(scores) > 1 and best == max(scores):
        edge = "; it is the highest tried, so a higher one may be better"
    elif best == min(scores):
        edge = "; it is the lowest tried, so a lower one may be better"
    batch = f" --batch-size {run.batch_size}" if "batch_size" in settings else ""
    return (
        f"lr {best:g} with {scores[best]:.2f} %{edge}\n"
        f"  python -m experiments train {run.recipe} --model {run.model} --norm {run.norm}{batch} --lr {best} ..."
    )


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise KNPortError(f"{name} is {value:g}; expected above 0: set --{name}")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    if _is_main():
        print(text, flush=True)
