"""The competitors of kernel normalization on networks that were built with something else."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import pytest
import timm
import torch
import torchvision
from timm.layers import EvoNorm2dS0, FilterResponseNormTlu2d, StdConv2d
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from torch.nn import functional as F

import architectures
import knport
from experiments.sweep_models import smallest
from knport.layers.channels_last import ChannelsLast
from knport.surgery.copying import copy_onto
from knport.surgery.kinds import kind
from knport.surgery.replace import NORMS

CLASSES = {
    "batch": nn.BatchNorm2d,
    "group": nn.GroupNorm,
    "layer": nn.GroupNorm,
    "instance": nn.InstanceNorm2d,
    "local_context": knport.LocalContextNorm,
    "positional": knport.PositionalNorm,
    "group_ws": nn.GroupNorm,
    "frn": FilterResponseNormTlu2d,
    "evonorm_s0": EvoNorm2dS0,
    "none": (),
}
FEW = (1, 1, 1, 1)  # blocks per stage
NETWORKS = {
    "torchvision": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, list(FEW), num_classes=5),
    "fused activations": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "pre-activation": lambda: timm.create_model("resnetv2_50", num_classes=5, layers=FEW),
    "small": lambda: architectures.create_model("cifar_resnet8", num_classes=5),
}
X = torch.zeros(2, 3, 16, 16)


def count(model: nn.Module, kinds) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


def conv_norm_act(norm: nn.Module, act: nn.Module | None = None) -> nn.Sequential:
    act = nn.ReLU() if act is None else act
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, act, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def reason(plan, path: str) -> str:
    return next(v.reason for v in plan.verdicts if v.path == path)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_on_every_network(norm, network):
    model = NETWORKS[network]()
    replaced = knport.replace_norm(model, norm)
    assert type(replaced) is type(model)
    before = count(model, nn.BatchNorm2d)
    assert before > 0, "the original must not change"
    assert count(replaced, CLASSES[norm]) == (before if norm != "none" else 0)
    assert count(replaced, nn.BatchNorm2d) == (before if norm == "batch" else 0)
    twin = copy_onto(replaced, "meta").train()
    out = twin(torch.zeros(2, 3, 64, 64, device="meta"))
    assert out.shape == (2, 5)
    out.sum().backward()
    assert [name for name, p in twin.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm not in ("batch", "none")])
def test_no_image_sees_another(norm):
    model = knport.replace_norm(NETWORKS["small"](), norm).double().train()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(x)[1:], model(x[1:]))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_layernorms_of_tokens_and_channels_last_maps_give_way_too(name, norm):
    options = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)} if "swin" in name else {}
    model = timm.create_model(name, num_classes=5, **options)
    plan = knport.plan_norm(model, norm)
    replaced = copy_onto(plan.apply(model), "meta")
    assert plan.count("norm")["replaced"] == count(model, nn.LayerNorm) - count(replaced, nn.LayerNorm) > 0
    assert replaced(torch.zeros(2, *model.pretrained_cfg["input_size"], device="meta")).shape == (2, 5)


def test_a_norm_of_channels_last_maps_is_the_norm_of_the_same_map():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), torchvision.ops.Permute([0, 2, 3, 1]), nn.LayerNorm(8), nn.Linear(8, 4))
    nn.init.normal_(model[2].weight)
    norm = knport.replace_norm(model, "group", groups=2, example_inputs=X)[2]
    assert isinstance(norm, ChannelsLast) and norm.norm.weight is not model[2].weight
    x = torch.randn(2, 5, 7, 8)
    expected = F.group_norm(x.permute(0, 3, 1, 2), 2, norm.norm.weight, norm.norm.bias).permute(0, 2, 3, 1)
    torch.testing.assert_close(norm(x), expected)


def test_queries_and_keys_are_no_features():
    plan = knport.plan_norm(timm.create_model("test_vit", qk_norm=True), "batch")
    assert "inside attention" in reason(plan, "blocks.0.attn.q_norm")
    assert plan.count("norm") == {"replaced": 13, "kept": 12}


@pytest.mark.slow
@pytest.mark.parametrize("index", range(0, 98, 4))
def test_networks_of_all_kinds(index):
    name = list(smallest().values())[index]
    norm = NORMS[index // 4 % len(NORMS)]
    with torch.device("meta"):
        model = timm.create_model(name)
    x = torch.zeros(2, *model.pretrained_cfg["input_size"], device="meta")
    if not any(kind(module) == "norm" for module in model.modules()):
        with pytest.raises(knport.NothingToConvert):
            knport.replace_norm(model, norm)
        return
    plan = knport.plan_norm(model, norm)
    norms = {path for path, module in model.named_modules() if kind(module) == "norm"}
    assert {v.path for v in plan.verdicts if v.kind == "norm"} >= norms
    assert all(v.reason for v in plan.verdicts)
    assert plan.apply(model).train()(x).shape == model.train()(x).shape


def test_the_fused_activations_stay():
    model = timm.create_model("test_efficientnet", num_classes=5)
    acts = [type(m) for m in model.modules() if isinstance(m, nn.SiLU | nn.ReLU)]
    replaced = knport.replace_norm(model, "group")
    assert [type(m) for m in replaced.modules() if isinstance(m, nn.SiLU | nn.ReLU)] == acts


def test_gains_biases_and_flags_stay():
    model = conv_norm_act(nn.BatchNorm2d(8, eps=1e-3)).double().eval()
    nn.init.normal_(model[1].weight).requires_grad_(False)
    for norm in ("group", "frn", "evonorm_s0"):
        replaced = knport.replace_norm(model, norm)[1]
        assert torch.equal(replaced.weight, model[1].weight)
        assert (replaced.eps, replaced.training, replaced.weight.requires_grad) == (1e-3, False, False)
        assert {p.dtype for p in replaced.parameters()} == {torch.float64}
    inplace = knport.replace_norm(model, "group", inplace=True)
    assert inplace is model and model[1].weight.requires_grad is False


def test_hooks_stay():
    model, seen = conv_norm_act(nn.BatchNorm2d(8)), []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    knport.replace_norm(model, "group", inplace=True)(X)
    assert seen == [1]


def test_groups_hold_two_channels_or_more():
    sizes = {8: 4, 16: 8, 24: 12, 48: 24, 64: 32, 96: 32, 128: 32, 3: 1}
    for channels, groups in sizes.items():
        model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))
        assert knport.replace_norm(model, "group", example_inputs=X)[1].num_groups == groups


@pytest.mark.parametrize(
    ("options", "groups"),
    [({"groups": 4}, 4), ({"groups": 1}, 1), ({"groups": 5}, 4), ({"group_size": 6}, 8), ({"group_size": 1}, 48)],
)
def test_groups_by_number_or_size(options, groups):
    model = nn.Sequential(nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48))
    plan = knport.plan_norm(model, "group", example_inputs=X, **options)
    assert plan.apply(model)[1].num_groups == groups
    assert f"of {groups} groups of {48 // groups} channels" in str(plan)


def test_one_position_per_image_in_groups_of_two_would_be_a_constant():
    model = timm.create_model("test_convnext")
    assert "one position per image" in reason(knport.plan_norm(model, "group"), "head.norm")
    assert "one position per image" in reason(knport.plan_norm(model, "instance"), "head.norm")
    assert reason(knport.plan_norm(model, "group", groups=8), "head.norm").startswith("becomes GroupNorm of 8 groups")


class TestActivations:
    """FRN brings a threshold, EvoNorm a non-linearity of its own: what stood there goes where it can."""

    @pytest.mark.parametrize("norm", ["frn", "evonorm_s0"])
    def test_a_relu_that_only_this_norm_has_goes(self, norm):
        new = knport.replace_norm(conv_norm_act(nn.BatchNorm2d(8)), norm)
        assert isinstance(new[1], CLASSES[norm]) and new[1].apply_act
        assert isinstance(new[2], nn.Identity)

    def test_a_threshold_is_no_silu(self):
        model = conv_norm_act(nn.BatchNorm2d(8), nn.SiLU())
        new = knport.replace_norm(model, "frn")
        assert isinstance(new[2], nn.SiLU) and new[1].tau is None
        new = knport.replace_norm(model, "evonorm_s0")
        assert isinstance(new[2], nn.Identity) and new[1].v is not None

    def test_fused_activations_go(self):
        new = knport.replace_norm(timm.create_model("resnetv2_50", layers=FEW), "evonorm_s0")
        assert count(new, nn.ReLU) == 0
        assert all(m.apply_act for m in new.modules() if isinstance(m, EvoNorm2dS0))

    def test_a_relu_that_others_use_stays(self):
        model = NETWORKS["torchvision"]()
        for norm, own in (("frn", False), ("evonorm_s0", True)):
            plan = knport.plan_norm(model, norm)
            assert "ReLU stays behind it: it is called 2 times" in reason(plan, "layer1.0.bn1")
            new = plan.apply(model)
            assert isinstance(new.layer1[0].relu, nn.ReLU) and new.layer1[0].bn1.apply_act is own

    def test_functions_and_gates_stay(self):
        class Net(nn.Sequential):
            def forward(self, x):
                return F.relu(self[1](self[0](x)))

        plan = knport.plan_norm(Net(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), "frn", example_inputs=X)
        assert "it is a function" in reason(plan, "1")
        plan = knport.plan_norm(conv_norm_act(nn.BatchNorm2d(8), nn.Sigmoid()), "evonorm_s0")
        assert "Sigmoid stays" in reason(plan, "1")

    @pytest.mark.parametrize(
        ("norm", "act"),
        [
            (EvoNorm2dS0(8, groups=4), nn.SiLU),
            (FilterResponseNormTlu2d(8), nn.ReLU),
            (EvoNorm2dS0(8, groups=4, apply_act=False), None),
        ],
    )
    def test_a_norm_with_an_activation_of_its_own_leaves_the_plain_form(self, norm, act):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1))
        new = knport.replace_norm(model, "group", example_inputs=X)[1]
        assert [type(m) for m in new.modules() if not list(m.children())] == [nn.GroupNorm, *([act] if act else [])]
        again = "frn" if act is nn.ReLU else "evonorm_s0"
        assert not knport.plan_norm(model, again, example_inputs=X).changes


class TestWeightStandardization:
    def test_the_filters_are_standardized_and_the_weights_kept(self):
        model = conv_norm_act(nn.BatchNorm2d(8))
        new = knport.replace_norm(model, "group_ws")
        assert isinstance(new[0], StdConv2d) and torch.equal(new[0].weight, model[0].weight)
        flat = model[0].weight.detach().flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        x = torch.randn(2, 3, 9, 9)
        expected = F.conv2d(x, weight.view_as(model[0].weight), model[0].bias)
        torch.testing.assert_close(new[0](x), expected, rtol=1e-4, atol=1e-4)

    def test_the_arguments_of_the_convolution_stay(self):
        conv = nn.Conv2d(4, 8, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2), groups=2, bias=False)
        new = knport.replace_norm(
            nn.Sequential(conv, nn.BatchNorm2d(8)), "group_ws", example_inputs=X.new_zeros(1, 4, 16, 16)
        )
        assert new[0].extra_repr() == conv.extra_repr()

    def test_gates_are_kept(self):
        plan = knport.plan_norm(timm.create_model("test_efficientnet"), "group_ws")
        assert "squeeze-excite" in reason(plan, "blocks.3.0.se.conv_reduce")

    @pytest.mark.parametrize(
        ("conv", "word"),
        [
            (nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
            (nn.Conv2d(3, 6, 1, groups=3), "no variance"),
            (nn.ConvTranspose2d(3, 8, 1), "transposed"),
            (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 1)), "parametrized"),
        ],
    )
    def test_convolutions_that_it_does_not_fit_are_kept(self, conv, word):
        model = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
        plan = knport.plan_norm(model, "group_ws", example_inputs=X)
        assert word in reason(plan, "0")
        assert type(plan.apply(model)[0]) is type(conv)

    def test_a_convolution_far_from_the_norms_is_kept(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
        new = knport.replace_norm(model, "group_ws", example_inputs=X)
        assert type(new[0]) is nn.Conv2d and type(new[2]) is StdConv2d


def test_no_norm_and_in_place_activations_leave_the_skip_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x):
            return x + self.act(self.norm(x))

    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    torch.testing.assert_close(knport.replace_norm(Block(), "none", example_inputs=x)(x), before + before.relu())
    assert torch.equal(x, before)


def test_without_norms_functions_in_place_are_refused():
    class Block(nn.Sequential):
        def forward(self, x):
            return x + F.relu(self[0](x), inplace=True)

    with pytest.raises(knport.UnsupportedModule, match="works in place on what 0 made"):
        knport.replace_norm(Block(nn.BatchNorm2d(3)), "none", example_inputs=X)
    knport.replace_norm(Block(nn.BatchNorm2d(3)), "layer", example_inputs=X)


def test_one_module_under_two_names_is_replaced_once():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), norm)
    plan = knport.plan_norm(model, "group", example_inputs=X)
    assert plan.verdicts[0].aliases == ("3",)
    replaced = plan.apply(model)
    assert isinstance(replaced[1], nn.GroupNorm) and replaced[1] is replaced[3]


def test_what_cannot_be_replaced_is_said():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.uncalled, self.norm = Odd(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.planes, self.response = nn.LayerNorm((3, 16, 16)), GlobalResponseNorm(3, channels_last=False)

        def forward(self, x):
            return F.instance_norm(self.norm(self.response(self.planes(self.odd(x)))))

    plan = knport.plan_norm(Net(), "group", example_inputs=X)
    words = {
        "odd": "own forward",
        "uncalled": "never called",
        "planes": "several dimensions",
        "response": "more than a norm",
    }
    for path, word in words.items():
        assert word in reason(plan, path)
    assert "called as a function" in reason(plan, "instance_norm()")
    assert [v.path for v in plan.verdicts if v.changes] == ["norm"]


def test_frozen_batchnorm_hands_its_constants_on():
    frozen = torchvision.ops.FrozenBatchNorm2d(8)
    frozen.weight.fill_(2.0)
    new = knport.replace_norm(conv_norm_act(frozen), "group")[1]
    assert new.weight.eq(2).all() and not new.weight.requires_grad and len(list(new.buffers())) == 0


@pytest.mark.parametrize(
    ("options", "expected"), [({}, (2, (227, 227))), ({"group_size": 3, "window_size": (5, 7)}, (3, (5, 7)))]
)
def test_the_windows_of_local_context_norm(options, expected):
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12))
    norm = knport.replace_norm(model, "local_context", example_inputs=X, **options)[1]
    assert (norm.channels_per_group, norm.window_size) == expected
    odd = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    assert knport.replace_norm(odd, "local_context", example_inputs=X)[1].channels_per_group == 5


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d, (2, 3, 9)), (nn.Conv3d, (2, 3, 4, 5, 6))])
def test_other_dimensions(conv, shape):
    model = nn.Sequential(conv(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU())
    for norm in ("batch", "group", "layer", "instance"):
        assert knport.replace_norm(model, norm, example_inputs=torch.zeros(shape))(torch.zeros(shape)).shape[1] == 8
    with pytest.raises(knport.NothingToConvert, match="takes 2D maps"):
        knport.replace_norm(model, "frn", example_inputs=torch.zeros(shape))


class TestFilters:
    @pytest.mark.parametrize(
        ("filters", "changed"),
        [
            ({"include": "layer1"}, ["layer1.0.bn1", "layer1.0.bn2"]),
            ({"include": ["bn1", "re:layer4.*"], "exclude": "*.bn2"}, ["bn1", "layer4.0.bn1", "layer4.0.downsample.1"]),
            ({"include": lambda name, module: module.num_features == 64}, ["bn1", "layer1.0.bn1", "layer1.0.bn2"]),
            ({"exclude": [torchvision.models.resnet.BasicBlock]}, ["bn1"]),
        ],
    )
    def test_include_and_exclude(self, filters, changed):
        plan = knport.plan_norm(NETWORKS["torchvision"](), "group", **filters)
        assert [v.path for v in plan.verdicts if v.changes] == changed

    def test_the_reason_says_by_what(self):
        plan = knport.plan_norm(NETWORKS["torchvision"](), "group", exclude="layer3")
        assert reason(plan, "layer3.0.bn1") == "excluded by 'layer3'"

    def test_one_that_matches_nothing_is_an_error_with_near_names(self):
        with pytest.raises(knport.UnmatchedPattern, match=r"near names: .*layer1"):
            knport.replace_norm(NETWORKS["torchvision"](), "group", include="layr1")

    def test_a_convolution_is_no_norm(self):
        with pytest.raises(knport.UnmatchedPattern, match="include='conv1' matches no norm"):
            knport.replace_norm(NETWORKS["torchvision"](), "group", include="conv1")
        kept = knport.replace_norm(NETWORKS["torchvision"](), "group_ws", exclude="conv1").conv1
        assert type(kept) is nn.Conv2d


def test_what_is_there_already_is_left():
    model = NETWORKS["torchvision"]()
    same = knport.replace_norm(model, "batch")
    assert same is not model and same.bn1.running_mean is not None
    plan = knport.plan_norm(model, "batch")
    assert not plan.changes and "batch normalization already" in str(plan)
    assert knport.replace_norm(model, "batch", inplace=True) is model
    vit = knport.plan_norm(timm.create_model("test_vit"), "layer")
    assert vit.count("norm") == {"already": 13}


def test_the_plan_reads_well_and_is_json():
    plan = knport.plan_norm(NETWORKS["torchvision"](), "evonorm_s0", groups=8)
    text = str(plan)
    assert "nothing has been changed yet" in text and "New norm: evonorm_s0 (groups=8)" in text
    assert "norms         12: 12 replaced" in text
    data = json.loads(plan.to_json())
    assert data["version"] == 1 and data["options"]["groups"] == 8 and data["verdicts"][0]["path"] == "bn1"
    assert text == str(knport.plan_norm(NETWORKS["torchvision"](), "evonorm_s0", groups=8))


def test_a_plan_fits_only_models_of_its_structure():
    plan = knport.plan_norm(NETWORKS["small"](), "group")
    with pytest.raises(knport.KNPortError, match="was made for another"):
        plan.apply(architectures.create_model("cifar_resnet8", num_classes=6))


def test_copies_and_pickles():
    model = knport.replace_norm(timm.create_model("test_convnext"), "evonorm_s0").eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), model(x))


def test_mistakes_are_told():
    model = conv_norm_act(nn.BatchNorm2d(8))
    with pytest.raises(knport.UnknownName, match="did you mean 'group'"):
        knport.replace_norm(model, "grup")
    with pytest.raises(knport.NothingToConvert, match="has no norm that 'group' could replace"):
        knport.replace_norm(nn.Linear(2, 2), "group")
    with pytest.raises(knport.UnsupportedModule, match="wrap it"):
        knport.replace_norm(nn.BatchNorm2d(4), "group")
    with pytest.raises(knport.AlreadyWrapped):
        knport.replace_norm(nn.DataParallel(model), "group")
    with pytest.raises(knport.KNPortError, match="groups=4 is no option of norm 'layer'; it is one of 'group'"):
        knport.replace_norm(model, "layer", groups=4)
    with pytest.raises(knport.KNPortError, match="two ways"):
        knport.replace_norm(model, "group", groups=4, group_size=2)
    with pytest.raises(knport.KNPortError, match="group_size=0"):
        knport.replace_norm(model, "group", group_size=0)


def test_without_timm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(ImportError, match="pip install timm"):
        knport.replace_norm(conv_norm_act(nn.BatchNorm2d(8)), "frn")


def test_all_in_the_context_of_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("test_vit")
        assert all(p.is_meta for p in knport.replace_norm(model, "positional").parameters())
        rows = {v.path: v for v in knport.plan(model).verdicts}
    assert rows["blocks.0.norm1"].verdict == "absorbed" and rows["blocks.0.attn.qkv"].norm_window == 3
