"""knport.convert: its promises, each tested over every network that it has to be right for."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import time
from collections import Counter

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import architectures
from knport import surgery
from knport.errors import NothingToConvert
from knport.layers import KernelNorm2d, KNConv2d
from knport.surgery import KNConfig, convert, plan
from knport.surgery.copying import copy_onto
from knport.surgery.plan import structure_of
from knport.surgery.read import read
from knport.surgery.read_fx import read_fx
from knport.surgery.read_run import read_run
from knport.surgery.roles import module_role

FEW = (2, 1, 1, 1)  # blocks per stage: every kind of block, quickly
NETWORKS = {
    "architectures/cifar_resnet8": lambda: architectures.create_model("cifar_resnet8", num_classes=10),
    "timm/densenet121": lambda: timm.create_model("densenet121", block_config=(2, 2, 2, 1)),
    "timm/mobilenetv2_050": lambda: timm.create_model("mobilenetv2_050"),
    "timm/regnety_002": lambda: timm.create_model("regnety_002"),
    "timm/resnet18": lambda: timm.create_model("resnet18", layers=FEW),
    "timm/resnet50d": lambda: timm.create_model("resnet50d", layers=FEW),
    "timm/resnet50": lambda: timm.create_model("resnet50", layers=FEW),
    "timm/resnetv2_50": lambda: timm.create_model("resnetv2_50", layers=FEW),
    "timm/resnetv2_50d_gn": lambda: timm.create_model("resnetv2_50d_gn", layers=FEW),
    "timm/resnetv2_50 with StdConv2d": lambda: timm.create_model("resnetv2_50", layers=FEW, conv_layer=StdConv2d),
    "timm/resnext50_32x4d": lambda: timm.create_model("resnext50_32x4d", layers=FEW),
    "timm/seresnet50": lambda: timm.create_model("seresnet50", layers=FEW),
    "timm/vgg11_bn": lambda: timm_vgg(),
    "torchvision/densenet121": lambda: torchvision.models.DenseNet(block_config=(2, 2, 2, 1)),
    "torchvision/mobilenet_v2": lambda: torchvision.models.mobilenet_v2(width_mult=0.5),
    "torchvision/regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "torchvision/resnet18": lambda: resnet(torchvision.models.resnet.BasicBlock),
    "torchvision/resnet50": lambda: resnet(torchvision.models.resnet.Bottleneck),
    "torchvision/vgg11_bn": lambda: vgg(),
}
BIG_INPUT_ONLY = ("timm/vgg11_bn",)  # its head is a 7x7 convolution
TIMM_TESTS = timm.list_models("test_*")
NO_DROPOUT = KNConfig(dropout=0.0)


def resnet(block: type[nn.Module]) -> nn.Module:
    return torchvision.models.ResNet(block, list(FEW))


def vgg() -> nn.Module:
    model = torchvision.models.vgg11_bn(init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 10)  # in the place of 120 million parameters
    return model


def timm_vgg() -> nn.Module:
    model = timm.create_model("vgg11_bn")
    model.pre_logits, model.head.fc = ConvMlp(512, 32), nn.Linear(32, 10)  # likewise
    return model


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
    """Module scope: the tests of one network follow one another and share it."""
    return request.param


@functools.lru_cache(maxsize=1)
def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


@functools.lru_cache(maxsize=1)
def converted(name: str) -> nn.Module:
    return convert(original(name), NO_DROPOUT)


@pytest.fixture(scope="module")
def seresnet50():
    old = timm.create_model("seresnet50")
    return old, convert(old)


def side_of(name: str) -> int:
    return 224 if name in BIG_INPUT_ONLY else 64


def sites(model: nn.Module) -> set[str]:
    kinds = (_ConvNd, _BatchNorm, nn.GroupNorm, nn.LayerNorm)
    return {path for path, module in model.named_modules() if isinstance(module, kinds)}


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


class TestPromises:
    def test_plan_has_one_verdict_per_site_and_sees_every_call(self, name):
        model, called = copy_onto(original(name), "meta").eval(), set()
        for path in sites(model):
            model.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))
        model(torch.zeros(2, 3, 224, 224, device="meta"))
        made = plan(original(name))
        paths = [verdict.path for verdict in made.verdicts]
        assert sorted(paths) == sorted(sites(original(name)))
        assert {v.path for v in made.verdicts if "never called" not in v.reason} == called
        assert all(verdict.reason for verdict in made.verdicts)

    def test_nothing_of_the_original_changes(self, name):
        model = original(name)
        before, tensors = structure_of(model), {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
        flags, random_state = [m.training for m in model.modules()], torch.get_rng_state()
        convert(model)
        assert structure_of(model) == before
        assert [m.training for m in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), random_state)
        for key, value in model.state_dict(keep_vars=True).items():
            assert value is tensors[key][0] and torch.equal(value, tensors[key][1])

    def test_class_kept_and_no_batchnorm_left(self, name):
        new = converted(name)
        assert type(new) is type(original(name))
        assert not any(isinstance(m, _BatchNorm) for m in new.modules())
        assert any(isinstance(m, KNConv2d | KernelNorm2d) for m in new.modules())

    def test_every_activation_stays(self, name):
        def kinds(model):
            return Counter(type(m).__name__ for m in model.modules() if module_role(m) == "act")

        assert kinds(converted(name)) == kinds(original(name))

    def test_a_kernelnorm_stands_before_the_head(self, name):
        final = [m for m in converted(name).modules() if isinstance(m, KernelNorm2d)]
        assert final
        drops = [v.dropout for v in plan(original(name)).verdicts if v.verdict == "KernelNorm"]
        assert 0.25 in drops or plan(original(name)).final_norms[0].dropout == 0.25

    def test_parameters_are_as_the_plan_says(self, name):
        made = plan(original(name))
        count = [sum(p.numel() for p in m.parameters()) for m in (original(name), converted(name))]
        assert list(made.parameters) == count

    def test_plan_apply_is_convert(self, name):
        new, again = converted(name), plan(original(name), NO_DROPOUT).apply(original(name))
        assert structure_of(new) == structure_of(again) and same_weights(new, again)

    def test_converting_twice_changes_nothing_and_says_so(self, name):
        new = converted(name)
        with pytest.warns(UserWarning, match="converted already"):
            again = convert(new, NO_DROPOUT)
        assert structure_of(again) == structure_of(new) and same_weights(again, new)

    @pytest.mark.parametrize("training", [False, True])
    def test_shapes_stay_at_two_sizes_and_batch_sizes(self, name, training):
        old = copy_onto(original(name), "meta").train(training)
        new = copy_onto(converted(name), "meta").train(training)
        for part in new.modules():
            if hasattr(part, "dropout"):
                part.dropout = 0.05
        for batch, side in ((2, 256), (3, 225 if name in BIG_INPUT_ONLY else 97)):
            x = torch.zeros(batch, 3, side, side, device="meta")
            assert new(x).shape == old(x).shape

    def test_no_image_sees_another_and_every_parameter_gets_a_gradient(self, name):
        new, x = copy.deepcopy(converted(name)), torch.randn(2, 3, side_of(name), side_of(name))
        for part in new.modules():  # other randomness than ours is not the question
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        with torch.no_grad():
            out = new.eval()(x)
            torch.testing.assert_close(new(x[:1]), out[:1], rtol=1e-4, atol=1e-4 * out.abs().max().item())
        out = new.train()(x)
        torch.testing.assert_close(new(x[1:]), out[1:], rtol=1e-4, atol=1e-4 * out.abs().max().item())
        out.square().sum().backward()
        assert [n for n, p in new.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_no_activation_works_in_place_where_that_matters(self, name):
        new = converted(name).eval()
        careful = copy.deepcopy(new)
        for module in careful.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        x = torch.randn(1, 3, side_of(name), side_of(name))
        with torch.no_grad():
            assert torch.equal(new(x), careful(x))

    def test_both_readers_lead_to_the_same_plan(self, name, monkeypatch):
        texts = []
        for reader in (read_fx, read_run):
            monkeypatch.setattr(
                surgery, "read_all", lambda model, inputs, _, by=reader: read(model, inputs, readers=(by,))
            )
            if (name, reader) != ("timm/vgg11_bn", read_fx):  # control flow that torch.fx cannot trace
                texts.append(str(plan(original(name))))
        assert len(set(texts)) == 1


@pytest.mark.parametrize("name", TIMM_TESTS)
def test_timm_test_models_convert_or_say_why_not(name):
    model = timm.create_model(name)
    made = plan(model)
    assert {v.path for v in made.verdicts} >= sites(model)
    if not made.changes:
        with pytest.raises(NothingToConvert, match="normalization"):
            convert(model)
        return
    old, new = copy_onto(model, "meta"), copy_onto(convert(model), "meta")
    x = torch.zeros(2, *model.pretrained_cfg["input_size"], device="meta")
    assert new(x).shape == old(x).shape
    assert new.eval()(x).shape == old.eval()(x).shape
    assert not any(isinstance(m, _BatchNorm) for m in new.modules())


class TestSEResNet50:
    """The network that the first version has to get right in every respect."""

    def test_squeeze_excite_and_classifier_are_left_alone(self, seresnet50):
        old, new = seresnet50
        kept = [path for path in sites(old) if ".se." in path]
        assert len(kept) == 32
        assert all(type(new.get_submodule(path)) is nn.Conv2d for path in kept)
        assert type(new.fc) is nn.Linear and torch.equal(new.fc.weight, old.fc.weight)

    def test_one_training_step(self, seresnet50):
        _, new = seresnet50
        optimizer = torch.optim.SGD(new.train().parameters(), lr=0.01)
        loss = nn.functional.cross_entropy(new(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2]))
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters())
        optimizer.step()
        assert loss.isfinite() and all(p.isfinite().all() for p in new.parameters())

    def test_methods_work_and_the_final_norm_survives_a_new_classifier(self, seresnet50):
        _, new = seresnet50
        new.reset_classifier(10)
        assert isinstance(new.layer4[2].act3[0], KernelNorm2d)
        with torch.no_grad():
            assert new(torch.randn(1, 3, 64, 64)).shape == (1, 10)
            assert new.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 2048, 2, 2)


@pytest.mark.parametrize("network", ["timm/resnet18", "torchvision/densenet121"])
def test_deepcopy_pickle_and_state_dict_round_trip(network):
    new, x = convert(NETWORKS[network](), NO_DROPOUT).eval(), torch.randn(1, 3, 64, 64)
    fresh = convert(NETWORKS[network](), NO_DROPOUT).eval()
    fresh.load_state_dict(new.state_dict())
    with torch.no_grad():
        for twin in (copy.deepcopy(new), pickle.loads(pickle.dumps(new)), fresh):
            assert torch.equal(twin(x), new(x))


def test_the_plan_reads_well():
    text = str(plan(timm.create_model("resnet50")))
    assert "nothing has been changed yet" in text
    assert "53: 53 absorbed" in text and "25,557,032 -> " in text
    assert "layer4.2.act3" in text
    rows = [line for line in text.splitlines() if line.startswith("layer1.0.conv1 ")]
    assert len(rows) == 1 and "1x1" in rows[0] and "takes over from" in rows[0] and "2x2" in rows[0]
    assert text == str(plan(timm.create_model("resnet50")))  # deterministic


def test_auxiliary_heads_that_only_training_calls_are_converted():
    new = convert(torchvision.models.googlenet(init_weights=False)).train()
    assert not any(isinstance(m, _BatchNorm) for m in new.modules())
    copy_onto(new, "meta")(torch.zeros(2, 3, 224, 224, device="meta"))


def test_the_plan_as_json():
    made = json.loads(plan(NETWORKS["timm/resnet18"]()).to_json())
    assert made["version"] == 1 and made["config"]["dropout"] == 0.05
    assert {"path": "conv1", "verdict": "KNConv"}.items() <= made["verdicts"][0].items()


def test_planning_and_applying_is_quick():
    model, seconds = timm.create_model("resnet50"), []
    for _ in range(3):
        start = time.process_time()  # of this process alone: a busy machine is not the surgery's fault
        plan(model).apply(model)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.5
