"""The rules of knport.convert on small made-up networks: patterns, traps, what is carried over, what is refused."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
import torchvision
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import nn
from torch.nn.utils import parametrizations

from knport.errors import AlreadyWrapped, KNPortError, NothingToConvert, UnknownName, UnsupportedModule
from knport.layers import KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d
from knport.surgery import KNConfig, convert, plan

X = torch.zeros(2, 3, 16, 16)


def post(*more: nn.Module) -> nn.Sequential:
    """conv, norm, act and whatever follows."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *more)


def verdict(model: nn.Module, path: str, **options):
    options.setdefault("example_inputs", X)
    return next(v for v in plan(model, **options).verdicts if v.path == path)


class Double(nn.Module):
    """A step that no norm's work can be moved through."""

    def forward(self, x):
        return 2 * x


class Skip(nn.Module):
    """x + conv(act(norm(x))): a pre-activation block."""

    def __init__(self, act=None, function=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.act = act or nn.Identity()
        self.function = function or (lambda x: x)

    def forward(self, x):
        x = self.stem(x)
        return x + self.conv(self.function(self.act(self.norm(x))))


# --- patterns


def test_conv_norm_act():
    new = convert(post(), example_inputs=X)
    assert [type(m) for m in new] == [KNConv2d, nn.Identity, nn.ReLU]


def test_the_convolution_keeps_its_weights_and_gains_a_bias():
    old = nn.Sequential(*post(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8))
    new, last = convert(old, KNConfig(final_norm=False), example_inputs=X), len(old) - 2
    assert torch.equal(new[0].weight, old[0].weight) and torch.equal(new[last].weight, old[last].weight)
    assert not new[last].bias.any()
    assert "bias starts at 0" in verdict(old, str(last)).reason
    assert "gain and bias folded into 0" in verdict(old, "1").reason
    assert "bias starts spread around 0" in verdict(old, "0").reason


def test_the_bias_of_a_stem_differs_in_every_channel():
    """Where an image is flat the output is the bias: next to nothing in it would be divided by sqrt(eps)."""
    bias = convert(post(), example_inputs=X)[0].bias
    assert len(set(bias.tolist())) == 8 and not torch.equal(bias, torch.zeros(8))
    zero = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    nn.init.zeros_(zero[0].bias)
    assert convert(zero, example_inputs=X)[0].bias.any() and "starts spread around 0" in verdict(zero, "0").reason
    trained = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), affine(nn.BatchNorm2d(8)), nn.ReLU(), nn.Conv2d(8, 8, 3))
    assert torch.equal(convert(trained, example_inputs=X)[0].bias, trained[1].bias)


def affine(norm: nn.Module) -> nn.Module:
    """The norm with a gain and a bias that training might have given it."""
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.uniform_(norm.bias, -1, 1)
    return norm


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("init", ["embed", "fresh"])
def test_gain_and_bias_of_the_norm_behind_go_into_the_weights(size, init):
    conv, norm = nn.Conv2d(3, 8, size, padding=size // 2), affine(nn.BatchNorm2d(8))
    plain, with_affine = (
        nn.Sequential(copy.deepcopy(conv), norm, nn.ReLU(), nn.Conv2d(8, 8, 3))
        for norm in (nn.BatchNorm2d(8), copy.deepcopy(norm))
    )
    x, outputs = torch.randn(2, 3, 9, 9), []
    for model in (plain, with_affine):
        torch.manual_seed(1)  # of a fresh kernel
        new = convert(model, KNConfig(init=init, dropout=0), example_inputs=X)[0]
        outputs.append(new(x) if model is with_affine else new(x) - new.bias.view(-1, 1, 1))
    expected = outputs[0] * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(outputs[1], expected, atol=1e-5, rtol=1e-5)
    assert "folded into 0" in verdict(with_affine, "1").reason


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), affine(nn.BatchNorm2d(8))])
def test_a_bias_that_the_norm_behind_takes_away_again_does_not_come_to_life(norm):
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    old = nn.Sequential(*first, nn.Conv2d(8, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3))
    new = convert(old, example_inputs=X)
    expected = torch.zeros(8) if norm.bias is None else norm.bias
    assert torch.equal(new[3].bias, expected) and torch.equal(new[6].bias, old[6].bias)
    assert "bias starts at 0: 4 took away what it had" in verdict(old, "3").reason
    assert "bias kept" in verdict(old, "6").reason
    assert old[3].bias.abs().sum() > 0


