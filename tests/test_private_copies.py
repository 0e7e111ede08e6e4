"""Networks that add their shortcuts in place can be trained privately, with any norm."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from knport import privacy
from knport.privacy.copies import COPYING


def network(kind, norm) -> nn.Sequential:
    torch.manual_seed(0)
    block = kind(8, 8 // kind.expansion, norm_layer=norm)
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def loss(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 4, reduction="none")


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
@pytest.mark.parametrize(
    "norm", [lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm2d(c, affine=True), lambda c: nn.GroupNorm(1, c)]
)
@pytest.mark.parametrize("ghost", [False, True])
def test_gradients_of_every_image(kind, norm, ghost):
    net, x = network(kind, norm), torch.randn(3, 3, 8, 8)
    alone = copy.deepcopy(net)
    expected = [torch.autograd.grad(loss(alone, x)[row], alone.parameters()) for row in range(3)]
    prepared = privacy.prepare(net)
    if not ghost:
        wrapped = GradSampleModule(prepared, loss_reduction="sum")
        loss(wrapped, x).sum().backward()
        for parameter, each in zip(net.parameters(), zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(parameter.grad_sample, torch.stack(each), atol=1e-5, rtol=1e-4)
        return
    wrapped = GradSampleModuleFastGradientClipping(prepared, max_grad_norm=1.0, loss_reduction="sum")
    loss(wrapped, x).sum().backward()
    norms = torch.stack([torch.stack([g.norm() for g in each]).norm() for each in expected])
    torch.testing.assert_close(wrapped.get_norm_sample(), norms, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", COPYING)
def test_a_norm_stays_what_it_is(kind):
    layer = kind(2, 4) if kind is nn.GroupNorm else kind(4)
    net = nn.Sequential(layer)
    before, x = (
        dict(net.state_dict()),
        torch.randn(3, 4, *[4] * max(1, int(kind.__name__[-2]) if kind.__name__[-1] == "d" else 1)),
    )
    expected = net(x)
    prepared = privacy.prepare(privacy.prepare(net))
    assert isinstance(prepared[0], kind) and type(prepared[0]) is COPYING[kind]
    assert torch.equal(prepared(x), expected) and list(prepared.state_dict()) == list(before)
    again = pickle.loads(pickle.dumps(copy.deepcopy(prepared)))
    assert torch.equal(again(x), expected)
