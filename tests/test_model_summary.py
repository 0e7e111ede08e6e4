"""knport.summary: its counts against counts made by hand."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from torch import nn

import knport
from knport.inputs import call_of
from knport.measure import macs_per_image, saved_bytes_per_image

X = torch.zeros(4, 3, 8, 8)


def test_contents_of_a_small_network():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1, groups=2),
    )
    found = knport.summary(model, example_inputs=X).before
    assert found.norms == {"BatchNorm2d": 1}
    assert found.layers == {"Conv2d 1x1 grouped": 1, "Conv2d 3x3": 1, "Conv2d 3x3 depthwise": 1}
    assert found.parameters == (27 * 8 + 8) + 16 + (9 * 8 + 8) + (4 * 4 + 4)
    assert found.macs == 64 * 27 * 8 + 36 * 9 * 8 + 36 * 4 * 4


def test_saved_activations_are_those_of_autograd():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Sigmoid(), nn.Conv2d(8, 5, 1))
    # input of each convolution (the first needs it for its weight), output of the sigmoid = input of the second
    assert saved_bytes_per_image(model, ((X,), {})) == 4 * (3 * 64 + 8 * 64)
    frozen = model.requires_grad_(False)
    assert saved_bytes_per_image(frozen, ((X,), {})) == 0


def test_costs_are_per_image_and_nothing_changes():
    model = timm.create_model("test_resnet").eval()
    one, four = (macs_per_image(model, call_of(model, torch.zeros(n, 3, 64, 64))) for n in (1, 4))
    assert one == four > 0
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_before_and_after_side_by_side():
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    new = knport.convert(model)
    summary = knport.summary(model, new)
    assert summary.input_shape[1:] == (3, 224, 224)
    assert summary.after.norms == {"KernelNorm2d": 1} and summary.before.norms == {"BatchNorm2d": 17}
    assert summary.after.layers["KNConv2d 2x2"] == summary.before.layers["Conv2d 1x1"] == 12
    plan = knport.plan(model)
    assert (summary.before.parameters, summary.after.parameters) == plan.parameters
    lines = str(summary).splitlines()
    assert lines[0] == "ResNet, costs per image of 3 x 224 x 224"
    row = next(line.split() for line in lines if line.startswith("parameters"))
    assert row == [
        "parameters",
        *(f"{n:,}" for n in plan.parameters),
        "x",
        f"{plan.parameters[1] / plan.parameters[0]:.2f}",
    ]
    assert json.loads(json.dumps(summary.to_dict()))["after"]["norms"] == {"KernelNorm2d": 1}


def test_a_network_that_cannot_train_on_the_inputs():
    class Detector(nn.Conv2d):
        def forward(self, x):
            if self.training:
                raise ValueError("targets are missing")
            return super().forward(x)

    summary = knport.summary(nn.Sequential(Detector(3, 4, 1)), example_inputs=X)
    assert summary.before.saved_bytes is None and "not known" in str(summary)


def test_a_network_that_needs_values_is_counted_on_the_cpu():
    class Branch(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum().item() == 0 else x

    assert knport.summary(nn.Sequential(Branch(3, 4, 1)), example_inputs=X).before.macs == 64 * 12


def test_mistakes_are_told():
    with pytest.raises(knport.KNPortError, match="could not run Sequential to measure it"):
        knport.summary(nn.Sequential(nn.Conv2d(5, 4, 1)), example_inputs=X)
    with pytest.raises(knport.KNPortError, match=r"expected a torch\.nn\.Module, got str"):
        knport.summary("resnet50")
