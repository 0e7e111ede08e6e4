"""The search for a learning rate: which rates it asks for, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from test_resume import at_step, crash
from test_train import TinyKN

from experiments.__main__ import main
from experiments.search_lr import DIVERGED, halving, search_lr, tpe
from knport.errors import KNPortError


@pytest.fixture(autouse=True)
def kn_net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"]))


def asked(rates, score) -> list[float]:
    """What a search asks for when `score` says how good a rate is."""
    found = [next(rates)]
    while True:
        try:
            found.append(rates.send(score(found[-1])))
        except StopIteration:
            return found


@pytest.mark.parametrize(
    ("patience", "scores", "expected"),
    [
        (1, {0.2: 50, 0.1: 60, 0.05: 55}, [0.2, 0.1, 0.05]),
        (1, {0.2: 50, 0.1: 50}, [0.2, 0.1]),
        (2, {0.2: 50, 0.1: 49, 0.05: 60, 0.025: 59, 0.0125: 58}, [0.2, 0.1, 0.05, 0.025, 0.0125]),
        (1, {0.2: DIVERGED, 0.1: DIVERGED, 0.05: 10, 0.025: 9}, [0.2, 0.1, 0.05, 0.025]),
        (1, {0.2 / 2**i: i for i in range(6)}, [0.2 / 2**i for i in range(6)]),
    ],
)
def test_halving(patience, scores, expected):
    assert asked(halving(0.2, patience, trials=6), scores.__getitem__) == expected


def test_optuna_asks_the_same_again_and_finds_the_better_half():
    pytest.importorskip("optuna")

    def score(rate: float) -> float:
        return 90 - 100 * abs(rate - 0.03)

    first, again = (asked(tpe(1e-4, 1.0, 14), score) for _ in range(2))
    assert first == again
    assert len(set(first)) == 14
    assert all(1e-4 <= rate <= 1 for rate in first)
    assert abs(max(first, key=score) - 0.03) < 0.02


def few(tmp_path, **options):
    settings = ["train_images=64", "test_images=50", "checkpoint_every=1"]
    fixed = {"batch_size": 16, "steps": 6, "override": settings, "out": str(tmp_path), "quiet": True}
    return search_lr("digits", **{**fixed, **options})


def table(folder) -> list[dict[str, str]]:
    with (folder / "search.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_search_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(RuntimeError, match="plug"):
            few(tmp_path / "stopped", seeds=[0, 1], start=4e3)
    best = few(tmp_path / "stopped", seeds=[0, 1], start=4e3)
    said = capsys.readouterr().out
    assert "lr 4000: diverged" in said
    assert f"best of {len(table(tmp_path / 'stopped'))}: lr {best:g} with" in said
    assert f"train digits --model cifar_resnet8 --norm original --batch-size 16 --lr {best}" in said
    rows = {float(row["lr"]): row for row in table(tmp_path / "stopped")}
    scored = {rate: float(row["score"]) for rate, row in rows.items() if row["score"] != "diverged"}
    assert scored[best] == max(scored.values())
    assert float(rows[best]["sd"]) >= 0 and rows[best]["runs"] == "2"
    runs = [json.loads(path.read_text()) for path in (tmp_path / "stopped").glob(f"lr{best:g}-s*/run.json")]
    assert sum(run["result"]["top1"] for run in runs) / 2 == pytest.approx(scored[best])
    monkeypatch.setattr("experiments.search_lr.train", lambda run, quiet: {"top1": stored_result(run)})
    assert few(tmp_path / "stopped", seeds=[0, 1], start=4e3) == best  # nothing is trained


def stored_result(run) -> float:
    return json.loads((Path(run.run_dir) / "run.json").read_text())["result"]["top1"]


def test_the_edges_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.search_lr._score", lambda run, quiet: 90 - run.lr)
    (tmp_path / "x").mkdir()
    assert few(tmp_path / "x", trials=4) == 0.025
    assert "lowest tried, so a lower one may be better" in capsys.readouterr().out
    monkeypatch.setattr("experiments.search_lr._score", lambda run, quiet: run.lr)
    assert few(tmp_path / "x", start=0.4) == 0.4
    assert "highest tried, so a higher one may be better" in capsys.readouterr().out


def test_mistakes(tmp_path, monkeypatch, capsys):
    with pytest.raises(KNPortError, match=r"start is 0; expected above 0: set --start"):
        few(tmp_path, start=0)
    with pytest.raises(KNPortError, match=r"low is 1 and high is 0\.1"):
        few(tmp_path, low=1.0, high=0.1)
    monkeypatch.setattr("experiments.search_lr._score", lambda run, quiet: DIVERGED)
    with pytest.raises(KNPortError, match=r"every learning rate from 0\.2 to 0\.1 diverged; start lower"):
        few(tmp_path, trials=2)
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search-lr", "digits", "--method", "optuna", "--out", str(tmp_path)]) == 2
    assert "pip install optuna" in capsys.readouterr().err
