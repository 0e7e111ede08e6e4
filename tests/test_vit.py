"""KN-ViT against timm's ViT, and what is special about it."""

import functools

import pytest
import timm
import torch
from torch import nn

import architectures
import knport
from knport import privacy

SIZES = ("test", "tiny", "small", "base")


def on_meta(name, **options):
    with torch.device("meta"):
        return architectures.create_model(name, **options)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("low_resolution", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_original_within_one_percent(size, low_resolution):
    ours = parameters(on_meta(f"knvit_{size}", low_resolution=low_resolution))
    theirs = parameters(on_meta(architectures.original_of(f"knvit_{size}"), low_resolution=low_resolution))
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("size, count", [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)])
def test_the_competitors_are_timms(size, count):
    ours = on_meta(f"baseline_vit_{size}")
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_{size}_patch16_224")
    assert parameters(ours) == parameters(theirs) == count
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def copied(original, ours):
    """Our weights for timm's: gains and biases of its norms folded into the linear layers behind them."""
    state = {f"tokens.{key}": getattr(original, key) for key in ("cls_token", "pos_embed")}
    state |= {f"patch_embed.{key}": value for key, value in original.patch_embed.proj.state_dict().items()}
    for i, block in enumerate(original.blocks):
        for name, norm, linear in (("attn.qkv", block.norm1, block.attn.qkv), ("mlp.fc1", block.norm2, block.mlp.fc1)):
            state[f"blocks.{i}.{name}.weight"] = linear.weight * norm.weight
            state[f"blocks.{i}.{name}.bias"] = linear.bias + linear.weight @ norm.bias
        for name, linear in (("attn.proj", block.attn.proj), ("mlp.fc2", block.mlp.fc2)):
            state |= {f"blocks.{i}.{name}.{key}": value for key, value in linear.state_dict().items()}
    state["head.weight"] = original.head.weight * original.norm.weight
    state["head.bias"] = original.head.bias + original.head.weight @ original.norm.bias
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize("size", [32, (32, 48), 20], ids=str)
def test_with_windows_of_one_token_it_is_timms_network(size):
    size = (size, size) if isinstance(size, int) else size
    norm = functools.partial(nn.LayerNorm, eps=1e-5)
    original = timm.models.VisionTransformer(
        32, 4, num_classes=5, embed_dim=64, depth=2, num_heads=2, norm_layer=norm, dynamic_img_size=True
    )
    for module in original.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    ours = architectures.vit.KNVisionTransformer(
        64, 2, 2, num_classes=5, low_resolution=True, window=1, patch_window=0, dropout=0.0
    )
    # timm resizes positions in float32
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(copied(original, ours)(x), original(x), rtol=1e-4, atol=1e-5)


def test_the_embedding_of_single_patches_is_kernel_normalized():
    model = architectures.create_model("knvit_test", low_resolution=True, patch_window=1, dropout=0.0)
    x = torch.rand(1, 3, 16, 16)
    patch = x[0, :, 4:8, 8:12]
    normalized = (patch - patch.mean()) / (patch.var(correction=0) + 1e-5).sqrt()
    expected = model.patch_embed.weight.flatten(1) @ normalized.flatten() + model.patch_embed.bias
    torch.testing.assert_close(model.patch_embed(x)[0, :, 1, 2], expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model.patch_embed, knport.KNConv2d)


def test_brightness_of_a_patch_is_seen_with_a_wide_window_only():
    x = torch.rand(1, 3, 32, 32)
    brighter = x.clone()
    brighter[:, :, 8:12, 8:12] += 1
    moved = {}
    for window in (1, 3):
        model = architectures.create_model("knvit_test", low_resolution=True, patch_window=window, dropout=0.0)
        tokens = model.patch_embed(torch.cat([x, brighter]))
        moved[window] = (tokens[1] - tokens[0])[:, 2, 2].norm().item()
    assert moved[1] < 1e-3 < 0.5 < moved[3]


def test_positions_are_learned_for_the_size_asked_for():
    model = architectures.create_model("knvit_test", img_size=(64, 96), num_classes=3).eval()
    assert model.tokens.pos_embed.shape == (1, 1 + 4 * 6, 64)
    assert model(torch.rand(1, 3, 64, 96)).shape == model(torch.rand(1, 3, 96, 64)).shape == (1, 3)
    with pytest.raises(knport.KNPortError, match="no grid of patches of 16 x 16"):
        model(torch.rand(1, 3, 64, 90))


def test_classifier_is_timms():
    model = architectures.create_model("knvit_test", low_resolution=True, num_classes=4)
    assert model.get_classifier() is model.head and model.head.out_features == 4
    model.reset_classifier(0)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 64)
    model.reset_classifier(9)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 9)


@pytest.mark.parametrize("images", [torch.rand, torch.randn], ids=["uniform", "normal"])
@pytest.mark.parametrize("low_resolution", [False, True])
def test_activations_keep_their_scale(low_resolution, images):
    model, scales = architectures.create_model("knvit_test", low_resolution=low_resolution), []
    for module in (model.tokens, *model.blocks, model.norm):
        module.register_forward_hook(lambda module, args, out: scales.append(out.std().item()))
    model(images(4, 3, 64, 64))
    assert len(scales) == 8
    assert max(scales) < 4 * min(scales)


def test_can_be_trained_privately():
    """Per-sample gradients of the whole network, dropout on, add up to its gradient."""
    grad_sample = pytest.importorskip("opacus.grad_sample")
    model = architectures.create_model("knvit_test", low_resolution=True, num_classes=3)
    assert privacy.validate(model) == []
    held = grad_sample.GradSampleModule(privacy.prepare(model), loss_reduction="sum")
    nn.functional.cross_entropy(held(torch.rand(3, 3, 16, 16)), torch.arange(3), reduction="sum").backward()
    for name, p in model.named_parameters():
        assert p.grad_sample.shape == (3, *p.shape)
        torch.testing.assert_close(p.grad_sample.sum(0), p.grad, rtol=1e-3, atol=1e-4, msg=name)
