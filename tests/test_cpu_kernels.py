"""KNConv and KernelNorm as one operation each on CPUs: values and gradients in float32 against float64."""

import math

import pytest
import torch
from test_functional import GEOMETRIES, arguments

from knport import functional
from knport.geometry import Box, pad
from knport.kernels import cpu, cpu_box
from knport.kernels.cpu_units import Units, statistics

ZERO_PADDED = [name for name, geometry in GEOMETRIES.items() if geometry[7] == "zeros"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def units_of(x, weight, p):
    box = Box(tuple(weight.shape[2:]), (1, 1), ((0, 0), (0, 0)), (1, 1))
    return Units(box, box, 1e-5, p, "moments")


def gradients(y, inputs, seed=1):
    torch.manual_seed(seed)
    return torch.autograd.grad((y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum(), inputs)


def is_fused(y):
    return y.grad_fn.name() in ("_KNConvBackward", "_KernelNormBackward")


def assert_same(inputs, form, definition, **tolerance):
    """`form` in float32 against `definition` in float64, with the same random numbers."""
    narrow = [t.detach().float().requires_grad_() for t in inputs]
    torch.manual_seed(0)
    y = form(*narrow)
    assert is_fused(y)
    torch.manual_seed(0)
    wide = definition(*inputs)
    torch.testing.assert_close(y.double(), wide, **tolerance)
    for ours, theirs in zip(gradients(y, narrow), gradients(wide, inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("geometry", ZERO_PADDED)
def test_is_the_definition(geometry, ndim):
    inputs, settings = arguments(geometry, ndim)
    assert_same(
        inputs,
        lambda *tensors: functional.kn_conv(*tensors, **settings),
        lambda *tensors: functional.naive.kn_conv(*tensors, **settings),
        **CLOSE,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form, p", [("expected", 0.1), ("moments", 0.1), ("moments", 0.5)])
@pytest.mark.parametrize(
    "geometry", ["plain", "strided, one side padded", "groups", "pointwise, wider window", "dilated"]
)
def test_dropout_is_that_of_the_formula(geometry, form, p, layout):
    """The same draw from the same seed, in float32 by one operation and in float64 by many."""
    (x, weight, bias), settings = arguments(geometry, 2)
    times = 16  # enough channels for a Gaussian
    x = x.detach().relu().repeat(1, times, 1, 1)
    x[0, :, :3] = 0  # a flat region
    x = x.to(memory_format=LAYOUTS[layout]).requires_grad_()
    weight = weight.detach().repeat(1, times, 1, 1).div(times).requires_grad_()

    def layer(*tensors):
        return functional.kn_conv(*tensors, **settings, dropout=p, dropout_form=form)

    assert_same((x, weight, bias), layer, layer, **CLOSE)


TILINGS = [(1, 0), (2, 0), (3, ((1, 2), (0, 1))), ((2, 3), 0), ((1, 2), ((0, 0), (1, 1)))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form, p", [("moments", 0.0), ("expected", 0.1), ("moments", 0.2)])
@pytest.mark.parametrize("kernel_size, padding", TILINGS, ids=str)
def test_kernel_norm_is_its_definition(kernel_size, padding, form, p, layout):
    x = torch.randn(2, 64, 7, 8, dtype=torch.float64).add(0.5).relu()
    if p:  # a flat region, which by the bare definition would pass 1 / sqrt(eps)
        x[0, :, :2] = 0
    x = x.to(memory_format=LAYOUTS[layout]).requires_grad_()

    def layer(x):
        how = {"dropout": p, "dropout_form": form}
        return functional.kernel_norm(x, kernel_size, kernel_size, padding, **how)

    def definition(x):
        return layer(x) if p else functional.naive.kernel_norm(x, kernel_size, kernel_size, padding)

    assert_same((x,), layer, definition, **CLOSE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.detach().float().requires_grad_())
    assert sum(t.numel() > 2 * 9 * 10 for t in kept) == 1  # x, and maps


def test_double_backward_of_kernel_norm():
    x = torch.randn(2, 64, 4, 5, dtype=torch.float64)

    def penalty(x):
        x = x.requires_grad_()
        torch.manual_seed(0)
        y = functional.kernel_norm(x, 2, 2, dropout=0.1)
        (slope,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    ours, theirs = penalty(x.float()), penalty(x)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_layouts_agree_and_stay():
    (x, weight, bias), settings = arguments("even kernel, one side padded", 2, torch.float32)
    plain = functional.kn_conv(x, weight, bias, **settings)
    last = functional.kn_conv(x.to(memory_format=torch.channels_last), weight, bias, **settings)
    assert last.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()
    torch.testing.assert_close(last, plain)
    for a, b in zip(gradients(last, (x, weight, bias)), gradients(plain, (x, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("images", [False, True], ids=["features", "images"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_gradient_in_another_order_or_expanded(p, images):
    (x, weight, bias), settings = arguments("plain", 2, torch.float32)
    x, weight = x.repeat(1, 13, 1, 1), weight.detach().repeat(1, 13, 1, 1).requires_grad_()
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_(not images)
    wanted = (weight, bias) if images else (x, weight, bias)
    y = functional.kn_conv(x, weight, bias, **settings, dropout=p)
    assert is_fused(y)
    cotangent = torch.randn(1, 7, 1, 1)
    ours = torch.autograd.grad(y, wanted, cotangent.expand_as(y), retain_graph=True)
    theirs = torch.autograd.grad(y, wanted, cotangent.repeat(2, 1, *y.shape[2:]))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("mean, n_out, centred", [(0, 2, True), (0, 40, False), (1e3, 40, True)])
def test_filters_are_centred_where_that_is_less_or_needed(mean, n_out, centred, p):
    x = torch.randn(2, 16, 6, 6) + mean
    weight = torch.randn(n_out, 16, 3, 3) / 12
    how = units_of(x, weight, p)
    assert statistics(x, how, weight.numel()).centred is (centred and (p == 0 or mean > 0))


@pytest.mark.parametrize("wanted", range(3), ids=["x", "weight", "bias"])
def test_one_gradient_alone(wanted):
    inputs, settings = arguments("strided, one side padded", 2, torch.float32)
    every = gradients(functional.kn_conv(*inputs, **settings), inputs)
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    torch.testing.assert_close(gradients(functional.kn_conv(*alone, **settings), alone[wanted])[0], every[wanted])


@pytest.mark.parametrize("form, p", [("moments", 0.0), ("expected", 0.1), ("moments", 0.1)])
def test_double_backward_is_that_of_the_formula(form, p):
    (x, weight, bias), settings = arguments("plain", 2)
    x, weight = x.detach().repeat(1, 4, 1, 1).requires_grad_(), weight.detach().repeat(1, 4, 1, 1).requires_grad_()
    inputs = (x, weight, bias)

    def penalty(*tensors):
        torch.manual_seed(0)
        y = functional.kn_conv(*tensors, **settings, dropout=p, dropout_form=form)
        slopes = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(s.square().sum() for s in slopes), tensors)

    narrow = [t.detach().float().requires_grad_() for t in inputs]
    for ours, theirs in zip(penalty(*narrow), penalty(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("scale, offset", [(1, 0), (1, 1e3), (1e-2, 0.0), (1e3, 0)])
def test_large_means_and_other_scales(scale, offset):
    x = (torch.randn(2, 16, 9, 9, dtype=torch.float64) * scale + offset).float().double().requires_grad_()
    weight = (torch.randn(8, 16, 3, 3, dtype=torch.float64) / 12).requires_grad_()
    y = functional.kn_conv(x.float(), weight.float())
    exact = functional.naive.kn_conv(x, weight)
    assert is_fused(y)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-3)
    ours, theirs = gradients(y, (x, weight)), gradients(exact, (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-3 * b.abs().max()


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e3])
def test_a_constant_unit_yields_the_bias_and_passes_no_gradient(value):
    x = torch.full((2, 8, 6, 6), value, requires_grad=True)
    weight, bias = torch.randn(4, 8, 3, 3), torch.randn(4)
    y = functional.kn_conv(x, weight, bias)
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y), rtol=0, atol=1e-4)
    (slope,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert slope.abs().max() < 1


@pytest.mark.parametrize("form, p", [("moments", 0.0), ("expected", 0.1), ("moments", 0.1)])
def test_inference_is_training_without_a_graph(form, p):
    (x, weight, bias), settings = arguments("groups", 2, torch.float32)
    x = x.detach().repeat(1, 16, 1, 1)
    weight, before = weight.detach().repeat(1, 16, 1, 1).requires_grad_(), x.clone()

    def layer():
        torch.manual_seed(0)
        return functional.kn_conv(x, weight, bias, **settings, dropout=p, dropout_form=form)

    with torch.no_grad():
        quiet = layer()
    torch.testing.assert_close(quiet, layer())
    assert quiet.grad_fn is None and torch.equal(x, before)


@pytest.mark.parametrize("images", [False, True], ids=["features", "images"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_add_up(layout, images, monkeypatch):
    """Images need no gradient: there the whole backward pass goes through parts."""
    (x, weight, bias), settings = arguments("plain", 2, torch.float32)
    x = x.detach().repeat(3, 13, 1, 1)[:5].to(memory_format=LAYOUTS[layout]).requires_grad_(not images)
    weight = weight.detach().repeat(1, 13, 1, 1).requires_grad_(images)
    results = []
    for size in (2**30, 2 * x[0].numel() * 4, 1):  # at once, two images at a time with one left over, one at a time
        monkeypatch.setattr(cpu, "WHOLE", size)
        monkeypatch.setattr(cpu, "PART", size)
        torch.manual_seed(0)
        y = functional.kn_conv(x, weight, bias, **settings, dropout=0.1)
        results.append((y, *gradients(y, [weight, bias] if images else [x])))
    for other in results[1:]:
        torch.testing.assert_close(other[0], results[0][0])
        for ours, theirs in zip(other[1:], results[0][1:], strict=True):
            scale = theirs.abs().max().item() if images else 1.0  # sums over all images, in another order
            torch.testing.assert_close(ours / scale, theirs / scale)


@pytest.mark.parametrize("images", [False, True], ids=["features", "images"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_two_full_size_tensors_are_kept_and_maps(p, images):
    """x and, unless x is images and needs no gradient, the convolution; everything else has one channel or is a
    parameter."""
    x, weight, bias = torch.randn(2, 16, 9, 9), torch.randn(24, 16, 3, 3), torch.randn(24)
    kept = []
    x.requires_grad_(not images), weight.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = functional.kn_conv(x, weight, bias, padding=((1, 1), (2, 0)), dropout=p)
    assert is_fused(y)
    kept = list({t.data_ptr(): t for t in kept}.values())
    full = [t for t in kept if t.numel() > 2 * 9 * 9 and t is not weight]
    assert sorted(t.shape[1] for t in full) == ([16] if images else [16, 24])
    maps = [t for t in kept if t.shape[:2] == (2, 1)]
    assert len(maps) <= (8 if p else 2) and len(kept) <= len(maps) + 5  # weight, bias and the sums of the filters


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_memory_is_used_again_where_the_graph_is_not_kept(p, layout):
    x = torch.randn(2, 16, 9, 9).to(memory_format=LAYOUTS[layout]).requires_grad_()
    weight, bias = torch.randn(24, 16, 3, 3, requires_grad=True), torch.randn(24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = functional.kn_conv(x, weight, bias, padding=1, dropout=p)
    assert is_fused(y)
    (convolved,) = (t for t in saved if t.shape == y.shape)
    before, grad = convolved.clone(), torch.randn_like(y)
    first = torch.autograd.grad(y, (x, weight, bias), grad, retain_graph=True)
    assert torch.equal(convolved, before)
    second = torch.autograd.grad(y, (x, weight, bias), grad)
    assert not torch.equal(convolved, before)
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("size", [(23, 18), (5, 7), (150, 6)], ids=["sums", "a product", "long"])
@pytest.mark.parametrize(
    "k, stride, dilation, padding", [(3, 1, 1, (1, 1)), (2, 2, 1, (1, 0)), (3, 2, 2, (0, 3)), (1, 1, 1, (0, 0))]
)
def test_box_is_a_mean_and_its_transpose(k, stride, dilation, padding, size):
    box = Box((k, k), (stride, stride), (padding, padding[::-1]), (dilation, dilation))
    maps = torch.randn(2, 3, *size, dtype=torch.float64)
    ones = torch.full((1, 1, k, k), 1 / math.prod(box.kernel_size), dtype=torch.float64)
    mean = torch.conv2d(pad(maps, box.padding).flatten(0, 1)[:, None], ones, None, stride, 0, dilation)
    ours = box.mean(maps)
    torch.testing.assert_close(ours, mean.view_as(ours))
    cotangent = torch.randn_like(ours)
    back = box.mean_backward(cotangent, maps.shape[2:])
    assert torch.isclose((ours * cotangent).sum(), (back * maps).sum()) and back.shape == maps.shape
    for summed in (1, 5):  # channels that the maps are sums over
        narrow = cpu_box.box_mean(box, summed * maps.float(), summed)
        torch.testing.assert_close(narrow, ours.float())
        narrow = cpu_box.box_mean_backward(box, summed * cotangent.float(), maps.shape[2:], summed)
        torch.testing.assert_close(narrow, back.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "size, k, stride, padding, dilation",
    [
        ((290,), (3,), (2,), ((1, 0),), (1,)),
        ((39, 43), (3, 2), (2, 3), ((1, 2), (0, 1)), (2, 1)),
        ((37, 36), (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)),
        ((22, 22), (5, 5), (1, 1), ((-1, -2), (3, -1)), (1, 1)),  # a window smaller than the kernel crops
        ((17, 8, 19), (2, 3, 2), (1, 2, 3), ((1, 1), (0, 2), (5, 0)), (1, 2, 1)),
    ],
)
def test_boxes_of_any_geometry(size, k, stride, padding, dilation, dtype):
    box = Box(k, stride, padding, dilation)
    maps = torch.randn(3, 2, 1, *size, dtype=dtype)
    mean = cpu_box.box_mean(box, 4 * maps, 4)
    exact = box.mean(maps.flatten(0, 1).double())
    torch.testing.assert_close(mean.flatten(0, 1).double(), exact, rtol=0, atol=1e-6)
    cotangent = torch.randn_like(mean)
    back = cpu_box.box_mean_backward(box, 4 * cotangent, size, 4)
    exact = box.mean_backward(cotangent.flatten(0, 1).double(), size)
    torch.testing.assert_close(back.flatten(0, 1).double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("channels", [1, 3, 16, 37])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_over_channels(layout, channels, order):
    x = torch.randn(2, channels, 5, 6).to(memory_format=LAYOUTS[layout])
    sums = cpu.channel_sums(x, order)
    exact = torch.stack([x.double().pow(j).sum(1, keepdim=True) for j in range(1, order + 1)])
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_window_that_is_not_flat_in_a_kernel_of_large_mean():
    """Which spread is rounding depends on the mean under the kernel, whatever the window."""
    x = torch.full((1, 64, 3, 3), 1000.0)
    x[:, :, 1, 1] = 0.01 * torch.randn(64)
    weight = torch.randn(4, 64, 3, 3)
    settings = {"norm_window": 1}
    ours = functional.kn_conv(x.requires_grad_(), weight, **settings)
    assert is_fused(ours)
    formula = torch.func.vmap(lambda x: functional.kn_conv(x, weight, **settings))(x[None].detach())[0]
    torch.testing.assert_close(ours, formula, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_outputs_may_be_edited_in_place(layout, dropout):
    """As networks do: y += shortcut, ReLU(inplace=True)."""
    x = torch.randn(2, 8, 5, 5).to(memory_format=LAYOUTS[layout]).requires_grad_()
    weight = torch.randn(8, 8, 3, 3)
    for function in (
        lambda: functional.kn_conv(x, weight, padding=1, dropout=dropout),
        lambda: functional.kernel_norm(x),
    ):
        y, other = function(), function()
        assert is_fused(y)
        y += 1
        assert torch.autograd.grad(y.relu_().sum(), x)[0].isfinite().all()
        if not dropout:
            torch.testing.assert_close(y, (other + 1).relu())


@pytest.mark.parametrize("reason", ["float64", "padding mode", "mask", "few entries", "autocast", "transform"])
def test_what_it_does_not_take_goes_by_the_formula(reason):
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(4, 8, 3, 3, requires_grad=True)
    if reason == "float64":
        y = functional.kn_conv(x.double(), weight.double())
    elif reason == "padding mode":
        y = functional.kn_conv(x, weight, padding=1, padding_mode="reflect")
    elif reason == "mask":
        y = functional.kn_conv(x, weight, dropout=0.1, dropout_form="unit")
    elif reason == "few entries":
        y = functional.kn_conv(x[:, :3], weight[:, :3], dropout=0.1)
    elif reason == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = functional.kn_conv(x, weight)
    else:
        y = torch.vmap(functional.kn_conv, in_dims=(0, None))(x[None], weight)
    assert not is_fused(y)
