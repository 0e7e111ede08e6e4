"""Per-sample gradients are those of the forward pass that was run, and what mixes samples is named."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import architectures
import knport
from knport import functional, privacy
from knport.errors import AlreadyWrapped, KNPortError
from knport.privacy import samplers

KN_CONVS = {1: knport.KNConv1d, 2: knport.KNConv2d, 3: knport.KNConv3d}
SIZES = {1: (13,), 2: (11, 8), 3: (5, 4, 6)}
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}
LAYERS = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "groups": {"kernel_size": 2, "groups": 2, "padding": 1},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": "same"},
    "dilated": {"kernel_size": 2, "dilation": 3, "padding": 2},
    "pointwise": {"kernel_size": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "window": {"kernel_size": 1, "norm_window": 3},
    "window in groups": {"kernel_size": 2, "norm_window": 4, "groups": 2, "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular, strided": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "one side padded": {"kernel_size": 2, "padding": "pairs"},
    "one side padded, strided groups": {"kernel_size": 2, "padding": "pairs", "stride": 2, "groups": 2},
}
# KNLinear: shape of the input behind the batch dimension, and options
TOKENS = {
    "vectors": ((9,), {}),
    "tokens": ((11, 9), {}),
    "no bias": ((11, 9), {"bias": False}),
    "window": ((12, 9), {"norm_window": 3, "grid_size": (3, 4)}),
    "window behind a class token": ((26, 9), {"norm_window": 3, "prefix_tokens": 1}),
    "map": ((4, 5, 9), {"norm_window": (3, 2)}),
    "windows of windows": ((2, 3, 2, 9), {}),
}
FORMS = ["moments", "shared", "unit"]


def make(name, ndim, **options):
    options = {"dropout": 0.2, **LAYERS[name], **options}
    if options.get("padding") == "pairs":
        options["padding"] = ((0, 1), (1, 0), (2, 1))[:ndim]
    return KN_CONVS[ndim](4, 8, **options)


def distance(a, b):
    """Of a from b, on the scale of b."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def samples_of(layer, x, wrapper=GradSampleModule, **options):
    """Opacus' per-sample gradients of a weighted sum, and autograd's for the same forward pass, image by image."""
    model = wrapper(privacy.prepare(layer), loss_reduction="sum", **options)
    y = model(x)
    weights = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    parameters = dict(layer.named_parameters())
    each = (y * weights).flatten(1).sum(1)
    model.disable_hooks()
    alone = [torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in each]
    model.enable_hooks()
    each.sum().backward()
    expected = dict(zip(parameters, map(torch.stack, zip(*alone, strict=True)), strict=True))
    return {name: p.grad_sample for name, p in parameters.items()}, expected


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_samples_are_those_of_autograd_on_the_same_forward_pass(name, ndim, dtype):
    layer = make(name, ndim).to(dtype)
    ours, expected = samples_of(layer, torch.randn(3, 4, *SIZES[ndim], dtype=dtype))
    assert ours.keys() == expected.keys() == dict(layer.named_parameters()).keys()
    for key, sample in ours.items():
        assert distance(sample, expected[key]) < EXACT[dtype]
        assert distance(sample.sum(0), layer.get_parameter(key).grad) < EXACT[dtype]