def test_a_bias_that_reaches_the_output_stays():
    """LayerNorm and GroupNorm take a mean over channels: what sets one channel apart from another goes through."""
    for norm in (nn.GroupNorm(2, 8), nn.GroupNorm(1, 8)):
        old = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3))
        assert torch.equal(convert(old, example_inputs=X)[0].bias, old[0].bias)


def test_units_of_few_values_get_no_dropout():
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    made = plan(wide, KNConfig(dropout=0.1), example_inputs=X)
    new = made.apply(wide)
    assert (new[0].dropout, new[2].dropout) == (0.0, 0.1), "27 values and 72"
    assert any(note.startswith("no dropout in 0:") for note in made.notes)


def test_a_branch_that_begins_at_zero_still_does():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            nn.init.zeros_(self.bn2.weight)

        def forward(self, x):
            return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))

    old = Block().train()
    new, x = convert(old, example_inputs=X).train(), torch.randn(2, 3, 8, 8)
    assert torch.equal(old(x), x) and torch.equal(new(x), x)
    new(x).square().sum().backward()
    assert new.conv2.weight.grad.abs().sum() > 0, "it can learn to be something else"


@pytest.mark.parametrize(
    "between", [(nn.ReLU(), nn.BatchNorm2d(8)), (nn.MaxPool2d(2), nn.BatchNorm2d(8)), (EvoNorm2dB0(8),)]
)
def test_a_gain_with_something_before_it_is_dropped_and_the_plan_says_so(between):
    affine(between[-1])
    old = nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Conv2d(8, 8, 3), nn.ReLU())
    new = convert(old, example_inputs=X)
    assert torch.equal(new[0].weight, old[0].weight)
    assert "gain and bias dropped" in verdict(old, str(len(between))).reason


def test_gain_and_bias_behind_a_linear_layer():
    class Tokens(nn.Module):  # LeViT's order
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.bn = nn.LayerNorm(6), nn.Linear(6, 5), affine(nn.BatchNorm1d(5))
            self.out = nn.Linear(5, 4)

        def forward(self, x):
            x = self.linear(self.norm(x))
            return self.out(self.bn(x.flatten(0, 1)).reshape_as(x).relu())

    old, x = Tokens(), torch.randn(2, 7, 6)
    new = convert(old, KNConfig(dropout=0), example_inputs=x)
    before = copy.deepcopy(old)
    nn.init.ones_(before.bn.weight), nn.init.zeros_(before.bn.bias)
    plain = convert(before, KNConfig(dropout=0), example_inputs=x).linear(x)
    torch.testing.assert_close(new.linear(x), plain * old.bn.weight + old.bn.bias, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.1), nn.Sequential(nn.GELU(), nn.AvgPool2d(2))]
)
def test_norm_then_something_then_conv(between):
    model = nn.Sequential(nn.BatchNorm2d(3), between, nn.Conv2d(3, 8, 3))
    new = convert(model, example_inputs=X)
    assert isinstance(new[0], nn.Identity) and isinstance(new[2], KNConv2d)


def test_all_convolutions_that_read_a_norm_take_over():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = self.norm(x)
            return torch.cat([self.a(x), self.b(F.relu(x))], 1)

    new = convert(Branches(), example_inputs=X)
    assert isinstance(new.a, KNConv2d) and isinstance(new.b, KNConv2d) and isinstance(new.norm, nn.Identity)


def test_a_norm_that_an_addition_reads_too_stays_a_norm():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = self.norm(x)
            return x + self.conv(x)

    new = convert(Both(), example_inputs=X)
    assert isinstance(new.norm, KernelNorm2d) and type(new.conv) is nn.Conv2d
    assert "stays or becomes a KernelNorm" in verdict(Both(), "conv").reason


