"""The competitors of kernel normalization on networks that were built with something else."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import architectures
import knport

KINDS = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm, "instance": nn.InstanceNorm2d}
NETWORKS = {
    "torchvision": lambda: torchvision.models.resnet18(num_classes=5),
    "fused activations": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "pre-activation": lambda: timm.create_model("resnetv2_50", num_classes=5, in_chans=3),
    "small": lambda: architectures.create_model("cifar_resnet8", num_classes=5),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("norm", [*KINDS, "none"])
def test_every_norm_on_every_network(norm, network):
    model = NETWORKS[network]()
    replaced = knport.replace_norm(model, norm)
    assert type(replaced) is type(model)
    assert replaced(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert sum(isinstance(m, KINDS.get(norm, ())) for m in replaced.modules()) == (count if norm != "none" else 0)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()), "the original must not change"


def test_the_fused_activations_stay():
    model = timm.create_model("test_efficientnet", num_classes=5)
    acts = [type(m) for m in model.modules() if isinstance(m, nn.SiLU | nn.ReLU)]
    replaced = knport.replace_norm(model, "group")
    assert [type(m) for m in replaced.modules() if isinstance(m, nn.SiLU | nn.ReLU)] == acts


def test_gains_biases_and_flags_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3)).double().eval()
    nn.init.normal_(model[1].weight).requires_grad_(False)
    replaced = knport.replace_norm(model, "group")[1]
    assert torch.equal(replaced.weight, model[1].weight)
    assert (replaced.eps, replaced.training, replaced.weight.requires_grad) == (1e-3, False, False)


def test_groups_hold_two_channels_or_more():
    sizes = {8: 4, 16: 8, 24: 12, 48: 24, 64: 32, 96: 32, 128: 32, 3: 1}
    for channels, groups in sizes.items():
        assert knport.replace_norm(nn.Sequential(nn.BatchNorm2d(channels)), "group")[0].num_groups == groups


def test_no_norm_and_in_place_activations_leave_the_skip_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            return x + self.act(self.norm(x))

    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    torch.testing.assert_close(knport.replace_norm(Block(), "none")(x), before + before.relu())
    assert torch.equal(x, before)


def test_one_module_under_two_names_is_replaced_once():
    norm = nn.BatchNorm2d(4)
    model = nn.ModuleDict({"a": norm, "b": norm})
    replaced = knport.replace_norm(model, "group")
    assert isinstance(replaced["a"], nn.GroupNorm)
    assert replaced["a"] is replaced["b"]


def test_mistakes_are_told():
    with pytest.raises(knport.UnknownName, match="did you mean 'group'"):
        knport.replace_norm(nn.BatchNorm2d(4), "grup")
    with pytest.raises(knport.NothingToConvert, match="found no BatchNorm"):
        knport.replace_norm(nn.Linear(2, 2), "group")
