"""The networks of `architectures`: the published parameter counts and what is published of their order.

What every network promises is in tests/test_all_models.py.
"""

import pytest
import timm
import torch
import torchvision
from torch import nn

import architectures
import knport
from architectures.resnet import PreActBasic, PreActBottleneck
from architectures.small import Dense, PreActivation

LOW, HIGH = True, False

# Parameters of the papers' networks at (classes, low resolution): sums over the figures of the first version and of
# the segmentation networks, which agree with the papers' tables; counts of the released code for the others.
PARAMETERS = {
    ("knresnet18_v1", 100, LOW): 11_206_468,
    ("knresnet18_v1", 1000, LOW): 11_668_168,
    ("knresnet18_v1", 1000, HIGH): 11_698_888,
    ("knresnet34_v1", 100, LOW): 21_304_932,
    ("knresnet34_v1", 1000, HIGH): 21_797_352,
    ("knresnet50_v1", 100, LOW): 24_599_836,
    ("knresnet50_v1", 1000, HIGH): 25_553_056,
    ("baseline_resnet18", 100, LOW): 11_220_132,
    ("baseline_resnet18", 1000, LOW): 11_681_832,
    ("baseline_resnet18", 1000, HIGH): 11_689_512,
    ("baseline_resnet34", 100, LOW): 21_328_292,
    ("baseline_resnet34", 1000, LOW): 21_789_992,
    ("baseline_resnet34", 1000, HIGH): 21_797_672,
    ("baseline_resnet50", 100, LOW): 23_705_252,
    ("baseline_resnet50", 1000, LOW): 25_549_352,
    ("baseline_resnet50", 1000, HIGH): 25_557_032,
    ("preact_resnet18", 100, LOW): 11_218_340,
    ("preact_resnet34", 100, LOW): 21_326_500,
    ("preact_resnet50", 100, LOW): 23_697_572,
    ("fcn_knresnet18", 19, HIGH): 13_525_380,
    ("fcn_knresnet34", 19, HIGH): 23_399_315,
    ("fcn_knresnet50", 19, HIGH): 32_873_971,
    ("fcn_resnet18", 19, HIGH): 13_546_579,
    ("fcn_resnet34", 19, HIGH): 23_654_739,
    ("fcn_resnet50", 19, HIGH): 32_955_987,
    ("knconvnext_tiny", 1000, HIGH): 28_587_784,
    ("knconvnext_small", 1000, HIGH): 50_222_344,
    ("knconvnext_base", 1000, HIGH): 88_589_672,
    ("knconvnext_large", 1000, HIGH): 197_764_648,
    ("baseline_densenet121", 1000, HIGH): 7_978_856,
    ("baseline_densenet169", 1000, HIGH): 14_149_480,
    ("baseline_densenet201", 1000, HIGH): 20_013_928,
    ("densenet100_k12", 10, LOW): 769_162,
    ("densenet250_k24", 10, LOW): 15_324_406,
    ("densenet190_k40", 10, LOW): 25_624_430,
    ("baseline_convnext_tiny", 1000, HIGH): 28_589_128,
    ("baseline_convmixer_1536_20", 1000, HIGH): 51_625_960,
    ("baseline_convmixer_768_32", 1000, HIGH): 21_110_248,
    ("baseline_convmixer_1024_20", 1000, HIGH): 24_383_464,
    ("dp_knresnet8", 10, LOW): 1_856_394,
    ("dp_knresnet13", 10, LOW): 2_041_034,
    ("dp_knpreact_resnet18", 10, LOW): 11_169_162,
    ("dp_kndensenet20x16", 10, LOW): 759_882,
    ("dp_knresnet18", 1000, LOW): 11_677_540,
}


def on_meta(name: str, num_classes: int = 7, low_resolution: bool = HIGH, **options) -> nn.Module:
    with torch.device("meta"):
        return architectures.create_model(name, num_classes, low_resolution=low_resolution, **options)


def build(name: str) -> nn.Module:
    return architectures.create_model(name, num_classes=3, dropout=0.0)


