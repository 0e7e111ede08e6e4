"""knport.convert on tokens and channels-last maps: norm and linear layer, exactly where that is possible."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from timm.layers import LayerNorm2d, RmsNorm
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from knport import KNConfig, KNConv2d, KNLinear, convert, plan
from knport.surgery.plan import structure_of
from knport.surgery.read import read
from knport.surgery.read_fx import read_fx
from knport.surgery.read_run import read_run

EXACT = KNConfig(enlarge="none", dropout=0.0)
NETWORKS = {  # build, input size, how many norms have linear layers that do their work
    "timm ViT": (lambda: timm.create_model("test_vit"), 160, 12),
    "timm ConvNeXt": (lambda: timm.create_model("test_convnext"), 64, 9),
    "timm ConvNeXt of 1x1 convolutions": (lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1)), 64, 4),
    "timm Swin": (lambda: _timm_swin(), 56, 9),
    "timm Mixer": (lambda: timm.create_model("mixer_s32_224", img_size=64), 64, 8),
    "torchvision ViT": (lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64), 32, 2),
    "torchvision ConvNeXt": (
        lambda: torchvision.models.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)]),
        64,
        3,
    ),
    "torchvision Swin": (lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [7, 7]), 64, 5),
}


def _timm_swin() -> nn.Module:
    options = {"depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4), "img_size": 56}
    return timm.create_model("swin_tiny_patch4_window7_224", **options)


def shaken(model: nn.Module) -> nn.Module:
    """With gains, biases and a classifier that a training would have changed."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 or "gamma" in name or "layer_scale" in name or not parameter.any():
            nn.init.normal_(parameter, 0.5, 0.3)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_at_window_1_a_converted_network_computes_what_the_original_did(name):
    build, side, count = NETWORKS[name]
    model, x = shaken(build()), torch.randn(2, 3, side, side)
    made = plan(model, EXACT)
    new = made.apply(model)
    assert sum(isinstance(m, KNLinear | KNConv2d) for m in new.modules()) >= count
    assert made.count("norm")["absorbed"] == count
    with torch.no_grad():
        old = model(x)
        assert old.std() > 0.01
        torch.testing.assert_close(new(x), old, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_windows_shapes_stay_no_image_sees_another_and_everything_learns(name):
    build, side, _ = NETWORKS[name]
    model = shaken(build())
    for module in model.modules():  # other randomness is not the question
        for drop in ("p", "drop_prob"):
            if hasattr(module, drop):
                setattr(module, drop, 0.0)
    new, x = convert(model, KNConfig(dropout=0.0)).train(), torch.randn(2, 3, side, side)
    out = new(x)
    assert out.shape == model(x).shape
    torch.testing.assert_close(new(x[1:]), out[1:], rtol=1e-4, atol=1e-4 * out.abs().max().item())
    out.square().sum().backward()
    assert [n for n, p in new.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["timm ConvNeXt", "timm Swin", "timm Mixer", "torchvision Swin"])
def test_both_readers_see_the_same_layouts(name, monkeypatch):
    build, side, _ = NETWORKS[name]
    model, rows = build(), []
    for reader in (read_fx, read_run):
        monkeypatch.setattr("knport.surgery.read_all", lambda m, inputs, _, by=reader: read(m, inputs, readers=(by,)))
        made = plan(model, example_inputs=torch.zeros(2, 3, side, side))
        rows.append([(v.path, v.verdict, v.norm_window, v.prefix_tokens, v.fold) for v in made.verdicts])
    assert rows[0] == rows[1]


# --- layouts


class Tokens(nn.Module):
    """Patches of an image, class tokens, and `arrange` between norm and linear layer."""

    def __init__(self, prefix: int = 0, arrange=lambda x: x, before=lambda x: x, norm=nn.LayerNorm):
        super().__init__()
        self.patches, self.norm, self.fc = nn.Conv2d(3, 8, 4, 4), norm(8), nn.Linear(8, 6)
        self.prefix = nn.Parameter(torch.zeros(1, prefix, 8)) if prefix else None
        self.arrange, self.before = arrange, before

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        return self.fc(self.arrange(self.norm(self.before(x))))


def linear(model: nn.Module, side=(32, 32)) -> KNLinear:
    return convert(model, example_inputs=torch.zeros(2, 3, *side)).fc


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_grid_and_the_tokens_before_it_are_recognised(prefix):
    fc = linear(Tokens(prefix))
    assert isinstance(fc, KNLinear) and fc.norm_window == (3, 3) and fc.prefix_tokens == prefix
    assert fc.grid_size is None
    assert linear(Tokens(prefix), (32, 48)).grid_size == (8, 12)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.view(2, 8, 8, -1),
        lambda x: x[:, None].flatten(1, 2),
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: torch.roll(torch.roll(x, 3, 1), -3, 1),
        lambda x: nn.functional.pad(x, (0, 0, 0, 0)),
    ],
)
def test_what_keeps_the_order_keeps_the_window(arrange):
    assert linear(Tokens(arrange=arrange)).norm_window == (3, 3)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.view(2, 4, 2, 4, 2, 8).transpose(2, 3).reshape(32, 4, 8),  # windows
        lambda x: torch.roll(x, 3, 1),
        lambda x: x.flip(1),
        lambda x: x[:, ::2],
        lambda x: x.view(2, 8, 8, 8).transpose(1, 2),
    ],
)
def test_what_does_not_leaves_each_token_by_itself_and_says_so(arrange):
    model = Tokens(arrange=arrange)
    assert linear(model).norm_window == (1, 1)
    row = next(v for v in plan(model, example_inputs=torch.zeros(2, 3, 32, 32)).verdicts if v.path == "fc")
    assert "statistics of each position: its tokens are windows, or shifted" in row.reason


