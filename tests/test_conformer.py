"""KN-Conformer and its original: sizes, the coupling of the branches, two heads."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import architectures
import knport
from knport import privacy

SIZES = ("test", "tiny", "small", "base")
MATCHED = [f"knconformer_{size}{form}" for size in SIZES for form in ("", "_pair") if (size, form) != ("test", "_pair")]


def on_meta(name, **options):
    with torch.device("meta"):
        return architectures.create_model(name, **options)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, size):
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


def build(name="knconformer_test", **options):
    return architectures.create_model(name, **{"num_classes": 3, "low_resolution": True, **options})


@pytest.mark.parametrize("size, count", [("tiny", 23_520_480), ("small", 37_673_424), ("base", 83_289_136)])
def test_the_original_has_the_published_parameters(size, count):
    assert parameters(on_meta(f"baseline_conformer_{size}")) == count  # 23.5, 37.7 and 83.3 M in the paper


@pytest.mark.parametrize("low_resolution", [False, True])
@pytest.mark.parametrize("name", MATCHED)
def test_parameters_match_the_original(name, low_resolution):
    ours = on_meta(name, low_resolution=low_resolution)
    theirs = on_meta(architectures.original_of(name), low_resolution=low_resolution)
    assert parameters(ours) == pytest.approx(parameters(theirs), rel=0.01)


# MACs in units of 1e9 of the originals are the paper's
@pytest.mark.parametrize(
    "size, giga",
    [
        ("tiny", 5.2),
        pytest.param("small", 10.6, marks=pytest.mark.slow),
        pytest.param("base", 23.3, marks=pytest.mark.slow),
    ],
)
def test_macs_match_the_original(size, giga):
    theirs = macs(on_meta(f"baseline_conformer_{size}"), 224)
    assert theirs / 1e9 == pytest.approx(giga, abs=0.05)
    assert 0.96 * theirs < macs(on_meta(f"knconformer_{size}"), 224) < theirs
    assert theirs < macs(on_meta(f"knconformer_{size}_pair"), 224) < 1.07 * theirs


@pytest.mark.parametrize("name", ["knconformer_test", "baseline_conformer_test"])
@pytest.mark.parametrize("low_resolution, size", [(False, (64, 96)), (True, (16, 24)), (True, (20, 20))])
def test_branches_have_the_sizes_of_the_paper(name, low_resolution, size):
    model, maps, tokens = build(name, low_resolution=low_resolution).eval(), [], []
    for block in model.blocks:
        block.conv.register_forward_hook(lambda module, args, out: maps.append(tuple(out[0].shape[1:])))
        block.transformer.register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    assert model(torch.randn(2, 3, *size)).shape == (2, 3)
    patch = 4 if low_resolution else 16
    height, width = (side // patch for side in size)
    assert tokens == [1 + height * width] * 5
    stages = [(32, 4 * height, 4 * width), (64, 2 * height, 2 * width), (128, height, width)]
    assert maps == [stages[0], stages[1], stages[1], stages[2], stages[2]]


@pytest.mark.parametrize("form", ["pair", "window"])
def test_each_branch_reaches_the_other(form):
    model = build(form=form, dropout=0.0).eval()
    x = torch.randn(1, 3, 16, 16)
    before = model.forward_heads(x)
    with torch.no_grad():
        model.blocks[0].conv.conv2.weight.normal_()
    after_map = model.forward_heads(x)
    assert (after_map[1] - before[1]).abs().max() > 1e-4
    with torch.no_grad():
        model.transformer.mlp.fc2.weight.normal_()
    after_token = model.forward_heads(x)
    assert (after_token[0] - after_map[0]).abs().max() > 1e-4


def test_projection_and_average_commute():
    """Why the tokens may be normalized and projected behind the pool, where the original projects in front of it."""
    inner, conv = torch.randn(1, 8, 8, 8), nn.Conv2d(8, 16, 1)
    pool = nn.AvgPool2d(4)
    torch.testing.assert_close(pool(conv(inner)), conv(pool(inner)))


def test_couplings_are_kernel_normalized_and_keep_the_class_token():
    model = build(dropout=0.0)
    block, tokens = model.blocks[0], torch.randn(2, 1 + 16, 64)
    inner = torch.randn(2, block.conv.conv2.out_channels, 16, 16)
    pooled = nn.functional.avg_pool2d(inner, 4).permute(0, 2, 3, 1)
    proj = block.down.proj
    expected = knport.functional.kn_linear(pooled, proj.weight, proj.bias, norm_window=3)
    added = block.down(inner, tokens) - tokens
    torch.testing.assert_close(added[:, 1:], nn.functional.gelu(expected).flatten(1, 2), rtol=1e-4, atol=1e-5)
    assert not added[:, 0].any()
    up = block.up(tokens, (4, 4))
    assert up.shape[2:] == (16, 16)
    assert torch.equal(up[:, :, 0, 0], up[:, :, 3, 3]) and not torch.equal(up[:, :, 3, 3], up[:, :, 4, 4])


def test_forward_is_the_mean_of_the_two_heads_and_each_has_a_loss():
    model = build().eval()
    x, target = torch.randn(2, 3, 16, 16), torch.arange(2)
    of_map, of_token = model.forward_heads(x)
    torch.testing.assert_close(model(x), (of_map + of_token) / 2)
    loss = sum(nn.functional.cross_entropy(logits, target) for logits in model.forward_heads(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_classifier():
    model = build(num_classes=0)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features) == (2, 128 + 64)
    model.reset_classifier(5)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert model.get_classifier().transformer.out_features == 5
    features, head = model.forward_features(torch.randn(2, 3, 16, 16)), model.get_classifier()
    bias = head.conv.bias + head.transformer.bias
    torch.testing.assert_close(head(features), (features @ head.weight.T + bias) / 2)


@pytest.mark.parametrize("images", [torch.rand, torch.randn], ids=["uniform", "normal"])
@pytest.mark.parametrize("form", ["pair", "window"])
@pytest.mark.parametrize("low_resolution", [False, True])
def test_activations_keep_their_scale(low_resolution, form, images):
    model = build(low_resolution=low_resolution, form=form)
    scales = {"map": [], "tokens": []}
    model.stem.register_forward_hook(lambda module, args, out: scales["map"].append(out.std().item()))
    model.class_token.register_forward_hook(lambda module, args, out: scales["tokens"].append(out.std().item()))
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: scales["map"].append(out[0].std().item()))
        block.register_forward_hook(lambda module, args, out: scales["tokens"].append(out[1].std().item()))
    for key, module in (("map", model.norm), ("tokens", model.token_norm)):
        module.register_forward_hook(lambda module, args, out, key=key: scales[key].append(out.std().item()))
    model(images(4, 3, 64, 64))
    for values in scales.values():
        assert len(values) == 7
        assert max(values) < 4 * min(values), values


def test_can_be_trained_privately():
    """Per-sample gradients of the whole network, dropout on, add up to its gradient."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model = build()
    assert privacy.validate(model) == []
    held = grad_sample.GradSampleModule(privacy.prepare(model), loss_reduction="sum")
    nn.functional.cross_entropy(held(torch.rand(3, 3, 16, 16)), torch.arange(3), reduction="sum").backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample.sum(0), p.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_mistakes_are_told():
    with pytest.raises(knport.KNPortError, match="form='pairs'; expected 'window'"):
        build(form="pairs")
    with pytest.raises(knport.KNPortError, match="no grid of patches of 4 x 4"):
        build()(torch.randn(1, 3, 18, 16))