def count(model: nn.Module, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("setting", PARAMETERS, ids=str)
def test_has_the_published_parameters(setting):
    assert sum(parameter.numel() for parameter in on_meta(*setting).parameters()) == PARAMETERS[setting]


@pytest.mark.parametrize("name", ["baseline_resnet18", "preact_resnet18", "fcn_resnet18"])
@pytest.mark.parametrize(
    "norm, kind",
    [
        ("group", nn.GroupNorm),
        ("layer", nn.GroupNorm),
        ("instance", nn.InstanceNorm2d),
        ("local_context", knport.LocalContextNorm),
        ("positional", knport.PositionalNorm),
        ("none", ()),
    ],
)
def test_competitors_take_a_norm(name, norm, kind):
    batch, other = on_meta(name), on_meta(name, norm=norm)
    norms = count(batch, nn.BatchNorm2d)
    assert norms >= 18 and count(other, nn.BatchNorm2d) == 0
    if kind:
        assert count(other, kind) == norms
        groups = {module.num_groups for module in other.modules() if isinstance(module, nn.GroupNorm)}
        assert groups == {"group": {32}, "layer": {1}}.get(norm, set())
        assert {key: value.shape for key, value in other.named_parameters()} == {
            key: value.shape for key, value in batch.named_parameters()
        }
    with pytest.raises(knport.UnknownName, match="norm"):
        on_meta(name, norm="grup")


def test_timm_keeps_its_own_networks():
    for name in architectures.list_models():
        assert timm.is_model(name)
    assert "timm" in timm.model_entrypoint("resnet18").__module__
    assert "timm" in timm.model_entrypoint("tv_resnet50").__module__


@pytest.mark.parametrize(
    "name, low_resolution, size, maps",
    [
        ("knresnet18", LOW, 32, [32, 16, 8, 4]),
        ("knresnet18", HIGH, 224, [56, 28, 14, 8]),
        ("knresnet50", HIGH, 224, [56, 28, 14, 7]),
        ("knresnet18_v1", LOW, 32, [32, 16, 7, 4]),
        ("knresnet50_v1", HIGH, 224, [56, 28, 13, 7]),
        ("fcn_knresnet50", HIGH, 224, [56, 28, 14, 7]),
    ],
)
def test_maps_of_the_sets(name, low_resolution, size, maps):
    model, found = on_meta(name, low_resolution=low_resolution), []
    for blocks in model.sets:
        blocks.register_forward_hook(lambda module, args, out: found.append(out.shape[-1]))
    model(torch.empty(1, 3, size, size, device="meta"))
    assert found == maps


@pytest.mark.parametrize("name", ["fcn_knresnet18", "fcn_knresnet50", "fcn_resnet18"])
def test_segmentation_takes_any_size(name):
    model = on_meta(name, num_classes=19).eval()
    for height, width in ((1, 33), (97, 131), (512, 1024)):
        logits = model(torch.empty(1, 3, height, width, device="meta"))
        assert logits.shape == (1, 19, -(-height // 32), -(-width // 32))


def test_dropout_is_that_of_the_papers():
    for name, conv, norm in (
        ("knresnet18", 0.05, 0.25),
        ("knresnet18_v1", 0.1, 0.25),
        ("fcn_knresnet18", 0.1, 0.5),
        ("dp_knresnet8", 0.1, 0.25),
        ("dp_knresnet13", 0.1, 0.5),
        ("dp_knresnet18", 0.05, 0.25),
        ("knconvnext_tiny", 0.1, None),
    ):
        model = on_meta(name)
        assert {module.dropout for module in model.modules() if isinstance(module, knport.KNConv2d)} == {conv}
        norms = [module.dropout for module in model.modules() if isinstance(module, knport.KernelNorm2d)]
        assert norms == ([] if norm is None else [norm])


def _definition(name: str, x: torch.Tensor, parameters) -> torch.Tensor:
    """The networks of private training, written out; `parameters` are weight, bias, weight, bias, ... in order."""
    mish, pool = nn.functional.mish, nn.functional.max_pool2d

    def conv(x, stride=1, padding=1):
        return knport.functional.naive.kn_conv(x, next(parameters), next(parameters), stride, padding)

    def layer(x):
        return mish(conv(x)) if name == "dp_knresnet8" else conv(mish(x))

    def residual(x):
        return x + layer(layer(x))

    def finish(x, size, act=mish):
        x = nn.functional.adaptive_avg_pool2d(act(knport.functional.naive.kernel_norm(x)), size)
        return nn.functional.linear(x.flatten(1), next(parameters), next(parameters))

    if name == "dp_knresnet8":
        x = residual(pool(layer(layer(x)), 2))
        return finish(pool(residual(pool(layer(x), 2)), 2), 2, act=lambda x: x)
    x = conv(x)
    if name == "dp_knresnet13":
        for _ in range(3):
            x = pool(layer(residual(x)), 2)
        return finish(residual(x), 2)
    if name == "dp_knpreact_resnet18":
        x = residual(residual(x))
        for _ in range(3):
            y = mish(x)
            x = residual(layer(conv(y, stride=2)) + conv(y, stride=2, padding=0))
        return finish(x, 1)
    for block in range(3):
        x = nn.functional.avg_pool2d(layer(x), 2) if block else x
        for _ in range(5):
            x = torch.cat((x, layer(x)), 1)
    return finish(x, 1)


@pytest.mark.parametrize("name", ["dp_knresnet8", "dp_knresnet13", "dp_knpreact_resnet18", "dp_kndensenet20x16"])
def test_networks_of_private_training_are_as_defined(name):
    model, x = build(name).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), _definition(name, x, model.parameters()))


def test_a_trained_convnext_fits_but_for_the_downsampling():
    ours, theirs = on_meta("knconvnext_tiny"), torchvision.models.convnext_tiny(num_classes=7)
    found = ours.load_state_dict(theirs.state_dict(), strict=False, assign=True)
    steps = [f"features.{i}" for i in (2, 4, 6)]
    assert found.missing_keys == []
    assert sorted(found.unexpected_keys) == sorted(f"{s}.0.{key}" for s in steps for key in ("weight", "bias"))


def test_dense_layers_keep_what_they_concatenate():
    x = torch.randn(2, 8, 5, 5)
    y = Dense(8, 4, nn.Mish, 0.0)(x)
    assert y.shape == (2, 12, 5, 5)
    assert torch.equal(y[:, :8], x)


def test_activation_comes_first_and_is_the_one_asked_for():
    layer, x = PreActivation(4, 5, nn.ReLU, 0.0).eval(), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(layer(x), layer.conv(x.relu()))
    assert count(on_meta("dp_kndensenet20x16"), nn.Mish) == 18
    model = on_meta("dp_kndensenet20x16", activation=nn.ReLU)
    assert (count(model, nn.Mish), count(model, nn.ReLU)) == (0, 18)


@pytest.mark.parametrize("block, last", [(PreActBasic, "conv2"), (PreActBottleneck, "conv3")])
def test_preactivation_shortcuts(block, last):
    """The identity passes the input as it is; a convolution reads what the branch reads."""
    x = torch.randn(2, 8, 6, 6)
    same, down = block(8, 8 // block.expansion, stride=1), block(8, 4, stride=2)
    for module in (same, down):
        nn.init.zeros_(getattr(module, last).weight)
    assert torch.equal(same(x), x)
    torch.testing.assert_close(down(x), down.shortcut(down.norm1(x).relu()))


def test_pooled_features_without_classes():
    for name, features in (
        ("knresnet34", 512),
        ("knresnet50_v1", 1024),
        ("baseline_resnet50", 2048),
        ("preact_resnet18", 512),
        ("knconvnext_tiny", 768),
        ("dp_knresnet8", 1024),
    ):
        assert on_meta(name, num_classes=0)(torch.empty(2, 3, 128, 128, device="meta")).shape == (2, features)