def make_linear(name, **options):
    shape, settings = TOKENS[name]
    return knport.KNLinear(9, 8, dropout=0.2, **settings, **options), torch.randn(3, *shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", TOKENS)
def test_samples_of_a_linear_layer_are_those_of_autograd(name, dtype, form):
    layer, x = make_linear(name, dropout_form=form)
    layer, x = layer.to(dtype), x.to(dtype)
    ours, expected = samples_of(layer, x)
    assert ours.keys() == expected.keys() == dict(layer.named_parameters()).keys()
    for key, sample in ours.items():
        assert distance(sample, expected[key]) < EXACT[dtype]
        assert distance(sample.sum(0), layer.get_parameter(key).grad) < EXACT[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_dropout_is_the_one_that_was_drawn(form):
    layer = knport.KNConv2d(8, 4, 3, padding=1, dropout=0.3, dropout_form=form).double()  # large enough for "moments"
    x = torch.randn(3, 8, 6, 7, dtype=torch.float64).relu()
    ours, expected = samples_of(layer, x)
    assert distance(ours["weight"], expected["weight"]) < 1e-12
    undropped = functional.kn_conv(x, layer.weight, layer.bias, padding=1)
    assert distance(layer(x), undropped) > 0.05, "a dropout that moves nothing would prove nothing"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_samples_are_those_of_a_loop_over_single_images(dropout):
    layer = knport.KNConv2d(8, 4, 3, stride=2, padding=((1, 0), (0, 1)), groups=2, dropout=dropout).double()
    where, x = (layer.stride, layer.padding), torch.randn(3, 8, 6, 7, dtype=torch.float64)
    torch.manual_seed(1)
    model = GradSampleModule(privacy.prepare(layer), loss_reduction="sum")
    model(x).square().sum().backward()
    torch.manual_seed(1)
    drawn = functional.kn_conv_statistics(x, 3, *where, dropout=dropout)
    for i in range(len(x)):
        own = type(drawn)(*(map_[i : i + 1] for map_ in drawn))
        y = functional.kn_conv(x[i : i + 1], layer.weight, layer.bias, *where, groups=2, statistics=own)
        for p, expected in zip(
            layer.parameters(), torch.autograd.grad(y.square().sum(), layer.parameters()), strict=True
        ):
            assert distance(p.grad_sample[i], expected) < 1e-12


def test_large_means_and_constant_images():
    layer = knport.KNConv2d(8, 4, 3, dropout=0.0)
    x = torch.randn(3, 8, 6, 6)
    x[0] += 1000
    x[1] = 7.0
    torch.manual_seed(1)
    ours, expected = samples_of(copy.deepcopy(layer).double(), x.double())
    torch.manual_seed(1)
    single, _ = samples_of(layer, x)
    assert expected["weight"][1].abs().max() < 1e-9, "a constant image gives the weights nothing"
    assert single["weight"][1].abs().max() < 1e-6
    assert distance(single["weight"][0].double(), expected["weight"][0]) < 1e-3
    assert distance(ours["bias"], expected["bias"]) < 1e-12


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_frozen_parameters_have_no_samples(trainable):
    layer = make("plain", 2)
    for name, p in layer.named_parameters():
        p.requires_grad_(name == trainable)
    privacy.prepare(layer)
    model = GradSampleModule(layer, loss_reduction="sum")
    model(torch.randn(2, 4, 6, 6)).square().sum().backward()
    for name, p in layer.named_parameters():
        if name == trainable:
            assert distance(p.grad_sample.sum(0), p.grad) < 1e-5
        else:
            assert not hasattr(p, "grad_sample")


def test_autocast():
    layer, x = make("plain", 2, dropout=0.2), torch.randn(3, 4, 9, 9)
    model = GradSampleModule(privacy.prepare(layer), loss_reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert layer.weight.grad_sample.dtype == torch.float32
    assert distance(layer.weight.grad_sample.sum(0), layer.weight.grad) < 0.02


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = knport.KNConv2d(4, 4, 3, padding=1, dropout=0.2)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    ours, expected = samples_of(Twice().double(), torch.randn(3, 4, 5, 5, dtype=torch.float64))
    assert distance(ours["conv.weight"], expected["conv.weight"]) < 1e-12


def test_forward_passes_that_opacus_does_not_see_do_not_count():
    layer, x = make("plain", 2).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    model = GradSampleModule(privacy.prepare(layer), loss_reduction="sum")
    for _ in range(3):  # its backward pass never comes
        model.disable_hooks()
        model(x + 1)
        model.enable_hooks()
        model.eval()(x)
        model.train()
        with torch.no_grad():
            model(x - 1)
        model.zero_grad()
        model(x).square().sum().backward()
        assert distance(layer.weight.grad_sample.sum(0), layer.weight.grad) < 1e-12
        assert "_recorded" not in vars(layer)


def clipped_sum(model, x, target, wrapper, bound):
    """The gradient that DP-SGD uses, noise 0, with either way of clipping."""
    ghost = wrapper is GradSampleModuleFastGradientClipping
    held = wrapper(model, **({"max_grad_norm": bound} if ghost else {}))
    plain = torch.optim.SGD(held.parameters(), lr=0.0)
    kind = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    optimizer = kind(plain, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=1)
    criterion = nn.CrossEntropyLoss()
    if ghost:
        criterion = DPLossFastGradientClipping(held, optimizer, criterion)
    torch.manual_seed(3)  # the same dropout either way
    criterion(held(x), target).backward()
    optimizer.step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    norms = held.per_sample_gradient_norms if ghost else None
    held.to_standard_module()
    return gradient, norms


def small():
    torch.manual_seed(0)
    model = knport.convert(architectures.create_model("cifar_resnet8", num_classes=5))
    return privacy.prepare(model)


@pytest.mark.parametrize("bound", [0.1, 1.0])
def test_ghost_clipping_gives_what_hooks_give(bound):
    model, x, target = small().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.arange(4)
    hooks, _ = clipped_sum(copy.deepcopy(model), x, target, GradSampleModule, bound)
    ghost, norms = clipped_sum(model, x, target, GradSampleModuleFastGradientClipping, bound)
    assert norms.min() > bound, "nothing to clip, nothing to test"
    assert distance(ghost, hooks) < 1e-9


@pytest.mark.parametrize("way", ["_ghost_norms", "_plain_norms"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_both_ways_to_the_norm(name, ndim, way, monkeypatch):
    other = {"_ghost_norms", "_plain_norms"} - {way}
    monkeypatch.setattr(samplers, other.pop(), getattr(samplers, way))
    layer, x = make(name, ndim).double(), torch.randn(3, 4, *SIZES[ndim], dtype=torch.float64)
    torch.manual_seed(4)
    _, expected = samples_of(copy.deepcopy(layer), x)
    torch.manual_seed(4)
    model = GradSampleModuleFastGradientClipping(privacy.prepare(layer), loss_reduction="sum", max_grad_norm=1.0)
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    for key, p in layer.named_parameters():
        assert distance(p._norm_sample, expected[key].flatten(1).norm(dim=1)) < 1e-9


@pytest.mark.parametrize("way", ["_norms_of_sums", "_linear_plain_norms"])
@pytest.mark.parametrize("name", TOKENS)
def test_both_ways_to_the_norm_of_a_linear_layer(name, way, monkeypatch):
    other = {"_norms_of_sums", "_linear_plain_norms"} - {way}
    monkeypatch.setattr(samplers, other.pop(), getattr(samplers, way))
    layer, x = make_linear(name)
    layer, x = layer.double(), x.double()
    torch.manual_seed(4)
    _, expected = samples_of(copy.deepcopy(layer), x)
    torch.manual_seed(4)
    model = GradSampleModuleFastGradientClipping(privacy.prepare(layer), loss_reduction="sum", max_grad_norm=1.0)
    y = model(x)
    (y * torch.randn_like(y)).sum().backward()
    for key, p in layer.named_parameters():
        assert distance(p._norm_sample, expected[key].flatten(1).norm(dim=1)) < 1e-9


@pytest.mark.parametrize("wrapper", [GradSampleModule, GradSampleModuleFastGradientClipping])
def test_no_image_moves_the_sum_by_more_than_the_bound(wrapper):
    model, bound = small(), 0.5
    model.apply(lambda m: setattr(m, "dropout", 0.0) if hasattr(m, "dropout") else None)  # the same for the others
    x, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    x[3] = 1e4 * torch.randn(3, 8, 8).sign()
    sums = [clipped_sum(copy.deepcopy(model), x[:n], target[:n], wrapper, bound)[0] for n in (4, 3)]
    assert 0.9 * bound < (sums[0] - sums[1]).norm() < bound * (1 + 1e-5)


def private(model, images, *, mode="hooks", noise=0.0, bound=1e12, batch=4, poisson=False):
    target = torch.arange(len(images)) % 5
    loader = DataLoader(TensorDataset(images, target), batch_size=batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=noise,
        max_grad_norm=bound,
        poisson_sampling=poisson,
        grad_sample_mode=mode,
        **({"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}),
    )


def test_without_noise_and_bound_it_is_sgd():
    model, x = small(), torch.randn(4, 3, 8, 8)
    plain, before = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    F.cross_entropy(plain(x), torch.arange(4)).backward()
    optimizer.step()
    held, optimizer, loader = private(model, x)
    ((images, target),) = loader
    torch.manual_seed(5)
    F.cross_entropy(held(images), target).backward()
    optimizer.step()
    for p, expected, start in zip(model.parameters(), plain.parameters(), before, strict=True):
        assert distance(p.detach() - start, expected.detach() - start) < 1e-5
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_private_steps_of_a_converted_network(mode):
    model = small()
    start = copy.deepcopy(model.state_dict())
    made = private(model, torch.randn(12, 3, 8, 8), mode=mode, noise=1.0, bound=1.0, poisson=True)
    held, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    sizes = []
    for images, target in (*loader, (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))):
        optimizer.zero_grad()
        criterion(held(images), target).backward()
        optimizer.step()
        sizes.append(len(images))
    assert sizes[-1] == 0, "Poisson sampling may draw nobody"
    for name, p in held.to_standard_module().state_dict().items():
        assert p.isfinite().all()
        assert not torch.equal(p, start[name])


def test_functorch_mode_without_dropout_gives_the_same():
    layer, x = make("groups", 2, dropout=0.0).double(), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    ours, expected = samples_of(layer, x, force_functorch=True)
    for key, sample in ours.items():
        assert distance(sample, expected[key]) < 1e-12


def test_functorch_mode_with_dropout_is_refused():
    model = GradSampleModule(privacy.prepare(make("plain", 2)), force_functorch=True)
    with pytest.raises(KNPortError, match="use grad_sample_mode='hooks'"):
        model(torch.randn(2, 4, 6, 6))


class Scaled(nn.Module):
    """A block with a parameter of its own, as ConvNeXt's."""

    def __init__(self, dropout):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4, 1, 1))
        self.conv = knport.KNConv2d(4, 4, 3, padding=1, dropout=dropout)

    def forward(self, x):
        return self.gain * self.conv(x)


def test_blocks_that_opacus_runs_twice():
    ours, expected = samples_of(nn.Sequential(Scaled(0.0)).double(), torch.randn(3, 4, 6, 6, dtype=torch.float64))
    for key, sample in ours.items():
        assert distance(sample, expected[key]) < 1e-12
    (problem,) = privacy.validate(nn.Sequential(Scaled(0.1)))
    assert problem.path == "0"
    assert "Scaled holds parameters itself (gain)" in str(problem)
    assert "set dropout=0" in str(problem)


def test_everything_that_mixes_samples_is_named():
    model = nn.ModuleDict(
        {
            "plain": nn.BatchNorm2d(4),
            "fused": nn.Sequential(timm.layers.BatchNormAct2d(4)),
            "bare": nn.BatchNorm1d(4, affine=False),
            "synced": nn.SyncBatchNorm(4),
            "evo": timm.layers.EvoNorm2dB0(4),
            "instance": nn.InstanceNorm2d(4, track_running_stats=True),
            "good": nn.Sequential(nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), timm.layers.FrozenBatchNormAct2d(4)),
            "ours": nn.Sequential(knport.KNConv2d(4, 4, 3), knport.KernelNorm2d()),
        }
    )
    problems = {problem.path: str(problem) for problem in privacy.validate(model)}
    assert list(problems) == ["plain", "fused.0", "bare", "synced", "evo", "instance"]
    assert all("knport.convert(model)" in text for path, text in problems.items() if path != "instance")
    assert "track_running_stats=False" in problems["instance"]
    with pytest.raises(KNPortError, match=r"6 modules stand against[\s\S]*fused.0: BatchNormAct2d"):
        privacy.prepare(model)
    assert model["ours"][0].statistics_hook is None, "a refused model must stay as it was"


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_50", "test_efficientnet"])
def test_converted_networks_of_timm_validate(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [problem.path for problem in privacy.validate(model)] == norms
    assert len(norms) > 5


def test_opacus_validator():
    privacy.register()
    unprepared, fused = nn.Sequential(make("plain", 2)), nn.Sequential(timm.layers.BatchNormAct2d(4))
    assert "knport.privacy.prepare" in str(ModuleValidator.validate(unprepared))
    assert "knport.convert" in str(ModuleValidator.validate(fused))
    assert ModuleValidator.validate(small()) == []


def test_computed_weights_and_other_forwards_are_refused():
    class Shifted(knport.KNConv2d):
        def forward(self, x):
            return super().forward(x) * 2

    computed = parametrizations.weight_norm(make("plain", 2))
    assert "computed" in str(privacy.validate(computed)[0])
    assert "forward of its own" in str(privacy.validate(Shifted(4, 4, 3))[0])
    assert "computed" in str(privacy.validate(parametrizations.weight_norm(knport.KNLinear(4, 4)))[0])


def test_a_sub_class_with_our_forward_is_a_kn_layer():
    class Named(knport.KNConv2d):
        pass

    ours, expected = samples_of(Named(4, 4, 3).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64))
    assert distance(ours["weight"], expected["weight"]) < 1e-12


def test_mistakes_are_told():
    privacy.register()
    held = GradSampleModule(make("plain", 2))
    with pytest.raises(KNPortError, match=r"call knport.privacy.prepare\(model\) before"):
        held(torch.randn(2, 4, 6, 6)).sum().backward()
    with pytest.raises(AlreadyWrapped, match="before make_private"):
        privacy.prepare(held)
    held = GradSampleModule(privacy.prepare(make("plain", 2)))
    with pytest.raises(KNPortError, match="batch dimension"):
        held(torch.randn(4, 6, 6)).sum().backward()
    held = GradSampleModule(privacy.prepare(knport.KNLinear(4, 4, norm_window=3)))
    with pytest.raises(KNPortError, match="batch dimension"):
        held(torch.randn(9, 4)).sum().backward()


class EditsInPlace(nn.Module):
    """As the blocks of torchvision's ResNets, which plain Opacus cannot run."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = knport.KNConv2d(4, 4, 3, padding=1), knport.KNConv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.conv2(self.act(self.conv1(x)))
        y += x
        return self.act(y)


def test_edits_in_place():
    ours, expected = samples_of(EditsInPlace().double(), torch.randn(2, 4, 6, 6, dtype=torch.float64))
    for key, sample in ours.items():
        assert distance(sample, expected[key]) < 1e-12


def test_a_prepared_model_is_otherwise_what_it_was():
    layer, x = make("plain", 2), torch.randn(2, 4, 6, 6)
    prepared = privacy.prepare(copy.deepcopy(layer))
    for form in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        torch.manual_seed(2)
        y = form(x)
        torch.manual_seed(2)
        assert torch.equal(y, layer(x))
        assert "_recorded" not in vars(form)
    assert "statistics_hook" not in vars(layer)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    assert compiled(x).shape == y.shape
    with torch.no_grad():
        held = GradSampleModule(prepared)
        held.eval()(x)
    pickle.loads(pickle.dumps(prepared))


def test_importing_knport_does_not_import_opacus():
    code = (
        "import sys, knport, knport.privacy, torch\n"
        "assert not any(name.startswith('opacus') for name in sys.modules)\n"
        "assert knport.privacy.validate(torch.nn.BatchNorm1d(2))\n"
        "sys.modules['opacus'] = None\n"
        "try: knport.privacy.register()\n"
        "except ImportError as error: assert 'knport[privacy]' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