def test_tokens_from_nowhere_have_no_window():
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    new = convert(model, example_inputs=torch.zeros(2, 16, 8))
    assert new[1].norm_window == (1, 1)


def test_a_window_of_the_configuration():
    image = torch.zeros(2, 3, 32, 32)
    for config, window in (
        (KNConfig(norm_window=5), (5, 5)),
        (KNConfig(norm_window=(1, 3)), (1, 3)),
        (KNConfig(enlarge="none"), (1, 1)),
        (KNConfig(enlarge="none", norm_window=3), (3, 3)),
    ):
        assert convert(Tokens(1), config, example_inputs=image).fc.norm_window == window


# --- what is refused, and why


@pytest.mark.parametrize(
    ("arrange", "why"),
    [
        (lambda x: x.transpose(1, 2)[..., :8], "does not read its channels"),
        (lambda x: x.flip(-1), "does not read its channels"),
        (lambda x: nn.functional.pad(x, (0, 0, 1, 0)), "does not read its channels"),
        (lambda x: x + 1, "read by the function add"),
        (lambda x: nn.functional.gelu(x), "read by the function gelu"),
    ],
)
def test_a_norm_whose_vectors_do_not_arrive_whole_is_kept(arrange, why):
    verdicts = {v.path: v for v in plan(Tokens(arrange=arrange), example_inputs=torch.zeros(2, 3, 32, 32)).verdicts}
    assert verdicts["norm"].verdict == "kept" and why in verdicts["norm"].reason


def test_a_linear_layer_that_reads_two_norms_is_left():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.b(self.fc(self.a(x))))

    verdicts = {v.path: v for v in plan(Two(), example_inputs=torch.zeros(2, 5, 8)).verdicts}
    assert "reads other norms too" in verdicts["a"].reason and verdicts["b"].verdict == "kept"


def test_filters_name_linear_layers_too():
    image = torch.zeros(2, 3, 32, 32)
    made = plan(Tokens(), exclude="fc", example_inputs=image)
    assert not made.changes and "excluded by 'fc'" in made.verdicts[1].reason
    assert isinstance(convert(Tokens(), include="norm", example_inputs=image).fc, KNLinear)
    assert isinstance(convert(Tokens(), include=nn.Linear, example_inputs=image).fc, KNLinear)


# --- gains and biases


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False), lambda n: nn.LayerNorm(n, bias=False)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_gain_and_bias_are_folded(norm, bias):
    model = shaken(nn.Sequential(norm(8), nn.Linear(8, 4, bias=bias)).double())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    new = convert(model, EXACT, example_inputs=x)
    assert type(new[0]) is nn.Identity and new[1].eps == model[0].eps
    torch.testing.assert_close(new(x), model(x))


@pytest.mark.parametrize("groups", [1, 4])
def test_a_layernorm_of_maps_is_folded_into_a_1x1_convolution(groups):
    model = shaken(nn.Sequential(LayerNorm2d(8), nn.Conv2d(8, 12, 1, stride=2, groups=groups), nn.Conv2d(12, 5, 3)))
    x = torch.randn(2, 8, 7, 6)
    new = convert(model, EXACT, example_inputs=x)
    assert isinstance(new[1], KNConv2d)
    torch.testing.assert_close(new(x), model(x), atol=1e-5, rtol=1e-5)
    assert convert(model, example_inputs=x)[1].kernel_size == (2, 2)


def test_an_rmsnorm_keeps_its_gain():
    model = shaken(nn.Sequential(RmsNorm(8), nn.Linear(8, 4)))
    new = convert(model, EXACT, example_inputs=torch.zeros(2, 5, 8))
    torch.testing.assert_close(new[1].weight, model[1].weight * model[0].weight)
    x = torch.randn(2, 5, 8)
    x = x - x.mean(-1, keepdim=True)  # where it is the same as a LayerNorm
    torch.testing.assert_close(new(x), model(x), atol=1e-5, rtol=1e-5)


# --- BatchNorm of tokens and features


class LinearNorm(nn.Module):
    """LeViT's: a BatchNorm over all tokens of all images."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.act, self.out = (
            nn.Linear(8, 6, bias=False),
            nn.BatchNorm1d(6),
            nn.GELU(),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = self.fc(x)
        return self.out(self.act(self.bn(x.flatten(0, 1)).reshape_as(x)))


def test_a_batchnorm_of_tokens_goes():
    x = torch.randn(3, 5, 8)
    new = convert(LinearNorm(), KNConfig(dropout=0.0), example_inputs=x)
    assert isinstance(new.fc, KNLinear) and isinstance(new.out, KNLinear) and isinstance(new.bn, nn.Identity)
    torch.testing.assert_close(new(x)[:1], new(x[:1]))


def test_a_batchnorm_of_pooled_features_goes_and_its_classifier_normalizes():
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(*body, nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 5))
    new = convert(model, KNConfig(dropout=0.0), example_inputs=torch.zeros(2, 3, 16, 16)).eval()
    assert isinstance(new[5], KNLinear) and isinstance(new[3], nn.Identity) and type(new[0]) is nn.Conv2d


def test_the_classifier_keeps_the_norm_before_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Unflatten(2, (4, 4)), LayerNorm2d(8))
    model = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 5))
    rows = {v.path: v for v in plan(model, example_inputs=torch.zeros(2, 3, 16, 16)).verdicts}
    assert rows["3"].verdict == "kept" and "last norm before the head" in rows["3"].reason and "4" not in rows


def test_converting_twice_leaves_linear_layers_alone():
    new = convert(timm.create_model("test_vit"))
    with pytest.warns(UserWarning, match="converted already"):
        again = convert(new)
    assert structure_of(again) == structure_of(new)
