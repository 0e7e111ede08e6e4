"""The sweep: a crash or a hang is a row, rows that are there stay, and the summary names what is wrong."""

from __future__ import annotations

import os
import time

import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

from experiments import sweep as command
from experiments.sweep import sweep
from experiments.sweep_models import Network, networks
from experiments.sweep_row import SweepRow, examine
from experiments.sweep_summary import read_rows, summary
from knport import UnmatchedPattern


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.spare = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return nn.functional.layer_norm(self.norm(self.conv(x)).mean((2, 3)), (4,))


def crash() -> nn.Module:
    os._exit(7)


def hang() -> nn.Module:
    time.sleep(60)


def fail() -> nn.Module:
    raise ValueError("no such weights")


BUILDS = {"a/toy": Toy, "b/crash": crash, "c/hang": hang, "d/fail": fail, "e/toy": Toy}


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(command, "networks", lambda: [Network(n, "classification", b) for n, b in BUILDS.items()])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_one_row_says_what_happened():
    row = examine(Network("a/toy", "classification", Toy))
    assert (row.error, row.device, row.shapes, row.sizes, row.no_gradient) == ("", "cpu", "equal", "2 x 64, 3 x 96", "")
    assert (row.batchnorms, row.batchnorms_left, row.kernelnorm, row.knconv) == (2, 1, 1, 1)
    assert "never called" in row.left_why
    assert row.norms_called == 2 and row.norms_missing == ""  # the norm and the function, both with a verdict


def test_a_convolution_that_normalizes_its_weights_has_the_verdict_of_a_convolution():
    row = examine(Network("a/std", "classification", lambda: nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4))))
    assert (row.norms_called, row.norms_planned, row.norms_missing) == (2, 2, "")
    assert "1 StdConv2d normalizes its own weights: StdConv2d has its own forward" in row.kept_why


@pytest.mark.slow
def test_a_crash_and_a_hang_are_rows(toys, tmp_path, capsys):
    out = tmp_path / "sweep.csv"
    sweep(out=out, timeout=10.0)
    rows = {row["model"]: row for row in read_rows(out)}
    assert list(rows) == list(BUILDS)
    assert "exit code 7" in rows["b/crash"]["error"] and "no result after 10 s" in rows["c/hang"]["error"]
    assert rows["d/fail"]["error"] == "ValueError: no such weights" and rows["a/toy"]["error"] == ""
    assert "errors (3): b/crash, c/hang, d/fail" in capsys.readouterr().out
    before = out.read_text()
    sweep(out=out, timeout=10.0)  # nothing is made again
    assert out.read_text() == before
    sweep(out=out, models=("d/*",), again=True)
    assert sorted(read_rows(out), key=lambda row: row["model"]) == list(rows.values())


def test_a_name_that_matches_nothing_is_an_error(toys, tmp_path):
    with pytest.raises(UnmatchedPattern, match=r"timm/nothing.* matches no network"):
        sweep(out=tmp_path / "sweep.csv", models=("timm/nothing",))


def test_the_networks_are_those_that_are_promised():
    names = {network.name for network in networks()}
    tasks = {network.task for network in networks()}
    assert tasks == {"classification", "segmentation", "video", "detection", "optical_flow"}
    assert sum(name.startswith("timm/") for name in names) == 98
    assert {"torchvision/resnet50", "torchvision/raft_small", "torchvision/mvit_v2_s"} <= names


def test_the_summary_counts_and_names():
    good = SweepRow(model="a", task="", norms_called=3, batchnorms=3, absorbed=3, shapes="equal")
    bad = SweepRow(model="b", task="", norms_called=2, norms_missing="x", batchnorms=1, batchnorms_left=1, shapes="no")
    text = summary([{key: str(value) for key, value in vars(row).items()} for row in (good, bad)])
    assert "2 networks, 0 errors; 5 norms called, 3 absorbed" in text and "75.0 % of 4 BatchNorms gone" in text
    assert "norms without a verdict (1): b" in text and "other shapes (1): b" in text
