"""KNLinear against its definition, against LayerNorm and a linear layer, and through what a layer must survive."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import knport
from knport import functional
from knport.errors import KNPortError

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# shape of the input, window, prefix tokens, grid size: one row per way in which tokens may lie
LAYOUTS = {
    "sequence": ((2, 12, 5), 3, 0, (3, 4)),
    "square sequence behind a class token": ((2, 10, 5), 3, 1, None),
    "two prefix tokens, even window": ((2, 14, 5), (2, 4), 2, (3, 4)),
    "one image": ((13, 5), 3, 1, (3, 4)),
    "map": ((2, 3, 4, 5), 3, 0, None),
    "flat window": ((2, 3, 4, 5), (1, 3), 0, None),
    "window beyond the grid": ((2, 2, 2, 5), 5, 0, None),
    "window of one": ((2, 12, 5), 1, 1, None),
    "vector": ((5,), 1, 0, None),
    "windows of windows": ((2, 3, 2, 2, 5), 1, 0, None),
}


def definition(x, weight, bias, window, prefix, grid_size, dropout=0.0, eps=1e-5):
    """Every token by the mean and variance of the entries around it, one token at a time."""
    features = x.shape[-1]
    top, left = (size - 1 for size in (window if isinstance(window, tuple) else (window, window)))
    if not top and not left:
        units = x.reshape(-1, 1, features)
    else:
        images = x if x.dim() > 2 else x[None]
        grid_size = grid_size or (images.shape[1:3] if x.dim() == 4 else (int((images.shape[1] - prefix) ** 0.5),) * 2)
        tokens = images.reshape(len(images), -1, features)
        units = []
        for image in tokens:
            units += [token[None] for token in image[:prefix]]
            grid = F.pad(image[prefix:].view(*grid_size, features), (0, 0, left // 2, left - left // 2, top // 2, top))
            for i in range(grid_size[0]):
                for j in range(grid_size[1]):
                    units.append(grid[i : i + top + 1, j : j + left + 1].reshape(-1, features))
    rows = []
    for token, unit in zip(x.reshape(-1, features), units, strict=True):
        mean, var, n = unit.mean(), unit.var(correction=0), unit.numel()
        if dropout:  # expected
            second = unit.square().mean()
            var = second / (1 - dropout) - mean**2 - dropout * second / ((1 - dropout) * n)
        rows.append((token - mean) / (var + eps).sqrt() @ weight.T + bias)
    return torch.stack(rows).view(*x.shape[:-1], -1)


def arguments(layout, dtype=torch.float64):
    shape, window, prefix, grid_size = LAYOUTS[layout]
    inputs = [torch.randn(*s, dtype=dtype, requires_grad=True) for s in (shape, (7, 5), (7,))]
    return inputs, {"norm_window": window, "prefix_tokens": prefix, "grid_size": grid_size}


def layer_of(layout, **options):
    (x, _, _), where = arguments(layout, torch.float32)
    return knport.KNLinear(5, 7, **where, **options), x


@pytest.mark.parametrize("form, dropout", [("moments", 0.0), ("expected", 0.3), ("moments", 0.3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_on_a_cpu_is_one_operation_with_the_values_of_float64(layout, form, dropout):
    shape, *where = LAYOUTS[layout]
    where = dict(zip(("norm_window", "prefix_tokens", "grid_size"), where, strict=True))
    wide = [torch.randn(*s, 65, dtype=torch.float64, requires_grad=True) for s in (shape[:-1], (7,))]
    wide.append(torch.randn(7, dtype=torch.float64, requires_grad=True))
    narrow = [t.detach().float().requires_grad_() for t in wide]
    results = []
    for inputs in (narrow, wide):
        torch.manual_seed(4)
        y = functional.kn_linear(*inputs, **where, dropout=dropout, dropout_form=form)
        results.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, 7)).square().sum(), inputs)])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    assert _operations(results[0][0].grad_fn) >= {"_KNConvBackward"} > _operations(results[1][0].grad_fn)


def _operations(node) -> set[str]:
    if node is None:
        return set()
    return {node.name()}.union(*(_operations(before) for before, _ in node.next_functions)) & {"_KNConvBackward"}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_the_definition(layout, dropout):
    inputs, where = arguments(layout)
    ours = functional.kn_linear(*inputs, **where, dropout=dropout, dropout_form="expected")
    expected = definition(*inputs, *where.values(), dropout=dropout)
    torch.testing.assert_close(ours, expected, **EXACT)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (ours, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("shape", [(7, 16), (2, 11, 16), (2, 3, 5, 16), (2, 3, 4, 5, 16)], ids=str)
def test_a_window_of_one_token_is_layer_norm(shape):
    layer = knport.KNLinear(16, 9, dropout=0.0).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = F.linear(F.layer_norm(x, (16,)), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["moments", "shared", "unit"])
@pytest.mark.parametrize("window", [1, 3])
def test_is_a_convolution_of_one_token_with_the_statistics_of_the_window(window, form):
    x, weight = torch.randn(2, 4, 6, 70, dtype=torch.float64), torch.randn(5, 70, dtype=torch.float64)
    drawn = []
    for run, arguments in ((functional.kn_linear, (x, weight)), (conv, (x, weight[..., None, None]))):
        torch.manual_seed(3)
        drawn.append(run(*arguments, norm_window=window, dropout=0.3, dropout_form=form))
    torch.testing.assert_close(*drawn, **EXACT)
    assert (drawn[0] - functional.kn_linear(x, weight, norm_window=window)).abs().max() > 0.01


def conv(x, weight, norm_window, **options):
    window = None if norm_window == 1 else norm_window
    return functional.kn_conv(x.permute(0, 3, 1, 2), weight, norm_window=window, **options).permute(0, 2, 3, 1)


@pytest.mark.parametrize("features", [5, 80])
def test_dropout_acts_in_training_only_and_has_the_scale_of_evaluation(features):
    layer = knport.KNLinear(features, 32, norm_window=3, prefix_tokens=1, dropout=0.25)
    x = torch.randn(4, 1 + 36, features).relu()
    training = torch.stack([layer(x) for _ in range(30)])
    assert not torch.equal(training[0], training[1])
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert layer(x).std().item() == pytest.approx(training.std().item(), rel=0.05)
    layer.eval_stats = "plain"
    assert torch.equal(layer(x), functional.kn_linear(x, layer.weight, layer.bias, norm_window=3, prefix_tokens=1))


def test_the_class_token_and_distant_tokens_are_not_mixed_in():
    layer = knport.KNLinear(5, 7, norm_window=3, prefix_tokens=1, dropout=0.0).double()
    x = torch.randn(2, 1 + 25, 5, dtype=torch.float64)
    changed = x.clone()
    changed[:, -1] += 1  # the last corner of the grid
    moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 1e-9
    grid = torch.zeros(5, 5, dtype=torch.bool)
    grid[3:, 3:] = True
    assert torch.equal(moved, torch.cat([torch.tensor([False]), grid.flatten()]))
    changed = x.clone()
    changed[:, 0] += torch.arange(5)
    assert ((layer(changed) - layer(x)).abs().amax((0, 2)) > 1e-9).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e3])
def test_a_constant_token_yields_the_bias(value, dtype):
    layer = knport.KNLinear(96, 8, dropout=0.05).eval()
    torch.nn.init.normal_(layer.bias)
    x = torch.full((2, 3, 96), value)
    bias = layer.bias.expand(2, 3, 8)
    mixed = layer.to(dtype)(x.to(dtype)).float()
    torch.testing.assert_close(mixed, bias, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("window, offset", [(1, 1e3), (3, 30)])  # zeros around the grid are 1e3 away, too
def test_large_means(window, offset):
    x = (torch.randn(2, 16, 64, dtype=torch.float64) + offset).float()
    weight = torch.randn(8, 64) / 8
    exact = functional.kn_linear(x.double(), weight.double(), norm_window=window)
    ours = functional.kn_linear(x, weight, norm_window=window)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(layout):
    layer, x = layer_of(layout)
    layer.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["square sequence behind a class token", "map", "window of one"])
def test_double_backward(layout):
    inputs, where = arguments(layout)

    def run(x, weight, bias):
        return functional.kn_linear(x[:1], weight, bias, **where, dropout=0.1, dropout_form="expected")

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("layout", ["sequence", "square sequence behind a class token", "map", "window of one"])
def test_per_sample_gradients_by_vmap(layout):
    layer, x = layer_of(layout, dropout=0.2)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, x[None]).pow(3).sum()

    layer.eval()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        for name, gradient in torch.func.grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], gradient, rtol=1e-4, atol=1e-4)
    layer.train()
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", ["square sequence behind a class token", "map", "window of one"])
def test_compile_without_a_graph_break(layout, training):
    torch.compiler.reset()
    layer, x = layer_of(layout, dropout=0.2)
    layer.train(training)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    if training:
        assert gradient.isfinite().all()
        assert not torch.equal(compiled(x), compiled(x))
    else:
        torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])


@pytest.mark.parametrize("layout", ["square sequence behind a class token", "map", "window of one"])
def test_export(layout):
    layer, x = layer_of(layout)
    layer.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(layer, (x.detach(),), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(5, *x.shape[1:])
    torch.testing.assert_close(exported(more), layer(more))


@pytest.mark.parametrize("layout", ["square sequence behind a class token", "map", "window of one"])
def test_onnx(layout, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = layer_of(layout)
    layer.eval()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x.detach(),), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.detach().numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["sequence", "map", "two prefix tokens, even window", "window of one"])
def test_batch_of_nothing_and_images_apart(layout):
    layer, x = layer_of(layout, dropout=0.0)
    assert layer(x[:0]).shape == (0, *x.shape[1:-1], 7)
    layer(x[:0]).sum().backward()
    for i in range(len(x)):
        torch.testing.assert_close(layer(x)[i : i + 1], layer(x[i : i + 1]))


def test_copies_and_checkpoints():
    layer, x = layer_of("two prefix tokens, even window")
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    plain = torch.nn.Linear(5, 7)
    plain.load_state_dict(layer.state_dict())
    assert isinstance(layer, torch.nn.Linear)
    with torch.device("meta"):
        assert layer_of("map")[0](torch.empty(2, 3, 4, 5)).device.type == "meta"


def test_no_full_size_copy_is_kept_or_made():
    """Kept for the backward pass: the input, the product, and one-feature maps; the output lies as tokens do."""
    x = torch.randn(2, 1 + 400, 64, requires_grad=True)
    layer = knport.KNLinear(64, 64, norm_window=3, prefix_tokens=1, dropout=0.05)
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    assert y.is_contiguous()
    assert sum(sizes.values()) < 2.6 * x.untyped_storage().nbytes() + 3 * 64 * 64 * 4


def test_the_grid_may_come_with_each_call():
    layer = knport.KNLinear(5, 7, norm_window=3, dropout=0.0)
    x = torch.randn(2, 3, 4, 5)
    expected = layer(x)
    torch.testing.assert_close(layer(x.flatten(1, 2), grid_size=(3, 4)).view_as(expected), expected)
    layer.grid_size = (3, 4)
    torch.testing.assert_close(layer(x.flatten(1, 2)).view_as(expected), expected)


def test_mistakes_are_told():
    layer = knport.KNLinear(5, 7, norm_window=3, prefix_tokens=1)
    with pytest.raises(KNPortError, match="expected 5 features in the last dimension"):
        layer(torch.randn(2, 5, 4))
    with pytest.raises(KNPortError, match=r"12 tokens, 1 of them .* no grid of 3 x 3; give grid_size"):
        layer(torch.randn(2, 12, 5))
    with pytest.raises(KNPortError, match="needs a sequence"):
        layer(torch.randn(2, 3, 4, 5))
    with pytest.raises(KNPortError, match="norm_window=0"):
        knport.KNLinear(5, 7, norm_window=0)
    with pytest.raises(KNPortError, match="prefix_tokens=-1"):
        knport.KNLinear(5, 7, prefix_tokens=-1)
    assert "norm_window=(3, 3)" in repr(layer) and "prefix_tokens=1" in repr(layer)
