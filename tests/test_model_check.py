"""knport.check: every promise can hold and can break, and the module to blame is named."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import knport

X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolution, something in the middle, head."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(3, 6, 3), middle, nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


class Function(nn.Module):
    """A module around a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class Own(Function):
    """With a rate of its own, as timm's networks have."""

    drop_rate = 0.5


class Pair(Net):
    """Keyword inputs; a dictionary of tensors and a list."""

    def forward(self, x, scale=1.0, *, shift=None):
        out = super().forward(x) * scale
        return {"out": out if shift is None else out + shift, "twice": [2 * out, out.argmax(1)]}


class Boxes(Net):
    """A list of images in, a list of dictionaries out, as in detection."""

    def forward(self, images):
        return [{"boxes": super(Boxes, self).forward(image[None])[0]} for image in images]


def holds_but_for_pickles(report) -> bool:
    return [p.name for p in report.broken] == ["copies, pickles and saved weights give the same output"]


def promise(report, words: str):
    return next(p for p in report.promises if words in p.name)


def broken(middle, words: str, inputs=X):
    found = promise(knport.check(Net(middle), inputs), words)
    assert not found.holds
    return found


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_converted_networks_keep_every_promise(name):
    side = 160 if "vit" in name else 64
    report = knport.check(knport.convert(timm.create_model(name)), torch.randn(2, 3, side, side))
    assert report, report
    assert str(report).startswith(f"{report.model}: every promise holds")


def test_a_batchnorm_breaks_two_and_is_named():
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    report = knport.check(model, torch.randn(2, 3, 64, 64))
    assert not report
    assert [p.name for p in report.broken] == [
        "no BatchNorm is left",
        "no image sees another in training, dropout 0",
    ]
    assert report.broken[0].paths[0] == report.broken[1].paths[0] == "bn1"
    assert "2 of 8 promises are broken" in str(report) and "the first module to differ is bn1" in str(report)


def test_equal_images_would_hide_it():
    assert not knport.check(Net(nn.BatchNorm2d(6)), torch.zeros(2, 3, 12, 12))


def test_a_norm_over_the_batch_in_a_function_is_seen():
    mix = Function(lambda self, x: x - x.mean(0))
    for mode in ("evaluation", "training"):
        assert broken(mix, f"sees another in {mode}").paths == ("middle",)


def test_randomness_in_evaluation_is_seen():
    assert broken(Function(lambda self, x: F.dropout(x, 0.5)), "deterministic").paths == ("middle",)


def test_dropout_is_turned_off_and_other_randomness_is_said():
    for middle in (nn.Dropout(0.5), timm.layers.DropPath(0.5), torchvision.ops.StochasticDepth(0.5, "row")):
        assert knport.check(Net(middle), X), middle
    own = Own(lambda self, x: F.dropout(x, self.drop_rate, self.training))
    assert holds_but_for_pickles(knport.check(Net(own), X)) and own.drop_rate == 0.5  # a lambda is in it
    noise = Function(lambda self, x: x + torch.randn_like(x) if self.training else x)
    found = broken(noise, "in training")
    assert found.paths == ("middle",) and "not tested" in found.detail


def test_a_parameter_without_gradient_is_named():
    class Unused(nn.Identity):
        def __init__(self):
            super().__init__()
            self.unused, self.frozen = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), requires_grad=False)

    found = broken(Unused(), "gradient")
    assert found.paths == ("middle.unused",) and "1 of 5 do not: middle.unused" in found.detail


def test_an_edit_in_place_is_named():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, x):
            return x + self.act(x)

    assert broken(Skip(), "in place").paths == ("middle.act",)

    class Input(nn.Module):
        def forward(self, x):
            return x.mul_(2).mean((2, 3))

    found = promise(knport.check(Input(), X), "in place")
    assert not found.holds and "into its input" in found.detail


def test_shapes_that_depend_on_the_batch_or_the_mode():
    net = Net(nn.Identity())
    net.head = Function(lambda self, x: x if self.training else x[:, :2])
    found = promise(knport.check(net, X), "no shape")
    assert not found.holds and found.detail == "one image gives (1, 2) or (1, 6)"


def test_what_cannot_be_pickled_is_said():
    found = broken(Function(lambda self, x: x), "pickles")
    assert "a pickle cannot be made" in found.detail


def test_one_image_leaves_independence_untested():
    report = knport.check(Net(nn.Identity()), torch.ones(1, 3, 12, 12))
    assert report, "one tensor becomes noise, two images of it"
    found = promise(knport.check(Boxes(nn.Identity()), ([X[0]],)), "in evaluation")
    assert not found.holds and "give two images" in found.detail


def test_several_inputs_and_outputs():
    report = knport.check(Pair(nn.Identity()), {"x": X, "shift": torch.randn(3, 1)})
    assert report, report


def test_detection_takes_lists_of_images():
    report = knport.check(Boxes(nn.Identity()), ([X[0], X[1]],))
    assert report, report


def test_the_model_and_the_random_state_stay():
    model = Net(nn.Dropout(0.5)).train()
    model.conv.register_forward_hook(lambda *_: pytest.fail("a user's hook must not fire"))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    knport.check(model, X)
    assert model.training and model.middle.p == 0.5 and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_as_json():
    data = json.loads(json.dumps(knport.check(Net(nn.BatchNorm2d(6)), X).to_dict()))
    assert data["holds"] is False and data["promises"][0]["paths"] == ["middle"]


def test_what_cannot_be_checked():
    with pytest.raises(knport.KNPortError, match=r"could not run Net to check it \(in conv: .*pass example_inputs="):
        knport.check(Net(nn.Identity()), torch.zeros(2, 5, 12, 12))
    with pytest.raises(knport.KNPortError, match="meta device"):
        knport.check(Net(nn.Identity()).to("meta"), X)
    with pytest.raises(knport.AlreadyWrapped):
        knport.check(nn.DataParallel(Net(nn.Identity())), X)