@pytest.mark.parametrize(
    ("norm", "conv", "kernel_norm", "kn_conv", "shape"),
    [
        (nn.BatchNorm1d, nn.Conv1d, KernelNorm1d, KNConv1d, (2, 3, 12)),
        (nn.BatchNorm3d, nn.Conv3d, KernelNorm3d, KNConv3d, (2, 3, 6, 6, 6)),
        (nn.InstanceNorm2d, nn.Conv2d, KernelNorm2d, KNConv2d, (2, 3, 12, 12)),
        (nn.SyncBatchNorm, nn.Conv2d, KernelNorm2d, KNConv2d, (2, 3, 12, 12)),
    ],
)
def test_every_dimension_and_kin(norm, conv, kernel_norm, kn_conv, shape):
    model = nn.Sequential(norm(3), nn.Sigmoid(), nn.Softmax(1), conv(3, 4, 1), Double(), norm(4)).eval()
    new = convert(model, example_inputs=torch.zeros(shape))
    assert (
        isinstance(new[3], kn_conv)
        and isinstance(new[5], kernel_norm)
        and new[3].kernel_size == (2,) * (len(shape) - 2)
    )
    assert new(torch.randn(shape)).shape == model(torch.randn(shape)).shape


def test_a_norm_of_flat_features_becomes_one_of_each_vector():
    model = post(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8))
    new, x = convert(model, example_inputs=X), torch.randn(2, 3, 16, 16)
    assert type(new[5]) is nn.LayerNorm and new[5].weight is None
    torch.testing.assert_close(new[5:](new[:5](x)).mean(1), torch.zeros(2), atol=1e-5, rtol=0)


# --- the norm before the head


def head(*body: nn.Module) -> nn.Sequential:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.body(x))


def test_the_last_norm_becomes_a_kernelnorm_and_its_convolution_a_knconv():
    new = convert(head(*post()), KNConfig(dropout=0.02), example_inputs=X)
    assert isinstance(new[0], KNConv2d)
    assert isinstance(new[1], KernelNorm2d) and new[1].dropout == pytest.approx(0.1)


def test_a_post_activation_network_gets_one_before_its_last_activation():
    new = convert(head(*post(), Residual()), example_inputs=X)
    assert isinstance(new[3].relu, nn.Sequential) and isinstance(new[3].relu[0], KernelNorm2d)
    assert new[3].relu[0].dropout == 0.25 and isinstance(new[3].relu[1], nn.ReLU)


def test_or_before_the_pooling_when_the_activation_is_shared():
    block = Residual()
    model = head(*post(), block, block)
    new = convert(model, example_inputs=X)
    assert isinstance(new[5], nn.Sequential) and isinstance(new[5][0], KernelNorm2d)
    assert "in front of 5" in str(plan(model, example_inputs=X))


def test_a_head_of_functions_only_is_noted():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.norm(self.conv(x))
            return self.fc(F.relu(x + x.flip(-1)).mean((2, 3)))

    notes = plan(Functions(), example_inputs=X).notes
    assert sum("no KernelNorm added" in note for note in notes) == 1


def test_final_norm_can_be_declined():
    config = KNConfig(final_norm=False)
    new = convert(head(*post(), Residual()), config, example_inputs=X)
    assert not any(isinstance(m, KernelNorm2d) for m in new.modules())
    assert isinstance(convert(head(*post()), config, example_inputs=X)[1], nn.Identity)


def test_a_norm_with_an_addition_behind_it_is_not_the_last():
    made = plan(head(*post(), Residual()), example_inputs=X)
    assert {v.path: v.verdict for v in made.verdicts} == {
        "0": "KNConv",
        "1": "absorbed",
        "3.body.0": "KNConv",
        "3.body.1": "absorbed",
    }


# --- what is kept, and why


def test_classifying_and_gating_convolutions_are_left_alone():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.gate = post(), nn.Conv2d(8, 8, 1)
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.classifier = nn.Conv2d(8, 5, 1)

        def forward(self, x):
            x = self.body(x)
            x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
            return self.classifier(F.relu(self.norm(self.conv(x))))

    new = convert(Gated(), example_inputs=X)
    assert type(new.gate) is nn.Conv2d and type(new.classifier) is nn.Conv2d
    assert isinstance(new.conv, KNConv2d) and isinstance(new.norm, KernelNorm2d)
    assert (
        "squeeze-excite" in verdict(Gated(), "gate").reason
        and verdict(Gated(), "classifier").reason == "the classifier"
    )


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("conv", "word"),
    [
        (lambda: Doubling(3, 8, 3), "own forward"),
        (lambda: nn.ConvTranspose2d(3, 8, 3), "transposed"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), "parametrized"),
        (lambda: nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), "computed"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), "computed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_convolutions_with_more_to_them_are_kept_and_their_norm_becomes_a_kernelnorm(conv, word):
    conv = conv()
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()).eval()
    made = verdict(model, "0")
    assert made.verdict == "kept" and word in made.reason
    new = convert(model, example_inputs=X)
    assert type(new[0]) is type(conv) and isinstance(new[1], KernelNorm2d)
    torch.testing.assert_close(new[0](X + 1), conv(X + 1))


