"""The fifteen ways in which tools that rewrite models go wrong, each with the networks on which they do.

What needs no numbers runs on the meta device.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_model, save_model
from timm.layers import BatchNormAct2d, EvoNorm2dS0
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from knport import AlreadyWrapped, KernelNorm2d, KNConfig, KNConv2d, NothingToConvert, convert, plan
from knport.surgery.copying import copy_onto
from knport.surgery.graph import is_map
from knport.surgery.kinds import kind
from knport.surgery.roles import module_role

FEW = (2, 1, 1, 1)  # blocks per stage
NO_DROPOUT = KNConfig(dropout=0.0)
X = torch.zeros(2, 3, 16, 16)


def on_meta(build: Callable, *args, **options) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **options)


def timm_model(name: str, **options) -> nn.Module:
    return on_meta(timm.create_model, name, **options)


def tv_model(name: str, **options) -> nn.Module:
    return on_meta(torchvision.models.get_model, name, weights=None, **options)


def shapes(out: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def calls(model: nn.Module, *inputs: Tensor) -> dict[str, tuple[tuple, tuple]]:
    """path of every module called with a tensor -> shapes of its input and output."""
    seen = {}
    for path, module in model.named_modules():
        module.register_forward_hook(
            lambda _, args, out, path=path: seen.update(
                {path: (tuple(args[0].shape), tuple(out.shape))}
                if args and isinstance(args[0], Tensor) and isinstance(out, Tensor)
                else {}
            )
        )
    with torch.no_grad():
        model(*inputs)
    return seen


def meta(*size: int) -> Tensor:
    return torch.zeros(*size, device="meta")


def norms_in(model: nn.Module) -> set[str]:
    """By torch's classes and by name, not by knport's own rule."""
    kinds = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm2d)
    return {path for path, module in model.named_modules() if isinstance(module, kinds)}


# 1
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "densenet121", "resnetv2_50", "resnetv2_50d_evos"])
def test_01_activations_inside_norms_are_neither_lost_nor_skipped(name):
    model = timm_model(name)
    new = convert(model)
    acts = [Counter(type(m).__name__ for m in net.modules() if module_role(m) == "act") for net in (model, new)]
    if name == "resnetv2_50d_evos":  # norm and activation in one formula
        inside = [m for m in model.modules() if isinstance(m, EvoNorm2dS0) and m.apply_act]
        assert acts[1] == acts[0] + Counter(SiLU=len(inside)) and len(inside) > 10
        assert "SiLU takes the place of the activation in it" in str(plan(model))
    else:
        assert acts[0] == acts[1] and sum(isinstance(m, BatchNormAct2d) for m in model.modules()) > 10
    assert not any(isinstance(m, _BatchNorm | EvoNorm2dS0) for m in new.modules())


# 2
class PreActivation(nn.Module):
    def __init__(self, inplace: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.act, self.conv = nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv(self.act(self.norm(x)))


@pytest.mark.parametrize(
    "build", [PreActivation, lambda inplace: timm.create_model("resnetv2_50", layers=(1, 1), channels=(16, 16))]
)
def test_02_no_activation_in_place_edits_a_skip(build):
    torch.manual_seed(0)
    model = build(inplace=True)
    assert any(getattr(m, "inplace", False) for m in model.modules())
    new, x = convert(model, NO_DROPOUT).eval(), torch.randn(2, 3, 32, 32)
    careful = copy.deepcopy(new)
    for module in careful.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    before = x.clone()
    with torch.no_grad():
        assert torch.equal(new(x), careful(x)) and torch.equal(x, before)


# 3
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnety_004", "legacy_seresnet18"])
def test_03_convolutions_on_1x1_maps_are_not_enlarged(name):
    model = timm_model(name)
    new = convert(model)
    small = [path for path, (x, _) in calls(model, meta(2, 3, 224, 224)).items() if x[2:] == (1, 1)]
    convs = [path for path in small if isinstance(model.get_submodule(path), nn.Conv2d)]
    assert len(convs) > 5
    assert all(type(new.get_submodule(path)) is type(model.get_submodule(path)) for path in convs)


# 4
@pytest.mark.parametrize("side", [224, 225, 97])
def test_04_even_kernels_keep_every_map_and_what_was_convolved(side):
    model = on_meta(torchvision.models.resnet50)
    before, after = (calls(net, meta(1, 3, side, side)) for net in (model, convert(model)))
    convs = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [after[path] for path in convs] == [before[path] for path in convs]


@pytest.mark.parametrize("side", [8, 9])
def test_04_an_enlarged_stride_2_shortcut_convolves_as_before(side):
    block = torchvision.models.resnet.Bottleneck(
        8, 4, stride=2, downsample=nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    )
    new, x = convert(block, example_inputs=torch.zeros(1, 8, side, side)), torch.randn(2, 8, side, side)
    for path in ("conv1", "downsample.0"):
        old, ours = block.get_submodule(path), new.get_submodule(path)
        assert old.kernel_size == (1, 1) and ours.kernel_size == (2, 2)
        (top, bottom), (left, right) = ours.padding
        y = F.conv2d(F.pad(x, (left, right, top, bottom)), ours.weight, stride=ours.stride)
        torch.testing.assert_close(y, old(x), atol=1e-5, rtol=0)


# 5
class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.again = self.conv

    def forward(self, x):
        return self.norm(self.conv(x)) + self.again(2 * x)


NETWORKS_THAT_SHARE = {
    "toy": Reused,
    "coat_lite_tiny": lambda: timm_model("coat_lite_tiny"),
    "coat_tiny": lambda: timm_model("coat_tiny"),
    "retinanet_resnet50_fpn_v2": lambda: torchvision.models.get_model(
        "retinanet_resnet50_fpn_v2", weights=None, weights_backbone=None, min_size=64, max_size=64
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "net" in n else ()) for n in NETWORKS_THAT_SHARE]
)
def test_05_a_module_called_twice_or_named_twice_stays_one_module(name):
    model = NETWORKS_THAT_SHARE[name]()
    new = convert(model)
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    for names in paths.values():
        assert len({id(new.get_submodule(path)) for path in names}) == 1, names
    if name == "toy":  # the second call has no norm: the convolution stays as it is for both
        assert type(new.conv) is nn.Conv2d and isinstance(new.norm, KernelNorm2d)
    assert not any(isinstance(m, _BatchNorm) for m in new.modules())


# 6
def test_06_train_and_eval_stay_two_modes():
    torch.manual_seed(0)
    new = convert(
        timm.create_model(
            "convnext_atto", depths=(2, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.9, ls_init_value=1.0
        )
    )
    x = torch.randn(4, 3, 32, 32)
    nn.init.normal_(new.head.fc.weight)
    with torch.no_grad():
        assert torch.equal(new.eval()(x), new(x))
        assert not torch.equal(new.train()(x), new(x))
        assert torch.equal(new.eval()(x), new(x))


# 7
@pytest.mark.parametrize("name", ["timm/coat_tiny", "torchvision/swin_t", "torchvision/googlenet"])
def test_07_class_methods_aliases_and_state_stay(name):
    library, name = name.split("/")
    model = timm_model(name) if library == "timm" else tv_model(name, **_no_init(name))
    new = convert(model, KNConfig(enlarge="none"))
    old_state, new_state = model.state_dict(), new.state_dict()
    assert type(new) is type(model)
    norms = tuple(
        f"{v.path}." for v in plan(model, KNConfig(enlarge="none")).verdicts if v.kind == "norm" and v.changes
    )
    assert {key for key in old_state if key not in new_state} <= {key for key in old_state if _under(key, norms, model)}
    assert all(key.endswith(".bias") for key in new_state if key not in old_state)
    assert all(new_state[key].shape == value.shape for key, value in old_state.items() if key in new_state)
    if library == "timm":
        new.reset_classifier(10)
        assert new(meta(1, 3, 224, 224)).shape == (1, 10)


def _no_init(name: str) -> dict[str, bool]:
    return {"init_weights": False} if name == "googlenet" else {}


def _under(key: str, norms: tuple[str, ...], model: nn.Module) -> bool:
    """Whether a state_dict key belongs to one of the norms, under any of its names."""
    owner = model.get_submodule(key.rpartition(".")[0])
    return any(owner is model.get_submodule(norm[:-1]) for norm in norms)


# 8
def test_08_hooks_and_parametrizations_survive():
    block = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())
    model, fired = nn.Sequential(block, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), []
    for path in ("", "0", "0.0", "0.1", "1"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))
    new = convert(model, example_inputs=X)
    assert fired == []
    new(X)
    assert fired == ["0.0", "0.1", "0", "1", ""]
    assert torch.nn.utils.parametrize.is_parametrized(new[0][0], "weight") and isinstance(new[1], KNConv2d)
    reasons = {v.path: v.reason for v in plan(model, example_inputs=X).verdicts}
    assert "parametrized" in reasons["0.0"] and "its work is done by 1" in reasons["0.1"]
    torch.testing.assert_close(new[0][0](X + 1), model[0][0](X + 1))


# 9
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resnetv2_50x1_bit", "StdConv2d"),
        ("nf_resnet50", "ScaledStdConv2d"),
        ("tf_mixnet_s", "Conv2dSame"),
        ("tf_efficientnet_cc_b0_4e", "CondConv2d"),
    ],
)
def test_09_convolutions_with_a_forward_of_their_own_are_kept_and_reported(name, word):
    model = timm_model(name)
    made = plan(model)
    special = {path for path, m in model.named_modules() if type(m).__name__ == word}
    assert special
    for verdict in made.verdicts:
        if verdict.path in special:
            assert verdict.verdict == "kept" and word in verdict.reason, verdict
    assert special <= {v.path for v in made.verdicts}
    if name == "nf_resnet50":
        with pytest.raises(NothingToConvert, match="no normalization"):
            convert(model)
        return
    new = made.apply(model)
    assert all(type(new.get_submodule(path)).__name__ == word for path in special)
    assert not any(isinstance(m, _BatchNorm | nn.GroupNorm) for m in new.modules())
    x = meta(2, *model.pretrained_cfg["input_size"])
    assert new(x).shape == model(x).shape


# 10
@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_10_layers_that_are_only_read_for_their_weights_are_not_converted(name):
    model = tv_model(name)
    called = calls(copy_onto(model, "meta"), meta(2, 3, 224, 224))
    unused = {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and path not in called}
    assert len(unused) >= 12
    rows = {v.path: v for v in plan(model).verdicts}
    assert all(rows[path].verdict == "kept" and "never called" in rows[path].reason for path in unused)


# 11
@pytest.mark.parametrize("name", ["timm/convnext_atto", "torchvision/mobilenet_v2", "timm/mobilevit_xxs"])
def test_11_the_plan_sees_every_norm_that_a_hook_sees(name):
    library, name = name.split("/")
    model = timm_model(name) if library == "timm" else tv_model(name)
    called = set(calls(copy_onto(model, "meta"), meta(2, 3, 224, 224))) & norms_in(model)
    rows = {v.path: v for v in plan(model).verdicts if v.kind == "norm"}
    assert len(called) > 15 and called <= set(rows)
    assert not any("never called" in rows[path].reason for path in called)


# 12
UNTRACEABLE = ["convit_tiny", "twins_svt_small", "hiera_tiny_224"]


@pytest.mark.parametrize("name", [*UNTRACEABLE, pytest.param("gemma4_vit_167m", marks=pytest.mark.slow)])
def test_12_forwards_that_cannot_be_traced_are_executed(name):
    model = timm_model(name)
    x = meta(2, *model.pretrained_cfg["input_size"])
    made = plan(model)
    assert norms_in(model) <= {v.path for v in made.verdicts}
    if name == "gemma4_vit_167m":  # its linear layers clamp what they read: every norm is kept, with the reason
        assert not made.changes and all("clamp" in v.reason or "read by" in v.reason for v in made.verdicts[:9])
        return
    assert shapes(made.apply(model)(x)) == shapes(model(x))
    assert made.count("linear")["KNLinear"] > 10


def test_12_outputs_in_tuples_and_auxiliary_heads():
    model = tv_model("googlenet", init_weights=False)
    new = convert(model)
    for training in (True, False):
        assert shapes(new.train(training)(meta(2, 3, 224, 224))) == shapes(model.train(training)(meta(2, 3, 224, 224)))
    assert not any(isinstance(m, _BatchNorm) for m in new.modules())


@pytest.mark.slow
def test_12_a_detector_loops_over_its_images():
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, min_size=64, max_size=64
    )
    new = convert(model).eval()
    assert plan(model).reader == "one executed forward"
    out = new([torch.rand(3, 64, 64), torch.rand(3, 48, 64)])
    assert [set(found) for found in out] == [{"boxes", "labels", "scores"}] * 2
    assert not any("BatchNorm" in type(m).__name__ for m in new.modules())


# 13
UNUSUAL = {
    "grouped": (lambda: timm_model("resnext50_32x4d"), (2, 3, 96, 96)),
    "depthwise": (lambda: timm_model("mobilenetv2_100"), (2, 3, 96, 96)),
    "dilated": (lambda: tv_model("deeplabv3_resnet50", weights_backbone=None), (2, 3, 96, 96)),
    "not square": (lambda: timm_model("inception_v3"), (2, 3, 299, 299)),
    "ghost": (lambda: timm_model("repghostnet_050"), (2, 3, 96, 96)),
    "three dimensions": (lambda: tv_model("r3d_18"), (2, 3, 8, 64, 64)),
    "maps smaller than the kernel": (lambda: timm_model("resnet50"), (2, 3, 32, 32)),
    "padding as a word": (lambda: _words(), (2, 3, 16, 16)),
    "one dimension": (lambda: _one_dimension(), (2, 3, 40)),
}


def _words() -> nn.Module:
    convs = (nn.Conv2d(3, 4, (2, 3), padding="same"), nn.Conv2d(4, 4, 3, padding="valid", dilation=2))
    return on_meta(lambda: nn.Sequential(*(m for conv in convs for m in (conv, nn.BatchNorm2d(4))))).to_empty(
        device="meta"
    )


def _one_dimension() -> nn.Module:
    layers = (
        nn.Conv1d(3, 4, 5, stride=2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 4, 2, 2),
        nn.BatchNorm1d(4),
    )
    return nn.Sequential(*layers).to(device="meta")


@pytest.mark.parametrize("which", UNUSUAL)
def test_13_unusual_convolutions(which):
    build, size = UNUSUAL[which]
    model = build()
    new = convert(model, example_inputs=meta(*size))
    for training in (False, True):
        x = meta(*size)
        assert shapes(new.train(training)(x)) == shapes(model.train(training)(x))
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd) and set(module.kernel_size) != {1}:
            same = ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "out_channels")
            assert all(getattr(new.get_submodule(path), name) == getattr(module, name) for name in same)
    assert not any(isinstance(m, _BatchNorm) for m in new.modules())


# 14
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "densenet121", "dpn48b", "poolformer_s12"]
)
def test_14_norms_without_a_convolution_beside_them(name):
    model = timm_model(name)
    made = plan(model)
    rows = [v for v in made.verdicts if v.kind == "norm"]
    assert {v.path for v in rows} >= norms_in(model)
    assert sum(made.count("norm").values()) == len(rows) and f"norms         {len(rows)}: " in str(made)
    new = made.apply(model)
    if "poolformer" in name:  # between a sum and pooling stands nothing that could do their work
        assert sum("no layer next to it" in v.reason for v in rows if v.verdict == "KernelNorm") > 5
    if "patch" in name:
        assert "the last norm before the head" in rows[-1].reason and rows[-1].verdict == "kept"
        assert not any(kind(m) == "kn_norm" for m in new.modules())
    elif name != "poolformer_s12":  # whose head normalizes pooled features
        seen = calls(copy.deepcopy(new), meta(1, 3, 224, 224))
        last = [path for path, (x, _) in seen.items() if is_map(x) and kind(new.get_submodule(path)) == "kn_norm"][-1]
        convs = [path for path, (x, _) in seen.items() if is_map(x) and kind(new.get_submodule(path)) == "kn_conv"]
        assert list(seen).index(last) > max(list(seen).index(path) for path in convs)


# 15
def test_15_flags_of_a_model_in_use_stay():
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, list(FEW)).to(torch.bfloat16).eval()
    frozen = {name for name, _ in model.layer1.named_parameters(prefix="layer1")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    new = convert(model)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16} and not any(m.training for m in new.modules())
    for name, parameter in new.named_parameters():
        assert parameter.requires_grad == (not name.startswith("layer1.")), name


def test_15_wrapped_models_are_refused_and_converted_ones_travel(tmp_path):
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, list(FEW))
    with pytest.raises(AlreadyWrapped, match="_orig_mod"):
        convert(torch.compile(model))
    new, x = convert(model, NO_DROPOUT).eval(), torch.randn(1, 3, 32, 32)
    save_model(new, tmp_path / "model.safetensors")
    fresh = convert(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, list(FEW)), NO_DROPOUT).eval()
    load_model(fresh, tmp_path / "model.safetensors", strict=True)
    with torch.no_grad():
        for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), fresh):
            assert torch.equal(twin(x), new(x))
