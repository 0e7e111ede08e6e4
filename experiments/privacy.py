"""`python -m experiments privacy`: what private training costs in accuracy, and what an attack still finds out.

scikit-learn's digits, nothing to download: every norm without privacy and at several epsilons over several seeds, then
membership inference against the first norm. Writes `accuracy.csv`, `membership.csv` and the report of both.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from experiments.membership import measure, pool, train_on_halves
from experiments.report import report
from experiments.results import write_text
from experiments.run import Run, resolve
from experiments.train import train
from knport.errors import KNPortError

COMMAND = "python -m experiments privacy"
ACCURACY = ("norm", "epsilon", "seed", "top1", "test_loss", "spent_epsilon", "delta", "noise_multiplier", "clip")
ACCURACY += ("batch_size", "epochs", "steps", "lr", "train_images", "test_images", "seconds", "device", "torch")
ACCURACY += ("command",)
MEMBERSHIP = ("norm", "epsilon", "delta", "attack", "images", "network", "auc", "true_positives_at_1_percent")
MEMBERSHIP += ("members", "others", "top1", "device", "torch", "command")


def privacy(
    *,
    norms: Sequence[str] = ("kernel", "group", "layer"),
    epsilons: Sequence[float] = (8.0, 2.0),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 8,
    networks: int = 6,
    attack_epochs: int = 15,
    out: Path = Path("runs/privacy"),
    quiet: bool = True,
) -> Path:
    """Train the digits with and without privacy, attack the networks, and report; returns the report's path.

    Args:
        norms: of cifar_resnet8; the first is the one that is attacked.
        epsilons: targets, besides training without privacy; the attack is on the first.
        seeds: of each setting.
        epochs: passes over the training images of every run for accuracy.
        networks: attacked with and without privacy, each trained on its own half of the images; even, 4 at least.
        attack_epochs: of those: memory of single images takes longer than learning.
        out: folder of the tables, the report and the run folders; a second call goes on where the first stopped.
        quiet: say one line per run.
    """
    if networks < 4 or networks % 2:
        raise KNPortError(f"networks is {networks}; expected an even number of at least 4: set --networks")
    command = _command(norms, epsilons, seeds, epochs, networks, attack_epochs)
    rows = []
    for seed in seeds:
        for epsilon in (None, *epsilons):
            for norm in norms:
                rows.append(
                    _accuracy(_run(norm, epsilon, seed, epochs, out / "accuracy"), quiet) | {"command": command}
                )
                _write(out / "accuracy.csv", ACCURACY, rows)
    rows = []
    for epsilon in (None, epsilons[0]):
        runs = [_run(norms[0], epsilon, model, attack_epochs, out / "membership") for model in range(networks)]
        rows += [row | {"command": command} for row in _membership(runs, quiet)]
        _write(out / "membership.csv", MEMBERSHIP, rows)
    return report(out)


def _run(norm: str, epsilon: float | None, seed: int, epochs: int, folder: Path) -> Run:
    """The digits' recipe, private or not, without augmentation.

    The noise follows from the seed, so that the table can be made again: digits are no secret.
    """
    shared = {"norm": norm, "seed": seed, "epochs": epochs, "augment": "none", "eval_every": float(epochs)}
    if epsilon is None:
        return resolve("digits", run_dir=str(folder / f"{norm}-s{seed}"), **shared)
    name = f"{norm}-e{epsilon:g}-s{seed}"
    return resolve("digits_private", epsilon=epsilon, privacy_seed=seed, run_dir=str(folder / name), **shared)


def _accuracy(run: Run, quiet: bool) -> dict[str, Any]:
    result = train(run, quiet=quiet)
    print(f"{Path(run.run_dir).name}: {result['top1']:.1f} %", flush=True)
    record = _record(run)
    names = ("norm", "epsilon", "seed", "batch_size", "epochs", "lr")
    row = {name: run.flat()[name] for name in names} | {name: result[name] for name in ("top1", "test_loss", "steps")}
    row |= {name: record[name] for name in ("train_images", "test_images", "device", "torch")}
    row |= {"seconds": round(result["seconds"], 1)}
    if run.private:
        spent = record["privacy"]
        row |= {"spent_epsilon": spent["epsilon"]}
        row |= {name: spent[name] for name in ("delta", "noise_multiplier", "clip")}
    return row


def _membership(runs: list[Run], quiet: bool) -> list[dict[str, Any]]:
    attacked = train_on_halves(runs, quiet=quiet)
    records = [_record(run) for run in runs]
    accuracies = [record["result"]["top1"] for record in records]
    print(f"{Path(runs[0].run_dir).name} and on: {sum(accuracies) / len(accuracies):.1f} %", flush=True)
    setting = {"norm": runs[0].norm, "epsilon": runs[0].privacy.epsilon, "delta": runs[0].privacy.delta}
    setting |= {name: records[0][name] for name in ("device", "torch")}
    _, wrong, _ = pool()
    return [setting | dict(row) | {"top1": accuracies[row["network"]]} for row in measure(attacked, wrong)]


def _record(run: Run) -> dict[str, Any]:
    record = json.loads((Path(run.run_dir) / "run.json").read_text())
    return record | {name: record["environment"][name] for name in ("device", "torch")}


def _write(path: Path, names: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    buffer = StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _text(row.get(name)) for name in names} for row in rows)
    write_text(path, buffer.getvalue())


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _command(norms, epsilons, seeds, epochs, networks, attack_epochs) -> str:
    given = {"norms": norms, "epsilons": [f"{epsilon:g}" for epsilon in epsilons], "seeds": seeds}
    flags = [f"--{name} {' '.join(map(str, values))}" for name, values in given.items()]
    flags += [f"--epochs {epochs}", f"--networks {networks}", f"--attack-epochs {attack_epochs}"]
    return " ".join([COMMAND, *flags])
