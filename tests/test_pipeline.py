"""What the pipeline of small images costs beside a training step."""

from __future__ import annotations

import csv

from experiments.benchmarks.pipeline import COLUMNS, RESULTS, pipeline


def test_rows(tmp_path, capsys):
    out = tmp_path / "pipeline.csv"
    for _ in range(2):
        pipeline(model="cifar_resnet8", batch_sizes=(2, 8), rounds=2, seconds=0.0, images=64, out=out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["batch_size"] for row in rows] == ["2", "8"] * 2 and tuple(rows[0]) == COLUMNS
    for row in rows:
        share = 100 * float(row["pipeline_ms_per_step"]) / float(row["step_ms"])
        assert 0.2 * share < float(row["share_percent"]) < 5 * share
    assert capsys.readouterr().out.count("cifar_resnet8, batch size 8") == 2


def test_what_was_measured_is_below_five_percent():
    with RESULTS.open(newline="") as file:
        rows = {row["batch_size"]: row for row in csv.DictReader(file) if row["model"] == "knresnet18"}
    assert {"2", "256"} <= set(rows)
    assert all(float(row["share_percent_q75"]) < 5 for row in rows.values())