def test_a_norm_with_a_forward_of_its_own_is_kept():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    made = verdict(nn.Sequential(nn.Conv2d(3, 8, 3), Odd(8)), "1")
    assert made.verdict == "kept" and "own forward" in made.reason


def test_functions_and_modules_that_are_never_called_are_rows_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.spare = post(), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.instance_norm(self.body(x))

    rows = {v.path: v for v in plan(Mixed(), example_inputs=X).verdicts}
    assert "never called" in rows["spare"].reason and "function" in rows["instance_norm()"].reason


def test_nothing_to_convert_says_what_was_seen():
    model = nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4))
    assert not plan(model, example_inputs=X).changes
    with pytest.raises(NothingToConvert, match=r"LayerNorm: it is read by 1 \(act\)"):
        convert(model, example_inputs=X)
    with pytest.raises(NothingToConvert, match="no normalization"):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3)), example_inputs=X)


# --- one module in several places


class Twice(nn.Module):
    def __init__(self, second_norm: bool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.alias, self.second_norm = self.conv, second_norm

    def forward(self, x):
        y = self.alias(2 * x)
        return self.norm(self.conv(x)) + (self.norm(y) if self.second_norm else y)


def test_a_convolution_called_twice_must_fit_both_times():
    new = convert(Twice(second_norm=True), example_inputs=X)
    assert isinstance(new.conv, KNConv2d) and new.alias is new.conv and isinstance(new.norm, nn.Identity)
    new = convert(Twice(second_norm=False), example_inputs=X)
    assert type(new.conv) is nn.Conv2d and new.alias is new.conv and isinstance(new.norm, KernelNorm2d)
    made = verdict(Twice(second_norm=False), "conv")
    assert made.aliases == ("alias",) and "called 2 times" in made.reason


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    new = convert(model, example_inputs=X)
    assert new[0].weight is new[2].weight and new[0].kernel_size == (1, 1)
    assert "gain and bias dropped" in verdict(model, "1").reason


# --- in place


def test_an_activation_in_place_must_not_edit_the_skip():
    torch.manual_seed(0)
    model = Skip(act=nn.ReLU(inplace=True))
    made = plan(model, example_inputs=X)
    assert made.inplace_off == ("act",) and "switched off in 1 activation" in str(made)
    new, x = convert(model, KNConfig(dropout=0.0), example_inputs=X), torch.randn(2, 3, 16, 16)
    seen = []
    new.norm.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[0].clone())))
    new(x)
    assert not new.act.inplace and torch.equal(*seen[0])
    assert model.act.inplace


class Branches(nn.Module):
    """conv, norm and an activation in place; then a sum, made in place or not, with its own norm and activation."""

    def __init__(self, add):
        super().__init__()
        self.first, self.norm1, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.norm2, self.act, self.last, self.add = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), add

    def forward(self, x):
        x = self.act(self.norm1(self.first(x)))
        return self.last(self.act(self.norm2(self.add(self.second(x), x))))


@pytest.mark.parametrize("add", [torch.add, lambda a, b: a.add_(b)], ids=["add", "add_"])
def test_an_activation_in_place_on_what_only_it_reads_stays(add):
    model = Branches(add)
    made = plan(model, example_inputs=X)
    assert made.inplace_off == () and "switched off" not in str(made)
    new = made.apply(model)
    other = copy.deepcopy(new)
    other.act.inplace = False
    assert new.act.inplace
    results = []
    for net in (new, other):
        torch.manual_seed(0)
        y = net(X)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_activation_in_place_on_a_sum_into_a_skip_is_switched_off():
    """add_ writes into the skip, which is then read once more: no new tensor."""

    class Twice(Branches):
        def forward(self, x):
            x = self.norm1(self.first(x))
            return self.second(self.act(self.norm2(x.add_(1)))) + x

    assert plan(Twice(None), example_inputs=X).inplace_off == ("act",)


