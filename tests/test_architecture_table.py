"""The table of all networks beside their originals."""

from __future__ import annotations

import pytest
import torch

import architectures
from experiments import architecture_table as tool
from experiments.signal_propagation import Stage, write_csv

PAIR = ("kncifar_resnet8x2", "cifar_resnet8x2")


def test_counts_are_those_of_the_network():
    one = tool.count("cifar_resnet8x2", (10, 3, 32, 32))
    model = architectures.create_model("cifar_resnet8x2", num_classes=10)
    assert one.parameters == sum(p.numel() for p in model.parameters())
    assert one.macs == 49_120_512  # the convolutions and the linear layer, added up by hand
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(torch.zeros(1, 3, 32, 32))
    own = {p.data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in own}
    assert one.peak_mib * 2**20 > sum(kept.values())


def test_images():
    assert tool.image_of("fcn_resnet18")[2:] == (512, 1024)
    assert tool.image_of("kncifar_convnext")[2:] == (32, 32)
    assert tool.image_of("knvit_tiny")[2:] == (224, 224)


def test_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "kernel_normalized", lambda: [PAIR[0]])
    write_csv(tmp_path / "signal_propagation.csv", {PAIR[0]: [Stage("stem", 0.5), Stage("norm", 1.5)]})
    tool.architecture_table(tmp_path, results=tmp_path)
    text = (tmp_path / "architectures.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and "cifar" in line]
    assert [row[0].strip() for row in rows] == list(PAIR)
    assert "params x 1.00, MACs x 1.09" in rows[0][4] and rows[0][5].strip() == "3.0"
    counted = tool.read_counts(tmp_path / "architectures.csv")
    assert counted.keys() == set(PAIR)
    monkeypatch.setattr(tool, "count", lambda name, image: pytest.fail(f"{name} was counted again"))
    tool.architecture_table(tmp_path, keep=True, results=tmp_path)
    assert (tmp_path / "architectures.md").read_text() == text
