"""The scale of activations in freshly built networks, and the table and picture made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import knport
from experiments import signal_propagation as tool

SMALLEST = [
    "kncifar_resnet8x2",
    "kndensenet40_k12",
    "kncifar_convmixer",
    "kncifar_convnext",
    "knvit_test",
    "knconformer_test",
    "fcn_knresnet18",
    "dp_knresnet8",
]


@pytest.mark.parametrize("name", SMALLEST)
def test_the_scale_stays_within_the_limit_from_stem_to_head(name):
    found = tool.measure(name, size=64 if name.startswith("fcn") else None)
    assert len(found) >= 5
    assert tool.spread(found) < tool.LIMIT, [f"{stage.name} {stage.sd:.2f}" for stage in found]


class Halves(nn.Module):
    """Each stage halves its input; the classifier is no stage."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(Half(), nn.ReLU())
        self.blocks = nn.Sequential(nn.Sequential(Half()), nn.Sequential(Half()))
        self.act, self.fc = nn.ReLU(), nn.Linear(4, 2)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x):
        return self.fc(self.act(self.blocks(self.stem(x))).mean((2, 3)))


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def test_stages_and_their_scale():
    x = torch.rand(4, 4, 8, 8)
    found = tool.propagate(Halves(), x)
    assert [stage.name for stage in found] == ["stem", "blocks.0", "blocks.1"]
    scale = x.std().item()
    assert [stage.sd for stage in found] == pytest.approx([scale / 2, scale / 4, scale / 8])
    assert tool.spread(found) == pytest.approx(4)


def test_no_hooks_are_left():
    model = Halves()
    tool.propagate(model, torch.rand(2, 4, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_committed_measurements_keep_it():
    traces = tool.read_csv(Path(__file__).parents[1] / "docs" / "signal_propagation.csv")
    assert sorted(traces) == tool.measured()
    exceed = {name for name, found in traces.items() if tool.spread(found) >= tool.LIMIT}
    assert exceed == {name for name in traces if tool.INIT in name}


def test_an_initialization_is_part_of_a_name():
    published, ours = (tool.measure(f"knresnet18_macs, init={init}", size=96) for init in ("published", "fan_in"))
    assert tool.spread(published) > 2 * tool.LIMIT > 2 * tool.spread(ours)
    assert ours == tool.measure("knresnet18_macs", size=96)
    with pytest.raises(knport.UnknownName, match="did you mean 'published'"):
        tool.measure("knresnet18_macs, init=publishd")


def test_every_kernel_normalized_network_has_a_family():
    assert {tool.family_of(name) for name in tool.kernel_normalized()} <= {*tool.FAMILIES, "small and private"}


def test_table_and_picture(tmp_path):
    tool.signal_propagation(("dp_kndensenet20x16",), folder=tmp_path)
    first = tool.read_csv(tmp_path / "signal_propagation.csv")
    tool.signal_propagation(("kncifar_resnet8x2",), folder=tmp_path)
    both = tool.read_csv(tmp_path / "signal_propagation.csv")
    assert both.keys() == {"dp_kndensenet20x16", "kncifar_resnet8x2"}
    assert both["dp_kndensenet20x16"] == first["dp_kndensenet20x16"]
    assert (tmp_path / "signal_propagation.svg").read_text().startswith("<?xml")
    before = (tmp_path / "signal_propagation.svg").read_text()
    tool.signal_propagation(folder=tmp_path, redraw=True)
    assert (tmp_path / "signal_propagation.svg").read_text() == before


def test_a_name_that_is_none_is_told(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["signal_propagation", "knresnet81"])
    assert tool.main() == 2
    assert "did you mean 'knresnet18'" in capsys.readouterr().err