def test_resnet18_keeps_its_activations_in_place():
    assert plan(torchvision.models.resnet18(), KNConfig(enlarge="none")).inplace_off == ()


@pytest.mark.parametrize("function", [lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True), torch.relu_])
def test_a_function_in_place_there_is_refused(function):
    model = Skip(function=function)
    with pytest.raises(UnsupportedModule, match=r"relu.*works in place.*exclude='norm'"):
        convert(model, example_inputs=X)
    outer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model)
    assert isinstance(convert(outer, exclude="2.norm", example_inputs=X)[2].norm, nn.BatchNorm2d)


def test_overwriting_what_a_norm_read_is_refused():
    class Late(Skip):
        def forward(self, x):
            x = self.stem(x)
            y = self.norm(x)
            return torch.relu_(x) + self.conv(y)

    with pytest.raises(UnsupportedModule, match=r"overwrites what norm reads.*exclude='norm'"):
        convert(Late(), example_inputs=X)


def test_a_fused_norm_leaves_its_dropout_activation_and_hooks():
    fused = BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    plain = BatchNormAct2d(8, apply_act=False)
    model, calls = (
        nn.Sequential(nn.Conv2d(3, 8, 3), fused, nn.Conv2d(8, 8, 3), plain, nn.Conv2d(8, 8, 3, bias=False)),
        [],
    )
    fused.register_forward_hook(lambda *_: calls.append(1))
    new = convert(model, example_inputs=X)
    assert [type(m) for m in new[1]] == [nn.Dropout2d, nn.SiLU] and type(new[3]) is nn.Identity
    new(X)
    assert calls == [1] and "its activation stays" in verdict(model, "1").reason


def test_a_function_in_place_on_a_fresh_tensor_is_fine():
    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)), inplace=True)

    new = convert(Fresh(), example_inputs=X)
    new(torch.randn(2, 3, 16, 16)).sum().backward()
    assert new.conv.weight.grad is not None


# --- what is carried over


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": (2, 0), "bias": False},
        {"padding": "same", "dilation": 2},
        {"groups": 3, "padding": 1, "padding_mode": "reflect"},
    ],
)
def test_the_arguments_of_the_convolution(options):
    old = nn.Sequential(nn.Conv2d(3, 6, (3, 5), **options), nn.BatchNorm2d(6)).eval()
    new = convert(old, example_inputs=X).eval()[0]
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(new, name) == getattr(old[0], name)
    assert new(torch.randn(2, 3, 16, 16)).shape == old(X).shape


def test_dtype_flags_and_hooks():
    old = post(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).to(torch.bfloat16)
    old[0].weight.requires_grad_(False)
    old[3].eval()
    calls = []
    for path in ("0", "1", ""):
        old.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    new = convert(old)
    assert calls == []  # reading fires no hooks
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert not new[0].weight.requires_grad and not new[0].bias.requires_grad and new[3].weight.requires_grad
    assert new[0].training and not new[3].training and new[1].training
    new(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
    assert calls == ["0", "1", ""]


def test_a_handle_of_a_hook_still_removes_it_after_an_inplace_conversion():
    model, calls = post(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    convert(model, example_inputs=X, inplace=True)
    handle.remove()
    model(X)
    assert calls == [] and isinstance(model[0], KNConv2d)


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = post(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    new = convert(model)
    assert all(p.is_meta for p in new.parameters()) and new[3].kernel_size == (2, 2)


# --- calls and errors


def test_inplace_returns_the_model_itself_and_keeps_its_parameters():
    model = post()
    weight = model[0].weight
    assert convert(model, example_inputs=X, inplace=True) is model
    assert model[0].weight is weight


def test_inputs_of_other_kinds():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = post()

        def forward(self, image, mask=None, *, scale=1.0):
            return self.body(image) * scale if mask is None else self.body(image[mask])

    for inputs in (X, (X,), [X], {"image": X}, {"image": X, "scale": 2.0}, None):
        assert isinstance(convert(Keyword(), example_inputs=inputs).body[0], KNConv2d)


def test_a_model_that_cannot_be_read_asks_for_inputs():
    class Needy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = post()

        def forward(self, image, size):
            return F.interpolate(self.body(image), size=size)

    with pytest.raises(KNPortError, match="example_inputs"):
        convert(Needy())
    assert isinstance(convert(Needy(), example_inputs=(X, 4)).body[0], KNConv2d)


@pytest.mark.parametrize("pack", [list, tuple, lambda xs: {"out": list(xs)}])
@pytest.mark.parametrize("traceable", [True, False])
def test_several_outputs(pack, traceable):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = post()

        def forward(self, x):
            if not traceable and x.sum() > 9:
                return x
            x = self.body(x)
            return pack((x, x + 1))

    assert isinstance(convert(Several(), example_inputs=X).body[0], KNConv2d)


def test_control_flow_is_read_by_running():
    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = post()

        def forward(self, x):
            return self.body(x) if x.shape[-1] > 8 and x.mean() < 9 else x

    for inputs in (X, None):  # values are needed: neither torch.fx nor the meta device will do
        assert plan(Flow(), example_inputs=inputs).reader == "one executed forward"


def wrapped() -> dict:
    return {
        "parallel": lambda m: nn.DataParallel(m),
        "compiled": lambda m: torch.compile(m),
        "compiled in place": lambda m: m.compile() or m,
        "scripted": lambda m: torch.jit.script(m),
        "hooked by accelerate": lambda m: add_hook_to_module(m, ModelHook()),
        "part compiled": lambda m: nn.Sequential(torch.compile(m)),
    }


@pytest.mark.parametrize("how", wrapped())
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_wrapped_models_are_refused_with_the_line_to_run(how):
    model = wrapped()[how](post())
    for call in (plan, convert):
        with pytest.raises(AlreadyWrapped, match=r"run this first|before"):
            call(model)


def test_a_forward_that_is_not_the_models_own_is_refused():
    model = post()
    forward = model[1].forward
    model[1].forward = lambda x: forward(x)
    with pytest.raises(UnsupportedModule, match="1: its forward is replaced on the instance"):
        convert(model, example_inputs=X)
    assert model[1].num_batches_tracked == 0


def test_a_method_bound_to_the_instance_is_kept():
    model = post()
    model[0].forward = types.MethodType(lambda self, x: 2 * nn.Conv2d.forward(self, x), model[0])
    made = verdict(model, "0")
    assert made.verdict == "kept" and "patched on the instance" in made.reason


def test_a_traced_model_is_fine():
    traced = torch.fx.symbolic_trace(post())
    new = convert(traced, example_inputs=X)
    assert type(new) is type(traced) or isinstance(new, torch.fx.GraphModule)
    assert isinstance(new.get_submodule("0"), KNConv2d) and new(X).shape == (2, 8, 16, 16)


def test_a_plan_fits_only_models_of_its_structure():
    made = plan(post(), example_inputs=X)
    assert isinstance(made.apply(post())[0], KNConv2d)
    other = post()
    other[0] = nn.Conv2d(3, 8, 5, padding=2)
    with pytest.raises(KNPortError, match="at 0 it expects Conv2d"):
        made.apply(other)


def test_bad_arguments():
    with pytest.raises(KNPortError, match="or a number of parameters"):
        convert(post(), match_params="modle")
    with pytest.raises(KNPortError, match=r"expected a knport\.KNConfig"):
        convert(post(), {"dropout": 0.1})
    with pytest.raises(KNPortError, match=r"expected a torch\.nn\.Module"):
        convert("resnet50")
    with pytest.raises(UnsupportedModule, match=r"nn\.Sequential"):
        convert(nn.BatchNorm2d(3))
    with pytest.raises(KNPortError, match="lazy"):
        convert(nn.Sequential(nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(UnknownName, match="2x2"):
        KNConfig(enlarge="2x")
    with pytest.raises(UnknownName, match="embed"):
        KNConfig(init="embedded")
    for bad in ({"dropout": 1.0}, {"eps": 0.0}, {"norm_window": 0}, {"norm_window": (3, -1)}):
        with pytest.raises(KNPortError, match="expected"):
            KNConfig(**bad)


def test_an_error_leaves_the_model_as_it_was():
    model = nn.Sequential(*post(), Skip(function=torch.relu_))
    model[3].stem = nn.Conv2d(8, 3, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModule):
        convert(model, example_inputs=X, inplace=True)
    assert isinstance(model[1], nn.BatchNorm2d) and all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items()
    )
